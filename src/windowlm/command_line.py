"""From a command line to a checked configuration; the only file that knows Hydra.

A command is composed and checked before Hydra writes anything, and every mistake of the user, Hydra's own
complaints included, ends with one message and exit status 2.
"""

import difflib
import logging
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, cast

from windowlm.command_words import corrected, for_hydra, key_of, made_room, refuse_settings_of_no_group
from windowlm.config import Config, ConfigError, Setting, check_config, settings_of, unknown_key_error
from windowlm.errors import USAGE_ERROR, SystemRefusedError, UserError, exit_status, limits_as_mistakes
from windowlm.hydra_settings import LAUNCHER, refuse_changes_of_hydra, refuse_words_for_hydra
from windowlm.parallel.launcher import launch, starter, threads_of_each
from windowlm.parallel.place import own_place
from windowlm.unbegun_runs import UnbegunRuns, free_name

# How OmegaConf says that a list stands where a group was, or a group where a list was.
MERGED_WITH_LIST = re.compile(r"(?:In '(\S+)': .*\n)?Cannot merge \w+ with \w+\s+full_key: (\S*)")
NOT_OVERRIDDEN = re.compile(r"Could not override '([^']+)'")
# Where there are fewer cores.
MOST_PROCESSES = 16
STATE_FOLDER = ".hydra"
# By version of huggingface_hub; they log each address that they ask, a password in it included.
HUB_CLIENTS = ("httpx", "httpx2")
SWEEP_RECORD = "multirun.yaml"
TASKS_OF_JOBS, GPUS_OF_JOBS = "hydra.launcher.tasks_per_node", "hydra.launcher.gpus_per_node"
# The check before the start could not see what these bring in.
REFUSED_OPTIONS = ("config_path", "config_name", "config_dir", "experimental_rerun")


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """How a run was started.

    Attributes:
        output_dir: folder of this run.
        sweep_dir: folder of the sweep that it belongs to, None for a single run.
        command: the command line, as a shell would take it.
    """

    output_dir: Path
    sweep_dir: Path | None
    command: str


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Config]):
    """One command of the project.

    Args:
        name: name of its YAML in ``conf`` and of the command in messages.
        config_type: dataclass that the composed YAML must fit.
        task: called with the checked configuration; returns the exit status.
        check: called before anything is written with the configuration of each run, their folder, and whether
            it is that of a sweep.
        complete: adds to the composed values what neither the YAML nor the command line says.
        adopt: replaces composed values by those of a file that they name, given the keys of the command line.
        fixes_run_dir: the command writes a run folder, whose name is chosen here, once.
        status_of: the exit status of a run that took place elsewhere, by its folder; None where none can.
        devices: key of the number of processes that do the work on this machine; None for one alone.
        check_shares: called with the configuration of each run and the number of its processes, where there
            are several.
        saved: what to tell about the work so far where one of several processes was killed.
    """

    name: str
    config_type: type[Config]
    task: Callable[[Config, Invocation], int]
    check: Callable[[Sequence[Config], Path, bool], None] | None = None
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    adopt: Callable[[dict[str, Any], Set[str]], dict[str, Any]] | None = None
    fixes_run_dir: bool = False
    devices: str | None = None
    check_shares: Callable[[Config, int], None] | None = None
    saved: str = ""
    status_of: Callable[[Path], int] | None = None


# OpenMP reads these when torch is imported. By default threads that wait spin for milliseconds, and a step
# takes several times as long where other threads or processes share the cores. Where they sleep at once, that
# of small products does. So they spin for some ten microseconds.
WAITING_VARIABLES = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
SHORT_WAITING = {"GOMP_SPINCOUNT": "1000"}


def wait_shortly() -> None:
    """Let torch's threads wait as those of the commands do, unless the environment says how."""
    if not WAITING_VARIABLES & os.environ.keys():
        os.environ.update(SHORT_WAITING)


