"""The sweep over context lengths."""

import json
import math

import numpy as np
import pytest
import torch

from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.length_sweep import length_sweep, plan_targets
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder

from .fakes import MemoryDocuments, ReachModel, UniformModel, one_byte_each, random_documents

FACTS = {
    "training_length": 32,
    "window": 8,
    "receptive_field": 15,
    "tokens_trained": 1000,
    "tokenizer_identity": "t",
    "source_identity": "s",
    "split": "validation",
}


def sweep(model, documents, token_bytes_V, lengths=(4, 8, 32), precision="64-true", **settings):
    evaluation = EvaluationConfig(context_lengths=list(lengths), precision=precision, **settings)
    return length_sweep(model, documents, token_bytes_V, evaluation, FACTS)[0]


def test_a_uniform_model_has_the_vocabulary_size_as_perplexity_at_every_length():
    documents = random_documents([100, 90, 40], vocabulary_size=997)
    result = sweep(UniformModel(997), documents, one_byte_each(997), precision="32-true")
    for row in result["rows"]:
        assert row["perplexity"] == pytest.approx(997, rel=1e-12)
        assert row["naive_perplexity"] == pytest.approx(997, rel=1e-12)
        assert row["bits_per_byte"] == pytest.approx(math.log2(997), rel=1e-12)


def test_bits_per_byte_of_multi_byte_characters_by_hand():
    pieces = ["a", "é", "漢", "😀", "b"]
    token_bytes_V = np.array([0] + [len(piece.encode()) for piece in pieces])
    documents = MemoryDocuments([[1, 2, 3, 4, 5]])
    result = sweep(UniformModel(6), documents, token_bytes_V, lengths=[2])
    (row,) = result["rows"]
    # Targets: a CJK character of 3 bytes, an emoji of 4, a letter of 1; each costs log2(6) bits.
    assert (row["targets"], row["bytes"]) == (3, 8)
    assert row["bits_per_byte"] == pytest.approx(3 * math.log2(6) / 8, rel=1e-12)


