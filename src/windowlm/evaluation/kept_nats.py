"""Nats that are scored already, so that an interrupted evaluation goes on, and a repeated one reads no text.

Shape letters: N targets.
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from windowlm.atomic_write import write_atomically
from windowlm.errors import UserError
from windowlm.evaluation.target_losses import LOSSES_NAME, read_losses

UNFINISHED = "unfinished"


class KeptNats:
    """Pieces of the evaluation in a folder, each in a file of its own until the evaluation is written.

    A piece is known by what decides its numbers, the scoring key among it. One that is damaged, or of
    another model, is not there.

    Args:
        folder: of the evaluation.
        scoring_key: what ``scoring_key`` gave.

    Attributes:
        damaged: whether the nats of a finished evaluation are there and cannot be read.
    """

    def __init__(self, folder: Path, scoring_key: str) -> None:
        self.scoring_key = scoring_key
        self._unfinished = folder / UNFINISHED
        self._finished, self.damaged = None, False
        if (folder / LOSSES_NAME).is_file():
            try:
                losses = read_losses(folder / LOSSES_NAME)
            except UserError:
                self.damaged = True  # it moves away, or is overwritten, with the result that it belongs to
                return
            if losses.scoring_key == scoring_key:
                self._finished = losses

    @property
    def tokens_per_second(self) -> float | None:
        """Pace of the finished evaluation, None where there is none."""
        return None if self._finished is None else self._finished.tokens_per_second

    def finished(self, targets_hash: str, kind: str, context_length: int) -> npt.NDArray[np.float64] | None:
        """Nats ``[N]`` from a finished evaluation of the same targets.

        Args:
            targets_hash: of the targets.
            kind: ``protocol`` or ``naive``.
            context_length: c.
        """
        if self._finished is None or self._finished.targets_hash != targets_hash:
            return None
        nats = self._finished.nats if kind == "protocol" else self._finished.naive_nats
        return nats.get(context_length)

    def piece(self, name: str, count: int) -> npt.NDArray[np.float64] | None:
        """Nats of a piece, None where it is not scored."""
        try:
            with np.load(self._path(name), allow_pickle=False) as file:
                nats: npt.NDArray[np.float64] = file["nats"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return nats if nats.shape == (count,) and nats.dtype == np.float64 else None

    def keep(self, name: str, nats: npt.NDArray[np.float64]) -> None:
        """Keep a piece.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            # The archive's checksum tells a damaged piece.
            write_atomically(self._path(name), lambda file: np.savez(file, nats=nats))
        except OSError as error:
            raise UserError(
                f"{self._unfinished}: cannot be written: {error.strerror}; the pieces that are there are kept"
            ) from None

    def remove(self) -> None:
        """Remove the pieces, once the evaluation is written."""
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._unfinished / f"{self.scoring_key[:16]}-{name}.npz"


def scoring_key(weights: str, settings: Mapping[str, Any]) -> str:
    """SHA-256 of what decides the nats of a given target.

    Args:
        weights: their hash.
        settings: shape of the model, precision and the like, as JSON can say them.
    """
    return hashlib.sha256(json.dumps([weights, settings], sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights, on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()
