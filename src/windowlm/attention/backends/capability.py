"""What an attention call asks for, and what a backend says it can do."""

from dataclasses import dataclass

import torch

MAJOR, MINOR = torch.__version__.split(".")[:2]
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 13)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The properties of a call that decide which backends can serve it, and which of them is the fastest.

    They are known before any tensor exists. `groups` are query heads a key-value head.
    """

    device: str = "cpu"
    compute_capability: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    groups: int = 1
    window: int | None = None
    causal: bool = True
    sinks: int = 0
    documents: bool = False
    gaps: bool = False
    gaps_known: bool = True
    separate_keys: bool = False
    more_keys: bool = False
    dropout: float = 0.0
    sink_logits: bool = False
    logit_cap: bool = False
    gradients: bool = True
    deterministic: bool = False
    torch_version: tuple[int, int] = (int(MAJOR), int(MINOR))


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend supports; None means no limit.

    `missing` says what it needs and does not find; `compute_capability` is the least of a CUDA device;
    `more_keys` are keys before the first query, in order; `deterministic` says whether gradients
    are the same to the bit each time where torch is told to be deterministic; `torch_versions` are the oldest
    and the newest that it is known to work with (None: it asks no more of torch than what stays).
    """

    purpose: str
    missing: str | None = None
    devices: frozenset[str] | None = None
    compute_capability: tuple[int, int] = (0, 0)
    dtypes: frozenset[torch.dtype]
    head_dim_limit: int | None = None
    head_dim_least: int = 1
    head_dim_multiple: int = 1
    bidirectional: bool
    sinks: bool
    documents: bool
    gaps: bool = True
    separate_keys: bool
    more_keys: bool
    dropout: bool
    sink_logits: bool = False
    logit_cap: bool = False
    gradients: bool
    deterministic: bool = True
    torch_versions: tuple[tuple[int, int], tuple[int, int] | None] = (OLDEST_TORCH, NEWEST_TORCH)

    def runs_on(self, device: str) -> bool:
        """Whether devices of this type are among those it is for."""
        return self.devices is None or device in self.devices

    def refusal(self, request: Request) -> str | None:
        """Why the request cannot be honoured, or None where it can."""
        if not self.runs_on(request.device):
            return f"it does not run on {request.device}"
        if self.missing is not None:
            return self.missing
        oldest, newest = self.torch_versions
        if request.torch_version < oldest or (newest is not None and request.torch_version > newest):
            until = "or later" if newest is None else f"to {_dotted(newest)}"
            given = _dotted(request.torch_version)
            return f"it is known to work with torch {_dotted(oldest)} {until}, this is {given}"
        if request.compute_capability is not None and request.compute_capability < self.compute_capability:
            given, least = _dotted(request.compute_capability), _dotted(self.compute_capability)
            return f"it needs a GPU of compute capability {least} or later, this one has {given}"
        if request.dtype not in self.dtypes:
            return f"it does not compute in {request.dtype}"
        if self.head_dim_limit is not None and request.head_dim > self.head_dim_limit:
            return f"it takes head dimensions up to {self.head_dim_limit}, not {request.head_dim}"
        if request.head_dim < self.head_dim_least:
            return f"it takes head dimensions from {self.head_dim_least} on, not {request.head_dim}"
        if request.head_dim % self.head_dim_multiple:
            multiple = self.head_dim_multiple
            return f"it takes head dimensions that are multiples of {multiple}, not {request.head_dim}"
        for wanted, supported, feature in (
            (not request.causal, self.bidirectional, "bidirectional attention"),
            (request.sinks > 0, self.sinks, "sinks"),
            (request.documents, self.documents, "documents or padding"),
            (
                request.gaps,
                self.gaps,
                "padding inside documents"
                if request.gaps_known
                else "padding inside documents, and whether there is some is unknown where a compiled graph "
                "builds the visibility: build it before",
            ),
            (request.separate_keys, self.separate_keys, "keys with positions of their own"),
            (request.more_keys, self.more_keys, "more keys than queries"),
            (request.dropout > 0, self.dropout, "dropout on attention weights"),
            (request.sink_logits, self.sink_logits, "learned sinks"),
            (request.logit_cap, self.logit_cap, "a cap on the logits"),
            (request.gradients, self.gradients, "gradients"),
            (
                request.deterministic and request.gradients,
                self.deterministic,
                "gradients that are the same to the bit each time",
            ),
        ):
            if wanted and not supported:
                return f"it does not support {feature}"
        return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
