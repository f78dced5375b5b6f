"""Settings that are tried are chosen by validation rows alone under one seed, and taken for all; what is tested on."""

import csv
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from tiny_base import tiny_encoder, write_jsonl, write_texts

import scalabl
from scalabl.core.errors import UserError
from scalabl.core.files import write_json
from scalabl.data import load_task
from scalabl.data.assemble import select_rows
from scalabl.data.load import rows_of
from scalabl.data.typos import with_typos
from scalabl.metrics.calibration import row_losses
from scalabl.runs.loading import load_run
from scalabl.runs.settings import RowSettings
from scalabl.study.benchmark import write_results
from scalabl.study.cells import PREDICTION, TRAINING, finished
from scalabl.study.detection import detection_rows
from scalabl.study.frontier import points_of
from scalabl.study.outcomes import scores
from scalabl.study.plan import StudyPlan, make_plan
from scalabl.study.pooled import holm, two_sided
from scalabl.study.predictions import UNLABELLED, read_predictions
from scalabl.study.results import tidy
from scalabl.study.run import run_here
from scalabl.study.study import Study, make_study
from scalabl.study.summary import summarize
from scalabl.study.tried import trials
from scalabl.study.work import RUN

RATES = [1e-3, 3e-2]


def content(rows: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(tiny_encoder()),
        "tasks": [{"name": "few", "data": str(rows), "rows_per_class": 4, "out_of_scope": [str(rows / "other.jsonl")]}],
        "typos": [0.2],
        "methods": [
            {"method": "mle", "tried": {"learning_rate": RATES}},
            {"method": "scalabl", "tried": [{"init_sigma": 0.5}, {"prior_mean": 0.577, "learning_rate": 3e-2}]},
            {"name": "scalabl mean", "of": "scalabl", "samples": 0},
            {"name": "two", "method": "ensemble", "members": 2},
        ],
        "seeds": [0, 1],
        "samples": 3,
        "validation_rows": 9,
        "settings": {"steps": 4, "batch_size": 4, "r": 4, "lora_alpha": 8, "layers": "last:2"},
    } | changes


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_texts(tmp_path_factory.mktemp("rows"))
    known = load_task(str(directory)).labels
    assert known is not None
    other = [{"text": f"of nothing {i}", "label": label} for i, label in enumerate(("none", "else", known[0]))]
    write_jsonl(directory / "other.jsonl", other)
    return directory


@pytest.fixture(scope="module")
def done(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, StudyPlan, Path]:
    study, output = make_study(content(rows), "tiny"), tmp_path_factory.mktemp("cells")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALABL_CACHE", str(tmp_path_factory.mktemp("cache")))
        run_here(make_plan(study), output)
    return study, make_plan(study, output), output


def test_the_choice_is_of_validation_rows_and_of_every_seed(done: tuple[Study, StudyPlan, Path]) -> None:
    study, plan, output = done
    assert all(finished(output, address) for address in plan.cells)
    for name in ("mle", "scalabl"):
        losses = []
        for attempt in (attempt for attempt in plan.attempts if attempt.variant.name == name):
            predictions = read_predictions(plan.cells[attempt.prediction], output)
            assert not predictions.tests  # no test row was read to choose
            facts = (finished(output, attempt.prediction) or {})["validation_nll"]
            log_probs, labels = predictions.validation
            assert facts["raw"] == pytest.approx(row_losses(log_probs, labels, 1.0).mean().item())
            loss = row_losses(log_probs, labels, facts["temperature"]).mean().item()
            assert facts["calibrated"] == pytest.approx(loss) and loss <= facts["raw"] + 1e-9
            losses.append((loss, attempt.point))
        assert len(losses) == 2
        best = min(losses, key=lambda pair: pair[0])[1]
        assert plan.choices["few", name] == best
        entries = [entry for entry in plan.entries if entry.variant.of == name and entry.variant.name != "two"]
        assert {entry.seeds for entry in entries} == {(0,), (1,)}
        for entry in entries:
            recipe = load_run(output / "cells" / entry.training[0] / RUN).record.recipe
            assert entry.chosen == best and all(recipe[setting] == value for setting, value in best.items())
            assert recipe["rows_per_class"] == 4


