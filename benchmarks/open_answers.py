"""Which score of a free-text answer tells that it is wrong, and what does it cost: every method, on real questions.

    python benchmarks/open_answers.py

For each task, method and seed: a LoRA is trained on the same questions, answers validation and test questions greedily
(with N particles where the method has some), and every score is compared with exact match. Plain LoRA also samples
answers, for self-consistency and semantic entropy; its answers and samples are kept for lm-polygraph's own code, whose
scores stand in the same table if it is installed (see polygraph_scores.py). The confidence is chosen on validation
questions among the scores that one decode gives. Resumable: a finished run is not trained again, finished figures are
not made again, and processes with other --tasks or --seeds may share --runs.
Needs the development environment (make dev) and the rows: scalabl data get nq-open triviaqa sciq.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import matplotlib
import numpy as np
import polygraph_scores
import torch
from matplotlib.figure import Figure

from scalabl.core.errors import UserError
from scalabl.core.files import write_text
from scalabl.data.load import load_open_task
from scalabl.data.open_questions import OpenQuestion
from scalabl.generation.decoding import Decoded
from scalabl.generation.equivalence import equivalence, semantic_sets
from scalabl.generation.evaluation import Judged, answer_questions, fit_on, judge, plain
from scalabl.generation.fan_out import EnsembleDraws
from scalabl.generation.generate import AnswerSampling, decoded_with_samples, draws_of
from scalabl.metrics.ranking import judge_ranking
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.settings import make_settings
from scalabl.training.run import train

TASKS = ("triviaqa", "nq-open", "sciq")
METHODS = ("mle", "mc_dropout", "ensemble", "blob", "scalabl", "scalabl mean")
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
# each method's own settings, chosen on validation questions; everything else is shared
OWN: dict[str, dict[str, Any]] = {
    "scalabl": {"variational_learning_rate": 5e-2, "prior_mean": 0.0, "init_sigma": 0.05, "empirical_prior": True}
}
METRICS = {"auroc": "AUROC ↑", "prr": "PRR ↑", "aurc": "AURC ↓"}
# what each method's answers are scored by in the table; every score is in the JSON file
SCORES = {
    "mle": ("log_probability", "mean_log_probability", "mean_entropy", "self_consistency", "semantic_entropy",
            "discrete_semantic_entropy"),
    "scalabl mean": ("log_probability", "mean_log_probability", "mean_entropy"),
    None: ("log_probability", "mean_log_probability", "mean_entropy", "mean_epistemic", "mean_intersection",
           "first_token_epistemic", "std_mean_log_probability"),
}  # fmt: skip
SAMPLED = ("self_consistency", "semantic_entropy", "discrete_semantic_entropy")
POLYGRAPH = "lm-polygraph "  # begins the names of its scores; those that are ours by another name are left out


def main() -> None:
    """Train and answer what is missing, and write open_answers.json, .csv, .md and .svg."""
    parser = harness.options(
        __doc__,
        tasks=(list(TASKS), "names, or files of open questions"),
        methods=(list(METHODS), None, METHODS),
        seeds=[0, 1, 2],
        model="smollm2-135m-instruct",
        layers="last:6",
        steps=150,
        train_rows=600,
        validation_rows=150,
        test_rows=300,
        samples=(10, "particles, and sampled answers of plain LoRA"),
        max_new_tokens=16,
        batch_size=8,
        rounds=(5, "paired timings of decoding"),
        runs=harness.ROOT / "runs" / "open-answers",
        output=harness.RESULTS,
    )
    a = parser.parse_args()
    rows = [of_cell(a, task, method, seed) for seed in a.seeds for task in a.tasks for method in a.methods]
    polygraph = [with_polygraph(a, row) for row in rows if row["method"] == "mle"]
    timings = costs(a)
    known = harness.facts(
        model=a.model,
        data=f"{', '.join(a.tasks)} (validation rows of the official sets, cut 60/10/30 by a seeded order): "
        f"{a.train_rows} trained on, {a.validation_rows} for the confidence, {a.test_rows} answered",
        budget=f"{a.steps} steps of 8, adapters (r = 8, all linear) on {a.layers}, N = {a.samples}, "
        f"{a.max_new_tokens} tokens at most",
        seeds=", ".join(map(str, a.seeds)),
        polygraph=f"lm-polygraph {polygraph_scores.version()}" if all(polygraph) else "lm-polygraph not installed",
        load=harness.load_average(),
    )
    content = {"facts": known, "costs": timings, "rows": rows}
    lines = summarized(content)
    harness.write_results(a.output, "open_answers", content, markdown(content, lines), csv_of(lines), picture(lines))


def run_of(a: argparse.Namespace, task: str, method: str, seed: int) -> Path:
    """A finished run; trained if there is none. "scalabl mean" is a way to answer, not to train."""
    method = method.partition(" ")[0]
    directory: Path = a.runs / Path(task).stem / f"{method}-{seed}"
    settings = make_settings(
        {
            "model": a.model, "data": task, "method": method, "seed": seed, "steps": a.steps, "batch_size": 8,
            "layers": a.layers, "target_modules": TARGETS, "r": 8, "lora_alpha": 16, "train_rows": a.train_rows,
            "validation_rows": a.validation_rows, "learning_rate": 1e-3, **OWN.get(method, {}),
        }
    )  # fmt: skip
    directory.parent.mkdir(parents=True, exist_ok=True)
    train(settings, directory)
    return directory


def loaded(a: argparse.Namespace, task: str, method: str, seed: int) -> Run:
    """The run of a method; for an ensemble plain LoRA's of every seed, as adapters of one model."""
    if method != "ensemble":
        return load_run(run_of(a, task, method, seed), generating=True)
    first, *others = [run_of(a, task, "mle", (seed + i) % 2**32) for i in members(a)]
    run = load_run(first, generating=True)
    for i, other in enumerate(others, start=1):
        run.scorer.model.load_adapter(str(other), adapter_name=f"member{i}")
    return run


