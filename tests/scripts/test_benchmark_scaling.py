"""The command ``python scripts/benchmark_scaling.py`` on CPUs, and the peers of context beside the halo."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import PROJECT, run_script
from tests.parallel.processes import run_in_processes
from windowlm.attention.dispatch import attention
from windowlm.parallel.context_group import ContextGroup
from windowlm.parallel.sequence_shard import shard_visibilities

SCRIPT = "scripts/benchmark_scaling.py"
SHAPE = "32,2,4,2,8,32,300,8,32,64"
FEW = ("--device", "cpu", "--shape", SHAPE, "--lengths", "32", "64", "128", "--rounds", "2", "--steps", "1")
TOKENS, WINDOW, HEADS, KV_HEADS, HEAD_DIM = 48, 9, 4, 2, 8


def test_entrants_share_one_model_and_are_compared(tmp_path: Path) -> None:
    entrants = [
        "apart",
        "ddp",
        "torch ddp",
        "fsdp2",
        "one long",
        "context",
        "gather",
        "torch ring",
        "context in pieces",
    ]
    entrants += ["context [1,2]", "one of documents", "context of documents"]
    done = run_script(
        SCRIPT,
        *FEW,
        *("--warmup", "1", "--limit", "600", "--entrants", *entrants, "--out", str(tmp_path / "out")),
        cwd=tmp_path,
        timeout=1200,
    )
    report = json.loads((tmp_path / "out" / "scaling.json").read_text())
    rows = {row["entrant"]: row for row in report["rows"]}
    assert list(rows) == entrants
    # What cannot run here is a row that says why, and the status tells of it.
    assert done.returncode == 1
    assert "kernels of a GPU" in rows.pop("torch ring")["problem"]
    assert {row["problem"] for row in rows.values()} == {None}
    one, context, gather = (rows[name] for name in ("one long", "context", "gather"))
    for row in (context, gather, rows["context in pieces"], rows["context [1,2]"]):
        assert row["first_loss"] == pytest.approx(one["first_loss"], abs=1e-6)
        assert row["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_s"])
    for key in ("first_loss", "loss", "state_bytes"):
        assert rows["torch ddp"][key] == pytest.approx(rows["ddp"][key], abs=1e-6)
    of_documents = rows["one of documents"]
    assert of_documents["first_loss"] != pytest.approx(one["first_loss"], abs=1e-6)
    for key in ("first_loss", "loss"):
        assert rows["context of documents"][key] == pytest.approx(of_documents[key], abs=1e-5)
    assert rows["fsdp2"]["state_bytes"] == pytest.approx(one["state_bytes"] / 2, rel=0.01)
    assert rows["apart"]["state_bytes"] == one["state_bytes"]
    assert rows["apart"]["tokens_per_step"] == rows["fsdp2"]["tokens_per_step"] == 128
    assert context["bytes_sent_forward"] == context["bytes_sent_backward"] == context["formula_bytes"] > 0
    # Two layers, all keys and values of two heads of 8 numbers to one other process.
    assert gather["bytes_sent_forward"] == 2 * 64 * 2 * 2 * 8 * 4
    unequal = rows["context [1,2]"]
    assert unequal["parts"] == [21, 43]
    assert unequal["bytes_sent_forward"] == unequal["formula_bytes"]
    paces, documents, of_shares, over_equal, bytes_, in_pieces = report["compared"]
    assert documents.startswith("context of documents: ")
    assert of_shares.startswith("context [1,2]: ")
    assert of_shares.partition(" times the tokens/s of ")[2].startswith("one long, ")
    assert over_equal.partition(" times the tokens/s of ")[2] == "context"
    assert in_pieces.startswith("context in pieces: ")
    assert paces.startswith("context: ")
    assert "1.000 of the weights, gradients and optimizer state" in paces
    assert bytes_.endswith("of gather, 0.109 of the bytes")


def test_a_command_goes_on_with_what_was_measured_of_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    import benchmark_scaling

    asked: list[str] = []

    def measured(name: str, options: Any) -> dict[str, Any]:
        asked.append(name)
        problem = "it failed" if asked == ["one", "ddp"] else None
        numbers = {"tokens_per_second": 1.0, "wall_s": 1.0, "peak_memory_bytes": 1, "state_bytes": 1}
        return {"entrant": name, "share": name, "problem": problem, "sequence_length": 32, **numbers}

    def run(*words: str) -> int:
        given = ["--entrants", "one", "ddp", "fsdp2", "--out", str(tmp_path), *words]
        monkeypatch.setattr(sys, "argv", [SCRIPT, *FEW, *given])
        return benchmark_scaling.main()

    monkeypatch.setattr(benchmark_scaling, "measured", measured)
    assert run() == 1
    assert run("--resume") == 0
    assert asked == ["one", "ddp", "fsdp2", "ddp"]
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [row["entrant"] for row in rows] == ["one", "fsdp2", "ddp"]
    # Nothing is left to measure.
    assert run("--resume") == 0
    assert run("--resume", "--steps", "2") == 2
    assert "has steps 1, and here it is 2; give another --out" in capsys.readouterr().err
    assert run("--resume", "--lengths", "32", "64", "256") == 2
    assert (
        "has lengths [32, 64, 128], and here it is [32, 64, 256]; give another --out"
        in capsys.readouterr().err
    )
    assert asked[4:] == []


def test_every_comparison_is_told_of_the_rows_that_have_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    from benchmark_scaling import ENTRANTS, compared

    numbers = {"peak_memory_bytes": 2, "state_bytes": 4, "bytes_sent_forward": 8, "problem": None}
    rows = {name: {**numbers, "tokens_per_second": 100.0 + number} for number, name in enumerate(ENTRANTS)}
    rows["context [1.008,1]"] = rows["context"]
    rows["one"] |= {"steps_s": [0.9, 1.25], "tokens_per_step": 100}
    said = compared(rows)
    names = [
        "apart",
        "ddp",
        "torch ddp",
        "fsdp2",
        "context",
        "context of documents",
        *["context [1.008,1]"] * 2,
    ]
    names += [*["context", "context in pieces"] * 4, "context longest"]
    assert [sentence.partition(":")[0] for sentence in said] == names
    assert said[0] == "apart: 1.010 times the tokens/s of one"
    assert said[1].startswith(
        "ddp: 1.020 times the tokens/s of one (1.275 of the slowest GPU's), 1.000 of the memory a process"
    )
    rows["context"] = {**rows["context"], "problem": "it failed"}
    assert len(compared(rows)) == 11


def test_one_gpu_is_the_mean_of_all_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    import benchmark_scaling
    from scaling_entrants import ALONE, Job

    answers = {0: [1.0, 2.0, 9.0], 1: [3.0, 4.0, 5.0]}
    monkeypatch.setattr(
        benchmark_scaling,
        "answer_of",
        lambda job, processes, limit: (
            {"rounds_s": answers[job.gpu], "step_s": answers[job.gpu][1]} if job.gpu in answers else None,
            None if job.gpu in answers else "it failed",
        ),
    )
    job = Job(share=ALONE, shape={}, precision="32-true", device="cuda", seed=0, warmup=1, rounds=3, steps=1)
    row, problem = benchmark_scaling.mean_answer(job, 2, 9.0)
    assert row == {"rounds_s": [*answers.values()], "steps_s": [2.0, 4.0], "step_s": 3.0}
    assert problem is None
    assert benchmark_scaling.mean_answer(job, 3, 9.0) == (None, "it failed")


def compare(rank: int, names: list[str]) -> dict[str, tuple[float, float, int]]:
    """Largest difference of outputs and gradients from the halo's, and bytes sent forward."""
    sys.path.insert(0, str(PROJECT / "scripts"))
    from context_peers import PEERS

    group = ContextGroup(dist.group.WORLD)
    (halo,) = shard_visibilities({WINDOW: 0}, group, 2, TOKENS).values()
    found = {}
    for name in names:
        outcomes: list[list[torch.Tensor]] = []
        own_L = PEERS[name].own_tokens(group, TOKENS, torch.device("cpu"))
        # torch has no backward pass of it on a CPU.
        trains = name != "torch flex"
        for visibility in (halo, PEERS[name].of(group, WINDOW, own_L)):
            torch.manual_seed(rank)
            tensors = [
                torch.randn(2, len(own_L), heads, HEAD_DIM, dtype=torch.float64).requires_grad_(trains)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            ]
            group.bytes_sent = 0
            output = visibility.attend(attention, *tensors, sent=visibility.send(*tensors[1:]))
            forward = group.bytes_sent
            if trains:
                (output * torch.randn_like(output)).sum().backward()  # type: ignore[no-untyped-call]
            outcomes.append([output.detach(), *(t.grad for t in tensors if t.grad is not None)])
        differences = [float((one - other).abs().max()) for one, other in zip(*outcomes, strict=True)]
        found[name] = differences[0], max(differences), forward
    return found


