"""The screen after a run: its evaluation, what its folder holds, and what to try next."""

import shlex

from rich.console import Console

from windowlm.command_line import Invocation
from windowlm.config import TrainConfig
from windowlm.data.compression import compressed_bits_per_byte
from windowlm.data.datamodule import DocumentDataModule
from windowlm.evaluation.report import length_table
from windowlm.evaluation.result import LengthResult
from windowlm.parallel.launcher import starter
from windowlm.training.given_settings import given_settings
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.run_folder import RunFolder


def print_closing_screen(
    console: Console,
    config: TrainConfig,
    folder: RunFolder,
    invocation: Invocation,
    module: LanguageModelModule,
    data_module: DocumentDataModule,
    result: LengthResult,
    sync_command: str | None,
) -> None:
    """Print it.

    Args:
        console: where to.
        config: settings of the run.
        folder: its folder.
        invocation: how it was started.
        module: after the last step.
        data_module: its validation bytes are compressed, to compare with.
        result: its evaluation.
        sync_command: uploads its offline W&B run; None where there is none.
    """
    console.print()
    console.print(length_table(result))
    compressed = compressed_bits_per_byte(data_module.validation_bytes())
    console.out(
        f"validation: {module.validation_bits_per_byte:.3f} bits per byte "
        f"(gzip -9 {compressed['gzip']:.3f}, xz -9 {compressed['xz']:.3f} on the same text, joined); "
        f"{module.spent().tokens:,} tokens in {module.seconds_trained:.0f} s",
        highlight=False,
    )
    console.out(f"\n{folder.path}", style="bold", highlight=False)
    for name, meaning in folder.contents():
        console.out(f"  {name:<14} {meaning}", highlight=False)
    console.out("\nnext", style="bold", highlight=False)
    for command in (*next_commands(config, folder, invocation), sync_command):
        if command is not None:
            console.out(f"  {command}", highlight=False)


def next_commands(config: TrainConfig, folder: RunFolder, invocation: Invocation) -> list[str]:
    """Three commands to try, as a shell takes them: after a single run the first is this one, changed."""
    if invocation.sweep_dir is not None:
        first = ["python", "scripts/compare_runs.py", str(folder.path.parent)]
    else:
        window = config.model.window
        smaller = max(1, window // 4) if isinstance(window, int) else 64
        given = given_settings(invocation.command)
        own = [given[key] for key in given if key not in ("run_dir", "resume", "model.window")]
        first = [*starter().split(), "train.py", *own, f"model.window={smaller}"]
    return [
        shlex.join(words)
        for words in (
            first,
            ["python", "scripts/evaluate.py", f"checkpoint={folder.path}", "data.path=FILE_OR_FOLDER"],
            ["python", "train.py", "data.path=FILE_OR_FOLDER"],
        )
    ]
