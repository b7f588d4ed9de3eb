"""Files that are whole."""

import errno
import os

import pytest

from windowlm.atomic_write import json_bytes, write_atomically


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new folder" / "file"
    write_atomically(path, b"old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_folder_that_was_moved_away_is_not_made_anew(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        write_atomically(tmp_path / "gone" / "new" / "file", b"", inside=tmp_path / "gone")
    assert not list(tmp_path.iterdir())
    write_atomically(tmp_path / "new" / "file", b"", inside=tmp_path)


def test_a_write_that_fails_says_of_which_file(tmp_path):
    def fail(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: .*/file'"):
        write_atomically(tmp_path / "file", fail)
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        write_atomically(tmp_path / "taken", b"")
    assert refused.value.filename == str(tmp_path / "taken")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_refused(number):
    assert json_bytes({"name": "größe"}).decode() == '{\n "name": "größe"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"loss": number})


def test_what_was_written_and_renamed_is_synced_with_the_names_above_it(tmp_path, monkeypatch):
    synced = []

    def watched(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", watched)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    write_atomically(path, b"state")
    assert synced == [
        str(tmp_path),
        str(tmp_path / "run"),
        str(path.with_name(f".last.ckpt.partial-{os.getpid()}")),
        str(path.parent),
    ]
