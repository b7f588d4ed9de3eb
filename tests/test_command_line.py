import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.conftest import PROJECT, SMALL_RUN, start_script
from windowlm import command_line
from windowlm.attention.config import NtkScaling, RotaryConfig, YarnScaling
from windowlm.command_line import HUB_CLIENTS, WAITING_VARIABLES, Command, Invocation, main
from windowlm.config import EvaluateConfig, ExportConfig, GenerateConfig, TrainConfig, settings_of
from windowlm.errors import UserError
from windowlm.evaluation.own_settings import with_own_settings
from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.setting_text import setting_text
from windowlm.training.run_folder import RunFolder, check_run_folder, record_of
from windowlm.training.shares import check_shares

CONF = PROJECT / "conf"
NO_CORRECTION = ""


class Recorder:
    """A task that notes how it was called and begins a run."""

    def __init__(self) -> None:
        self.calls: list[tuple[TrainConfig, Invocation]] = []
        self.begin: Callable[[TrainConfig, Path], None] = begin_run

    def __call__(self, config: TrainConfig, invocation: Invocation) -> int:
        self.calls.append((config, invocation))
        self.begin(config, invocation.output_dir)
        return 0


def begin_run(config: TrainConfig, folder: Path) -> None:
    run = RunFolder(folder)
    run.write_config(config)
    run.update_record(**record_of(config, "stopped"))


def begin_nothing(config: TrainConfig, folder: Path) -> None:
    pass


def refuse(config: TrainConfig, folder: Path) -> None:
    raise UserError("data.path: is binary")


def interrupt(config: TrainConfig, folder: Path) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.chdir(tmp_path)
    return Recorder()


def run(recorder: Recorder, *words: str) -> int:
    command = Command(
        name="train", config_type=TrainConfig, task=recorder, check=check_run_folder, fixes_run_dir=True
    )
    return main(command, PROJECT / "train.py", CONF, list(words))


