"""The tidy table, and the tables of means that are written from it."""

import csv
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from tiny_study import Done, content, snapshot, write

from scalabl.cli.benchmark import benchmark
from scalabl.core.errors import UserError
from scalabl.metrics import METRICS, evaluate, ood_auroc
from scalabl.metrics.uncertainty import apply_temperature, average, decompose
from scalabl.study.benchmark import facts_of, write_results
from scalabl.study.cells import finished
from scalabl.study.page import NOTES, Document, html, latex, layout, markdown
from scalabl.study.predictions import read_predictions
from scalabl.study.results import SCHEMA, csv_of, tidy
from scalabl.study.summary import BASELINES, OTHERS, Figure, Gap, Line, Table, _mark_best, figure, summarize
from scalabl.study.variants import Variant


def test_there_is_a_row_for_each_entry_set_and_temperature(done: Done) -> None:
    keys = [(r["method"], r["task"], r["seed"]) for r in done.rows]
    assert len(set(keys)) == len(keys) == 2 * 2 * len(done.plan.entries)
    names = {"mle", "ensemble", "tfb", "scalabl", "scalabl mean"}
    assert {r["method"] for r in done.rows} == names | {f"{name}+temperature" for name in names}
    assert {(r["task"], r["n"]) for r in done.rows} == {(done.task, 12), (done.other, 10)}
    assert {r["particles"] for r in done.rows if r["method"].startswith("scalabl mean")} == {1}
    assert {r["seeds"] for r in done.rows if r["method"] == "ensemble"} == {"0 1"}


def test_a_fit_that_was_deleted_takes_its_rows_out_until_it_is_done_again(done: Done, tmp_path: Path) -> None:
    for cell in (done.output / "cells").iterdir():
        if (cell / "finished.json").exists():
            (tmp_path / "cells" / cell.name).mkdir(parents=True)
            for file in ("finished.json", "predictions.safetensors", "settings.json"):
                if (cell / file).exists():
                    shutil.copyfile(cell / file, tmp_path / "cells" / cell.name / file)
    entry = next(e for e in done.plan.entries if e.post_hoc is not None and e.variant.method != "ensemble")
    (tmp_path / "cells" / str(entry.post_hoc) / "finished.json").unlink()
    left = tidy(done.study, done.plan, tmp_path)
    assert {r["cell"] for r in done.rows} - {r["cell"] for r in left} == {entry.prediction}


def test_the_columns_begin_with_what_a_reader_looks_for(done: Done) -> None:
    header = (done.output / "results.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header.startswith(
        "method,task,trained_on,seed,accuracy,nll,ece,brier,ood_auroc,extra_parameters,train_cost,predict_cost,collapsed,"
    )
    assert {"ood_auroc_total", "validation_nll", "temperature", "peak_memory"} < set(header.split(","))


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
        assert (row["ood_auroc_total"] is None) == (row["task"] == done.task)
        assert (row["ood_auroc"] is None) == (row["task"] == done.task or row["particles"] == 1)
        if row["task"] == done.other:
            inside, outside = decompose(known), decompose(log_probs)
            assert row["ood_auroc_total"] == ood_auroc(inside.total, outside.total, bootstrap=1).value
            if row["particles"] > 1:
                assert row["ood_auroc"] == ood_auroc(inside.epistemic, outside.epistemic, bootstrap=1).value


def test_settings_are_chosen_by_the_raw_predictions_on_validation_rows(done: Done) -> None:
    for row in done.rows:
        log_probs, labels = read_predictions(done.plan.cells[row["cell"]], done.output).validation
        averaged = log_probs.exp().mean(dim=0)[torch.arange(len(labels)), labels]
        expected = pytest.approx(-averaged.log().mean().item(), abs=1e-5) if row["temperature"] is None else None
        assert row["validation_nll"] == expected


