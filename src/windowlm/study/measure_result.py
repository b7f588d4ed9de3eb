"""What a measure of the study returns and its file holds."""

from typing import Any, TypedDict

FORMAT = 1
CLUSTERS = "clusters_hash"  # setting that tells which documents are whose; earlier results lack it


class MeasureResult(TypedDict):
    """One measure of one run.

    Attributes:
        format: of the file.
        measure: its name.
        meaning: what the numbers say, in plain sentences.
        settings: all that decides the numbers, the hashes of model, targets and clusters among it.
        left_out: what could not be measured, in plain sentences.
        rows: one flat object a number with its interval.
        clusters: sums of each author, from which the paired differences of two runs can be computed.
    """

    format: int
    measure: str
    meaning: list[str]
    settings: dict[str, Any]
    left_out: list[str]
    rows: list[dict[str, Any]]
    clusters: list[dict[str, Any]]


def measure_result(
    measure: str,
    *,
    meaning: list[str],
    rows: list[dict[str, Any]],
    left_out: list[str] | None = None,
    clusters: list[dict[str, Any]] | None = None,
) -> MeasureResult:
    """A result whose settings are filled in by ``run_study``."""
    return {
        "format": FORMAT,
        "measure": measure,
        "meaning": meaning,
        "settings": {},
        "left_out": left_out or [],
        "rows": rows,
        "clusters": clusters or [],
    }
