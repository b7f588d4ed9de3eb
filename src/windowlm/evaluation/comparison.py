"""Evaluated runs side by side: what differs in their settings and in their losses."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windowlm.errors import UserError
from windowlm.evaluation.clusters import cluster_names, sums_by_cluster
from windowlm.evaluation.equivalence import Equivalence, equivalence
from windowlm.evaluation.paired_difference import paired_difference
from windowlm.evaluation.result import Interval, LengthResult, bits_per_byte, interval
from windowlm.evaluation.result_files import OWN_EVALUATION, RESULT_NAME, evaluate_command, read_result
from windowlm.json_text import has_text, parse_json
from windowlm.setting_text import flattened, setting_text

# Where a run goes and how it is logged does not change what it learns.
UNCOMPARED = re.compile(r"run_dir|resume|plan|(logger|hydra)(\..*)?")
# What runs of one setting may differ in.
OF_ONE_SETTING = re.compile(
    rf"seed|(checkpoint|evaluation)\..*|data\.(workers|cache_dir)|{UNCOMPARED.pattern}"
    r"|trainer\.(max_time|device|log_every_n_steps|progress_bar)"
)
ABSENT = "(absent)"
BASE = "(base)"
MARKS_OF_A_RUN = ("run.json", ".hydra", f"{OWN_EVALUATION}/{RESULT_NAME}")


@dataclass(frozen=True)
class Run:
    """A run's folder, the name of an evaluation in it, its settings by full key, and the result.

    The result is None for a run that has no such evaluation.
    """

    folder: Path
    evaluation: str
    settings: dict[str, Any]
    result: LengthResult | None


@dataclass(frozen=True)
class PairedLength:
    """Two runs at one context length: bits per byte of each, and second minus first over clusters.

    The equivalence, None with one cluster, is that of this length alone.
    """

    context_length: int
    first: float
    second: float
    difference: Interval
    equivalence: Equivalence | None
    extrapolation: bool


def runs_in(folder: Path, evaluation: str = OWN_EVALUATION) -> list[Run]:
    """Runs in a folder and its subfolders, numbers in their names in numeric order.

    Args:
        folder: where they are.
        evaluation: which of their evaluations.

    Raises:
        UserError: no such folder, or no run in it, or it is a run itself.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the folder of a sweep, or two run folders")
    if _is_run(folder):
        raise UserError(
            f"{folder}: is one run; give a second one to compare it with, or the folder of several"
        )
    runs = [read_run(path, evaluation) for path in sorted(run_folders(folder), key=_natural_order)]
    if not runs:
        raise UserError(
            f"{folder}: no run is in it (a run holds {' or '.join(MARKS_OF_A_RUN)}); give the folder of a "
            "sweep, or two run folders"
        )
    return runs


def read_run(folder: Path, evaluation: str = OWN_EVALUATION) -> Run:
    """Settings and result of a run folder.

    Args:
        folder: the run's.
        evaluation: which of its evaluations.

    Raises:
        UserError: not a run, or a damaged file.
    """
    if not _is_run(folder):
        raise UserError(f"{folder}: not a run: none of {', '.join(MARKS_OF_A_RUN)} is in it")
    evaluated = (folder / evaluation / RESULT_NAME).is_file()
    result = read_result(folder, evaluation) if evaluated else None
    return Run(folder, evaluation, _settings(folder), result)


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Full keys whose values are not the same in all runs, in the order of the first run's settings."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not UNCOMPARED.fullmatch(key))
    return [
        key
        for key in keys
        if any(run.settings.get(key, ABSENT) != runs[0].settings.get(key, ABSENT) for run in runs)
    ]


