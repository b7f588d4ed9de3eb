import gc
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from windowlm.data.packing import UNSCORED
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.training import calibration
from windowlm.training.calibration import calibrate, kept_bytes
from windowlm.training.compilation import HiddenStates
from windowlm.training.config import OptimizerConfig
from windowlm.training.linear_cross_entropy import linear_cross_entropy
from windowlm.training.optimizer import build_optimizer
from windowlm.training.peak_memory import peak_memory_bytes, reset_peak_memory

CPU = torch.device("cpu")
VOCABULARY = 180_000  # tensors so large that the system gets their memory back when they are freed


def model_and_batch(vocabulary: int = VOCABULARY) -> tuple[Decoder, dict[str, torch.Tensor]]:
    shape = ModelConfig(layers=1, dim=128, heads=2, kv_heads=1, head_dim=64, feed_forward_dim=128, window=16)
    tokens_BT = torch.randint(0, vocabulary, (2, 64), generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens_BT": tokens_BT,
        "targets_BT": tokens_BT.roll(-1, 1),
        "documents_BT": torch.zeros(2, 64, dtype=torch.int32),
        "positions_BT": torch.arange(64).repeat(2, 1),
    }
    return Decoder(shape, vocabulary), batch


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_the_expected_memory_is_what_training_takes() -> None:
    # What earlier tests have freed would be taken without the process growing.
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh_process:
        expected, taken = fresh_process.submit(expected_and_taken_memory).result()
    assert taken == pytest.approx(expected, rel=0.25)


def expected_and_taken_memory() -> tuple[int, int]:
    """Bytes by which this process should grow in training, and by which it does."""
    model, batch = model_and_batch()
    gc.collect()
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    settings = OptimizerConfig()
    expected = calibrate(model, batch, "32-true", CPU, optimizer=settings).memory_bytes - before

    reset_peak_memory(CPU)
    optimizer = build_optimizer(model, settings, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        hidden_BTD = model.hidden(batch["tokens_BT"], batch["documents_BT"], batch["positions_BT"])
        targets_N = batch["targets_BT"].flatten()
        linear_cross_entropy(
            hidden_BTD.flatten(0, 1), model.head.weight, targets_N, unscored=UNSCORED, logit_cap=None
        )[0].backward()
        optimizer.step()
    return expected, peak_memory_bytes(CPU) - before


def test_calibration_leaves_the_model_as_it_was() -> None:
    model, batch = model_and_batch(500)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = calibrate(model, batch, "bf16-true", CPU)
    assert 0 < measured.forward_seconds < measured.seconds_per_batch
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_optimizer_takes_gradients_before_another_pass_can_write_over_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As graphs of kernels do, whose gradients lie in memory that each pass uses again.
    model, batch = model_and_batch(500)
    steps = []

    def writing_over_gradients(copied: Decoder) -> HiddenStates:
        def hidden(*tokens: torch.Tensor, **seen: Any) -> torch.Tensor:
            for parameter in copied.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
            return copied.hidden(*tokens, **seen)

        return hidden

    class Checked(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            assert all(bool(p.grad.isfinite().all()) for p in parameters)
            steps.append(len(parameters))

    monkeypatch.setattr(
        calibration, "build_optimizer", lambda copied, *_, **__: Checked(copied.parameters(), lr=0.1)
    )
    calibrate(model, batch, "32-true", CPU, states_of=writing_over_gradients, optimizer=OptimizerConfig())
    assert steps == [len(list(model.parameters()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("averaging", [None, 0.5])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_what_an_optimizer_keeps_is_what_its_state_holds(
    kind: Any, averaging: float | None, dtype: torch.dtype
) -> None:
    model, _ = model_and_batch(50)
    model.to(dtype)
    settings = OptimizerConfig(kind=kind, averaging=averaging)
    optimizer = build_optimizer(model, settings, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    numbers = sum(parameter.numel() for parameter in model.parameters())
    held += 4 * numbers * ((dtype == torch.bfloat16) + (averaging is not None))
    assert kept_bytes(model, settings) == held
