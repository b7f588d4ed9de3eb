"""Settings of the study measures."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from windowlm.setting_text import setting_text

Measure = Literal[
    "far_repeats", "key_words", "pasted_spans", "forced_choice", "far_context", "reach", "useful_reach"
]
DISTANCES = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is measured of a scored run besides its loss by context length.

    Args:
        measures: which; ``key_words`` needs ``choosers``.
        distances: bytes, increasing: edges of the bins of far repeats, and where spans and facts are put.
        choosers: other runs, scored on the same targets, whose losses choose the key words.
        threshold: nats that a word must cost less at the longest context than at the shortest to be a key.
        span: bytes of a pasted span.
        places: pasted spans and forced choices an author.
        depths: shares of the context that stand before the facts of a forced choice.
        window: bytes of the longest text that spans and facts are put into; null is what training sequences
            hold.
        near: tokens of context that the far-context control leaves as they are; null is the longest of the
            context lengths that is at most a quarter of the last.
        max_targets: tokens scored by the far-context control.
        block: bytes of a block that is shuffled.
        seed: of places, random spans, facts and shuffles.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    measures: list[Measure] = field(default_factory=list)
    distances: list[int] = field(default_factory=lambda: list(DISTANCES))
    choosers: list[str] = field(default_factory=list)
    threshold: float = 2.0
    span: int = 256
    places: int = 2
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75])
    window: int | None = None
    near: int | None = None
    max_targets: int = 65_536
    block: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a value out of range.
        """
        if len(set(self.measures)) < len(self.measures):
            good = list(dict.fromkeys(self.measures))
            raise ValueError(
                f"measures={setting_text(self.measures)}: each once; try measures={setting_text(good)}"
            )
        if len(self.distances) < 2 or self.distances != sorted(set(self.distances)) or self.distances[0] < 1:
            good_distances = sorted({distance for distance in self.distances if distance > 0})
            if len(good_distances) < 2:
                good_distances = list(DISTANCES)
            raise ValueError(
                f"distances={setting_text(self.distances)}: two or more whole numbers from 1 on, each once, "
                f"in increasing order; try distances={setting_text(good_distances)}"
            )
        if ("key_words" in self.measures) != bool(self.choosers):
            raise ValueError(
                f"choosers={setting_text(self.choosers)}: runs whose losses choose the key words, given with "
                "the measure key_words and never without; try choosers=[RUN_DIR]"
            )
        if not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold}: nats above 0; try threshold=2.0")
        if not self.depths or any(not 0 <= depth < 1 for depth in self.depths):
            raise ValueError(
                f"depths={setting_text(self.depths)}: shares from 0 to below 1; try depths=[0.0,0.5]"
            )
        if self.span < 32:
            raise ValueError(f"span={self.span}: at least 32, of which 16 are not scored; try span=256")
        for name, good_number in (("window", 8192), ("near", 512)):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1, or null; try {name}={good_number}")
        for name, good_number in (("places", 2), ("max_targets", 65536), ("block", 256)):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: at least 1; try {name}={good_number}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must lie in [0, 2**32); try seed=0")
