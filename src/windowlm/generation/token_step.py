"""The logits after one more token of each row, compiled; a GPU replays it as one graph.

A model of some hundred million parameters reads its weights in a tenth of the time that the host needs to
launch the kernels of its layers one by one.

Shapes: B batch, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from windowlm.attention.kv_cache import KVCache
from windowlm.attention.step_cache import StepCache
from windowlm.model.decoder import Decoder

# A capacity of these many slots or a multiple: each other number would be compiled anew.
SLOTS_MULTIPLE = 1024
# Of one process, by batch, capacity and dtype.
MOST_COMPILED = 64
WARM_UPS = 3
LogitsAfter = Callable[[Decoder, Tensor, StepCache], Tensor]


def capacity_of_steps(tokens: int) -> int:
    """The capacity of a cache for so many tokens that a `TokenStep` shall take over."""
    return -(-tokens // SLOTS_MULTIPLE) * SLOTS_MULTIPLE


def holds_sinks(cache: KVCache) -> bool:
    """Whether a `TokenStep` may take over: from then on no token is a sink of its row."""
    return cache.tokens >= max(1, *(slots.sinks for slots in cache.slots.values()))


class TokenStep:
    """Takes one token a row and gives the logits of the next; the logits are overwritten by the next call.

    Args:
        model: in evaluation mode, on the backend "auto".
        cache: what it has read so far, with a capacity; it is spent.
        batch: B.
        compiled: False for the slow twin.

    Raises:
        ValueError: as ``StepCache``.
    """

    def __init__(self, model: Decoder, cache: KVCache, batch: int, *, compiled: bool = True) -> None:
        self.model, self.cache = model, StepCache(cache)
        self._tokens_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=self.cache.place.column.device)
        self._logits_after: LogitsAfter = logits_after
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_BV: Tensor
        if compiled:
            self._compile()

    @torch.no_grad()
    def __call__(self, tokens_B: Tensor) -> Tensor:
        """Logits ``[B, V]`` after these tokens.

        Raises:
            ValueError: the cache has no room for them.
        """
        self.cache.take_room()
        self._tokens_B1.copy_(tokens_B[:, None])
        if self._graph is not None:
            self._graph.replay()
            return self._logits_BV
        return self._step()

    def _step(self) -> Tensor:
        logits_BV = self._logits_after(self.model, self._tokens_B1, self.cache)
        self.cache.place.step()
        return logits_BV

    @torch.no_grad()
    def _compile(self) -> None:
        """Compile the step, on a GPU record it, and put back what that moved on.

        The slot that it wrote meanwhile is the one that the next token writes.
        """
        kept = [(state, state.clone()) for state in self.cache.moving_state()]
        on_gpu = self._tokens_B1.is_cuda
        # Products with one row become sums, kernels that are fused with what stands around them.
        given: dict[str, Any] = {"options": {"coordinate_descent_tuning": True}} if on_gpu else {}
        self._logits_after = torch.compile(logits_after, fullgraph=True, dynamic=False, **given)
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED, fail_on_recompile_limit_hit=True):
            if on_gpu:
                self._record()
            else:
                self._step()
        for state, before in kept:
            state.copy_(before)

    def _record(self) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits_BV = self._step()
        self._graph = graph


def logits_after(model: Decoder, tokens_B1: Tensor, cache: StepCache) -> Tensor:
    """Logits ``[B, V]`` behind one token of each row; `cache.place.step` is up to the caller."""
    logits_BV: Tensor = model.head(model.hidden(tokens_B1, cache=cache)[:, -1])
    return logits_BV
