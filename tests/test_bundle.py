"""A model, its tokenizer and its settings in one folder."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from windowlm.attention.config import LinearScaling, RotaryConfig
from windowlm.bundle import load, save_bundle
from windowlm.errors import UserError
from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.model.decoder import Decoder
from windowlm.tokenization.tokenizer import BytesTokenizer

SHAPE = {
    "layers": 2,
    "dim": 16,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "feed_forward_dim": 24,
    "window": [4, None],
}


def config_of(shape):
    return {
        "model": asdict(ModelConfig(**shape)),
        "vocabulary_size": 256,
        "sequence_length": 32,
        "source_identity": "source",
        "tokenizer_identity": "bytes",
        "data": {},
        "tokenizer": {"kind": "bytes"},
        "training": {"tokens_trained": 10},
    }


def saved(folder, **changes):
    shape = SHAPE | changes
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**shape), 256).eval()
    save_bundle(folder, model.state_dict(), config_of(shape), BytesTokenizer())
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_gives_the_same_logits_to_the_bit(tmp_path, tied):
    model = saved(tmp_path / "run" / "model", tied_embeddings=tied)
    tokens_BT = torch.randint(256, (2, 12))
    for path in (tmp_path / "run", tmp_path / "run" / "model", str(tmp_path / "run")):
        bundle = load(path)
        assert torch.equal(bundle.model(tokens_BT), model(tokens_BT))
    assert not bundle.model.training
    assert bundle.config == {"format": 1, **config_of(SHAPE | {"tied_embeddings": tied})}
    assert bundle.tokenizer.decode(bundle.tokenizer.encode("Größe 😀")) == "Größe 😀"
    assert (bundle.model.head.weight is bundle.model.embedding.weight) is tied


BLOCKED = ("lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb", "datasets")
LOADING = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED}))  # an import of one raises ImportError
import torch, windowlm
bundle = windowlm.load(sys.argv[1])
tokens_T = torch.from_numpy(bundle.tokenizer.encode("wide windows").astype("int64"))
print(bundle.model(tokens_T[None]).flatten().tolist())
"""


def test_a_run_opens_without_the_packages_of_its_training(finished_run, tmp_path):
    folder, _ = finished_run
    words = [sys.executable, "-c", LOADING, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bundle = load(folder)
    tokens_T = torch.from_numpy(bundle.tokenizer.encode("wide windows").astype("int64"))
    assert json.loads(done.stdout) == bundle.model(tokens_T[None]).flatten().tolist()


def test_tied_weights_are_written_once(tmp_path):
    saved(tmp_path, tied_embeddings=True)
    assert len({"head.weight", "embedding.weight"} & load_file(tmp_path / "model.safetensors").keys()) == 1


OPTIONS = {
    "attention_sinks": 2,
    "learned_sinks": True,
    "output_gate": True,
    "logit_cap": 30.0,
    "activation": "relu_squared",
    "value_embeddings": 1,
    "final_logit_cap": 3.0,
    "short_convolution": 3,
    "embedding_residual": True,
    "zero_output_init": True,
    "ngram_embeddings": NgramEmbeddingsConfig(orders=[2, 3], buckets=50, dim=6),
    "rotary": [RotaryConfig(base=100.0, scaling=LinearScaling(kind="linear", factor=2.0)), None],
}


def test_every_option_of_the_attention_is_kept(tmp_path):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, **OPTIONS), 256).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_bundle(tmp_path, model.state_dict(), config_of(SHAPE | OPTIONS), BytesTokenizer())
    bundle = load(tmp_path)
    tokens_BT = torch.randint(256, (2, 12))
    assert bundle.model.config == model.config
    assert torch.equal(bundle.model(tokens_BT), model(tokens_BT))


def test_a_bundle_from_before_these_options_is_read_as_one_without_them(tmp_path):
    model = saved(tmp_path)
    edit_config(tmp_path, lambda config: [config["model"].pop(name) for name in [*OPTIONS][:-1]])
    bundle = load(tmp_path)
    tokens_BT = torch.randint(256, (2, 12))
    assert bundle.model.config == model.config
    assert torch.equal(bundle.model(tokens_BT), model(tokens_BT))


def test_the_receptive_field_is_that_of_the_windows(tmp_path):
    saved(tmp_path / "a", window=4)
    saved(tmp_path / "b", window=[4, None])
    assert load(tmp_path / "a").receptive_field == 1 + 2 * 3
    assert load(tmp_path / "b").receptive_field is None
    saved(tmp_path / "c", window=4, attention_sinks=2)
    assert load(tmp_path / "c").receptive_field == 1 + 2 * 3 + 2


