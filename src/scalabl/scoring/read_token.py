"""The one token that an encoder's head reads, for which alone the last layer is computed above its attention.

BERT and its kin hand their head the hidden state of a row's first token. What stands above the attention of the last
layer works on each token by itself, so that nobody reads what becomes of the others: three quarters of that layer's
products, forwards and backwards. Whether a model is such a one is tried on it, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from scalabl.core.modules import eval_mode
from scalabl.scoring.reading import gap, tolerance
from scalabl.tuner.layers import decoder_layers, sequence_classifier, unwrap
from scalabl.tuner.state import mean_of_any
from scalabl.tuner.threads import base_model, own

_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_whole: ContextVar[bool] = ContextVar("whole_rows", default=False)


@contextmanager
def whole_rows() -> Iterator[None]:
    """Within it this thread's passes compute every token of a row, for those who look at hidden states."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


@contextmanager
def read_token_alone(model: nn.Module, *, on_meta: bool = False) -> Iterator[None]:
    """Within it a sequence classifier computes what no other token needs for the token alone that its head reads, if it
    was found to be such a model.

    Args:
        model: the model.
        on_meta: its tensors have no numbers, with which it could be tried; its kind decides.
    """
    alone = _known.get(base_model(model), on_meta and _above_attention(model) is not None)
    with _first_token(model) if alone and not _whole.get() else nullcontext():
        yield


def reads_first_token(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether a head's logits are the same without the last layer's other tokens: tried once, where no particles and
    hooks are.

    Args:
        model: a sequence classifier.
        inputs: keywords of its forward pass, of a row or more.
    """
    base = base_model(model)
    if base not in _known:
        _known[base] = _above_attention(model) is not None and _tried(unwrap(model), inputs)
    return _known[base]


def known_first_token(model: nn.Module) -> bool:
    """What `reads_first_token` found; False before it was tried."""
    return _known.get(base_model(model), False)


def remember_first_token(model: nn.Module, found: bool) -> None:
    """Take over what another process has found out of the same model."""
    _known.setdefault(base_model(model), found)


@torch.no_grad()
def _tried(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    with eval_mode(model), mean_of_any(model):
        whole = model(**inputs).logits
        try:
            with _first_token(model):
                alone = model(**inputs).logits
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what stands above takes no shorter rows
            return False
    return alone.shape == whole.shape and gap(alone, whole) <= tolerance(model)


@contextmanager
def _first_token(model: nn.Module) -> Iterator[None]:
    def first(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value[:, :1] for value in args)

    above = _above_attention(model)
    assert above is not None
    handle = above.register_forward_pre_hook(own(first))
    try:
        yield
    finally:
        handle.remove()


def _above_attention(model: nn.Module) -> nn.Module | None:
    """What follows the mixing of tokens in the last layer of BERT and its kin; None of others, and of decoders."""
    base = sequence_classifier(model)
    if base is None or getattr(base.config, "is_decoder", False):
        return None
    above = getattr(getattr(decoder_layers(model)[-1], "attention", None), "output", None)
    return above if isinstance(above, nn.Module) and hasattr(above, "LayerNorm") else None
