"""Drawn attention calls, and what must hold for a backend on each of them.

`python tests/attention/cases.py BACKEND COUNT [FIRST_SEED] [device=cuda] [processes=8] [threads=2]
[seconds=500]` checks many more than the tests do, as many as it can in the time if there is a limit; threads
are those of one process on a CPU.
"""

import json
import math
import random
import shlex
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from windowlm.attention.backends.capability import Request
from windowlm.attention.dispatch import MODULES, attention, capabilities, compute_capability
from windowlm.attention.document_layout import PADDING
from windowlm.attention.window import Visibility
from windowlm.errors import UserError, exit_status

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
CHECKS = (
    *(f"error of {name}" for name in ("output", "dq", "dk", "dv", "dsink")),
    *(f"numbers of {name} that are not zero where nothing is seen" for name in ("output", "dq", "dk", "dv")),
    "pairs of query and key read wrongly",
    "numbers of a query's output changed by what it cannot see",
)
# Beside documents of several kinds: those whose first began before the row, keys before the queries' own
# tokens, and keys in an order of their own, of which some are missing.
KINDS = ("plain", "packed", "left", "right", "both", "holes", "begun before", "more keys", "ring")
# How queries, keys and values lie in memory.
LAYOUTS = ("contiguous", "heads before tokens", "numbers apart", "parts of wider heads")
TOLD_APART = 320  # queries: all of a case that is not long
# Of the numbers of a case, where fewer leave open whether the backend errs or plain PyTorch was lucky.
DRAWS = (8, 64)
# Of what all allow on average, for a single draw: luck makes plain PyTorch right, not a backend wrong.
MOST_OF_ONE = 4
AT_ONCE = 25
SEEDS_A_PROCESS = 1_000_000
# Of the command; that no process has taken yet.
_left: "Synchronized[int] | None" = None
EXAMPLE = "try python tests/attention/cases.py banded 100"
DYNAMO = {"recompile_limit": 1000, "fail_on_recompile_limit_hit": True, "assume_static_by_default": False}
# A graph that is asked for several gradients must not give away what it saved for the first.
FUNCTORCH = {"donated_buffer": False}
# A pool of compilers for each of many processes would take longer to start than it saves.
INDUCTOR = {"compile_threads": 1}


class Shape(NamedTuple):
    """What compiled kernels are specialised for, all but the lengths; `special` is one of `SPECIALS`."""

    batch: int
    kv_heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    special: str = ""


SPECIALS = ("learned sinks", "logit cap", "more keys", "ring")
SHAPES = (
    Shape(2, 1, 1, 64, torch.bfloat16),
    Shape(2, 2, 4, 64, torch.bfloat16),
    Shape(2, 2, 4, 128, torch.bfloat16),
    Shape(2, 1, 8, 128, torch.bfloat16),
    Shape(2, 3, 1, 32, torch.bfloat16),
    Shape(2, 1, 3, 96, torch.bfloat16),
    Shape(1, 1, 1, 128, torch.bfloat16),
    Shape(1, 1, 6, 64, torch.bfloat16),
    Shape(1, 1, 16, 128, torch.bfloat16),
    Shape(1, 1, 32, 64, torch.float16),
    Shape(2, 2, 2, 16, torch.float16),
    Shape(2, 3, 2, 64, torch.float16),
    Shape(2, 2, 3, 32, torch.float32),
    Shape(2, 1, 4, 40, torch.bfloat16),
    Shape(1, 2, 2, 80, torch.bfloat16),
    Shape(1, 1, 2, 192, torch.bfloat16),
    Shape(1, 1, 2, 256, torch.bfloat16),
    *(Shape(2, 2, 4, 64, torch.bfloat16, special) for special in SPECIALS),
)