def test_collapsed_says_whether_and_why_says_why(done: Done) -> None:
    assert {row["collapsed"] for row in done.rows} == {True, False}
    assert all((row["why"] or "").startswith("At chance") == row["collapsed"] for row in done.rows)


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
            assert line.collapsed == sum(r["collapsed"] for r in rows)
            assert (line.figures["nll"].low is None) == (line.figures["nll"].sd is None) == (line.seeds == 1)
        assert [line.tempered for line in table.lines] == [False] * 5 + [True] * 5
    mle, tempered = tables[0].lines[0], tables[0].lines[5]
    assert set(mle.figures["nll"].versus) == {"mle+temperature"} and set(tempered.figures["nll"].versus) == {"mle"}
    assert mle.figures["accuracy"].mean == tempered.figures["accuracy"].mean


def test_an_interval_over_seeds_stays_where_figures_can_be() -> None:
    wide = figure([0.5, 0.9], "accuracy")
    assert (
        wide.mean == pytest.approx(0.7) and wide.sd == pytest.approx(0.2 * 2**0.5) and (wide.low, wide.high) == (0, 1)
    )
    assert (figure([0.5, 0.9], "nll").high or 0) > 1
    narrow = figure([0.50, 0.51, None], "ece")
    # Student's quantile of one degree of freedom is 12.706, the half width 12.706 sd / sqrt(2) = 12.706 * 0.005
    assert (narrow.low, narrow.high) == pytest.approx((0.505 - 0.06353, 0.505 + 0.06353), abs=1e-5)


def test_the_summary_holds_the_tables(done: Done) -> None:
    tables = summarize(done.study, done.plan, done.output, done.rows)
    with (done.output / "summary.csv").open(newline="", encoding="utf-8") as file:
        read = {(r["trained_on"], r["task"], r["method"], r["metric"]): r for r in csv.DictReader(file)}
    count = 0
    for table in tables:
        for line in table.lines:
            for metric in (*METRICS, *OTHERS):
                found = line.figures[metric]
                if found.mean is None:
                    continue
                count += 1
                row = read[table.trained_on, table.task, line.method, metric]
                assert (row["mean"], row["low"]) == (str(found.mean), "" if found.low is None else str(found.low))
                for rival, gap in found.versus.items():
                    assert (row[f"minus {rival}"], row[f"minus {rival}, high"]) == (str(gap.value), str(gap.high))
    assert count == len(read)


def variant(name: str, method: str = "scalabl") -> Variant:
    return Variant(name, method, {}, 10, name, {}, {})


def line(method: str, nll: float, *, collapsed: int = 0, tempered: bool = False) -> Line:
    figures = {name: Figure(nll if name == "nll" else 0.5, 0.01, 0.4, 0.6) for name in METRICS}
    figures |= {name: Figure(None) for name in OTHERS} | {
        name: Figure(7.0) for name in ("extra_parameters", "peak_memory")
    }
    return Line(variant(method), tempered, 3, collapsed, figures)


def test_bold_is_the_best_and_what_ties_with_it_but_nothing_at_chance() -> None:
    from test_compare import drawn

    found = {"good": drawn(3, 200, gain=2.0, first=1), "bad": drawn(3, 200, gain=-2.0, first=2)}
    found |= {"twin": found["good"], "chance": drawn(3, 200, gain=5.0, first=3)}
    means = {name: sum(o.figures["nll"] for o in by_seed.values()) / 3 for name, by_seed in found.items()}
    lines = [line(name, mean, collapsed=int(name == "chance")) for name, mean in means.items()]
    assert min(means, key=means.__getitem__) == "chance"
    _mark_best(lines, found)
    assert {made.method for made in lines if made.figures["nll"].best} == {"good", "twin"}
    alone = [line("good", 1.0)]
    _mark_best(alone, found)
    assert not alone[0].figures["nll"].best