def main(command: Command[Any], script: Path, conf: Path, arguments: Sequence[str] | None = None) -> int:
    """Compose, check and run ``command``.

    Args:
        command: what to run.
        script: the file that the user started, named in messages.
        conf: folder of the YAML files.
        arguments: words after the script's name; None takes the process's.

    Returns:
        The exit status: the task's, 2 for a user's mistake, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    started = f"{starter()} {shlex.quote(str(_shortest(script.resolve())))}"
    wait_shortly()
    for name in HUB_CLIENTS:
        logging.getLogger(name).setLevel(logging.WARNING)

    def run() -> int:
        try:
            return _run(command, started, script, conf, words)
        except UserError as error:
            # All processes of a machine find the same mistake, and one tells of it.
            if not own_place().speaks and not isinstance(error, SystemRefusedError):
                return USAGE_ERROR
            if not isinstance(error, ConfigError) or error.correction is None:
                raise
            better = shlex.join(corrected(words, error.key, error.correction))
            raise UserError(f"{error}\n   try: {started} {better}") from None

    return exit_status(run)


def _run(command: Command[Any], started: str, script: Path, conf: Path, words: list[str]) -> int:
    from hydra._internal.utils import get_args_parser

    known, unknown_options = get_args_parser().parse_known_intermixed_args(words)
    refused = [f"--{name.replace('_', '-')}" for name in REFUSED_OPTIONS if getattr(known, name, None)]
    if unknown_options or refused:
        raise ConfigError(f"{(unknown_options or refused)[0]}: no such option; {started} --help lists them")
    if known.help and (own_help := _own_help(conf / f"{command.name}.yaml")) is not None:
        print(own_help)
        return 0
    if known.multirun and not command.fixes_run_dir:
        raise ConfigError(f"{started} makes no sweeps: leave -m away, and call it once for each")
    for word in known.overrides:
        if word.startswith("~"):
            key = key_of(word)
            raise ConfigError(f"{word}: a setting can be changed, not removed; give {key}=VALUE", key=key)
    settings = settings_of(command.config_type)
    sparse = command.complete is not None
    overrides = [
        override
        for word in known.overrides
        for override in (
            *made_room(word, settings),
            for_hydra(word, settings, sweep=known.multirun, sparse=sparse),
        )
    ]
    given = {key_of(word): word.partition("=")[2] for word in overrides}
    if command.fixes_run_dir and given.get("data.path", "null") != "null" and "data" not in given:
        overrides.insert(0, "data=text")
    name = None
    if command.fixes_run_dir and given.get("run_dir", "null") == "null":
        # One process chooses the name: Hydra's own clock would differ between the processes of one run.
        name = free_name(Path("runs", time.strftime("%Y-%m-%d_%H-%M-%S")))
        overrides = [*(word for word in overrides if key_of(word) != "run_dir"), f"run_dir={name}"]
    options = [word for word in words if word not in known.overrides]
    shows_only = known.help or known.hydra_help or known.cfg or known.info or known.shell_completion
    runs, folder = None, Path()
    configs: list[Any] = []
    if not shows_only:
        configs, folder = _check(command, conf, overrides, sweep=known.multirun)
        if command.check is not None:
            command.check(configs, folder, known.multirun)
        place = own_place()
        count = 1 if command.devices is None else max(map(attrgetter(command.devices), configs))
        launcher = given.get(LAUNCHER, "basic")
        if launcher != "basic" and not known.multirun:
            raise ConfigError(
                f"{LAUNCHER}={launcher}: it starts the runs of a sweep, and this command is none; add -m, "
                "also for one run",
                key=LAUNCHER,
            )
        if known.multirun and launcher.endswith("slurm") and shutil.which("srun") is None:
            raise ConfigError(
                f"{LAUNCHER}={launcher}: this machine has no srun, with which jobs reach SLURM",
                key=LAUNCHER,
                correction=f"{LAUNCHER}=jobs_local",
            )
        if place.size > 1 and known.multirun and launcher != "basic":
            raise ConfigError(
                f"{LAUNCHER}={launcher}: each of the {place.size} processes of this command would start all "
                "jobs; start it once, without torchrun or srun",
                key=LAUNCHER,
                correction=f"{LAUNCHER}=basic",
            )
        in_jobs = known.multirun and launcher != "basic"
        if in_jobs and count == 1 and launcher.startswith("submitit_") and GPUS_OF_JOBS not in given:
            # Left to itself submitit hides all GPUs from a job of this machine.
            overrides = [f"{GPUS_OF_JOBS}=1", *overrides]
        if in_jobs and count > 1:
            overrides = [*_processes_of_jobs(command, configs, count, given), *overrides]
            if not launcher.endswith("slurm"):
                os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_each(count)))
        if count > 1 and place.size > 1 and count != place.local_size:
            raise _wrong_count(
                command,
                f"{count}: the launcher started {place.local_size} processes on this machine; leave it at 1 "
                "there",
            )
        most = max(MOST_PROCESSES, os.cpu_count() or 1)
        if count > most and place.size == 1:
            raise _wrong_count(
                command,
                f"{count}: at most {most} processes are started on a machine of {os.cpu_count()} cores",
                allowed=most,
            )
        processes = max(count, place.size)
        # How many machines a job has is for SLURM to say.
        if (
            command.check_shares is not None
            and processes > 1
            and not (in_jobs and launcher.endswith("slurm"))
        ):
            for config in configs:
                command.check_shares(config, processes)
        if count > 1 and place.size == 1 and not in_jobs:
            return launch(count, [sys.executable, str(script), *words], command.saved)
        if command.fixes_run_dir:
            if place.rank == 0:
                runs = _in_new_folder(name) if folder == name else UnbegunRuns(folder, SWEEP_RECORD)
                agreed = _agreed(runs.folder)
                if folder == name:
                    overrides[-1] = f"run_dir={agreed}"
                overrides += _keep_old_state(folder, sweep=known.multirun)
            else:
                # Also where the name is given: Hydra would make a folder that the leader has removed.
                agreed = _agreed(folder)
                if folder == name:
                    overrides[-1] = f"run_dir={agreed}"
                # The leader alone writes Hydra's record.
                overrides.append("hydra.output_subdir=null")
    return _hand_to_hydra(
        command,
        conf,
        options,
        overrides,
        runs,
        folder,
        command_line=f"{started} {shlex.join(words)}".strip(),
        jobs=len(configs) if known.multirun else 0,
    )


def _own_help(path: Path) -> str | None:
    """What a command's YAML says of its settings; None where it composes groups, which Hydra's help lists."""
    about, _, rest = path.read_text(encoding="utf-8").partition("defaults:\n")
    defaults, _, rest = rest.partition("\n\n")
    if not all(line.strip().startswith(("- _self_", "- override")) for line in defaults.splitlines()):
        return None
    settings, _, _ = rest.partition("\nhydra:")
    return f"{about.removeprefix('# ')}\n{settings.strip()}"


def _wrong_count(command: Command[Any], complaint: str, allowed: int = 1) -> ConfigError:
    key = command.devices
    assert key is not None
    return ConfigError(f"{key}={complaint}", key=key, correction=f"{key}={allowed}")


def _processes_of_jobs(
    command: Command[Any], configs: Sequence[Any], count: int, given: Mapping[str, str]
) -> list[str]:
    """What tells the launcher of jobs to start so many processes in each, with a GPU for each of them."""
    assert command.devices is not None
    if any(attrgetter(command.devices)(config) != count for config in configs):
        raise _wrong_count(command, f"{count}: in another run of the sweep it differs; all jobs are alike")
    if given.get(TASKS_OF_JOBS, str(count)) != str(count):
        raise ConfigError(
            f"{TASKS_OF_JOBS}={given[TASKS_OF_JOBS]}: {command.devices}={count} says how many processes a "
            "job has",
            key=TASKS_OF_JOBS,
            correction=f"{TASKS_OF_JOBS}={count}",
        )
    return [f"{name}={count}" for name in (TASKS_OF_JOBS, GPUS_OF_JOBS) if name not in given]


def _agreed(folder: Path) -> Path:
    """The leader's name of the run's folder, on each process of the command."""
    if own_place().size == 1:
        return folder
    from windowlm.parallel.processes import LostProcessError, Processes, leave_after_loss

    try:
        return Processes.join().share(folder)
    except LostProcessError:
        leave_after_loss("nothing was trained yet")


def _in_new_folder(path: Path) -> UnbegunRuns:
    try:
        return UnbegunRuns.in_new_folder(path, SWEEP_RECORD)
    except OSError as error:
        raise _not_writable(path, error) from None


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run_dir={folder}: cannot be written: {error.strerror or error}; give a folder that can",
        key="run_dir",
    )


def _keep_old_state(folder: Path, *, sweep: bool) -> list[str]:
    """Overrides that make Hydra write its record beside earlier ones instead of over them."""
    taken = {path.name for path in folder.glob(f"{'*/' if sweep else ''}{STATE_FOLDER}*")}
    name, number = STATE_FOLDER, 1
    while name in taken:
        number += 1
        name = f"{STATE_FOLDER}-{number}"
    return [] if number == 1 else [f"hydra.output_subdir={name}"]


def _check(command: Command[Any], conf: Path, overrides: list[str], *, sweep: bool) -> tuple[list[Any], Path]:
    """The checked configuration of every run that the command line asks for, and the folder of all."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    configs, folders = [], []
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        try:
            refuse_words_for_hydra(overrides)
            for words in _expand(command, overrides) if sweep else [overrides]:
                try:
                    refuse_settings_of_no_group(words, settings_of(command.config_type))
                    composed = compose(command.name, words, return_hydra_config=True)
                    hydra = OmegaConf.to_container(composed.hydra, resolve=False)
                    refuse_changes_of_hydra(cast(dict[str, Any], hydra))
                    configs.append(check_config(command.config_type, _plain(command, composed, words)))
                except ConfigError as error:
                    raise _keep_sweep(error, overrides, words) if sweep else error from None
                folders.append(Path(composed.hydra.sweep.dir if sweep else composed.hydra.run.dir))
        except ConfigError:
            raise
        except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
            raise _explain(error, command, conf, overrides) from None
        finally:
            GlobalHydra.instance().clear()
    if not folders:
        empty = next((word for word in overrides if "range(" in word or word.endswith("=")), "-m")
        raise ConfigError(f"{empty}: the sweep has no run; give each setting a value at least")
    if len(set(folders)) > 1:
        raise ConfigError(
            f"run_dir: under -m it is the one folder of all runs, not {', '.join(map(str, folders))}",
            key="run_dir",
            correction="run_dir=null",
        )
    return configs, folders[0]


