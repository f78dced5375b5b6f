"""Options that `evaluate` and `predict` share, and their checks: how a run's posterior is turned into predictions."""

from typing import Annotated, Any

import typer

from scalabl.core.errors import UserError
from scalabl.core.top_layers import check_spec
from scalabl.predictive.sampling import Sampling
from scalabl.runs.record import RunRecord
from scalabl.runs.registry import OVER_S, SAMPLED
from scalabl.runs.settings import LARGEST_SEED

Predictive = Annotated[str | None, typer.Option(help="mean, mc, linearized or auto, the default.")]


def samples_option(help: str) -> Any:
    """The option of N, the number of particles."""
    return typer.Option(max=10**6, help=help)


def seed_option(help: str) -> Any:
    """The option of a seed."""
    return typer.Option(min=0, max=LARGEST_SEED, help=help)


Samples = Annotated[int, samples_option("Particles of mc.")]
Seed = Annotated[int, seed_option("Of the particles.")]
Draws = Annotated[str, typer.Option(help="independent, antithetic, sobol or moments: how they are drawn.")]
Adaptive = Annotated[bool, typer.Option("--adaptive", help="Stop a row early when its decision is settled.")]
Confidence = Annotated[
    float, typer.Option(help="Of --adaptive: that all particles decide alike; of --max-error: that it is kept.")
]
Bound = Annotated[str, typer.Option(help="Of --adaptive: t (near normal) or betting (any distribution).")]
StochasticLayers = Annotated[
    str | None, typer.Option(help="Draw s in the top layers alone: last:K, last:0.25 or variance:0.9.")
]
BatchSize = Annotated[int, typer.Option(help="Questions at a time.")]
BaseModel = Annotated[str | None, typer.Option(help="The base model, if it has moved.")]


def check_predictive(
    predictive: str | None, samples: int, batch_size: int, limit: int | None, record: RunRecord
) -> None:
    """Refuse a predictive that there is not or that the run does not have, and numbers below 1."""
    if predictive not in (None, "mean", "mc", "linearized", "auto"):
        raise UserError(f"--predictive is {predictive!r}; it must be mean, mc or linearized, or auto, the default.")
    if predictive == "linearized" and record.method not in OVER_S:
        raise UserError("Only ScalaBL runs have a linearised predictive; use --predictive mean or mc.")
    if predictive == "mc" and record.method not in SAMPLED:
        raise UserError("This run is a plain LoRA without a posterior; use --predictive mean.")
    require_counts(samples=samples, batch_size=batch_size, limit=limit)


def require_counts(**given: int | None) -> None:
    """Refuse numbers below 1, by the names of their options; None is left out."""
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


def check_sampling(
    draws: str,
    adaptive: bool,
    confidence: float,
    bound: str,
    predictive: str | None,
    samples: int,
    record: RunRecord,
) -> Sampling:
    """The draws and adaptive N that the options ask for.

    Raises:
        UserError: bad values, or a run or a predictive that has no such particles.
    """
    sampling = Sampling(draws=draws, confidence=confidence if adaptive else None, bound=bound)
    sampled = predictive == "mc" or (predictive in (None, "auto") and record.method in SAMPLED)
    if adaptive and not sampled:
        raise UserError("--adaptive is for the mc predictive of runs that draw particles; leave it out here.")
    if draws != "independent" and not (sampled and record.method in OVER_S):
        raise UserError(f"--draws {draws} is for the mc predictive of ScalaBL runs; leave it out here.")
    if draws == "moments" and samples < 2:
        raise UserError("--draws moments needs at least 2 --samples: one particle has no variance to match.")
    return sampling


def check_layers(stochastic_layers: str | None, predictive: str | None, record: RunRecord) -> None:
    """Refuse --stochastic-layers that name nothing, or where no s is drawn."""
    if stochastic_layers is None:
        return
    check_spec(stochastic_layers, variance=True)
    if predictive == "mean" or record.method not in OVER_S:
        raise UserError(
            "--stochastic-layers is for the mc and linearized predictives of ScalaBL runs; leave it out here."
        )
