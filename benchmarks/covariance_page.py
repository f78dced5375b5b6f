"""The covariance study's page and pictures: each picture a function from figures to an SVG file's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from covariance_effects import POSITIONS, STRUCTURES
from covariance_posterior import KINDS, RUNS, Position, correlation_of, layer_correlations, off_diagonals, pairs, shown
from harness import excludes_zero, markdown_facts, svg, table
from matplotlib.ticker import NullFormatter
from scipy.stats import halfnorm
from torch import Tensor

from scalabl.posterior.joint import JointGaussian
from scalabl.study.look import COLOURS, MUTED, RULE, blank, styled

Rows = Sequence[dict[str, Any]]
PRIOR = {"own": "its own", "evidence": "of the highest evidence"}
PREDICTIVES = {"mean": "one pass, no noise", "linearized": "linearised", "mc": "Monte Carlo"}
METRICS = {
    "nll": "NLL, nats",
    "ece": "ECE",
    "brier": "Brier",
    "accuracy": "accuracy",
    "ood_auroc_epistemic": "OOD AUROC, epistemic",
    "ood_auroc_total": "OOD AUROC, total",
}
MARKERS = ("o", "s", "D")
LINES = ("solid", "dashed", "dotted")


def page(tables: Mapping[str, Rows], known: dict[str, str], sizes: Mapping[str, str]) -> str:
    """The results as a page; parts that are not done yet are left out.

    Args:
        tables: by name, as they are written to CSV.
        known: the facts of the measurement.
        sizes: "samples", "points", "draws", "batches" as text.
    """
    parts = ["# Correlations in the posterior of s", _INTRODUCTION]
    sections = {"posterior": _posterior, "predictions": _predictions, "learnt": _learnt, "gradient_noise": _noise}
    for needed, write in sections.items():
        if needed in tables:
            parts += write(tables, sizes)
    return "\n\n".join([*parts, "## Measurement", markdown_facts(known)]).strip() + "\n"


_INTRODUCTION = """\
The exact posterior here is the Gaussian whose precision is the Gauss-Newton matrix H of all s of all layers together
plus the prior's precision, at the weights of a finished run (`scalabl.training.posthoc`). For a plain LoRA, s are the
relative strengths of the components of B A (its SVD); for ScalaBL, its own s. Where fewer rows than the run's were
used, H is scaled up to all of them. p is the exact posterior, q a Gaussian without some of its correlations: "layer"
keeps those within a layer, "diagonal" none; "marginal" keeps blocks of the covariance, "conditional" blocks of the
precision, which is what a variational approximation of that form finds."""


def _weights(row: Mapping[str, Any]) -> str:
    return f"{RUNS[row['weights']]}, {PRIOR[row['prior']]}"


def _posterior(tables: Mapping[str, Rows], sizes: Mapping[str, str]) -> list[str]:
    exact = table(
        tables["posterior"],
        ("weights", lambda row: f"{RUNS[row['weights']]}, prior {PRIOR[row['prior']]}"),
        ("numbers", "{numbers}"),
        ("effective", "{effective_parameters:.1f}"),
        ("prior std", "{prior_std:.3g}"),
        ("training NLL", lambda row: f"{-row['log_likelihood']:.3f}"),
    )
    of_pairs = table(
        tables["correlations"],
        ("weights, prior", _weights),
        ("pairs", "{pairs}"),
        ("number", "{number:,}"),
        ("rms", "{rms:.3f}"),
        ("median", "{median:.3f}"),
        ("90 %", "{quantile_90:.3f}"),
        ("99 %", "{quantile_99:.3f}"),
        ("largest", "{largest:.3f}"),
        ("> 0.1, %", lambda row: f"{100 * row['above_0.1']:.1f}"),
        ("> 0.3, %", lambda row: f"{100 * row['above_0.3']:.1f}"),
    )
    apart = table(
        tables["divergences"],
        ("weights, prior", _weights),
        ("kept", "{structure}, {kept}"),
        ("KL(p‖q)", "{kl_p_q:.2f}"),
        ("KL(q‖p)", "{kl_q_p:.2f}"),
        ("std q / std p", "{std_ratio:.3f}"),
    )
    return [
        "## How far the exact posterior is from diagonal",
        "![Correlation matrices of the exact posteriors, by layer](correlations.svg)",
        "![Share of pairs whose correlation is above a size](sizes.svg)",
        exact,
        "Effective: tr(H Sigma), the numbers that the data decide. Prior std: of the relative strengths s / s_mu.",
        of_pairs,
        "Sizes of the correlations, by kind of pair; a layer is one adapted module.",
        apart,
        "In nats, summed over all numbers.",
        _gains(tables["divergences"]),
    ]


def _gains(rows: Rows) -> str:
    """What correlations within layers, and between them, are worth in the ELBO, in a sentence a posterior."""
    found = []
    of = {(row["weights"], row["prior"], row["structure"], row["kept"]): row["kl_q_p"] for row in rows}
    for weights, prior in dict.fromkeys((row["weights"], row["prior"]) for row in rows):
        diagonal, layer = (of[weights, prior, structure, "conditional"] for structure in ("diagonal", "layer"))
        share = f" ({(diagonal - layer) / diagonal:.0%})" if diagonal > 0 else ""
        found.append(
            f"- {RUNS[weights]}, prior {PRIOR[prior]}: the best diagonal q is {diagonal:.2f} nats from the exact "
            f"posterior; correlations within layers regain {diagonal - layer:.2f} of them{share}, the other "
            f"{layer:.2f} lie between layers."
        )
    return "\n".join(found)


def _predictions(tables: Mapping[str, Rows], sizes: Mapping[str, str]) -> list[str]:
    by: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in tables["predictions"]:
        by.setdefault((row["predictive"], row["structure"], row["kept"]), {})[row["metric"]] = row
    rows: list[dict[str, Any]] = []
    for (predictive, structure, kept), figures in by.items():
        own = "" if predictive == "mean" else f", {structure}" + ("" if structure == "joint" else f", {kept}")
        rows.append({"name": PREDICTIVES[predictive] + own} | figures)
    columns = [
        (heading.removesuffix(", nats"), lambda row, metric=metric: _with_difference(row.get(metric)))
        for metric, heading in METRICS.items()
    ]
    compared = [row for row in tables["predictions"] if row["difference"] is not None]
    apart = sum(excludes_zero(row["difference_low"], row["difference_high"]) for row in compared)
    return [
        "## What keeping or dropping correlations does to predictions",
        "![Differences to the joint posterior](predictions.svg)",
        table(rows, ("predictive", "{name}"), *columns),
        "Of the plain LoRA with its exact posterior, prior of the highest evidence. In brackets the difference to "
        "the joint posterior with its 95 % paired bootstrap interval over rows; * where that leaves out 0. "
        f"Linearised: {sizes['test_rows']} test rows, {sizes['ood_rows']} of the other task, {sizes['points']} "
        f"points. Monte Carlo: {sizes['mc_rows']} and {sizes['mc_ood_rows']} of them, {sizes['samples']} draws. "
        "All structures share their normal numbers.",
        f"- {apart} of {len(compared)} intervals of a difference leave out 0 (no correction is made for their number).",
    ]


def _with_difference(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "–"
    low, high = row["difference_low"], row["difference_high"]
    if row["difference"] is None or low is None:
        return f"{row['value']:.4f}"
    ends = f"{row['difference']:+.4f}, {low:+.4f} to {high:+.4f}"
    return f"{row['value']:.4f} ({ends}){'*' if excludes_zero(low, high) else ''}".replace("-", "−")


def _learnt(tables: Mapping[str, Rows], sizes: Mapping[str, str]) -> list[str]:
    def signed(name: str) -> Any:
        return lambda row: f"{row[name]:+.2f}".replace("-", "−")

    layers = table(
        tables["learnt"],
        ("layer", lambda row: row["layer"].removeprefix("model.layers.")),
        ("rms learnt", "{rms_learnt:.3f}"),
        ("conditional", "{rms_conditional:.3f}"),
        ("marginal", "{rms_marginal:.3f}"),
        ("cosine", signed("conditional_cosine")),
        ("with marginal", signed("marginal_cosine")),
        ("slope", signed("slope")),
        ("p signs", "{p_signs:.3f}"),
        ("p order", "{p_order:.3f}"),
    )
    fits = table(
        tables["fit"],
        ("weights", lambda row: RUNS[row["weights"]]),
        ("q", "{q}"),
        ("KL(q‖exact), nats", "{kl:.2f}"),
        ("a training row, 1e-3 nats", lambda row: f"{1000 * row['kl_a_row']:.2f}"),
    )
    last = tables["learnt"][-1]
    return [
        "## What the full covariance learnt",
        "![Learnt correlations against exact ones](learnt.svg)",
        layers,
        "Correlations within each layer of the full run, beside those of the exact posterior at its weights with "
        "its own prior. Cosine and slope: of the learnt on the conditional ones, which the ELBO asks for. p: how "
        "often a cosine as large comes from learnt correlations with random signs, or with their numbers in random "
        "order.",
        f"- Over all layers, {last['conditional_cosine'] ** 2:.1%} of the learnt correlations' squares lie along "
        f"the exact ones; their root mean square is {last['rms_learnt']:.3f}, and {last['rest_rms']:.3f} without "
        f"that part. The exact ones' is {last['rms_conditional']:.3f}.",
        fits,
        "Around the run's mean; a difference of two is one of ELBO, were the loss quadratic.",
    ]


def _noise(tables: Mapping[str, Rows], sizes: Mapping[str, str]) -> list[str]:
    def unless_none(name: str, scale: float, digits: int) -> Any:
        return lambda row: "–" if row[name] is None else f"{scale * row[name]:.{digits}f}"

    noise = table(
        tables["gradient_noise"],
        ("where", "{position}, batch {batch}"),
        ("parameters", "{kind}"),
        ("number", "{numbers:,}"),
        ("signal", "{signal:.2e}"),
        ("noise, draws", "{noise_of_draws:.2e}"),
        ("noise, rows", "{noise_of_rows:.2e}"),
        ("SNR", unless_none("snr", 1, 3)),
        ("median ratio", "{median_ratio:.3f}"),
        ("of noise alone", "{median_ratio_of_noise:.3f}"),
        ("noise, %", unless_none("noise_share", 100, 1)),
        ("signal, %", unless_none("signal_share", 100, 1)),
    )
    return [
        "## What correlations cost in gradient noise",
        "![Signal-to-noise ratio by kind of parameter](gradient_noise.svg)",
        noise,
        f"Reparameterised gradients of the negative ELBO (a mean over the rows of a batch, plus KL / N) of "
        f"{sizes['batches']} fixed batches of {sizes['noise_batch']} rows, {sizes['draws']} draws each, in log "
        f"s_mu, log L_ii and L_ij. Start: after a run of {sizes['start_steps']} steps of the same recipe (at the "
        "very first B is 0, and with it every gradient of the likelihood in s). Signal: root mean square of the "
        "expected gradient, freed of noise. Noise: standard deviation over draws of the fixed batch, and over "
        "batches of other rows. Median ratio: of |mean| / std over draws, beside what noise alone would show. "
        "Shares: of the squares over all parameters of s.",
    ]


def picture_of_correlations(positions: Mapping[str, Position]) -> str:
    """Correlation matrices of the exact posteriors, their numbers ordered by layer."""
    panels = shown(positions)
    figure, ((*axes,),) = blank(3.6 * len(panels), 3.7, 1, len(panels))
    with styled():
        for axis, (name, joint, depth) in zip(axes, panels, strict=True):
            image = axis.imshow(correlation_of(joint).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
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


def picture_of_sizes(positions: Mapping[str, Position]) -> str:
    """How large correlations are, by kind of pair: the share of pairs above each size."""
    panels = shown(positions)
    figure, ((*axes,),) = blank(3.1 * len(panels), 2.9, 1, len(panels), sharey=True)
    with styled():
        for axis, (name, joint, depth) in zip(axes, panels, strict=True):
            absolute = correlation_of(joint).abs()
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


def picture_of_predictions(rows: Sequence[dict[str, Any]]) -> str:
    """Each structure's difference to the joint posterior, with its interval, by metric and predictive."""
    predictives = [p for p in ("linearized", "mc") if any(row["predictive"] == p for row in rows)]
    names = [f"{structure}, {kept}" for structure, kept in STRUCTURES[1:]]
    figure, grid = blank(9.6, 4.6, 2, 3)
    with styled():
        for axis, (metric, heading) in zip([a for line in grid for a in line], METRICS.items(), strict=True):
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


def picture_of_learnt(at: Position, nulls: Mapping[str, Tensor], observed: float) -> str:
    """Learnt correlations against the exact ones, and their cosine among those of unrelated ones."""
    exact, _ = at.exact("own")
    best = layer_correlations(exact.restricted("layer", "conditional"))
    own = layer_correlations(at.learnt_relative())
    x, y = (torch.cat([off_diagonals(of[name]) for name in own]).numpy() for of in (best, own))
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


def picture_of_gradient_noise(ratios: Mapping[str, Mapping[str, Tensor]], draws: int) -> str:
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
