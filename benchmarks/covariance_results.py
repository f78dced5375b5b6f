"""What the covariance study says: its tables as CSV, and the page with tables, pictures and computed facts."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from _common import markdown_facts, markdown_table
from covariance_study import RUNS

Rows = Sequence[dict[str, Any]]
PRIOR = {"own": "its own", "evidence": "of the highest evidence"}
PREDICTIVES = {"mean": "one pass, no noise", "linearized": "linearised", "mc": "Monte Carlo"}


def as_csv(rows: Rows) -> str:
    """One line a row, numbers in full."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def page(tables: Mapping[str, Rows], known: dict[str, str], sizes: Mapping[str, str]) -> str:
    """The results as a page; parts that are not done yet are left out.

    Args:
        tables: by name, as they are written to CSV.
        known: the facts of the measurement.
        sizes: "samples", "points", "draws", "batches" as text.
    """
    parts = ["# Correlations in the posterior of s", _INTRODUCTION]
    for needed, write in SECTIONS.items():
        if needed in tables:
            parts.append(write(tables, sizes))
    return "\n\n".join([*parts, "## Measurement", markdown_facts(known)]).strip() + "\n"


_INTRODUCTION = """\
The exact posterior here is the Gaussian whose precision is the Gauss-Newton matrix H of all s of all layers together
plus the prior's precision, at the weights of a finished run (`scalabl.training.posthoc`). For a plain LoRA, s are the
relative strengths of the components of B A (its SVD); for ScalaBL, its own s. Where fewer rows than the run's were
used, H is scaled up to all of them. p is the exact posterior, q a Gaussian without some of its correlations: "layer"
keeps those within a layer, "diagonal" none; "marginal" keeps blocks of the covariance, "conditional" blocks of the
precision, which is what a variational approximation of that form finds."""


def _posterior(tables: Mapping[str, Rows], sizes: Mapping[str, str]) -> str:
    rows = [
        [
            f"{RUNS[row['weights']]}, prior {PRIOR[row['prior']]}",
            str(row["numbers"]),
            f"{row['effective_parameters']:.1f}",
            f"{row['prior_std']:.3g}",
            f"{-row['log_likelihood']:.3f}",
        ]
        for row in tables["posterior"]
    ]
    of_pairs = [
        [
            f"{RUNS[row['weights']]}, {PRIOR[row['prior']]}",
            row["pairs"],
            f"{row['number']:,}",
            *(f"{row[name]:.3f}" for name in ("rms", "median", "quantile_90", "quantile_99", "largest")),
            f"{100 * row['above_0.1']:.1f}",
            f"{100 * row['above_0.3']:.1f}",
        ]
        for row in tables["correlations"]
    ]
    apart = [
        [
            f"{RUNS[row['weights']]}, {PRIOR[row['prior']]}",
            f"{row['structure']}, {row['kept']}",
            f"{row['kl_p_q']:.2f}",
            f"{row['kl_q_p']:.2f}",
            f"{row['std_ratio']:.3f}",
        ]
        for row in tables["divergences"]
    ]
    return "\n\n".join(
        [
            "## How far the exact posterior is from diagonal",
            "![Correlation matrices of the exact posteriors, by layer](correlations.svg)",
            "![Share of pairs whose correlation is above a size](sizes.svg)",
            markdown_table(["weights", "numbers", "effective", "prior std", "training NLL"], rows),
            "Effective: tr(H Sigma), the numbers that the data decide. Prior std: of the relative strengths s / s_mu.",
            markdown_table(
                [
                    "weights, prior",
                    "pairs",
                    "number",
                    "rms",
                    "median",
                    "90 %",
                    "99 %",
                    "largest",
                    "> 0.1, %",
                    "> 0.3, %",
                ],
                of_pairs,
            ),
            "Sizes of the correlations, by kind of pair; a layer is one adapted module.",
            markdown_table(["weights, prior", "kept", "KL(p‖q)", "KL(q‖p)", "std q / std p"], apart),
            "In nats, summed over all numbers.",
            *_gains(tables["divergences"]),
        ]
    )


def _gains(rows: Rows) -> list[str]:
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
    return ["\n".join(found)]


def _predictions(tables: Mapping[str, Rows], sizes: Mapping[str, str]) -> str:
    by: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in tables["predictions"]:
        by.setdefault((row["predictive"], row["structure"], row["kept"]), {})[row["metric"]] = row
    metrics = ("nll", "ece", "brier", "accuracy", "ood_auroc_epistemic", "ood_auroc_total")
    rows = []
    for (predictive, structure, kept), figures in by.items():
        name = structure if structure == "joint" else f"{structure}, {kept}"
        name = PREDICTIVES[predictive] if predictive == "mean" else f"{PREDICTIVES[predictive]}, {name}"
        rows.append([name, *(_with_difference(figures.get(metric)) for metric in metrics)])
    told = [row for row in tables["predictions"] if _told_apart(row)]
    compared = [row for row in tables["predictions"] if row["difference"] is not None]
    return "\n\n".join(
        [
            "## What keeping or dropping correlations does to predictions",
            "![Differences to the joint posterior](predictions.svg)",
            markdown_table(
                ["predictive", "NLL", "ECE", "Brier", "accuracy", "OOD AUROC, epistemic", "OOD AUROC, total"], rows
            ),
            "Of the plain LoRA with its exact posterior, prior of the highest evidence. In brackets the difference to "
            "the joint posterior with its 95 % paired bootstrap interval over rows; * where that leaves out 0. "
            f"Linearised: {sizes['test_rows']} test rows, {sizes['ood_rows']} of the other task, {sizes['points']} "
            f"points. Monte Carlo: {sizes['mc_rows']} and {sizes['mc_ood_rows']} of them, {sizes['samples']} draws. "
            "All structures share their normal numbers.",
            f"- {len(told)} of {len(compared)} intervals of a difference leave out 0 (no correction is made for their "
            "number).",
        ]
    )


