"""Full disks and too little memory: one sentence that names the mend, and nothing half-written."""

import errno
import resource
from pathlib import Path

import own_process
import pytest
import torch
from program import Program, train_arguments

from scalabl.core.errors import UserError, explain


def limited(bytes_a_file: int, *arguments: object) -> None:
    """The program where no file may become larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, resource.RLIM_INFINITY))
    own_process.program(*arguments)


@pytest.mark.parametrize("bytes_a_file", [3_000, 20_000])
def test_writes_that_fail_leave_nothing_half_written(
    rows: Path, tmp_path: Path, own_cache: Path, bytes_a_file: int
) -> None:
    # a file may not become larger than that: the adapter of the first checkpoint, or its optimiser state
    output = tmp_path / "run"
    said = own_process.run(limited, bytes_a_file, *train_arguments(rows, output))
    assert said.returncode == 2, said.stderr
    (line,) = said.stderr.splitlines()
    assert line.startswith("scalabl: ") and ("disk" in line)
    assert not output.exists()


class _Full(OSError):
    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "No space left on device", "/data/run/scalabl.json")


def test_a_prediction_without_room_for_an_answer_leaves_no_file(
    program: Program, rows: Path, scalabl_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise _Full

    monkeypatch.setattr("scalabl.inference.batch_prediction._write", full)
    output = tmp_path / "own" / "answers.jsonl"
    output.parent.mkdir()
    ended = program("predict", scalabl_run, "--input", rows, "--output", output, "--predictive", "mean")
    assert "the disk is full" in ended.sentence()
    assert not list(output.parent.iterdir())


def test_a_full_disk_a_read_only_one_and_memory_are_named_with_their_mend(
    program: Program, rows: Path, tmp_path: Path, scalabl_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise _Full

    with monkeypatch.context() as patch:
        patch.setattr("scalabl.training.run.optimise", fail)
        sentence = program(*train_arguments(rows, tmp_path / "run")).sentence()
    assert sentence.startswith("/data/run/scalabl.json: the disk is full; free some space")
    assert not (tmp_path / "run").exists()

    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()):

        def scarce(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("scalabl.predictive.monte_carlo.MonteCarloPredictive._chunk", scarce)
            sentence = program("evaluate", scalabl_run, "--data", rows).sentence()
        assert sentence.startswith("Out of memory; lower --batch-size")


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/ro/x"), "/ro/x: the file system is read-only; choose"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission was denied; choose"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up; free"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "A checkpoint could"),
        (RuntimeError("basic_ios::clear: iostream error"), "A checkpoint could"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "Out of memory"),
        (UserError("Do this."), "Do this."),
    ],
)
def test_errors_of_libraries_become_sentences(error: Exception, start: str) -> None:
    sentence = explain(error)
    assert sentence is not None and sentence.startswith(start) and sentence.endswith(".")


def test_bugs_are_no_users_business() -> None:
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOENT, "No"),
        KeyError("x"),
    ):
        assert explain(error) is None


def test_allocating_too_much_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert str(explain(caught.value)).startswith("Out of memory")
