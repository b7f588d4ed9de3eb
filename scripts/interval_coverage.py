"""Measure how often each interval of the evaluation covers the truth, at few clusters and of skewed measures.

python scripts/interval_coverage.py [--simulations 1000] [--out docs/results/interval_coverage.json]

Every simulated study draws clusters whose true mean is known and asks whether the 95% interval holds it.
`seeds` draws two settings of equal mean, three seeds each, on common authors: `authors only` takes the mean
of the seeds as if no other seed could be drawn. `equivalence` draws clusters whose mean lies on the margin,
where equality should be claimed in at most 5% of the cases, or at zero, where a claim is right.
"""

import argparse
import itertools
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from out_argument import out_file

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.evaluation.bootstrap_t import bootstrap_t
from windowlm.evaluation.equivalence import MARGIN, equivalence
from windowlm.evaluation.paired_difference import PairedDifference, paired_difference
from windowlm.evaluation.seed_variation import setting_difference

CLUSTERS = (8, 20, 40)
RESAMPLES = 1_999
SEEDS_OF_A_SETTING = 3

# Both have mean 0 and standard deviation 1; the lognormal's skewness is 6.2.
DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda generator, count: generator.normal(size=count),
    "skewed": lambda generator, count: (
        (generator.lognormal(0, 1, size=count) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    ),
}


def percentile_bootstrap(values: np.ndarray, seed: int) -> PairedDifference:
    """The interval that is common and covers too little: quantiles of resampled means."""
    means = values[np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))].mean(
        axis=1
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return PairedDifference(float(values.mean()), float(low), float(high), len(values))


INTERVALS: dict[str, Callable[[np.ndarray, int], PairedDifference]] = {
    "t": lambda values, _: paired_difference(np.zeros_like(values), values),
    "bootstrap-t": lambda values, seed: bootstrap_t(values, resamples=RESAMPLES, seed=seed),
    "percentile bootstrap": percentile_bootstrap,
}


def main() -> int:
    """Run the simulations, print their table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=1_000)
    parser.add_argument("--out", type=out_file)
    options = parser.parse_args()
    if options.simulations < 1:
        parser.error("--simulations: at least 1; try --simulations 1000")
    rows = [
        row
        for measure in (coverage_rows, seed_rows, equivalence_rows)
        for row in measure(options.simulations)
    ]
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in row.items()))
    if options.out is not None:
        report = {
            "command": "python " + shlex.join(sys.argv),
            "commit": commit(),
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "scipy": scipy.__version__,
            },
            "simulations": options.simulations,
            "resamples": RESAMPLES,
            "nominal": 0.95,
            "rows": rows,
        }
        write_atomically(options.out, json_bytes(report))
    return 0


def coverage_rows(simulations: int) -> list[dict[str, Any]]:
    """How often the interval of a mean holds it, and how wide it is in the middle of the cases."""
    rows = []
    for distribution, draw in DRAWS.items():
        for clusters in CLUSTERS:
            generator = np.random.default_rng(clusters)
            samples = [draw(generator, clusters) for _ in range(simulations)]
            for name, interval in INTERVALS.items():
                found = [interval(values, number) for number, values in enumerate(samples)]
                stated = [
                    (each.low, each.high) for each in found if each.low is not None and each.high is not None
                ]
                rows.append(
                    {
                        "kind": "mean",
                        "distribution": distribution,
                        "clusters": clusters,
                        "interval": name,
                        "covered": round(sum(low <= 0 <= high for low, high in stated) / len(stated), 4),
                        "median_width": round(float(np.median([high - low for low, high in stated])), 4),
                        "not_stated": len(found) - len(stated),
                    }
                )
    return rows


def seed_rows(simulations: int) -> list[dict[str, Any]]:
    """How often the interval of a claim about a setting holds the truth, by how much seeds vary.

    ``seed_share`` is the standard deviation of seeds over that of the authors' differences, and a quarter of
    its variance is added for each author and seed. ``distribution`` is that of the authors' differences.
    """
    rows = []
    for distribution, draw in DRAWS.items():
        for clusters, share in itertools.product(CLUSTERS, (0.1, 0.5, 2.0)):
            generator = np.random.default_rng(clusters)
            covered = {"authors and seeds": 0, "authors only": 0}
            for _ in range(simulations):
                authors = generator.normal(2, 1, size=clusters)
                settings = [
                    authors
                    + difference
                    + generator.normal(0, share, size=(SEEDS_OF_A_SETTING, 1))
                    + generator.normal(0, share / 2, size=(SEEDS_OF_A_SETTING, clusters))
                    for difference in (0, draw(generator, clusters))
                ]
                both = setting_difference(*settings)
                alone = paired_difference(settings[0].mean(axis=0), settings[1].mean(axis=0))
                for name, found in (("authors and seeds", both), ("authors only", alone)):
                    assert found.low is not None
                    assert found.high is not None
                    covered[name] += found.low <= 0 <= found.high
            rows += [
                {
                    "kind": "seeds",
                    "seeds": SEEDS_OF_A_SETTING,
                    "seed_share": share,
                    "distribution": distribution,
                    "clusters": clusters,
                    "interval": name,
                    "covered": round(count / simulations, 4),
                }
                for name, count in covered.items()
            ]
    return rows


def equivalence_rows(simulations: int) -> list[dict[str, Any]]:
    """How often equality is claimed where the truth is on the margin, or nothing at all."""
    rows = []
    for distribution, draw in DRAWS.items():
        for clusters in CLUSTERS:
            for mean in (MARGIN, -MARGIN, 0.0):
                generator = np.random.default_rng(clusters)
                verdicts = [
                    equivalence(mean + MARGIN * draw(generator, clusters)) for _ in range(simulations)
                ]
                rows.append(
                    {
                        "kind": "equivalence",
                        "distribution": distribution,
                        "clusters": clusters,
                        "true_mean": mean,
                        "claimed": round(
                            sum(v is not None and v.equivalent for v in verdicts) / simulations, 4
                        ),
                    }
                )
    return rows


def commit() -> str:
    """The commit of the clone, with a mark where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
