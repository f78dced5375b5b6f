"""A run that was killed, interrupted or met a full disk ends with the same weights, bit for bit."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from own_process import OwnProcess, program
from short_run import STEPS, send_at_checkpoint, settings_of, start, weights

from scalabl.core.errors import UserError
from scalabl.runs.record import RunRecord
from scalabl.training import run as run_module
from scalabl.training.checkpoints import last_checkpoint
from scalabl.training.run import Interrupted, train

KINDS: dict[str, dict[str, Any]] = {
    "cached trunk": {},
    "all layers, accumulation, full covariance": {
        "layers": "all", "gradient_accumulation": 2, "covariance": "full", "lora_dropout": 0.1,
    },
}  # fmt: skip


def logged(run: Path) -> list[dict[str, float]]:
    """The log, without what time it took and without the loss: after resuming, its first mean is over fewer steps."""
    entries = json.loads((run / "training_log.json").read_text())
    return [{k: v for k, v in entry.items() if k not in ("loss", "elbo/nll")} for entry in entries if "loss" in entry]


@pytest.mark.parametrize("changes", KINDS.values(), ids=list(KINDS))
def test_a_killed_run_resumes_to_the_same_weights(
    changes: dict[str, Any], base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path
) -> None:
    settings = settings_of(base_directory, task_directory, **changes)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(settings, killed)
    send_at_checkpoint(process, killed, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert RunRecord.read(killed).status == "running" and not (killed / "adapter_model.safetensors").exists()
    reached = max(int(path.name.rpartition("-")[2]) for path in killed.glob("checkpoints/checkpoint-*"))
    assert 5 <= reached < STEPS
    train(settings, whole)
    train(settings, killed)
    assert weights(killed) == weights(whole)
    assert logged(killed) == logged(whole)
    assert not (killed / "checkpoints").exists()


def test_ctrl_c_saves_a_checkpoint_exits_130_and_resumes_to_the_same_weights(
    base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path
) -> None:
    settings = settings_of(base_directory, task_directory)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps(settings.as_dict()))  # JSON is YAML
    stderr = tmp_path / "stderr"
    process = OwnProcess(program, "train", "--config", config, "--output", stopped, stderr=stderr)
    send_at_checkpoint(process, stopped, signal.SIGINT)
    said = stderr.read_text()
    assert process.returncode == 130
    last = last_checkpoint(stopped)
    assert last is not None
    step = int(last.name.rpartition("-")[2])
    assert 5 <= step < STEPS
    assert said == f"scalabl: Interrupted, stopped at step {step} of {STEPS}; run the same command again to go on.\n"
    train(settings, whole)
    train(settings, stopped)
    assert weights(stopped) == weights(whole)


class _Stop(BaseException):
    """As sudden as a kill, but in this process."""


def stop_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise _Stop

    monkeypatch.setattr(run_module, name, stop)


def test_a_kill_between_the_last_step_and_the_end_resumes_too(
    base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(base_directory, task_directory, steps=6)
    train(settings, tmp_path / "whole")
    for point in ("_publish", "sha256"):
        with monkeypatch.context() as patch, pytest.raises(_Stop):
            stop_in(patch, point)
            train(settings, tmp_path / point)
        assert RunRecord.read(tmp_path / point).status == "running"
        train(settings, tmp_path / point)
        assert weights(tmp_path / point) == weights(tmp_path / "whole")
        assert {p.name for p in (tmp_path / point).iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_a_half_written_checkpoint_is_passed_over(
    base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(base_directory, task_directory, steps=12)
    train(settings, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(_Stop):
        stop_in(patch, "_publish")
        train(settings, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-12"]
    # as a kill leaves it: weights cut off, the state (the trainer's last file) not there or cut off
    newest = checkpoints / "checkpoint-12"
    half = newest / "adapter_model.safetensors"
    half.write_bytes(half.read_bytes()[:100])
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    assert last_checkpoint(tmp_path / "run") == checkpoints / "checkpoint-10"
    assert not newest.exists()
    train(settings, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def misnamed(file: Path) -> None:
    """An entry's name in the archive's directory is no UTF-8, and said to be it."""
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 9] |= 8
    content[entry + 46] = 0xFA
    file.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(base_directory: Path, task_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that was stopped behind the last one, with checkpoints 10 and 12."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Stop):
        stop_in(patch, "_publish")
        train(settings_of(base_directory, task_directory, steps=12), output)
    return output


@pytest.mark.parametrize("damage", [emptied, halved, flipped, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_in_a_sentence(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    files = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors")
    for name in files:
        run = tmp_path / name
        shutil.copytree(stopped, run)
        assert last_checkpoint(run) == run / "checkpoints" / "checkpoint-12"
        damage(run / "checkpoints" / "checkpoint-12" / name)
        assert last_checkpoint(run) == run / "checkpoints" / "checkpoint-10"
        said = capsys.readouterr().err
        assert "checkpoint-12 is damaged (" in said and name in said
        assert said.endswith("; the run goes on from checkpoint-10.\n") and said.count("\n") == 1
        damage(run / "checkpoints" / "checkpoint-10" / name)
        assert last_checkpoint(run) is None
        assert capsys.readouterr().err.endswith("; the run begins anew.\n")


def test_an_archive_that_zipfile_cannot_name_is_damaged(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    misnamed(tmp_path / "run" / "checkpoints" / "checkpoint-12" / "scheduler.pt")
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "checkpoint-10"


def test_a_run_whose_checkpoints_are_damaged_ends_with_the_same_weights(
    stopped: Path, base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path
) -> None:
    settings, run = settings_of(base_directory, task_directory, steps=12), tmp_path / "run"
    train(settings, tmp_path / "whole")
    shutil.copytree(stopped, run)
    emptied(run / "checkpoints" / "checkpoint-12" / "optimizer.pt")
    (run / "checkpoints" / "checkpoint-10" / "optimizer.pt").unlink()
    (run / "README.md").write_text("mine")
    (run / "checkpoints" / "notes.txt").write_text("mine")
    train(settings, run)
    assert weights(run) == weights(tmp_path / "whole")
    assert (run / "README.md").read_text() == (run / "checkpoints" / "notes.txt").read_text() == "mine"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["notes.txt"]


def test_a_failure_before_the_first_checkpoint_leaves_the_user_s_own_files(
    base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = tmp_path / "run", settings_of(base_directory, task_directory, steps=1, batch_size=2)

    def fail(*_: Any, **__: Any) -> None:
        (run / "checkpoints" / "checkpoint-1").mkdir(parents=True, exist_ok=True)  # half written
        (run / "notes.txt").write_text("mine")
        raise RuntimeError("a disk")

    for _ in range(2):  # the first call, and one that goes on
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a disk"):
            patch.setattr(run_module, "optimise", fail)
            train(settings, run)
        assert sorted(path.name for path in run.iterdir()) == ["notes.txt", "scalabl.json"]
    assert train(settings, run).is_finished and (run / "notes.txt").read_text() == "mine"


def test_a_second_ctrl_c_and_a_failure_before_the_first_checkpoint_leave_no_directory(
    base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (KeyboardInterrupt, RuntimeError("out of memory"), OSError(28, "No space left on device")):

        def fail(*_: Any, error: Any = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, RuntimeError, OSError)):
            patch.setattr(run_module, "optimise", fail)
            train(settings_of(base_directory, task_directory), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    # so that the same place takes other settings
    train(settings_of(base_directory, task_directory, steps=1, batch_size=2), tmp_path / "run")


def test_an_interrupt_in_the_last_step_is_too_late(
    base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalabl.training.monitors import StopOnInterrupt

    step_end = StopOnInterrupt.on_step_end

    def interrupt_at(wanted: int) -> Any:
        def on_step_end(self: StopOnInterrupt, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == wanted:
                signal.raise_signal(signal.SIGINT)
            step_end(self, args, state, control, **kwargs)

        return on_step_end

    settings = settings_of(base_directory, task_directory, steps=4)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(StopOnInterrupt, "on_step_end", interrupt_at(4))
        assert train(settings, tmp_path / "last").status == "finished"
        patch.setattr(StopOnInterrupt, "on_step_end", interrupt_at(2))
        with pytest.raises(Interrupted, match="step 2 of 4"):
            train(settings, tmp_path / "early")
    assert signal.getsignal(signal.SIGINT) is before
    train(settings, tmp_path / "early")
    assert weights(tmp_path / "early") == weights(tmp_path / "last")


def test_an_unfinished_run_does_not_take_other_settings_and_cannot_be_read(
    base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalabl.runs.loading import load_run

    settings = settings_of(base_directory, task_directory, steps=6)
    with monkeypatch.context() as patch, pytest.raises(_Stop):
        stop_in(patch, "_publish")
        train(settings, tmp_path / "run")
    with pytest.raises(UserError, match="steps was 6, now 7"):
        train(settings_of(base_directory, task_directory, steps=7), tmp_path / "run")
    with pytest.raises(UserError, match="not finished"):
        load_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
