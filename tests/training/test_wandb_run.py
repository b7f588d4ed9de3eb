from pathlib import Path

import pytest

from tests.training.runs import begin
from windowlm.config import TrainConfig
from windowlm.errors import UserError
from windowlm.training.wandb_run import WandbRun, choose_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def give_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


def test_auto_is_online_with_a_key_and_offline_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_mode("auto") == "offline"
    give_key(monkeypatch)
    assert choose_mode("auto") == "online"


@pytest.mark.parametrize(
    ("variable", "mode"),
    [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("", "online")],
)
def test_auto_follows_the_variable(monkeypatch: pytest.MonkeyPatch, variable: str, mode: str) -> None:
    give_key(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", variable)
    assert choose_mode("auto") == mode


def test_a_setting_goes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    give_key(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode("offline") == "offline"


def test_online_without_a_key_names_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"logger\.mode=online: no W&B key"):
        choose_mode("online")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="WANDB_MODE=online: no W&B key"):
        choose_mode("auto")


def test_what_is_no_key_is_refused_and_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "part of a key")
    with pytest.raises(
        UserError, match=r"logger\.mode=online: W&B takes the configured key for none"
    ) as refused:
        choose_mode("online")
    assert "part of a key" not in str(refused.value)


@pytest.mark.parametrize("setting", [{"mode": "online"}, {"mode": "auto"}])
def test_a_run_that_wandb_would_refuse_leaves_nothing_behind(
    setting: dict[str, str], documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="no W&B key is configured"):
        begin(tmp_path / "run", documents, tmp_path / "cache", logger={"kind": "wandb", **setting})
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE=sometimes: allowed is one of online"):
        choose_mode("offline")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("CommError", r"^logger\.mode=auto: no; try logger\.mode=offline"),
        ("UsageError", r"^logger: W&B refuses the settings: no"),
        ("ValueError", r"^logger: W&B refuses the settings: no"),
    ],
)
def test_only_a_failed_connection_is_laid_to_the_mode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: str, message: str
) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise getattr(wandb.errors, failure, ValueError)("no")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UserError, match=message):
        WandbRun(TrainConfig(run_dir="run"), tmp_path, None, "id", {})
