import pytest
from hypothesis import given
from hypothesis import strategies as st

from windowlm.training.config import OptimizerConfig, TrainerConfig
from windowlm.training.schedule import (
    Budget,
    FurtherTargets,
    Spent,
    WindowWarmup,
    learning_rate_factor,
    muon_momentum,
)

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


def test_windows_double_in_equal_shares_until_the_largest_is_whole() -> None:
    warmup = WindowWarmup.of(TrainerConfig(window_warmup=128, window_warmup_fraction=0.6), [512, None, 1024])
    assert warmup.limits == (128, 256, 512, None)
    assert [warmup.limits[warmup.stage(progress)] for progress in (0, 0.19, 0.21, 0.39, 0.41, 0.59)] == [
        *[128, 128],
        *[256, 256],
        *[512, 512],
    ]
    assert [warmup.limits[warmup.stage(progress)] for progress in (0.6, 1.0, 2.0)] == [None] * 3


@pytest.mark.parametrize(
    "trainer", [TrainerConfig(), TrainerConfig(window_warmup=4, window_warmup_fraction=0.0)]
)
def test_without_a_warm_up_windows_are_whole_from_the_start(trainer: TrainerConfig) -> None:
    warmup = WindowWarmup.of(trainer, [16, None])
    assert warmup.limits[warmup.stage(0.0)] is None


def test_further_targets_lose_their_weight_one_after_the_other_the_farthest_first() -> None:
    further = FurtherTargets(count=2, fraction=0.6)
    weights = [further.weights(progress) for progress in (0.0, 0.15, 0.3, 0.45, 0.6, 1.0)]
    assert weights == [pytest.approx(wanted) for wanted in ([0.5, 0.25], [0.5, 0.125], [0.5], [0.25], [], [])]
    assert FurtherTargets(count=3, fraction=1.0).weights(0.0) == [0.5, 0.25, 0.125]
    assert FurtherTargets(count=0, fraction=1.0).weights(0.0) == []
    assert FurtherTargets(count=2, fraction=0.0).weights(0.0) == []


def test_muons_momentum_rises_to_its_value() -> None:
    settings = OptimizerConfig(muon_momentum=0.95, muon_momentum_warmup=0.2)
    assert [muon_momentum(settings, progress) for progress in (0.0, 0.1, 0.2, 1.0)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )
    assert muon_momentum(OptimizerConfig(), 0.0) == 0.95
    assert muon_momentum(OptimizerConfig(muon_momentum=0.5, muon_momentum_warmup=0.2), 0.1) == 0.5
