"""The tidy table, and the tables of means that are written from it."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from tiny_study import Done

from scalabl.benchmark.benchmark import facts_of
from scalabl.benchmark.cells import finished
from scalabl.benchmark.render import NOTES, Document, html, latex, layout, markdown
from scalabl.benchmark.results import SCHEMA
from scalabl.benchmark.summary import Figure, Line, Table, _mark_best, summarize
from scalabl.benchmark.work import read_predictions
from scalabl.methods.temperature import apply_temperature
from scalabl.metrics import METRICS, evaluate, ood_auroc
from scalabl.uncertainty import average, decompose


def test_there_is_a_row_for_each_entry_set_and_temperature(done: Done) -> None:
    keys = [(r["method"], r["task"], r["seed"]) for r in done.rows]
    assert len(set(keys)) == len(keys) == 2 * 2 * len(done.plan.entries)
    names = {"mle", "ensemble", "tfb", "scalabl", "scalabl mean"}
    assert {r["method"] for r in done.rows} == names | {f"{name}+temperature" for name in names}
    assert {(r["task"], r["n"]) for r in done.rows} == {(done.task, 12), (done.other, 10)}
    assert {r["particles"] for r in done.rows if r["method"].startswith("scalabl mean")} == {1}
    assert {r["seeds"] for r in done.rows if r["method"] == "ensemble"} == {"0 1"}


def test_csv_and_parquet_are_the_rows(done: Done) -> None:
    table = pyarrow.parquet.read_table(done.output / "results.parquet")
    assert table.schema.equals(SCHEMA) and table.to_pylist() == done.rows
    with (done.output / "results.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in done.rows] == read


def test_figures_are_those_of_the_predictions(done: Done) -> None:
    for row in done.rows:
        held = read_predictions(done.plan.cells[row["cell"]], done.output)
        known, log_probs = held.tests[done.task][0], held.tests[row["task"]][0]
        if row["temperature"] is not None:
            known, log_probs = (apply_temperature(x, row["temperature"]) for x in (known, log_probs))
        metrics = evaluate(average(log_probs), held.tests[row["task"]][1], bootstrap=1)
        assert {name: row[name] for name in METRICS} == {name: metric.value for name, metric in metrics.items()}
        assert (row["ood_auroc"] is None) == (row["task"] == done.task)
        assert (row["ood_auroc_epistemic"] is None) == (row["task"] == done.task or row["particles"] == 1)
        if row["task"] == done.other:
            inside, outside = decompose(known), decompose(log_probs)
            assert row["ood_auroc"] == ood_auroc(inside.total, outside.total, bootstrap=1).value
            if row["particles"] > 1:
                expected = ood_auroc(inside.epistemic, outside.epistemic, bootstrap=1).value
                assert row["ood_auroc_epistemic"] == expected


def test_costs_are_ratios_to_mle(done: Done) -> None:
    rows = {(r["method"], r["seed"]): r for r in done.rows if r["task"] == done.task}
    seconds = {
        (entry.variant.name, entry.seeds[0]): [finished(done.output, a)["seconds"] for a in entry.addresses]  # type: ignore[index]
        for entry in done.plan.entries
    }
    for (name, seed), cells in seconds.items():
        mle = seconds["mle", seed]
        assert rows[name, seed]["train_cost"] == pytest.approx(sum(cells[:-1]) / mle[0])
        assert rows[name, seed]["predict_cost"] == pytest.approx(cells[-1] / mle[-1])
    assert rows["mle", 1]["train_cost"] == rows["mle", 1]["predict_cost"] == 1
    assert rows["ensemble", 0]["train_cost"] > 1
    extra = {name: rows[name, 0]["extra_parameters"] for name, _ in rows}
    lora = finished(done.output, done.plan.entries[0].training[0])["parameters"]["lora"]  # type: ignore[index]
    # 2 layers x (q, v) x r = 4, a mean and a sigma each
    assert (extra["mle"], extra["scalabl"], extra["tfb"], extra["ensemble"]) == (0, 2 * 2 * 4 * 2, 1, lora)
    assert all(extra[f"{name}+temperature"] == extra[name] + 1 for name in ("mle", "scalabl", "ensemble"))


def test_means_are_those_of_the_seeds(done: Done) -> None:
    tables = summarize(done.study, done.plan, done.output, done.rows)
    assert [(t.trained_on, t.task, t.shifted) for t in tables] == [
        (done.task, done.task, False),
        (done.task, done.other, True),
    ]
    for table in tables:
        for line in table.lines:
            rows = [r for r in done.rows if (r["method"], r["task"]) == (line.method, table.task)]
            assert line.seeds == len(rows) == (1 if line.method.startswith("ensemble") else 2)
            assert line.figures["nll"].mean == pytest.approx(sum(r["nll"] for r in rows) / len(rows))
            assert line.collapsed == sum(r["collapsed"] is not None for r in rows)
            assert (line.figures["nll"].half is None) == (line.seeds == 1)
    mle, tempered = tables[0].lines[:2]
    assert set(mle.figures["nll"].versus) == {"mle+temperature"} and set(tempered.figures["nll"].versus) == {"mle"}
    assert mle.figures["accuracy"].mean == tempered.figures["accuracy"].mean


def line(method: str, nll: float, *, collapsed: int = 0) -> Line:
    why = "At chance: 25% & no more." if collapsed else None
    figures = {name: Figure(nll if name == "nll" else 0.5, 0.01) for name in METRICS}
    others = ("temperature", "ood_auroc", "ood_auroc_epistemic", "train_cost", "predict_cost")
    figures |= {name: Figure(None) for name in others} | {
        name: Figure(7.0) for name in ("extra_parameters", "peak_memory")
    }
    return Line(method, 3, collapsed, why, figures)


def test_bold_is_the_best_and_what_ties_with_it_but_nothing_at_chance() -> None:
    from test_compare import drawn

    said = {"good": drawn(3, 200, gain=2.0, first=1), "bad": drawn(3, 200, gain=-2.0, first=2)}
    said |= {"twin": said["good"], "chance": drawn(3, 200, gain=5.0, first=3)}
    means = {name: sum(o.figures["nll"] for o in by_seed.values()) / 3 for name, by_seed in said.items()}
    lines = [line(name, mean, collapsed=int(name == "chance")) for name, mean in means.items()]
    assert min(means, key=means.__getitem__) == "chance"
    _mark_best(lines, said)
    assert {made.method for made in lines if made.figures["nll"].best} == {"good", "twin"}
    alone = [line("good", 1.0)]
    _mark_best(alone, said)
    assert not alone[0].figures["nll"].best


@pytest.fixture
def document() -> Document:
    better, worse = line("a_b+temperature", 1.04), line("<i>r=8 & 50%", 2.0, collapsed=2)
    better.figures["nll"].best = True
    better.figures["nll"].versus = {"mle": "better", "mle+temperature": "worse"}
    return layout("Study", {"model": "a_model", "command": "scalabl benchmark x.yaml"},
                  [Table("arc-easy", "arc-easy", 1200, [better, worse])])  # fmt: skip


def test_markdown(document: Document) -> None:
    text = markdown(document)
    assert "- model: a_model" in text and "trained on arc-easy, tested on arc-easy (1,200 rows)" in text
    assert "| a_b+temperature | 3 | 50.0 ±1.0 | **1.040** ±0.010 ▲▽ |" in text
    assert "at chance in 2 of 3" in text and "25% & no more." in text and all(note in text for note in NOTES)
    widths = {row.count("|") for row in text.splitlines() if row.startswith("|")}
    assert widths == {10}


def test_latex(document: Document) -> None:
    text = latex(document)
    assert r"a\_b+temperature & 3 & 50.0 {\scriptsize$\pm$1.0} & \textbf{1.040} {\scriptsize$\pm$0.010}" in text
    assert r"$^{\blacktriangle\triangledown}$" in text and r"r=8 \& 50\%" in text
    body = "\n".join(row for row in text.splitlines() if not row.startswith("%"))
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    assert len(re.findall(r"(?<!\\)%", body)) == 0 and body.isascii()
    cells = {len(re.findall(r"(?<!\\)&", row)) for row in body.splitlines() if row.endswith(r"\\")}
    assert cells == {8}


class Page(HTMLParser):
    """Tags that stand open, and attributes that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.loads += [name for name, _ in attrs if name in ("src", "href")]
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def test_html(document: Document) -> None:
    text, page = html(document), Page()
    page.feed(text)
    assert not page.open and not page.loads
    assert "&lt;i&gt;r=8 &amp; 50%" in text and "<strong>1.040</strong>" in text
    assert len(page.cells) == 2 * 8 and page.cells[2].split() == ["1.040", "±0.010", "▲", "▽"]


def test_every_table_says_what_it_is_of(done: Done) -> None:
    facts = facts_of(done.study, done.plan, done.output, done.rows, "scalabl benchmark tiny.yaml")
    assert facts["model"] == done.study.model and facts["seeds"] == "0, 1"
    assert facts["finished"] == f"{len(done.plan.entries)} of {len(done.plan.entries)} runs"
    assert f"torch {torch.__version__}" in facts["versions"] and facts["device"].startswith(("cpu", "cuda"))
    assert "24 training, 9 validation rows" in facts[f"data, {done.task}"]
    for name in ("md", "tex", "html"):
        text = (done.output / f"results.{name}").read_text(encoding="utf-8")
        assert "scalabl benchmark tiny.yaml" in text
    assert not list(Path(done.output).glob(".results*"))
