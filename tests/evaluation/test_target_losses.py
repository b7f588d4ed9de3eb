"""Nats of single targets, in memory and as parquet, and the curve over positions made of them."""

import math

import numpy as np
import pytest

from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.evaluation.target_losses import read_losses, write_losses

from .fakes import MemoryDocuments, ReachModel, random_documents
from .test_length_sweep import FACTS

TOKEN_BYTES_V = np.array([0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1])


def swept(documents, reach=6, lengths=(4, 8, 32)):
    evaluation = EvaluationConfig(context_lengths=list(lengths), precision="64-true")
    return length_sweep(ReachModel(11, reach), documents, TOKEN_BYTES_V, evaluation, FACTS)


def test_sums_over_the_file_are_those_of_the_result_to_the_bit(tmp_path):
    result, targets, losses = swept(random_documents([130, 20, 70, 55], authors=["A", "B", "A", None]))
    write_losses(tmp_path / "losses.parquet", losses)
    read = read_losses(tmp_path / "losses.parquet")
    assert read.targets_hash == targets.hash
    assert (read.document_hashes, read.authors) == (losses.document_hashes, losses.authors)
    for row in result["rows"]:
        c = row["context_length"]
        assert math.fsum(read.by_document(read.nats[c])) == row["nats"]
        assert math.fsum(read.by_document(read.naive_nats[c])) == row["naive_nats"]
        assert (len(read.token), int(read.byte_count.sum())) == (row["targets"], row["bytes"])


def test_each_target_is_found_in_the_text():
    documents = random_documents([130, 70])
    _, targets, losses = swept(documents)
    for region in targets.regions:
        number = losses.document_hashes.index(region.document_hash)
        inside = losses.document == number
        assert losses.token[inside].tolist() == list(range(region.first, region.end))
        sizes = TOKEN_BYTES_V[documents.read(region.document, 0, region.end)]
        starts = [int(sizes[:token].sum()) for token in range(region.first, region.end)]
        assert losses.first_byte[inside].tolist() == starts
        assert losses.byte_count[inside].tolist() == sizes[region.first :].tolist()
        assert losses.offsets[inside].tolist() == list(range(region.end - region.first))


def test_the_position_curve_is_the_naive_loss_by_place_in_the_window():
    result, _, losses = swept(random_documents([130, 70, 55]), reach=3)
    rows = result["position_curve"]
    assert [(row["first"], row["last"]) for row in rows] == [
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
        (16, 31),
        (32, 32),
    ]
    assert sum(row["nats"] for row in rows) == pytest.approx(result["rows"][-1]["naive_nats"])
    assert sum(row["targets"] for row in rows) == result["rows"][-1]["targets"]
    for row in rows:
        expected = bytes_seen = 0
        for place, (document, nats, size) in enumerate(
            zip(losses.document, losses.naive_nats[32], losses.byte_count, strict=True)
        ):
            position = (place - int(np.argmax(losses.document == document))) % 32 + 1
            if row["first"] <= position <= row["last"]:
                expected, bytes_seen = expected + nats, bytes_seen + size
        assert row["bits_per_byte"] == pytest.approx(expected / math.log(2) / bytes_seen)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_a_damaged_file_is_a_clear_error(tmp_path, content):
    path = tmp_path / "losses.parquet"
    with pytest.raises(UserError, match="there is no such file"):
        read_losses(path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged, or not the losses.*; do this$"):
        read_losses(path, "do this")


def test_a_cut_file_is_a_clear_error(tmp_path):
    path = tmp_path / "losses.parquet"
    write_losses(path, swept(MemoryDocuments([list(range(1, 11)) * 9]))[2])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        read_losses(path)
