"""Bootstrap over rows: how far a figure would move had other rows been drawn (Efron 1979).

A resample is kept as counts, how often each row was drawn. Every metric here is a function of such counts, so
a thousand resamples are a few matrix products and no sort. The counts depend on rows, resamples and seed
alone: two methods judged on the same rows with one seed share their resamples (a paired bootstrap).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from scalabl.core.errors import UserError

_CHUNK = 4_000_000  # counts in memory at a time (32 MB)


@dataclass(frozen=True)
class Metric:
    """A figure with the ends of its interval; all None with the `reason` where it is not defined."""

    value: float | None
    low: float | None
    high: float | None
    reason: str | None = None


def resamples(rows: int, bootstrap: int, seed: int) -> Iterable[Tensor]:
    """Counts (k, rows) float64 of `bootstrap` resamples, in chunks of k; each resample sums to `rows`."""
    # A table asks for the same resamples again and again: what fits in one chunk is kept.
    return _kept(rows, bootstrap, seed) if rows * bootstrap <= _CHUNK else _draw(rows, bootstrap, seed)


@lru_cache(maxsize=2)
def _kept(rows: int, bootstrap: int, seed: int) -> tuple[Tensor, ...]:
    return tuple(_draw(rows, bootstrap, seed))


def _draw(rows: int, bootstrap: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _CHUNK // rows)
    for start in range(0, bootstrap, step):
        k = min(step, bootstrap - start)
        drawn = torch.randint(rows, (k, rows), generator=generator) + rows * torch.arange(k)[:, None]
        yield torch.bincount(drawn.flatten(), minlength=k * rows).view(k, rows).double()


def interval(
    value: float, draws: Tensor, confidence: float, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Metric:
    """The percentile interval of the resampled values `draws` (k,), moved by the bootstrap's own bias.

    Resampling adds noise to each bin of ECE and the absolute value turns noise into bias: its plain
    percentiles can lie wholly above the figure they belong to. So mean(draws) - value is taken off both ends;
    for the other metrics that bias is nil. Ends are kept within `bounds`. Undefined resamples (NaN) are left
    out.
    """
    draws = draws[~draws.isnan()]
    if draws.numel() == 0:
        return Metric(value, None, None, "no interval: the figure is undefined in every resample")
    tail = (1 - confidence) / 2
    ends = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)) - (draws.mean() - value)
    # Rounding must not put the figure a hair outside its own interval.
    low, high = min(ends[0].item(), value), max(ends[1].item(), value)
    return Metric(value, max(low, bounds[0]), min(high, bounds[1]))


def judged(
    figures: Mapping[str, Callable[[Tensor], Tensor]],
    rows: int,
    bootstrap: int,
    seed: int,
    confidence: float,
    bounds: Mapping[str, tuple[float, float]],
    undefined: Mapping[str, str],
) -> dict[str, Metric]:
    """Figures with their intervals, from one walk through the resamples.

    Args:
        figures: name -> the figure as a function of counts (k, rows) -> (k,).
        rows: how many there are.
        bootstrap, seed, confidence: of the intervals.
        bounds: the ends of a figure's range.
        undefined: why a figure has no value; the others are computed alone.
    """
    defined = {name: figure for name, figure in figures.items() if name not in undefined}
    chunks = [{name: figure(counts) for name, figure in defined.items()} for counts in resamples(rows, bootstrap, seed)]
    once = torch.ones(1, rows, dtype=torch.float64)
    found = {name: Metric(None, None, None, reason) for name, reason in undefined.items()}
    for name, figure in defined.items():
        draws = torch.cat([chunk[name] for chunk in chunks])
        found[name] = interval(figure(once).item(), draws, confidence, bounds.get(name, (-math.inf, math.inf)))
    return {name: found[name] for name in figures}


def by_rows(figure: Callable[[Tensor], Tensor], per_row: int) -> Callable[[Tensor], Tensor]:
    """A figure of questions as one of rows with `per_row` questions each, which are drawn together.

    Args:
        figure: counts (k, n per_row) -> (k,).
        per_row: questions of a row, behind each other.

    Returns:
        counts (k, n) -> (k,).
    """
    if per_row == 1:
        return figure

    def grouped(counts: Tensor) -> Tensor:
        at_once = max(1, _CHUNK // (counts.shape[1] * per_row))
        return torch.cat([figure(part.repeat_interleave(per_row, dim=1)) for part in counts.split(at_once)])

    return grouped


def check_settings(bootstrap: int = 1, confidence: float = 0.95, num_bins: int = 1) -> None:
    """Raises UserError unless there is at least one resample and one bin, and 0 < confidence < 1."""
    if bootstrap < 1:
        raise UserError(f"bootstrap must be at least 1 resample, not {bootstrap}; 1000 is usual.")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1, not {confidence}; 0.95 is usual.")
    if num_bins < 1:
        raise UserError(f"num_bins must be at least 1, not {num_bins}; 15 is usual.")
