"""An interrupted evaluation goes on where it stopped, to the same bit."""

import json

import numpy as np
import pytest
import torch

from tests.study.oracles import FACTS, letters
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.evaluate import evaluate_checkpoint
from windowlm.evaluation.kept_nats import UNFINISHED, KeptNats, scoring_key, weights_hash
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.evaluation.target_losses import read_losses
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder

from .fakes import MemoryDocuments, ReachModel
from .test_evaluate import run  # noqa: F401

TOKEN_BYTES_V = np.append(np.ones(255, dtype=np.int64), 0)
SHAPE = {"dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward_dim": 24, "layers": 2}
LENGTHS = [4, 8, 16]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("windowlm.evaluation.passes.PART_TOKENS", 100)
    monkeypatch.setattr("windowlm.evaluation.evaluate.html_page", lambda *_: b"page")
    monkeypatch.setattr("windowlm.evaluation.evaluate.length_plot", lambda _: b"plot")


class InterruptedSweepError(Exception):
    """Stands for a signal."""


def sweep(model, kept=None, stop_after=None, facts=FACTS, **settings):
    documents = MemoryDocuments([list(letters(n, n).encode()) for n in (150, 90, 60)], end_mark=255)
    evaluation = EvaluationConfig(
        context_lengths=LENGTHS, max_targets=None, **{"batch_tokens": 64, **settings}
    )
    reads = []

    def watch(done, total, read):
        reads.append(read)
        if stop_after is not None and read > stop_after:
            raise InterruptedSweepError

    found = length_sweep(model, documents, TOKEN_BYTES_V, evaluation, facts, watch, kept)
    return found, reads[-1]


def decoder(window=4):
    torch.manual_seed(0)
    return Decoder(ModelConfig(**SHAPE, window=window), 256)


@pytest.mark.parametrize("receptive_field", [None, 7])
@pytest.mark.parametrize("stop_after", [0, 130, 700, 1500])
def test_it_goes_on_where_it_stopped_and_ends_with_the_same_bits(tmp_path, stop_after, receptive_field):
    model, facts = decoder(), FACTS | {"receptive_field": receptive_field}
    (whole, _, losses), read = sweep(model, facts=facts)
    kept = KeptNats(tmp_path, "key")
    with pytest.raises(InterruptedSweepError):
        sweep(model, kept, stop_after, facts=facts)
    (result, _, found), read_then = sweep(model, KeptNats(tmp_path, "key"), facts=facts)
    assert result == whole
    assert all(np.array_equal(found.nats[c], losses.nats[c]) for c in LENGTHS)
    assert read_then <= read
    if stop_after > 300:
        assert read_then < read - 100


def test_pieces_of_another_model_or_damaged_ones_are_scored_again(tmp_path):
    (whole, _, _), read = sweep(decoder())
    sweep(decoder(window=6), KeptNats(tmp_path, "other"))
    sweep(decoder(), KeptNats(tmp_path, "key"))
    pieces = sorted((tmp_path / UNFINISHED).glob("key*"))
    content = bytearray(pieces[0].read_bytes())
    content[len(content) // 2] ^= 1
    pieces[0].write_bytes(content)
    pieces[1].write_bytes(b"")
    pieces[2].write_bytes(pieces[3].read_bytes()[:40])
    (result, _, _), read_again = sweep(decoder(), KeptNats(tmp_path, "key"))
    assert result == whole
    assert 0 < read_again < read


def test_the_key_is_of_weights_and_settings():
    model = ReachModel(11, reach=3)
    weights = weights_hash(model)
    assert weights == weights_hash(ReachModel(11, reach=3))
    assert scoring_key(weights, {"precision": "32-true"}) != scoring_key(weights, {"precision": "64-true"})
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-6
    changed = weights_hash(model)
    assert weights != changed
    assert scoring_key(weights, {}) != scoring_key(changed, {})


def test_a_finished_evaluation_is_not_read_again_and_a_new_length_alone_is(run, monkeypatch, capsys):  # noqa: F811
    def evaluate(lengths):
        settings = EvaluationConfig(context_lengths=lengths)
        return evaluate_checkpoint(run, data={}, evaluation=settings, device="cpu")

    first = evaluate([4, 16])
    assert not (run / "evaluation" / UNFINISHED).exists()
    calls = []
    original = Decoder.hidden
    monkeypatch.setattr(Decoder, "hidden", lambda *a, **k: calls.append(1) or original(*a, **k))
    again = evaluate([4, 16])
    assert not calls
    assert "scored already" in capsys.readouterr().err
    assert again.result == first.result
    assert first.result["weights"] == weights_hash(first.bundle.model)
    assert again.losses.tokens_per_second == first.losses.tokens_per_second
    grown = evaluate([4, 8, 16])
    assert calls
    assert np.array_equal(grown.losses.nats[4], first.losses.nats[4])
    kept = read_losses(run / "evaluation" / "losses.parquet")
    assert sorted(kept.nats) == [4, 8, 16]
    weights = run / "model" / "config.json"
    config = json.loads(weights.read_text())
    config["model"]["window"] = 6
    weights.write_text(json.dumps(config))
    calls.clear()
    assert evaluate([4, 8, 16]).result["rows"] != grown.result["rows"]
    assert calls


def test_what_other_code_scored_is_scored_again(run, monkeypatch, capsys):  # noqa: F811
    def evaluate():
        settings = EvaluationConfig(context_lengths=[4, 16])
        return evaluate_checkpoint(run, data={}, evaluation=settings, device="cpu")

    evaluate()
    monkeypatch.setattr("windowlm.evaluation.evaluate.packages_version", lambda *_: "of another day")
    evaluate()
    assert "scored already" not in capsys.readouterr().err


def test_nats_that_cannot_be_read_are_scored_again_and_it_is_said(run, capsys):  # noqa: F811
    settings = EvaluationConfig(context_lengths=[4, 16])
    whole = evaluate_checkpoint(run, data={}, evaluation=settings, device="cpu")
    losses = run / "evaluation" / "losses.parquet"
    losses.write_bytes(losses.read_bytes()[:100])
    again = evaluate_checkpoint(run, data={}, evaluation=settings, device="cpu")
    assert "losses.parquet: damaged, so that all is scored again" in " ".join(capsys.readouterr().err.split())
    assert again.result == whole.result
    assert read_losses(losses).scoring_key == whole.losses.scoring_key
