"""One training run from a checked configuration to its evaluation."""

import errno
import logging
import math
import os
import secrets
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from windowlm.atomic_write import write_atomically
from windowlm.bundle import load as load_bundle
from windowlm.bundle import save_bundle
from windowlm.command_line import Invocation
from windowlm.config import ConfigError, TrainConfig
from windowlm.data.datamodule import DocumentDataModule
from windowlm.data.token_store import PreparedData, prepare_tokens
from windowlm.errors import USAGE_ERROR, UserError, unwritable_screen
from windowlm.evaluation.evaluate import evaluate_model
from windowlm.evaluation.length_sweep import plan_targets
from windowlm.evaluation.precision import WEIGHT_DTYPES, compute_dtype
from windowlm.evaluation.result import LengthResult, RunFacts
from windowlm.evaluation.result_files import PLOT_NAME
from windowlm.model.cost import model_cost
from windowlm.model.decoder import Decoder
from windowlm.parallel.cluster_environment import LaunchedProcesses
from windowlm.parallel.processes import (
    LostProcessError,
    Processes,
    is_loss,
    leave_after_loss,
    noticing_losses,
    tell_of_loss,
)
from windowlm.training import COMMAND_STARTED
from windowlm.training.backends import chosen_backends
from windowlm.training.calibration import calibrate
from windowlm.training.checkpoint_io import AtomicCheckpointIO
from windowlm.training.checkpoint_writer import CheckpointWriter
from windowlm.training.closing_screen import print_closing_screen
from windowlm.training.compilation import forget_compiled, hidden_states, is_compiled, replays_graphs
from windowlm.training.determinism import set_determinism
from windowlm.training.device import check_room, choose_device
from windowlm.training.earlier_starts import earlier_starts
from windowlm.training.failed_writes import UNWRITABLE, FailedWrites, unwritable
from windowlm.training.float8 import check_float8
from windowlm.training.given_settings import given_settings
from windowlm.training.initial_model import load_initial_weights
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.linear_cross_entropy import head_loss
from windowlm.training.metrics_log import MetricsLog
from windowlm.training.metrics_writer import MetricsWriter
from windowlm.training.non_finite import NonFiniteWatch
from windowlm.training.offline_wandb import history_differences
from windowlm.training.peak_flops import dense_bf16_peak, device_name
from windowlm.training.peak_memory import reset_peak_memory
from windowlm.training.plan import Plan, plan_table
from windowlm.training.progress import ProgressDisplay
from windowlm.training.provenance import code_difference, provenance
from windowlm.training.requeue import requeue
from windowlm.training.resuming import read_newest
from windowlm.training.run_ahead import RunAhead
from windowlm.training.run_folder import (
    DAMAGED,
    DIFF,
    RunFolder,
    Start,
    batch_size_kept,
    find_start,
    lasting_settings,
    record_of,
)
from windowlm.training.run_lock import RunLock
from windowlm.training.run_screen import RunScreen
from windowlm.training.schedule import Budget, FurtherTargets, WindowWarmup
from windowlm.training.sharded_model import whole_state
from windowlm.training.shared_work import SharedWork
from windowlm.training.shares import with_rows
from windowlm.training.signals import Interrupted, Signals
from windowlm.training.stopping import INTERRUPTED, Stopping, keep_signals, reached_limit
from windowlm.training.wandb_run import WandbRun, choose_mode

MOST_VALIDATIONS = 8
# A validation reads forward only, a third of the work of training on the same tokens.
VALIDATION_SHARE = 0.1


