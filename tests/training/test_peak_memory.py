import mmap
import sys

import pytest
import torch

from windowlm.training.peak_memory import peak_memory_bytes, reset_peak_memory

MEBIBYTE = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_the_peak_of_one_run_does_not_stay_for_the_next() -> None:
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    # Fresh from the system: what the allocator gives may be resident already.
    block = mmap.mmap(-1, 100 * MEBIBYTE)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    with_block = peak_memory_bytes(device)
    assert 90 * MEBIBYTE < with_block - before < 130 * MEBIBYTE
    block.close()
    assert abs(peak_memory_bytes(device) - with_block) < MEBIBYTE  # the kernel counts in batches of pages
    reset_peak_memory(device)
    assert peak_memory_bytes(device) < with_block - 80 * MEBIBYTE
