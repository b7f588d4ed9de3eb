"""Any causal model of transformers in the two parts that scoring asks for.

Shape letters: B batch, T tokens, D model width, V vocabulary.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from windowlm.errors import UserError
from windowlm.interchange.self_contained import check_self_contained
from windowlm.interchange.weights_in import check_finite

# Of a model whose config states no length.
USUAL_LENGTH = 2048
PROBED_TOKENS = 9
ROUNDING = 1e-5
LONGEST_REASON = 300
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert, in the name of a weight


class TransformersModel(nn.Module):
    """A model of transformers, to be scored.

    States and head are taken apart where the head alone, applied to the states, gives the model's logits,
    which a few tokens show. Otherwise (scaled or capped logits) the logits count as the states, and
    nothing as the head.

    Args:
        model: of ``AutoModelForCausalLM``.

    Raises:
        UserError: its logits depend on tokens that come later.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.model_type: str = model.config.model_type
        text = model.config.get_text_config()
        self.vocabulary_size: int = text.vocab_size
        known = getattr(text, "max_position_embeddings", None)
        self.length: int = known or USUAL_LENGTH
        rotates = any(getattr(text, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling"))
        self.most_positions: int | None = None if rotates else known
        head = model.get_output_embeddings()
        self.head: nn.Module = nn.Identity() if head is None else head
        self._check_causal()
        self._apart = head is not None and self._agrees()
        if not self._apart:
            self.head = nn.Identity()

    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Final states ``[B, T, D]``, or the logits where the head cannot be taken apart.

        Raises:
            UserError: more tokens than the model has positions.
        """
        if self.most_positions is not None and tokens_BT.shape[1] > self.most_positions:
            raise UserError(
                f"evaluation.context_lengths: windows of {tokens_BT.shape[1]:,} tokens, and this "
                f"{self.model_type} has {self.most_positions:,} positions; windows hold twice the context, "
                f"so try evaluation.context_lengths=[{self.most_positions // 4},{self.most_positions // 2}]"
            )
        if self._apart:
            states_BTD: torch.Tensor = self.model.base_model(tokens_BT, use_cache=False)[0]
            return states_BTD
        return self._logits(tokens_BT)

    def _logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV: torch.Tensor = self.model(tokens_BT, use_cache=False).logits
        return logits_BTV

    @property
    def _probe(self) -> torch.Tensor:
        device = next(self.model.parameters()).device
        return torch.arange(PROBED_TOKENS, device=device)[None] % self.vocabulary_size

    @torch.no_grad()
    def _check_causal(self) -> None:
        half = PROBED_TOKENS // 2
        others_1T = self._probe.clone()
        others_1T[:, half:] = (others_1T[:, half:] + self.vocabulary_size // 2) % self.vocabulary_size
        logits_TV, others_TV = (self._logits(tokens_1T)[0, :half] for tokens_1T in (self._probe, others_1T))
        if (logits_TV - others_TV).abs().max() > ROUNDING * logits_TV.abs().max():
            raise UserError(
                f"this {self.model_type} sees tokens that come later, so that it does not predict them; one "
                "that reads from left to right is needed (of some, is_decoder=true in config.json)"
            )

    @torch.no_grad()
    def _agrees(self) -> bool:
        tokens_1T = self._probe
        states_1TD = self.model.base_model(tokens_1T, use_cache=False)[0]
        expected = self._logits(tokens_1T)
        if states_1TD.shape[-1] != getattr(self.head, "in_features", None):
            return False
        return torch.allclose(self.head(states_1TD), expected, rtol=1e-5, atol=1e-5)


def load_any_causal_model(folder: Path, device: str | torch.device = "cpu") -> TransformersModel:
    """Open a folder by AutoModelForCausalLM, float32, from safetensors alone and without code of the folder.

    Raises:
        UserError: transformers is not installed, or cannot open it, a weight is missing, of another shape,
            not finite, or of a layer that the config does not have, or a file leads out of the folder.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError(
            f"checkpoint={folder}: reading it needs transformers: pip install 'windowlm[transformers]'"
        ) from None
    check_self_contained(folder)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            # Told in what is returned, as what is missing is: both would be drawn at random.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # of transformers and of what it checks with
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise UserError(f"checkpoint={folder}: transformers cannot open it: {reason}") from None
    model, loaded = opened
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"checkpoint={folder}: the weight {missing[0]} is missing, which config.json asks for"
        )
    if mismatched := sorted(loaded["mismatched_keys"]):
        name, given, asked = mismatched[0]
        raise UserError(
            f"checkpoint={folder}: the weight {name} has shape {list(given)}, and config.json asks for "
            f"{list(asked)}"
        )
    patterns = {_NUMBER.sub("N", name) for name, _ in model.named_parameters()}
    if further := sorted(name for name in loaded["unexpected_keys"] if _NUMBER.sub("N", name) in patterns):
        raise UserError(
            f"checkpoint={folder}: the weight {further[0]} is one of more layers than config.json asks for; "
            "the files are of different models"
        )
    for name, weight in model.named_parameters():
        check_finite(f"checkpoint={folder}: {name}", weight)
    try:
        return TransformersModel(model.to(device).eval())
    except UserError as error:
        raise UserError(f"checkpoint={folder}: {error}") from None
