"""The page on scaling says what model and counts say."""

import json
import math
from typing import Any

import pytest

from tests.conftest import PROJECT
from tests.parallel.backends import ROOM
from tests.parallel.cases import draw
from tests.training.killed_processes import went_well
from windowlm.parallel.scaling_model import (
    Layer,
    Machine,
    context_table,
    gathered_bytes,
    halo_bytes,
    long_table,
    memory_bytes,
    reduced_bytes,
    rows_table,
    sharded_bytes,
)

DTYPES = ("float32", "float64")
PAGE = (PROJECT / "docs" / "scaling.md").read_text(encoding="utf-8")
COUNTED = json.loads((PROJECT / "docs" / "results" / "halo_bytes.json").read_text(encoding="utf-8"))


def test_the_tables_are_those_of_the_model() -> None:
    gpus = (1, 2, 4, 8, 64, 512, 4096)
    assert rows_table(Layer(), Machine(), tokens=65_536, gpus=gpus) in PAGE
    assert context_table(Layer(), Machine(), tokens=131_072, gpus=gpus) in PAGE


def test_the_counted_bytes_of_eight_processes_are_those_of_the_formula() -> None:
    assert len(COUNTED["rows"]) > 5
    for row in COUNTED["rows"]:
        assert row["forward_bytes"] == row["backward_bytes"] == row["formula"]
        assert f"{row['forward_bytes']:,}" in PAGE


def test_the_model_counts_the_largest_share_that_was_counted() -> None:
    tokens, processes = COUNTED["tokens"], COUNTED["processes"]
    for row in COUNTED["rows"]:
        layer = Layer(
            kv_heads=COUNTED["kv_heads"],
            head_dim=COUNTED["head_dim"],
            window=row["window"] or tokens + 1,
            number_bytes=4,
        )
        part = tokens // processes
        # The last process receives what the first of many sends at most.
        received = [min(layer.window - 1, rank * part) for rank in range(processes)]
        assert halo_bytes(layer, tokens, processes) == layer.key_value_bytes * max(received)
        assert gathered_bytes(layer, tokens, processes) * processes == row["gathering_all"]


SPEED = Layer(dim=768, heads=12, kv_heads=4, head_dim=64, feed_forward_dim=2048)


def test_the_table_of_memory_is_that_of_the_model_and_fits_what_one_gpu_took() -> None:
    lengths = (65_536, 1), (131_072, 1), (131_072, 2), (1 << 20, 1), (1 << 20, 2), (1 << 20, 4), (1 << 20, 8)
    assert long_table(SPEED, 12, 32_768, lengths) in PAGE
    measured = json.loads((PROJECT / "docs/results/training_h100/bf16_mixed.json").read_text())["rows"]
    (peak,) = (row["peak_memory_bytes"] for row in measured if row["entrant"] == "windowlm loop")
    said = memory_bytes(SPEED, 12, 32_768, 65_536, checkpointed=False)
    assert said == pytest.approx(peak, rel=0.05)
    assert f"{peak / 1e9:.1f} GB were measured" in PAGE


def report_of(folder: str) -> Any:
    return json.loads((PROJECT / "docs/results" / folder / "scaling.json").read_text())


REPORTS = [report_of(name) for name in ("scaling_rows", "scaling_context", "scaling_documents")]
ROWS = {row["entrant"]: row for report in REPORTS for row in report["rows"]}


def ratio(name: str, base: str, key: str = "tokens_per_second") -> float:
    return float(ROWS[name][key] / ROWS[base][key])


def over_slower(name: str, base: str) -> float:
    one = ROWS[base]
    return float(ROWS[name]["tokens_per_second"] * max(one["steps_s"]) / one["tokens_per_step"])


@pytest.mark.parametrize("fact", ["commit", "device", "versions"])
def test_the_table_is_of_one_code_and_machine(fact: str) -> None:
    assert all(report[fact] == REPORTS[0][fact] for report in REPORTS)


@pytest.mark.parametrize(
    ("title", "name", "base"),
    [
        ("ddp", "ddp", "one"),
        ("torch's DistributedDataParallel, a graph for each block", "torch ddp", "one"),
        ("fsdp2", "fsdp2", "one"),
        ("context", "context", "one long"),
        ("context, cut where keys arrive", "context in pieces", "one long"),
        ("gather all keys and values", "gather", "one long"),
        ("torch's context parallelism, FlexAttention", "torch flex", "one long"),
        ("all-to-all over heads", "all-to-all over heads", "one long"),
        ("torch's context parallelism, ring (no window)", "torch ring", "one long"),
        ("context, rows of several documents", "context of documents", "one of documents"),
    ],
)
def test_the_table_of_two_gpus_is_what_the_result_says(title: str, name: str, base: str) -> None:
    row = ROWS[name]
    sent = f"{row['bytes_sent_forward'] / 1e6:,.1f}" if row["bytes_sent_forward"] else ""
    ahead = "" if base != "one long" or name == "context" else f"{ratio('context', name):.2f}"
    cells = [
        title,
        f"{row['tokens_per_second']:,.0f}",
        f"{over_slower(name, base):.3f}",
        f"{ratio(name, base):.3f}",
        f"{ratio(name, base, 'peak_memory_bytes'):.3f}",
        sent,
        ahead,
    ]
    assert f"| {' | '.join(cells)} |".replace("  ", " ") in PAGE


