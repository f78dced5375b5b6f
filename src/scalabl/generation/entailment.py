"""Equivalence by a natural language inference model: two answers mean the same where each entails the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scalabl.errors import UserError
from scalabl.generation.clusters import distinct


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
    def load(cls, name: str, **options: Any) -> Entailment:
        """The model of a directory or a Hub id.

        Raises:
            UserError: it cannot be loaded, or is no model for natural language inference.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForSequenceClassification.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            first = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise UserError(f"The entailment model {name} cannot be loaded: {first}") from error
        return cls(model.eval(), tokenizer, **options)

    def __call__(self, texts: Sequence[str], question: str = "") -> NDArray[np.bool_]:
        """(n, n): whether each text entails the other as an answer to the question."""
        unique, number = distinct([f"{question} {text}".strip() for text in texts])
        k = len(unique)
        pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
        entails = np.eye(k, dtype=np.bool_)
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            premise, hypothesis = ([unique[pair[side]] for pair in batch] for side in (0, 1))
            for (i, j), label in zip(batch, self._labels(premise, hypothesis), strict=True):
                entails[i, j] = label == self.label
        both = entails & entails.T
        return both[number][:, number]

    @torch.no_grad()
    def _labels(self, premise: list[str], hypothesis: list[str]) -> list[int]:
        self.tokenizer.truncation_side = "left"  # the answer is at the end of "question answer"
        inputs = self.tokenizer(premise, hypothesis, padding=True, truncation=True, return_tensors="pt")
        device = next(self.model.parameters()).device
        labels: list[int] = self.model(**inputs.to(device)).logits.argmax(dim=-1).tolist()
        return labels
