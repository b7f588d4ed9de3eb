"""The output head: logits of the next token, bounded where that is asked for.

Shape letters: D model width, V vocabulary.
"""

import torch
from torch import nn


class Head(nn.Linear):
    """A matrix without bias; with a cap c, logits l become ``c * tanh(l / c)`` (Gemma 2, arXiv:2408.00118).

    Args:
        dim: D.
        vocabulary_size: V.
        logit_cap: c; None for no bound.
    """

    def __init__(self, dim: int, vocabulary_size: int, logit_cap: float | None = None) -> None:
        super().__init__(dim, vocabulary_size, bias=False)
        self.logit_cap = logit_cap

    def forward(self, hidden_D: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., V]`` of states ``[..., D]``."""
        logits_V = super().forward(hidden_D)
        return logits_V if self.logit_cap is None else capped(logits_V, self.logit_cap)


def capped(logits_V: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap * tanh(logits / cap)``, taken in at least float32, in the dtype of the logits."""
    wide_V = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))
    return ((wide_V / cap).tanh() * cap).to(logits_V.dtype)
