from dataclasses import replace

import torch

from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.model.decoder import Decoder
from windowlm.training.config import OptimizerConfig
from windowlm.training.optimizer import RATE_SHARE, build_optimizer


def test_only_matrices_are_decayed_and_each_parameter_is_trained_once() -> None:
    model = Decoder(ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=8), 20)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3), fused=False)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert decay == {id(p): 0.3 if p.ndim == 2 else 0.0 for p in model.parameters()}


def test_a_step_without_gradient_shrinks_matrices_alone() -> None:
    model = Decoder(ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=8), 20)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5), fused=False)
    before = model.head.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.head.weight, before * 0.95)
    assert torch.equal(model.final_norm.weight, torch.ones(16))


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest_at_their_own_rates() -> None:
    shape = ModelConfig(
        layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=8, output_gate=True
    )
    model = Decoder(shape, 20)
    config = OptimizerConfig(kind="muon", lr=2e-3, muon_lr=6e-3, weight_decay=0.3)
    optimizer = build_optimizer(model, config, fused=False)
    muon, *rest = optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(muon["params"]) == 2 * 7
    assert all(names[id(p)].startswith("blocks.") and p.ndim == 2 for p in muon["params"])
    of_adamw = {names[id(p)] for group in rest for p in group["params"]}
    assert {"embedding.weight", "blocks.0.attention.gate.weight"} <= of_adamw
    assert len(of_adamw) + len(muon["params"]) == len(list(model.parameters()))
    assert (muon["lr"], muon[RATE_SHARE], {group[RATE_SHARE] for group in rest}) == (6e-3, 3.0, {1.0})
    of_one_rate = replace(config, muon_lr=None)
    assert {group[RATE_SHARE] for group in build_optimizer(model, of_one_rate, fused=False).param_groups} == {
        1.0
    }


def test_tables_and_vectors_have_rates_and_decay_of_their_own_where_these_are_given() -> None:
    shape = ModelConfig(
        layers=2,
        dim=16,
        heads=2,
        kv_heads=1,
        head_dim=8,
        feed_forward_dim=8,
        tied_embeddings=False,
        value_embeddings=1,
        ngram_embeddings=NgramEmbeddingsConfig(orders=[2], buckets=9, dim=4),
    )
    model = Decoder(shape, 20)
    tables = {"embedding.weight", "value_embeddings.0.weight", "ngram_embedding.tables.weight"}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {"lr": 2e-3, "embedding_lr": 1e-2, "vector_lr": 1e-3}
    for given in (
        rates,
        {"weight_decay": 0.2, "embedding_weight_decay": 0.0},
        {**rates, "weight_decay": 0.2},
    ):
        config = OptimizerConfig(kind="adamw", **given)
        groups = build_optimizer(model, config, fused=False).param_groups
        of_group = {
            names[id(p)]: (group[RATE_SHARE], group["weight_decay"])
            for group in groups
            for p in group["params"]
        }
        decay = given.get("weight_decay", 0.1)
        of_tables = (5.0 if "lr" in given else 1.0, given.get("embedding_weight_decay", decay))
        of_vectors = (0.5 if "lr" in given else 1.0, 0.0)
        for name, parameter in model.named_parameters():
            others = of_vectors if parameter.ndim != 2 else (1.0, decay)
            assert of_group[name] == (of_tables if name in tables else others)
