"""Runs of two processes learn what a run of one learns, and go on as one."""

import json
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from tests.conftest import MakeOnce
from tests.parallel.processes import LOOPBACK, free_port, run_in_processes
from tests.training.runs import begin, record, rows
from windowlm.bundle import load
from windowlm.config import ConfigError, TrainConfig, check_config
from windowlm.errors import UserError
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder, Visibilities
from windowlm.parallel import processes as meeting
from windowlm.parallel.config import ParallelConfig
from windowlm.parallel.context_group import ContextGroup
from windowlm.parallel.launcher import LAUNCHED
from windowlm.parallel.place import Place, own_place
from windowlm.parallel.processes import Processes
from windowlm.training.gradients_at_once import GradientsAtOnceStrategy
from windowlm.training.shared_work import SharedWork
from windowlm.training.shares import blocks_at_once, with_rows

KINDS = ("ddp", "fsdp2", "context")
MUON = ("ddp muon", "fsdp2 muon")
RESUMED = ("from one to two", "from two to one")  # by another number of processes, with Muon too
COMPILED = (
    "ddp compiled",
    "ddp compiled on two machines",
    "fsdp2 compiled",
    "fsdp2 compiled two blocks at once",
    "context compiled",
    "context compiled unequal whole rows",
)
CHECKPOINTED = (
    "ddp compiled checkpointed",
    "fsdp2 checkpointed",
    "context unequal checkpointed",
    "context compiled checkpointed",
)
# Two kinds of layers share work in the other runs; to trace both takes long.
OF_ONE_LAYER = (
    *(name for name in COMPILED if "two blocks" not in name and "whole rows" not in name),
    "ddp compiled checkpointed",
    "context compiled checkpointed",
)
STEPS = 20
MOST = 1e-6
# Newton and Schulz's iterations make much of small singular values, and of what rounding adds to them.
MOST_OF_MUON = 1e-5
COUNTS = ("context_length", "targets", "bytes")
LOSSES = ("train_loss", "validation_loss", "train_bits_per_byte", "validation_bits_per_byte")
RUN: dict[str, Any] = {
    "model": {"layers": 2, "window": [8, None], "attention_dropout": 0.0, "short_convolution": 3},
    "data": {"batch_size": 4},
    "trainer": {
        "max_steps": STEPS,
        "validate_every_n_steps": 10,
        "log_every_n_steps": 5,
        "device": "cpu",
        "further_targets": 2,
    },
    "optimizer": {"kind": "adamw"},
}


def settings(**changes: Any) -> dict[str, Any]:
    return {**{name: dict(group) for name, group in RUN.items()}, **changes}


def settings_of(name: str) -> dict[str, Any]:
    """Of a run by its name: how work is shared, whether it is compiled and activations are checkpointed."""
    kind, *words = name.split()
    made = settings() if kind == "one" else settings(parallel={"kind": kind})
    made["trainer"]["activation_checkpointing"] = "checkpointed" in words
    made["trainer"]["compile"] = "on" if "compiled" in words else "off"
    if "unequal" in name:
        made["parallel"]["context_shares"] = [3, 2]
    if "muon" in words:
        made["optimizer"]["kind"] = "muon"
    if "at once" in name:
        made["parallel"]["blocks_at_once"] = 2
    if "whole rows" in name:
        # One graph can hold this exchange.
        made["model"] |= {"window": 8, "short_convolution": None}
        made["data"]["document_masking"] = False
    return made


def one_like(name: str) -> str:
    """The run of one process that learns what another learns."""
    if name in RESUMED:
        return "one muon"
    special = next((words for words in ("whole rows", "muon") if words in name), None)
    return f"one {special}" if special else "one"


def settings_here(name: str) -> dict[str, Any]:
    """Settings of the run in these tests."""
    made = settings_of(name)
    if name in OF_ONE_LAYER or name == "one of one layer":
        made["model"] |= {"layers": 1, "window": 8}
    return made


