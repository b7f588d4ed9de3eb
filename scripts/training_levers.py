"""What each lever of the training step gives: the bare loop with one of them moved.

A lever is moved in a process of its own, before the loop is built, by putting something else in the place of
what the project takes; nothing of it is a setting.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import windowlm.attention.layers
import windowlm.model.decoder
import windowlm.model.feed_forward
import windowlm.training.compilation
import windowlm.training.linear_cross_entropy
import windowlm.training.optimizer
from windowlm.model.config import ModelConfig

Lever = Callable[[], None]


def put(owner: Any, name: str, other: Any) -> None:
    """Put something else in the place of what the project takes, which must be there."""
    assert hasattr(owner, name), f"{owner} has no {name}: the lever would move nothing"
    setattr(owner, name, other)


def with_joint_projections() -> None:
    """Query, key and value as one product, gate and up as another."""

    def project(hidden_ND: Tensor, layers: list[nn.Linear], *_: Any, **__: Any) -> tuple[Tensor, ...]:
        weight_OD = torch.cat([layer.weight for layer in layers])
        return F.linear(hidden_ND, weight_OD).split([layer.out_features for layer in layers], dim=-1)

    for module in (windowlm.attention.layers, windowlm.model.feed_forward):
        put(module, "project_jointly", project)


def with_kept_activations() -> None:
    """The activation of the feed-forward network is kept, and not computed again."""

    def keep(activation: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return activation(*inputs)

    put(windowlm.model.feed_forward, "computed_again", keep)


def with_float32_stream() -> None:
    """The residual stream as autocast leaves it."""
    put(windowlm.model.decoder, "_narrowed_by_autocast", lambda hidden_BTD: hidden_BTD)


def with_whole_loss() -> None:
    """All logits of a batch at once."""
    module = windowlm.training.linear_cross_entropy
    put(module, "head_loss", lambda kind, precision, *, compiled: module.cross_entropy_of_logits)


def with_plain_loss() -> None:
    """The loss in pieces, nothing between its products compiled."""
    module = windowlm.training.linear_cross_entropy
    compiled_or_not = module.head_loss
    put(
        module,
        "head_loss",
        lambda kind, precision, *, compiled: compiled_or_not(kind, precision, compiled=False),
    )


def without_compilation() -> None:
    """Nothing compiled but the attention kernel."""
    put(windowlm.training.compilation, "is_compiled", lambda settings, device: False)


def with_compiled_blocks() -> None:
    """Each block a graph of its own, shared by those of one window: quick to compile, less to fuse."""

    def hidden_states(model: Any, **_: Any) -> Any:
        for block in model.blocks:
            block.compile(fullgraph=True)
        return model.hidden

    put(windowlm.training.compilation, "hidden_states", hidden_states)


def with_backend(name: str) -> Lever:
    """Another attention kernel."""

    def move() -> None:
        build = windowlm.model.decoder.Decoder.__init__

        def building(self: nn.Module, config: ModelConfig, *rest: Any) -> None:
            build(self, replace(config, backend=name), *rest)

        put(windowlm.model.decoder.Decoder, "__init__", building)

    return move


def with_unfused_optimizer() -> None:
    """AdamW in several kernels an operation."""
    module = windowlm.training.optimizer
    fused_or_not = module.build_optimizer
    put(
        module,
        "build_optimizer",
        lambda model, settings, *, fused: fused_or_not(model, settings, fused=False),
    )


def with_half_the_activations() -> None:
    """``trainer.activation_memory_budget=0.5``."""
    module = windowlm.training.compilation
    plain = module.hidden_states

    def hidden_states(model: Any, **options: Any) -> Any:
        return plain(model, **options, activation_memory_budget=0.5)

    put(module, "hidden_states", hidden_states)


LEVERS: dict[str, Lever] = {
    "joint projections": with_joint_projections,
    "kept activations": with_kept_activations,
    "float32 stream": with_float32_stream,
    "whole loss": with_whole_loss,
    "plain loss": with_plain_loss,
    "compiled blocks": with_compiled_blocks,
    "no compilation": without_compilation,
    "flex": with_backend("flex"),
    "band": with_backend("band"),
    "unfused optimizer": with_unfused_optimizer,
    "budget 0.5": with_half_the_activations,
}
