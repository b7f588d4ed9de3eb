"""Drawn sequences cut over 2, 3 and 4 processes, compared with one process: outputs, gradients, bytes.

`python -m tests.parallel.cases COUNT [FIRST_SEED] [graph]` checks many more than the tests do; `graph` those
whose exchange a compiled graph holds, compiled to graphs, which count no bytes. An error is the largest
absolute difference over a tensor, divided by the largest number of that tensor where this is above 1.
"""

import json
import random
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.processes import run_in_processes
from windowlm.attention.dispatch import attention
from windowlm.attention.document_layout import PADDING
from windowlm.attention.window import Visibility
from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.model.decoder import Decoder
from windowlm.parallel.context_group import ContextGroup
from windowlm.parallel.parts import parts_of
from windowlm.parallel.sequence_shard import shard_visibilities

MOST_PROCESSES = 4
ALLOWED = {torch.float32: 1e-6, torch.float64: 1e-12}
VOCABULARY = 29
UNSCORED = -100


@dataclass(frozen=True)
class Case:
    """One batch, cut over so many processes: through attention alone, or through a whole model."""

    seed: int
    processes: int
    batch: int
    shard: int
    kv_heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    windows: tuple[int | None, ...]
    sinks: int
    padding: str
    rows: tuple[tuple[int, ...], ...] | None
    whole_model: bool
    convolution: int | None
    ngrams: bool
    shares: tuple[float, ...] | None
    in_graph: bool = False

    @property
    def tokens(self) -> int:
        return self.processes * self.shard

    def cuts(self) -> list[slice]:
        """The tokens of each process."""
        return parts_of(self.tokens, self.processes, self.shares)

    def documents(self) -> Tensor | None:
        return None if self.rows is None else torch.tensor(self.rows, dtype=torch.int32)

    def layer_sinks(self) -> dict[int | None, int]:
        return {window: self.sinks if window is not None else 0 for window in self.windows}

    def properties(self) -> Iterator[str]:
        """What to count cases by."""
        yield f"{self.processes} processes"
        yield str(self.dtype).removeprefix("torch.")
        yield "whole model" if self.whole_model else "attention alone"
        spans = ends = False
        starts = [cut.start for cut in self.cuts()[1:]]
        if self.rows is not None:
            for row in self.rows:
                for start in starts:
                    spans |= row[start - 1] == row[start] != PADDING
                ends |= any(
                    row[token - 1] != row[token] and token not in starts for token in range(1, self.tokens)
                )
        numbers = [window for window in self.windows if window is not None]
        longest = max(cut.stop - cut.start for cut in self.cuts())
        for name, there in (
            ("W-1 > shard", any(window - 1 > longest for window in numbers)),
            ("W-1 > two shards", any(window - 1 > 2 * longest for window in numbers)),
            ("several documents", self.rows is not None),
            ("a document spans shards", spans),
            ("a document ends inside a shard", ends),
            ("padding", self.rows is not None and any(PADDING in row for row in self.rows)),
            ("padding inside documents", self.padding == "holes"),
            ("sinks", self.sinks > 0),
            ("GQA", self.groups > 1),
            ("no window", None in self.windows),
            ("layer pattern", len(set(self.windows)) > 1),
            ("short convolution", self.convolution is not None),
            ("n-gram embeddings", self.ngrams),
            ("parts of several lengths", self.shares is not None),
        ):
            if there:
                yield name


