"""Which context lengths are measured, and the documents that are long enough for them."""

import numpy as np
import numpy.typing as npt

from windowlm.errors import UserError

DEFAULT_COUNT = 6


def resolve_context_lengths(
    requested: list[int] | None, training_length: int, text_lengths: npt.NDArray[np.int64]
) -> list[int]:
    """Context lengths to measure, increasing.

    The default ends at the largest power of two c such that windows of 2c tokens fit the training length
    and documents longer than c hold at least half of the tokens; it then halves down to c / 32.

    Args:
        requested: the setting, already sorted and positive; None for the default.
        training_length: tokens of a training sequence.
        text_lengths: tokens of each document, without the end mark.

    Raises:
        UserError: no document is longer than the longest context.
    """
    longest_document = int(text_lengths.max(initial=0))
    if requested is None:
        longest = 1 << max(0, (training_length // 2).bit_length() - 1)
        half = text_lengths.sum() / 2
        while longest > 1 and text_lengths[text_lengths > longest].sum() < half:
            longest //= 2
        lengths = [longest >> shift for shift in reversed(range(DEFAULT_COUNT)) if longest >> shift]
    else:
        lengths = requested
    if longest_document <= lengths[-1]:
        listed = ",".join(map(str, lengths))
        fitting = [length for length in lengths if length < longest_document] or [
            max(1, longest_document // 4)
        ]
        raise UserError(
            f"evaluation.context_lengths=[{listed}]: the longest of {len(text_lengths)} documents has "
            f"{longest_document} tokens, and a target needs the longest context, {lengths[-1]} tokens, "
            f"before it; try evaluation.context_lengths=[{','.join(map(str, fitting))}]"
        )
    return lengths
