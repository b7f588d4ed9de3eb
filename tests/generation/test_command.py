"""The command ``python scripts/generate.py``."""

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.generation.test_generate import PROMPTS, bundle_of
from tests.interchange.models import random_decoder, save_run
from windowlm import generate, load
from windowlm.command_line import Command, main
from windowlm.config import GenerateConfig

SCRIPT = PROJECT / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a run, [1]=x")
    bundle_of(folder / "model")
    return folder


def composed(*words: str) -> GenerateConfig:
    configs: list[GenerateConfig] = []
    command = Command(
        name="generate",
        config_type=GenerateConfig,
        task=lambda config, _: configs.append(config) or 0,  # type: ignore[func-returns-value]
    )
    assert main(command, SCRIPT, PROJECT / "conf", list(words)) == 0
    return configs[0]


@pytest.mark.parametrize(
    "prompt",
    [
        "Once upon a time, there was",
        "def window(x=[1, 2], y={'a': \"b\"}):\n    return x\n",
        "'quoted'",
        '"quoted"',
        "it's",
        "a=b=c",
        "~",
        "~/x",
        "null",
        "3",
        "true",
        " spaces around ",
        "${HOME} $(x) \\${y} \\\\${z}",
        "ends with \\",
        "a backslash \\ and \\' quote",
        "back\\\nslash\\\n",
        "$ % # ; & | < > ( ) ! * ? ` @ ^",
        "choice(1,2)",
        "\ttab\r\nand 😀 ü\n\n",
        "a,b",
        "key: value",
        "---\n",
        "ends with a quote'",
        "\\'",
    ],
)
def test_a_prompt_is_taken_as_it_stands(prompt: str) -> None:
    assert composed("checkpoint=run", f"prompt={prompt}").prompt == prompt


def test_every_setting_of_the_yaml_is_that_of_the_dataclass() -> None:
    assert composed("checkpoint=run") == GenerateConfig(checkpoint="run")
    assert composed("checkpoint=run", "stop=['###','a b']", "top_k=5").stop == ["###", "a b"]


