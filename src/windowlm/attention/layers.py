"""The attention layer: projections, rotary embedding and windowed attention.

Shapes: B batch, T tokens, t some of them, H query heads, K key-value heads, D head dimension, E = K x D.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backends.autocast import autocast_is_on
from .chunk_cache import ChunkLayer
from .config import BACKENDS, RotaryConfig, is_number, shown
from .dense_tensor import check_dense
from .dispatch import attention, check_dropout, check_logit_cap, check_visibility
from .joint_projection import WithJointWeights, lay_side_by_side, project_jointly
from .kv_cache import LayerCache
from .rotary import RotaryEmbedding, Rotation
from .short_convolution import ShortConvolution, check_taps
from .step_cache import StepLayer
from .window import Visibility, check_causal, check_sinks, check_window, narrowed

DEFAULT_ROTARY = RotaryConfig()
AnyLayerCache = LayerCache | StepLayer | ChunkLayer


class Heads(NamedTuple):
    """What tokens bring to attention: queries and keys, rotated, values, and the gate of what they read.

    Attributes:
        query: [B, T, H, D].
        key, value: [B, T, K, D].
        gate: [B, T, H, 1], between 0 and 1; None without a gate.
        visibility: what they see.
        sent: what `Visibility.send` gave for keys and values; None where nothing was begun.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    visibility: Visibility
    sent: Any = None


