"""The same bits each time: torch's deterministic algorithms, and compilation that does not measure."""

import os

import torch
import torch._inductor.config as compiler

# A workspace that does not grow: cuBLAS may otherwise choose another algorithm in another process.
# https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def set_determinism(wanted: bool) -> None:
    """Ask torch for algorithms that give the same bits each time, or no longer.

    An operation that has none raises. The compiler takes its choices by rule, where it would measure which of
    several kernels is fastest, and sum in another order when the device was busy. cuBLAS reads its variable
    with the first product of a process.
    """
    if wanted:
        os.environ.setdefault(*WORKSPACE)
    torch.use_deterministic_algorithms(wanted)
    compiler.deterministic = wanted
