"""The trunk: the lower decoder layers, computed once where they are the same for everybody.

What lies below the lowest adapted layer is the same for every particle, step and epoch, and can be stored. While
predicting, what lies below the lowest *stochastic* layer is the same for every particle. A trunk is run once for a row,
stopping at the layer where the difference begins; from then on that layer is fed the hidden states and the layers below
are passed through.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache

from scalabl.core.errors import UserError, first_line
from scalabl.scoring.base import Batch
from scalabl.scoring.read_token import read_token_alone
from scalabl.scoring.reading import packed_logits, plain_logits, reads_packed, turns
from scalabl.tuner.layers import decoder_layers, depths, reads_token_types, sequence_classifier
from scalabl.tuner.threads import alone, own


class _Reached(Exception):
    """The trunk's end: the forward pass goes no further."""


class _StandIn(nn.Module):
    """Stands in for a layer of the trunk in the passes of one thread; in those of others the layer is itself.

    Args:
        layer: the layer, whose attributes the model may read (the kind of its attention).
        hidden: the stored hidden states, which the first layer hands on; None for the others, which hand on what they
            are given.
        outputs: how many things the layer returns, where it is a tuple of them.
    """

    def __init__(self, layer: nn.Module, hidden: Tensor | None, outputs: int | None) -> None:
        super().__init__()
        self.layer = (layer,)  # no part of this module, so that no name changes
        self.hidden = hidden
        self.outputs = outputs
        self.thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # a compiled pass is of the thread that compiles it
        if not torch.compiler.is_compiling() and self.thread != threading.get_ident():
            return self.layer[0](hidden_states, *args, **kwargs)
        given = hidden_states if self.hidden is None else self.hidden.to(hidden_states.dtype)
        return given if self.outputs is None else (given, *[None] * (self.outputs - 1))


class Trunk:
    """The lower decoder layers of a model.

    Args:
        model: a model with an adapter.

    Attributes:
        depth: how many decoder layers lie below the lowest adapted one; 0 means that there is nothing to store.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = decoder_layers(model)
        self.depth = lowest_adapted_layer(model, self.layers)
        self._resumes: dict[int, bool] = {}
        self._outputs: int | None = None  # of a layer that returns a tuple

    def start_of(self, batch: Batch) -> int:
        """The decoder layer that a batch begins at: the one its hidden states enter, 0 where it has none."""
        if batch.trunk is None:
            return 0
        return self.depth if batch.start is None else batch.start

    @torch.no_grad()
    def encode(self, model: nn.Module, batch: Batch, start: int | None = None, cache: Cache | None = None) -> Tensor:
        """The hidden states (B, T, d) that enter layer `start`, computed from where the batch begins.

        Args:
            model: the model.
            batch: the rows.
            start: a decoder layer, or their number for what follows them; `depth` if None.
            cache: keys and values of what stands before the rows.
        """
        start = self.depth if start is None else start
        if reads_packed(model, batch):
            return self._entering(
                model, start, lambda: token_logits(model, batch, self, cache=cache), batch.trunk is None
            )
        found: Tensor | None = None
        for number, turn in turns(batch, model):
            before = nullcontext() if batch.trunk is None else self.resume(model, turn.of(batch.trunk), batch.start)
            with before:
                run = partial(model, **turn.inputs(model, batch))
                hidden = self._entering(model, start, run, batch.trunk is None)
            if found is None:
                found = hidden.new_zeros(*batch.input_ids.shape, hidden.shape[-1])
            rows, columns = ((batch.segments == 0) | (batch.segments == number)).nonzero(as_tuple=True)
            found[rows, columns] = hidden[rows, turn.place[rows, columns]]
        assert found is not None
        return found

    def _entering(self, model: nn.Module, start: int, run: Callable[[], object], whole: bool) -> Tensor:
        """What enters layer `start` in a pass of the model, which goes no further; `whole`: from the lowest layer."""
        reached: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        def see(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._outputs = len(output) if isinstance(output, tuple) else None

        after = self.layers[start] if start < len(self.layers) else final_norm(model)
        handles = [after.register_forward_pre_hook(own(stop), with_kwargs=True)]
        if whole and start > 0:
            handles.append(self.layers[0].register_forward_hook(own(see)))
        try:
            run()
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return reached[0]

    @contextmanager
    def resume(self, model: nn.Module, hidden: Tensor, start: int | None = None) -> Iterator[None]:
        """Within it this thread's passes start from `hidden` (B, T, d) at layer `start`; `depth` if None."""
        with alone(model):
            original = list(self.layers[: self.depth if start is None else start])
            try:
                for i, layer in enumerate(original):
                    self.layers[i] = _StandIn(layer, hidden if i == 0 else None, self._outputs)
                yield
            finally:
                for i, layer in enumerate(original):
                    self.layers[i] = layer

    def check(self, model: nn.Module, batch: Batch, start: int | None = None, tolerance: float = 1e-3) -> None:
        """Refuse a model that does not give the same logits from its trunk.

        Raises:
            UserError: the logits differ by more than `tolerance` of their spread.
        """
        start = self.depth if start is None else start
        with torch.no_grad():
            whole = token_logits(model, batch, self).float()
            try:
                resumed_at = replace(batch, trunk=self.encode(model, batch, start), start=start)
                resumed = token_logits(model, resumed_at, self).float()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # layers that take or give other things than hidden states
                why = first_line(error)
                raise UserError(f"This architecture cannot resume from a cached trunk ({why}).") from error
        gap = ((whole - resumed).abs().max() / whole.std()).item()
        if not gap <= tolerance * (1 if whole.dtype == torch.float32 else 50):
            raise UserError(f"This architecture cannot resume from a cached trunk (logits differ by {gap:.2g} std).")
        self._resumes[start] = True

    def resumes(self, model: nn.Module, batch: Batch, start: int) -> bool:
        """Whether the model gives the same logits from this layer on, tried once, with the model at its mean."""
        if start not in self._resumes and start > 0:
            try:
                self.check(model, batch, start)
            except UserError:
                self._resumes[start] = False
        return self._resumes.get(start, True)


