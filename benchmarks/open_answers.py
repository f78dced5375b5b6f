"""Which score of a free-text answer tells that it is wrong, and what does it cost: every method, on real questions.

    python benchmarks/open_answers.py

For each task, method and seed: a LoRA is trained on the same questions, answers validation and test questions greedily
(with N particles where the method has some), and every score is held against exact match. Plain LoRA also samples
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polygraph_scores
import torch
from _common import RESULTS, ROOT, facts, load_average, write_text
from open_answers_results import write

from scalabl.core.errors import UserError
from scalabl.data.load import load_open_task
from scalabl.data.open_questions import OpenQuestion
from scalabl.generation.decoding import Decoded
from scalabl.generation.equivalence import equivalence, semantic_sets
from scalabl.generation.evaluation import Judged, answer_questions, fit_on, judge, plain
from scalabl.generation.fan_out import EnsembleDraws
from scalabl.generation.generate import AnswerSampling, decoded_with_samples, draws_of
from scalabl.generation.loading import LanguageRun, load_language_run
from scalabl.metrics.ranking import judge_ranking
from scalabl.runs.settings import make_settings
from scalabl.training.run import train

TASKS = ("triviaqa", "nq-open", "sciq")
METHODS = ("mle", "mc_dropout", "ensemble", "blob", "scalabl", "scalabl mean")
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
# each method's own settings, chosen on validation questions; everything else is shared
OWN: dict[str, dict[str, Any]] = {"scalabl": {"variational_learning_rate": 5e-2, "empirical_prior": True}}


def main(argv: Sequence[str] | None = None) -> None:
    """Train and answer what is missing, and write open_answers.json, .csv, .md and .svg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="names, or files of open questions")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layers", default="last:6")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--train-rows", type=int, default=600)
    parser.add_argument("--validation-rows", type=int, default=150)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--samples", type=int, default=10, help="particles, and sampled answers of plain LoRA")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="paired timings of decoding")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "open-answers")
    parser.add_argument("--output", type=Path, default=RESULTS)
    a = parser.parse_args(argv)
    rows = [of_cell(a, task, method, seed) for seed in a.seeds for task in a.tasks for method in a.methods]
    polygraph = [with_polygraph(a, row) for row in rows if row["method"] == "mle"]
    timings = costs(a)
    known = facts(
        model=a.model,
        data=f"{', '.join(a.tasks)} (validation rows of the official sets, cut 60/10/30 by a seeded order): "
        f"{a.train_rows} trained on, {a.validation_rows} for the confidence, {a.test_rows} answered",
        budget=f"{a.steps} steps of 8, adapters (r = 8, all linear) on {a.layers}, N = {a.samples}, "
        f"{a.max_new_tokens} tokens at most",
        seeds=", ".join(map(str, a.seeds)),
        polygraph=f"lm-polygraph {polygraph_scores.version()}" if all(polygraph) else "lm-polygraph not installed",
        load=load_average(),
    )
    write(a.output, {"facts": known, "costs": timings, "rows": rows})


def run_of(a: argparse.Namespace, task: str, method: str, seed: int) -> Path:
    """A finished run; trained if there is none. "scalabl mean" is a way to answer, not to train."""
    method = method.partition(" ")[0]
    directory: Path = a.runs / Path(task).stem / f"{method}-{seed}"
    recipe = make_settings(
        {
            "model": a.model, "data": task, "method": method, "seed": seed, "steps": a.steps, "batch_size": 8,
            "layers": a.layers, "target_modules": TARGETS, "r": 8, "lora_alpha": 16, "train_rows": a.train_rows,
            "validation_rows": a.validation_rows, "learning_rate": 1e-3, **OWN.get(method, {}),
        }
    )  # fmt: skip
    directory.parent.mkdir(parents=True, exist_ok=True)
    train(recipe, directory)
    return directory


def loaded(a: argparse.Namespace, task: str, method: str, seed: int) -> LanguageRun:
    """The run of a method; for an ensemble plain LoRA's of every seed, as adapters of one model."""
    if method != "ensemble":
        return load_language_run(run_of(a, task, method, seed))
    first, *others = [run_of(a, task, "mle", (seed + i) % 2**32) for i in members(a)]
    run = load_language_run(first)
    for i, other in enumerate(others, start=1):
        run.model.load_adapter(str(other), adapter_name=f"member{i}")
    return run


def members(a: argparse.Namespace) -> range:
    """Of an ensemble: as many as there are seeds, three at least; member 0 is plain LoRA of the same seed."""
    return range(max(3, len(a.seeds)))


def of_cell(a: argparse.Namespace, task: str, method: str, seed: int) -> dict[str, Any]:
    """The figures of one method on one task with one seed, kept in a file together with their settings."""
    kept = a.runs / Path(task).stem / f"{method}-{seed}.json"
    own = OWN.get(method.partition(" ")[0], {})
    names = ("model", "layers", "steps", "train_rows", "validation_rows", "test_rows", "samples", "max_new_tokens")
    settings = {name: getattr(a, name) for name in names} | {"own": own}
    if kept.is_file():
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if known["settings"] == settings:
            return known
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
    found = {"task": Path(task).stem, "method": method, "seed": seed, "settings": settings, "why": why}
    found |= judge(judged, fitted)
    if method == "mle":
        same = equivalence(AnswerSampling().equivalence)
        sets = [semantic_sets([one.text for one in others], same) for _, others in decoded]
        stats = polygraph_scores.statistics([one for one, _ in decoded], [others for _, others in decoded], sets)
        text = json.dumps({"right": judged.right.tolist(), "statistics": stats})
        write_text(kept.with_suffix(".answers.json"), text + "\n")
    write_text(kept, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def answers(
    a: argparse.Namespace,
    run: LanguageRun,
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
        batch_size=a.batch_size, sampling=AnswerSampling(a.samples) if sampled else None, draws=ensemble_of(a, method),  # noqa: E501
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
    kept = json.loads((a.runs / row["task"] / f"mle-{row['seed']}.answers.json").read_text(encoding="utf-8"))
    tokens = max(figures["tokens"] for figures in row["scores"].values())
    for name, values in polygraph_scores.polygraph_scores(kept["statistics"]).items():
        sampled = name.startswith(polygraph_scores.SAMPLED)
        figures = plain(judge_ranking(np.array(values), np.array(kept["right"]), seed=0))
        own = tokens if sampled else row["tokens_an_answer"]
        row["scores"][f"lm-polygraph {name}"] = {**figures, "tokens": own}
    return True


def costs(a: argparse.Namespace) -> dict[str, Any]:
    """What answering costs beside plain LoRA's greedy decode: medians of paired rounds, all on one task.

    "mle + samples" is the answer and the sampled ones, what semantic entropy takes.
    """
    kept = a.runs / "costs.json"
    if kept.is_file():
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if known["settings"] == [a.samples, a.max_new_tokens, a.batch_size, a.rounds, a.methods]:
            return known
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
        name: [own / plain for own, plain in zip(values[1:], seconds[names[0]][1:], strict=True)]
        for name, values in seconds.items()
    }
    found = {
        "settings": [a.samples, a.max_new_tokens, a.batch_size, a.rounds, a.methods],
        "beside": names[0],
        "ratios": ratios,
        "medians": {name: statistics.median(values) for name, values in ratios.items()},
        "load": load_average(),
    }
    write_text(kept, json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