def generated(
    capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    data: bytes,
    *words: str,
) -> tuple[int, bytes, str]:
    """Status, standard output and standard error of the script, in this process."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    task = runpy.run_path(str(SCRIPT))["generate"]
    command = Command(name="generate", config_type=GenerateConfig, task=task)
    given = [f"checkpoint={checkpoint}", "max_new_tokens=20", *words]
    status = main(command, SCRIPT, PROJECT / "conf", given)
    output, errors = capsysbinary.readouterr()
    return status, output, errors.decode()


def test_text_goes_to_standard_output_and_all_else_to_standard_error(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), f"checkpoint={checkpoint}", "prompt=Größe, [1]=", "max_new_tokens=40"],
        capture_output=True,
        cwd=checkpoint,
        # A terminal that cannot show the text.
        env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    errors = done.stderr.decode()
    assert done.returncode == 0, errors
    assert done.stdout == generate(load(checkpoint), "Größe, [1]=", max_new_tokens=40).text.encode()
    assert "tokens/s after 13 prompt tokens in" in errors
    assert "bits per byte of what was produced" in errors
    assert sorted(path.name for path in checkpoint.iterdir()) == ["model"]


def test_prompts_come_from_a_file_and_from_standard_input(
    capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "a prompt, [1].txt").write_text("Größe\n", encoding="utf-8")
    expected = generate(load(checkpoint), "Größe\n", max_new_tokens=20).text.encode()
    for data, words in (
        ("Größe\n".encode(), ()),
        ("Größe\n".encode(), ("prompt_file=-",)),
        (b"", (f"prompt_file={tmp_path / 'a prompt, [1].txt'}",)),
    ):
        status, output, errors = generated(capsysbinary, monkeypatch, checkpoint, data, *words)
        assert (status, output) == (0, expected), errors


def test_many_prompts_are_answered_line_by_line(
    capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    lines = [json.dumps({"number": number, "prompt": prompt}) for number, prompt in enumerate(PROMPTS)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    answers = []
    for size in (1, 2, 16):
        words = (f"prompts_file={path}", f"batch_size={size}", "seed=3")
        status, output, errors = generated(capsysbinary, monkeypatch, checkpoint, b"", *words)
        assert status == 0, errors
        answers.append([json.loads(line) for line in output.decode().splitlines()])
        assert "5 prompts; " in errors
    for answer in answers:
        assert [line["number"] for line in answer] == [0, 1, 2, 3, 4]
        assert [line["text"] for line in answer] == [line["text"] for line in answers[0]]
    first = answers[0][0]
    assert first["text"] == generate(load(checkpoint), PROMPTS[0], seed=3, max_new_tokens=20).text
    assert set(first) == {
        "number",
        "prompt",
        "text",
        "tokens",
        "prompt_tokens",
        "ended_by",
        "bits_per_byte",
    }


@pytest.mark.parametrize(
    ("words", "data", "message"),
    [
        ((), b"", "prompt: standard input holds no text"),
        (("prompt=",), b"", "prompt=: it is empty"),
        (("prompt=a", "temperature=-1"), b"", "temperature=-1.0: must be 0, which is greedy, or finite and"),
        (("prompt=a", "temperature=1e-310"), b"", "finite and at least 1e-06"),
        (("prompts_file=-",), b'{"prompt": "a", "b": "\\ud800"}', "line 1: it holds half a character"),
        (
            ("prompts_file=-",),
            b'{"prompt": "a", "b": [1e999]}',
            "line 1: it holds a number beyond those of JSON",
        ),
        (("prompt=a", 'stop=["b",""]'), b"", "stop=[b]"),
        (("prompt=a", "temprature=1"), b"", "nearest: temperature"),
        (("prompt=a", "stop=x"), b"", "stop=[x]"),
        (("prompt=a", "prompt_file=b"), b"", "prompt_file=b: prompt is given too"),
        (("prompt_file=missing.txt",), b"", "prompt_file=missing.txt: cannot be read: No such file"),
        (("prompt_file=-",), b"\xff\xfe", "no UTF-8 text: byte 0 is 0xff"),
        (("prompts_file=-",), b"", "prompts_file: standard input holds no prompts"),
        (("prompts_file=-",), b'{"prompt": "a"}\n{"prompt": ', "standard input, line 2: not JSON"),
        (("prompts_file=-",), b'{"text": "a"}', "line 1: an object with a text that is not empty"),
        (("prompts_file=-",), b'{"prompt": "a", "text": "b"}', "the result has a key text too"),
        (("prompts_file=-",), b'{"prompt": "a", "top_k": 3}', "line 1: top_k is a setting of all prompts"),
        (("prompts_file=-",), b'{"prompt": "a", "prompt": "b"}', "the key prompt stands in an object twice"),
        (("prompt=a", "batch_size=4"), b"", "batch_size=4: it is for the prompts of a prompts_file"),
        (("prompt=a", "device=cuda"), b"", "device=cuda: there is no such device here"),
    ],
)
def test_mistakes_end_with_status_2_and_no_text(
    capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    words: tuple[str, ...],
    data: bytes,
    message: str,
) -> None:
    status, output, errors = generated(capsysbinary, monkeypatch, checkpoint, data, *words)
    assert (status, output) == (2, b"")
    assert message in errors


def test_what_is_advised_serves_the_prompt_of_most_tokens(
    capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_run(tmp_path, random_decoder(window=None))
    # As bytes are the tokens, the shorter text has more of them.
    data = b"\n".join(json.dumps({"prompt": text}).encode() for text in ("a" * 30, "ä" * 25))
    status, _, errors = generated(
        capsysbinary, monkeypatch, tmp_path, data, "prompts_file=-", "max_new_tokens=40"
    )
    assert status == 2
    assert "line 2: max_new_tokens=40: the prompt has 50 tokens" in errors
    assert "try max_new_tokens=14" in errors


def test_a_missing_checkpoint_is_named(
    capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, output, errors = generated(capsysbinary, monkeypatch, tmp_path / "none", b"", "prompt=a")
    assert (status, output) == (2, b"")
    assert "there is no such folder" in errors
