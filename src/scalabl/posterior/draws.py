"""Draws by particle number: particle 7 is the same noise today, tomorrow and on another machine.

A counter-based generator (Philox) is keyed by (seed, stream) and its counter set to the particle's number, so any
particle is had without drawing the ones before it. The bits go through the normal quantile in float64.

Kinds of draws: N particles of all layers whose average comes nearer to the expectation than independent ones do.

    independent   z_n                        error of the average ~ 1 / sqrt(N); particle n depends on n alone
    antithetic    z_0, -z_0, z_1, -z_1 ...   odd functions of z are averaged exactly (even N)
    sobol         ndtri(scrambled Sobol)     sums of functions of one coordinate each are averaged best
    moments       whitened independent ones  linear functions of all, quadratic ones of a layer, are averaged exactly

Every particle of the first three kinds is N(0, I) on its own, so that their averages are unbiased, and their first n
particles are those of a smaller N. Moment-matched draws depend on N and are N(0, I) only as N grows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from scalabl.core.errors import UserError


def uniform(particles: Sequence[int], size: int, *, seed: int, stream: str) -> Tensor:
    """Uniform numbers in (0, 1), shape (len(particles), size), float64.

    Args:
        particles: the numbers of the particles, each at least 0.
        size: how many numbers a particle has.
        seed: the seed.
        stream: a name, usually the layer's: streams are independent of each other.
    """
    digest = hashlib.sha256(f"{seed}|{stream}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    bits = np.empty((len(particles), size), dtype=np.uint64)
    for row, particle in enumerate(particles):
        # the counter's second word is the particle's number: 2^64 blocks apart, streams never meet
        counter = np.array([0, particle, 0, 0], dtype=np.uint64)
        bits[row] = np.random.Philox(key=key, counter=counter).random_raw(size)
    # 53 bits, centred in their cell, so that 0 and 1 never occur
    return torch.from_numpy(((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53)


def standard_normal(particles: Sequence[int], size: int, *, seed: int, stream: str) -> Tensor:
    """Standard normal noise of the named particles, shape (len(particles), size), float32, on the CPU."""
    return torch.special.ndtri(uniform(particles, size, seed=seed, stream=stream)).float()


def noise(kind: str, samples: int, layers: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Standard normal noise of N particles for every layer.

    Args:
        kind: "independent", "antithetic", "sobol" or "moments".
        samples: N, at least 1 (moments: 2).
        layers: layer name -> r, in the model's order.
        seed: the seed.

    Returns:
        layer name -> (N, r), float32, on the CPU; row n of every layer belongs to particle n.

    Raises:
        UserError: there is no such kind, too few samples, or more numbers than a Sobol sequence has dimensions.
    """
    if kind not in KINDS:
        raise UserError(f"There are no {kind!r} draws; choose one of {', '.join(KINDS)}.")
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1.")
    if kind == "moments" and samples < 2:
        raise UserError("One particle has no variance to match: moments needs at least 2 samples.")
    return KINDS[kind](samples, layers, seed) if layers else {}


def independent(samples: int, layers: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Particle n is the same in every run of a seed, whatever N is and whichever other layers there are."""
    return {name: standard_normal(range(samples), r, seed=seed, stream=name) for name, r in layers.items()}


def antithetic(samples: int, layers: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Particles 2 k and 2 k + 1 are z_k and -z_k, in all layers at once [Hammersley and Morton 1956].

    z_k is particle k of the independent draws. With an odd N the last one has no partner.
    """
    half = independent((samples + 1) // 2, layers, seed)
    return {name: torch.stack([z, -z], dim=1).flatten(0, 1)[:samples] for name, z in half.items()}


def sobol(samples: int, layers: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """N points of one scrambled Sobol sequence over the numbers of all layers, through the normal quantile.

    D = sum of r dimensions; a layer reads its own coordinates, in the order of `layers`. The scramble (a random
    matrix and a digital shift [Matousek 1998], from torch's SobolEngine) makes each point uniform on its own. Each
    coordinate visits every one of N equal cells once where N is a power of two.

    Raises:
        UserError: D is above the 21,201 dimensions for which direction numbers are known [Joe and Kuo 2008].
    """
    dimensions = sum(layers.values())
    if dimensions > torch.quasirandom.SobolEngine.MAXDIM:
        raise UserError(
            f"The adapter has {dimensions:,} random numbers, but a Sobol sequence at most "
            f"{torch.quasirandom.SobolEngine.MAXDIM:,} dimensions; choose antithetic or moments."
        )
    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed)
    # points are multiples of 2^-30: half a cell keeps them off 0, where the quantile is infinite
    uniform = engine.draw(samples, dtype=torch.float64) + 2.0**-31
    return dict(zip(layers, torch.special.ndtri(uniform).float().split(list(layers.values()), dim=1), strict=True))


def moments(samples: int, layers: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Independent draws, shifted and whitened: over the N particles a layer's mean is 0 and its covariance I.

    Where N > r, X (N, r), centred, becomes sqrt(N) U V^T with X = U S V^T: of all matrices with those moments the
    nearest to X. Where N <= r no N particles have such a covariance: each coordinate is scaled to variance 1.
    [Moment matching: Boyle, Broadie and Glasserman 1997; the whole covariance: quadratic resampling,
    Barraquand 1995.] A number's fourth moment is 3 (N - 1) / (N + 1) rather than 3.
    """
    return {name: _matched(z) for name, z in independent(samples, layers, seed).items()}


def _matched(z: Tensor) -> Tensor:
    samples, r = z.shape
    centred = z.double() - z.double().mean(dim=0)
    if samples > r:
        left, _, right = torch.linalg.svd(centred, full_matrices=False)
        return (samples**0.5 * left @ right).float()
    return (centred / centred.square().mean(dim=0).sqrt()).float()


KINDS: dict[str, Callable[[int, Mapping[str, int], int], dict[str, Tensor]]] = {
    "independent": independent,
    "antithetic": antithetic,
    "sobol": sobol,
    "moments": moments,
}
