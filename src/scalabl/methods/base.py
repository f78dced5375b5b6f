"""The one interface of all methods. Each is a module, with its sections in the same order:

    what it is, its paper and equation    the docstring
    its name and its own settings         TITLE, constants
    how it is trained or fitted           adapter_config, callbacks (trained), or fit (post-hoc)
    how it predicts                       predictive

A trained method's numbers lie in its adapter, which PEFT saves and loads. A post-hoc method's lie in
DIR/posthoc/NAME/ of the run that it was fitted on (`scalabl.methods.saved`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from peft import PeftConfig
from transformers import PreTrainedModel, TrainerCallback

from scalabl.predictive import Predictive
from scalabl.tasks import Example
from scalabl.training.recipe import Recipe

if TYPE_CHECKING:
    from scalabl.loading import Run
    from scalabl.methods import (
        blob,
        ensemble,
        laplace,
        map,
        mc_dropout,
        mle,
        monteclora,
        subspace_laplace,
        temperature,
        tfb,
    )
    from scalabl.methods import scalabl as scalabl_method

    # the type checker holds every module against the interface
    _trained: tuple[TrainedMethod, ...] = (scalabl_method, mle, map, mc_dropout, blob, monteclora)
    _post_hoc: tuple[PostHocMethod, ...] = (temperature, ensemble, laplace, tfb, subspace_laplace)


class Method(Protocol):
    """What every method has."""

    TITLE: str  # as in a table

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        """A run of this method (post-hoc: fitted with it) -> the strategy that gives (N, B, C) log class
        probabilities of a batch of B rows.

        Args:
            run: the loaded run.
            samples: N, where the method draws particles; ignored where it does not.
            seed: of the particles.

        Raises:
            UserError: a post-hoc method was not fitted on this run, or the run's adapter has changed since.
        """


class TrainedMethod(Method, Protocol):
    """A method with a training run of its own.

    A module may also have `trainer_class(base)`, a subclass of the Trainer that adds the method's own loss.
    """

    def adapter_config(self, recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
        """The adapter that the recipe asks for.

        Raises:
            UserError: a target matches no module, more layers are asked for than there are, or a setting without
                which the method would be another one.
        """

    def callbacks(self, recipe: Recipe, num_examples: int) -> list[TrainerCallback]:
        """What the training needs beside the likelihood, for so many training rows."""


class PostHocMethod(Method, Protocol):
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
