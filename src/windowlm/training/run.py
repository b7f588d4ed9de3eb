"""One training run from a checked configuration to its evaluation."""

import logging
import math
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console

from windowlm.bundle import save_bundle
from windowlm.command_line import Invocation
from windowlm.config import ConfigError, TrainConfig
from windowlm.data.compression import compressed_bits_per_byte
from windowlm.data.datamodule import DocumentDataModule
from windowlm.data.token_store import PreparedData, prepare_tokens
from windowlm.evaluation.evaluate import evaluate_model
from windowlm.evaluation.length_sweep import plan_targets
from windowlm.evaluation.report import length_table
from windowlm.evaluation.result import LengthResult, RunFacts
from windowlm.model.cost import model_cost
from windowlm.model.decoder import Decoder
from windowlm.training.calibration import calibrate
from windowlm.training.checkpoint_io import AtomicCheckpointIO
from windowlm.training.checkpoint_writer import CheckpointWriter
from windowlm.training.config import BYTES_PER_ELEMENT
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.metrics_log import MetricsLog
from windowlm.training.metrics_writer import MetricsWriter
from windowlm.training.peak_flops import dense_bf16_peak, device_name
from windowlm.training.plan import Plan, plan_table
from windowlm.training.progress import ProgressDisplay
from windowlm.training.provenance import provenance
from windowlm.training.run_folder import RunFolder, Start, find_start, record_of
from windowlm.training.schedule import Budget
from windowlm.training.stopping import INTERRUPTED, Stopping
from windowlm.training.wandb_run import WandbRun

MOST_VALIDATIONS = 8
# A validation reads forward only, a third of the work of training on the same tokens.
VALIDATION_SHARE = 0.1


def train(config: TrainConfig, invocation: Invocation) -> int:
    """Train, evaluate, report.

    Args:
        config: checked settings.
        invocation: the folder of the run and how it was started.

    Returns:
        Exit status: 0 when the budget is spent, 75 when the run stopped before and can go on.

    Raises:
        UserError: what device, data or checkpoint show to be wrong.
    """
    return TrainingRun(config, invocation).execute()


