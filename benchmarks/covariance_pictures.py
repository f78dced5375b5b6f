"""The covariance study's pictures: each a function from figures to an SVG file's text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from covariance_noise import POSITIONS
from covariance_posterior import KINDS, Position, layer_correlations, pairs, shown
from covariance_predictions import STRUCTURES
from covariance_study import RUNS
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.stats import halfnorm
from torch import Tensor

from scalabl.posterior.joint import JointGaussian
from scalabl.study.drawing import COLOURS, MUTED, RULE, blank, styled

MARKERS = ("o", "s", "D")
LINES = ("solid", "dashed", "dotted")
PREDICTIONS = {
    "nll": "NLL, nats",
    "ece": "ECE",
    "brier": "Brier",
    "accuracy": "accuracy",
    "ood_auroc_epistemic": "OOD AUROC, epistemic",
    "ood_auroc_total": "OOD AUROC, total",
}


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG file; the same text for the same figures."""
    out = io.StringIO()
    with styled(name):
        figure.savefig(out, format="svg", metadata={"Date": None, "Description": description})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def correlations(positions: Mapping[str, Position]) -> str:
    """Correlation matrices of the exact posteriors, their numbers ordered by layer."""
    panels = shown(positions)
    figure, ((*axes,),) = blank(3.6 * len(panels), 3.7, 1, len(panels))
    with styled():
        for axis, (name, joint, depth) in zip(axes, panels, strict=True):
            image = axis.imshow(joint.correlation().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            _decoder_layers(axis, joint, depth)
            axis.set_title(RUNS[name], fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8, label="correlation")
    described = "correlations between all numbers s in the exact posterior, ordered by layer"
    return svg(figure, "correlations", described)


def _decoder_layers(axis: Any, joint: JointGaussian, depth: Mapping[str, int]) -> None:
    """Lines between decoder layers, and their numbers as ticks."""
    middles: dict[int, list[float]] = {}
    last = None
    for name, rows in joint.blocks():
        if last is not None and depth[name] != last:
            axis.axhline(rows.start - 0.5, color=MUTED, linewidth=0.5)
            axis.axvline(rows.start - 0.5, color=MUTED, linewidth=0.5)
        last = depth[name]
        middles.setdefault(last, []).append((rows.start + rows.stop - 1) / 2)
    places, names = [float(np.mean(m)) for m in middles.values()], [str(number) for number in middles]
    axis.set_xticks(places, names)
    axis.set_yticks(places, names)
    axis.set_xlabel("decoder layer")


def sizes(positions: Mapping[str, Position]) -> str:
    """How large correlations are, by kind of pair: the share of pairs above each size."""
    panels = shown(positions)
    figure, ((*axes,),) = blank(3.1 * len(panels), 2.9, 1, len(panels), sharey=True)
    with styled():
        for axis, (name, joint, depth) in zip(axes, panels, strict=True):
            absolute = joint.correlation().abs()
            for kind, mask in pairs(joint.ranks, depth).items():
                values = absolute[mask].sort().values.numpy()
                if len(values):
                    above = 1 - np.arange(len(values)) / len(values)
                    look = KINDS.index(kind)
                    axis.step(values, above, color=COLOURS[look], linestyle=LINES[look], label=kind, where="post")
            axis.set(xlabel="|correlation|", xlim=(0, 1), yscale="log")
            axis.set_title(RUNS[name], fontsize=9)
            _plain_decades(axis.yaxis)
            axis.grid(True, color=RULE)
        axes[0].set_ylabel("share of pairs above")
        axes[-1].legend()
    described = "share of pairs whose correlation in the exact posterior is above a size, by kind of pair"
    return svg(figure, "sizes", described)


def _plain_decades(axis: Any) -> None:
    """0.01, 0.1, 1, ... on a logarithmic axis: powers would need mathematical text."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def predictions(rows: Sequence[dict[str, Any]]) -> str:
    """Each structure's difference to the joint posterior, with its interval, by metric and predictive."""
    predictives = [p for p in ("linearized", "mc") if any(row["predictive"] == p for row in rows)]
    names = [f"{structure}, {kept}" for structure, kept in STRUCTURES[1:]]
    figure, grid = blank(9.6, 4.6, 2, 3)
    with styled():
        for axis, (metric, heading) in zip([a for line in grid for a in line], PREDICTIONS.items(), strict=True):
            for k, predictive in enumerate(predictives):
                own = {
                    (row["structure"], row["kept"]): row
                    for row in rows
                    if (row["predictive"], row["metric"]) == (predictive, metric)
                }
                for y, structure in enumerate(STRUCTURES[1:]):
                    row, place = own[structure], y + 0.25 * (k - (len(predictives) - 1) / 2)
                    if row["difference"] is None:
                        continue
                    if row["difference_low"] is not None:
                        ends = (row["difference_low"], row["difference_high"])
                        axis.plot(ends, (place, place), color=COLOURS[k], linewidth=1.2)
                    label = {"linearized": "linearised", "mc": "Monte Carlo"}[predictive] if y == 0 else None
                    axis.plot(row["difference"], place, MARKERS[k], color=COLOURS[k], markersize=4, label=label)
            axis.axvline(0, color=MUTED, linewidth=0.8)
            axis.set_yticks(range(len(names)), names if axis in (grid[0][0], grid[1][0]) else [""] * len(names))
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_title(f"{heading}, difference to joint", fontsize=8)
            axis.grid(True, axis="x", color=RULE)
        grid[0][0].legend(fontsize=7)
    described = "difference of each structure's figures to those of the joint posterior, with 95 % intervals"
    return svg(figure, "predictions", described)


def learnt(at: Position, nulls: Mapping[str, Tensor], observed: float) -> str:
    """Learnt correlations against the exact ones, and their cosine among those of unrelated ones."""
    exact, _ = at.exact("own")
    best = layer_correlations(exact.restricted("layer", "conditional"))
    own = layer_correlations(at.learnt_relative())
    below = {name: torch.tril_indices(len(matrix), len(matrix), offset=-1) for name, matrix in own.items()}
    x, y = (torch.cat([of[name][tuple(below[name])] for name in own]).numpy() for of in (best, own))
    figure, ((scatter, histogram),) = blank(7.4, 3.2, 1, 2)
    with styled():
        scatter.axline((0, 0), slope=1, color=MUTED, linewidth=0.8)
        scatter.scatter(x, y, s=6, alpha=0.5, color=COLOURS[0], linewidths=0)
        limit = 1.05 * max(float(np.abs(x).max(initial=0)), float(np.abs(y).max(initial=0)), 0.01)
        scatter.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel="exact, other numbers known", ylabel="learnt")
        scatter.set_title("correlations within layers", fontsize=9)
        scatter.grid(True, color=RULE)
        for k, (null, values) in enumerate(nulls.items()):
            label = {"signs": "signs flipped", "order": "numbers shuffled"}[null]
            histogram.hist(
                values.numpy(), bins=40, histtype="step", color=COLOURS[k + 1], linestyle=LINES[k], label=label
            )
        histogram.axvline(observed, color=COLOURS[0], label="learnt")
        histogram.set(xlabel="cosine with the exact correlations", ylabel="number")
        histogram.legend(fontsize=7)
    return svg(figure, "learnt", "learnt correlations against exact ones; their cosine among those of unrelated ones")


