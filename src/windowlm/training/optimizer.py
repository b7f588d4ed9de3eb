"""AdamW over the parameters of a model, with decay on matrices only."""

import torch
from torch import nn

from windowlm.training.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019).

    Norm weights and other vectors are not decayed: pulling them to zero shrinks the signal, not the
    function's complexity.

    Args:
        model: its trainable parameters, a shared one counted once.
        config: rate, betas, decay.
        fused: one kernel for all parameters; float16's loss scaling needs it off, so that gradients are
            unscaled before they are clipped.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.epsilon,
        fused=fused,
    )