@dataclass(frozen=True)
class Case:
    """One call: sizes, and what its visibility is built of, as lists."""

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
    kind: str
    documents: list[list[int]] | None = field(repr=False)
    positions: list[list[int]] | None = field(repr=False)
    key_documents: list[list[int]] | None = field(repr=False)
    key_positions: list[list[int]] | None = field(repr=False)
    learned_sinks: bool
    logit_cap: float | None
    size: float
    layout: str

    def visibility(self, device: str) -> Visibility:
        """Build the visibility."""

        def rows(numbers: list[list[int]] | None) -> Tensor | None:
            return None if numbers is None else torch.tensor(numbers, dtype=torch.int32, device=device)

        return Visibility.build(
            window=self.window,
            causal=self.causal,
            sinks=self.sinks,
            documents_BT=rows(self.documents),
            positions_BT=rows(self.positions),
            key_documents_BS=rows(self.key_documents),
            key_positions_BS=rows(self.key_positions),
        )

    def gaps(self) -> bool:
        """Whether padding stands between tokens of one document."""
        layout = self.visibility("cpu").layout
        return layout is not None and layout.gaps

    def request(self, device: str) -> Request:
        """What a backend must be able to do for this case."""
        return Request(
            device=device,
            compute_capability=compute_capability(torch.device(device)),
            dtype=self.dtype,
            head_dim=self.head_dim,
            groups=self.groups,
            window=self.window,
            causal=self.causal,
            sinks=self.sinks,
            documents=self.documents is not None,
            gaps=self.documents is not None and self.gaps(),
            separate_keys=self.key_positions is not None,
            more_keys=self.kind == "more keys",
            sink_logits=self.learned_sinks,
            logit_cap=self.logit_cap is not None,
        )

    def properties(self) -> Iterator[str]:
        """What to count cases by."""
        yield self.kind
        yield str(self.dtype).removeprefix("torch.")
        yield "causal" if self.causal else "bidirectional"
        yield f"{self.groups} query heads a key-value head"
        yield f"head dimension {self.head_dim}"
        for name, there in (
            ("no window", self.window is None),
            ("sinks", self.sinks > 0),
            ("learned sinks", self.learned_sinks),
            ("logit cap", self.logit_cap is not None),
            ("1,000 tokens or more", self.queries >= 1000),
            ("fewer keys than queries", self.keys < self.queries),
            ("documents in a ring", self.key_documents is not None),
            (f"queries and keys {self.size:g} times as large", self.size != 1),
            (self.layout, self.layout != LAYOUTS[0]),
        ):
            if there:
                yield name


