"""Particles while generating: one shared text of B rows, N of every row from the lowest stochastic layer on.

Below that layer all particles are one, so it runs once; there every row becomes N, each with keys and values of its own
above; behind the output layer they are averaged, so that `generate` sees one distribution a row and knows nothing of
particles. Sampling, stopping criteria, streaming: all of transformers' own decoding stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from scalabl.errors import UserError
from scalabl.predictive.drawn_layers import first_difference, restricted
from scalabl.trunk import final_norm, lowest_adapted_layer
from scalabl.tuner.depth import decoder_layers
from scalabl.tuner.layers import unwrap

Averaged = Callable[[Tensor, Tensor], None]


class Draws(Protocol):
    """What the particles are: `MonteCarloPredictive` and the rivals' of its kind."""

    samples: int

    def context(self, model: nn.Module, first: int, number: int) -> AbstractContextManager[None]:
        """Context in which a batch of `number` B rows carries the particles first .. first + number - 1."""
        ...


@contextmanager
def averaged(model: nn.Module, draws: Draws, seen: Averaged | None = None) -> Iterator[None]:
    """Context in which the next-token distribution of a model is the average over N particles.

    p(y_t | y_<t, x) = 1/N sum_n p(y_t | y_<t, x, s_n): the particles share one text [ScalaBL's model average, a token].
    Logits come back as log-probabilities at the logits' own scale: a constant for each position is added, the mean
    over particles of the log-normaliser, so that with equal particles they are the model's logits themselves.

    Args:
        model: a PEFT model with an adapter.
        draws: the particles; one particle is left as it is, to the last bit.
        seen: called at each forward pass with (input_ids (B, T), log-probabilities (N, B, V) of the last position).

    Raises:
        UserError: in the forward pass, where the rows in the cache are not those that go in (beam search).
    """
    inner = unwrap(model)
    layers = decoder_layers(inner)
    drawn = getattr(draws, "stochastic_layers", None)
    start = first_difference(inner, drawn)
    if start is None:
        start = lowest_adapted_layer(inner, layers)
    number, rows = draws.samples, [0]
    output = _output_module(inner)

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = _input_ids(args, kwargs)
        if kwargs.get("labels") is not None:
            raise UserError("Labels cannot be given while particles are averaged: there is no loss of an average here.")
        rows[0] = ids.shape[0]

    def fan_out(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _repeated(args, rows[0], number), {k: _repeated(v, rows[0], number) for k, v in kwargs.items()}

    def average(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        logits = out.logits.unflatten(0, (number, rows[0]))
        normaliser = logits.float().logsumexp(dim=-1, keepdim=True)
        log_probs = logits.float() - normaliser
        if seen is not None:
            seen(_input_ids(args, kwargs), log_probs[:, :, -1])
        if number == 1:
            out.logits = logits[0]
        else:
            mean = log_probs.logsumexp(dim=0) - math.log(number)
            out.logits = mean + normaliser.mean(dim=0)  # float32: rounded to bfloat16, likely tokens would tie
        return out

    # the first of these repeats the hidden states; masks and positions are given to each layer anew
    entered = layers[start:] if start < len(layers) else [final_norm(inner)]
    handles = [
        output.register_forward_pre_hook(begin, with_kwargs=True),
        output.register_forward_hook(average, with_kwargs=True),
        *(layer.register_forward_pre_hook(fan_out, with_kwargs=True) for layer in entered),
    ]
    try:
        with draws.context(model, 0, number), restricted(model, drawn):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _repeated(value: Any, rows: int, number: int) -> Any:
    """What a decoder layer is given, with every tensor of B rows repeated for N particles; what has N B already stays.

    A tensor of one row serves all (positions of a batch), a vector has no rows.
    """
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == rows:
        return value.repeat(number, *[1] * (value.dim() - 1))
    if type(value) in (tuple, list):
        return type(value)(_repeated(item, rows, number) for item in value)
    return value


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor):
        raise UserError("Give input_ids: particles are averaged for token numbers, not for embeddings.")
    return ids


def _output_module(model: nn.Module) -> nn.Module:
    """The module whose forward gives the logits: the causal language model inside the adapter's wrappers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(base, nn.Module):
        raise UserError("This model has no causal language model inside.")
    return base
