"""The LightningModule: loss, gradient scaling, learning rate, validation sums.

Shape letters: B batch, T sequence, N tokens of a batch, D model width, V vocabulary, S stages of the window
warm-up, K further targets.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from windowlm.data.packing import UNSCORED
from windowlm.model.cost import pairs_by_position
from windowlm.model.decoder import Decoder
from windowlm.training.compilation import HiddenStates
from windowlm.training.compilation import hidden_states as states_of
from windowlm.training.config import OptimizerConfig
from windowlm.training.device_batch import moved_without_waiting, shown_to_layers
from windowlm.training.gradient import gradient_norm, rescale_gradient
from windowlm.training.linear_cross_entropy import HeadLoss, linear_cross_entropy
from windowlm.training.loss_sums import LossSums
from windowlm.training.master_weights import MasterWeights
from windowlm.training.non_finite import NonFiniteError, leave_out
from windowlm.training.optimizer import RATE_SHARE, build_optimizer
from windowlm.training.schedule import (
    Budget,
    FurtherTargets,
    Spent,
    WindowWarmup,
    learning_rate_factor,
    muon_momentum,
)
from windowlm.training.sharded_model import local, shard_model
from windowlm.training.shared_work import SharedWork
from windowlm.training.weight_average import WeightAverage

Batch = dict[str, Any]

STATE = "windowlm"  # key of the run's own state in a checkpoint


def further_of(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Further targets of a batch [B, T] on its device, each with the weight of its loss."""
    if "further_targets_KBT" in batch:
        yield from zip(batch["further_targets_KBT"], batch["further_weights_K"], strict=True)