def test_the_page_tells_what_two_gpus_held_and_lost() -> None:
    first_losses = [
        row["first_loss"]
        for name, row in ROWS.items()
        # The ring has no window.
        if row["sequence_length"] == 131_072 and name != "torch ring" and "documents" not in name
    ]
    assert max(first_losses) - min(first_losses) < 5e-5
    checkpointed, longest = ROWS["context checkpointed"], ROWS["context longest"]
    assert ROWS["context"]["bytes_sent_forward"] == ROWS["context"]["formula_bytes"]
    faster, slower = sorted(ROWS["one long"]["steps_s"])
    apart = [max(ROWS[name]["steps_s"]) / min(ROWS[name]["steps_s"]) - 1 for name in ("one", "one long")]
    assert over_slower("ddp", "one") >= 1.95
    assert over_slower("fsdp2", "one") >= 1.85
    assert over_slower("context", "one long") >= 1.9
    assert ratio("context", "one long", "peak_memory_bytes") <= 0.55
    for told in (
        f"these by {100 * min(apart):.1f} to {100 * max(apart):.1f}%",
        f"could not go beyond {1 + faster / slower:.3f}",
        f"The first losses agree, {min(first_losses):.4f} or {max(first_losses):.4f} for all",
        f"fsdp2 holds {ratio('fsdp2', 'one', 'state_bytes'):.3f} of the weights",
        f"Context sends {ratio('context', 'gather', 'bytes_sent_forward'):.3f} of the bytes of gathering",
        f"activations 131,072 tokens take {checkpointed['peak_memory_bytes'] / 1e9:.1f} GB on each of the "
        "two GPUs at "
        f"{checkpointed['tokens_per_second']:,.0f} tokens/s, and 1,048,576 tokens "
        f"{longest['peak_memory_bytes'] / 1e9:.1f} GB at {longest['tokens_per_second']:,.0f}, which is "
        f"{ratio('context longest', 'context checkpointed'):.2f} times the pace",
        f"and {ratio('context longest', 'context'):.2f} times that of 131,072 tokens whose activations",
    ):
        assert told in " ".join(PAGE.split()), told


def test_the_page_tells_what_parts_of_several_lengths_gain() -> None:
    steps = {row["entrant"]: row["step_s"] for row in report_of("scaling_shares")["rows"]}

    def longer(shares: str) -> float:
        return float(100 * (steps[f"context {shares}"] / steps["context"] - 1))

    told = (
        f"a step with parts as 1.008 to 1 took {-longer('[1.008,1]'):.1f}% less than with equal ones, as "
        f"1.016 to 1 {-longer('[1.016,1]'):.1f}% less and as 1 to 1.008 {longer('[1,1.008]'):.1f}% more"
    )
    assert told in " ".join(PAGE.split())


def test_two_gpus_stand_beside_the_model() -> None:
    parameters = 12 * SPEED.parameters + 32_768 * SPEED.dim
    shares = {"ddp": reduced_bytes(SPEED, 2), "fsdp2": sharded_bytes(SPEED, 2)}
    longer = {name: 1e3 * (ROWS[name]["step_s"] - max(ROWS["one"]["steps_s"])) for name in shares}
    sent = {name: share * parameters / SPEED.parameters for name, share in shares.items()}
    sending = {name: 1e3 * Machine().seconds_to_send(size, 2) for name, size in sent.items()}
    halved = 1e3 * (ROWS["context"]["step_s"] - max(ROWS["one long"]["steps_s"]) / 2)
    halo = 2e3 * Machine().seconds_to_send(12 * halo_bytes(SPEED, 131_072, 2), 2)
    held = {}
    for name, title, tokens, checkpointed in (
        ("one long", "one GPU, T = 131,072, GB", 131_072, False),
        ("context", "context on two, GB on each", 65_536, False),
        ("context checkpointed", "context on two, checkpointed, GB on each", 65_536, True),
        ("context longest", "context on two, T = 1,048,576, checkpointed, GB on each", 524_288, True),
    ):
        measured = ROWS[name]["peak_memory_bytes"] / 1e9
        said = memory_bytes(SPEED, 12, 32_768, tokens, checkpointed=checkpointed) / 1e9
        assert f"| {title} | {measured:.1f} | {said:.1f} |" in PAGE
        held[name] = measured / said - 1
    for line in (
        f"| context, MB sent forward | 12.6 | {12 * halo_bytes(SPEED, 131_072, 2) / 1e6:.1f} |",
        f"| ddp, ms a step more than the slower GPU | {longer['ddp']:.1f} | {sending['ddp']:.1f} |",
        f"| fsdp2, ms a step more than the slower GPU | {longer['fsdp2']:.1f} | {sending['fsdp2']:.1f} |",
        f"| context, ms a step more than half the slower GPU's | {halved:.1f} | "
        f"{sending['ddp'] + halo:.1f} |",
        f"and {halo:.2f} ms of keys, values and their gradients",
    ):
        assert line in " ".join(PAGE.split())
    assert "Context has on a GPU what the model says, to 1%." in PAGE
    assert "which at T = 131,072 took as much, to 1%" in PAGE
    assert abs(held["context"]) < 0.01


