"""Short causal convolution over the sequence, of each channel on its own, that stays inside documents.

Shapes: B batch, T tokens, E earlier tokens, H heads, D head dimension, C taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .computed_again import computed_again


def check_taps(taps: object) -> None:
    """Raise ValueError unless it is None or a whole number from 2 on."""
    if taps is not None and (isinstance(taps, bool) or not isinstance(taps, int) or taps < 2):
        raise ValueError(
            f"short_convolution={taps!r}: a whole number from 2 on (tokens read, the own one included) or "
            "null for none is allowed; try short_convolution=4"
        )


class ShortConvolution(nn.Module):
    """Depthwise convolution over queries, keys or values (Primer, So et al. 2021, arXiv:2109.08668).

    A channel becomes the sum of its last `taps` tokens, each times a weight of that channel; the tokens
    before a document's first count zero. It starts as the identity. Written as shifted products, which a
    compiler fuses with what stands around them.

    Args:
        heads: H.
        dim_head: D.
        taps: tokens read, the own one included.
    """

    def __init__(self, heads: int, dim_head: int, taps: int) -> None:
        super().__init__()
        self.weight_CHD = nn.Parameter(torch.empty(taps, heads, dim_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1 for the token itself, 0 for those before it."""
        nn.init.zeros_(self.weight_CHD)
        nn.init.ones_(self.weight_CHD[0])

    def extra_repr(self) -> str:
        """Say how far back it reads, for `print(model)`."""
        return f"taps={self.taps}"

    @property
    def taps(self) -> int:
        """Tokens read, the own one included."""
        return self.weight_CHD.shape[0]

    def forward(self, channels_BTHD: Tensor, behind_BT: Tensor, earlier_BEHD: Tensor | None = None) -> Tensor:
        """Convolve each document on its own.

        Args:
            channels_BTHD: queries, keys or values.
            behind_BT: how many tokens directly before each are of its document, [B or 1, T].
            earlier_BEHD: of the tokens before the first, where these are the end of a longer text.

        Returns:
            [B, T, H, D] in the dtype of `channels_BTHD`.
        """
        # Each shifted copy would be kept for the gradient of its weight.
        return computed_again(_convolved, channels_BTHD, self.weight_CHD, behind_BT, earlier_BEHD)


def _convolved(
    channels_BTHD: Tensor, weight_CHD: Tensor, behind_BT: Tensor, earlier_BEHD: Tensor | None
) -> Tensor:
    tokens, earlier = channels_BTHD.shape[1], 0
    longer_BSHD = channels_BTHD
    if earlier_BEHD is not None:
        earlier = earlier_BEHD.shape[1]
        longer_BSHD = torch.cat([earlier_BEHD, channels_BTHD], 1)
    # Under autocast the channels are narrower than the weights.
    own_HD, *earlier_HD = weight_CHD.to(channels_BTHD.dtype)
    mixed_BTHD: Tensor = channels_BTHD * own_HD
    for distance, weight_HD in enumerate(earlier_HD, 1):
        shifted_BTHD = F.pad(longer_BSHD, (0, 0, 0, 0, distance, 0))[:, earlier : earlier + tokens]
        there_BT11 = (behind_BT >= distance)[..., None, None]
        mixed_BTHD = mixed_BTHD + torch.where(there_BT11, shifted_BTHD * weight_HD, 0.0)
    return mixed_BTHD
