"""Sums from which losses are divided once.

Shape letters: B batch, T sequence, V vocabulary.
"""

import math
from typing import NamedTuple

import torch

from windowlm.data.packing import UNSCORED
from windowlm.deferred_numbers import DeferredNumbers
from windowlm.parallel.processes import ALONE, Processes


class LossNumbers(NamedTuple):
    """Sums that were read.

    Args:
        nats: of all targets.
        scored_nats: of those that stand for bytes, so without marks.
        targets: how many targets.
        scored_targets: how many stand for bytes.
        text_bytes: UTF-8 bytes of the scored text.
    """

    nats: float = math.nan
    scored_nats: float = math.nan
    targets: float = math.nan
    scored_targets: float = math.nan
    text_bytes: float = math.nan

    def loss(self) -> float:
        """Nats a target, marks included."""
        return self.nats / self.targets if self.targets else math.nan

    def bits_per_byte(self) -> float:
        """Bits a UTF-8 byte of the scored text, marks left out."""
        return self.scored_nats / self.text_bytes / math.log(2) if self.text_bytes else math.nan


class LossSums:
    """Nats, targets and bytes, summed on the device in float64 and read only when asked for.

    They live outside any module: a buffer would be cast to bfloat16 under bf16-true.
    """

    def __init__(self) -> None:
        self._nats: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None

    def add(
        self,
        nats_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        token_bytes_V: torch.Tensor,
        *,
        only_finite: bool = False,
    ) -> None:
        """Add the targets of one batch.

        Args:
            nats_BT: loss of each target.
            targets_BT: token ids, -100 where there is no target.
            token_bytes_V: bytes of each token, 0 where it is not scored.
            only_finite: leave the batch out where a loss in it is not finite.
        """
        trained_BT = targets_BT != UNSCORED
        bytes_BT = token_bytes_V[targets_BT.clamp(min=0)] * trained_BT
        scored_BT = bytes_BT > 0
        double_BT = nats_BT.detach().double()
        nats = torch.stack([double_BT.sum(), (double_BT * scored_BT).sum()])
        counts = torch.stack([trained_BT.sum(), scored_BT.sum(), bytes_BT.sum()])
        if only_finite:
            finite = nats.isfinite().all()
            nats, counts = nats.masked_fill(~finite, 0), counts * finite
        # Sums that a checkpoint restored come from the CPU.
        self._nats = nats if self._nats is None else self._nats.to(nats.device) + nats
        self._counts = counts if self._counts is None else self._counts.to(counts.device) + counts

    def total(self, processes: Processes = ALONE) -> "LossSums":
        """Those of all processes together; all ask for it, after as many batches."""
        sums = LossSums()
        if self._nats is not None and self._counts is not None:
            sums._nats, sums._counts = processes.total(self._nats), processes.total(self._counts)
        return sums

    def without_numbers(self) -> "LossSums":
        """Zeros where there are sums, which another process holds."""
        sums = LossSums()
        if self._nats is not None and self._counts is not None:
            sums._nats, sums._counts = torch.zeros_like(self._nats), torch.zeros_like(self._counts)
        return sums

    def scalars(self) -> list[torch.Tensor]:
        """The sums on their device, in the order of ``LossNumbers``; nothing where nothing was added."""
        if self._nats is None or self._counts is None:
            return []
        return [*self._nats.unbind(), *self._counts.unbind()]

    def read(self) -> LossNumbers:
        """The sums; waits for the device."""
        return LossNumbers(*DeferredNumbers(self.scalars()).read()) if self.scalars() else LossNumbers()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sums, on the CPU; nothing where nothing was added."""
        if self._nats is None or self._counts is None:
            return {}
        return {"nats": self._nats.cpu(), "counts": self._counts.cpu()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from sums that were saved."""
        self._nats, self._counts = state.get("nats"), state.get("counts")
