"""The next token of each row: logits bent by the settings, then one draw of the row's own.

Shapes: B batch, T tokens, V vocabulary.
"""

import hashlib

import torch
from torch import Tensor

from windowlm.generation.config import SamplingConfig


def row_draws(seed: int, prompt: int, tokens: int) -> Tensor:
    """Uniform numbers in [0, 1) for a prompt's tokens, float64 ``[tokens]``; a longer row begins alike.

    Args:
        seed: of the settings.
        prompt: number of the prompt, the same whichever prompts are served beside it.
        tokens: how many.
    """
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    # Integers come one by one; floating-point numbers would depend on how many are drawn at once.
    return torch.randint(2**53, (tokens,), generator=generator).double() / 2**53


def next_tokens(
    logits_BV: Tensor, draws_B: Tensor, settings: SamplingConfig, occurred_BV: Tensor | None = None
) -> Tensor:
    """Choose the next token of each row, int64 ``[B]``.

    Args:
        logits_BV: of the next token.
        draws_B: a uniform number in [0, 1) for each row.
        settings: temperature, filters, repetition penalty.
        occurred_BV: bool, what the penalty makes less probable; may be left away without penalty.
    """
    if settings.repetition_penalty != 1:
        assert occurred_BV is not None
        # In float16 and float32 a bent logit may overflow.
        logits_BV = logits_BV.double()
        penalty = settings.repetition_penalty
        bent_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(occurred_BV, bent_BV, logits_BV)
    if settings.temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BV = _kept(logits_BV.double() / settings.temperature, settings).softmax(-1)
    # The inverse of the distribution function; a draw near 1 may lie beyond its rounded end.
    sums_BV = probabilities_BV.cumsum(-1)
    chosen_B1 = torch.searchsorted(sums_BV, draws_B[:, None] * sums_BV[:, -1:], right=True)
    last_possible_B1 = probabilities_BV.shape[-1] - 1 - (probabilities_BV > 0).int().flip(-1).argmax(-1, True)
    return torch.minimum(chosen_B1, last_possible_B1)[:, 0]


def _kept(logits_BV: Tensor, settings: SamplingConfig) -> Tensor:
    """The logits with -inf for the tokens that top-k, top-p and min-p take away, one after the other."""
    if settings.top_k is not None and settings.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(settings.top_k, -1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if settings.top_p < 1:
        sorted_BV, token_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probabilities_BV = sorted_BV.softmax(-1)
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        beyond_BV = before_BV >= settings.top_p
        beyond_BV[:, 0].fill_(False)
        logits_BV = logits_BV.masked_fill(
            torch.zeros_like(beyond_BV).scatter(1, token_BV, beyond_BV), -torch.inf
        )
    if settings.min_p > 0:
        probabilities_BV = logits_BV.softmax(-1)
        least_B1 = settings.min_p * probabilities_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(probabilities_BV < least_B1, -torch.inf)
    return logits_BV
