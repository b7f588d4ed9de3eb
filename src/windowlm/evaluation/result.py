"""What ``length.json`` holds."""

import math
from collections.abc import Iterable
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from windowlm.evaluation.paired_difference import PairedDifference
from windowlm.evaluation.position_curve import PositionRow

FORMAT = 2


class Interval(TypedDict):
    """A paired difference in bits per byte over clusters; no interval with one cluster."""

    mean: float
    low: float | None
    high: float | None
    pairs: int


class EqualToLongest(TypedDict):
    """Whether a length loses nothing beyond the margin: ``p_holm``, over all lengths, decides."""

    margin: float
    p: float
    p_holm: float
    equivalent: bool


class Row(TypedDict):
    """One context length. ``naive_*`` are the same targets in non-overlapping windows of c tokens."""

    context_length: int
    targets: int
    bytes: int
    nats: float
    perplexity: float
    bits_per_byte: float
    extrapolation: bool
    change_from_shortest: Interval | None
    equal_to_longest: EqualToLongest | None
    naive_nats: float
    naive_perplexity: float
    naive_bits_per_byte: float


class DocumentRow(TypedDict):
    """One document; ``nats`` by context length."""

    document_hash: str
    title: str | None
    author: str | None
    targets: int
    bytes: int
    nats: dict[str, float]


class Paired(Interval):
    """Longest context minus shortest, in bits per byte over clusters."""

    shortest: int
    longest: int
    confidence: float


class RunFacts(TypedDict):
    """What a result says about the run besides its losses.

    Attributes:
        training_length: tokens of a training sequence; a window beyond it is extrapolation.
        window: the setting ``model.window``; a description for a model that is not ours.
        receptive_field: tokens that can influence an output; None when a layer sees everything.
        tokens_trained: tokens seen by these weights, where known.
        tokenizer_identity: hash of the tokenizer.
        source_identity: hash of the documents' source.
        split: name of the documents scored.
        weights: hash of the model's, which the evaluation fills in; earlier results lack it.
    """

    training_length: int
    window: int | list[int | None] | str | None
    receptive_field: int | None
    tokens_trained: int | None
    tokenizer_identity: str
    source_identity: str
    split: str
    weights: NotRequired[str]


class LengthResult(RunFacts):
    """What ``length.json`` holds.

    ``cluster`` says what the intervals are over: author or document. ``targets_within`` is the hash of the
    targets of another evaluation, to whose bytes these were confined; None where they were not.
    """

    format: int
    rows: list[Row]
    paired: Paired | None
    cluster: str
    position_curve: list[PositionRow]
    targets_hash: str
    targets_within: str | None
    documents_too_short: int
    documents_over_budget: int
    authors_too_short: int
    bytes_per_author: int | None
    precision: str
    parameters: int
    documents: list[DocumentRow]


def trained_context(results: Iterable[LengthResult]) -> int | None:
    """The longest context length of all results that is extrapolation in none; the longest where each is.

    What extrapolates says how a model breaks beyond its training, not what a longer context is worth to it.

    Returns:
        None where no length is that of all.
    """
    rows_of = [result["rows"] for result in results]
    shared = set.intersection(*({row["context_length"] for row in rows} for rows in rows_of))
    beyond = {row["context_length"] for rows in rows_of for row in rows if row["extrapolation"]}
    return max(shared - beyond or shared, default=None)


def trained_row(result: LengthResult) -> Row:
    """The row of its ``trained_context``."""
    c = trained_context([result])
    return next(row for row in result["rows"] if row["context_length"] == c)


def bits_per_byte(nats: npt.ArrayLike, byte_counts: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Bits per UTF-8 byte from nats of the same text."""
    return np.asarray(nats, dtype=np.float64) / math.log(2) / np.asarray(byte_counts, dtype=np.float64)


def interval(difference: PairedDifference) -> Interval:
    """A paired difference as it stands in JSON."""
    return {
        "mean": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "pairs": difference.pairs,
    }
