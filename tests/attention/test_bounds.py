"""Ranges, segments and block masks made from documents, against the mask itself."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.profiler import ProfilerActivity, profile

from windowlm.attention.backends import flex
from windowlm.attention.document_layout import PADDING
from windowlm.attention.rotary import RotaryEmbedding
from windowlm.attention.window import OFFSETS_MULTIPLE, RUNS, Visibility, move_together

from .cases import Case, draw

CPU = torch.device("cpu")
DRAWN = [draw(seed) for seed in range(400)]
RANGED = [case for case in DRAWN if not case.sinks and case.key_positions is None and case.queries <= 300]


def test_ranges_say_exactly_what_is_visible() -> None:
    assert sum(case.documents is not None for case in RANGED) > 40
    for case in RANGED:
        visibility = case.visibility("cpu")
        bounds = visibility.bounds(case.queries, case.keys, CPU)
        key_S = torch.arange(case.keys)
        at_T1 = torch.arange(case.keys - case.queries, case.keys)[:, None]
        seen_BTS = (bounds.first_keys[..., None] <= key_S) & (key_S <= bounds.last_keys[..., None])
        seen_BTS &= at_T1 <= bounds.last_queries[:, None, :]
        mask_BTS = visibility.mask(case.queries, case.keys, CPU)
        assert torch.equal(seen_BTS.expand_as(mask_BTS), mask_BTS), case
        if bounds.gaps == 0 and visibility.layout is not None:
            assert not visibility.layout.gaps


def test_what_is_made_from_runs_is_what_each_token_says() -> None:
    checked = gaps = 0
    for case in DRAWN:
        if case.documents is None or case.key_positions is not None:
            continue
        of_runs = case.visibility("cpu")
        of_tokens = replace(of_runs, _of_window={}, _of_documents={})
        assert RUNS in of_runs._of_documents
        sizes = case.queries, case.keys, CPU
        assert all(map(torch.equal, of_runs.bounds(*sizes), of_tokens.bounds(*sizes))), case
        assert all(map(torch.equal, of_runs.sink_ranges(*sizes), of_tokens.sink_ranges(*sizes))), case
        assert torch.equal(of_runs.behind(case.queries, CPU), of_tokens.behind(case.queries, CPU)), case
        checked += 1
        gaps += of_runs.layout is not None and of_runs.layout.gaps
    assert checked > 40
    assert gaps > 5


def test_without_gaps_the_ranges_of_queries_alone_are_enough() -> None:
    for case in RANGED:
        visibility = case.visibility("cpu")
        bounds = visibility.bounds(case.queries, case.keys, CPU)
        if bounds.gaps:
            assert visibility.layout is not None
            assert visibility.layout.gaps
            continue
        key_S = torch.arange(case.keys)
        seen_BTS = (bounds.first_keys[..., None] <= key_S) & (key_S <= bounds.last_keys[..., None])
        mask_BTS = visibility.mask(case.queries, case.keys, CPU)
        assert torch.equal(seen_BTS.expand_as(mask_BTS), mask_BTS), case


def test_segments_are_the_runs_of_the_rows_laid_end_to_end() -> None:
    packed = [case for case in DRAWN if case.documents is not None and case.key_documents is None]
    checked = 0
    for case in packed:
        visibility = case.visibility("cpu")
        assert visibility.layout is not None
        if visibility.layout.gaps:
            continue
        segments = visibility.segments(case.batch, case.queries, CPU)
        assert case.documents is not None
        starts = [
            row * case.queries + token
            for row, documents in enumerate(case.documents)
            for token in range(case.queries)
            if token == 0 or documents[token] != documents[token - 1]
        ]
        total = case.batch * case.queries
        offsets = segments.offsets.tolist()
        assert offsets[: len(starts)] == starts
        assert set(offsets[len(starts) :]) == {total}
        assert len(offsets) % OFFSETS_MULTIPLE == 0
        longest = max(b - a for a, b in zip(starts, [*starts[1:], total], strict=True))
        assert longest <= segments.longest < 2 * longest
        assert segments.longest.bit_count() == 1
        padded = any(PADDING in documents for documents in case.documents)
        assert (segments.real is not None) == padded
        checked += 1
    assert checked > 40


def test_one_row_of_documents_serves_a_batch() -> None:
    visibility = Visibility.build(window=3, documents_BT=torch.tensor([[0, 0, 1, 1]], dtype=torch.int32))
    segments = visibility.segments(3, 4, CPU)
    assert segments.offsets.tolist()[:7] == [0, 2, 4, 6, 8, 10, 12]


def blocks_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Partly and wholly visible blocks of `flex`, and its mask function over all pairs."""
    visibility = case.visibility("cpu")
    query = torch.empty(case.batch, case.queries, 1, 16)
    blocks = flex.block_mask(visibility, query, torch.empty(case.batch, case.keys, 1, 16))
    rows = visibility.mask(case.queries, case.keys, CPU).shape[0]
    partly, wholly = (
        torch.zeros(rows, -(-case.queries // flex.BLOCK), -(-case.keys // flex.BLOCK), dtype=torch.bool)
        for _ in range(2)
    )
    for chosen, counts, indices in (
        (partly, blocks.kv_num_blocks, blocks.kv_indices),
        (wholly, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        if counts is None:
            continue
        # By the rows of one the kernel finds those of the other.
        assert indices.shape == blocks.kv_indices.shape, case
        for row in range(rows):
            for block in range(chosen.shape[1]):
                count = int(counts[row % len(counts), 0, block])
                chosen[row, block, indices[row % len(counts), 0, block, :count].long()] = True
    seen = torch.stack(
        [
            blocks.mask_mod(
                torch.tensor(row),
                torch.tensor(0),
                torch.arange(case.queries)[:, None],
                torch.arange(case.keys)[None, :],
            )
            for row in range(rows)
        ]
    )
    return partly, wholly, seen


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_block_masks_hold_all_that_is_visible_and_whole_blocks_nothing_else(first: int) -> None:
    for case in DRAWN[first : first + 50]:
        mask_BTS = case.visibility("cpu").mask(case.queries, case.keys, CPU)
        partly, wholly, seen = blocks_of(case)
        assert torch.equal(seen, mask_BTS), case
        assert not (partly & wholly).any()
        grown = [
            chosen.repeat_interleave(flex.BLOCK, 1).repeat_interleave(flex.BLOCK, 2)
            for chosen in (partly, wholly)
        ]
        partly_BTS, wholly_BTS = (chosen[:, : case.queries, : case.keys] for chosen in grown)
        assert mask_BTS[wholly_BTS].all(), case
        assert not mask_BTS[~partly_BTS & ~wholly_BTS].any(), case


def test_sinks_of_packed_documents_add_the_blocks_that_hold_them_and_no_others() -> None:
    tokens, window, sinks = 4096, 100, 4
    documents_BT = (torch.arange(tokens)[None] + torch.tensor([[0], [700]])) // 1500
    with_sinks = Visibility.build(window=window, sinks=sinks, documents_BT=documents_BT)
    heads = torch.empty(2, tokens, 1, 16)
    blocks = flex.block_mask(with_sinks, heads, heads)
    mask_BTS = with_sinks.mask(tokens, tokens, CPU)
    seen_BIJ = mask_BTS.unflatten(2, (-1, flex.BLOCK)).any(3).unflatten(1, (-1, flex.BLOCK)).any(2)
    assert blocks.full_kv_num_blocks is not None
    chosen_BI = (blocks.kv_num_blocks + blocks.full_kv_num_blocks)[:, 0]
    assert torch.equal(chosen_BI, seen_BIJ.sum(2))


def test_a_ring_meets_few_blocks_beside_those_it_sees() -> None:
    tokens, window = 4096, 100
    positions_1S = torch.arange(tokens).roll(1000)[None]
    ring = Visibility.build(
        window=window, positions_BT=torch.arange(tokens)[None], key_positions_BS=positions_1S
    )
    heads = torch.empty(2, tokens, 1, 16)
    blocks = flex.block_mask(ring, heads, heads)
    mask_BTS = ring.mask(tokens, tokens, CPU)
    seen_BIJ = mask_BTS.unflatten(2, (-1, flex.BLOCK)).any(3).unflatten(1, (-1, flex.BLOCK)).any(2)
    # All blocks of queries meet the block in which the ring starts anew.
    assert (blocks.kv_num_blocks[:, 0] <= seen_BIJ.sum(2) + 1).all()


def test_rows_of_keys_may_differ_where_those_of_queries_do_not() -> None:
    key_positions_BS = torch.stack([torch.arange(200), torch.arange(200).flip(0)])
    visibility = Visibility.build(
        window=9, positions_BT=torch.arange(200)[None], key_positions_BS=key_positions_BS
    )
    heads = torch.empty(2, 200, 1, 16)
    sees = flex.block_mask(visibility, heads, heads).mask_mod
    index = torch.arange(200)
    for row, mask_TS in enumerate(visibility.mask(200, 200, CPU)):
        seen_TS = sees(torch.tensor(row), torch.tensor(0), index[:, None], index[None])
        assert torch.equal(seen_TS, mask_TS)


@pytest.mark.parametrize("kind", ["sinks", "packed", "ring"])
def test_block_masks_are_made_inside_a_graph_and_smaller_than_the_mask(kind: str) -> None:
    tokens = 2048
    positions_1T = torch.arange(tokens)[None]
    others: dict[str, Tensor | int] = {"sinks": 4}
    if kind == "packed":
        others["documents_BT"] = positions_1T // 700
    if kind == "ring":
        others |= {"positions_BT": positions_1T, "key_positions_BS": positions_1T.roll(5)}
    visibility = Visibility.build(window=64, **others)  # type: ignore[arg-type]
    heads = torch.empty(1, tokens, 1, 16)

    def counts(heads: Tensor) -> Tensor:
        return flex.block_mask(visibility, heads, heads).kv_num_blocks

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        eager = counts(heads)
    # Of numbers of eight bytes, one for each token and block of the other side.
    limit = 8 * tokens * -(-tokens // flex.BLOCK)
    assert max(event.cpu_memory_usage for event in profiled.events()) <= limit
    torch.compiler.reset()
    compiled = torch.compile(counts, fullgraph=True, backend="eager")
    assert torch.equal(compiled(heads), eager)


def test_what_was_prepared_in_a_loader_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = next(case for case in DRAWN if case.kind == "packed" and not case.sinks and case.batch == 2)
    fresh = packed.visibility("cpu")
    bounds, segments = fresh.bounds(packed.queries, packed.keys, CPU), fresh.segments(2, packed.queries, CPU)
    prepared = packed.visibility("cpu").prepare(2)
    for name in ("_bounds", "_segments"):
        monkeypatch.delattr(Visibility, name)
    moved = prepared.to(CPU)
    assert all(map(torch.equal, moved.bounds(packed.queries, packed.keys, CPU), bounds))
    assert torch.equal(moved.segments(2, packed.queries, CPU).offsets, segments.offsets)
    # Runs do not depend on the window, ranges do.
    other = moved.with_window(3)
    assert torch.equal(other.segments(2, packed.queries, CPU).offsets, segments.offsets)
    with pytest.raises(AttributeError):
        other.bounds(packed.queries, packed.keys, CPU)


def test_a_moved_visibility_takes_what_was_prepared_of_one_row_for_several() -> None:
    visibility = Visibility.build(window=5, documents_BT=torch.zeros(1, 64, dtype=torch.int64)).prepare(4)
    assert visibility._of_documents.keys() == {RUNS, ("segments", 4, 64, torch.device("cpu"))}
    moved = visibility.to(torch.device("meta"))
    assert moved._of_documents.keys() == {("segments", 4, 64, torch.device("meta"))}


def test_a_moved_visibility_takes_its_tensors_along() -> None:
    documents = torch.tensor([[0, 0, 1, 1, -1]], dtype=torch.int32)
    meta = torch.device("meta")
    moved = Visibility.build(window=2, documents_BT=documents).prepare(1).to(meta)
    assert moved.documents is not None
    assert moved.documents.device == moved.segments(1, 5, meta).offsets.device == meta
    assert moved.bounds(5, 5, meta).first_keys.device == meta


def test_compiled_code_meets_other_documents_and_lengths_without_compiling_anew() -> None:
    """What kernels on a GPU read; on a CPU the length decides how many blocks the layer has."""
    chance, counter = random.Random(0), CompileCounter()
    rotary, batch = RotaryEmbedding(8), 2

    def read(query_BTHD: Tensor, visibility: Visibility) -> Tensor:
        tokens, device = query_BTHD.shape[1], query_BTHD.device
        for layer_visibility in (visibility, visibility):
            rotation = layer_visibility.once(
                "rotation",
                lambda: rotary.rotation(torch.arange(tokens, device=device)[None]),
                sizes=(tokens,),
            )
            query_BTHD = rotary.rotate(query_BTHD, rotation)
            segments = layer_visibility.segments(batch, tokens, device)
            bounds = layer_visibility.bounds(tokens, tokens, device)
            query_BTHD = (
                query_BTHD * bounds.first_keys[..., None, None] + segments.offsets[1] * segments.longest
            )
            visibility.check_call(query_BTHD.shape[0], tokens, tokens, device)
        return query_BTHD

    compiled = torch.compile(read, backend=counter, fullgraph=True)
    lengths = [chance.randint(30, 400) for _ in range(16)]
    warm = 0
    for number in range(100):
        length = lengths[number % len(lengths)]
        ends_B1 = torch.tensor([[chance.randint(1, length)] for _ in range(batch)])
        documents_BT = (torch.arange(length) >= ends_B1).int()
        query_BTHD = torch.randn(batch, length, 1, 8)
        visibility = Visibility.build(window=20, documents_BT=documents_BT).prepare(batch)
        torch.testing.assert_close(compiled(query_BTHD, visibility), read(query_BTHD, visibility))
        warm = counter.frame_count if number == 2 * len(lengths) else warm
    assert counter.frame_count == warm <= 4


def test_the_first_graph_serves_every_layout_of_its_length() -> None:
    counter, tokens, longest, places = CompileCounter(), 1024, set(), set()

    def read(query_BT: Tensor, visibility: Visibility) -> Tensor:
        segments = visibility.segments(2, tokens, query_BT.device)
        return query_BT * segments.longest + segments.offsets.sum()

    compiled = torch.compile(read, backend=counter, fullgraph=True)
    for documents in (3, 40, 500, 1, 7, 200):
        documents_BT = (torch.arange(tokens) * documents // tokens).int().expand(2, -1)
        visibility = Visibility.build(window=20, documents_BT=documents_BT).prepare(2).to(CPU)
        query_BT = torch.randn(2, tokens)
        torch.testing.assert_close(compiled(query_BT, visibility), read(query_BT, visibility))
        segments = visibility.segments(2, tokens, CPU)
        longest.add(segments.longest)
        places.add(len(segments.offsets))
    assert len(longest) > 3
    assert len(places) > 3
    assert counter.frame_count == 1


def test_windows_that_move_together_share_what_they_shared() -> None:
    documents = torch.tensor([[0, 0, 1, 1, -1]], dtype=torch.int32)
    wide = Visibility.build(window=4, documents_BT=documents).prepare(1)
    moves: list[Tensor] = []

    def move(tensor: Tensor) -> Tensor:
        moves.append(tensor)
        return tensor.clone()

    moved = move_together({4: wide, 2: wide.with_window(2).prepare(1)}, move)
    assert moved[4].documents is moved[2].documents is not documents
    assert moved[4].segments(1, 5, CPU) is moved[2].segments(1, 5, CPU)
    assert len({id(tensor) for tensor in moves}) == len(moves)
    for window, visibility in moved.items():
        fresh = Visibility.build(window=window, documents_BT=documents)
        assert all(map(torch.equal, visibility.bounds(5, 5, CPU), fresh.bounds(5, 5, CPU)))
