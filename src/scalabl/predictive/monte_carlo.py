"""The Monte Carlo predictive: p(y | x) = 1/N sum_n p(y | x, s_n), the particles as rows of one batch.

Which stochastic layers a predictive draws, and the lowest of them: below it all particles are one. How many particles
fit into memory at once.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.core.modules import check_spec, top_layers
from scalabl.posterior.draws import noise
from scalabl.scoring.base import Batch
from scalabl.scoring.scorer import Scorer
from scalabl.tuner.layers import depths, sequence_classifier, stochastic_layers
from scalabl.tuner.state import noise_particles, only, particles


def drawn_layers(model: nn.Module, spec: str | None) -> dict[str, int]:
    """The stochastic layers that are drawn, with their depths; empty where the model has no posterior over s.

    Args:
        model: a PEFT model.
        spec: "last:K" or a fraction "last:0.25" of the stochastic layers; None for all.

    Raises:
        UserError: there are fewer such layers.
    """
    try:
        names = stochastic_layers(model)
    except UserError:
        return {}
    found = depths(model, names)
    return found if spec is None else {name: found[name] for name in top_layers(found, spec)}


def first_difference(model: nn.Module, spec: str | None) -> int | None:
    """The lowest decoder layer that is drawn; None for a baseline, whose noise begins at the lowest adapted layer."""
    return min(drawn_layers(model, spec).values(), default=None)


def restricted(model: nn.Module, spec: str | None) -> AbstractContextManager[None]:
    """Context in which the stochastic layers that are not drawn carry their mean."""
    return nullcontext() if spec is None else only(model, drawn_layers(model, spec))


# a fraction of what is free: other programs, fragmentation and the estimate's own error need the rest
_SHARE = 0.4
_CPU_LIMIT = 2 * 2**30


def bytes_per_particle(model: nn.Module, batch: Batch) -> int:
    """An upper estimate of the memory that one more particle of this batch takes in a forward pass without gradient."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows, length = batch.input_ids.shape
    width = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", 4 * hidden) or 4 * hidden
    # residual, normalised, q/k/v/out, and the MLP's three inner tensors; the mask; logits in float32 beside their own
    activations = rows * length * (6 * hidden + 3 * inner) * width
    before = 0 if batch.prefix is None else batch.prefix.length
    mask = rows * length * (before + length) * width
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    # the particle's own keys and values of the prefix in every layer, and their copies for the rows in one
    prefix = before * 2 * heads * head_size * width * (config.num_hidden_layers + rows)
    read = rows * batch.keep * config.vocab_size if sequence_classifier(model) is None else rows * config.num_labels
    logits = read * (width + 4)
    return activations + mask + prefix + logits


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _CPU_LIMIT)
    except (ValueError, OSError):
        return _CPU_LIMIT


def particles_at_once(model: nn.Module, batch: Batch, wanted: int) -> int:
    """How many of `wanted` particles of this batch to run together, at least 1."""
    budget = _SHARE * free_bytes(batch.input_ids.device)
    return max(1, min(wanted, int(budget // bytes_per_particle(model, batch))))


class MonteCarloPredictive:
    """N fixed draws, the same for every input and every run of the same seed [ScalaBL, Bayesian model average].

    Args:
        samples: N, at least 1.
        seed: the seed of the draws.
        chunk: how many particles at once; None fits them to the free memory. The answers do not depend on it.
        draws: "independent", "antithetic", "sobol" or "moments" (`scalabl.posterior.draws`).
        stochastic_layers: draw s in the top layers alone, "last:K" or a fraction "last:0.25", the others at their mean.
        scale: tau, by which the posterior's standard deviations are multiplied.

    Raises:
        UserError: N is below 1, there are no such draws or layers, or they cannot be of this N.
    """

    name = "mc"
    shares_prefix = True
    has_scale = True  # of a posterior, which other noise is not

    def __init__(
        self,
        samples: int = 10,
        *,
        seed: int = 0,
        chunk: int | None = None,
        draws: str = "independent",
        stochastic_layers: str | None = None,
        scale: float = 1.0,
    ) -> None:
        if samples < 1:
            raise UserError(f"samples is {samples}; it must be at least 1.")
        noise(draws, samples, {}, seed)  # refuses what there is not, before any pass
        if stochastic_layers is not None:
            check_spec(stochastic_layers)
        self.samples = samples
        self.seed = seed
        self.chunk = chunk
        self.draws = draws
        self.stochastic_layers = stochastic_layers
        self.scale = scale
        self._all_noise: dict[tuple[tuple[str, int], ...], dict[str, Tensor]] = {}

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        return self.draw(scorer, batch, 0, self.samples)

    def draw(self, scorer: Scorer, batch: Batch, first: int, samples: int) -> Tensor:
        """(samples, B, C) log class probabilities of the particles first .. first + samples - 1, in chunks."""
        batch = self.begun(scorer, batch)
        at_once = self.chunk or particles_at_once(scorer.model, batch, samples)
        parts, end = [], first + samples
        while first < end:
            number = min(at_once, end - first)
            try:
                parts.append(self._chunk(scorer, batch, first, number))
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                at_once //= 2  # smaller chunks, same particles
                torch.cuda.empty_cache()
                continue
            first += number
        return torch.cat(parts)

    def begun(self, scorer: Scorer, batch: Batch) -> Batch:
        """The batch at the lowest layer that is drawn: below it all particles are one, and run once."""
        return scorer.with_trunk(batch, first_difference(scorer.model, self.stochastic_layers))

    def context(self, model: nn.Module, first: int, number: int) -> AbstractContextManager[None]:
        """Context in which a batch of `number` B rows carries the particles first .. first + number - 1."""
        if self.draws == "independent":
            return particles(model, number, seed=self.seed, first=first, scale=self.scale)
        of_these = {name: z[first : first + number] for name, z in self._noise_of(model).items()}
        return noise_particles(model, of_these, self.scale)

    def _noise_of(self, model: nn.Module) -> dict[str, Tensor]:
        """(N, r) noise by layer, drawn once for a model's layers: these draws know of each other."""
        layers = {name: leaf.out_features for name, leaf in stochastic_layers(model).items()}
        key = tuple(layers.items())
        if key not in self._all_noise:
            self._all_noise[key] = noise(self.draws, self.samples, layers, self.seed)
        return self._all_noise[key]

    def _chunk(self, scorer: Scorer, batch: Batch, first: int, number: int) -> Tensor:
        with self.context(scorer.model, first, number), restricted(scorer.model, self.stochastic_layers):
            log_probs = scorer.class_log_probs(batch.repeat(number, range(first, first + number)))
        return log_probs.view(number, len(batch), -1)