@pytest.fixture
def document() -> Document:
    better, worse = line("a_b", 1.04, tempered=True), line("<i>r=8 & 50%", 2.0, collapsed=2)
    better.figures["nll"].best = True
    gaps = (Gap(-0.2, -0.3, -0.1, "better"), Gap(0.05, 0.01, 0.09, "worse"))
    better.figures["nll"].versus = dict(zip(BASELINES, gaps, strict=True))
    facts = {"model": "a_model", "command": "scalabl benchmark x.yaml"}
    table = Table("arc-easy", "arc-easy", 1200, [better, worse])
    return layout("Study", "Is it so?", facts, [table], answer="It **is**.")


def test_markdown(document: Document) -> None:
    text = markdown(document)
    assert text.startswith("# Study\n\nIs it so?\n\nIt **is**.\n\n## arc-easy (1,200 test rows)")
    assert "- model: a_model" in text
    assert "| a_b + T | 50.0 ±1.0 | **1.040** ±0.010 ▲▽ | 50.0 ±1.0 |" in text
    assert r"| \<i>r=8 & 50% † | 50.0" in text and r"† at chance: \<i>r=8 & 50% (2 of 3 seeds)." in text
    assert "0.400 to 0.600 | −0.200 (−0.300 to −0.100) ▲ | +0.050 (+0.010 to +0.090) ▽ |" in text
    assert all(note in text for note in NOTES)
    widths = {row.count("|") for row in text.splitlines() if row.startswith("|")}
    assert widths == {12, 6} and text.count("<details>") == text.count("</details>") == 4  # behind the answer


def test_tables_without_an_answer_are_not_folded() -> None:
    made = layout("Study", "Is it so?", {}, [Table("a", "a", 3, [line("a", 1.0), line("b", 2.0)])])
    text = markdown(made)
    assert "\n**Quality and cost**\n" in text and text.count("<details>") == text.count("</details>") == 3


def test_names_are_no_markdown_and_no_line_of_their_own() -> None:
    name = "x](http://x) ![y](z) `c` | <script>\n\n# forged \x1b[31m"
    facts = {"model": name, name: "1"}
    made = layout(name, name, facts, [Table(name, name, 3, [line(name, 1.0, collapsed=1), line("b", 2.0)])])
    text = markdown(made)
    shown = r"x\](http://x) !\[y\](z) \`c\` \| \<script> # forged \\u001b\[31m"
    assert text.startswith(f"# {shown}\n\n{shown}\n\n## ") and text.splitlines()[4].endswith(" (3 test rows)")
    assert f"- model: {shown}\n- {shown}: 1\n" in text and f"| {shown} † | 50.0" in text
    assert "\x1b" not in text and not any(row.startswith("# forged") for row in text.splitlines())
    assert not any(row.startswith("# forged") for row in latex(made).splitlines())


def test_a_spreadsheet_runs_no_cell() -> None:
    names = ["=1+1", "+1", "-1", "@sum", "\t=1", "a=1", "", "mle + T"]
    rows = [{"name": name, "value": -0.5} for name in names] + [{"name": None, "value": -3}]
    read = list(csv.DictReader(io.StringIO(csv_of(rows, ["name", "value"]), newline="")))
    assert [row["name"] for row in read] == [f"'{name}" for name in names[:5]] + [*names[5:], ""]
    assert csv_of([{"name": "a\r=1"}], ["name"]) == "name\na\\u000d=1\n"
    assert [row["value"] for row in read] == ["-0.5"] * len(names) + ["-3"]


def test_latex(document: Document) -> None:
    text = latex(document)
    assert r"a\_b + T & 50.0 {\scriptsize$\pm$1.0} & \textbf{1.040} {\scriptsize$\pm$0.010}" in text
    assert r"$^{\blacktriangle\triangledown}$" in text and r"r=8 \& 50\%" in text
    body = "\n".join(row for row in text.splitlines() if not row.startswith("%"))
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    assert len(re.findall(r"(?<!\\)%", body)) == 0 and body.isascii()
    cells = {len(re.findall(r"(?<!\\)&", row)) for row in body.splitlines() if row.endswith(r"\\")}
    assert cells == {10, 4}


