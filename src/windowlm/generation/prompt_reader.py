"""Reads prompts into a cache, chunk by chunk; compiled, as one graph from tokens to hidden states.

Shapes: B batch, T tokens of a chunk, D model width.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from windowlm.attention.chunk_cache import ChunkCache
from windowlm.attention.kv_cache import KVCache
from windowlm.errors import UserError
from windowlm.model.compiled_for_windows import compiled_for_windows
from windowlm.model.decoder import Decoder

# Of models, batches and lengths that differ in a way that no symbol can stand for.
MOST_GRAPHS = 32


class PromptReader:
    """Gives the hidden states of the last token of each row.

    Args:
        model: in evaluation mode.
        compiled: compile what reads a chunk, for any length once there were two.

    Attributes:
        compile_seconds: of all compiling so far.
    """

    def __init__(self, model: Decoder, *, compiled: bool) -> None:
        self._model, self._compiled = model, compiled
        self.compile_seconds = 0.0

    @torch.no_grad()
    def __call__(self, tokens_BT: Tensor, documents_BT: Tensor | None, cache: KVCache) -> Tensor:
        """Read the next tokens of each row, [B, T]; returns [B, D].

        Raises:
            UserError: too many graphs were compiled, or there is no compiler.
            ValueError: as `KVCache.advance`.
        """
        batch, tokens = tokens_BT.shape
        # Behind the first chunk, keys of documents stand in slots in an order that no kernel is made for.
        in_order = documents_BT is None or cache.tokens == 0
        if not self._compiled or tokens == 1 or not in_order:
            return _last_hidden(self._model, tokens_BT, cache, documents_BT)
        dtype = next(self._model.parameters()).dtype
        tokens_BT = tokens_BT.contiguous()  # other steps in memory would be compiled anew
        chunk = ChunkCache(cache, batch, tokens, tokens_BT.device, documents_BT, dtype)
        hidden_BD = self._read(tokens_BT, chunk)
        chunk.write()
        return hidden_BD

    def _read(self, tokens_BT: Tensor, chunk: ChunkCache) -> Tensor:
        for tensor in chunk.tensors_that_vary(tokens_BT):
            torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))
        read = compiled_for_windows(_last_hidden, tuple(self._model.layer_windows))
        graphs, started = _graphs(), time.perf_counter()
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS), needs_compiler():
                hidden_BD: Tensor = read(self._model, tokens_BT, chunk)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            raise UserError(
                f"compile=true: these prompts take more than {MOST_GRAPHS} graphs to read; try compile=false"
            ) from None
        if _graphs() != graphs:
            self.compile_seconds += time.perf_counter() - started
        return hidden_BD


@contextmanager
def needs_compiler() -> Iterator[None]:
    """Within it the lack of a C++ compiler is the user's mistake."""
    try:
        yield
    except Exception as error:
        # torch wraps it, and what knows it by its type takes seconds to import.
        lacking = getattr(error, "inner_exception", error)
        if type(lacking).__name__ != "InvalidCxxCompiler":
            raise
        raise UserError(
            "compile=true: torch finds no C++ compiler on this machine; try compile=false"
        ) from None


def _last_hidden(
    model: Decoder, tokens_BT: Tensor, cache: KVCache | ChunkCache, documents_BT: Tensor | None = None
) -> Tensor:
    return model.hidden(tokens_BT, documents_BT, cache=cache)[:, -1]


def _graphs() -> int:
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count
