"""What made the steps of a run that went on elsewhere: commit, versions, machine and code of each start."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from windowlm.atomic_write import write_atomically

# Entries of a run's record that say where it was made.
PLACES = ("git_commit", "python", "machine", "versions", "device")
# Where these change, the steps that follow are made by something else.
MADE_BY = (*PLACES, "processes", "threads")


def earlier_starts(
    before: Mapping[str, Any], facts: Mapping[str, Any], diff: Path, difference: bytes, step: int
) -> list[dict[str, Any]]:
    """What made the steps so far, where it is not what makes those that come; keeps its code difference.

    Args:
        before: the record as the start before left it.
        facts: those of this start, `MADE_BY` among them.
        diff: file with the code's difference of the start before, where it had one.
        difference: the code's difference of this start.
        step: where this start goes on.
    """
    differed = diff.read_bytes() if diff.is_file() else b""
    name = _name(diff, differed)
    latest = {**{fact: before.get(fact) for fact in MADE_BY}, "code_difference": name}
    # Records of earlier versions tell of fewer facts.
    now = {fact: facts[fact] if fact in before else None for fact in MADE_BY}
    now["code_difference"] = _name(diff, difference)
    kept: list[dict[str, Any]] = []
    for start in (*recorded_starts(before), {"until_step": step, **latest}):
        until = min(start["until_step"], step)
        if until > (kept[-1]["until_step"] if kept else 0):
            kept.append({**start, "until_step": until})
    while kept and all(kept[-1].get(fact) == now[fact] for fact in now):
        kept.pop()
    if name is not None and any(start["code_difference"] == name for start in kept):
        write_atomically(diff.with_name(name), differed)
    return kept


def recorded_starts(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries ``earlier_starts`` of a record; what is none is left out."""
    known = record.get("earlier_starts")
    return [
        start
        for start in (known if isinstance(known, list) else [])
        if isinstance(start, dict) and type(start.get("until_step")) is int and "code_difference" in start
    ]


def _name(diff: Path, content: bytes) -> str | None:
    """Of the file that keeps a difference; None where there is none."""
    return f"{diff.stem}.{hashlib.sha256(content).hexdigest()[:8]}{diff.suffix}" if content else None