def test_peers_attend_as_the_halo_does_and_send_more() -> None:
    names = ["gather", "all-to-all over heads", "torch flex"]
    token, number = 2, 8
    for found in run_in_processes(2, compare, names):
        for output, all_of_it, _ in found.values():
            assert output < 1e-12
            assert all_of_it < 1e-12
        rows = token * TOKENS // 2
        gathered = rows * 2 * KV_HEADS * HEAD_DIM * number
        assert found["gather"][2] == found["torch flex"][2] == gathered
        # Half of queries, keys, values and outputs.
        assert found["all-to-all over heads"][2] == rows * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM * number / 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--entrants", "magic"], "--entrants magic: one, apart, ddp"),
        (["--entrants", "context [1,a]"], "--entrants context [1,a]: one, apart, ddp"),
        (
            ["--entrants", "context [1,0]"],
            "--entrants context [1,0]: numbers above 0 are allowed",
        ),
        (["--entrants", "context [1,999]"], "of 1024 tokens a process would have none"),
        (["--entrants", "context [3,2,1]"], "there are 2 processes, and a number for each is allowed"),
        (["--resume"], "--resume: --out says of which folder"),
        (["--processes", "1"], "--processes 1: a number from 2 on"),
        (["--lengths", "32", "33", "64"], "--lengths 33: 2 processes share a sequence"),
        (["--lengths", "0", "32", "64"], "--lengths 0: a number from 1 on"),
        (["--lengths", "32", "-4", "64"], "--lengths -4: a number from 1 on"),
        (["--device", "cuda", "--processes", "99"], "this machine shows"),
    ],
)
def test_mistakes_end_with_status_2(
    arguments: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    import benchmark_scaling

    defaults: list[Any] = ["--device", "cpu", "--shape", SHAPE]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *defaults, *arguments])
    with pytest.raises(SystemExit) as stopped:
        benchmark_scaling.main()
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
