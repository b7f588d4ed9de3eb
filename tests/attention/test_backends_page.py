"""The page on the backends says what the results of the runs on a GPU say, and leaves no backend out."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from windowlm.attention.dispatch import MODULES, capabilities

DOCS = Path(__file__).parents[2] / "docs"
RUNS = ("attention_h200", "attention_h200_wide", "attention_h200_documents")
PEERS = {
    "flex, flash": "flex flash",
    "flex, autotuned": "flex autotuned",
    "chunked SDPA": "chunked sdpa",
    "full causal, cuDNN": "causal cudnn",
}


def report_of(run: str) -> dict[str, Any]:
    """What a run of the benchmark of attention wrote."""
    report: dict[str, Any] = json.loads((DOCS / "results" / run / "attention.json").read_text())
    return report


def measured(*runs: str) -> dict[tuple[str, bool], dict[str, dict[str, Any]]]:
    """Rows by name, of each shape without and with documents."""
    reports = [report_of(run) for run in runs]
    assert len({(report["commit"], report["device"]) for report in reports}) == 1
    return {
        (shape["shape"], shape["documents"] is not None): {row["name"]: row for row in shape["rows"]}
        for report in reports
        for shape in report["shapes"]
    }


def prose() -> str:
    """The page as one line."""
    return " ".join((DOCS / "attention-backends.md").read_text().split())


def tables(section: str) -> list[list[dict[str, str]]]:
    """The tables of a section, each row by the names of the columns."""
    page = (DOCS / "attention-backends.md").read_text()
    start = page.index(f"## {section}\n")
    return tables_of(page[start : page.find("\n## ", start)])


def tables_of(text: str) -> list[list[dict[str, str]]]:
    """All tables of a text."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        names, _, *rows = (
            [cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in table.splitlines()
        )
        found.append([dict(zip(names, row, strict=True)) for row in rows])
    return found


