"""The report: whole, self-contained, escaped, and right about who is best."""

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from scalabl.core.errors import UserError
from scalabl.inference.report import MethodResult, Report, print_table, write
from scalabl.inference.report.render import verdict
from scalabl.inference.report.table import number, plus_minus, span, table
from scalabl.inference.report.verdict import in_short, pure_guess
from scalabl.metrics import METRICS, evaluate
from scalabl.metrics.uncertainty import average

ROWS = 240


def logits(rows: int, seed: int, skill: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (rows,), generator=generator)
    found = 1.5 * torch.randn(rows, 5, generator=generator)
    found[torch.arange(rows), labels] += skill
    found[:, 4] = -torch.inf  # a fifth choice that these rows lack
    return found, labels


KNOWN, LABELS = logits(ROWS, 0)
SHIFTED, SHIFTED_LABELS = logits(90, 1, skill=0.2)


def method(name: str, scale: float = 1.0, particles: int = 1, notes: tuple[str, ...] = ()) -> MethodResult:
    generator = torch.Generator().manual_seed(2)

    def predict(base: torch.Tensor, spread: float) -> torch.Tensor:
        noise = torch.randn(particles, *base.shape, generator=generator) * spread * (particles > 1)
        return ((base + noise) * scale).log_softmax(dim=-1)

    ood, ood_labels = {"shifted set": predict(SHIFTED, 1.0)}, {"shifted set": SHIFTED_LABELS}
    return MethodResult(name, predict(KNOWN, 0.3), LABELS, ood, ood_labels, list(notes))


def constant(name: str) -> MethodResult:
    """Always the same answer: a fine ECE and nothing else."""
    share = LABELS.bincount(minlength=4) / ROWS
    log_probs = torch.cat([share.log(), torch.tensor([-torch.inf])]).expand(1, ROWS, 5)
    return MethodResult(name, log_probs, LABELS)


def report(**changes: object) -> Report:
    fields: dict[str, object] = {
        "title": "A title",
        "facts": {"model": "tiny", "command": "scalabl evaluate out"},
        "methods": [
            method("plain LoRA", 3.0),
            method("ScalaBL, N = 6", particles=6, notes=("a note",)),
            constant("flat"),
        ],
        "questions": [(f"question {i}?", ("one", "two", "three", "four")) for i in range(ROWS)],
        "training": {
            "plain LoRA": [{"step": i, "loss": 2 / (i + 1)} for i in range(50)],
            "ScalaBL": [
                {"step": i, "nll": 2 / (i + 1), "kl": 9.0, "sigma_mean": 0.1, "s_mean": 0.5} for i in range(50)
            ],
        },
    }
    return Report(**(fields | changes))  # type: ignore[arg-type]


