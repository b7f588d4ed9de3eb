"""Time how fast windowlm and transformers' Mistral of the same shape go on with a text, on a CPU or a GPU.

python scripts/benchmark_decoding.py --shape speed --batches 1 64 --out docs/results/decoding_h100
python scripts/benchmark_decoding.py --shape default --prompts 256 1024 4096 --tokens 64 --out docs/results

All take the most probable token after the same prompt of drawn weights. `windowlm` is the generator with
its tokenizer and streams of text, `windowlm compiled` the same compiled, each made once, as
`scripts/generate.py` does; `transformers dynamic` and `transformers static` are `generate` with those
caches. Tokens a second are the tokens between a short and a long production of a round over the difference
of their times, the median of rounds in turns; the prompt's are its tokens over the time until the first
token is chosen, which for transformers is all that the production of one token takes, and for ours what it
counts itself, its tokenizer left out. Python collects its garbage between productions, not in them. The
columns "of forward" and "of training" are the prompt's pace over that of our model's forward pass alone in
the same rounds, compiled as in training for `windowlm compiled`: without and with what a backward pass
needs; MiB are the keys and values that the cache holds behind the prompt. A plot shows both by the length of
the prompt, where there are several.

Shapes: B batch, T tokens.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_attention import circumstances, one_line, version_of
from benchmark_training import SHAPES, shape_of
from measure_streaming import text_tokens
from out_argument import out_folder
from rich.console import Console
from rich.table import Table
from training_entrants import Shape, mistral_config

from windowlm.bundle import Bundle
from windowlm.errors import exit_status
from windowlm.evaluation.report import png
from windowlm.generation.config import SamplingConfig
from windowlm.generation.generate import PREFILL_TOKENS, Generator
from windowlm.model.decoder import Decoder
from windowlm.tokenization.tokenizer import BytePairTokenizer
from windowlm.tokenization.training import train_bpe
from windowlm.training.compilation import hidden_states

OURS, COMPILED = "windowlm", "windowlm compiled"
PEERS = {"transformers dynamic": None, "transformers static": "static"}
SHORT = 32
END_MARK = "<end>"
PACKAGES = ("torch", "triton", "transformers", "windowlm")
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
Produce = Callable[[int], float | None]  # makes so many tokens; the prompts' seconds, where they are told


def main() -> int:
    """Run the command; 2 is the status of a user's mistake."""
    options = parse_options()
    console = Console(width=None if sys.stdout.isatty() else 120)
    report: dict[str, Any] = {**circumstances(torch.device(options.device), PACKAGES), "rows": []}
    report |= {"shape": options.shape.__dict__, "precision": options.precision, "tokens": options.tokens}
    tokenizer = drawn_tokenizer(options.shape.vocabulary_size)
    for batch, length in itertools.product(options.batches, options.prompts):
        ids = text_tokens(tokenizer, length, "cpu")[0].numpy()
        rows = measured(options, tokenizer, [tokenizer.decode(ids.tolist())] * batch)
        report["rows"] += rows
        console.print(table_of(rows, batch, length))
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "decoding.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.out is not None and len(options.prompts) > 1:
        (options.out / "decoding.png").write_bytes(plot_of(report))
    return 0


