"""Backends under the exchange, on two GPUs; on CPUs `test_halo` has more cases."""

import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import PROJECT
from tests.parallel.backends import ROOM

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_backends_compute_of_parts_what_they_compute_of_the_whole() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.parallel.backends"], cwd=PROJECT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["device"] == "cuda"
    for found in report["processes"]:
        for case, of_backends in found.items():
            computed = {name: errors for name, errors in of_backends.items() if not isinstance(errors, str)}
            for name, (ours, plain) in computed.items():
                assert ours <= ROOM * plain + 1e-12, (case, name, ours, plain)
            wanted = {"auto"} if case == "compiled model" else {"reference", "banded", "flex"}
            if case not in ("compiled model", "sinks"):
                wanted |= {"band", "varlen"}
            assert wanted <= computed.keys(), of_backends
