"""Several linear maps of one input as one matrix product.

Shapes: N tokens of any leading dimensions, D input, O outputs of all maps together.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Up to here, putting the weights together costs more than one wide product saves.
FEW_TOKENS = 32
# Weights [O, D] and biases [O], or None, of several layers one after the other.
JointWeights = tuple[Tensor, Tensor | None]


class WithJointWeights(nn.Module):
    """A module that may hold the weights of some of its layers in one tensor.

    Copies of it, pickled ones too, and what is cast or moved hold none: their weights lie elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self._joint_weights: JointWeights | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the joint weights."""
        return {**self.__dict__, "_joint_weights": None}

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        self._joint_weights = None
        applied: Self = super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return applied


def lay_side_by_side(layers: Sequence[nn.Linear]) -> JointWeights:
    """Move the weights of the layers into one tensor, of which each layer's own become a part."""
    # The weights may be trained later, which those of inference mode refuse.
    with torch.inference_mode(False), torch.no_grad():
        weight_OD, bias_O = joint = _put_together(layers)
        start = 0
        for layer in layers:
            part = slice(start, start + layer.out_features)
            layer.weight.data = weight_OD[part]
            if bias_O is not None:
                layer.bias.data = bias_O[part]
            start = part.stop
    return joint


def project_jointly(
    hidden_ND: Tensor,
    layers: Sequence[nn.Linear],
    joint: JointWeights | None = None,
    *,
    outputs_kept: bool = False,
) -> tuple[Tensor, ...]:
    """Apply each layer to the input; outputs may be views of one tensor.

    The weights stay apart, as optimizers and checkpoints want them, and are put together for the product. On
    a CPU one wide product is faster than several narrow ones, and the input's gradient need not be summed
    over them. On a GPU a part, as a view of it, keeps the whole alive until the backward pass, so that there
    the product is one only where all outputs are kept anyway.

    One by one are applied a few tokens without gradients, as in generation, and layers that are more than a
    weight: of another kind, such as those that multiply in float8, and with hooks, such as those of pruning.

    Args:
        hidden_ND: [..., D].
        layers: of D inputs each, all with biases or all without.
        joint: what `lay_side_by_side` made of them; without gradients the product is then one in any case,
            unless the layers have other weights by now.
        outputs_kept: whether the backward pass needs them all.

    Returns:
        [..., outputs of the layer] for each layer.
    """
    # What lies side by side is no parameter, and would keep gradients from those that are.
    if joint is None or torch.is_grad_enabled() or not _are_parts(layers, joint):
        few_tokens = not torch.is_grad_enabled() and math.prod(hidden_ND.shape[:-1]) <= FEW_TOKENS
        joinable = outputs_kept or hidden_ND.device.type == "cpu"
        joinable = joinable and all(map(_is_its_weight, layers))
        if few_tokens or not joinable:
            return tuple(layer(hidden_ND) for layer in layers)
        joint = _put_together(layers)
    outputs_NO = F.linear(hidden_ND, *joint)
    return torch.split(outputs_NO, [layer.out_features for layer in layers], dim=-1)


def _is_its_weight(layer: nn.Linear) -> bool:
    """Whether calling the layer is the product with its weight and nothing else."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) is nn.Linear and not any(hooks)


def _are_parts(layers: Sequence[nn.Linear], joint: JointWeights) -> bool:
    """Whether the layers are their weights, and these still lie where they were laid.

    Those that are loaded by assignment do not. A graph knows no addresses: what it is compiled for must stay.
    """
    if not all(map(_is_its_weight, layers)):
        return False
    if torch.compiler.is_compiling():
        return True
    start = 0
    for layer in layers:
        for own, whole in zip((layer.weight, layer.bias), joint, strict=True):
            if (own is None) != (whole is None):
                return False
            if own is None or whole is None:
                continue
            place = whole.data_ptr() + start * whole.stride(0) * whole.element_size()
            if own.data_ptr() != place or (own.dtype, own.device) != (whole.dtype, whole.device):
                return False
        start += layer.out_features
    return True


def _put_together(layers: Sequence[nn.Linear]) -> JointWeights:
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers))
    weight_OD = torch.cat([layer.weight for layer in layers])
    return weight_OD, torch.cat(biases) if biases else None
