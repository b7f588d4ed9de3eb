"""Nats spent on rare words whose last use in the document lies far back.

Model-free: which bytes these are is a matter of the text and of the training words alone.

Shape letters: N targets, B bytes of a document.
"""

from collections.abc import Container, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from windowlm.evaluation.target_losses import TargetLosses
from windowlm.study.loss_by_group import loss_by_group
from windowlm.study.measure_result import MeasureResult, measure_result
from windowlm.study.words import words_of


def repeat_distances(text: str, rare: Container[str]) -> npt.NDArray[np.int64]:
    """Of each byte behind the third letter of a rare word used before, how far back; else 0, ``[B]``.

    The first letters are left out because no model can tell that a word begins; from its third letter on one
    that remembers the word can complete it. The distance is from the word's first byte to that of its last
    use, case-folded.
    """
    words = words_of(text)
    distances_B = np.zeros(len(text.encode()), dtype=np.int64)
    last_use: dict[str, int] = {}
    for number, name in enumerate(words.names):
        start = int(words.start[number])
        if name in last_use and name in rare:
            distances_B[words.after_third_letter[number] : words.end[number]] = start - last_use[name]
        last_use[name] = start
    return distances_B


def target_distances(
    losses: TargetLosses, texts: Mapping[str, str], rare: Container[str]
) -> npt.NDArray[np.int64]:
    """Distance of each target, 0 for those that are not wholly inside such bytes, ``[N]``.

    Args:
        losses: the targets.
        texts: text of each document by its hash.
        rare: case-folded rare words.
    """
    distances_N = np.zeros(len(losses.document), dtype=np.int64)
    for number, digest in enumerate(losses.document_hashes):
        inside_N = (losses.document == number) & (losses.byte_count > 0)
        distances_B = repeat_distances(texts[digest], rare)
        first = losses.first_byte[inside_N]
        last = first + losses.byte_count[inside_N] - 1
        distances_N[inside_N] = np.where(distances_B[first] == distances_B[last], distances_B[first], 0)
    return distances_N


def far_repeats(
    losses: TargetLosses, texts: Mapping[str, str], rare: Container[str], edges: Sequence[int]
) -> MeasureResult:
    """Nats a byte of far repeats by distance bin and context length.

    Args:
        losses: nats of every target.
        texts: text of each document by its hash.
        rare: case-folded rare words.
        edges: increasing distances in bytes; a bin holds its lower edge and not its upper one, and the last
            edge begins one more bin without an end.
    """
    distances_N = target_distances(losses, texts, rare)
    rows, clusters, empty = [], [], []
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        chosen_N = (distances_N >= low) & (distances_N < (np.iinfo(np.int64).max if high is None else high))
        if not chosen_N.any():
            empty.append(f"from {low:,} bytes" if high is None else f"{low:,} to {high:,} bytes")
            continue
        found, sums = loss_by_group(losses, chosen_N, {"distance_from": low, "distance_to": high})
        rows += found
        clusters += sums
    return measure_result(
        "far_repeats",
        meaning=[
            "Rare words (below one in a million training words) are scored behind their third letter, by how "
            "far back in the document they were last used. A model that remembers that far completes them "
            "cheaply, so that nats a byte fall once the context holds the last use.",
            "They are so few that their total loss hardly moves the average: share_of_bytes says how few.",
        ],
        rows=rows,
        clusters=clusters,
        left_out=[f"No far repeat lies {', '.join(empty)} back."] if empty else [],
    )
