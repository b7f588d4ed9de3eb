"""One more token of each row and what follows from its logits; compiled, and replayed by a GPU as one graph.

A model of some hundred million parameters reads its weights in a tenth of the time that the host needs to
launch the kernels of its layers one by one.

Shapes: B batch, V vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from windowlm.attention.kv_cache import KVCache
from windowlm.attention.step_cache import StepCache
from windowlm.generation.row_products import compile_row_products
from windowlm.generation.split_products import compile_split_products
from windowlm.model.decoder import Block, Decoder

# A capacity of these many slots or a multiple: each other number would be compiled anew.
SLOTS_MULTIPLE = 1024
# Of one process, by batch, capacity and dtype.
MOST_COMPILED = 64
WARM_UPS = 3
Outcome = TypeVar("Outcome")
OutcomeOut = TypeVar("OutcomeOut", covariant=True)


class Finish(Protocol[OutcomeOut]):
    """What is made of the logits of a step, in tensors of fixed shape."""

    def __call__(self, logits_BV: Tensor) -> OutcomeOut:
        """The outcome of logits [B, V]."""

    def moving_state(self) -> Iterator[Tensor]:
        """What a call changes."""


def capacity_of_steps(tokens: int) -> int:
    """The capacity of a cache for so many tokens that a `TokenStep` shall take over."""
    return -(-tokens // SLOTS_MULTIPLE) * SLOTS_MULTIPLE


def holds_sinks(cache: KVCache) -> bool:
    """Whether a `TokenStep` may take over: from then on no token is a sink of its row."""
    return cache.tokens >= max(1, *(slots.sinks for slots in cache.slots.values()))


def can_be_recorded(model: Decoder) -> bool:
    """Whether a GPU may replay the model's step: with the backend "auto", and without hooks, which no graph
    calls.
    """
    if not next(model.parameters()).is_cuda or model.config.backend != "auto":
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class TokenStep(Generic[Outcome]):
    """Takes one token a row and gives what follows from its logits, which the next call overwrites.

    Args:
        model: in evaluation mode, on the backend "auto"; `joined_view` of one takes fewer products.
        cache: what it has read so far, with a capacity; it is spent.
        batch: B.
        finish: what follows; compiled and replayed with the model.
        compiled: compile it, which takes a minute or two.
        recorded: on a GPU, replay it as one graph; False, beside compiled=False, for the slow twin.

    Raises:
        ValueError: as ``StepCache``.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        batch: int,
        finish: Finish[Outcome],
        *,
        compiled: bool = True,
        recorded: bool = True,
    ) -> None:
        self.model, self.cache, self.finish = model, StepCache(cache), finish
        self._tokens_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=self.cache.place.column.device)
        self._after: Any = outcome_after
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outcome: Outcome
        if compiled:
            self._compile()
        elif recorded and self._tokens_B1.is_cuda:
            self._record()

    @torch.no_grad()
    def __call__(self, tokens_B: Tensor) -> Outcome:
        """The outcome behind these tokens.

        Raises:
            ValueError: the cache has no room for them.
        """
        self.cache.take_room()
        self._tokens_B1.copy_(tokens_B[:, None])
        if self._graph is not None:
            self._graph.replay()
            return self._outcome
        return self._step()

    def _step(self) -> Outcome:
        outcome: Outcome = self._after(self.model, self._tokens_B1, self.cache, self.finish)
        self.cache.place.step()
        return outcome

    @torch.no_grad()
    def _compile(self) -> None:
        on_gpu = self._tokens_B1.is_cuda
        # torch compiles anew for each backend that is another object.
        backend = compile_split_products if on_gpu else compile_row_products
        self._after = torch.compile(outcome_after, fullgraph=True, dynamic=False, backend=backend)
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED, fail_on_recompile_limit_hit=True):
            if on_gpu:
                self._record()
            else:
                with self._put_back():
                    self._step()

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        """Undo what a step moves on. The slot that it writes is the one that the next token writes; a second
        step would write one that the next token sees.
        """
        moving = chain(self.cache.moving_state(), self.finish.moving_state())
        kept = [(state, state.clone()) for state in moving]
        yield
        for state, before in kept:
            state.copy_(before)

    @torch.no_grad()
    def _record(self) -> None:
        with torch.cuda.device(self._tokens_B1.device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    with self._put_back():
                        self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those of a data loader, may allocate meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outcome = self._step()
        self._graph = graph


def joined_view(model: Decoder) -> Decoder:
    """The same model on the same parameters, whose products that share an input are one.

    Weights that share an input come to lie beside each other, as parts of one tensor.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    view: Decoder = copy.deepcopy(model, shared)
    for block in view.blocks:
        assert isinstance(block, Block)
        block.attention.join_projections()
        block.feed_forward.join_projections()
    return view


def outcome_after(model: Decoder, tokens_B1: Tensor, cache: StepCache, finish: Finish[Outcome]) -> Outcome:
    """What follows from the logits behind one token of each row; `cache.place.step` is up to the caller."""
    return finish(model.head(model.hidden(tokens_B1, cache=cache)[:, -1]))