def draw(seed: int, *, shapes: Sequence[Shape] = (), wide: bool = False) -> Case:
    """Draw the case of this seed; always the same one. A wide one has a window of 768 to its many tokens.

    With `shapes`, some of `SHAPES`, all that needs a kernel of its own is theirs: compiled backends would
    compile for hours.
    """
    chance = random.Random(seed)
    shape = chance.choice(shapes) if shapes else None
    # With many heads the reference would need all memory of several processes.
    few = 0.012 if shape is None else 0.05 * (shape.kv_heads * shape.groups == 1)
    long = chance.random() < few or wide
    queries = chance.randint(1000, 4000) if long else chance.randint(1, 300)
    if not long and chance.random() < 0.4:
        queries = chance.choice([63, 64, 65, 128, 129])
    near = [queries - 1, queries, queries + 1]
    window = chance.choice([None, 1, 2, 64, 65, chance.randint(1, 320), chance.randint(1, 100), *near])
    if long and chance.random() < 0.5:
        window = chance.choice([chance.randint(500, 1500), chance.randint(queries // 2, queries)])
    if wide:
        window = chance.randint(768, queries)
    kind = chance.choice(["plain", *KINDS])
    learned_sinks, capped = chance.random() < 0.1, chance.random() < 0.1
    if shape is not None:
        if kind in SPECIALS or shape.special in SPECIALS[2:]:
            kind = shape.special if shape.special in SPECIALS[2:] else "packed"
        learned_sinks, capped = (shape.special == special for special in SPECIALS[:2])
    else:
        kv_heads, groups = chance.choice([(1, 1), (1, 2), (2, 1)])
        shape = Shape(
            batch=1 if long else chance.randint(1, 2),
            kv_heads=kv_heads if long else chance.choice([1, 2, 3]),
            groups=groups if long else chance.choice([1, 2, 4, 8]),
            head_dim=chance.choice([16, 64] if long else [8, 16, 32, 64]),
            dtype=chance.choice(DTYPES),
        )
    places = _places(chance, kind, shape.batch, queries)
    return Case(
        seed=seed,
        batch=shape.batch,
        kv_heads=shape.kv_heads,
        groups=shape.groups,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        queries=queries,
        window=None if window is None else max(window, 1),
        causal=chance.random() < 0.7,
        sinks=chance.choice([0, 0, 1, 4, 70]),
        kind=kind,
        learned_sinks=learned_sinks,
        logit_cap=chance.choice([1.0, 20.0]) if capped else None,
        size=chance.choice([1.0, 1.0, 3.0]),
        layout=chance.choice([LAYOUTS[0], *LAYOUTS]),
        **places._asdict(),
    )


class _Places(NamedTuple):
    """How many keys a call has, and what its visibility says of queries and keys."""

    keys: int
    documents: list[list[int]] | None = None
    positions: list[list[int]] | None = None
    key_documents: list[list[int]] | None = None
    key_positions: list[list[int]] | None = None


def _places(chance: random.Random, kind: str, batch: int, queries: int) -> _Places:
    if kind == "plain":
        return _Places(queries)
    extra = chance.randint(1, 150)
    if kind == "more keys":
        return _Places(queries + extra)
    if kind == "ring":
        return _ring(chance, batch, queries, extra)
    if kind == "begun before":
        of_first = [chance.choice([1, 2, extra]) for _ in range(batch)]
        if chance.random() < 0.5:
            return _Places(queries, positions=[list(range(first, first + queries)) for first in of_first])
        documents = [_documents(chance, queries, chance.choice(KINDS[1:6])) for _ in range(batch)]
        positions = [_positions(row, first) for row, first in zip(documents, of_first, strict=True)]
        return _Places(queries, documents, positions)
    return _Places(queries, [_documents(chance, queries, kind) for _ in range(batch)])


def _ring(chance: random.Random, batch: int, queries: int, extra: int) -> _Places:
    """Keys of some positions before, among and behind those of the queries, in any order."""
    first, everywhere = chance.randint(0, extra), range(queries + extra)
    keys = chance.choice([len(everywhere), chance.randint(1, len(everywhere))])
    positions = [list(everywhere[first : first + queries])] * batch
    key_positions = [chance.sample(everywhere, keys) for _ in range(chance.choice([1, batch]))]
    if chance.random() < 0.5:
        return _Places(keys, positions=positions, key_positions=key_positions)
    rows = [_documents(chance, len(everywhere), "holes") for _ in key_positions]
    of_keys = [[row[place] for place in places] for row, places in zip(rows, key_positions, strict=True)]
    of_queries = [row[first : first + queries] for row in rows] * (batch // len(rows))
    return _Places(keys, of_queries, positions, of_keys, key_positions)


def _positions(documents: list[int], first: int) -> list[int]:
    """Of each token in its document, of which the row's first begins before the row."""
    begun: dict[int, int] = {}
    for place, document in enumerate(documents):
        if document != PADDING:
            begun.setdefault(document, place if begun else place - first)
    return [place - begun.get(document, 0) for place, document in enumerate(documents)]


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
    complaints, _ = _settled(case, backend, device, measure(case, backend, device).tolist())
    return complaints


def _settled(case: Case, backend: str, device: str, measured: list[list[float]]) -> tuple[list[str], int]:
    """The complaints that are no luck of few numbers, and over how many draws of the numbers.

    Where only errors are too large, as plain PyTorch may be right by chance, the case gets other numbers
    seven times, and errors and allowances are compared in the mean square over all eight; and over 64 if
    eight do not settle it, as where one query alone sees two keys. No draw may err much more than all allow.
    """
    complaints, pooled = _complaints(measured), [torch.tensor(measured, dtype=torch.float64)]
    for draws in DRAWS:
        if not complaints or not all(complaint.startswith("error of") for complaint in complaints):
            break
        more = range(len(pooled), draws)
        pooled += [measure(case, backend, device, numbers).cpu() for numbers in more]
        drawn = torch.stack(pooled)
        found, allowed = drawn.square().mean(0).sqrt().unbind(-1)
        found = torch.maximum(found, drawn[..., 0].amax(0) / MOST_OF_ONE)
        complaints = _complaints(torch.stack([found, allowed], -1).tolist())
    return complaints, len(pooled)


def _complaints(measured: list[list[float]]) -> list[str]:
    return [
        f"{name}: {found:.3g}, {allowed:.3g} is allowed"
        for name, (found, allowed) in zip(CHECKS, measured, strict=True)
        if not found <= allowed  # also where it is NaN
    ]


def measure(case: Case, backend: str, device: str = "cpu", numbers: int = 0) -> Tensor:
    """What was found and what is allowed for each of `CHECKS`, [len(CHECKS), 2], without waiting for it.

    `numbers` chooses among the numbers that the case may hold.
    """
    generator = torch.Generator(device).manual_seed(case.seed + (numbers << 32))

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        numbers = torch.randn(shape, generator=generator, device=device) * size
        return laid_out(numbers.to(case.dtype), case.layout).requires_grad_()

    heads = case.kv_heads * case.groups
    query = normal(case.batch, case.queries, heads, case.head_dim, size=case.size)
    key = normal(case.batch, case.keys, case.kv_heads, case.head_dim, size=case.size)
    value = normal(*key.shape)
    tensors = [query, key, value, *([normal(heads)] if case.learned_sinks else [])]
    gradient = normal(*query.shape).detach()
    visibility = case.visibility(device)
    visible_BTS = visibility.mask(case.queries, case.keys, gradient.device).expand(case.batch, -1, -1)

    def attend(name: str) -> Callable[[list[Tensor]], Tensor]:
        return lambda tensors: _call(case, name, visibility, tensors)

    output = attend(backend)(tensors)
    gradients = torch.autograd.grad(output, tensors, gradient, retain_graph=True)
    ours = [tensor.detach().double() for tensor in (output, *gradients)]
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
    nothing = gradient.new_zeros((), dtype=torch.float64)
    found: list[tuple[Tensor, Tensor]] = []
    for got, wanted, usual, of_usual in zip(ours, exact, plain, of_plain, strict=True):
        # Plain PyTorch may be exact by luck: a query with one key has weight one and no gradient, as two
        # equal sums of D products cancel. Each errs by about eps sqrt(D) in another order, for inputs of size
        # 1 (the probabilistic bound of Higham and Mary 2019 is larger). Tensor cores cut off each of the
        # D / 16 numbers that they add up (Fasi et al. 2021), in one direction: about eps D / 8 for many.
        # Twice that for each query and head; all that is compared sums them up with weights of at most one.
        accumulated = torch.promote_types(case.dtype, torch.float32)
        of_a_sum = max(case.head_dim**0.5, case.head_dim / 8)
        sums = (gradient.numel() / case.head_dim) ** 0.5
        floor = 2 * torch.finfo(accumulated).eps * of_a_sum * sums * case.size
        found.append(((got - wanted).norm(), factor * share * (usual - of_usual).norm() + floor))
    if not case.learned_sinks:
        found.append((nothing, nothing))
    blind_BT, unseen_BS = ~visible_BTS.any(2), ~visible_BTS.any(1)
    for tensor, silent in zip(ours[:4], (blind_BT, blind_BT, unseen_BS, unseen_BS), strict=True):
        found.append((((tensor != 0) & silent[..., None, None]).sum(), nothing))
    changed = _changed_unseen(case, attend(backend), tensors, output, visible_BTS)
    if case.size != 1:
        # Weights of large scores may be too small for the dtype of dV.
        output = attend(backend)([query / case.size**2, *tensors[1:]])
    found += [(_read_wrongly(case, output, value, visible_BTS), nothing), (changed, nothing)]
    return torch.stack([torch.stack([one.double(), other]) for one, other in found])


def laid_out(numbers: Tensor, layout: str) -> Tensor:
    """The same heads in memory in another way."""
    if numbers.dim() != 4 or layout == LAYOUTS[0]:
        return numbers
    if layout == "heads before tokens":
        return numbers.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "numbers apart":
        return torch.stack([numbers, numbers], -1)[..., 0]
    return torch.nn.functional.pad(numbers, (1, 2))[..., 1:-2]


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


def _read_wrongly(case: Case, output_BTHD: Tensor, value: Tensor, visible_BTS: Tensor) -> Tensor:
    """How many pairs of query and key disagree with dV, which is not zero exactly for the keys that are read.

    As many queries at once as a head has dimensions to tell them apart; some hundred of a long case. Each
    key-value head counts by itself.
    """
    firsts = list(range(0, case.queries, case.head_dim))
    wrong = visible_BTS.new_zeros((), dtype=torch.int64)
    passes = min(math.ceil(TOLD_APART / case.head_dim), len(firsts))
    for first in random.Random(case.seed).sample(firsts, passes):
        count = min(case.head_dim, case.queries - first)
        told_apart = torch.zeros_like(output_BTHD)
        told_apart[:, first : first + count] = torch.eye(
            count, case.head_dim, dtype=output_BTHD.dtype, device=output_BTHD.device
        )[:, None]
        (dv_BSKD,) = torch.autograd.grad(output_BTHD, value, told_apart, retain_graph=True)
        read_BSKD = dv_BSKD[..., :count] != 0
        wanted_BSD = visible_BTS[:, first : first + count].mT
        wrong = wrong + (read_BSKD != wanted_BSD[:, :, None]).sum()
    return wrong


def _changed_unseen(
    case: Case,
    attend: Callable[[list[Tensor]], Tensor],
    tensors: list[Tensor],
    before: Tensor,
    visible_BTS: Tensor,
) -> Tensor:
    """How many numbers of one query's output change when all that it cannot see does."""
    chance = random.Random(case.seed)
    row, token = chance.randrange(case.batch), chance.randrange(case.queries)
    hidden_BS11 = torch.zeros_like(visible_BTS[:, 0])
    hidden_BS11[row] = ~visible_BTS[row, token]
    hidden_BS11 = hidden_BS11[..., None, None]
    query, key, value, *sinks = tensors
    query = query * -2
    query[row, token] = tensors[0][row, token]
    # In another layout sums may round in another order.
    changed = (query, key + 30 * hidden_BS11, value - 1000 * hidden_BS11)
    after = attend([*(laid_out(tensor, case.layout) for tensor in changed), *sinks])
    return (before[row, token] != after[row, token]).sum()


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


class Wanted(NamedTuple):
    """What the command line asks for."""

    backend: str
    cases: int
    first: int = 0
    device: str = "cpu"
    processes: int = 1
    threads: int = 1
    seconds: float = math.inf


def read(words: Sequence[str]) -> Wanted:
    """The words of the command line.

    Raises:
        UserError: for a word that is not understood, and a backend that serves no call on the device.
    """
    in_place = [word for word in words if "=" not in word]
    if not 2 <= len(in_place) <= 3:
        raise UserError(
            f"{len(in_place)} words without '=': BACKEND COUNT [FIRST_SEED] are allowed; {EXAMPLE}"
        )
    given = dict(zip(Wanted._fields, in_place, strict=False))
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name not in ("device", "processes", "threads", "seconds"):
            raise UserError(f"{word}: device=, processes=, threads= and seconds= are allowed; {EXAMPLE}")
        if equals:
            given[name] = value
    numbers = {name: _number(name, given[name]) for name in given if name not in ("backend", "device")}
    wanted = Wanted(given["backend"], device=given.get("device", "cpu"), **numbers)
    if wanted.backend not in MODULES:
        raise UserError(f"{wanted.backend}: {', '.join(MODULES)} are allowed; {EXAMPLE}")
    try:
        generation = compute_capability(torch.device(wanted.device))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={wanted.device}: {str(error).splitlines()[0]}; try device=cpu") from None
    request = Request(
        device=torch.device(wanted.device).type, compute_capability=generation, dtype=torch.bfloat16
    )
    refusal = capabilities(wanted.backend).refusal(request)
    if refusal is not None:
        raise UserError(f"{wanted.backend} with device={wanted.device}: {refusal}")
    return wanted


def _number(name: str, text: str) -> int | float:
    least = 1 if name in ("cases", "processes", "threads") else 0
    most = math.inf if name == "seconds" else 2**31
    try:
        number = float(text) if name == "seconds" else int(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise UserError(f"{name}={text}: a number from {least} to {most} is allowed; {EXAMPLE}")
    return number


def main(*words: str) -> int:
    """Check as many cases as asked for that the backend claims, and print the outcome as a line of JSON."""
    backend, count, first, device, processes, threads, seconds = read(words)
    started, deadline = time.perf_counter(), time.time() + seconds
    # Of compiled kernels each process compiles those of its own shapes. As that takes some much longer than
    # others, half of the cases go to who is ready for more.
    shapes = [shape for shape in SHAPES if device != "cpu" and _serves(backend, device, shape)]
    own = count // (2 * processes)
    shares = [
        (
            backend,
            own,
            first + process * SEEDS_A_PROCESS,
            device,
            shapes[process % max(len(shapes), 1) :: processes],
            deadline,
        )
        for process in range(processes)
    ]
    context = get_context("spawn")
    left = context.Value("q", count - own * processes)
    if processes == 1:
        _begin(left, threads)
        outcomes = [_check(*shares[0])]
    else:
        with ProcessPoolExecutor(processes, context, _begin_process, (left, threads)) as pool:
            outcomes = list(pool.map(_check, *zip(*shares, strict=True)))
    failed = sorted(seed for outcome in outcomes for seed in outcome.failed)
    drawn = sum((outcome.drawn for outcome in outcomes), Counter[str]())
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None,
        "backend": backend,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "cases": sum(outcome.checked for outcome in outcomes),
        "mismatches": len(failed),
        "failed_seeds": failed[:20],
        "seeds": [outcome.seeds for outcome in outcomes],
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "drawn": dict(sorted(drawn.items())),
    }
    print(json.dumps(report))
    return min(len(failed), 1)


def _serves(backend: str, device: str, shape: Shape) -> bool:
    request = Request(
        device=device,
        compute_capability=compute_capability(torch.device(device)),
        dtype=shape.dtype,
        head_dim=shape.head_dim,
        sink_logits=shape.special == "learned sinks",
        logit_cap=shape.special == "logit cap",
        separate_keys=shape.special == "ring",
        more_keys=shape.special == "more keys",
    )
    return capabilities(backend).refusal(request) is None


class Outcome(NamedTuple):
    """What one process found, of seeds from the first to the last."""

    checked: int
    failed: list[int]
    seeds: tuple[int, int]
    drawn: Counter[str]


def _prepare() -> None:
    for module, options in (
        (torch._dynamo.config, DYNAMO),
        (torch._functorch.config, FUNCTORCH),
        (torch._inductor.config, INDUCTOR),
    ):
        for name, value in options.items():
            setattr(module, name, value)


def _begin(left: "Synchronized[int]", threads: int) -> None:
    """Share the cases that are left with other processes."""
    global _left
    _left = left
    torch.set_num_threads(threads)


def _begin_process(left: "Synchronized[int]", threads: int) -> None:
    """The same in a process that was started for it."""
    _prepare()
    _begin(left, threads)


def _take() -> int:
    """Some of the cases that no process has taken; zero where there are none."""
    assert _left is not None
    with _left.get_lock():
        taken = min(AT_ONCE, _left.value)
        _left.value -= taken
    return taken


def _check(
    backend: str, own: int, first: int, device: str, shapes: Sequence[Shape], deadline: float
) -> Outcome:
    checked, seed = 0, first
    failed: list[int] = []
    drawn: Counter[str] = Counter()
    while time.time() < deadline and (count := min(AT_ONCE, max(0, own - checked)) or _take()):
        cases: list[Case] = []
        measured: list[Tensor] = []
        while len(cases) < count and not (cases and time.time() > deadline):
            case = draw(seed, shapes=shapes)
            seed += 1
            if not supported(case, backend, device):
                continue
            cases.append(case)
            try:
                measured.append(measure(case, backend, device))
            except Exception:
                traceback.print_exc()
                measured.append(torch.full((len(CHECKS), 2), torch.nan, dtype=torch.float64, device=device))
        # Once for many cases, as the host would wait for the device each time.
        for case, of_case in zip(cases, torch.stack(measured).tolist(), strict=True):
            drawn.update(case.properties())
            complaints, draws = _settled(case, backend, device, of_case)
            if draws > 1:
                drawn[f"cases compared over {draws} draws of numbers"] += 1
            if complaints:
                failed.append(case.seed)
                print(case, *complaints, sep="\n  ", file=sys.stderr, flush=True)
        checked += len(cases)
        torch.cuda.empty_cache()  # of long cases, which other processes need
        print(f"{backend}: {checked} cases, {len(failed)} mismatches", file=sys.stderr, flush=True)
    return Outcome(checked, failed, (first, seed - 1), drawn)


if __name__ == "__main__":
    _prepare()
    sys.exit(exit_status(lambda: main(*sys.argv[1:])))
