"""The evaluation settings of a finished run, for those that a second evaluation does not give."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.json_text import parse_json


def with_own_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of ``scripts/evaluate.py`` with ``evaluation`` filled up from the run's own.

    A run's own data are scored as the run scored them. Of other data, ``data.path`` or ``data.name``, every
    target is, in float32, unless the bounds of the targets and ``evaluation.precision`` say otherwise.

    Args:
        values: composed settings, in ``evaluation`` those that are given.

    Raises:
        UserError: the run's ``config.json`` is damaged, or a split of other data is asked for.
    """
    own, given = _own_settings(Path(values["checkpoint"])), values["evaluation"] or {}
    if any(values["data"].get(name) is not None for name in ("path", "name")):
        if "split" in given:
            raise UserError(
                f"evaluation.split={given['split']}: other data are scored whole, in no split; leave it "
                "away, or data.path and data.name"
            )
        own |= dict.fromkeys(("max_targets", "max_targets_per_document", "bytes_per_author", "targets"))
        own["precision"] = "32-true"
    return {**values, "evaluation": own | given}


def _own_settings(checkpoint: Path) -> dict[str, Any]:
    """From the run's settings, where ``checkpoint`` is a run or the model in it; else nothing."""
    known = {field.name for field in fields(EvaluationConfig)}
    for path in (checkpoint / "config.json", checkpoint.parent / "config.json"):
        try:
            settings = parse_json(path.read_text(encoding="utf-8"))
        except OSError:
            continue
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from None
        if isinstance(settings, dict) and isinstance(settings.get("evaluation"), dict):
            return {name: value for name, value in settings["evaluation"].items() if name in known}
    return {}
