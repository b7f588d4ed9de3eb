"""Callback that measures the run and writes its rows."""

import math
import sys
import time
from collections import deque
from typing import Any, NamedTuple

import lightning.pytorch as pl

from windowlm.deferred_numbers import DeferredNumbers
from windowlm.model.cost import ModelCost
from windowlm.training.failed_writes import FailedWrites
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.loss_spikes import LossSpikes
from windowlm.training.loss_sums import LossNumbers
from windowlm.training.metrics_log import MetricsLog
from windowlm.training.peak_memory import peak_memory_bytes

COLUMNS = (
    "step",
    "tokens",
    "train_loss",
    "train_bits_per_byte",
    "learning_rate",
    "gradient_norm",
    "skipped_steps",
    "loss_spike",
    "seconds",
    "tokens_per_second",
    "model_flops_per_second",
    "mfu",
    "peak_memory_bytes",
    "data_wait_fraction",
)


class MetricsWriter(pl.Callback):
    """Write a row every n steps, and one after each validation, to ``metrics.jsonl`` and to the logger.

    What a row needs from the device is asked for when the row is due and read when it has arrived, a step or
    two later: training does not wait. Before a validation, a save and the end all rows are written. A loss
    that jumps out of those before it is reported, and its height stands in the row as `loss_spike`.

    Args:
        log: the file.
        every_n_steps: steps between two rows.
        cost: FLOPs of the model outside attention.
        flops_per_pair: forward FLOPs of one visible pair in one layer, 4 x heads x head_dim.
        peak: dense peak of the device in FLOPs/s, None when it is not known.
        failed_writes: what follows when a row cannot be written.

    Attributes:
        last_row: the last row of training.
    """

    def __init__(
        self,
        log: MetricsLog,
        every_n_steps: int,
        cost: ModelCost,
        flops_per_pair: int,
        peak: float | None,
        failed_writes: FailedWrites,
    ) -> None:
        self.metrics_log = log
        self.every_n_steps = every_n_steps
        self.cost = cost
        self.flops_per_pair = flops_per_pair
        self.peak = peak
        self.failed_writes = failed_writes
        self.last_row: dict[str, Any] = {}
        self._row_started = self._idle_since = 0.0
        self._row_elapsed = 0.0  # of a row that an earlier start of the run began
        self._waited = 0.0
        self._tokens_at_row = 0
        self._spikes = LossSpikes()
        self._due: deque[DueRow] = deque()
        self._trainer: pl.Trainer | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clocks; the run may go on from an earlier step, in the middle of a row."""
        self._trainer = trainer
        self._idle_since = time.monotonic()
        self._row_started = self._idle_since - self._row_elapsed

    def state_dict(self) -> dict[str, Any]:
        """What belongs to the row being filled, beside the module's sums; earlier rows are written first.

        Raises:
            OSError: they cannot be, and no checkpoint may be saved without them.
        """
        self.write_rows()
        return {
            "row_elapsed": time.monotonic() - self._row_started,
            "waited": self._waited,
            "tokens_at_row": self._tokens_at_row,
            "losses": self._spikes.state(),
            "rows": self.metrics_log.count,
        }

    def write_rows(self) -> None:
        """Have all rows so far on the disk.

        Raises:
            OSError: they cannot be written.
        """
        self._write_due(wait=True)
        self.metrics_log.write_all(sync=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that row."""
        self._row_elapsed = state_dict["row_elapsed"]
        self._waited = state_dict["waited"]
        self._tokens_at_row = state_dict["tokens_at_row"]
        self._spikes.restore(state_dict["losses"])

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the time since the last batch as waiting for data."""
        self._waited += time.monotonic() - self._idle_since

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Ask for the row that is due, and write those that have arrived."""
        step, rest = divmod(pl_module.batches_trained, pl_module.accumulate_batches)
        if rest == 0 and (step % self.every_n_steps == 0 or pl_module.finished):
            self._due.append(self._row(pl_module, step))
            self._start_row(pl_module)
        self._write_due(wait=pl_module.finished)
        self._idle_since = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is left."""
        self._write_due(wait=True)
        try:
            self.metrics_log.write_all()
        except OSError as error:
            self.failed_writes.report(self.metrics_log.path.name, error, is_last=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the row's clock: validation is not training."""
        self._write_due(wait=True)
        self._validation_started = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the validation's row."""
        if trainer.state.fn == "fit":
            row = {
                "step": pl_module.spent().steps,
                "tokens": pl_module.spent().tokens,
                "validation_loss": pl_module.validation_loss,
                "validation_bits_per_byte": pl_module.validation_bits_per_byte,
            }
            self._write(trainer, row)
        self._row_started += time.monotonic() - self._validation_started
        self._idle_since = time.monotonic()

    def _start_row(self, module: LanguageModelModule) -> None:
        self._row_started = self._idle_since = time.monotonic()
        self._waited = 0.0
        self._tokens_at_row = module.spent().tokens
        module.start_row()

    def _row(self, module: LanguageModelModule, step: int) -> "DueRow":
        tokens = module.spent().tokens
        elapsed = max(time.monotonic() - self._row_started, 1e-9)
        return DueRow(
            tokens - self._tokens_at_row,
            elapsed,
            {
                "step": step,
                "tokens": tokens,
                "learning_rate": module.learning_rate,
                "seconds": module.seconds_trained,
                "tokens_per_second": (tokens - self._tokens_at_row) / elapsed,
                "peak_memory_bytes": peak_memory_bytes(module.device),
                "data_wait_fraction": min(self._waited / elapsed, 1.0),
            },
            DeferredNumbers([scalar.to(module.device) for scalar in module.row_scalars()]),
        )

    def _write_due(self, *, wait: bool) -> None:
        while self._due and (wait or self._due[0].numbers.arrived):
            assert self._trainer is not None
            self.last_row = self._completed(self._due.popleft())
            self._write(self._trainer, self.last_row)

    def _completed(self, due: "DueRow") -> dict[str, Any]:
        pairs, gradient_norm, skipped_steps, *of_losses = due.numbers.read()
        sums = LossNumbers(*of_losses)
        loss = sums.loss()
        flops = 6 * self.cost.matmul_parameters * due.tokens + 3 * self.flops_per_pair * pairs
        row = {
            **due.known,
            "train_loss": loss,
            "train_bits_per_byte": sums.bits_per_byte(),
            "gradient_norm": gradient_norm,
            "skipped_steps": int(skipped_steps),
            "model_flops_per_second": flops / due.elapsed,
        }
        if self.peak is not None:
            row["mfu"] = flops / due.elapsed / self.peak
        # Where every batch of the row was left out there is no loss.
        if math.isfinite(loss) and (rise := self._spikes.height(loss)) is not None:
            row["loss_spike"] = rise
            if not self.metrics_log.writes:
                return row
            print(
                f"warning: step {due.known['step']:,}: the training loss {loss:.3f} is {rise:.3f} above the "
                "median of the rows before",
                file=sys.stderr,
            )
        return {name: row[name] for name in COLUMNS if name in row}

    def _write(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        try:
            self.metrics_log.append(row)
        except OSError as error:
            self.failed_writes.report(f"{self.metrics_log.path.name}, step {row['step']:,}", error)
        if trainer.logger is not None:
            metrics = {name: value for name, value in row.items() if name != "step"}
            trainer.logger.log_metrics(metrics, step=row["step"])


class DueRow(NamedTuple):
    """A row whose numbers are on their way.

    Args:
        tokens: trained since the row before.
        elapsed: seconds since then, validations left out.
        known: columns that the host knows.
        numbers: visible pairs, norm of the gradient, steps left out, and the sums of the losses.
    """

    tokens: int
    elapsed: float
    known: dict[str, Any]
    numbers: DeferredNumbers