class SlidingWindowAttention(WithJointWeights):
    """Multi-head attention in which a token sees the last `window_size` tokens, itself included.

    With window_size=2, rows are tokens and 1 marks what they see:

        1 0 0 0
        1 1 0 0
        0 1 1 0
        0 0 1 1

    Args:
        dim: size of the hidden states.
        heads: query heads.
        dim_head: size of a head; a multiple of 2 with rotary embedding.
        window_size: tokens seen, the own one included; None for all.
        dropout: probability of dropping an attention weight, in training only.
        kv_heads: key-value heads, a divisor of `heads` (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245);
            None for as many as `heads`.
        causal: hide later tokens; False shows `window_size - 1` tokens on both sides.
        backend: who computes, a name of `config.BACKENDS`.
        rotary: rotary position embedding; None for no positions at all.
        qk_norm: RMS-normalise each head's queries and keys before the rotation
            (Henry et al. 2020, https://arxiv.org/abs/2010.04245; with RMS as in Qwen 3 and OLMo 2).
        qk_norm_epsilon: added to the mean square there; None for the machine epsilon of the dtype.
        qkv_bias: a bias on queries, keys and values (as in Qwen 2, https://arxiv.org/abs/2407.10671).
        sinks: how many first tokens stay visible to all (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).
        learned_sinks: a logit for each head joins the softmax's denominator, so that a head may attend to
            nothing (Xiao et al. 2023; as in gpt-oss, https://arxiv.org/abs/2508.10925).
        gate: multiply each head's output by a sigmoid of the hidden state
            (Qiu et al. 2025, https://arxiv.org/abs/2505.06708).
        logit_cap: bound the scores by `cap * tanh(score / cap)` (Gemma 2, https://arxiv.org/abs/2408.00118).
        value_embedding: mix the values with embeddings given to the call, by a learned share of each
            (value residual, Zhou et al. 2024, https://arxiv.org/abs/2410.17897).
        short_convolution: tokens, the own one included, that a causal convolution of each channel of queries,
            keys and values reads (Primer, So et al. 2021, https://arxiv.org/abs/2109.08668); None for none.

    Raises:
        ValueError: where a size is out of range, naming it.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        window_size: int | None = 512,
        dropout: float = 0.1,
        *,
        kv_heads: int | None = None,
        causal: bool = True,
        backend: str = "auto",
        rotary: RotaryConfig | None = DEFAULT_ROTARY,
        qk_norm: bool = False,
        qk_norm_epsilon: float | None = None,
        qkv_bias: bool = False,
        sinks: int = 0,
        learned_sinks: bool = False,
        gate: bool = False,
        logit_cap: float | None = None,
        value_embedding: bool = False,
        short_convolution: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        for name, size in (("dim", dim), ("heads", heads), ("dim_head", dim_head), ("kv_heads", kv_heads)):
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 2**31:
                good = heads if name == "kv_heads" else 8
                raise ValueError(
                    f"{name}={shown(size)}: a whole number from 1 to 2**31 - 1 is allowed; try {name}={good}"
                )
        if heads % kv_heads:
            raise ValueError(
                f"kv_heads={kv_heads}: a divisor of heads={heads} is allowed; try kv_heads={heads}"
            )
        check_dropout(dropout)
        check_causal(causal)
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: {', '.join(BACKENDS)} are allowed; try backend='auto'")
        if rotary is not None and not isinstance(rotary, RotaryConfig):
            raise ValueError(
                f"rotary={rotary!r}: a RotaryConfig, or None for no positions, is allowed; "
                "try rotary=RotaryConfig(base=10000)"
            )
        if rotary is not None and (dim_head < 2 or (rotary.fraction == 1 and dim_head % 2)):
            raise ValueError(
                f"dim_head={dim_head}: an even number is allowed with rotary positions, which rotate pairs; "
                f"try dim_head={dim_head + 1} or rotary=None"
            )
        check_sinks(sinks)
        check_logit_cap(logit_cap)
        check_taps(short_convolution)
        for name, switch in (
            ("qk_norm", qk_norm),
            ("qkv_bias", qkv_bias),
            ("learned_sinks", learned_sinks),
            ("gate", gate),
            ("value_embedding", value_embedding),
        ):
            if not isinstance(switch, bool):
                raise ValueError(f"{name}={switch!r}: True or False is allowed; try {name}=True")
        if qk_norm_epsilon is not None and not (is_number(qk_norm_epsilon) and qk_norm_epsilon >= 0):
            raise ValueError(
                f"qk_norm_epsilon={qk_norm_epsilon!r}: a finite number from 0 on, or None for the machine "
                "epsilon, is allowed; try qk_norm_epsilon=1e-6"
            )
        self.window_size = check_window(window_size, "window_size")
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.dropout, self.causal, self.backend = dropout, causal, backend
        self.sinks, self.logit_cap = sinks, logit_cap
        self.query = nn.Linear(dim, heads * dim_head, bias=qkv_bias)
        self.key = nn.Linear(dim, kv_heads * dim_head, bias=qkv_bias)
        self.value = nn.Linear(dim, kv_heads * dim_head, bias=qkv_bias)
        self.output = nn.Linear(heads * dim_head, dim, bias=False)
        self.rotary = None if rotary is None else RotaryEmbedding(dim_head, rotary)
        self.query_norm = nn.RMSNorm(dim_head, eps=qk_norm_epsilon) if qk_norm else None
        self.key_norm = nn.RMSNorm(dim_head, eps=qk_norm_epsilon) if qk_norm else None
        self.sink_logits = nn.Parameter(torch.empty(heads)) if learned_sinks else None
        self.gate = nn.Linear(dim, heads, bias=False) if gate else None
        self.value_shares = nn.Parameter(torch.empty(2)) if value_embedding else None
        self.convolutions = None
        if short_convolution is not None:
            self.convolutions = nn.ModuleDict(
                {
                    name: ShortConvolution(of_heads, dim_head, short_convolution)
                    for name, of_heads in (("query", heads), ("key", kv_heads), ("value", kv_heads))
                }
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the parameters that the layer itself holds; its parts fill their own."""
        if self.sink_logits is not None:
            # Beside scores around 0 a sink weighs as much as one key: the output stays near that without
            # sinks, and the softmax's gradient reaches the logit. A very low logit would learn nothing, a
            # very high one would shut the head.
            nn.init.zeros_(self.sink_logits)
        if self.value_shares is not None:
            nn.init.constant_(self.value_shares, 2**-0.5)

    def join_projections(self) -> None:
        """Keep the weights of queries, keys and values in one tensor from now on, for one product.

        The product is one where no gradients are recorded. A layer that gets other weights, or another dtype
        or device, and a copy of it are multiplied one by one until it is called again.
        """
        self._joint_weights = lay_side_by_side((self.query, self.key, self.value))

    def extra_repr(self) -> str:
        """Say what `print(model)` would not show."""
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, window_size={self.window_size}, "
            f"causal={self.causal}, sinks={self.sinks}, learned_sinks={self.sink_logits is not None}, "
            f"logit_cap={self.logit_cap}, dropout={self.dropout}, backend={self.backend}"
        )

    def forward(
        self,
        hidden_BTD: Tensor,
        mask: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        visibility: Visibility | None = None,
        value_embedding_BTE: Tensor | None = None,
        cache: AnyLayerCache | None = None,
    ) -> Tensor:
        """Mix each token with those it sees.

        Args:
            hidden_BTD: [B, T, dim].
            mask: bool [B, T], True where there is a token, False for padding.
            positions_BT: [B or 1, T], whole-number positions for the rotation; None for those of the
                visibility, or 0 .. T-1.
            visibility: built once a batch and shared by layers of one window; that of a smaller window than
                the layer's is what counts. Without it the layer builds its own from `mask`.
            value_embedding_BTE: [B, T, kv_heads * dim_head], what is mixed with the values.
            cache: what the layer keeps of the tokens before these; it says itself where these stand and what
                they see, so mask, positions and visibility are left away.

        Returns:
            [B, T, dim]; zeros where a token sees nothing.

        Raises:
            ValueError: for a hidden state of other rank, size, dtype or device, a mask or positions of
                another shape, dtype or device, a mask beside a visibility, a visibility of a wider window,
                another direction, number of sinks or shape, or with keys of its own, value embeddings that
                are missing, not asked for, or of another shape, or a cache of another window, or beside what
                it says itself.
        """
        heads = self.heads_of(
            hidden_BTD,
            mask,
            positions_BT=positions_BT,
            visibility=visibility,
            value_embedding_BTE=value_embedding_BTE,
            cache=cache,
            sending=True,
        )
        return self.attended(heads, cache)

    def heads_of(
        self,
        hidden_BTD: Tensor,
        mask: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        visibility: Visibility | None = None,
        value_embedding_BTE: Tensor | None = None,
        cache: AnyLayerCache | None = None,
        sending: bool = False,
    ) -> Heads:
        """The first half of `forward`: what each token brings to attention by itself.

        With `sending` a graph that holds the second half too begins here to send keys and values to the
        processes whose queries see them.
        """
        self._check_hidden(hidden_BTD)
        batch, tokens = hidden_BTD.shape[:2]
        if cache is not None:
            if any(given is not None for given in (mask, positions_BT, visibility)):
                raise ValueError(
                    "cache: it says itself where tokens stand; leave mask, positions_BT, visibility"
                )
            visibility = self._visibility_in(cache, batch, tokens)
        else:
            if positions_BT is not None:
                _check_positions(positions_BT, hidden_BTD)
            visibility = self._visibility(hidden_BTD, mask, visibility)
            visibility.check_call(batch, tokens, tokens, hidden_BTD.device)
        query_BTHD, key_BTKD, value_BTKD = (
            projected.view(batch, tokens, -1, self.dim_head)
            for projected in project_jointly(
                hidden_BTD,
                (self.query, self.key, self.value),
                self._joint_weights,
                outputs_kept=self.convolutions is not None,
            )
        )
        if self.convolutions is not None:
            behind_BT = (
                visibility.behind(tokens, hidden_BTD.device) if cache is None else cache.slots.chunk.behind
            )
            query_BTHD = self._convolved("query", query_BTHD, behind_BT, visibility, cache)
            key_BTKD = self._convolved("key", key_BTKD, behind_BT, visibility, cache)
            value_BTKD = self._convolved("value", value_BTKD, behind_BT, visibility, cache)
        value_BTKD = self._mixed_value(value_BTKD, value_embedding_BTE)
        rotation = self._rotation(query_BTHD, positions_BT, visibility, cache)
        dtype = value_BTKD.dtype
        key_BTKD = self._turned(key_BTKD, self.key_norm, rotation, dtype)
        # What is computed of the queries alone overlaps with it, and so do their gradients on the way back.
        sent = visibility.send(key_BTKD, value_BTKD) if sending else None
        query_BTHD = self._turned(query_BTHD, self.query_norm, rotation, dtype)
        gate_BTH1 = None if self.gate is None else self.gate(hidden_BTD).sigmoid()[..., None]
        return Heads(query_BTHD, key_BTKD, value_BTKD, gate_BTH1, visibility, sent)

    def attended(self, heads: Heads, cache: AnyLayerCache | None = None) -> Tensor:
        """The second half of `forward`: attention and the projection of what it gives."""
        return self._attend(heads, cache, finish=self._project, finish_with=heads.gate)

    def _project(self, mixed_BtHD: Tensor, gate_BtH1: Tensor | None) -> Tensor:
        if gate_BtH1 is not None:
            mixed_BtHD = mixed_BtHD * gate_BtH1
        projected_BtD: Tensor = self.output(mixed_BtHD.flatten(-2))
        return projected_BtD

    def mix(
        self,
        query_BTHD: Tensor,
        key_BTKD: Tensor,
        value_BTKD: Tensor,
        visibility: Visibility,
        positions_BT: Tensor | None = None,
        cache: AnyLayerCache | None = None,
    ) -> Tensor:
        """The layer between its projections: normalise and rotate queries and keys, then attend.

        Returns:
            [B, T, H, D].
        """
        rotation = self._rotation(query_BTHD, positions_BT, visibility, cache)
        key_BTKD = self._turned(key_BTKD, self.key_norm, rotation, value_BTKD.dtype)
        query_BTHD = self._turned(query_BTHD, self.query_norm, rotation, value_BTKD.dtype)
        return self._attend(Heads(query_BTHD, key_BTKD, value_BTKD, None, visibility), cache)

    def _turned(
        self, heads_BTHD: Tensor, norm: nn.RMSNorm | None, rotation: Rotation | None, dtype: torch.dtype
    ) -> Tensor:
        """Queries or keys, normalised and rotated."""
        if norm is not None:
            heads_BTHD = norm(heads_BTHD.to(norm.weight.dtype)).to(dtype)
        if self.rotary is None or rotation is None:
            return heads_BTHD
        return self.rotary.rotate(heads_BTHD, rotation)

    def _attend(self, heads: Heads, cache: AnyLayerCache | None, **finish: Any) -> Tensor:
        """Attention, and what `Visibility.attend` is to make of it."""
        keys, values = heads.key, heads.value
        key_BSKD, value_BSKD = (keys, values) if cache is None else cache.extend(keys, values)
        return heads.visibility.attend(
            attention,
            heads.query,
            key_BSKD,
            value_BSKD,
            sent=heads.sent,
            backend=self.backend,
            dropout=self.dropout if self.training else 0.0,
            sink_logits_H=self.sink_logits,
            logit_cap=self.logit_cap,
            **finish,
        )

    def _convolved(
        self,
        name: str,
        projected_BTHD: Tensor,
        behind_BT: Tensor,
        visibility: Visibility,
        cache: AnyLayerCache | None,
    ) -> Tensor:
        assert self.convolutions is not None
        convolution = self.convolutions[name]
        assert isinstance(convolution, ShortConvolution)
        if cache is not None:
            earlier_BEHD = cache.earlier(name, projected_BTHD, convolution.taps - 1)
        else:
            earlier_BEHD = visibility.earlier(projected_BTHD, convolution.taps - 1)
        convolved_BTHD: Tensor = convolution(projected_BTHD, behind_BT, earlier_BEHD)
        return convolved_BTHD

    def _mixed_value(self, value_BTKD: Tensor, embedding_BTE: Tensor | None) -> Tensor:
        if (self.value_shares is None) != (embedding_BTE is None):
            raise ValueError(
                "value_embedding_BTE is for the layers of value_embedding=True, and they need it: "
                "give both or neither"
            )
        if self.value_shares is None or embedding_BTE is None:
            return value_BTKD
        check_dense("value_embedding_BTE", embedding_BTE)
        if embedding_BTE.shape != value_BTKD.flatten(2).shape or not embedding_BTE.is_floating_point():
            raise ValueError(
                f"value_embedding_BTE has shape {tuple(embedding_BTE.shape)} and dtype "
                f"{embedding_BTE.dtype}: {tuple(value_BTKD.flatten(2).shape)} and a floating-point dtype "
                "are allowed"
            )
        _check_device("value_embedding_BTE", embedding_BTE, value_BTKD)
        # Under autocast the values are narrower than embeddings and shares.
        own, embedded = self.value_shares.to(value_BTKD.dtype)
        embedding_BTKD = embedding_BTE.to(value_BTKD.dtype).view_as(value_BTKD)
        mixed_BTKD: Tensor = own * value_BTKD + embedded * embedding_BTKD
        return mixed_BTKD

    def _check_hidden(self, hidden_BTD: Tensor) -> None:
        dim, weight = self.query.in_features, self.query.weight
        check_dense("hidden_BTD", hidden_BTD)
        if hidden_BTD.dim() != 3 or hidden_BTD.shape[-1] != dim or not hidden_BTD.is_floating_point():
            raise ValueError(
                f"hidden_BTD has shape {tuple(hidden_BTD.shape)} and dtype {hidden_BTD.dtype}: "
                f"[batch, tokens, {dim}] and a floating-point dtype are allowed"
            )
        if 0 in hidden_BTD.shape:
            raise ValueError(f"hidden_BTD has shape {tuple(hidden_BTD.shape)}: sizes from 1 on are allowed")
        dtypes = {weight.dtype, hidden_BTD.dtype}
        other_dtype = len(dtypes) > 1 and weight.is_floating_point()
        # Autocast leaves double precision as it is.
        if hidden_BTD.device != weight.device or (
            other_dtype and (torch.float64 in dtypes or not autocast_is_on(hidden_BTD.device))
        ):
            raise ValueError(
                f"hidden_BTD is {hidden_BTD.dtype} on {hidden_BTD.device}, the layer {weight.dtype} on "
                f"{weight.device}: give both one dtype (or use autocast, not for float64) and one device"
            )

    def _visibility(
        self, hidden_BTD: Tensor, mask: Tensor | None, visibility: Visibility | None
    ) -> Visibility:
        if visibility is None:
            if mask is not None:
                check_dense("mask", mask)
                if mask.shape != hidden_BTD.shape[:2] or mask.dtype != torch.bool:
                    raise ValueError(
                        f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: "
                        f"{tuple(hidden_BTD.shape[:2])} and bool (True for a token) are allowed"
                    )
                _check_device("mask", mask, hidden_BTD)
            return Visibility.build(
                window=self.window_size, causal=self.causal, sinks=self.sinks, mask_BT=mask
            )
        if mask is not None:
            raise ValueError("mask beside visibility: give the mask to Visibility.build(mask_BT=...) instead")
        check_visibility(visibility)
        given = (visibility.window, visibility.causal, visibility.sinks)
        if given != (narrowed(self.window_size, visibility.window), self.causal, self.sinks):
            raise ValueError(
                f"visibility has window={given[0]}, causal={given[1]}, sinks={given[2]}, the layer "
                f"window_size={self.window_size}, causal={self.causal}, sinks={self.sinks}; "
                "build one for each kind of layer, or take visibility.with_window() of a layer's window"
            )
        if visibility.separate_keys:
            raise ValueError(
                "visibility has key_positions_BS: the keys of a layer are its tokens' own and stand where "
                "its queries do; leave them away, or give a cache"
            )
        return visibility

    def _visibility_in(self, cache: AnyLayerCache, batch: int, tokens: int) -> Visibility:
        if not isinstance(cache, AnyLayerCache):
            raise ValueError(
                f"cache is a {type(cache).__name__}: the layer's entry of KVCache.layers is allowed"
            )
        slots = cache.slots
        if not self.causal:
            raise ValueError("cache beside causal=False: a bidirectional layer reads the text as a whole")
        if (slots.window, slots.sinks) != (self.window_size, self.sinks):
            raise ValueError(
                f"cache has window={slots.window}, sinks={slots.sinks}, the layer "
                f"window_size={self.window_size}, sinks={self.sinks}; give each layer its own"
            )
        if slots.chunk.tokens != tokens:
            raise ValueError(f"the cache expects {slots.chunk.tokens} tokens, hidden_BTD has {tokens}")
        if slots.chunk.batch not in (None, batch):
            raise ValueError(f"the cache expects {slots.chunk.batch} rows, hidden_BTD has {batch}")
        return slots.visibility

    def prepare_rotation(self, visibility: Visibility) -> None:
        """Make the table of angles of the visibility's positions now, which layers share: graphs that are
        compiled apart would each make their own.
        """
        if self.rotary is not None and visibility.positions is not None:
            positions_BT = visibility.positions
            self._shared_rotation(self.rotary, positions_BT.shape[1], positions_BT.device, visibility)

    def _rotation(
        self,
        query_BTHD: Tensor,
        positions_BT: Tensor | None,
        visibility: Visibility,
        cache: AnyLayerCache | None,
    ) -> Rotation | None:
        rotary = self.rotary
        if rotary is None:
            return None
        if cache is not None:
            chunk = cache.slots.chunk
            return chunk.once((rotary.config, rotary.rotated), lambda: rotary.rotation(chunk.positions))
        if positions_BT is not None and positions_BT is not visibility.positions:
            return rotary.rotation(positions_BT)
        return self._shared_rotation(rotary, query_BTHD.shape[1], query_BTHD.device, visibility)

    def _shared_rotation(
        self, rotary: RotaryEmbedding, tokens: int, device: torch.device, visibility: Visibility
    ) -> Rotation:
        positions_BT = visibility.positions

        def rotation() -> Rotation:
            counted_1T = torch.arange(tokens, device=device)[None]
            return rotary.rotation(counted_1T if positions_BT is None else positions_BT)

        return visibility.once(
            ("rotation", rotary.config, rotary.rotated),
            rotation,
            sizes=(tokens, device) if positions_BT is None else (),
            any_window=True,
        )


