"""A finished run as something that predicts: base model, adapter, scoring and trunk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from scalabl.errors import UserError
from scalabl.models import load_base
from scalabl.run_directory import finished_record
from scalabl.scoring import Encoded, Scorer, Scoring, make_scoring
from scalabl.tasks import Example
from scalabl.trunk import Trunk


@dataclass
class Run:
    """A trained model, ready to predict.

    Attributes:
        record: what `scalabl.json` says.
        scorer: the model with its scoring and trunk.
        tokenizer: the base model's.
    """

    record: dict[str, Any]
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase

    @property
    def scoring(self) -> Scoring:
        return self.scorer.scoring

    @property
    def is_bayesian(self) -> bool:
        """Whether the adapter has a posterior to draw from."""
        return self.record["recipe"]["method"] == "scalabl"

    def encode(self, rows: list[Example]) -> list[Encoded]:
        """Rows as tokens."""
        return [self.scoring.encode(row) for row in rows]


def load_adapter(model: Any, directory: Path) -> PeftModel:
    """Put an adapter on its base model.

    Raises:
        UserError: the files are missing, truncated or made for another base model.
    """
    try:
        return PeftModel.from_pretrained(model, str(directory)).eval()
    except SafetensorError as error:
        raise UserError(f"The adapter in {directory} is truncated or altered ({error}); restore its files.") from error
    except RuntimeError as error:
        if "size mismatch" in str(error):
            raise UserError(
                f"The adapter in {directory} was made for a base model of other sizes; load the one that its "
                "adapter_config.json names."
            ) from error
        raise


def load_run(directory: Path, *, model: str | None = None) -> Run:
    """Load a finished run.

    Args:
        directory: made by `scalabl train`.
        model: the base model, if it has moved since.

    Raises:
        UserError: not a finished run, altered files, another base model.
    """
    record = finished_record(directory)
    recipe = record["recipe"]
    base, tokenizer = load_base(model or recipe["model"], dtype=recipe["dtype"], bits=recipe["bits"])
    adapted = load_adapter(base, directory)
    scoring = make_scoring(record["scoring"], tokenizer)
    trunk = Trunk(adapted)
    return Run(record, Scorer(adapted, scoring, trunk if trunk.depth else None), tokenizer)
