"""The script for a borrowed GPU: what it starts is there and takes the options that it is given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import predictive
import pytest
import scale
import training_cost
import typer
from tiny_base import questions, write_task

import scalabl.cli.benchmark
import scalabl.cli.train  # noqa: F401  (the two add their commands to the app)
from scalabl.cli.app import app
from scalabl.data import Task, find, store
from scalabl.study.plan import make_plan
from scalabl.study.study import read_study

ROOT = Path(__file__).resolve().parents[2]
# stands in for Python: notes what is to be started, and runs what comes on its standard input
RECORDER = """#!{python}
import json, os, sys
if sys.argv[1] == "-":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with open({record!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


class Reached(Exception):
    """The arguments were taken, and the work would begin."""


def reached(*_: object, **__: object) -> None:
    raise Reached


def session(directory: Path, *arguments: str) -> list[list[str]]:
    """Run the script; the command lines that it starts."""
    recorder, record = directory / "python", directory / "record.jsonl"
    recorder.write_text(RECORDER.format(python=sys.executable, record=str(record)), encoding="utf-8")
    recorder.chmod(0o755)
    own = {"PYTHON": str(recorder), "WORK": str(directory / "work"), "OUT": str(directory / "out")}
    made = subprocess.run(
        [str(ROOT / "scripts" / "gpu_session.sh"), *arguments], env=os.environ | own, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("size", [[], ["--toy"]])
def test_every_command_is_understood(size: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path / "work-toy" / "task")  # as if made before
    (tmp_path / "work-toy" / "base").mkdir()
    lines = session(tmp_path, *size)
    programs = [line[0] if line[0] != "-m" else " ".join(line[:3]) for line in lines]
    assert programs == [
        "benchmarks/scale.py", "benchmarks/training_cost.py", "benchmarks/scale.py", "-m scalabl train",
        "benchmarks/predictive.py", "-m scalabl benchmark",
    ]  # fmt: skip
    monkeypatch.setattr(scale, "Study", reached)
    monkeypatch.setattr(scale.Clock, "left", reached)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(training_cost, "child", reached)
    monkeypatch.setattr(predictive, "bench_of", reached)
    mains = {"scale": scale.main, "training_cost": training_cost.main, "predictive": predictive.main}
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in lines:
        if line[0] == "-m":
            context = commands[line[2]].make_context(line[2], list(line[3:]))  # raises where an option is unknown
            assert Path(context.params["output"]).is_relative_to(tmp_path)
            continue
        assert (ROOT / line[0]).is_file()
        monkeypatch.setattr("sys.argv", line)
        with pytest.raises(Reached):
            mains[Path(line[0]).stem]()
    study = read_study(next((tmp_path).glob("work*/paper.yaml")))
    assert len(make_plan(study).cells) == 7  # three trainings, four predictions
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"gpu-session-{i}.tar.gz" for i in (1, 2, 3)}


def test_a_part_alone_and_what_is_no_part(tmp_path: Path) -> None:
    (scale_line,) = session(tmp_path, "1")
    budget = float(scale_line[scale_line.index("--budget") + 1])
    assert 500 <= budget <= 540 and "cuda" in scale_line
    refused = subprocess.run([str(ROOT / "scripts" / "gpu_session.sh"), "4"], capture_output=True, text=True)
    assert refused.returncode == 2 and "usage" in refused.stderr


def test_the_papers_study_has_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(ROOT / "recipes" / "paper.yaml")
    # a plan reads rows for their digests alone, and a bare machine has not downloaded the benchmarks' own
    monkeypatch.setenv("SCALABL_CACHE", str(tmp_path))
    rows = tuple(questions(320, choices=(4,)))
    for name in {*study.tasks, *(name for shifted in study.shift.values() for name in shifted)}:
        kept = Task(name, dict.fromkeys(("train", "validation", "test"), rows), find(name).labels, "stand-in", "none")
        store.write_task(kept, store.task_folder(tmp_path, name))
    plan = make_plan(study)
    trained = [cell.label for cell in plan.cells.values() if cell.label.startswith("training ")]
    # mle, map, mc_dropout, blob, scalabl, scalabl full, monteclora, and the ensemble's other members
    assert len({label.partition(" on ")[0] for label in trained}) >= 7
    assert {label.rpartition(" on ")[2].partition(",")[0] for label in trained} == set(study.tasks)
    assert study.settings["steps"] == 5000 and study.settings["target_modules"] == "q_proj,v_proj,lm_head"
