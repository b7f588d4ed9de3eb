"""The benchmark: the peers at hand compute the function that they are timed for, and mistakes are said."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import run_script

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark_attention

    return benchmark_attention


def benchmark(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_script("scripts/benchmark_attention.py", "--threads", "1", *arguments, cwd=folder)


def test_ours_and_the_peers_at_hand_are_checked_timed_and_written(tmp_path: Path) -> None:
    entrants = ["windowlm", "chunked sdpa", "causal sdpa", "causal cudnn"]
    shapes = ["2,256,4,2,16,64", "1,256,4,4,16,128"]
    done = benchmark(
        tmp_path, "--shapes", *shapes, "--entrants", *entrants, "--rounds", "2", "--out", str(tmp_path),
        "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "attention.json").read_text())
    assert [shape["shape"] for shape in report["shapes"]] == shapes
    for shape in report["shapes"]:
        rows = {row["name"]: row for row in shape["rows"]}
        for name in ("windowlm:banded", "windowlm:reference", "chunked sdpa", "causal sdpa"):
            assert rows[name]["problem"] is None
            assert 0 < rows[name]["error_over_plain"] < 4
            assert 0 < rows[name]["least_total_ms"] <= rows[name]["total_ms"]
        assert rows[shape["auto"]]["total_ratio"] == 1
        assert rows["causal cudnn"]["absent"]
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_packed_documents_reach_the_peers_that_have_them(tmp_path: Path) -> None:
    done = benchmark(
        tmp_path, "--shapes", "2,256,2,1,16,64", "--documents", "40", "--entrants", "windowlm:banded",
        "chunked sdpa", "causal sdpa", "--rounds", "1", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "chunked sdpa: ready" in done.stdout
    assert "causal sdpa: unsupported: it has no documents" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shapes", "Z"], "--shapes Z: A, B"),
        (["--shapes", "1,64,3,2,8,4"], "--shapes 1,64,3,2,8,4"),
        (["--entrants", "magic"], "--entrants magic: windowlm"),
        (["--rounds", "0"], "--rounds 0"),
        (["--shapes", f"1,64,2,1,8,{2**31}"], f"--shapes 1,64,2,1,8,{2**31}: "),
        (["--shapes", "1,64,3,2,8,4"], "kv_heads a divisor of heads"),
        (["--device", "potato"], "--device: potato: cpu, cuda or cuda:NUMBER is allowed; try --device cpu"),
        (["--device", "meta"], "--device: meta: "),
        (["--device", "cuda:99"], "--device: cuda:99: torch "),
        (["--out", __file__], f"--out {__file__}: a folder that can be written is allowed"),
        *((["--round-ms", given], f"--round-ms {float(given)}: ") for given in ("nan", "inf", "-1")),
        *((["--seed", given], f"--seed {given}: a number from 0") for given in ("-1", str(10**30))),
        (["--threads", "100000000"], "--threads 100000000: a number from 1 to "),
    ],
)
def test_mistakes_end_with_status_2_and_no_traceback(
    arguments: list[str],
    complaint: str,
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_attention.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_shape_beyond_the_memory_ends_with_status_2(tmp_path: Path) -> None:
    done = benchmark(tmp_path, "--shapes", "9999,9999999,64,8,256,4", "--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --shapes 9999,9999999,64,8,256,4: its tensors do not fit in memory")


def prepared(module: Any, spoil: Callable[[Tensor], Tensor], *, tokens: int = 600, window: int = 64) -> Any:
    """What the check says of an entrant that is right but for `spoil`."""
    problem = module.Problem("", 1, tokens, 2, 1, 16, window, torch.device("cpu"), torch.float32)
    right = module.ours("windowlm:banded", problem)
    module.PEERS["spoilt"] = lambda _: lambda *heads: spoil(right(*heads))
    try:
        return module.prepare("spoilt", problem, module.draw_inputs(problem))
    finally:
        del module.PEERS["spoilt"]


def test_an_entrant_that_is_right_passes_the_check(module: Any) -> None:
    entrant = prepared(module, lambda output: output.clone())
    assert entrant.problem is None
    assert 0 < entrant.error < 4


class SpoiltGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].index_fill(1, torch.tensor([200]), torch.nan)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda output: output * torch.nan,
        lambda output: output.index_fill(1, torch.tensor([200]), torch.nan),
        lambda output: output.index_fill(1, torch.tensor([200]), torch.inf),
        SpoiltGradient.apply,
    ],
)
def test_an_entrant_with_nan_or_infinity_anywhere_fails_the_check(
    module: Any, spoil: Callable[[Tensor], Tensor]
) -> None:
    entrant = prepared(module, spoil)
    assert (entrant.attend, entrant.error) == (None, None)
    assert entrant.problem == "wrong: its output or gradients hold NaN or infinity"


def test_an_entrant_that_is_wrong_in_the_middle_alone_fails_the_check(module: Any) -> None:
    scale = torch.ones(1, 600, 1, 1)
    scale[:, 290:310] = 1.5
    entrant = prepared(module, lambda output: output * scale)
    assert entrant.attend is None
    assert entrant.error > 4
    assert entrant.problem.startswith("wrong: it errs too much")


def test_where_plain_pytorch_is_exact_an_error_counts_against_rounding(module: Any) -> None:
    assert prepared(module, lambda output: output.clone(), window=1).problem is None
    entrant = prepared(module, lambda output: output * 1.001, window=1)
    assert entrant.problem.startswith("wrong: it errs too much")
    zero = torch.zeros(3)
    assert module.over_plain(zero, zero.double(), zero) == 0
    assert module.over_plain(zero * torch.nan, zero.double(), zero).isnan()
