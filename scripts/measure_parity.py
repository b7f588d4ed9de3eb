"""Measure how far our logits and those of transformers differ, of models that went out, and that came in.

python scripts/measure_parity.py --out docs/results/transformers_parity.json

Random models with a window of 64 at 512 tokens, float32: the largest difference of a logit beside the largest
logit, the same against a window of one key more (which must be seen), the distance of each side from the
model in float64, and how many of 256 greedy tokens agree.

Shapes: B batch, T tokens, V vocabulary.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark_attention import circumstances
from out_argument import out_file
from torch import nn

from windowlm import load
from windowlm.attention.config import RotaryConfig
from windowlm.errors import exit_status
from windowlm.interchange.export import export_to_transformers
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.tokenization.tokenizer import BytesTokenizer
from windowlm.tokenization.transformers_files import write_transformers_files

WINDOW, TOKENS, PROMPT, GREEDY = 64, 512, 100, 256
NOPE = [RotaryConfig(), RotaryConfig(), RotaryConfig(), None]
OUT: dict[str, dict[str, Any]] = {
    "Mistral": {"qk_norm": False},
    "Qwen3": {"window": [WINDOW, None]},
    "SmolLM3": {
        "qk_norm": False,
        "qkv_bias": True,
        "window": [WINDOW, WINDOW, WINDOW, None],
        "rotary": NOPE,
    },
}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
MIXED = ["sliding_attention", "full_attention"] * 2
IN: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {**SLIDING, "layer_types": MIXED},
    "Qwen3": {**SLIDING, "layer_types": MIXED, "head_dim": 32},
    "SmolLM3": {**SLIDING, "layer_types": MIXED},
}


@torch.no_grad()
def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=out_file, help="JSON file")
    out = parser.parse_args().out
    torch.set_float32_matmul_precision("highest")
    figures: dict[str, Any] = circumstances(torch.device("cpu"), ["torch", "transformers"])
    figures |= {"window": WINDOW, "tokens": TOKENS, "greedy_tokens": GREEDY, "out": {}, "in": {}}
    for name, settings in OUT.items():
        figures["out"][name] = _compared(*_gone_out(name, settings), implementations=["eager", "sdpa"])
    for name, settings in IN.items():
        figures["in"][name] = _compared(*_come_in(name, settings), implementations=["sdpa"])
    text = json.dumps(figures, indent=1) + "\n"
    print(text, end="")
    if out is not None:
        out.write_text(text, encoding="utf-8")
    return 0


def _drawn(model: nn.Module) -> nn.Module:
    """Weights of which each key matters, where those of a new model attend to all keys alike."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
        else:
            nn.init.normal_(weight, std=0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
    return model.eval()


def _gone_out(name: str, settings: dict[str, Any]) -> tuple[Decoder, Callable[[str], Any]]:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**{"window": WINDOW, **settings}), 256)
    _drawn(model)
    folder = Path(tempfile.mkdtemp()) / "out"
    config = export_to_transformers(model, BytesTokenizer(), folder, sequence_length=TOKENS, card="")
    assert config["architectures"] == [f"{name}ForCausalLM"]
    return model, lambda implementation: _opened(folder, implementation)


def _come_in(name: str, settings: dict[str, Any]) -> tuple[Decoder, Callable[[str], Any]]:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=None,
        eos_token_id=255,
        pad_token_id=None,
        **settings,
    )
    theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    folder = tempfile.mkdtemp()
    _drawn(theirs).save_pretrained(folder)
    write_transformers_files(BytesTokenizer(), Path(folder))
    return load(folder).model, lambda implementation: _opened(Path(folder), implementation)


def _opened(folder: Path, implementation: str) -> Any:
    found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=implementation, trust_remote_code=False
    )
    return found.eval()


def _compared(ours: Decoder, open_theirs: Callable[[str], Any], implementations: list[str]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(255, (2, TOKENS), generator=generator)
    logits_BTV = ours(tokens_BT)
    figures: dict[str, Any] = {"largest_logit": logits_BTV.abs().max().item()}
    exact_BTV = copy.deepcopy(ours).double()(tokens_BT)
    figures["ours_from_float64"] = (logits_BTV - exact_BTV).abs().max().item()
    wider = _one_key_wider(ours)
    for implementation in implementations:
        theirs = open_theirs(implementation)
        theirs_BTV = theirs(tokens_BT).logits
        figures[f"difference_{implementation}"] = (logits_BTV - theirs_BTV).abs().max().item()
        figures[f"{implementation}_from_float64"] = (theirs_BTV - exact_BTV).abs().max().item()
        if wider is not None:
            difference = (wider(tokens_BT) - theirs_BTV).abs().max().item()
            figures[f"difference_{implementation}_one_key_wider"] = difference
    prompt_BT = tokens_BT[:1, :PROMPT]
    found_BT = theirs.generate(prompt_BT, max_new_tokens=GREEDY, do_sample=False, eos_token_id=None)
    cache, chunk_BT, agreeing = ours.new_cache(), prompt_BT, 0
    for place in range(PROMPT, PROMPT + GREEDY):
        chunk_BT = ours(chunk_BT, cache=cache)[:, -1:].argmax(-1)
        agreeing += int(chunk_BT[0, 0] == found_BT[0, place])
    return {**figures, "greedy_agreeing": agreeing}


def _one_key_wider(model: Decoder) -> Decoder | None:
    windows = model.config.layer_windows()
    if set(windows) == {None}:
        return None
    wider = [None if window is None else window + 1 for window in windows]
    other = Decoder(replace(copy.copy(model.config), window=wider), model.vocabulary_size).eval()
    other.load_state_dict(model.state_dict())
    return other


if __name__ == "__main__":
    sys.exit(exit_status(main))
