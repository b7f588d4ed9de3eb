"""How far back a model looks: measured by gradient and by perturbation, beside ``1 + sum(W - 1)``.

Shape letters: T tokens, D model width.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from windowlm.study.measure_result import MeasureResult, measure_result


def reach(
    model: nn.Module,
    tokens: npt.NDArray[np.int64],
    receptive_field: int | None,
    vocabulary_size: int,
    seed: int,
) -> MeasureResult:
    """Tokens at the end of a text, the last one included, that can alter the last output.

    Args:
        model: inside ``precision.scoring`` in float64.
        tokens: text that is longer than the receptive field, if the model has one.
        receptive_field: as the settings say; None where a layer sees everything.
        vocabulary_size: ids that a token is replaced by are below it.
        seed: of the replacements and of the direction of the gradient.
    """
    by_gradient = gradient_reach(model, tokens, seed)
    by_perturbation = perturbation_reach(model, tokens, vocabulary_size, seed)
    row: dict[str, Any] = {
        "receptive_field": receptive_field,
        "by_gradient": by_gradient,
        "by_perturbation": by_perturbation,
        "tokens_probed": len(tokens),
    }
    if receptive_field is None:
        sentence = (
            f"A layer sees everything; of {len(tokens):,} tokens {by_gradient:,} reach the last output."
        )
    elif by_gradient > receptive_field or by_perturbation > receptive_field:
        sentence = (
            f"The model looks further back ({max(by_gradient, by_perturbation):,} tokens) than its settings "
            f"allow ({receptive_field:,}): something is wrong."
        )
    elif by_gradient == receptive_field:
        sentence = f"Measured and computed reach agree: {receptive_field:,} tokens."
    else:
        sentence = (
            f"The settings allow {receptive_field:,} tokens, and {by_gradient:,} alter the last output "
            "by as much as float64 can hold."
        )
    return measure_result("reach", meaning=[sentence], rows=[row])


def gradient_reach(model: nn.Module, tokens: npt.NDArray[np.int64], seed: int = 0) -> int:
    """Tokens from the furthest whose embedding the last state has a gradient for, to the last.

    Products of small weights shrink but do not vanish beside larger ones, so this sees the furthest path.
    """
    outputs: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if output.shape[:2] != (1, len(tokens)):
            return None
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    hooks = [
        module.register_forward_hook(keep) for module in model.modules() if isinstance(module, nn.Embedding)
    ]
    assert hooks, "the model has no embedding to take a gradient for"
    try:
        with torch.enable_grad():
            last_D = _last_state(model, tokens)
            direction_D = torch.from_numpy(np.random.default_rng(seed).normal(size=len(last_D))).to(last_D)
            gradients = torch.autograd.grad((last_D * direction_D).sum(), outputs, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    reached_T = torch.zeros(len(tokens), dtype=torch.bool)
    for gradient in gradients:
        if gradient is not None:
            reached_T |= (gradient[0].flatten(1) != 0).any(dim=1).cpu()
    return len(tokens) - int(reached_T.nonzero()[0])


def perturbation_reach(
    model: nn.Module, tokens: npt.NDArray[np.int64], vocabulary_size: int, seed: int = 0
) -> int:
    """Tokens from the furthest whose replacement, with all before, alters a bit of the last state.

    All tokens before a border are replaced, and the border is found by bisection: whether the output alters
    can only turn from no to yes as the border comes nearer.
    """
    replaced = (
        tokens + np.random.default_rng(seed).integers(1, vocabulary_size, len(tokens))
    ) % vocabulary_size
    original_D = _last_state(model, tokens)
    unaltered, altered = 0, len(tokens)
    while altered - unaltered > 1:
        border = (unaltered + altered) // 2
        state_D = _last_state(model, np.concatenate([replaced[:border], tokens[border:]]))
        if torch.equal(state_D, original_D):
            unaltered = border
        else:
            altered = border
    return len(tokens) - unaltered


def _last_state(model: nn.Module, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    device = next(model.parameters()).device
    hidden_1TD: torch.Tensor = model.hidden(torch.from_numpy(tokens)[None].to(device))  # type: ignore[operator]
    return hidden_1TD[0, -1]
