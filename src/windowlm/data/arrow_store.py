"""Arrow stores of `datasets`: written once by one process, read by all through the memory map.

`Dataset.from_generator` with a fingerprint locks the store while it is written and renames it into place when
it is whole, so an interruption leaves nothing that is taken for data, and a second process waits and reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from windowlm.data.config import DataConfig
from windowlm.data.errors import DataError

_ROWS_A_BATCH = 256  # pieces of some 16 Ki characters: 4 MiB wait in memory while writing


def cache_folder(data: DataConfig) -> Path:
    """Folder of prepared data: `data.cache_dir`, else `data/` of the clone or of the working folder."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    clone = Path(__file__).resolve().parents[3]
    return (clone if (clone / "pyproject.toml").is_file() else Path.cwd()) / "data"


def holds_stores(folder: Path) -> bool:
    """Whether it is a folder of prepared data."""
    return any(folder.glob("*/generator/*"))


def build_or_open(
    folder: Path, key: str, features: datasets.Features, rows: Callable[[], Iterator[dict[str, Any]]]
) -> datasets.Dataset:
    """Open the store of this key, written first from `rows` where there is none.

    Args:
        folder: Folder of all stores.
        key: Hash of all that decides the rows.
        features: Names and types of the columns.
        rows: Gives the rows.

    Raises:
        DataError: As raised while the rows were made, or the folder cannot be written.
    """
    with quiet_datasets():
        try:
            return datasets.Dataset.from_generator(
                rows,
                features=features,
                cache_dir=str(folder),
                fingerprint=key,
                writer_batch_size=_ROWS_A_BATCH,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, DataError):
                raise error.__cause__ from None
            if isinstance(error.__cause__, OSError):
                raise _not_writable(folder, error.__cause__) from error
            raise
        except OSError as error:
            raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"data.cache_dir: {str(folder)!r} cannot be written: {error}; set another data.cache_dir"
    )


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from drawing progress bars beside ours."""
    enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