def train(config: TrainConfig, invocation: Invocation) -> int:
    """Train, evaluate, report.

    Args:
        config: checked settings.
        invocation: the folder of the run and how it was started.

    Returns:
        Exit status: 0 when the run is finished, 75 when it stopped before and can go on.

    Raises:
        UserError: what device, data or checkpoint show to be wrong, or a loss that is not finite.
        SystemExit: with status 75, where a run of a sweep stopped or a signal came: the sweep stops too.
    """
    processes = Processes.join()
    with Signals() as signals:
        try:
            # By then Hydra has made the folder for each: none makes it again once the leader has removed it.
            processes.wait()
            status = TrainingRun(config, invocation, signals, processes).execute()
        except Interrupted as interruption:
            _tell_of_lost_leader(interruption, processes, invocation)
            print(f"stopped: {interruption}", file=sys.stderr)
            status = INTERRUPTED
        except Exception as error:
            if processes.size > 1 and is_loss(error):
                leave_after_loss(_what_is_saved(invocation.output_dir))
            if processes.size > 1 and invocation.sweep_dir is not None and isinstance(error, UserError):
                # The others may not have met the mistake, and would wait in the next run.
                if processes.place.speaks:
                    print(f"error: {error}; this command ends", file=sys.stderr)
                raise SystemExit(USAGE_ERROR) from None
            # Hydra would go on with the other runs of the sweep.
            if signals.received is None or invocation.sweep_dir is None:
                raise
            print(f"stopped: {signals.received}; {type(error).__name__}: {error}", file=sys.stderr)
            status = INTERRUPTED
    # A signal counts even where a library swallowed its exception and the run came to its end.
    interrupted = status == INTERRUPTED or signals.received is not None
    # Once, and by the process that has written what the run leaves: SLURM ends the job's processes for it.
    if signals.requeues and status == INTERRUPTED and processes.leads:
        requeue()
    if interrupted and invocation.sweep_dir is not None:
        raise SystemExit(INTERRUPTED)
    return status


