"""The W&B run of a finished run, opened again for what was measured of it since."""

import shlex
from pathlib import Path

from windowlm.config import ConfigError, TrainConfig, check_config
from windowlm.errors import UserError
from windowlm.json_text import parse_json
from windowlm.training.metrics_log import MetricsLog
from windowlm.training.offline_wandb import history_differences
from windowlm.training.run_folder import RunFolder
from windowlm.training.wandb_run import WandbRun, choose_mode


def check_wandb_run(path: Path) -> None:
    """Whether ``open_wandb_run`` can open the W&B run of a run, without opening it.

    Args:
        path: the run's folder.

    Raises:
        UserError: it has none or is not finished, or its mode asks for a key that is not there.
    """
    choose_mode(_settings(path).logger.mode)


def open_wandb_run(path: Path) -> WandbRun:
    """Open it under its id, with its settings and its history; offline it takes the place of the earlier one.

    What was logged of evaluations is not in the metrics, and is to be logged again.

    Args:
        path: the run's folder.

    Raises:
        UserError: as ``check_wandb_run``, or W&B cannot be reached.
    """
    folder, config = RunFolder(path), _settings(path)
    record = folder.read_record()
    facts = {name: value for name, value in record.items() if name not in ("wandb_id", "wandb_group")}
    rows = MetricsLog(folder.metrics).rows()
    return WandbRun(config, path, record.get("wandb_group"), record["wandb_id"], facts, rows)


def end_wandb_run(wandb_run: WandbRun, path: Path) -> None:
    """End it, all of it written.

    Args:
        wandb_run: as ``open_wandb_run`` opened it.
        path: the run's folder.

    Raises:
        UserError: what was written offline does not hold all of the run, as on a full disk.
    """
    wandb_run.finish(0)
    if wandb_run.is_offline and (lacking := history_differences(path)):
        raise UserError(
            f"{path / 'wandb'}: W&B's file does not hold all of the run: {lacking[0]}. The evaluations are "
            "whole; the same command writes it again"
        )


def _settings(path: Path) -> TrainConfig:
    folder = RunFolder(path)
    record = folder.read_record()
    if record.get("status") != "finished":
        raise UserError(f"wandb=true: {path} holds no finished run; try wandb=false")
    if record.get("wandb_id") is None:
        raise UserError(f"wandb=true: the run in {path} was not logged to W&B; try wandb=false")
    try:
        return check_config(TrainConfig, parse_json(folder.config.read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        raise UserError(f"{shlex.quote(str(folder.config))}: cannot be read: {error}") from None
