"""scripts/export.py as a user calls it."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import run_script, start_script
from tests.interchange.models import random_decoder, save_run
from windowlm.bundle import load
from windowlm.export_run import ROW_FIELDS

transformers = pytest.importorskip("transformers")


@torch.no_grad()
def test_a_finished_run_opens_in_transformers(finished_run: tuple[Path, str], workplace: Path) -> None:
    run, _ = finished_run
    out = workplace / "exported [1], x=y"
    done = start_script(
        "scripts/export.py", f"checkpoint={run}", "to=transformers", f"out={out}", cwd=workplace
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Qwen3ForCausalLM in ")
    bundle = load(run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens_BT = torch.randint(255, (1, 64))
    torch.testing.assert_close(theirs(tokens_BT).logits, bundle.model(tokens_BT), atol=1e-4, rtol=0)
    card = (out / "README.md").read_text()
    assert "| tokens trained | 1,536 |" in card
    assert "## Loss by context length" in card
    assert f"| training data | {Path(bundle.config['data']['path']).name} |" in card
    assert str(workplace) not in card
    names = dict.fromkeys(("AutoModelForCausalLM", "AutoTokenizer"), out.name)
    assert all(f"{kind}.from_pretrained({name!r})" in card for kind, name in names.items())
    assert (out / "length.png").read_bytes() == (run / "evaluation" / "length.png").read_bytes()
    outside = run_script("scripts/export.py", f"checkpoint={out}", "out=again", cwd=workplace)
    assert outside.returncode == 0, outside.stderr
    assert "no run of windowlm, so that the card tells nothing of its training" in outside.stderr
    assert "tokens trained" not in (workplace / "again" / "README.md").read_text()
    again = run_script("scripts/export.py", f"checkpoint={run}", f"out={out}", cwd=workplace)
    assert again.returncode == 2
    assert "it exists" in again.stderr


def test_a_mistake_ends_with_one_message_and_no_folder(tmp_path: Path) -> None:
    save_run(tmp_path / "run", random_decoder(output_gate=True))
    save_run(tmp_path / "other", random_decoder())
    save_run(tmp_path / "plain", random_decoder())
    config = tmp_path / "other" / "model" / "config.json"
    config.write_text(
        config.read_text().replace('"tokenizer_identity": "bytes"', '"tokenizer_identity": "x"')
    )
    for name, damage in (("rowless", {"rows": [{"context_length": 8}]}), ("words", {"perplexity": "x"})):
        save_run(tmp_path / name, random_decoder())
        row = dict.fromkeys(ROW_FIELDS, 1) | damage
        result = {"documents": [], "split": "test", "precision": "32-true", "rows": [row], **damage}
        (tmp_path / name / "evaluation").mkdir()
        (tmp_path / name / "evaluation" / "length.json").write_text(json.dumps(result))
    before = sorted(tmp_path.rglob("*"))
    for words, said in (
        (("checkpoint=run", "out=out"), "error: model.output_gate=true"),
        (("checkpoint=other", "out=out"), "is not that of its training"),
        (("checkpoint=nowhere", "out=out"), "there is no such folder"),
        (("checkpoint=run", "out=run"), "it exists"),
        (("checkpoint=rowless", "out=out"), "not the result of an evaluation"),
        (("checkpoint=words", "out=out"), "not the result of an evaluation"),
        (("checkpoint=plain", f"out=new/folders/{'x' * 300}"), "cannot be written"),
        (("checkpoint=run", "out=run/model/config.json/x"), "cannot be written"),
        (("checkpoint=run", "out=out", "to=onnx"), "to=onnx: allowed is transformers"),
        (("checkpoint=run",), "out: must be given"),
    ):
        done = run_script("scripts/export.py", *words, cwd=tmp_path)
        assert done.returncode == 2, words
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
