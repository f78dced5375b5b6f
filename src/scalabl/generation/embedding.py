"""Equivalence by embeddings: two answers mean the same where the cosine of their vectors is high.

The small model that ships in a package is wordllama's (MIT; 16 MB; one trained vector of 256 numbers for each of
Llama 2's 32,000 tokens, and the mean of them for a text); its two files are read here, so the package's own needs are
not. Such vectors know words and not meanings: on TriviaQA a cosine above 0.7 joins 40 % of an answer with its aliases
that differ when normalised, and none of 4,000 pairs of answers to different questions; but where the nearest of 8,000
other answers is picked for each, it joins 24 % of those too ("World War I" and "World War II"). Texts with other digits
are kept apart whatever their cosine.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scalabl.errors import UserError
from scalabl.generation.clusters import distinct
from scalabl.generation.correctness import normalise_answer

THRESHOLD = 0.7
_PACKAGE = "wordllama"
_WEIGHTS, _TOKENIZER = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"

Embed = Callable[[Sequence[str]], NDArray[np.float64]]


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
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

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
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"The embedding model {name} cannot be loaded: {first}") from error

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
