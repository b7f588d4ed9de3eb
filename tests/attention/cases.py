"""Drawn attention calls, and what must hold for a backend on each of them.

`python tests/attention/cases.py BACKEND COUNT [FIRST_SEED]` checks many more than the tests do.
"""

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from windowlm.attention.backends.capability import Request
from windowlm.attention.dispatch import attention, capabilities
from windowlm.attention.window import PADDING, Visibility

DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
PASSES = 8


@dataclass(frozen=True)
class Case:
    """One call: sizes, and a visibility whose documents are lists so that a failure prints in full."""

    seed: int
    batch: int
    queries: int
    keys: int
    kv_heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    window: int | None
    causal: bool
    sinks: int
    documents: list[list[int]] | None = field(repr=False)
    ring: list[int] | None = field(repr=False)
    learned_sinks: bool
    logit_cap: float | None

    def visibility(self, device: str) -> Visibility:
        """Build the visibility, keys in the order of a ring where there is one."""
        documents = None
        if self.documents is not None:
            documents = torch.tensor(self.documents, dtype=torch.int32, device=device)
        if self.ring is None:
            return Visibility.build(
                window=self.window, causal=self.causal, sinks=self.sinks, documents_BT=documents
            )
        positions = torch.tensor([self.ring] * self.batch, device=device)
        last = torch.arange(self.keys - self.queries, self.keys, device=device).expand(self.batch, -1)
        return Visibility.build(
            window=self.window,
            causal=self.causal,
            sinks=self.sinks,
            positions_BT=last,
            key_positions_BS=positions,
        )

    def gaps(self) -> bool:
        """Whether padding stands between tokens of one document."""
        layout = self.visibility("cpu").layout
        return layout is not None and layout.gaps

    def request(self, device: str) -> Request:
        """What a backend must be able to do for this case."""
        return Request(
            device=device,
            dtype=self.dtype,
            head_dim=self.head_dim,
            window=self.window,
            causal=self.causal,
            sinks=self.sinks,
            documents=self.documents is not None,
            gaps=self.documents is not None and self.gaps(),
            separate_keys=self.ring is not None,
            sink_logits=self.learned_sinks,
            logit_cap=self.logit_cap is not None,
        )


def draw(seed: int) -> Case:
    """Draw the case of this seed; always the same one."""
    chance = random.Random(seed)
    long = chance.random() < 0.004
    queries = (
        chance.randint(1000, 4000) if long else chance.choice([chance.randint(1, 300), 63, 64, 65, 128, 129])
    )
    near = [queries - 1, queries, queries + 1]
    window = chance.choice([None, 1, 2, 64, 65, chance.randint(1, 320), chance.randint(1, 100), *near])
    kind = chance.choice(["plain", "plain", "packed", "left", "right", "both", "holes", "more keys", "ring"])
    batch = 1 if long else chance.randint(1, 2)
    extra = chance.randint(1, 150) if kind in ("more keys", "ring") else 0
    ring = chance.sample(range(queries + extra), queries + extra) if kind == "ring" else None
    packed = kind in ("packed", "left", "right", "both", "holes")
    return Case(
        seed=seed,
        batch=batch,
        queries=queries,
        keys=queries + extra,
        kv_heads=1 if long else chance.choice([1, 2, 3]),
        groups=1 if long else chance.choice([1, 2, 4]),
        head_dim=16 if long else chance.choice([8, 16, 32, 64]),
        dtype=chance.choice(DTYPES[:3] if long else DTYPES),
        window=None if window is None else max(window, 1),
        causal=chance.random() < 0.7,
        sinks=chance.choice([0, 0, 1, 4, 70]),
        documents=[_documents(chance, queries, kind) for _ in range(batch)] if packed else None,
        ring=ring,
        learned_sinks=chance.random() < 0.1,
        logit_cap=chance.choice([1.0, 20.0]) if chance.random() < 0.1 else None,
    )


