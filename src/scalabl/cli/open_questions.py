"""`scalabl evaluate` on open questions: accuracy, and for each score how well it tells wrong answers, at its cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalabl.cli import options
from scalabl.core import processes
from scalabl.core.console import progress_bar, quiet, words_console
from scalabl.core.errors import UserError

# beside the best of one decode, these are always shown
_SHOWN = ("log_probability", "mean_log_probability", "mean_entropy", "semantic_entropy", "self_consistency")
_MOST = 8


def evaluate_open(
    run: Path,
    data: str,
    *,
    samples: int,
    seed: int,
    split: str | None,
    limit: int | None,
    batch_size: int,
    measure: str,
    max_new_tokens: int,
    answers: int,
    equivalence: str,
    chat: bool | None,
    json: Path | None,
    model: str | None,
) -> None:
    """Answer validation and test questions; fit the confidence on the former, judge everything on the latter.

    The fitted confidence is written into the run's directory, where `scalabl generate` finds it.

    Raises:
        UserError: bad data or options, several processes, or a run that is not finished.
    """
    from scalabl.core.files import write_json
    from scalabl.core.outputs import require_writable
    from scalabl.data.load import load_open_task
    from scalabl.runs.stock import read_generating

    if processes.world_size() > 1:
        raise UserError("Open questions are answered by one process; start it without accelerate launch.")
    read_generating(run, model=model)
    require_writable(json, reads=(run, data, model, equivalence.partition(":")[2] or None))
    options.require_counts(limit=limit)
    task = load_open_task(data)
    name = split or ("test" if "test" in task.splits else next(iter(task.splits)))
    questions = task.split(name)[:limit]
    held_out = task.splits.get("validation", ())[:limit] if name != "validation" else ()
    _check(measure)

    quiet()
    from scalabl.generation.evaluation import answer_questions, fit_on, judge
    from scalabl.generation.generate import CONFIDENCE, AnswerSampling, check
    from scalabl.runs.loading import load_run

    sampling = AnswerSampling(answers, equivalence=equivalence)
    check(samples, max_new_tokens, batch_size, sampling)
    loaded = load_run(run, model=model, generating=True)
    shared: dict[str, Any] = {
        "samples": samples, "seed": seed, "max_new_tokens": max_new_tokens, "measure": measure,
        "chat": chat, "batch_size": batch_size,
    }  # fmt: skip
    console, fitted, why = words_console(), None, "there are no validation questions"
    with progress_bar() as progress:
        bar = progress.add_task("answering", total=len(questions) + len(held_out), detail="")

        def advance(done: int) -> None:
            progress.advance(bar, done)

        if held_out:
            validation = answer_questions(loaded, held_out, **shared, advance=advance)
            try:
                fitted = fit_on(validation)
            except UserError as error:
                why = str(error)
        test = answer_questions(loaded, questions, **shared, sampling=sampling, advance=advance)
    if fitted is not None:
        fitted.save(run / CONFIDENCE)
    found = judge(test, fitted, seed=seed)
    if json is not None:
        recipe = loaded.record.recipe
        about = {"data": data, "split": name, "model": recipe["model"], "method": recipe["method"], "measure": measure}
        write_json(json, {**about, **shared, "answers": answers, **found, "versions": loaded.record.versions})
    _print(console, found, measure)
    if fitted is None:
        console.print(f"no confidence was fitted: {why}", style="yellow", highlight=False)


def _check(measure: str) -> None:
    from scalabl.generation.correctness import MEASURES

    if measure not in MEASURES:
        raise UserError(f"--measure is {measure!r}; it must be one of {', '.join(MEASURES)}.")
    if measure == "f1":
        raise UserError("--measure f1 is no right or wrong; it is reported anyway, choose exact_match or contains.")


def _print(console: Any, found: dict[str, Any], measure: str) -> None:
    from rich import box
    from rich.table import Table

    console.print(
        f"{found['n']:,} answers, {found['accuracy']:.1%} right ({measure.replace('_', ' ')}), "
        f"F1 {found['f1']:.3f}, {found['tokens_an_answer']:.1f} tokens an answer",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("score", "AUROC ↑", "PRR ↑", "AURC ↓", "ECE % ↓", "tokens"):
        table.add_column(column, justify="left" if column == "score" else "right")
    if "confidence" in found:
        fitted = found["confidence"]
        name = f"confidence ({fitted['kind']} of {', '.join(fitted['scores'])})"
        table.add_row(name, *(_cell(fitted[m]) for m in ("auroc", "prr", "aurc")), _cell(fitted["ece"], 100), "")
    for name in _shown(found["scores"]):
        row = found["scores"][name]
        table.add_row(name, *(_cell(row[m]) for m in ("auroc", "prr", "aurc")), "", f"{row['tokens']:.0f}")
    console.print(table)
    console.print("± half the 95% bootstrap interval; tokens: generated for an answer with that score.", style="dim")


def _shown(scores: dict[str, Any]) -> list[str]:
    """The scores of a short table: the usual ones, and the best by AUROC; all of them are in --json."""

    def auroc(name: str) -> float:
        value = scores[name]["auroc"]["value"]
        return -1.0 if value is None else float(value)

    best = sorted(scores, key=auroc, reverse=True)[:_MOST]
    return sorted(dict.fromkeys([*best, *(name for name in _SHOWN if name in scores)]), key=auroc, reverse=True)


def _cell(figure: dict[str, Any], scale: float = 1.0) -> str:
    if figure["value"] is None:
        return "–"
    half = (figure["high"] - figure["low"]) / 2
    digits = 1 if scale == 100 else 3
    return f"{scale * figure['value']:.{digits}f} ± {scale * half:.{digits}f}"
