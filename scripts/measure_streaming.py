"""Measure what the rolling cache promises: the logits of one call, bytes by the formula, a flat pace.

python scripts/measure_streaming.py --out docs/results/streaming_cpu
python scripts/measure_streaming.py --checkpoint RUN_DIR --stream 1000000 --out FOLDER

Without a checkpoint the weights are drawn as those of a new model. The text is the source code of Python's
standard library. By chunk size: the largest difference of a logit from one call over ten windows, also with
model and cache in float64, and how far that one call itself is from float64. Over the greedy tokens: how
often the most probable next token differs from calls with the receptive field as context, where the two best
differ by more than 1e-4. Over the stream: bytes of the cache, tokens a second, and bits a token of the last
tenth beside the same tokens scored with just the receptive field as context. Behind it the cache that has
read all of it and a new one take the same chunks in turns: the ratio of their median times is free of what
else the machine does.

Shapes: B batch, T tokens, V vocabulary.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_attention import circumstances
from out_argument import out_folder

from windowlm.attention.kv_cache import KVCache
from windowlm.bundle import device_named, load
from windowlm.errors import exit_status
from windowlm.model.config import ModelConfig
from windowlm.model.cost import model_cost
from windowlm.model.decoder import Decoder
from windowlm.tokenization.tokenizer import BytesTokenizer, Tokenizer

CLOSE = 1e-4
# So many that the new one's first chunks, which see less than a window, do not move its median.
TURNS = 400


def main() -> int:
    """Run the command; 2 is the status of a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="a run's folder; default: drawn weights")
    parser.add_argument("--window", type=int, default=64, help="of drawn weights")
    parser.add_argument("--greedy", type=int, default=100_000, help="tokens whose greedy choice is compared")
    parser.add_argument("--stream", type=int, default=1_000_000, help="tokens that stream through")
    parser.add_argument("--chunk", type=int, default=256, help="tokens a chunk of the stream")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=out_folder, help="folder of streaming.json")
    options = parser.parse_args()
    for name in ("window", "greedy", "stream", "chunk"):
        if (number := getattr(options, name)) < 1:
            parser.error(f"--{name} {number}: a number from 1 on is allowed")
    device = device_named(options.device)
    torch.set_float32_matmul_precision("highest")
    if options.checkpoint is None:
        torch.manual_seed(0)
        tokenizer: Tokenizer = BytesTokenizer()
        model = Decoder(ModelConfig(window=options.window), tokenizer.vocabulary_size)
    else:
        bundle = load(options.checkpoint)
        model, tokenizer = bundle.model, bundle.tokenizer
    model = model.to(device).eval()
    tokens_1T = text_tokens(tokenizer, max(options.greedy, options.stream), options.device)
    with torch.no_grad():
        report: dict[str, Any] = {
            **circumstances(torch.device(options.device), ["torch"]),
            "windows": model.layer_windows,
            "weights": "drawn" if options.checkpoint is None else "trained",
            "one_call": distance_of_one_call(model, tokens_1T),
            "logit_difference": logit_differences(model, tokens_1T),
            "logit_difference_in_float64": logit_differences(copy.deepcopy(model).double(), tokens_1T),
            "greedy": greedy_differences(model, tokens_1T[:, : options.greedy], options.chunk),
            "stream": stream_figures(model, tokens_1T[:, : options.stream], options.chunk),
        }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "streaming.json").write_text(text + "\n", encoding="utf-8")
    return 0


