"""Matrix products of the blocks in float8, by torchao, an optional package (pytorch/ao).

Inputs, weights and gradients are scaled as whole tensors to the range of float8 at every product
(Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433). Embedding and head stay in
bfloat16.
"""

import copy
from importlib.util import find_spec
from itertools import chain

import torch
from torch import nn

from windowlm.attention.dispatch import compute_capability
from windowlm.config import ConfigError, TrainConfig
from windowlm.model.decoder import Decoder

LEAST_CAPABILITY = (8, 9)
MULTIPLE = 16  # of both sides of a matrix, as the hardware's products ask


def check_float8(config: TrainConfig, device: torch.device) -> None:
    """Raise unless the run can train in float8, where its settings ask for that.

    Raises:
        ConfigError: a device without float8 products, torchao missing, or no matrix that they could multiply.
    """
    if config.precision != "fp8":
        return
    capability = compute_capability(device)
    reason = None
    if capability is None or capability < LEAST_CAPABILITY:
        reason = "float8 products need a GPU of compute capability 8.9 or later (Ada, Hopper or newer)"
    elif find_spec("torchao") is None:
        reason = "it needs the package torchao, which is not installed (pip install 'windowlm[fp8]')"
    elif config.model.dim % MULTIPLE:
        reason = f"model.dim={config.model.dim} is no multiple of {MULTIPLE}, as float8 products need"
    if reason is not None:
        raise ConfigError(f"precision=fp8: {reason}", key="precision", correction="precision=bf16-true")


def float8_view(model: Decoder) -> Decoder:
    """The same model, on the same parameters and buffers, whose blocks multiply in float8.

    On a CPU, for tests, the rounding is that of float8 and the products are not.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    view: Decoder = copy.deepcopy(model, shared)
    convert_to_float8_training(
        view.blocks,
        module_filter_fn=_divides,
        config=Float8LinearConfig(emulate=model.head.weight.device.type == "cpu"),
    )
    return view


def _divides(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not any(side % MULTIPLE for side in module.weight.shape)
