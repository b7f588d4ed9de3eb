"""Rotary position embedding: queries and keys turned by angles that grow with the position.

Angles are computed in float64 and only their cosines and sines rounded to float32: float32 angles are off
by 1e-2 at position 1,048,576. Nothing is kept in buffers, so no cast, reload or meta device can spoil them.

Shapes: B batch, T tokens, H heads, D head dimension, R rotated dimensions, F = R / 2 frequencies.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import RotaryConfig


class Rotation(NamedTuple):
    """Cosine and sine of every angle, float32 [B or 1, T, F]."""

    cosine: Tensor
    sine: Tensor


def rotary_frequencies(rotated: int, config: RotaryConfig) -> list[float]:
    """Angle a token in radians of each of the `rotated / 2` pairs: base^(-2 f / rotated)."""
    return [config.base ** (-2 * pair / rotated) for pair in range(rotated // 2)]


class RotaryEmbedding(nn.Module):
    """Rotates dimension f together with dimension f + R / 2 (the pairing of LLaMA's and Mistral's weights).

    Args:
        dim: head dimension D.
        config: base and fraction; R is `fraction * dim`, and dimensions from R on pass unchanged.

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
        frequencies_F = torch.tensor(
            rotary_frequencies(self.rotated, self.config), dtype=torch.float64, device=positions_BT.device
        )
        angles_BTF = positions_BT.to(torch.float64)[..., None] * frequencies_F
        return Rotation(angles_BTF.cos().to(torch.float32), angles_BTF.sin().to(torch.float32))

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
