"""The run on Weights & Biases, online or offline; the only file that imports wandb."""

import os
import secrets
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from windowlm.config import TrainConfig
from windowlm.errors import UserError
from windowlm.evaluation.result import LengthResult
from windowlm.evaluation.result_files import flat_rows


class WandbRun:
    """A W&B run through Lightning's logger.

    Args:
        config: settings, logged whole.
        folder: the run's folder; W&B writes below it.
        group: group of a sweep.
        run_id: id of the run to continue, None for a new one.
        facts: what else is logged with the configuration, such as the git state.

    Raises:
        UserError: ``logger.mode=online`` without a key.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, group: str | None, run_id: str | None, facts: dict[str, Any]
    ) -> None:
        # W&B asks on a terminal unless told not to, and its own lines would break the progress bar.
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        settings = config.logger
        has_key = settings.mode != "offline" and bool(wandb.login(prompt=False, verify=False))
        if settings.mode == "online" and not has_key:
            raise UserError(
                "logger.mode=online: no W&B key is configured; run `wandb login`, or set logger.mode=offline"
            )
        self.offline = not has_key
        self.folder = folder
        self.id = run_id or secrets.token_hex(4)
        self.logger = WandbLogger(
            project=settings.project,
            entity=settings.entity,
            group=settings.group or group,
            name=settings.name or folder.name,
            tags=settings.tags,
            id=self.id,
            save_dir=str(folder),
            mode="offline" if self.offline else "online",
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.logger.experiment.config.update({**asdict(config), **facts}, allow_val_change=True)

    def log_length(self, result: LengthResult, plot: Path) -> None:
        """The table and the plot of perplexity by context length, and each value as a summary."""
        import wandb

        rows = flat_rows(result)
        columns = list(rows[0])
        table = wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])
        run = self.logger.experiment
        run.log({"evaluation/length": table, "evaluation/length_plot": wandb.Image(str(plot))})
        for row in rows:
            run.summary[f"evaluation/bits_per_byte_{row['context_length']}"] = row["bits_per_byte"]
            run.summary[f"evaluation/perplexity_{row['context_length']}"] = row["perplexity"]

    def finish(self) -> None:
        """Flush and end the run."""
        import wandb

        wandb.finish()

    def sync_command(self) -> str | None:
        """The command that uploads an offline run; None online."""
        if not self.offline:
            return None
        folders = sorted(self.folder.glob(f"wandb/offline-run-*-{self.id}"))
        return f"wandb sync {shlex.join(map(str, folders))}"
