"""The largest memory that a run has held, counted anew for each run of a process.

On a GPU it is what tensors held of the device's memory (the allocator's own reserve is left out). On a CPU it
is the resident memory of the process, so its libraries, the pages of the token store that were read and the
tensors; the workers that load data are left out.
"""

import resource
import sys
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def reset_peak_memory(device: torch.device) -> None:
    """Count from here on.

    Outside Linux the system keeps one peak for the life of a process, so there the peak of an earlier run of
    a sweep stays.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (PROCESS / "clear_refs").exists():
        try:
            (PROCESS / "clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        except OSError:  # a container may not allow it
            return


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory since the reset, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (PROCESS / "status").exists():
        for line in (PROCESS / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