def _documents(chance: random.Random, tokens: int, kind: str) -> list[int]:
    documents: list[int] = []
    longest = chance.choice([3, 40, 100, tokens])
    while len(documents) < tokens:
        following = documents[-1] + chance.randint(1, 3) if documents else chance.randint(0, 2)
        documents += [following] * chance.randint(1, max(longest, 1))
    documents = documents[:tokens]
    if kind in ("left", "both"):
        padded = chance.randint(0, tokens)
        documents[:padded] = [PADDING] * padded
    if kind in ("right", "both"):
        padded = chance.randint(0, tokens)
        documents[tokens - padded :] = [PADDING] * padded
    if kind == "holes":
        documents = [PADDING if chance.random() < 0.2 else document for document in documents]
    return documents


def supported(case: Case, backend: str, device: str = "cpu") -> bool:
    """Whether the backend claims this case."""
    return capabilities(backend).refusal(case.request(device)) is None


def mismatches(case: Case, backend: str, device: str = "cpu") -> list[str]:
    """Everything in which the backend departs from the float64 reference on this case; empty when equal."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype).requires_grad_()

    heads = case.kv_heads * case.groups
    query = normal(case.batch, case.queries, heads, case.head_dim)
    key, value = (normal(case.batch, case.keys, case.kv_heads, case.head_dim) for _ in range(2))
    tensors = [query, key, value, *([normal(heads)] if case.learned_sinks else [])]
    gradient = normal(*query.shape).detach()
    visibility = case.visibility(device)
    visible_BTS = visibility.mask(case.queries, case.keys, gradient.device).expand(case.batch, -1, -1)

    def attend(name: str) -> Callable[[list[Tensor]], Tensor]:
        return lambda tensors: _call(case, name, visibility, tensors)

    ours = _with_gradients(attend(backend), tensors, gradient)
    exact = _with_gradients(attend("reference"), tensors, gradient, torch.float64)
    # Reference and backend both err in float64; there the error of plain PyTorch is known from float32.
    plain_dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    plain = _with_gradients(
        lambda tensors: _plain(case, tensors, visible_BTS), tensors, gradient, plain_dtype
    )
    of_plain = exact
    if case.dtype == torch.float64:
        rounded = [tensor.detach().float() for tensor in tensors]
        of_plain = _with_gradients(attend("reference"), rounded, gradient.float(), torch.float64)
    share = torch.finfo(case.dtype).eps / torch.finfo(plain_dtype).eps
    factor = 3 if case.dtype == torch.float64 else 2
    found = []
    names = ("output", "dq", "dk", "dv", "dsink")
    for name, got, wanted, usual, of_usual in zip(names, ours, exact, plain, of_plain, strict=False):
        error, allowed = (got - wanted).norm(), factor * share * (usual - of_usual).norm()
        # Plain PyTorch may be exact by luck: a query with one key has weight one and no gradient, as two
        # equal sums of D products cancel. In another order each errs by about eps sqrt(D), as inputs are of
        # size 1: together 2 eps sqrt(D) for each query and head, which all that is compared sums up with
        # weights of at most one. The probabilistic bound of such sums (Higham and Mary 2019) is larger.
        accumulated = torch.promote_types(case.dtype, torch.float32)
        allowed = allowed + 2 * torch.finfo(accumulated).eps * gradient.numel() ** 0.5
        if not error <= allowed:
            found.append(f"{name} errs by {error:.2e}, {allowed:.2e} is allowed")
    blind_BT, unseen_BS = ~visible_BTS.any(2), ~visible_BTS.any(1)
    for name, tensor, silent in (
        ("output", ours[0], blind_BT),
        ("dq", ours[1], blind_BT),
        ("dk", ours[2], unseen_BS),
        ("dv", ours[3], unseen_BS),
    ):
        if (tensor[silent] != 0).any():
            found.append(f"{name} is not zero where nothing is seen")
    found += _reads(case, attend(backend), tensors, visible_BTS)
    return found + _leaks(case, attend(backend), tensors, visible_BTS)


def _call(case: Case, backend: str, visibility: Visibility, tensors: list[Tensor]) -> Tensor:
    query, key, value, *sinks = tensors
    return attention(
        query,
        key,
        value,
        visibility,
        backend=backend,
        sink_logits_H=sinks[0] if sinks else None,
        logit_cap=case.logit_cap,
    )


def _reads(
    case: Case, attend: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], visible_BTS: Tensor
) -> list[str]:
    """Keys whose dV is not zero, for as many queries at once as a head has dimensions to tell them apart.

    All queries of short cases, some of long ones.
    """
    found = []
    output_BTHD = attend(tensors)
    firsts = list(range(0, case.queries, case.head_dim))
    if len(firsts) > PASSES:
        firsts = random.Random(case.seed).sample(firsts, 1)
    for first in firsts:
        count = min(case.head_dim, case.queries - first)
        told_apart = torch.zeros_like(output_BTHD)
        told_apart[:, first : first + count] = torch.eye(case.head_dim)[:count, None].to(output_BTHD)
        (dv_BSKD,) = torch.autograd.grad(output_BTHD, tensors[2], told_apart, retain_graph=True)
        read_BSD = (dv_BSKD != 0).any(2)
        wanted_BSD = visible_BTS[:, first : first + count].mT
        wrong = (read_BSD[..., :count] != wanted_BSD).any(1).nonzero().tolist()
        found += [f"query {first + query} of row {row} reads other keys" for row, query in wrong]
    return found


def _leaks(
    case: Case, attend: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], visible_BTS: Tensor
) -> list[str]:
    """One query's output when all that it cannot see changes."""
    chance = random.Random(case.seed)
    row, token = chance.randrange(case.batch), chance.randrange(case.queries)
    with torch.no_grad():
        hidden_S = ~visible_BTS[row, token]
        query, key, value, *sinks = (tensor.detach().clone() for tensor in tensors)
        key[row, hidden_S] += 30
        value[row, hidden_S] -= 1000
        others_T = torch.arange(case.queries, device=query.device) != token
        query[row, others_T] *= -2
        before, after = attend(tensors), attend([query, key, value, *sinks])
    if torch.equal(before[row, token], after[row, token]):
        return []
    return [f"query {token} of row {row} changes with what it cannot see"]


