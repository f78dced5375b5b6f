"""`Classifier`: from any adapter directory to probabilities and their uncertainty."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from short_run import settings_of
from tiny_base import loaded, questions, tiny_base
from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

import scalabl
from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, sha256
from scalabl.data import Example
from scalabl.inference.answer import Answer
from scalabl.inference.classifier import Classifier, rows_of
from scalabl.predictive import MonteCarloPredictive, predict
from scalabl.runs.loading import load_run
from scalabl.runs.record import RECORD
from scalabl.scoring import Letters, Scorer
from scalabl.training.run import train

LABELS = ["yes", "no", "red"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a user's own Trainer on a plain PEFT model, saved by `save_pretrained`."""
    base, tokenizer = loaded()
    model = get_peft_model(base, scalabl.ScalaBLConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    rows = [tokenizer(f"text {i}\nLabel: {LABELS[i % 3]}") for i in range(12)]
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    directory = tmp_path_factory.mktemp("own")
    args = TrainingArguments(
        str(directory / "trainer"), max_steps=6, learning_rate=0.05, use_cpu=True, report_to=[], save_strategy="no",
        per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    callbacks = [scalabl.ELBOCallback(num_examples=len(data))]
    collator = DataCollatorForTokenClassification(tokenizer)
    Trainer(model, args, train_dataset=data, data_collator=collator, callbacks=callbacks).train()  # type: ignore[arg-type]
    model.save_pretrained(str(directory / "out"))
    return directory / "out"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, task_directory: Path) -> Path:
    """Of `scalabl train`, scored by continuation."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(settings_of(tiny_base(), task_directory, steps=6), directory)
    return directory


def add_up(answer: Answer, rows: int, classes: int, particles: int) -> None:
    assert answer.probs.shape == (rows, classes)
    assert answer.particle_log_probs.shape == (particles, rows, classes)
    assert answer.entropy.shape == answer.aleatoric.shape == answer.epistemic.shape == (rows,)
    np.testing.assert_allclose(answer.probs.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(answer.probs, np.exp(answer.particle_log_probs).mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(answer.entropy, answer.aleatoric + answer.epistemic, atol=1e-6)
    assert (answer.epistemic >= 0).all() and (answer.entropy <= np.log(classes) + 1e-6).all()


def test_a_trainers_own_adapter_classifies_prompts(adapter: Path) -> None:
    classifier = Classifier.from_pretrained(adapter, labels=LABELS, samples=5)
    prompts = [f"text {i}\nLabel:" for i in range(4)]
    answer = classifier(prompts)
    add_up(answer, 4, 3, 5)
    assert (answer.epistemic > 0).all()
    assert answer.label == [LABELS[i] for i in answer.probs.argmax(axis=1)]
    np.testing.assert_allclose(classifier(prompts[2]).probs, answer.probs[2:3], atol=1e-5)
    # prompts are used as they are: the plain model under the same particles
    base, tokenizer = loaded()
    model = scalabl_adapter(base, adapter)
    rows = [
        Letters(tokenizer, labels=LABELS, template="{text}").encode(Example("", p, tuple(LABELS), None))
        for p in prompts
    ]
    scorer = Scorer(model, Letters(tokenizer, labels=LABELS, template="{text}"))
    expected = predict(scorer, rows, MonteCarloPredictive(5))
    np.testing.assert_allclose(answer.particle_log_probs, expected.numpy(), atol=1e-4)


def scalabl_adapter(base: Any, directory: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(directory)).eval()


def test_a_loaded_model_and_the_mean(adapter: Path) -> None:
    base, tokenizer = loaded()
    with pytest.raises(UserError, match="needs its tokenizer"):
        Classifier.from_pretrained(adapter, labels=LABELS, model=base)
    mean = Classifier.from_pretrained(adapter, labels=LABELS, model=base, tokenizer=tokenizer, samples=0)(["a", "b"])
    add_up(mean, 2, 3, 1)
    assert (mean.epistemic == 0).all()
    plain = Classifier.from_pretrained(adapter / "mean", labels=LABELS, model=str(tiny_base()))(["a", "b"])
    np.testing.assert_allclose(plain.probs, mean.probs, atol=1e-5)


def test_a_plain_lora_has_no_epistemic_part(tmp_path: Path) -> None:
    base, _ = loaded()
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        str(tmp_path)
    )
    answer = Classifier.from_pretrained(tmp_path, labels=LABELS, samples=10)(["one", "two"])
    add_up(answer, 2, 3, 1)
    assert (answer.epistemic == 0).all() and (answer.entropy == answer.aleatoric).all()


def test_a_run_directory_knows_its_scoring(run: Path) -> None:
    classifier = Classifier.from_pretrained(run, samples=3)
    rows = questions(3)
    answer = classifier(rows)
    add_up(answer, 3, 5, 3)
    assert answer.probs[0, 3:].tolist() == [0, 0] and answer.probs[1, 4] == 0
    assert all(label in row.choices for label, row in zip(answer.label, rows, strict=True))
    mappings = [{"question": row.question, "choices": list(row.choices)} for row in rows]
    np.testing.assert_array_equal(classifier(mappings).probs, answer.probs)


def test_what_would_have_been_answered_stands_beside_what_is_not(run: Path) -> None:
    rows = questions(3)
    sure = Classifier.from_pretrained(run, samples=3)(rows)
    unsure = Classifier.from_pretrained(run, samples=3, abstain=1.0)(rows)
    assert unsure.label == [None] * 3 and unsure.guess == sure.guess == sure.label


def test_a_run_of_mc_dropout_keeps_its_masks(task_directory: Path, tmp_path: Path) -> None:
    """As `evaluate` predicts with it: the method's own predictive, on the same rows."""
    train(settings_of(tiny_base(), task_directory, steps=6, method="mc_dropout", lora_dropout=0.3), tmp_path / "run")
    rows = questions(5)
    answer = Classifier.from_pretrained(tmp_path / "run", samples=4, seed=2)(rows)
    found = load_run(tmp_path / "run")
    own = found.predictive(samples=4, seed=2)
    expected = predict(found.scorer, [found.scorer.scoring.encode(row) for row in rows_of(rows, None)], own)
    np.testing.assert_allclose(answer.particle_log_probs, expected, atol=1e-5)
    assert answer.epistemic.max() > 0
    assert Classifier.from_pretrained(tmp_path / "run", samples=0)(rows).epistemic.max() < 1e-6


def test_the_same_seed_is_the_same_answer_whatever_the_batch(run: Path) -> None:
    rows = questions(5)
    one = Classifier.from_pretrained(run, samples=3, seed=1)(rows)
    other = Classifier.from_pretrained(run, samples=3, seed=1, batch_size=2)(rows)
    np.testing.assert_allclose(one.particle_log_probs, other.particle_log_probs, atol=1e-4)
    assert np.abs(Classifier.from_pretrained(run, samples=3, seed=2)(rows).probs - one.probs).max() > 1e-6


def test_bad_input_is_refused(adapter: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        Classifier.from_pretrained(tmp_path, labels=LABELS)
    with pytest.raises(UserError, match="pass labels="):
        Classifier.from_pretrained(adapter)
    with pytest.raises(UserError, match="'maybe' is 2 tokens"):
        Classifier.from_pretrained(adapter, labels=["yes", "maybe"])
    with pytest.raises(UserError, match="samples is -1"):
        Classifier.from_pretrained(adapter, labels=LABELS, samples=-1)
    with pytest.raises(UserError, match="another base model"):
        Classifier.from_pretrained(adapter, labels=LABELS, model=str(tiny_base(seed=1)))
    by_label, by_choice = Classifier.from_pretrained(adapter, labels=LABELS), Classifier.from_pretrained(run)
    with pytest.raises(UserError, match="no questions"):
        by_label([])
    with pytest.raises(UserError, match="choices of its own"):
        by_label([{"question": "which?", "choices": ["stone", "bee", "wide"]}])
    with pytest.raises(UserError, match="pass rows"):
        by_choice("which?")
    with pytest.raises(UserError, match='question 0: no "choices"'):
        by_choice([{"question": "which?"}])
    with pytest.raises(UserError, match="only one choice"):
        by_choice([{"question": "which?", "choices": ["red"]}])
    with pytest.raises(UserError, match="there twice"):
        by_choice([Example("x", "which?", ("red", "red"), None)])


def test_a_run_whose_file_was_cut_or_swapped_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    tensors = load_file(copy / ADAPTER)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / ADAPTER)
    with pytest.raises(UserError, match="truncated or altered"):
        Classifier.from_pretrained(copy)
    record = json.loads((copy / RECORD).read_text())
    (copy / RECORD).write_text(json.dumps(record | {"adapter_sha256": sha256(copy / ADAPTER)}))
    assert Classifier.from_pretrained(copy, samples=1)(questions(1)).probs.shape == (1, 3)


def test_it_leaves_the_random_numbers_alone(run: Path) -> None:
    classifier = Classifier.from_pretrained(run, samples=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    classifier(questions(2))
    assert torch.equal(torch.get_rng_state(), before)
