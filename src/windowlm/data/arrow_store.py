"""Arrow stores of `datasets`: written once by one process, read by all through the memory map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from windowlm.data.config import DataConfig
from windowlm.data.errors import DataError
from windowlm.data.kept_folder import RECORD, make_once

_ROWS_A_BATCH = 256  # pieces of some 16 Ki characters: 4 MiB wait in memory while writing


def cache_folder(data: DataConfig) -> Path:
    """Folder of prepared data: `data.cache_dir`, else `data/` of the clone or of the working folder."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    clone = Path(__file__).resolve().parents[3]
    return (clone if (clone / "pyproject.toml").is_file() else Path.cwd()) / "data"


def filled_cache(cache_dir: str | None) -> str | None:
    """The cache folder that a run names, if prepared data lie there.

    None otherwise: a run that comes from others could name any place to be written to.
    """
    filled = cache_dir is not None and any(Path(cache_dir).expanduser().glob(f"*/*/{RECORD}"))
    return cache_dir if filled else None


def build_or_open(
    folder: Path, key: str, features: datasets.Features, rows: Callable[[], Iterator[dict[str, Any]]]
) -> datasets.Dataset:
    """Open the store of this key, written first from `rows` where there is none or it is damaged.

    Args:
        folder: Folder of all stores.
        key: Hash of all that decides the rows.
        features: Names and types of the columns.
        rows: Gives the rows.

    Raises:
        DataError: As raised while the rows were made, or they cannot be read or stored, or the folder cannot
            be written.
    """
    with quiet_datasets():
        files = make_once(folder / key, lambda place: _write(place, key, features, rows))
        try:
            parts = [
                datasets.Dataset.from_file(str(file), split=datasets.Split.TRAIN)
                for file in files
                if file.suffix == ".arrow"
            ]
            return datasets.concatenate_datasets(parts)
        except (pa.ArrowException, OSError) as error:  # of a store that is too large to be hashed each time
            raise DataError(
                f"data.cache_dir: {str(folder / key)!r} is damaged: {error}; remove it, and it is made anew"
            ) from error


def _write(
    place: Path, key: str, features: datasets.Features, rows: Callable[[], Iterator[dict[str, Any]]]
) -> None:
    try:
        datasets.Dataset.from_generator(
            lambda: _readable(rows()),
            features=features,
            cache_dir=str(place),
            fingerprint=key,
            writer_batch_size=_ROWS_A_BATCH,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, DataError):
            raise cause from None
        if isinstance(cause, OSError | MemoryError):
            raise cause from error
        if isinstance(cause, pa.ArrowException | UnicodeError):
            raise DataError(
                f"data.path: a document cannot be stored as text: {cause}; mend it, or leave it away"
            ) from error
        raise


def _readable(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; what the system refuses while they are read is no fault of the folder they are written to."""
    try:
        yield from rows
    except OSError as error:
        raise DataError(f"data.path: not readable: {error}") from error


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
