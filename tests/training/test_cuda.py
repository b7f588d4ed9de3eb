"""What only a GPU can show of training: it never waits for the device, and fast paths equal the plain one."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.conftest import start_script
from tests.training.runs import begin
from windowlm.data.packing import UNSCORED
from windowlm.model.config import ModelConfig
from windowlm.model.cost import model_cost
from windowlm.model.decoder import Decoder
from windowlm.training.calibration import calibrate
from windowlm.training.compilation import hidden_states
from windowlm.training.config import OptimizerConfig
from windowlm.training.device_batch import visibilities_on
from windowlm.training.failed_writes import FailedWrites
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.linear_cross_entropy import (
    cross_entropy_of_logits,
    head_loss,
    linear_cross_entropy,
)
from windowlm.training.metrics_log import MetricsLog
from windowlm.training.metrics_writer import MetricsWriter
from windowlm.training.run_ahead import RunAhead
from windowlm.training.schedule import Budget

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda", 0)
VOCABULARY, LENGTH, BATCH, STEPS, WARM = 512, 1024, 2, 130, 30
SHAPE = ModelConfig(
    layers=2, dim=256, heads=4, kv_heads=2, head_dim=64, feed_forward_dim=512, window=[100, None]
)


def draw(number: int) -> dict[str, torch.Tensor]:
    """A batch with documents of its own."""
    generator = torch.Generator().manual_seed(number)
    tokens_BT = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    starts_BT = torch.rand(BATCH, LENGTH, generator=generator) < 0.01
    documents_BT = starts_BT.cumsum(1).int()
    index_T = torch.arange(LENGTH)
    first_BT = torch.where(starts_BT, index_T, 0).cummax(1).values
    return {
        "tokens_BT": tokens_BT,
        "targets_BT": tokens_BT.roll(-1, 1),
        "documents_BT": documents_BT,
        "positions_BT": index_T - first_BT,
    }


class Batches(pl.LightningDataModule):
    next_batch = 0

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        batches = [draw(number) for number in range(STEPS)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class NoWaiting(pl.Callback):
    """Any operation that waits for the device raises, once the graphs are compiled."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM:
            self.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            torch.cuda.set_sync_debug_mode("error")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == self.graphs

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_training_never_waits_for_the_device(
    tmp_path: Path, precision: Any, kind: Any, cuda_graphs: bool
) -> None:
    torch._dynamo.utils.counters.clear()
    model = Decoder(SHAPE, VOCABULARY)
    module = LanguageModelModule(
        model,
        OptimizerConfig(kind=kind),
        Budget(steps=STEPS + 1),
        np.ones(VOCABULARY, dtype=np.int64),
        sequence_length=LENGTH,
        batch_size=BATCH,
        accumulate_batches=1,
        seed=0,
        hidden_states=hidden_states(model, compiled=True, cuda_graphs=cuda_graphs),
        loss=head_loss("auto", precision, compiled=True),
    )
    cost = model_cost(SHAPE, VOCABULARY, LENGTH, 2)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            RunAhead(),
            MetricsWriter(log, 10, cost, 4 * 4 * 64, None, FailedWrites("stop", tmp_path)),
            NoWaiting(),
        ],
    )
    trainer.fit(module, datamodule=Batches())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == STEPS // 10
    torch.compiler.reset()


