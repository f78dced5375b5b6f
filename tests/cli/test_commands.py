"""What the commands print and write."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from program import Program, batches_of
from tiny_base import as_json, questions, tiny_base, write_jsonl, write_task
from typer.main import get_command

from scalabl.cli.main import app
from scalabl.core import __version__
from scalabl.metrics import METRICS
from scalabl.runs.settings import FIELDS

_HEAVY = """
import sys
from scalabl.cli import main
sys.argv[1:] = {arguments!r}
try:
    main()
finally:
    heavy = [name for name in ("torch", "transformers", "peft", "datasets", "matplotlib") if name in sys.modules]
    print("imported:", *heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["--version"],
        ["data", "list"],
        ["train", "--output", "/nowhere/x", "--prior-std", "0"],
        ["train", "--output", "/nowhere/x", "--data", "no-such-benchmark"],
        ["train", "--steps", "few"],
        ["evaluate", "/nowhere", "--data", "arc-easy"],
        ["predict", "/nowhere", "--input", "x.jsonl", "--output", "y.jsonl"],
        ["acquire", "x.jsonl", "/nowhere", "-k", "1"],
        ["inspect", "/nowhere"],
        ["demo", "--steps", "0"],
    ],
    ids=" ".join,
)
def test_help_and_refusals_import_nothing_heavy(arguments: list[str]) -> None:
    code = _HEAVY.format(arguments=arguments)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == (0 if said.stdout else 2), said.stderr
    assert said.stderr.splitlines()[-1] == "imported:"


