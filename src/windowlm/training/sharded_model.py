"""A model of which each process holds a part (FSDP2), saved and loaded as if one process had all of it.

Zhao et al. 2023, PyTorch FSDP, arXiv:2304.11277; torch's `fully_shard` is its second version.

Shapes: M matrices of one shape, R rows, P rows of one process, C columns.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from windowlm.model.decoder import Decoder
from windowlm.parallel.place import own_place


def shard_model(model: Decoder, mesh: DeviceMesh, blocks_at_once: int = 1) -> None:
    """Let each process of the mesh keep a part of every parameter; so many blocks are gathered at once."""
    blocks = list(model.blocks)
    for start in range(0, len(blocks), blocks_at_once):
        fully_shard(blocks[start : start + blocks_at_once], mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    # The head is applied to the states outside of the model's own forward.
    register_fsdp_forward_method(model, "hidden")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; one that is no part of anything as it is."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def gathered_rows(parts_MPC: Tensor, like: Tensor) -> Tensor:
    """All rows of matrices of which this process has those given; every process must ask.

    Args:
        parts_MPC: of all M matrices.
        like: one of the matrices; where it is whole, so are the parts.

    Returns:
        [M, R, C].
    """
    if not isinstance(like, DTensor):
        return parts_MPC
    assert like.placements == (Shard(0),)
    rows, columns = like.shape
    shared = DTensor.from_local(
        parts_MPC,
        like.device_mesh,
        (Shard(1),),
        run_check=False,
        shape=torch.Size((len(parts_MPC), rows, columns)),
        stride=(rows * columns, columns, 1),
    )
    return shared.full_tensor()


def own_rows(matrices_MRC: Tensor, like: Tensor) -> Tensor:
    """Of matrices that every process has, the rows that this one keeps of one like them, [M, P, C]."""
    if not isinstance(like, DTensor):
        return matrices_MRC
    same = DTensor.from_local(matrices_MRC, like.device_mesh, (Replicate(),), run_check=False)
    return local(same.redistribute(placements=(Shard(1),)))


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all parts, on the CPU, and nothing but with the leader, who writes it; every process of
    the run must ask for it.
    """
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if own_place().rank != 0:
        # The processes of a machine share its memory.
        return torch.empty(0)
    return full.detach().cpu()


def whole_state(state: Any) -> Any:
    """A state dict with the tensors of all parts, see `whole`."""
    return _each_tensor(state, whole)


def _each_tensor(state: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, Mapping):
        return {key: _each_tensor(value, change) for key, value in state.items()}
    if isinstance(state, list):
        return [_each_tensor(value, change) for value in state]
    return state


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's, with checkpoints that one process reads and writes alike.

    Lightning's own number the optimizer's state by the model's parameters; an optimizer with several groups
    numbers it by these.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizer's state to `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights, see `whole`."""
        assert self.lightning_module is not None
        state: dict[str, Any] = whole_state(self.lightning_module.state_dict())
        return state

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole state, see `whole`."""
        state: dict[str, Any] = whole_state(optimizer.state_dict())
        return state

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it; each process takes its parts."""
        loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path)
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take the own parts of the weights."""
        assert self.lightning_module is not None
        for name, parameter in self.lightning_module.named_parameters():
            with torch.no_grad():
                parameter.copy_(_like(checkpoint["state_dict"][name], parameter))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the own parts of the state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: _each_tensor(of_one, partial(_like, parameter=parameters[number]))
                for number, of_one in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor cut as the parameter is, where it has one number for each of its."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    moved = tensor.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
