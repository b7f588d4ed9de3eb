"""The page of an evaluation: loss by context length, equality, positions, what the model costs, settings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from windowlm.evaluation.clusters import cluster_names, sums_by_cluster
from windowlm.evaluation.html_page import Section
from windowlm.evaluation.report import COLORS, caption, change_chart, levels_chart, window_text
from windowlm.evaluation.result import LengthResult, bits_per_byte
from windowlm.evaluation.result_files import flat_rows
from windowlm.model.config import ModelConfig
from windowlm.model.cost import model_cost
from windowlm.setting_text import flattened, setting_text

PAGE_NAME = "report.html"


def length_sections(
    result: LengthResult, costs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[Section]:
    """Sections of the page.

    Args:
        result: of the evaluation.
        costs: rows of what and how much.
        settings: the run's by full key.
    """
    changes = change_chart(result)
    sections = [
        Section(
            "Loss by context length",
            [
                f"{len(result['documents']):,} documents, {result['rows'][0]['targets']:,} targets "
                f"({result['rows'][0]['bytes']:,} bytes) at each length; {window_text(result)}; "
                f"{result['split']}, {result['precision']}.",
                caption(result),
                *_equality(result),
            ],
            [levels_chart(result), *([] if changes is None else [changes])],
            [_page_row(row) for row in flat_rows(result)],
        ),
        Section(
            "Loss by position in one long window",
            [
                "Bits per byte of the targets by how many tokens they see, in windows of "
                f"{result['rows'][-1]['context_length']:,} tokens that do not overlap. Each position holds "
                "other text, so that this curve mixes what context is worth with what stands where."
            ],
            [_position_chart(result)],
            result["position_curve"],
        ),
        _by_cluster(result),
        Section("What the model costs", rows=costs),
    ]
    if settings:
        rows = [{"setting": key, "value": setting_text(value)} for key, value in settings.items()]
        sections.append(Section("Settings of the run", rows=rows, folded=True))
    return sections


def _by_cluster(result: LengthResult) -> Section:
    """Bits per byte of each author at the shortest and the longest context, the largest gain first."""
    shortest, longest = (str(result["rows"][place]["context_length"]) for place in (0, -1))
    documents = result["documents"]
    names = cluster_names(
        [document["author"] for document in documents], [document["document_hash"] for document in documents]
    )
    sizes = sums_by_cluster([document["bytes"] for document in documents], names)
    short, long = (
        bits_per_byte(sums_by_cluster([document["nats"][c] for document in documents], names), sizes)
        for c in (shortest, longest)
    )
    cluster = result["cluster"]
    rows: list[dict[str, Any]] = [
        {
            cluster: name.removeprefix("document ")[:40],
            "bytes": int(size),
            f"c = {shortest}": float(first),
            f"c = {longest}": float(last),
            "change": float(last - first),
        }
        for name, size, first, last in zip(dict.fromkeys(names), sizes, short, long, strict=True)
    ]
    rows.sort(key=lambda row: row["change"])
    falls = sum(row["change"] < 0 for row in rows)
    return Section(
        f"By {cluster}",
        [
            f"Bits per byte of each {cluster}, the largest gain from context first. The loss of {falls:,} of "
            f"{len(rows):,} falls from c = {shortest} to c = {longest}."
        ],
        rows=rows,
        folded=len(rows) > 12,
    )


def cost_rows(
    config: ModelConfig,
    vocabulary_size: int,
    result: LengthResult,
    words: int,
    tokens_per_second: float | None,
) -> list[dict[str, Any]]:
    """What a model costs, and its windows in bytes and words of the scored text.

    Args:
        config: shape of the model.
        vocabulary_size: of its tokens.
        result: of the evaluation.
        words: whitespace words of the scored text.
        tokens_per_second: that the evaluation read, None where it is not known.
    """
    row = result["rows"][0]
    bytes_a_token, words_a_token = row["bytes"] / row["targets"], words / row["targets"]
    rows = [
        {
            "what": f"KV cache, bytes a token in {dtype}",
            "amount": model_cost(
                config, vocabulary_size, result["training_length"], size
            ).kv_cache_bytes_per_token,
        }
        for dtype, size in (("float32", 4), ("bfloat16", 2))
    ]
    cost = model_cost(config, vocabulary_size, result["training_length"], 4)
    rows += [
        {
            "what": f"KV cache of {result['training_length']:,} tokens in float32, bytes",
            "amount": cost.kv_cache_bytes,
        },
        {"what": "FLOPs a token, forward and backward, million", "amount": round(cost.flops_per_token / 1e6)},
        *pace_rows(result, tokens_per_second),
    ]
    windows = {f"window of {size:,} tokens": size for size in config.layer_windows() if size is not None}
    if cost.receptive_field is not None:
        windows["receptive field"] = cost.receptive_field
    return rows + [
        {"what": f"{name}, in {unit}", "amount": round(size * share)}
        for name, size in windows.items()
        for unit, share in (("bytes", bytes_a_token), ("words", words_a_token))
    ]


def pace_rows(result: LengthResult, tokens_per_second: float | None) -> list[dict[str, Any]]:
    """What is known of the cost of a model that is not ours."""
    rows = [{"what": "parameters", "amount": result["parameters"]}]
    if tokens_per_second is not None:
        rows.append(
            {"what": "tokens a second, forward, in this evaluation", "amount": round(tokens_per_second)}
        )
    return rows


def settings_of_run(folder: Path) -> dict[str, Any]:
    """Settings by full key of the run in a folder; nothing where there are none to be read."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return flattened(content) if isinstance(content, dict) else {}