def draw(seed: int) -> Case:
    """Draw the case of this seed; always the same one."""
    chance = random.Random(seed)
    processes = chance.choice([2, 3, 4])
    shard = chance.choice([1, 2, chance.randint(3, 12), chance.randint(13, 40)])
    tokens, batch = processes * shard, chance.randint(1, 3)
    sizes = [None, 1, 2, shard, shard + 1, shard + 2, 2 * shard + 2, tokens, chance.randint(1, tokens + 3)]
    whole_model = chance.random() < 0.5
    windows = tuple(chance.choice(sizes) for _ in range(chance.choice([1, 2, 3]) if whole_model else 1))
    padding = chance.choice(["none", "none", "left", "right", "both", "holes"])
    documents = None
    if padding != "none" or chance.random() < 0.6:
        documents = tuple(tuple(_documents(chance, tokens, shard, padding)) for _ in range(batch))
    return Case(
        seed=seed,
        processes=processes,
        batch=batch,
        shard=shard,
        kv_heads=chance.choice([1, 2]),
        groups=chance.choice([1, 2, 3]),
        head_dim=chance.choice([4, 8]),
        dtype=chance.choice([torch.float32, torch.float64]),
        windows=windows,
        sinks=chance.choice([0, 0, 1, 3, chance.randint(1, tokens)]),
        padding=padding,
        rows=documents,
        whole_model=whole_model,
        convolution=chance.choice([None, None, 2, 4]) if whole_model else None,
        ngrams=whole_model and chance.random() < 0.25,
        shares=_shares(chance, processes, shard),
    )


def draw_for_graph(seed: int) -> Case:
    """The same with windows that reach the process before and no further, in rows of one document each."""
    case, chance = draw(seed), random.Random(-1 - seed)
    least = min(cut.stop - cut.start for cut in case.cuts())
    windows = tuple(chance.choice([2, least + 1, chance.randint(2, least + 1)]) for _ in case.windows)
    plain: dict[str, Any] = {
        "sinks": 0,
        "padding": "none",
        "rows": None,
        "convolution": None,
        "ngrams": False,
    }
    return replace(case, windows=windows, in_graph=True, **plain)


DRAWS = {"plain": draw, "graph": draw_for_graph}


def _shares(chance: random.Random, processes: int, shard: int) -> tuple[float, ...] | None:
    """How the parts relate, in each third case; each gets a token where the mean is as many as that."""
    drawn = tuple(chance.choice([1.0, 1.5, 2.0, 3.0]) for _ in range(processes))
    return drawn if shard >= max(drawn) and chance.random() < 1 / 3 else None


