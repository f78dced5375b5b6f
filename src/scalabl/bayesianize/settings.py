"""What decides a posterior that is fitted to a finished adapter. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scalabl.adapter_file import CONFIG
from scalabl.bayesianize.source import Source
from scalabl.errors import UserError
from scalabl.training.recipe import LARGEST, Recipe, typed_setting

METHODS = ("laplace", "vi")
STRUCTURES = ("joint", "layer", "diagonal")
# settings of a run's recipe that its adapter keeps; how it was trained is over
_KEPT = (
    "r", "lora_alpha", "target_modules", "layers", "scoring", "normalization", "chat", "max_length", "seed", "dtype",
    "bits", "quantization",
)  # fmt: skip
_VARIATIONAL = {"steps", "variational_learning_rate", "prior_std", "init_sigma", "schedule", "beta"}


@dataclass(frozen=True)
class Settings:
    """What decides the posterior.

    Attributes:
        method: "laplace" or "vi".
        recipe: scoring, batch size and precision of the model; for "vi" steps, rates and the prior too.
        structure: which correlations Laplace's covariance keeps: "joint", "layer" or "diagonal".
        prior_precision: Laplace's, on relative strengths; None takes the one of the highest evidence.
        scoring_given: whether the recipe's scoring was asked for, so that it holds against the run's own.

    Raises:
        UserError: a value out of its range, or one that the method does not read.
    """

    method: str
    recipe: Recipe
    structure: str = "joint"
    prior_precision: float | None = None
    scoring_given: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (("method", self.method, METHODS), ("structure", self.structure, STRUCTURES)):
            if value not in choices:
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        precision = self.prior_precision
        if precision is not None and not 0 < precision <= LARGEST:
            raise UserError(f"prior_precision is {precision}; it must be a positive number, at most {LARGEST:g}.")
        if self.method == "vi" and (precision is not None or self.structure != "joint"):
            raise UserError("prior_precision and structure belong to laplace; leave them out for vi.")


def settings_for(
    source: Source,
    data: str,
    method: str = "laplace",
    *,
    structure: str = "joint",
    prior_precision: float | None = None,
    **given: Any,
) -> Settings:
    """The settings of a posterior: the source run's own where it has one, else what the adapter's configuration says.

    Args:
        source: the adapter.
        data: what the posterior is fitted on.
        method: "laplace" or "vi".
        structure: see `Settings`.
        prior_precision: see `Settings`.
        given: settings of a recipe; None leaves one as it is.

    Raises:
        UserError: a value out of its range, or one that the method does not read.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if source.record:
        settings = {name: value for name, value in source.record["recipe"].items() if name in _KEPT}
    else:
        targets = source.config.get("target_modules") or "all-linear"
        settings = {
            **{name: _number(source, name) for name in ("r", "lora_alpha")},
            "target_modules": targets if isinstance(targets, str) else ",".join(sorted(targets)),
        }
    if source.record and "scoring" not in named and (unread := sorted(named.keys() & {"chat", "max_length"})):
        raise UserError(f"{unread[0]} belongs to a scoring, and a run keeps its own; name one with --scoring too.")
    if method == "laplace" and (unread := sorted(named.keys() & _VARIATIONAL)):
        raise UserError(f"{unread[0]} belongs to vi; leave it out for laplace, which takes one pass over the rows.")
    covariance = "full" if method == "laplace" else "diagonal"
    settings |= {"method": "scalabl", "model": source.model, "data": data, "covariance": covariance}
    return Settings(method, Recipe(**settings | named), structure, prior_precision, "scoring" in named)


def _number(source: Source, name: str) -> Any:
    try:
        return typed_setting(name, source.config.get(name))
    except UserError as error:
        raise UserError(f"{source.directory / CONFIG}: {str(error).rstrip('.')}; restore the file.") from error
