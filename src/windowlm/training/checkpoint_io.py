"""Checkpoints on disk: written aside, synced, verified by hash, renamed; read without running code."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from windowlm.atomic_write import write_atomically
from windowlm.errors import UserError, lacks_memory
from windowlm.training.run_folder import LAST, PREVIOUS

# The last bytes of a file: the hash of all before them. torch reads what stands in front of it.
MARK = b"\nsha256 "
TRAILER_BYTES = len(MARK) + 64
_CHUNK_BYTES = 1 << 22


class DamagedCheckpointError(UserError):
    """A file that is not, or no longer, the checkpoint that was written."""


class AtomicCheckpointIO(CheckpointIO):
    """A checkpoint is either the old one or the new one, never half of it, and known to be whole.

    The last state that was there stays as the previous one, once the new one is on disk and read back.
    Lightning's own writer stages in the system's temporary folder and does not sync, so a crash can lose
    both.

    Args:
        defers: keep a failure in ``failed`` instead of raising it, as other processes wait for the end of the
            save.
    """

    def __init__(self, *, defers: bool = False) -> None:
        self.defers = defers
        self.failed: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, whose folder is made if need be.

        Raises:
            OSError: it cannot be written, or reads back as something else.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        try:
            self._save(checkpoint, Path(path))
        except OSError as error:
            if not self.defers:
                raise
            self.failed = error

    def _save(self, checkpoint: dict[str, Any], target: Path) -> None:

        def before_rename(partial: Path) -> None:
            if (reason := damage(partial)) is not None:
                raise OSError(f"{target} reads back wrong: {reason}")
            if target.name == LAST and target.exists():
                target.replace(target.with_name(PREVIOUS))

        # The run's folder may have been moved away, and one in its place would hold half a run.
        write_atomically(
            target,
            lambda file: _write_hashed(checkpoint, file),
            before_rename,
            inside=target.absolute().parents[1],
        )

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain values; anything else in the file, or more than its size, is refused.

        Raises:
            DamagedCheckpointError: not the file that was written, nor any that torch writes.
            UserError: no file, or the system does not give its content.
        """
        try:
            if not Path(path).is_file():
                raise UserError(f"resume={path}: no such checkpoint; give a run's folder, or resume=auto")
            if (reason := damage(Path(path))) is not None:
                raise DamagedCheckpointError(f"resume={path}: damaged: {reason}")
            if (reason := _expansion(Path(path))) is not None:
                raise DamagedCheckpointError(
                    f"resume={path}: not a readable checkpoint ({reason}, which could fill the memory)"
                )
            loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except UserError:
            raise
        except OSError as error:
            # What cannot be read now, as of a server that is away, may be whole.
            raise UserError(
                f"resume={path}: cannot be read: {error.strerror or error}; nothing was changed. Start again "
                "when it can be read; where it never can, move it away, and the state before it is used"
            ) from None
        except Exception as error:
            if lacks_memory(error) is not None:
                raise
            # torch would advise to run what is in the file.
            of_code = type(error).__name__ == "UnpicklingError"
            reason = "it holds more than tensors and plain values" if of_code else _first_line(error)
            raise DamagedCheckpointError(f"resume={path}: not a readable checkpoint ({reason})") from error
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Delete ``path`` if it is there."""
        Path(path).unlink(missing_ok=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes; None where they are those that were written."""
    length = path.stat().st_size - TRAILER_BYTES
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        left = max(length, 0)
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            hashed.update(chunk)
            left -= len(chunk)
        trailer = file.read()
    if length < 0 or not trailer.startswith(MARK):
        size = length + TRAILER_BYTES
        return "it is empty" if not size else f"its end is missing, or it is no checkpoint ({size:,} bytes)"
    if trailer.removeprefix(MARK) != hashed.hexdigest().encode():
        return "its content is not that of its hash"
    return None


def _expansion(path: Path) -> str | None:
    """Why a file may hold more than its size; None where torch.save can have written it, which packs nothing.

    Raises:
        zipfile.BadZipFile: it is no zip archive, as which torch.load would read an older format.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise zipfile.BadZipFile("it is no zip archive")
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return "its records are compressed"
    # Records that overlap are each as large as they are said to be.
    stated, size = sum(record.file_size for record in records), path.stat().st_size
    return f"its records state {stated:,} bytes and it has {size:,}" if stated > size else None


class _HashingFile:
    """An open file that hashes what is written, and keeps the error that a library would hide."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            written = self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(content)
        return written

    def flush(self) -> None:
        self._file.flush()


def _write_hashed(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    hashing = _HashingFile(file)
    try:
        torch.save(checkpoint, hashing)  # type: ignore[arg-type]
    except RuntimeError:
        if hashing.error is not None:
            raise hashing.error from None
        raise
    file.write(MARK + hashing.sha256.hexdigest().encode())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
