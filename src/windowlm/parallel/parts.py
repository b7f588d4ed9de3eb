"""Where a sequence is cut for the processes that share it; loads no torch."""

from collections.abc import Sequence
from itertools import pairwise

# Products of a GPU take rows by so many: a part that ends elsewhere takes as long as a longer one.
GRAIN = 256
# A grain is no more than this share of an equal part.
FINEST = 1 / 128


class SequenceLengthError(ValueError):
    """A sequence that cannot be cut into equal parts.

    Args:
        tokens: its length.
        processes: how many parts there should be.
    """

    def __init__(self, tokens: int, processes: int) -> None:
        # What an exception is made of again, in a process that is told of it.
        super().__init__(tokens, processes)

    def __str__(self) -> str:
        tokens, processes = self.args
        good = max(tokens // processes, 1) * processes
        return (
            f"sequence_length={tokens}: the sequence is cut over {processes} processes, and a multiple of "
            f"{processes} is allowed; try sequence_length={good}"
        )


def parts_of(tokens: int, processes: int, shares: Sequence[float] | None = None) -> list[slice]:
    """The tokens of each process, in order.

    Args:
        tokens: of the sequence.
        processes: how many share it.
        shares: how the lengths relate, one number above 0 for each process; None for equal parts. Lengths
            are rounded to whole grains.

    Raises:
        SequenceLengthError: parts that should be equal cannot be.
        ValueError: another number of shares, or one that gives a part without tokens.
    """
    if shares is None:
        if tokens % processes:
            raise SequenceLengthError(tokens, processes)
        length = tokens // processes
        return [slice(part * length, (part + 1) * length) for part in range(processes)]
    if len(shares) != processes:
        raise ValueError(
            f"context_shares={list(shares)}: {processes} processes share each sequence, and as many numbers "
            "are allowed, or null"
        )
    finest = max(int(FINEST * tokens / processes), 1)
    grain = min(GRAIN, 1 << (finest.bit_length() - 1))
    before = [sum(shares[:part]) / sum(shares) for part in range(processes)]
    ends = [*(round(tokens * share / grain) * grain for share in before), tokens]
    parts = [slice(start, end) for start, end in pairwise(ends)]
    if any(part.stop <= part.start for part in parts):
        raise ValueError(
            f"context_shares={list(shares)}: of {tokens} tokens a process would have none; numbers that "
            "differ less are allowed, or null"
        )
    return parts
