"""Small language models with sliding-window attention, judged by perplexity versus context length.

Names are imported on first use, so that reading or checking a configuration never loads torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from windowlm.attention.layers import FlashAttention, SlidingWindowAttention
    from windowlm.attention.rotary import RotaryEmbedding
    from windowlm.bundle import load
    from windowlm.generation.generate import generate, stream

_MODULE_OF = {
    "FlashAttention": "windowlm.attention.layers",
    "RotaryEmbedding": "windowlm.attention.rotary",
    "SlidingWindowAttention": "windowlm.attention.layers",
    "generate": "windowlm.generation.generate",
    "load": "windowlm.bundle",
    "stream": "windowlm.generation.generate",
}

__all__ = ["FlashAttention", "RotaryEmbedding", "SlidingWindowAttention", "generate", "load", "stream"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'windowlm' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_MODULE_OF[name]), name)
