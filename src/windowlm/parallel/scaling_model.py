"""What a layer costs on N GPUs by each strategy: bytes sent, seconds, memory; loads no torch.

A model, not a measurement. Bytes of the halo are exact; seconds are bytes over a bandwidth and FLOPs over a
rate, without latency.
"""

from dataclasses import dataclass

# Weights and gradients are float32 in mixed precision, and AdamW keeps two more numbers of each weight.
WEIGHT_BYTES = GRADIENT_BYTES = 4
STATE_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is assumed of the GPUs and of what lies between them.

    Attributes:
        flops: that a layer reaches on one GPU, a second.
        near_bandwidth: bytes a second that a GPU sends to one of its host.
        far_bandwidth: the same between hosts.
        gpus_per_host: how many share a host.
    """

    flops: float = 0.4 * 989e12
    near_bandwidth: float = 0.8 * 450e9
    far_bandwidth: float = 0.8 * 50e9
    gpus_per_host: int = 8

    def seconds_to_send(self, sent: float, gpus: int) -> float:
        """Seconds for so many bytes of one GPU, over the slowest link that is used."""
        return sent / (self.near_bandwidth if gpus <= self.gpus_per_host else self.far_bandwidth)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's shape; activations are of so many bytes a number."""

    dim: int = 2048
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    feed_forward_dim: int = 5632
    window: int = 1024
    number_bytes: int = 2

    @property
    def parameters(self) -> int:
        """Of the projections and the gated feed-forward network."""
        projections = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.dim
        return projections + 3 * self.dim * self.feed_forward_dim

    @property
    def key_value_bytes(self) -> int:
        """Keys and values of a token."""
        return 2 * self.kv_heads * self.head_dim * self.number_bytes

    def attention_flops(self, tokens: int) -> int:
        """Forward, whole windows."""
        return 4 * self.head_dim * self.heads * self.window * tokens

    def forward_flops(self, tokens: int) -> int:
        """Of matrices and attention."""
        return 2 * self.parameters * tokens + self.attention_flops(tokens)


