"""Checkpoints on disk: written aside, synced, renamed; read without running code."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from windowlm.atomic_write import write_atomically
from windowlm.errors import UserError


class AtomicCheckpointIO(CheckpointIO):
    """A checkpoint is either the old one or the new one, never half of it.

    Lightning's own writer stages in the system's temporary folder and does not sync, so a crash can lose
    both.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, whose folder is made if need be."""
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain values; anything else in the file is refused.

        Raises:
            UserError: no file, or not a checkpoint.
        """
        if not Path(path).is_file():
            raise UserError(f"resume={path}: no such checkpoint; give a run's folder, or resume=auto")
        try:
            loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"resume={path}: not a readable checkpoint ({_first_line(error)})") from error
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Delete ``path`` if it is there."""
        Path(path).unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
