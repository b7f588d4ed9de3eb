"""General compressors."""

import gzip
import lzma
import random

import pytest

from windowlm.data.compression import compressed_bits_per_byte


def test_the_sizes_are_those_of_the_whole_files() -> None:
    text = " ".join(random.Random(0).choices(["cat", "sat", "mat"], k=5000)).encode()
    bits = compressed_bits_per_byte([text[:100], text[100:]])
    # A gzip file from Python's module holds the same stream behind a header of the same ten bytes.
    assert bits["gzip"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    assert bits["xz"] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text))


def test_random_bytes_need_eight_bits() -> None:
    bits = compressed_bits_per_byte([random.Random(0).randbytes(100_000)])
    assert bits == {"gzip": pytest.approx(8, abs=0.02), "xz": pytest.approx(8, abs=0.02)}
