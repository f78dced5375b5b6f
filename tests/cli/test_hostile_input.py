"""Numbers, files and calls that would lose work, never end or end in a traceback: each is refused in a sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from program import Program, train_arguments
from safetensors.torch import load_file, save_file
from tiny_base import as_json, questions, tiny_base, write_jsonl

from scalabl.core.errors import UserError, explain
from scalabl.core.outputs import require_writable
from scalabl.planning.plan import make_plan
from scalabl.planning.step import PlannedRows
from scalabl.runs.directory import lock_directory
from scalabl.runs.settings import Settings
from scalabl.training.monitors import finite

SHORT = ("--samples", 2, "--max-new-tokens", 2)


@pytest.fixture
def open_rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "open.jsonl", [{"question": f"which {i}?", "answers": ["red"]} for i in range(4)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", 10**23), "--seed"),
        (("--seed", -1), "--seed"),
        (("--samples", 10**26), "--samples"),
        (("--temperature", "nan"), "--temperature is nan"),
        (("--temperature", "inf"), "--temperature is inf"),
        (("--temperature", 1e-300), "--temperature is 1e-300"),
        (("--max-new-tokens", 10**11), "more than the 512 that the model has positions for"),
    ],
)
def test_numbers_of_generate(program: Program, scalabl_run: Path, options: tuple[object, ...], message: str) -> None:
    assert message in program("generate", scalabl_run, "--prompt", "red", *options).sentence()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", -3), "--limit is -3; it must be at least 1"),
        (("--limit", 0), "--limit is 0; it must be at least 1"),
        (("--report", "page.html"), "--report is for questions with choices"),
        (("--ood", "rows.jsonl"), "--ood is for questions with choices"),
        (("--predictive", "linearized"), "--predictive is for questions with choices"),
        (("--max-error", 0), "--max-error is for questions with choices"),
        (("--adaptive",), "--adaptive is for questions with choices"),
        (("--draws", "sobol"), "--draws is for questions with choices"),
        (("--stochastic-layers", "last:1"), "--stochastic-layers is for questions with choices"),
    ],
)
def test_open_questions_leave_no_option_unread(
    program: Program, scalabl_run: Path, open_rows: Path, options: tuple[object, ...], message: str
) -> None:
    said = program("evaluate", scalabl_run, "--data", open_rows, *SHORT, *options).sentence()
    assert message in said


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (
            "evaluate",
            ("--max-new-tokens", 3),
            "--max-new-tokens is for open questions; leave it out for",
        ),
        ("evaluate", ("--equivalence", "exact"), "--equivalence is for open questions"),
        ("evaluate", ("--confidence", 0.9), "--confidence is of --adaptive or --max-error; leave it out"),
        ("predict", ("--confidence", 0.9), "--confidence is of --adaptive or --max-error; leave it out"),
        ("predict", ("--score", "entropy"), "--score is of --max-error; leave it out"),
        ("predict", ("--guarantee", "conformal"), "--guarantee is of --max-error; leave it out"),
        ("predict", ("--block-rows", 3), "--block-rows is of --ray; leave it out"),
        ("inspect", ("--rows", 3), "--rows is of --variance; leave it out"),
        ("inspect", ("--model", "elsewhere"), "--model is of --variance; leave it out"),
        ("generate", ("--equivalence", "exact"), "--equivalence is of --answers, of which there are none"),
    ],
)
def test_no_option_goes_unread(
    program: Program, scalabl_run: Path, rows: Path, tmp_path: Path, command: str, options: Any, message: str
) -> None:
    given: dict[str, tuple[Any, ...]] = {
        "evaluate": ("--data", rows), "predict": ("--input", rows, "--output", tmp_path / "answers.jsonl"),
        "inspect": (), "generate": ("--prompt", "red"),
    }  # fmt: skip
    assert message in program(command, scalabl_run, *given[command], *options).sentence()


def test_brackets_in_a_path_are_no_markup(program: Program, scalabl_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "a[" / "b] :smile: [bold]c"
    shutil.copytree(scalabl_run, run)
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "x[/y] :smile:"}))
    said = program("inspect", run)
    assert said.code == 0 and "x[/y] :smile:" in said.out


def test_answers_do_not_overwrite_their_rows(program: Program, scalabl_run: Path, rows: Path, tmp_path: Path) -> None:
    before = rows.read_bytes()
    same = tmp_path / "." / rows.name
    assert (
        "one would overwrite the other" in program("predict", scalabl_run, "--input", rows, "--output", same).sentence()
    )
    acquired = program("acquire", rows, scalabl_run, "-k", 2, "--by", "random", "--output", same)
    assert "one would overwrite the other" in acquired.sentence()
    assert rows.read_bytes() == before


def test_no_two_outputs_are_one_file(program: Program, rows: Path, scalabl_run: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "out", tmp_path / "run"
    for arguments in (
        ("generate", scalabl_run, "--prompt", "red", "--json", file, "--html", file),
        ("evaluate", scalabl_run, "--data", rows, "--json", file, "--report", file),
        train_arguments(rows, output, "--json", output),
    ):
        assert "is given twice, and one would overwrite the other" in program(*arguments).sentence()
    assert not file.exists() and not output.exists()
    require_writable(file, tmp_path / "other", reads=(output,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learning-rate", 1e300), "learning_rate is 1e+300; it must be a positive number, at most"),
        (("--lora-alpha", 1e300), "lora_alpha is 1e+300"),
        (("--prior-mean", -1e308), "prior_mean is -1e+308"),
    ],
)
def test_numbers_that_float32_does_not_hold(
    program: Program, rows: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    output = tmp_path / "run"
    assert message in program(*train_arguments(rows, output, *options)).sentence()
    assert not output.exists()


def test_a_recipe_that_names_a_number(program: Program, rows: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("5: 2\n", encoding="utf-8")
    said = program(*train_arguments(rows, tmp_path / "run", "--config", recipe)).sentence()
    assert "names 5, which is no setting" in said


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.json", '"hidden_size": 32', '"hidden_size": NaN', "'hidden_size' expected int"),
        ("config.json", '"hidden_size": 32', '"hidden_size": "big"', "'hidden_size' expected int"),
        ("config.json", '"hidden_size": 32', '"hidden_size": -32', "negative dimension"),
        ("tokenizer_config.json", None, "[]", "tokenizer"),
    ],
)
def test_damaged_models(
    program: Program, rows: Path, tmp_path: Path, file: str, old: str | None, new: str, message: str
) -> None:
    model = shutil.copytree(tiny_base(), tmp_path / "model")
    text = (model / file).read_text(encoding="utf-8")
    assert old is None or old in text
    (model / file).write_text(new if old is None else text.replace(old, new), encoding="utf-8")
    output = tmp_path / "run"
    assert message in program(*train_arguments(rows, output, "--model", model)).sentence()
    assert not output.exists()
    if old is not None:
        assert message in program("plan", "--model", model).sentence()


def test_a_model_without_numbers(program: Program, rows: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_base(), tmp_path / "model")
    weights = {name: torch.full_like(w, torch.nan) for name, w in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "run"
    said = program(*train_arguments(rows, output, "--model", model, "--scoring", "continuation")).sentence()
    assert "scores are NaN or infinite; check its weights" in said
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seq", 10**22), "more than a plan is made for"),
        (("--batch", 10**9), "more than a plan is made for"),
        (("--samples", 10**6), "more than a plan is made for"),
        (("--optimizer", "adamwise"), "optimizer is 'adamwise'; it must be one of adamw_torch"),
    ],
)
def test_plans_of_what_no_machine_holds(program: Program, options: tuple[object, ...], message: str) -> None:
    assert message in program("plan", "--model", tiny_base(), *options).sentence()


def test_the_largest_batch_is_looked_for_among_those_that_can_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plan", "step"):
        monkeypatch.setattr(f"scalabl.planning.{module}.MOST", 256)
    settings, rows = Settings.flat(model=str(tiny_base()), layers="last:1"), PlannedRows(1, 256 // 4)
    made = make_plan(settings, rows, device="cuda", card=2**60, samples=2)
    assert made.largest["training"] == 4 and made.largest["prediction"] == 2


def test_a_log_is_json_whatever_it_holds() -> None:
    log = [{"loss": 1.5, "grad_norm": float("inf"), "step": 1}, {"kl": float("nan"), "name": "x"}]
    assert json.loads(json.dumps(finite(log), allow_nan=False)) == [
        {"loss": 1.5, "grad_norm": None, "step": 1},
        {"kl": None, "name": "x"},
    ]


def test_norms_that_overflow_do_not_stop_a_run_at_its_end(program: Program, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert program(*train_arguments(rows, output, "--lora-alpha", 1e30)).code == 0
    assert any(
        value is None for logs in json.loads((output / "training_log.json").read_text()) for value in logs.values()
    )


_HOLDER = """
import sys
from pathlib import Path
from scalabl.runs.directory import lock_directory
assert lock_directory(Path(sys.argv[1])) is not None
print("held", flush=True)
sys.stdin.read()
"""


def test_two_trainings_do_not_share_a_directory(program: Program, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert "Another call trains into" in program(*train_arguments(rows, output)).sentence()
        assert output.is_dir() and not any(output.iterdir())  # left to the one that holds it
        other.send_signal(signal.SIGKILL)
    finally:
        other.kill()
        other.communicate()
    assert program(*train_arguments(rows, output)).code == 0  # nothing is left of a lock
    lock = lock_directory(output)
    assert lock is not None  # and the training has let go
    with pytest.raises(UserError, match="wait for its end"):
        lock_directory(output)
    os.close(lock)


def test_what_another_call_has_written_meanwhile(tmp_path: Path) -> None:
    ours, place = tmp_path / ".out.1", tmp_path / "out"
    for directory in (ours, place):
        directory.mkdir()
        (directory / "x").touch()
    (tmp_path / "file").touch()
    for source, target, words in ((ours, place, "another call has written"), (tmp_path / "file", place, "a directory")):
        with pytest.raises(OSError) as caught:
            os.replace(source, target)
        sentence: Any = explain(caught.value)
        assert sentence.startswith(f"{place}: {words}")


def test_evaluate_refuses_seeds_that_torch_does_not_take(program: Program, scalabl_run: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "few.jsonl", map(as_json, questions(3)))
    for command in (
        ("evaluate", scalabl_run, "--data", rows),
        ("predict", scalabl_run, "--input", rows, "--output", "x"),
    ):
        assert "--seed" in program(*command, "--seed", 10**30).sentence()