def parse_options() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    entrants = [OURS, COMPILED, *PEERS]
    parser.add_argument("--shape", default="speed" if cuda else "default", help=f"{', '.join(SHAPES)}, sizes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], metavar="B")
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[2048], metavar="T", help="tokens of a prompt"
    )
    parser.add_argument("--tokens", type=int, default=256, help="produced between the two times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--precision", choices=DTYPES, default="bf16-true" if cuda else "32-true")
    parser.add_argument("--entrants", nargs="+", choices=entrants, default=entrants)
    parser.add_argument(
        "--out", type=out_folder, metavar="FOLDER", help="write decoding.json and decoding.png"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: this machine shows no CUDA GPU; try --device cpu")
    for name in ("tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: a number from 1 on is allowed")
    for name in ("batches", "prompts"):
        if (least := min(getattr(options, name))) < 1:
            parser.error(f"--{name} {least}: numbers from 1 on are allowed")
    options.shape = shape_of(options.shape, parser)
    return options


def drawn_tokenizer(vocabulary_size: int) -> BytePairTokenizer:
    """Trained on the standard library's sources, so that text streams through ours as a user's would."""
    sources = sorted(Path(json.__file__).parents[1].glob("**/*.py"))
    texts = (
        path.read_text(encoding="utf-8", errors="replace")
        for path in sources
        if "site-packages" not in path.parts
    )
    return BytePairTokenizer(train_bpe(texts, vocabulary_size, END_MARK), END_MARK, vocabulary_size)


def measured(
    options: argparse.Namespace, tokenizer: BytePairTokenizer, prompts: list[str]
) -> list[dict[str, Any]]:
    """A row for each entrant at one batch."""
    length = len(tokenizer.encode(prompts[0]))
    rows: list[dict[str, Any]] = []
    produce_of: dict[str, Produce] = {}
    lengths = (1, SHORT, SHORT + options.tokens)
    for name in options.entrants:
        row: dict[str, Any] = {"entrant": name, "batch": len(prompts), "prompt_tokens": length}
        rows.append(row)
        try:
            started = time.perf_counter()
            produce = produce_of[name] = entrant(name, options, tokenizer, prompts)
            row["cache_bytes"] = cache_bytes(name, options, tokenizer, prompts)
            for tokens in lengths:
                produce(tokens)
            row["start_s"] = time.perf_counter() - started
        except Exception as error:  # a peer may lack its package, memory or compiler
            produce_of.pop(name, None)
            row["problem"] = one_line(error)
    times: dict[tuple[str, int], list[float]] = {}
    prompt_times: dict[str, list[float]] = {}
    passes = {
        (compiled, training): forward_pass(options, len(prompts), length, compiled, training)
        for compiled in sorted({name == COMPILED for name in produce_of})
        for training in (False, True)
    }
    forward_times: dict[tuple[bool, bool], list[float]] = {kind: [] for kind in passes}
    for _ in range(options.rounds):
        for kind, forward in passes.items():
            forward_times[kind].append(seconds(forward, 1)[0])
        for name, produce in produce_of.items():
            for tokens in lengths:
                whole_s, prompt_s = seconds(produce, tokens)
                times.setdefault((name, tokens), []).append(whole_s)
                if tokens == 1:
                    prompt_times.setdefault(name, []).append(whole_s if prompt_s is None else prompt_s)
    for row in rows:
        if row["entrant"] not in produce_of:
            continue
        short_s, long_s = (times[row["entrant"], tokens] for tokens in lengths[1:])
        behind_s = statistics.median(long - short for short, long in zip(short_s, long_s, strict=True))
        if behind_s <= 0:
            row["problem"] = "the times of its prompts differ by more than the tokens take; try more --tokens"
            continue
        prompt = statistics.median(prompt_times[row["entrant"]])
        row["tokens_per_second"] = len(prompts) * options.tokens / behind_s
        row["prompt_tokens_per_second"] = len(prompts) * length / prompt
        forward_s, training_s = (forward_times[row["entrant"] == COMPILED, kind] for kind in (False, True))
        row["prompt_over_forward"] = statistics.median(forward_s) / prompt
        row["prompt_over_training_forward"] = statistics.median(training_s) / prompt
        row["seconds"] = {tokens: times[row["entrant"], tokens] for tokens in lengths}
        row["prompt_seconds"] = prompt_times[row["entrant"]]
        row["forward_seconds"] = forward_s
        row["training_forward_seconds"] = training_s
    return rows


def seconds(produce: Produce, tokens: int) -> tuple[float, float | None]:
    """Of the host's clock, all work on the device done; and what `produce` tells."""
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    told = produce(tokens)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken = time.perf_counter() - started
    gc.enable()
    return taken, told


def entrant(
    name: str, options: argparse.Namespace, tokenizer: BytePairTokenizer, prompts: list[str]
) -> Produce:
    """What produces so many tokens behind each prompt."""
    torch.manual_seed(0)
    if name in PEERS:
        return transformers_mistral(PEERS[name], options, tokenizer, prompts)
    generators: dict[int, Generator] = {}

    def produce(tokens: int) -> float:
        if tokens not in generators:
            settings = SamplingConfig(max_new_tokens=tokens, temperature=0, stop_at_end=False)
            # Each its own model, whose weights lie as its last generator wants them.
            bundle = Bundle(our_model(options), tokenizer, {"sequence_length": 2**20}, Path())
            generators[tokens] = Generator(bundle, settings, compiled=name == COMPILED)
        generator = generators[tokens]
        before = generator.pace.prompt_seconds
        results = generator.batch(prompts)
        assert all(len(result.tokens) == tokens for result in results)
        return generator.pace.prompt_seconds - before

    return produce


@torch.no_grad()
def cache_bytes(
    name: str, options: argparse.Namespace, tokenizer: BytePairTokenizer, prompts: list[str]
) -> int:
    """Of the keys and values that are held behind the prompts."""
    tokens_BT = torch.tensor([tokenizer.encode(prompt).tolist() for prompt in prompts], device=options.device)
    if name not in PEERS:
        model = our_model(options)
        cache = model.new_cache(tokens_BT.shape[1])
        model.hidden(tokens_BT, cache=cache)
        return cache.bytes_held
    model, given = peer_model(PEERS[name], options)
    held = model.generate(tokens_BT, max_new_tokens=1, return_dict_in_generate=True, **given).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)


