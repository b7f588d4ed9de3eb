"""How the documents lie in the rows of a batch: their runs, first and last tokens, and mistakes in them.

Shapes: B batch, T tokens, N = B T, R runs of tokens of one document, or of padding, in the rows laid end
to end.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

PADDING = -1


class Layout(NamedTuple):
    """How the documents of a batch lie, as plain numbers: what decides which kernels can serve them.

    Attributes:
        runs: runs of tokens of one document, or of padding, over all rows.
        longest: tokens of the longest run.
        padded: whether there is padding.
        gaps: whether padding stands between tokens of one document.
    """

    runs: int
    longest: int
    padded: bool
    gaps: bool


class Runs(NamedTuple):
    """The runs in order; their number depends on the documents, so that no compiled graph can make them.

    Much of what is asked about each token is the same for all of a run, of which there are few. Tokens are
    told by index in the rows laid end to end.

    Attributes:
        rows: [R], first token of the row.
        starts: [R], first token.
        lengths: [R], tokens.
        documents: [R], whose tokens they are.
        before: [R], the run of tokens before it in its row, padding apart; -1 where there is none.
        goes_on: [R], whether its document has tokens before it too, in front of padding.
        first_tokens, last_tokens: [R], of its document; of no use for padding.
    """

    rows: Tensor
    starts: Tensor
    lengths: Tensor
    documents: Tensor
    before: Tensor
    goes_on: Tensor
    first_tokens: Tensor
    last_tokens: Tensor

    @classmethod
    def of(cls, documents_BT: Tensor) -> Self:
        """Find them, with one transfer from the device."""
        starts_R = opens_run(documents_BT).flatten().nonzero().squeeze(1)
        index_R = torch.arange(len(starts_R), device=starts_R.device)
        ends_R = torch.nn.functional.pad(starts_R, (0, 1), value=documents_BT.numel())[1:]
        rows_R = starts_R - starts_R % documents_BT.shape[1]
        documents_R = documents_BT.flatten()[starts_R]
        real_R = documents_R != PADDING
        latest_R = torch.where(real_R, index_R, -1).cummax(0).values
        before_R = torch.nn.functional.pad(latest_R, (1, 0), value=-1)[:-1]
        before_R = torch.where(rows_R[before_R] == rows_R, before_R, -1)
        goes_on_R = real_R & (before_R >= 0) & (documents_R[before_R] == documents_R)
        opens_R = real_R & ~goes_on_R
        number_R = opens_R.cumsum(0)
        last_R = torch.zeros(len(starts_R) + 1, dtype=torch.int64, device=starts_R.device)
        last_R = last_R.scatter_reduce(0, number_R, torch.where(real_R, ends_R - 1, 0), "amax")[number_R]
        first_R = torch.where(opens_R, starts_R, rows_R).cummax(0).values
        return cls(rows_R, starts_R, ends_R - starts_R, documents_R, before_R, goes_on_R, first_R, last_R)

    @property
    def real(self) -> Tensor:
        """Whether it is not padding; [R]."""
        return self.documents != PADDING

    def by_token(self, index_R: Tensor, shape: torch.Size) -> Tensor:
        """Index in its row, of what is told by index in the rows laid end to end, for each token; [B, T]."""
        index_N = (index_R - self.rows).repeat_interleave(self.lengths, output_size=shape.numel())
        return index_N.view(shape)


def positions_in_documents(documents_BT: Tensor) -> Tensor:
    """Position of each token counted from its document's first, int64 [B, T]; padding inside counts on."""
    return torch.arange(documents_BT.shape[1], device=documents_BT.device) - document_starts(documents_BT)


