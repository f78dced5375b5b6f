"""Which tokenizer and which base model an adapter is read with, and that no argument goes unread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_base import adapted, loaded, tiny_base, tiny_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from scalabl.core.errors import UserError
from scalabl.inference.classifier import Classifier
from scalabl.inference.settings import PredictionSettings
from scalabl.runs.directory import as_recorded, find_base
from scalabl.runs.models import load_base
from scalabl.scoring import Letters
from scalabl.serving.export import export
from scalabl.serving.vllm import VLLMClassifier

LABELS = ["yes", "no"]
PROMPT = "which word is red\nLabel:"


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny base's own, but for another token in front of every text."""
    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> </s> </s> $A", special_tokens=[("</s>", 2)]
    )
    return made


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapted().save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def probs(adapter: Path, **options: Any) -> Any:
    return Classifier.from_pretrained(adapter, labels=LABELS, samples=0, **options)(PROMPT).probs


def test_the_tokenizer_beside_the_adapter_is_preferred_and_the_given_one_wins(adapter: Path) -> None:
    base, own = loaded()
    of_base, of_other = probs(adapter), probs(adapter, tokenizer=other_tokenizer())
    assert not np.allclose(of_base, of_other, atol=1e-4)
    expected = Classifier(adapted(), Letters(other_tokenizer(), labels=LABELS, template="{text}"), samples=0)(PROMPT)
    np.testing.assert_allclose(of_other, expected.probs, atol=1e-6)
    other_tokenizer().save_pretrained(str(adapter))
    for options in ({}, {"model": str(tiny_base())}, {"model": base}):
        np.testing.assert_array_equal(probs(adapter, **options), of_other)
    np.testing.assert_array_equal(probs(adapter, tokenizer=own), of_base)


def test_exported_particles_take_the_tokenizer_with_them(adapter: Path, tmp_path: Path) -> None:
    def first_token(**options: Any) -> int:
        client = VLLMClassifier.from_export(tmp_path / "out", url="http://localhost:1", labels=LABELS, **options)
        return int(client.scoring.tokenizer(PROMPT)["input_ids"][0])

    other_tokenizer().save_pretrained(str(adapter))
    export(adapter, 2, tmp_path / "out")
    assert first_token() == 2 and first_token(tokenizer=str(tiny_base())) == 1


def test_a_tokenizer_of_another_vocabulary_is_refused(adapter: Path) -> None:
    larger = tiny_tokenizer()
    larger.add_tokens([f"<new {i}>" for i in range(20)])
    with pytest.raises(UserError, match=r"The tokenizer has 3\d\d tokens, but the model's embedding 310"):
        probs(adapter, tokenizer=larger)
    larger.save_pretrained(str(adapter))
    with pytest.raises(UserError, match=r"The tokenizer saved in .*adapter has 3\d\d tokens, but .* 310: it is"):
        probs(adapter)


def test_no_argument_goes_unread(adapter: Path) -> None:
    model, tokenizer = adapted(), loaded()[1]
    with pytest.raises(UserError, match="model is a PeftModel.*give the base model without an adapter"):
        Classifier.from_pretrained(adapter, labels=LABELS, model=model, tokenizer=tokenizer)  # type: ignore[arg-type]
    scoring = Letters(tokenizer, labels=LABELS, template="{text}")
    with pytest.raises(UserError, match="dropout is of a plain LoRA"):
        Classifier(model, scoring, dropout=0.1)
    base, _ = loaded()
    plain = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert isinstance(plain, PeftModel)
    with pytest.raises(UserError, match="no posterior.*leave out predictive"):
        Classifier(plain, scoring, predictive="mc")
    with pytest.raises(UserError, match="quantization is torchao, but bits is left out"):
        load_base(str(tiny_base()), quantization="torchao")
    with pytest.raises(UserError, match="samples is 0, the posterior mean, but predictive is linearized"):
        PredictionSettings("linearized", 0)


def test_what_is_no_question_is_refused_in_a_sentence(adapter: Path) -> None:
    classifier = Classifier.from_pretrained(adapter, labels=LABELS, samples=0)
    for given, said in (
        ([None], "Question 0 is None; give a text"),
        ([PROMPT, 3], "Question 1 is a int; give a text"),
        (None, "There are no questions to answer"),
        ([""], "question 0: the prompt is blank"),
        ([{"question": 3}], 'question 0: "question" is a number, not a text'),
        ([{"question": "a", "choices": "yes"}], 'question 0: "choices" is not a list'),
        ([{"question": "a", "choices": [None, "no"]}], "question 0: choice 0 is null, not a text"),
    ):
        with pytest.raises(UserError, match=said):
            classifier(given)  # type: ignore[arg-type]
    np.testing.assert_array_equal(classifier({"question": PROMPT}).probs, classifier(PROMPT).probs)  # one row


def test_a_chat_template_that_raises_is_one_sentence(adapter: Path) -> None:
    for template, why in (("{{ raise_exception('no users here') }}", "no users here"), ("{{ 1 / 0 }}", "zero")):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=f"chat template cannot write this conversation .*{why}"):
            probs(adapter, tokenizer=tokenizer, chat=True)


def test_a_base_directory_is_recorded_whole_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    run, base = project / "runs" / "mine", project / "models" / "base"
    for directory in (run, base):
        directory.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    monkeypatch.chdir(project)
    assert as_recorded("models/base") == as_recorded("./models/base") == str(base)
    assert as_recorded("owner/name") == "owner/name" and as_recorded("smollm2-135m-instruct") == "smollm2-135m-instruct"
    monkeypatch.chdir(tmp_path)
    # a relative one of an older record, from elsewhere
    assert Path(find_base("models/base", run)) == Path(find_base("./models/base", run)) == base
    # a whole one after the project has moved
    assert Path(find_base("/before/project/models/base", run)) == base
    assert find_base("owner/name", run) == "owner/name"
    with pytest.raises(UserError, match=r"The base model of .*mine was in /gone/model, which .* --model \(model="):
        find_base("/gone/model", run)


def test_an_adapter_names_its_base_by_a_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_base().parent)
    base, _ = load_base(f"./{tiny_base().name}")
    torch.manual_seed(0)
    plain = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    plain.save_pretrained(str(tmp_path / "adapter"))
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named).is_absolute() and Path(named) == tiny_base()
    monkeypatch.chdir(tmp_path)
    assert probs(tmp_path / "adapter").shape == (1, 2)
