"""The screen before step one: what will be trained, on what, at which cost, and where results go."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from windowlm.attention.config import RotaryConfig
from windowlm.config import TrainConfig
from windowlm.data.token_store import PreparedData
from windowlm.model.config import ModelConfig
from windowlm.model.cost import ModelCost
from windowlm.parallel.parts import parts_of
from windowlm.training.backends import chosen_backends
from windowlm.training.calibration import Calibration
from windowlm.training.peak_flops import dense_bf16_peak, device_name
from windowlm.training.schedule import Budget, WindowWarmup


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known before step one.

    Attributes:
        config: settings of the run.
        cost: of its model at the training length.
        data: prepared documents.
        device: where it will run.
        calibration: one batch, measured.
        budget: what it may use.
        run_dir: where results go.
        cut: whether sequences are cut over processes.
        processes: how many there are.
    """

    config: TrainConfig
    cost: ModelCost
    data: PreparedData
    device: torch.device
    calibration: Calibration
    budget: Budget
    run_dir: Path
    cut: bool = False
    processes: int = 1

    @property
    def tokens_per_step(self) -> int:
        """Inputs of one optimizer step."""
        data = self.config.data
        return data.sequence_length * data.rows * self.config.trainer.accumulate_batches

    @property
    def validation_tokens(self) -> int:
        """Tokens that one validation reads."""
        limit = self.config.data.validation_tokens
        tokens = self.data.validation.token_count
        return tokens if limit is None else min(limit, tokens)

    @property
    def seconds_per_step(self) -> float:
        """Measured on one batch, the optimizer left out."""
        return self.calibration.seconds_per_batch * self.config.trainer.accumulate_batches

    @property
    def steps(self) -> int:
        """Optimizer steps that the budget is expected to pay for."""
        if self.budget.steps is not None:
            return self.budget.steps
        if self.budget.tokens is not None:
            return -(-self.budget.tokens // self.tokens_per_step)
        assert self.budget.seconds is not None
        return max(1, round(self.budget.seconds / self.seconds_per_step))

    @property
    def seconds(self) -> float:
        """Expected seconds of training."""
        return self.budget.seconds if self.budget.seconds is not None else self.steps * self.seconds_per_step


def plan_table(plan: Plan) -> Table:
    """One screen of facts, a line each."""
    config, cost, data = plan.config, plan.cost, plan.data
    train = data.train
    tokens = plan.steps * plan.tokens_per_step
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    peak = dense_bf16_peak(device_name(plan.device))
    cached = f"{cost.kv_cache_bytes / 2**20:.2f} MiB for {config.data.sequence_length:,} tokens"
    reach = "the whole document" if cost.receptive_field is None else f"{cost.receptive_field:,} tokens"
    rows = {
        "data": _documents(data),
        "source hash": data.source_identity + (f"; hub revision {data.revision}" if data.revision else ""),
        "tokenizer": f"{config.tokenizer.kind}, {data.tokenizer.vocabulary_size:,} symbols, "
        f"{train.byte_count / max(train.token_count, 1):.2f} bytes a token",
        "model": "; ".join(
            [_shape(config.model), *_additions(config.model), f"{cost.parameters:,} parameters"]
        ),
        "attention": "; ".join(
            [
                f"window {_window(config.model)}",
                *_warmup(config),
                *_options(config.model),
                f"receptive field {reach}",
            ]
        ),
        "backend": ", ".join(chosen_backends(config, plan.device, cut=plan.cut)),
        "KV cache": f"{cost.kv_cache_bytes_per_token:,} bytes a token; {cached}",
        "FLOPs": f"{cost.flops_per_token / 1e6:,.1f} million a token, forward and backward",
        "device": device_name(plan.device)
        + (f"; dense bf16 peak {peak / 1e12:,.0f} TFLOP/s" if peak else "; peak not known, so no MFU"),
        "precision": config.precision,
        "budget": f"{plan.budget}: about {plan.steps:,} steps of {plan.tokens_per_step:,} tokens, "
        f"{tokens / 1e6:,.2f} million tokens, {tokens / max(train.token_count, 1):.2f} epochs",
        "expected": f"{_duration(plan.seconds)} of training, "
        f"{plan.calibration.memory_bytes / 2**30:.2f} GiB at the peak",
        "results": shlex.quote(str(plan.run_dir)),
    }
    if plan.processes > 1 or config.parallel.kind != "ddp":
        rows["processes"] = _processes(plan)
    for name, value in rows.items():
        # As text: names from outside may look like rich's markup.
        table.add_row(name, Text(value))
    return table


def _processes(plan: Plan) -> str:
    settings = plan.config.parallel
    kind, together = settings.kind, settings.sharing or plan.processes
    if plan.processes == 1:
        return f"one alone, so that parallel={kind} shares nothing; trainer.devices=N or torchrun starts more"
    shares = {
        "ddp": "rows of the batch",
        "fsdp2": "rows of the batch and the model",
        "context": f"each sequence among {together}"
        if together > 1
        else "rows of the batch, and cut no sequence",
    }
    unequal = ""
    if settings.context_shares is not None:
        cuts = parts_of(plan.config.data.sequence_length, together, settings.context_shares)
        unequal = f", in parts of {', '.join(f'{cut.stop - cut.start:,}' for cut in cuts)} tokens"
    return f"{plan.processes} share {shares[kind]}{unequal}"


def _documents(data: PreparedData) -> str:
    splits = "; ".join(
        f"{split.name} {len(split):,} documents, {split.byte_count / 1e6:,.2f} MB"
        for split in (data.train, data.validation, data.test)
        if len(split)
    )
    dropped = f"; {data.duplicates_dropped:,} duplicates dropped" if data.duplicates_dropped else ""
    excluded = "" if data.excluded is None else f"; {data.excluded:,} left out by data.exclude"
    cuts = "".join(f"; {cut}" for cut in data.cuts)
    return f"{data.source}: {splits}{dropped}{excluded}{cuts}"


def _shape(model: ModelConfig) -> str:
    return (
        f"{model.layers} layers, width {model.dim}, {model.heads} query and {model.kv_heads} key-value heads "
        f"of {model.head_dim}, MLP {model.feed_forward_dim}"
        f"{'' if model.activation == 'swiglu' else ' with ReLU squared'}"
    )


def _additions(model: ModelConfig) -> list[str]:
    """What the model has besides the plain decoder, attention aside."""
    additions = []
    if (ngrams := model.ngram_embeddings) is not None:
        width = f" of {ngrams.dim:,}" if ngrams.dim else ""
        orders = ", ".join(map(str, ngrams.orders))
        additions.append(f"n-grams of {orders} in {ngrams.buckets:,} rows each{width}")
    if model.value_embeddings:
        additions.append(f"value embeddings {model.value_embeddings}")
    if model.embedding_residual:
        additions.append("embedding residual")
    if model.short_convolution is not None:
        additions.append(f"short convolution {model.short_convolution}")
    if model.final_logit_cap is not None:
        additions.append(f"final logit cap {model.final_logit_cap}")
    if model.zero_output_init:
        additions.append("outputs from zero")
    return additions


def _window(model: ModelConfig) -> str:
    return _by_layer(["full" if window is None else f"{window:,}" for window in model.layer_windows()])


def _warmup(config: TrainConfig) -> list[str]:
    """The stages of windows that grow."""
    *limits, _ = WindowWarmup.of(config.trainer, config.model.layer_windows()).limits
    share = f"{config.trainer.window_warmup_fraction:.0%} of the budget"
    return [f"at most {', '.join(f'{limit:,}' for limit in limits)} in the first {share}"] if limits else []


def _options(model: ModelConfig) -> list[str]:
    """What the layers do besides the window, where it is not the default."""
    bases = ["none" if rotary is None else f"{rotary.base:,.10g}" for rotary in model.layer_rotaries()]
    options = {
        f"{model.attention_sinks:,} sinks": model.attention_sinks > 0,
        "learned sinks": model.learned_sinks,
        "output gate": model.output_gate,
        f"logit cap {model.logit_cap}": model.logit_cap is not None,
        f"rotary base {_by_layer(bases)}": not isinstance(model.rotary, RotaryConfig),
    }
    return [option for option, is_on in options.items() if is_on]


def _by_layer(names: list[str]) -> str:
    return names[0] if len(set(names)) == 1 else " ".join(names) + " (by layer)"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
