"""Controls on models that are known to use their far context, its order, or nothing of it."""

import numpy as np
import pytest
import torch

from tests.evaluation.fakes import UniformModel
from windowlm.evaluation.precision import scoring
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.study.far_context import far_context, shuffled_blocks
from windowlm.study.reach import gradient_reach, perturbation_reach, reach
from windowlm.study.useful_reach import useful_reach

from .oracles import OneHotModel, PeriodModel, letters, scored

BLOCKS = {"near": 16, "far": 128, "block": 32, "max_targets": 10_000, "seed": 0}
SHAPE = {"dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward_dim": 24}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def periodic(period, length=400, seed=0):
    return (letters(period, seed) * (length // period + 1))[:length]


def conditions(model, texts, authors=None, **settings):
    subject, documents, _ = scored(model, texts, lengths=(16, 128), authors=authors)
    found = far_context(subject, documents, **BLOCKS | settings)
    return {row["far_context"]: row for row in found["rows"]}, found


class MostFrequent(OneHotModel):
    """Predicts the most frequent token so far: far context helps, its order does not."""

    def predicted(self, tokens):
        counts, found = np.zeros(256, dtype=int), []
        for token in tokens:
            counts[token] += 1
            found.append(int(counts.argmax()))
        return found


def test_a_uniform_model_does_not_care_about_its_far_context():
    rows, found = conditions(UniformModel(256), [letters(400, seed) for seed in range(3)])
    assert list(rows) == ["intact", "left out", "shuffled", "another author"]
    for name in ("left out", "shuffled", "another author"):
        assert (rows[name]["difference"], rows[name]["authors"]) == (0.0, 3)
    assert "cannot be told" in found["meaning"][1]


def test_a_model_with_a_long_period_needs_its_far_context_in_order_and_its_own():
    rows, found = conditions(PeriodModel(period=96, reach=96), [periodic(96, 400, seed) for seed in range(4)])
    assert rows["intact"]["bits_per_byte"] < 1e-6
    # Most of what lies a period back is replaced; a chunk of 16 reads no part of it from the near context.
    assert rows["left out"]["bits_per_byte"] == pytest.approx(8.0, rel=1e-6)
    for name in ("shuffled", "another author"):
        assert rows[name]["difference_low"] > 5
    assert "is worth" in found["meaning"][0]
    assert "worse than the document's own" in found["meaning"][2]


def test_a_model_that_reaches_less_than_the_near_context_is_the_same_everywhere():
    rows, _ = conditions(PeriodModel(period=16, reach=16), [periodic(16, 400, seed) for seed in range(3)])
    assert {row["bits_per_byte"] for row in rows.values()} == {rows["intact"]["bits_per_byte"]}


def test_order_is_told_from_presence():
    texts = [letters(400, seed, "ab" + "c" * (2 + seed)) for seed in range(4)]
    rows, _ = conditions(MostFrequent(sure=3.0), texts)
    assert rows["shuffled"]["difference"] == pytest.approx(0, abs=1e-9)


def test_one_author_has_no_stranger():
    rows, found = conditions(UniformModel(256), [letters(400, 1), letters(400, 2)], authors=["A", "A"])
    assert "another author" not in rows
    assert found["left_out"] == ["All documents are one author's, so no far context is another's."]


def test_few_blocks_are_never_left_in_their_order():
    tokens = np.arange(20)
    for seed in range(20):
        mixed = shuffled_blocks(tokens, np.ones(20, dtype=int), 10, np.random.default_rng(seed))
        assert mixed.tolist() == [*range(10, 20), *range(10)]


def test_a_far_context_of_few_blocks_is_not_shuffled():
    texts = [letters(400, seed) for seed in range(3)]
    rows, found = conditions(UniformModel(256), texts, block=64)
    assert "shuffled" not in rows
    assert "too few to be shuffled" in found["left_out"][-1]


def test_shuffled_blocks_are_the_blocks():
    token_bytes_V = np.array([1, 2, 3])
    tokens = np.random.default_rng(0).integers(0, 3, size=97)
    mixed = shuffled_blocks(tokens, token_bytes_V, 16, np.random.default_rng(1))
    assert sorted(mixed) == sorted(tokens)
    assert mixed.tolist() != tokens.tolist()
    ends = np.cumsum(token_bytes_V[tokens])
    spelled = "".join(map(str, mixed))
    for block in range(int(ends[-1] - 1) // 16 + 1):
        inside = tokens[(ends > 16 * block) & (ends <= 16 * (block + 1))]
        assert "".join(map(str, inside)) in spelled


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers": 1, "window": 1}, 1),
        ({"layers": 1, "window": 5}, 5),
        ({"layers": 2, "window": 4}, 7),
        ({"layers": 3, "window": [4, 2, 3]}, 7),
        ({"layers": 2, "window": 4, "rotary": None}, 7),
        ({"layers": 1, "window": None}, 40),
    ],
    ids=str,
)
def test_the_measured_reach_of_a_decoder_is_that_of_its_settings(settings, expected):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, **settings), 50)
    tokens = np.random.default_rng(0).integers(0, 50, size=40)
    with scoring(model, "64-true") as double:
        assert gradient_reach(double, tokens) == expected
        assert perturbation_reach(double, tokens, 50) == expected


def test_a_model_that_looks_too_far_is_called_wrong():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, layers=2, window=4), 50)
    tokens = np.random.default_rng(0).integers(0, 50, size=40)
    with scoring(model, "64-true") as double:
        assert reach(double, tokens, 7, 50, 0)["meaning"] == ["Measured and computed reach agree: 7 tokens."]
        assert "something is wrong" in reach(double, tokens, 6, 50, 0)["meaning"][0]
        assert "settings allow 9 tokens, and 7" in reach(double, tokens, 9, 50, 0)["meaning"][0]


def test_the_useful_reach_of_a_copying_model_is_its_period():
    texts = [periodic(32, 500, seed) for seed in range(3)]
    _, _, result = scored(PeriodModel(period=32, reach=32), texts, lengths=(4, 8, 16, 32, 64))
    found = useful_reach(result)
    assert found["rows"][0]["useful_context"] == 32
    _, _, flat = scored(UniformModel(256), texts, lengths=(4, 8))
    assert useful_reach(flat)["rows"][0]["useful_context"] is None
    assert "no gain to be had" in useful_reach(flat)["meaning"][0]