class NoWaitingBeforeValidation(NoWaiting):
    """The same of a run, which may wait for its last validation, whose graphs are its own, and behind it."""

    on_validation_start = NoWaiting.on_train_end

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pass


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_whole_run_never_waits_for_the_device(
    tmp_path: Path, precision: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.utils.counters.clear()
    generator = np.random.default_rng(0)
    for number in range(40):
        words = generator.choice(["a", "little", "text", "of", "few", "words"], 2000)
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(" ".join(words))
    trainer, watch = pl.Trainer, NoWaitingBeforeValidation()
    monkeypatch.setattr(
        "windowlm.training.run.pl.Trainer",
        lambda callbacks, **options: trainer(callbacks=[*callbacks, watch], **options),
    )
    sizes = {"layers": 2, "dim": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "feed_forward_dim": 512}
    status = begin(
        tmp_path / "run",
        tmp_path / "texts",
        tmp_path / "cache",
        model={**sizes, "window": [100, None], "attention_dropout": 0.0},
        data={"sequence_length": LENGTH, "workers": 1},
        trainer={
            "max_steps": STEPS,
            "validate_every_n_steps": STEPS,
            "log_every_n_steps": 10,
            "progress_bar": "on",
            "device": CUDA.type,
        },
        optimizer={"kind": kind},
        precision=precision,
    )
    assert status == 0
    assert watch.graphs > 0
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.compiler.reset()


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_compiled_decoder_computes_the_same(packed: bool, cuda_graphs: bool) -> None:
    torch.manual_seed(0)
    model = Decoder(SHAPE, VOCABULARY).to(CUDA, torch.bfloat16)
    exact = Decoder(SHAPE, VOCABULARY).to(CUDA)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    weights_BTD = torch.randn(BATCH, LENGTH, SHAPE.dim, device=CUDA)
    outcomes = []
    for decoder, compiled in ((exact, False), (model, False), (model, True)):
        hidden = hidden_states(decoder, compiled=compiled, cuda_graphs=compiled and cuda_graphs)
        # A graph is recorded by the second call and replayed by the fourth, which has another batch.
        for number in range(4):
            drawn = draw(number)
            batch = drawn if packed else {"tokens_BT": drawn["tokens_BT"]}
            visibilities = visibilities_on(decoder, batch, CUDA)
            hidden_BTD = hidden(batch["tokens_BT"].to(CUDA), visibilities=visibilities)
            decoder.zero_grad()
            # The mean of squares of what was normed is a constant, whose gradient is rounding alone.
            (hidden_BTD.float() * weights_BTD).sum().backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad.float() for p in decoder.parameters() if p.grad is not None]
        outcomes.append([hidden_BTD.detach().float(), *gradients])
    for wanted, plain, fast in zip(*outcomes, strict=True):
        assert (fast - wanted).norm() <= 2 * (plain - wanted).norm() + 1e-6 * wanted.norm()
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_batch_is_measured_with_graphs_of_kernels_and_a_step_of_the_optimizer(kind: Any) -> None:
    # Convolutions join projections, whose weights are put together within the graph.
    model = Decoder(replace(SHAPE, short_convolution=4), VOCABULARY)
    measured = calibrate(
        model,
        draw(0),
        "bf16-mixed",
        CUDA,
        states_of=partial(hidden_states, compiled=True, cuda_graphs=True),
        loss=head_loss("auto", "bf16-mixed", compiled=True),
        optimizer=OptimizerConfig(kind=kind),
        window_limits=(50, None),
    )
    assert 0 < measured.forward_seconds < measured.seconds_per_batch
    torch.compiler.reset()


@pytest.mark.parametrize("logit_cap", [None, 5.0])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 100, 4097])
def test_the_loss_in_pieces_errs_no_more_than_twice_as_much(
    tokens: int, compiled: bool, logit_cap: float | None
) -> None:
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.randn(1000, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    targets_N = torch.randint(1000, (tokens,), device=CUDA)
    targets_N[::7] = UNSCORED
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, weight_VD)]
    narrow = [hidden_ND, weight_VD]

    def outcome(loss: Any, tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        summed, nats_N = loss(*tensors, targets_N, unscored=UNSCORED, logit_cap=logit_cap, **options)
        gradients = torch.autograd.grad(summed, tensors)
        return [tensor.detach().double() for tensor in (nats_N, *gradients)]

    exact = outcome(cross_entropy_of_logits, wide)
    plain = outcome(cross_entropy_of_logits, narrow)
    ours = outcome(linear_cross_entropy, narrow, tokens_at_once=1024, compiled=compiled)
    for wanted, usual, got in zip(exact, plain, ours, strict=True):
        assert (got - wanted).norm() <= 2 * (usual - wanted).norm() + 1e-6 * wanted.norm()
    torch.compiler.reset()


# The first is compiled, with the kernels that a GPU takes by itself; the second has dropout, float16's loss
# scale and workers.
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("muon,bf16-mixed,0,none", ("--kills", "3", "--compile", "on", "--dropout", "0")),
        ("adamw,16-mixed,2,none", ("--kills", "2", "--compile", "off")),
    ],
)
def test_killed_runs_end_equal_bit_for_bit_on_a_gpu(
    case: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    # A fresh interpreter, as no process that has used a GPU can be forked.
    done = start_script(
        "scripts/kill_and_resume.py", "--device", "cuda", "--deterministic", "--cases", case, "--steps", "12",
        *words, "--out", str(tmp_path), cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kill_and_resume.json").read_text())
    assert report["different"] == 0
    assert len(report["cases"][0]["kills"]) == int(words[1])
