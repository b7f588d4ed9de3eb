import os

import pytest
import torch
import torch._inductor.config as compiler

from windowlm.attention.backends.capability import Request
from windowlm.attention.dispatch import capabilities
from windowlm.training.determinism import set_determinism


def test_a_run_that_asks_for_it_is_deterministic_and_the_next_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    set_determinism(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert compiler.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not compiler.deterministic


def test_a_kernel_that_sums_in_any_order_is_passed_over() -> None:
    wanted = Request(device="cuda", dtype=torch.bfloat16, deterministic=True)
    refused = {name for name in ("band", "flash4", "varlen", "flex") if not capabilities(name).deterministic}
    assert refused == {"flash4"}
    assert capabilities("banded").refusal(wanted) is None