def rounded_up(size: float) -> str:
    """To two digits."""
    power = math.floor(math.log10(size))
    return f"{math.ceil(10 * size / 10.0**power) / 10:.1f}e{power}"


def test_the_cases_of_the_halo_are_as_many_as_the_result_says() -> None:
    cases = json.loads((PROJECT / "docs/results/halo_cases.json").read_text())
    drawn, error = cases["drawn"], cases["largest_error"]
    page = " ".join(PAGE.split())
    largest = [max(error[f"{what} {dtype}"] for what in ("outputs", "gradients")) for dtype in DTYPES]
    single, double = map(rounded_up, largest)
    assert cases["mismatches"] == 0
    for said in (
        f"Of {cases['cases']} cases none differed by more than {single} in float32",
        f"and {double} in float64",
        f"{drawn['W-1 > shard']} had W - 1 above a part",
        f"{drawn['a document spans shards']} documents that span parts",
        f"{drawn['a document ends inside a shard']} documents that end inside one",
        f"{drawn['padding']} padding, {drawn['sinks']} sinks, {drawn['GQA']} grouped queries, "
        f"{drawn['layer pattern']} layers of several windows, ",
        f"{drawn['parts of several lengths']} parts of several lengths",
    ):
        assert said in page, said


def test_the_cases_of_graphs_are_as_many_as_the_result_says() -> None:
    cases = json.loads((PROJECT / "docs/results/halo_cases_graph.json").read_text())
    error = cases["largest_error"]
    single, double = (
        rounded_up(max(error[f"{what} {dtype}"] for what in ("outputs", "gradients"))) for dtype in DTYPES
    )
    assert cases["mismatches"] == 0
    said = f"`{cases['command']}` compiles {cases['cases']} to graphs"
    assert said in PAGE
    assert f"none differed by more than {single} and {double}" in " ".join(PAGE.split())


def test_every_backend_under_the_exchange_errs_as_the_plain_formula_does_on_gpus() -> None:
    processes = json.loads((PROJECT / "docs/results/halo_backends_h200.json").read_text())["processes"]
    ratios: dict[str, float] = {}
    for found in processes:
        for backends in found.values():
            for name, errors in backends.items():
                if not isinstance(errors, str):
                    ratios[name] = max(ratios.get(name, 0), errors[0] / errors[1])
    assert ratios.keys() == {"auto", "band", "banded", "flex", "reference", "varlen"}
    largest = max(ratios.values())
    assert largest <= ROOM == 2
    assert f"at most {largest:.1f} times that of the plain formula" in " ".join(PAGE.split())


def test_documents_of_a_million_tokens_are_scored_alike_by_any_number_of_processes() -> None:
    dealt = json.loads((PROJECT / "docs/results/dealt_million.json").read_text())
    rows, windows = dealt["rows"], [2 * length for length in dealt["context_lengths"]]
    assert [row["processes"] for row in rows] == [1, 2, 3]
    assert all(row["equal"] and row["sums_of_nats"] == rows[0]["sums_of_nats"] for row in rows)
    assert dealt["documents"] == 3
    told = (
        f"Of three documents of {dealt['tokens_a_document']:,} tokens, in windows of {windows[0]:,} and of "
        f"{windows[1]:,}, each of {rows[0]['targets']:,} targets"
    )
    assert told in " ".join(PAGE.split())


def test_the_page_tells_of_the_case_that_rounding_decides() -> None:
    cases = json.loads((PROJECT / "docs/results/halo_cases_xeon.json").read_text())
    (seed,) = cases["failed_seeds"]
    assert draw(seed).windows == (1,)
    assert f"by more, by {cases['largest_error']['gradients float32']:.2e}".replace("e-0", "e-") in PAGE


def test_the_curves_of_two_processes_are_those_of_one() -> None:
    curves = json.loads((PROJECT / "docs" / "results" / "shared_curves.json").read_text(encoding="utf-8"))
    differences = [of_one["train_loss"] for of_one in curves["largest_difference"].values()]
    assert curves["steps"] == 50
    assert len(differences) == 13
    # Norms of gradients included.
    assert max(max(of_one.values()) for of_one in curves["largest_difference"].values()) <= 1e-6
    assert {"git_commit", "device", "versions"} <= curves.keys()
    told = f"are those of one to {max(differences):.1e}".replace("e-0", "e-")
    assert told in " ".join(PAGE.split())


def test_killed_processes_ended_as_the_page_says() -> None:
    cases = json.loads((PROJECT / "docs/results/killed_processes_cpu.json").read_text())["cases"]
    assert {case["parallel"] for case in cases} == {"ddp", "fsdp2", "context"}
    assert all(map(went_well, cases))
    longest = max(case["seconds_to_end"] for case in cases)
    assert f"the other ended within {longest:.1f} seconds" in " ".join(PAGE.split())