def _with_difference(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "–"
    if row["difference"] is None or row["difference_low"] is None:
        return f"{row['value']:.4f}"
    ends = f"{row['difference']:+.4f}, {row['difference_low']:+.4f} to {row['difference_high']:+.4f}"
    return f"{row['value']:.4f} ({ends}){'*' if _told_apart(row) else ''}".replace("-", "−")


def _told_apart(row: dict[str, Any]) -> bool:
    low, high = row["difference_low"], row["difference_high"]
    return low is not None and high is not None and not low <= 0 <= high


def _learnt(tables: Mapping[str, Rows], sizes: Mapping[str, str]) -> str:
    rows = [
        [
            row["layer"].removeprefix("model.layers."),
            *(f"{row[name]:.3f}" for name in ("rms_learnt", "rms_conditional", "rms_marginal")),
            *(f"{row[name]:+.2f}".replace("-", "−") for name in ("conditional_cosine", "marginal_cosine", "slope")),
            *(f"{row[name]:.3f}" for name in ("p_signs", "p_order")),
        ]
        for row in tables["learnt"]
    ]
    last = tables["learnt"][-1]
    fits = [
        [RUNS[row["weights"]], row["q"], f"{row['kl']:.2f}", f"{1000 * row['kl_a_row']:.2f}"] for row in tables["fit"]
    ]
    return "\n\n".join(
        [
            "## What the full covariance learnt",
            "![Learnt correlations against exact ones](learnt.svg)",
            markdown_table(
                [
                    "layer",
                    "rms learnt",
                    "conditional",
                    "marginal",
                    "cosine",
                    "with marginal",
                    "slope",
                    "p signs",
                    "p order",
                ],
                rows,
            ),
            "Correlations within each layer of the full run, beside those of the exact posterior at its weights with "
            "its own prior. Cosine and slope: of the learnt on the conditional ones, which the ELBO asks for. p: how "
            "often a cosine as large comes from learnt correlations with random signs, or with their numbers in random "
            "order.",
            f"- Over all layers, {last['conditional_cosine'] ** 2:.1%} of the learnt correlations' squares lie along "
            f"the exact ones; their root mean square is {last['rms_learnt']:.3f}, and {last['rest_rms']:.3f} without "
            f"that part. The exact ones' is {last['rms_conditional']:.3f}.",
            markdown_table(["weights", "q", "KL(q‖exact), nats", "a training row, 1e-3 nats"], fits),
            "Around the run's mean; a difference of two is one of ELBO, were the loss quadratic.",
        ]
    )


def _noise(tables: Mapping[str, Rows], sizes: Mapping[str, str]) -> str:
    rows = [
        [
            f"{row['position']}, batch {row['batch']}",
            row["kind"],
            f"{row['numbers']:,}",
            f"{row['signal']:.2e}",
            f"{row['noise_of_draws']:.2e}",
            f"{row['noise_of_rows']:.2e}",
            "–" if row["snr"] is None else f"{row['snr']:.3f}",
            f"{row['median_ratio']:.3f}",
            f"{row['median_ratio_of_noise']:.3f}",
            "–" if row["noise_share"] is None else f"{100 * row['noise_share']:.1f}",
            "–" if row["signal_share"] is None else f"{100 * row['signal_share']:.1f}",
        ]
        for row in tables["gradient_noise"]
    ]
    header = ["where", "parameters", "number", "signal", "noise, draws", "noise, rows", "SNR", "median ratio"]
    header += ["of noise alone", "noise, %", "signal, %"]
    return "\n\n".join(
        [
            "## What correlations cost in gradient noise",
            "![Signal-to-noise ratio by kind of parameter](gradient_noise.svg)",
            markdown_table(header, rows),
            f"Reparameterised gradients of the negative ELBO (a mean over the rows of a batch, plus KL / N) of "
            f"{sizes['batches']} fixed batches of {sizes['noise_batch']} rows, {sizes['draws']} draws each, in log "
            f"s_mu, log L_ii and L_ij. Start: after a run of {sizes['start_steps']} steps of the same recipe (at the "
            "very first B is 0, and with it every gradient of the likelihood in s). Signal: root mean square of the "
            "expected gradient, freed of noise. Noise: standard deviation over draws of the fixed batch, and over "
            "batches of other rows. Median ratio: of |mean| / std over draws, beside what noise alone would show. "
            "Shares: of the squares over all parameters of s.",
        ]
    )


SECTIONS: dict[str, Callable[[Mapping[str, Rows], Mapping[str, str]], str]] = {
    "posterior": _posterior,
    "predictions": _predictions,
    "learnt": _learnt,
    "gradient_noise": _noise,
}
