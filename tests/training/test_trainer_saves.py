"""What Transformers' Trainer and TRL's save is what they resume from: no mean/ that they take for a second adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from test_callback_preferences import drawing_model, trainer_of
from tiny_run import arguments, largest_difference, tiny_model, trainer, weights
from transformers.trainer import Trainer

import scalabl
from scalabl.training.callback import ELBOCallback
from scalabl.tuner.config import write_mean_adapter


def finished(directory: Path, model: PeftModel, **options: Any) -> Trainer:
    return trainer(model, arguments(directory, max_steps=2, **options), [ELBOCallback(16)])


def test_save_model_is_resumed_from(tmp_path: Path) -> None:
    model = tiny_model()
    first = finished(tmp_path, model)
    first.train()
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "mean" / "adapter_model.safetensors").exists()
    first.save_model(str(tmp_path))
    first.save_state()
    assert not (tmp_path / "mean").exists()

    again = tiny_model(seed=4)
    assert largest_difference(weights(again), weights(model)) > 0.01
    second = finished(tmp_path, again)
    second.train(resume_from_checkpoint=str(tmp_path))
    assert second.state.global_step == 2 and list(again.peft_config) == ["default"]
    assert largest_difference(weights(again), weights(model)) == 0

    # whoever wants a plain LoRA of it writes one
    write_mean_adapter(tmp_path, again.peft_config["default"])
    plain = PeftModel.from_pretrained(tiny_model().unload(), str(tmp_path / "mean"))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad(), scalabl.mean(model):
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits)


def test_checkpoints_have_no_mean_and_what_is_saved_by_hand_has(tmp_path: Path) -> None:
    model = tiny_model()
    finished(tmp_path, model, save_strategy="steps", save_steps=1).train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert not list(tmp_path.glob("**/mean"))
    model.save_pretrained(str(tmp_path / "out"))
    assert (tmp_path / "out" / "mean" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_preference_trainer_resumes_both_adapters(kind: str, tmp_path: Path) -> None:
    model = drawing_model()
    first = trainer_of(kind, tmp_path, model)
    first.train()
    first.save_model(str(tmp_path))
    first.save_state()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["ref"]
    again = drawing_model(seed=4)
    second = trainer_of(kind, tmp_path, again)
    second.train(resume_from_checkpoint=str(tmp_path))
    for adapter in ("default", "ref"):
        ours, theirs = (get_peft_model_state_dict(m, adapter_name=adapter) for m in (again, model))
        assert largest_difference(ours, theirs) == 0
