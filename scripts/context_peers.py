"""How others attend over a sequence that is cut over processes, each in the place of the halo exchange.

A peer is a `Visibility` of one process's part, as `windowlm.parallel.sequence_shard` makes one: the same
model calls it. It raises `UnsupportedError` where it cannot compute the layer. Those in `FULL` see all
earlier tokens: the price of having no window. Bytes of keys, values, queries and outputs that a forward pass
sends are counted in the group.

Shapes: B batch, T tokens of the whole sequence, L own tokens, H query heads, K key-value heads, D head
dimension, F features, N processes.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_peers import UnsupportedError
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from windowlm.attention.window import Finish, Visibility, reach, unfinished
from windowlm.parallel.context_group import ContextGroup


@dataclass(frozen=True, eq=False)
class Peer(Visibility, ABC):
    """One process's part of a sequence without documents, padding or sinks.

    Attributes:
        group: the processes that share the sequence.
    """

    group: ContextGroup | None = None

    @classmethod
    def of(cls, group: ContextGroup, window: int, own_L: Tensor) -> Self:
        """The peer for layers of one window; `own_L` are the places of the own tokens in the sequence."""
        return cls(window=window, positions=own_L[None], group=group)

    @staticmethod
    def own_tokens(group: ContextGroup, tokens: int, device: torch.device) -> Tensor:
        """Places of the process's tokens in the sequence, [L]."""
        return group.shard(torch.arange(tokens, device=device)[None])[0]

    def in_one_graph(self, *, computed_again: bool) -> bool:
        """As its authors publish it: exchanges stand between graphs."""
        return False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self,
        attention: Callable[..., Tensor],
        query_BTHD: Tensor,
        key_BTKD: Tensor,
        value_BTKD: Tensor,
        *,
        sent: None = None,
        finish: Finish = unfinished,
        finish_with: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention of the own queries, and what `finish` makes of it."""
        assert self.group is not None
        output = self.exchange(self.group, attention, query_BTHD, key_BTKD, value_BTKD, **options)
        return finish(output, finish_with)

    @abstractmethod
    def exchange(
        self,
        group: ContextGroup,
        attention: Callable[..., Tensor],
        query_BLHD: Tensor,
        key_BLKD: Tensor,
        value_BLKD: Tensor,
        **options: Any,
    ) -> Tensor:
        """What `attend` does, which the compiler leaves alone, as it leaves the halo exchange."""


class Gather(Peer):
    """All keys and values of all processes, then our kernel over those that the window reaches."""

    def exchange(
        self,
        group: ContextGroup,
        attention: Callable[..., Tensor],
        query_BLHD: Tensor,
        key_BLKD: Tensor,
        value_BLKD: Tensor,
        **options: Any,
    ) -> Tensor:
        """Attention of the own queries."""
        assert self.window is not None
        end = (group.rank + 1) * query_BLHD.shape[1]
        first = max(end - query_BLHD.shape[1] - reach(self.window, causal=True)[0], 0)
        key_BTKD, value_BTKD = gathered(group, key_BLKD, value_BLKD)
        reached = Visibility.build(window=self.window)
        return attention(query_BLHD, key_BTKD[:, first:end], value_BTKD[:, first:end], reached, **options)


class Heads(Peer):
    """All tokens of some heads by an exchange of all with all, and back (Jacobs et al. 2023, Ulysses,
    arXiv:2309.14509).
    """

    def exchange(
        self,
        group: ContextGroup,
        attention: Callable[..., Tensor],
        query_BLHD: Tensor,
        key_BLKD: Tensor,
        value_BLKD: Tensor,
        **options: Any,
    ) -> Tensor:
        """Attention of the own queries."""
        count, kv_heads = group.size, key_BLKD.shape[2]
        if kv_heads % count:
            raise UnsupportedError(f"{kv_heads} key-value heads cannot be dealt out to {count} processes")
        own = [
            rearrange(heads, "b l (n h) d -> n b l h d", n=count)
            for heads in (query_BLHD, key_BLKD, value_BLKD)
        ]
        dealt = rearrange(_Deal.apply(group, torch.cat(own, 3)), "n b l h d -> b (n l) h d")
        query, key, value = dealt.split([heads.shape[3] for heads in own], 2)
        mixed = attention(query, key, value, Visibility.build(window=self.window), **options)
        back = _Deal.apply(group, rearrange(mixed, "b (n l) h d -> n b l h d", n=count))
        joined: Tensor = rearrange(back, "n b l h d -> b l (n h) d")
        return joined


class TorchFlex(Peer):
    """torch's context parallelism of FlexAttention: all keys and values gathered, then a mask of blocks."""

    def exchange(
        self,
        group: ContextGroup,
        attention: Callable[..., Tensor],
        query_BLHD: Tensor,
        key_BLKD: Tensor,
        value_BLKD: Tensor,
        **options: Any,
    ) -> Tensor:
        """Attention of the own queries."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        assert self.window is not None
        length, window = query_BLHD.shape[1], self.window
        first, on_gpu = group.rank * length, query_BLHD.is_cuda
        if not on_gpu and query_BLHD.requires_grad:
            raise UnsupportedError("torch has its backward pass for a GPU alone")

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = query + first - key
            return (distance >= 0) & (distance < window)

        blocks = self.once(
            "blocks",
            lambda: create_block_mask(
                visible, None, None, length, length * group.size, query_BLHD.device.type, _compile=on_gpu
            ),
        )
        kernel: Any = flex_attention
        if on_gpu:
            kernel = self.once("kernel", lambda: torch.compile(flex_attention, dynamic=False))
        keys = gathered(group, key_BLKD, value_BLKD)
        mixed_BHLD: Tensor = kernel(
            *(heads.transpose(1, 2) for heads in (query_BLHD, *keys)), block_mask=blocks, enable_gqa=True
        )
        return mixed_BHLD.transpose(1, 2)


class TorchRing(Peer):
    """torch's `context_parallel`: keys and values of all pass by, full causal attention in equal shares.

    Keys and values are repeated for all query heads, as its users do.
    """

    _entered = contextlib.ExitStack()

    @staticmethod
    def own_tokens(group: ContextGroup, tokens: int, device: torch.device) -> Tensor:
        """The places that torch's balance of work gives the process; from now on torch attends so."""
        if device.type != "cuda":
            raise UnsupportedError("torch has it for kernels of a GPU")
        from torch.distributed.tensor.experimental import context_parallel

        own_L = torch.arange(tokens, device=device)
        assert group.processes is not None
        mesh = DeviceMesh.from_group(group.processes, device.type)
        TorchRing._entered.enter_context(
            context_parallel(mesh, buffers=[own_L], buffer_seq_dims=[0], no_restore_buffers={own_L})
        )
        return own_L

    def exchange(
        self,
        group: ContextGroup,
        attention: Callable[..., Tensor],
        query_BLHD: Tensor,
        key_BLKD: Tensor,
        value_BLKD: Tensor,
        **options: Any,
    ) -> Tensor:
        """Attention of the own queries."""
        repeats = query_BLHD.shape[2] // key_BLKD.shape[2]
        keys = [heads.repeat_interleave(repeats, 2).transpose(1, 2) for heads in (key_BLKD, value_BLKD)]
        group.bytes_sent += sum(heads.nbytes for heads in keys) * (group.size - 1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            mixed_BHLD = F.scaled_dot_product_attention(query_BLHD.transpose(1, 2), *keys, is_causal=True)
        return mixed_BHLD.transpose(1, 2)


PEERS: dict[str, type[Peer]] = {
    "gather": Gather,
    "all-to-all over heads": Heads,
    "torch flex": TorchFlex,
    "torch ring": TorchRing,
}
FULL = {"torch ring"}
# Names of torch 2.13 and of before.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gathered(group: ContextGroup, *tensors_BLF: Tensor) -> tuple[Tensor, ...]:
    """The tensors of all processes, [B, T, ...] from [B, L, ...] each, in one exchange."""
    widths = [tensor[0, 0].numel() for tensor in tensors_BLF]
    own_LBF = torch.cat([tensor.flatten(2) for tensor in tensors_BLF], 2).transpose(0, 1).contiguous()
    parts = _Gather.apply(group, own_LBF).transpose(0, 1).split(widths, 2)
    return tuple(part.unflatten(2, tensor.shape[2:]) for part, tensor in zip(parts, tensors_BLF, strict=True))


class _Gather(torch.autograd.Function):
    """Parts of all processes, one behind the other; backward each gets the sum of its part's gradients."""

    @staticmethod
    def forward(ctx: Any, group: ContextGroup, own_LBF: Tensor) -> Tensor:
        ctx.group = group
        whole = own_LBF.new_empty((group.size * own_LBF.shape[0], *own_LBF.shape[1:]))
        ALL_GATHER(whole, own_LBF, group=group.processes)
        group.bytes_sent += own_LBF.nbytes * (group.size - 1)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TBF: Tensor) -> tuple[None, Tensor]:
        length = gradient_TBF.shape[0] // ctx.group.size
        own = gradient_TBF.new_empty((length, *gradient_TBF.shape[1:]))
        REDUCE_SCATTER(own, gradient_TBF.contiguous(), group=ctx.group.processes)
        return None, own


class _Deal(torch.autograd.Function):
    """The first dimension's parts to their processes, and theirs in their places; backward the same."""

    @staticmethod
    def forward(ctx: Any, group: ContextGroup, parts_NF: Tensor) -> Tensor:
        ctx.group = group
        group.bytes_sent += parts_NF.nbytes // group.size * (group.size - 1)
        return _dealt(group, parts_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NF: Tensor) -> tuple[None, Tensor]:
        return None, _dealt(ctx.group, gradient_NF)


def _dealt(group: ContextGroup, parts_NF: Tensor) -> Tensor:
    parts_NF = parts_NF.contiguous()
    received = torch.empty_like(parts_NF)
    dist.all_to_all_single(received, parts_NF, group=group.processes)
    return received
