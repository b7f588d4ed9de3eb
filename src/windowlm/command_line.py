"""From a command line to a checked configuration; the only file that knows Hydra.

A command is composed and checked before Hydra writes anything, and every mistake of the user, Hydra's own
complaints included, ends with one message and exit status 2.
"""

import difflib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Generic

from windowlm.config import Config, ConfigError, check_config, known_keys, unknown_key_error
from windowlm.errors import UserError

USAGE_ERROR = 2
# Their values are texts that may hold any character; Hydra's grammar would read commas and brackets in them.
TEXT_KEYS = ("run_dir", "resume", "checkpoint", "output_dir", "data.path", "data.exclude", "tokenizer.path")
STATE_FOLDER = ".hydra"


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """How a run was started.

    Attributes:
        output_dir: folder of this run.
        sweep_dir: folder of the sweep that it belongs to, None for a single run.
        overrides: the run's own overrides.
        command: the command line, as a shell would take it.
    """

    output_dir: Path
    sweep_dir: Path | None
    overrides: tuple[str, ...]
    command: str


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Config]):
    """One command of the project.

    Args:
        name: name of its YAML in ``conf`` and of the command in messages.
        config_type: dataclass that the composed YAML must fit.
        task: called with the checked configuration; returns the exit status.
        check: called with the configuration and its folder before anything is written, and whether the folder
            is that of a sweep.
        fixes_run_dir: the command writes a run folder, whose name is chosen here, once.
    """

    name: str
    config_type: type[Config]
    task: Callable[[Config, Invocation], int]
    check: Callable[[Config, Path, bool], None] | None = None
    fixes_run_dir: bool = False


def main(command: Command[Any], script: Path, conf: Path, arguments: Sequence[str] | None = None) -> int:
    """Compose, check and run ``command``.

    Args:
        command: what to run.
        script: the file that the user started, named in messages.
        conf: folder of the YAML files.
        arguments: words after the script's name; None takes the process's.

    Returns:
        The exit status: the task's, or 2 for a user's mistake.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that spin while they wait make a step many times slower where other processes share the cores.
    # OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _run(command, script, conf, words)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.correction is not None:
            corrected = _correct(words, error.key, error.correction)
            print(f"   try: python {script.name} {shlex.join(corrected)}", file=sys.stderr)
        return USAGE_ERROR
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR


def _run(command: Command[Any], script: Path, conf: Path, words: list[str]) -> int:
    from hydra._internal.utils import get_args_parser

    known, unknown_options = get_args_parser().parse_known_intermixed_args(words)
    if unknown_options:
        raise ConfigError(f"{unknown_options[0]}: no such option; python {script.name} --help lists them")
    overrides = [_quote(word, sweep=known.multirun) for word in known.overrides]
    given = {word.partition("=")[0].lstrip("+~") for word in overrides}
    if "data.path" in given and "data" not in given and command.fixes_run_dir:
        overrides.insert(0, "data=text")
    options = [word for word in words if word not in known.overrides]
    shows_only = known.help or known.hydra_help or known.cfg or known.info or known.shell_completion
    if command.fixes_run_dir and "run_dir" not in given:
        # One process chooses the name: Hydra's own clock would differ between the processes of one run.
        overrides.append(f"run_dir=runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    if not shows_only:
        configs = _check(command, conf, overrides, sweep=known.multirun)
        if command.fixes_run_dir:
            folder = Path(_sweep_dir(overrides) or configs[0].run_dir)
            if command.check is not None:
                command.check(configs[0], folder, known.multirun)
            overrides += _keep_old_state(folder / "0" if known.multirun else folder)
    return _hand_to_hydra(command, script, conf, options, overrides, shlex.join(words))


def _sweep_dir(overrides: list[str]) -> str | None:
    """The value of ``hydra.sweep.dir`` where it is given."""
    given = [word.partition("=")[2].strip("'") for word in overrides if word.startswith("hydra.sweep.dir=")]
    return given[-1] if given else None


def _quote(word: str, *, sweep: bool) -> str:
    """``word`` with the value of a text setting quoted for Hydra's grammar."""
    key, separator, value = word.partition("=")
    if key.lstrip("+") not in TEXT_KEYS or not separator or value in ("", "null", "???"):
        return word
    if sweep and "," in value and not Path(value).exists():
        return word
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" and not Path(value).exists():
        value = value[1:-1]
    # A backslash is an escape only before a quote or at the end; elsewhere it stands for itself.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"{key}='{escaped}'"


def _keep_old_state(run_dir: Path) -> list[str]:
    """Overrides that make Hydra write its record beside an earlier one in ``run_dir`` instead of over it."""
    folder, number = run_dir / STATE_FOLDER, 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{STATE_FOLDER}-{number}")
    return [] if number == 1 else [f"hydra.output_subdir={folder.name}"]