def members(a: argparse.Namespace) -> range:
    """Of an ensemble: as many as there are seeds, three at least; member 0 is plain LoRA of the same seed."""
    return range(max(3, len(a.seeds)))


def of_cell(a: argparse.Namespace, task: str, method: str, seed: int) -> dict[str, Any]:
    """The figures of one method on one task with one seed, kept in a file together with their settings."""
    place = a.runs / Path(task).stem / f"{method}-{seed}.json"
    names = ("model", "layers", "steps", "train_rows", "validation_rows", "test_rows", "samples", "max_new_tokens")
    settings = {name: getattr(a, name) for name in names} | {"own": OWN.get(method.partition(" ")[0], {})}

    def make() -> dict[str, Any]:
        splits = load_open_task(task).splits
        validation, test = splits["validation"][: a.validation_rows], splits["test"][: a.test_rows]
        run = loaded(a, task, method, seed)
        print(f"answering {task}: {method}, seed {seed}", flush=True)
        held_out = answers(a, run, method, seed, validation)
        decoded: list[tuple[Decoded, list[Decoded]]] = []
        judged = answers(a, run, method, seed, test, sampled=method == "mle", decoded=decoded)
        try:
            fitted, why = fit_on(held_out), None
        except UserError as error:
            fitted, why = None, str(error)
        if method == "mle":
            same = equivalence(AnswerSampling().equivalence)
            sets = [semantic_sets([one.text for one in others], same) for _, others in decoded]
            stats = polygraph_scores.statistics([one for one, _ in decoded], [others for _, others in decoded], sets)
            text = json.dumps({"right": judged.right.tolist(), "statistics": stats})
            write_text(place.with_suffix(".answers.json"), text + "\n")
        found = {"task": Path(task).stem, "method": method, "seed": seed, "settings": settings, "why": why}
        return found | judge(judged, fitted)

    return harness.kept(place, lambda: settings, make)


def answers(
    a: argparse.Namespace,
    run: Run,
    method: str,
    seed: int,
    questions: tuple[OpenQuestion, ...],
    *,
    sampled: bool = False,
    decoded: list[tuple[Decoded, list[Decoded]]] | None = None,
) -> Judged:
    """Answers to questions, with sampled ones beside them if wished; both are added to `decoded`."""
    return answer_questions(
        run, questions, samples=particles(a, method), seed=seed, max_new_tokens=a.max_new_tokens,
        batch_size=a.batch_size, draws=ensemble_of(a, method),
        sampling=AnswerSampling(a.samples) if sampled else None,
        seen=None if decoded is None else lambda answer, others: decoded.append((answer, others)),
    )  # fmt: skip


def particles(a: argparse.Namespace, method: str) -> int:
    """N of a method's predictions; 0 is the posterior's mean."""
    return 0 if method.endswith(" mean") else int(a.samples)


def ensemble_of(a: argparse.Namespace, method: str) -> EnsembleDraws | None:
    """The members' adapters, for an ensemble."""
    return EnsembleDraws(["default", *(f"member{i}" for i in members(a) if i)]) if method == "ensemble" else None


