"""A finished run as something that predicts: base model, adapter, scoring and trunk."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from scalabl import ranks
from scalabl.errors import UserError
from scalabl.methods import SAMPLED, load_method
from scalabl.models import held, load_base
from scalabl.predictive import (
    AutoPredictive,
    LinearizedPredictive,
    MeanPredictive,
    MonteCarloPredictive,
    Predictive,
)
from scalabl.run_directory import classifier_record
from scalabl.scoring import Encoded, Scorer, Scoring, make_scoring
from scalabl.tasks import Example
from scalabl.trunk import Trunk
from scalabl.tuner.fingerprint import fingerprint, same_base
from scalabl.tuner.joint import load_joint, set_joint


@dataclass
class Run:
    """A trained model, ready to predict.

    Attributes:
        record: what `scalabl.json` says.
        scorer: the model with its scoring and trunk.
        tokenizer: the base model's.
        directory: where it was loaded from, and where post-hoc methods keep their files.
    """

    record: dict[str, Any]
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    directory: Path | None = None

    @property
    def model(self) -> nn.Module:
        """The base model with its adapter."""
        return self.scorer.model

    @property
    def scoring(self) -> Scoring:
        return self.scorer.scoring

    @property
    def is_bayesian(self) -> bool:
        """Whether the adapter has a posterior over s."""
        return self.record["recipe"]["method"] == "scalabl"

    @property
    def is_sampled(self) -> bool:
        """Whether the run's method averages over particles."""
        return self.record["recipe"]["method"] in SAMPLED

    def predictive(
        self, name: str | None = None, *, samples: int = 10, seed: int = 0, stochastic_layers: str | None = None
    ) -> Predictive:
        """The predictive of the run's own method ("mc" or None), of one pass ("mean"), or linearised in s.

        Args:
            name: which one; "auto" is what the run's record names, else the cheapest of ScalaBL's that keeps the
                quality of mc (`AutoPredictive`), else the method's own.
            samples: N of mc.
            seed: of the particles.
            stochastic_layers: draw s in the top layers alone: "last:K", a fraction "last:0.25", or "variance:0.9", the
                fewest that hold so much of the predictive variance on the run's validation rows.

        Raises:
            UserError: layers are named, but the run has no posterior over s, or the predictive draws none.
        """
        if stochastic_layers is not None:
            if not self.is_bayesian or name == "mean":
                raise UserError("Only the mc and linearized predictives of ScalaBL runs draw s layer by layer.")
            from scalabl.variance import as_top_layers

            spec = stochastic_layers
            stochastic_layers = ranks.on_main(lambda: as_top_layers(self, spec))
        if name == "auto":
            name = self.record.get("predictive")
            if name is None and self.is_bayesian:
                return AutoPredictive(samples, seed=seed, stochastic_layers=stochastic_layers)
        if name == "mean":
            return MeanPredictive()
        if name == "linearized":
            return LinearizedPredictive(seed=seed, stochastic_layers=stochastic_layers)
        if stochastic_layers is not None:
            return MonteCarloPredictive(samples, seed=seed, stochastic_layers=stochastic_layers)
        return load_method(self.record["recipe"]["method"]).predictive(self, samples=samples, seed=seed)

    def encode(self, rows: list[Example]) -> list[Encoded]:
        """Rows as tokens."""
        return [self.scoring.encode(row) for row in rows]


def load_adapter(model: Any, directory: Path) -> PeftModel:
    """Put an adapter on its base model.

    Raises:
        UserError: the files are missing, truncated or made for another base model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(directory)).eval()
        set_joint(adapted, load_joint(directory))
        return adapted
    except UserWarning as error:
        missing = str(error).partition("keys while loading the checkpoint: ")[2][:200]
        raise UserError(f"The adapter in {directory} lacks weights ({missing}); restore its files.") from error
    except SafetensorError as error:
        raise UserError(f"The adapter in {directory} is truncated or altered ({error}); restore its files.") from error
    except RuntimeError as error:
        if "size mismatch" in str(error):
            raise UserError(
                f"The adapter in {directory} was made for a base model of other sizes; load the one that its "
                "adapter_config.json names."
            ) from error
        raise


def require_base(model: nn.Module, record: dict[str, Any]) -> None:
    """Refuse a base model other than the one that a run was trained on.

    Raises:
        UserError: its fingerprint differs from the record's.
    """
    found, trained = fingerprint(model), record.get("base_fingerprint")
    if found is not None and trained is not None and not same_base(trained, found):
        raise UserError(
            f"This adapter was trained on another base model ({record['recipe']['model']}, whose fingerprint is "
            f"{trained}; this one's is {found}); give that one with --model."
        )


def load_adapted(
    directory: Path, record: dict[str, Any], model: str | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model of a run with its adapter, held as it was trained, and the tokenizer.

    Args:
        directory: of a finished run.
        record: what its `scalabl.json` says.
        model: the base model, if it has moved since.

    Raises:
        UserError: altered files, another base model.
    """
    recipe = record["recipe"]
    base, tokenizer = load_base(model or recipe["model"], **held(recipe), device=ranks.own_device())
    require_base(base, record)
    return load_adapter(base, directory), tokenizer


def load_run(directory: Path, *, model: str | None = None) -> Run:
    """Load a finished run.

    Args:
        directory: made by `scalabl train`.
        model: the base model, if it has moved since.

    Raises:
        UserError: not a finished run, altered files, another base model.
    """
    record = classifier_record(directory)
    adapted, tokenizer = load_adapted(directory, record, model)
    scoring = make_scoring(record["scoring"], tokenizer)
    return Run(record, Scorer(adapted, scoring, Trunk(adapted)), tokenizer, directory)
