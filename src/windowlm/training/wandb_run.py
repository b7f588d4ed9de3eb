"""The run on Weights & Biases, online or offline; the only file that imports wandb."""

import os
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger

from windowlm.config import TrainConfig
from windowlm.errors import UserError
from windowlm.evaluation.result import LengthResult
from windowlm.evaluation.result_files import OWN_EVALUATION, flat_rows

Mode = Literal["online", "offline", "disabled"]

# What WANDB_MODE may say, with its older names.
MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


class StepLogger(WandbLogger):
    """Lightning's logger with the training step as W&B's own.

    W&B keeps one entry a step and drops a step that it has already, so a run that goes on from a checkpoint
    may log again what it logged before.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the numbers of one training step."""
        self.experiment.log(dict(metrics), step=step)


class WandbRun:
    """A W&B run through Lightning's logger.

    Args:
        config: settings, logged whole.
        folder: the run's folder; W&B writes below it.
        group: group of a sweep.
        run_id: id of the run, new or to be continued.
        facts: what else is logged with the configuration, such as the git state.
        rows: what ``metrics.jsonl`` holds of the run so far. The history is rebuilt from them, as W&B loses
            its last entries when a process is killed; what it has already is not logged twice.

    Raises:
        UserError: the mode asks for a key and there is none, ``WANDB_MODE`` is unknown, W&B cannot be
            reached, or it refuses a setting.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        group: str | None,
        run_id: str,
        facts: Mapping[str, Any],
        rows: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        import wandb

        settings = config.logger
        mode = choose_mode(settings.mode)
        self.is_offline = mode == "offline"
        self.folder = folder
        self.id = run_id
        earlier = self._offline_folders()
        try:
            run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=settings.group or group,
                name=settings.name or folder.name,
                tags=settings.tags,
                id=self.id,
                dir=str(folder),
                mode=mode,
                resume="allow",
                reinit="create_new",
                config={**asdict(config), **facts},
                allow_val_change=True,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.CommError as error:
            raise UserError(f"logger.mode={settings.mode}: {error}; try logger.mode=offline") from None
        except (wandb.Error, ValueError) as error:
            raise UserError(
                f"logger: W&B refuses the settings: {error}; logger=none runs without it"
            ) from None
        self.logger = StepLogger(experiment=run)
        for row in rows:
            if row["step"] >= run.starting_step:
                self.logger.log_metrics({name: row[name] for name in row if name != "step"}, row["step"])
        # The new run holds the whole history, and uploading both would log it twice.
        for old in earlier if mode != "disabled" else ():
            shutil.rmtree(old)

    def log_length(self, result: LengthResult, plot: Path, evaluation: str = OWN_EVALUATION) -> None:
        """The table and the plot of perplexity by context length, and each value as a summary.

        Args:
            result: of the evaluation.
            plot: PNG.
            evaluation: its folder in the run's, with which the names begin.
        """
        rows = flat_rows(result)
        self.log_table(f"{evaluation}/length", rows, plot)
        summary = self.logger.experiment.summary
        for row in rows:
            summary[f"{evaluation}/bits_per_byte_{row['context_length']}"] = row["bits_per_byte"]
            summary[f"{evaluation}/perplexity_{row['context_length']}"] = row["perplexity"]

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], plot: Path) -> None:
        """Rows as a table, and as ``NAME_plot`` the PNG of them, where there is one."""
        import wandb

        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(key) for key in columns] for row in rows]
        logged: dict[str, Any] = {name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)}
        if plot.is_file():
            logged[f"{name}_plot"] = wandb.Image(str(plot))
        self.logger.experiment.log(logged)

    def finish(self, exit_code: int) -> None:
        """Flush and end the run, marked as failed unless the code is 0; the next run starts its own."""
        import wandb

        self.logger.experiment.finish(exit_code=exit_code)
        if self.is_offline:
            # W&B's process writes the end of the file at leisure, unless its own end is waited for.
            wandb.teardown(exit_code)

    def sync_command(self) -> str | None:
        """The command that uploads an offline run; None where there is nothing to upload."""
        folders = self._offline_folders()
        return f"wandb sync {shlex.join(map(str, folders))}" if folders else None

    def _offline_folders(self) -> list[Path]:
        # W&B counts at the end of the name where one of the same second is there already.
        return sorted(self.folder.glob(f"wandb/offline-run-*-{self.id}*"))


def parse_record(data: bytes) -> Any:
    """One record of an offline run's file.

    Raises:
        ValueError: it is none.
    """
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    try:
        record.ParseFromString(data)
    except Exception as error:  # protobuf's own, of no kind of Python's
        raise ValueError(f"it holds what is no record: {error}") from None
    return record


def choose_mode(asked: Literal["auto", "online", "offline"]) -> Mode:
    """``online``, ``offline`` or ``disabled``.

    Args:
        asked: ``auto`` follows the variable ``WANDB_MODE``, and where it is not set is online with a key and
            offline without one.

    Raises:
        UserError: online without a key or with one that cannot be one, or an unknown ``WANDB_MODE``.
    """
    import wandb

    variable = os.environ.get("WANDB_MODE", "")
    if not variable:
        os.environ.pop("WANDB_MODE", None)  # W&B takes an empty one for a mode
    if variable and variable not in MODES:
        raise UserError(f"WANDB_MODE={variable}: allowed is one of {', '.join(MODES)}")
    mode: Mode | None = None if asked == "auto" else asked
    asker = f"logger.mode={asked}"
    if mode is None and variable:
        mode, asker = MODES[variable], f"WANDB_MODE={variable}"
    if mode in ("offline", "disabled"):
        return mode
    # Without the mode, W&B would look at WANDB_MODE instead of for a key.
    wandb.setup(settings=wandb.Settings(silent=True, mode="online"))
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError):
        # What W&B says of a key may hold some of it.
        raise UserError(
            f"{asker}: W&B takes the configured key for none (WANDB_API_KEY, or that of `wandb login`); mend "
            "it, or set logger.mode=offline"
        ) from None
    if mode == "online" and not has_key:
        raise UserError(f"{asker}: no W&B key is configured; run `wandb login`, or set logger.mode=offline")
    return "online" if has_key else "offline"
