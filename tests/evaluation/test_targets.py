"""The fixed target set and the windows that score it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windowlm.errors import UserError
from windowlm.evaluation.targets import (
    ScoredWindow,
    TargetRegion,
    assert_tiled,
    choose_targets,
    hash_of_ranges,
    naive_windows,
    protocol_windows,
    read_byte_ranges,
    targets_in_bytes,
)

from .fakes import MemoryDocuments, one_byte_each, random_documents


def scored_positions(windows):
    return [(window.document, position) for window in windows for position in range(window.first, window.end)]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    contexts=st.sets(st.integers(1, 40), min_size=1, max_size=4),
    budget=st.none() | st.integers(1, 300),
)
def test_every_context_length_scores_the_same_tokens_with_c_to_2c_tokens_of_context(
    lengths, contexts, budget
):
    documents = random_documents(lengths)
    targets = choose_targets(documents, one_byte_each(), max(contexts), budget)
    expected = [(region.document, p) for region in targets.regions for p in range(region.first, region.end)]
    for c in contexts:
        protocol, naive = protocol_windows(targets.regions, c), naive_windows(targets.regions, c)
        for windows in (protocol, naive):
            assert scored_positions(windows) == expected
        for window in protocol:
            assert window.start >= 0
            assert window.end <= lengths[window.document]
            assert window.first - window.start == c
            assert window.end - window.start <= 2 * c
        assert all(window.first - window.start == 1 and window.end - window.first <= c for window in naive)


def test_without_a_budget_every_token_that_has_the_longest_context_is_a_target():
    targets = choose_targets(random_documents([10, 30, 20]), one_byte_each(), 20, None)
    assert [(r.document, r.first, r.end) for r in targets.regions] == [(1, 20, 30)]
    assert (targets.target_count, targets.documents_too_short, targets.documents_over_budget) == (10, 2, 0)


def test_the_end_mark_is_no_target():
    documents = MemoryDocuments([[1, 2, 3]])
    (region,) = choose_targets(documents, one_byte_each(), 1, None).regions
    assert documents.read(0, region.first, region.end).tolist() == [2, 3]


def test_byte_offsets_are_those_of_the_text_with_multi_byte_characters():
    text = "aé漢😀b"
    pieces = ["a", "é", "漢", "😀", "b"]
    token_bytes_V = np.array([0] + [len(piece.encode()) for piece in pieces])
    documents = MemoryDocuments([[1, 2, 3, 4, 5]])
    (region,) = choose_targets(documents, token_bytes_V, 2, None).regions
    assert text.encode()[region.first_byte : region.end_byte].decode() == "漢😀b"


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=12), budget=st.integers(1, 400))
def test_a_budget_is_never_exceeded_and_nearly_used_up(lengths, budget):
    available = [max(0, length - 16) for length in lengths]
    targets = choose_targets(random_documents(lengths), one_byte_each(), 16, budget)
    assert targets.target_count <= budget
    if sum(available) <= budget:
        assert targets.target_count == sum(available)
    elif targets.regions:
        by_document = {region.document: region.end - region.first for region in targets.regions}
        smallest = min(
            (count for document, count in by_document.items() if count < available[document]), default=None
        )
        if smallest is not None:
            assert max(by_document.values()) == smallest, "the larger shares are equal"
    counted = len(targets.regions) + targets.documents_too_short + targets.documents_over_budget
    assert counted == len(lengths)


def test_a_small_budget_goes_to_few_documents_so_that_long_contexts_stay_cheap():
    targets = choose_targets(random_documents([500] * 20), one_byte_each(), 100, 1000)
    assert [region.end - region.first for region in targets.regions] == [100] * 10
    assert targets.documents_over_budget == 10


def test_targets_do_not_depend_on_the_order_of_the_documents():
    generator = np.random.default_rng(1)
    texts = [generator.integers(1, 11, 150) for _ in range(8)]
    forward = choose_targets(MemoryDocuments(texts), one_byte_each(), 32, 200)
    backward = choose_targets(MemoryDocuments(texts[::-1]), one_byte_each(), 32, 200)
    assert forward.hash == backward.hash
    assert forward.byte_ranges == backward.byte_ranges


@pytest.mark.parametrize("change", ["text", "context", "budget"])
def test_other_targets_have_another_hash(change):
    def chosen(text=3, context=8, budget=50):
        return choose_targets(MemoryDocuments([[text] * 100]), one_byte_each(), context, budget).hash

    assert chosen() == chosen()
    assert chosen(**{change: 7}) != chosen()


@pytest.mark.parametrize(
    "windows",
    [
        [],
        [ScoredWindow(0, 0, 4, 8), ScoredWindow(0, 4, 9, 10)],
        [ScoredWindow(0, 0, 4, 8), ScoredWindow(0, 3, 7, 10)],
        [ScoredWindow(0, 0, 4, 12)],
        [ScoredWindow(1, 0, 4, 10)],
        [ScoredWindow(0, 4, 4, 10)],
    ],
    ids=["nothing", "a gap", "twice", "too far", "another document", "no context"],
)
def test_windows_that_do_not_tile_the_targets_are_found_out(windows):
    with pytest.raises((AssertionError, StopIteration)):
        assert_tiled([TargetRegion(0, "hash", 4, 10, 4, 10)], windows)


class OfText(MemoryDocuments):
    """Documents that are known by their text, whatever the tokens."""

    def __init__(self, documents, texts):
        super().__init__(documents)
        self.texts = texts

    def document_hash(self, document):
        return self.texts[document]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=12, max_size=60),
    context=st.integers(1, 8),
    budget=st.integers(1, 40),
)
def test_tokens_within_the_bytes_of_another_evaluation_are_its_targets(sizes, context, budget):
    byte_count = sum(sizes)
    if byte_count <= 32:
        return
    by_bytes = OfText([np.ones(byte_count, dtype=int)], ["a"])
    given_set = choose_targets(by_bytes, one_byte_each(), 32, budget)
    token_bytes_V = np.arange(5)
    (region,) = given_set.regions
    inside, at = [], 0
    for token, size in enumerate(sizes):
        if at >= region.first_byte and at + size <= region.end_byte:
            inside.append((token, at, at + size))
        at += size
    taken_over = OfText([sizes], ["a"]), token_bytes_V, min(context, 8), given_set.byte_ranges
    if not inside:
        with pytest.raises(UserError, match="no token of this tokenizer lies wholly in them"):
            targets_in_bytes(*taken_over)
        return
    found = targets_in_bytes(*taken_over)
    assert found.within == given_set.hash
    assert found.target_count == len(inside)
    for each in found.regions:
        assert (each.first, each.first_byte) == inside[0][:2]
        assert (each.end - 1, each.end_byte) == inside[-1][::2]
        assert region.end_byte - 3 <= each.end_byte <= region.end_byte
        assert region.first_byte <= each.first_byte <= region.first_byte + 3


def test_the_bytes_of_the_same_tokenizer_are_the_same_targets():
    documents = random_documents([60, 90, 10], seed=3)
    first = choose_targets(documents, one_byte_each(), 20, 50)
    again = targets_in_bytes(documents, one_byte_each(), 20, first.byte_ranges)
    assert again.hash == first.hash == again.within
    assert again.regions == first.regions


def test_targets_that_cannot_be_taken_over_are_named(tmp_path):
    documents = random_documents([60, 90], seed=3)
    ranges = choose_targets(documents, one_byte_each(), 20, None).byte_ranges
    with pytest.raises(UserError, match=r"document 1 of 2 is not among the 2 that are scored here"):
        targets_in_bytes(random_documents([60, 90], seed=4), one_byte_each(), 20, ranges)
    with pytest.raises(UserError, match=r"context_lengths: .* 20 tokens before them, and the longest .* 21"):
        targets_in_bytes(documents, one_byte_each(), 21, ranges)
    beyond = [ranges[0], {**ranges[1], "end": 91}]
    with pytest.raises(UserError, match=r"document 2 of 2 has 90 bytes and its targets end at 91"):
        targets_in_bytes(documents, one_byte_each(), 20, beyond)
    path = tmp_path / "targets.json"
    for wrong in (
        [ranges[0], {**ranges[1], "end": ranges[1]["start"]}],
        [{**ranges[0], "end": 40}, {**ranges[0], "start": 39}],
        [{**ranges[0], "start": -1}],
    ):
        path.write_text(json.dumps({"documents": wrong, "hash": hash_of_ranges(wrong)}))
        with pytest.raises(UserError, match="damaged, or not the targets"):
            read_byte_ranges(path)
    path.unlink()
    with pytest.raises(UserError, match=r"targets\.json: No such file"):
        read_byte_ranges(path)
    for content in ("{", "[]", '{"documents": [], "hash": "x"}', '{"documents": [{"document_hash": "a"}]}'):
        path.write_text(content)
        with pytest.raises(UserError, match="damaged, or not the targets of an evaluation"):
            read_byte_ranges(path)
