"""A finished run as something that generates: base model, adapter and tokenizer, without a classifier's scoring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from scalabl.runs.loading import load_adapted
from scalabl.runs.record import RunRecord
from scalabl.runs.registry import OVER_S, SAMPLED
from scalabl.scoring.text import Text


@dataclass
class LanguageRun:
    """A trained model, ready to generate.

    Attributes:
        record: what `scalabl.json` says.
        model: the base model with its adapter, in evaluation mode.
        tokenizer: the base model's.
        directory: where it was loaded from.
    """

    record: RunRecord
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    directory: Path | None = None

    @property
    def is_bayesian(self) -> bool:
        """Whether the adapter has a posterior over s."""
        return self.record.method in OVER_S

    @property
    def is_sampled(self) -> bool:
        """Whether the run's method averages over particles."""
        return self.record.method in SAMPLED

    @property
    def text(self) -> Text:
        """Prompts and rows as the tokens that the run was trained on."""
        settings = self.record.scoring
        return Text(self.tokenizer, chat=settings["chat"], max_length=settings["max_length"])


def load_language_run(directory: Path, *, model: str | None = None) -> LanguageRun:
    """Load a finished run for generation; one that was trained on questions with choices generates too.

    Args:
        directory: made by `scalabl train`.
        model: the base model, if it has moved since.

    Raises:
        UserError: not a finished run, altered files, another base model.
    """
    record = RunRecord.read_finished(directory)
    adapted, tokenizer = load_adapted(directory, record, model)
    return LanguageRun(record, adapted, tokenizer, directory)
