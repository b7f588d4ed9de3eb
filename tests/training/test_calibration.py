import gc
import sys

import pytest
import torch
import torch.nn.functional as F

from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.training.calibration import calibrate
from windowlm.training.config import OptimizerConfig
from windowlm.training.optimizer import build_optimizer
from windowlm.training.peak_memory import peak_memory_bytes, reset_peak_memory

CPU = torch.device("cpu")
VOCABULARY = 90_000  # tensors so large that the system gets their memory back when they are freed


def model_and_batch() -> tuple[Decoder, dict[str, torch.Tensor]]:
    shape = ModelConfig(layers=1, dim=128, heads=2, kv_heads=1, head_dim=64, feed_forward_dim=128, window=16)
    tokens_BT = torch.randint(0, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens_BT": tokens_BT,
        "targets_BT": tokens_BT.roll(-1, 1),
        "documents_BT": torch.zeros(2, 64, dtype=torch.int32),
        "positions_BT": torch.arange(64).repeat(2, 1),
    }
    return Decoder(shape, VOCABULARY), batch


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_the_expected_memory_is_what_training_takes() -> None:
    model, batch = model_and_batch()
    gc.collect()
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    expected = calibrate(model, batch, "32-true", CPU).memory_bytes - before

    reset_peak_memory(CPU)
    optimizer = build_optimizer(model, OptimizerConfig(), fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        logits_BTV = model(batch["tokens_BT"], batch["documents_BT"], batch["positions_BT"])
        F.cross_entropy(logits_BTV.flatten(0, 1), batch["targets_BT"].flatten()).backward()
        optimizer.step()
    assert peak_memory_bytes(CPU) - before == pytest.approx(expected, rel=0.25)


def test_calibration_leaves_the_model_as_it_was() -> None:
    model, batch = model_and_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = calibrate(model, batch, "bf16-true", CPU)
    assert 0 < measured.forward_seconds < measured.seconds_per_batch
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
