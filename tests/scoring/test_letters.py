"""Letters: the next-token distribution over label words."""

import pytest
import torch
from tiny_base import loaded, questions, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.scoring import Continuation, Letters, Scorer
from scalabl.scoring.scorer import make_scoring


def test_labels_are_the_tokens_of_the_words_behind_a_space() -> None:
    _, tokenizer = loaded()
    scoring = Letters(tokenizer, num_letters=4)
    assert [tokenizer.decode([i]) for i in scoring.label_ids.tolist()] == [" A", " B", " C", " D"]
    words = Letters(tokenizer, labels=("yes", "no"))
    assert [tokenizer.decode([i]) for i in words.label_ids.tolist()] == [" yes", " no"]


def test_scores_are_the_plain_logits_of_the_next_token() -> None:
    model, tokenizer = loaded()
    scoring = Letters(tokenizer, num_letters=5)
    rows = questions(6)
    with torch.no_grad():
        together = Scorer(model, scoring).class_log_probs(scoring.collate([scoring.encode(row) for row in rows]))
        for row, found in zip(rows, together, strict=True):
            prompt = torch.tensor([tokenizer(scoring.prompt(row))["input_ids"]])
            number = len(row.choices)
            logits = model(input_ids=prompt).logits[0, -1, scoring.label_ids[:number]]
            torch.testing.assert_close(found[:number], logits.log_softmax(dim=-1), atol=1e-5, rtol=1e-5)
            assert (found[number:] == -torch.inf).all()


def test_one_position_of_logits_is_asked_for() -> None:
    model, tokenizer = loaded()
    scoring = Letters(tokenizer)
    batch = scoring.collate([scoring.encode(row) for row in questions(3)])
    with torch.no_grad():
        assert Scorer(model, scoring).logits(batch).shape == (3, 310)


def test_the_prompt_shows_the_lettered_choices() -> None:
    _, tokenizer = loaded()
    row = Example("x", "Which?", ("red", "blue"), 1)
    assert Letters(tokenizer).prompt(row) == "Question: Which?\nA. red\nB. blue\nAnswer:"
    assert Letters(tokenizer, labels=("yes", "no")).prompt(row) == "Which?\nLabel:"
    assert Letters(tokenizer, labels=("yes", "no"), template="{text}").prompt(row) == "Which?"


def test_labels_of_several_tokens_and_of_the_same_token_are_refused() -> None:
    _, tokenizer = loaded()
    with pytest.raises(UserError, match=r"'maybe' is 2 tokens .*--scoring continuation"):
        Letters(tokenizer, labels=("yes", "maybe"))
    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="same token"):
        Letters(lower, labels=("yes", "YES"))


def test_more_choices_than_letters_are_refused() -> None:
    _, tokenizer = loaded()
    with pytest.raises(UserError, match="has 5 choices, but this scoring was made for 3"):
        Letters(tokenizer, num_letters=3).encode(questions(1, choices=(5,))[0])


@pytest.mark.parametrize("kind", [Letters, Continuation])
def test_the_chat_template_is_used_when_asked_for_and_refused_where_there_is_none(kind: type) -> None:
    _, plain = loaded()
    with pytest.raises(UserError, match="leave out --chat"):
        kind(plain, chat=True)
    _, chatty = loaded(chat=True)
    row = Example("x", "Which?", ("A", "B"), 1)
    text = chatty.decode(kind(chatty, chat=True).encode(row).input_ids)
    without = chatty.decode(kind(chatty).encode(row).input_ids)
    assert "<user>" in text and "</user><reply>" in text and "<s>" not in text
    assert "<user>" not in without


def test_chat_labels_stand_without_a_space() -> None:
    _, chatty = loaded(chat=True)
    ids = Letters(chatty, chat=True, num_letters=2).label_ids.tolist()
    assert [chatty.decode([i]) for i in ids] == ["A", "B"]


def test_a_sentencepiece_tokenizer_has_its_letters_as_one_token() -> None:
    # Llama 2's kind puts a space of its own in front of every text: " A" alone would be "▁▁A", two tokens
    pieces = ["<unk>", "▁", "▁A", "▁B", "A", "B", ":", "▁:", "▁▁", "Q", "u"]
    merges = [("▁", "A"), ("▁", "B"), ("▁", ":"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert len(fast(" A", add_special_tokens=False)["input_ids"]) == 2
    ids = Letters(fast, num_letters=2).label_ids.tolist()
    assert fast.convert_ids_to_tokens(ids) == ["▁A", "▁B"]
    assert fast(": A", add_special_tokens=False)["input_ids"][-1] == ids[0]


def test_the_settings_make_the_same_scoring_again() -> None:
    _, tokenizer = loaded()
    for scoring in (Letters(tokenizer, num_letters=3), Letters(tokenizer, labels=("yes", "no"), template="{text}")):
        again = make_scoring(scoring.settings(), tokenizer)
        assert isinstance(again, Letters) and again.settings() == scoring.settings()
        assert again.label_ids.tolist() == scoring.label_ids.tolist()


def test_labels_that_are_one_text_are_refused_by_name() -> None:
    tokenizer = tiny_tokenizer()
    for labels in (["yes", "no", "yes"], ["yes", " yes"], ["caf\u00e9", "cafe\u0301"]):
        with pytest.raises(UserError, match=f"The label '{labels[-1]}' is there twice; use labels that differ"):
            Letters(tokenizer, labels=labels)
