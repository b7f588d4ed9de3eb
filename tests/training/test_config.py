"""Settings that W&B would refuse only once the run begins."""

import pytest

from windowlm.config import ConfigError, TrainConfig, check_config
from windowlm.training.config import LoggerConfig


def refusal(**logger: object) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        check_config(TrainConfig, {"run_dir": "run", "logger": logger})
    return refused.value


@pytest.mark.parametrize("project", ["", "a/b", "a\\b", "a#b", "a?b", "a%b", "a:b", "x" * 129])
def test_a_project_that_wandb_does_not_take_is_refused_by_its_key(project: str) -> None:
    error = refusal(project=project)
    assert str(error).startswith(f"logger.project={project}: ")
    assert (error.key, error.correction) == ("logger.project", "logger.project=windowlm")


@pytest.mark.parametrize(
    ("tags", "correction"),
    [([""], "logger.tags=null"), (["good", "x" * 65, ""], "logger.tags=[good]")],
)
def test_a_tag_that_wandb_does_not_take_is_refused(tags: list[str], correction: str) -> None:
    error = refusal(tags=tags)
    assert (error.key, error.correction) == ("logger.tags", correction)


def test_the_longest_project_and_tag_are_allowed() -> None:
    LoggerConfig(project="x" * 128, tags=["x", "x" * 64])