def targets_behind(targets_BT: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The targets of the ``count`` tokens that follow each, each [B, T], those of its own document alone.

    Args:
        targets_BT: the next token of each, `UNSCORED` at the end of a document and behind the text.
        count: how many.
    """
    unscored_B1 = targets_BT.new_full((len(targets_BT), 1), UNSCORED)
    behind, nearer_BT = [], targets_BT
    for _ in range(count):
        next_BT = torch.cat([nearer_BT[:, 1:], unscored_B1], 1)
        # What lies behind the end of a document is of another.
        nearer_BT = torch.where(targets_BT == UNSCORED, UNSCORED, next_BT)
        behind.append(nearer_BT)
    return behind


def dropout_seed(seed: int, batch: int, rank: int = 0) -> int:
    """Seed of what a process draws in a batch, so that one that is taken again draws the same."""
    return (seed * 1_000_003 + batch + (rank << 40)) % 2**63


class LanguageModelModule(pl.LightningModule):
    """Next-token training of a decoder, with further tokens as targets where that is asked for.

    The gradient of a step is that of the summed loss over all its targets divided by their number, however
    many batches the step is cut into: each batch is divided by a constant and the whole is rescaled once
    before clipping. Averaging the means of batches, which hold different numbers of targets when documents
    are packed, would be another loss. Of several processes the same holds: the gradients that they average
    are rescaled by the targets of all.

    Args:
        model: the decoder.
        optimizer: kind, rates and schedule.
        budget: what the schedule runs over.
        token_bytes_V: UTF-8 bytes of each token; 0 for marks that are trained but not scored.
        sequence_length: T of a batch.
        batch_size: B of a full batch, the rows of all processes.
        accumulate_batches: batches per optimizer step.
        seed: with the number of the batch, seeds dropout.
        identities: hashes of source and tokenizer, kept in checkpoints.
        settings: `run_folder.lasting_settings`, kept in checkpoints.
        loss_scaling: float16's; it must see the gradients before a fused optimizer would.
        hidden_states: of tokens and visibilities, ``model.hidden`` or the same compiled; None for the former.
        loss: of head and targets, a choice of ``head_loss``.
        document_masking: False where each sequence is one document; padding then follows all text, which
            causal attention cannot see, and kernels are spared the documents.
        window_warmup: how windows grow; validation sees whole ones.
        further_targets: tokens behind the next one that have a part in the loss that is trained, which is
            then no longer the one that is reported.
        max_skipped_steps: steps with a loss or gradient that is not finite that are left out; after one more
            weights and optimizer stay as they are.
        work: how several processes share it.

    Attributes:
        batches_trained: batches whose gradient has been taken, over the whole run.
        seconds_trained: clock of the run, kept over resumes.
        seconds_per_step: what a step is expected to take, for the schedule over a budget in seconds.
        learning_rate: rate of the running step.
        gradient_norm: norm before clipping of the last step, a scalar tensor.
        skipped_steps: steps that were left out, a scalar tensor.
        train_sums: losses since the last logged row, of batches whose loss is finite.
        visible_pairs: query-key pairs of all layers since the last logged row, a scalar tensor.
        average: of the weights, which validation, the saved model and the evaluation use; None without.
        validation_loss, validation_bits_per_byte: of the last validation, NaN before the first.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: OptimizerConfig,
        budget: Budget,
        token_bytes_V: npt.NDArray[np.int64],
        *,
        sequence_length: int,
        batch_size: int,
        accumulate_batches: int,
        seed: int,
        identities: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        loss_scaling: bool = False,
        hidden_states: HiddenStates | None = None,
        loss: HeadLoss = linear_cross_entropy,
        document_masking: bool = True,
        window_warmup: WindowWarmup | None = None,
        further_targets: FurtherTargets | None = None,
        max_skipped_steps: int = 0,
        work: SharedWork | None = None,
    ) -> None:
        super().__init__()
        self.work = work or SharedWork()
        self.processes = self.work.processes
        self.model = model
        self.optimizer_config = optimizer
        self.budget = budget
        # Buffers of integers follow the module to its device and keep their dtype under bf16-true.
        self.token_bytes_V = nn.Buffer(
            torch.from_numpy(np.ascontiguousarray(token_bytes_V)), persistent=False
        )
        self.window_warmup = window_warmup or WindowWarmup()
        self.further_targets = further_targets or FurtherTargets()
        pairs = [
            pairs_by_position(model.config, sequence_length, limit) for limit in self.window_warmup.limits
        ]
        self.pairs_by_position_ST = nn.Buffer(torch.tensor(pairs), persistent=False)
        self.visible_pairs = nn.Buffer(torch.zeros((), dtype=torch.int64), persistent=False)
        self.skipped_steps = nn.Buffer(torch.zeros((), dtype=torch.int64), persistent=False)
        self.max_skipped_steps = max_skipped_steps
        self.tokens_per_batch = sequence_length * batch_size
        self.accumulate_batches = accumulate_batches
        self.seed = seed
        self.identities = dict(identities or {})
        self.settings = dict(settings or {})
        self.loss_scaling = loss_scaling
        self.hidden_states = hidden_states or states_of(model)
        self.head_loss = loss
        self.document_masking = document_masking
        self.batches_trained = 0
        self.seconds_trained = 0.0
        self.seconds_per_step = 0.0
        self.learning_rate = 0.0
        self.gradient_norm = torch.tensor(math.nan)
        self.train_sums = LossSums()
        self._window_stage = 0
        self._further_weights: list[float] = []
        self.average = WeightAverage(optimizer.averaging) if optimizer.averaging is not None else None
        self._averaged = self._trained_weights() if self.average is not None else []
        self._validated = ExitStack()
        self._step_targets: list[torch.Tensor] = []
        self._step_losses: list[torch.Tensor] = []
        self._validation_sums = LossSums()
        self.validation_loss = math.nan
        self.validation_bits_per_byte = math.nan

    def spent(self) -> Spent:
        """What the run has used so far."""
        return Spent(
            steps=self.batches_trained // self.accumulate_batches,
            tokens=self.batches_trained * self.tokens_per_batch,
            seconds=self.seconds_trained,
        )

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.budget.progress(self.spent()) >= 1

    @property
    def window_limit(self) -> int | None:
        """Most keys that a window shows in the running step, None without a limit."""
        return self.window_warmup.limits[self._window_stage]

    def require_finite_weights(self) -> None:
        """Raise ``NonFiniteError`` unless every weight is finite; waits for the device."""
        for name, parameter in self.model.named_parameters():
            wrong = (~local(parameter.detach()).isfinite()).any().to(torch.int32)
            if bool(self.processes.largest(wrong) if self.work.sharded else wrong):
                raise NonFiniteError.of_step(self.spent().steps, f"the weight {name} is not finite")

    def configure_model(self) -> None:
        """Leave each process its part of the model, where they share it."""
        if self.work.sharded and not isinstance(self.model, FSDPModule):
            assert self.device_mesh is not None
            shard_model(self.model, self.device_mesh["data_parallel"], self.work.blocks_at_once)

    def row_scalars(self) -> list[torch.Tensor]:
        """Visible pairs, norm of the gradient, steps left out and the losses' sums, of all processes."""
        return [
            self.processes.total(self.visible_pairs),
            self.gradient_norm,
            self.skipped_steps,
            *self.train_sums.total(self.processes).scalars(),
        ]

    def start_row(self) -> None:
        """Start the sums of the next logged row."""
        self.train_sums = LossSums()
        self.visible_pairs.zero_()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the rate of the step and seed what is drawn in it."""
        # Without a seed of its own each batch, dropout after a resume would differ.
        # And so would that of processes with other rows be the same.
        torch.manual_seed(dropout_seed(self.seed, self.batches_trained, self.processes.rank))
        if self.batches_trained % self.accumulate_batches == 0:
            progress = self._progress_in_mid_step()
            factor = learning_rate_factor(self.optimizer_config, progress)
            self.learning_rate = self.optimizer_config.lr * factor
            optimizer = self.optimizers()
            for group in optimizer.param_groups:  # type: ignore[union-attr]
                # A checkpoint from before the share existed has none.
                group["lr"] = self.learning_rate * group.get(RATE_SHARE, 1.0)
                if group.get("muon"):
                    group["momentum"] = muon_momentum(self.optimizer_config, progress)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Add what the layers may see, in training by the stage of the warm-up, and further targets."""
        shown = shown_to_layers(batch, self.document_masking)
        limit, further = None, {}
        if self.training:
            if self.batches_trained % self.accumulate_batches == 0:
                progress = self.budget.progress(self.spent())
                self._window_stage = self.window_warmup.stage(progress)
                self._further_weights = self.further_targets.weights(progress)
            limit = self.window_limit
            further = self._further(batch["targets_BT"], device)
        visibilities = self.work.visibilities(self.model, shown, device, limit)
        own = self.work.own_tokens(batch)
        moved: dict[str, Any] = super().transfer_batch_to_device(own, device, dataloader_idx)
        return {**moved, **further, "visibilities": visibilities}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Summed loss of the batch over a constant; see the class on how it is normalised."""
        targets_BT = batch["targets_BT"]
        hidden_ND = self._hidden(batch)
        summed, nats_BT = self._loss(hidden_ND, targets_BT)
        for further_BT, weight in further_of(batch):
            summed = summed + weight * self._loss(hidden_ND, further_BT)[0]
        self.train_sums.add(nats_BT, targets_BT, self.token_bytes_V, only_finite=True)
        self._step_losses.append(summed.detach())
        self._step_targets.append((targets_BT != UNSCORED).sum())
        self.visible_pairs.add_(self._count_pairs(batch))
        self.batches_trained += 1
        # Workers read ahead, so only training knows which batch comes next.
        self.trainer.datamodule.next_batch = self.batches_trained  # type: ignore[attr-defined]
        # Lightning divides by the number of accumulated batches; the rescaling undoes that as well.
        return summed / self.tokens_per_batch

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Rescale the gradient to the mean over the step's targets, and clip its norm.

        A step whose loss or gradient is not finite is marked for the optimizer to leave out. float16's loss
        scaling does that itself, and finds its scale by gradients that are not finite.
        """
        if isinstance(optimizer, MasterWeights):
            optimizer.take_gradients()
        targets = torch.stack(self._step_targets).sum()
        wrong = (~torch.stack(self._step_losses).isfinite()).sum()
        targets, wrong = self.processes.total(torch.stack([targets, wrong])).unbind()
        self._step_targets.clear()
        self._step_losses.clear()
        # The processes' gradients were averaged.
        summed = self.tokens_per_batch * self.accumulate_batches * self.processes.size
        scale = summed / targets.clamp(min=1).double()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [local(p.grad) for p in parameters]
        norm = gradient_norm(gradients)
        if self.work.sharded:
            norm = self.processes.total(norm.square()).sqrt()
        norm = norm * scale
        self.gradient_norm = norm.detach()
        finite = wrong == 0
        if self.loss_scaling:
            leave_out(finite, self.skipped_steps, self.max_skipped_steps)
        else:
            finite = finite & norm.isfinite()
            optimizer.found_inf = leave_out(  # type: ignore[attr-defined]
                finite, self.skipped_steps, self.max_skipped_steps
            )
        limit = self.optimizer_config.gradient_clip
        if limit is not None:
            scale = scale * (limit / norm.clamp(min=limit))
        rescale_gradient(gradients, scale)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Take the step, and add what came of it to the average."""
        super().optimizer_step(*arguments, **options)
        if self.average is not None:
            self.average.update(self._averaged, self.spent().steps)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model has the average of its weights inside the context, where there is one."""
        if self.average is None:
            yield
            return
        with self.average.in_place_of(self._trained_weights()):
            yield

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the sums."""
        targets_BT = batch["targets_BT"]
        _, nats_BT = self._loss(self._hidden(batch), targets_BT)
        self._validation_sums.add(nats_BT, targets_BT, self.token_bytes_V)

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._validated.enter_context(self.averaged_weights())
        self._validation_sums = LossSums()

    def on_validation_epoch_end(self) -> None:
        """Divide once."""
        self._validated.close()
        sums = self._validation_sums.total(self.processes).read()
        self.validation_loss, self.validation_bits_per_byte = sums.loss(), sums.bits_per_byte()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The rates are set at the start of every step."""
        optimizer = build_optimizer(self.model, self.optimizer_config, fused=not self.loss_scaling)
        # In a narrow dtype small steps would be rounded away, each in its turn.
        self._averaged = (
            optimizer.masters if isinstance(optimizer, MasterWeights) else self._trained_weights()
        )
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the run's own state beside Lightning's, the sums of the row that is being filled included."""
        checkpoint[STATE] = {
            "identities": self.identities,
            "settings": self.settings,
            "batches_trained": self.batches_trained,
            "seconds_trained": self.seconds_trained,
            "validation_loss": self.validation_loss,
            "validation_bits_per_byte": self.validation_bits_per_byte,
            "train_sums": self.train_sums.total(self.processes).state_dict(),
            "visible_pairs": int(self.processes.total(self.visible_pairs)),
            "average": None if self.average is None else self.average.state_dict(),
            "skipped_steps": int(self.skipped_steps),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        state = checkpoint[STATE]
        self.batches_trained = state["batches_trained"]
        self.seconds_trained = state["seconds_trained"]
        self.validation_loss = state["validation_loss"]
        self.validation_bits_per_byte = state["validation_bits_per_byte"]
        self.train_sums.load_state_dict(state["train_sums"])
        self.visible_pairs.fill_(state["visible_pairs"])
        if not self.processes.leads:
            # They are the sums of all, and the leader goes on from them.
            self.train_sums = self.train_sums.without_numbers()
            self.visible_pairs.zero_()
        if self.average is not None:
            # A run without an average, or of before there were any, may be gone on from.
            self.average.load_state_dict(state.get("average") or [])
        self.skipped_steps.fill_(state["skipped_steps"])

    def _further(self, targets_BT: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """Of a batch of whole sequences, for `further_of`."""
        if not self._further_weights:
            return {}
        behind = targets_behind(targets_BT, len(self._further_weights))
        made = {
            "further_targets_KBT": torch.stack([self.work.own_part(further_BT) for further_BT in behind]),
            "further_weights_K": torch.tensor(self._further_weights, dtype=torch.float32),
        }
        return {name: moved_without_waiting(tensor, device) for name, tensor in made.items()}

    def _trained_weights(self) -> list[torch.Tensor]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def _progress_in_mid_step(self) -> float:
        """Share of the budget in the middle of the step that begins: at either end the rate may be 0."""
        before = self.budget.progress(self.spent())
        step = Spent(
            steps=1, tokens=self.tokens_per_batch * self.accumulate_batches, seconds=self.seconds_per_step
        )
        return before + min(self.budget.progress(step), 1 - before) / 2

    def _count_pairs(self, batch: Batch) -> torch.Tensor:
        """Query-key pairs inside window and document, summed over the layers."""
        real_BT: torch.Tensor = batch["documents_BT"] >= 0
        pairs_by_position_T = self.pairs_by_position_ST[self._window_stage]
        return (pairs_by_position_T[batch["positions_BT"]] * real_BT).sum()

    def _hidden(self, batch: Batch) -> torch.Tensor:
        hidden_BTD = self.hidden_states(batch["tokens_BT"], visibilities=batch["visibilities"])
        return hidden_BTD.flatten(0, 1)

    def _loss(self, hidden_ND: torch.Tensor, targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats summed over the targets, and of each, 0 where there is none: ``[B, T]``, without gradient."""
        summed, nats_N = self.head_loss(
            hidden_ND,
            self.model.head.weight,
            targets_BT.flatten(),
            unscored=UNSCORED,
            logit_cap=self.model.head.logit_cap,
        )
        return summed, nats_N.view_as(targets_BT)