def with_polygraph(a: argparse.Namespace, row: dict[str, Any]) -> bool:
    """Add lm-polygraph's scores of the same answers and samples to a row of plain LoRA, if it is installed."""
    if not polygraph_scores.installed():
        return False
    file = a.runs / row["task"] / f"mle-{row['seed']}.answers.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    tokens = max(figures["tokens"] for figures in row["scores"].values())
    for name, values in polygraph_scores.polygraph_scores(written["statistics"]).items():
        sampled = name.startswith(polygraph_scores.SAMPLED)
        figures = plain(judge_ranking(np.array(values), np.array(written["right"]), seed=0))
        own = tokens if sampled else row["tokens_an_answer"]
        row["scores"][f"lm-polygraph {name}"] = {**figures, "tokens": own}
    return True


def costs(a: argparse.Namespace) -> dict[str, Any]:
    """What answering costs beside plain LoRA's greedy decode: medians of paired rounds, all on one task.

    "mle + samples" is the answer and the sampled ones, what semantic entropy takes.
    """
    settings = [a.samples, a.max_new_tokens, a.batch_size, a.rounds, a.methods]
    return harness.kept(a.runs / "costs.json", lambda: settings, lambda: {"settings": settings, **_costs(a)})


def _costs(a: argparse.Namespace) -> dict[str, Any]:
    task, seed = a.tasks[0], a.seeds[0]
    prompts = [row.prompt for row in load_open_task(task).split("test")[: a.batch_size]]
    runs = {method: loaded(a, task, method, seed) for method in a.methods}
    names = [*a.methods, *(["mle + samples"] if "mle" in a.methods else [])]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 + a.rounds):
        for name in names:
            method = "mle" if name == "mle + samples" else name
            draws: Any = ensemble_of(a, method) or draws_of(runs[method], particles(a, method), seed)
            torch.manual_seed(0)
            begin = time.perf_counter()
            # a fixed number of tokens, so that no method gains by ending early
            decoded_with_samples(
                runs[method], prompts, draws, chat=None, stop=(), max_new_tokens=a.max_new_tokens,
                sampling=AnswerSampling(a.samples if "samples" in name else 0), min_new_tokens=a.max_new_tokens,
            )  # fmt: skip
            seconds[name].append(time.perf_counter() - begin)
    ratios = {
        name: [own / base for own, base in zip(values[1:], seconds[names[0]][1:], strict=True)]
        for name, values in seconds.items()
    }
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return {"beside": names[0], "ratios": ratios, "medians": medians, "load": harness.load_average()}


