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

from .config import (
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    RotaryConfig,
    YarnScaling,
    nearest_fraction,
    rotated_dimensions,
)
from .dense_tensor import check_dense
from .operator import Operator
from .window import outside_inference_mode

HEAD_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Rotation(NamedTuple):
    """Cosine and sine of every angle, float32 [B or 1, T, F]."""

    cosine: Tensor
    sine: Tensor


def rotary_frequencies(rotated: int, config: RotaryConfig) -> list[float]:
    """Angle a token in radians of each of the `rotated / 2` pairs: base^(-2 f / rotated), then scaled."""
    base, scaling = config.base, config.scaling
    frequencies = [base ** (-2 * pair / rotated) for pair in range(rotated // 2)]
    if isinstance(scaling, LinearScaling):
        return [frequency / scaling.factor for frequency in frequencies]
    if isinstance(scaling, NtkScaling):
        # What the larger base comes to, without a base that may overflow.
        slowing = [scaling.factor ** (-2 * pair / max(rotated - 2, 1)) for pair in range(rotated // 2)]
        return [frequency * slowed for frequency, slowed in zip(frequencies, slowing, strict=True)]
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
    scaling = config.scaling
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale is None or scaling.mscale_all_dim is None:
        return _grown(1.0, scaling.factor)
    return _grown(scaling.mscale, scaling.factor) / _grown(scaling.mscale_all_dim, scaling.factor)


def _grown(mscale: float, factor: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1


def _yarn_kept(rotated: int, base: float, scaling: YarnScaling) -> list[float]:
    """How far each pair keeps its frequency: 1 up to the pair of `fast` turns, 0 from that of `slow`."""

    def pair_of(turns: float) -> float:
        return rotated * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(scaling.fast), pair_of(scaling.slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
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
        ValueError: for a head dimension that is no whole number from 2 on, or where `fraction * dim` is not
            an even number from 2 on.
    """

    def __init__(self, dim: int, config: RotaryConfig | None = None) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 2:
            raise ValueError(f"dim={dim!r}: a head dimension from 2 on is allowed; try dim=64")
        if not isinstance(config, RotaryConfig | None):
            raise ValueError(
                f"config={config!r}: a RotaryConfig or None is allowed; try config=RotaryConfig(base=10000)"
            )
        self.dim, self.config = dim, config or RotaryConfig()
        fraction = self.config.fraction
        rotated = rotated_dimensions(dim, fraction)
        if rotated is None:
            what = f"head dimension {dim}"
            if fraction < 1:
                what = f"fraction={fraction!r} of {what} rotates {fraction * dim:g} dimensions"
            raise ValueError(
                f"{what}: an even number from 2 on is allowed, as pairs are rotated; take another head "
                f"dimension, or try fraction={nearest_fraction(dim, fraction)!r}"
            )
        self.rotated = rotated

    def extra_repr(self) -> str:
        """Say which rotation this is, for `print(model)`."""
        return f"rotated={self.rotated}, {self.config}"

    def rotation(self, positions_BT: Tensor) -> Rotation:
        """Cosines and sines of positions [B or 1, T]; share them over layers of the same config.

        Raises:
            ValueError: for positions of another rank, or that are not whole numbers (int32 or int64): in
                bfloat16 token 257 would stand at 256.
        """
        _check_positions(positions_BT)
        frequencies = rotary_frequencies(self.rotated, self.config)
        return Rotation(*_rotation.call(positions_BT, frequencies, rotary_magnitude(self.config)))

    def rotate(self, heads_BTHD: Tensor, rotation: Rotation) -> Tensor:
        """Rotate in at least float32, then return to the dtype of `heads_BTHD`.

        Raises:
            ValueError: for heads of another rank, head dimension or dtype, and a rotation of another kind,
                dtype or number of frequencies, tokens or rows, or on another device.
        """
        self._check_heads(heads_BTHD)
        self._check_rotation(heads_BTHD, rotation)
        cosine, sine = (table_BTF[:, :, None] for table_BTF in rotation)
        first, second = heads_BTHD[..., : self.rotated].chunk(2, dim=-1)
        turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
        turned = turned.to(heads_BTHD.dtype)
        if self.rotated == heads_BTHD.shape[-1]:
            return turned
        return torch.cat([turned, heads_BTHD[..., self.rotated :]], dim=-1)

    def forward(self, heads_BTHD: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Rotate queries or keys [B, T, H, D] by positions [B or 1, T], default 0 .. T-1.

        Returns:
            The same shape and dtype.

        Raises:
            ValueError: where shapes, dtypes or devices do not fit.
        """
        self._check_heads(heads_BTHD)
        if positions_BT is None:
            positions_BT = torch.arange(heads_BTHD.shape[1], device=heads_BTHD.device)[None]
        _check_positions(positions_BT)
        batch, tokens = heads_BTHD.shape[:2]
        if positions_BT.shape[1] != tokens or positions_BT.shape[0] not in (1, batch):
            raise ValueError(
                f"positions_BT has shape {tuple(positions_BT.shape)}: {(batch, tokens)} or {(1, tokens)} is "
                f"allowed beside heads_BTHD of shape {tuple(heads_BTHD.shape)}"
            )
        return self.rotate(heads_BTHD, self.rotation(positions_BT))

    def _check_heads(self, heads_BTHD: Tensor) -> None:
        check_dense("heads_BTHD", heads_BTHD)
        if heads_BTHD.dim() != 4 or heads_BTHD.shape[3] != self.dim or heads_BTHD.dtype not in HEAD_DTYPES:
            raise ValueError(
                f"heads_BTHD has shape {tuple(heads_BTHD.shape)} and dtype {heads_BTHD.dtype}: "
                f"[batch, tokens, heads, {self.dim}] and {', '.join(map(str, HEAD_DTYPES))} are allowed"
            )

    def _check_rotation(self, heads_BTHD: Tensor, rotation: Rotation) -> None:
        if not isinstance(rotation, Rotation):
            raise ValueError(f"rotation is a {type(rotation).__name__}: what rotation() returns is allowed")
        batch, sizes = heads_BTHD.shape[0], [heads_BTHD.shape[1], self.rotated // 2]
        for name, table_BTF in zip(("cosine", "sine"), rotation, strict=True):
            check_dense(f"rotation.{name}", table_BTF)
            fits = table_BTF.dim() == 3 and table_BTF.dtype == torch.float32
            if not fits or table_BTF.shape[0] not in (1, batch) or list(table_BTF.shape[1:]) != sizes:
                raise ValueError(
                    f"rotation.{name} has shape {tuple(table_BTF.shape)} and dtype {table_BTF.dtype}: "
                    f"{(batch, *sizes)} or {(1, *sizes)} and float32 are allowed "
                    f"beside heads_BTHD of shape {tuple(heads_BTHD.shape)}"
                )
            if table_BTF.device != heads_BTHD.device:
                raise ValueError(
                    f"rotation.{name} is on {table_BTF.device}, heads_BTHD on {heads_BTHD.device}: "
                    "give positions on the device of the heads"
                )


def _check_positions(positions_BT: Tensor) -> None:
    check_dense("positions_BT", positions_BT)
    if positions_BT.dim() != 2 or positions_BT.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions_BT has shape {tuple(positions_BT.shape)} and dtype {positions_BT.dtype}: "
            "[batch or 1, tokens] and whole numbers (int32 or int64) are allowed"
        )


def _cosine_and_sine(
    positions_BT: Tensor, frequencies: list[float], magnitude: float
) -> tuple[Tensor, Tensor]:
    # Tables made while a model is evaluated may be shared with its training, which inference tensors refuse.
    with torch.inference_mode(False):
        angles_BTF = positions_BT[..., None] * _on_device(tuple(frequencies), positions_BT.device)
        table = _empty_cosine_and_sine(positions_BT, frequencies, magnitude)
        for function, table_BTF in zip((torch.cos, torch.sin), table, strict=True):
            # Computed in float64 and rounded by the same kernel: a token read alone waits for each kernel.
            if magnitude == 1:
                function(angles_BTF, out=table_BTF)
            else:
                torch.mul(function(angles_BTF), magnitude, out=table_BTF)
        return table


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
