import pytest
import torch

from windowlm.training.weight_average import WeightAverage


def averaged(share: float, steps: list[float]) -> tuple[WeightAverage, torch.Tensor]:
    average, weight = WeightAverage(share), torch.zeros(2)
    for step, value in enumerate(steps, start=1):
        weight.fill_(value)
        average.update([weight], step)
    return average, weight


def test_a_share_of_one_is_the_mean_of_all_steps() -> None:
    average, weight = averaged(1.0, [1.0, 4.0, 7.0])
    with average.in_place_of([weight]):
        assert weight.tolist() == pytest.approx([4.0, 4.0])
    assert weight.tolist() == [7.0, 7.0]


def test_a_small_share_follows_the_last_steps_whatever_the_length_of_the_run() -> None:
    for steps in (100, 1000):
        average, weight = averaged(0.1, [step / steps for step in range(1, steps + 1)])
        with average.in_place_of([weight]):
            assert weight[0].item() == pytest.approx(1 - 0.1 / 1.1, abs=0.02)


def test_before_the_first_step_the_weights_are_their_own_average() -> None:
    weight = torch.ones(2)
    with WeightAverage(0.5).in_place_of([weight]):
        assert weight.tolist() == [1.0, 1.0]


def test_narrow_weights_are_averaged_in_float32_and_come_back_as_they_were() -> None:
    average = WeightAverage(1.0)
    weight = torch.full((2,), 1.0, dtype=torch.bfloat16)
    average.update([weight], 1)
    average.update([torch.full((2,), 1 + 2**-6)], 2)
    assert average.state_dict()[0].dtype is torch.float32
    assert average.state_dict()[0].tolist() == [1 + 2**-7] * 2
    with average.in_place_of([weight]):
        assert weight.dtype is torch.bfloat16
    assert weight.tolist() == [1.0, 1.0]