def run_all(rank: int, base: Path, texts: Path, cache: Path) -> tuple[list[int], int]:
    """Statuses of each kind, and of half a run of each that another number of processes finishes; and how
    often a number was sent by the device in the first of them.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", LAUNCHED: "1"}
    statuses = []
    sent: list[int] = []
    broadcast = dist.broadcast

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return broadcast(tensor, *arguments, **options)

    dist.broadcast = counted
    # Graphs cut into their two passes; kernels would take minutes.
    with torch.compiler.set_stance("default", force_backend="aot_eager_decomp_partition"):
        for name in (*KINDS, *MUON, *COMPILED, *CHECKPOINTED):
            local_rank, local_size = ("0", "1") if "machines" in name else (str(rank), "2")
            os.environ |= {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
            statuses.append(begin(base / name, texts, cache, **settings_here(name)))
            dist.broadcast = broadcast
    half = settings_here("fsdp2 muon")
    half["trainer"]["max_time"] = 1e-9
    statuses.append(begin(base / "from two to one", texts, cache, **half))
    statuses.append(begin(base / "from one to two", texts, cache, **settings_here("fsdp2 muon")))
    return statuses, sent.count(1)


@pytest.fixture(scope="module")
def runs(documents: Path, made_once: MakeOnce) -> Path:
    """Folders of a run of one process, and of the same by two in each way."""

    def make(base: Path) -> None:
        cache = base / "cache"
        for name in ("one", "one of one layer", "one whole rows", "one muon"):
            assert begin(base / name, documents, cache, **settings_here(name)) == 0
        half = settings_here("one muon")
        half["trainer"]["max_time"] = 1e-9
        assert begin(base / "from one to two", documents, cache, **half) == 75
        first, second = run_in_processes(2, run_all, base, documents, cache)
        # Lightning's question before each batch, whether to stop, would wait for GPUs.
        numbers_sent = 0
        statuses = [*[0] * len((*KINDS, *MUON, *COMPILED, *CHECKPOINTED)), 75, 0]
        assert first == second == (statuses, numbers_sent)
        assert begin(base / "from two to one", documents, cache, **settings_here("one muon")) == 0

    return made_once("shared work", make)


@pytest.mark.parametrize("name", [*KINDS, *MUON, *COMPILED, *CHECKPOINTED, *RESUMED])
def test_the_loss_curve_is_that_of_one_process(runs: Path, name: str) -> None:
    one = "one of one layer" if name in OF_ONE_LAYER else one_like(name)
    alone, shared = rows(runs / one), rows(runs / name)
    assert [row["step"] for row in shared] == [row["step"] for row in alone]
    for wanted, found in zip(alone, shared, strict=True):
        assert found.keys() == wanted.keys()
        assert found["tokens"] == wanted["tokens"]
        for column in (*LOSSES, "gradient_norm"):
            if column in wanted:
                most = MOST_OF_MUON if name in (*MUON, *RESUMED) else MOST
                assert found[column] == pytest.approx(wanted[column], rel=0, abs=most)


@pytest.mark.parametrize("name", KINDS)
def test_the_run_is_recorded_and_evaluated_once(runs: Path, name: str) -> None:
    assert record(runs / name)["status"] == "finished"
    evaluated = json.loads((runs / name / "evaluation" / "length.json").read_text())["rows"]
    alone = json.loads((runs / "one" / "evaluation" / "length.json").read_text())["rows"]
    for wanted, found in zip(alone, evaluated, strict=True):
        assert [found[count] for count in COUNTS] == [wanted[count] for count in COUNTS]
        assert found["nats"] == pytest.approx(wanted["nats"], rel=MOST, abs=0)


def test_it_is_recorded_that_another_number_of_processes_went_on(runs: Path) -> None:
    for name, processes, changed in (
        ("one", 1, False),
        ("ddp", 2, False),
        ("from one to two", 2, True),
        ("from two to one", 1, True),
    ):
        found = record(runs / name)
        assert (found["processes"], found["processes_changed"]) == (processes, changed)


@pytest.mark.parametrize("name", [*KINDS, *MUON])
def test_a_checkpoint_has_the_form_of_one_process(runs: Path, name: str) -> None:
    alone, shared = (
        torch.load(runs / folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (one_like(name), name)
    )
    assert shared["state_dict"].keys() == alone["state_dict"].keys()
    (of_one,), (of_two,) = alone["optimizer_states"], shared["optimizer_states"]
    assert of_two["state"].keys() == of_one["state"].keys()
    for number, wanted in of_one["state"].items():
        for key, tensor in wanted.items():
            assert of_two["state"][number][key].shape == tensor.shape


@pytest.mark.parametrize("name", ["one", *KINDS])
def test_the_saved_model_has_the_weights_of_the_checkpoint(runs: Path, name: str) -> None:
    saved = torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for key, weight in load(runs / name).model.state_dict().items():
        assert torch.equal(weight, saved[f"model.{key}"])


def test_a_place_is_what_the_launcher_says() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert own_place(torchrun) == Place(3, 4, 1, 2)
    job = {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_LOCALID": "1"}
    assert own_place(job) == Place(1, 2, 1, 2)
    step = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert own_place({**step, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}) == Place(5, 8, 1, 4)
    uneven = {**step, "SLURM_STEP_TASKS_PER_NODE": "3(x2),2", "SLURM_NODEID": "2"}
    assert own_place(uneven) == Place(5, 8, 1, 2)
    # A batch script without srun is one process.
    assert own_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}) == Place()


def join_with(rank: int, port: int, counts: list[int]) -> str:
    dist.destroy_process_group()
    told = {"RANK": rank, "WORLD_SIZE": len(counts), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": counts[rank]}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update({"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)})
    try:
        return f"{Processes.join().size} joined"
    except UserError as error:
        return str(error)


def test_machines_with_more_processes_than_others_are_refused_by_all() -> None:
    assert run_in_processes(2, join_with, free_port(), [1, 1]) == ["2 joined"] * 2
    for told in run_in_processes(2, join_with, free_port(), [2, 1]):
        assert told.startswith(
            "2 processes on one machine and 1 on another: as many on each are allowed; try"
        )


@pytest.mark.parametrize(
    ("changes", "message", "correction"),
    [
        ({"data": {"batch_size": 3}}, "share the rows of a batch", "data.batch_size=4"),
        (
            {"data": {"sequence_length": 65}, "parallel": {"kind": "context"}},
            "share each sequence",
            "data.sequence_length=68",
        ),
        (
            {"parallel": {"kind": "context", "context_processes": 3}},
            "a divisor of the number of processes, 4",
            "parallel.context_processes=null",
        ),
        (
            {"parallel": {"kind": "context", "context_shares": [1, 2, 1.5]}},
            r"parallel.context_shares=\[1,2,1.5\]: for 3 processes that share each sequence, .* there are 4;",
            "parallel.context_shares=null",
        ),
        (
            {"parallel": {"kind": "context", "context_shares": [1, 1, 1e-3, 1]}},
            "of 64 tokens a process would have none",
            "parallel.context_shares=null",
        ),
    ],
)
def test_work_that_has_no_equal_shares_is_refused(
    changes: dict[str, Any], message: str, correction: str
) -> None:
    data = {"batch_size": 4, "sequence_length": 64, **changes.pop("data", {})}
    config = check_config(TrainConfig, {"run_dir": "run", "data": data, **changes})
    with pytest.raises(ConfigError, match=message) as caught:
        SharedWork.of(config, Processes(Place(0, 4, 0, 4)), torch.device("cpu"))
    assert caught.value.correction == correction


def test_a_run_that_goes_on_is_told_which_numbers_of_processes_share_its_batch() -> None:
    raw = {"run_dir": "run", "resume": "auto", "data": {"batch_size": 4}}
    config = check_config(TrainConfig, raw)
    with pytest.raises(ConfigError, match=r"as many processes are allowed: 1, 2, 4$") as caught:
        SharedWork.of(config, Processes(Place(0, 3, 0, 3)), torch.device("cpu"))
    assert caught.value.correction is None


def buffers_of(rank: int) -> tuple[float, float]:
    module = torch.nn.Linear(1, 1, bias=False)
    module.counted = torch.nn.Buffer(torch.tensor(float(rank)))
    torch.nn.init.constant_(module.weight, rank + 5.0)
    strategy = GradientsAtOnceStrategy()
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy._lightning_module = strategy.model = module  # type: ignore[assignment]
    strategy.configure_ddp()
    return float(module.weight), float(module.counted)


def test_processes_begin_with_the_weights_of_the_leader_and_sums_of_their_own() -> None:
    assert run_in_processes(2, buffers_of) == [(5.0, 0.0), (5.0, 1.0)]


@pytest.mark.parametrize(
    ("told", "place"),
    [
        ({}, ("127.0.0.1", "19711")),
        ({"SLURM_NODELIST": "node[3-5]"}, ("node3", "19711")),
        ({"SLURM_NODELIST": "node[3-5]", "SLURM_STEP_NODELIST": "node5"}, ("node5", "19711")),
        ({"SLURM_STEP_ID": "2"}, ("127.0.0.1", "21729")),
        ({"SLURM_STEP_ID": "batch", "MASTER_PORT": "7"}, ("127.0.0.1", "7")),
        ({"SLURM_JOB_ID": "123456789", "SLURM_STEP_ID": "400"}, ("127.0.0.1", "15389")),
    ],
)
def test_steps_of_a_job_meet_at_places_of_their_own(
    told: dict[str, str], place: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_NODELIST", "SLURM_STEP_NODELIST", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "4711", **told}.items():
        monkeypatch.setenv(name, value)
    own = dict(os.environ)
    monkeypatch.setattr(meeting.os, "environ", own)
    meeting._meet_by_job()
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == place


def test_processes_that_wait_in_vain_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "TIME_TO_MEET", timedelta(seconds=1))
    port = str(free_port())
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^process 0 of 2 did not meet the others at {LOOPBACK}:{port} \("):
        Processes.join()


def test_several_blocks_at_once_are_refused_where_each_is_computed_again() -> None:
    def at_once(checkpointed: bool, given: int | None = None) -> int:
        return blocks_at_once(
            ParallelConfig(kind="fsdp2", blocks_at_once=given), 5, checkpointed=checkpointed
        )

    with pytest.raises(ConfigError, match=r"^parallel.blocks_at_once=2: .* 1 is allowed, or null") as caught:
        at_once(True, 2)
    assert caught.value.correction == "parallel.blocks_at_once=null"
    assert [at_once(True), at_once(True, 1), at_once(False), at_once(False, 3)] == [1, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"^parallel.blocks_at_once=6: the model has 5 blocks"):
        at_once(False, 6)


def test_graphs_are_cut_where_gradients_travel_by_a_network_or_weights_by_parts() -> None:
    one, two = Processes(Place(0, 4, 0, 4)), Processes(Place(0, 4, 0, 2))
    assert [SharedWork(processes, "ddp", 4).graphs for processes in (one, two)] == ["one", "blocks"]
    assert [SharedWork(processes, "fsdp2", 4).graphs for processes in (one, two)] == ["blocks", "blocks"]
    group = ContextGroup()
    shared = [SharedWork(processes, "context", 1, group) for processes in (one, two)]
    assert [work.graphs for work in shared] == ["one", "pieces"]


@pytest.mark.parametrize(
    ("parallel", "kept", "rows"),
    [
        ({}, None, 4),
        ({"kind": "fsdp2"}, None, 4),
        ({"kind": "context"}, None, 1),
        ({"kind": "context", "context_processes": 2}, None, 2),
        ({}, 8, 8),
    ],
)
def test_a_batch_has_a_row_for_each_that_reads_unless_told(
    parallel: dict[str, Any], kept: int | None, rows: int
) -> None:
    config = check_config(TrainConfig, {"run_dir": "run", "parallel": parallel})
    settled = with_rows(config, 4, kept)
    assert settled.data.batch_size == settled.data.rows == rows
    assert replace(settled, data=config.data) == config


def test_a_batch_of_all_processes_that_is_too_large_is_refused() -> None:
    config = check_config(TrainConfig, {"run_dir": "run", "data": {"sequence_length": 2**27}})
    with pytest.raises(ConfigError, match=r"^data.batch_size=4: .* are more than"):
        with_rows(config, 4, None)


def test_torch_sums_gradients_of_gpus_over_a_network_alone() -> None:
    one, two = Processes(Place(0, 4, 0, 4)), Processes(Place(0, 4, 0, 2))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for processes, device, wanted in (
        (one, cpu, GradientsAtOnceStrategy),
        (one, gpu, GradientsAtOnceStrategy),
        (two, cpu, GradientsAtOnceStrategy),
        (two, gpu, DDPStrategy),
    ):
        assert type(SharedWork(processes, "ddp", 4).strategy(device)) is wanted


def test_one_process_alone_is_not_several_that_share_sequences() -> None:
    for parallel, message in (
        ({"context_processes": 2}, "a divisor of the number of processes, 1"),
        ({"context_shares": [1, 2]}, "and there is 1; start more by trainer.devices"),
    ):
        config = check_config(TrainConfig, {"run_dir": "run", "parallel": {"kind": "context", **parallel}})
        with pytest.raises(ConfigError, match=message):
            SharedWork.of(config, Processes(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "correction"),
    [
        ({"optimizer": {"averaging": 0.1}}, "optimizer.averaging=null"),
        ({"precision": "bf16-true"}, "precision=bf16-mixed"),
    ],
)
def test_what_needs_whole_matrices_is_refused_where_a_process_has_none(
    changes: dict[str, Any], correction: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(TrainConfig, {"run_dir": "run", "parallel": {"kind": "fsdp2"}, **changes})
    assert caught.value.correction == correction


def test_what_rows_of_one_document_each_show_is_planned_once() -> None:
    model = Decoder(ModelConfig(dim=16, layers=2, heads=2, window=4), vocabulary_size=8)
    work = SharedWork(context=ContextGroup())

    def seen(window_limit: int | None = None, **more: torch.Tensor) -> Visibilities:
        shown = {"tokens_BT": torch.zeros(1, 12, dtype=torch.int64), **more}
        return work.visibilities(model, shown, torch.device("cpu"), window_limit)

    with torch.inference_mode():
        first = seen()
    assert seen() is first
    positions = [visibility.positions for visibility in first.values()]
    assert not any(places_BT is None or places_BT.is_inference() for places_BT in positions)
    assert [visibility.window for visibility in seen(3).values()] == [3]
    documents_BT = torch.tensor([[0] * 5 + [1] * 7])
    packed = seen(documents_BT=documents_BT)
    assert packed is not seen(documents_BT=documents_BT)
    assert all(visibility.documents is not None for visibility in packed.values())
