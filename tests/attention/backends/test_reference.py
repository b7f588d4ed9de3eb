"""The oracle against attention written as loops over single numbers."""

import math

import torch

from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility


def test_the_reference_is_softmax_over_the_visible_keys() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(5, 4, 3), torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    output = attention(
        query[None].double(),
        key[None].double(),
        value[None].double(),
        Visibility.build(window=3),
        backend="reference",
    )
    for token in range(5):
        for head in range(4):
            seen = range(max(0, token - 2), token + 1)
            scores = [math.exp((query[token, head] @ key[s, head // 2]).item() / math.sqrt(3)) for s in seen]
            for d in range(3):
                mixed = sum(
                    score * value[s, head // 2, d].item() for score, s in zip(scores, seen, strict=True)
                )
                assert abs(output[0, token, head, d].item() - mixed / sum(scores)) < 1e-6
