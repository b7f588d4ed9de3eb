"""Draw which token each slot of a windowed layer's cache holds while a text comes in chunks.

python scripts/show_ring.py --window 4 --sinks 1 --chunks 4 3 3 1 1 --out ring.png

A row is the cache behind a chunk, read from a real one whose keys are the numbers of their tokens. The PNG
shows what the chunk has just written, what stayed, the pinned sinks, and slots that hold nothing yet.

Shapes: B batch, T tokens, S slots, K key-value heads, D head dimension.
"""

import argparse
import sys
from io import BytesIO
from typing import Any

import torch
from out_argument import out_file

from windowlm.atomic_write import write_atomically
from windowlm.attention.kv_cache import KVCache
from windowlm.errors import exit_status
from windowlm.evaluation.report import png

EMPTY, SINK, KEPT, WRITTEN = "empty", "sink", "kept", "written now"
COLORS = {EMPTY: "#eeeeee", SINK: "#f0c9a8", KEPT: "#c5d9ec", WRITTEN: "#7fb0dc"}
CELL_PIXELS = 34


def main() -> int:
    """Print the rows, and draw them."""
    options = parse_options()
    rows = ring(options.window, options.sinks, options.chunks)
    tokens = 0
    for count, row in zip(options.chunks, rows, strict=True):
        tokens += count
        print(
            f"{count:>3} tokens, to {tokens - 1:>3}:",
            *(f"{'' if token is None else token:>4}" for token in row),
        )
    if options.out is not None:
        write_atomically(options.out, picture(rows, options))
    return 0


def parse_options() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--sinks", type=int, default=1)
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 3, 3, 1, 1], metavar="TOKENS")
    parser.add_argument("--out", type=out_file, metavar="PNG")
    options = parser.parse_args()
    for name, least in (("window", 1), ("sinks", 0)):
        if (number := getattr(options, name)) < least:
            parser.error(f"--{name} {number}: a number from {least} on is allowed")
    if min(options.chunks) < 1:
        parser.error(f"--chunks {min(options.chunks)}: numbers from 1 on are allowed")
    return options


def ring(window: int, sinks: int, chunks: list[int]) -> list[list[int | None]]:
    """The token in each slot behind each chunk; None where there is none."""
    cache = KVCache([window], [sinks])
    (layer,) = cache.layers
    rows, tokens = [], 0
    for count in chunks:
        key_BTKD = torch.arange(tokens, tokens + count, dtype=torch.float32).view(1, -1, 1, 1)
        cache.advance(1, count, key_BTKD.device)
        layer.extend(key_BTKD, key_BTKD)
        tokens += count
        assert layer.key_BSKD is not None
        held_S = layer.key_BSKD[0, :, 0, 0].int().tolist()
        rows.append([token if slot < tokens else None for slot, token in enumerate(held_S)])
    return rows


def picture(rows: list[list[int | None]], options: argparse.Namespace) -> bytes:
    """PNG of the rows."""
    import altair as alt
    from PIL import Image

    cells: list[dict[str, Any]] = []
    tokens = 0
    for number, (count, row) in enumerate(zip(options.chunks, rows, strict=True)):
        name = f"{number + 1}: tokens {tokens} to {tokens + count - 1}"
        for slot, token in enumerate(row):
            kind = SINK if slot < options.sinks else KEPT
            if token is None:
                kind = EMPTY
            elif token >= tokens:
                kind = WRITTEN
            cells.append({"chunk": name, "slot": slot, "token": "" if token is None else token, "kind": kind})
        tokens += count
    places = {"x": alt.X("slot:O", title="slot", axis=alt.Axis(orient="top", labelAngle=0)),
              "y": alt.Y("chunk:N", sort=None, title="behind chunk")}  # fmt: skip
    base = alt.Chart(alt.Data(values=cells), width=alt.Step(CELL_PIXELS), height=alt.Step(CELL_PIXELS))
    scale = alt.Scale(domain=list(COLORS), range=list(COLORS.values()))
    boxes = base.mark_rect(stroke="white").encode(
        **places, color=alt.Color("kind:N", scale=scale, title=None)
    )
    chart = (boxes + base.mark_text().encode(**places, text="token:N")).properties(
        title=f"window {options.window}, sinks {options.sinks}: the token in each slot"
    )
    content = BytesIO()
    Image.open(BytesIO(png(chart))).save(content, format="PNG", optimize=True)
    return content.getvalue()


if __name__ == "__main__":
    sys.exit(exit_status(main))
