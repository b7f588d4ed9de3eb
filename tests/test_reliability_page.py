"""The page on reliability says what was measured."""

import json
import re
from typing import Any

import pytest

from tests.bad_inputs import bad_inputs
from tests.conftest import PROJECT

# As text runs on over the ends of lines.
PAGE = " ".join((PROJECT / "docs" / "reliability.md").read_text(encoding="utf-8").split())


def measured(name: str) -> dict[str, Any]:
    path = PROJECT / "docs" / "results" / "reliability_cpu" / f"{name}.json"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", ["kill_and_resume", "stops", "fuzzing", "soak"])
def test_it_is_known_where_a_figure_was_measured(name: str) -> None:
    assert {"command", "git_commit", "versions", "machine", "device"} <= measured(name).keys()


def test_the_table_of_wrong_inputs_holds_as_many_as_the_page_says() -> None:
    said = re.search(r"a table of more than (\d+) wrong", PAGE)
    assert said is not None
    assert len(bad_inputs()) > int(said[1])


def test_kills_and_soak_are_those_of_the_results() -> None:
    kills, soak = measured("kill_and_resume"), measured("soak")
    assert f"{kills['kills']} kills over {kills['runs']} runs" in PAGE
    assert f": {kills['different']} differences" in PAGE
    paths = (PROJECT / "docs" / "results" / "reliability_h100").glob("kill_and_resume_*.json")
    on_gpu = [json.loads(path.read_text()) for path in paths]
    of_all, of_muon = (
        sum(each["kills"] for each in on_gpu if name in each["cases"][0]["case"]) for name in ("", "muon")
    )
    assert f"{of_all} kills over {sum(each['runs'] for each in on_gpu)} runs, {of_muon} with Muon" in PAGE
    assert not any(each["different"] for each in on_gpu)
    grown = f"grew by {100 * soak['largest_growth']:.2f}% of {soak['resident_bytes_first'] / 1e6:.0f} MB"
    assert grown in PAGE


def test_stops_are_those_of_the_results() -> None:
    stops = measured("stops")
    assert stops["holds"]
    saved = [row for row in stops["rows"] if row["status"] == 75]
    at_once = [row["seconds"] for row in stops["rows"] if row["status"] == 130]
    assert all(row["saved"] and row["wandb_lacks"] == [] for row in saved)
    assert f"{len(saved)} stops with status 75, the slowest {max(r['seconds'] for r in saved):.1f} s" in PAGE
    assert f"with 130 within {max(at_once):.1f} s" in PAGE
    loads = [row["load"] for row in stops["rows"]]
    assert f"a load of {min(loads):.1f} to {max(loads):.1f}" in PAGE


def test_draws_are_those_of_the_results() -> None:
    fuzzing = measured("fuzzing")
    assert fuzzing["failed"] == 0
    assert f"{fuzzing['cases']:,} cases in {fuzzing['seconds'] / 60:.0f} minutes" in PAGE