def test_a_task_takes_what_was_chosen_on_another(done: tuple[Study, StudyPlan, Path], rows: Path) -> None:
    _, plan, output = done
    few = content(rows)["tasks"][0]
    more = {"name": "more", "data": str(rows), "rows_per_class": 5, "chosen_on": "few"}
    both = make_plan(make_study(content(rows, tasks=[few, more]), "both"), output)
    assert both.choices == plan.choices and [a.task for a in both.attempts] == [a.task for a in plan.attempts]
    taken = [entry for entry in both.entries if entry.task == "more"]
    assert len(taken) == 7 and all(entry.chosen == plan.choices["few", entry.variant.of] for entry in taken)
    assert all(both.cells[entry.training[0]].settings["recipe"]["rows_per_class"] == 5 for entry in taken)


def test_what_was_tried_is_not_tried_again_elsewhere(
    done: tuple[Study, StudyPlan, Path], tmp_path: Path, rows: Path
) -> None:
    study, plan, output = done
    write_results(study, plan, output, tmp_path / "results", tidy(study, plan, output), "command")
    again = make_plan(study, tmp_path / "nothing", tmp_path / "results")
    assert again.choices == plan.choices and trials(again, tmp_path / "nothing") == trials(plan, output)
    # what was chosen is trained; what was not, and every trial's prediction, is not
    refused = {a.training for a in plan.attempts if a.point != plan.choices[a.task, a.variant.name]}
    assert set(plan.cells) - set(again.cells) == refused | {attempt.prediction for attempt in plan.attempts}
    # of other rows nothing is known, and of a damaged line neither
    other = make_study(content(rows, validation_rows=8), "tiny")
    assert not make_plan(other, tmp_path / "nothing", tmp_path / "results").choices
    path = tmp_path / "results" / "tried.csv"
    path.write_text(path.read_text().replace(",0,", ",0,x", 1))
    assert len(make_plan(study, tmp_path / "nothing", tmp_path / "results").choices) == 1


def test_runs_are_shared(done: tuple[Study, StudyPlan, Path]) -> None:
    _, plan, output = done
    trained = [cell.settings["recipe"] for cell in plan.cells.values() if cell.kind == TRAINING]
    # two tried under the first seed, and the chosen one under the other
    assert sorted((r["method"], r["seed"]) for r in trained) == [
        (method, seed) for method in ("mle", "scalabl") for seed in (0, 0, 1)
    ]
    by_name = {(entry.variant.name, entry.seeds): entry for entry in plan.entries}
    two = by_name["two", (0, 1)]
    assert two.training == tuple(by_name["mle", (seed,)].training[0] for seed in (0, 1))
    members = read_predictions(plan.cells[two.prediction], output).tests["few"][0]
    for seed in (0, 1):
        alone = read_predictions(plan.cells[by_name["mle", (seed,)].prediction], output).tests["few"][0][0]
        torch.testing.assert_close(members[seed], alone, atol=1e-5, rtol=0)
    assert by_name["scalabl mean", (1,)].training == by_name["scalabl", (1,)].training


def test_every_set_has_its_rows(done: tuple[Study, StudyPlan, Path], rows: Path) -> None:
    _, plan, output = done
    entry = next(entry for entry in plan.entries if entry.variant.name == "scalabl mean")
    tests = read_predictions(plan.cells[entry.prediction], output).tests
    own, typos, other = tests
    assert (own, typos, other) == ("few", "few, 20% typos", str(rows / "other.jsonl"))
    # the row with a label of the task's is not out of its scope
    assert tests[other][1].tolist() == [UNLABELLED] * 2
    run = load_run(output / "cells" / entry.training[0] / RUN)
    mistyped = with_typos(rows_of(str(rows), split="test"), 0.2)
    assert torch.equal(tests[typos][1], tests[own][1])
    encoded = run.encode(mistyped)
    with torch.no_grad():
        expected = run.predictive("mean")(run.scorer, run.scorer.scoring.collate(encoded))
    torch.testing.assert_close(tests[typos][0], expected, atol=1e-5, rtol=0)