class Page(HTMLParser):
    """Tags that stand open, and attributes that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
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
    assert len(page.cells) == 2 * (10 + 3 * 4) and page.cells[1].split() == ["1.040", "±0.010", "▲", "▽"]


def test_the_page_of_a_study_carries_its_pictures(done: Done) -> None:
    page = Page()
    page.feed((done.output / "results.html").read_text(encoding="utf-8"))
    assert not page.open and len(page.loads) == 2
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)


def test_shifted_sets_stand_side_by_side_a_table_for_each_metric(done: Done) -> None:
    tables = summarize(done.study, done.plan, done.output, done.rows)
    inside, shifted = layout("Study", "", {}, tables).sections
    assert [len(inside.grids), len(shifted.grids)] == [4, 5]
    name = Path(done.other).name
    nll, epistemic = shifted.grids[0], shifted.grids[3]
    assert nll.columns == ("method", f"{Path(done.task).name} (trained)", f"{name} (10)")
    for (label, cells), known, other in zip(nll.rows, tables[0].lines, tables[1].lines, strict=True):
        assert label.removesuffix(" †") == known.method.replace("+temperature", " + T")
        assert [cell.text for cell in cells] == [f"{each.figures['nll'].mean:.3f}" for each in (known, other)]
        assert ("†" in cells[1].marks) == bool(other.collapsed)
    assert epistemic.columns == ("method", f"{name} (10)")
    # one particle has no epistemic part
    assert [label for label, _ in epistemic.rows][:3] == ["ensemble", "tfb", "scalabl"] and len(epistemic.rows) == 6


def test_words_written_by_hand_stay(done: Done, tmp_path: Path) -> None:
    (tmp_path / "answer.md").write_text("By hand.\n")
    for _ in range(2):
        write_results(done.study, done.plan, done.output, tmp_path, done.rows, "command")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.count("By hand.") == 1 and (tmp_path / "answer.md").read_text() == "By hand.\n"
    # the same figures give the same files
    for path in done.output.glob("*.svg"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_every_table_says_what_it_is_of(done: Done) -> None:
    facts = facts_of(done.study, done.plan, done.output, done.rows, "scalabl benchmark tiny.yaml")
    assert facts["model"] == done.study.model and facts["seeds"] == "0, 1"
    assert facts["finished"] == f"{len(done.plan.entries)} of {len(done.plan.entries)} runs"
    assert f"torch {torch.__version__}" in facts["versions"] and facts["device"].startswith(("cpu", "cuda"))
    assert "24 training, 9 validation rows" in facts[f"data, {done.task}"]
    for name in ("README.md", "results.tex", "results.html"):
        text = (done.output / name).read_text(encoding="utf-8")
        assert "scalabl benchmark tiny.yaml" in text
    assert not list(Path(done.output).glob(".*"))


def test_tables_alone_are_made_of_what_is_finished(
    done: Done, base_directory: Path, task_directory: Path, tmp_path: Path
) -> None:
    recipe = write(tmp_path / "tiny.yaml", content(base_directory, task_directory, shift={done.task: [done.other]}))
    before = snapshot(done.output)
    benchmark(recipe, output=done.output, results=tmp_path / "tables", tables_only=True)
    assert snapshot(done.output) == before
    assert (tmp_path / "tables" / "results.csv").read_bytes() == (done.output / "results.csv").read_bytes()
    assert (tmp_path / "tables" / "README.md").is_file()
    with pytest.raises(UserError, match="No prediction of this study is finished"):
        benchmark(recipe, output=tmp_path / "empty", results=tmp_path / "no tables", tables_only=True)
    # the tables keep what they were made of
    whole = (tmp_path / "tables" / "summary.csv").read_bytes()
    benchmark(recipe, output=tmp_path / "empty", results=tmp_path / "tables", tables_only=True)
    assert (tmp_path / "tables" / "summary.csv").read_bytes() == whole
