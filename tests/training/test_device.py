"""Precision and device."""

import pytest
import torch

from windowlm.config import ConfigError, TrainConfig, check_config
from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.training.device import check_room, choose_device


@pytest.mark.parametrize("key", ["precision", "evaluation.precision"])
def test_float16_without_a_gpu_is_refused_for_training_and_evaluation(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = (
        TrainConfig(run_dir="run", precision="16-mixed")
        if key == "precision"
        else TrainConfig(run_dir="run", evaluation=EvaluationConfig(precision="16-mixed"))
    )
    with pytest.raises(ConfigError, match=rf"^{key}=16-mixed: ") as refused:
        choose_device(config)
    assert (refused.value.key, refused.value.correction) == (key, f"{key}=bf16-mixed")


def test_float16_in_the_evaluation_is_refused_with_the_settings_where_they_name_a_cpu() -> None:
    values = {
        "run_dir": "run",
        "trainer": {"device": "cpu"},
        "evaluation": {"precision": "16-mixed"},
    }
    with pytest.raises(ConfigError, match=r"^evaluation\.precision=16-mixed: ") as refused:
        check_config(TrainConfig, values)
    assert refused.value.key == "evaluation.precision"
    assert refused.value.correction == "evaluation.precision=bf16-mixed"


def test_what_a_cpu_can_do_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = TrainConfig(
        run_dir="run", precision="bf16-mixed", evaluation=EvaluationConfig(precision="64-true")
    )
    assert choose_device(config).type == "cpu"


@pytest.mark.parametrize(("number", "chosen"), [(0, 0), (1, 1), (2, 1)])
def test_a_gpu_is_named_by_its_number_as_lightning_demands(
    monkeypatch: pytest.MonkeyPatch, number: int, chosen: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert choose_device(TrainConfig(run_dir="run"), number) == torch.device("cuda", chosen)


def test_a_model_that_the_machine_cannot_hold_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**18}.__getitem__)
    check_room(2**26, torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"67,108,865 parameters take 1\.0 GiB at least, and this machine has 1"
    ):
        check_room(2**26 + 1, torch.device("cpu"))
    check_room(2**28, torch.device("cuda"))
