"""Measure the evaluator on models whose losses are known, and let evaluators with the usual mistakes fail.

python scripts/prove_evaluator.py [--out docs/results/known_answers.json]

The models and the checks are those of the tests, which hold the same bounds; here the numbers are written
down. Each row says what is known, the largest distance from it that was found, and the bound. Status 1: one
is missed.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from out_argument import out_file

from tests.evaluation import test_known_answers as known
from tests.evaluation.fakes import ReachModel, UniformModel
from tests.study.oracles import FACTS, InductionModel, PeriodModel, letters, scored
from windowlm.evaluation import passes
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.kept_nats import KeptNats
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.model.config import ModelConfig
from windowlm.model.cost import model_cost
from windowlm.model.decoder import Decoder
from windowlm.study.pasted_spans import pasted_spans
from windowlm.training.provenance import provenance

LENGTHS = list(known.LENGTHS)
DISTANCE = 24
TEXTS = [letters(size, size) for size in known.SIZES]


def main() -> int:
    """Run all proofs, print their table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=out_file)
    options = parser.parse_args()
    with torch.no_grad():
        rows = [row for proof in PROOFS for row in proof()]
    for row in rows:
        print(
            f"{'holds ' if row['holds'] else 'MISSED'} {row['known']}: {row['found']:.3g} ({row['bound']:g})"
        )
    mistakes = [broken(mistake, name) for mistake, name in MISTAKES]
    for row in mistakes:
        print(f"{'fails ' if row['fails'] else 'PASSES'} {row['mistake']} at {row['check']}")
    if options.out is not None:
        report = {
            "command": "python " + shlex.join(sys.argv),
            **provenance(),
            "known_answers": rows,
            "broken_evaluators": mistakes,
            "copy_model": copy_table(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sound = all(row["holds"] for row in rows) and all(row["fails"] for row in mistakes)
    return 0 if sound else 1


def row(what: str, found: float, bound: float) -> dict[str, Any]:
    """A known answer with the largest distance from it."""
    return {"known": what, "found": float(found), "bound": bound, "holds": bool(found <= bound)}


def decoder(**settings: Any) -> Decoder:
    """A small decoder with drawn weights."""
    torch.manual_seed(0)
    return Decoder(ModelConfig(**{**known.SHAPE, **settings}), 256)


def uniform() -> list[dict[str, Any]]:
    """The vocabulary's size at every length."""
    scores = known.ours(UniformModel(256), TEXTS)
    found = max(abs(value - 256) for value in scores.perplexity.values())
    return [row("a uniform model has perplexity 256 at every context length", found, 1e-9)]


def copy_table() -> list[dict[str, Any]]:
    """Perplexity of the copy model by reach and context length, and what theory says."""
    texts = [(letters(DISTANCE, size) * 9)[:size] for size in known.SIZES]
    table = []
    for reach in (DISTANCE - 1, DISTANCE, 2 * DISTANCE):
        scores = known.ours(PeriodModel(DISTANCE, reach), texts)
        for c in LENGTHS:
            nats = list(scores.nats[c].items())
            seen = [c + (token - max(LENGTHS)) % c for (_, token), _ in nats]
            expected = [0.0 if reach >= DISTANCE <= s else math.log(256) for s in seen]
            distance = max(abs(n - e) for (_, n), e in zip(nats, expected, strict=True))
            table.append(
                {
                    "repeats_at": DISTANCE,
                    "reach": reach,
                    "context_length": c,
                    "perplexity": scores.perplexity[c],
                    "expected": math.exp(math.fsum(expected) / len(expected)),
                    "largest_difference_nats": distance,
                }
            )
    return table


def copying() -> list[dict[str, Any]]:
    """The loss steps at the distance, and only for a reach that holds it."""
    found = max(line["largest_difference_nats"] for line in copy_table())
    return [row(f"a copy model's loss steps at {DISTANCE} tokens, only for R >= {DISTANCE}", found, 1e-9)]


def beyond_the_window() -> list[dict[str, Any]]:
    """A windowed decoder gains nothing beyond its receptive field."""
    rows = []
    for name, settings, bound in (
        ("with rotary positions", {}, 1e-5),
        ("without positions", {"rotary": None}, 1e-10),
    ):
        scores = known.ours(decoder(window=4, **settings), TEXTS)
        longest = scores.nats[max(LENGTHS)]
        found = max(abs(scores.nats[c][target] - nats) for target, nats in longest.items() for c in LENGTHS)
        rows.append(row(f"a decoder of reach 7 is the same from 8 tokens on, {name}", found, bound))
    return rows


def against_the_slow_twin() -> list[dict[str, Any]]:
    """Each target by itself."""
    model = decoder(window=6)
    fast, slow = known.ours(model, TEXTS), known.plain(model, TEXTS)
    found = max(abs(fast.nats[c][t] - nats) for c in LENGTHS for t, nats in slow.nats[c].items())
    return [row("a decoder has the losses of the slow twin", found, 1e-6)]


def invariance() -> list[dict[str, Any]]:
    """Order, batch size, streams and interruptions."""
    model = decoder(window=4)
    whole = known.ours(model, TEXTS)

    def distance(other: known.Scores) -> float:
        return max(abs(other.nats[c][t] - nats) for c in LENGTHS for t, nats in whole.nats[c].items())

    rows = [row("another order of documents", distance(known.ours(model, TEXTS[::-1])), 0)]
    for tokens in (1, 40, 333):
        found = distance(known.ours(model, TEXTS, batch_tokens=tokens))
        rows.append(row(f"{tokens} tokens a batch", found, 1e-12))
    field = model_cost(model.config, 256, 64, 4).receptive_field
    for precision, bound in (("64-true", 1e-5), ("32-true", 1e-5)):
        one, other = (sweep(model, field, precision, streaming=streaming) for streaming in (True, False))
        found = max(np.abs(one[c] - other[c]).max() for c in one)
        rows.append(row(f"one stream against windows, {precision}", found, bound))
    exact = decoder(window=4, rotary=None)
    one, other = (sweep(exact, field, "64-true", streaming=streaming) for streaming in (True, False))
    found = max(np.abs(one[c] - other[c]).max() for c in one)
    rows.append(row("one stream against windows, without positions, 64-true", found, 1e-10))
    rows.append(row("interrupted five times and gone on with", interrupted(model, field), 0))
    return rows


def sweep(
    model: Decoder, field: int | None, precision: str, kept: KeptNats | None = None, **settings: Any
) -> dict[int, np.ndarray]:
    """Nats by context length, on both sides of the receptive field."""
    assert field is not None
    watch = settings.pop("watch", None)
    evaluation = EvaluationConfig(
        context_lengths=[field - 1, field, field + 1, 4 * field],
        max_targets=None,
        precision=precision,
        **settings,
    )
    facts = FACTS | {"receptive_field": field}
    documents = known.documents_of(TEXTS)
    _, _, losses = length_sweep(model, documents, known.TOKEN_BYTES_V, evaluation, facts, watch, kept)
    return {**losses.nats, **{-c: values for c, values in losses.naive_nats.items()}}


def interrupted(model: Decoder, field: int | None) -> float:
    """Largest difference of a target after five interruptions, on small parts."""

    def stop(done: int, total: int, read: int) -> None:
        if read > 150:
            raise KeyboardInterrupt

    usual, passes.PART_TOKENS = passes.PART_TOKENS, 60
    try:
        whole = sweep(model, field, "32-true", batch_tokens=60)
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(5):
                try:
                    sweep(model, field, "32-true", KeptNats(Path(folder), "key"), batch_tokens=60, watch=stop)
                except KeyboardInterrupt:
                    continue
            found = sweep(model, field, "32-true", KeptNats(Path(folder), "key"), batch_tokens=60)
    finally:
        passes.PART_TOKENS = usual
    return float(max(np.abs(found[c] - whole[c]).max() for c in whole))


def pasted() -> list[dict[str, Any]]:
    """A model that copies within 300 tokens saves all there and nothing beyond."""
    texts = [letters(3000, seed) for seed in range(3)]
    subject, _, _ = scored(InductionModel(reach=300, letters=8), texts, lengths=(8, 16), max_targets=48)
    measured = pasted_spans(subject, [64, 256, 299, 302, 440], span=64, places=2, window=512, seed=0)
    random = {line["distance"]: line for line in measured["rows"] if line["span"] == "random"}
    within = max(random[distance]["nats_per_byte_with"] for distance in (64, 256, 299))
    beyond = max(abs(random[distance]["saved"]) for distance in (302, 440))
    return [
        row("a pasted span costs nothing within the reach of an induction model, 300", within, 1e-6),
        row("and saves nothing beyond", beyond, 1e-9),
    ]


def alone() -> list[dict[str, Any]]:
    """No context crosses into another document."""
    together = known.ours(ReachModel(256, reach=20), TEXTS[:2])
    found = 0.0
    for text in TEXTS[:2]:
        single = known.ours(ReachModel(256, reach=20), [text])
        found = max(
            found,
            *(abs(together.nats[c][t] - n) for c in LENGTHS for t, n in single.nats[c].items()),
        )
    return [row("a document scores as if it were alone", found, 1e-9)]


PROOFS: tuple[Callable[[], list[dict[str, Any]]], ...] = (
    uniform,
    copying,
    beyond_the_window,
    against_the_slow_twin,
    alone,
    invariance,
    pasted,
)
MISTAKES = (
    ("crossing", "a_document_scores_as_if_it_were_alone"),
    ("crossing", "targets_are_those_with_the_longest_context"),
    ("own_targets", "targets_are_those_with_the_longest_context"),
    ("mean_of_means", "perplexity_is_of_all_targets_alike"),
)


def broken(mistake: str, name: str) -> dict[str, Any]:
    """Whether an evaluator with a mistake fails a check that the right one passes."""
    (check,) = [check for check in known.KNOWN_ANSWERS if check.__name__ == name]
    check(known.ours)
    try:
        check(lambda model, texts: known.plain(model, texts, **{mistake: True}))
    except (AssertionError, KeyError):
        return {"mistake": mistake, "check": name, "fails": True}
    return {"mistake": mistake, "check": name, "fails": False}


if __name__ == "__main__":
    sys.exit(main())
