"""Options that `evaluate` and `predict` share: how a run's posterior is turned into predictions."""

from typing import Annotated

import typer

Predictive = Annotated[str | None, typer.Option(help="mean, mc, linearized or auto, the default.")]
Samples = Annotated[int, typer.Option(help="Particles of mc.")]
Seed = Annotated[int, typer.Option(help="Of the particles.")]
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
