"""Semantic sets: which of several answers to a question mean the same.

An equivalence looks at n texts and says of each pair whether they mean the same; by name:

    exact               the same text, outer white space aside
    normalised          the same without case, punctuation and articles (`normalise_answer`)
    embedding           the cosine of small word vectors is high, those of the package wordllama
    embedding:MODEL     likewise of an encoder: a directory or a Hub id
    entailment:MODEL    each entails the other, by a natural language inference model: a directory or a Hub id

wordllama (MIT; 16 MB) has one trained vector of 256 numbers for each of Llama 2's 32,000 tokens, and the mean of them
for a text; its two files are read here, so the package's own needs are not. Such vectors know words and not meanings:
on TriviaQA a cosine above 0.7 joins 40 % of an answer with its aliases that differ when normalised, and none of 4,000
pairs of answers to different questions; but where the nearest of 8,000 other answers is picked for each, it joins 24 %
of those too ("World War I" and "World War II"). Texts with other digits are kept apart whatever their cosine.

Sources: Kuhn et al. 2023 (2302.09664), algorithm 1; Farquhar et al. 2024 (Nature 630).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from scalabl.core.errors import UserError
from scalabl.core.remote_code import reading_model, trust_remote_code
from scalabl.generation.correctness import normalise_answer

THRESHOLD = 0.7
_PACKAGE = "wordllama"
_WEIGHTS, _TOKENIZER = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"

Embed = Callable[[Sequence[str]], NDArray[np.float64]]


class Equivalence(Protocol):
    """Which of n texts mean the same as answers to a question."""

    def __call__(self, texts: Sequence[str], question: str = "") -> NDArray[np.bool_]:
        """(n, n), symmetric, with a true diagonal."""
        ...


def equivalence(name: str) -> Equivalence:
    """The equivalence of a name: one of this module's list.

    Raises:
        UserError: no such name, the package of the word vectors is not installed, or the model cannot be loaded.
    """
    kind, _, model = name.partition(":")
    if model and kind == "entailment":
        return Entailment.load(model)
    if kind == "embedding":
        return EmbeddingSimilarity(encoder(model) if model else word_vectors())
    if name == "exact":
        return SameText(str.strip)
    if name == "normalised":
        return SameText(normalise_answer)
    raise UserError(
        f"There is no equivalence of answers {name!r}; choose exact, normalised, embedding, embedding:MODEL or "
        "entailment:MODEL."
    )


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


def distinct(texts: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The different ones among n texts, as they come, and the place (n,) of each text among them."""
    place: dict[str, int] = {}
    number = np.array([place.setdefault(text, len(place)) for text in texts], dtype=np.int64)
    return list(place), number


class SameText:
    """Equal texts, once `form` was applied to each; the question plays no part."""

    def __init__(self, form: Callable[[str], str]) -> None:
        self.form = form

    def __call__(self, texts: Sequence[str], question: str = "") -> NDArray[np.bool_]:
        """(n, n): whether two texts are equal."""
        _, number = distinct([self.form(text) for text in texts])
        same: NDArray[np.bool_] = number[:, None] == number[None, :]
        return same


class EmbeddingSimilarity:
    """Cosine of the embeddings of normalised texts above a threshold; equal texts are equivalent without one.

    Args:
        embed: n texts -> (n, d) vectors of any length.
        threshold: of the cosine, -1 to 1.

    Raises:
        UserError: a threshold out of range.
    """

    def __init__(self, embed: Embed, threshold: float = THRESHOLD) -> None:
        if not -1 <= threshold <= 1:
            raise UserError(
                f"The threshold of a cosine lies between -1 and 1, not at {threshold}; {THRESHOLD} is usual."
            )
        self.embed, self.threshold = embed, threshold

    def __call__(self, texts: Sequence[str], question: str = "") -> NDArray[np.bool_]:
        """(n, n): whether two texts lie close; the question plays no part."""
        unique, number = distinct([normalise_answer(text) for text in texts])
        vectors = np.asarray(self.embed(unique), dtype=np.float64)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
        digits = [sorted(re.findall(r"\d+", text)) for text in unique]
        alike = np.array([[a == b for b in digits] for a in digits], dtype=np.bool_)
        same = ((vectors @ vectors.T > self.threshold) & alike) | np.eye(len(unique), dtype=np.bool_)
        found: NDArray[np.bool_] = same[number][:, number]
        return found


