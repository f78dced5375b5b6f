"""Shared prompts: the tokens with which all rows begin (an instruction, a few-shot block), encoded once a particle.

The rows are cut behind them. In every layer a row's tokens see the prefix's keys and values, of the row's own particle;
below the layer where particles begin to differ these are encoded once for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from scalabl.core.modules import eval_mode
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.scorer import Scorer
from scalabl.scoring.trunk import token_logits
from scalabl.tuner.layers import active_adapters, unwrap

LEAST = 16  # tokens, under which sharing them is not worth a pass of its own
LEAST_SHARE = 0.2  # of a row
TOLERANCE = 1e-3  # between a row's class probabilities behind the prefix and whole, in float32

KeysValues = dict[int, tuple[Tensor, Tensor]]  # decoder layer -> keys and values (particles, heads, P, d)


class SharedPrefix:
    """The first P tokens of every row, and their keys and values under each particle.

    Args:
        scorer: the model with its scoring.
        row: the P tokens.
    """

    def __init__(self, scorer: Scorer, row: Encoded) -> None:
        self.row = row
        self.length = len(row.input_ids)
        self._whole = scorer.scoring.collate([row]).to(scorer.device)
        self._owner: tuple[object, ...] = ()
        self._forget()

    def _forget(self) -> None:
        self.batch = self._whole  # moves up to the layer where particles begin to differ
        self._below: KeysValues = {}
        self._of: dict[Hashable, KeysValues] = {}

    def claim(self, owner: object, model: nn.Module) -> None:
        """Forget what was encoded for another owner (a predictive), another adapter or other weights."""
        versions = sum(0 if p.is_inference() else p._version for p in model.parameters())
        present = (owner, tuple(active_adapters(unwrap(model))), versions)
        if present != self._owner:
            self._forget()
            self._owner = present

    def begins(self, row: Encoded) -> bool:
        """Whether a row can be cut behind the prefix: it begins with it, and a token of its prompt is left."""
        if row.images is not None:  # its positions are the model's own, of a whole row
            return False
        alike = (row.trunk is None) == (self.row.trunk is None) and common_length([self.row, row]) == self.length
        return alike and row.segments[self.length : self.length + 1] == [0]

    def cut(self, row: Encoded) -> Encoded:
        """The row's tokens behind the prefix."""
        return row.part(slice(self.length, None))

    @torch.no_grad()
    def below(self, scorer: Scorer, start: int) -> Cache:
        """The prefix's keys and values below layer `start`, where all particles agree."""
        trunk = scorer.trunk
        if trunk is not None and trunk.start_of(self.batch) < start:
            cache = DynamicCache()
            hidden = trunk.encode(scorer.model, self.batch, start, cache)
            self._below |= _keys_values(cache)
            self.batch = replace(self.batch, trunk=hidden, start=start)
        return _Behind(self._below)

    @torch.no_grad()
    def cache(self, scorer: Scorer, batch: Batch) -> Cache:
        """The prefix's keys and values for the particles of a batch, from the layer on that the batch begins at.

        The model is in the state that the batch will meet, so that it can encode the particles not met before. The
        prefix itself has been brought to that layer by `below`.
        """
        if any(particle not in self._of for particle in batch.particles):
            found = DynamicCache()
            copies = self.batch.repeat(len(batch.particles), batch.particles)
            token_logits(scorer.model, copies, scorer.trunk, cache=found)
            for i, particle in enumerate(batch.particles):
                self._of[particle] = {n: (k[i : i + 1], v[i : i + 1]) for n, (k, v) in _keys_values(found).items()}
        each = [self._of[particle] for particle in batch.particles]
        return _Behind({n: (_cat([kv[n][0] for kv in each]), _cat([kv[n][1] for kv in each])) for n in each[0]})


class _Behind(DynamicCache):
    """Puts the prefix's keys and values in front of the rows', layer by layer, and keeps nothing."""

    def __init__(self, before: KeysValues) -> None:
        super().__init__()
        self.before = before

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = self.before[layer_idx]
        each = key_states.shape[0] // keys.shape[0]
        return (
            torch.cat([keys.repeat_interleave(each, dim=0), key_states], dim=-2),
            torch.cat([values.repeat_interleave(each, dim=0), value_states], dim=-2),
        )


def shared_prefix(scorer: Scorer, rows: Sequence[Encoded]) -> SharedPrefix | None:
    """What all rows begin with, where it is worth encoding on its own and the model gives the same answers behind it.

    Args:
        scorer: the model with its scoring.
        rows: the encoded rows.
    """
    if (
        len(rows) < 2
        or scorer.shares_prefix is False
        or not scorer.scoring.shares_prefix
        or any(row.images is not None for row in rows)
    ):
        return None
    # each row keeps a token of its prompt: its logits are the first that are read
    length = min(common_length(rows), *(row.segments.count(0) - 1 for row in rows))
    mean = sum(len(row.input_ids) for row in rows) / len(rows)
    if length < max(LEAST, LEAST_SHARE * mean):
        return None
    if not scorer.reads_packed(rows):
        return None
    prefix = SharedPrefix(scorer, rows[0].part(slice(length)))
    return prefix if agrees(scorer, prefix, rows[0]) else None


def agrees(scorer: Scorer, prefix: SharedPrefix, row: Encoded) -> bool:
    """Whether a row has the same class probabilities behind the prefix as whole; tried once a scorer."""
    if scorer.shares_prefix is None:
        behind = replace(scorer.scoring.collate([prefix.cut(row)]).to(scorer.device), prefix=prefix)
        try:
            with eval_mode(scorer.model), torch.no_grad():
                whole = scorer.class_log_probs(scorer.scoring.collate([row]).to(scorer.device)).exp()
                gap = (scorer.class_log_probs(behind).exp() - whole).abs().max().item()
        except Exception:  # an architecture whose cache is of another kind: its rows are run whole
            gap = float("inf")
        dtype = next(p.dtype for p in scorer.model.parameters() if p.is_floating_point())
        scorer.shares_prefix = gap <= TOLERANCE * (1 if dtype == torch.float32 else 50)
        prefix.claim(None, scorer.model)
    return scorer.shares_prefix


def common_length(rows: Sequence[Encoded]) -> int:
    """How many tokens of the prompt all rows begin with, at the same positions."""
    length = min(len(row.input_ids) for row in rows)
    first = [*zip(rows[0].input_ids, rows[0].position_ids, itertools.repeat(0), strict=False)]
    for row in rows:
        tokens = zip(row.input_ids[:length], row.position_ids, row.segments, strict=False)
        length = next((i for i, (own, other) in enumerate(zip(tokens, first, strict=False)) if own != other), length)
    return length


def _keys_values(cache: DynamicCache) -> KeysValues:
    layers: list[Any] = cache.layers
    return {n: (layer.keys, layer.values) for n, layer in enumerate(layers) if layer.is_initialized}


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
