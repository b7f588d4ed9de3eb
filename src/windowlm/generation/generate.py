"""Generation: prompts in, text out as it comes, any number of prompts side by side.

Shapes: B batch, T tokens, V vocabulary, D model width.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from windowlm.attention.config import Llama3Scaling, YarnScaling
from windowlm.attention.document_layout import PADDING
from windowlm.attention.kv_cache import KVCache
from windowlm.bundle import Bundle
from windowlm.deferred_numbers import DeferredNumbers
from windowlm.errors import UserError
from windowlm.generation.config import SamplingConfig
from windowlm.generation.prompt_reader import PromptReader, needs_compiler
from windowlm.generation.sampling import row_draws
from windowlm.generation.text_stream import TextStream
from windowlm.generation.token_choice import NO_TOKEN, Chosen, TokenChoice
from windowlm.generation.token_step import (
    TokenStep,
    can_be_recorded,
    capacity_of_steps,
    holds_sinks,
    joined_view,
)
from windowlm.model.decoder import Decoder

# Tokens of the prompts that one call reads at most, so that memory does not grow with their length. The host
# takes longer to launch a model than a GPU takes for a few thousand tokens.
PREFILL_TOKENS = {"cpu": 8192, "cuda": 65536}
# Recording a step takes about as long as so many steps.
FEWEST_STEPS_RECORDED = 8
EndedBy = Literal["max_new_tokens", "stop", "end_of_document"]


@dataclass(frozen=True)
class Generation:
    """What was produced after one prompt.

    Attributes:
        text: the text, without the stop text.
        tokens: ids, the end mark and what the stop text cut included.
        ended_by: why it ended.
        nats: -log of the probability that the model gave to each token, before temperature and filters;
            the end mark, which stands for no text, left out.
        bytes: UTF-8 bytes that the tokens stand for.
        prompt_tokens: tokens of the prompt.
    """

    text: str
    tokens: list[int]
    ended_by: EndedBy
    nats: float
    bytes: int
    prompt_tokens: int

    @property
    def bits_per_byte(self) -> float | None:
        """Of what was produced, under the model; None where nothing was."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


@dataclass
class Pace:
    """Seconds of the host's clock, and the tokens that they brought.

    Attributes:
        prompt_tokens, prompt_seconds: reading the prompts, up to the choice of each first token.
        tokens, seconds: all tokens after each first one.
        compile_seconds: compiling what reads prompts and takes tokens, which is in none of the others.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Of production, the prompts apart; None where there was but one token."""
        return self.tokens / self.seconds if self.tokens else None


def generate(
    bundle: Bundle, prompt: str, settings: SamplingConfig | None = None, **changes: Any
) -> Generation:
    """Continue a text.

    Args:
        bundle: what ``load`` gives.
        prompt: text from the beginning of a document.
        settings: how to choose tokens; None for the defaults.
        changes: fields of ``SamplingConfig`` that differ from `settings`, such as ``temperature=0``.

    Raises:
        UserError: as ``Generator``, or an empty prompt.
        ValueError: a setting out of range.
    """
    return Generator(bundle, _settings(settings, changes)).batch([prompt])[0]


def stream(
    bundle: Bundle, prompt: str, settings: SamplingConfig | None = None, **changes: Any
) -> Iterator[str]:
    """Like ``generate``, and gives the text piece by piece, as soon as it is certain."""
    generator = Generator(bundle, _settings(settings, changes))
    for pieces in generator.pieces([prompt]):
        if pieces[0]:
            yield pieces[0]


def _settings(settings: SamplingConfig | None, changes: dict[str, Any]) -> SamplingConfig:
    given = {} if settings is None else {entry.name: getattr(settings, entry.name) for entry in _FIELDS}
    if unknown := sorted(changes.keys() - {entry.name for entry in _FIELDS}):
        names = ", ".join(entry.name for entry in _FIELDS)
        raise ValueError(f"{unknown[0]}={changes[unknown[0]]!r}: there are {names}")
    return SamplingConfig(**{**given, **changes})


_FIELDS = fields(SamplingConfig)


