"""Nats saved on a span that is pasted a second time: how far back a model can copy from.

A span stands at the end of a text, and a copy of it some distance before, or not; the difference of its loss
is what the copy saves. Random letters can only be copied; of natural text much is known without the copy.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from windowlm.evaluation.bootstrap_t import bootstrap_t
from windowlm.evaluation.clusters import sums_by_cluster
from windowlm.study.measure_result import MeasureResult, measure_result
from windowlm.study.places import Place, character_start, draw_places
from windowlm.study.subject import Subject

KINDS = ("natural", "random")
NOT_SCORED = 16  # bytes at the start of a span, before which no model can know that it is a copy
LOWER_CASE = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)


def pasted_spans(
    subject: Subject, distances: Sequence[int], *, span: int, places: int, window: int, seed: int
) -> MeasureResult:
    """Nats a byte with and without a copy, by kind of span and distance between the starts of both.

    Args:
        subject: the scored run.
        distances: bytes, increasing; those without room in the window, or shorter than a span, are left out.
        span: bytes of a span.
        places: spans of each kind an author.
        window: bytes of the whole text.
        seed: of places and random spans.
    """
    fitting = [distance for distance in distances if span <= distance <= window - span]
    left_out = []
    if len(fitting) < len(distances):
        absent = ", ".join(f"{distance:,}" for distance in distances if distance not in fitting)
        left_out.append(f"No room for spans of {span:,} at {absent} bytes in {window:,} bytes of text.")
    if not fitting:
        return measure_result("pasted_spans", meaning=[], rows=[], left_out=left_out)
    drawn, without_room = draw_places(subject, window, span, places, seed)
    if without_room:
        left_out.append(f"{without_room:,} authors have no document of {window + span:,} bytes.")
    rows: list[dict[str, Any]] = []
    clusters: list[dict[str, Any]] = []
    if not drawn:
        return measure_result("pasted_spans", meaning=[], rows=[], left_out=left_out)
    spans = {"natural": [place.behind for place in drawn]}
    spans["random"] = [
        place.generator.choice(LOWER_CASE, size=span).astype(np.uint8).tobytes() for place in drawn
    ]
    names = [place.cluster for place in drawn]
    for kind in KINDS:
        without = _losses(subject, drawn, spans[kind], None)
        for distance in fitting:
            with_copy = _losses(subject, drawn, spans[kind], distance)
            sizes = sums_by_cluster([size for _, size in without], names)
            lone, copied = (
                sums_by_cluster([nats for nats, _ in found], names) / sizes for found in (without, with_copy)
            )
            saved = bootstrap_t(lone - copied)
            rows.append(
                {
                    "span": kind,
                    "distance": distance,
                    "places": len(drawn),
                    "authors": len(sizes),
                    "nats_per_byte_without": float(lone.mean()),
                    "nats_per_byte_with": float(copied.mean()),
                    "saved": saved.mean,
                    "saved_low": saved.low,
                    "saved_high": saved.high,
                    "extrapolation": window > subject.window_bytes,
                }
            )
            clusters += [
                {"span": kind, "distance": distance, "cluster": name, "saved": float(difference)}
                for name, difference in zip(dict.fromkeys(names), lone - copied, strict=True)
            ]
    return measure_result(
        "pasted_spans",
        meaning=[
            f"A span of {span:,} bytes ends a text of {window:,} bytes; saved is how many nats a byte it "
            "costs less when a copy of it stands at the distance. Zero: the model does not reach the copy, "
            "or cannot use it. Random lower-case letters cost at best log 26 = 3.26 nats each "
            "without it.",
        ],
        rows=rows,
        clusters=clusters,
        left_out=left_out,
    )


def pasted(background: bytes, span: bytes, distance: int | None) -> list[bytes]:
    """Pieces of a text as long as the background, the span last, and a copy of it ``distance`` bytes before.

    The copy replaces as much of the background, so that both texts differ nowhere else.
    """
    end = character_start(background, len(background) - len(span))
    if distance is None:
        return [background[:end], span]
    first = character_start(background, end - distance)
    behind = character_start(background, first + len(span))
    return [background[:first], span, background[behind:end], span]


def _losses(
    subject: Subject, places: Sequence[Place], spans: Sequence[bytes], distance: int | None
) -> list[tuple[float, int]]:
    """Nats and bytes of the scored part of the last span of each place."""
    sequences, first_scored, sizes = [], [], []
    for place, span in zip(places, spans, strict=True):
        pieces = subject.encode(pasted(place.background, span, distance))
        bytes_of = subject.tokenizer.token_bytes_V[pieces[-1]]
        starts = np.cumsum(bytes_of) - bytes_of
        skipped = int(np.searchsorted(starts, NOT_SCORED))
        sequence = np.concatenate(pieces)
        sequences.append(sequence)
        first_scored.append(len(sequence) - len(pieces[-1]) + skipped)
        sizes.append(int(bytes_of[skipped:].sum()))
    nats = subject.tail_nats(sequences, first_scored)
    return [(float(np.sum(found)), size) for found, size in zip(nats, sizes, strict=True)]
