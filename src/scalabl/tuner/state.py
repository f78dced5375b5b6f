"""The states of a model: its mean, fresh draws, or N fixed particles: contexts of the thread that enters them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.posterior.draws import standard_normal
from scalabl.posterior.gaussian import Gaussian
from scalabl.tuner.joint import correlated
from scalabl.tuner.layers import require_live, stochastic_layers
from scalabl.tuner.projection import Particles, State, StochasticProjection, Values
from scalabl.tuner.threads import Scope


@contextmanager
def _state(
    model: nn.Module, state_of: Callable[[str, StochasticProjection], State], others: State | None
) -> Iterator[None]:
    """The active adapters' leaves in the states that `state_of` gives, other adapters' in `others` (None: kept)."""
    layers = stochastic_layers(model)
    states = {name: state_of(name, leaf) for name, leaf in layers.items()}
    if any(state != "mean" for state in states.values()):
        require_live(model)
    made = [(leaf, states[name]) for name, leaf in layers.items()]
    if others is not None:
        active = {id(leaf) for leaf in layers.values()}
        leaves = (module for module in model.modules() if isinstance(module, StochasticProjection))
        made += [(leaf, others) for leaf in leaves if id(leaf) not in active]
    scope = Scope()
    try:
        for leaf, state in made:
            leaf.enter(scope, state)
        yield
    finally:
        scope.is_open = False  # at once for all of them, wherever a generator is closed and whatever stops this
        for leaf, _ in made:
            leaf.leave(scope)


def mean(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which every row carries the posterior mean, while training too."""
    return _state(model, lambda _name, _leaf: "mean", "mean")


@contextmanager
def mean_of_any(model: nn.Module) -> Iterator[None]:
    """`mean` of whatever posteriors the model has, of any adapter and of none."""
    leaves = [module for module in model.modules() if isinstance(module, StochasticProjection)]
    scope = Scope()
    try:
        for leaf in leaves:
            leaf.enter(scope, "mean")
        yield
    finally:
        scope.is_open = False
        for leaf in leaves:
            leaf.leave(scope)


def sample(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which every row of every pass carries a fresh draw, while predicting too."""
    return _state(model, lambda _name, _leaf: "sample", "sample")


def only(model: nn.Module, names: Collection[str]) -> AbstractContextManager[None]:
    """Context in which the stochastic layers not named carry their mean, whatever the state around it."""
    return _state(model, lambda name, leaf: leaf.state if name in names else "mean", None)


@contextmanager
def values(model: nn.Module, rows: int) -> Iterator[dict[str, tuple[Tensor, Gaussian]]]:
    """Context in which each of `rows` rows carries its own copy of the mean, to differentiate with respect to.

    Yields:
        the layer's name -> (s (rows, r) with requires_grad, the layer's posterior).
    """
    made: dict[str, tuple[Tensor, Gaussian]] = {}

    def state_of(name: str, leaf: StochasticProjection) -> State:
        s = leaf.posterior.mean.detach().expand(rows, -1).clone().requires_grad_()
        made[name] = (s, leaf.posterior)
        return Values(s)

    with _state(model, state_of, "inactive"):
        yield made


def particles(
    model: nn.Module,
    number: int,
    *,
    seed: int = 0,
    first: int = 0,
    indices: Sequence[int] | None = None,
    scale: float = 1.0,
) -> AbstractContextManager[None]:
    """Context in which a batch of N B rows carries N fixed draws: row j has particle j // B, in every layer.

    The same (seed, particle, layer) gives the same noise on every machine and in every run.

    Args:
        model: a PEFT model with a ScalaBL adapter.
        number: N, at least 1.
        seed: the seed of the draws.
        first: the number of the first particle (for chunks of a larger N).
        indices: particle numbers instead of first .. first + number - 1.
        scale: tau, by which the posterior's standard deviations are multiplied: s = mean + tau scale noise.

    Raises:
        UserError: N is below 1, or the model has no stochastic layer. In the forward pass: a batch whose rows are
            not a multiple of N.
    """
    chosen = list(indices) if indices is not None else list(range(first, first + number))
    if number < 1 or len(chosen) != number or min(chosen) < 0:
        raise UserError(f"Particles are counted from 1, numbers from 0: got number={number}, indices={chosen}.")
    independent = {
        name: standard_normal(chosen, leaf.out_features, seed=seed, stream=name)
        for name, leaf in stochastic_layers(model).items()
    }
    return noise_particles(model, independent, scale)


def noise_particles(model: nn.Module, noise: Mapping[str, Tensor], scale: float = 1.0) -> AbstractContextManager[None]:
    """Context in which a batch of N B rows carries N particles made of given noise, as `particles` does of its own.

    Args:
        model: a PEFT model with a ScalaBL adapter.
        noise: (N, r) standard normal numbers by the layer's name, for every stochastic layer.
        scale: tau, as in `particles`.
    """
    noise = correlated(model, noise)
    # a draw is linear in its noise, whatever the covariance is; tau = 1 changes no bit
    return _state(model, lambda name, _leaf: Particles(scale * noise[name]), "inactive")
