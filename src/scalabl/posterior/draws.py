"""Draws by particle number: particle 7 is the same noise today, tomorrow and on another machine.

A counter-based generator (Philox) is keyed by (seed, stream) and its counter set to the particle's number, so any
particle is had without drawing the ones before it. The bits go through the normal quantile in float64.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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
