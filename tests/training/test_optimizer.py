import torch

from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.training.config import OptimizerConfig
from windowlm.training.optimizer import build_optimizer


def test_only_matrices_are_decayed_and_each_parameter_is_trained_once() -> None:
    model = Decoder(ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=8), 20)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3), fused=False)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert decay == {id(p): 0.3 if p.ndim == 2 else 0.0 for p in model.parameters()}


def test_a_step_without_gradient_shrinks_matrices_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.RMSNorm(3))
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5), fused=False)
    before = model[0].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model[0].weight, before * 0.95)
    assert torch.equal(model[1].weight, torch.ones(3))
