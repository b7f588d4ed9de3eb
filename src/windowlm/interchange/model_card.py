"""The model card of an export: what the model is, how it was trained, and its loss by context length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from windowlm.model.config import ModelConfig
from windowlm.model.cost import model_cost
from windowlm.setting_text import setting_text

CURVE_NAME = "length.png"


def model_card(
    title: str,
    model: ModelConfig,
    facts: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    *,
    has_picture: bool = False,
) -> str:
    """Markdown of the card.

    Args:
        title: name of the model.
        model: its shape.
        facts: content of a bundle's config.json.
        evaluation: content of a run's length.json; None where there is none.
        has_picture: ``length.png`` lies beside the card.
    """
    sections = [_FRONT_MATTER, f"# {title}", *_facts(model, facts), *_usage(title, model, facts)]
    if evaluation is not None:
        sections += _curve(evaluation, has_picture)
    return "\n\n".join(sections) + "\n"


_FRONT_MATTER = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [windowlm]\n---"


def _facts(model: ModelConfig, facts: Mapping[str, Any]) -> list[str]:
    length, vocabulary = facts["sequence_length"], facts["vocabulary_size"]
    cost = model_cost(model, vocabulary, length, 2)
    training, data, known = facts["training"], facts["data"], _trained_here(facts)
    reach, tokenizer = cost.receptive_field, facts.get("tokenizer")
    kind = tokenizer.get("kind") if isinstance(tokenizer, dict) else "of the folder"
    rows = {
        "parameters": f"{cost.parameters:,}",
        "layers, width, MLP": f"{model.layers}, {model.dim}, {model.feed_forward_dim}",
        "heads": f"{model.heads} query, {model.kv_heads} key-value, of {model.head_dim}",
        "window": f"{setting_text(model.window)} keys, the query's own included; null is full attention",
        "receptive field": "the whole text" if reach is None else f"{reach:,} tokens",
        "KV cache": f"{cost.kv_cache_bytes:,} bytes in bfloat16 for {length:,} tokens",
        "tokenizer": f"{kind}, {vocabulary:,} tokens",
        "training data": _place(data.get("path")) or data.get("name"),
        "hash of the training data": facts["source_identity"] if known else None,
        "training sequences" if known else "positions": f"{length:,} tokens",
        "began from the weights of": model.init_from,
        "tokens trained": _count(training.get("tokens_trained")),
        "steps": _count(training.get("steps_trained")),
        "precision of the training": training.get("precision"),
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    return ["\n".join(["| | |", "|---|---|", *lines])]


def _usage(title: str, model: ModelConfig, facts: Mapping[str, Any]) -> list[str]:
    notes = []
    if _trained_here(facts):
        masked = facts["data"].get("document_masking", True)
        start = "no mark before its first token" if masked else "the end mark of another document before it"
        notes.append(f"In training a document had {start}; the end mark came behind it.")
    if any(window is not None for window in model.layer_windows()):
        notes.append(
            "The window is in every mask that transformers builds for `eager`, `sdpa` and `flex_attention`."
        )
    code = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({title!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({title!r})\n```"
    )
    return [code, " ".join(notes)] if notes else [code]


def _place(path: str | None) -> str | None:
    """A path without the folders of the machine above it."""
    if path is None:
        return None
    parts = Path(path).parts
    pattern = next((place for place, part in enumerate(parts) if set(part) & set("*?")), len(parts))
    return str(Path(*parts[max(pattern - 1, 0) :]))


def _trained_here(facts: Mapping[str, Any]) -> bool:
    """Whether the training is known; it is not of a model that others trained."""
    return bool(facts["training"])


def _curve(evaluation: Mapping[str, Any], has_picture: bool) -> list[str]:
    rows = [
        f"| {row['context_length']:,} | {row['perplexity']:.3f} | {row['bits_per_byte']:.4f} "
        f"| {row['naive_bits_per_byte']:.4f} |"
        for row in evaluation["rows"]
    ]
    first = evaluation["rows"][0]
    about = (
        f"The same {first['targets']:,} tokens ({first['bytes']:,} bytes) of "
        f"{len(evaluation['documents']):,} documents ({evaluation['split']}, "
        f"{evaluation['precision']}) at every length: each is predicted from c to 2c - 1 tokens before it. "
        "Naive: in windows of c tokens that do not overlap."
    )
    table = "\n".join(
        ["| context c | perplexity | bits/byte | naive bits/byte |", "|---|---|---|---|", *rows]
    )
    picture = [f"![Bits per byte by context length]({CURVE_NAME})"] if has_picture else []
    return ["## Loss by context length", about, table, *picture]


def _count(number: object) -> str | None:
    return f"{number:,}" if isinstance(number, int) else None


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