def test_a_set_out_of_scope_has_detection_alone(
    done: tuple[Study, StudyPlan, Path], rows: Path, tmp_path: Path
) -> None:
    study, plan, output = done
    table = tidy(study, plan, output)
    out = [row for row in table if row["task"].endswith("other.jsonl")]
    assert len(out) == 2 * len(plan.entries)
    assert all(row["nll"] is row["accuracy"] is None and 0 <= row["ood_auroc_total"] <= 1 for row in out)
    write_results(study, plan, output, tmp_path, table, "scalabl benchmark tiny.yaml")
    page = (tmp_path / "README.md").read_text()
    assert "other.jsonl" in page and "## Over all tasks" in page and "](cost.svg)" in page
    with (tmp_path / "tried.csv").open() as file:
        tried = list(csv.DictReader(file))
    assert [row["chosen"] for row in tried].count("True") == 2 and len(tried) == len(plan.attempts)
    for row, attempt in zip(tried, plan.attempts, strict=True):
        assert float(row["calibrated_validation_nll"]) == pytest.approx(
            (plan.figures(output, attempt) or {})["calibrated"]
        )
    with (tmp_path / "pooled.csv").open() as file:
        pooled = {(r["method"], r["metric"], r["where"], r["task"]): r for r in csv.DictReader(file)}
    means = {
        name: fmean(row["nll"] for row in table if (row["method"], row["task"]) == (name + "+temperature", "few"))
        for name in ("mle", "scalabl")
    }
    overall = pooled["scalabl", "nll", "in scope", "all"]
    assert float(overall["difference"]) == pytest.approx(means["scalabl"] - means["mle"])
    assert overall["difference"] == pooled["scalabl", "nll", "in scope", "few"]["difference"]
    (point,) = [p for p in points_of(summarize(study, plan, output, table), "mle") if p.name == "scalabl"]
    assert point.gap == pytest.approx(means["scalabl"] - means["mle"]) and point.tasks == 1


def test_the_picture_of_costs_is_of_the_seeds_that_both_have(done: tuple[Study, StudyPlan, Path]) -> None:
    study, plan, output = done
    tables = summarize(study, plan, output, tidy(study, plan, output))
    before = {point.name: point.gap for point in points_of(tables, "mle")}
    for table in tables:  # as a further seed of plain LoRA alone would move its mean
        figure = next(line for line in table.lines if line.method == "mle+temperature").figures["nll"]
        figure.mean = None if figure.mean is None else figure.mean + 1
    assert {point.name: point.gap for point in points_of(tables, "mle")} == before and before["mle"] == 0


def test_scores_are_what_they_say_and_are_compared_by_what_they_tell(
    done: tuple[Study, StudyPlan, Path],
) -> None:
    drawn = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0)).double().log_softmax(dim=-1)
    found = scores(drawn)
    pairs = [(drawn[i].exp() * (drawn[i] - drawn[j])).sum(dim=-1) for i in range(4) for j in range(4) if i != j]
    torch.testing.assert_close(found["pairwise KL"], torch.stack(pairs).mean(dim=0))
    torch.testing.assert_close(found["entropy"], found["aleatoric"] + found["epistemic"])
    assert scores(drawn[:1]).keys() == {"probability", "entropy"}
    alike = scores(drawn[:1].expand(4, -1, -1))
    for name in ("epistemic", "pairwise KL", "logits", "answer", "disagreement"):
        torch.testing.assert_close(alike[name], torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)
    study, plan, output = done
    rows = detection_rows(plan, output)
    (row,) = [
        row
        for row in rows
        if (row["method"], row["score"], row["tells"], row["seed"]) == ("scalabl", "entropy", "out of scope", 0)
    ]
    (tabled,) = [
        row
        for row in tidy(study, plan, output)
        if row["method"] == "scalabl+temperature" and row["task"].endswith("other.jsonl") and row["seed"] == 0
    ]
    assert row["auroc"] == pytest.approx(tabled["ood_auroc_total"])