def test_weights_of_bfloat16_are_read_as_float32(tmp_path):
    model = Decoder(ModelConfig(**SHAPE), 256).to(torch.bfloat16)
    save_bundle(tmp_path, model.state_dict(), config_of(SHAPE), BytesTokenizer())
    assert {parameter.dtype for parameter in load(tmp_path).model.parameters()} == {torch.float32}


def test_saving_again_replaces_the_files_and_leaves_nothing_else(tmp_path):
    saved(tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    model = saved(tmp_path / "model", dim=20)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load(tmp_path).model.embedding.weight, model.embedding.weight)


def test_a_kill_before_the_weights_are_written_leaves_the_old_weights(tmp_path, monkeypatch):
    model = saved(tmp_path / "model")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("windowlm.bundle.save", killed)
    later = config_of(SHAPE) | {"training": {"tokens_trained": 20}}
    with pytest.raises(KeyboardInterrupt):
        save_bundle(tmp_path / "model", model.state_dict(), later, BytesTokenizer())
    monkeypatch.undo()
    assert load(tmp_path).config == {"format": 1, **later}
    assert torch.equal(load(tmp_path).model.embedding.weight, model.embedding.weight)


def test_each_flipped_bit_of_the_weights_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    for place in (first, first + 1001, (first + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"model\.safetensors: damaged: .*; copy the file again"):
            load(tmp_path)


def test_names_that_changed_places_in_the_weights_are_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    names = b"blocks.0.", b"blocks.1.", b"blocks.x."
    whole = path.read_bytes()
    path.write_bytes(
        whole.replace(names[0], names[2]).replace(names[1], names[0]).replace(names[2], names[1])
    )
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)


def test_weights_without_a_hash_are_read(tmp_path):
    model = saved(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).model.embedding.weight, model.embedding.weight)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^checkpoint=.*nowhere: there is no such folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_description.json"])
def test_a_missing_file_is_named(tmp_path, name):
    saved(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(UserError, match=rf"{name}.* is missing"):
        load(tmp_path)


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("model"), "the key model is missing"),
        (lambda config: config.pop("vocabulary_size"), "the key vocabulary_size is missing"),
        (lambda config: config.pop("training"), "the key training is missing"),
        (lambda config: config.update(model=[1]), r"model=\[1\]: must be an object"),
        (lambda config: config.update(sequence_length="32"), "sequence_length='32': must be a whole number"),
        (lambda config: config["model"].update(dim="wide"), r"model\.dim: .*integer"),
        (lambda config: config["model"].update(wings=2), r"model\.wings: "),
        (
            lambda config: config["model"].update(window="x"),
            r"model\.window: .*valid integer; or .*valid array",
        ),
        (lambda config: config["model"].update(kv_heads=3), "kv_heads=3: must divide"),
        (lambda config: config.update(format=7), "format=7: windowlm's own has format=1"),
        (lambda config: config.update(vocabulary_size=300), "the tokenizer has 256 tokens"),
        (lambda config: config.update(tokenizer_identity="x"), "is not that of its training"),
        (
            lambda config: config["model"].update(layers=3),
            "holds the weights of 2 layers and config.json asks for 3",
        ),
        (
            lambda config: config["model"].update(layers=1, window=4),
            "holds the weights of 2 layers and config.json asks for 1",
        ),
        (
            lambda config: config["model"].update(feed_forward_dim=32),
            r"has shape \[.*\] and config\.json asks for",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_explained(tmp_path, change, message):
    saved(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).write_bytes(b"\x00 not this")
    with pytest.raises(UserError, match=name):
        load(tmp_path)


@pytest.mark.parametrize(
    "content", ["[1]", "{}", '{"kind": 3}', '{"kind": "bpe"}', '{"kind": "bpe", "end_mark": 3}', "{"]
)
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    saved(tmp_path)
    (tmp_path / "tokenizer_description.json").write_text(content)
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load(tmp_path)


def test_weights_with_a_tensor_too_few_are_refused(tmp_path):
    saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("final_norm.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"the tensor final_norm\.weight is missing"):
        load(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["final_norm.weight"][3] = float("inf")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"final_norm\.weight holds NaN or infinity"):
        load(tmp_path)


def test_the_tokenizer_counts_bytes_as_the_text_does(tmp_path):
    saved(tmp_path)
    tokenizer = load(tmp_path).tokenizer
    text = "naïve 漢字"
    assert int(np.sum(tokenizer.token_bytes_V[tokenizer.encode(text)])) == len(text.encode())