def lowest_adapted_layer(model: nn.Module, layers: nn.ModuleList) -> int:
    """The index of the lowest decoder layer with an adapter or anything else that is trained; their number if only
    what follows them is."""
    adapted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) or any(p.requires_grad for p in module.parameters(False))
    ]
    return min(depths(model, adapted).values(), default=len(layers))


def final_norm(model: nn.Module) -> nn.Module:
    """The normalisation between the last decoder layer and the output layer.

    Raises:
        UserError: there is none by a known name.
    """
    known = re.compile(r"(^|\.)(norm|ln_f|norm_f|final_layernorm|embedding_norm)$")
    named = [(name, m) for name, m in model.named_modules() if known.search(name)]
    if not named:
        raise UserError("This model has no final normalisation by a known name; adapt at least one decoder layer.")
    return named[-1][1]


def token_logits(
    model: torch.nn.Module,
    batch: Batch,
    trunk: Trunk | None,
    positions: tuple[Tensor, Tensor] | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Logits at some positions, from the trunk's hidden states where the batch carries them; those of its head, which
    have no positions, of a sequence classifier.

    Args:
        model: a causal language model, or a sequence classifier.
        batch: the rows.
        trunk: the lower layers, or None.
        positions: rows (M,) and columns (M,), among the last `batch.keep`; all of these if None.
        cache: keys and values of the prefix that the rows stand behind; or one to be filled with the rows' own.

    Returns:
        (M, V), or (B, keep, V) without positions; (B, C) of a head.
    """
    if sequence_classifier(model) is not None:
        with (
            nullcontext() if trunk is None or batch.trunk is None else trunk.resume(model, batch.trunk, batch.start),
            read_token_alone(model, on_meta=batch.input_ids.is_meta),
        ):
            of_head: Tensor = model(**head_inputs(model, batch)).logits
        return of_head

    def resume(hidden: Tensor) -> AbstractContextManager[None]:
        assert trunk is not None
        return trunk.resume(model, hidden, batch.start)

    if not reads_packed(model, batch):
        return plain_logits(model, batch, positions, None if trunk is None else resume)
    with nullcontext() if trunk is None or batch.trunk is None else resume(batch.trunk):
        return packed_logits(model, batch, positions, cache)


def head_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Keywords of a sequence classifier's forward pass."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": (batch.segments >= 0).long()}
    if batch.token_types is not None and reads_token_types(model):
        inputs["token_type_ids"] = batch.token_types
    return inputs