def _plain(command: Command[Any], composed: Any, words: Iterable[str]) -> dict[str, Any]:
    """The settings of a configuration composed with these overrides, without Hydra's own."""
    from omegaconf import OmegaConf

    own = OmegaConf.masked_copy(composed, [name for name in composed if name != "hydra"])
    if missing := sorted(OmegaConf.missing_keys(own)):
        raise ConfigError(f"{missing[0]}: must be given: {missing[0]}=VALUE", key=missing[0])
    container = OmegaConf.to_container(own, resolve=True)
    assert isinstance(container, dict)
    values = {str(key): container[key] for key in container}
    if command.complete is not None:
        values = command.complete(values)
    return values if command.adopt is None else command.adopt(values, set(map(key_of, words)))


def _expand(command: Command[Any], overrides: list[str]) -> Iterator[list[str]]:
    """The override lists of a sweep, in the order of Hydra's sweeper, which numbers the runs: what the
    configuration sweeps over comes first, in its own order also where the command line gives other values.
    """
    from hydra import compose
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    parsed = parser.parse_overrides(overrides)
    fixed = [entry.input_line or "" for entry in parsed if not entry.is_sweep_override()]
    params = compose(command.name, fixed, return_hydra_config=True).hydra.sweeper.get("params") or {}
    written = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
    choices: dict[str, list[str]] = {}
    for entry in (*written, *parsed):
        key = entry.get_key_element()
        choices[key] = (
            [f"{key}={value}" for value in entry.sweep_string_iterator()]
            if entry.is_sweep_override()
            else [entry.input_line or ""]
        )
    for combination in product(*choices.values()):
        yield list(combination)