class TrainingRun:
    """The parts of one run, made in the order in which they can fail.

    Args:
        config: checked settings.
        invocation: the folder of the run and how it was started.
        signals: inside their context.
        processes: those of the run. The leader writes its files, its screen and its W&B run.
    """

    def __init__(
        self, config: TrainConfig, invocation: Invocation, signals: Signals, processes: Processes
    ) -> None:
        _quiet_lightning()
        self.processes = processes
        self.signals = signals
        if config.data.batch_size is None:
            config = with_rows(config, processes.size, batch_size_kept(config, invocation.output_dir))
        self.config = config
        self.invocation = invocation
        self.console = RunScreen(quiet=not processes.leads)
        self.folder = RunFolder(invocation.output_dir)
        self.lock = RunLock(invocation.output_dir)
        self.start: Start = find_start(config, invocation.output_dir)
        set_determinism(config.trainer.deterministic)
        self.device = choose_device(config, processes.place.local_rank)
        self.work = SharedWork.of(config, processes, self.device)
        check_float8(config, self.device)
        self.compiled = is_compiled(config.trainer, self.device)
        self.states_of = partial(
            hidden_states,
            compiled=self.compiled,
            float8=config.precision == "fp8",
            activation_memory_budget=config.trainer.activation_memory_budget,
            activation_checkpointing=config.trainer.activation_checkpointing,
            cuda_graphs=replays_graphs(config.trainer, self.device, processes.size),
            graphs=self.work.graphs,
            blocks_at_once=self.work.blocks_at_once,
        )
        self.loss = head_loss(config.trainer.loss, config.precision, compiled=self.compiled)
        # Refuses one that cannot serve the run.
        chosen_backends(config, self.device, cut=self.work.context is not None)
        self.budget = Budget.of(config.trainer)
        self.checkpoint: Path | None = None
        self.begun = self.has_begun = self.save_recorded = False
        # Of the metrics: how many the state that the run goes on from knows, and how many are there.
        self.rows_saved: int | None = None
        self.rows_kept = 0
        self.wandb_run: WandbRun | None = None
        self.open_wandb: Callable[[Iterable[Mapping[str, Any]]], WandbRun]
        if config.logger.kind == "wandb":
            # Refuses before the run begins what its W&B run would be refused for.
            processes.leader_alone(lambda: choose_mode(config.logger.mode))
        # Nothing is written before all have looked at the folder.
        processes.wait()

    def execute(self) -> int:
        """Run it; see ``train``."""
        try:
            return self._run()
        except Interrupted as interruption:
            _tell_of_lost_leader(interruption, self.processes, self.invocation)
            return self._stopped(str(interruption))
        except OSError as error:
            self._end("failed")
            if error.errno not in UNWRITABLE:
                raise
            if error.filename is None and (of_screen := unwritable_screen(error)) is not None:
                raise of_screen from None
            if self.has_begun:
                raise unwritable(self.folder.path, error.filename or "the run's files", error) from None
            raise UserError(
                f"{error.filename or 'a file'}: {error.strerror}; mend this and start again"
            ) from None
        except (RuntimeError, LostProcessError) as error:
            # A signal to all has ended the other processes, and the workers that load data, as well.
            if self.signals.received is not None:
                _tell_of_lost_leader(error, self.processes, self.invocation)
                return self._stopped(self.signals.received)
            self._end("failed")
            raise
        except BaseException:
            self._end("stopped" if self.signals.received is not None else "failed")
            raise
        finally:
            self.lock.release()

    def _run(self) -> int:
        config = self.config
        if self.start.finished and self._is_evaluated():
            return self._nothing_to_do()
        if self._cannot_be_found_again():
            self.console.out(
                "warning: resume=auto without run_dir starts a new run; to go on with this one later, give "
                f"{shlex.quote(f'run_dir={self.folder.path}')}",
                style="yellow",
                highlight=False,
            )
        if self.compiled:
            forget_compiled()
        torch.manual_seed(config.seed)
        data = self.processes.leader_first(
            lambda: prepare_tokens(config.data, config.tokenizer, self.work.parts)
        )
        data_module = DocumentDataModule(
            data, config.data, seed=config.seed, reader=self.work.reader, readers=self.work.readers
        )
        plan_targets(
            self._scored_split(data),
            data.tokenizer.token_bytes_V,
            config.evaluation,
            config.data.sequence_length,
        )
        module = self._module(data)
        if self.start.checkpoints:
            self._restore(module)
            if module.finished and (self.start.origin is not None or not self.start.continues):
                raise self._spent_already(module)
        elif config.resume == "auto" and not self._cannot_be_found_again():
            self.console.out(
                "resume=auto: no state is saved there, so this begins at step 1", highlight=False
            )
        if module.finished and not config.plan:
            if self.start.continues and self._is_evaluated():
                return self._nothing_to_do()
            self._begin(data, step=module.spent().steps)
            self._save_model(module, data)
        else:
            plan = self._plan(module, data, data_module)
            self.console.print(plan_table(plan))
            if config.plan:
                return 0
            self._begin(data, step=module.spent().steps)
            reason = self._fit(module, data, data_module, plan)
            if reason is not None:
                return self._stopped(reason)
            # A start that has not trained scores a part first, so that each gets somewhere.
            self._obey_limit()
        self.signals.check()
        result = self._evaluate(module, data)
        if not self.processes.leads:
            return 0
        if not self.folder.record.is_file():
            # What the evaluation has written is no run without it.
            gone = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            raise unwritable(self.folder.path, self.folder.record.name, gone)
        self._end("finished", result)
        if not config.checkpoint.keep:
            shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
        print_closing_screen(
            self.console,
            config,
            self.folder,
            self.invocation,
            module,
            data_module,
            result,
            self.wandb_run.sync_command() if self.wandb_run is not None else None,
        )
        return 0

    def _cannot_be_found_again(self) -> bool:
        """Whether the same command would choose another folder, in which there is nothing to resume."""
        given = given_settings(self.invocation.command).get("run_dir", "run_dir=null")
        return self.config.resume == "auto" and given == "run_dir=null"

    def _is_evaluated(self) -> bool:
        """Whether the model of the last step was; an evaluation alone may be of an earlier budget."""
        was_finished = self.folder.read_record().get("status") == "finished"
        return was_finished and self.folder.result.exists()

    def _nothing_to_do(self) -> int:
        self.console.out(f"{self.folder.path}: this run is finished; nothing to do", highlight=False)
        return 0

    def _module(self, data: PreparedData) -> LanguageModelModule:
        config = self.config
        cost = model_cost(config.model, data.tokenizer.vocabulary_size, config.data.sequence_length, 4)
        check_room(cost.parameters, self.device)
        model = Decoder(config.model, data.tokenizer.vocabulary_size)
        if config.model.init_from is not None and not self.start.checkpoints:
            load_initial_weights(model, data.tokenizer, config.model.init_from)
        return LanguageModelModule(
            model,
            config.optimizer,
            self.budget,
            data.tokenizer.token_bytes_V,
            sequence_length=config.data.sequence_length,
            batch_size=config.data.rows,
            accumulate_batches=config.trainer.accumulate_batches,
            seed=config.seed,
            identities=_identities(data),
            settings=lasting_settings(config),
            loss_scaling=config.precision == "16-mixed",
            hidden_states=self.states_of(model),
            loss=self.loss,
            document_masking=config.data.document_masking,
            window_warmup=WindowWarmup.of(config.trainer, model.layer_windows),
            further_targets=FurtherTargets(
                count=config.trainer.further_targets, fraction=config.trainer.further_targets_fraction
            ),
            max_skipped_steps=config.trainer.max_skipped_steps,
            work=self.work,
        )

    def _restore(self, module: LanguageModelModule) -> None:
        """Weights and counters; ``Trainer.fit`` restores the rest."""
        own = self.start.continues and self.start.origin is None
        checkpoint, saved = read_newest(self.start.checkpoints, module, of_same_settings=own)
        self.checkpoint = checkpoint
        module.on_load_checkpoint(saved)
        # Weights that were trained in bfloat16 stay what they are.
        module.model.to(WEIGHT_DTYPES[self.config.precision])
        module.load_state_dict(saved["state_dict"])
        left_out, allowed = int(module.skipped_steps), self.config.trainer.max_skipped_steps
        if left_out > allowed:
            raise ConfigError(
                f"trainer.max_skipped_steps={allowed}: the state of {checkpoint} has left out {left_out} "
                f"steps, and counts them; a number from {left_out} on is allowed",
                key="trainer.max_skipped_steps",
                correction=f"trainer.max_skipped_steps={left_out}",
            )
        if self.start.origin is None:
            # States of earlier versions do not say.
            self.rows_saved = saved["callbacks"]["MetricsWriter"].get("rows")
        self.console.out(f"going on from step {module.spent().steps:,} of {checkpoint}", highlight=False)

    def _spent_already(self, module: LanguageModelModule) -> ConfigError:
        trainer = self.config.trainer
        used = self.budget.used(module.spent())
        name = "max_steps" if trainer.max_steps else "max_tokens" if trainer.max_tokens else "max_seconds"
        return ConfigError(
            f"resume={self.config.resume}: that run has already spent {used:,.10g} of {self.budget}; give a "
            "larger budget",
            key=f"trainer.{name}",
            correction=f"trainer.{name}={2 * math.ceil(used)}",
        )

    def _begin(self, data: PreparedData, step: int) -> None:
        """Write what the run is, cut its metrics back to ``step``, and start logging."""
        self.processes.leader_alone(self._take_folder)
        if self.processes.leads:
            self._write_beginning(data, step)
        self.processes.wait()

    def _take_folder(self) -> None:
        """Keep other processes out of the folder, which must still be as it was when this one began.

        Raises:
            UserError: another process writes it, or did so meanwhile.
        """
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.lock.take()
        try:
            changed = find_start(self.config, self.folder.path) != self.start
        except ConfigError:
            changed = True
        if changed:
            raise UserError(
                f"run_dir={self.folder.path}: another process has written it since this one began; start "
                "again"
            )

    def _write_beginning(self, data: PreparedData, step: int) -> None:
        config = self.config
        facts = {
            **provenance(),
            "command": self.invocation.command,
            "device": device_name(self.device),
            # Where relative paths of the settings begin, and what decides in which order numbers are added.
            "working_folder": str(Path.cwd()),
            "processes": self.processes.size,
            "threads": torch.get_num_threads(),
            "prepared_data": data.summary(),
        }
        before = self.folder.read_record()
        changed = before.get("processes", self.processes.size) != self.processes.size
        if self.start.continues and self.start.origin is None:
            # A damaged state must not take the place of the good one before it when the next is saved.
            for path in self._damaged_checkpoints():
                path.replace(path.with_name(DAMAGED))
        wandb_id = self.start.wandb_id
        sweep = self.invocation.sweep_dir
        group = sweep.name if sweep is not None else None
        if config.logger.kind == "wandb":
            wandb_id = wandb_id or secrets.token_hex(4)
        # The record comes first: a folder with anything else in it is not taken for a run's.
        entries = {**record_of(config, "running"), "wandb_id": wandb_id, "origin": self.start.origin}
        entries["processes_changed"] = changed or bool(before.get("processes_changed"))
        # The schedule of the steps before was another one; a run that begins anew has only its own.
        goes_on = self.checkpoint is not None and self.start.origin is None
        other_budget = goes_on and before.get("budget", entries["budget"]) != entries["budget"]
        entries["budget_changed"] = other_budget or bool(before.get("budget_changed"))
        entries["began_from"] = self.start.origin or before.get("began_from")
        difference = code_difference()
        entries["earlier_starts"] = (
            earlier_starts(before, facts, self.folder.path / DIFF, difference, step) if goes_on else []
        )
        if wandb_id is not None:
            entries["wandb_group"] = group
        self.folder.update_record(**facts, **entries)
        self.folder.remove_partial_files()
        self.folder.write_config(config)
        if difference:
            write_atomically(self.folder.path / DIFF, difference)
        else:
            (self.folder.path / DIFF).unlink(missing_ok=True)
        self.begun = self.has_begun = True
        log = MetricsLog(self.folder.metrics)
        rows = log.cut_back(step) if self.start.continues else []
        self.rows_kept = len(rows)
        if isinstance(self.rows_saved, int) and self.rows_kept != self.rows_saved:
            missing = self.rows_saved - self.rows_kept
            what = f"{missing:,} of the {self.rows_saved:,} rows up to step {step:,} are missing"
            if missing < 0:
                what = f"{-missing:,} more than the {self.rows_saved:,} rows of step {step:,} are there"
            print(
                f"warning: {self.folder.metrics}: {what}; the run goes on, and its history stays so",
                file=sys.stderr,
            )
        if config.logger.kind == "wandb":
            assert wandb_id is not None
            self.open_wandb = partial(WandbRun, config, self.folder.path, group, wandb_id, facts)
            self.wandb_run = self.open_wandb(rows)

    def _damaged_checkpoints(self) -> tuple[Path, ...]:
        """Those newer than the one that the run goes on from."""
        checkpoints = self.start.checkpoints
        return checkpoints[: checkpoints.index(self.checkpoint)] if self.checkpoint is not None else ()

    def _stopped(self, reason: str) -> int:
        self._end("stopped")
        saved = bool(self.folder.saved_states())
        state = "the state is saved, resume=auto goes on" if saved else "nothing was trained yet"
        self.console.out(f"stopped: {reason}; {state}", highlight=False)
        return INTERRUPTED

    def _end(
        self, status: Literal["stopped", "finished", "failed"], result: LengthResult | None = None
    ) -> None:
        """Record how the run ended, and give W&B back, so that the next run of a sweep starts its own.

        Args:
            status: how.
            result: the evaluation of a finished run.

        Raises:
            UserError: W&B's file does not hold all of a finished run, and cannot be made to.
        """
        if not self.begun:
            return
        self.begun = False  # what goes wrong from here on does not change how it ended
        if result is not None:
            # Killed before W&B has all of it, the run goes on and rebuilds the history.
            try:
                self._end_wandb(exit_code=0)
                self._complete_offline_run(result)
            except (UserError, OSError):
                self._record_end("failed")
                raise
            except Interrupted:
                self._record_end("stopped")
                raise
            self._record_end(status)
            return
        try:
            self._record_end(status)
        finally:
            self._end_wandb(exit_code=1 if status == "failed" else 0)

    def _end_wandb(self, exit_code: int) -> None:
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code)

    def _complete_offline_run(self, result: LengthResult) -> None:
        """Rebuild W&B's file where it lacks something: where a disk is full, W&B ends it without a word."""
        if self.wandb_run is None or not self.wandb_run.is_offline:
            return  # what the service has cannot be read back
        if not (lacking := history_differences(self.folder.path)):
            return
        print(f"warning: W&B's file is rebuilt from {self.folder.metrics}: {lacking[0]}", file=sys.stderr)
        try:
            self.wandb_run = self.open_wandb(MetricsLog(self.folder.metrics).rows())
            self._log_length(result)
            self._end_wandb(exit_code=0)
            lacking = history_differences(self.folder.path)
        except (OSError, UserError) as error:
            lacking = [str(error)]
        if lacking:
            raise UserError(
                f"{self.folder.path / 'wandb'}: W&B's file does not hold all of the run, and could not be "
                f"rebuilt: {lacking[0]}. Weights, metrics and evaluation are whole; resume=auto tries again, "
                "and with logger=none does without W&B"
            )

    def _record_end(self, status: Literal["stopped", "finished", "failed"]) -> None:
        try:
            if not self.folder.path.is_dir():
                return  # no folder in its place, which would look like a run
            if self.config.logger.kind == "csv":
                MetricsLog(self.folder.metrics).write_csv(self.folder.path / "metrics.csv")
            self.folder.update_record(status=status)
        except OSError as error:
            if status != "failed":
                raise
            print(f"warning: {self.folder.record}: {error.strerror or error}", file=sys.stderr)

    def _plan(self, module: LanguageModelModule, data: PreparedData, data_module: DocumentDataModule) -> Plan:
        config = self.config
        batch = next(iter(data_module.train_dataloader()))
        if not config.data.document_masking:
            batch = {name: batch[name] for name in ("tokens_BT", "targets_BT")}
        return Plan(
            config=config,
            cost=model_cost(
                config.model,
                data.tokenizer.vocabulary_size,
                config.data.sequence_length,
                compute_dtype(config.precision).itemsize,
            ),
            data=data,
            device=self.device,
            processes=self.processes.size,
            # All measure, as it warms up, and go by the leader's clock.
            calibration=self.processes.share(
                calibrate(
                    module.model,
                    batch,
                    config.precision,
                    self.device,
                    states_of=self.states_of,
                    loss=self.loss,
                    optimizer=config.optimizer,
                    window_limits=module.window_warmup.limits if self.compiled else (),
                    further_targets=config.trainer.further_targets,
                    work=self.work,
                )
            ),
            budget=self.budget,
            run_dir=self.folder.path,
            cut=self.work.context is not None,
        )

    def _fit(
        self,
        module: LanguageModelModule,
        data: PreparedData,
        data_module: DocumentDataModule,
        plan: Plan,
    ) -> str | None:
        """Train; returns why it stopped before the budget was spent, or None."""
        config = self.config
        interval = self._validation_interval(plan)
        module.seconds_per_step = plan.seconds_per_step

        def validates_after(step: int) -> bool:
            return isinstance(interval, int) and step % interval == 0

        leads = self.processes.leads
        failed_writes = FailedWrites(config.checkpoint.on_failed_write, self.folder.path, speaks=leads)
        flops_per_pair = 4 * config.model.heads * config.model.head_dim
        peak = dense_bf16_peak(device_name(self.device))
        metrics = MetricsWriter(
            MetricsLog(self.folder.metrics, writes=leads, held=self.rows_kept),
            config.trainer.log_every_n_steps,
            plan.cost,
            flops_per_pair,
            None if peak is None else peak * self.processes.size,
            failed_writes,
        )
        stopping = Stopping(
            self.signals, config.trainer.max_time, COMMAND_STARTED, validates_after, self.processes
        )
        writer = CheckpointWriter(
            self.folder.checkpoints,
            config.checkpoint.every_n_steps,
            validates_after,
            write_metrics=metrics.write_rows,
            save_model=lambda: self._save_model(module, data),
            failed_writes=failed_writes,
        )
        trainer = pl.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=self.processes.place.local_size,
            num_nodes=self.processes.size // self.processes.place.local_size,
            strategy=self.work.strategy(self.device),
            use_distributed_sampler=False,
            precision="bf16-true" if config.precision == "fp8" else config.precision,
            accumulate_grad_batches=config.trainer.accumulate_batches,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            val_check_interval=(
                interval * config.trainer.accumulate_batches if isinstance(interval, int) else interval
            ),
            num_sanity_val_steps=0,
            logger=self.wandb_run.logger if self.wandb_run is not None else False,
            # Stopping comes after what keeps its clock true, and before those that act on its decision.
            callbacks=[
                RunAhead(),
                NonFiniteWatch(self.folder.replay, config.trainer.max_skipped_steps),
                stopping,
                metrics,
                writer,
                ProgressDisplay(metrics, self.console, config.trainer.progress_bar if leads else "off"),
            ],
            plugins=[
                AtomicCheckpointIO(defers=self.processes.size > 1),
                LaunchedProcesses(self.processes.place),
            ],
            # On SLURM, Lightning starts from what it finds in this folder.
            default_root_dir=self.folder.path,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        keep_signals(trainer)
        reset_peak_memory(self.device)
        with noticing_losses(self.processes, lambda: _what_is_saved(self.folder.path)):
            trainer.fit(module, datamodule=data_module, ckpt_path=self.checkpoint)
        return stopping.reason

    def _validation_interval(self, plan: Plan) -> int | timedelta:
        """Steps between validations, or time where the budget is one."""
        given = self.config.trainer.validate_every_n_steps
        if given is not None:
            return given
        affordable = 3 * VALIDATION_SHARE * plan.steps * plan.tokens_per_step / plan.validation_tokens
        validations = min(max(int(affordable), 1), MOST_VALIDATIONS)
        # Clocks of several processes differ, and all must validate at the same step.
        if self.budget.seconds is not None and self.processes.size == 1:
            return timedelta(seconds=self.budget.seconds / validations)
        return math.ceil(plan.steps / validations)

    def _save_model(self, module: LanguageModelModule, data: PreparedData) -> None:
        with module.averaged_weights():
            self._save_weights(module, data)

    def _save_weights(self, module: LanguageModelModule, data: PreparedData) -> None:
        weights = module.model.state_dict()
        if self.work.sharded:
            weights = whole_state(weights)
        self.processes.leader_alone(lambda: self._write_model(module, data, weights))

    def _write_model(
        self, module: LanguageModelModule, data: PreparedData, weights: dict[str, torch.Tensor]
    ) -> None:
        config = self.config
        if not self.save_recorded:
            self.folder.record_save()
            self.save_recorded = True
        save_bundle(
            self.folder.model,
            weights,
            {
                "model": asdict(config.model),
                "vocabulary_size": data.tokenizer.vocabulary_size,
                "sequence_length": config.data.sequence_length,
                **_identities(data),
                "data": asdict(config.data),
                "tokenizer": asdict(config.tokenizer),
                "training": {
                    "precision": config.precision,
                    "tokens_trained": module.spent().tokens,
                    "steps_trained": module.spent().steps,
                },
            },
            data.tokenizer,
            inside=self.folder.path,
        )

    def _whole_model(self, module: LanguageModelModule, data: PreparedData) -> Decoder:
        """The model; where its parts lie in several processes, that of the last save, which has all of it."""
        if not self.work.sharded:
            return module.model
        return load_bundle(self.folder.model).model

    def _scored_split(self, data: PreparedData) -> Any:
        return data.test if self.config.evaluation.split == "test" else data.validation

    def _evaluate(self, module: LanguageModelModule, data: PreparedData) -> LengthResult:
        config = self.config
        cost = model_cost(config.model, data.tokenizer.vocabulary_size, config.data.sequence_length, 4)
        facts = RunFacts(
            training_length=config.data.sequence_length,
            window=config.model.window,
            receptive_field=cost.receptive_field,
            tokens_trained=module.spent().tokens,
            tokenizer_identity=data.tokenizer.identity,
            source_identity=data.source_identity,
            split=config.evaluation.split,
        )
        model = self._whole_model(module, data).to(self.device)
        with module.averaged_weights():
            result, _ = evaluate_model(
                model,
                self._scored_split(data),
                data.tokenizer.token_bytes_V,
                config.evaluation,
                facts,
                self.folder.evaluation,
                self.processes,
                self._obey_limit,
            )
        self._log_length(result)
        return result

    def _obey_limit(self) -> None:
        """Raise ``Interrupted`` on all processes where the leader's clock has reached the limit."""
        reason = self.processes.share(reached_limit(self.config.trainer.max_time, COMMAND_STARTED))
        if reason is not None:
            raise Interrupted(reason)

    def _log_length(self, result: LengthResult) -> None:
        if self.wandb_run is not None:
            self.wandb_run.log_length(result, self.folder.evaluation / PLOT_NAME)


def _tell_of_lost_leader(error: BaseException, processes: Processes, invocation: Invocation) -> None:
    """Say that the leader is gone, where a launcher's signal to those that are left came before or after
    this process met the loss; a leader says itself that it was stopped.
    """
    if processes.size > 1 and not processes.leads and is_loss(error):
        tell_of_loss(_what_is_saved(invocation.output_dir))


def _what_is_saved(path: Path) -> str:
    if not path.is_dir():
        return f"the run's folder {path} is gone"
    if RunFolder(path).saved_states():
        return "resume=auto goes on from the last checkpoint"
    return "nothing was saved yet"


def _identities(data: PreparedData) -> dict[str, str]:
    return {"source_identity": data.source_identity, "tokenizer_identity": data.tokenizer.identity}


def _quiet_lightning() -> None:
    """Keep advice that does not apply, and advertisements, off the run's screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    # The plan names the backend and the reason.
    logging.getLogger("windowlm.attention").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*`max_epochs`.*",
        ".*transfer_batch_to.*",
        ".*`broadcast_buffers` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
