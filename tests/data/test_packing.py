"""Packing of documents into sequences, against a slow twin."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from windowlm.data.packing import PackedSequences, stack_sequences

END = 255
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1)


class Split:
    """Documents whose token ids are all different."""

    def __init__(self, lengths: list[int]) -> None:
        starts = np.cumsum([0, *lengths])
        self.documents = [np.arange(a, b) for a, b in pairwise(starts)]
        self.lengths = np.array(lengths)
        self.token_count = int(starts[-1])

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, document: int, start: int, stop: int) -> NDArray[Any]:
        return self.documents[document][start:stop]


def pack(lengths: list[int], sequence_length: int, seed: int | None) -> PackedSequences:
    return PackedSequences(Split(lengths), sequence_length, seed, END)  # type: ignore[arg-type]


def slow_sequences(lengths: list[int], sequence_length: int) -> list[dict[str, list[int]]]:
    """Sequences of documents in order, token by token."""
    stream = [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    token = {place: number for number, place in enumerate(stream)}
    sequences = []
    for start in range(0, len(stream) - 1, sequence_length):
        row: dict[str, list[int]] = {"tokens": [], "targets": [], "documents": [], "positions": []}
        inputs = stream[start : start + sequence_length]
        for document, index in inputs:
            first = min(i for d, i in inputs if d == document)
            row["tokens"].append(token[document, index])
            following = (document, index + 1)
            row["targets"].append(token.get(following, -100))
            row["documents"].append(document - inputs[0][0])
            row["positions"].append(index - first)
        for name, padding in (("tokens", END), ("targets", -100), ("documents", -1), ("positions", 0)):
            row[name] += [padding] * (sequence_length - len(inputs))
        sequences.append(row)
    return sequences


@given(lengths=LENGTHS, sequence_length=st.integers(1, 20))
@settings(deadline=None)
def test_sequences_in_order_equal_the_slow_twin(lengths: list[int], sequence_length: int) -> None:
    packed = pack(lengths, sequence_length, None)
    sequences = [
        {name: array.tolist() for name, array in packed.sequence(position).items()}
        for position in range(len(packed))
    ]
    assert sequences == slow_sequences(lengths, sequence_length)


@given(lengths=LENGTHS, sequence_length=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_every_token_with_a_predecessor_is_a_target_once_an_epoch(
    lengths: list[int], sequence_length: int, seed: int, epoch: int
) -> None:
    packed = pack(lengths, sequence_length, seed)
    first = epoch * packed.sequences_per_epoch
    targets: list[int] = []
    for position in range(first, first + packed.sequences_per_epoch):
        sequence = packed.sequence(position)
        scored = sequence["targets"] != -100
        targets += sequence["targets"][scored].tolist()
        # Ids count up within a document: the target is the token behind the input.
        assert (sequence["targets"][scored] == sequence["tokens"][scored] + 1).all()
    starts = set(np.cumsum([0, *lengths])[:-1].tolist())
    assert sorted(targets) == [token for token in range(sum(lengths)) if token not in starts]


@given(lengths=LENGTHS, sequence_length=st.integers(1, 20), seed=st.integers(0, 5))
@settings(deadline=None)
def test_without_document_masking_the_same_stream_is_one_document_a_sequence(
    lengths: list[int], sequence_length: int, seed: int
) -> None:
    masked = pack(lengths, sequence_length, seed)
    whole = PackedSequences(Split(lengths), sequence_length, seed, END, document_masking=False)  # type: ignore[arg-type]
    targets = 0
    for position in range(len(masked)):
        usual, sequence = masked.sequence(position), whole.sequence(position)
        real = int((usual["documents"] >= 0).sum())
        assert (sequence["tokens"] == usual["tokens"]).all()
        assert sequence["documents"].tolist() == [0] * real + [-1] * (sequence_length - real)
        assert sequence["positions"].tolist() == [*range(real), *[0] * (sequence_length - real)]
        assert (sequence["targets"][: real - 1] == sequence["tokens"][1:real]).all()
        assert (sequence["targets"][real:] == -100).all()
        assert (sequence["targets"] == usual["targets"])[usual["targets"] != -100].all()
        targets += int((sequence["targets"] != -100).sum())
    assert targets == sum(lengths) - 1


def test_positions_and_document_ids_restart() -> None:
    sequence = pack([3, 2, 4], 6, None).sequence(0)
    assert sequence["tokens"].tolist() == [0, 1, 2, 3, 4, 5]
    assert sequence["targets"].tolist() == [1, 2, -100, 4, -100, 6]
    assert sequence["documents"].tolist() == [0, 0, 0, 1, 1, 2]
    assert sequence["positions"].tolist() == [0, 1, 2, 0, 1, 0]


def test_the_last_sequence_is_padded() -> None:
    sequence = pack([3, 2, 4], 6, None).sequence(1)
    assert sequence["tokens"].tolist() == [6, 7, 8, END, END, END]
    assert sequence["targets"].tolist() == [7, 8, -100, -100, -100, -100]
    assert sequence["documents"].tolist() == [0, 0, 0, -1, -1, -1]
    assert sequence["positions"].tolist() == [0, 1, 2, 0, 0, 0]


def test_a_sequence_is_a_function_of_its_position_whatever_was_read_before() -> None:
    packed, fresh = pack([5, 9, 3, 7] * 5, 8, 1), pack([5, 9, 3, 7] * 5, 8, 1)
    in_order = [packed.sequence(position) for position in range(40)]
    for position in reversed(range(40)):
        sequence = fresh.sequence(position)
        assert all((sequence[name] == in_order[position][name]).all() for name in sequence)


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        packed = pack([5, 9, 3, 7] * 5, 8, seed)
        start = epoch * len(packed)
        return [int(packed.sequence(start + position)["tokens"][0]) for position in range(len(packed))]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 1) == order(0, 1)


def test_a_batch_has_the_promised_names_types_and_shapes() -> None:
    packed = pack([5, 9], 8, 1)
    batch = stack_sequences([packed.sequence(0), packed.sequence(1)])
    assert {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "tokens_BT": ("torch.int64", (2, 8)),
        "targets_BT": ("torch.int64", (2, 8)),
        "documents_BT": ("torch.int32", (2, 8)),
        "positions_BT": ("torch.int64", (2, 8)),
    }


@pytest.mark.parametrize("sequence_length", [1, 7, 14, 15])
def test_the_number_of_sequences_covers_all_targets(sequence_length: int) -> None:
    packed = pack([15], sequence_length, None)
    assert len(packed) == -(-14 // sequence_length)
