"""Parts of an evaluation that are not scored yet, dealt out over the processes of the command.

Shape letters: N targets.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from windowlm.errors import UserError
from windowlm.evaluation.kept_nats import KeptNats
from windowlm.evaluation.passes import Kind, Part, Pass
from windowlm.parallel.processes import ALONE, Processes

Nats = npt.NDArray[np.float64]


def score_parts(
    model: nn.Module,
    passes: Sequence[Pass],
    targets_hash: str,
    *,
    device: torch.device,
    advance: Callable[[int, int], Any],
    kept: KeptNats | None = None,
    processes: Processes = ALONE,
    between_rounds: Callable[[], object] | None = None,
) -> dict[Kind, dict[int, Nats]]:
    """Nats ``[N]`` of all targets by kind and context length, on each process the same.

    Which windows share a batch is decided by the parts, and these by the passes alone: so the nats are those
    of one process to the bit where each has as many threads. In a round each process scores a part; then all
    get all, and the leader keeps them. What an interruption costs is a round.

    Args:
        model: inside ``precision.scoring``, on the device of this process.
        passes: what is to be scored.
        targets_hash: of the targets.
        device: of the model.
        advance: told after each step how many tokens are done, and how many of them were read in this call.
        kept: of the leader: what is scored already, and where parts go that are.
        processes: those that share the work.
        between_rounds: called on all of them where a round is kept and another follows; it may raise.

    Raises:
        UserError: a loss is not finite, on whichever process, or a part cannot be kept.
        LostProcessError: a process is gone.
    """
    finished, pieces = processes.share(_known(passes, targets_hash, kept if processes.leads else None))
    missing = []
    for each in passes:
        if each.name in finished:
            advance(each.tokens, 0)
            continue
        for name, part in _named_parts(each, targets_hash):
            if name in pieces:
                advance(part.tokens, 0)
            else:
                missing.append((name, part))
    if processes.size > 1:
        # Those of a round should take equally long, and the shortest round comes last.
        missing.sort(key=lambda named: -named[1].tokens)
    for start in range(0, len(missing), processes.size):
        # Not before the first, so that an evaluation that is started again and again gets somewhere.
        if start and between_rounds is not None:
            between_rounds()
        dealt = missing[start : start + processes.size]
        own = dealt[processes.rank][1] if processes.rank < len(dealt) else None
        outcomes = processes.gather(_outcome(own, model, device, advance))
        scored: dict[str, Nats] = {}
        for rank, ((name, part), outcome) in enumerate(zip(dealt, outcomes, strict=False)):
            if not isinstance(outcome, np.ndarray):
                continue
            scored[name] = outcome
            if rank != processes.rank:
                advance(part.tokens, part.tokens)
        processes.leader_alone(partial(_keep, kept, scored))
        pieces |= scored
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                raise outcome
    nats: dict[Kind, dict[int, Nats]] = {"protocol": {}, "naive": {}}
    for each in passes:
        if each.name in finished:
            nats[each.kind] |= finished[each.name]
        else:
            whole = np.concatenate([pieces[name] for name, _ in _named_parts(each, targets_hash)])
            nats[each.kind] |= dict.fromkeys(each.context_lengths, whole)
    return nats


def _keep(kept: KeptNats | None, scored: dict[str, Nats]) -> None:
    if kept is None:
        return
    for name, nats in scored.items():
        kept.keep(name, nats)


def _known(
    passes: Sequence[Pass], targets_hash: str, kept: KeptNats | None
) -> tuple[dict[str, dict[int, Nats]], dict[str, Nats]]:
    """What is scored already: of whole passes by their name, and of parts of the others by theirs."""
    finished: dict[str, dict[int, Nats]] = {}
    pieces: dict[str, Nats] = {}
    if kept is None:
        return finished, pieces
    for each in passes:
        found = {c: kept.finished(targets_hash, each.kind, c) for c in each.context_lengths}
        whole = {c: nats_N for c, nats_N in found.items() if nats_N is not None}
        if len(whole) == len(found):
            finished[each.name] = whole
            continue
        for name, part in _named_parts(each, targets_hash):
            if (piece := kept.piece(name, part.targets)) is not None:
                pieces[name] = piece
    return finished, pieces


def _named_parts(each: Pass, targets_hash: str) -> list[tuple[str, Part]]:
    return [(f"{targets_hash[:16]}-{each.name}-{number}", part) for number, part in enumerate(each.parts)]


def _outcome(
    part: Part | None, model: nn.Module, device: torch.device, advance: Callable[[int, int], Any]
) -> Nats | UserError | None:
    """The nats of a part, or why it has none, for all to know."""
    if part is None:
        return None
    try:
        return part.score(model, device=device, on_tokens=lambda read: advance(read, read))
    except UserError as error:
        return error
