"""A model at chance can have a fine ECE: it is called collapsed, in words, wherever its figures stand."""

import torch
from torch import Tensor

from scalabl.metrics.bootstrap import Metric


def is_collapsed(accuracy: Metric, labels: Tensor, num_choices: int | Tensor) -> str | None:
    """Why a model counts as collapsed, as a sentence, or None if it beats both guesses.

    The guesses: a random choice (the mean of 1 / num_choices) and always the commonest label. The model beats
    them when the lower end of its accuracy's interval lies above both.

    Args:
        accuracy: as `evaluate` gives it.
        labels: (n,) the rows' labels.
        num_choices: how many choices a row has, or (n,) of them.
    """
    if accuracy.value is None or labels.numel() == 0:
        return None
    chance = torch.as_tensor(num_choices, dtype=torch.float64).reciprocal().mean().item()
    majority = labels.bincount().max().item() / labels.numel()
    low = accuracy.low if accuracy.low is not None else accuracy.value
    if low > max(chance, majority):
        return None
    guess = "random guessing" if chance >= majority else "always giving the commonest answer"
    return (
        f"At chance: its accuracy of {accuracy.value:.1%} (interval from {low:.1%}) is not reliably above "
        f"{guess} ({max(chance, majority):.1%}), so its other figures, however good, say nothing."
    )
