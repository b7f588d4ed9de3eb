import random

import pytest

from windowlm.training.loss_spikes import FEWEST, LossSpikes


def heights(losses: list[float]) -> list[float | None]:
    spikes = LossSpikes()
    return [spikes.height(loss) for loss in losses]


def test_a_jump_is_a_spike_and_its_height_is_over_the_median() -> None:
    found = heights([4.0, 3.9, 3.8, 3.9, 3.7, 3.8, 3.6, 3.7, 6.0, 3.6])
    assert found[:8] == [None] * 8
    assert found[8] == pytest.approx(6.0 - 3.8)
    assert found[9] is None


def test_noise_and_a_falling_loss_are_none() -> None:
    draw = random.Random(0)
    falling = [10 * 0.97**step + draw.gauss(0, 0.3) for step in range(300)]
    assert heights(falling) == [None] * 300
    assert heights([2.0] * 20 + [2.01]) == [None] * 21


def test_a_few_losses_tell_nothing() -> None:
    assert heights([1.0] * (FEWEST - 1) + [100.0]) == [None] * FEWEST


def test_what_is_remembered_survives_a_resume() -> None:
    draw = random.Random(1)
    losses = [3 + draw.random() for _ in range(60)] + [9.0, 4.0]
    whole, before = LossSpikes(), LossSpikes()
    expected = [whole.height(loss) for loss in losses]
    found = [before.height(loss) for loss in losses[:45]]
    after = LossSpikes()
    after.restore(before.state())
    assert found + [after.height(loss) for loss in losses[45:]] == expected
    assert expected[-2] is not None
