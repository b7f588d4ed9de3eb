"""Where a sequence is cut for the processes that share it; loads no torch."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

# The tiles of a GPU's products have so many rows, or a divisor of them.
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
            are whole grains, but for a rest.

    Raises:
        SequenceLengthError: parts that should be equal cannot be.
        ValueError: shares that give a part without tokens.
    """
    if shares is None and tokens % processes:
        raise SequenceLengthError(tokens, processes)
    if shares is None or (len(set(shares)) == 1 and tokens % processes == 0):
        lengths = [tokens // processes] * processes
    else:
        assert len(shares) == processes
        lengths = _lengths(tokens, [share / max(shares) for share in shares])
        if not all(lengths):
            raise ValueError(
                f"context_shares={told(shares)}: of {tokens} tokens a process would have none; numbers that "
                "differ less are allowed, or null"
            )
    ends = [0, *accumulate(lengths)]
    return [slice(start, end) for start, end in pairwise(ends)]


def told(shares: Sequence[float]) -> str:
    """The shares as a setting."""
    return f"[{','.join(f'{share:g}' for share in shares)}]"


def _lengths(tokens: int, shares: list[float]) -> list[int]:
    """By largest remainders, so that no part is longer by a grain than its share."""
    finest = max(int(FINEST * tokens / len(shares)), 1)
    grain = min(GRAIN, 1 << (finest.bit_length() - 1))
    grains, rest = divmod(tokens, grain)
    exact = [grains * share / sum(shares) for share in shares]
    whole = [int(each) for each in exact]
    by_remainder = sorted(range(len(shares)), key=lambda part: whole[part] - exact[part])
    for part in by_remainder[: grains - sum(whole)]:
        whole[part] += 1
    lengths = [each * grain for each in whole]
    lengths[-1] += rest
    return lengths