def halo_bytes(layer: Layer, tokens: int, gpus: int) -> int:
    """Most that a GPU sends forward for a sequence of so many tokens without documents or sinks."""
    return layer.key_value_bytes * min(layer.window - 1, tokens - tokens // gpus)


def gathered_bytes(layer: Layer, tokens: int, gpus: int) -> int:
    """The same where all keys and values are gathered."""
    return layer.key_value_bytes * (tokens - tokens // gpus)


def reduced_bytes(layer: Layer, gpus: int) -> float:
    """What a GPU sends in a step to average gradients in a ring: twice their size, less its part."""
    return 2 * GRADIENT_BYTES * layer.parameters * (gpus - 1) / gpus


def sharded_bytes(layer: Layer, gpus: int) -> float:
    """What a GPU sends in a step under FSDP2: weights for either pass, and gradients."""
    return (2 * WEIGHT_BYTES + GRADIENT_BYTES) * layer.parameters * (gpus - 1) / gpus


def state_bytes(layer: Layer, gpus: int, *, sharded: bool) -> float:
    """Weights, gradients and optimizer state that a GPU holds."""
    return STATE_BYTES * layer.parameters / (gpus if sharded else 1)


def kept_bytes(layer: Layer, layers: int, tokens: int, *, checkpointed: bool) -> int:
    """Activations that wait for the backward pass on a GPU with so many tokens.

    Of a layer compiled training keeps the input, the stream after attention, the norms of both, queries,
    keys, values, attention's output and the two products before the activation. Checkpointed it keeps the
    input of each layer, and of the one that is computed again all.
    """
    within = 4 * layer.dim + 2 * (layer.heads + layer.kv_heads) * layer.head_dim + 2 * layer.feed_forward_dim
    numbers = layers * layer.dim + within if checkpointed else layers * within
    return layer.number_bytes * tokens * numbers


def memory_bytes(layer: Layer, layers: int, vocabulary_size: int, tokens: int, *, checkpointed: bool) -> int:
    """Most that a GPU holds in a step: states, what is kept, and as much as one layer keeps for gradients."""
    states = STATE_BYTES * (layers * layer.parameters + vocabulary_size * layer.dim)
    kept = kept_bytes(layer, layers, tokens, checkpointed=checkpointed)
    return states + kept + kept_bytes(layer, 1, tokens, checkpointed=False)


def halo_is_hidden(layer: Layer, machine: Machine, tokens: int, gpus: int) -> bool:
    """Whether the queries that need no others' keys take longer than the keys take to arrive."""
    near = max(tokens // gpus - (layer.window - 1), 0)
    seconds = machine.seconds_to_send(halo_bytes(layer, tokens, gpus), gpus)
    return layer.attention_flops(near) / machine.flops >= seconds


def rows_table(layer: Layer, machine: Machine, *, tokens: int, gpus: tuple[int, ...]) -> str:
    """A Markdown table of ddp and fsdp2 with so many tokens on each GPU."""
    rows = [
        "| GPUs | compute ms | ddp MB | ddp ms | ddp GB | fsdp2 MB | fsdp2 ms | fsdp2 GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    compute = 3e3 * layer.forward_flops(tokens) / machine.flops
    kept = kept_bytes(layer, 1, tokens, checkpointed=False)
    for count in gpus:
        cells = [f"{compute:.1f}"]
        for sharded, sent in ((False, reduced_bytes(layer, count)), (True, sharded_bytes(layer, count))):
            held = state_bytes(layer, count, sharded=sharded) + kept
            if sharded and count > 1:
                # The layer's own, whole while it computes.
                held += (WEIGHT_BYTES + GRADIENT_BYTES) * layer.parameters
            cells += [
                f"{sent / 1e6:.0f}",
                f"{1e3 * machine.seconds_to_send(sent, count):.2f}",
                f"{held / 1e9:.3f}",
            ]
        rows.append(f"| {count:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def context_table(layer: Layer, machine: Machine, *, tokens: int, gpus: tuple[int, ...]) -> str:
    """A Markdown table of context with one sequence of so many tokens, cut over the GPUs."""
    rows = [
        "| GPUs | compute ms | halo MB | halo ms | gather MB | gather ms | hidden | gradients ms | GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in gpus:
        own, halo = tokens // count, halo_bytes(layer, tokens, count)
        gathered = gathered_bytes(layer, tokens, count)
        held = state_bytes(layer, count, sharded=False) + kept_bytes(layer, 1, own, checkpointed=False)
        cells = (
            f"{3e3 * layer.forward_flops(own) / machine.flops:.3f}",
            f"{halo / 1e6:.2f}",
            f"{1e3 * machine.seconds_to_send(halo, count):.4f}",
            f"{gathered / 1e6:.1f}",
            f"{1e3 * machine.seconds_to_send(gathered, count):.3f}",
            "yes" if halo_is_hidden(layer, machine, tokens, count) else "no",
            f"{1e3 * machine.seconds_to_send(reduced_bytes(layer, count), count):.2f}",
            f"{held / 1e9:.3f}",
        )
        rows.append(f"| {count:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def long_table(layer: Layer, layers: int, vocabulary_size: int, cases: tuple[tuple[int, int], ...]) -> str:
    """A Markdown table of memory a GPU, for one sequence of so many tokens over so many GPUs."""
    rows = ["| T | GPUs | all activations GB | inputs of blocks alone GB |", "|---|---|---|---|"]
    for tokens, gpus in cases:
        both = (
            memory_bytes(layer, layers, vocabulary_size, tokens // gpus, checkpointed=checkpointed) / 1e9
            for checkpointed in (False, True)
        )
        rows.append(f"| {tokens:,} | {gpus:,} | {' | '.join(f'{each:.1f}' for each in both)} |")
    return "\n".join(rows)