def test_p_values_are_corrected_as_holm_has_it() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    draws = torch.cat([torch.full((95,), 1.0), torch.full((4,), -1.0)])
    assert two_sided(draws) == pytest.approx(2 * 5 / 100) and two_sided(-draws) == two_sided(draws)
    assert two_sided(torch.zeros(10)) == 1


def test_what_was_tried_is_shown_before_anything_is_chosen(done: tuple[Study, StudyPlan, Path], tmp_path: Path) -> None:
    study, _, output = done
    plan = make_plan(study)
    write_results(study, plan, output, tmp_path, tidy(study, plan, output), "scalabl benchmark tiny.yaml")
    page = (tmp_path / "README.md").read_text()
    assert "## Settings that were tried" in page and "0 of 7 runs, 4 of 4 settings tried" in page
    assert f"- versions: scalabl {scalabl.__version__}" in page and re.search(r"- device: \w+", page)
    assert (tmp_path / "tried.csv").read_text().count("\n") == 1 + len(plan.attempts)


def test_nothing_is_planned_on_a_choice_before_all_are_finished(
    done: tuple[Study, StudyPlan, Path], tmp_path: Path
) -> None:
    study, before, output = done
    plan = make_plan(study)
    assert not plan.entries and len(plan.attempts) == 4 and plan.renewed(tmp_path) is plan
    losses = [0.5, 0.4, None, 0.7]
    for i, (attempt, loss) in enumerate(zip(plan.attempts, losses, strict=True)):
        facts = finished(output, before.attempts[i].prediction) or {}
        facts |= {"validation_nll": {"raw": 0.0, "calibrated": loss, "temperature": 1.0}}
        directory = tmp_path / "cells" / attempt.prediction
        directory.mkdir(parents=True)
        write_json(directory / "finished.json", facts)
        plan = plan.renewed(tmp_path)
        assert len(plan.choices) == (i + 1) // 2
    assert plan.choices["few", "mle"] == {"learning_rate": RATES[1]}
    assert plan.choices["few", "scalabl"] == {
        "prior_mean": 0.577,
        "learning_rate": 3e-2,
    }  # what is no number is never chosen


def test_waves_come_after_each_other(rows: Path, tmp_path: Path) -> None:
    methods = ["map", {"method": "mle", "wave": 0}, {"method": "mc_dropout", "wave": 1, "seeds": [0]}]
    tasks = [{"name": "late", "data": str(rows), "wave": 2}, {"name": "few", "data": str(rows), "rows_per_class": 4}]
    plan = make_plan(make_study(content(rows, methods=methods, tasks=tasks), "tiny"))
    turns = [
        (cell.settings["task"], cell.settings["method"], cell.settings["seed"])
        for cell in plan.cells.values()
        if cell.kind == PREDICTION
    ]
    first = [("few", method, seed) for seed in (0, 1) for method in ("map", "mle")]
    late = [("late", "map", 0), ("late", "mle", 0), ("late", "mc_dropout", 0)]
    late += [("late", method, seed) for seed in (1,) for method in ("map", "mle")]
    assert turns == [*first, ("few", "mc_dropout", 0), *late]


