"""Settings of generation."""

import math
import re
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import ClassVar

from windowlm.setting_text import setting_text

# The draws of all of them are made before the first.
MOST_NEW_TOKENS = 100_000_000
# Below it the most probable token has all of the probability, and above what logits can be divided by.
LEAST_TEMPERATURE = 1e-6
# What logits can be divided and multiplied by.
LEAST_PENALTY, LARGEST_PENALTY = 1e-6, 1e6
# Names of settings, what they may be, the same in words, and an example.
_KINDS: tuple[tuple[tuple[str, ...], tuple[type, ...], str, str], ...] = (
    (("max_new_tokens",), (Integral,), "a whole number", "256"),
    (("seed",), (Integral,), "a whole number", "0"),
    (("top_k", "repetition_window"), (Integral, type(None)), "a whole number or null", "null"),
    (("temperature", "top_p", "repetition_penalty"), (Real,), "a number", "1.0"),
    (("min_p",), (Real,), "a number", "0.0"),
    (("stop_at_end", "beyond_training"), (bool,), "true or false", "true"),
)


# What a backslash makes of the character behind it where stop texts are written on a command line.
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def written_texts(stop: list[str]) -> list[str]:
    """Stop texts as a command line writes them, where a line break is ``\\n``.

    Raises:
        ValueError: another escape.
    """

    def without(text: str) -> str:
        return text.replace("\\", "") or "END"

    if any(found not in ESCAPES for text in stop for found in re.findall(r"\\(.?)", text, re.DOTALL)):
        raise ValueError(
            f"stop={setting_text(stop)}: behind a backslash n, t, r and another backslash are allowed, and "
            f"any other character as it stands; try stop={setting_text([without(text) for text in stop])}"
        )
    return [re.sub(r"\\(.)", lambda found: ESCAPES[found[1]], text) for text in stop]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen, and when to stop.

    The logits pass the repetition penalty, then the temperature, then top-k, top-p and min-p; the most
    probable token always stays.

    Args:
        max_new_tokens: tokens produced at most.
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_k: only the k most probable tokens, and those as probable as the last of them, stay; null for all.
        top_p: only the most probable tokens that together reach this probability stay (nucleus sampling,
            Holtzman et al. 2020, arXiv:1904.09751).
        min_p: only tokens with at least this share of the largest probability stay (Nguyen et al. 2024,
            arXiv:2407.01082).
        repetition_penalty: positive logits of tokens that occurred are divided by it, negative ones
            multiplied (CTRL, Keskar et al. 2019, arXiv:1909.05858); 1 for none.
        repetition_window: tokens back, the prompt's included, that count as occurred; null for all.
        seed: of the draws; the text of a prompt depends on the seed and the prompt's number, not on the
            prompts that are served beside it, as far as the model's numbers do not: in bfloat16 products
            are rounded differently in batches of other sizes.
        stop: texts before which production ends; they are not part of the result.
        stop_at_end: end at the end mark of a document; where not, the text goes on behind the mark as more of
            the same document, which it still sees.
        beyond_training: allow positions at which layers without a window, with sinks, or with a window
            longer than the sequences of the training see distances that they were not trained on.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int | None = None
    seed: int = 0
    stop: list[str] = field(default_factory=list)
    stop_at_end: bool = True
    beyond_training: bool = False

    def __post_init__(self) -> None:
        """Check kinds and ranges.

        Raises:
            ValueError: a value of another kind or out of range.
        """
        for names, kinds, what, example in _KINDS:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                    raise ValueError(f"{name}={value!r}: {what} is allowed; try {name}={example}")
        if not 1 <= self.max_new_tokens <= MOST_NEW_TOKENS:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}: must lie between 1 and {MOST_NEW_TOKENS:,}; try "
                "max_new_tokens=256"
            )
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature}: must be 0, which is greedy, or finite and at "
                f"least {LEAST_TEMPERATURE}; try temperature=1.0"
            )
        for name in ("top_k", "repetition_window"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: must be at least 1, or null for all; try {name}=null")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must lie in (0, 1], where 1 keeps all; try top_p=0.95")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: must lie in [0, 1], where 0 keeps all; try min_p=0.05")
        if not LEAST_PENALTY <= self.repetition_penalty <= LARGEST_PENALTY:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty}: must lie between {LEAST_PENALTY} and "
                f"{LARGEST_PENALTY:.0f}, where 1 is none; try repetition_penalty=1.1"
            )
        if self.repetition_window is not None and self.repetition_penalty == 1:
            raise ValueError(
                f"repetition_window={self.repetition_window}: it says how far repetition_penalty looks back, "
                "which is 1, so that there is none; try repetition_window=null"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must lie in [0, 2**63); try seed=0")
        if isinstance(self.stop, str):
            raise ValueError(f"stop={self.stop!r}: a list of texts is allowed; try stop=[{self.stop!r}]")
        if not isinstance(self.stop, list | tuple) or not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop={self.stop!r}: a list of texts is allowed; try stop=[]")
        if "" in self.stop:
            raise ValueError(
                f"stop={self.stop!r}: texts that end production, of a character at least, are "
                f"allowed; try stop={setting_text([text for text in self.stop if text])}"
            )