def gradient_noise(ratios: Mapping[str, Mapping[str, Tensor]], draws: int) -> str:
    """The share of parameters whose |mean| / std of the gradient is below a value, by kind of parameter."""
    figure, ((*axes,),) = blank(7.4, 3.1, 1, len(POSITIONS), sharey=True)
    with styled():
        for axis, where in zip(axes, POSITIONS, strict=True):
            highest = 1.0
            for k, (kind, values) in enumerate(ratios[where].items()):
                ordered = values.sort().values.numpy()
                share = np.arange(1, len(ordered) + 1) / len(ordered)
                axis.step(ordered, share, color=COLOURS[k], linestyle=LINES[k], label=kind, where="post")
                highest = max(highest, float(np.quantile(ordered, 0.99)))
            x = np.geomspace(0.003, highest, 200)
            axis.plot(x, halfnorm.cdf(x * draws**0.5), color=MUTED, linewidth=0.9, label="noise alone")
            axis.set(xscale="log", xlim=(0.003, highest), xlabel="|mean gradient| / std over draws")
            axis.set_title({"start": "after a few steps", "end": "at the end"}[where], fontsize=9)
            _plain_decades(axis.xaxis)
            axis.grid(True, color=RULE)
        axes[0].set_ylabel("share of parameters below")
        axes[-1].legend(fontsize=7)
    return svg(figure, "gradient_noise", "signal-to-noise ratio of the gradient by kind of parameter")
