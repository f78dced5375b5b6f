"""The objective of training on tokens is the ELBO divided by T, however its rows are cut into batches: gradients
against their closed form, in `scalabl train`'s trainer and in TRL's. The noise is made vanish, not the KL."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_base import MARKED, chat_base, pairs, said
from datasets import Dataset
from peft import PeftModel
from tiny_base import adapted, tiny_tokenizer
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

import scalabl
from scalabl.core.errors import UserError
from scalabl.data import TextRow
from scalabl.runs.method import load_method
from scalabl.runs.models import load_base
from scalabl.runs.settings import Settings
from scalabl.scoring import Text
from scalabl.scoring.text import EncodedText
from scalabl.training.callback import ELBOCallback
from scalabl.training.trainer import LanguageTrainer, tokens_a_row, weighing_the_kl

ROWS = 12


def model_without_noise() -> PeftModel:
    model = adapted()
    with torch.no_grad():
        for leaf in scalabl.stochastic_layers(model).values():
            leaf.posterior.log_std.fill_(-25.0)
    return model


def objective(model: PeftModel, rows: list[tuple[list[int], list[int]]], kl_weight: float) -> dict[str, Tensor]:
    """The gradient of 1/T sum of all tokens' losses + kl_weight KL, row by row, by transformers' own loss."""
    model.zero_grad()
    total = sum(sum(label != -100 for label in labels[1:]) for _, labels in rows)
    model.eval()
    for ids, labels in rows:
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        (loss * sum(label != -100 for label in labels[1:]) / total).backward()
    (kl_weight * scalabl.kl_divergence(model)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class MeanGradient(TrainerCallback):
    """The mean over steps of the gradients that an optimiser is given."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        for name, p in kwargs["model"].named_parameters():
            if p.grad is not None:
                self.sums[name] = self.sums.get(name, 0) + p.grad.clone()

    def mean(self) -> dict[str, Tensor]:
        return {name: value / self.steps for name, value in self.sums.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 12
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def standing_still(directory: Path, **options: Any) -> dict[str, Any]:
    """Arguments of one epoch at the rate 0, so that every step is at the same weights."""
    return {
        "output_dir": str(directory), "num_train_epochs": 1, "learning_rate": 0.0, "optim": "sgd", "max_grad_norm": 0,
        "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False,
        **options,
    }  # fmt: skip


def encoded() -> list[EncodedText]:
    text = Text(tiny_tokenizer())
    rows = [text.encode(TextRow("r", row["prompt"], row["completion"])) for row in pairs(ROWS)]
    assert len({row.trained for row in rows}) > 4  # else a batch's mean over tokens would be right as well
    return rows


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize(("batch", "accumulation"), [(12, 1), (3, 4), (4, 1), (1, 3), (2, 2)])
def test_an_epoch_of_ours_is_the_elbo_however_it_is_cut(
    tmp_path: Path, batch: int, accumulation: int, normalization: str
) -> None:
    rows, model, seen = encoded(), model_without_noise(), MeanGradient()
    settings = Settings.flat(
        batch_size=batch, gradient_accumulation=accumulation, kl_normalization=normalization,
        variational_learning_rate=1e-30,
    )  # fmt: skip
    arguments = standing_still(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, dataloader_drop_last=True
    )
    trainer = LanguageTrainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows,
        callbacks=[*load_method("scalabl").callbacks(weighing_the_kl(settings, rows), ROWS), seen],
        scoring=Text(tiny_tokenizer()),
    )
    trainer.train()
    assert seen.steps == ROWS // (batch * accumulation)
    tokens = sum(row.trained for row in rows)
    weight = 1 / tokens if normalization == "token" else 1 / ROWS
    assert_same(seen.mean(), objective(model, [(row.input_ids, list(row.labels)) for row in rows], weight))


@pytest.mark.parametrize("kind", ["completion_only_loss", "assistant_only_loss"])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_a_step_of_trl_is_the_elbo_however_it_is_cut(tmp_path: Path, kind: str, batch: int, accumulation: int) -> None:
    trl = pytest.importorskip("trl")
    model, seen = model_without_noise(), MeanGradient()
    if kind == "completion_only_loss":
        tokenizer, rows = tiny_tokenizer(), Dataset.from_list(pairs(8))
    else:
        _, tokenizer = load_base(str(chat_base(tmp_path / "base", MARKED)))
        turns = [said(row["prompt"], row["completion"].strip()) for row in pairs(8)]
        rows = Dataset.from_list([{"messages": [message.as_dict() for message in turn]} for turn in turns])
    arguments = standing_still(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, bf16=False,
        gradient_checkpointing=False, **{kind: True},
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, trl.SFTConfig(**arguments), train_dataset=rows, processing_class=tokenizer)
    callback = ELBOCallback.for_tokens(trainer.train_dataset, learning_rate=None)
    trainer.add_callback(callback)
    trainer.add_callback(seen)
    trainer.train()
    data = [(list(row["input_ids"]), list(row["labels"])) for row in trainer.train_dataset]
    tokens = sum(label != -100 for _, labels in data for label in labels[1:])
    assert callback.num_examples == tokens and seen.steps == 1
    assert_same(seen.mean(), objective(model, data, 1 / tokens))


def test_trained_tokens_are_counted_as_the_trainer_counts_them() -> None:
    rows = [{"labels": [5, 6, -100, 7]}, {"labels": torch.tensor([-100, -100, 3])}]
    assert ELBOCallback.for_tokens(rows, beta=0.5).num_examples == 3  # nothing predicts the first label
    assert ELBOCallback.for_tokens(Dataset.from_list(rows[:1])).num_examples == 2
    with pytest.raises(UserError, match='no "labels" to count'):
        ELBOCallback.for_tokens([{"input_ids": [1, 2]}])
    with pytest.raises(UserError, match="all of them are -100"):
        ELBOCallback.for_tokens([{"labels": [1, -100]}])
    with pytest.raises(UserError, match="stream without length"):
        ELBOCallback.for_tokens(iter(rows))


def test_the_kl_of_a_token_is_what_a_row_has_of_it() -> None:
    rows = encoded()
    settings = Settings.flat(beta=0.5)
    assert weighing_the_kl(settings, rows).posterior.beta == pytest.approx(
        0.5 * ROWS / sum(row.trained for row in rows)
    )
    assert tokens_a_row(rows) == sum(row.trained for row in rows) / ROWS
    sequence = Settings.flat(beta=0.5, kl_normalization="sequence")
    assert weighing_the_kl(sequence, rows) is sequence
    # BLoB's own weights, which sum to one over a cycle, go by the same factor
    (token,) = load_method("blob").callbacks(weighing_the_kl(settings, rows), ROWS)
    (row,) = load_method("blob").callbacks(sequence, ROWS)
    assert token.cycle == row.cycle and row.beta / token.beta == pytest.approx(tokens_a_row(rows))