def _documents(chance: random.Random, tokens: int, shard: int, padding: str) -> list[int]:
    documents: list[int] = []
    while len(documents) < tokens:
        following = documents[-1] + 1 if documents else 0
        documents += [following] * chance.choice([1, shard, chance.randint(1, tokens)])
    documents = documents[:tokens]
    if padding in ("left", "both"):
        padded = chance.randint(0, tokens // 2)
        documents[:padded] = [PADDING] * padded
    if padding in ("right", "both"):
        padded = chance.randint(0, tokens // 2)
        documents[tokens - padded :] = [PADDING] * padded
    if padding == "holes":
        documents = [PADDING if chance.random() < 0.2 else document for document in documents]
    return documents


class Measured(NamedTuple):
    """Largest error of outputs and gradients, and bytes that this process sent and should have sent."""

    output: float
    gradients: float
    sent: int
    expected: int


def measure(case: Case, group: ContextGroup) -> Measured:
    """Compare this process's part with one process that has the whole sequence."""
    group = ContextGroup(group.processes, case.shares)
    measured = (_of_model if case.whole_model else _of_attention)(case, group)
    return measured._replace(expected=0) if case.in_graph else measured


def _of_attention(case: Case, group: ContextGroup) -> Measured:
    generator = torch.Generator().manual_seed(case.seed)
    heads = case.kv_heads * case.groups
    whole = [
        torch.randn(
            case.batch, case.tokens, count, case.head_dim, generator=generator, dtype=case.dtype
        ).requires_grad_()
        for count in (heads, case.kv_heads, case.kv_heads)
    ]
    upstream = torch.randn(whole[0].shape, generator=generator, dtype=case.dtype)
    (window,) = case.windows
    documents_BT, layers = case.documents(), case.layer_sinks()
    visibility = Visibility.build(window=window, sinks=layers[window], documents_BT=documents_BT)
    wanted = attention(*whole, visibility)
    wanted_gradients = torch.autograd.grad(wanted, whole, upstream)
    shards = shard_visibilities(layers, group, case.batch, case.tokens, documents_BT=documents_BT)
    own = [group.shard(tensor).detach().clone().requires_grad_() for tensor in whole]
    output = _called(case, shards[window].attend, attention, *own)
    gradients = torch.autograd.grad(output, own, group.shard(upstream))
    return Measured(
        error(output, group.shard(wanted)),
        max(
            error(gradient, group.shard(of_whole))
            for gradient, of_whole in zip(gradients, wanted_gradients, strict=True)
        ),
        group.bytes_sent,
        bytes_to_send(case, visibility, group),
    )


def _called(case: Case, function: Any, *arguments: Any, **options: Any) -> Tensor:
    """What the function gives, as one graph where the case is for that."""
    if case.in_graph:
        torch.compiler.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    result: Tensor = function(*arguments, **options)
    return result


def _of_model(case: Case, group: ContextGroup) -> Measured:
    torch.manual_seed(case.seed)
    config = ModelConfig(
        layers=len(case.windows),
        dim=8 * case.kv_heads,
        heads=case.kv_heads * case.groups,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        feed_forward_dim=16,
        window=list(case.windows),
        attention_sinks=case.sinks,
        qk_norm=True,
        short_convolution=case.convolution,
        ngram_embeddings=NgramEmbeddingsConfig(orders=[2, 3], buckets=50) if case.ngrams else None,
    )
    model = Decoder(config, VOCABULARY).to(case.dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    documents_BT = case.documents()
    tokens_BT = torch.randint(VOCABULARY, (case.batch, case.tokens))
    targets_BT = torch.randint(VOCABULARY, (case.batch, case.tokens))
    if documents_BT is not None:
        targets_BT = targets_BT.masked_fill(documents_BT == PADDING, UNSCORED)
    count = max(int((targets_BT != UNSCORED).sum()), 1)
    parameters = list(model.parameters())
    wanted = model(tokens_BT, documents_BT)
    wanted_gradients = torch.autograd.grad(
        _summed(wanted, targets_BT) / count, parameters, materialize_grads=True
    )
    layers = dict(zip(model.layer_windows, model.config.layer_sinks(), strict=True))
    visibilities = shard_visibilities(
        layers,
        group,
        case.batch,
        case.tokens,
        documents_BT=documents_BT,
        earlier=model.earlier_tokens_read(),
    )
    output = _called(case, model, group.shard(tokens_BT), visibilities=visibilities)
    loss = _summed(output, group.shard(targets_BT)) / count
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    expected = 0
    for window in model.layer_windows:
        seen = Visibility.build(window=window, sinks=layers[window], documents_BT=documents_BT)
        expected += bytes_to_send(case, seen, group)
    if case.convolution is not None:
        # Queries, keys and values of each layer, and their gradients.
        each = (2 + case.groups) * case.kv_heads * case.head_dim * case.dtype.itemsize
        expected += len(case.windows) * each * sum(neighbours_to_send(case, case.convolution - 1, group))
    if case.ngrams:
        expected += 8 * neighbours_to_send(case, 2, group)[0]
    errors = [
        error(group.summed(gradient), of_whole)
        for gradient, of_whole in zip(gradients, wanted_gradients, strict=True)
    ]
    return Measured(error(output, group.shard(wanted)), max(errors), group.bytes_sent, expected)


def _summed(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=UNSCORED, reduction="sum"
    )


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference, relative to the largest number where that is above 1."""
    largest = float(wanted.detach().abs().max())
    difference = float((found.detach() - wanted.detach()).abs().max())
    return difference / max(largest, 1.0) if difference == difference else float("inf")


def tokens_to_send(case: Case, visibility: Visibility, group: ContextGroup) -> tuple[int, int]:
    """Tokens that this process must send and receive, counted from the whole mask."""
    visible_BTS = visibility.mask(case.tokens, case.tokens, torch.device("cpu")).expand(case.batch, -1, -1)
    sent = received = 0
    cuts = case.cuts()
    for reader, cut in enumerate(cuts):
        seen_BS = visible_BTS[:, cut, : cut.start].any(1)
        if reader == group.rank:
            received = int(seen_BS.sum())
        elif reader > group.rank:
            sent += int(seen_BS[:, cuts[group.rank]].sum())
    return sent, received


def neighbours_to_send(case: Case, count: int, group: ContextGroup) -> tuple[int, int]:
    """Tokens sent and received where each part reads so many before its own, of one run with its first."""
    rows = case.rows or ((0,) * case.tokens,) * case.batch
    cuts = case.cuts()
    own = cuts[group.rank]
    sent = received = 0
    for row in rows:
        for reader, cut in enumerate(cuts):
            start = token = cut.start
            while token and start - token < count and row[token - 1] == row[start]:
                token -= 1
                sent += own.start <= token < own.stop
                received += reader == group.rank
    return sent, received


def bytes_to_send(case: Case, visibility: Visibility, group: ContextGroup) -> int:
    """Keys and values sent to readers, and gradients sent to owners."""
    each = 2 * case.kv_heads * case.head_dim * case.dtype.itemsize
    return each * sum(tokens_to_send(case, visibility, group))


class Outcome(NamedTuple):
    """What one process found of each case that it took part in, by seed."""

    measured: dict[int, Measured]


def check(rank: int, count: int, first_seed: int, way: str = "plain") -> Outcome:
    """Measure the cases of so many seeds in this process."""
    groups = {size: ContextGroup(dist.new_group(list(range(size)))) for size in range(2, MOST_PROCESSES + 1)}
    measured = {}
    for seed in range(first_seed, first_seed + count):
        case = DRAWS[way](seed)
        if rank < case.processes:
            measured[seed] = measure(case, groups[case.processes])
    return Outcome(measured)


def wrong(case: Case, measured: Measured) -> list[str]:
    """What is not as it should be."""
    allowed = ALLOWED[case.dtype]
    complaints = [
        f"{name}: {found:.3g}, {allowed:g} is allowed"
        for name, found in (("outputs", measured.output), ("gradients", measured.gradients))
        if not found <= allowed
    ]
    if measured.sent != measured.expected:
        complaints.append(f"{measured.sent} bytes were sent, {measured.expected} should be")
    return complaints


def main(count: str, first_seed: str = "0", way: str = "plain") -> int:
    """Check so many cases and print the outcome as a line of JSON."""
    started = time.perf_counter()
    outcomes: list[Outcome] = run_in_processes(MOST_PROCESSES, check, int(count), int(first_seed), way)
    drawn: Counter[str] = Counter()
    largest: dict[str, float] = dict.fromkeys(("outputs float32", "gradients float32"), 0.0)
    largest |= dict.fromkeys(("outputs float64", "gradients float64"), 0.0)
    failed: list[int] = []
    sent = 0
    for seed in range(int(first_seed), int(first_seed) + int(count)):
        case = DRAWS[way](seed)
        drawn.update(case.properties())
        complaints: list[str] = []
        for outcome in outcomes[: case.processes]:
            found = outcome.measured[seed]
            complaints += wrong(case, found)
            sent += found.sent
            dtype = str(case.dtype).removeprefix("torch.")
            for name, of_name in (("outputs", found.output), ("gradients", found.gradients)):
                largest[f"{name} {dtype}"] = max(largest[f"{name} {dtype}"], of_name)
        if complaints:
            failed.append(seed)
            print(replace(case, rows=None), *complaints, sep="\n  ", file=sys.stderr)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "tests.parallel.cases", *sys.argv[1:]]),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None,
        "cases": int(count),
        "mismatches": len(failed),
        "failed_seeds": failed[:20],
        "largest_error": largest,
        "bytes_sent": sent,
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "drawn": dict(sorted(drawn.items())),
    }
    print(json.dumps(report))
    return min(len(failed), 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
