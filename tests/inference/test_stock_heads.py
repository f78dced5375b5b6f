"""`Classifier` on adapters with a classification head that no run of this program has made, and on models in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_bases import LABELS, body_of, classifier_on, own_logits, own_probs, stock_head
from peft import LoraConfig
from program import Program
from safetensors.torch import load_file, save_file
from tiny_base import perturb, tiny_tokenizer, write_jsonl
from transformers import Trainer, TrainingArguments

import scalabl
from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER

TEXTS = ["red", "a green answer that is long enough to be padded by others", "blue or not?", "yes and no"]


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert", "deberta-v2", "llama"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter of stock PEFT, and what its model itself says of the texts."""
    directory = tmp_path_factory.mktemp(request.param)
    model = stock_head(directory / "adapter", body_of(request.param, directory / "body"))
    return directory / "adapter", own_probs(model, TEXTS)


def test_a_stock_adapter_answers_by_its_own_head(stock: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory, expected = stock
    assert expected.std(dim=0).max() > 0.01
    answer = scalabl.Classifier.from_pretrained(directory, labels=LABELS)(TEXTS)
    np.testing.assert_allclose(answer.probs, expected, atol=1e-4)
    assert answer.label == [LABELS[i] for i in expected.argmax(dim=1)]
    assert (answer.epistemic == 0).all()
    with pytest.raises(UserError, match=r"does not say what its labels are; pass labels=\[...\]"):
        scalabl.Classifier.from_pretrained(directory)
    if "llama" not in str(directory):  # whose positions are not learnt
        with pytest.warns(UserWarning, match="1 of 1 rows are longer than 1"):
            assert np.isfinite(
                scalabl.Classifier.from_pretrained(directory, labels=LABELS)("red blue " * 100).probs
            ).all()
    # named by the configuration that a user has saved beside it, in the order of the head
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    names = {str(i): f"about {label}" for i, label in enumerate(LABELS)}
    (copy / "config.json").write_text(json.dumps({"id2label": names}))
    named = scalabl.Classifier.from_pretrained(copy)(TEXTS)
    np.testing.assert_allclose(named.probs, answer.probs, atol=1e-6)
    assert named.label == [names[str(int(i))] for i in expected.argmax(dim=1)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a body, and an adapter on it."""
    directory = tmp_path_factory.mktemp("bert")
    stock_head(directory / "adapter", body_of("bert", directory / "body"))
    return directory


def test_a_trainers_bayesian_adapter_keeps_its_posterior_and_its_head(bert: Path, tmp_path: Path) -> None:
    config = scalabl.ScalaBLConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = stock_head(tmp_path / "unused", bert / "body", config)
    tokens = [tiny_tokenizer()(text, return_token_type_ids=False)["input_ids"][:6] for text in TEXTS]
    rows: Any = [{"input_ids": (ids * 6)[:6], "labels": i % 3} for i, ids in enumerate(tokens)]
    arguments = TrainingArguments(
        str(tmp_path / "trainer"), max_steps=3, learning_rate=0.01, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[scalabl.ELBOCallback(len(rows))])
    trainer.train()
    perturb(model)
    trainer.save_model(str(tmp_path / "saved"))
    answer = scalabl.Classifier.from_pretrained(tmp_path / "saved", labels=LABELS, predictive="mc", samples=5)(TEXTS)
    model.eval()
    with scalabl.particles(model, 5):
        once = [own_probs_of_particles(model, text, 5) for text in TEXTS]
    np.testing.assert_allclose(np.exp(answer.particle_log_probs), torch.stack(once, dim=1), atol=1e-4)
    assert (answer.epistemic > 1e-4).all()
    mean = scalabl.Classifier.from_pretrained(tmp_path / "saved", labels=LABELS, samples=0)(TEXTS)
    np.testing.assert_allclose(mean.probs, own_probs(model, TEXTS), atol=1e-4)


@torch.no_grad()
def own_probs_of_particles(model: Any, text: str, number: int) -> torch.Tensor:
    ids = tiny_tokenizer()(text, return_tensors="pt")["input_ids"].repeat(number, 1)
    probs: torch.Tensor = model(input_ids=ids).logits.softmax(dim=-1)
    return probs


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_model_in_memory_answers_by_its_head_and_its_labels(architecture: str, tmp_path: Path) -> None:
    body = body_of(architecture, tmp_path / "body")
    model = stock_head(tmp_path / "adapter", body)
    model.config.id2label = {0: "one", 1: "two", 2: "three"}
    expected = own_probs(model, TEXTS)
    answer = scalabl.Classifier(model, tiny_tokenizer())(TEXTS)
    np.testing.assert_allclose(answer.probs, expected, atol=1e-4)
    assert answer.label == [("one", "two", "three")[i] for i in expected.argmax(dim=1)]
    merged = model.merge_and_unload()
    np.testing.assert_allclose(scalabl.Classifier(merged, tiny_tokenizer())(TEXTS).probs, expected, atol=1e-4)
    # the base in memory under the adapter on disk
    base = classifier_on(body)
    base.config.id2label = model.config.id2label
    under = scalabl.Classifier.from_pretrained(tmp_path / "adapter", model=base, tokenizer=tiny_tokenizer())
    np.testing.assert_allclose(under(TEXTS).probs, expected, atol=1e-4)
    assert under.scorer.scoring.labels == ("one", "two", "three")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="a classification head of 3 labels, but the model one of 2"):
        scalabl.Classifier.from_pretrained(
            tmp_path / "adapter", labels=LABELS, model=classifier_on(body, 2), tokenizer=tiny_tokenizer()
        )
    if architecture == "llama":
        merged.config.pad_token_id = 2
        with pytest.raises(UserError, match="looks behind its pad token 2, but the tokenizer pads with 0"):
            scalabl.Classifier(merged, tiny_tokenizer())


def test_what_cannot_be_read_is_refused(bert: Path, tmp_path: Path) -> None:
    adapter = bert / "adapter"

    def refused(sentence: str, directory: Path = adapter, **options: Any) -> None:
        with pytest.raises(UserError, match=sentence):
            scalabl.Classifier.from_pretrained(directory, **options)

    refused("has 3 outputs, but there are 2 labels", labels=["a", "b"])
    refused("the same name", labels=["a", "b", "a"])
    refused("reads the text as it is|chat is the run's own", labels=LABELS, chat=True)
    refused("no error rate can be promised", labels=LABELS, max_error=0.1)

    def altered(name: str, config: dict[str, Any] | None = None, without: str | None = None) -> Path:
        copy = tmp_path / name
        shutil.copytree(adapter, copy)
        file = copy / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
        if without is not None:
            tensors = load_file(copy / ADAPTER)
            save_file({key: t for key, t in tensors.items() if without not in key}, copy / ADAPTER)
        return copy

    # a head that was trained and not saved would be drawn anew, as would be a pooler that neither has
    refused("has the weights of classifier, so that answers would be at random", altered("x", without="classifier"),
            labels=LABELS)  # fmt: skip
    lost = tmp_path / "lost"
    stock_head(
        lost, body_of("deberta-v2", tmp_path / "body"), LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"])
    )
    refused("has the weights of pooler.dense, so that", lost, labels=LABELS)
    refused("trained for TOKEN_CLS, which gives a row no label", altered("tokens", {"task_type": "TOKEN_CLS"}),
            labels=LABELS)  # fmt: skip
    refused("is an encoder, which has no next token", altered("causal", {"task_type": "CAUSAL_LM"}), labels=LABELS)
    refused("adapter of type LOHA", altered("loha", {"peft_type": "LOHA"}), labels=LABELS)
    named = altered("named")
    (named / "config.json").write_text(json.dumps({"id2label": {"0": "b", "1": "a", "2": "c"}}))
    refused("in the order of the head's outputs, which is b, a, c", named, labels=["a", "b", "c"])
    numbers = {"id2label": {"0": "b", "1": "a", "2": "c"}, "problem_type": "regression"}
    (named / "config.json").write_text(json.dumps(numbers))
    refused("is of a regression, whose outputs are no labels", named)


def test_a_head_of_several_labels_says_so_in_its_configuration(program: Program, bert: Path, tmp_path: Path) -> None:
    copy, rows = tmp_path / "copy", tmp_path / "rows.jsonl"
    shutil.copytree(bert / "adapter", copy)
    several = {"id2label": dict(enumerate(LABELS)), "problem_type": "multi_label_classification"}
    (copy / "config.json").write_text(json.dumps(several))
    found = scalabl.Classifier.from_pretrained(copy)
    model = found.scorer.model
    assert model.config.problem_type == "multi_label_classification"
    logits = own_logits(model, TEXTS)
    answer = found(TEXTS)
    np.testing.assert_allclose(answer.probs, logits.sigmoid(), atol=1e-5)
    assert answer.labels == [[LABELS[i] for i in range(3) if z[i] > 0] for z in logits] and answer.label == []
    in_memory = scalabl.Classifier(model, tiny_tokenizer())
    np.testing.assert_allclose(in_memory(TEXTS).probs, answer.probs, atol=1e-6)

    # bayesianize: the kind of the rows is that of the head, and the linearised mean is the adapter's own
    write_jsonl(rows, [{"text": text, "labels": list(LABELS[: i % 3])} for i, text in enumerate(TEXTS * 3)])
    output = program("bayesianize", copy, "--data", rows, "--output", tmp_path / "run")
    assert output.code == 0, output.err
    again = scalabl.Classifier.from_pretrained(tmp_path / "run", predictive="mean", raw=True)(TEXTS)
    np.testing.assert_allclose(again.probs, answer.probs, atol=1e-4)
    (copy / "config.json").unlink()  # nothing says it: the rows do
    output = program("bayesianize", copy, "--data", rows, "--output", tmp_path / "more", "--labels", ",".join(LABELS))
    assert output.code == 0, output.err
    assert json.loads((tmp_path / "more" / "scalabl.json").read_text())["scoring"]["several"] is True
    one = {"id2label": dict(enumerate(LABELS)), "problem_type": "single_label_classification"}
    (copy / "config.json").write_text(json.dumps(one))
    said = program("bayesianize", copy, "--data", rows, "--output", tmp_path / "x").sentence()
    assert 'says one "label" a row (problem_type), but the rows have several "labels"; give rows of its kind.' in said


def test_commands_read_it_where_its_labels_are_named(program: Program, bert: Path, tmp_path: Path) -> None:
    copy, rows = tmp_path / "copy", tmp_path / "rows.jsonl"
    shutil.copytree(bert / "adapter", copy)
    write_jsonl(rows, [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(TEXTS)])
    said = program("evaluate", copy, "--data", rows).sentence()
    assert "does not say what its labels are" in said
    given = ("--labels", ",".join(LABELS), "--json", tmp_path / "given.json")
    assert program("evaluate", copy, "--data", rows, *given).code == 0
    said = program("evaluate", copy, "--data", rows, *given, "--template", "{text}:").sentence()
    assert "template is of a prompt, and a classification head has none; leave it out" in said
    (copy / "config.json").write_text(json.dumps({"id2label": dict(enumerate(LABELS))}))
    judged = program("evaluate", copy, "--data", rows, "--json", tmp_path / "judged.json")
    assert judged.code == 0, judged.err
    probs = scalabl.Classifier.from_pretrained(copy)(TEXTS).probs
    nll = -np.log(probs[np.arange(4), np.arange(4) % 3]).mean()
    assert json.loads((tmp_path / "judged.json").read_text())["nll"]["value"] == pytest.approx(nll, abs=1e-4)
    assert json.loads((tmp_path / "given.json").read_text())["nll"]["value"] == pytest.approx(nll, abs=1e-4)
    predicted = program("predict", copy, "--input", rows, "--output", tmp_path / "answers.jsonl")
    assert predicted.code == 0, predicted.err
    answers = [json.loads(line)["probs"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([[a[label] for label in LABELS] for a in answers], probs, atol=1e-5)
    said = program("predict", copy, "--input", rows, "--output", tmp_path / "x", "--max-error", 0.5).sentence()
    assert "no record of the rows that it was trained on" in said
