import copy

import torch

from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.training.config import OptimizerConfig
from windowlm.training.master_weights import MasterWeights
from windowlm.training.optimizer import build_optimizer

SHAPE = ModelConfig(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=8)


def draw_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (
            torch.randn(parameter.shape, generator=generator).to(torch.bfloat16).to(parameter.dtype)
        )


def models() -> tuple[Decoder, Decoder]:
    """In bfloat16, and the same numbers in float32."""
    torch.manual_seed(0)
    narrow = Decoder(SHAPE, 20).to(torch.bfloat16)
    return narrow, copy.deepcopy(narrow).float()


def test_small_updates_add_up_as_in_float32() -> None:
    for kind in ("adamw", "muon"):
        narrow, wide = models()
        config = OptimizerConfig(kind=kind, lr=1e-5, muon_lr=1e-5, weight_decay=0.0)
        optimizers = [build_optimizer(model, config, fused=False) for model in (narrow, wide)]
        assert isinstance(optimizers[0], MasterWeights)
        assert not isinstance(optimizers[1], MasterWeights)
        for step in range(20):
            for model, optimizer in zip((narrow, wide), optimizers, strict=True):
                draw_gradients(model, step)
                optimizer.step()
                optimizer.zero_grad()
        for got, wanted in zip(narrow.parameters(), wide.parameters(), strict=True):
            assert got.grad is None
            assert torch.equal(got, wanted.to(torch.bfloat16))


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    narrow, _ = models()
    config = OptimizerConfig(lr=1e-4)
    optimizer = build_optimizer(narrow, config, fused=False)
    draw_gradients(narrow, 0)
    optimizer.step()
    saved = copy.deepcopy({"model": narrow.state_dict(), "optimizer": optimizer.state_dict()})
    other, _ = models()
    other.load_state_dict(saved["model"])
    resumed = build_optimizer(other, config, fused=False)
    resumed.load_state_dict(saved["optimizer"])
    for model, of_model in ((narrow, optimizer), (other, resumed)):
        for step in range(1, 4):
            draw_gradients(model, step)
            of_model.step()
    assert isinstance(optimizer, MasterWeights)
    assert isinstance(resumed, MasterWeights)
    for got, wanted in zip(resumed._masters, optimizer._masters, strict=True):
        assert torch.equal(got, wanted)