def runs_by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of the same settings but for the seed, by what differs from the first run's, as overrides.

    Those of the first run are called ``BASE`` and come first. Settings that do not decide what is learnt do
    not count.
    """
    base = _without_seed(runs[0].settings)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = _without_seed(run.settings)
        changed = [
            f"{key}={setting_text(value)}"
            for key, value in settings.items()
            if base.get(key, ABSENT) != value
        ]
        # A group that became null has its old keys no more, which the null says.
        absent = [f"{key}={ABSENT}" for key in base if key not in settings]
        groups.setdefault(" ".join(changed or absent) or BASE, []).append(run)
    return groups


def _without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not OF_ONE_SETTING.fullmatch(key)}


def paired_lengths(first: Run, second: Run) -> list[PairedLength]:
    """Paired differences at every context length that both runs have.

    Raises:
        UserError: a run is not evaluated, or the two scored different text.
    """
    one, two = (run.result or read_result(run.folder, run.evaluation) for run in (first, second))
    if one["targets_hash"] != two["targets_hash"]:
        raise UserError(_why_unpaired(first, one, second, two))
    rows_one = {row["context_length"]: row for row in one["rows"]}
    rows_two = {row["context_length"]: row for row in two["rows"]}
    documents_one, documents_two = (
        {document["document_hash"]: document for document in result["documents"]} for result in (one, two)
    )
    if documents_one.keys() != documents_two.keys():
        raise UserError(_why_unpaired(first, one, second, two))
    hashes = list(documents_one)
    clusters = cluster_names([documents_one[digest]["author"] for digest in hashes], hashes)
    cluster_bytes = sums_by_cluster([documents_one[digest]["bytes"] for digest in hashes], clusters)
    pairs = []
    for c in sorted(rows_one.keys() & rows_two.keys()):
        bits_one, bits_two = (
            bits_per_byte(
                sums_by_cluster([documents[digest]["nats"][str(c)] for digest in hashes], clusters),
                cluster_bytes,
            )
            for documents in (documents_one, documents_two)
        )
        pairs.append(
            PairedLength(
                context_length=c,
                first=rows_one[c]["bits_per_byte"],
                second=rows_two[c]["bits_per_byte"],
                difference=interval(paired_difference(bits_one, bits_two)),
                equivalence=equivalence(bits_two - bits_one),
                extrapolation=rows_one[c]["extrapolation"] or rows_two[c]["extrapolation"],
            )
        )
    assert pairs, "equal targets have equal longest contexts"
    return pairs


def _why_unpaired(first: Run, one: LengthResult, second: Run, two: LengthResult) -> str:
    if one["tokenizer_identity"] != two["tokenizer_identity"]:
        return (
            f"{first.folder} and {second.folder} scored different text, because their tokenizers differ and "
            "as many tokens end at other bytes. Their bits per byte may be read side by side; paired "
            "differences need runs with one tokenizer"
        )
    shortest_reach = min(one["rows"][-1]["context_length"], two["rows"][-1]["context_length"])
    lengths = [row["context_length"] for row in one["rows"] if row["context_length"] <= shortest_reach]
    listed = ",".join(map(str, lengths or [shortest_reach]))
    commands = "".join(
        f"\n  {evaluate_command(run.folder)} data.path=TEXT 'evaluation.context_lengths=[{listed}]'"
        for run in (first, second)
    )
    folders = shlex.join([str(first.folder), str(second.folder)])
    commands += f"\n  python scripts/compare_runs.py {folders} --evaluation evaluation_TEXT"
    return (
        f"{first.folder} and {second.folder} scored different text (documents, longest context or "
        f"evaluation.max_targets differ), so their losses cannot be paired; score both on the same:{commands}"
    )


def run_folders(folder: Path) -> Iterator[Path]:
    """Folders of the runs in a folder and its subfolders, in no order; the folder itself where it is one."""
    if _is_run(folder):
        yield folder
        return
    for child in folder.iterdir():
        if child.is_dir() and not child.name.startswith("."):
            yield from run_folders(child)


def _is_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS_OF_A_RUN)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the settings of a run, but {type(content).__name__}")
    if not has_text(content):
        raise UserError(f"{path}: damaged: a setting holds half a character (a surrogate), which is no text")
    return flattened(content)
