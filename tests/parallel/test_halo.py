"""A sequence cut over processes is what it is on one, and only what is needed travels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.parallel.cases import ALLOWED, MOST_PROCESSES, Outcome, check, draw, draw_for_graph, wrong
from tests.parallel.processes import run_in_processes
from windowlm import SlidingWindowAttention
from windowlm.attention import layers
from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility
from windowlm.parallel.context_group import ContextGroup
from windowlm.parallel.parts import SequenceLengthError
from windowlm.parallel.place import Place
from windowlm.parallel.processes import Processes
from windowlm.parallel.sequence_shard import ShardVisibility, shard_visibilities

DRAWN, DRAWN_FOR_GRAPHS = 33, 3
KV_HEADS, HEAD_DIM, SHARD = 2, 4, 16


@cache
def outcomes() -> list[Outcome]:
    return list(run_in_processes(MOST_PROCESSES, check, DRAWN, 0))


def test_outputs_gradients_and_bytes_are_those_of_one_process_and_of_the_formula() -> None:
    for seed in range(DRAWN):
        case = draw(seed)
        for outcome in outcomes()[: case.processes]:
            assert not wrong(case, outcome.measured[seed]), case


def test_outputs_and_gradients_of_graphs_that_hold_the_exchange_are_those_of_one_process() -> None:
    outcomes: list[Outcome] = run_in_processes(MOST_PROCESSES, check, DRAWN_FOR_GRAPHS, 0, "graph")
    for seed in range(DRAWN_FOR_GRAPHS):
        case = draw_for_graph(seed)
        for outcome in outcomes[: case.processes]:
            assert not wrong(case, outcome.measured[seed]), case


def test_the_drawn_cases_hold_what_is_hard() -> None:
    drawn = {property_ for seed in range(DRAWN) for property_ in draw(seed).properties()}
    assert drawn >= {
        *(f"{count} processes" for count in (2, 3, 4)),
        *(str(dtype).removeprefix("torch.") for dtype in ALLOWED),
        *("W-1 > shard", "W-1 > two shards", "no window", "layer pattern", "sinks", "GQA", "padding"),
        *("a document spans shards", "a document ends inside a shard", "padding inside documents"),
        *(
            "short convolution",
            "n-gram embeddings",
            "whole model",
            "attention alone",
            "parts of several lengths",
        ),
    }


WINDOWS = (1, 2, 8, SHARD + 1, SHARD + 2, 2 * SHARD + 5, 1000, None)
KEPT_TOKENS = 256
ALIGNED = [[token // SHARD for token in range(3 * SHARD)]]


def are_for_a_graph(rank: int) -> list[bool]:
    """Of windows that reach all of the shortest part, and beyond it."""
    group = ContextGroup(torch.distributed.group.WORLD, (3.0, 1.0, 2.0))
    found = shard_visibilities({5: 0, 6: 0}, group, 1, 24)
    return [seen.in_one_graph(computed_again=False) for seen in found.values()]


def test_all_processes_agree_on_what_a_graph_can_hold() -> None:
    assert run_in_processes(3, are_for_a_graph) == [[True, False]] * 3


def bytes_of_layers(rank: int) -> tuple[dict[int | None, tuple[int, int]], tuple[int, int]]:
    """What this process sends forward and back for each window, and where no document spans two parts."""
    whole = {window: _bytes_of_layer(window, None) for window in WINDOWS}
    return whole, _bytes_of_layer(9, torch.tensor(ALIGNED, dtype=torch.int32))


def _bytes_of_layer(window: int | None, documents_BT: torch.Tensor | None) -> tuple[int, int]:
    group = ContextGroup(torch.distributed.group.WORLD)
    (visibility,) = shard_visibilities(
        {window: 0}, group, 1, SHARD * group.size, documents_BT=documents_BT
    ).values()
    key = torch.randn(1, SHARD, KV_HEADS, HEAD_DIM, requires_grad=True)
    output = visibility.attend(attention, key, key, key)
    forward = group.bytes_sent
    output.sum().backward()
    return forward, group.bytes_sent - forward


def test_the_bytes_of_a_layer_are_those_that_the_docs_state() -> None:
    each = 2 * KV_HEADS * HEAD_DIM * 4
    for rank, (whole, aligned) in enumerate(run_in_processes(3, bytes_of_layers)):
        for window, (forward, back) in whole.items():
            reach = 10**9 if window is None else window - 1
            distances = [reader - rank - 1 for reader in range(rank + 1, 3)]
            assert forward == each * sum(min(SHARD, max(0, reach - far * SHARD)) for far in distances)
            assert back == each * min(reach, rank * SHARD)
        # Nothing crosses the start of a document.
        assert aligned == (0, 0)


def test_a_group_of_one_is_a_plain_call() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 20, 2, 8) for _ in range(3))
    (shard,) = shard_visibilities({5: 0}, ContextGroup(), 2, 20).values()
    alone = attention(query, key, value, Visibility.build(window=5))
    assert torch.equal(shard.attend(attention, query, key, value), alone)


def differences_of_placed_rows(rank: int) -> list[float]:
    """Of rows whose positions are given and without documents, from what one process computes."""
    torch.manual_seed(0)
    group, tokens = ContextGroup(torch.distributed.group.WORLD), 12
    tensors = [torch.randn(2, tokens, 2, 8, dtype=torch.float64) for _ in range(3)]
    positions_BT = torch.arange(tokens).repeat(2, 1)
    differences = []
    for window, sinks in ((5, 1), (3, 4), (9, 2), (None, 0), (5, 0)):
        whole = Visibility.build(window=window, sinks=sinks, positions_BT=positions_BT)
        (cut,) = shard_visibilities({window: sinks}, group, 2, tokens, positions_BT=positions_BT).values()
        found = cut.attend(attention, *map(group.shard, tensors))
        differences.append(float((found - group.shard(attention(*tensors, whole))).abs().max()))
    return differences


def test_rows_may_be_placed_without_documents() -> None:
    assert max(max(found) for found in run_in_processes(3, differences_of_placed_rows)) < 1e-12


def test_a_length_that_the_processes_do_not_divide_is_refused() -> None:
    group = ContextGroup()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContextGroup, "size", 3)
        with pytest.raises(SequenceLengthError, match="multiple of 3 is allowed; try sequence_length=63"):
            shard_visibilities({5: 0}, group, 1, 64)


def told_of_a_length(rank: int) -> str:
    def plan() -> None:
        raise SequenceLengthError(64, 3)

    try:
        Processes(Place(rank, 2, rank, 2)).leader_alone(plan)
    except SequenceLengthError as error:
        return str(error)
    return "nothing"


def test_the_leader_tells_the_others_of_such_a_length() -> None:
    assert run_in_processes(2, told_of_a_length) == [str(SequenceLengthError(64, 3))] * 2


def test_a_shard_is_planned_for_one_window() -> None:
    (shard,) = shard_visibilities({5: 0}, ContextGroup(), 2, 20).values()
    assert isinstance(shard, ShardVisibility)
    with pytest.raises(ValueError, match="planned for its window"):
        shard.with_window(3)


def test_queries_of_one_document_come_with_its_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContextGroup, "size", 4)
    monkeypatch.setattr(ContextGroup, "rank", 3)

    def parts(*lengths: int) -> list[list[tuple[int, int, bool] | None]]:
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        shards = shard_visibilities({None: 0, 5: 0}, ContextGroup(), 1, 64, documents_BT=ids[None])
        return [
            [
                None if part is None else (part.queries, part.blank, part.visibility.documents is None)
                for part in (shard.near, shard.far)
            ]
            for shard in shards.values()
            if isinstance(shard, ShardVisibility)
        ]

    assert parts(64) == [[None, (16, 0, True)], [(12, 0, True), (4, 0, True)]]
    assert parts(50, 14) == [[(14, 0, True), (2, 0, True)]] * 2
    # Those that see own keys alone are of two documents.
    assert parts(50, 6, 8) == [[(14, 0, False), (2, 0, True)]] * 2


def bytes_kept(rank: int) -> tuple[int, int]:
    """Bytes that a layer keeps for the backward pass, of a part and of a sequence of its length."""
    torch.manual_seed(0)
    layer = SlidingWindowAttention(64, heads=8, dim_head=32, window_size=17, kv_heads=2, dropout=0.0)
    hidden_BTD = torch.randn(1, KEPT_TOKENS, 64, requires_grad=True)
    group = ContextGroup(torch.distributed.group.WORLD)
    (shard,) = shard_visibilities({17: 0}, group, 1, KEPT_TOKENS * group.size).values()

    def kept(visibility: Visibility) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        # A GPU's kernels keep what they return, as exp does.
        with (
            hooks,
            patch.object(layers, "attention", lambda *call, **options: attention(*call, **options).exp()),
        ):
            output_BTD = layer(hidden_BTD, visibility=visibility)
        output_BTD.sum().backward()
        return sum(sizes.values())

    return kept(shard), kept(Visibility.build(window=17))


def test_a_part_keeps_attentions_outputs_once() -> None:
    outputs = KEPT_TOKENS * 8 * 32 * 4
    for shard, plain in run_in_processes(2, bytes_kept):
        # Besides, the queries that see others' keys keep these, and what goes with each call.
        assert shard - plain < outputs / 8


@dataclass(frozen=True, eq=False)
class Cut(Visibility):
    """Finishes some tokens after the others, as a part does whose documents begin anywhere."""

    at: int = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self, _: Callable[..., torch.Tensor], query_BTHD: torch.Tensor, *others: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Gives back the queries, finished."""
        finish, gate_BTH1 = options["finish"], options["finish_with"]
        parts = [slice(0, self.at), slice(self.at, None)]
        return torch.cat([finish(query_BTHD[:, part], gate_BTH1[:, part]) for part in parts], 1)


def test_parts_of_other_lengths_compile_nothing() -> None:
    torch.compiler.reset()
    layer = SlidingWindowAttention(32, heads=4, dim_head=8, window_size=8, dropout=0.0, gate=True)
    graphs = CompileCounter()
    compiled = torch.compile(layer, backend=graphs)
    seen = []
    for at in (7, 20, 1, 31, 0, 12):
        compiled(torch.randn(1, 32, 32), visibility=Cut(window=8, at=at)).sum().backward()
        seen.append(graphs.frame_count)
    assert len(set(seen)) == 1
