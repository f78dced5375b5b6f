"""FSDP 2 through Accelerate on two CPU processes: one process's run, killed and resumed, saved as whole tensors."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import sharded_launch
import torch
from accelerate.utils import compare_versions
from own_process import OwnProcess, program, ranks, written
from peft import PeftModel
from safetensors.torch import load_file
from sharded_launch import own_trainer
from tiny_base import tiny_base, write_task
from two_processes import head_settings_of, launcher_environment, settings_of, write_head

from scalabl.data.load import rows_of
from scalabl.inference.predictor import log_probabilities
from scalabl.predictive import MonteCarloPredictive
from scalabl.runs.loading import load_run
from scalabl.runs.models import load_base
from scalabl.runs.record import RunRecord
from scalabl.training.run import train
from scalabl.tuner.config import ScalaBLConfig, write_mean_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.skipif(compare_versions("accelerate", "<", "1.15"), reason="Accelerate does not read shards back"),
]

# every layer, the output layer too; noise that has to be the same again when a checkpointed layer is run once more
CHANGES: dict[str, Any] = {
    "target_modules": "q_proj,v_proj,lm_head",
    "layers": "all",
    "covariance": "full",
    "gradient_checkpointing": True,
    "gradient_accumulation": 2,
    "steps": 12,
    "scoring": "continuation",
    "normalization": "token",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of one process, "one", and one of two, "two", one of which was killed on the way."""
    path = tmp_path_factory.mktemp("sharded")
    shutil.copytree(tiny_base(), path / "base")
    write_task(path / "task")
    write_head(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALABL_CACHE", str(path / "cache"))
        train(settings_of(path, batch_size=4, **CHANGES), path / "one")
        config = path / "recipe.yaml"
        config.write_text(json.dumps(settings_of(path, batch_size=2, **CHANGES).as_dict()))  # JSON is YAML
        line = ("train", "--config", config, "--output", path / "two")
        place: dict[str, Any] = {"directory": path, "environment": launcher_environment("fsdp2")}
        kill_both(ranks(program, *line, **place), path)
        codes = [each.wait(900) for each in ranks(sharded_launch.main, path / "own", *line, **place)]
        own_trainer(path / "own_one", batch_size=4)
        train(head_settings_of(path, batch_size=4, layers="all"), path / "head one")
    assert codes == [0, 0], "\n".join(written(path, "err"))
    assert "".join(written(path, "out")).count("LoRA") == 1  # the main process alone prints
    return path


def kill_both(processes: list[OwnProcess], path: Path) -> None:
    """SIGKILL rank 1 as soon as there is a whole checkpoint, and then the other, as a launcher does."""
    deadline = time.monotonic() + 900
    while not list(path.glob("two/checkpoints/checkpoint-*/trainer_state.json")):
        if any(each.poll() is not None for each in processes) or time.monotonic() > deadline:
            raise AssertionError(f"no checkpoint was written: {written(path, 'err')}")
        time.sleep(0.01)
    for each in reversed(processes):
        each.send_signal(signal.SIGKILL)
        each.wait()
    record = RunRecord.read(path / "two")
    assert record.status == "running" and not (path / "two" / "adapter_model.safetensors").exists()


def test_the_adapter_is_one_process_s_in_whole_tensors(work: Path) -> None:
    one, two = (load_file(work / run / "adapter_model.safetensors") for run in ("one", "two"))
    # where lm_head is adapted and everything whole, PEFT adds the frozen output layer
    one = {name: tensor for name, tensor in one.items() if "lora_" in name}
    assert one.keys() == two.keys() and any("posterior.lower" in name for name in one)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4, msg=name)
    moved = [name for name, tensor in one.items() if "lora_B" in name and tensor.abs().max() > 0.01]
    assert any("lm_head" in name for name in moved) and any("layers.0" in name for name in moved)


def test_an_encoder_with_a_classification_head_is_one_process_s(work: Path) -> None:
    one, two = (load_file(work / run / "adapter_model.safetensors") for run in ("head one", "head"))
    assert one.keys() == two.keys() and any("classifier" in name for name in one)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4, msg=name)
    assert max(tensor.abs().max().item() for name, tensor in one.items() if "lora_B" in name) > 0.01


def test_the_loss_and_the_kl_are_one_process_s(work: Path) -> None:
    one, two = (
        [entry for entry in json.loads((work / run / "training_log.json").read_text()) if "loss" in entry]
        for run in ("one", "two")
    )
    assert [entry["step"] for entry in two] == [entry["step"] for entry in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["elbo/kl"] == pytest.approx(theirs["elbo/kl"], rel=1e-4), ours["step"]
    # the first log after resuming is a mean over fewer steps
    assert [e["loss"] for e in two[-3:]] == pytest.approx([e["loss"] for e in one[-3:]], rel=1e-3)


def test_what_was_sharded_loads_in_one_process_and_its_mean_in_peft_alone(work: Path) -> None:
    rows = rows_of(str(work / "task" / "test.jsonl"), limit=5)
    one, two = (log_probabilities(load_run(work / run), rows, MonteCarloPredictive(3)) for run in ("one", "two"))
    torch.testing.assert_close(two.exp(), one.exp(), rtol=0, atol=1e-3)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        means = [
            PeftModel.from_pretrained(load_base(str(work / "base"))[0], str(work / run / "mean"))(ids).logits
            for run in ("one", "two")
        ]
    torch.testing.assert_close(means[1], means[0], rtol=0, atol=1e-3)
    record = RunRecord.read(work / "two")
    assert record.processes == 2 and record.status == "finished" and not (work / "two" / "checkpoints").exists()


def test_a_trainer_of_one_s_own_under_fsdp_saves_one_process_s_adapter(work: Path) -> None:
    one, two = (load_file(work / run / "adapter_model.safetensors") for run in ("own_one", "own"))
    for run in ("own_one", "own"):  # a Trainer leaves it out
        write_mean_adapter(work / run, ScalaBLConfig.from_pretrained(str(work / run)))
    means = [load_file(work / run / "mean" / "adapter_model.safetensors") for run in ("own_one", "own")]
    assert one.keys() == two.keys() and means[0].keys() == means[1].keys()
    for ours, theirs in ((two, one), (means[1], means[0])):
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5, msg=name)
