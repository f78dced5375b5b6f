"""ELBOCallback in TRL's SFTTrainer."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_run import Recorder, posterior_ids, tiny_model, tiny_tokenizer

import scalabl
from scalabl.core.errors import UserError
from scalabl.training.callback import ELBOCallback

trl = pytest.importorskip("trl")


def prompts() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{(3 * i) % 29 + 1}"} for i in range(1, 17)]
    )


def config(directory: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 3,
    }
    return trl.SFTConfig(**{**settings, **options})


def test_sft_adds_the_kl_and_logs_it(tmp_path: Path) -> None:
    def trained(beta: float) -> tuple[Any, Any, Recorder]:
        model, recorder = tiny_model(), Recorder()
        trainer = trl.SFTTrainer(
            model,
            config(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0),
            train_dataset=prompts(),
            processing_class=tiny_tokenizer(),
            callbacks=[ELBOCallback(32, beta=beta), recorder],
        )
        trainer.train()
        return trainer, model, recorder

    trainer, model, recorder = trained(1.0)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    assert history[1]["elbo/kl"] < history[0]["elbo/kl"]
    assert {"elbo/nll", "elbo/kl_weight", "elbo/sigma_mean", "elbo/s_mean", "mean_token_accuracy"} <= history[0].keys()
    # beside the likelihood's gradient there is the closed form, once, over 32
    likelihood = trained(0.0)[2].gradients[0]
    with torch.no_grad():
        for name, value in recorder.before[0].items():
            model.get_parameter(name).copy_(value)
    model.zero_grad()
    scalabl.kl_divergence(model).backward()
    checked = 0
    for name, gradient in recorder.gradients[0].items():
        parameter = model.get_parameter(name)
        if id(parameter) in posterior_ids(model):
            torch.testing.assert_close(gradient - likelihood[name], parameter.grad / 32, rtol=1e-4, atol=1e-6)
            checked += 1
    assert checked == 8


def test_rows_counted_for_a_loss_over_tokens_are_warned_about(tmp_path: Path) -> None:
    def train(number: int) -> list[str]:
        trainer = trl.SFTTrainer(
            tiny_model(), config(tmp_path, max_steps=1), train_dataset=prompts(), processing_class=tiny_tokenizer(),
            callbacks=[ELBOCallback(number)],
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert ELBOCallback.for_tokens(trainer.train_dataset).num_examples == 32
        return [str(each.message) for each in caught if "num_examples" in str(each.message)]

    (warning,) = train(16)
    assert warning.startswith("num_examples is 16, the number of rows, but their loss is a mean over tokens")
    assert train(32) == []


@pytest.mark.parametrize(("option", "max_length"), [("packing", 32), ("padding_free", None)])
def test_sft_with_packed_rows_is_refused(tmp_path: Path, option: str, max_length: int | None) -> None:
    trainer = trl.SFTTrainer(
        tiny_model(),
        config(tmp_path, **{option: True}, max_length=max_length),
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(),
        callbacks=[ELBOCallback(32)],
    )
    with pytest.raises(UserError, match=f"{option}=False"):
        trainer.train()
