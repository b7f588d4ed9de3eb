"""Steps whose loss or gradient is not finite: left out on the device, kept for replay, counted, and an end.

The device decides, by a flag that its optimizer reads, so that nothing of the step reaches weights or
optimizer state and the host need not wait; the host learns of it a step or two later. Once more steps were
left out than are allowed, all that follow are left out too, so that the state is still that of the step when
the host hears of it.
"""

import sys
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, Self

import lightning.pytorch as pl
import torch
from torch import Tensor

from windowlm.deferred_numbers import DeferredNumbers
from windowlm.errors import UserError
from windowlm.training.checkpoint_io import AtomicCheckpointIO

REPLAY_FORMAT = 2
# Of steps that were left out, beside those that ended a run; each is as large as a checkpoint.
MOST_REPLAYS = 3


class NonFiniteError(UserError):
    """A loss, a gradient or a weight is infinite or not a number."""

    @classmethod
    def of_step(cls, step: int, what: str, advice: str = "") -> Self:
        """The error of an optimizer step.

        Args:
            step: that was found to be so.
            what: what is not finite.
            advice: what else to say.
        """
        return cls(
            f"step {step}: {what}, so the run stops; what it saved before, if anything, is of a step when "
            f"all was finite. {advice}Try a lower optimizer.lr, a longer optimizer.warmup_fraction, a "
            "smaller optimizer.gradient_clip, or precision=32-true"
        )


def leave_out(finite: Tensor, left_out: Tensor, most: int) -> Tensor:
    """Count a step that is not finite, and say whether the optimizer must leave the step out.

    Args:
        finite: whether loss and gradient are, a boolean scalar.
        left_out: steps left out so far, an integer scalar on the same device; changed in place.
        most: steps that may be left out; beyond it all that follow are.

    Returns:
        1.0 or 0.0, a float32 scalar, as optimizers of torch take it as ``found_inf``.
    """
    left_out.add_(~finite)
    return (~finite | (left_out > most)).to(torch.float32)


class NonFiniteWatch(pl.Callback):
    """Hear of steps that were left out, save what replays them, and end the run after too many.

    Args:
        folder: where replays go.
        most: steps that may be left out.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder = folder
        self.most = most
        self._batches: list[dict[str, Tensor]] = []
        self._due: deque[_Step] = deque()
        self._known = 0
        self._of: tuple[pl.Trainer, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Know what was left out before."""
        self._of = (trainer, pl_module)
        self._known = int(pl_module.skipped_steps)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Hold the batch until its step is known to be finite."""
        self._batches.append({name: value for name, value in batch.items() if isinstance(value, Tensor)})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Ask for the count of this step, and read those that have arrived."""
        step, rest = divmod(pl_module.batches_trained, pl_module.accumulate_batches)
        if rest:
            return
        numbers = DeferredNumbers([pl_module.skipped_steps])
        rate, limit = pl_module.learning_rate, pl_module.window_limit
        self._due.append(_Step(step, rate, limit, self._batches, numbers))
        self._batches = []
        self._read(wait=pl_module.finished)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before a validation all steps are known."""
        self._read(wait=True)

    def state_dict(self) -> dict[str, Any]:
        """Nothing; but before a checkpoint is saved all steps are known.

        Raises:
            NonFiniteError: too many were left out.
        """
        self._read(wait=True)
        return {}

    def _read(self, *, wait: bool) -> None:
        # Several processes must hear of a step at the same place of the program, each a step late.
        together = self._of is not None and self._of[1].processes.size > 1
        while self._due and (wait or (len(self._due) > 1 if together else self._due[0].numbers.arrived)):
            step = self._due.popleft()
            (left_out,) = step.numbers.read()
            if left_out > self._known:
                self._known = int(left_out)
                self._left_out(step)

    def _left_out(self, step: "_Step") -> None:
        ends = self._known > self.most
        replay = self._save(step, needed=ends)
        what = "the loss or its gradient is not finite"
        if ends:
            self._due.clear()
            setting = f"trainer.max_skipped_steps={self.most}"
            raise NonFiniteError.of_step(step.number, f"{what} ({setting})", f"{replay} ")
        if not replay:
            return
        print(
            f"warning: step {step.number}: {what}; left out, {self._known} of at most {self.most}. {replay}",
            file=sys.stderr,
        )

    def _save(self, step: "_Step", *, needed: bool) -> str:
        """Save the step's replay; what to tell of it."""
        assert self._of is not None
        trainer, module = self._of
        if not module.processes.leads:
            return ""
        if module.processes.size > 1:
            return "Replays are saved by runs of one process."
        if not needed and len(list(self.folder.glob("*.ckpt"))) >= MOST_REPLAYS:
            return f"{self.folder} holds {MOST_REPLAYS} replays already."
        path = self.folder / f"step_{step.number}.ckpt"
        # Float16's scaler leaves out what is not finite, and not what follows one too many.
        goes_on = not needed or module.loss_scaling
        content = {
            "format": REPLAY_FORMAT,
            "step": step.number,
            # The updates between the step and this state; 0 where the device was not ahead.
            "later_steps": module.spent().steps - step.number if goes_on else 0,
            "first_batch": (step.number - 1) * module.accumulate_batches,
            "learning_rate": step.learning_rate,
            "window_limit": step.window_limit,
            "seed": module.seed,
            "batches": [{name: value.cpu() for name, value in batch.items()} for batch in step.batches],
            "vocabulary_size": module.model.vocabulary_size,
            "model": module.model.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
        }
        if not self.folder.parent.is_dir():
            # A new one in its place would look like a run.
            return f"Its batch could not be saved: {self.folder.parent} is gone."
        try:
            AtomicCheckpointIO().save_checkpoint(content, path)
        except OSError as error:
            return f"Its batch could not be saved: {error.strerror or error}."
        return f"Look into it with: python scripts/replay_batch.py {path}."


class _Step(NamedTuple):
    """A step whose count is on its way."""

    number: int
    learning_rate: float
    window_limit: int | None
    batches: list[dict[str, Tensor]]
    numbers: DeferredNumbers
