"""What threads of `banded` do with whole tensors."""

import pytest
import torch

from windowlm.attention.backends.banded_threads import MANY, holds_nan, zeros


@pytest.fixture(params=[1, 2, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [0, 1, 7, MANY - 1, MANY, MANY + 1])
def test_a_single_nan_is_found_wherever_it_is(size: int) -> None:
    tensor = torch.zeros(size)
    assert not holds_nan(tensor)
    for place in {0, size // 2, size - 1} if size else ():
        tensor[place] = torch.nan
        assert holds_nan(tensor)
        tensor[place] = 0.0


def test_infinities_of_one_sign_are_none() -> None:
    assert not holds_nan(torch.tensor([[1.0, torch.inf], [torch.inf, -1.0]]))


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 4), (MANY // 4, 5)])
def test_zeros_are_zeros(shape: tuple[int, ...]) -> None:
    assert torch.equal(zeros(shape, torch.float64), torch.zeros(shape, dtype=torch.float64))
