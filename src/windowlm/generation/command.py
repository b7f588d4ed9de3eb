"""Generation as ``scripts/generate.py`` calls it: prompts from settings, files or standard input, text out.

Standard output gets the text, or one JSON object a prompt, and nothing else.
"""

import json
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from windowlm.bundle import Bundle, device_named, load
from windowlm.errors import UserError
from windowlm.generation.config import SamplingConfig
from windowlm.generation.generate import Generation, Generator
from windowlm.json_text import has_text, parse_json

STANDARD_INPUT = "-"
SETTINGS = {entry.name for entry in fields(SamplingConfig)}
RESULT_KEYS = ("text", "tokens", "prompt_tokens", "ended_by", "bits_per_byte")


def generate_from_checkpoint(
    checkpoint: Path,
    *,
    prompt: str | None,
    prompt_file: str | None,
    prompts_file: str | None,
    batch_size: int,
    settings: SamplingConfig,
    device: str = "auto",
    precision: str = "32-true",
    compiled: bool = False,
) -> None:
    """Continue one text, as it comes, or all prompts of a JSON lines file; say the pace on standard error.

    Args:
        checkpoint: a run's folder, a model's folder in our layout or transformers', or a name of the hub.
        prompt: the text.
        prompt_file: file that holds the text; ``-`` is standard input, as is nothing at all.
        prompts_file: file of JSON objects, one a line, with a ``prompt`` each; ``-`` is standard input.
        batch_size: prompts of `prompts_file` that are served together.
        settings: how to choose tokens, and when to stop.
        device: ``auto`` takes a GPU where there is one.
        precision: ``32-true`` or ``bf16-true``.
        compiled: as of ``Generator``.

    Raises:
        UserError: the prompts, the checkpoint or the device cannot be used.
    """
    if prompts_file is not None:
        lines = _prompt_lines(prompts_file)
        generator = Generator(_model(checkpoint, device, precision), settings, compiled=compiled)
        _each_line(generator, lines, batch_size)
        return
    if prompt is None:
        prompt = _prompt_text(prompt_file)
    generator = Generator(_model(checkpoint, device, precision), settings, compiled=compiled)
    for pieces in generator.pieces([prompt]):
        _write(pieces[0])
    if sys.stdout.isatty():
        print(file=sys.stderr)
    result = generator.results[0]
    words = {"max_new_tokens": "max_new_tokens", "stop": "a stop text", "end_of_document": "the end mark"}
    _say(f"ended by {words[result.ended_by]}; {_pace(generator)}; {_bits([result])}")


def _model(checkpoint: Path, device: str, precision: str) -> Bundle:
    bundle = load(checkpoint, device_named(device))
    if precision == "bf16-true":
        # Parameters alone: what the model keeps exact, such as hashes, stays so.
        for parameter in bundle.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return bundle


def _prompt_text(path: str | None) -> str:
    if path is None and sys.stdin.isatty():
        raise UserError(
            "prompt: must be given: prompt=TEXT, prompt_file=FILE, prompts_file=FILE.jsonl, or a text on "
            "standard input"
        )
    name, text = _read(STANDARD_INPUT if path is None else path, "prompt_file")
    if not text:
        raise UserError(f"prompt: {name} holds no text; give prompt=TEXT, or a file that holds one")
    return text


class PromptLine(NamedTuple):
    """A JSON object with a prompt, and the file and line that it stands in, to name it by."""

    place: str
    given: dict[str, Any]


def _prompt_lines(path: str) -> list[PromptLine]:
    name, text = _read(path, "prompts_file")
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            given = parse_json(line, keys_once=True)
        except ValueError as error:
            raise UserError(f"prompts_file: {place}: not JSON: {error}") from None
        if not isinstance(given, dict) or not isinstance(given.get("prompt"), str) or not given["prompt"]:
            raise UserError(
                f"prompts_file: {place}: an object with a text that is not empty is allowed, "
                'such as {"prompt": "Once upon a time"}'
            )
        if taken := sorted(given.keys() & set(RESULT_KEYS)):
            raise UserError(f"prompts_file: {place}: the result has a key {taken[0]} too; rename it")
        if settings := sorted(given.keys() & SETTINGS):
            raise UserError(
                f"prompts_file: {place}: {settings[0]} is a setting of all prompts; give "
                f"{settings[0]}=... on the command line, or rename the key"
            )
        if not has_text(given):
            raise UserError(
                f"prompts_file: {place}: it holds half a character (a lone surrogate), which "
                "the result cannot repeat; give UTF-8 text"
            )
        try:
            json.dumps(given, allow_nan=False)
        except ValueError:
            raise UserError(
                f"prompts_file: {place}: it holds a number beyond those of JSON, such as NaN "
                "or 1e999, which the result cannot repeat; give null or a text"
            ) from None
        lines.append(PromptLine(place, given))
    if not lines:
        raise UserError(f"prompts_file: {name} holds no prompts; give one JSON object a line")
    return lines


def _read(path: str, key: str) -> tuple[str, str]:
    """What to call a source, and its text; a byte order mark and nothing else is dropped."""
    name = "standard input" if path == STANDARD_INPUT else path
    try:
        data = sys.stdin.buffer.read() if path == STANDARD_INPUT else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{key}={path}: cannot be read: {error.strerror or error}") from None
    try:
        return name, data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}={path}: no UTF-8 text: byte {error.start} is {data[error.start]:#04x}"
        ) from None


def _each_line(generator: Generator, lines: list[PromptLine], batch_size: int) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # All of them before the first is served.
    _checked(generator, lines)
    results: list[Generation] = []
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task("prompts", total=len(lines), pace="")
        for first in range(0, len(lines), batch_size):
            batch = lines[first : first + batch_size]
            served = generator.batch([line.given["prompt"] for line in batch], first)
            for line, result in zip(batch, served, strict=True):
                _write(json.dumps({**line.given, **_facts(result)}, ensure_ascii=False) + "\n")
            results += served
            progress.update(task, completed=len(results), pace=_pace(generator))
    _say(f"{len(results):,} prompts; {_pace(generator)}; {_bits(results)}")


def _checked(generator: Generator, lines: list[PromptLine]) -> None:
    # What is advised for the longest serves all.
    encoded = generator.bundle.tokenizer.encode_batch([line.given["prompt"] for line in lines])
    place, given = lines[max(range(len(lines)), key=lambda line: len(encoded[line]))]
    try:
        generator.encode([given["prompt"]])
    except UserError as error:
        raise UserError(f"prompts_file: {place}: {error}") from None


def _facts(result: Generation) -> dict[str, Any]:
    values = (
        result.text,
        len(result.tokens),
        result.prompt_tokens,
        result.ended_by,
        result.bits_per_byte,
    )
    return dict(zip(RESULT_KEYS, values, strict=True))


def _pace(generator: Generator) -> str:
    pace = generator.pace
    per_second = pace.tokens_per_second
    produced = "one token" if per_second is None else f"{per_second:,.1f} tokens/s"
    compiled = f", compiled in {pace.compile_seconds:.0f} s" if pace.compile_seconds else ""
    return f"{produced} after {pace.prompt_tokens:,} prompt tokens in {pace.prompt_seconds:.2f} s{compiled}"


def _bits(results: list[Generation]) -> str:
    size = sum(result.bytes for result in results)
    nats = sum(result.nats for result in results)
    if not size:
        return "no bytes produced"
    return f"{nats / math.log(2) / size:.3f} bits per byte of what was produced ({size:,} bytes)"


def _write(text: str) -> None:
    # Bytes, as the terminal's encoding may be another; at once, as somebody may be reading.
    if text:
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr)
