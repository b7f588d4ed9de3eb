"""Backends that cannot serve a run."""

from dataclasses import replace

import pytest
import torch

from windowlm.attention.backends import banded
from windowlm.config import ConfigError, TrainConfig
from windowlm.data.config import DataConfig
from windowlm.evaluation.config import EvaluationConfig
from windowlm.model.config import ModelConfig
from windowlm.training.backends import chosen_backends

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["flex", "flash4"])
def test_a_backend_that_needs_a_gpu_is_refused_by_its_key(backend: str) -> None:
    config = TrainConfig(run_dir="run", model=ModelConfig(backend=backend))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=rf"^model\.backend={backend}: cannot serve this call: it does not run on cpu"
    ) as refused:
        chosen_backends(config, CPU)
    assert (refused.value.key, refused.value.correction) == ("model.backend", "model.backend=auto")


def test_each_distinct_choice_is_named_once() -> None:
    config = TrainConfig(run_dir="run", model=ModelConfig(layers=4, window=[8, None, 8, None]))
    choices = chosen_backends(config, CPU)
    assert len(choices) == len(set(choices))
    assert all("fastest that supports the call" in choice for choice in choices)


@pytest.mark.parametrize(
    ("option", "flag", "feature"),
    [
        ({"attention_sinks": 2}, "sinks", "it does not support sinks"),
        ({"learned_sinks": True}, "sink_logits", "it does not support learned sinks"),
        ({"logit_cap": 5.0}, "logit_cap", "it does not support a cap on the logits"),
    ],
)
def test_the_options_of_the_attention_count(
    monkeypatch: pytest.MonkeyPatch, option: dict[str, object], flag: str, feature: str
) -> None:
    monkeypatch.setattr(banded, "CAPABILITIES", replace(banded.CAPABILITIES, **{flag: False}))
    model = ModelConfig(backend="banded", **option)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=feature):
        chosen_backends(TrainConfig(run_dir="run", model=model), CPU)


@pytest.mark.parametrize(
    ("option", "flag", "feature"),
    [
        ({}, "more_keys", "it does not support more keys than queries"),
        ({"attention_sinks": 2}, "separate_keys", "it does not support keys with positions of their own"),
    ],
)
def test_a_part_of_a_sequence_needs_a_backend_that_takes_the_keys_of_others(
    monkeypatch: pytest.MonkeyPatch, option: dict[str, object], flag: str, feature: str
) -> None:
    monkeypatch.setattr(banded, "CAPABILITIES", replace(banded.CAPABILITIES, **{flag: False}))
    model = ModelConfig(backend="banded", **option)  # type: ignore[arg-type]
    config = TrainConfig(run_dir="run", model=model, data=DataConfig(document_masking=False))
    assert chosen_backends(config, CPU)
    with pytest.raises(ConfigError, match=rf"{feature}.*\(training\)"):
        chosen_backends(config, CPU, cut=True)


def test_sinks_do_not_limit_the_backends_of_full_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "CAPABILITIES", replace(banded.CAPABILITIES, sinks=False))
    model = ModelConfig(window=[8, None], attention_sinks=2)
    windowed, full = chosen_backends(TrainConfig(run_dir="run", model=model), CPU)
    assert windowed.startswith("reference")
    assert full.startswith("banded")


def test_the_precision_of_the_evaluation_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        banded, "CAPABILITIES", replace(banded.CAPABILITIES, dtypes=frozenset({torch.float32}))
    )
    model = ModelConfig(backend="banded")
    assert chosen_backends(TrainConfig(run_dir="run", model=model), CPU)
    config = TrainConfig(run_dir="run", model=model, evaluation=EvaluationConfig(precision="64-true"))
    with pytest.raises(
        ConfigError, match=r"does not compute in torch\.float64.*evaluation\.precision=64-true"
    ):
        chosen_backends(config, CPU)


def test_without_document_masking_training_needs_no_documents_and_the_evaluation_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(banded, "CAPABILITIES", replace(banded.CAPABILITIES, documents=False))
    config = TrainConfig(
        run_dir="run", model=ModelConfig(backend="banded"), data=DataConfig(document_masking=False)
    )
    with pytest.raises(ConfigError, match=r"documents.*\(evaluation\.precision=32-true\)"):
        chosen_backends(config, CPU)
    with pytest.raises(ConfigError, match=r"documents.*\(training\)"):
        chosen_backends(replace(config, data=DataConfig()), CPU)
