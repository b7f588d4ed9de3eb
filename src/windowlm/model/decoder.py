"""The decoder: embedding, pre-norm blocks of windowed attention and an MLP, output head.

Shape letters: B batch, T sequence, D model width, V vocabulary, E width of all key-value heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from windowlm.attention.chunk_cache import ChunkCache
from windowlm.attention.config import RotaryConfig
from windowlm.attention.kv_cache import KVCache
from windowlm.attention.layers import AnyLayerCache, Heads, SlidingWindowAttention
from windowlm.attention.step_cache import StepCache
from windowlm.attention.window import Visibility, narrowed
from windowlm.model.config import ModelConfig
from windowlm.model.feed_forward import FeedForward
from windowlm.model.head import Head
from windowlm.model.initialization import initialize
from windowlm.model.look_up_table import LookUpTable
from windowlm.model.ngram_embedding import NgramEmbedding

Visibilities = dict[int | None, Visibility]  # by window
AnyCache = KVCache | StepCache | ChunkCache


class Block(nn.Module):
    """One pre-norm residual block: windowed attention, then the feed-forward network."""

    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        sinks: int,
        rotary: RotaryConfig | None,
        value_table: int | None,
    ) -> None:
        super().__init__()
        self.residual_shares = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_residual else None
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.attention = SlidingWindowAttention(
            config.dim,
            heads=config.heads,
            dim_head=config.head_dim,
            window_size=window,
            dropout=config.attention_dropout,
            kv_heads=config.kv_heads,
            qk_norm=config.qk_norm,
            qk_norm_epsilon=config.qk_norm_epsilon,
            qkv_bias=config.qkv_bias,
            rotary=rotary,
            backend=config.backend,
            sinks=sinks,
            learned_sinks=config.learned_sinks,
            gate=config.output_gate,
            logit_cap=config.logit_cap,
            value_embedding=value_table is not None,
            short_convolution=config.short_convolution,
        )
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.feed_forward = FeedForward(config.dim, config.feed_forward_dim, config.activation)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        visibility: Visibility | None,
        value_embedding_BTE: torch.Tensor | None = None,
        embedded_BTD: torch.Tensor | None = None,
        cache: AnyLayerCache | None = None,
        *,
        compute: "BlockComputation | None" = None,
    ) -> torch.Tensor:
        """Map ``[B, T, D]`` to the same shape.

        Args:
            hidden_BTD: the residual stream.
            visibility: what the layer's window shows; None with a cache, which says it itself.
            value_embedding_BTE: value embeddings of the tokens, for the layers that have them.
            embedded_BTD: normalised input of the first layer, for the embedding residual.
            cache: keys and values of the tokens before.
            compute: what computes it in the place of `compute`.
        """
        of_layer = (hidden_BTD, visibility, value_embedding_BTE, embedded_BTD, cache)
        return self.compute(*of_layer) if compute is None else compute(self, *of_layer)

    def compute(
        self,
        hidden_BTD: torch.Tensor,
        visibility: Visibility | None,
        value_embedding_BTE: torch.Tensor | None,
        embedded_BTD: torch.Tensor | None,
        cache: AnyLayerCache | None,
    ) -> torch.Tensor:
        """What `forward` says, without what hooks add to it, such as the gathering of parts of weights."""
        hidden_BTD = self._with_embedding(hidden_BTD, embedded_BTD)
        attended_BTD = self.attention(
            self.attention_norm(hidden_BTD),
            visibility=visibility,
            value_embedding_BTE=value_embedding_BTE,
            cache=cache,
        )
        return self.output_of(hidden_BTD, attended_BTD)

    def heads_of(
        self,
        hidden_BTD: torch.Tensor,
        visibility: Visibility,
        value_embedding_BTE: torch.Tensor | None,
        embedded_BTD: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Heads]:
        """`compute` until attention, for those that compute the rest apart: residual stream and heads."""
        hidden_BTD = self._with_embedding(hidden_BTD, embedded_BTD)
        heads = self.attention.heads_of(
            self.attention_norm(hidden_BTD), visibility=visibility, value_embedding_BTE=value_embedding_BTE
        )
        return hidden_BTD, heads

    def _with_embedding(self, hidden_BTD: torch.Tensor, embedded_BTD: torch.Tensor | None) -> torch.Tensor:
        if self.residual_shares is None:
            return hidden_BTD
        own, embedded = self.residual_shares
        mixed_BTD: torch.Tensor = own * hidden_BTD + embedded * embedded_BTD
        return mixed_BTD

    def output_of(self, hidden_BTD: torch.Tensor, attended_BTD: torch.Tensor) -> torch.Tensor:
        """`compute` behind attention, whose output is given."""
        hidden_BTD = hidden_BTD + attended_BTD
        output_BTD: torch.Tensor = hidden_BTD + self.feed_forward(self.feed_forward_norm(hidden_BTD))
        return output_BTD


BlockComputation = Callable[..., torch.Tensor]  # of a block and its inputs, in their order
BlockInputs = tuple[Visibility | None, torch.Tensor | None, torch.Tensor | None, AnyLayerCache | None]
Run = list[tuple[Block, BlockInputs]]  # blocks one behind the other, and what each gets besides hidden states
# Of all blocks: the residual stream before the first, normalised for the embedding residual, and value
# embeddings by table.
BlocksInputs = tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]


@dataclass(frozen=True)
class Parts:
    """What computes a decoder's parts in their place: graphs, say.

    Attributes:
        inputs: of the decoder and what `Decoder.inputs` gets.
        run: of so many blocks at once, within the hooks of them all.
        norm: of the final norm and the residual stream.
        blocks_at_once: more than one only without checkpointed activations.
    """

    inputs: Callable[..., BlocksInputs]
    run: Callable[[Run, torch.Tensor], torch.Tensor]
    norm: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    blocks_at_once: int = 1


class Decoder(nn.Module):
    """Decoder-only language model (pre-RMSNorm, rotary positions, grouped-query windowed attention).

    Args:
        config: shape of the model.
        vocabulary_size: rows of the embedding and of the head, V.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.layer_windows = config.layer_windows()
        self.embedding = LookUpTable(vocabulary_size, config.dim)
        ngrams = config.ngram_embeddings
        self.ngram_embedding = None if ngrams is None else NgramEmbedding(ngrams, vocabulary_size, config.dim)
        self.value_embeddings = nn.ModuleList(
            LookUpTable(vocabulary_size, config.kv_heads * config.head_dim)
            for _ in range(config.value_embeddings)
        )
        self.value_tables = config.layer_value_tables()
        layers = zip(
            self.layer_windows,
            config.layer_sinks(),
            config.layer_rotaries(),
            self.value_tables,
            strict=True,
        )
        self.blocks = nn.ModuleList(Block(config, *layer) for layer in layers)
        self.final_norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.head = Head(config.dim, vocabulary_size, config.final_logit_cap)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        initialize(self, config.layers, zero_outputs=config.zero_output_init)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        *,
        visibilities: Visibilities | None = None,
        cache: AnyCache | None = None,
    ) -> torch.Tensor:
        """Logits of the next token.

        Args:
            tokens_BT: token ids.
            documents_BT: document of each token, -1 for padding; tokens of one document never see
                another's. None: each row is one document.
            positions_BT: position of each token in its document; None counts along the row, which is
                the same for windowed rotary attention but not bit for bit.
            visibilities: what `visibilities` made of documents and positions, instead of them.
            cache: what `new_cache` made, holding the tokens before these; it takes these in. Whatever the
                chunks, the logits are those of one call. Without documents, that of each row goes on.

        Returns:
            ``[B, T, V]`` in the dtype of the weights (or of autocast).

        Raises:
            ValueError: positions or visibilities beside a cache, and as `KVCache.advance`.
        """
        logits_BTV: torch.Tensor = self.head(
            self.hidden(tokens_BT, documents_BT, positions_BT, visibilities=visibilities, cache=cache)
        )
        return logits_BTV

    def hidden(
        self,
        tokens_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        *,
        visibilities: Visibilities | None = None,
        cache: AnyCache | None = None,
        checkpoint_activations: bool = False,
        parts: Parts | None = None,
    ) -> torch.Tensor:
        """Final normed states ``[B, T, D]``, for callers that apply the head in pieces.

        Where activations are checkpointed the backward pass finds the inputs of the blocks alone, and
        computes each block again (Chen et al. 2016, arXiv:1604.06174). ``parts`` compute in the model's
        place.
        """
        behind_BT = seen = None
        if cache is not None:
            if positions_BT is not None or visibilities is not None:
                raise ValueError(
                    "positions_BT or visibilities beside a cache, which counts the tokens itself"
                )
            batch, tokens = tokens_BT.shape
            behind_BT = cache.advance(batch, tokens, tokens_BT.device, documents_BT).behind
        elif visibilities is None:
            visibilities = self.visibilities(documents_BT, positions_BT)
        elif documents_BT is not None or positions_BT is not None:
            raise ValueError("visibilities beside documents_BT or positions_BT: give the one or the others")
        if visibilities is not None and self._reads_behind:
            # Windows share it, and blocks that are compiled apart cannot keep it for one another.
            seen = visibilities[self.layer_windows[0]]
            behind_BT = seen.behind(tokens_BT.shape[1], tokens_BT.device)
        of_tokens = (tokens_BT, behind_BT, seen, cache)
        hidden_BTD, embedded_BTD, values_BTE = (
            self.inputs(*of_tokens) if parts is None else parts.inputs(self, *of_tokens)
        )
        layers: Run = [
            (
                cast(Block, block),
                (
                    None if visibilities is None else visibilities[self.layer_windows[layer]],
                    None if table is None else values_BTE[table],
                    embedded_BTD,
                    None if cache is None else cache.layers[layer],
                ),
            )
            for layer, (block, table) in enumerate(zip(self.blocks, self.value_tables, strict=True))
        ]
        at_once = 1 if parts is None else parts.blocks_at_once
        for start in range(0, len(layers), at_once):
            run = layers[start : start + at_once]
            for place, (block, of_block) in enumerate(run):
                compute = None
                if parts is not None:
                    compute = _computed_before if place else _computing(run, parts)
                if checkpoint_activations:
                    assert len(run) == 1
                    hidden_BTD = checkpoint(
                        block, hidden_BTD, *of_block, use_reentrant=False, compute=compute
                    )
                else:
                    hidden_BTD = block(hidden_BTD, *of_block, compute=compute)
        output_BTD: torch.Tensor = (
            self.final_norm(hidden_BTD) if parts is None else parts.norm(self.final_norm, hidden_BTD)
        )
        return output_BTD

    def inputs(
        self,
        tokens_BT: torch.Tensor,
        behind_BT: torch.Tensor | None,
        seen: Visibility | None,
        cache: AnyCache | None,
    ) -> BlocksInputs:
        """What the blocks get.

        Args:
            tokens_BT: token ids.
            behind_BT: how many tokens lie behind each in its document, for n-gram embeddings.
            seen: what knows the tokens before a part of a sequence, without a cache.
            cache: keys and values of the tokens before.
        """
        hidden_BTD = _narrowed_by_autocast(self._embed(tokens_BT, behind_BT, seen, cache))
        embedded_BTD = None
        if self.config.embedding_residual:
            # Normalised, as the embeddings start far smaller than what the layers add.
            embedded_BTD = _narrowed_by_autocast(
                F.rms_norm(hidden_BTD, hidden_BTD.shape[-1:], eps=self.config.norm_epsilon)
            )
        return hidden_BTD, embedded_BTD, [table(tokens_BT) for table in self.value_embeddings]

    @property
    def _reads_behind(self) -> bool:
        return self.config.short_convolution is not None or self.ngram_embedding is not None

    def _embed(
        self,
        tokens_BT: torch.Tensor,
        behind_BT: torch.Tensor | None,
        seen: Visibility | None,
        cache: AnyCache | None,
    ) -> torch.Tensor:
        embedded_BTD: torch.Tensor = self.embedding(tokens_BT)
        if self.ngram_embedding is None:
            return embedded_BTD
        earlier_BE = None
        if cache is not None:
            earlier_BE = cache.earlier("tokens", tokens_BT, self.ngram_embedding.longest - 1)
        elif seen is not None:
            earlier_BE = seen.earlier(tokens_BT, self.ngram_embedding.longest - 1)
        summed_BTD: torch.Tensor = embedded_BTD + self.ngram_embedding(tokens_BT, behind_BT, earlier_BE)
        return summed_BTD

    def earlier_tokens_read(self) -> tuple[int, ...]:
        """How many tokens before its own each part reads besides attention; none where none does."""
        read = set()
        if self.config.short_convolution is not None:
            read.add(self.config.short_convolution - 1)
        if self.ngram_embedding is not None:
            read.add(self.ngram_embedding.longest - 1)
        return tuple(sorted(read))

    def new_cache(self, capacity: int | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for a batch of texts that come in chunks.

        Args:
            capacity: tokens that a row may have; None for no limit.
            dtype: of the keys and values that are kept; None for the dtype that they are computed in.

        Raises:
            ValueError: for a bad capacity.
        """
        return KVCache(self.layer_windows, self.config.layer_sinks(), capacity=capacity, dtype=dtype)

    def visibilities(
        self,
        documents_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        *,
        window_limit: int | None = None,
    ) -> Visibilities:
        """What the layers of each window may see; checking documents on a GPU makes the host wait for it.

        Args:
            documents_BT, positions_BT: as of `forward`.
            window_limit: layers whose window is larger see only so many keys; None for no limit.

        Raises:
            ValueError: as ``Visibility.build``.
        """
        checked = Visibility.build(
            window=self.layer_windows[0],
            sinks=self.config.attention_sinks,
            documents_BT=documents_BT,
            positions_BT=positions_BT,
        )
        return {
            window: replace(checked.with_window(narrowed(window, window_limit)), sinks=sinks)
            for window, sinks in zip(self.layer_windows, self.config.layer_sinks(), strict=True)
        }

    def embedding_tables(self) -> list[torch.Tensor]:
        """The tables that are looked up; with tied embeddings one of them is the head's matrix as well."""
        return [layer.weight for layer in self.modules() if isinstance(layer, nn.Embedding)]

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices of the blocks that map hidden states to hidden states: what Muon is for."""
        return [
            layer.weight
            for block in self.blocks
            for layer in (
                *(getattr(block.attention, name) for name in ("query", "key", "value", "output")),
                *(getattr(block.feed_forward, name) for name in ("gate", "up", "down")),
            )
            if layer is not None
        ]


def _computing(run: Run, parts: Parts) -> BlockComputation:
    """Of the first block of a run, for all of it."""
    return lambda block, hidden_BTD, *of_block: parts.run(run, hidden_BTD)


def _computed_before(block: Block, hidden_BTD: torch.Tensor, *of_block: Any) -> torch.Tensor:
    return hidden_BTD


def _narrowed_by_autocast(hidden_BTD: torch.Tensor) -> torch.Tensor:
    """In bfloat16 under a GPU's autocast: layers would add bfloat16 to a residual stream that look-ups and
    norms leave in float32, which takes twice the memory and traffic. Float16 lacks the range that the sum
    needs, and a CPU's norm the kernel for bfloat16 beside weights in float32.
    """
    if hidden_BTD.device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return hidden_BTD
    dtype = torch.get_autocast_dtype("cuda")
    return hidden_BTD.to(dtype) if dtype == torch.bfloat16 else hidden_BTD