def _keep_sweep(error: ConfigError, overrides: list[str], words: list[str]) -> ConfigError:
    """The error of one run of a sweep, whose correction changes the wrong one of the values swept over."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if error.correction is None:
        return error
    wrong = {word.partition("=")[2] for word in words if key_of(word) == error.key}
    for override in overrides:
        if key_of(override) == error.key == key_of(error.correction):
            parsed = OverridesParser.create().parse_override(override)
            if parsed.is_sweep_override():
                good = error.correction.partition("=")[2]
                values = [good if value in wrong else value for value in parsed.sweep_string_iterator()]
                error.correction = f"{error.key}={','.join(dict.fromkeys(values))}"
    return error


def _explain(error: Exception, command: Command[Any], conf: Path, overrides: list[str]) -> ConfigError:
    """Hydra's complaint as an error that names the key and the nearest right one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    settings = settings_of(command.config_type)
    groups = {folder.name: folder for folder in conf.iterdir() if folder.is_dir()}
    defaults = OmegaConf.load(conf / f"{command.name}.yaml").defaults
    chosen = {str(name) for entry in defaults if OmegaConf.is_dict(entry) for name in entry}
    lines = str(error.__cause__ or error).strip().splitlines()
    reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    given = {}
    for word in overrides:
        key, separator, value = word.partition("=")
        given[key_of(word)] = value
        if not separator or not key_of(word):
            return ConfigError(f"{word!r}: a setting is given as key=value", key=key)
        try:
            parsed = OverridesParser.create().parse_override(word)
            key = parsed.key_or_group
        except HydraException:
            is_text = key_of(word) in settings and settings[key_of(word)].is_text
            advice = (
                "a text with commas or quotes stands in quotes" if is_text else "a bracket or quote is open"
            )
            return ConfigError(
                f"{word}: cannot be read; {advice}",
                key=key,
                correction=f"{key}='{value}'" if is_text and "'" not in value else None,
            )
        if key in groups and key not in chosen:
            inside = ", ".join(name for name in settings if name.startswith(f"{key}."))
            return ConfigError(
                f"{word}: this command has no {key} to choose" + (f", but {inside}" if inside else ""),
                key=key,
            )
        if key in groups:
            options = sorted(option.stem for option in groups[key].glob("*.yaml"))
            if (wrong := _wrong_option(key, value, options)) is not None:
                return wrong
        elif key == LAUNCHER and f"Could not find '{key}/{value}'" in reason:
            presets = sorted(option.stem for option in (conf / key).glob("*.yaml"))
            if (wrong := _wrong_option(key, value, ["basic", *presets])) is not None:
                return wrong
        elif key not in settings and not key.startswith(("hydra.", "hydra/")):
            return unknown_key_error(key, value, settings)
        if parsed.is_sweep_override() and "Ambiguous" in reason:
            return ConfigError(f"{word}: several values make a sweep, which starts with -m", key=key)
    if (mistake := _list_for_group(error, given, settings)) is not None:
        return mistake
    if type(error) is TypeError:
        raise error
    key = str(getattr(error, "full_key", None) or "")
    if (refused := NOT_OVERRIDDEN.search(str(error))) is not None:
        key = refused[1]
    if key in given:
        return ConfigError(f"{key}={given[key]}: {reason}", key=key)
    return ConfigError(f"{key}: {reason}" if key else reason)