def document_starts(documents_BT: Tensor) -> Tensor:
    """Index in its row of the first token of each token's document; [B, T]."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    latest_BT = torch.where(documents_BT != PADDING, index_T, -1).cummax(1).values
    previous_BT = torch.nn.functional.pad(latest_BT, (1, 0), value=-1)[:, :-1]
    previous_document_BT = documents_BT.gather(1, previous_BT.clamp(min=0))
    opens_BT = (documents_BT != PADDING) & ((previous_BT < 0) | (documents_BT != previous_document_BT))
    return torch.where(opens_BT, index_T, 0).cummax(1).values


def document_ends(documents_BT: Tensor) -> Tensor:
    """Index in its row of the last token of each token's document; [B, T]."""
    return documents_BT.shape[1] - 1 - document_starts(documents_BT.flip(1)).flip(1)


def opens_run(documents_BT: Tensor) -> Tensor:
    """Whether each token's left neighbour is of another document, padding counted as one; bool [B, T]."""
    return torch.nn.functional.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)


def run_starts(documents_BT: Tensor) -> Tensor:
    """Index in its row of the first token of each token's run; [B, T]."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    return torch.where(opens_run(documents_BT), index_T, 0).cummax(1).values


def checked_runs(documents_BT: Tensor, positions_BT: Tensor | None, sinks: int) -> tuple[Runs, Layout]:
    """The runs of documents that are as they should be, with two transfers from the device.

    Raises:
        ValueError: for numbers below -1, documents whose numbers decrease, positions that do not advance with
            the tokens of their document, and such below 0 beside sinks.
    """
    runs = Runs.of(documents_BT)
    decreases_R = runs.real & (runs.before >= 0) & (runs.documents < runs.documents[runs.before])
    jumps_N = below_R = torch.zeros((), dtype=torch.bool, device=documents_BT.device)
    if positions_BT is not None:
        jumps_N = _jumps(runs, documents_BT, positions_BT)
        # Where none jumps, the first of each run are the lowest.
        below_R = runs.real & (positions_BT.flatten()[runs.starts] < 0)
    lowest, decreases, jumps, below, longest, padded, gaps = torch.stack(
        [
            runs.documents.min(),
            decreases_R.any(),
            jumps_N.any(),
            below_R.any(),
            runs.lengths.max(),
            (~runs.real).any(),
            runs.goes_on.any(),
        ]
    ).tolist()
    check_lowest("documents_BT", lowest)

    def place(token: int) -> str:
        row, column = divmod(token, documents_BT.shape[1])
        return f"row {row}, token {column}"

    if decreases:
        raise ValueError(
            f"documents_BT decreases at {place(int(runs.starts[decreases_R][0]))}: "
            "the tokens of a document must stand together, numbered upwards from left to right"
        )
    if jumps:
        raise ValueError(
            f"positions_BT does not advance by one a token at {place(int(jumps_N.nonzero()[0]))}: "
            "positions may restart only where documents_BT changes; "
            "for keys in another order give key_positions_BS"
        )
    if below and sinks:
        raise ValueError(
            f"positions_BT is below 0 at {place(int(runs.starts[below_R][0]))}: sinks stand at positions "
            f"0 to {sinks - 1}, before all others of their document; give positions from 0 on, or sinks=0"
        )
    return runs, Layout(len(runs.starts), longest, bool(padded), bool(gaps))


def _jumps(runs: Runs, documents_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Whether each token's position is not one beyond that of the token of its document before it; [N]."""
    follows_BT = ~opens_run(documents_BT) & (documents_BT != PADDING)
    advances_BT = torch.nn.functional.pad(positions_BT.diff(dim=1) == 1, (1, 0), value=True)
    jumps_N = (follows_BT & ~advances_BT).flatten()
    # Behind padding the last token of the run before is further away.
    last_R = (runs.starts + runs.lengths - 1)[runs.before]
    position_N = positions_BT.flatten()
    wrong_R = runs.goes_on & (position_N[runs.starts] - position_N[last_R] != runs.starts - last_R)
    jumps_N[runs.starts] |= wrong_R
    return jumps_N


def check_lowest(name: str, lowest: int) -> None:
    """Raise ValueError for a number of a document below that of padding."""
    if lowest < PADDING:
        raise ValueError(f"{name} holds {lowest}: numbers from 0 on and -1 for padding are allowed")
