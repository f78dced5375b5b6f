"""Answers made by hand: particles' next-token distributions with known figures, as `decode` gives them."""

import torch
from torch import Tensor

from scalabl.generation.decoding import Decoded, token_figures


def decoded(text: str, tokens: list[str], distributions: Tensor, chosen: list[int]) -> Decoded:
    """An answer of T tokens from log-probabilities (N, T, V) and the token numbers (T,) that were taken."""
    log_probs = distributions.log_softmax(dim=-1)
    figures = token_figures(log_probs)
    index = torch.tensor(chosen)[None, :, None].expand(len(log_probs), -1, 1)
    return Decoded(
        "question?", text, chosen, tokens, log_probs.gather(-1, index)[..., 0],
        figures.total, figures.aleatoric, figures.epistemic, figures.intersection, True,
    )  # fmt: skip


def at_random(text: str = "some words", *, particles: int = 4, length: int = 5, vocabulary: int = 11, seed: int = 0):
    """An answer from random distributions."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(particles, length, vocabulary, generator=generator, dtype=torch.float64)
    chosen = torch.randint(vocabulary, (length,), generator=generator).tolist()
    return decoded(text, [f"t{i}" for i in range(length)], logits, chosen)


def with_probability(text: str, probabilities: list[float]) -> Decoded:
    """An answer whose T tokens have these probabilities, under one particle of a vocabulary of two."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    logits = torch.stack([p, 1 - p], dim=-1).log()[None]
    return decoded(text, ["t"] * len(probabilities), logits, [0] * len(probabilities))
