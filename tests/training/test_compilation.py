from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo.utils import counters

from windowlm.errors import UserError
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.training.calibration import calibrate
from windowlm.training.compilation import (
    Graphs,
    forget_compiled,
    hidden_states,
    is_compiled,
    replays_graphs,
)
from windowlm.training.config import Precision, TrainerConfig
from windowlm.training.device_batch import visibilities_on

SHAPE = ModelConfig(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=16, window=[4, None])
CPU = torch.device("cpu")


def test_only_a_gpu_compiles_unless_told() -> None:
    assert is_compiled(TrainerConfig(), torch.device("cuda"))
    assert not is_compiled(TrainerConfig(), CPU)
    assert is_compiled(TrainerConfig(compile="on", activation_memory_budget=0.5), CPU)
    assert not is_compiled(TrainerConfig(compile="off"), torch.device("cuda"))


@pytest.mark.parametrize(("compile", "device"), [("auto", "cpu"), ("off", "cuda")])
def test_a_memory_budget_without_compilation_is_refused(compile: Any, device: str) -> None:
    with pytest.raises(UserError, match=r"activation_memory_budget=0.5: .* try trainer.compile=on"):
        is_compiled(TrainerConfig(compile=compile, activation_memory_budget=0.5), torch.device(device))


@pytest.mark.parametrize(
    ("compile", "device", "processes"),
    [("auto", "cpu", 1), ("on", "cpu", 1), ("off", "cuda", 1), ("on", "cuda", 2)],
)
def test_graphs_are_replayed_of_compiled_training_on_one_gpu(
    compile: Any, device: str, processes: int
) -> None:
    place = torch.device(device), processes
    assert not replays_graphs(TrainerConfig(compile=compile, cuda_graphs="auto"), *place)
    with pytest.raises(UserError, match=r"^trainer.cuda_graphs=on: .* try trainer.cuda_graphs=auto$"):
        replays_graphs(TrainerConfig(compile=compile, cuda_graphs="on"), *place)


def test_graphs_are_replayed_of_one_batch_a_step() -> None:
    one_gpu = torch.device("cuda"), 1
    assert not replays_graphs(TrainerConfig(), *one_gpu)
    assert replays_graphs(TrainerConfig(cuda_graphs="auto"), *one_gpu)
    assert not replays_graphs(TrainerConfig(cuda_graphs="auto", accumulate_batches=2), *one_gpu)
    with pytest.raises(ValueError, match=r"^cuda_graphs=on: .* try accumulate_batches=1$"):
        TrainerConfig(cuda_graphs="on", accumulate_batches=2)


class Kept:
    """Shapes and bytes of what the operations inside keep for the backward pass, each storage once."""

    def __enter__(self) -> "Kept":
        self.shapes: list[torch.Size] = []
        self.bytes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.bytes:
            self.shapes.append(tensor.shape)
        self.bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *failure: object) -> None:
        self.hooks.__exit__(*failure)


@pytest.mark.usefixtures("no_kernels")
def test_a_smaller_budget_keeps_less_and_changes_no_gradient() -> None:
    torch.manual_seed(0)
    shape = ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=64, window=8)
    model = Decoder(shape, 20).double()
    tokens_BT = torch.randint(20, (2, 64))
    kept, gradients = [], []
    for budget in (1.0, 0.5):
        forget_compiled()
        model.zero_grad()
        hidden = hidden_states(model, compiled=True, activation_memory_budget=budget)
        with Kept() as by_graph:
            hidden_BTD = hidden(tokens_BT, visibilities=model.visibilities())
        hidden_BTD.square().sum().backward()  # type: ignore[no-untyped-call]
        kept.append(sum(by_graph.bytes.values()))
        gradients.append([parameter.grad for parameter in model.blocks.parameters()])
    assert kept[1] < 0.9 * kept[0]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("activation", "inputs"), [("swiglu", 2), ("relu_squared", 1)])
def test_activations_of_feed_forward_networks_are_not_kept(activation: Any, inputs: int) -> None:
    shape = ModelConfig(
        layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=72, activation=activation
    )
    model, tokens_BT = Decoder(shape, 20), torch.randint(20, (2, 64))
    forget_compiled()
    with Kept() as by_graph:
        hidden_states(model, compiled=True)(tokens_BT, visibilities=model.visibilities())
    widths = [number // (2 * 64 * 4) for number in by_graph.bytes.values() if number % (2 * 64 * 4 * 72) == 0]
    assert sum(widths) == inputs * 72


def test_the_compiled_decoder_computes_the_same() -> None:
    assert_compiled_is_the_same([24], packed=True)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    ("graphs", "packed", "blocks_at_once"),
    [("one", False, 1), ("one", True, 1), ("blocks", True, 1), ("blocks", False, 2), ("pieces", False, 1)],
)
def test_the_graphs_of_the_decoder_compute_the_same_at_any_length(
    graphs: Graphs, packed: bool, blocks_at_once: int
) -> None:
    # From the second length on the compiler takes it for a symbol.
    assert_compiled_is_the_same([24, 25, 31], packed=packed, graphs=graphs, blocks_at_once=blocks_at_once)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_that_are_alike_share_a_graph(checkpointing: bool) -> None:
    shape = replace(SHAPE, layers=6, window=[4, 4, None], value_embeddings=1, embedding_residual=True)
    model, tokens_BT = Decoder(shape, 20), torch.randint(20, (2, 24))
    blocks = partial(
        hidden_states, model, compiled=True, activation_checkpointing=checkpointing, graphs="blocks"
    )
    forget_compiled()
    # Embeddings, final norm, and of six blocks some have value embeddings; a smaller window is that of all.
    for limit, graphs in ((None, 2 + 4), (None, 0), (3, 2)):
        counters.clear()
        visibilities = visibilities_on(model, {"tokens_BT": tokens_BT}, CPU, limit)
        blocks()(tokens_BT, visibilities=visibilities).sum().backward()  # type: ignore[no-untyped-call]
        assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("blocks_at_once", "graphs"), [(2, 1), (3, 1), (4, 2), (6, 1)])
