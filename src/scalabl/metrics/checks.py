"""What probabilities and labels must look like before anything is computed from them."""

from torch import Tensor, float64

from scalabl.errors import UserError
from scalabl.uncertainty import SUM_TOLERANCE


def checked(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, C) probabilities and (n,) labels -> the same as float64 and int64 on the CPU.

    Raises:
        UserError: for shapes that do not fit, no rows, NaN, negative probabilities, rows that do not sum to
            one, labels that are no whole numbers or lie outside the columns.
    """
    if probs.ndim != 2 or labels.ndim != 1 or probs.shape[0] != labels.shape[0]:
        raise UserError(
            f"probs must have the shape (rows, choices) and labels (rows,), not {tuple(probs.shape)} and "
            f"{tuple(labels.shape)}; pass one label for each row of probabilities."
        )
    if 0 in probs.shape:
        raise UserError("there are no rows to evaluate; pass at least one row with its label.")
    if labels.is_floating_point() or labels.is_complex():
        raise UserError(f"labels must be whole numbers, not {labels.dtype}; pass indices of choices.")
    probs, labels = probs.detach().to("cpu").to(float64), labels.detach().to("cpu").long()
    if not probs.isfinite().all():
        row = int((~probs.isfinite()).any(dim=1).nonzero()[0])
        raise UserError(f"the probabilities of row {row} hold NaN or infinity; check the model behind them.")
    sums = probs.sum(dim=1)
    wrong = ((sums - 1).abs() > SUM_TOLERANCE) | (probs < 0).any(dim=1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise UserError(
            f"row {row} is no probability distribution (lowest {probs[row].min().item():.4g}, sum "
            f"{sums[row].item():.4g}); pass probabilities, not logits or log-probabilities."
        )
    outside = (labels < 0) | (labels >= probs.shape[1])
    if outside.any():
        row = int(outside.nonzero()[0])
        raise UserError(
            f"the label {int(labels[row])} of row {row} is outside 0 to {probs.shape[1] - 1}; labels are "
            "indices of the columns of probs."
        )
    return probs, labels
