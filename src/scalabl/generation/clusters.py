"""Semantic sets: which of several answers to a question mean the same.

An equivalence looks at n texts and says of each pair whether they mean the same; by name:

    exact               the same text, outer white space aside
    normalised          the same without case, punctuation and articles (`normalise_answer`)
    embedding           cosine of small word vectors, from the package wordllama (`embedding.py`)
    embedding:MODEL     likewise of an encoder: a directory or a Hub id
    entailment:MODEL    each entails the other, by a natural language inference model: a directory or a Hub id

Sources: Kuhn et al. 2023 (2302.09664), algorithm 1; Farquhar et al. 2024 (Nature 630).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scalabl.errors import UserError
from scalabl.generation.correctness import normalise_answer


class Equivalence(Protocol):
    """Which of n texts mean the same as answers to a question."""

    def __call__(self, texts: Sequence[str], question: str = "") -> NDArray[np.bool_]:
        """(n, n), symmetric, with a true diagonal."""
        ...


def semantic_sets(texts: Sequence[str], equivalence: Equivalence, question: str = "") -> list[int]:
    """The set that each text belongs to, numbered from 0 as they come.

    A text joins the first set whose first text it is equivalent to, else it opens one of its own [Kuhn et al. 2023,
    algorithm 1]. Where equivalence is not transitive the order of the texts matters.
    """
    same = equivalence(texts, question)
    firsts: list[int] = []
    sets: list[int] = []
    for i in range(len(texts)):
        found = next((k for k, first in enumerate(firsts) if same[first, i]), len(firsts))
        if found == len(firsts):
            firsts.append(i)
        sets.append(found)
    return sets


def exact(texts: Sequence[str], question: str = "") -> NDArray[np.bool_]:
    """The same text, outer white space aside."""
    return _equal([text.strip() for text in texts])


def normalised(texts: Sequence[str], question: str = "") -> NDArray[np.bool_]:
    """The same without case, punctuation and articles."""
    return _equal([normalise_answer(text) for text in texts])


def equivalence(name: str) -> Equivalence:
    """The equivalence of a name: one of this module's list.

    Raises:
        UserError: no such name, the package of the word vectors is not installed, or the model cannot be loaded.
    """
    kind, _, model = name.partition(":")
    if model and kind == "entailment":
        from scalabl.generation.entailment import Entailment

        return Entailment.load(model)
    if kind == "embedding":
        from scalabl.generation.embedding import EmbeddingSimilarity, encoder, word_vectors

        return EmbeddingSimilarity(encoder(model) if model else word_vectors())
    if name not in _BY_MATCH:
        raise UserError(
            f"There is no equivalence of answers {name!r}; choose exact, normalised, embedding, embedding:MODEL or "
            "entailment:MODEL."
        )
    return _BY_MATCH[name]


def distinct(texts: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The different ones among n texts, as they come, and the place (n,) of each text among them."""
    place: dict[str, int] = {}
    number = np.array([place.setdefault(text, len(place)) for text in texts], dtype=np.int64)
    return list(place), number


def _equal(texts: Sequence[str]) -> NDArray[np.bool_]:
    _, number = distinct(texts)
    same: NDArray[np.bool_] = number[:, None] == number[None, :]
    return same


_BY_MATCH: dict[str, Callable[..., NDArray[np.bool_]]] = {"exact": exact, "normalised": normalised}
