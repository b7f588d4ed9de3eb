"""Who trains in the benchmark of training: each a process of its own that takes steps when it is asked to.

python scripts/training_entrants.py JOB

JOB is a `Job` as JSON. `windowlm` and `windowlm documents` run the command line of ``train.py`` and are
followed in the run's folder. The others read one JSON object a line, such as ``{"steps": 10}``, and answer
each with one; whatever they print besides goes to standard error. All take AdamW's step on the same shape;
the peers do not clip their gradient, ours do, as ``train.py`` does.

Shapes: B batch, T tokens, N tokens of all rows, D model width.
"""

import contextlib
import itertools
import json
import math
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from windowlm.command_line import wait_shortly
from windowlm.model.config import ModelConfig

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
FULL_PATH, DOCUMENTS, LOOP = "windowlm", "windowlm documents", "windowlm loop"
FLEX, SDPA = "transformers flex", "transformers sdpa"
ENTRANTS = (FULL_PATH, DOCUMENTS, LOOP, FLEX, SDPA)
LEVER_OF_LOOP = f"{LOOP}, "  # and the name of a lever
ATTENTION_OF_PEERS = {FLEX: "flex_attention", SDPA: "sdpa"}
LOSS_RANGE = "head and loss"
FEW_BATCHES = 4
LEARNING_RATE = 3e-4  # of all: low enough for any of the shapes in bfloat16
Step = Callable[[], Any]  # takes one step and returns the loss, a scalar on the device


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Model and batch; sizes as in ``windowlm.model.config``."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward_dim: int
    vocabulary_size: int
    window: int
    sequence_length: int
    tokens_per_step: int

    @property
    def batch(self) -> int:
        """Sequences a step; one that is longer than the tokens of a step goes alone."""
        return max(1, self.tokens_per_step // self.sequence_length)

    @property
    def tokens(self) -> int:
        """Tokens that a step really takes."""
        return self.batch * self.sequence_length

    def sizes_of_model(self) -> dict[str, int]:
        """The sizes that ``ModelConfig`` is given."""
        return {
            name: size
            for name, size in asdict(self).items()
            if name not in ("vocabulary_size", "sequence_length", "tokens_per_step")
        }

    def model_config(self) -> ModelConfig:
        """The model of these sizes, the rest being its defaults but for the QK norm, which Mistral lacks."""
        return ModelConfig(**self.sizes_of_model(), qk_norm=False)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an entrant is asked to train.

    Attributes:
        entrant: one of `ENTRANTS`, or `LEVER_OF_LOOP` and a lever's name.
        shape: as a dictionary of `Shape`.
        precision: Lightning's name.
        device: cpu or cuda.
        text: folder of the text that `windowlm` reads, for those that read it once before they train.
        seed: of weights and tokens.
        compiled: whether a peer is compiled.
        overrides: of ``train.py``, for those that run it.
        compile_file: where those say how long torch compiled.
    """

    entrant: str
    shape: dict[str, int]
    precision: str
    device: str
    text: str
    seed: int = 0
    compiled: bool = False
    overrides: tuple[str, ...] = ()
    compile_file: str | None = None


def main() -> None:
    """Run the job."""
    job = Job(**json.loads(sys.argv[1]))
    if job.entrant in (FULL_PATH, DOCUMENTS):
        run_command_line(job)
    else:
        answer_requests(job)


def run_command_line(job: Job) -> None:
    """``python train.py`` itself, then the seconds that torch spent on compiling."""
    sys.argv = [str(TRAIN), *job.overrides]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    finally:
        if job.compile_file is not None:
            Path(job.compile_file).write_text(json.dumps(compile_seconds()), encoding="utf-8")


def answer_requests(job: Job) -> None:
    """Take steps until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if job.entrant not in ATTENTION_OF_PEERS:
        wait_shortly()
    import torch

    from windowlm.training.peak_memory import peak_memory_bytes, reset_peak_memory

    device = torch.device(job.device)
    torch.manual_seed(job.seed)
    if job.entrant.startswith(LEVER_OF_LOOP):
        from training_levers import LEVERS

        LEVERS[job.entrant.removeprefix(LEVER_OF_LOOP)]()
    step = transformers_mistral(job) if job.entrant in ATTENTION_OF_PEERS else windowlm_loop(job)

    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request.get("reset_peak_memory"):
            reset_peak_memory(device)
        if "steps" in request:
            answer["seconds"], loss = timed(step, request["steps"], device)
            answer["loss"] = float(loss)
            answer["peak_memory_bytes"] = peak_memory_bytes(device)
            answer["compile_s"] = compile_seconds()
        if "breakdown" in request:
            from step_breakdown import floors_of, profiled

            answer["breakdown"] = profiled(step, request["breakdown"], LOSS_RANGE)
            answer["floors"] = floors_of(Shape(**job.shape), job.precision, device)
        print(json.dumps(answer), file=answers, flush=True)


def timed(step: Step, steps: int, device: Any) -> tuple[float, Any]:
    """Seconds of so many steps, and the last loss.

    A GPU has one step more to do before the first, so that it waits for the host no more than in a run.
    """
    import torch

    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(steps):
            loss = step()
        return time.perf_counter() - started, loss
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    begin.record()
    for _ in range(steps):
        loss = step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000, loss


def compile_seconds() -> float:
    """Seconds that torch.compile took in this process so far, backward graphs included."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))


def tokens_of_text(shape: Shape, text: str, device: str) -> Iterator[tuple[Any, Any]]:
    """Inputs and targets of the text on the device, int64 [B, T] each, a few batches over and over."""
    import torch
    from synthetic_text import read_tokens

    size = (FEW_BATCHES, shape.batch, shape.sequence_length + 1)
    tokens = torch.from_numpy(read_tokens(Path(text), math.prod(size)).reshape(size)).to(device)
    return itertools.cycle([(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens])


def autocast_of(job: Job) -> Callable[[], Any]:
    """The context of the forward pass."""
    import torch

    from windowlm.evaluation.precision import AUTOCAST_DTYPES

    if job.precision not in AUTOCAST_DTYPES:
        return contextlib.nullcontext
    return lambda: torch.autocast(job.device, AUTOCAST_DTYPES[job.precision])


def windowlm_loop(job: Job) -> Step:
    """The bare loop: model, loss, clipping and optimizer of a run, without Lightning, loader and logs."""
    import torch

    from windowlm.data.packing import UNSCORED
    from windowlm.evaluation.precision import WEIGHT_DTYPES
    from windowlm.model.decoder import Decoder
    from windowlm.training.compilation import hidden_states, is_compiled
    from windowlm.training.config import OptimizerConfig, TrainerConfig
    from windowlm.training.gradient import gradient_norm, rescale_gradient
    from windowlm.training.linear_cross_entropy import head_loss
    from windowlm.training.master_weights import MasterWeights
    from windowlm.training.optimizer import build_optimizer

    shape, settings = Shape(**job.shape), OptimizerConfig(kind="adamw", lr=LEARNING_RATE)
    assert settings.gradient_clip is not None
    limit = settings.gradient_clip
    model = Decoder(shape.model_config(), shape.vocabulary_size)
    model = model.to(job.device, WEIGHT_DTYPES[job.precision])
    optimizer = build_optimizer(model, settings, fused=True)
    compiled = is_compiled(TrainerConfig(), torch.device(job.device))
    hidden = hidden_states(model, compiled=compiled, float8=job.precision == "fp8")
    loss_of_head = head_loss(TrainerConfig().loss, job.precision, compiled=compiled)
    batches, autocast = tokens_of_text(shape, job.text, job.device), autocast_of(job)

    def step() -> torch.Tensor:
        tokens_BT, targets_BT = next(batches)
        with autocast():
            hidden_BTD = hidden(tokens_BT, visibilities=model.visibilities())
            with torch.profiler.record_function(LOSS_RANGE):
                summed, _ = loss_of_head(
                    hidden_BTD.flatten(0, 1), model.head.weight, targets_BT.flatten(), unscored=UNSCORED
                )
        loss = summed / shape.tokens
        loss.backward()
        if isinstance(optimizer, MasterWeights):
            optimizer.take_gradients()
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        rescale_gradient(gradients, limit / gradient_norm(gradients).clamp(min=limit))
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def mistral_config(shape: Shape, **others: Any) -> Any:
    """transformers' configuration of a Mistral of this shape."""
    from transformers import MistralConfig

    return MistralConfig(
        vocab_size=shape.vocabulary_size,
        hidden_size=shape.dim,
        intermediate_size=shape.feed_forward_dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        sliding_window=shape.window,
        tie_word_embeddings=True,
        **others,
    )


def transformers_mistral(job: Job) -> Step:
    """Hugging Face transformers' Mistral of the same shape, without key-value cache."""
    import torch
    from transformers import MistralForCausalLM

    from windowlm.evaluation.precision import WEIGHT_DTYPES
    from windowlm.training.config import OptimizerConfig

    shape, settings = Shape(**job.shape), OptimizerConfig(kind="adamw", lr=LEARNING_RATE)
    config = mistral_config(
        shape,
        max_position_embeddings=shape.sequence_length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=ATTENTION_OF_PEERS[job.entrant],
    )
    if job.entrant == FLEX:
        let_flex_attention_autocast()
    model = MistralForCausalLM(config).to(job.device, WEIGHT_DTYPES[job.precision])
    called = torch.compile(model, dynamic=False) if job.compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    batches, autocast = tokens_of_text(shape, job.text, job.device), autocast_of(job)

    def step() -> torch.Tensor:
        tokens_BT, _ = next(batches)
        with autocast():
            loss: torch.Tensor = called(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def let_flex_attention_autocast() -> None:
    """Give transformers' flex attention queries and keys in the dtype of the values.

    Under autocast its rotation leaves them in float32, as for sdpa, whose inputs autocast itself casts.
    """
    from transformers import AttentionInterface
    from transformers.integrations.flex_attention import flex_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, *arguments: Any, **options: Any) -> Any:
        query, key = query.to(value.dtype), key.to(value.dtype)
        return flex_attention_forward(module, query, key, value, *arguments, **options)

    AttentionInterface.register("flex_attention", attend)


if __name__ == "__main__":
    main()
