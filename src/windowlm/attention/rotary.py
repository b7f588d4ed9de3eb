"""Rotary position embedding: queries and keys turned by angles that grow with the position.

Angles are computed in float64 and only their cosines and sines rounded to float32: float32 angles are off
by 1e-2 at position 1,048,576. Nothing is kept in buffers, so no cast, reload or meta device can spoil them.

Shapes: B batch, T tokens, H heads, D head dimension, R rotated dimensions, F = R / 2 frequencies.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import LinearScaling, Llama3Scaling, NtkScaling, RotaryConfig, YarnScaling
from .operator import Operator
from .window import outside_inference_mode


class Rotation(NamedTuple):
    """Cosine and sine of every angle, float32 [B or 1, T, F]."""

    cosine: Tensor
    sine: Tensor


def rotary_frequencies(rotated: int, config: RotaryConfig) -> list[float]:
    """Angle a token in radians of each of the `rotated / 2` pairs: base^(-2 f / rotated), then scaled."""
    base, scaling = config.base, config.scaling
    if isinstance(scaling, NtkScaling):
        base *= scaling.factor ** (rotated / max(rotated - 2, 1))
    frequencies = [base ** (-2 * pair / rotated) for pair in range(rotated // 2)]
    if isinstance(scaling, LinearScaling):
        return [frequency / scaling.factor for frequency in frequencies]
    if isinstance(scaling, YarnScaling):
        kept = _yarn_kept(rotated, base, scaling)
    elif isinstance(scaling, Llama3Scaling):
        kept = [_llama3_kept(frequency, scaling) for frequency in frequencies]
    else:
        return frequencies
    return [
        share * frequency + (1 - share) * frequency / scaling.factor
        for share, frequency in zip(kept, frequencies, strict=True)
    ]


def rotary_magnitude(config: RotaryConfig) -> float:
    """Factor on cosines and sines, so on queries and keys: YaRN's attention factor, otherwise 1."""
    if not isinstance(config.scaling, YarnScaling):
        return 1.0
    given = config.scaling.attention_factor
    return 0.1 * math.log(config.scaling.factor) + 1 if given is None else given


def _yarn_kept(rotated: int, base: float, scaling: YarnScaling) -> list[float]:
    """How far each pair keeps its frequency: 1 up to the pair of `fast` turns, 0 from that of `slow`."""

    def pair_of(turns: float) -> float:
        return rotated * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(scaling.fast)), 0)
    high = min(math.ceil(pair_of(scaling.slow)), rotated - 1)
    width = high - low if high != low else 0.001
    return [1 - min(max((pair - low) / width, 0.0), 1.0) for pair in range(rotated // 2)]


def _llama3_kept(frequency: float, scaling: Llama3Scaling) -> float:
    turns = scaling.original_length * frequency / (2 * math.pi)
    return min(max((turns - scaling.slow) / (scaling.fast - scaling.slow), 0.0), 1.0)


class RotaryEmbedding(nn.Module):
    """Rotates dimension f together with dimension f + R / 2 (the pairing of LLaMA's and Mistral's weights).

    Args:
        dim: head dimension D.
        config: base, fraction and scaling; R is `fraction * dim`, and dimensions from R on pass unchanged.

    Raises:
        ValueError: where `fraction * dim` is not an even number from 2 on.
    """

    def __init__(self, dim: int, config: RotaryConfig | None = None) -> None:
        super().__init__()
        self.config = config or RotaryConfig()
        rotated = self.config.fraction * dim
        if rotated < 2 or rotated % 2:
            raise ValueError(
                f"fraction={self.config.fraction!r} of head dimension {dim} rotates {rotated:g} dimensions: "
                "an even number from 2 on is allowed; try fraction=1"
            )
        self.rotated = int(rotated)

    def extra_repr(self) -> str:
        """Say which rotation this is, for `print(model)`."""
        return f"rotated={self.rotated}, {self.config}"

    def rotation(self, positions_BT: Tensor) -> Rotation:
        """Cosines and sines for whole-number positions; share them over layers of the same config."""
        frequencies = rotary_frequencies(self.rotated, self.config)
        return Rotation(*_rotation.call(positions_BT, frequencies, rotary_magnitude(self.config)))

    def rotate(self, heads_BTHD: Tensor, rotation: Rotation) -> Tensor:
        """Rotate in at least float32, then return to the dtype of `heads_BTHD`."""
        cosine, sine = (table_BTF[:, :, None] for table_BTF in rotation)
        first, second = heads_BTHD[..., : self.rotated].chunk(2, dim=-1)
        turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
        turned = turned.to(heads_BTHD.dtype)
        if self.rotated == heads_BTHD.shape[-1]:
            return turned
        return torch.cat([turned, heads_BTHD[..., self.rotated :]], dim=-1)

    def forward(self, heads_BTHD: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Rotate queries or keys [B, T, H, D] by positions [B, T], default 0 .. T-1; same shape and dtype."""
        if positions_BT is None:
            positions_BT = torch.arange(heads_BTHD.shape[1], device=heads_BTHD.device)[None]
        return self.rotate(heads_BTHD, self.rotation(positions_BT))


def _cosine_and_sine(
    positions_BT: Tensor, frequencies: list[float], magnitude: float
) -> tuple[Tensor, Tensor]:
    frequencies_F = _on_device(tuple(frequencies), positions_BT.device)
    angles_BTF = positions_BT.to(torch.float64)[..., None] * frequencies_F
    cosine_BTF, sine_BTF = angles_BTF.cos(), angles_BTF.sin()
    return (magnitude * cosine_BTF).to(torch.float32), (magnitude * sine_BTF).to(torch.float32)


@lru_cache(maxsize=64)
def _on_device(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept, as a copy from the host to a GPU makes the host wait for all work before it."""
    return outside_inference_mode(lambda: torch.tensor(frequencies, dtype=torch.float64, device=device))


def _empty_cosine_and_sine(
    positions_BT: Tensor, frequencies: list[float], magnitude: float
) -> tuple[Tensor, Tensor]:
    cosine_BTF, sine_BTF = (
        positions_BT.new_empty((*positions_BT.shape, len(frequencies)), dtype=torch.float32) for _ in range(2)
    )
    return cosine_BTF, sine_BTF


# A compiler that looked inside would compute the angles anew, in float64, for every head that it rotates.
_rotation = Operator(
    f"{__name__}.rotation",
    "(Tensor positions, float[] frequencies, float magnitude) -> (Tensor, Tensor)",
    _cosine_and_sine,
    _empty_cosine_and_sine,
)
