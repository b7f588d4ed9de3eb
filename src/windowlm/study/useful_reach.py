"""How much context a model profits from: the shortest that gives 99% of the gain."""

from windowlm.evaluation.result import LengthResult
from windowlm.study.measure_result import MeasureResult, measure_result

SHARE = 0.99
WINDOWS = 1.5


def useful_reach(result: LengthResult) -> MeasureResult:
    """The shortest measured c from which on 99% of the gain from the shortest to the best c is kept.

    Beside it stand the receptive field, and 1.5 windows: a rule of thumb for stacks of windowed layers with
    residual connections, whatever their depth. If a layer takes a share s of its output from attention and
    the rest from the token itself, what lies k windows back arrives with weight s^k; for s = 0.05 it falls to
    1% at 1.5 windows. (Guangxuan Xiao, "Why Stacking Sliding Windows Can't See Very Far", 2025: an article
    on the web, not a reviewed paper. The rule supposes the share; nothing trains it to be so.)

    Args:
        result: of the evaluation.
    """
    rows = result["rows"]
    loss = [row["bits_per_byte"] for row in rows]
    gain = loss[0] - min(loss)
    stated = result["window"]
    windows = stated if isinstance(stated, list) else [None if isinstance(stated, str) else stated]
    widest = None if None in windows else max(window for window in windows if window is not None)
    useful = None
    best = rows[loss.index(min(loss))]["change_from_shortest"]
    certain = best is not None and best["high"] is not None and best["high"] < 0
    if certain:
        for row in rows:
            if loss[0] - row["bits_per_byte"] >= SHARE * gain:
                useful = row["context_length"]
                break
    if useful is None:
        sentence = "No longer context is better than the shortest by more than chance: no gain to be had."
    elif useful == rows[-1]["context_length"]:
        sentence = (
            f"The loss still falls up to the longest context, {useful:,} tokens; the reach may be longer."
        )
    else:
        sentence = (
            f"{useful:,} tokens of context (c; a target sees c to 2c - 1) give {SHARE:.0%} of the gain."
        )
    if widest is not None:
        sentence += (
            f" A rule of thumb says about {WINDOWS:g} windows, {WINDOWS * widest:,.0f} tokens, whatever the "
            f"depth; the receptive field is {result['receptive_field']:,}."
        )
    return measure_result(
        "useful_reach",
        meaning=[sentence],
        rows=[
            {
                "useful_context": useful,
                "gain": gain,
                "windows_1_5": None if widest is None else WINDOWS * widest,
                "receptive_field": result["receptive_field"],
                "shortest": rows[0]["context_length"],
                "longest": rows[-1]["context_length"],
            }
        ],
    )
