"""The rotation: its definition, its exactness far out, and that nothing can spoil it."""

import math

import pytest
import torch

from windowlm.attention.config import RotaryConfig
from windowlm.attention.rotary import RotaryEmbedding


def test_each_half_split_pair_turns_by_position_times_frequency() -> None:
    heads_BTHD = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    rotated = RotaryEmbedding(8)(heads_BTHD)
    for position in range(3):
        for pair in range(4):
            angle = position * 10_000.0 ** (-2 * pair / 8)
            x, y = heads_BTHD[0, position, 1, pair].item(), heads_BTHD[0, position, 1, pair + 4].item()
            assert rotated[0, position, 1, pair].item() == pytest.approx(
                x * math.cos(angle) - y * math.sin(angle), abs=1e-6
            )
            assert rotated[0, position, 1, pair + 4].item() == pytest.approx(
                y * math.cos(angle) + x * math.sin(angle), abs=1e-6
            )


def test_scores_depend_on_the_distance_alone() -> None:
    rotary = RotaryEmbedding(64)
    query, key = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        turned_query = rotary(query, torch.tensor([[query_position]]))
        turned_key = rotary(key, torch.tensor([[key_position]]))
        return (turned_query * turned_key).sum().item()

    assert score(1_000_007, 1_000_000) == pytest.approx(score(7, 0), abs=1e-5)


def test_angles_a_million_tokens_out_err_by_at_most_one_in_a_million() -> None:
    position = 1_048_576
    rotation = RotaryEmbedding(64).rotation(torch.tensor([[position]]))
    angles = [position * 10_000.0 ** (-2 * pair / 64) for pair in range(32)]
    cosine = torch.tensor([math.cos(angle) for angle in angles], dtype=torch.float64)
    sine = torch.tensor([math.sin(angle) for angle in angles], dtype=torch.float64)
    assert (rotation.cosine[0, 0].double() - cosine).abs().max() <= 1e-6
    assert (rotation.sine[0, 0].double() - sine).abs().max() <= 1e-6


def test_casts_default_dtypes_and_the_meta_device_change_nothing() -> None:
    positions_BT = torch.tensor([[0, 1, 5_000]])
    expected = RotaryEmbedding(64).rotation(positions_BT)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            rotary = RotaryEmbedding(64)
        rotation = rotary.to_empty(device="cpu").to(torch.bfloat16).rotation(positions_BT)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rotation.cosine.dtype == torch.float32
    assert torch.equal(rotation.cosine, expected.cosine)
    assert torch.equal(rotation.sine, expected.sine)
    assert not rotary.state_dict()


def test_low_precision_is_rotated_in_float32_and_cast_afterwards() -> None:
    heads_BTHD = torch.randn(1, 100, 2, 64).bfloat16()
    rotary = RotaryEmbedding(64)
    assert torch.equal(rotary(heads_BTHD), rotary(heads_BTHD.float()).bfloat16())


def test_a_fraction_leaves_the_remaining_dimensions_alone() -> None:
    heads_BTHD = torch.randn(1, 5, 2, 16)
    rotated = RotaryEmbedding(16, RotaryConfig(fraction=0.25))(heads_BTHD)
    assert torch.equal(rotated[..., 4:], heads_BTHD[..., 4:])
    assert torch.equal(rotated[..., :4], RotaryEmbedding(4)(heads_BTHD[..., :4]))


@pytest.mark.parametrize(("dim", "fraction"), [(7, 1.0), (8, 0.1), (8, 0.375)])
def test_an_odd_or_empty_rotation_is_refused(dim: int, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"an even number from 2 on is allowed"):
        RotaryEmbedding(dim, RotaryConfig(fraction=fraction))
