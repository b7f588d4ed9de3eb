import pytest
from hypothesis import given
from hypothesis import strategies as st

from windowlm.training.config import OptimizerConfig, TrainerConfig
from windowlm.training.schedule import Budget, Spent, learning_rate_factor

SCHEDULES = ["cosine", "warmup_stable_decay", "constant"]


def config(schedule: str, **changes: float) -> OptimizerConfig:
    settings = {"warmup_fraction": 0.1, "decay_fraction": 0.4, "final_lr_fraction": 0.2, **changes}
    return OptimizerConfig(schedule=schedule, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    assert learning_rate_factor(config(schedule), 0.0) == 0.0
    assert learning_rate_factor(config(schedule), 0.05) == pytest.approx(0.5)
    assert learning_rate_factor(config(schedule), 0.1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("schedule", "last"), [("cosine", 0.2), ("warmup_stable_decay", 0.2), ("constant", 1.0)]
)
def test_the_last_rate_is_the_stated_share(schedule: str, last: float) -> None:
    assert learning_rate_factor(config(schedule), 1.0) == pytest.approx(last)
    assert learning_rate_factor(config(schedule), 1.5) == pytest.approx(last)


def test_the_plateau_lasts_until_the_decay_and_the_fall_is_linear() -> None:
    settings = config("warmup_stable_decay")
    assert learning_rate_factor(settings, 0.6) == 1.0
    assert learning_rate_factor(settings, 0.8) == pytest.approx(0.6)


def test_half_a_cosine_is_in_the_middle_half_way() -> None:
    assert learning_rate_factor(config("cosine"), 0.55) == pytest.approx(0.6)


@given(st.sampled_from(SCHEDULES), st.floats(0, 1), st.floats(0, 1))
def test_after_the_warm_up_the_rate_never_rises(schedule: str, one: float, other: float) -> None:
    first, second = sorted((0.1 + 0.9 * one, 0.1 + 0.9 * other))
    settings = config(schedule)
    assert learning_rate_factor(settings, first) >= learning_rate_factor(settings, second) - 1e-12


def test_a_schedule_without_warm_up_starts_at_the_peak() -> None:
    assert learning_rate_factor(config("cosine", warmup_fraction=0.0), 0.0) == 1.0


def test_the_budget_that_is_given_is_the_one_that_counts() -> None:
    spent = Spent(steps=5, tokens=300, seconds=20.0)
    assert Budget.of(TrainerConfig(max_steps=10)).progress(spent) == 0.5
    assert Budget.of(TrainerConfig(max_tokens=600)).progress(spent) == 0.5
    assert Budget.of(TrainerConfig(max_seconds=40)).progress(spent) == 0.5
    assert Budget.of(TrainerConfig()).seconds == 180
