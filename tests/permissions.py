"""Files that may not be read, also where root runs the tests."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

# Of <linux/capability.h>: root's rights to pass over the permissions of files.
VERSION_3 = 0x20080522
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2
PASSES_OVER = 1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@contextmanager
def locked(paths: Sequence[Path]) -> Iterator[None]:
    """Within it these files and folders may not be read, written or entered.

    Root gives up its rights over files in this thread and takes them back; where that cannot be, the test
    is skipped.
    """
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0)
    header, sets = _Header(VERSION_3, 0), (_Sets * 2)()
    library = ctypes.CDLL(None)
    limited = hasattr(library, "capset") and library.capget(ctypes.byref(header), sets) == 0
    before = sets[0].effective
    if limited:
        sets[0].effective = before & ~PASSES_OVER
        library.capset(ctypes.byref(header), sets)
    try:
        if any(os.access(path, os.R_OK, effective_ids=True) for path in paths):
            pytest.skip("this process may read every file and cannot give that up")
        yield
    finally:
        if limited:
            sets[0].effective = before
            library.capset(ctypes.byref(header), sets)
        for path, mode in modes.items():
            path.chmod(mode)
