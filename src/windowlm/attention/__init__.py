"""Sliding-window attention: one definition of the window, several backends proven equal to a reference.

The folder depends on torch and einops alone and on nothing else of the project, so it can be copied.
Start at `window.py` (what a query may see), then `dispatch.py` (who computes it), then `layers.py`.
"""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "FlashAttention": ".layers",
    "KVCache": ".kv_cache",
    "LinearScaling": ".config",
    "Llama3Scaling": ".config",
    "NtkScaling": ".config",
    "RotaryConfig": ".config",
    "RotaryEmbedding": ".rotary",
    "SlidingWindowAttention": ".layers",
    "Visibility": ".window",
    "YarnScaling": ".config",
    "attention": ".dispatch",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    # On first use, so that reading the settings of this package loads no torch.
    if name not in _MODULE_OF:
        names = ", ".join(_MODULE_OF)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {names}")
    return getattr(import_module(_MODULE_OF[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
