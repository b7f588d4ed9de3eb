"""The oracle against attention written as loops over single numbers."""

import math

import pytest
import torch

from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility


@pytest.mark.parametrize("learned_sinks", [False, True])
@pytest.mark.parametrize("logit_cap", [None, 0.7])
def test_the_reference_is_softmax_over_the_visible_keys(learned_sinks: bool, logit_cap: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(5, 4, 3), torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    sink_logits_H = torch.randn(4) if learned_sinks else None
    output = attention(
        query[None].double(),
        key[None].double(),
        value[None].double(),
        Visibility.build(window=3),
        backend="reference",
        sink_logits_H=sink_logits_H,
        logit_cap=logit_cap,
    )
    for token in range(5):
        for head in range(4):
            seen = range(max(0, token - 2), token + 1)
            scores = [(query[token, head] @ key[s, head // 2]).item() / math.sqrt(3) for s in seen]
            if logit_cap is not None:
                scores = [logit_cap * math.tanh(score / logit_cap) for score in scores]
            weights = [math.exp(score) for score in scores]
            total = sum(weights) + (0 if sink_logits_H is None else math.exp(sink_logits_H[head]))
            for d in range(3):
                mixed = sum(
                    weight * value[s, head // 2, d].item() for weight, s in zip(weights, seen, strict=True)
                )
                assert abs(output[0, token, head, d].item() - mixed / total) < 1e-6