def _list_for_group(
    error: Exception, given: Mapping[str, str], settings: Mapping[str, Setting]
) -> ConfigError | None:
    """The error where a list in one place meets a group, or a setting of the group, in another."""
    inside = [key for key in given if key in settings and settings[key].under_nullable]
    if inside and type(error) in (TypeError, ValueError):
        return ConfigError(
            f"{inside[0]}={given[inside[0]]}: there is a list above it, which has no such setting; give the "
            "whole list",
            key=inside[0],
        )
    if (merged := MERGED_WITH_LIST.search(f"{error}\n{error.__cause__}")) is not None:
        place = merged[2] or merged[1]
        return ConfigError(
            f"{place}: a list and a group of settings cannot be merged; give the whole list on the command "
            "line, in an option of conf/model, or in an experiment with defaults: [/rotary_as_list, _self_]",
            key=place,
        )
    return None


def _wrong_option(group: str, value: str, options: list[str]) -> ConfigError | None:
    """The error for a group's option, or one of those of a sweep, that does not exist."""
    chosen = [choice.strip() for choice in value.split(",")]
    wrong = [choice for choice in chosen if choice not in options]
    if not wrong:
        return None
    if "null" in wrong:
        return ConfigError(
            f"{group}=null: allowed is {', '.join(options)}; leave {group} away for the default", key=group
        )
    nearest = {name: difflib.get_close_matches(name, options, n=1, cutoff=0.5) for name in wrong}
    better = [nearest[choice][0] if nearest.get(choice) else choice for choice in chosen]
    return ConfigError(
        f"{group}={wrong[0]}: allowed is {', '.join(options)}",
        key=group,
        correction=f"{group}={','.join(dict.fromkeys(better))}" if all(nearest.values()) else None,
    )


