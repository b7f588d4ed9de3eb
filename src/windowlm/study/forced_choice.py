"""Ten-way forced choice: which of ten values belongs to a key that was read some distance before.

Ten lines ``key=value`` stand together in a text, and at its end one key again. The model chooses among the
ten values, all of which it has read, so that only the key can tell: chance is one in ten.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from windowlm.evaluation.clusters import sums_by_cluster
from windowlm.study.measure_result import MeasureResult, measure_result
from windowlm.study.pasted_spans import LOWER_CASE
from windowlm.study.places import Place, character_start, draw_places
from windowlm.study.subject import Subject

CHOICES = 10
KEY_LETTERS = 8
FACTS_BYTES = 1 + CHOICES * (KEY_LETTERS + 3)


def forced_choice(
    subject: Subject,
    distances: Sequence[int],
    depths: Sequence[float],
    *,
    places: int,
    window: int,
    seed: int,
) -> MeasureResult:
    """Share of right choices by distance (facts to question) and depth (share of the text before the facts).

    Args:
        subject: the scored run.
        distances: bytes; those without room in the window at a depth are left out there.
        depths: shares of the context.
        places: questions an author at each distance and depth.
        window: bytes of the longest text.
        seed: of places, keys and values.
    """
    values = _values(subject)
    rows: list[dict[str, Any]] = []
    clusters: list[dict[str, Any]] = []
    left_out = []
    for depth in depths:
        for distance in distances:
            before = round(distance * depth / (1 - depth))
            if distance < FACTS_BYTES or before + distance + KEY_LETTERS + 2 > window:
                left_out.append(f"No room at {distance:,} bytes and depth {depth:g} in {window:,} bytes.")
                continue
            drawn, without_room = draw_places(subject, before + distance, 0, places, seed)
            if without_room:
                left_out.append(
                    f"{without_room:,} authors have no document of {before + distance:,} bytes, for "
                    f"{distance:,} bytes and depth {depth:g}."
                )
            if drawn:
                group = {"distance": distance, "depth": depth}
                right = _right(subject, drawn, before, values)
                rows.append(group | _share(right))
                names = [place.cluster for place in drawn]
                asked, found = (sums_by_cluster(each, names) for each in ([1.0] * len(names), right))
                clusters += [
                    {**group, "cluster": name, "questions": int(count), "right": float(total)}
                    for name, count, total in zip(dict.fromkeys(names), asked, found, strict=True)
                ]
    return measure_result(
        "forced_choice",
        meaning=[
            f"Share of questions in which the right one of {CHOICES} values is the likeliest, by the bytes "
            "between facts and question and by the share of the text that stands before the facts. One in "
            "ten is chance: the model does not reach the facts, or cannot look one up by its key.",
        ],
        rows=rows,
        clusters=clusters,
        left_out=left_out,
    )


def question(place: Place, before: int, values: Sequence[bytes]) -> tuple[list[bytes], int]:
    """Pieces of a text that ends in a key and ``=``, and which of the values is right.

    The facts begin behind ``before`` bytes of the background and replace as much of it.
    """
    letters = place.generator.choice(LOWER_CASE, size=(CHOICES, KEY_LETTERS)).astype(np.uint8)
    keys = [row.tobytes() for row in letters]
    order = place.generator.permutation(CHOICES)
    asked = int(place.generator.integers(CHOICES))
    start = character_start(place.background, before)
    rest = character_start(place.background, start + FACTS_BYTES)
    facts = [
        piece for key, value in zip(keys, order, strict=True) for piece in (key + b"=", values[value], b"\n")
    ]
    pieces = [place.background[:start], b"\n", *facts, place.background[rest:], b"\n", keys[asked] + b"="]
    return pieces, int(order[asked])


def _values(subject: Subject) -> list[bytes]:
    """Ten letters, each one token."""
    values = [bytes([letter]) for letter in LOWER_CASE[:CHOICES]]
    assert all(len(tokens) == 1 for tokens in subject.encode(values)), "a byte-level token for each byte"
    return values


def _right(subject: Subject, places: Sequence[Place], before: int, values: Sequence[bytes]) -> list[float]:
    """Of each question, the share of a right answer."""
    ids = [int(tokens[0]) for tokens in subject.encode(values)]
    right = []
    for place in places:
        pieces, answer = question(place, before, values)
        (logits_V,) = subject.next_token_logits([np.concatenate(subject.encode(pieces))])
        offered = logits_V[ids]
        likeliest = np.flatnonzero(offered == offered.max())
        # Of several that are equally likely one would be drawn.
        right.append((answer in likeliest) / len(likeliest))
    return right


def _share(right: Sequence[float]) -> dict[str, Any]:
    interval = binomtest(round(sum(right)), len(right)).proportion_ci(method="wilson")
    return {
        "questions": len(right),
        "right": sum(right) / len(right),
        "right_low": float(interval.low),
        "right_high": float(interval.high),
        "chance": 1 / CHOICES,
    }
