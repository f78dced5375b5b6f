"""Runs on rows of text: every method, what the record says, what resumes, and who refuses them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_base import PLAIN, chat_base, pairs, said
from safetensors.torch import load_file
from tiny_base import as_json, questions, tiny_base, write_jsonl

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, sha256
from scalabl.generation.generate import prompt_tokens
from scalabl.inference.classifier import Classifier
from scalabl.runs.loading import load_run
from scalabl.runs.record import RunRecord
from scalabl.runs.registry import TRAINED
from scalabl.runs.settings import Settings, make_settings
from scalabl.training.run import train
from scalabl.training.trainer import LanguageTrainer


def settings_of(data: Path, **changes: Any) -> Settings:
    settings: dict[str, Any] = {
        "model": str(tiny_base()), "data": str(data), "steps": 12, "batch_size": 4, "save_steps": 5, "r": 4,
        "learning_rate": 1e-2, "layers": "last:2",
    }  # fmt: skip
    return make_settings({**settings, **changes})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "rows.jsonl", pairs(20))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    train(settings_of(rows), output)
    return output


def log_of(run: Path) -> list[dict[str, float]]:
    return [entry for entry in json.loads((run / "training_log.json").read_text()) if "loss" in entry]


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_on_rows_of_text(method: str, rows: Path, tmp_path: Path) -> None:
    record = train(settings_of(rows, method=method, steps=30), tmp_path / "run")
    log = log_of(tmp_path / "run")
    assert record.kind == "language" and log[-1]["loss"] < log[0]["loss"] - 0.3
    run = load_run(tmp_path / "run", generating=True)
    assert run.is_bayesian == (method == "scalabl") and not run.model.training
    with torch.no_grad():
        ids = torch.tensor([prompt_tokens(run, "Question: which word 1?\nAnswer:", None)])
        assert run.model(ids).logits.isfinite().all()


def test_the_record_counts_tokens_and_weighs_the_kl_by_them(finished: Path, rows: Path, tmp_path: Path) -> None:
    record = RunRecord.read(finished)
    assert record.rows == {"train": 18, "validation": 2} and record.status == "finished"
    run = load_run(finished, generating=True)
    assert record.scoring == run.scoring.settings() == {"scoring": "text", "chat": False, "max_length": 300}
    tokens = record.tokens
    assert tokens["cut_rows"] == 0 and tokens["trained"] < tokens["all"]
    assert all(entry["elbo/kl_weight"] == pytest.approx(1 / tokens["trained"]) for entry in log_of(finished))
    train(settings_of(rows, kl_normalization="sequence"), tmp_path / "run")
    assert all(entry["elbo/kl_weight"] == pytest.approx(1 / 18) for entry in log_of(tmp_path / "run"))


def test_rows_that_are_cut_are_counted(rows: Path, tmp_path: Path) -> None:
    whole = train(settings_of(rows, steps=1), tmp_path / "whole").tokens
    cut = train(settings_of(rows, steps=1, max_length=24), tmp_path / "cut").tokens
    assert 0 < cut["cut_rows"] < 18 and cut["trained"] == whole["trained"] and cut["all"] < whole["all"]
    with pytest.raises(UserError, match="raise --max-length or shorten the row"):
        train(settings_of(rows, max_length=3), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_an_interrupted_run_goes_on_where_it_was(
    finished: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = LanguageTrainer.compute_loss, [0]

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        return loss(self, *arguments, **options)

    monkeypatch.setattr(LanguageTrainer, "compute_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        train(settings_of(rows), tmp_path / "run")
    assert RunRecord.read(tmp_path / "run").status == "running"
    train(settings_of(rows), tmp_path / "run")
    assert calls[0] == 9 + 12 - 5
    assert sha256(tmp_path / "run" / ADAPTER) == sha256(finished / ADAPTER)


def test_the_stored_trunk_changes_no_gradient(rows: Path, tmp_path: Path, own_cache: Path) -> None:
    for name, checkpointing in (("with", False), ("without", True)):
        train(settings_of(rows, steps=3, gradient_checkpointing=checkpointing), tmp_path / name)
        assert bool(list((own_cache / "trunks").glob("*"))) == (own_cache / "trunks").exists()
    assert len(list((own_cache / "trunks").iterdir())) == 1
    one, other = (load_file(tmp_path / name / ADAPTER) for name in ("with", "without"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=2e-3, rtol=1e-2, msg=name)


def test_conversations_train_through_the_template_and_open_questions_by_their_first_answer(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base", PLAIN)
    turns = [said(row["prompt"], row["completion"].strip()) for row in pairs(8)]
    chats = [{"messages": [message.as_dict() for message in turn]} for turn in turns]
    data, other = tmp_path / "chat-rows", tmp_path / "pair-rows"
    for split in ("train", "validation"):
        write_jsonl(data / f"{split}.jsonl", chats)
        write_jsonl(other / f"{split}.jsonl", pairs(8))
    record = train(settings_of(data, steps=2, model=str(base)), tmp_path / "chat")
    # the same rows as prompts and completions, through the template
    again = train(settings_of(other, steps=2, model=str(base), chat=True), tmp_path / "pairs")
    assert again.tokens == record.tokens
    assert record.scoring["chat"] is True and record.recipe["chat"] is False  # a lone prompt is a turn as well
    with pytest.raises(UserError, match="messages need a chat template"):
        train(settings_of(data, steps=2), tmp_path / "none")
    questions = [{"question": f"which word {i}?", "answers": ["red", "blue"]} for i in range(8)]
    record = train(settings_of(write_jsonl(tmp_path / "open.jsonl", questions), steps=2), tmp_path / "open")
    assert record.tokens["trained"] == 2 * record.rows["train"]  # " red", and the end


def test_what_scores_choices_refuses_a_run_on_text(finished: Path) -> None:
    for use in (load_run, Classifier.from_pretrained, RunRecord.read_classifier):
        with pytest.raises(UserError, match="no choices to score; use scalabl generate"):
            use(finished)


def test_a_run_on_choices_generates_too(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(12)))
    train(settings_of(data, steps=2, scoring="continuation"), tmp_path / "run")
    run = load_run(tmp_path / "run", generating=True)
    assert run.record.kind == "choices" and prompt_tokens(run, "a", None) == run.tokenizer("a")["input_ids"]
    assert RunRecord.read_classifier(tmp_path / "run") == run.record


def test_settings_of_the_other_kind_of_rows_are_refused(rows: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "choices.jsonl", map(as_json, questions(12)))
    with pytest.raises(UserError, match="kl_normalization is sequence, which is of rows of text"):
        train(settings_of(data, kl_normalization="sequence"), tmp_path / "run")
    for name, value in (("scoring", "letters"), ("normalization", "sum")):
        with pytest.raises(UserError, match=f"{name} is {value}, which is of questions with choices"):
            train(settings_of(rows, **{name: value}), tmp_path / "run")
    with pytest.raises(UserError, match="must be one of token, sequence"):
        settings_of(rows, kl_normalization="row")
    assert not (tmp_path / "run").exists()