def test_sums_are_divided_once():
    documents = random_documents([200, 60, 90])
    result = sweep(ReachModel(11, reach=6), documents, one_byte_each())
    targets = sum(document["targets"] for document in result["documents"])
    for row in result["rows"]:
        nats = sum(document["nats"][str(row["context_length"])] for document in result["documents"])
        assert row["nats"] == pytest.approx(nats, rel=1e-13)
        assert row["targets"] == targets
        assert row["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-12)


def test_a_windowed_model_does_not_change_beyond_its_reach():
    result = sweep(ReachModel(11, reach=8), random_documents([200, 60]), one_byte_each())
    nats = {row["context_length"]: row["nats"] for row in result["rows"]}
    assert nats[8] == pytest.approx(nats[32], abs=1e-10)
    assert abs(nats[4] - nats[32]) > 1e-2
    longest = result["rows"][-1]["change_from_shortest"]["mean"]
    assert result["rows"][1]["change_from_shortest"]["mean"] == pytest.approx(longest, abs=1e-10)


def test_the_result_does_not_depend_on_the_batch_size():
    documents = random_documents([130, 70, 55])
    small, large = (
        sweep(ReachModel(11, reach=8), documents, one_byte_each(), batch_tokens=size) for size in (1, 4096)
    )
    for one, other in zip(small["rows"], large["rows"], strict=True):
        assert one["nats"] == pytest.approx(other["nats"], abs=1e-10)


def test_windows_beyond_the_training_length_are_called_extrapolation():
    result = sweep(UniformModel(11), random_documents([200]), one_byte_each(), lengths=[8, 16, 17])
    assert [row["extrapolation"] for row in result["rows"]] == [False, False, True]


def test_the_paired_difference_is_that_of_the_documents():
    documents = random_documents([200, 60, 90, 120])
    result = sweep(ReachModel(11, reach=20), documents, one_byte_each())
    differences = [
        (document["nats"]["32"] - document["nats"]["4"]) / math.log(2) / document["bytes"]
        for document in result["documents"]
    ]
    paired = result["paired"]
    assert (paired["shortest"], paired["longest"], paired["pairs"]) == (4, 32, 4)
    assert paired["mean"] == pytest.approx(np.mean(differences))
    assert paired["low"] < paired["mean"] < paired["high"]
    assert {key: paired[key] for key in ("mean", "low", "high", "pairs")} == result["rows"][-1][
        "change_from_shortest"
    ]


def test_one_length_has_nothing_to_compare_with():
    result = sweep(UniformModel(11), random_documents([100]), one_byte_each(), lengths=[8])
    assert result["paired"] is None
    assert result["rows"][0]["change_from_shortest"] is None


def test_a_broken_evaluator_that_averages_means_would_give_another_number():
    documents = random_documents([400, 40])
    result = sweep(ReachModel(11, reach=6), documents, one_byte_each())
    row = result["rows"][-1]
    means = [document["nats"]["32"] / document["targets"] for document in result["documents"]]
    assert abs(math.exp(np.mean(means)) - row["perplexity"]) > 1e-3


def test_the_result_is_json_and_progress_ends_at_the_total():
    seen = []
    evaluation = EvaluationConfig(context_lengths=[4, 8])
    result, targets, _ = length_sweep(
        ReachModel(11, reach=3),
        random_documents([100, 33, 5]),
        one_byte_each(),
        evaluation,
        FACTS,
        on_progress=lambda done, total, read: seen.append((done, total)),
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert seen[-1][0] == seen[-1][1] == seen[0][1]
    assert [read for read, _ in seen] == sorted(read for read, _ in seen)
    assert result["targets_hash"] == targets.hash
    assert result["documents_too_short"] == 1


def test_the_targets_of_the_sweep_can_be_planned_before_there_is_a_model():
    documents = random_documents([100, 90])
    lengths, targets = plan_targets(documents, one_byte_each(), EvaluationConfig(), training_length=32)
    evaluation = EvaluationConfig(context_lengths=lengths)
    _, swept, _ = length_sweep(UniformModel(11), documents, one_byte_each(), evaluation, FACTS)
    assert lengths == [1, 2, 4, 8, 16]
    assert targets == swept


def test_a_diverged_model_is_a_clear_error():
    model = ReachModel(11, reach=3)
    model.head.weight.data *= 1e6
    with pytest.raises(UserError, match="diverged"):
        sweep(model, random_documents([100]), one_byte_each())


def test_overlapping_windows_from_the_start_of_each_book_scored_in_their_second_halves():
    """The protocol of books: windows of 2c bytes every c bytes, the first so many of each, by hand."""
    c, windows = 16, 3
    documents = random_documents([300, 64, 65])
    torch.manual_seed(0)
    shape = ModelConfig(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=16, window=8)
    model = Decoder(shape, 11)
    result = sweep(
        *(model, documents, one_byte_each()),
        lengths=[c],
        max_targets=None,
        max_targets_per_document=windows * c,
        streaming=False,
    )
    nats = []
    for document in range(len(documents)):
        for number in range(windows):
            window = torch.from_numpy(documents.read(document, number * c, number * c + 2 * c))
            log_probabilities = model.double()(window[None])[0].log_softmax(-1)
            nats += [-float(log_probabilities[place - 1, window[place]]) for place in range(c, 2 * c)]
    (row,) = result["rows"]
    assert row["targets"] == row["bytes"] == len(nats) == 3 * windows * c
    assert row["bits_per_byte"] == pytest.approx(math.fsum(nats) / len(nats) / math.log(2), rel=1e-12)


def test_equal_bytes_of_each_author_are_scored_and_authors_are_the_clusters():
    documents = random_documents(
        [100, 60, 200, 40, 300, 30], vocabulary_size=11, authors=["A", "A", "B", "C", None, "D"]
    )
    token_bytes_V = np.array([0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1])
    evaluation = EvaluationConfig(
        context_lengths=[4, 32], max_targets=None, bytes_per_author=140, precision="64-true"
    )
    result, targets, losses = length_sweep(ReachModel(11, 20), documents, token_bytes_V, evaluation, FACTS)
    bytes_of = dict.fromkeys(losses.clusters, 0)
    for document, cluster in zip(result["documents"], losses.clusters, strict=True):
        bytes_of[cluster] += document["bytes"]
    assert len(bytes_of) == 3
    assert {"A", "B"} < set(bytes_of)
    # A token of up to 3 bytes that would exceed the share is left out.
    assert all(138 <= count <= 140 for count in bytes_of.values())
    assert (targets.authors_too_short, targets.documents_too_short) == (1, 1)
    nats = {c: dict.fromkeys(bytes_of, 0.0) for c in ("4", "32")}
    for document, cluster in zip(result["documents"], losses.clusters, strict=True):
        for c, by_cluster in nats.items():
            by_cluster[cluster] += document["nats"][c]
    changes = [(nats["32"][key] - nats["4"][key]) / math.log(2) / bytes_of[key] for key in bytes_of]
    assert result["paired"]["pairs"] == 3
    assert result["paired"]["mean"] == pytest.approx(np.mean(changes))
    assert result["cluster"] == "author"


def test_too_many_bytes_for_every_author_is_a_clear_error():
    evaluation = EvaluationConfig(context_lengths=[4], max_targets=None, bytes_per_author=1000)
    with pytest.raises(UserError, match=r"^evaluation\.bytes_per_author=1000: none of 2 authors"):
        plan_targets(random_documents([100, 90]), one_byte_each(), evaluation, 32)


def test_a_windowed_models_lengths_beyond_its_reach_are_equal_and_those_below_are_not_said_to_be():
    result = sweep(ReachModel(11, reach=8), random_documents([200] * 6), one_byte_each())
    verdicts = [row["equal_to_longest"] for row in result["rows"]]
    assert [verdict and verdict["equivalent"] for verdict in verdicts] == [False, True, None]
