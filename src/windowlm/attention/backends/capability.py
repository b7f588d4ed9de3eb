"""What an attention call asks for, and what a backend says it can do."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Request:
    """The properties of a call that decide which backends can serve it; known before any tensor exists."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    window: int | None = None
    causal: bool = True
    sinks: int = 0
    documents: bool = False
    separate_keys: bool = False
    dropout: float = 0.0
    sink_logits: bool = False
    logit_cap: bool = False
    gradients: bool = True


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend supports; None means no limit."""

    purpose: str
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype]
    head_dim_limit: int | None = None
    bidirectional: bool
    sinks: bool
    documents: bool
    separate_keys: bool
    dropout: bool
    sink_logits: bool = False
    logit_cap: bool = False
    gradients: bool

    def refusal(self, request: Request) -> str | None:
        """Why the request cannot be honoured, or None where it can."""
        if self.devices is not None and request.device not in self.devices:
            return f"it does not run on {request.device}"
        if request.dtype not in self.dtypes:
            return f"it does not compute in {request.dtype}"
        if self.head_dim_limit is not None and request.head_dim > self.head_dim_limit:
            return f"it takes head dimensions up to {self.head_dim_limit}, not {request.head_dim}"
        for wanted, supported, feature in (
            (not request.causal, self.bidirectional, "bidirectional attention"),
            (request.sinks > 0, self.sinks, "sinks"),
            (request.documents, self.documents, "documents or padding"),
            (request.separate_keys, self.separate_keys, "keys with positions of their own"),
            (request.dropout > 0, self.dropout, "dropout on attention weights"),
            (request.sink_logits, self.sink_logits, "learned sinks"),
            (request.logit_cap, self.logit_cap, "cap on the logits"),
            (request.gradients, self.gradients, "gradients"),
        ):
            if wanted and not supported:
                return f"it has no {feature}"
        return None
