"""Loss by position in one long window, from windows that do not overlap.

The curve that is usually shown. Each position holds other text, so that a step in it may be the text's;
the honest curve scores the same text at every context. Windows of C tokens tile each document's targets,
so that a position sees 1 to C tokens.

Shape letters: N targets.
"""

import math
from typing import TypedDict

import numpy as np

from windowlm.evaluation.target_losses import TargetLosses


class PositionRow(TypedDict):
    """Targets that see ``first`` to ``last`` tokens, their own place in the window included."""

    first: int
    last: int
    targets: int
    bytes: int
    nats: float
    bits_per_byte: float | None


def position_curve(losses: TargetLosses) -> list[PositionRow]:
    """Bits per byte of the targets in bins of powers of two of their position in windows of the longest c.

    Positions without a target, and targets without a byte, give no row and no bits per byte.
    """
    longest = max(losses.naive_nats)
    seen_N = losses.offsets % longest + 1
    bins_N = np.frexp(seen_N)[1] - 1
    rows: list[PositionRow] = []
    for power in range(int(longest).bit_length()):
        inside_N = bins_N == power
        if not inside_N.any():
            continue
        nats = math.fsum(losses.naive_nats[longest][inside_N])
        byte_count = int(losses.byte_count[inside_N].sum())
        rows.append(
            {
                "first": 1 << power,
                "last": min((2 << power) - 1, longest),
                "targets": int(inside_N.sum()),
                "bytes": byte_count,
                "nats": nats,
                "bits_per_byte": nats / math.log(2) / byte_count if byte_count else None,
            }
        )
    return rows
