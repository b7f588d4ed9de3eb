"""The end of a run whose numbers are no longer finite."""

from windowlm.errors import UserError


class NonFiniteError(UserError):
    """A loss or a weight is infinite or not a number.

    Args:
        step: optimizer steps trained when it was found.
        what: the loss or the weight, with its value.
    """

    def __init__(self, step: int, what: str) -> None:
        super().__init__(
            f"step {step}: {what}, so the run stops; the last checkpoint is of a step before, when all was "
            "finite. Try a lower optimizer.lr, a longer optimizer.warmup_fraction, a smaller "
            "optimizer.gradient_clip, or precision=32-true"
        )