def test_runs_of_blocks_that_are_alike_share_a_graph(blocks_at_once: int, graphs: int) -> None:
    model, tokens_BT = Decoder(replace(SHAPE, layers=6, window=4), 20), torch.randint(20, (2, 24))
    forget_compiled()
    counters.clear()
    hidden = hidden_states(model, compiled=True, graphs="blocks", blocks_at_once=blocks_at_once)
    hidden_BTD = hidden(tokens_BT, visibilities=model.visibilities())
    torch.testing.assert_close(hidden_BTD, model.hidden(tokens_BT))
    assert counters["stats"]["unique_graphs"] == 2 + graphs  # embeddings and final norm


def assert_compiled_is_the_same(
    lengths: Sequence[int], *, packed: bool, graphs: Graphs = "one", blocks_at_once: int = 1
) -> None:
    forget_compiled()
    torch.manual_seed(0)
    model = Decoder(SHAPE, 20).double()
    for tokens in lengths:
        tokens_BT = torch.randint(20, (2, tokens))
        documents_BT = torch.zeros(2, tokens, dtype=torch.int32)
        documents_BT[:, 9:] = 1
        batch = {
            "tokens_BT": tokens_BT,
            "documents_BT": documents_BT if packed else None,
            "positions_BT": (torch.arange(tokens) - 9 * documents_BT).long() if packed else None,
        }
        visibilities = visibilities_on(model, batch, CPU)
        outcomes = []
        for compiled in (False, True):
            model.zero_grad()
            hidden_BTD = hidden_states(
                model, compiled=compiled, graphs=graphs, blocks_at_once=blocks_at_once
            )(tokens_BT, visibilities=visibilities)
            hidden_BTD.square().sum().backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            outcomes.append([hidden_BTD.detach(), *gradients])
        assert len(outcomes[0]) == 1 + sum(1 for name, _ in model.named_parameters())
        for plain, compiled_one in zip(*outcomes, strict=True):
            torch.testing.assert_close(compiled_one, plain, rtol=1e-9, atol=1e-12)
    assert all("_orig_mod" not in name for name in model.state_dict())


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_run_compiles_nothing_that_its_calibration_did_not(precision: Precision) -> None:
    torch.manual_seed(0)
    shape = ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=16, window=16)
    model = Decoder(shape, 20)
    tokens_BT = torch.randint(20, (2, 24))
    batch = {"tokens_BT": tokens_BT, "targets_BT": tokens_BT.roll(-1, 1)}
    calibrate(
        model,
        batch,
        precision,
        CPU,
        states_of=partial(hidden_states, compiled=True),
        window_limits=(4, None),
    )
    if precision == "bf16-true":
        model.to(torch.bfloat16)
    hidden = hidden_states(model, compiled=True)
    plugin = pl.Trainer(accelerator="cpu", precision=precision, logger=False).precision_plugin
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for limit in (4, None):
        visibilities = visibilities_on(model, batch, CPU, limit)
        with plugin.forward_context():
            hidden_BTD = hidden(tokens_BT, visibilities=visibilities)
            assert counters["stats"]["unique_graphs"] == graphs
            expected_BTD = model.hidden(tokens_BT, visibilities=visibilities)
        torch.testing.assert_close(hidden_BTD, expected_BTD, rtol=0.1, atol=0.1)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_activations_are_the_inputs_of_blocks_and_gradients_stay(compiled: bool) -> None:
    forget_compiled()
    torch.manual_seed(0)
    shape = ModelConfig(
        layers=3,
        dim=16,
        heads=2,
        kv_heads=1,
        head_dim=8,
        feed_forward_dim=64,
        window=[8, None],
        value_embeddings=1,
        embedding_residual=True,
    )
    model = Decoder(shape, 20).double()
    tokens_BT = torch.randint(20, (2, 64))
    kept, outcomes = [], []
    for checkpointing in (False, True):
        model.zero_grad()
        hidden = hidden_states(model, compiled=compiled, activation_checkpointing=checkpointing)
        with Kept() as by_graph:
            hidden_BTD = hidden(tokens_BT, visibilities=model.visibilities())
        hidden_BTD.square().sum().backward()  # type: ignore[no-untyped-call]
        kept.append(sum(by_graph.bytes.values()))
        outcomes.append([hidden_BTD.detach(), *(parameter.grad for parameter in model.blocks.parameters())])
        with torch.no_grad():
            assert torch.equal(hidden(tokens_BT, visibilities=model.visibilities()), hidden_BTD)
    assert kept[1] < kept[0] / 2
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-12, atol=1e-14)
