"""A prompt's tokens: the answer as the chat template writes it, no end token in between, nothing empty, nothing cut
without a word."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_base import adapted, loaded, questions, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.data.text_rows import TextRow
from scalabl.generation.decoding import decode
from scalabl.generation.fan_out import MeanDraws
from scalabl.inference.classifier import Classifier
from scalabl.scoring import Continuation, Letters
from scalabl.scoring.base import Scoring, cut_rows_sentence
from scalabl.scoring.scorer import make_scoring
from scalabl.scoring.text import IGNORED, Text

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] | trim }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# what begins a turn is not what stands in front of one that is written
REASONING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def sentencepiece(template: str) -> PreTrainedTokenizerFast:
    """Of Llama's kind: a space is part of the word behind it, and one stands in front of every text."""
    words = ["yes", "no", "▁yes", "▁no", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<think>", "</think>"]
    letters = [*"abcdefghijklmnopqrstuvwxyz?]:", "▁]", "▁:", "▁", "\n"]
    pieces = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *letters, *words])}
    made = Tokenizer(models.WordPiece(pieces, unk_token="<unk>", continuing_subword_prefix=""))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": words[4:]})
    fast.chat_template = template
    return fast


@pytest.mark.parametrize(
    ("template", "word", "ends"),
    [(MISTRAL, "▁yes", "[/INST]"), (CHATML, "yes", "\n"), (THINKING, "yes", "\n"), (REASONING, "yes", "\n")],
)
def test_a_label_behind_a_chat_is_the_token_that_the_template_writes(template: str, word: str, ends: str) -> None:
    tokenizer = sentencepiece(template)
    scoring = Letters(tokenizer, labels=("yes", "no"), template="{text}", chat=True)
    assert tokenizer.convert_ids_to_tokens(scoring.label_ids.tolist()) == [word, word.replace("yes", "no")]
    prompt = scoring.encode(Example("x", "a?", ("yes", "no"), 0)).input_ids
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == ends
    assert ("</think>" in tokenizer.convert_ids_to_tokens(prompt)) == (template is THINKING)
    if template is not REASONING:  # which training on conversations refuses
        trained = Text(tokenizer, chat=True).encode(TextRow("x", "a?", "yes"))
        assert (*prompt, scoring.label_ids[0]) == tuple(trained.input_ids[: len(prompt) + 1])
        assert trained.labels[len(prompt)] == scoring.label_ids[0] != IGNORED


def test_a_run_that_is_older_keeps_its_labels() -> None:
    tokenizer = sentencepiece(MISTRAL)
    scoring = Letters(tokenizer, labels=("yes", "no"), template="{text}", chat=True)
    settings = scoring.settings()
    assert make_scoring(settings, tokenizer).settings() == settings and settings.pop("turn") == "template"
    old = make_scoring(settings, tokenizer)
    assert isinstance(old, Letters)
    assert tokenizer.convert_ids_to_tokens(old.label_ids.tolist()) == ["yes", "no"]
    assert old.settings()["turn"] == "bare"
    assert "turn" not in Letters(tokenizer, labels=("yes", "no")).settings()


def ending() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which appends its end token too."""
    tokenizer = tiny_tokenizer()
    frame = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = frame
    assert tokenizer("red")["input_ids"][-1] == 2
    return tokenizer


@pytest.mark.parametrize("kind", [Letters, Continuation])
def test_no_end_token_stands_between_a_prompt_and_its_answer(kind: type[Scoring]) -> None:
    row = questions(1)[0]
    assert kind(ending()).encode(row) == kind(tiny_tokenizer()).encode(row)
    assert kind(ending()).with_prefix("red ").encode(row) == kind(tiny_tokenizer()).with_prefix("red ").encode(row)


def test_no_end_token_stands_in_front_of_a_completion_or_a_generated_text() -> None:
    row = TextRow("x", "which word is", " red")
    assert Text(ending()).encode(row) == Text(tiny_tokenizer()).encode(row)
    assert Text(ending()).prompt_tokens("which") == Text(tiny_tokenizer()).prompt_tokens("which")
    model = adapted()
    texts = [
        decode(model, t, ["which word"], MeanDraws(), max_new_tokens=3)[0][0] for t in (ending(), tiny_tokenizer())
    ]
    assert texts[0].token_ids == texts[1].token_ids
    # an end token that the text itself has is the text's
    assert Text(tiny_tokenizer()).prompt_tokens("red</s>")[-1] == 2 == Text(ending()).prompt_tokens("red</s>")[-1]


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_a_blank_prompt_is_refused(text: str) -> None:
    _, tokenizer = loaded()
    classifier = Classifier(adapted(), Letters(tokenizer, labels=("yes", "no"), template="{text}"), samples=0)
    with pytest.raises(UserError, match="question 1: the prompt is blank; write its text"):
        classifier(["red", text])


def test_a_prompt_without_tokens_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    scoring = Letters(tokenizer, labels=("yes", "no"), template="{text}")
    with pytest.raises(UserError, match=r"'\\u200b' is empty for this tokenizer; write what is asked"):
        scoring.encode(Example("x", "\u200b", ("yes", "no"), 0))


@pytest.mark.parametrize("kind", [Letters, Continuation])
def test_rows_that_are_cut_are_counted_with_their_mend(kind: type[Scoring]) -> None:
    _, tokenizer = loaded()
    rows = [*questions(2), Example("long", "word " * 60, ("red", "blue"), 0)]
    scoring = kind(tokenizer, max_length=100)
    encoded = [scoring.encode(row) for row in rows]
    whole = kind(tokenizer).encode(rows[2])
    assert [row.dropped for row in encoded] == [0, 0, len(whole.input_ids) - 100]
    sentence = cut_rows_sentence(encoded, scoring)
    assert sentence is not None and sentence.startswith("1 of 3 rows are longer than 100 tokens")
    mended = kind(tokenizer, max_length=int(sentence.split("--max-length ")[1].split()[0]))
    assert cut_rows_sentence([mended.encode(row) for row in rows], mended) is None
    assert mended.encode(rows[2]) == replace(whole, dropped=0)


def test_a_classifier_warns_of_rows_that_it_cuts_and_marks_their_answers() -> None:
    _, tokenizer = loaded()
    scoring = Letters(tokenizer, labels=("yes", "no"), template="{text}", max_length=20)
    classifier = Classifier(adapted(), scoring, samples=0)
    rows = [Example(str(i), text, ("yes", "no"), None) for i, text in enumerate(("red", "word " * 30 + "?"))]
    with pytest.warns(UserWarning, match="1 of 2 rows are longer than 20 tokens .*--max-length"):
        found = classifier(rows)
    answers = list(classifier.predictor.answers(rows))
    assert "truncated" not in answers[0] and answers[1]["truncated"] is True
    torch.testing.assert_close(torch.tensor(answers[1]["probs"]["yes"]), torch.tensor(found.probs[1, 0].item()))
