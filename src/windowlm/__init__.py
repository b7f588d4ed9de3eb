"""Small language models with sliding-window attention, judged by perplexity versus context length.

Names are imported on first use, so that reading or checking a configuration never loads torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from windowlm.attention.layers import FlashAttention, SlidingWindowAttention
    from windowlm.attention.rotary import RotaryEmbedding
    from windowlm.bundle import load

_MODULE_OF = {
    "FlashAttention": "windowlm.attention.layers",
    "RotaryEmbedding": "windowlm.attention.rotary",
    "SlidingWindowAttention": "windowlm.attention.layers",
    "load": "windowlm.bundle",
}

__all__ = ["FlashAttention", "RotaryEmbedding", "SlidingWindowAttention", "load"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'windowlm' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_MODULE_OF[name]), name)
