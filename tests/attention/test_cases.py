"""Five hundred drawn calls of every backend, and that the comparison notices what it should."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from windowlm.attention.backends import banded, banded_blocks, banded_matmul
from windowlm.attention.dispatch import MODULES, capabilities
from windowlm.errors import UserError

from .cases import CHECKS, DYNAMO, FUNCTORCH, KINDS, SHAPES, draw, main, mismatches, supported

CASES, AT_ONCE = 500, 50


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads until the test ends."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
@pytest.mark.parametrize("backend", [name for name in MODULES if name != "reference"])
def test_a_backend_equals_the_reference_on_all_cases_it_claims(
    backend: str, first: int, use_threads: Callable[[int], None]
) -> None:
    declared = capabilities(backend)
    device = "cpu" if declared.runs_on("cpu") else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{backend} needs CUDA")
    if declared.missing is not None:
        pytest.skip(f"{backend}: {declared.missing}")
    shapes = () if device == "cpu" else SHAPES
    cases = [draw(seed, shapes=shapes) for seed in range(first, first + AT_ONCE)]
    claimed = [case for case in cases if supported(case, backend, device)]
    assert claimed
    # One thread is fast for small calls, and shares nothing.
    use_threads(2 if first < 2 * AT_ONCE else 1)
    with torch._dynamo.config.patch(DYNAMO), torch._functorch.config.patch(FUNCTORCH):
        for case in claimed:
            assert not mismatches(case, backend, device), case


@pytest.mark.parametrize("seed", range(8))
def test_wide_windows_of_many_tokens_equal_the_reference(
    seed: int, use_threads: Callable[[int], None]
) -> None:
    use_threads(1 + seed % 3)
    assert not mismatches(draw(seed, wide=True), "banded")


def test_padding_among_the_sinks_stays_hidden() -> None:
    drawn = (draw(seed) for seed in range(20_000, 20_400))
    cases = [case for case in drawn if case.sinks > 1 and case.kind == "holes"]
    assert len(cases) > 9
    for case in cases:
        assert not mismatches(case, "banded"), case


def test_few_tokens_that_are_cut_as_many_are_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "FEW_TOKENS", 0)
    for seed in range(CASES):
        case = draw(seed)
        if case.causal and case.kind == "plain" and case.queries > 2 * (case.window or case.queries):
            assert not mismatches(case, "banded"), case


def test_the_slow_twin_of_banded_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "FEW_TOKENS", 0)
    monkeypatch.setattr(banded_matmul, "attend", banded_blocks.attend)
    for seed in range(CASES, CASES + AT_ONCE):
        case = draw(seed)
        assert not mismatches(case, "banded"), case


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (lambda output: output * 1.01, "error of output"),
        (lambda output: output + 1e-3, "of output that are not zero where nothing is seen"),
        (lambda output: output + 0 * output.sum() + output.roll(1, 1), "read wrongly"),
        (lambda output: output + output.mean(1, keepdim=True).detach(), "changed by what it cannot see"),
    ],
)
def test_the_comparison_notices_faults(
    fault: Callable[[torch.Tensor], torch.Tensor], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = banded.attend
    monkeypatch.setattr(
        banded, "attend", lambda *tensors, **options: fault(right(*tensors, **options)), raising=True
    )
    cases = [draw(seed) for seed in range(AT_ONCE)]
    padded = next(case for case in cases if case.documents and -1 in case.documents[0] and case.window)
    assert any(complaint in mismatch for mismatch in mismatches(padded, "banded"))


def test_an_error_that_is_too_large_on_average_is_no_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = banded.attend, []

    def coarse(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(1)
        output: torch.Tensor = right(*tensors, **options)
        return output + output.detach() * 2e-6

    monkeypatch.setattr(banded, "attend", coarse)
    case = next(case for case in map(draw, range(100)) if case.dtype == torch.float32 and case.queries > 60)
    assert any("error of output" in mismatch for mismatch in mismatches(case, "banded"))
    assert len(calls) > 8


@pytest.mark.parametrize(("errs", "draws"), [(3.0, 64), (30.0, 64), (0.1, 1)])
def test_what_eight_draws_leave_open_is_settled_by_more(
    errs: float, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def lucky(*_: object) -> torch.Tensor:
        """Plain PyTorch errs less than usual at first, and then the backend for once."""
        drawn.append(1)
        measured = torch.zeros(len(CHECKS), 2, dtype=torch.float64)
        measured[0] = torch.tensor([errs if len(drawn) == 1 else 3.0, 2.9 if len(drawn) <= 8 else 6.0])
        return measured

    monkeypatch.setattr("tests.attention.cases.measure", lucky)
    assert bool(mismatches(draw(0), "banded")) == (errs == 30)
    assert len(drawn) == draws


def test_cases_of_few_shapes_need_few_kernels() -> None:
    kernels = set()
    for seed in range(2000):
        case = draw(seed, shapes=SHAPES)
        sizes = case.batch, case.kv_heads, case.groups, case.head_dim, case.dtype
        separate = case.key_positions is not None
        more_keys = case.keys > case.queries and not separate
        special = separate, more_keys, case.learned_sinks, case.logit_cap is None
        kernels.add((sizes, *special))
    assert len(kernels) == len(SHAPES)
    assert not any(mismatches(draw(seed, shapes=SHAPES), "banded") for seed in range(20))


def test_the_command_prints_what_it_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("banded", "3", "40") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["cases"], report["mismatches"], report["seeds"]) == (3, 0, [[40, 42]])


def test_processes_share_the_count_and_no_seed_in_the_command_as_it_is_written() -> None:
    """Started as a file, where the tests are no package that could be imported."""
    script = Path(__file__).with_name("cases.py")
    command = [sys.executable, str(script), "banded", "5", "processes=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    (first, last), (other_first, _) = report["seeds"]
    assert (report["cases"], sum(report["drawn"][kind] for kind in KINDS if kind in report["drawn"])) == (
        5,
        5,
    )
    assert first == 0 <= last < other_first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "0 words without '=': BACKEND COUNT [FIRST_SEED] are allowed"),
        (["banded", "5", "0", "cuda"], "4 words without '='"),
        (["flush", "5"], "flush: band, flash4, "),
        (["banded", "many"], "cases=many: a number from 1 to 2147483648"),
        (["banded", "0"], "cases=0: "),
        (["banded", "5", "-1"], "first=-1: a number from 0 to 2147483648"),
        (["banded", "5", "99999999999999999999"], "first=99999999999999999999: a number from 0 to"),
        (["banded", "5", "devise=cuda"], "devise=cuda: device=, processes=, threads= and seconds= are"),
        (["banded", "5", "threads=0"], "threads=0: "),
        (["banded", "5", "processes=0"], "processes=0: "),
        (["banded", "5", "seconds=nan"], "seconds=nan: "),
        (["banded", "5", "device=potato"], "device=potato: "),
        (["banded", "5", "device=cuda:99"], "device=cuda:99: "),
        (["flex", "5"], "flex with device=cpu: it does not run on cpu"),
    ],
)
def test_a_command_that_is_not_understood_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        main(*words)


def test_the_command_counts_a_backend_that_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(banded, "attend", None)
    assert main("banded", "2") == 1
    assert json.loads(capsys.readouterr().out)["mismatches"] == 2