class TrainingRun:
    """The parts of one run, made in the order in which they can fail.

    Args:
        config: checked settings.
        invocation: the folder of the run and how it was started.
    """

    def __init__(self, config: TrainConfig, invocation: Invocation) -> None:
        self.started = time.monotonic()
        _quiet_lightning()
        self.config = config
        self.invocation = invocation
        self.console = Console(width=None)
        self.folder = RunFolder(invocation.output_dir)
        self.start: Start = find_start(config, invocation.output_dir)
        self.device = _device(config)
        self.budget = Budget.of(config.trainer)

    def execute(self) -> int:
        """Run it; see ``train``."""
        config = self.config
        if self.start.finished:
            self.console.print(f"{self.folder.path}: this run is finished; nothing to do", soft_wrap=True)
            return 0
        torch.manual_seed(config.seed)
        data = prepare_tokens(config.data, config.tokenizer)
        data_module = DocumentDataModule(data, config.data, seed=config.seed)
        plan_targets(
            self._scored_split(data),
            data.tokenizer.token_bytes_V,
            config.evaluation,
            config.data.sequence_length,
        )
        model = Decoder(config.model, data.tokenizer.vocabulary_size)
        plan = self._plan(model, data, data_module)
        self.console.print(plan_table(plan))
        if config.plan:
            return 0
        module = LanguageModelModule(
            model,
            config.optimizer,
            self.budget,
            data.tokenizer.token_bytes_V,
            tokens_per_batch=config.data.sequence_length * config.data.batch_size,
            accumulate_batches=config.trainer.accumulate_batches,
            seed=config.seed,
            fused=config.precision != "16-mixed",
        )
        facts = {
            **provenance(),
            "command": self.invocation.command,
            "device": device_name(self.device),
            "source_identity": data.source_identity,
            "tokenizer_identity": data.tokenizer.identity,
        }
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.write_config(config)
        self.folder.update_record(**facts, **record_of(config, "running"))
        wandb_run = self._start_wandb(facts)
        stopping = self._fit(module, data, data_module, plan, wandb_run)
        if config.logger.kind == "csv":
            MetricsLog(self.folder.metrics).write_csv(self.folder.path / "metrics.csv")
        if stopping.reason is not None:
            self.folder.update_record(**record_of(config, "stopped"))
            self._finish_wandb(wandb_run)
            self.console.print(f"stopped: {stopping.reason}; the state is saved, resume=auto goes on")
            return INTERRUPTED
        result = self._evaluate(module, data, wandb_run)
        self.folder.update_record(**record_of(config, "finished"))
        self._finish_wandb(wandb_run)
        self._report(module, data_module, result, wandb_run)
        return 0

    def _plan(self, model: Decoder, data: PreparedData, data_module: DocumentDataModule) -> Plan:
        config = self.config
        batch = next(iter(data_module.train_dataloader()))
        return Plan(
            config=config,
            cost=model_cost(
                config.model,
                data.tokenizer.vocabulary_size,
                config.data.sequence_length,
                BYTES_PER_ELEMENT[config.precision],
            ),
            data=data,
            device=self.device,
            calibration=calibrate(model, batch, config.precision, self.device),
            budget=self.budget,
            run_dir=self.folder.path,
        )

    def _start_wandb(self, facts: dict[str, Any]) -> WandbRun | None:
        if self.config.logger.kind != "wandb":
            return None
        sweep = self.invocation.sweep_dir
        group = sweep.name if sweep is not None else None
        run = WandbRun(self.config, self.folder.path, group, self.start.wandb_id, facts)
        self.folder.update_record(wandb_id=run.id)
        return run

    def _finish_wandb(self, run: WandbRun | None) -> None:
        if run is not None:
            run.finish()

    def _fit(
        self,
        module: LanguageModelModule,
        data: PreparedData,
        data_module: DocumentDataModule,
        plan: Plan,
        wandb_run: WandbRun | None,
    ) -> Stopping:
        config = self.config
        log = MetricsLog(self.folder.metrics)
        interval = self._validation_interval(plan)
        flops_per_pair = 4 * config.model.heads * config.model.head_dim
        metrics = MetricsWriter(
            log,
            config.trainer.log_every_n_steps,
            plan.cost,
            flops_per_pair,
            dense_bf16_peak(device_name(self.device)),
        )
        stopping = Stopping(config.trainer.max_time, self.started)
        writer = CheckpointWriter(
            self.folder.checkpoints,
            config.checkpoint.every_n_steps,
            validates_after=lambda step: isinstance(interval, int) and step % interval == 0,
            save_model=lambda: self._save_model(module, data),
        )
        trainer = pl.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision=config.precision,
            accumulate_grad_batches=config.trainer.accumulate_batches,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            val_check_interval=(
                interval * config.trainer.accumulate_batches if isinstance(interval, int) else interval
            ),
            num_sanity_val_steps=0,
            logger=wandb_run.logger if wandb_run is not None else False,
            # Stopping comes first: the others act on the decision to stop.
            callbacks=[
                stopping,
                metrics,
                writer,
                ProgressDisplay(metrics, self.console, config.trainer.progress_bar),
            ],
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        checkpoint = self.start.checkpoint
        if checkpoint is not None:
            saved = AtomicCheckpointIO().load_checkpoint(checkpoint)
            _check_shapes(module, saved["state_dict"], checkpoint)
            step = saved["windowlm"]["batches_trained"] // config.trainer.accumulate_batches
            if self.start.continues:
                log.cut_back(step)
            self.console.print(f"going on from step {step:,} of {checkpoint}", soft_wrap=True)
        elif self.start.continues:
            log.cut_back(0)
        trainer.fit(module, datamodule=data_module, ckpt_path=checkpoint)
        return stopping

    def _validation_interval(self, plan: Plan) -> int | timedelta:
        """Steps between validations, or time where the budget is one."""
        given = self.config.trainer.validate_every_n_steps
        if given is not None:
            return given
        affordable = 3 * VALIDATION_SHARE * plan.steps * plan.tokens_per_step / plan.validation_tokens
        validations = min(max(int(affordable), 1), MOST_VALIDATIONS)
        if self.budget.seconds is not None:
            return timedelta(seconds=self.budget.seconds / validations)
        return math.ceil(plan.steps / validations)

    def _save_model(self, module: LanguageModelModule, data: PreparedData) -> None:
        config = self.config
        save_bundle(
            self.folder.model,
            module.model.state_dict(),
            {
                "format": 1,
                "model": _plain(config.model),
                "vocabulary_size": data.tokenizer.vocabulary_size,
                "sequence_length": config.data.sequence_length,
                "source_identity": data.source_identity,
                "tokenizer_identity": data.tokenizer.identity,
                "data": _plain(config.data),
                "tokenizer": _plain(config.tokenizer),
                "training": {
                    "precision": config.precision,
                    "tokens_trained": module.spent().tokens,
                    "steps_trained": module.spent().steps,
                },
            },
            data.tokenizer,
        )

    def _scored_split(self, data: PreparedData) -> Any:
        return data.test if self.config.evaluation.split == "test" else data.validation

    def _evaluate(
        self, module: LanguageModelModule, data: PreparedData, wandb_run: WandbRun | None
    ) -> LengthResult:
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
        result, _ = evaluate_model(
            module.model.to(self.device),
            self._scored_split(data),
            data.tokenizer.token_bytes_V,
            config.evaluation,
            facts,
            self.folder.evaluation,
        )
        if wandb_run is not None:
            wandb_run.log_length(result, self.folder.evaluation / "length.png")
        return result

    def _report(
        self,
        module: LanguageModelModule,
        data_module: DocumentDataModule,
        result: LengthResult,
        wandb_run: WandbRun | None,
    ) -> None:
        console, folder = self.console, self.folder
        console.print()
        console.print(length_table(result))
        compressed = compressed_bits_per_byte(data_module.validation_bytes())
        console.print(
            f"validation: {module.validation_bits_per_byte:.3f} bits per byte "
            f"(gzip -9 {compressed['gzip']:.3f}, xz -9 {compressed['xz']:.3f} on the same bytes); "
            f"{module.spent().tokens:,} tokens in {module.seconds_trained:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
        console.print(f"\n[bold]{folder.path}[/bold]", soft_wrap=True, highlight=False)
        for name, meaning in folder.contents():
            console.print(f"  {name:<14} {meaning}", highlight=False, soft_wrap=True)
        console.print("\n[bold]next[/bold]")
        for command in self._next_commands(wandb_run):
            console.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)

    def _next_commands(self, wandb_run: WandbRun | None) -> list[str]:
        window = self.config.model.window
        smaller = max(1, window // 4) if isinstance(window, int) else 64
        commands = [
            f"python train.py model.window={smaller}",
            f"python scripts/evaluate.py checkpoint={self.folder.path} data.path=FILE_OR_FOLDER",
            "python train.py data.path=FILE_OR_FOLDER",
        ]
        sync = wandb_run.sync_command() if wandb_run is not None else None
        return commands + ([sync] if sync else [])


def _plain(config: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)


def _device(config: TrainConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.trainer.device == "cuda" and not available:
        raise ConfigError(
            "trainer.device=cuda: this machine shows no CUDA GPU; allowed here: auto, cpu",
            key="trainer.device",
            correction="trainer.device=cpu",
        )
    device = torch.device("cuda" if available and config.trainer.device != "cpu" else "cpu")
    if config.precision == "16-mixed" and device.type == "cpu":
        raise ConfigError(
            "precision=16-mixed: float16 training needs a GPU and this run is on a CPU; allowed there: "
            "32-true, bf16-mixed, bf16-true",
            key="precision",
            correction="precision=bf16-mixed",
        )
    return device


def _check_shapes(module: LanguageModelModule, saved: dict[str, torch.Tensor], path: Path) -> None:
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    other = {name: tuple(value.shape) for name, value in saved.items()}
    wrong = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"resume: {path} holds another model: {name} is {other.get(name)} there and {own.get(name)} "
            "here; give the model settings of that run",
            key="resume",
        )


def _quiet_lightning() -> None:
    """Keep advice that does not apply, and advertisements, off the run's screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    # The plan names the backend and the reason.
    logging.getLogger("windowlm.attention").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*LeafSpec.*", ".*`max_epochs`.*"):
        warnings.filterwarnings("ignore", message=message)
