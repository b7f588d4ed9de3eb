"""A compiled graph that holds the exchange computes what one process does, and sends what the other sends."""

from typing import Any

import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table

from tests.parallel.processes import run_in_processes
from windowlm.attention.window import Visibility
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.parallel.context_group import ContextGroup
from windowlm.parallel.neighbour_exchange import NeighbourExchange
from windowlm.parallel.sequence_shard import ShardVisibility, shard_visibilities
from windowlm.training.compilation import forget_compiled, hidden_states

PROCESSES, ROWS, DIM, VOCABULARY, SHARD = 3, 2, 16, 20, 8
LAYERS = 2
# One token travels, or a whole part; nothing is computed of the queries alone, or much.
PLAIN: dict[str, Any] = {"window": 2, "qk_norm": False, "rotary": None}
RICH: dict[str, Any] = {
    "window": [SHARD + 1, 3],
    "output_gate": True,
    "learned_sinks": True,
    "logit_cap": 4.0,
    "value_embeddings": 1,
}
EXCHANGE = (
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.wait_tensor.default,
)


def decoder(settings: dict[str, Any]) -> Decoder:
    torch.manual_seed(0)
    sizes = {"dim": DIM, "heads": 4, "kv_heads": 2, "head_dim": 8, "feed_forward_dim": 16}
    return Decoder(ModelConfig(layers=LAYERS, **settings, **sizes), VOCABULARY).double()


def counting_backend(counted: list[tuple[int, ...]]) -> Any:
    """Compiles to graphs that run as they are; counts how often each begins and ends an exchange."""

    def compile_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets = [node.target for node in graph.graph.nodes]
        counted.append(tuple(targets.count(target) for target in EXCHANGE))
        return make_boxed_func(graph.forward)

    return aot_autograd(
        fw_compiler=compile_graph,
        bw_compiler=compile_graph,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )


def gradients(model: Decoder) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)).detach())


def errors_of_graphs(rank: int) -> tuple[float, list[int], list[tuple[int, ...]]]:
    """Largest error beside one process, how many graphs each model took, and how often each exchanges."""
    largest, graphs = 0.0, []
    counted: list[tuple[int, ...]] = []
    for settings, shares in ((PLAIN, (3.0, 2.0, 1.0)), (RICH, None)):
        group = ContextGroup(dist.group.WORLD, shares)
        forget_compiled()
        model = decoder(settings)
        windows = dict.fromkeys(block.attention.window_size for block in model.blocks)
        counters.clear()
        with torch.compiler.set_stance("default", force_backend=counting_backend(counted)):
            hidden = hidden_states(model, compiled=True)
            # At a second length the compiler takes it for a symbol.
            for shard in (SHARD, SHARD + 3):
                tokens_BT = torch.randint(VOCABULARY, (ROWS, shard * PROCESSES))
                weights_BTD = torch.randn(ROWS, shard * PROCESSES, DIM, dtype=torch.float64)
                whole_BTD = model.hidden(tokens_BT)
                (whole_BTD * weights_BTD).sum().backward()
                wanted = gradients(model)
                seen = shard_visibilities(dict.fromkeys(windows, 0), group, ROWS, shard * PROCESSES)
                own_BLD = hidden(group.shard(tokens_BT), visibilities=seen)
                (own_BLD * group.shard(weights_BTD)).sum().backward()
                found = [group.summed(gradient) for gradient in gradients(model)]
                assert len(found) == len(wanted)
                pairs = [(own_BLD, group.shard(whole_BTD)), *zip(found, wanted, strict=True)]
                largest = max(largest, *(error(one, other) for one, other in pairs))
        graphs.append(counters["stats"]["unique_graphs"])
    return largest, graphs, counted


def test_a_graph_with_the_exchange_computes_what_one_process_does() -> None:
    for largest, graphs, counted in run_in_processes(PROCESSES, errors_of_graphs):
        assert largest < 1e-12
        # One for the first length, one for others.
        assert graphs == [2, 2]
        # Each has a forward and a backward pass.
        of_layers = [numbers for numbers in counted if any(numbers)]
        assert of_layers == [(LAYERS, LAYERS)] * 8


def sent_in_both_ways(rank: int) -> list[list[tuple[int, int]]]:
    """By window, bytes forward and back of each exchange, which must give and take the same numbers."""
    group = ContextGroup(dist.group.WORLD)
    return [_sent_in_both_ways(group, window) for window in (2, 5, SHARD + 1)]


def _sent_in_both_ways(group: ContextGroup, window: int) -> list[tuple[int, int]]:
    (seen,) = shard_visibilities({window: 0}, group, ROWS, SHARD * PROCESSES).values()
    assert isinstance(seen, ShardVisibility)
    assert isinstance(seen.halo, NeighbourExchange)
    assert seen.exchange is not None
    torch.manual_seed(group.rank)
    key, value = (torch.randn(ROWS, SHARD, 2, 4, requires_grad=True) for _ in range(2))
    counted, outcomes = [], []
    for exchange in (seen.exchange, seen.halo):
        group.bytes_sent = 0
        own: tuple[Tensor, ...] = (key, value)
        if isinstance(exchange, NeighbourExchange):
            remote = exchange.receive(own, exchange.send(key, value))
        else:
            own, _, travelling = exchange.send(key, value)
            remote = exchange.receive(own, travelling)
        forward = group.bytes_sent
        torch.cat([*remote, *own], 1).sin().sum().backward()
        counted.append((forward, group.bytes_sent - forward))
        outcomes.append([*remote, key.grad, value.grad])
        key.grad = value.grad = None
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)
    return counted


def test_it_sends_and_returns_what_the_exchange_of_chosen_tokens_does() -> None:
    for of_windows in run_in_processes(PROCESSES, sent_in_both_ways):
        for chosen, neighbours in of_windows:
            assert neighbours == chosen
            assert sum(chosen)


def kinds_in_one_graph(rank: int) -> list[bool]:
    group = ContextGroup(dist.group.WORLD)
    tokens = SHARD * PROCESSES
    documents_BT = torch.zeros(1, tokens, dtype=torch.int32)

    def seen(window: int | None, sinks: int = 0, **more: Tensor | tuple[int, ...]) -> Visibility:
        (made,) = shard_visibilities({window: sinks}, group, 1, tokens, **more).values()  # type: ignore[arg-type]
        return made

    kinds = [
        seen(SHARD + 1),
        seen(SHARD + 2),
        seen(None),
        seen(4, sinks=1),
        seen(4, documents_BT=documents_BT),
        seen(4, positions_BT=torch.arange(tokens)[None]),
        seen(4, earlier=(2,)),
    ]
    assert not kinds[0].in_one_graph(computed_again=True)
    return [kind.in_one_graph(computed_again=False) for kind in kinds]


def test_what_documents_or_several_parts_choose_stays_outside() -> None:
    for kinds in run_in_processes(PROCESSES, kinds_in_one_graph):
        assert kinds == [True, *[False] * (len(kinds) - 1)]