def test_a_task_may_have_fewer_seeds(rows: Path) -> None:
    methods = ["mle", {"method": "mc_dropout", "seeds": [2]}, {"name": "two", "method": "ensemble", "members": 2}]
    tasks = [{"name": "slow", "data": str(rows), "seeds": [0, 2]}, {"name": "few", "data": str(rows), "seeds": [1, 0]}]
    plan = make_plan(make_study(content(rows, methods=methods, tasks=tasks, seeds=[0, 1, 2]), "tiny"))
    runs = [(entry.task, entry.variant.name, entry.seeds) for entry in plan.entries]
    slow = [("slow", "mle", (0,)), ("slow", "mle", (2,)), ("slow", "mc_dropout", (2,))]
    assert runs == [*slow, ("few", "mle", (0,)), ("few", "mle", (1,)), ("few", "two", (0, 1))]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": [{"data": "a", "seeds": []}]}, "seeds is empty; give at least one"),
        ({"tasks": [{"data": "a", "chosen_on": "b"}]}, "chosen_on of a names b, which is no task that tries"),
        ({"tasks": ["a", {"data": "b", "chosen_on": "a"}, {"data": "c", "chosen_on": "b"}]}, "chosen_on of c names b"),
        (
            {
                "tasks": ["a", {"data": "b", "chosen_on": "a"}],
                "methods": [{"method": "mle", "tasks": ["b"], "tried": {"r": [4]}}],
            },
            "mle runs on b, but not on a, where its settings are chosen",
        ),
        ({"methods": [{"method": "mle", "tried": {"r": 4}}]}, "tried of mle must name settings with lists"),
        ({"methods": [{"method": "mle", "tried": {"r": [4]}, "grid": {"r": [4]}}]}, "leave out one of the two"),
        ({"methods": [{"method": "mle", "tried": {"seed": [1]}}]}, "sets seed, which the study itself decides"),
        ({"methods": [{"name": "x", "of": "mle"}]}, "x is of 'mle', which is no method above it"),
        ({"methods": ["scalabl", {"name": "x", "of": "scalabl", "r": 4}]}, "x has the runs of scalabl and sets r"),
        ({"methods": [{"method": "mle", "members": 2}]}, "mle names members, which are an ensemble's"),
        ({"methods": ["mle", {"method": "ensemble", "members": 4}]}, "has more members than there are seeds"),
        ({"methods": [{"method": "mle", "tasks": ["other"]}]}, "tasks of mle names other"),
        ({"tasks": [{"name": "few"}]}, "tasks must be a list of names"),
        ({"tasks": [{"name": "a", "data": "x"}, {"name": "a", "data": "y"}]}, "Two tasks are called 'a'"),
        ({"typos": [2]}, "typos is 2; it must be a list of shares"),
    ],
)
def test_what_cannot_be_tried_is_refused(changes: dict[str, Any], sentence: str, rows: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        make_study(content(rows, **changes), "tiny")


def test_rows_of_each_label_are_so_many_and_the_same_ones_however_the_file_is_ordered(
    rows: Path, tmp_path: Path
) -> None:
    task = load_task(str(rows))
    taken = select_rows(task, RowSettings(rows_per_class=4)).train
    assert [sum(row.answer == label for row in taken) for label in range(3)] == [4, 4, 4]
    lines = (rows / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[::-1]))
    (tmp_path / "validation.jsonl").write_text((rows / "validation.jsonl").read_text())
    turned = select_rows(load_task(str(tmp_path)), RowSettings(rows_per_class=4)).train
    assert {row.question for row in turned} == {row.question for row in taken}
    whole = select_rows(task, RowSettings(rows_per_class=1000))
    assert whole.train == task.split("train")
    with pytest.raises(UserError, match="rows_per_class is 2, but the rows of arc-easy have no one label"):
        select_rows(load_task("arc-easy"), RowSettings(rows_per_class=2))


def test_typos_are_so_many_and_the_same_ones_in_any_order(rows: Path) -> None:
    given = [row for row in rows_of("arc-easy", split="test")[:200]]
    few, many = (with_typos(given, share) for share in (0.05, 0.15))

    def changed(a: str, b: str) -> int:
        return sum(x != y for x, y in zip(a.split(), b.split(), strict=False))

    assert with_typos(given[::-1], 0.05) == few[::-1] and with_typos(given, 0.05, seed=1) != few
    assert with_typos(given[:5], 1e-9) == given[:5]
    words = sum(len(row.question.split()) for row in given)
    low, high = (
        sum(changed(row.question, other.question) for row, other in zip(given, made, strict=True)) / words
        for made in (few, many)
    )
    assert 0.1 < low < high < 0.9
    lengths = [len(other.question) / len(row.question) for row, other in zip(given, many, strict=True)]
    assert 0.95 < sum(lengths) / len(lengths) < 1.05
    assert all(a.choices == b.choices and a.answer == b.answer for a, b in zip(given, many, strict=True))
