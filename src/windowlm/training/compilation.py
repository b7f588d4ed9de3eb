"""The decoder compiled for training: from tokens to hidden states in one graph, or each block in its own."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as partitioning
from torch import Tensor, nn

from windowlm.attention.layers import Heads
from windowlm.attention.rotary import RotaryEmbedding
from windowlm.attention.window import Visibility
from windowlm.errors import UserError
from windowlm.model.compiled_for_windows import compiled_for_windows
from windowlm.model.decoder import Block, BlockInputs, BlocksInputs, Decoder, Parts, Run, Visibilities
from windowlm.training.config import TrainerConfig
from windowlm.training.float8 import float8_view

# Of one function: of blocks that differ, in training and validation, at some lengths.
MOST_GRAPHS = 32
HiddenStates = Callable[..., Tensor]
# One for the whole decoder; one for each run of blocks, so that gradients travel while those of the blocks
# before are computed; or two for each block, between which keys of other processes arrive. Where one graph
# cannot hold that, "one" stands for "pieces".
Graphs = Literal["one", "blocks", "pieces"]


def is_compiled(settings: TrainerConfig, device: torch.device) -> bool:
    """Whether a run compiles: ``auto`` does on a GPU.

    Raises:
        UserError: it does not, and the settings ask for something of compiled training.
    """
    compiled = settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda")
    if settings.activation_memory_budget < 1 and not compiled:
        raise UserError(
            f"trainer.activation_memory_budget={settings.activation_memory_budget}: compiled training alone "
            f"can compute activations again, and trainer.compile={settings.compile} does not compile on a "
            f"{device.type.upper()}; try trainer.compile=on"
        )
    return compiled


def replays_graphs(settings: TrainerConfig, device: torch.device, processes: int) -> bool:
    """Whether a run replays its passes as graphs of kernels.

    Raises:
        UserError: it is asked for and cannot.
    """
    possible = device.type == "cuda" and processes == 1 and is_compiled(settings, device)
    if settings.cuda_graphs == "on" and not possible:
        raise UserError(
            f"trainer.cuda_graphs=on: it is for compiled training on one GPU, and here trainer.compile="
            f"{settings.compile}, device {device.type}, processes {processes}; try trainer.cuda_graphs=auto"
        )
    return settings.cuda_graphs != "off" and possible and settings.accumulate_batches == 1


def hidden_states(
    model: Decoder,
    *,
    compiled: bool = False,
    float8: bool = False,
    activation_memory_budget: float = 1.0,
    activation_checkpointing: bool = False,
    cuda_graphs: bool = False,
    graphs: Graphs = "one",
    blocks_at_once: int = 1,
) -> HiddenStates:
    """``model.hidden``, compiled or not; the model itself stays as it is, for checkpoints and evaluation.

    A graph that must be compiled anew too often raises, where torch would go on uncompiled.

    Args:
        model: trained by what is returned.
        compiled: `is_compiled`.
        float8: whether the blocks multiply in float8.
        activation_memory_budget: of compiled graphs, in (0, 1]: the share that is kept for the backward pass
            of what torch would keep by itself.
        activation_checkpointing: whether the inputs of blocks alone are kept, see `Decoder.hidden`.
        cuda_graphs: of compiled graphs on a GPU: replay each pass as one graph of kernels.
        graphs: of the compiled decoder.
        blocks_at_once: how many blocks share one of "blocks"; more than one only without checkpointed
            activations.
    """
    if not compiled and not float8:
        # Looked up in each call: a model that is shared by processes gets another.
        return lambda *tokens, **seen: model.hidden(
            *tokens, **seen, checkpoint_activations=activation_checkpointing and torch.is_grad_enabled()
        )
    views = [] if float8 else [model]
    keep_frequencies = cache(partial(_keep_frequencies, model))

    def hidden(tokens_BT: Tensor, *, visibilities: Visibilities) -> Tensor:
        if not views:  # not before the model is on its device and in its dtype
            views.append(float8_view(model))
        decoder = views[0] if views[0] is model else views[0].train(model.training)
        windows = tuple(visibility.window for visibility in visibilities.values())
        again = activation_checkpointing and torch.is_grad_enabled()
        if not compiled:
            return _hidden(decoder, tokens_BT, visibilities, again)
        if cuda_graphs:
            keep_frequencies(tokens_BT.device)
        # Read when a graph is cut into its passes, which is within its first call. Within DDP's forward torch
        # would cut it into buckets as well.
        with (
            partitioning.patch(activation_memory_budget=activation_memory_budget),
            dynamo.patch(optimize_ddp=False, recompile_limit=MOST_GRAPHS),
        ):
            computed_again = again or activation_memory_budget < 1
            if graphs == "one" and all(
                visibility.in_one_graph(computed_again=computed_again) for visibility in visibilities.values()
            ):
                states_BTD: Tensor = compiled_for_windows(_hidden, windows, cuda_graphs=cuda_graphs)(
                    decoder, tokens_BT, visibilities, again
                )
                return states_BTD
            parts = Parts(
                partial(_compiled_inputs, whole=graphs == "blocks"),
                _compiled_run if graphs == "blocks" else _compiled_around_attention,
                compiled_for_windows(_normed, ()),
                blocks_at_once,
            )
            return decoder.hidden(
                tokens_BT, visibilities=visibilities, checkpoint_activations=again, parts=parts
            )

    return hidden


def _keep_frequencies(model: Decoder, device: torch.device) -> None:
    """Those of rotations are kept for later calls, which memory of a graph that is recorded cannot be."""
    for layer in model.modules():
        if isinstance(layer, RotaryEmbedding):
            layer.rotation(torch.zeros(1, 1, dtype=torch.int64, device=device))


def forget_compiled() -> None:
    """Drop the graphs of earlier runs of a sweep, which count against the number that torch allows."""
    torch._dynamo.reset()


def _hidden(
    model: Decoder, tokens_BT: Tensor, visibilities: Visibilities, checkpoint_activations: bool
) -> Tensor:
    return model.hidden(tokens_BT, visibilities=visibilities, checkpoint_activations=checkpoint_activations)


def _inputs(model: Decoder, *of_tokens: Any) -> BlocksInputs:
    return model.inputs(*of_tokens)


def _normed(norm: nn.Module, hidden_BTD: Tensor) -> Tensor:
    output_BTD: Tensor = norm(hidden_BTD)
    return output_BTD


def _run(run: Run, hidden_BTD: Tensor) -> Tensor:
    for block, of_block in run:
        hidden_BTD = block.compute(hidden_BTD, *of_block)
    return hidden_BTD


def _heads_of(block: Block, *of_layer: Any) -> tuple[Tensor, Heads]:
    return block.heads_of(*of_layer)


def _output_of(block: Block, hidden_BTD: Tensor, attended_BTD: Tensor) -> Tensor:
    return block.output_of(hidden_BTD, attended_BTD)


def _compiled_inputs(
    model: Decoder,
    tokens_BT: Tensor,
    behind_BT: Tensor | None,
    seen: Visibility | None,
    *rest: Any,
    whole: bool,
) -> BlocksInputs:
    windows = () if seen is None else (seen.window,)
    # N-gram embeddings read tokens of other processes as well.
    compute = compiled_for_windows(_inputs, windows, whole=whole or model.ngram_embedding is None)
    inputs: BlocksInputs = compute(model, tokens_BT, behind_BT, seen, *rest)
    return inputs


def _compiled_run(run: Run, hidden_BTD: Tensor) -> Tensor:
    compute = compiled_for_windows(_run, tuple(_seen(of_block).window for _, of_block in run))
    output_BTD: Tensor = compute(run, hidden_BTD)
    return output_BTD


def _compiled_around_attention(run: Run, hidden_BTD: Tensor) -> Tensor:
    ((block, of_block),) = run
    visibility = _seen(of_block)
    # A convolution reads tokens of other processes as well.
    whole = block.attention.convolutions is None
    block.attention.prepare_rotation(visibility)
    heads_of = compiled_for_windows(_heads_of, (visibility.window,), whole=whole)
    hidden_BTD, heads = heads_of(block, hidden_BTD, *of_block[:-1])
    attended_BTD = block.attention.attended(heads)
    output_of = compiled_for_windows(_output_of, (visibility.window,))
    output_BTD: Tensor = output_of(block, hidden_BTD, attended_BTD)
    return output_BTD


def _seen(of_block: BlockInputs) -> Visibility:
    visibility = of_block[0]
    assert visibility is not None
    return visibility
