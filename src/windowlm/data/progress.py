"""A progress bar on standard error, for people only: nothing is drawn into files and pipes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how many bytes of a total are done.

    Args:
        description: What is being done.
        total: Bytes, or None where they are unknown.

    Yields:
        A function that is told the bytes done since its last call. The bar appears at the first call.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task(description, total=total, visible=False)
        yield lambda done: progress.update(task, advance=done, visible=True)
