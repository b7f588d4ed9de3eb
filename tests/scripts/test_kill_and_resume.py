import json
import random
from collections import Counter
from pathlib import Path

import pytest
from kill_and_resume import MOMENTS, TRIES, WANDB_MOMENTS, Places

from tests.conftest import run_script


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("adamw,bf16-true,2,wandb", ()),
        # As tests/training/test_cuda.py starts it on a GPU.
        ("muon,bf16-mixed,0,none", ("--deterministic", "--dropout", "0")),
    ],
)
def test_killed_runs_end_equal_bit_for_bit(case: str, words: tuple[str, ...], tmp_path: Path) -> None:
    done = run_script(
        "scripts/kill_and_resume.py", "--cases", case, "--kills", "3", "--steps", "8", *words,
        "--first", "step taken and not counted@5", "--out", str(tmp_path), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kill_and_resume.json").read_text())
    assert report["different"] == 0
    (tried,) = report["cases"]
    assert len(tried["kills"]) == 3
    assert tried["runs"] >= 1
    # The first kill came in the fifth step, behind the save of the fourth: half of the run was trained anew.
    assert tried["kills"][0]["moment"] == "step taken and not counted"
    assert tried["resumed_from"][0] == 4


def test_every_place_is_drawn_before_one_is_drawn_again() -> None:
    moments = (*MOMENTS, *WANDB_MOMENTS)
    places = Places(MOMENTS, random.Random(0), first=WANDB_MOMENTS)
    rounds = [[places.draw() for _ in moments] for _ in range(3)]
    assert [Counter(drawn) for drawn in rounds] == [Counter(moments)] * 3
    assert rounds[0] != rounds[1]


def test_places_of_wandb_come_first_and_are_tried_again_at_once() -> None:
    places = Places(MOMENTS, random.Random(0), first=WANDB_MOMENTS)
    drawn = [missed := places.draw()]
    places.miss(missed)
    drawn += [places.draw() for _ in WANDB_MOMENTS]
    assert drawn[1] == missed
    assert set(drawn) == set(WANDB_MOMENTS)


@pytest.mark.parametrize("seed", range(20))
def test_a_place_that_was_not_reached_is_tried_again_behind_another(seed: int) -> None:
    moments = set(MOMENTS)
    places = Places(sorted(moments, key=lambda moment: moment.name), random.Random(seed))
    drawn = [never := places.draw()]
    places.miss(never)
    while set(drawn) != moments or drawn.count(never) < 2:
        drawn.append(places.draw())
        if drawn[-1] == never:
            places.miss(never)
    assert drawn[1] != never
    assert 2 <= drawn.count(never) <= TRIES
    assert len(drawn) == len(moments) - 1 + drawn.count(never)


def test_a_device_that_is_not_there_is_said(tmp_path: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    done = run_script("scripts/kill_and_resume.py", "--device", "cuda", cwd=tmp_path, environment=environment)
    assert done.returncode == 2
    assert "trainer.device=cuda: this machine shows no CUDA GPU" in done.stderr
    assert "Traceback" not in done.stderr
