import errno
import hashlib
import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from windowlm.errors import UserError
from windowlm.training import checkpoint_io
from windowlm.training.checkpoint_io import MARK, TRAILER_BYTES, AtomicCheckpointIO, DamagedCheckpointError


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(3), "step": 7}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["step"] == 7
    assert torch.equal(loaded["weights"], torch.arange(3))


def test_a_failed_write_leaves_the_old_checkpoint_alone(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        AtomicCheckpointIO().save_checkpoint({"step": lambda: 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path, witness = tmp_path / "last.ckpt", tmp_path / "ran"
    # With a hash that is right, which anybody can compute.
    content = io.BytesIO()
    torch.save({"step": Touch(witness)}, content)
    path.write_bytes(content.getvalue() + MARK + hashlib.sha256(content.getvalue()).hexdigest().encode())
    with pytest.raises(UserError, match="not a readable checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not witness.exists()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


def test_the_last_state_that_was_there_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        AtomicCheckpointIO().save_checkpoint({"step": step}, tmp_path / "last.ckpt")
        AtomicCheckpointIO().save_checkpoint({"step": step}, tmp_path / "best.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "previous.ckpt") == {"step": 2}


def test_every_flipped_bit_and_every_cut_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(3), "step": 7}, path)
    whole = path.read_bytes()
    draw = random.Random(0)
    places = [*draw.sample(range(len(whole)), 200), *range(len(whole) - TRAILER_BYTES, len(whole))]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt: damaged: "):
            AtomicCheckpointIO().load_checkpoint(path)
    for length in (0, 1, TRAILER_BYTES, *draw.sample(range(len(whole)), 50), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError, match="damaged: it"):
            AtomicCheckpointIO().load_checkpoint(path)
    path.write_bytes(whole)
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == 7


def test_a_state_without_room_in_memory_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def test_what_reads_back_wrong_does_not_replace_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io, "damage", lambda _: "a bit has turned")
        with pytest.raises(OSError, match=r"last\.ckpt reads back wrong: a bit has turned"):
            AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}


def test_a_write_that_fails_in_the_middle_says_what_the_system_said(
    tmp_path: Path, largest_file: Callable[[int], None]
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    largest_file(100_000)
    with pytest.raises(OSError, match="File too large") as failed:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    assert failed.value.errno == errno.EFBIG
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
