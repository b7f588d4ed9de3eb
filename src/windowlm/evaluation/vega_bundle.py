"""The plotting library as one script, for pages that work without a network.

Bundling takes seconds and gives the same text each time, so that it is kept in the user's cache.
"""

import contextlib
import importlib.metadata
import os
from pathlib import Path

from windowlm.atomic_write import write_atomically

NAME = "vl-convert-python"
SHORTEST = 100_000  # characters; what is shorter is no bundle


def vega_bundle() -> str:
    """JavaScript that defines ``vegaEmbed``, safe inside a ``script`` element."""
    import vl_convert

    path = _cache() / f"vega-{importlib.metadata.version(NAME)}.js"
    try:
        kept = path.read_text(encoding="utf-8")
        if len(kept) > SHORTEST:
            return kept
    except (OSError, UnicodeDecodeError):
        pass
    made: str = vl_convert.javascript_bundle(None)  # type: ignore[arg-type]  # its stub errs
    bundle = made.replace("</script", "<\\/script")
    # A home that cannot be written only costs the time again.
    with contextlib.suppress(OSError):
        write_atomically(path, bundle.encode())
    return bundle


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "windowlm"
