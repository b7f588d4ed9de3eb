"""What is measured of a finished run reaches its W&B run, of which nothing is lost or doubled."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import run_script
from tests.training.runs import begin
from windowlm.errors import UserError
from windowlm.training.finished_wandb_run import check_wandb_run, end_wandb_run
from windowlm.training.offline_wandb import history_differences, read_offline_run


@pytest.mark.parametrize("sweep", [False, True])
def test_measures_and_evaluations_join_the_history_of_an_offline_run(
    sweep: bool, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "runs" / "0"
    assert begin(folder, documents, tmp_path / "cache", sweep=sweep, logger={"kind": "wandb"}) == 0
    (before,) = (folder / "wandb").glob("offline-run-*")
    first = read_offline_run(before)
    scored = run_script(
        "scripts/evaluate.py",
        f"checkpoint={folder}",
        "wandb=true",
        "study.measures=[useful_reach]",
        cwd=tmp_path,
        environment={"WANDB_MODE": "offline"},
    )
    assert (scored.returncode, scored.stderr.count("Traceback")) == (0, 0), scored.stderr
    assert history_differences(folder) == []
    (after,) = (folder / "wandb").glob("offline-run-*")
    again = read_offline_run(after)
    assert (again["id"], again["group"]) == (first["id"], first["group"])
    assert (first["group"] == "runs") == sweep
    assert again["config"]["command"] == first["config"]["command"]
    logged = {"/".join(name.split("/")[:2]) for row in again["history"] for name in row}
    assert {"evaluation/length", "evaluation/length_plot", "evaluation/useful_reach"} <= logged
    assert f"wandb sync {after}" in scored.stdout


def test_a_file_that_lacks_something_of_the_run_is_said(tmp_path: Path) -> None:
    ended: list[int] = []
    online = SimpleNamespace(finish=ended.append, is_offline=False)
    end_wandb_run(online, tmp_path)  # type: ignore[arg-type]
    offline = SimpleNamespace(finish=ended.append, is_offline=True)
    with pytest.raises(UserError, match="does not hold all of the run: 0 W&B runs"):
        end_wandb_run(offline, tmp_path)  # type: ignore[arg-type]
    assert ended == [0, 0]


def test_a_run_without_one_is_refused_before_it_is_scored(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", "wandb_id": "a"}))
    with pytest.raises(UserError, match=r"^wandb=true: .* holds no finished run; try wandb=false"):
        check_wandb_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "wandb_id": None}))
    with pytest.raises(UserError, match=r"was not logged to W&B; try wandb=false"):
        check_wandb_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "wandb_id": "a"}))
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        check_wandb_run(tmp_path)