def commands(group: Any = None, before: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command of the program by the words that call it."""
    group, found = group or get_command(app), {}
    for name, command in group.commands.items():
        found |= commands(command, (*before, name)) if hasattr(command, "commands") else {(*before, name): command}
    return found


MANY = 15  # options in one panel: more are a wall


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_at_80_columns_cuts_no_name_and_has_no_wall_of_options(
    words: tuple[str, ...], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for each in commands()[words].params for name in each.opts if name.startswith("--")]
    hidden = [name for each in commands()[words].params if getattr(each, "hidden", False) for name in each.opts]
    monkeypatch.setenv("COLUMNS", "80")
    shown = program(*words, "--help").out
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown and max(map(len, shown.splitlines())) <= 80
    of_option = re.compile(r"^. (?:[* ]  )?(--\S+)", re.MULTILINE)
    listed = {name for found in of_option.findall(shown) for name in found.split(",")}
    assert {*names, "--help"} - set(hidden) == listed, shown
    for panel in shown.split("\N{BOX DRAWINGS LIGHT ARC DOWN AND RIGHT}"):
        assert len(of_option.findall(panel)) <= MANY, panel


@pytest.mark.parametrize("command", ["train", "plan"])
def test_settings_are_shown_in_panels(command: str, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = program(command, "--help").out
    assert "--no-gradient-checkpointing" in shown
    first, *others = shown.split("\N{BOX DRAWINGS LIGHT ARC DOWN AND RIGHT}")[1:]
    assert {"Optimisation", "Posterior", "Adapter", "Rows", "Machine"} == {panel.split()[1] for panel in others}
    if command == "train":
        names = [line.split("--")[1].split()[0] for line in first.splitlines() if "  --" in line]
        assert names[:-1] == [
            "output",
            "config",
            "model",
            "data",
            "method",
            "steps",
            "batch-size",
            "learning-rate",
            "rank",
            "seed",
        ]
        options = {name.replace("_", "-") for name, each in FIELDS.items() if each.metadata["help"]} - {"r"}
        assert all(f"--{name} " in shown for name in options)


def test_a_command_in_a_process_of_its_own_says_nothing_but_its_table(scalabl_run: Path, task_directory: Path) -> None:
    # libraries speak up while they are imported, which happens once a process
    code = "from scalabl.cli import main; main()"
    arguments = ["evaluate", str(scalabl_run), "--data", str(task_directory), "--samples", "2"]
    said = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")
    assert "ScalaBL" in said.stdout and "ACC" in said.stdout


def test_train_prints_what_it_did_and_a_second_time_does_it_at_once(
    program: Program, task_directory: Path, tmp_path: Path
) -> None:
    arguments = [
        "train", "--model", tiny_base(), "--data", task_directory, "--output", tmp_path / "run", "--steps", 3,
        "--rank", 4, "--batch-size", 4, "--json", tmp_path / "record.json",
    ]  # fmt: skip
    first = program(*arguments)
    assert first.code == 0 and first.err == ""
    text = " ".join(first.out.split())
    assert "24 trained on, 9 held out" in text and "chosen by NLL on held-out rows before training" in text
    assert "variational" in text
    record = json.loads((tmp_path / "record.json").read_text())
    assert record == json.loads((tmp_path / "run" / "scalabl.json").read_text())
    again = program(*arguments)
    planned, _, rest = first.out.partition("\nrun ")  # what a run needs is said before it, not of one that is there
    assert planned.startswith("training: ") and (again.code, again.out, again.err) == (0, f"run {rest}", "")


_METRIC = {"value", "low", "high", "reason"}
_FIGURES = {*METRICS, "collapsed", "best"}
_ROW = {*_FIGURES, "method", "n", "particles", "entropy", "versus_first", "notes", "ood"}


def evaluated(program: Program, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    said = program("evaluate", *arguments, "--json", tmp_path / "figures.json")
    assert (said.code, said.err) == (0, "")
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    return found


def test_evaluate_writes_documented_keys(
    program: Program, scalabl_run: Path, task_directory: Path, tmp_path: Path
) -> None:
    shifted = write_jsonl(tmp_path / "shifted.jsonl", map(as_json, questions(5, choices=(4,), seed=9)))
    held_out = write_task(tmp_path / "held_out", validation=20)
    found = evaluated(
        program, tmp_path, scalabl_run, "--data", task_directory, "--samples", 3, "--predictive", "mc",
        "--ood", shifted, "--calibrate", held_out, "--report", tmp_path / "report.html",
    )  # fmt: skip
    assert found.keys() == _ROW | {"data", "model", "seed", "versions", "further"}
    assert all(found[name].keys() == _METRIC for name in METRICS)
    assert set(METRICS) == {"accuracy", "nll", "ece", "brier", "auroc", "aurc"}
    for name in ("accuracy", "nll", "brier"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert (found["n"], found["particles"]) == (12, 3)
    entropy = found["entropy"]
    assert entropy["total"] == pytest.approx(entropy["aleatoric"] + entropy["epistemic"])
    assert found["ood"][str(shifted)].keys() == _FIGURES | {"n", "auroc_total", "auroc_epistemic", "scores"}
    (tempered,) = found["further"]
    assert tempered.keys() == _ROW and any("temperature" in note for note in tempered["notes"])
    assert tempered["accuracy"]["value"] is not None
    page = (tmp_path / "report.html").read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_evaluate_is_the_same_every_time_and_mean_is_one_particle(
    program: Program, scalabl_run: Path, mle_run: Path, task_directory: Path, tmp_path: Path
) -> None:
    arguments = (scalabl_run, "--data", task_directory)
    mc = ("--predictive", "mc", "--samples", 2, "--seed")
    one, again, other = (evaluated(program, tmp_path, *arguments, *mc, seed) for seed in (0, 0, 1))
    assert one == again and one["nll"] != other["nll"]
    mean = evaluated(program, tmp_path, *arguments, "--predictive", "mean", "--limit", 5)
    assert (mean["particles"], mean["n"], mean["entropy"]["epistemic"]) == (1, 5, 0)
    plain = evaluated(program, tmp_path, mle_run, "--data", task_directory / "test.jsonl")
    assert (plain["particles"], plain["method"]) == (1, "plain LoRA")


def test_evaluate_takes_labels_in_the_order_of_the_run(program: Program, task_directory: Path, tmp_path: Path) -> None:
    def rows(labels: tuple[str, ...], number: int = 12) -> list[dict[str, str]]:
        return [{"text": f"word {i}", "label": labels[i % len(labels)]} for i in range(number)]

    data = write_jsonl(tmp_path / "three" / "train.jsonl", rows(("blue", "no", "yes"))).parent
    run = tmp_path / "run"
    arguments = ("--model", tiny_base(), "--steps", 2, "--rank", 4, "--batch-size", 4)
    assert program("train", "--data", data, "--output", run, *arguments).code == 0
    # a directory that lacks a label: on its own, "no" would be its first label instead of the run's second
    fewer = write_jsonl(tmp_path / "fewer" / "test.jsonl", rows(("no", "yes")))
    one_file = evaluated(program, tmp_path, run, "--data", fewer)
    directory = evaluated(program, tmp_path, run, "--data", fewer.parent)
    assert one_file["nll"] == directory["nll"] and one_file["accuracy"] == directory["accuracy"]
    sentence = program("evaluate", run, "--data", task_directory).sentence()
    assert "the run was trained on 'blue', 'no', 'yes'" in sentence
    # a question among some of the labels is no question among all of them
    asked = [{"id": f"q{i}", "question": "word?", "choices": ["yes", "no", "blue"][:i]} for i in (3, 2)]
    path, output = write_jsonl(tmp_path / "asked.jsonl", asked), tmp_path / "answers.jsonl"
    told = ("row q2 asks among 'yes', 'no', but the run answers among 'blue', 'no', 'yes'", "asked.jsonl")
    for command in (("predict", run, "--input", path, "--output", output), ("acquire", path, run, "-k", 1)):
        sentence = program(*command).sentence()
        assert all(words in sentence for words in told)
    assert program("predict", run, "--input", write_jsonl(path, asked[:1]), "--output", output).code == 0
    # answers are ignored, whatever they are
    ignored = write_jsonl(tmp_path / "ignored.jsonl", [{"text": "a", "label": None}, {"text": "b", "label": "perhaps"}])
    assert program("predict", run, "--input", ignored, "--output", tmp_path / "others.jsonl").code == 0
    assert program("acquire", ignored, run, "-k", 2).code == 0


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_predict_writes_one_answer_a_row_in_their_order(program: Program, scalabl_run: Path, tmp_path: Path) -> None:
    rows = questions(7, seed=5)
    unlabelled = [{k: v for k, v in as_json(row).items() if k != "answer"} for row in rows]
    output = tmp_path / "answers.jsonl"
    said = program(
        "predict", scalabl_run, "--input", write_jsonl(tmp_path / "rows.jsonl", unlabelled), "--output", output,
        "--predictive", "mc",
    )  # fmt: skip
    assert (said.code, said.out, said.err) == (0, "", "")
    found = answers(output)
    assert [answer["id"] for answer in found] == [row.id for row in rows]
    for answer, row in zip(found, rows, strict=True):
        assert answer.keys() == {"id", "text", "label", "probs", "confidence", "entropy", "aleatoric", "epistemic"}
        assert list(answer["probs"]) == list(row.choices)
        assert sum(answer["probs"].values()) == pytest.approx(1)
        assert answer["confidence"] == max(answer["probs"].values()) == answer["probs"][answer["label"]]
        assert answer["entropy"] == pytest.approx(answer["aleatoric"] + answer["epistemic"])
        assert answer["epistemic"] >= 0
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_predict_and_evaluate_agree(program: Program, scalabl_run: Path, task_directory: Path, tmp_path: Path) -> None:
    test = task_directory / "test.jsonl"
    figures = evaluated(program, tmp_path, scalabl_run, "--data", test, "--samples", 3)
    output = tmp_path / "answers.jsonl"
    program("predict", scalabl_run, "--input", test, "--output", output, "--samples", 3, "--batch-size", 5)
    rows = questions(12, seed=2)
    right = torch.tensor([a["probs"][r.choices[r.answer or 0]] for a, r in zip(answers(output), rows, strict=True)])
    assert figures["nll"]["value"] == pytest.approx(-right.log().mean().item(), abs=1e-5)


def test_predict_resumes_behind_its_last_whole_line(
    program: Program, scalabl_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(9)))
    arguments = ("predict", scalabl_run, "--input", rows, "--batch-size", 2, "--output")
    program(*arguments, tmp_path / "whole.jsonl")
    output = tmp_path / "answers.jsonl"
    with batches_of(monkeypatch, killed_at=3):
        said = program(*arguments, output)
    assert said.code == 130 and said.err == "scalabl: Interrupted; run the same command again to go on.\n"
    assert not output.exists()
    (unfinished,) = tmp_path.glob(".answers.jsonl.*")
    content = unfinished.read_bytes()
    assert content.count(b"\n") == 4
    unfinished.write_bytes(content + b'{"id": "q4", "lab')  # a kill in the middle of a line
    with batches_of(monkeypatch) as calls:
        assert program(*arguments, output).code == 0
    assert calls == [2, 2, 1]
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not unfinished.exists()
    # other settings do not go on with these answers
    unfinished.write_bytes(content)
    program(*arguments, output, "--seed", 1)
    assert answers(output)[0]["probs"] != answers(tmp_path / "whole.jsonl")[0]["probs"]


def test_abstaining_answers_null_below_the_confidence(program: Program, scalabl_run: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(9)))
    program("predict", scalabl_run, "--input", rows, "--output", tmp_path / "all.jsonl")
    middle = sorted(answer["confidence"] for answer in answers(tmp_path / "all.jsonl"))[4]
    program("predict", scalabl_run, "--input", rows, "--output", tmp_path / "sure.jsonl", "--abstain", middle)
    found = answers(tmp_path / "sure.jsonl")
    assert [answer["label"] is None for answer in found] == [answer["confidence"] < middle for answer in found]
    assert sum(answer["label"] is None for answer in found) == 4


def test_inspect_shows_a_posterior_and_says_where_there_is_none(
    program: Program, scalabl_run: Path, mle_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    said = program("inspect", scalabl_run, "--json", tmp_path / "found.json")
    assert (said.code, said.err) == (0, "")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {
        "base_model", "target_modules", "stochastic_modules", "stochastic_layers", "r", "lora_alpha", "covariance",
        "prior", "lora_parameters", "variational_parameters", "kl", "layers", "warnings",
    }  # fmt: skip
    record = json.loads((scalabl_run / "scalabl.json").read_text())
    assert found["lora_parameters"] == record["parameters"]["lora"]
    assert found["variational_parameters"] == record["parameters"]["variational"]
    assert found["kl"] == pytest.approx(sum(layer["kl"] for layer in found["layers"]))
    assert [layer["name"] for layer in found["layers"]][0] == "model.layers.1.self_attn.q_proj"
    assert "layers of model.layers\n" in re.sub(" +\n", "\n", said.out)
    assert all(f" {layer['name'].removeprefix('model.layers.')} " in said.out for layer in found["layers"])
    for directory in (mle_run, scalabl_run / "mean"):
        said = program("inspect", directory, "--json", tmp_path / "plain.json")
        assert said.code == 0 and "a plain LoRA: it has no posterior" in " ".join(said.out.split())
        plain = json.loads((tmp_path / "plain.json").read_text())
        assert plain.keys() == found.keys() and plain["variational_parameters"] == 0 and plain["kl"] is None
        assert [layer["name"] for layer in plain["layers"]] == [layer["name"] for layer in found["layers"]]
        assert all(layer["sigma"] is None for layer in plain["layers"])


def test_inspect_agrees_with_the_loaded_model(program: Program, scalabl_run: Path, tmp_path: Path) -> None:
    from scalabl.runs.loading import load_run
    from scalabl.tuner import kl_divergence, prior_of
    from scalabl.tuner.diagnostics import summarize, weights_of

    program("inspect", scalabl_run, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    model = load_run(scalabl_run).scorer.model
    assert found["kl"] == pytest.approx(kl_divergence(model).item(), rel=1e-5)
    by_name = {row.name: row for row in summarize(weights_of(model), prior_of(model))}
    for layer in found["layers"]:
        summary = by_name[layer["name"]]
        assert layer["effect"] == pytest.approx(summary.effect, rel=1e-4) and layer["effect"] > 0
        assert layer["noise"] == pytest.approx(summary.noise, rel=1e-5)


def test_version_and_benchmarks(program: Program) -> None:
    assert program("--version").out.strip() == __version__
    names = program("data", "list").out.split()
    assert {"arc-easy", "arc-challenge", "openbookqa", "boolq", "winogrande-s", "winogrande-m"} <= set(names)