@pytest.mark.parametrize("own", [None, ("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
def test_threads_wait_shortly_unless_the_user_says_how(
    own: tuple[str, str] | None, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in WAITING_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if own is not None:
        monkeypatch.setenv(*own)
    run(recorder)
    assert {name: os.environ[name] for name in WAITING_VARIABLES & os.environ.keys()} == dict(
        [own or ("GOMP_SPINCOUNT", "1000")]
    )


def test_defaults_are_composed_and_the_run_gets_a_folder_of_its_own(recorder: Recorder) -> None:
    assert run(recorder) == 0
    ((config, invocation),) = recorder.calls
    assert config.model.window == 256
    assert invocation.output_dir.parts[0] == "runs"
    assert (invocation.output_dir / ".hydra" / "overrides.yaml").is_file()


def test_a_launcher_and_the_settings_agree_on_the_number_of_processes(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    command = Command(name="train", config_type=TrainConfig, task=recorder, devices="trainer.devices")
    assert main(command, PROJECT / "train.py", CONF, ["trainer.devices=4", "run_dir=r"]) == 0
    assert main(command, PROJECT / "train.py", CONF, ["trainer.devices=3", "run_dir=r"]) == 2
    printed = capsys.readouterr().err
    assert "trainer.devices=3: the launcher started 4 processes" in printed
    assert "try: python" in printed
    assert "trainer.devices=1" in printed


def test_work_that_processes_cannot_share_is_refused_before_they_are_started(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "launch", lambda count, words, saved: 0)
    command = Command(
        name="train",
        config_type=TrainConfig,
        task=recorder,
        devices="trainer.devices",
        check_shares=check_shares,
    )
    words = ["trainer.devices=2", "run_dir=r"]
    assert main(command, PROJECT / "train.py", CONF, [*words, "data.batch_size=4"]) == 0
    for wrong, better in (
        (["data.batch_size=3"], "data.batch_size=4"),
        (["parallel=context", "data.sequence_length=1023"], "data.sequence_length=1024"),
        (["parallel=context", "parallel.context_processes=3"], "parallel.context_processes=null"),
        (["parallel=fsdp2", "parallel.blocks_at_once=9"], "parallel.blocks_at_once=4"),
    ):
        assert main(command, PROJECT / "train.py", CONF, [*words, *wrong]) == 2
        assert better in capsys.readouterr().err.partition("try: ")[2]
    assert not recorder.calls


@pytest.mark.parametrize(
    ("words", "expected", "correction"),
    [
        (["model.windw=64"], "there is no setting model.windw", "model.window=64"),
        (["window=64"], "there is no setting window", "model.window=64"),
        (["+model.extra=1"], "there is no setting model.extra", None),
        (["model=tinny"], "model=tinny: allowed is base, small, study, tiny", "model=tiny"),
        (["nogroup=3"], "there is no setting nogroup", None),
        (["model.kv_heads=3"], "must divide heads=4", "model.kv_heads=2"),
        (["model.window=0"], "model.window=0", "model.window=256"),
        (["model.window=-1"], "model.window=-1", "model.window=256"),
        (["model.window=1.5"], "model.window=1.5", "model.window=256"),
        (["model.window=true"], "model.window=true", "model.window=256"),
        (["model.foo=1"], "model has layers, dim", None),
        (["optimizer=3"], "optimizer=3: allowed is adamw, muon", None),
        (["optimizer=null"], "optimizer=null: allowed is adamw, muon; leave optimizer away", None),
        (
            ["experiment=null"],
            "length_study, length_study_long, window_sweep; leave experiment away",
            None,
        ),
        (
            ["-m", "model=tiny,null"],
            "allowed is base, small, study, tiny; leave model away",
            None,
        ),
        (["trainer.max_steps=10,20"], "several values make a sweep, which starts with -m", None),
        (["tokenizer=file"], "tokenizer.path=null: kind=file", "tokenizer.path=tokenizer.json"),
        (["=3"], "given as key=value", None),
        ([""], "given as key=value", None),
        (["~model.window"], "changed, not removed", None),
        (["hydra/nothing=3"], "hydra/nothing", None),
        (["--config-name", "evaluate"], "no such option", None),
        (["run_dir="], "a folder of its own", "run_dir=null"),
        (["-m", "run_dir=runs/${seed}", "seed=1,2"], "the one folder of all runs", "run_dir=null"),
        (["seed=${nothing}"], "seed=${nothing}: Interpolation key 'nothing' not found", None),
        (["-m", "model.kv_heads=1,3,4"], "model.kv_heads=3", "model.kv_heads=1,2,4"),
        (["-m", "model=tiny,tinny,base"], "model=tinny: allowed is", "model=tiny,base"),
        (["-m", "model.window=64", "model.kv_heads=range(1,4)"], "kv_heads=3", "model.kv_heads=1,2"),
        (["model.rotary.scaling.kind=yarn", "model.rotary.scaling.factor=2"], "original_length", None),
        (["model.rotary.fractoin=0.5"], "no setting model.rotary.fractoin", "model.rotary.fraction=0.5"),
        (["model.rotary=null", "model.rotary.base=5"], "model.rotary=null stands beside it", NO_CORRECTION),
        (["model.rotary.base=5", "model.rotary=null"], "model.rotary=null stands beside it", NO_CORRECTION),
        (["model.rotary=[null]", "model.rotary.base=5"], "model.rotary=[null] stands", NO_CORRECTION),
        (
            ["model.rotary.scaling=null", "model.rotary.scaling.kind=ntk"],
            "scaling=null stands",
            NO_CORRECTION,
        ),
        (["-m", "model.rotary={base: 3},null", "model.rotary.base=5"], "rotary=null stands", NO_CORRECTION),
        (["model.rotary=[{bsae: 5}]"], "no setting model.rotary[0].bsae", "model.rotary=[{base: 5}]"),
        (["trainer.max_steps"], "given as key=value", None),
        (["optimizer.lr=[1"], "optimizer.lr=[1: cannot be read", NO_CORRECTION),
        (["model.window=[64,64"], "model.window=[64,64: cannot be read", NO_CORRECTION),
        (["-m", "data.path=choice(a,b"], "cannot be read; a text", "data.path='choice(a,b'"),
        (["precision=16-mixed", "trainer.device=cpu"], "needs a GPU", "precision=bf16-mixed"),
        (["precision=16-mixed", "trainer.loss=pieces"], "scales the loss", "trainer.loss=auto"),
        (["--unknown"], "no such option", None),
        (["-m", "model.window=64,0"], "model.window=0", "model.window=64,256"),
        (["-m", "model.windw=64,128"], "there is no setting model.windw", "model.window=64,128"),
        (["seed=${oc.env:NOT_SET_ANYWHERE}"], "NOT_SET_ANYWHERE", None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_ends_with_status_2_one_message_and_nothing_written(
    recorder: Recorder,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
    correction: str | None,
) -> None:
    assert run(recorder, *words) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) <= 2
    if correction == NO_CORRECTION:
        assert "try:" not in printed.err
    elif correction is not None:
        assert correction in shlex.split(printed.err.splitlines()[1])
    assert not recorder.calls
    assert not list(Path.cwd().iterdir())


def test_a_mistake_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    # Importing torch is what takes seconds: without it the answer comes within two.
    script = tmp_path / "train_and_tell.py"
    script.write_text(
        "import runpy, sys\n"
        "heavy = ('torch', 'numpy', 'datasets', 'lightning', 'tokenizers', 'wandb')\n"
        f"sys.argv = ['train.py', 'model.kv_heads=3']\n"
        "try:\n"
        f"    runpy.run_path({str(PROJECT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    print(ended.code, [name for name in heavy if name in sys.modules])\n"
    )
    done = start_script(str(script), cwd=tmp_path)
    assert "must divide heads=4" in done.stderr
    assert done.stdout.strip() == "2 []"


def words_of(values: dict[str, object], prefix: str = "") -> list[str]:
    words = []
    for name, value in values.items():
        if isinstance(value, dict):
            words += words_of(value, f"{prefix}{name}.")
        else:
            words.append(f"{prefix}{name}={setting_text(value)}")
    return words


@pytest.mark.parametrize("config_type", [TrainConfig, EvaluateConfig])
def test_every_setting_can_be_given_as_key_and_value(recorder: Recorder, config_type: type) -> None:
    scaling = YarnScaling(kind="yarn", factor=2.0, original_length=64, attention_factor=1.5)
    config = (
        EvaluateConfig(checkpoint="run")
        if config_type is EvaluateConfig
        else TrainConfig(
            run_dir=str(Path.cwd() / "new"),
            model=ModelConfig(
                rotary=RotaryConfig(scaling=scaling), ngram_embeddings=NgramEmbeddingsConfig(dim=8)
            ),
        )
    )
    words = words_of(asdict(config))
    given = {word.partition("=")[0] for word in words}
    assert {
        key for key, setting in settings_of(config_type).items() if not setting.is_group and key not in given
    } == set()
    assert (run if config_type is TrainConfig else evaluate)(recorder, *words) == 0
    assert recorder.calls[-1][0] == config


@pytest.mark.parametrize(
    ("word", "group"),
    [
        ("model.ngram_embeddings={}", NgramEmbeddingsConfig()),
        ("model.ngram_embeddings={orders: [3], buckets: 7}", NgramEmbeddingsConfig(orders=[3], buckets=7)),
        ("model.ngram_embeddings.buckets=9", NgramEmbeddingsConfig(buckets=9)),
        ("model.ngram_embeddings=null", None),
    ],
)
def test_ngram_embeddings_are_given_as_a_group_or_by_one_setting(
    recorder: Recorder, word: str, group: NgramEmbeddingsConfig | None
) -> None:
    assert run(recorder, word) == 0
    assert recorder.calls[-1][0].model.ngram_embeddings == group


def test_every_option_of_the_attention_can_be_given(recorder: Recorder) -> None:
    pattern = [RotaryConfig(base=5.0, scaling=NtkScaling(kind="ntk", factor=2.0)), None]
    model = ModelConfig(
        attention_sinks=4, learned_sinks=True, output_gate=True, logit_cap=50.0, rotary=pattern
    )
    assert run(recorder, *words_of(asdict(model), "model.")) == 0
    assert recorder.calls[-1][0].model == model


@pytest.mark.parametrize(
    "value",
    [
        "a b,c",
        "it's",
        'say "x"',
        "[x] {a: 1}[/i]",
        "k=v # % $HOME",
        "back\\slash",
        "ends'",
        "end\\",
        "line\nbreak",
    ],
)
def test_paths_may_hold_any_character(recorder: Recorder, value: str) -> None:
    path = Path.cwd() / value
    assert run(recorder, f"data.path={path}", f"run_dir=out/{value}") == 0
    ((config, invocation),) = recorder.calls
    assert config.data.path == str(path)
    assert config.data.name == "text"
    assert invocation.output_dir == Path("out") / value


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(recorder: Recorder) -> None:
    assert run(recorder, "-m", "model.window=64,null", "model.kv_heads=1,4", "run_dir=sweep") == 0
    settings = [(config.model.window, config.model.kv_heads) for config, _ in recorder.calls]
    assert settings == [(64, 1), (64, 4), (None, 1), (None, 4)]
    assert [invocation.output_dir for _, invocation in recorder.calls] == [
        Path(f"sweep/{n}") for n in range(4)
    ]
    assert {invocation.sweep_dir for _, invocation in recorder.calls} == {Path("sweep").resolve()}


def test_the_hubs_client_logs_no_address_which_may_hold_a_password(recorder: Recorder) -> None:
    for name in HUB_CLIENTS:
        logging.getLogger(name).setLevel(logging.NOTSET)
    assert run(recorder) == 0
    assert not any(logging.getLogger(name).isEnabledFor(logging.INFO) for name in HUB_CLIENTS)


def test_the_folder_of_a_sweep_can_be_given_in_hydras_words(recorder: Recorder) -> None:
    assert run(recorder, "-m", "seed=1,2", "hydra.sweep.dir=elsewhere") == 0
    assert [invocation.output_dir for _, invocation in recorder.calls] == [
        Path("elsewhere/0"),
        Path("elsewhere/1"),
    ]


def test_texts_of_a_sweep_may_hold_any_character_but_the_comma(recorder: Recorder) -> None:
    assert run(recorder, "-m", "data.path=a [1].txt,it's.txt", "run_dir=a, b") == 0
    assert [config.data.path for config, _ in recorder.calls] == ["a [1].txt", "it's.txt"]
    assert recorder.calls[0][1].output_dir == Path("a, b/0")


def test_home_is_found_in_every_path(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert run(recorder, "data.path=~/text", "run_dir=~/runs/1", "data.cache_dir=~/cache") == 0
    ((config, invocation),) = recorder.calls
    assert config.data.path == str(Path.cwd() / "text")
    assert config.data.cache_dir == str(Path.cwd() / "cache")
    assert invocation.output_dir == Path("runs/1")


def test_a_path_that_exists_is_taken_to_the_letter(recorder: Recorder) -> None:
    for name in ("a,b", "~", "'quoted'", "${seed}"):
        Path(name).mkdir()
        assert run(recorder, "-m", f"data.path={name}", "seed=1", f"run_dir=runs/{len(recorder.calls)}") == 0
        assert recorder.calls[-1][0].data.path == name


def test_groups_that_are_null_can_be_filled_key_by_key(recorder: Recorder) -> None:
    scaling = {"kind": "yarn", "factor": 2.0, "original_length": 64}
    assert run(recorder, *(f"model.rotary.scaling.{key}={value}" for key, value in scaling.items())) == 0
    config = recorder.calls[0][0]
    assert config.model.rotary is not None
    assert config.model.rotary.base == 10_000
    assert getattr(config.model.rotary.scaling, "original_length", None) == 64


@pytest.mark.parametrize("mark", ["", "+", "++"])
def test_a_list_takes_the_place_of_a_group(recorder: Recorder, mark: str) -> None:
    assert (
        run(recorder, f"{mark}model.rotary=[{{base: 100}},null,{{scaling: {{kind: ntk, factor: 2}}}}]") == 0
    )
    bases = [rotary and rotary.base for rotary in recorder.calls[0][0].model.layer_rotaries()]
    assert bases == [100, None, 10_000, 100]


def test_lists_null_and_groups_can_be_swept(recorder: Recorder) -> None:
    words = ("-m", "model.rotary=[{base: 100},null],null,{base: 200}", "seed=1,2", "run_dir=sweep")
    assert run(recorder, *words) == 0
    pattern = [RotaryConfig(base=100.0), None]
    settings = [(config.model.rotary, config.seed) for config, _ in recorder.calls]
    assert settings == [
        (rotary, seed) for rotary in (pattern, None, RotaryConfig(base=200.0)) for seed in (1, 2)
    ]


@pytest.fixture
def own_conf(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings with a model and an experiment that hold a list."""
    folder = tmp_path_factory.mktemp("clone") / "conf"
    shutil.copytree(CONF, folder)
    written = (folder / "model" / "tiny.yaml").read_text().partition("rotary:")[0]
    (folder / "model" / "mine.yaml").write_text(f"{written}rotary: [{{base: 100}}, null]\n")
    text = "# @package _global_\nmodel:\n  rotary: [{base: 100}, null]\n"
    (folder / "experiment" / "mine.yaml").write_text(text)
    listed = text.replace("model:", "defaults: [/rotary_as_list, _self_, override /model: small]\nmodel:")
    (folder / "experiment" / "listed.yaml").write_text(listed)
    monkeypatch.setitem(globals(), "CONF", folder)
    return folder


@pytest.mark.usefixtures("own_conf")
def test_a_list_of_a_yaml_is_taken_or_replaced_whole(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recorder, "model=mine") == 0
    assert run(recorder, "model=mine", "model.rotary=null") == 0
    assert run(recorder, "model=mine", "model.rotary=[{base: 7}]") == 0
    assert run(recorder, "experiment=listed") == 0
    assert run(recorder, "experiment=listed", "model.rotary={base: 8}") == 2
    assert "a list and a group of settings cannot be merged" in capsys.readouterr().err
    assert [config.model.rotary for config, _ in recorder.calls] == [
        [RotaryConfig(base=100.0), None],
        None,
        [RotaryConfig(base=7.0)],
        [RotaryConfig(base=100.0), None],
    ]
    assert recorder.calls[-1][0].model.dim == 512
    for words, message in [
        (["model=mine", "model.rotary.base=5"], "model.rotary.base=5: there is a list above it"),
        (["model=mine", "model.rotary.scaling.kind=ntk"], "kind=ntk: there is a list above it"),
        (["model=mine", "model.rotary={base: 5}"], "model.rotary: a list and a group of settings cannot be"),
        (["experiment=mine"], "experiment/mine: a list and a group of settings cannot be merged"),
    ]:
        assert run(recorder, *words) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert len(printed.splitlines()) == 1


def test_a_run_folder_of_null_is_named_by_the_time(recorder: Recorder) -> None:
    assert run(recorder, "run_dir=null") == 0
    assert recorder.calls[0][1].output_dir.parent == Path("runs")


def test_runs_of_one_second_get_folders_of_their_own(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "now")

    assert run(recorder) == 0
    assert run(recorder) == 0
    assert run(recorder, "-m", "seed=1,2") == 0
    assert [str(invocation.output_dir) for _, invocation in recorder.calls] == [
        "runs/now",
        "runs/now-2",
        "runs/now-3/0",
        "runs/now-3/1",
    ]


def test_a_sweep_of_an_experiment_is_checked_and_run(recorder: Recorder) -> None:
    assert run(recorder, "-m", "experiment=window_sweep") == 0
    assert len(recorder.calls) == 12
    assert {config.trainer.max_tokens for config, _ in recorder.calls} == {2_000_000}


@pytest.mark.parametrize("swept", [("model.window=64,128",), ("model.window=64,128", "seed=0,1")])
def test_a_part_of_an_experiments_sweep_goes_on_in_the_order_of_its_file(
    recorder: Recorder, swept: tuple[str, ...]
) -> None:
    words = ("-m", "experiment=window_sweep", "run_dir=old", *swept)
    assert run(recorder, *words) == 0
    begun = [(config.model.window, config.seed) for config, _ in recorder.calls]
    recorder.calls.clear()
    assert run(recorder, *words, "resume=auto") == 0
    assert [(config.model.window, config.seed) for config, _ in recorder.calls] == begun


def everything() -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in Path.cwd().rglob("*")}


@pytest.mark.parametrize("words", [(), ("resume=auto",), ("-m", "seed=1,2"), ("-m", "seed=1", "resume=auto")])
@pytest.mark.parametrize("name", ["config.json", ".secret"])
def test_a_folder_with_other_content_is_refused_before_anything_is_written(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], name: str
) -> None:
    Path("old").mkdir()
    Path("old", name).write_text("{}")
    before = everything()
    assert run(recorder, "run_dir=old", *words) == 2
    assert f"run_dir=old: holds '{name}' and is no run of windowlm" in capsys.readouterr().err
    assert everything() == before


@pytest.mark.parametrize("content", ["{}", '{"name": "another tool"}', "[]", "not JSON"])
def test_a_record_that_is_not_ours_is_no_run(recorder: Recorder, content: str) -> None:
    Path("old").mkdir()
    Path("old/run.json").write_text(content)
    before = everything()
    assert run(recorder, "run_dir=old", "resume=auto") == 2
    assert everything() == before


def test_a_folder_with_a_run_is_refused_before_anything_is_written(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recorder, "run_dir=old") == 0
    before = everything()
    assert run(recorder, "run_dir=old") == 2
    assert "already holds a run (stopped)" in capsys.readouterr().err
    assert run(recorder, "-m", "run_dir=old", "seed=1,2") == 2
    assert "run_dir=old: holds a run" in capsys.readouterr().err
    assert everything() == before


def test_a_folder_with_a_sweep_goes_on_with_the_same_settings_alone(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recorder, "-m", "run_dir=old", "seed=1,2") == 0
    before = everything()
    assert run(recorder, "-m", "run_dir=old", "seed=1,2") == 2
    assert "already holds 2 runs of a sweep" in capsys.readouterr().err
    assert run(recorder, "-m", "run_dir=old", "seed=1,3", "resume=auto") == 2
    assert "seed=3: the run in old/1 has seed=2" in capsys.readouterr().err
    assert everything() == before
    assert run(recorder, "-m", "run_dir=old", "seed=1,2", "resume=auto") == 0
    assert Path("old/0/.hydra-2").is_dir()


def test_a_run_from_before_a_setting_goes_on_with_its_default_alone(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recorder, "run_dir=one") == 0
    settings = json.loads(Path("one/config.json").read_text())
    del settings["model"]["attention_sinks"]
    Path("one/config.json").write_text(json.dumps(settings))
    assert run(recorder, "run_dir=one", "resume=auto", "model.attention_sinks=2") == 2
    assert "model.attention_sinks=2: the run in one has model.attention_sinks=null" in capsys.readouterr().err
    assert run(recorder, "run_dir=one", "resume=auto", "model.rotary=null") == 2
    assert run(recorder, "run_dir=one", "resume=auto") == 0


@pytest.mark.parametrize("folder", ["file", "file/run", "/proc/no/run"])
def test_a_folder_that_cannot_be_written_is_a_users_mistake(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    Path("file").touch()
    for words in ((), ("-m", "seed=1,2")):
        assert run(recorder, f"run_dir={folder}", *words) == 2
        assert f"run_dir={folder}: " in capsys.readouterr().err
    assert not recorder.calls


@pytest.mark.parametrize(("end", "status"), [(refuse, 2), (begin_nothing, 0), (interrupt, 130)])
@pytest.mark.parametrize("words", [(), ("-m", "seed=1,2")])
@pytest.mark.parametrize("folder", ["new/and/deep", "here"])
def test_a_run_that_does_not_begin_leaves_nothing(
    recorder: Recorder,
    capsys: pytest.CaptureFixture[str],
    end: Callable[[TrainConfig, Path], None],
    status: int,
    words: tuple[str, ...],
    folder: str,
) -> None:
    Path("here").mkdir()
    recorder.begin = end
    before = everything()
    assert run(recorder, f"run_dir={folder}", *words) == status
    assert everything() == before
    printed = capsys.readouterr().err
    assert ("data.path: is binary" in printed) == (status == 2)
    assert ("interrupted" in printed) == (status == 130)


@pytest.mark.parametrize("words", [("seed=1",), ("-m", "seed=1,2")])
def test_a_resumed_run_that_does_not_begin_leaves_the_earlier_record(
    recorder: Recorder, words: tuple[str, ...]
) -> None:
    assert run(recorder, "run_dir=one", *words) == 0
    before = everything()
    recorder.begin = begin_nothing
    assert run(recorder, "run_dir=one", "resume=auto", "plan=true", *words) == 0
    assert everything() == before


@pytest.mark.parametrize("content", ["[1]", "null", "not JSON"])
def test_a_run_whose_settings_are_damaged_is_named(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    assert run(recorder, "run_dir=one") == 0
    Path("one/config.json").write_text(content)
    assert run(recorder, "run_dir=one", "resume=auto") == 2
    assert "one/config.json: cannot be read" in capsys.readouterr().err


def test_hydras_record_of_an_earlier_start_is_kept(recorder: Recorder) -> None:
    assert run(recorder, "run_dir=one", "seed=1") == 0
    assert run(recorder, "run_dir=one", "seed=1", "resume=auto") == 0
    assert "resume='auto'" not in Path("one/.hydra/overrides.yaml").read_text()
    assert "resume='auto'" in Path("one/.hydra-2/overrides.yaml").read_text()


def test_a_mistake_in_one_run_of_a_sweep_names_it_and_the_others_go_on(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse_one(config: TrainConfig, folder: Path) -> None:
        (refuse if config.seed == 1 else begin_run)(config, folder)

    recorder.begin = refuse_one
    assert run(recorder, "-m", "run_dir=a b", "seed=1,2") == 2
    assert "error: 'a b/0': data.path: is binary" in capsys.readouterr().err
    assert not Path("a b/0").exists()
    assert Path("a b/1/run.json").is_file()
    assert Path("a b/multirun.yaml").is_file()


def evaluate(recorder: Recorder, *words: str) -> int:
    command = Command(
        name="evaluate",
        config_type=EvaluateConfig,
        task=lambda config, _: recorder.calls.append((config, None)) or 0,  # type: ignore[func-returns-value, arg-type]
        complete=with_own_settings,
    )
    return main(command, PROJECT / "scripts" / "evaluate.py", CONF, list(words))


def test_the_evaluation_takes_what_is_not_given_from_the_run(recorder: Recorder) -> None:
    assert run(recorder, "run_dir=one", "evaluation.max_targets=77", "evaluation.split=test") == 0
    for words, targets, split in [
        ((), 77, "test"),
        (("evaluation.split=validation",), 77, "validation"),
        (("evaluation=full",), None, "test"),
        (("data.path=book.txt",), None, "test"),
        (("data.path=book.txt", "evaluation.max_targets=5"), 5, "test"),
        (("evaluation=full", "evaluation.max_targets=5"), 5, "test"),
    ]:
        assert evaluate(recorder, "checkpoint=one", *words) == 0
        config = recorder.calls[-1][0]
        assert (config.evaluation.max_targets, config.evaluation.split) == (targets, split)
    assert {path.name for path in Path.cwd().iterdir()} == {"one"}


def test_a_corrected_command_names_the_script_as_it_was_started(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    assert evaluate(recorder, "checkpoint=x", "evaluation.max_targets=0") == 2
    expected = "try: python scripts/evaluate.py checkpoint=x evaluation.max_targets=16384"
    assert expected in capsys.readouterr().err
    for data in ("pg19", "null"):
        assert evaluate(recorder, "checkpoint=x", f"data={data}") == 2
        expected = f"data={data}: this command has no data to choose, but data.name, data.path"
        assert expected in capsys.readouterr().err
    assert evaluate(recorder, "checkpoint=x", "data.path=y", "evaluation.split=test") == 2
    assert "error: evaluation.split=test: other data are scored whole" in capsys.readouterr().err
    assert evaluate(recorder, "-m", "checkpoint=x,y") == 2
    assert "scripts/evaluate.py makes no sweeps" in capsys.readouterr().err
    assert evaluate(recorder) == 2
    assert "checkpoint: must be given: checkpoint=VALUE" in capsys.readouterr().err


def test_ctrl_c_while_data_are_read_ends_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "long.txt").write_text("a few words of text\n" * 4_000_000)
    # Where this process had to wait too long for a core, the plan is printed before the signal comes.
    for attempt in range(3):
        here, cache = tmp_path / f"new {attempt}", tmp_path / f"cache {attempt}"
        command = [
            *(sys.executable, str(PROJECT / "train.py"), *SMALL_RUN),
            *("data.path=text", f"data.cache_dir={cache}", f"run_dir={here / 'run'}"),
        ]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 60
            while not cache.is_dir() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        if "parameters" not in errors:
            break
    # As of a command that can go on, or of one that cannot.
    assert process.returncode in (75, 130)
    assert "Traceback" not in errors
    assert not here.exists()


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75)],
)
def test_a_signal_while_the_command_is_imported_prints_nothing(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    (tmp_path / "windowlm").mkdir()
    (tmp_path / "windowlm" / "__init__.py").write_text(f"import os\nos.kill(os.getpid(), {number.value})")
    done = subprocess.run(
        [sys.executable, str(PROJECT / "train.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        # A shell starts what runs in the background with this signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.parametrize(("script", "config_type"), [("generate", GenerateConfig), ("export", ExportConfig)])
def test_the_help_of_a_command_without_groups_says_what_each_setting_is(
    script: str, config_type: type, capfd: pytest.CaptureFixture[str]
) -> None:
    command = Command(name=script, config_type=config_type, task=lambda *_: 1)
    assert main(command, PROJECT / "scripts" / f"{script}.py", CONF, ["--help"]) == 0
    shown = capfd.readouterr().out
    for name in settings_of(config_type):
        assert re.search(rf"^{name}: .*# \w", shown, re.MULTILINE), name
    assert "hydra" not in shown


def test_a_reader_that_goes_away_is_no_mistake(tmp_path: Path) -> None:
    command = shlex.join([sys.executable, str(PROJECT / "train.py"), "--help"])
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 141)
    assert done.stderr == ""
