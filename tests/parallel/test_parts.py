"""Where sequences are cut."""

import pytest

from windowlm.parallel.config import ParallelConfig
from windowlm.parallel.parts import SequenceLengthError, parts_of


def lengths(*arguments: object) -> list[int]:
    return [part.stop - part.start for part in parts_of(*arguments)]  # type: ignore[arg-type]


def test_parts_follow_each_other_and_hold_all_tokens() -> None:
    for tokens, processes, shares in (
        (12, 3, None),
        (3003, 3, None),
        (10, 3, (1.0, 1.0, 2.0)),
        (131_072, 2, (1.008, 1.0)),
        (100_003, 4, (1.0, 2.0, 3.0, 4.0)),
    ):
        parts = parts_of(tokens, processes, shares)
        assert [parts[0].start, *(part.stop for part in parts)] == [*(part.start for part in parts), tokens]
        assert len(parts) == processes


def test_shares_are_rounded_to_what_a_gpu_computes_at_once() -> None:
    assert lengths(131_072, 2, (1.008, 1.0)) == [65_792, 65_280]
    assert lengths(8192, 2, (1.1, 1.0)) == [4288, 3904]
    assert lengths(10, 3, (1.0, 1.0, 2.0)) == [3, 2, 5]
    assert lengths(131_072, 8, (1.02,) * 4 + (1.0,) * 4) == [16_512] * 4 + [16_256] * 4
    # Equal ones are not.
    assert lengths(3003, 3, None) == [1001] * 3


def test_equal_shares_are_equal_parts() -> None:
    for tokens, processes in ((64, 4), (131_072, 8), (1024, 2), (100_000, 4), (3003, 3)):
        for share in (2.0, 1e308):
            assert parts_of(tokens, processes, (share,) * processes) == parts_of(tokens, processes)
    assert lengths(3001, 3, (1e308,) * 3) == [1000, 1000, 1001]


def test_parts_that_cannot_be_are_refused() -> None:
    with pytest.raises(SequenceLengthError, match="a multiple of 3 is allowed"):
        parts_of(10, 3)
    with pytest.raises(ValueError, match=r"context_shares=\[1,100\]: of 10 tokens a process would have none"):
        parts_of(10, 2, (1.0, 100.0))


@pytest.mark.parametrize("shares", [(), (0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_shares_are_numbers_above_0(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be numbers above 0, or null for equal parts"):
        ParallelConfig(kind="context", context_shares=shares)


def test_shares_are_of_several_parts() -> None:
    with pytest.raises(ValueError, match=r"context_shares=\[1.1\]: one part is the whole sequence"):
        ParallelConfig(kind="context", context_shares=(1.1,))


def test_shares_are_of_sequences_that_are_cut() -> None:
    with pytest.raises(ValueError, match=r"context_shares=\[1,2\]: parallel=ddp cuts no sequences"):
        ParallelConfig(context_shares=(1.0, 2.0))


def test_shares_are_as_many_as_the_processes_that_share_a_sequence() -> None:
    assert ParallelConfig(kind="context", context_shares=(1.0, 2.0)).sharing == 2
    assert ParallelConfig(kind="context", context_shares=(1.0, 2.0), context_processes=2).sharing == 2
    assert ParallelConfig(kind="context").sharing is None
    with pytest.raises(ValueError, match=r"context_shares=\[1,2\]: context_processes=3 share"):
        ParallelConfig(kind="context", context_shares=(1.0, 2.0), context_processes=3)
