"""A figure for each author of all that was measured of a run, from which runs and settings are compared."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from windowlm.errors import UserError
from windowlm.evaluation.clusters import cluster_names, sums_by_cluster
from windowlm.evaluation.comparison import Run
from windowlm.evaluation.result import LengthResult, bits_per_byte, trained_context
from windowlm.study.measure_files import measures_of
from windowlm.study.measure_result import CLUSTERS

LOSS = "bits per byte"
FAR_REPEATS = "far repeats, nats a byte"
KEY_WORDS = "key words, nats a byte"
SAVED = "span pasted again, nats a byte saved"
RIGHT = "ten-way choice, share right"
ALL_FAR = "all distances"  # group of all far repeats


@dataclass(frozen=True, order=True)
class Figure:
    """What a figure is of: the measure, its group, and the order of groups within it.

    Attributes:
        context: context length at which the targets' nats are; None for what has windows of its own.
    """

    measure: str
    order: int
    group: str
    context: int | None = None

    @property
    def label(self) -> str:
        """The group, and the context length where the group does not say it."""
        said = self.context is None or self.measure == LOSS
        return self.group if said else f"{self.group}, c = {self.context:,}"

    def is_called(self, measure: str, group: str) -> bool:
        """Whether it is this figure."""
        return (self.measure, self.group) == (measure, group)

    @property
    def skewed(self) -> bool:
        """Whether its differences between authors are far from normal."""
        return self.measure != LOSS


@dataclass(frozen=True)
class AuthorValues:
    """A run's figures.

    Attributes:
        values: of each author by figure.
        settings: of each measure but the model: only equal ones may be compared.
    """

    values: dict[Figure, dict[str, float]]
    settings: dict[str, dict[str, Any]]


def author_values(run: Run, without: Container[str] = ()) -> AuthorValues:
    """Figures of an evaluated run: the loss at each context length, and those of its measures.

    Args:
        run: the run.
        without: names of measures that are left out.

    Raises:
        UserError: a file is damaged.
    """
    assert run.result is not None
    values = _losses(run.result)
    settings = {}
    for measured in measures_of(run.folder / run.evaluation, run.result):
        name = measured["measure"]
        if name in without:
            continue
        settings[name] = {key: value for key, value in measured["settings"].items() if key != "model"}
        sums: dict[Figure, dict[str, list[tuple[float, float]]]] = {}
        for row in measured["clusters"]:
            for figure, value, weight in _figures(name, row):
                sums.setdefault(figure, {}).setdefault(row["cluster"], []).append((value, weight))
        values |= {
            figure: {
                author: sum(value for value, _ in found) / sum(weight for _, weight in found)
                for author, found in by_author.items()
            }
            for figure, by_author in sums.items()
        }
    return AuthorValues(values, settings)


def measured_differently(one: AuthorValues, two: AuthorValues) -> dict[str, list[str]]:
    """The settings that differ of each measure that both runs have, where some do."""
    found = {}
    for name in sorted(one.settings.keys() & two.settings.keys()):
        here, there = one.settings[name], two.settings[name]
        told = here.keys() | there.keys()
        if not (CLUSTERS in here and CLUSTERS in there):
            told = told - {CLUSTERS}
        if differing := sorted(key for key in told if here.get(key) != there.get(key)):
            found[name] = differing
    return found


def comparable(
    first: Run, one: AuthorValues, second: Run, two: AuthorValues, context: int | None = None
) -> list[Figure]:
    """Figures that both runs have of the same authors, in their order.

    Args:
        first, second: the runs.
        one, two: their figures.
        context: context length at which far repeats and key words are compared, losses at each; None for the
            ``trained_context`` of both.

    Raises:
        UserError: they scored different text, or a measure was made with different settings.
    """
    assert first.result is not None
    assert second.result is not None
    if first.result["targets_hash"] != second.result["targets_hash"]:
        raise UserError(
            f"{first.folder} and {second.folder} scored different text, so their figures cannot be compared; "
            "score both on the same data with the same evaluation settings"
        )
    for name, differing in measured_differently(one, two).items():
        raise UserError(
            f"{first.folder} and {second.folder}: {name} was measured with different "
            f"{', '.join(differing)}; measure both with the same study settings"
        )
    if context is None:
        context = trained_context((first.result, second.result))
    return sorted(
        figure
        for figure in one.values.keys() & two.values.keys()
        if one.values[figure].keys() == two.values[figure].keys()
        and (figure.measure == LOSS or figure.context in (None, context))
    )


def _losses(result: LengthResult) -> dict[Figure, dict[str, float]]:
    documents = result["documents"]
    names = cluster_names(
        [document["author"] for document in documents], [document["document_hash"] for document in documents]
    )
    sizes = sums_by_cluster([document["bytes"] for document in documents], names)
    found = {}
    for row in result["rows"]:
        c = row["context_length"]
        nats = sums_by_cluster([document["nats"][str(c)] for document in documents], names)
        bits = bits_per_byte(nats, sizes).tolist()
        found[Figure(LOSS, c, f"c = {c:,}", c)] = dict(zip(dict.fromkeys(names), bits, strict=True))
    return found


def _figures(name: str, row: Mapping[str, Any]) -> list[tuple[Figure, float, float]]:
    """Figures that an author's row counts for, each with a sum and what it is to be divided by."""
    if name == "pasted_spans":
        distance = row["distance"]
        figure = Figure(f"{row['span']} {SAVED}", distance, f"{distance:,} bytes back")
        return [(figure, row["saved"], 1)]
    if name == "forced_choice":
        distance = row["distance"]
        return [(Figure(RIGHT, distance, f"{distance:,} bytes back"), row["right"], row["questions"])]
    if name not in ("far_repeats", "key_words"):
        return []
    if name == "key_words":
        groups = [(KEY_WORDS, 0, f"chosen by {row['chooser']}")]
    else:
        low, high = row["distance_from"], row["distance_to"]
        group = f"from {low:,} bytes back" if high is None else f"{low:,} to {high:,} bytes back"
        groups = [(FAR_REPEATS, 0, ALL_FAR), (FAR_REPEATS, low, group)]
    return [
        (Figure(*called, context=int(c)), nats, row["bytes"])
        for called in groups
        for c, nats in row["nats"].items()
    ]