def _check(command: Command[Any], conf: Path, overrides: list[str], *, sweep: bool) -> list[Any]:
    """The checked configuration of every run that the command line asks for."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    checked = []
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        try:
            for words in _expand(command, overrides) if sweep else [overrides]:
                composed = compose(command.name, words)
                plain = OmegaConf.to_container(composed, resolve=True)
                assert isinstance(plain, dict)
                checked.append(check_config(command.config_type, {str(key): plain[key] for key in plain}))
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(error, command, conf, overrides) from None
        finally:
            GlobalHydra.instance().clear()
    return checked


def _expand(command: Command[Any], overrides: list[str]) -> Iterator[list[str]]:
    """The override lists of a sweep, those written in the configuration included."""
    from hydra import compose
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    parsed = parser.parse_overrides(overrides)
    fixed = [entry.input_line or "" for entry in parsed if not entry.is_sweep_override()]
    params = compose(command.name, fixed, return_hydra_config=True).hydra.sweeper.get("params") or {}
    given = {entry.key_or_group for entry in parsed}
    parsed += parser.parse_overrides([f"{key}={value}" for key, value in params.items() if key not in given])
    choices = [
        [f"{entry.get_key_element()}={value}" for value in entry.sweep_string_iterator()]
        if entry.is_sweep_override()
        else [entry.input_line or ""]
        for entry in parsed
    ]
    for combination in product(*choices):
        yield list(combination)


def _explain(error: Exception, command: Command[Any], conf: Path, overrides: list[str]) -> ConfigError:
    """Hydra's complaint as an error that names the key and the nearest right one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    keys = known_keys(command.config_type)
    groups = {folder.name: folder for folder in conf.iterdir() if folder.is_dir()}
    for word in overrides:
        key, separator, value = word.partition("=")
        if not separator and not word.startswith("~"):
            return ConfigError(f"{word}: a setting is given as key=value", key=key)
        try:
            key = OverridesParser.create().parse_override(word).key_or_group
        except HydraException:
            return ConfigError(
                f"{word}: cannot be read; a value with commas, brackets, quotes or spaces stands in quotes",
                key=key,
                correction=f"{key}='{value}'" if "'" not in value else None,
            )
        if key in groups:
            options = sorted(option.stem for option in groups[key].glob("*.yaml"))
            wrong = [choice for choice in value.split(",") if choice.strip() not in {*options, "null"}]
            if wrong:
                nearest = difflib.get_close_matches(wrong[0], options, n=1, cutoff=0.3)
                return ConfigError(
                    f"{key}={wrong[0]}: allowed is {', '.join(options)}",
                    key=key,
                    correction=f"{key}={nearest[0]}" if nearest else None,
                )
        elif key not in keys and key.split(".")[0] != "hydra":
            return unknown_key_error(key, value, keys)
    return ConfigError(" ".join(str(error.__cause__ or error).split()))


def _correct(words: list[str], key: str, correction: str) -> list[str]:
    """The command line with the wrong setting replaced, or the right one added."""
    new_key = correction.partition("=")[0]
    kept = [word for word in words if word.partition("=")[0].lstrip("+~") not in (key, new_key)]
    return [*kept, correction]


def _shortest(path: Path) -> Path:
    """Relative to the working folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _hand_to_hydra(
    command: Command[Any],
    script: Path,
    conf: Path,
    options: list[str],
    overrides: list[str],
    command_line: str,
) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    statuses: list[int] = []
    mistakes: list[UserError] = []

    def task(composed: DictConfig) -> None:
        runtime = HydraConfig.get()
        plain = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(plain, dict)
        values = {str(key): plain[key] for key in plain}
        if command.fixes_run_dir:
            values["run_dir"] = runtime.runtime.output_dir
        invocation = Invocation(
            output_dir=_shortest(Path(runtime.runtime.output_dir)),
            sweep_dir=Path(runtime.sweep.dir).resolve() if runtime.mode == RunMode.MULTIRUN else None,
            overrides=tuple(runtime.overrides.task),
            command=f"python {script.name} {command_line}".strip(),
        )
        try:
            statuses.append(command.task(check_config(command.config_type, values), invocation))
        except UserError as error:
            # Hydra would end the sweep here and print a heading of its own.
            mistakes.append(error)

    # Hydra would print tracebacks of its own and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    saved, sys.argv = sys.argv, [script.name, *options, f"hydra.job.name={command.name}", *overrides]
    try:
        hydra.main(config_path=str(conf.resolve()), config_name=command.name, version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, command, conf, overrides) from None
    finally:
        sys.argv = saved
    if mistakes:
        raise mistakes[0]
    return max(statuses, default=0)
