"""What torch.compile is told of our operators: sizes, strides and dtypes are those of the real outputs."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    operators: str, tokens: int, visibility: dict[str, Any], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, tokens, heads, 8, requires_grad=True) for heads in (2, 1, 1)]
    with StandInsAgree() as agree:
        output_BTHD = attention(*tensors, Visibility.build(**visibility), backend="banded", **options)
        output_BTHD.sum().backward()
    assert agree.seen == {(operators, "attend"), (operators, "attend_backward")}
