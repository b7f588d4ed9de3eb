"""The Arrow stores and the folder that they are in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from windowlm.data import arrow_store
from windowlm.data.arrow_store import build_or_open, cache_folder
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


def test_progress_bars_of_datasets_stay_as_they_were(tmp_path: Path) -> None:
    before = datasets.are_progress_bars_disabled()
    build_or_open(tmp_path, "a", FEATURES, lambda: rows(3))
    assert datasets.are_progress_bars_disabled() == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir: '.*file/a' cannot be written"):
        build_or_open(tmp_path / "file" / "a", "a", FEATURES, lambda: rows(3))


def test_a_disk_that_fills_up_is_named(tmp_path: Path) -> None:
    def full() -> Iterator[dict[str, Any]]:
        yield {"number": 1}
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"data\.cache_dir: .*No space left on device"):
        build_or_open(tmp_path, "a", FEATURES, full)


def test_prepared_data_goes_to_the_clone_or_where_the_setting_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder(DataConfig(cache_dir=str(tmp_path))) == tmp_path
    assert cache_folder(DataConfig()) == Path(__file__).parents[2] / "data"
    installed = tmp_path / "lib" / "python3" / "site-packages" / "windowlm" / "data" / "arrow_store.py"
    monkeypatch.setattr(arrow_store, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    assert cache_folder(DataConfig()) == tmp_path / "data"
