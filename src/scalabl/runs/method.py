"""The one interface of all methods, and the run that they train, are fitted on and predict with.

A method is one object of a class, found by its name in `scalabl.runs.registry`; docs/adding-a-method.md shows how one
is added. A trained method's numbers lie in its adapter, which PEFT saves and loads; a post-hoc method's lie in
DIR/posthoc/NAME/ of the run that it was fitted on (`scalabl.methods.saved`).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from scalabl.core.errors import UserError
from scalabl.core.files import FEATURES, sha256
from scalabl.data.example import Example
from scalabl.metrics.distance import FeatureDistance
from scalabl.predictive.auto import AutoPredictive
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.predictive.linearized import LinearizedPredictive
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.runs.record import RunRecord
from scalabl.runs.registry import METHODS, OVER_S, POST_HOC, SAMPLED, TRAINED
from scalabl.runs.settings import Settings
from scalabl.scoring.base import Encoded, Scoring
from scalabl.scoring.scorer import Scorer


class Method:
    """What every method has.

    Args:
        name: by which the registry has found it.

    Attributes:
        traits: what the registry says of it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.traits = METHODS[name]

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        """A run of this method (post-hoc: fitted with it) -> the strategy that gives (N, B, C) log class
        probabilities of a batch of B rows. Without particles: one pass.

        Args:
            run: the loaded run.
            samples: N, where the method draws particles; ignored where it does not.
            seed: of the particles.

        Raises:
            UserError: a post-hoc method was not fitted on this run, or the run's adapter has changed since.
        """
        return MeanPredictive()


class TrainedMethod(Method):
    """A method with a training run of its own.

    Attributes:
        optimizer_numbers: float32 numbers that its own optimiser keeps for each trained one.
    """

    optimizer_numbers: int | None = None

    def adapter_config(self, settings: Settings, model: PreTrainedModel) -> PeftConfig:
        """The adapter that the settings ask for.

        Raises:
            UserError: a target matches no module, more layers are asked for than there are, or a setting without
                which the method would be another one.
        """
        raise NotImplementedError

    def callbacks(self, settings: Settings, num_examples: int) -> list[TrainerCallback]:
        """What the training needs beside the likelihood, for so many training rows."""
        return []

    def trainer_class(self, base: type[Trainer]) -> type[Trainer]:
        """The trainer, with what the method changes in its steps."""
        return base

    def optimizer(self, settings: Settings, model: PeftModel, num_examples: int) -> Optimizer | None:
        """The method's own optimiser; None where the settings name one."""
        return None

    def beside(self, trainer: Trainer) -> dict[str, Tensor]:
        """What a finished training leaves beside the adapter, to be saved as DIR/NAME.safetensors."""
        return {}

    def empty_particles(self, model: PeftModel, samples: int) -> AbstractContextManager[None]:
        """Context in which N particles are rows of a batch, as shapes on the meta device: for planning."""
        return nullcontext()

    def count(self, model: PeftModel) -> tuple[int, int]:
        """How many numbers A and B have, and how many their distribution (means, standard deviations, scales)."""
        adapter = {name: p.numel() for name, p in model.named_parameters() if "lora_" in name}
        own = sum(n for name, n in adapter.items() if ".posterior." in name or "_sampler." in name)
        return sum(adapter.values()) - own, own


