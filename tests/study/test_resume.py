"""A benchmark that is killed goes on where it was: no finished cell is done again, no work is lost for good."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from own_process import OwnProcess, program
from tiny_study import content, finished_addresses, snapshot, write

from scalabl.core.errors import UserError
from scalabl.study.cells import Cell, finished
from scalabl.study.plan import StudyPlan, make_plan
from scalabl.study.run import attempt, failures, open_cells, run_here
from scalabl.study.study import read_study


@pytest.fixture
def recipe(tmp_path: Path, base_directory: Path, task_directory: Path, own_cache: Path) -> Path:
    """Runs long enough to be met at work, with checkpoints."""
    study = content(base_directory, task_directory, methods=["mle", "tfb", "scalabl"], seeds=[0])
    study["settings"] |= {"steps": 150, "save_steps": 10}
    return write(tmp_path / "study.yaml", study)


@pytest.fixture
def short_recipe(recipe: Path) -> Path:
    """The same in as few steps as a run needs, for what is not met at work."""
    study = yaml.safe_load(recipe.read_text())
    study["settings"] |= {"steps": 4, "save_steps": 2}
    return write(recipe, study)


def start(recipe: Path, output: Path, *options: str) -> OwnProcess:
    """`scalabl benchmark` in a process of its own, which writes its standard error to `errors(recipe)`."""
    return OwnProcess(program, "benchmark", recipe, "--output", output, *options, stderr=errors(recipe))


def errors(recipe: Path) -> Path:
    return recipe.with_name("stderr.txt")


def wait_for(what: str, condition: Callable[[], bool], process: OwnProcess | None = None) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        if (process is not None and process.poll() is not None) or time.monotonic() > deadline:
            raise AssertionError(f"{what} never came; exit code {process and process.returncode}")
        time.sleep(0.005)


def in_training(output: Path) -> bool:
    """A training cell that has a checkpoint but is not finished."""
    started = output.glob("cells/*/run/checkpoints/checkpoint-*/trainer_state.json")
    return any(finished(output, path.parents[3].name) is None for path in started)


def training_under_way(plan: StudyPlan, output: Path) -> bool:
    """A finished cell, and one that is in training."""
    return bool(finished_addresses(plan, output)) and in_training(output)


def test_a_killed_benchmark_goes_on(recipe: Path, tmp_path: Path) -> None:
    output, plan = tmp_path / "output", make_plan(read_study(recipe))
    process = start(recipe, output, "--workers", "2")
    wait_for("a checkpoint", lambda: training_under_way(plan, output), process)
    children = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    # workers end with the call that started them
    wait_for("the end of the workers", lambda: not any(map(alive, children)))

    before = snapshot(output)
    assert 1 <= len(before) < len(plan.cells)
    again = start(recipe, output)
    assert again.wait(timeout=600) == 0, errors(recipe).read_text()
    after = snapshot(output)
    assert set(after) == set(plan.cells)
    assert {address: after[address] for address in before} == before
    resumed = [facts["resumed_from"] for a in plan.cells if "resumed_from" in (facts := finished(output, a) or {})]
    assert any(step >= 5 for step in resumed)
    assert (output / "study" / "results.csv").read_text().count("\n") == 1 + 2 * len(plan.entries)

    # and once more there is nothing to do; the tables, made of the same cells, go where the recipe says
    write(recipe, yaml.safe_load(recipe.read_text()) | {"results": str(tmp_path / "tables")})
    times = {path: path.stat().st_mtime_ns for path in output.glob("cells/*/*.json")}
    assert start(recipe, output).wait(timeout=600) == 0
    assert {path: path.stat().st_mtime_ns for path in output.glob("cells/*/*.json")} == times
    for name in ("results.csv", "summary.csv", "README.md"):
        assert (tmp_path / "tables" / name).read_bytes() == (output / "study" / name).read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_benchmark_saves_and_says_how_to_go_on(recipe: Path, tmp_path: Path, workers: int) -> None:
    output, plan = tmp_path / "output", make_plan(read_study(recipe))
    process = start(recipe, output, "--workers", str(workers))
    # the first checkpoint: with two workers the second training ends soon behind the first
    wait_for("a checkpoint", lambda: in_training(output), process)
    children = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=600) == 130
    written = errors(recipe).read_text()
    assert written.strip().endswith("Interrupted; run the same command again to go on.")
    assert "Traceback" not in written
    wait_for("the end of the workers", lambda: not any(map(alive, children)))
    assert open_cells(plan, output, "") and not failures(plan, output)
    started = {path.parents[2].name for path in output.glob("cells/*/run/checkpoints/checkpoint-*")}
    assert any(finished(output, address) is None for address in started)


def test_the_lock_of_a_dead_process_is_free(short_recipe: Path, tmp_path: Path) -> None:
    cell = next(iter(make_plan(read_study(short_recipe)).cells.values()))
    directory = cell.directory(tmp_path)
    directory.mkdir(parents=True)
    code = (
        "import sys, time; from filelock import FileLock\n"
        "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(600)"
    )
    holding = subprocess.Popen([sys.executable, "-c", code, f"{directory}.lock"], stdout=subprocess.PIPE)
    assert holding.stdout and holding.stdout.readline() == b"held\n"
    assert not attempt(cell, tmp_path, "a")
    assert finished(tmp_path, cell.address) is None
    holding.send_signal(signal.SIGKILL)
    holding.wait()
    assert attempt(cell, tmp_path, "a")
    assert finished(tmp_path, cell.address) is not None
    assert not attempt(cell, tmp_path, "b")  # it is done


def test_a_failure_stops_what_needs_it_and_nothing_else(
    short_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalabl.study import work

    plan, tried, do = make_plan(read_study(short_recipe)), [], work.do

    def sometimes(cell: Cell, output: Path) -> dict[str, object]:
        tried.append(cell.label.split(" on ")[0])
        if cell.label.startswith("fitting tfb"):
            raise UserError("the anchor is lost.")
        return do(cell, output)

    monkeypatch.setattr(work, "do", sometimes)
    run_here(plan, tmp_path)
    assert tried.count("fitting tfb") == 1 and "predicting tfb" not in tried
    assert {label.split(" on ")[0]: why for label, why in failures(plan, tmp_path).items()} == {
        "fitting tfb": "the anchor is lost."
    }
    done = {plan.cells[address].label.split(" on ")[0] for address in finished_addresses(plan, tmp_path)}
    assert done == {"training mle", "predicting mle", "training scalabl", "predicting scalabl"}
    (log,) = (path for path in tmp_path.glob("cells/*/log.txt") if "anchor" in path.read_text())
    assert "Traceback" in log.read_text()

    monkeypatch.setattr(work, "do", do)
    before = snapshot(tmp_path)
    run_here(plan, tmp_path)
    assert not open_cells(plan, tmp_path, "") and not failures(plan, tmp_path)
    after = snapshot(tmp_path)
    assert {address: after[address] for address in before} == before


def descendants(pid: int) -> set[int]:
    """Processes below one, by Linux's tables."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # what has ended and waits to be collected is dead
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