def _page_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a page has room for; ``length.csv`` holds the rest."""
    return {
        "context c": row["context_length"],
        "perplexity": row["perplexity"],
        "bits per byte": row["bits_per_byte"],
        "change": row["change_mean"],
        "from": row["change_low"],
        "to": row["change_high"],
        "equal to longest": row["equal_to_longest_equivalent"],
        "naive bits per byte": row["naive_bits_per_byte"],
        "extrapolation": row["extrapolation"],
    }


def _equality(result: LengthResult) -> list[str]:
    tested = [(row["context_length"], row["equal_to_longest"]) for row in result["rows"]]
    known = [(c, verdict) for c, verdict in tested if verdict is not None]
    if not known:
        return []
    longest = result["rows"][-1]["context_length"]
    equal = [f"{c:,}" for c, verdict in known if verdict["equivalent"]]
    margin = known[0][1]["margin"]
    if not equal:
        return [f"No shorter context is shown to be equal to {longest:,} within {margin} bits per byte."]
    return [
        f"Equal to {longest:,} within {margin} bits per byte (two one-sided tests, Holm over the lengths): "
        f"context {', '.join(equal)}."
        + (
            " Of the others equality is not shown, which does not show a difference."
            * (len(equal) < len(known))
        )
    ]


def _position_chart(result: LengthResult) -> Any:
    import altair as alt

    rows = [row for row in result["position_curve"] if row["bits_per_byte"] is not None]
    base = alt.Chart(alt.Data(values=rows)).encode(
        alt.X(
            "first:Q", title="tokens seen, from", scale=alt.Scale(type="log", base=2, nice=False, padding=12)
        ),
        alt.Y("bits_per_byte:Q", title="bits per byte", scale=alt.Scale(zero=False, padding=8)),
        tooltip=[
            alt.Tooltip("first:Q", title="from", format=",d"),
            alt.Tooltip("last:Q", title="to", format=",d"),
            alt.Tooltip("bits_per_byte:Q", title="bits per byte", format=".5f"),
            alt.Tooltip("targets:Q", format=",d"),
        ],
    )
    return base.mark_line(color=COLORS[1]) + base.mark_point(color=COLORS[1], filled=True, size=45, opacity=1)