class Generator:
    """Serves prompts with one model and one choice of settings.

    Args:
        bundle: what ``load`` gives.
        settings: how to choose tokens, and when to stop.
        compiled: compile what reads prompts, a `PromptReader`, and what takes the tokens behind them, a
            `TokenStep`, which take their time to begin.
            A GPU replays it as one graph in any case where it `can_be_recorded`.

    Attributes:
        pace: what it took so far.

    Raises:
        UserError: not a bundle; compiled, with a model that asks for a backend by name.
    """

    def __init__(self, bundle: Bundle, settings: SamplingConfig, *, compiled: bool = False) -> None:
        if not isinstance(bundle, Bundle):
            raise UserError(
                f"bundle={bundle!r}: what windowlm.load gives is allowed; try windowlm.load(PATH)"
            )
        self.bundle, self.settings, self.compiled = bundle, settings, compiled
        self.pace = Pace()
        self.results: list[Generation] = []
        self._ends = frozenset((bundle.tokenizer.end_of_document, *bundle.config.get("end_marks", ())))
        self._device = next(bundle.model.parameters()).device
        backend = bundle.model.config.backend
        if compiled and backend != "auto":
            raise UserError(
                f"compile=true: one token attends without a backend, and the model asks for {backend}; "
                "try compile=false"
            )
        recorded = settings.max_new_tokens > FEWEST_STEPS_RECORDED and can_be_recorded(bundle.model)
        self._steps_token = compiled or recorded

    def batch(self, prompts: Sequence[str], first: int = 0) -> list[Generation]:
        """Continue each prompt.

        Args:
            prompts: texts.
            first: number of the first among all prompts that are ever served: with the seed it decides what
                is drawn, so that texts do not depend on how prompts are put into batches.

        Raises:
            UserError: as `pieces`.
        """
        for _ in self.pieces(prompts, first):
            pass
        return self.results

    def pieces(self, prompts: Sequence[str], first: int = 0) -> Iterator[list[str]]:
        """Give for each token step the text of each row that is certain now; then `results` are complete.

        Raises:
            UserError: no prompt, an empty one, one that is too long for a layer without a window, or a model
                that gives no numbers.
        """
        steps = self._steps(prompts, first)
        while True:
            # The caller has modes of its own between two steps, and may have changed them.
            with torch.inference_mode(False), torch.no_grad():
                pieces = next(steps, None)
            if pieces is None:
                return
            yield pieces

    def _steps(self, prompts: Sequence[str], first: int) -> Iterator[list[str]]:
        settings, model = self.settings, self._model
        encoded = self.encode(prompts)
        rows = [_Row(self.bundle, self._ends, ids, settings) for ids in encoded]
        longest = max(map(len, encoded))
        tokens_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
        documents_BT = torch.full_like(tokens_BT, PADDING, dtype=torch.int32)
        for row, ids in enumerate(encoded):
            tokens_BT[row, longest - len(ids) :] = torch.from_numpy(ids.astype(np.int64))
            documents_BT[row, longest - len(ids) :] = 0
        # At once: a copy between two chunks would wait for the first of them.
        tokens_BT, documents_BT = tokens_BT.to(self._device), documents_BT.to(self._device)
        earlier_BT = tokens_BT.masked_fill(documents_BT == PADDING, NO_TOKEN)
        alike = all(len(ids) == longest for ids in encoded)
        # More than are used: each other number of draws would be compiled anew.
        most = capacity_of_steps(settings.max_new_tokens)
        draws = [row_draws(settings.seed, first + row, most) for row in range(len(rows))]
        draws_BT = torch.stack(draws).to(self._device)
        choose = TokenChoice(settings, draws_BT, earlier_BT, model.vocabulary_size, self._without_text())
        capacity = longest + settings.max_new_tokens
        cache = model.new_cache(capacity_of_steps(capacity) if self.compiled else capacity)
        started = self._working_time()
        read_prompt = PromptReader(model, compiled=self.compiled)
        size = max(PREFILL_TOKENS[self._device.type] // len(rows), 1)
        for start in range(0, longest, size):
            chunk = slice(start, start + size)
            hidden_BD = read_prompt(tokens_BT[:, chunk], None if alike else documents_BT[:, chunk], cache)
        chosen = choose(model.head(hidden_BD))
        self.pace.compile_seconds += read_prompt.compile_seconds
        go_on = self._continuation(cache, len(rows), choose)
        for step in range(settings.max_new_tokens):
            numbers = DeferredNumbers([chosen.numbers])
            goes_on, waits = step + 1 < settings.max_new_tokens, not numbers.arrived
            if goes_on and waits:
                chosen = go_on(chosen.tokens)
            read = numbers.read()
            tokens, nats = map(int, read[: len(rows)]), read[len(rows) :]
            now = self._working_time()
            self._count(rows, started, now, encoded if step == 0 else None)
            started = now
            pieces = [
                row.add(*token) for row, token in zip(rows, zip(tokens, nats, strict=True), strict=True)
            ]
            if all(row.ended_by is not None for row in rows):
                self.results = [row.result() for row in rows]
                yield pieces
                return
            yield pieces
            if goes_on and not waits:
                chosen = go_on(chosen.tokens)

    def _continuation(self, cache: KVCache, batch: int, choose: TokenChoice) -> Callable[[Tensor], Chosen]:
        """What takes one more token of each row and chooses the next."""
        model = self._model
        token_step: TokenStep[Chosen] | None = None

        def go_on(tokens_B: Tensor) -> Chosen:
            nonlocal token_step
            if self._steps_token and token_step is None and holds_sinks(cache):
                token_step = self._token_step(cache, batch, choose)
            if token_step is not None:
                return token_step(tokens_B)
            return choose(model.head(model.hidden(tokens_B[:, None], cache=cache)[:, -1]))

        return go_on

    def _token_step(self, cache: KVCache, batch: int, choose: TokenChoice) -> TokenStep[Chosen]:
        if not self.compiled:
            return TokenStep(self._model, cache, batch, choose, compiled=False)
        started = time.perf_counter()
        with needs_compiler():
            step = TokenStep(self._model, cache, batch, choose)
        self.pace.compile_seconds += time.perf_counter() - started
        return step

    @cached_property
    def _model(self) -> Decoder:
        return joined_view(self.bundle.model) if self.compiled else self.bundle.model

    def _without_text(self) -> Tensor | None:
        """Tokens that stand for no text and end none, such as rows of an embedding beyond its tokenizer."""
        tokenizer = self.bundle.tokenizer
        bytes_V = torch.from_numpy(np.asarray(tokenizer.token_bytes_V))
        never_V = torch.ones(self._model.vocabulary_size, dtype=torch.bool)
        never_V[: len(bytes_V)] = bytes_V == 0
        never_V[list(self._ends)] = False
        return never_V.to(self._device) if never_V.any() else None

    def _working_time(self) -> float:
        """The host's clock without the time in which it compiled."""
        return time.perf_counter() - self.pace.compile_seconds

    def encode(self, prompts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Tokens of the prompts.

        Raises:
            UserError: there is no prompt, or one is no text, empty, or too long for a layer without a window.
        """
        if not prompts:
            raise UserError("prompts: there is none; give a text that the model continues")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UserError(f"prompt={prompt!r}: a {type(prompt).__name__}; a text (str) is allowed")
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"prompt={prompt!r}: it holds half a character (a lone surrogate); give UTF-8 text"
                ) from None
        encoded = self.bundle.tokenizer.encode_batch(list(prompts))
        largest = None if self.settings.beyond_training else position_range(self.bundle)
        for ids in encoded:
            if not len(ids):
                raise UserError("prompt: it is empty; give a text that the model continues: prompt=TEXT")
            if largest is None:
                continue
            room, trained = largest - len(ids), "layers that see further were trained on positions below"
            if room < 1:
                raise UserError(
                    f"prompt: it has {len(ids):,} tokens, and {trained} {largest:,}; "
                    f"give at most {largest - 1:,}, or beyond_training=true"
                )
            if room < self.settings.max_new_tokens:
                raise UserError(
                    f"max_new_tokens={self.settings.max_new_tokens}: the prompt has {len(ids):,} tokens, and "
                    f"{trained} {largest:,}; try max_new_tokens={room}, or beyond_training=true"
                )
        return encoded

    def _count(
        self, rows: "list[_Row]", started: float, now: float, encoded: list[NDArray[np.uint32]] | None
    ) -> None:
        if encoded is not None:
            self.pace.prompt_tokens += sum(map(len, encoded))
            self.pace.prompt_seconds += now - started
        else:
            self.pace.tokens += sum(row.ended_by is None for row in rows)
            self.pace.seconds += now - started


def position_range(bundle: Bundle) -> int | None:
    """Positions up to which all distances that layers see are known from training; None for any.

    A window bounds the distances that a rotation sees, whatever the position, but not those to sinks, and
    one that is larger than the sequences of the training does so too late.
    """
    config = bundle.model.config
    largest = None
    layers = zip(config.layer_windows(), config.layer_sinks(), config.layer_rotaries(), strict=True)
    for window, sinks, rotary in layers:
        if rotary is None:
            continue
        known, scaling = int(bundle.config["sequence_length"]), rotary.scaling
        if isinstance(scaling, YarnScaling | Llama3Scaling):
            known = max(known, int(scaling.original_length * scaling.factor))
        if window is None or window > known or sinks:
            largest = known if largest is None else min(largest, known)
    return largest


class _Row:
    """One prompt on its way."""

    def __init__(
        self, bundle: Bundle, ends: frozenset[int], prompt: NDArray[np.uint32], settings: SamplingConfig
    ) -> None:
        self.tokenizer, self.settings, self.prompt_tokens = bundle.tokenizer, settings, len(prompt)
        self._ends = ends
        self.stream = TextStream(settings.stop)
        self.tokens: list[int] = []
        self.nats = 0.0
        self.ended_by: EndedBy | None = None

    def add(self, token: int, nats: float) -> str:
        """Take in a token and return the text that is certain now; nothing once it ended."""
        if self.ended_by is not None:
            return ""
        if not math.isfinite(nats):
            raise UserError("checkpoint: the model gives no finite numbers; its training has diverged")
        self.tokens.append(token)
        at_end = token in self._ends
        if not at_end:
            self.nats += nats
        if at_end and self.settings.stop_at_end:
            self.ended_by = "end_of_document"
        elif len(self.tokens) == self.settings.max_new_tokens:
            self.ended_by = "max_new_tokens"
        piece = self.stream.add(self.tokenizer.decode_bytes([token]), final=self.ended_by is not None)
        if self.stream.stopped:
            self.ended_by = "stop"
        return piece

    def result(self) -> Generation:
        """Of a row that has ended."""
        assert self.ended_by is not None
        size = int(self.tokenizer.token_bytes_V[self.tokens].sum())
        return Generation(self.stream.text, self.tokens, self.ended_by, self.nats, size, self.prompt_tokens)
