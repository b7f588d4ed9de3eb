"""Traces of runs that do not begin."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from windowlm.unbegun_runs import UnbegunRuns, free_name


def test_commands_that_start_at_once_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: UnbegunRuns.in_new_folder(tmp_path / "a" / "b", "record"), range(40)))
    assert len({run.folder for run in runs}) == 40
    assert free_name(tmp_path / "a" / "b") == tmp_path / "a" / "b-41"


def test_what_was_there_stays_and_what_was_made_in_vain_goes(tmp_path):
    (tmp_path / "a" / "0").mkdir(parents=True)
    (tmp_path / "a" / "record").write_text("old")
    runs = UnbegunRuns(tmp_path / "a", "record")
    with runs.all(".hydra*"):
        (tmp_path / "a" / "record").write_text("new")
        for name in "01":
            (tmp_path / "a" / name / ".hydra").mkdir(parents=True)
            with runs.run(tmp_path / "a" / name, ".hydra"):
                pass
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0", "record"]
    assert not list((tmp_path / "a" / "0").iterdir())
    assert (tmp_path / "a" / "record").read_text() == "old"


def test_a_run_that_writes_keeps_its_record(tmp_path):
    runs = UnbegunRuns(tmp_path / "new", "record")
    with runs.all(".hydra*"):
        (tmp_path / "new" / ".hydra").mkdir(parents=True)
        (tmp_path / "new" / "record").touch()
        with runs.run(tmp_path / "new", ".hydra"):
            (tmp_path / "new" / "run.json").touch()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".hydra", "record", "run.json"]


def test_a_folder_that_is_gone_hides_nothing_of_what_ended_its_run(tmp_path):
    runs = UnbegunRuns(tmp_path / "new", "record")
    (tmp_path / "new" / ".hydra").mkdir(parents=True)

    def fail():
        (tmp_path / "new").rename(tmp_path / "elsewhere")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), runs.all(".hydra*"), runs.run(tmp_path / "new", ".hydra"):
        fail()
    assert (tmp_path / "elsewhere" / ".hydra").is_dir()


def test_a_link_that_leads_nowhere_is_an_entry_like_others(tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / "note").symlink_to("nowhere")
    runs = UnbegunRuns(tmp_path / "run", "record")
    with runs.all(".hydra*"), runs.run(tmp_path / "run", ".hydra"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["note"]


def test_a_record_that_could_not_be_written_goes_and_those_of_runs_stay(tmp_path):
    def fail(*made):
        for name in made:
            (tmp_path / name).mkdir(parents=True)
        raise OSError

    for made in (["new/.hydra"], ["new/0/.hydra"], ["run/.hydra-2"]):
        (tmp_path / "run" / ".hydra").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "run.json").touch()
        runs = UnbegunRuns(tmp_path / made[0].partition("/")[0], "record")
        with pytest.raises(OSError), runs.all(".hydra*"):  # noqa: PT011  # as of a full disk
            fail(*made)
        assert {path.name for path in tmp_path.iterdir()} == {"run"}
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".hydra", "run.json"}
    # A launcher has run the first in a process of its own.
    runs = UnbegunRuns(tmp_path / "new", "record")
    with pytest.raises(OSError), runs.all(".hydra*"):  # noqa: PT011
        fail("new/0/.hydra", "new/0/model", "new/1/.hydra")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["0"]
    assert len(list((tmp_path / "new" / "0").iterdir())) == 2
