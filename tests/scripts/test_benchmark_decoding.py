"""The decoding benchmark writes its table and plot, and the page on streaming says what it measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT, run_script

RESULTS = PROJECT / "docs" / "results"
PAGE = (PROJECT / "docs" / "streaming.md").read_text(encoding="utf-8")
ENTRANTS = ("windowlm", "windowlm compiled", "transformers dynamic", "transformers static")


def test_two_prompts_are_timed_and_plotted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = run_script(
        "scripts/benchmark_decoding.py",
        *("--shape", "32,2,2,1,16,32,300,8,64,64", "--prompts", "8", "40", "--tokens", "64"),
        *("--rounds", "1", "--entrants", "windowlm", "transformers dynamic", "--out", "out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "decoding.json").read_text())["rows"]
    found = [(row["entrant"], row["prompt_tokens"], row["cache_bytes"]) for row in rows]
    # Keys and values in float32 of two layers, one head of 16: ours keep W tokens, theirs one less.
    assert found == [
        (name, prompt, 2 * 2 * 16 * 4 * kept)
        for prompt in (8, 40)
        for name, kept in (("windowlm", 8), ("transformers dynamic", 7))
    ]
    assert (tmp_path / "out" / "decoding.png").read_bytes().startswith(b"\x89PNG")


def rows_in(run: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / run / "decoding.json").read_text())["rows"]
    return rows


def rows_of(run: str) -> dict[int, dict[str, dict[str, Any]]]:
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows_in(run):
        rows.setdefault(row["prompt_tokens"], {})[row["entrant"]] = row
    return rows


def test_the_page_gives_the_paces_by_length_of_the_prompt() -> None:
    for prompt, rows in rows_of("decoding_lengths_cpu").items():
        compiled, dynamic = rows["windowlm compiled"], rows["transformers dynamic"]
        cells = [
            f"{prompt:,}",
            *(f"{rows[name]['tokens_per_second']:,.0f}" for name in ENTRANTS),
            *(f"{row['prompt_tokens_per_second']:,.0f}" for row in (compiled, dynamic)),
            *(f"{row['cache_bytes'] / 2**20:.2f}" for row in (compiled, dynamic)),
        ]
        assert f"| {' | '.join(cells)} |" in PAGE


def test_the_page_gives_the_paces_on_a_cpu() -> None:
    (rows,) = rows_of("decoding_cpu").values()
    paces = " | ".join(f"{rows[name]['tokens_per_second']:,.0f}" for name in ENTRANTS)
    assert f"(results/decoding_cpu/decoding.json), float32, prompt of 512 | 1 | {paces} |" in PAGE


def test_the_page_gives_the_paces_on_a_gpu() -> None:
    runs = ("decoding_one_row", "decoding_static", "decoding_h100")
    rows = {(run, row["entrant"], row["batch"]): row for run in runs for row in rows_in(run)}
    paces = {of_row: row["tokens_per_second"] for of_row, row in rows.items()}
    for run, batch, where in (
        ("decoding_one_row", 1, "decoding_one_row/decoding.json), bf16, prompt of 2,048"),
        ("decoding_static", 1, "decoding_static/decoding.json), other work on other cores"),
        ("decoding_static", 64, "the same run"),
    ):
        compiled, static = paces[run, "windowlm compiled", batch], paces[run, "transformers static", batch]
        assert f"{where} | {batch} | | {compiled:,.0f} | | {static:,.0f} |" in PAGE
    recorded = paces["decoding_h100", "windowlm", 1]
    dynamic = paces["decoding_h100", "transformers dynamic", 1]
    assert f"(results/decoding_h100/decoding.json) | 1 | {recorded:,.0f} | | {dynamic:,.0f} | |" in PAGE
    one, many = (
        rows["decoding_one_row", "windowlm compiled", 1],
        rows["decoding_static", "windowlm compiled", 64],
    )
    static = rows["decoding_one_row", "transformers static", 1]
    seconds = [
        [long - short for short, long in zip(row["seconds"]["32"], row["seconds"]["1024"], strict=True)]
        for row in (static, one)
    ]
    by_round = [theirs / ours for theirs, ours in zip(*seconds, strict=True)]
    batched = (
        paces["decoding_static", "windowlm compiled", 64] / paces["decoding_static", "windowlm compiled", 1]
    )
    on_cpu = {row["entrant"]: row["tokens_per_second"] for row in rows_in("decoding_cpu")}
    uncompiled = rows["decoding_h100", "windowlm", 1]["prompt_over_forward"]
    for told in (
        f"gives {one['tokens_per_second'] / static['tokens_per_second']:.1f} ({min(by_round):.1f} to "
        f"{max(by_round):.1f} by round) times the tokens of the static cache for one row",
        f"{many['tokens_per_second'] / paces['decoding_static', 'transformers static', 64]:.1f} times for 64",
        f"step gives {recorded / dynamic:.1f} times those of the dynamic cache",
        f"the compiled step gives {on_cpu['windowlm compiled'] / on_cpu['transformers dynamic']:.1f} times "
        "those of the dynamic cache",
        f"the CPU's pace is {on_cpu['windowlm'] / on_cpu['transformers dynamic']:.1f} times that",
        f"a batch of 64 gives {batched:.1f} times the tokens of one row",
        f"at {one['prompt_over_training_forward']:.2f} times the pace of the forward pass of training for "
        f"one row and at {many['prompt_over_training_forward']:.2f} times for 64, and at "
        f"{one['prompt_over_forward']:.2f} and {many['prompt_over_forward']:.2f} times that of the same pass "
        "without gradients",
        f"uncompiled, read one prompt at {uncompiled:.2f} times",
    ):
        assert told in " ".join(PAGE.split()), told