def _lost_a_job(error: RuntimeError) -> bool:
    """Whether a job of submitit, which was imported if there is one, left no result."""
    submitit = sys.modules.get("submitit.core.utils")
    return submitit is not None and isinstance(error, submitit.UncompletedJobError)


def _lost_jobs(folder: Path, jobs: int, status_of: Callable[[Path], int], error: RuntimeError) -> UserError:
    """Of a sweep whose launcher gives up at the first job that is lost, and lets the others be."""
    finished = [number for number in range(jobs) if status_of(folder / str(number)) == 0]
    others = [str(number) for number in range(jobs) if number not in finished]
    last_line = (
        str(error).strip().rpartition("\n")[2].removeprefix("error: ").removesuffix("; this command ends")
    )
    return UserError(
        f"run_dir={shlex.quote(str(folder))}: a job of the sweep left no result ({last_line}); of its runs "
        f"{', '.join(others)} had not finished by then, and those whose jobs were not lost go on; their logs "
        "are in .submitit there. Once what ended it is mended, resume=auto goes on with what is left"
    )


def _ended(folder: Path, statuses: list[int]) -> str:
    """How the jobs of a sweep ended, none of which has this screen."""
    failed = [f"{number} (status {status})" for number, status in enumerate(statuses) if status]
    said = f"not finished: {', '.join(failed)}" if failed else f"all {len(statuses)} runs have finished"
    return f"run_dir={shlex.quote(str(folder))}: {said}; logs are in .submitit there"


def _shortest(path: Path) -> Path:
    """Relative to the working folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _hand_to_hydra(
    command: Command[Any],
    conf: Path,
    options: list[str],
    overrides: list[str],
    runs: UnbegunRuns | None,
    folder: Path,
    command_line: str,
    jobs: int,
) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    statuses: list[int] = []
    mistakes: list[UserError | BrokenPipeError] = []
    started = False

    def task(composed: DictConfig) -> None:
        runtime = HydraConfig.get()
        values = _plain(command, composed, runtime.overrides.task)
        if command.fixes_run_dir:
            values["run_dir"] = runtime.runtime.output_dir
        invocation = Invocation(
            output_dir=_shortest(Path(runtime.runtime.output_dir)),
            sweep_dir=Path(runtime.sweep.dir).resolve() if runtime.mode == RunMode.MULTIRUN else None,
            command=command_line,
        )
        nonlocal started
        started = True
        # The processes of a job have all that its leader has.
        watched = runs if own_place().rank == 0 else None
        own = nullcontext() if watched is None else watched.run(invocation.output_dir, runtime.output_subdir)
        try:
            with own, limits_as_mistakes():
                statuses.append(command.task(check_config(command.config_type, values), invocation))
        except BrokenPipeError as error:
            mistakes.append(error)  # Hydra would print words of its own
        except UserError as error:
            if invocation.sweep_dir is None:
                mistakes.append(error)
            else:
                # The other runs of the sweep go on.
                print(f"error: {shlex.quote(str(invocation.output_dir))}: {error}", file=sys.stderr)
                statuses.append(USAGE_ERROR)

    # Hydra would print tracebacks of its own and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    saved, sys.argv = sys.argv, [command.name, f"hydra.job.name={command.name}", *overrides, *options]
    try:
        with runs.all(f"{STATE_FOLDER}*") if runs is not None else nullcontext():
            hydra.main(config_path=str(conf.resolve()), config_name=command.name, version_base="1.3")(task)()
            if jobs and not started and runs is not None and command.status_of is not None:
                # A launcher ran them in processes of their own.
                runs.have_begun()
                statuses += [command.status_of(runs.folder / str(number)) for number in range(jobs)]
                print(_ended(runs.folder, statuses))
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, command, conf, overrides) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        if started or not command.fixes_run_dir:
            raise
        raise _not_writable(folder if runs is None else runs.folder, error) from None
    except RuntimeError as error:
        if runs is None or command.status_of is None or not _lost_a_job(error):
            raise
        runs.have_begun()
        raise _lost_jobs(runs.folder, jobs, command.status_of, error) from None
    finally:
        sys.argv = saved
    if mistakes:
        raise mistakes[0]
    return max(statuses, default=0)
