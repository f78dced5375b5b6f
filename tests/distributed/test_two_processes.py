"""Two processes (DDP) train, resume, predict and fail as one does."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from one_launch import SAMPLING, answer, evaluate, predictions
from safetensors.torch import load_file
from tiny_base import tiny_base, write_task
from torch import Tensor
from two_processes import HERE, head_settings_of, killed_after, launch, settings_of, write_head

from scalabl.core.errors import UserError
from scalabl.core.files import FEATURES
from scalabl.inference.calibrate import calibration_at_the_end
from scalabl.inference.calibration import Calibration
from scalabl.runs.loading import load_run
from scalabl.runs.record import RunRecord
from scalabl.training.run import train


@dataclass(frozen=True)
class Work:
    """The directory that both processes worked in, what each of them said, and what the launcher gave out."""

    path: Path
    said: list[dict[str, Any]]
    stdout: str
    stderr: str
    code: int

    def adapter(self, run: str) -> dict[str, Tensor]:
        return load_file(self.path / run / "adapter_model.safetensors")

    def log(self, run: str) -> list[dict[str, float]]:
        entries = json.loads((self.path / run / "training_log.json").read_text())
        return [entry for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    path = tmp_path_factory.mktemp("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALABL_CACHE", str(path / "cache"))
        shutil.copytree(tiny_base(), path / "base")
        write_task(path / "task")
        write_task(path / "held_out", validation=20)
        whole = settings_of(path, batch_size=8)
        train(whole, path / "one")
        write_head(path)
        train(head_settings_of(path, batch_size=8), path / "head one", calibrate=calibration_at_the_end)
        with killed_after(7):
            train(whole, path / "grown")
        patch.setenv("SCALABL_CACHE", str(path / "cache of two"))
        ended = launch("ddp", str(HERE / "one_launch.py"), str(path))
        said = [path / f"said{rank}.json" for rank in range(2)]
        assert all(file.exists() for file in said), ended.stderr[-5000:]
        train(whole, path / "left")  # killed in two processes, resumed in one
    return Work(path, [json.loads(file.read_text()) for file in said], ended.stdout, ended.stderr, ended.returncode)


# what two orders of summation do to twelve steps of Adam
CLOSE = {"rtol": 0.0, "atol": 2e-5}


@pytest.mark.parametrize("run", ["two", "resumed", "left", "grown"])
def test_the_adapter_and_its_mean_are_one_process_s(work: Work, run: str) -> None:
    one, several = work.adapter("one"), work.adapter(run)
    assert one.keys() == several.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, **CLOSE, msg=name)
    mean = load_file(work.path / run / "mean" / "adapter_model.safetensors")
    for name, tensor in load_file(work.path / "one" / "mean" / "adapter_model.safetensors").items():
        torch.testing.assert_close(mean[name], tensor, **CLOSE, msg=name)
    # twelve steps went somewhere: B was zero
    assert max(tensor.abs().max().item() for name, tensor in one.items() if "lora_B" in name) > 0.01


def test_a_classification_head_is_one_process_s(work: Work) -> None:
    one, two = work.adapter("head one"), work.adapter("head")
    assert one.keys() == two.keys() and any("classifier" in name for name in one)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, **CLOSE, msg=name)
    # what belongs to a run: the distance to its rows, and the calibration
    features = [load_file(work.path / run / FEATURES) for run in ("head one", "head")]
    assert features[0].keys() == features[1].keys()
    for name, tensor in features[0].items():
        torch.testing.assert_close(features[1][name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    made = [Calibration.of(RunRecord.read(work.path / run)) for run in ("head one", "head")]
    assert made[0] is not None and made[1] is not None and made[0].scale == made[1].scale
    assert made[0].temperatures == pytest.approx(made[1].temperatures, rel=1e-3)


def test_killed_and_resumed_in_two_processes_is_bit_for_bit_never_killed(work: Work) -> None:
    whole, resumed = work.adapter("two"), work.adapter("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("run", ["two", "resumed", "left", "grown"])
def test_the_loss_curve_and_the_kl_are_one_process_s(work: Work, run: str) -> None:
    one, several = work.log("one"), work.log(run)
    assert [entry["step"] for entry in several] == [entry["step"] for entry in one]
    for ours, theirs in zip(several, one, strict=True):
        for name in (
            "loss",
            *(f"elbo/{name}" for name in ("kl", "nll", "sigma_mean", "s_mean", "kl_weight")),
            "learning_rate",
        ):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), (ours["step"], name)


def test_the_record_is_of_both_and_every_process_gets_it(work: Work) -> None:
    ours, one = work.said[0]["record"], RunRecord.read(work.path / "one").as_dict()
    assert ours == work.said[1]["record"] == RunRecord.read(work.path / "two").as_dict()
    assert ours["processes"] == 2 and one["processes"] == 1
    for same in ("scoring", "scoring_nll", "scoring_name", "parameters", "rows", "base_fingerprint"):
        assert ours[same] == one[same], same
    assert [said["again"] for said in work.said] == [ours["adapter_sha256"]] * 2
    assert not {path.name for path in (work.path / "two").iterdir()} & {"checkpoints", ".unfinished"}


def test_with_dropout_every_rank_draws_for_itself(work: Work) -> None:
    first, second = (torch.tensor(said["first draw"]) for said in work.said)
    assert first.shape == (4, 4) and not torch.isclose(first, second).any()


def test_what_the_main_process_refuses_all_refuse_in_the_same_words(work: Work) -> None:
    assert all("holds another run (seed was 0, now 1)" in said["another run"] for said in work.said)
    assert work.said[0]["another run"] == work.said[1]["another run"]


def test_a_run_of_two_processes_is_that_of_one_where_its_steps_have_as_many_rows(work: Work) -> None:
    assert train(settings_of(work.path, batch_size=8), work.path / "two") == RunRecord.read(work.path / "two")
    with pytest.raises(UserError, match=r"run of 8 rows a step \(in 2 processes\), but batch_size 4 .* are 4; choose"):
        train(settings_of(work.path, batch_size=4), work.path / "two")
    with pytest.raises(UserError, match=r"holds another run \(batch_size was 8, now 4\)"):
        train(settings_of(work.path, batch_size=4, gradient_accumulation=2), work.path / "one")


def test_predictions_are_one_process_s_on_every_rank(work: Work) -> None:
    expected = predictions(load_run(work.path / "two"), str(work.path / "task" / "test.jsonl"))
    for rank in range(2):
        found = load_file(work.path / f"predictions{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, log_probs in expected.items():
            torch.testing.assert_close(found[name].exp(), log_probs.exp(), rtol=0, atol=1e-6, msg=name)
    assert expected["mc"].shape[0] == 5 and expected["fewer particles than processes"].shape[0] == 1
    assert not torch.equal(expected["mc"][0], expected["mc"][1])


@pytest.mark.parametrize("name", list(SAMPLING))
def test_a_file_of_answers_is_one_process_s(work: Work, name: str, tmp_path: Path) -> None:
    taken = answer(work.path / "two", str(work.path / "task" / "test.jsonl"), tmp_path / "one.jsonl", SAMPLING[name])
    assert [said["particles"][name] for said in work.said] == [taken, taken]
    ours, one = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (work.path / f"{name}.jsonl", tmp_path / "one.jsonl")
    )
    assert len(ours) == 11 and [row["id"] for row in ours] == [row["id"] for row in one]
    for row, other in zip(ours, one, strict=True):
        assert row["label"] == other["label"] and row["probs"] == pytest.approx(other["probs"], abs=1e-6)
        assert row["epistemic"] == pytest.approx(other["epistemic"], abs=1e-6)
    assert not list(work.path.glob(f".{name}.jsonl.*"))


def test_evaluate_tells_one_process_s_figures_once(work: Work, tmp_path: Path) -> None:
    evaluate(work.path, tmp_path / "one.json")
    ours, one = (json.loads(path.read_text()) for path in (work.path / "evaluated.json", tmp_path / "one.json"))
    assert ours["n"] == one["n"] == 12 and ours["accuracy"] == one["accuracy"]
    for name in ("nll", "ece", "brier"):
        assert ours[name] == pytest.approx(one[name], abs=1e-6), name
    assert work.stdout.count("ScalaBL, N = 3 + T") == 2  # in the table, and in what is said under it


def test_the_trunk_is_computed_by_one_process_and_read_by_the_other(work: Work) -> None:
    assert work.said[0]["computed trunks"] > 2 and work.said[1]["computed trunks"] == 0


def test_ctrl_c_in_one_process_stops_both_at_the_same_step(work: Work) -> None:
    assert [said["interrupted"] for said in work.said] == ["stopped at step 3 of 12"] * 2
    assert [path.name for path in (work.path / "interrupted" / "checkpoints").iterdir()] == ["checkpoint-3"]


def test_a_failure_of_one_process_ends_both_with_one_sentence_and_leaves_nothing(work: Work) -> None:
    assert work.code != 0
    ours = [line for line in work.stderr.splitlines() if line.startswith("scalabl: ")]
    assert ours == ["scalabl: The base of rank 1 is broken; mend it."]
    assert "[rank0]" not in work.stderr and "[rank1]" not in work.stderr  # a traceback of a process
    assert not (work.path / "failed").exists()
