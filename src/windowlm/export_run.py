"""The export of a finished run: its model, with a card of its training and its evaluation."""

import sys
from pathlib import Path
from typing import Any

from windowlm.bundle import load
from windowlm.errors import UserError
from windowlm.evaluation.result_files import OWN_EVALUATION, PLOT_NAME, RESULT_NAME
from windowlm.interchange.export import check_out, export_to_transformers
from windowlm.interchange.model_card import CURVE_NAME, model_card
from windowlm.json_text import parse_json
from windowlm.model_folder import IN_RUN

# Of a row of the evaluation, what the card shows.
ROW_FIELDS = ("context_length", "perplexity", "bits_per_byte", "naive_bits_per_byte", "targets", "bytes")


def export_run(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Write a run's model in transformers' layout.

    Args:
        checkpoint: a run's folder, a model's folder in our layout or transformers', or a name of the hub.
        out: a folder that does not exist.

    Returns:
        The content of the config.json written.

    Raises:
        UserError: the checkpoint cannot be used or expressed, or ``out`` exists; nothing is written then.
    """
    check_out(out)
    bundle = load(checkpoint)
    run = bundle.folder.parent if bundle.folder.name == IN_RUN else bundle.folder
    evaluation = _evaluation(run / OWN_EVALUATION / RESULT_NAME)
    pictures = {}
    plot = run / OWN_EVALUATION / PLOT_NAME
    if evaluation is not None and plot.is_file():
        pictures[CURVE_NAME] = plot.read_bytes()
    if not bundle.config["training"]:
        print(
            f"checkpoint={checkpoint}: no run of windowlm, so that the card tells nothing of its training",
            file=sys.stderr,
        )
    card = model_card(
        out.name, bundle.model.config, bundle.config, evaluation, has_picture=CURVE_NAME in pictures
    )
    return export_to_transformers(
        bundle.model,
        bundle.tokenizer,
        out,
        sequence_length=bundle.config["sequence_length"],
        further_ends=bundle.config.get("end_marks", ()),
        card=card,
        pictures=pictures,
    )


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}; evaluate the run again") from None
    try:
        whole = bool(result["rows"]) and {*ROW_FIELDS} <= set.intersection(*map(set, result["rows"]))
        whole &= isinstance(result["documents"], list) and {"split", "precision"} <= result.keys()
        numbers = [row[name] for row in result["rows"] for name in ROW_FIELDS]
        whole &= all(isinstance(number, int | float) for number in numbers)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: not the result of an evaluation; evaluate the run again")
    return dict(result)
