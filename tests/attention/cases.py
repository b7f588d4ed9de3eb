"""Drawn attention calls, and what must hold for a backend on each of them.

`python tests/attention/cases.py BACKEND COUNT [FIRST_SEED]` checks many more than the tests do.
"""

import random
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from windowlm.attention.backends.capability import Request
from windowlm.attention.dispatch import attention, capabilities
from windowlm.attention.window import PADDING, Visibility

DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)


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
            separate_keys=self.ring is not None,
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

    def normal(tokens: int, heads: int) -> Tensor:
        drawn = torch.randn(case.batch, tokens, heads, case.head_dim, generator=generator)
        return drawn.to(device, case.dtype).requires_grad_()

    heads = case.kv_heads * case.groups
    tensors = normal(case.queries, heads), normal(case.keys, case.kv_heads), normal(case.keys, case.kv_heads)
    weights = normal(case.queries, heads).detach()
    visibility = case.visibility(device)
    visible_BTS = visibility.mask(case.queries, case.keys, weights.device).expand(case.batch, -1, -1)

    ours = _with_gradients(attention(*tensors, visibility, backend=backend), tensors, weights)
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    exact = _with_gradients(attention(*wide, visibility, backend="reference"), wide, weights.double())
    plain = _with_gradients(_plain(*tensors, visible_BTS), tensors, weights)
    found = []
    for name, got, wanted, usual in zip(("output", "dq", "dk", "dv"), ours, exact, plain, strict=True):
        error, allowed = (got - wanted).norm(), 2 * (usual - wanted).norm()
        # Plain PyTorch may be exact by luck (one key) and in float64 is the oracle: beside its error allow
        # some rounding of the inputs, which are of size 1.
        units = {torch.float64: 16.0, torch.float32: 2.0}.get(case.dtype, 0.1)
        unit = units * torch.finfo(case.dtype).eps
        allowed = allowed + unit * wanted.numel() ** 0.5
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
    return found + _leaks(case, backend, tensors, visibility, visible_BTS)


def _leaks(
    case: Case,
    backend: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    visibility: Visibility,
    visible_BTS: Tensor,
) -> list[str]:
    """Look at one query: keys whose dV is not zero, and its output when all that it cannot see changes."""
    found = []
    chance = random.Random(case.seed)
    row, token = chance.randrange(case.batch), chance.randrange(case.queries)
    output = attention(*tensors, visibility, backend=backend)
    (value_gradient,) = torch.autograd.grad(output[row, token].sum(), tensors[2])
    touched_BS = (value_gradient != 0).flatten(2).any(2)
    expected_BS = torch.zeros_like(touched_BS)
    expected_BS[row] = visible_BTS[row, token]
    if not torch.equal(touched_BS, expected_BS):
        found.append(f"query {token} of row {row} reads {touched_BS.sum()} keys, not {expected_BS.sum()}")
    with torch.no_grad():
        hidden_S = ~visible_BTS[row, token]
        query, key, value = (tensor.detach().clone() for tensor in tensors)
        key[row, hidden_S] += 30
        value[row, hidden_S] -= 1000
        others_T = torch.arange(case.queries, device=query.device) != token
        query[row, others_T] *= -2
        changed = attention(query, key, value, visibility, backend=backend)
    if not torch.equal(output[row, token], changed[row, token]):
        found.append(f"query {token} of row {row} changes with what it cannot see")
    return found


def _with_gradients(
    output: Tensor, tensors: tuple[Tensor, ...], weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = torch.autograd.grad(output, tensors, weights)
    return output.detach().double(), query.double(), key.double(), value.double()


def _plain(query: Tensor, key: Tensor, value: Tensor, visible_BTS: Tensor) -> Tensor:
    """Attention as anyone would write it, in the dtype given: the measure of what rounding does."""
    groups = query.shape[2] // key.shape[2]
    query, key, value = (
        tensor.transpose(1, 2)
        for tensor in (query, key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2))
    )
    visible = visible_BTS[:, None]
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1).masked_fill(~visible, 0.0) @ value).transpose(1, 2)


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
