"""The Arrow stores and the folder that they are in."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from windowlm.data import arrow_store, kept_folder
from windowlm.data.arrow_store import build_or_open, cache_folder, filled_cache
from windowlm.data.config import DataConfig
from windowlm.data.errors import DataError

FEATURES = datasets.Features({"number": datasets.Value("int64")})


def rows(count: int) -> Iterator[dict[str, Any]]:
    return ({"number": number} for number in range(count))


def test_a_store_is_built_once_for_each_key(tmp_path: Path) -> None:
    first = build_or_open(tmp_path, "a", FEATURES, lambda: rows(3))
    again = build_or_open(tmp_path, "a", FEATURES, lambda: rows(5))
    other = build_or_open(tmp_path, "b", FEATURES, lambda: rows(5))
    assert [store["number"][:] for store in (first, again, other)] == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4]]


def test_a_store_of_several_files_is_opened_in_order_and_sent_as_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", "8KB")
    store = build_or_open(tmp_path, "a", FEATURES, lambda: rows(9000))
    assert len(list(tmp_path.rglob("*.arrow"))) > 2
    assert store["number"][:] == list(range(9000))
    sent = pickle.dumps(store)
    assert len(sent) < 8000
    assert pickle.loads(sent)["number"][:] == list(range(9000))


def test_a_damaged_store_that_is_too_large_to_be_hashed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_or_open(tmp_path, "a", FEATURES, lambda: rows(3))
    (file,) = tmp_path.rglob("*.arrow")
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(bytes(file.stat().st_size))
    os.utime(file, ns=times)
    monkeypatch.setattr(kept_folder, "_ALWAYS_HASHED_BYTES", 0)
    with pytest.raises(DataError, match=r"data\.cache_dir: '.*/a' is damaged: .*; remove it"):
        build_or_open(tmp_path, "a", FEATURES, lambda: rows(3))


def test_progress_bars_of_datasets_stay_as_they_were(tmp_path: Path) -> None:
    before = datasets.are_progress_bars_disabled()
    build_or_open(tmp_path, "a", FEATURES, lambda: rows(3))
    assert datasets.are_progress_bars_disabled() == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir: '.*file/a' cannot be written"):
        build_or_open(tmp_path / "file" / "a", "a", FEATURES, lambda: rows(3))


def test_a_disk_that_fills_up_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", full)
    with pytest.raises(DataError, match=r"data\.cache_dir: .*No space left on device"):
        build_or_open(tmp_path, "a", FEATURES, lambda: rows(3))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (DataError("data.path: no"), DataError, r"^data\.path: no$"),
        (
            PermissionError(13, "Permission denied", "a.txt"),
            DataError,
            r"^data\.path: not readable: .*a\.txt",
        ),
        (pa.ArrowInvalid("too much"), DataError, r"^data\.path: a document cannot be stored .*too much"),
        (MemoryError("malloc"), MemoryError, "malloc"),
        # What only a bug can cause is seen whole.
        (KeyError("bug"), datasets.exceptions.DatasetGenerationError, "while generating"),
    ],
)
def test_what_fails_while_a_store_is_written_is_told_from_a_bug(
    tmp_path: Path, failure: Exception, kind: type[Exception], message: str
) -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield {"number": 1}
        raise failure

    with pytest.raises(kind, match=message):
        build_or_open(tmp_path, "a", FEATURES, failing)
    assert not list(tmp_path.rglob("*.arrow"))


def test_prepared_data_goes_to_the_clone_or_where_the_setting_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder(DataConfig(cache_dir=str(tmp_path))) == tmp_path
    assert cache_folder(DataConfig()) == Path(__file__).parents[2] / "data"
    installed = tmp_path / "lib" / "python3" / "site-packages" / "windowlm" / "data" / "arrow_store.py"
    monkeypatch.setattr(arrow_store, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    assert cache_folder(DataConfig()) == tmp_path / "data"


def test_a_run_may_name_a_cache_that_is_one(tmp_path: Path) -> None:
    build_or_open(tmp_path / "cache" / "documents", "a", FEATURES, lambda: rows(3))
    assert filled_cache(str(tmp_path / "cache")) == str(tmp_path / "cache")
    assert filled_cache(str(tmp_path)) is filled_cache(str(tmp_path / "none")) is filled_cache(None) is None