@pytest.mark.parametrize(("number", "claims"), [(0, 2), (1, 1)])
def test_an_example_runs_and_gives_the_shapes_that_it_says(number: int, claims: int) -> None:
    page = (DOCS / "attention-backends.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    claim = re.compile(r"^(\w.*)  # (\[[\d, ]+\])$", re.MULTILINE)
    checked, found = claim.subn(r"assert [*(\1).shape] == \2", examples[number])
    assert found == claims
    exec(checked, {})


def test_the_table_of_backends_says_what_they_declare() -> None:
    (table, *_) = tables_of((DOCS / "attention-backends.md").read_text())
    assert [row["backend"] for row in table] == list(MODULES)
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    for row in table:
        declared = capabilities(row["backend"])
        major, minor = declared.compute_capability
        assert row["devices"] == (
            "all" if declared.devices is None else f"CUDA{f' {major}.{minor}' * (major > 0)}"
        )
        assert row["dtypes"].split(", ") == [names[dtype] for dtype in names if dtype in declared.dtypes]
        multiple = declared.head_dim_multiple
        limits = f"{max(declared.head_dim_least, multiple)} to {declared.head_dim_limit}"
        limits += f" by {multiple}" * (multiple > 1)
        assert row["head dimensions"] == ("all" if declared.head_dim_limit is None else limits)
        for heading, field in (
            ("bidirectional", "bidirectional"),
            ("documents, padding", "documents"),
            ("padding inside", "gaps"),
            ("sinks", "sinks"),
            ("learned sinks", "sink_logits"),
            ("logit cap", "logit_cap"),
            ("more keys", "more_keys"),
            ("keys in any order", "separate_keys"),
            ("dropout", "dropout"),
            ("repeatable", "deterministic"),
        ):
            assert row[heading] == ("yes" if getattr(declared, field) else "no"), (row["backend"], heading)


def test_the_ratios_beside_the_peers_are_those_of_the_results() -> None:
    rows_of, (plain, packed, *_) = measured(*RUNS), tables("Speed on a GPU")[1:]
    for documents, table in ((False, plain), (True, packed)):
        assert [row["shape"] for row in table] == sorted(s for s, packed in rows_of if packed == documents)
        for row in table:
            rows = rows_of[row.pop("shape"), documents]
            chosen = rows[f"windowlm:{row.pop('auto')}"]
            assert row.pop("forward / backward ms") == " / ".join(
                f"{chosen[name]:.3f}" for name in ("forward_ms", "backward_ms")
            )
            assert row.pop("TFLOP/s") == " / ".join(
                f"{chosen[name]:.0f}" for name in ("forward_tflops", "backward_tflops")
            )
            for peer, ratio in row.items():
                assert ratio == f"{rows[PEERS.get(peer, peer)]['total_ratio']:.2f}", peer


def test_every_backend_of_ours_that_was_measured_is_in_the_page() -> None:
    rows_of, (_, _, ours, _) = measured(*RUNS), tables("Speed on a GPU")[1:]
    assert len(ours) == len(rows_of)
    for row in ours:
        rows = rows_of[row.pop("shape"), row.pop("documents") == "yes"]
        timed = {name for name in rows if name.startswith("windowlm:") and rows[name]["calls"]}
        # One makes a T x T tensor, the other computed in another way then.
        assert {f"windowlm:{name}" for name in row} == timed - {"windowlm:reference", "windowlm:banded"}
        for name, ratio in row.items():
            assert ratio == f"{rows[f'windowlm:{name}']['total_ratio']:.2f}", name


def total_ratios(run: str) -> dict[str, dict[str, float]]:
    """Of each shape and entrant of a run, and of the minima."""
    shapes = report_of(run)["shapes"]
    return {
        shape["shape"]: {
            f"{least}{row['name']}": row[f"{least}total_ratio"]
            for row in shape["rows"]
            for least in ("", "least_")
        }
        for shape in shapes
    }


def test_the_ratios_on_another_cpu_are_those_of_the_result() -> None:
    ratios = {
        shape: [f"{of_shape[f'{least}causal sdpa']:.2f}" for least in ("", "least_")]
        for shape, of_shape in total_ratios("attention_cpu_xeon").items()
    }
    (first, second, third), least = zip(
        *(ratios[f"1,8192,8,8,64,{window}"] for window in (64, 256, 512)), strict=True
    )
    short, longer = (
        sorted(medians[0] for shape, medians in ratios.items() if shape.split(",")[1] in tokens)
        for tokens in (("512",), ("640", "768", "896", "1024", "1152", "1536"))
    )
    paces = [shape["matmul_tflops"] for shape in report_of("attention_cpu_xeon")["shapes"]]
    assert (
        f"where a matrix product reached {min(paces):.2f} to {max(paces):.2f} TFLOP/s, torch's kernel is "
        f"faster, and causal SDPA takes {first}, {second} and {third} times as long at 8,192 tokens with "
        f"windows of 64, 256 and 512 (minima {least[0]}, {least[1]} and {least[2]}), {short[0]} to "
        f"{short[-1]} times at 512 tokens and {longer[0]} to {longer[-1]} times from 640 to 1,536 " in prose()
    )
    (small,) = total_ratios("attention_cpu_xeon_small").values()
    assert f"but {small['causal sdpa']:.2f} times at 512 tokens with heads of 16" in prose()


def test_flash_attention_4_beside_us_is_what_the_results_say() -> None:
    ours = total_ratios("attention_h200_flash")
    peer = {name: f"{ratios['flash-attn-4']:.2f}" for name, ratios in ours.items()}
    assert peer["A"] == peer["B"] == peer["C"]
    assert f"gave {peer['A']} at A, B and C, {peer['D']} at D and {peer['E']} at E" in prose()
    least = {
        name: f"{rows['flash-attn-4']['least_total_ratio']:.2f}"
        for (name, _), rows in measured(*RUNS[:2]).items()
    }
    assert least["B"] == least["C"] == least["D"]
    assert f"choice is {least['D']} there, as at B and C, and {least['A']} at A" in prose()
    (wide, _) = report_of("attention_h200_wide")["shapes"]
    low, high = (wide["clock_mhz"][end] for end in ("min", "max"))
    assert f"its clock went from {low:,.0f} to {high:,.0f} MHz" in prose()


def test_autotuned_flex_with_documents_took_what_the_results_say() -> None:
    rows_of = {
        name: rows
        for run in ("_c", "_wide", "")  # some shapes are in several
        for (name, _), rows in measured(f"attention_h100_documents{run}").items()
    }
    for peer in ("flex autotuned", "flex"):
        *first, last = (f"{rows_of[name][peer]['total_ratio']:.2f}" for name in "ABCDE")
        assert f"{', '.join(first)} and {last} times" in prose()


def test_banded_on_a_gpu_takes_what_the_result_says() -> None:
    banded = {
        name: ratios["windowlm:banded"] for name, ratios in total_ratios("attention_h100_banded").items()
    }
    assert f"took {banded['A']:.0f} times as long as `band` at A and {banded['C']:.0f} times at C" in prose()


def test_flex_that_is_compiled_for_any_length_takes_what_the_results_say() -> None:
    over = {
        of: rows["windowlm:flex"]["total_ms"] / rows["flex"]["total_ms"]
        for of, rows in measured(*RUNS).items()
    }
    first = [f"{over[of]:.2f}" for of in (("D", False), ("E", False), ("D", True))]
    assert f"it takes {first[0]}, {first[1]} and {first[2]} times as long as the peer flex" in prose()
    assert f"it takes up to {max(over.values()):.2f} times as long, and up to" in prose()


def test_the_pace_of_matrix_products_is_that_of_the_runs() -> None:
    reports = [report_of(run) for run in RUNS]
    paces = [shape["matmul_tflops"] for report in reports for shape in report["shapes"]]
    assert f"a product of 8,192 x 8,192 matrices reached {min(paces):.0f} to {max(paces):.0f}." in prose()


def test_the_cases_are_as_many_as_the_results_say() -> None:
    (table,) = tables("Proof")
    drawn: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for device in ("CPU", "H200"):
        for run in json.loads((DOCS / "results" / f"attention_cases_{device.lower()}.json").read_text()):
            drawn.setdefault((run["backend"], device), []).append(run)
    assert sorted(drawn) == sorted((row["backend"], row["device"]) for row in table)
    for row in table:
        runs = drawn[row["backend"], row["device"]]
        # Of one commit, and no case twice.
        assert len({run["commit"] for run in runs}) == 1
        seeds = sorted(seeds for run in runs for seeds in run["seeds"])
        assert all(last < first for (_, last), (first, _) in itertools.pairwise(seeds))
        counts = [sum(run[name] for run in runs) for name in ("cases", "mismatches")]
        assert [row["cases"], row["mismatches"]] == [f"{count:,}" for count in counts]
    properties = ("1 query heads a key-value head", "ring")
    (flex,) = drawn["flex", "H200"]
    alone, ring = (flex["drawn"][name] for name in properties)
    told = f"{alone:,} have one query head a key-value head, and {ring} keys in the order of a ring"
    assert f"of `flex`'s, {told}" in prose()
    even = json.loads((DOCS / "results" / "attention_cases_flex.json").read_text())
    assert not sum(run["mismatches"] for run in even)
    alone, ring = (sum(run["drawn"][name] for run in even) for name in properties)
    cases = sum(run["cases"] for run in even)
    before, again = (
        {seed for run in runs for first, last in run["seeds"] for seed in range(first, last + 1)}
        for runs in ([flex], even)
    )
    told = f"these are {alone:,} and {ring} of {cases:,}, of which {len(again - before):,} are new"
    assert told in prose()


def test_masks_cost_what_the_result_says() -> None:
    report = json.loads((DOCS / "results" / "attention_layouts" / "layer.json").read_text())["layouts"]
    assert report["graphs_when_warm"] == report["graphs_at_the_end"] == 6
    assert report["memory_when_warm_mib"] >= report["memory_at_the_end_mib"]
    for told in (
        f"over {report['batches']:,} batches of other documents (median 1,500 tokens) and "
        f"{len(report['lengths'])} lengths",
        f"the slowest batch takes {1000 * report['slowest_warm_step_s']:.0f} ms",
        f"goes from {report['memory_when_warm_mib']:.0f} to {report['memory_at_the_end_mib']:.0f} MiB",
        f"takes {report['mask_on_device_ms']:.3f} ms, {report['mask_over_attention']:.1%} of the "
        f"{report['attention_ms']:.2f} ms of attention",
        f"Making them takes {report['mask_on_host_ms']:.1f} ms of a CPU",
    ):
        assert told in prose(), told


def test_the_peers_of_band_take_as_long_as_the_results_say() -> None:
    rows_of, (*_, table) = measured(*RUNS), tables("Speed on a GPU")
    assert len(table) == len(rows_of)
    for row in table:
        rows = rows_of[row.pop("shape"), row.pop("documents") == "yes"]
        band = rows["windowlm:band"]
        times = " / ".join(f"{band[name]:.3f}" for name in ("forward_ms", "backward_ms"))
        assert row.pop("forward / backward ms") == times
        assert min(float(row["flex"]), float(row["flex, autotuned"] or 1)) >= 1
        for name, ratio in row.items():
            peer = rows.get(PEERS.get(name, name))
            timed = peer is not None and peer["calls"]
            assert ratio == (f"{peer['total_ms'] / band['total_ms']:.2f}" if timed else ""), name


def test_the_layer_takes_what_the_results_say() -> None:
    reports = [
        json.loads((DOCS / "results" / f"attention_layer{run}" / "layer.json").read_text())
        for run in ("", "_documents")
    ]
    assert len({report["commit"] for report in reports}) == 1
    rows = {(row["shape"], row["documents"]): row for report in reports for row in report["shapes"]}
    (table,) = tables("The layer around the kernel")
    assert list(rows) == [(told["shape"], told["documents"] == "yes") for told in table]
    for told, row in zip(table, rows.values(), strict=True):
        assert told["backend"] == row["backend"]
        for name, part in (("kernel, forward / backward ms", "kernel"), ("layer ms", "layer")):
            assert told[name] == f"{row[f'{part}_forward_ms']:.3f} / {row[f'{part}_backward_ms']:.3f}"
        assert told["rotation's least traffic, one way, ms"] == f"{row['least_traffic_ms']:.3f}"
        assert told["layer over floor"] == f"{row['over_floor']:.3f}"


def test_banded_on_a_cpu_takes_what_the_results_say() -> None:
    ratios, growth = tables("Speed on a CPU")
    shapes = report_of("attention_cpu")["shapes"]
    for told, shape in zip(ratios, shapes, strict=True):
        rows = {row["name"]: row for row in shape["rows"]}
        ours, causal = (rows[name] for name in ("windowlm:banded", "causal sdpa"))
        assert list(told.values()) == [
            f"{shape['tokens']:,}",
            f"{shape['window']:,}",
            f"{ours['total_ms']:.3g}",
            f"{causal['total_ratio']:.2f}",
            f"{causal['least_total_ratio']:.2f}",
        ]
    for run, verb in (("again", "gave"), ("calm", "were")):
        ratio = [f"{ratios['causal sdpa']:.2f}" for ratios in total_ratios(f"attention_cpu_{run}").values()]
        rest = sorted(ratio[3:], key=float)
        told = f"{verb} {ratio[0]}, {ratio[1]} and {ratio[2]} at 8,192 tokens and {rest[0]} to {rest[-1]}"
        assert f"{told} at the others" in prose()
    for runs, verb in (
        (("", "_again"), "a matrix product reached"),
        (("_calm",), "An hour before it reached"),
    ):
        reports = [report_of(f"attention_cpu{run}") for run in runs]
        paces = [shape["matmul_tflops"] for report in reports for shape in report["shapes"]]
        assert f"{verb} {min(paces):.2f} to {max(paces):.2f}" in prose()
    other = total_ratios("attention_cpu_other")
    long = [other[f"1,8192,8,8,64,{window}"]["causal sdpa"] for window in (64, 256, 512)]
    short = [ratios["causal sdpa"] for shape, ratios in other.items() if not shape.startswith("1,8192,")]
    chunked = sorted(ratios["chunked sdpa"] for ratios in other.values() if ratios["chunked sdpa"])
    assert (
        f"took {long[0]:.2f}, {long[1]:.2f} and {long[2]:.2f} times as long at 8,192 tokens and "
        f"{min(short):.2f} to {max(short):.2f} times at 512 and 1,024 " in prose()
    )
    told = (
        f"takes whole multiples of the window, {chunked[1]:.2f} to {chunked[-1]:.2f} times, but half as long"
    )
    assert told in prose()
    assert chunked[0] == pytest.approx(0.5, abs=0.01)
    shapes = report_of("attention_cpu_growth")["shapes"]
    measured = [
        (row["total_ms"], row["least_total_ms"], row["memory_mib"])
        for row in (shape["rows"][0] for shape in shapes)
    ]
    for told, shape, now in zip(growth, shapes, measured, strict=True):
        times, least, memory = (
            f"{a / b:.2f}".replace("1.00", "1") for a, b in zip(now, measured[0], strict=True)
        )
        assert list(told.values()) == [
            f"{shape['tokens']:,}",
            f"{now[0]:,.0f}",
            times,
            least,
            f"{now[2]:,.0f}",
            memory,
        ]
