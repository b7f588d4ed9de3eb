import torch

from windowlm.deferred_numbers import DeferredNumbers


def test_numbers_are_those_of_the_moment_they_were_asked_for() -> None:
    count, norm = torch.tensor(2**53 - 1), torch.tensor(0.5)
    numbers = DeferredNumbers([count, norm])
    count.zero_()
    assert numbers.arrived
    assert numbers.read() == [2**53 - 1, 0.5]


def test_a_single_tensor_may_change_behind_it() -> None:
    total = torch.tensor([0.25, 3.0], dtype=torch.float64)
    numbers = DeferredNumbers([total])
    total.zero_()
    assert numbers.read() == [0.25, 3.0]