def our_model(options: argparse.Namespace) -> Decoder:
    """Drawn, in evaluation mode."""
    shape: Shape = options.shape
    model = Decoder(shape.model_config(), shape.vocabulary_size)
    return model.to(options.device, DTYPES[options.precision]).eval()


def forward_pass(
    options: argparse.Namespace, batch: int, length: int, compiled: bool, training: bool
) -> Produce:
    """The model alone over so many prompts, as many rows at a time as they are read; ready to be timed.

    In training it keeps what a backward pass would need, though none follows.
    """
    model = our_model(options).train(training)
    hidden, visibilities = hidden_states(model, compiled=compiled), model.visibilities()
    rows = min(batch, max(PREFILL_TOKENS[options.device] // length, 1))
    tokens_BT = torch.randint(0, options.shape.vocabulary_size, (batch, length), device=options.device)

    def forward(_: int) -> None:
        with torch.set_grad_enabled(training):
            for tokens_RT in tokens_BT.split(rows):
                model.head(hidden(tokens_RT, visibilities=visibilities)[:, -1])

    for _ in range(2):
        forward(1)
    return forward


def transformers_mistral(
    cache: str | None, options: argparse.Namespace, tokenizer: BytePairTokenizer, prompts: list[str]
) -> Produce:
    """Hugging Face transformers' Mistral of the same shape."""
    model, given = peer_model(cache, options)
    encoded = [tokenizer.encode(prompt).astype("int64").tolist() for prompt in prompts]
    tokens_BT = torch.tensor(encoded, device=options.device)

    def produce(tokens: int) -> None:
        model.generate(tokens_BT, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **given)

    return produce


def peer_model(cache: str | None, options: argparse.Namespace) -> tuple[Any, dict[str, str]]:
    """Drawn, in evaluation mode; and what asks for the cache."""
    from transformers import MistralForCausalLM

    config = mistral_config(options.shape, max_position_embeddings=2**16)
    model = MistralForCausalLM(config).to(options.device, DTYPES[options.precision]).eval()
    return model, {} if cache is None else {"cache_implementation": cache}


def plot_of(report: dict[str, Any]) -> bytes:
    """PNG: tokens a second, and what the cache holds, by the length of the prompt; one row a batch."""
    import altair as alt

    columns = ("entrant", "batch", "prompt_tokens", "tokens_per_second")
    values = [
        {**{name: row[name] for name in columns}, "mib": row["cache_bytes"] / 2**20}
        for row in report["rows"]
        if "tokens_per_second" in row
    ]
    panels = [
        alt.Chart(
            alt.Data(values=[value for value in values if value["batch"] == batch]),
            title=f"batch {batch}",
            width=300,
        )
        .mark_line(point=True)
        .encode(
            x=alt.X("prompt_tokens:Q", title="tokens of the prompt", scale=alt.Scale(type="log", base=2)),
            y=alt.Y(f"{column}:Q", title=title, scale=alt.Scale(type="log")),
            color=alt.Color("entrant:N", sort=[OURS, COMPILED, *PEERS], title=None),
        )
        for batch in dict.fromkeys(value["batch"] for value in values)
        for column, title in (("tokens_per_second", "tokens/s behind the prompt"), ("mib", "MiB of cache"))
    ]
    title = f"{report['device']}, window {report['shape']['window']:,}, {report['precision']}"
    return png(alt.concat(*panels, columns=2, title=title))


def table_of(rows: list[dict[str, Any]], batch: int, length: int) -> Table:
    """For the terminal."""
    table = Table(title=f"batch {batch}, prompts of {length:,}, transformers {version_of('transformers')}")
    numbers = ("tokens/s", "prompt tokens/s", "of forward", "of training", "MiB", "start s")
    for column in ("entrant", *numbers, "note"):
        table.add_column(column, justify="right" if column in numbers else "left")
    for row in rows:
        if "problem" in row:
            table.add_row(row["entrant"], *[""] * len(numbers), row["problem"])
            continue
        table.add_row(
            row["entrant"],
            f"{row['tokens_per_second']:,.1f}",
            f"{row['prompt_tokens_per_second']:,.0f}",
            f"{row['prompt_over_forward']:.2f}",
            f"{row['prompt_over_training_forward']:.2f}",
            f"{row['cache_bytes'] / 2**20:,.2f}",
            f"{row['start_s']:.1f}",
            "",
        )
    return table


if __name__ == "__main__":
    sys.exit(exit_status(main))
