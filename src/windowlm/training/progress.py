"""What the terminal shows while a run trains."""

import sys
import time
from typing import Any, Literal

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.metrics_writer import MetricsWriter


class ProgressDisplay(pl.Callback):
    """A bar on an interactive terminal; elsewhere one line after each validation.

    Args:
        metrics: where the current numbers come from.
        console: where to print.
        show: ``auto`` draws the bar on a terminal only.
    """

    def __init__(self, metrics: MetricsWriter, console: Console, show: Literal["auto", "on", "off"]) -> None:
        self.metrics = metrics
        self.console = console
        self.bar = Progress(
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.draws = show == "on" or (show == "auto" and console.is_terminal and sys.stdout.isatty())
        self.silent = show == "off"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        self._started = time.monotonic()
        if self.draws:
            self._task = self.bar.add_task("", total=1.0, numbers="")
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Move the bar."""
        if self.draws:
            self.bar.update(
                self._task,
                completed=pl_module.budget.progress(pl_module.spent()),
                numbers=self._numbers(pl_module),
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Print a line where there is no bar."""
        if trainer.state.fn == "fit" and not self.draws and not self.silent:
            progress = pl_module.budget.progress(pl_module.spent())
            elapsed = time.monotonic() - self._started
            self.console.print(
                f"step {pl_module.spent().steps:>6,}  {progress:>4.0%}  {elapsed:>5.0f} s  "
                f"{self._numbers(pl_module)}",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self.bar.stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self.bar.stop()

    def _numbers(self, module: LanguageModelModule) -> str:
        row = self.metrics.last_row
        if not row:
            return f"step {module.spent().steps}"
        numbers = (
            f"loss {row['train_loss']:.3f}  {row['train_bits_per_byte']:.3f} bits/byte  "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        if module.validation_bits_per_byte == module.validation_bits_per_byte:
            numbers += f"  validation {module.validation_bits_per_byte:.3f}"
        return numbers