class Page(HTMLParser):
    """Tags in balance, ids, references, and the text between the tags."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href", "src", "srcset", "action", "data"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(made: Report, folder: Path) -> tuple[str, Page]:
    write(made, folder / "report.html")
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_full_report_has_every_section_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    html, found = page(report(), tmp_path)
    assert {"figures", "reliability", "risk", "entropy", "scope", "rows", "training"} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert found.references and all(reference.startswith("#") for reference in found.references)
    assert {reference[1:] for reference in found.references} <= set(found.ids)
    assert "http" not in html and "@import" not in html and "url(" not in re.sub(r"url\(#", "", html)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    # 2 on top, 3 of reliability, 1 risk-coverage, 3 + 1 of entropy, 1 of a score of scope, 4 training curves
    assert html.count('role="img"') == 15
    assert len(html) < 2_000_000
    assert "a note" in found.text and "scalabl evaluate out" in found.text
    assert not re.search(r"#0000[ab]\d", html)  # every stand-in colour became one of the page's
    for variable in re.findall(r"var\((--[\w-]+)\)", html):
        assert f"{variable}:" in html


def test_every_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"$x^2$"
    made = report(
        title=evil,
        facts={evil: evil},
        methods=[method(evil, notes=(evil,)), method("other", 2.0)],
        questions=[(evil, (evil, "b", "c", "d"))] * ROWS,
        training={evil: [{"step": 0, "nll": 1.0}]},
    )
    made.methods[0].ood = {evil: made.methods[0].ood["shifted set"]}
    made.methods[0].ood_labels = {}
    html, found = page(made, tmp_path)
    assert "<script" not in html.lower() and "script" not in found.tags
    assert found.text.count(evil) > 15  # shown as it was written


def test_shows_the_surest_mistakes_and_the_least_sure_hits(tmp_path: Path) -> None:
    made = report(methods=[method("plain LoRA")])
    _, found = page(made, tmp_path)
    confidence, answer = average(made.methods[0].log_probs).max(dim=1)
    wrong = answer != LABELS
    surest = int((confidence * wrong).argmax())
    least = int((confidence + 9 * wrong).argmin())
    mistakes, hits = found.text.split("Surest mistakes")[1].split("Least sure hits")
    assert mistakes.split("?")[0].strip() == f"question {surest}"
    assert hits.split("?")[0].strip() == f"question {least}"
    assert f"{100 * confidence[surest]:.1f}%" in mistakes.split(" row ")[0]


def test_smallest_report(tmp_path: Path) -> None:
    """One method, one row, one particle; no shifted set, no questions, no training."""
    made = Report(
        "One",
        {},
        [MethodResult("x", torch.tensor([[[-0.1, math.log(1 - math.exp(-0.1))]]]), torch.tensor([0]))],
    )
    html, found = page(made, tmp_path)
    assert "rows" not in found.ids and "training" not in found.ids
    assert "every answer is right" in found.text
    assert "nan" not in found.text.lower()


@pytest.mark.parametrize("left_out", [{"questions": []}, {"training": {}}, {"training": {"run": []}}, {"facts": {}}])
def test_parts_can_be_left_out(left_out: dict[str, object], tmp_path: Path) -> None:
    page(report(methods=[method("plain LoRA")], **left_out), tmp_path)


def test_nan_in_the_training_log_is_left_out(tmp_path: Path) -> None:
    training = {"run": [{"step": 1, "nll": math.nan}, {"step": 2, "nll": 1.0}, {"nll": 3.0}, {"step": 3}]}
    _, found = page(report(training=training), tmp_path)
    assert "training" in found.ids


def test_table_holds_the_figures_and_is_json(tmp_path: Path) -> None:
    rows = table(report())
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    first = report().methods[0]
    expected = evaluate(average(first.log_probs), LABELS)
    for metric in METRICS:
        assert rows[0][metric]["value"] == expected[metric].value
        assert rows[0][metric]["low"] == expected[metric].low
    assert rows[0]["n"] == ROWS and rows[1]["particles"] == 6
    assert rows[1]["entropy"]["epistemic"] > 0 == rows[0]["entropy"]["epistemic"]
    shifted = rows[1]["ood"]["shifted set"]
    assert shifted["n"] == 90 and 0.5 < shifted["auroc_epistemic"]["value"] <= 1
    assert rows[0]["ood"]["shifted set"]["auroc_epistemic"]["value"] is None


def test_best_is_bold_ties_share_it_and_a_collapsed_model_never_has_it() -> None:
    # "bold" is overconfident: the same answers, a clearly worse NLL
    rows = table(report(methods=[method("bold", 6.0), method("sober"), method("sober too", 1.001), constant("flat")]))
    best = {row["method"]: row["best"] for row in rows}
    assert "nll" in best["sober"] or "nll" in best["sober too"]
    assert "nll" not in best["bold"] and "ece" not in best["bold"]
    assert all("accuracy" in best[name] for name in ("bold", "sober", "sober too"))
    assert best["flat"] == [] and rows[3]["collapsed"].startswith("At chance")
    assert rows[3]["ece"]["value"] < rows[1]["ece"]["value"] + 1e-9
    assert verdict(rows[1], "nll") == "better" and verdict(rows[3], "accuracy") == "worse"
    assert verdict(rows[3], "ece") == "at chance"
    assert verdict(rows[1], "accuracy") == "not told apart"


def test_one_method_has_no_best() -> None:
    assert table(report(methods=[method("alone")]))[0]["best"] == []


def test_collapse_is_written_out(tmp_path: Path) -> None:
    _, found = page(report(), tmp_path)
    assert "At chance: its accuracy" in found.text and "at chance" in found.text


def test_write_leaves_the_old_file_whole_when_it_fails(tmp_path: Path) -> None:
    place = tmp_path / "report.html"
    place.write_text("old")
    with pytest.raises(UserError, match="NaN"):
        write(
            report(methods=[MethodResult("x", torch.full((1, ROWS, 2), math.nan), LABELS)], questions=[]),
            place,
        )
    assert place.read_text() == "old" and list(tmp_path.iterdir()) == [place]
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write(report(methods=[method("x")]), tmp_path / "a file" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write(report(methods=[method("x")]), tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "folder", "report.html"]


def test_writes_the_same_file_twice(tmp_path: Path) -> None:
    made = report(methods=[method("plain LoRA"), method("ScalaBL", particles=3)])
    rows = table(made)
    for name in ("one.html", "two.html"):
        write(made, tmp_path / "made" / name, rows)
    assert (tmp_path / "made/one.html").read_bytes() == (tmp_path / "made/two.html").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "at least one method"),
        ({"methods": [method("x"), method("x")]}, "same name"),
        (
            {"methods": [method("x"), MethodResult("y", KNOWN[None].log_softmax(-1), (LABELS + 1) % 4)]},
            "same rows",
        ),
        ({"questions": [("q", ("a", "b"))]}, "1 questions but 240 predictions"),
        ({"questions": [("q", tuple("abcdef"))] * ROWS}, "6 choices but predictions for 5"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        table(report(**changes))


def test_terminal_table() -> None:
    console = Console(width=160, record=True, force_terminal=True, color_system="truecolor")
    rows = table(
        report(methods=[method("[red]plain[/red]", 6.0, notes=("see [1]",)), method("sober"), constant("flat")])
    )
    with console.capture() as capture:
        print_table(rows, console)
    styled = capture.get()
    text = re.sub(r"\x1b\[[\d;]*m", "", styled)
    assert "[red]plain[/red]" in text and "see [1]" in text
    assert "warning: flat: At chance" in text and "shifted: shifted set, 90 rows" in text
    sober = plus_minus(rows[1]["nll"], "nll")
    assert f"\x1b[1m{sober}\x1b[0m" in styled
    assert f"\x1b[1m{plus_minus(rows[0]['nll'], 'nll')}" not in styled


def test_a_narrow_console_cuts_no_figure() -> None:
    made = report(methods=[method("plain", 6.0), method("sober")])
    rows = table(made)
    console = Console(record=True, width=60, file=io.StringIO())
    print_table(rows, console)
    shown = console.export_text()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 60
    words = shown.split()
    for row in rows:
        for metric in METRICS:
            assert set(plus_minus(row[metric], metric).split()) <= set(words), (row["method"], metric)


def test_numbers_as_text() -> None:
    figure = {"value": 0.6083, "low": 0.5894, "high": 0.6271, "reason": None}
    assert number(0.6083, "accuracy") == "60.8" and number(0.98312, "nll") == "0.983"
    assert number(-0.0312, "nll", signed=True) == "−0.031" and number(0.031, "ece", signed=True) == "+3.1"
    assert number(-0.00001, "nll", signed=True) == "0.000"
    assert span(figure, "accuracy") == "58.9 to 62.7" and plus_minus(figure, "accuracy") == "60.8 ±1.9"
    assert plus_minus({"value": None, "low": None, "high": None}, "auroc") == "–"


def test_figures_of_each_label_stand_in_table_terminal_and_page(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(12, (300,), generator=generator)
    answers[answers == 11] = 0  # a label without a row
    found = 2 * torch.randn(1, 300, 12, generator=generator)
    found[0, torch.arange(300), answers] += 3
    labels = tuple(f"label <{i}>" for i in range(12))
    made = report(methods=[MethodResult("one", found.log_softmax(-1), answers)], questions=[], labels=labels)
    rows = table(made, bootstrap=10)
    of_labels = rows[0]["per_class"]
    assert [each["label"] for each in of_labels] == list(labels) and json.dumps(of_labels)
    right = (found[0].argmax(-1) == answers) & (answers == 3)
    assert of_labels[3]["recall"] == pytest.approx(right.sum().item() / (answers == 3).sum().item())
    assert of_labels[11]["support"] == 0 and of_labels[11]["recall"] is None
    console = Console(record=True, width=100, file=io.StringIO())
    print_table(rows, console)
    shown = console.export_text()
    worst = {each["label"] for each in sorted(of_labels[:11], key=lambda of: of["recall"])[:10]}
    assert "12 labels, the 10 of lowest recall: one" in shown
    assert {name for name in labels if name in shown} == worst
    write(made, tmp_path / "r.html", rows)
    page = (tmp_path / "r.html").read_text()
    assert all(f"label &lt;{i}&gt;" in page for i in range(12))
    with pytest.raises(UserError, match="there are 3 labels, but predictions for other numbers"):
        table(report(labels=("a", "b", "c")))
    assert "per_class" not in table(report(), bootstrap=10)[0]


def test_a_verdict_stands_on_top(tmp_path: Path) -> None:
    made = report(lead=1)
    rows = table(made)
    said = in_short(made, rows)
    sure = average(made.methods[1].log_probs).amax(dim=1).mean().item()
    gap = sure - rows[1]["accuracy"]["value"]
    expected = "as it should" if abs(gap) < 0.01 else "too sure" if gap > 0 else "not sure enough"
    accuracy = number(rows[1]["accuracy"]["value"], "accuracy")
    assert said.startswith(f"ScalaBL, N = 6 is right on {accuracy} % of 240 rows, where guessing is right on 25.0 %")
    assert expected in said and f"it says {number(sure, 'accuracy')} % on average" in said
    # three times as large logits are too sure by far, and the particles are told from them
    assert "too sure" in in_short(report(lead=0), rows)
    difference = rows[1]["versus_first"]["nll"]
    assert difference["high"] < 0 and f"Its NLL is lower than that of plain LoRA by {-difference['value']:.3f}" in said
    assert in_short(report(), rows).startswith("flat: At chance: its accuracy")
    nearly = report(methods=[method("one"), method("two", 1.00001)])
    assert in_short(nearly, table(nearly)).endswith("Its NLL is that of one, to three digits.")
    write(made, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 0 < page.index('<p id="verdict">') < page.index('id="figures"')
    assert "is a pure guess (1.39 for 4 choices)" in page


def test_a_pure_guess_is_of_the_rows_at_hand() -> None:
    log_probs = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]]).log()
    labels = torch.tensor([0, 1])
    assert pure_guess(MethodResult("m", log_probs[:, 1:], labels[1:])) == "1.10 for 3 choices"
    assert pure_guess(MethodResult("m", log_probs, labels)) == "0.69 to 1.10 for 2 to 3 choices"
    of_labels = torch.full((1, 6, 2), 0.5).log()
    several = MethodResult("m", of_labels, torch.zeros(6, dtype=torch.long), per_row=3)
    assert pure_guess(several) == "2.08 for 3 labels, each yes or no"


def test_a_baseline_is_the_first_row_of_the_page_alone(tmp_path: Path) -> None:
    plain = method("its mean")
    made = report(methods=[method("ScalaBL", 2.0)], baseline=plain)
    write(made, tmp_path / "report.html", table(made))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Against its mean, on the same rows" in page and len(made.methods) == 1
    assert [row["method"] for row in table(made)] == ["ScalaBL"]