class PostHocMethod(Method):
    """A method that is fitted on a finished run and saved beside its adapter."""

    def fit(
        self,
        run: Run,
        train_rows: Sequence[Example],
        validation_rows: Sequence[Example],
        *,
        members: Sequence[Path] = (),
        batch_size: int = 8,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Fit on a finished run, save, and return the facts that were saved.

        Args:
            run: the loaded run, with its directory.
            train_rows: the rows that the run was trained on.
            validation_rows: rows that were not trained on; no method reads a test row.
            members: directories of the other runs of an ensemble.
            batch_size: rows at a time.
            seed: of the particles that the fit draws.

        Raises:
            UserError: rows are missing, or the run is not one that the method can be fitted on.
        """
        raise NotImplementedError

    def extra_numbers(self, run: Run, facts: dict[str, Any], saved: int) -> int:
        """How many numbers it adds to the run: by default all that it has saved."""
        return saved


def load_method(name: str) -> TrainedMethod:
    """A trained method.

    Raises:
        UserError: there is no such method, or it is not a trained one.
    """
    if name in POST_HOC:
        raise UserError(f"{name} is not trained but fitted on a finished run; choose one of {', '.join(TRAINED)}.")
    return _imported(name, TRAINED)  # type: ignore[no-any-return]


def load_post_hoc(name: str) -> PostHocMethod:
    """A post-hoc method.

    Raises:
        UserError: there is no such method, or it is not a post-hoc one.
    """
    if name in TRAINED:
        raise UserError(f"{name} has a training run of its own; fitted on a finished one are {', '.join(POST_HOC)}.")
    return _imported(name, POST_HOC)  # type: ignore[no-any-return]


def _imported(name: str, among: Sequence[str]) -> Any:
    if name not in among:
        raise UserError(f"There is no method {name!r}; choose one of {', '.join(among)}.")
    file, _, of_class = METHODS[name].source.partition(":")
    return getattr(importlib.import_module(f"scalabl.methods.{file}"), of_class)(name)


@dataclass
class Run:
    """A trained model, ready to predict.

    Attributes:
        record: what `scalabl.json` says.
        scorer: the model with its scoring and trunk.
        tokenizer: the base model's.
        directory: where it was loaded from, and where post-hoc methods keep their files.
    """

    record: RunRecord
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
        return self.record.method in OVER_S

    @property
    def is_sampled(self) -> bool:
        """Whether the run's method averages over particles."""
        return self.record.method in SAMPLED

    def predictive(
        self, name: str | None = None, *, samples: int = 10, seed: int = 0, stochastic_layers: str | None = None
    ) -> Predictive:
        """The predictive of the run's own method ("mc" or None), of one pass ("mean"), or linearised in s.

        Args:
            name: which one; "auto" is what the run's record names, else the cheapest of ScalaBL's that keeps the
                quality of mc (`AutoPredictive`), else the method's own.
            samples: N of mc.
            seed: of the particles.
            stochastic_layers: draw s in the top layers alone: "last:K", or a fraction "last:0.25".

        Raises:
            UserError: layers are named, but the run has no posterior over s, or the predictive draws none.
        """
        if stochastic_layers is not None and (not self.is_bayesian or name == "mean"):
            raise UserError("Only the mc and linearized predictives of ScalaBL runs draw s layer by layer.")
        if name == "auto":
            name = self.record.predictive
            if name is None and self.is_bayesian:
                return AutoPredictive(samples, seed=seed, stochastic_layers=stochastic_layers)
        if name == "mean":
            return MeanPredictive()
        if name == "linearized":
            return LinearizedPredictive(seed=seed, stochastic_layers=stochastic_layers)
        if stochastic_layers is not None:
            return MonteCarloPredictive(samples, seed=seed, stochastic_layers=stochastic_layers)
        return load_method(self.record.method).predictive(self, samples=samples, seed=seed)

    @cached_property
    def distance(self) -> FeatureDistance | None:
        """To the run's training rows; None for a run that keeps no features of them.

        Raises:
            UserError: the file that holds them was lost or altered.
        """
        if self.directory is None or self.record.features_sha256 is None:
            return None
        path = self.directory / FEATURES
        if not path.is_file() or sha256(path) != self.record.features_sha256:
            raise UserError(
                f"{path} was lost or altered (its sha256 is not the one in the run's record); restore the file or "
                "train the run again."
            )
        try:
            return FeatureDistance.of(load_file(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or altered ({error}); train the run again.") from error

    def encode(self, rows: list[Example]) -> list[Encoded]:
        """Rows as tokens."""
        return [self.scoring.encode(row) for row in rows]