def word_vectors() -> Embed:
    """Mean of the token vectors of the package wordllama.

    Raises:
        UserError: the package is not installed, or is another version without these files.
    """
    # found without importing it: the package imports its own network and configuration libraries
    package = importlib.util.find_spec(_PACKAGE)
    folder = Path(package.origin).parent if package is not None and package.origin else None
    if folder is None or not all((folder / name).is_file() for name in (_WEIGHTS, _TOKENIZER)):
        raise UserError(
            "The embedding model comes with a package that is not installed: pip install --no-deps "
            "wordllama==0.4.0.post1; without it, take the equivalence normalised."
        )
    [table] = load_file(folder / _WEIGHTS).values()
    tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def embed(texts: Sequence[str]) -> NDArray[np.float64]:
        vectors = np.zeros((len(texts), table.shape[1]))
        for i, encoded in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            if encoded.ids:
                vectors[i] = table[encoded.ids].astype(np.float64).mean(axis=0)
        return vectors

    return embed


def encoder(name: str, *, batch_size: int = 32) -> Embed:
    """Mean of the last hidden states of an encoder (sentence-transformers' mean pooling), of a directory or a Hub id.

    Raises:
        UserError: it cannot be loaded.
    """
    model, tokenizer = _loaded("embedding", AutoModel, name)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> NDArray[np.float64]:
        found = []
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state.double()
            mask = inputs["attention_mask"][..., None].double()
            found.append(((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).numpy())
        return np.concatenate(found) if found else np.zeros((0, 1))

    return embed


class Entailment:
    """Bidirectional entailment of "question answer" pairs [Kuhn et al. 2023; Farquhar et al. 2024, the strict form].

    Args:
        model: a sequence classifier one of whose labels begins with "entail"; premise first, hypothesis second.
        tokenizer: its tokenizer.
        batch_size: pairs in a forward pass.

    Raises:
        UserError: no label, or several, begin with "entail".
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32) -> None:
        labels = {str(name): int(i) for i, name in model.config.id2label.items()}
        # "not_entailment" of two-label models is none
        found = [i for name, i in labels.items() if name.lower().startswith("entail")]
        if len(found) != 1:
            raise UserError(
                f"An entailment model has one label that begins with 'entail', and this one has {', '.join(labels)}; "
                "choose a model for natural language inference (MNLI)."
            )
        self.model, self.tokenizer, self.batch_size, self.label = model, tokenizer, batch_size, found[0]

    @classmethod
    def load(cls, name: str) -> Entailment:
        """The model of a directory or a Hub id.

        Raises:
            UserError: it cannot be loaded, or is no model for natural language inference.
        """
        return cls(*_loaded("entailment", AutoModelForSequenceClassification, name))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], question: str = "") -> NDArray[np.bool_]:
        """(n, n): whether each text entails the other as an answer to the question."""
        unique, number = distinct([f"{question} {text}".strip() for text in texts])
        pairs = [(i, j) for i in range(len(unique)) for j in range(len(unique)) if i != j]
        entails = np.eye(len(unique), dtype=np.bool_)
        self.tokenizer.truncation_side = "left"  # the answer is at the end of "question answer"
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            premise, hypothesis = ([unique[pair[side]] for pair in batch] for side in (0, 1))
            inputs = self.tokenizer(premise, hypothesis, padding=True, truncation=True, return_tensors="pt")
            logits = self.model(**inputs.to(next(self.model.parameters()).device)).logits
            for (i, j), label in zip(batch, logits.argmax(dim=-1).tolist(), strict=True):
                entails[i, j] = label == self.label
        both = entails & entails.T
        return both[number][:, number]


@torch.no_grad()
def _loaded(kind: str, auto: Any, name: str) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, of a directory or a Hub id."""
    with reading_model(f"The {kind} model {name} cannot be loaded"):
        model = auto.from_pretrained(name, trust_remote_code=trust_remote_code()).eval()
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code())
        # one pass, with a character that few vocabularies have: what fails on it would fail behind the answers
        model(**tokenizer(["a", "\u2603 b"], padding=True, truncation=True, return_tensors="pt"))
    return model, tokenizer
