"""Settings of optimizer, trainer, checkpoints and logger."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from windowlm.setting_text import setting_text

DEFAULT_BUDGET_SECONDS = 180.0

Precision = Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "fp8"]

MOST_FURTHER_TARGETS = 16

# Of numbers that multiply a step: far beyond any of use, and far below where float32 ends.
LARGEST = 1e6


def _at_least(owner: object, minimum: float, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name}={value}: must be at least {minimum:g}; try {name}={minimum:g}")


def _inside(owner: object, names: tuple[str, ...], good: float) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: must lie between 0 and 1; try {name}={good:g}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule over the budget.

    Args:
        kind: ``muon`` (Jordan et al. 2024) for the matrices inside the blocks and AdamW (Loshchilov and
            Hutter 2019) for the rest, or ``adamw`` for all.
        lr: peak learning rate.
        muon_lr: that of Muon, whose updates are scaled to the size of AdamW's; null for ``lr``.
        muon_momentum: decay of Muon's running mean of the gradients.
        muon_momentum_warmup: share of the budget over which that decay rises from 0.85, so that the first
            steps do not follow a mean of the first gradients (as in modded-nanogpt); 0 for none.
        embedding_lr: peak rate of the tables of tokens, n-grams and values, of which a step reaches few rows
            (as in modded-nanogpt), the head included where it shares one; null for ``lr``.
        vector_lr: peak rate of norm weights, scalars and other parameters that are no matrices; null for
            ``lr``.
        betas: decay of the running mean and mean square of the gradients.
        epsilon: added to the root of the mean square.
        weight_decay: decoupled decay, on matrices only.
        embedding_weight_decay: that of the tables of tokens, n-grams and values, the head included where it
            shares one; null for ``weight_decay``. A step shrinks rows that it does not reach as well.
        gradient_clip: largest norm of the whole gradient; null leaves it as it is.
        schedule: ``warmup_stable_decay`` (warm-up, plateau, linear decay), ``cosine`` (warm-up, then half a
            cosine) or ``constant`` (after the warm-up).
        warmup_fraction: share of the budget over which the rate rises linearly from 0.
        decay_fraction: share of the budget over which ``warmup_stable_decay`` falls.
        final_lr_fraction: last rate as a share of ``lr``.
        averaging: share of the steps so far over which weights are averaged (Shamir and Zhang 2013,
            arXiv:1212.1824; as a share of the training in Karras et al. 2024, arXiv:2312.02696); the average
            is what is validated, saved as the model and evaluated. Null for none.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["adamw", "muon"] = "muon"
    lr: float = 6e-3
    muon_lr: float | None = None
    muon_momentum: float = 0.95
    muon_momentum_warmup: float = 0.0
    embedding_lr: float | None = None
    vector_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    embedding_weight_decay: float | None = None
    gradient_clip: float | None = 1.0
    schedule: Literal["cosine", "warmup_stable_decay", "constant"] = "warmup_stable_decay"
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.5
    final_lr_fraction: float = 0.0
    averaging: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "embedding_lr", "vector_lr", "epsilon", "gradient_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= LARGEST:
                raise ValueError(
                    f"{name}={value}: must lie above 0 and up to {LARGEST:,.0f}; try {name}=0.001"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: each must lie in [0, 1); try betas=[0.9,0.95]")
        for name in ("weight_decay", "embedding_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= LARGEST:
                raise ValueError(f"{name}={value}: must lie between 0 and {LARGEST:,.0f}; try {name}=0.1")
        if not 0 <= self.muon_momentum < 1:
            raise ValueError(
                f"muon_momentum={self.muon_momentum}: must lie in [0, 1); try muon_momentum=0.95"
            )
        _inside(self, ("warmup_fraction", "decay_fraction", "final_lr_fraction", "muon_momentum_warmup"), 0.1)
        if self.averaging is not None and not 0 < self.averaging <= 1:
            raise ValueError(
                f"averaging={self.averaging}: a share of the steps, above 0 and at most 1, or null for none; "
                "try averaging=0.05"
            )
        if self.schedule == "warmup_stable_decay" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"decay_fraction={self.decay_fraction}: with warmup_fraction={self.warmup_fraction} the two "
                f"take more than the whole budget; try decay_fraction={1 - self.warmup_fraction:g}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Budget, device and rhythm of a run.

    Args:
        max_steps: budget in optimizer steps.
        max_tokens: budget in trained tokens.
        max_seconds: budget in seconds from the first step on, validations and saves on the way included; the
            validation and the evaluation after the last step come on top. The schedule follows the clock.
            With none of the three given it is 180 seconds.
        max_time: wall-clock limit in seconds from the start of the command, for all runs of a sweep
            together; training then stops between two steps, and the evaluation between two of its parts,
            saves and exits with status 75, and ``resume=auto`` goes on. What a start has begun first, a
            step or a part, is finished in any case.
        device: ``auto`` takes a GPU where there is one.
        devices: processes that ``python train.py`` starts on this machine, each with a GPU of its own where
            there are GPUs; under ``torchrun`` and ``srun`` these say how many there are.
        deterministic: the same bits in every run, and after every resume, on a GPU too, by slower algorithms;
            a run on a CPU is so in any case.
        accumulate_batches: batches per optimizer step.
        validate_every_n_steps: steps between two validations; null validates up to eight times a run, as
            often as a tenth of its work pays for, and at its end.
        max_skipped_steps: steps whose loss or gradient is not finite that are left out, over the whole run;
            after one more the run stops. The batch and the state of such a step are saved for replay.
        log_every_n_steps: steps between two logged rows.
        loss: ``pieces`` never holds the logits of a whole batch, ``whole`` does; ``auto`` takes pieces but
            for 16-mixed, whose scaled loss needs the whole.
        compile: compile the model for training; ``auto`` does on a GPU.
        activation_memory_budget: of compiled training, above 0 and at most 1: the share of the activations
            that is kept for the backward pass, the rest being computed again; 1 is the fastest.
        activation_checkpointing: keep the inputs of the blocks alone, and compute each block again in the
            backward pass: a third more work, for sequences whose activations would not fit.
        cuda_graphs: of compiled training on one GPU, with one batch a step: replay the kernels of each pass
            as one graph, where the host is too slow to launch them one by one; ``auto`` does where it can be.
        window_warmup: keys that windows show at most when training begins; the limit doubles in equal shares
            of ``window_warmup_fraction`` until it reaches the largest window (as in modded-nanogpt). Layers
            without a window stay without. Validation sees whole windows. Null for none.
        window_warmup_fraction: share of the budget after which windows are whole.
        further_targets: tokens behind the next one that its logits answer for as well while training is
            young (multi-token prediction, Gloeckle et al. 2024, arXiv:2404.19737, by the same logits as in
            modded-nanogpt); the k-th counts 2**-k of the next one at first. Each takes head and loss once
            more. The reported loss is that of the next token alone. 0 for none.
        further_targets_fraction: share of the budget over which they lose their weight, the farthest first,
            one after the other in equal shares.
        progress_bar: ``auto`` shows it on an interactive terminal only.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    max_steps: int | None = None
    max_tokens: int | None = None
    max_seconds: float | None = None
    max_time: float | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    deterministic: bool = False
    accumulate_batches: int = 1
    validate_every_n_steps: int | None = None
    max_skipped_steps: int = 0
    log_every_n_steps: int = 10
    loss: Literal["auto", "pieces", "whole"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    activation_memory_budget: float = 1.0
    activation_checkpointing: bool = False
    cuda_graphs: Literal["auto", "on", "off"] = "off"
    window_warmup: int | None = None
    window_warmup_fraction: float = 0.5
    further_targets: int = 0
    further_targets_fraction: float = 0.66
    progress_bar: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        given = [
            name for name in ("max_steps", "max_tokens", "max_seconds") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(
                f"{given[1]}={getattr(self, given[1])}: the budget is one of max_steps, max_tokens and "
                f"max_seconds, and {given[0]}={getattr(self, given[0])} is given too; try {given[1]}=null"
            )
        _at_least(
            self,
            1,
            (
                "max_steps",
                "max_tokens",
                "devices",
                "accumulate_batches",
                "validate_every_n_steps",
                "log_every_n_steps",
                "window_warmup",
            ),
        )
        _inside(self, ("window_warmup_fraction", "further_targets_fraction"), 0.5)
        _at_least(self, 0, ("max_skipped_steps", "further_targets"))
        if self.further_targets > MOST_FURTHER_TARGETS:
            raise ValueError(
                f"further_targets={self.further_targets}: each has half the weight of the one before, so "
                f"that more than {MOST_FURTHER_TARGETS} would say nothing; try further_targets=2"
            )
        if not 0 < self.activation_memory_budget <= 1:
            raise ValueError(
                f"activation_memory_budget={self.activation_memory_budget}: a share above 0 and at most 1; "
                "try activation_memory_budget=0.5"
            )
        if self.activation_checkpointing and self.activation_memory_budget < 1:
            raise ValueError(
                f"activation_memory_budget={self.activation_memory_budget}: activation_checkpointing=true "
                "keeps the inputs of blocks alone, of which no share is left out; try "
                "activation_memory_budget=1"
            )
        if self.cuda_graphs == "on" and self.accumulate_batches > 1:
            raise ValueError(
                f"cuda_graphs=on: accumulate_batches={self.accumulate_batches} would add to gradients that "
                "the next batch overwrites; try accumulate_batches=1"
            )
        for name in ("max_seconds", "max_time"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: must be a finite number of seconds above 0; try {name}=60")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Args:
    every_n_steps: steps between two saves of the last state; it is saved at the end as well.
    keep: whether a finished run keeps its states of training; its model stays in any case.
    on_failed_write: when the run's folder cannot be written, ``stop`` ends the run, ``go_on`` warns and tries
        again at the next save. The end of a run must be written in any case.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    every_n_steps: int = 250
    keep: bool = True
    on_failed_write: Literal["stop", "go_on"] = "stop"

    def __post_init__(self) -> None:
        _at_least(self, 1, ("every_n_steps",))


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Where metrics go besides ``metrics.jsonl``, which every run writes.

    Args:
        kind: ``wandb``, ``csv`` (the same rows as ``metrics.csv``) or ``none``.
        project: W&B project.
        entity: W&B team or user; null is the account's default.
        group: W&B group; null is the sweep's folder name under ``-m`` and none otherwise.
        name: W&B run name; null is the run folder's name.
        tags: W&B tags.
        mode: ``auto`` is online when a key is configured and offline otherwise.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["wandb", "csv", "none"] = "wandb"
    project: str = "windowlm"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] | None = None
    mode: Literal["auto", "online", "offline"] = "auto"

    def __post_init__(self) -> None:
        # W&B's own rules, which it would check only when the run begins.
        if not 1 <= len(self.project) <= 128 or any(mark in self.project for mark in "/\\#?%:"):
            raise ValueError(
                f"project={self.project}: 1 to 128 characters without / \\ # ? % :; try project=windowlm"
            )
        wrong = [tag for tag in self.tags or () if not 1 <= len(tag) <= 64]
        if wrong:
            kept = [tag for tag in self.tags or () if tag not in wrong]
            raise ValueError(
                f"tags={setting_text(self.tags)}: each has 1 to 64 characters, one here {len(wrong[0])}; "
                f"try tags={setting_text(kept or None)}"
            )