def summarized(content: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a task, method and score, with every figure's mean, sd and interval over seeds."""
    lines = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    medians = content["costs"]["medians"]
    for (task, method), seeds in groups.items():
        shared = {"task": task, "method": method, "ece": None, "cost": medians[method]}
        shared |= {name: harness.mean_with_interval([row[name] for row in seeds]) for name in ("accuracy", "f1")}
        # scores that took more tokens than the answer
        first = seeds[0]
        sampled = {s for s, f in first["scores"].items() if f["tokens"] > first["tokens_an_answer"] + 1e-9}
        for score in first["scores"]:
            of = [row["scores"][score] for row in seeds]
            own = {m: harness.mean_with_interval([figures[m]["value"] for figures in of]) for m in METRICS}
            own |= {"tokens": harness.mean_with_interval([figures["tokens"] for figures in of])}
            cost = {"cost": medians[f"{method} + samples"]} if score in sampled else {}
            lines.append({**shared, "score": score, **own, **cost})
        if all("confidence" in row for row in seeds):
            of = [row["confidence"] for row in seeds]
            own = {m: harness.mean_with_interval([figures[m]["value"] for figures in of]) for m in (*METRICS, "ece")}
            own |= {"tokens": harness.mean_with_interval([row["tokens_an_answer"] for row in seeds])}
            lines.append({**shared, "score": "confidence", **own})
    return lines


def markdown(content: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """The results as a page."""
    parts = ["# Open answers: which score tells that an answer is wrong", "![AUROC and cost](open_answers.svg)"]
    for task in dict.fromkeys(row["task"] for row in lines):
        rows = [row for row in lines if row["task"] == task and _is_shown(row)]
        best = max((row["auroc"]["mean"] for row in rows if row["auroc"]["mean"] is not None), default=None)

        def auroc(row: dict[str, Any], best: float | None = best) -> str:
            text, mean = _number(row["auroc"], 1, 3), row["auroc"]["mean"]
            return f"**{text}**" if mean is not None and mean == best else text

        shown = harness.table(
            rows,
            ("method, score", lambda row: f"{row['method']}, {row['score'].replace('_', ' ')}"),
            ("ACC % ↑", lambda row: _number(row["accuracy"], 100, 1)),
            (METRICS["auroc"], auroc),
            *((METRICS[m], lambda row, m=m: _number(row[m], 1, 3)) for m in ("prr", "aurc")),
            ("ECE % ↓", lambda row: _number(row["ece"], 100, 1) if row["ece"] else ""),
            ("cost", "{cost:.2f}"),
            ("tokens", "{tokens[mean]:.0f}"),
        )
        parts += [f"## {task}", shown]
    parts += [
        "Mean ± standard deviation over seeds; bold: the highest mean AUROC of a task. ACC: exact match with one of "
        "the answers that count. Cost: time beside plain LoRA's greedy decode, medians of paired rounds with a fixed "
        'number of tokens; "tokens": generated for an answer with its score. confidence: of the scores that one decode '
        "gives, the one (isotonic or Platt) with the lowest left-out NLL on validation questions. lm-polygraph: by its "
        "own code, of plain LoRA's answers and samples; those that are ours by another name are in the JSON file only.",
        harness.markdown_facts(content["facts"]),
    ]
    return "\n\n".join(parts) + "\n"


def _is_shown(row: dict[str, Any]) -> bool:
    score = row["score"]
    if score.startswith(POLYGRAPH):
        return score.removeprefix(POLYGRAPH) not in polygraph_scores.SAME
    return score == "confidence" or score in SCORES.get(row["method"], SCORES[None])


def _took_samples(score: str) -> bool:
    return score in SAMPLED or score.removeprefix(POLYGRAPH).startswith(polygraph_scores.SAMPLED)


def _number(figure: dict[str, float | None], scale: float, digits: int) -> str:
    mean, sd = figure["mean"], figure["sd"]
    if mean is None:
        return "–"
    return f"{scale * mean:.{digits}f}" + ("" if sd is None else f" ± {scale * sd:.{digits}f}")


def csv_of(lines: list[dict[str, Any]]) -> str:
    """One line a task, method and score."""
    rows = []
    for line in lines:
        row = {name: line[name] for name in ("task", "method", "score", "cost")}
        for name in ("accuracy", "f1", *METRICS, "ece", "tokens"):
            figure = line[name] or {"mean": None, "sd": None}
            row |= {name: figure["mean"], f"{name}_sd": figure["sd"]}
        rows.append(row)
    return harness.as_csv(rows)


def picture(lines: list[dict[str, Any]]) -> str:
    """AUROC of each score, a panel a task and a colour a method; bars: standard deviations over seeds."""
    shown = [row for row in lines if _is_shown(row) and row["auroc"]["mean"] is not None]
    tasks = list(dict.fromkeys(row["task"] for row in lines))
    methods = list(dict.fromkeys(row["method"] for row in shown))
    # one decode's scores first, then those of sampled answers
    scores = sorted(dict.fromkeys(row["score"] for row in shown), key=_took_samples)
    tab10: Any = matplotlib.colormaps["tab10"]
    size = (3.6 * len(tasks) + 2.4, 0.42 * len(scores) + 1.3)
    figure = Figure(figsize=size)
    axes = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for i, method in enumerate(methods):
            rows = [row for row in shown if (row["task"], row["method"]) == (task, method)]
            # a method's points lie a little below the method's before it
            y = [scores.index(row["score"]) + 0.11 * (i - (len(methods) - 1) / 2) for row in rows]
            x = [row["auroc"]["mean"] for row in rows]
            bars = [row["auroc"]["sd"] or 0.0 for row in rows]
            costs = sorted({row["cost"] for row in rows})
            label = f"{method} ({', with samples '.join(f'{cost:.1f}' for cost in costs)} ×)" if costs else method
            shape: dict[str, Any] = {"fmt": "o", "color": tab10.colors[i], "markersize": 4, "elinewidth": 0.8}
            axis.errorbar(x, y, xerr=bars, label=label, **shape)
        for place in range(1, len(scores)):
            axis.axhline(place - 0.5, color="0.92", linewidth=0.8, zorder=0)
        axis.axvline(0.5, color="0.7", linewidth=0.8, zorder=0)
        axis.set_title(task)
        axis.set_xlabel("AUROC of wrong answers")
    axes[0][0].set_yticks(range(len(scores)), [name.replace("_", " ") for name in scores], fontsize=8)
    axes[0][0].set_ylim(max(len(scores), 1) - 0.5, -0.5)  # the first score on top
    handles, labels = axes[0][0].get_legend_handles_labels()
    legend: dict[str, Any] = {"ncols": 3, "fontsize": 8, "frameon": False, "loc": "lower center"}
    figure.legend(handles, labels, title="method (cost in greedy decodes of plain LoRA)", title_fontsize=8, **legend)
    figure.tight_layout(rect=(0, 0.85 / size[1], 1, 1))
    return harness.svg(figure, "open_answers")


if __name__ == "__main__":
    main()
