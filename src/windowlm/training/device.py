"""The device of a run."""

import os

import torch

from windowlm.config import ConfigError, TrainConfig
from windowlm.errors import UserError

# Of a parameter in float32: itself, and in training its gradient and the optimizer's two running means.
BYTES_MADE, BYTES_TRAINED = 4, 16


def choose_device(config: TrainConfig, number: int = 0) -> torch.device:
    """The GPU where there is one and the settings leave it open, otherwise what they say.

    Args:
        config: settings.
        number: which GPU of this machine, where there are that many.

    Raises:
        ConfigError: there is no GPU, and the device or the precision asks for one.
    """
    available = torch.cuda.is_available()
    if config.trainer.device == "cuda" and not available:
        raise ConfigError(
            "trainer.device=cuda: this machine shows no CUDA GPU; allowed here: auto, cpu",
            key="trainer.device",
            correction="trainer.device=cpu",
        )
    device = torch.device("cuda" if available and config.trainer.device != "cpu" else "cpu")
    key = config.float16_key()
    if device.type == "cpu" and key is not None:
        raise ConfigError(
            f"{key}=16-mixed: float16 needs a GPU and this run is on a CPU; allowed there: 32-true, "
            "bf16-mixed, bf16-true",
            key=key,
            correction=f"{key}=bf16-mixed",
        )
    if device.type == "cuda":
        # Lightning takes no device without a number.
        device = torch.device("cuda", min(number, torch.cuda.device_count() - 1))
        if number:
            torch.cuda.set_device(device)
    return device


def check_room(parameters: int, device: torch.device) -> None:
    """Refuse a model that this machine cannot hold before it is made, as the system may kill what asks.

    Raises:
        UserError: saying what it would take.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = parameters * (BYTES_TRAINED if device.type == "cpu" else BYTES_MADE)
    if needed > there:
        raise UserError(
            f"model: not enough memory: {parameters:,} parameters take {needed / 2**30:,.1f} GiB at least, "
            f"and this machine has {there / 2**30:,.1f}; try model=tiny, or a smaller model.dim, "
            "model.feed_forward_dim or model.layers"
        )
