"""The page on transformers says what the result of the measurement says."""

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
HOW = {"written": "out", "read": "in"}


def test_the_differences_of_logits_are_those_of_the_result() -> None:
    result = json.loads((DOCS / "results" / "transformers_parity.json").read_text())
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (DOCS / "transformers.md").read_text().splitlines()
        if line.endswith(f"of {result['greedy_tokens']} |")
    ]
    shown = {
        (HOW[row[0].partition(", ")[2]], row[0].partition(",")[0].partition(" ")[0]): row[1:] for row in rows
    }
    measured = {}
    for way in HOW.values():
        for architecture, found in result[way].items():
            differences, theirs, wider = (
                [number for name, number in found.items() if name in names]
                for names in (
                    ("difference_eager", "difference_sdpa"),
                    ("eager_from_float64", "sdpa_from_float64"),
                    ("difference_eager_one_key_wider", "difference_sdpa_one_key_wider"),
                )
            )
            numbers = [
                f"{number:.1e}" for number in (max(differences), found["ours_from_float64"], max(theirs))
            ]
            seen = f"{min(wider):.1f}" if wider else "-"
            agreeing = f"{found['greedy_agreeing']} of {result['greedy_tokens']}"
            measured[way, architecture] = [*numbers, seen, agreeing]
    assert shown == measured
