"""Each lever of the benchmark moves something, and the loop goes on with it."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.conftest import PROJECT

SCRIPTS = PROJECT / "scripts"
# The others compile, or take a kernel of a GPU.
ON_A_CPU = (
    "joint projections",
    "kept activations",
    "float32 stream",
    "whole loss",
    "plain loss",
    "no compilation",
    "unfused optimizer",
    "budget 0.5",
)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that the levers put something else in the place of, which is undone behind the test."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import training_levers

    names: list[str] = []

    def put(owner: object, name: str, other: object) -> None:
        assert getattr(owner, name) is not other
        monkeypatch.setattr(owner, name, other)
        names.append(name)

    monkeypatch.setattr(training_levers, "put", put)
    return names


def test_no_lever_puts_anything_where_nothing_is(moved: list[str]) -> None:
    levers = sys.modules["training_levers"].LEVERS
    assert set(ON_A_CPU) < set(levers)
    for name, move in levers.items():
        before = len(moved)
        move()  # fails for a name that is not there
        assert len(moved) > before, name


@pytest.mark.parametrize("lever", ON_A_CPU)
def test_the_loop_goes_on_with_the_lever_moved(moved: list[str], lever: str, tmp_path: Path) -> None:
    from benchmark_training import shape_of
    from synthetic_text import write_text
    from training_entrants import Job, windowlm_loop

    sys.modules["training_levers"].LEVERS[lever]()
    assert moved
    shape = shape_of("32,1,2,1,16,64,256,32,64,64", argparse.ArgumentParser())
    write_text(tmp_path, shape.vocabulary_size, 1000, seed=0)
    entrant = {"entrant": "windowlm loop", "shape": asdict(shape), "precision": "32-true"}
    job = Job(**entrant, device="cpu", text=str(tmp_path))
    step = windowlm_loop(job)
    for _ in range(3):
        assert step().isfinite()
