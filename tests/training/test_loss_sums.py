import math

import pytest
import torch

from tests.parallel.processes import run_in_processes
from windowlm.data.packing import UNSCORED
from windowlm.parallel.place import Place
from windowlm.parallel.processes import Processes
from windowlm.training.loss_sums import LossNumbers, LossSums


def test_nats_are_divided_once_and_marks_are_not_scored() -> None:
    token_bytes_V = torch.tensor([1, 4, 0])
    sums = LossSums()
    sums.add(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0, 1, UNSCORED]]), token_bytes_V)
    sums.add(torch.tensor([[9.0]]), torch.tensor([[2]]), token_bytes_V)
    assert sums.read().loss() == pytest.approx(12 / 3)
    assert sums.read().bits_per_byte() == pytest.approx(3 / 5 / math.log(2))


def test_many_small_losses_are_not_rounded_away() -> None:
    sums = LossSums()
    token_bytes_V = torch.tensor([1])
    sums.add(torch.full((1, 1), 2.0**24), torch.zeros(1, 1, dtype=torch.int64), token_bytes_V)
    for _ in range(100):
        sums.add(torch.full((1, 1), 0.5), torch.zeros(1, 1, dtype=torch.int64), token_bytes_V)
    assert sums.read().loss() * 101 == 2**24 + 50


def test_nothing_summed_is_not_a_number() -> None:
    assert math.isnan(LossSums().read().loss())
    assert math.isnan(LossSums().read().bits_per_byte())


def test_sums_go_on_from_saved_ones_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    token_bytes_V = torch.tensor([1, 3, 0])
    batches = [
        (torch.rand(2, 5, generator=draw), torch.randint(-1, 3, (2, 5), generator=draw)) for _ in range(4)
    ]
    whole, first, second = LossSums(), LossSums(), LossSums()
    for nats_BT, targets_BT in batches:
        whole.add(nats_BT, targets_BT.where(targets_BT >= 0, UNSCORED), token_bytes_V)
    for sums, part in ((first, batches[:3]), (second, batches[3:])):
        if sums is second:
            second.load_state_dict(first.state_dict())
        for nats_BT, targets_BT in part:
            sums.add(nats_BT, targets_BT.where(targets_BT >= 0, UNSCORED), token_bytes_V)
    assert (second.read().loss(), second.read().bits_per_byte()) == (
        whole.read().loss(),
        whole.read().bits_per_byte(),
    )
    assert LossSums().state_dict() == {}


TOKEN_BYTES_V = torch.tensor([1, 3, 0])
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def totals(rank: int, batches: Batches) -> LossNumbers:
    """The sums of two processes, of which each has seen half of the rows."""
    sums = LossSums()
    for nats_BT, targets_BT in batches:
        half = len(nats_BT) // 2
        rows = slice(rank * half, (rank + 1) * half)
        sums.add(nats_BT[rows], targets_BT[rows], TOKEN_BYTES_V)
    return sums.total(Processes(Place(rank, 2, rank, 2))).read()


def test_sums_of_two_processes_are_those_of_one_bit_for_bit() -> None:
    # Float32 numbers of like size add up in float64 without rounding, so in any order.
    draw = torch.Generator().manual_seed(0)
    batches = [
        (8 * torch.rand(4, 97, generator=draw), torch.randint(0, 3, (4, 97), generator=draw))
        for _ in range(5)
    ]
    alone = LossSums()
    for nats_BT, targets_BT in batches:
        alone.add(nats_BT, targets_BT, TOKEN_BYTES_V)
    assert run_in_processes(2, totals, batches) == [alone.read()] * 2
    # Float32 sums would not be equal.
    assert sum(nats_BT.sum() for nats_BT, _ in batches).item() != alone.read().nats
