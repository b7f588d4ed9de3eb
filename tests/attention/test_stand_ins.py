"""What torch.compile is told of our operators: sizes, strides and dtypes are those of the real outputs."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.attention import cases
from tests.attention.cases import LAYOUTS
from windowlm.attention.backends import flash4
from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility


class StandInsAgree(TorchDispatchMode):
    """Compare each call of an operator of ours with its stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("windowlm"):
            torch.library.opcheck(func, args, kwargs, test_utils="test_faketensor")
            self.seen.add((func.namespace.rpartition("_backends_")[2], func._opname))
        return func(*args, **(kwargs or {}))


def laid_out(layout: str) -> Callable[..., Tensor]:
    """What draws heads that lie so."""

    def draw(*shape: int) -> Tensor:
        return cases.laid_out(torch.randn(shape), layout).requires_grad_()

    return draw


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("operators", "tokens", "visibility", "options"),
    [
        ("banded_matmul", 700, {"window": 7}, {}),
        ("banded_wide", 100, {"window": 7}, {}),
        ("banded_matmul", 100, {"window": 7, "sinks": 2}, {}),
        ("banded_wide", 100, {"window": None}, {}),
        ("banded_wide", 1600, {"window": 1540}, {}),
        ("blockwise", 100, {"window": None}, {"logit_cap": 5.0}),
        ("blockwise", 100, {"window": 7}, {"sink_logits_H": torch.zeros(2)}),
        ("banded_matmul", 100, {"window": 7, "documents_BT": (torch.arange(100) // 30).int()[None]}, {}),
        ("banded_wide", 100, {"window": None, "documents_BT": (torch.arange(100) // 30).int()[None]}, {}),
    ],
)
def test_stand_ins_are_as_the_outputs(
    operators: str, tokens: int, visibility: dict[str, Any], options: dict[str, Any], layout: str
) -> None:
    torch.manual_seed(0)
    tensors = [laid_out(layout)(2, tokens, heads, 8) for heads in (2, 1, 1)]
    with StandInsAgree() as agree:
        output_BTHD = attention(*tensors, Visibility.build(**visibility), backend="banded", **options)
        output_BTHD.sum().backward()
    assert agree.seen == {(operators, "attend"), (operators, "attend_backward")}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stand_ins_of_flash4_are_as_what_the_package_allocates(
    layout: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        *batch, tokens, heads, _dim = query.shape
        return query.new_zeros(query.shape), query.new_zeros((*batch, heads, tokens), dtype=torch.float32)

    def backward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> tuple[Tensor, ...]:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

    package = ModuleType("flash_attn.cute.interface")
    package._flash_attn_fwd, package._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tensors = [laid_out(layout)(2, 100, heads, 64) for heads in (4, 2, 2)]
    documents_BT = (torch.arange(100) // 30).int()[None] if packed else None
    visibility = Visibility.build(window=7, documents_BT=documents_BT)
    with StandInsAgree() as agree:
        output_BTHD = flash4.attend(*tensors, visibility, scale=1.0, dropout=0.0)
        output_BTHD.sum().backward()
    assert agree.seen == {("flash4", "attend"), ("flash4", "attend_backward")}
