"""One pass with a rolling cache against windows, on both sides of the receptive field."""

import numpy as np
import pytest
import torch

from tests.study.oracles import FACTS, letters
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.evaluation.passes import passes_of
from windowlm.evaluation.precision import scoring
from windowlm.evaluation.streamed_loss import streamed_nats, streams
from windowlm.evaluation.targets import choose_targets, protocol_windows
from windowlm.evaluation.token_loss import target_nats
from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.model.cost import model_cost
from windowlm.model.decoder import Decoder

from .fakes import MemoryDocuments

TOKEN_BYTES_V = np.append(np.ones(255, dtype=np.int64), 0)
SHAPE = {"dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward_dim": 24, "layers": 3}
KINDS = {
    "plain": {"window": 4},
    "mixed windows": {"window": [2, 7, 4]},
    "without positions": {"window": 4, "rotary": None},
    "reads behind": {
        "window": 3,
        "short_convolution": 3,
        "ngram_embeddings": NgramEmbeddingsConfig(orders=[2, 4], buckets=97),
    },
}


def decoder(settings):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, **settings), 256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    field = model_cost(model.config, 256, 64, 4).receptive_field
    return model, field


def texts(sizes=(150, 97, 60, 59, 41)):
    return MemoryDocuments([list(letters(n, n).encode()) for n in sizes], end_mark=255)


@pytest.mark.parametrize(
    ("beyond", "batch_tokens"), [(0, 1), *((beyond, size) for beyond in (0, 1) for size in (33, 64, 1000))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_windows(kind, beyond, batch_tokens):
    model, field = decoder(KINDS[kind])
    assert streams(model)
    documents = texts((60, 59, 41)) if batch_tokens == 1 else texts()
    targets = choose_targets(documents, TOKEN_BYTES_V, field + beyond, None)
    options = {"device": torch.device("cpu"), "batch_tokens": batch_tokens}
    read = []
    with scoring(model, "64-true") as scored:
        windows = protocol_windows(targets.regions, field + beyond)
        direct = target_nats(scored, documents, windows, **options)
        streamed = streamed_nats(scored, documents, targets.regions, field, on_tokens=read.append, **options)
    # The angles of rotary positions are rounded to float32, and a stream counts them from further back.
    assert np.abs(streamed - direct).max() < (1e-10 if kind == "without positions" else 1e-5)
    assert sum(read) >= targets.target_count + (field - 1) * len(targets.regions)
    with scoring(model, "32-true") as scored:
        streamed = streamed_nats(scored, documents, targets.regions, field, **options)
        direct = target_nats(scored, documents, windows, **options)
    assert np.abs(streamed - direct).max() < 1e-5


def test_only_contexts_that_hold_the_receptive_field_are_streamed():
    model, field = decoder({"window": 4})
    documents = texts()
    lengths = [field - 1, field, field + 1, 2 * field]
    targets = choose_targets(documents, TOKEN_BYTES_V, lengths[-1], None)
    options = {"receptive_field": field, "batch_tokens": 64}
    passes = passes_of(model, documents, targets, lengths, streaming=True, **options)
    protocol = [each.context_lengths for each in passes if each.kind == "protocol"]
    assert protocol == [(field - 1,), (field, field + 1, 2 * field)]
    assert all(sum(part.targets for part in each.parts) == targets.target_count for each in passes)
    for without in (
        passes_of(model, documents, targets, lengths, streaming=False, **options),
        passes_of(model, documents, targets, lengths, streaming=True, **options | {"receptive_field": None}),
    ):
        assert [each.context_lengths for each in without if each.kind == "protocol"] == [
            (c,) for c in lengths
        ]
    assert not streams(decoder({"window": 4, "attention_sinks": 2})[0])


def test_a_sweep_that_streams_has_the_result_of_one_that_does_not():
    model, field = decoder({"window": 4})
    facts = FACTS | {"receptive_field": field}
    results = []
    for streaming in (True, False):
        evaluation = EvaluationConfig(
            context_lengths=[field - 1, field, 2 * field, 4 * field],
            max_targets=None,
            streaming=streaming,
            precision="64-true",
        )
        results.append(length_sweep(model, texts(), TOKEN_BYTES_V, evaluation, facts))
    (one, _, losses), (other, _, direct) = results
    for row, twin in zip(one["rows"], other["rows"], strict=True):
        assert row["bits_per_byte"] == pytest.approx(twin["bits_per_byte"], abs=1e-6)
    for c in losses.nats:
        assert np.abs(losses.nats[c] - direct.nats[c]).max() < 1e-5