def _with_gradients(
    attend: Callable[[list[Tensor]], Tensor],
    tensors: list[Tensor],
    gradient: Tensor,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Output and gradients in float64 of a computation in `dtype`."""
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
    output = attend(leaves)
    gradients = torch.autograd.grad(output, leaves, gradient.to(output.dtype))
    return [tensor.detach().double() for tensor in (output, *gradients)]


def _plain(case: Case, tensors: list[Tensor], visible_BTS: Tensor) -> Tensor:
    """Attention as anyone would write it, in the dtype given: the measure of what rounding does."""
    query, key, value, *sinks = tensors
    query, key, value = (
        tensor.transpose(1, 2)
        for tensor in (query, *(tensor.repeat_interleave(case.groups, 2) for tensor in (key, value)))
    )
    visible = visible_BTS[:, None]
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if case.logit_cap is not None:
        scores = case.logit_cap * torch.tanh(scores / case.logit_cap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks:
        scores = torch.cat([scores, sinks[0][:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : case.keys].masked_fill(~visible, 0.0)
    return (weights @ value).transpose(1, 2)


def main(backend: str, count: str, first: str = "0") -> int:
    """Check `count` cases that the backend claims, and say how many fail."""
    torch.set_num_threads(1)
    started, checked, failed, seed = time.perf_counter(), 0, 0, int(first)
    while checked < int(count):
        case = draw(seed)
        seed += 1
        if not supported(case, backend):
            continue
        checked += 1
        for mismatch in mismatches(case, backend):
            failed += 1
            print(case, mismatch, sep="\n  ", flush=True)
    seconds = time.perf_counter() - started
    print(f"{backend}: {checked} cases, {failed} mismatches, seeds {first} to {seed - 1}, {seconds:.0f} s")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
