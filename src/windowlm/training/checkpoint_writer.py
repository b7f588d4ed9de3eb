"""Callback that saves the last and the best state, and the model beside them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from windowlm.parallel.processes import Processes
from windowlm.training.checkpoint_io import AtomicCheckpointIO
from windowlm.training.failed_writes import FailedWrites
from windowlm.training.run_folder import BEST, LAST


class CheckpointWriter(pl.Callback):
    """Save after every validation, every n steps and at the end.

    A step that is both due and validated is saved after its validation: saved before, a run killed in
    between would resume without that validation. Validations that are due at times cannot be foreseen, and
    such a step may be saved before and after. Weights that are not finite are never saved.

    Args:
        folder: where ``last.ckpt`` and ``best.ckpt`` go.
        every_n_steps: steps between two saves.
        validates_after: tells whether a validation is known to be due after this step.
        write_metrics: writes the rows that a checkpoint must not be without. Lightning would do it within its
            save, where a failure of the leader alone would leave the other processes waiting for it.
        save_model: writes the weights in the form that is read without Lightning.
        failed_writes: what follows when a save fails.

    Attributes:
        best_bits_per_byte: lowest validation of which the state was saved; kept over resumes.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        validates_after: Callable[[int], bool],
        write_metrics: Callable[[], None],
        save_model: Callable[[], None],
        failed_writes: FailedWrites,
    ) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.validates_after = validates_after
        self.write_metrics = write_metrics
        self.save_model = save_model
        self.failed_writes = failed_writes
        self.best_bits_per_byte = math.inf

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Save where a save is due and no validation follows."""
        step, rest = divmod(pl_module.batches_trained, pl_module.accumulate_batches)
        if rest or pl_module.finished or self.validates_after(step):
            return
        if trainer.should_stop or step % self.every_n_steps == 0:
            self._save(trainer, pl_module, LAST)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save the last state, and the best where the validation says so."""
        if trainer.state.fn != "fit":
            return
        before = self.best_bits_per_byte
        if pl_module.validation_bits_per_byte < before:
            self.best_bits_per_byte = pl_module.validation_bits_per_byte
            if not self._save(trainer, pl_module, BEST):
                self.best_bits_per_byte = before  # of the best that is there
        self._save(trainer, pl_module, LAST)

    def state_dict(self) -> dict[str, Any]:
        """The best value."""
        return {"best_bits_per_byte": self.best_bits_per_byte}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.best_bits_per_byte = state_dict["best_bits_per_byte"]

    def _save(self, trainer: pl.Trainer, module: Any, name: str) -> bool:
        """Save; whether it was possible, where a failure does not end the run."""
        module.require_finite_weights()
        processes = module.processes
        try:
            processes.leader_alone(self._prepare)
            trainer.save_checkpoint(self.folder / name)
            self._raise_failure(trainer, processes)
            if name == LAST:
                self.save_model()
        except OSError as error:
            step = module.spent().steps
            is_last = name == LAST and (trainer.should_stop or module.finished)
            # Besides the state it may be the rows of the metrics, or a file of the model.
            file = Path(error.filename or name).name
            self.failed_writes.report(f"the state of step {step:,} ({file})", error, is_last=is_last)
            return False
        return True

    def _prepare(self) -> None:
        self.failed_writes.require_folder()
        self.write_metrics()

    def _raise_failure(self, trainer: pl.Trainer, processes: Processes) -> None:
        """Raise on all processes what kept the leader from saving."""
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        failed, io.failed = processes.share(io.failed), None
        if failed is not None:
            raise failed
