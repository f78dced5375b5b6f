"""Language models' adapters that another trainer saved: judged, asked and made Bayesian with their own prompt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from program import Program
from tiny_base import adapted, loaded, tiny_tokenizer, write_jsonl
from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

import scalabl
from scalabl.core.errors import UserError

TEMPLATE = "Tweet: {text}\nSentiment:"
TYPED = TEMPLATE.replace("\n", "\\n")
LABELS = ("no", "red", "yes")
TEXTS = [f"{LABELS[i % 3]} {'abc'[i % 2]}" for i in range(24)]
ROWS = [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(TEXTS)]


def prompt(text: str) -> str:
    return TEMPLATE.format(text=text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `Trainer.save_model` leaves of a plain LoRA that was trained with a prompt of its own."""
    base, tokenizer = loaded()
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    data = []
    for text, row in zip(TEXTS, ROWS, strict=True):
        given, answer = tokenizer(prompt(text))["input_ids"], tokenizer(f" {row['label']}")["input_ids"][1:]
        data.append({"input_ids": given + answer, "labels": [-100] * len(given) + answer})
    directory = tmp_path_factory.mktemp("trainer")
    arguments = TrainingArguments(
        str(directory / "work"), max_steps=60, learning_rate=0.01, use_cpu=True, report_to=[], save_strategy="no",
        per_device_train_batch_size=8, disable_tqdm=True, seed=0,
    )  # fmt: skip
    collator = DataCollatorForTokenClassification(tokenizer)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(directory / "saved"))
    assert not (directory / "saved" / "scalabl.json").exists()
    return directory / "saved"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as texts, and as prompts already."""
    directory = tmp_path_factory.mktemp("rows")
    write_jsonl(directory / "texts.jsonl", ROWS)
    pairs = [{"prompt": prompt(row["text"]), "completion": f" {row['label']}"} for row in ROWS]
    write_jsonl(directory / "pairs.jsonl", pairs)
    write_jsonl(directory / "unlabelled.jsonl", [{"text": text} for text in TEXTS])
    return directory


def figures(program: Program, *arguments: object, file: Path) -> tuple[dict[str, Any], str]:
    said = program(*arguments, "--json", file)
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(file.read_text())
    return found, " ".join(said.out.split())


def test_a_plain_lora_is_judged_by_its_own_prompt(program: Program, saved: Path, files: Path, tmp_path: Path) -> None:
    texts, file = files / "texts.jsonl", tmp_path / "figures.json"
    own, said = figures(program, "evaluate", saved, "--data", texts, "--template", TYPED, file=file)
    assert own["accuracy"]["value"] > 0.9 and own["method"] == "plain LoRA"
    assert f"template: {TYPED}" in said and "was probably trained with another prompt" not in said
    pairs, said = figures(program, "evaluate", saved, "--data", files / "pairs.jsonl", file=file)
    assert pairs["nll"]["value"] == pytest.approx(own["nll"]["value"], abs=1e-5)
    assert "template: the row's own prompt" in said
    other, said = figures(program, "evaluate", saved, "--data", texts, file=file)
    assert other["nll"]["value"] > own["nll"]["value"] + 0.1
    assert "template: {text}\\nLabel:" in said
    classifier = scalabl.Classifier.from_pretrained(saved, labels=LABELS, template=TEMPLATE)
    probs = classifier(TEXTS).probs
    nll = -np.log(probs[np.arange(len(TEXTS)), np.arange(len(TEXTS)) % 3]).mean()
    assert own["nll"]["value"] == pytest.approx(nll, abs=1e-5)
    plain = scalabl.Classifier.from_pretrained(saved, labels=LABELS)(list(map(prompt, TEXTS)))
    np.testing.assert_allclose(plain.probs, probs, atol=1e-6)

    output = tmp_path / "answers.jsonl"
    asked = ("--labels", "yes,no,red", "--template", TYPED)
    done = program("predict", saved, "--input", files / "unlabelled.jsonl", "--output", output, *asked)
    assert done.code == 0, done.err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert list(answers[0]["probs"]) == ["yes", "no", "red"]
    np.testing.assert_allclose([[a["probs"][label] for label in LABELS] for a in answers], probs, atol=1e-5)
    picked = tmp_path / "picked.jsonl"
    pool = ("acquire", files / "unlabelled.jsonl", saved, "-k", 3, "--by", "entropy", "--output", picked)
    done = program(*pool, *asked)
    assert done.code == 0, done.err
    entropies = sorted((a["entropy"] for a in answers), reverse=True)
    scores = [json.loads(line)["score"] for line in picked.read_text().splitlines()]
    np.testing.assert_allclose(scores, entropies[:3], atol=1e-5)


def test_a_posterior_without_a_record_is_averaged_over(program: Program, files: Path, tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path / "out"))
    arguments = ("evaluate", tmp_path / "out", "--data", files / "texts.jsonl", "--template", TYPED)
    arguments += ("--predictive", "mc", "--samples", 4, "--report", tmp_path / "report.html")
    found, _ = figures(program, *arguments, file=tmp_path / "figures.json")
    classifier = scalabl.Classifier.from_pretrained(
        tmp_path / "out", labels=LABELS, template=TEMPLATE, predictive="mc", samples=4
    )
    probs = classifier(TEXTS).probs
    nll = -np.log(probs[np.arange(len(TEXTS)), np.arange(len(TEXTS)) % 3]).mean()
    assert found["method"] == "ScalaBL, N = 4" and found["nll"]["value"] == pytest.approx(nll, abs=1e-4)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Against ScalaBL, mean, on the same rows" in page and "Tweet: {text}" in page


def test_an_adapter_at_chance_is_warned_about(program: Program, files: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded()
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(tmp_path / "untrained"))
    said = program("evaluate", tmp_path / "untrained", "--data", files / "texts.jsonl")
    assert said.code == 0 and "was probably trained with another prompt: give its template with --template" in " ".join(
        said.out.split()
    )


def test_what_is_missing_is_asked_for_in_a_sentence(program: Program, saved: Path, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    unlabelled = ("predict", saved, "--input", files / "unlabelled.jsonl", "--output", out)
    assert "say which there are (--labels)" in program(*unlabelled).sentence()
    assert "{label} is no field of a row" in program(*unlabelled, "--template", "{text} {label}").sentence()
    assert "scoring is 'words'" in program(*unlabelled, "--labels", "yes,no", "--scoring", "words").sentence()
    promised = program(*unlabelled, "--labels", "yes,no,red", "--max-error", 0.5).sentence()
    assert "no record of the rows that it was trained on" in promised
    assert "scalabl evaluate needs --data" in program("evaluate", saved).sentence()
    shards = ("predict", saved, "--input", files, "--output", tmp_path / "out", "--ray", "local", "--labels", "yes,no")
    assert "which workers cannot read; leave out --ray" in program(*shards).sentence()
    assert not out.exists()


def test_bayesianize_compares_before_and_after(program: Program, saved: Path, files: Path, tmp_path: Path) -> None:
    task = tmp_path / "task"
    write_jsonl(task / "train.jsonl", ROWS)
    write_jsonl(task / "validation.jsonl", ROWS[:21])
    said = program("bayesianize", saved, "--data", task, "--output", tmp_path / "run", "--template", TYPED)
    assert said.code == 0, said.err
    text = " ".join(said.out.split())
    assert f"template: {TYPED}" in text and "before and after, 21 validation rows" in text
    assert "was probably trained with another prompt" not in text
    table = [line.strip() for line in said.out.splitlines()]
    methods = [line.split("  ")[0] for line in table if line.startswith(("plain LoRA", "ScalaBL"))]
    assert methods == ["plain LoRA", "plain LoRA + T", "ScalaBL, linearized", "ScalaBL, linearized, calibrated"]
    # no temperature below 1 where every row is right, before as after
    plain, tempered = (re.findall(r"[\d.]+ ±", line) for line in table if line.startswith("plain LoRA"))
    assert plain[0] == "100.0 ±" and plain == tempered
    record = json.loads((tmp_path / "run" / "scalabl.json").read_text())
    assert record["recipe"]["template"] == record["scoring"]["template"] == TEMPLATE
    judged, _ = figures(
        program, "evaluate", saved, "--data", task / "validation.jsonl", "--template", TYPED, "--scoring",
        record["scoring"]["scoring"], file=tmp_path / "figures.json",
    )  # fmt: skip
    if record["scoring_name"] == "letters":  # whose scoring is the one that evaluate takes
        assert f"{judged['nll']['value']:.3f}" in next(line for line in table if line.startswith("plain LoRA"))

    one = program("bayesianize", saved, "--data", files / "pairs.jsonl", "--output", tmp_path / "pairs")
    assert one.code == 0, one.err
    text = " ".join(one.out.split())
    assert "before and after, 24 of the rows that it was fitted on" in text and "ScalaBL, linearized + T" in text
    scoring = json.loads((tmp_path / "pairs" / "scalabl.json").read_text())["scoring"]
    assert scoring["template"] == "{text}"


def test_texts_of_a_directory_and_of_a_model_in_memory(program: Program, saved: Path, tmp_path: Path) -> None:
    prompts = list(map(prompt, TEXTS[:3]))
    from peft import PeftModel

    model = PeftModel.from_pretrained(loaded()[0], str(saved))
    model.train()
    tokenizer = tiny_tokenizer()
    here = scalabl.generate(model, tokenizer, prompts, max_new_tokens=1)
    assert model.training and [answer.text for answer in here] == list(LABELS)
    there = scalabl.generate(saved, prompts, max_new_tokens=1)
    assert [answer.scores for answer in there] == [pytest.approx(answer.scores, abs=1e-4) for answer in here]
    file = tmp_path / "answers.json"
    said = program("generate", saved, "--prompt", prompt(TEXTS[0]), "--max-new-tokens", 1, "--json", file)
    assert said.code == 0, said.err
    assert json.loads(file.read_text())[0]["text"] == LABELS[0]
    bayesian = adapted()
    drawn = scalabl.generate(bayesian, tokenizer, prompts, samples=3, max_new_tokens=4)
    assert max(token.epistemic for answer in drawn for token in answer.tokens) > 1e-4
    mean = scalabl.generate(bayesian, tokenizer, prompts, samples=0, max_new_tokens=4)
    assert max(token.epistemic for answer in mean for token in answer.tokens) < 1e-6
    with pytest.raises(UserError, match=r"takes \(run, prompts\), or \(model, tokenizer, prompts\)"):
        scalabl.generate(model, prompts)
