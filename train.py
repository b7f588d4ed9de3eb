"""Train a windowed language model and measure its perplexity against context length."""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C within the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if __name__ == "__main__":
    # There is nothing to save within them, and the status is that of a run that can go on.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda *_: os._exit(os.EX_TEMPFAIL))

from windowlm.command_line import Command, Invocation, main
from windowlm.config import TrainConfig
from windowlm.training.initial_model import adopt_initial_model
from windowlm.training.run_folder import check_run_folder, status_of_run
from windowlm.training.shares import check_shares


def train(config: TrainConfig, invocation: Invocation) -> int:
    """Import torch and the rest only once the settings are known to be right."""
    from windowlm.training.run import train

    return train(config, invocation)


if __name__ == "__main__":
    command = Command(
        name="train",
        config_type=TrainConfig,
        task=train,
        check=check_run_folder,
        adopt=adopt_initial_model,
        fixes_run_dir=True,
        status_of=status_of_run,
        devices="trainer.devices",
        check_shares=check_shares,
        saved="resume=auto goes on from the last checkpoint, or starts anew where none was saved",
    )
    status = main(command, Path(__file__), Path(__file__).parent / "conf")
    # SLURM's word that time is short would end the interpreter's own end.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
