"""Pictures of what each query sees, for the terminal, a notebook or a page.

Loads torch, rich or Altair only when something is drawn. Shapes: T queries, S keys.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from rich.text import Text

LARGEST = 512
COLORS = ("#1b5e9b", "#b3541e", "#3a7d34", "#7a4fa3", "#8a6d00", "#c2417c")
HIDDEN_COLOR, PADDING_COLOR = "#eeeeee", "#ffffff"
SEEN, SINK, HIDDEN, PADDED = "1", "s", "·", " "
PANEL_PIXELS, SMALLEST_CELL, LARGEST_CELL = 420, 1, 22


class Panel(NamedTuple):
    """The mask of the layers that share a window.

    Attributes:
        title: the window, and where it is not that of all layers, which layers have it.
        rows: a row of marks for each query: `SEEN`, `SINK` (visible as a sink alone), `HIDDEN`, `PADDED`.
        visible: keys that each query sees.
    """

    title: str
    rows: list[list[str]]
    visible: list[int]


@dataclass(frozen=True, kw_only=True)
class AttentionPicture:
    """Which keys each query sees, drawn; in a notebook `AttentionPicture(window=4).chart()`.

    A window of 4 over two documents, of which the first has 5 tokens; columns are keys, and the numbers
    count the keys that a query sees:

    >>> print(AttentionPicture(window=4, documents=[5, 3], sequence_length=8).text())
    window 4
        A A A A A B B B
    A 0 1 · · · · · · · 1
    A 1 1 1 · · · · · · 2
    A 2 1 1 1 · · · · · 3
    A 3 1 1 1 1 · · · · 4
    A 4 · 1 1 1 1 · · · 4
    B 0 · · · · · 1 · · 1
    B 1 · · · · · 1 1 · 2
    B 2 · · · · · 1 1 1 3

    Args:
        window: keys that a query sees, itself included; None for all; a list is a pattern of layers.
        sequence_length: queries.
        documents: tokens of each document; None for one document.
        causal: hide later keys.
        sinks: how many first tokens of a document stay visible to all of it.
        padding_left: tokens of padding before the documents.
        padding_right: tokens of padding after the documents.
        keys: keys, of which the last are the queries' own (a cache); None for as many as queries.

    Raises:
        ValueError: for what cannot be drawn, naming the field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    window: int | list[int | None] | None = 4
    sequence_length: int = 12
    documents: list[int] | None = None
    causal: bool = True
    sinks: int = 0
    padding_left: int = 0
    padding_right: int = 0
    keys: int | None = None

    def __post_init__(self) -> None:
        """Check the kinds and ranges, and that the lengths add up."""
        for window in self._pattern():
            if window is not None and (not _is_whole(window) or window < 1):
                raise ValueError(
                    f"window={self.window!r}: a window counts the keys a query sees, itself included, so it "
                    "is a whole number from 1 on, or null for all keys; try window=4"
                )
        if not self._pattern():
            raise ValueError("window=[]: a pattern holds at least one entry; try window=4")
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal={self.causal!r}: true or false is allowed; try causal=true")
        for name in ("sinks", "padding_left", "padding_right"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: a whole number, at least 0, is allowed; try {name}=0"
                )
        for name, good in (("sequence_length", 12), ("keys", None)):
            value = getattr(self, name)
            if not _is_whole(value) and (value, name) != (None, "keys"):
                raise ValueError(f"{name}={value!r}: a whole number is allowed; try {name}={good or 'null'}")
        if self.documents is not None and not (
            isinstance(self.documents, list | tuple) and all(map(_is_whole, self.documents))
        ):
            raise ValueError(
                f"documents={self.documents!r}: a list of whole numbers, or null for one document, is "
                "allowed; try documents=[5,7]"
            )
        if not 1 <= self.sequence_length <= LARGEST:
            raise ValueError(
                f"sequence_length={self.sequence_length}: from 1 to {LARGEST} can be drawn; "
                "try sequence_length=12"
            )
        if self.keys is not None and not self.sequence_length <= self.keys <= LARGEST:
            raise ValueError(
                f"keys={self.keys}: at least sequence_length={self.sequence_length} and at most {LARGEST} "
                f"are allowed, as the last keys are the queries' own; try keys={self.sequence_length}"
            )
        real = self._key_count() - self.padding_left - self.padding_right
        if real < 0:
            raise ValueError(
                f"padding_left={self.padding_left}: with padding_right={self.padding_right} it is more than "
                f"the {self._key_count()} tokens there are; try padding_left=0"
            )
        if self.documents is not None and (
            any(length < 1 for length in self.documents) or sum(self.documents) != real
        ):
            told = "documents=[" + ",".join(map(str, self.documents)) + "]"
            needed = sum(self.documents) + self.padding_left + self.padding_right
            if min(self.documents, default=0) >= 1 and self.keys is None and needed <= LARGEST:
                raise ValueError(
                    f"sequence_length={self.sequence_length}: {needed}, the tokens of {told} and padding, "
                    f"is allowed; try sequence_length={needed}"
                )
            fitting = [real] if real < 2 else [real // 2, real - real // 2]
            raise ValueError(
                f"{told}: lengths from 1 on that sum to {real}, the tokens that are not padding, "
                f"are allowed; try documents=[{','.join(map(str, fitting if real else []))}]"
            )

    def text(self) -> "Text":
        """The masks in characters, documents coloured; letters name documents, numbers positions."""
        from rich.text import Text

        documents = self._documents()
        positions = _positions(documents)
        width = len(str(max(positions)))
        text = Text()
        for number, panel in enumerate(self.panels()):
            text.append("\n\n" * (number > 0)).append(panel.title, style="bold").append("\n")
            text.append(" " * (width + 3))
            for document in documents:
                text.append(_letter(document), style=_color(document)).append(" ")
            text.right_crop(1)
            first = len(documents) - self.sequence_length
            for query, (row, visible) in enumerate(zip(panel.rows, panel.visible, strict=True), first):
                name = "" if documents[query] < 0 else str(positions[query])
                text.append(f"\n{_letter(documents[query])} {name:>{width}} ", style=_color(documents[query]))
                for mark in row:
                    text.append(mark, style=_color(documents[query]) if mark in (SEEN, SINK) else "dim")
                    text.append(" ")
                text.append(str(visible), style="dim")
        return text

    def chart(self) -> Any:
        """The masks as an Altair chart, one panel for each window of the pattern."""
        import altair as alt

        documents = self._documents()
        first = len(documents) - self.sequence_length
        cell = max(SMALLEST_CELL, min(LARGEST_CELL, PANEL_PIXELS // len(documents)))
        seen = {f"document {_letter(document)}": _color(document) for document in documents if document >= 0}
        colors = {**seen, "hidden": HIDDEN_COLOR}
        panels = [
            alt.Chart(
                # Rows, which Vega cuts into cells: Altair checks each entry, for 512 x 512 a minute long.
                alt.Data(
                    values=[
                        {
                            "query": query,
                            "document": f"document {_letter(documents[query])}",
                            "marks": "".join(row),
                        }
                        for query, row in enumerate(panel.rows, first)
                    ]
                ),
                title=panel.title,
                width=cell * len(documents),
                height=cell * self.sequence_length,
            )
            .transform_calculate(mark="split(datum.marks, '')", key=f"sequence({len(documents)})")
            .transform_flatten(["mark", "key"])
            .transform_filter(f"datum.mark != '{PADDED}'")
            .transform_calculate(
                shows=f"datum.mark == '{HIDDEN}' ? 'hidden' : datum.document",
                sink=f"datum.mark == '{SINK}'",
            )
            .mark_rect(stroke="white", strokeWidth=1 if cell > 4 else 0)
            .encode(
                x=_axis(alt.X, "key", range(len(documents))),
                y=_axis(alt.Y, "query", range(first, len(documents))),
                color=alt.Color(
                    "shows:N", title=None, scale=alt.Scale(domain=list(colors), range=list(colors.values()))
                ),
                opacity=alt.condition("datum.sink", alt.value(0.5), alt.value(1)),
            )
            for panel in self.panels()
        ]
        title = alt.Title("What each query sees", subtitle=self._subtitle(), anchor="start")
        return alt.hconcat(*panels, title=title).configure_view(stroke=None)

    def panels(self) -> list[Panel]:
        """The mask of each window of the pattern, by the definition in `window.py`."""
        documents = self._documents()
        first = len(documents) - self.sequence_length
        layers_of: dict[int | None, list[int]] = {}
        for layer, window in enumerate(self._pattern(), 1):
            layers_of.setdefault(window, []).append(layer)
        panels = []
        for window, layers in layers_of.items():
            seen, in_window = self._mask(window, self.sinks), self._mask(window, 0)
            rows = [[HIDDEN for _ in documents] for _ in range(self.sequence_length)]
            for row, marks in enumerate(rows):
                for key in range(len(documents)):
                    if documents[first + row] < 0 or documents[key] < 0:
                        marks[key] = PADDED
                    elif seen[row][key]:
                        marks[key] = SEEN if in_window[row][key] else SINK
            title = "no window" if window is None else f"window {window}"
            if len(layers_of) > 1:
                title += f", layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
                title += f" of {len(self._pattern())}"
            panels.append(Panel(title, rows, [sum(row) for row in seen]))
        return panels

    def _mask(self, window: int | None, sinks: int) -> list[list[bool]]:
        import torch

        from .window import Visibility

        documents_1S = torch.tensor([self._documents()], dtype=torch.int32)
        keys = documents_1S.shape[1]
        # Beyond the keys all numbers show the same, and tensors hold no number of any size.
        visibility = Visibility.build(
            window=None if window is None else min(window, keys),
            causal=self.causal,
            sinks=min(sinks, keys),
            documents_BT=documents_1S,
        )
        mask_SS = visibility.mask(keys, keys, documents_1S.device)[0]
        rows: list[list[bool]] = mask_SS[keys - self.sequence_length :].tolist()
        return rows

    def _pattern(self) -> list[int | None]:
        return list(self.window) if isinstance(self.window, list | tuple) else [self.window]

    def _key_count(self) -> int:
        return self.sequence_length if self.keys is None else self.keys

    def _documents(self) -> list[int]:
        """Document of each key, -1 for padding."""
        real = self._key_count() - self.padding_left - self.padding_right
        lengths = [real] if self.documents is None else self.documents
        tokens = [number for number, length in enumerate(lengths) for _ in range(length)]
        return [-1] * self.padding_left + tokens + [-1] * self.padding_right

    def _subtitle(self) -> str:
        parts = ["causal" if self.causal else "bidirectional"]
        if self.sinks:
            parts.append(f"{self.sinks} sink{'s' * (self.sinks > 1)} (pale) beside the window")
        if self.keys is not None and self.keys > self.sequence_length:
            parts.append(f"{self.sequence_length} queries, the last of {self.keys} keys")
        if self.padding_left or self.padding_right:
            parts.append("padding is blank")
        return ", ".join(parts)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _letter(document: int) -> str:
    """A to Z, then A again; a dash for padding."""
    return "-" if document < 0 else chr(ord("A") + document % 26)


def _color(document: int) -> str:
    return "dim" if document < 0 else COLORS[document % len(COLORS)]


def _positions(documents: list[int]) -> list[int]:
    return [token - documents.index(document) for token, document in enumerate(documents)]


def _axis(channel: Any, name: str, tokens: range) -> Any:
    """A discrete axis with about a dozen labels."""
    step = max(1, -(-len(tokens) // 12))
    axis = {"values": list(tokens)[::step], "labelAngle": 0, "title": name}
    return channel(f"{name}:O", axis=axis, scale={"domain": list(tokens)})
