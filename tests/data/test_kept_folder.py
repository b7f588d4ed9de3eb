"""What the cache keeps: made once, checked, and made anew where it is damaged."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

from windowlm.data import kept_folder
from windowlm.data.errors import DataError
from windowlm.data.kept_folder import RECORD, make_once

CONTENT = bytes(range(256)) * 8


def make(place: Path) -> None:
    (place / "deep").mkdir()
    (place / "deep" / "b").write_bytes(CONTENT)
    (place / "a").write_bytes(b"")


def refuse(place: Path) -> None:
    raise AssertionError("made again")


def overwrite(file: Path, content: bytes, *, keeps_time: bool = False) -> None:
    state = file.stat()
    file.write_bytes(content)
    if keeps_time:
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


FLIPPED = CONTENT[:500] + b"\xff" * 8 + CONTENT[508:]
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed": (
        lambda place: overwrite(place / "deep" / "b", FLIPPED, keeps_time=True),
        "deep/b is damaged: it",
    ),
    "cut": (lambda place: os.truncate(place / "deep" / "b", 700), "it has 700 of 2,048 bytes"),
    "empty": (lambda place: os.truncate(place / "deep" / "b", 0), "it has 0 of 2,048 bytes"),
    "zeroed": (lambda place: overwrite(place / "deep" / "b", bytes(2048)), "does not hold what was written"),
    "longer": (lambda place: overwrite(place / "a", b"x"), "it has 1 of 0 bytes"),
    "gone": (lambda place: (place / "a").unlink(), "a is missing"),
    "folder": (
        lambda place: ((place / "a").unlink(), (place / "a").mkdir()),
        "a is damaged|a is not readable",
    ),
    "record": (lambda place: (place / RECORD).write_text("{"), f"{RECORD} is damaged"),
    "list": (lambda place: (place / RECORD).write_text('["a"]'), f"{RECORD} is damaged"),
    "nothing": (lambda place: (place / RECORD).write_text("{}"), f"{RECORD} is damaged"),
    "binary": (lambda place: (place / RECORD).write_bytes(b"\xff"), f"{RECORD} is damaged"),
    "numbers": (lambda place: (place / RECORD).write_text('{"a": {"bytes": 0}}'), f"{RECORD} is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_mended(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "kept"
    assert make_once(place, make) == [place / "a", place / "deep" / "b"]
    make_once(place, refuse)
    assert capsys.readouterr() == ("", "")
    damage, said = DAMAGES[kind]
    damage(place)
    make_once(place, make)
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {place}: ")
    assert warning.endswith("; it is made anew\n")
    assert any(part in warning for part in said.split("|"))
    assert (place / "deep" / "b").read_bytes() == CONTENT
    make_once(place, refuse)
    assert capsys.readouterr() == ("", "")


def test_a_large_folder_is_hashed_where_a_file_was_written_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kept_folder, "_ALWAYS_HASHED_BYTES", 100)
    place = tmp_path / "kept"
    make_once(place, make)
    overwrite(place / "deep" / "b", FLIPPED, keeps_time=True)
    make_once(place, refuse)
    os.utime(place / "deep" / "b", ns=(0, 0))
    make_once(place, make)
    assert "does not hold what was written" in capsys.readouterr().err
    os.utime(place / "deep" / "b", ns=(0, 0))
    make_once(place, refuse)


def test_what_was_begun_or_lacks_its_record_is_made_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "kept"

    def fail(place: Path) -> None:
        make(place)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        make_once(place, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.lock"]
    (tmp_path / "kept.unfinished").mkdir()
    (tmp_path / "kept.unfinished" / "c").touch()
    place.mkdir()
    (place / "old").touch()
    assert make_once(place, make) == [place / "a", place / "deep" / "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "kept.lock"]
    assert sorted(path.name for path in place.iterdir()) == ["a", RECORD, "deep"]
    assert capsys.readouterr() == ("", "")


def test_a_process_that_waited_takes_what_the_other_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "kept"
    locked = filelock.FileLock.__enter__

    def wait_for_another(lock: Any) -> Any:
        monkeypatch.setattr(filelock.FileLock, "__enter__", locked)
        make_once(place, make)
        return locked(lock)

    monkeypatch.setattr(filelock.FileLock, "__enter__", wait_for_another)
    assert make_once(place, refuse) == [place / "a", place / "deep" / "b"]


def test_what_is_sound_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "kept"
    make_once(place, make)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(filelock.FileLock, "__enter__", read_only)
    assert make_once(place, refuse) == [place / "a", place / "deep" / "b"]
    os.truncate(place / "deep" / "b", 5)
    with pytest.raises(
        DataError, match=r"data\.cache_dir: .* is damaged \(.*5 of 2,048.*\) and cannot be written"
    ):
        make_once(place, refuse)


def test_the_record_says_what_each_file_is(tmp_path: Path) -> None:
    make_once(tmp_path / "kept", make)
    record = json.loads((tmp_path / "kept" / RECORD).read_text())
    assert set(record) == {"a", "deep/b"}
    assert record["deep/b"]["bytes"] == 2048