def text_tokens(tokenizer: Tokenizer, count: int, device: str) -> torch.Tensor:
    """The first tokens of the standard library's sources, [1, T]."""
    found: list[int] = []
    for path in sorted(Path(json.__file__).parents[1].glob("**/*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            found += tokenizer.encode(path.read_text(encoding="utf-8", errors="replace")).tolist()
        if len(found) >= count:
            break
    return torch.tensor([found[:count]], device=device)


def streamed(
    model: Decoder, tokens_1T: torch.Tensor, chunks: Sequence[int], cache: KVCache | None = None
) -> Iterator[torch.Tensor]:
    """Logits [1, T, V] of chunk after chunk, sizes repeated."""
    cache, start = model.new_cache() if cache is None else cache, 0
    while True:
        for size in chunks:
            if start >= tokens_1T.shape[1]:
                return
            yield model(tokens_1T[:, start : start + size], cache=cache)
            start += size


def widest_window(model: Decoder) -> int:
    """Of its layers; 1 where none has one."""
    return max(window or 1 for window in model.layer_windows)


def distance_of_one_call(model: Decoder, tokens_1T: torch.Tensor) -> dict[str, float]:
    """How far the logits of one call over ten times the largest window are from the same in float64."""
    row_1T = tokens_1T[:, : 10 * widest_window(model)]
    wide_1TV = copy.deepcopy(model).double()(row_1T)
    difference = float((model(row_1T) - wide_1TV).abs().max())
    return {"largest_logit": float(wide_1TV.abs().max()), "difference_from_float64": difference}


def logit_differences(model: Decoder, tokens_1T: torch.Tensor) -> dict[str, float]:
    """The largest by chunk size, over ten times the largest window."""
    window = widest_window(model)
    row_1T = tokens_1T[:, : 10 * window]
    whole_1TV = model(row_1T)
    sizes = {
        "1": [1],
        "3": [3],
        "W - 1": [max(window - 1, 1)],
        "W": [window],
        "W + 1": [window + 1],
        "2 W": [2 * window],
        "mixed": [1, window + 7, 3, 1, 2 * window + 1, 1, 5],
    }
    return {
        name: float((torch.cat(list(streamed(model, row_1T, chunks)), 1) - whole_1TV).abs().max())
        for name, chunks in sizes.items()
    }


def greedy_differences(model: Decoder, tokens_1T: torch.Tensor, chunk: int) -> dict[str, int]:
    """Choices by chunks, and by single tokens over a tenth of the text, beside those of overlapping calls."""
    cost = model_cost(model.config, model.vocabulary_size, tokens_1T.shape[1], 4)
    counts = {"tokens": 0, "close": 0, "different": 0}
    for chunks, row_1T in (([chunk], tokens_1T), ([1], tokens_1T[:, : tokens_1T.shape[1] // 10])):
        reach = row_1T.shape[1] if cost.receptive_field is None else cost.receptive_field - 1
        start = 0
        block: list[torch.Tensor] = []
        span = max(4 * chunk, 4096)
        for logits_1TV in streamed(model, row_1T, chunks):
            block.append(logits_1TV)
            held = sum(part.shape[1] for part in block)
            if held < span and start + held < row_1T.shape[1]:
                continue
            first = max(start - reach, 0)
            whole_TV = model(row_1T[:, first : start + held])[0, start - first :]
            best_T2 = whole_TV.topk(2, -1).values
            clear_T = best_T2[:, 0] - best_T2[:, 1] > CLOSE
            different_T = torch.cat(block, 1)[0].argmax(-1) != whole_TV.argmax(-1)
            counts["tokens"] += held
            counts["close"] += int((~clear_T).sum())
            counts["different"] += int((different_T & clear_T).sum())
            start, block = start + held, []
    return counts


def stream_figures(model: Decoder, tokens_1T: torch.Tensor, chunk: int) -> dict[str, Any]:
    """Bytes of the cache, pace by tenths of the stream, and bits of the last tenth, both ways."""
    length = tokens_1T.shape[1]
    cache = model.new_cache()
    held, seconds = set(), [0.0] * 10
    last_from, nats = length - length // 10, 0.0
    start, before = 0, time.perf_counter()
    for logits_1TV in streamed(model, tokens_1T, [chunk], cache):
        # A GPU has done the work only once a number is asked for.
        float(logits_1TV[0, -1, 0])
        now = time.perf_counter()
        nats += summed_nats(logits_1TV, tokens_1T, start, last_from)
        seconds[min(10 * start // length, 9)] += now - before
        held.add(cache.bytes_held)
        start += logits_1TV.shape[1]
        before = time.perf_counter()
    cost = model_cost(model.config, model.vocabulary_size, length, 4)
    figures: dict[str, Any] = {
        "tokens": length,
        "chunk": chunk,
        "cache_bytes": sorted(held),
        "cache_bytes_by_the_formula": cost.kv_cache_bytes,
        "tokens_per_second_by_tenth": [round(length / 10 / tenth, 1) for tenth in seconds],
        "tokens_per_second": round(statistics.median(length / 10 / tenth for tenth in seconds), 1),
    }
    if cost.receptive_field is not None:
        scored = length - last_from
        figures["bits_per_token_of_the_last_tenth"] = nats / scored / math.log(2)
        again = 0.0
        for place in range(last_from - 1, length, chunk):
            first = max(place - cost.receptive_field + 1, 0)
            logits_1TV = model(tokens_1T[:, first : place + chunk])[:, place - first :]
            again += summed_nats(logits_1TV, tokens_1T, place, last_from)
        figures["with_the_receptive_field_as_context"] = again / scored / math.log(2)
    figures["seconds_a_chunk_late_over_early"] = late_over_early(model, tokens_1T, chunk, cache)
    return figures


def late_over_early(model: Decoder, tokens_1T: torch.Tensor, chunk: int, late: KVCache) -> float:
    """Median seconds of a chunk by a cache that has read much over those of a new one."""
    early = model.new_cache()
    late_s: list[float] = []
    early_s: list[float] = []
    turns = [(late, late_s), (early, early_s)]
    for turn in range(TURNS):
        start = turn * chunk % max(tokens_1T.shape[1] - chunk, 1)
        for cache, seconds in turns:
            began = time.perf_counter()
            float(model(tokens_1T[:, start : start + chunk], cache=cache)[0, -1, 0])
            seconds.append(time.perf_counter() - began)
        # Who comes second finds the weights in the processor's cache.
        turns.reverse()
    return statistics.median(late_s) / statistics.median(early_s)


def summed_nats(logits_1TV: torch.Tensor, tokens_1T: torch.Tensor, start: int, scored_from: int) -> float:
    """Nats of the tokens from `scored_from` on that follow those of the logits, which begin at `start`."""
    stop = min(start + logits_1TV.shape[1], tokens_1T.shape[1] - 1)
    first = max(start, scored_from - 1)
    if first >= stop:
        return 0.0
    nats_TV = -logits_1TV[0, first - start : stop - start].double().log_softmax(-1)
    return float(nats_TV.gather(1, tokens_1T[0, first + 1 : stop + 1, None]).sum())


if __name__ == "__main__":
    sys.exit(exit_status(main))
