"""The evaluator on models whose curve is known exactly; evaluators that are broken on purpose fail it."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.study.oracles import FACTS, PeriodModel, letters
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.evaluation.precision import scoring
from windowlm.evaluation.targets import choose_targets, protocol_windows
from windowlm.evaluation.token_loss import target_nats
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder

from .fakes import MemoryDocuments, ReachModel, UniformModel

LENGTHS = (8, 16, 32)
PERIOD = 24
SIZES = (150, 90, 33, 20)
TOKEN_BYTES_V = np.append(np.ones(255, dtype=np.int64), 0)
SHAPE = {"dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward_dim": 24, "layers": 2}


@dataclass
class Scores:
    """Perplexity by context length, and nats by context length and target (document, token)."""

    perplexity: dict
    nats: dict


def documents_of(texts):
    return MemoryDocuments([list(text.encode()) for text in texts], end_mark=255)


def ours(model, texts, **settings):
    documents = documents_of(texts)
    evaluation = EvaluationConfig(
        context_lengths=list(LENGTHS), max_targets=None, precision="64-true", **settings
    )
    result, _, losses = length_sweep(model, documents, TOKEN_BYTES_V, evaluation, FACTS)
    text_of = {documents.document_hash(number): text for number, text in enumerate(texts)}
    names = [text_of[losses.document_hashes[number]] for number in losses.document]
    nats = {
        c: dict(zip(zip(names, losses.token.tolist(), strict=True), values.tolist(), strict=True))
        for c, values in losses.nats.items()
    }
    return Scores({row["context_length"]: row["perplexity"] for row in result["rows"]}, nats)


def plain(model, texts, *, crossing=False, own_targets=False, mean_of_means=False):
    """The protocol as a loop over targets, or one of the usual mistakes."""
    longest = max(LENGTHS)
    scores = Scores({}, {})
    stream = "".join(texts)
    with torch.no_grad(), scoring(model, "64-true") as scored:
        for c in LENGTHS:
            nats = {}
            for number, text in enumerate(texts):
                begin = len("".join(texts[:number]))
                first = 0 if crossing else c if own_targets else longest
                for token in range(first, len(text)):
                    context = c + (token - first) % c
                    if crossing:
                        window = stream[max(0, begin + token - context) : begin + token + 1]
                    else:
                        window = text[token - context : token + 1]
                    if len(window) < 2:
                        continue
                    ids = torch.tensor([list(window.encode())])
                    logits = scored.head(scored.hidden(ids[:, :-1])[0, -1]).double()
                    nats[text, token] = -logits.log_softmax(-1)[ids[0, -1]].item()
            scores.nats[c] = nats
            by_document = [[n for (name, _), n in nats.items() if name == text] for text in texts]
            if mean_of_means:
                mean = np.mean([np.mean(part) for part in by_document if part])
            else:
                mean = sum(map(sum, by_document)) / len(nats)
            scores.perplexity[c] = math.exp(mean)
    return scores


def uniform_is_the_vocabulary(evaluate):
    scores = evaluate(UniformModel(256), [letters(size, size) for size in SIZES])
    for c in LENGTHS:
        assert scores.perplexity[c] == pytest.approx(256, rel=1e-12)


def targets_are_those_with_the_longest_context(evaluate):
    texts = [letters(size, size) for size in SIZES]
    expected = {(text, token) for text in texts for token in range(max(LENGTHS), len(text))}
    scores = evaluate(UniformModel(256), texts)
    for c in LENGTHS:
        assert scores.nats[c].keys() == expected


def a_copy_model_steps_at_its_period(evaluate):
    texts = [(letters(PERIOD, size) * 9)[:size] for size in SIZES]
    for reach in (PERIOD - 1, PERIOD):
        scores = evaluate(PeriodModel(PERIOD, reach), texts)
        for c in LENGTHS:
            for (_, token), nats in scores.nats[c].items():
                seen = c + (token - max(LENGTHS)) % c
                known = reach >= PERIOD and seen >= PERIOD
                assert nats == pytest.approx(0 if known else math.log(256), abs=1e-9)
            if reach < PERIOD or 2 * c <= PERIOD:
                assert scores.perplexity[c] == pytest.approx(256)
            if reach >= PERIOD <= c:
                assert scores.perplexity[c] == pytest.approx(1)


def a_document_scores_as_if_it_were_alone(evaluate):
    texts = [letters(size, size) for size in SIZES[:2]]
    together = evaluate(ReachModel(256, reach=20), texts)
    for text in texts:
        alone = evaluate(ReachModel(256, reach=20), [text])
        for c in LENGTHS:
            for target, nats in alone.nats[c].items():
                assert together.nats[c][target] == pytest.approx(nats, abs=1e-9)


def perplexity_is_of_all_targets_alike(evaluate):
    scores = evaluate(ReachModel(256, reach=6), [letters(size, size) for size in SIZES])
    for c in LENGTHS:
        mean = math.fsum(scores.nats[c].values()) / len(scores.nats[c])
        assert scores.perplexity[c] == pytest.approx(math.exp(mean), rel=1e-9)


KNOWN_ANSWERS = (
    uniform_is_the_vocabulary,
    targets_are_those_with_the_longest_context,
    a_copy_model_steps_at_its_period,
    a_document_scores_as_if_it_were_alone,
    perplexity_is_of_all_targets_alike,
)


@pytest.mark.parametrize("known_answer", KNOWN_ANSWERS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("evaluate", [ours, plain])
def test_the_evaluator_and_its_slow_twin_give_the_known_answer(evaluate, known_answer):
    known_answer(evaluate)


@pytest.mark.parametrize(
    ("mistake", "found_by"),
    [
        ("crossing", "a_document_scores_as_if_it_were_alone"),
        ("crossing", "targets_are_those_with_the_longest_context"),
        ("own_targets", "targets_are_those_with_the_longest_context"),
        ("mean_of_means", "perplexity_is_of_all_targets_alike"),
    ],
)
def test_a_broken_evaluator_fails(mistake, found_by):
    (check,) = [check for check in KNOWN_ANSWERS if check.__name__ == found_by]
    with pytest.raises((AssertionError, KeyError)):
        check(lambda model, texts: plain(model, texts, **{mistake: True}))


def test_the_evaluator_equals_its_slow_twin_on_a_decoder():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, window=6), 256)
    texts = [letters(size, size) for size in SIZES]
    fast, slow = ours(model, texts), plain(model, texts)
    for c in LENGTHS:
        assert fast.nats[c].keys() == slow.nats[c].keys()
        for target, nats in slow.nats[c].items():
            assert fast.nats[c][target] == pytest.approx(nats, abs=1e-6)


@pytest.mark.parametrize(("rotary", "tolerance"), [({"base": 10000.0}, 1e-5), (None, 1e-10)])
def test_a_windowed_decoder_is_the_same_beyond_its_receptive_field(rotary, tolerance):
    torch.manual_seed(0)
    settings = {} if rotary is not None else {"rotary": None}
    model = Decoder(ModelConfig(**SHAPE, window=4, **settings), 256)
    scores = ours(model, [letters(size, size) for size in SIZES])
    # The receptive field is 7 tokens, and the shortest context 8.
    for target, nats in scores.nats[max(LENGTHS)].items():
        for c in LENGTHS:
            assert abs(scores.nats[c][target] - nats) < tolerance


def test_results_are_the_same_to_the_bit_in_another_order_of_documents():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, window=6), 256)
    texts = [letters(size, size) for size in SIZES]
    forward, backward = ours(model, texts), ours(model, texts[::-1])
    assert forward.perplexity == backward.perplexity
    assert forward.nats == backward.nats


@pytest.mark.parametrize("batch_tokens", [1, 40, 333])
def test_results_do_not_depend_on_the_batch_size(batch_tokens):
    torch.manual_seed(0)
    texts = [letters(size, size) for size in SIZES]
    for model in (UniformModel(256), PeriodModel(PERIOD, PERIOD)):
        assert ours(model, texts, batch_tokens=batch_tokens) == ours(model, texts)
    decoder = Decoder(ModelConfig(**SHAPE, window=6), 256)
    one, other = ours(decoder, texts, batch_tokens=batch_tokens), ours(decoder, texts)
    for c in LENGTHS:
        assert one.perplexity[c] == pytest.approx(other.perplexity[c], rel=1e-12)


def shares_of(windows, processes):
    return [windows[number::processes] for number in range(processes)]


def scored_by(model, documents, windows, **options):
    nats = target_nats(model, documents, windows, device=torch.device("cpu"), **options)
    ends = np.cumsum([window.end - window.first for window in windows])
    return dict(zip(windows, np.split(nats, ends[:-1]), strict=True))


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_results_do_not_depend_on_how_many_processes_share_the_windows(processes):
    torch.manual_seed(0)
    documents = documents_of([letters(size, size) for size in SIZES])
    targets = choose_targets(documents, TOKEN_BYTES_V, max(LENGTHS), None)
    for model, tolerance in (
        (UniformModel(256), 0),
        (PeriodModel(PERIOD, PERIOD), 0),
        (Decoder(ModelConfig(**SHAPE, window=6), 256), 1e-12),
    ):
        for c in LENGTHS:
            windows = protocol_windows(targets.regions, c)
            with scoring(model, "64-true") as scored:
                whole = scored_by(scored, documents, windows, batch_tokens=100)
                parts = [
                    scored_by(scored, documents, share, batch_tokens=100)
                    for share in shares_of(windows, processes)
                ]
            joined = {window: nats for part in parts for window, nats in part.items()}
            assert joined.keys() == whole.keys()
            assert max(np.abs(joined[window] - nats).max() for window, nats in whole.items()) <= tolerance
            # Sums over the windows in their order: whoever scored them.
            sums = [math.fsum(np.concatenate([nats[w] for w in windows])) for nats in (whole, joined)]
            assert sums[0] == pytest.approx(sums[1], rel=1e-14 if tolerance else 0)


def nats_of_a_decoder():
    torch.manual_seed(0)
    scores = ours(Decoder(ModelConfig(**SHAPE, window=6), 256), [letters(size, size) for size in SIZES])
    return str([repr(value) for by_target in scores.nats.values() for value in by_target.values()])


def test_results_are_the_same_to_the_bit_in_another_process(tmp_path):
    """Another interpreter, with hashes of its own, scores the same model with one thread as well."""
    script = (
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from tests.evaluation.test_known_answers import nats_of_a_decoder\n"
        "print(nats_of_a_decoder())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == nats_of_a_decoder()