def _check_device(name: str, tensor: Tensor, hidden_BTD: Tensor) -> None:
    if tensor.device != hidden_BTD.device:
        raise ValueError(
            f"{name} is on {tensor.device}, hidden_BTD on {hidden_BTD.device}; move it with .to()"
        )


def _check_positions(positions_BT: Tensor, hidden_BTD: Tensor) -> None:
    check_dense("positions_BT", positions_BT)
    batch, tokens = hidden_BTD.shape[:2]
    whole = positions_BT.dtype in (torch.int32, torch.int64)
    if not whole or positions_BT.shape not in ((1, tokens), (batch, tokens)):
        raise ValueError(
            f"positions_BT has shape {tuple(positions_BT.shape)} and dtype {positions_BT.dtype}: "
            f"{(batch, tokens)} or {(1, tokens)} and whole numbers (int32 or int64) are allowed"
        )
    _check_device("positions_BT", positions_BT, hidden_BTD)


class FlashAttention(SlidingWindowAttention):
    """`SlidingWindowAttention` without a window: every token sees all tokens before it, and itself.

    Raises:
        ValueError: as that, and for a `window_size`.
    """

    def __init__(
        self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0, **options: Any
    ) -> None:
        if "window_size" in options:
            raise ValueError(
                f"window_size={options['window_size']!r}: FlashAttention takes none, as it sees all tokens; "
                "try SlidingWindowAttention"
            )
        super().__init__(dim, heads, dim_head, None, dropout, **options)
