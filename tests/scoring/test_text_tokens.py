"""Rows of text as tokens: what is trained on, with TRL as the witness; cuts, templates and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_base import FORGETFUL, MARKED, OPEN, PLAIN, conversation, pairs, said, with_template
from datasets import Dataset
from tiny_base import adapted, loaded, tiny_tokenizer

from scalabl.core.errors import UserError
from scalabl.data import Message, TextRow
from scalabl.scoring import Scorer, Text
from scalabl.scoring.text import IGNORED, EncodedText


def trained_text(tokenizer: Any, row: EncodedText) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = [[]]
    for label in row.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [str(tokenizer.decode(run)) for run in runs if run]


def first_trained(row: EncodedText) -> int:
    return next(i for i, label in enumerate(row.labels) if label != IGNORED)


def trl_rows(tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """What SFTTrainer makes of the rows."""
    trl = pytest.importorskip("trl")
    model, _ = loaded()
    arguments = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **options)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return list(trainer.train_dataset)


def test_a_prompt_and_its_completion_are_trls_tokens_and_labels(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = Text(tokenizer)
    expected = trl_rows(tmp_path, tokenizer, list(pairs()))  # type: ignore[arg-type]
    for row, witness in zip(pairs(), expected, strict=True):
        encoded = text.encode(TextRow("r", row["prompt"], row["completion"]))
        assert encoded.input_ids == witness["input_ids"] and list(encoded.labels) == witness["labels"]
        assert encoded.input_ids[-1] == tokenizer.eos_token_id and encoded.labels[-1] == tokenizer.eos_token_id
        prompt = text.prompt_tokens(row["prompt"])
        assert encoded.input_ids[: len(prompt)] == prompt and set(encoded.labels[: len(prompt)]) == {IGNORED}


def test_marked_turns_of_a_conversation_are_trls_assistant_only_labels(tmp_path: Path) -> None:
    tokenizer = with_template(MARKED)
    turns = ("hello", "red yes", "which word?", "blue or green")
    rows = [{"messages": [m.as_dict() for m in said(*turns[:n])]} for n in (2, 4)]
    expected = trl_rows(tmp_path, tokenizer, rows, assistant_only_loss=True)
    for n, witness in zip((2, 4), expected, strict=True):
        encoded = Text(tokenizer).encode(conversation(*turns[:n]))
        assert encoded.input_ids == witness["input_ids"] and list(encoded.labels) == witness["labels"]


def test_the_templates_mask_and_the_difference_of_its_texts_train_on_the_same() -> None:
    rows = [conversation("hello", "red yes", "which?", "blue\ngreen "), conversation("a", "b")]
    marked, plain = with_template(MARKED), with_template(PLAIN)
    for row in rows:
        one, other = Text(marked).encode(row), Text(plain).encode(row)
        length = len(other.input_ids)
        assert one.input_ids[:length] == other.input_ids and one.labels[:length] == other.labels
        assert set(one.labels[length:]) <= {IGNORED}  # the line's end
    assert trained_text(plain, Text(plain).encode(rows[0])) == ["red yes</s>", "blue\ngreen </s>"]


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_a_prompt_of_messages_is_not_trained_on(template: str) -> None:
    tokenizer = with_template(template)
    messages = said("hello", "red", "which?", "blue")
    row = Text(tokenizer).encode(TextRow("r", messages[:3], messages[3:]))
    assert trained_text(tokenizer, row) == ["blue</s>"]
    prompt = Text(tokenizer).prompt_tokens(messages[:3])
    assert row.input_ids[: len(prompt)] == prompt and row.labels[len(prompt)] != IGNORED
    # as texts, through the template
    pair = Text(tokenizer, chat=True).encode(TextRow("r", "which?", " blue"))
    assert trained_text(tokenizer, pair) == ["blue</s>"]
    assert Text(tokenizer, chat=True).prompt_tokens("which?") == pair.input_ids[: first_trained(pair)]


def test_a_template_that_marks_no_end_gets_an_end_token() -> None:
    tokenizer = with_template(OPEN)
    row = Text(tokenizer).encode(conversation("hello", "red", "which?", "blue"))
    assert trained_text(tokenizer, row) == ["red", "blue</s>"]


def test_templates_that_can_be_told_neither_way_are_refused() -> None:
    forgetful = with_template(FORGETFUL)
    assert trained_text(forgetful, Text(forgetful).encode(conversation("a", "red"))) == ["so </s>red</s>"]
    with pytest.raises(UserError, match=r"^Row c: .*otherwise when others follow; use a template with"):
        Text(forgetful).encode(conversation("a", "red", "b", "blue"))
    marks_nothing = "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    broken = with_template(PLAIN + marks_nothing)
    with pytest.raises(UserError, match="marks no token as the assistant's"):
        Text(broken).encode(conversation("a", "red"))
    strict = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"^Row c: .*cannot write this conversation \(roles must alternate\)"):
        Text(strict).encode(conversation("a", "red"))
    with pytest.raises(UserError, match="needs? a chat template, but the model's tokenizer has none"):
        Text(tiny_tokenizer()).encode(conversation("a", "red"))
    with pytest.raises(UserError, match="leave out --chat"):
        Text(tiny_tokenizer(), chat=True)


def test_a_long_row_loses_its_beginning_and_never_its_last_turn() -> None:
    tokenizer = tiny_tokenizer()
    row = TextRow("long", "Question: which word is red or blue? " * 4 + "\nAnswer:", " red or blue")
    whole = Text(tokenizer).encode(row)
    last = first_trained(whole)
    for limit in (len(whole.input_ids), len(whole.input_ids) - 1, len(whole.input_ids) - last + 1):
        cut = Text(tokenizer, max_length=limit).encode(row)
        assert len(cut.input_ids) == limit and cut.trained == whole.trained
        assert cut.cut == (limit < len(whole.input_ids))
        assert cut.input_ids[0] == tokenizer.bos_token_id and cut.labels[0] == IGNORED
        assert cut.input_ids[1:] == whole.input_ids[len(whole.input_ids) - limit + 1 :]
        assert cut.position_ids == list(range(limit))
    with pytest.raises(UserError, match=r"Row long is trained on \d+ tokens.*raise --max-length"):
        Text(tokenizer, max_length=len(whole.input_ids) - last).encode(row)


def test_class_logits_are_the_rows_log_likelihoods_of_a_plain_forward_pass() -> None:
    model = adapted()
    tokenizer = with_template(PLAIN)
    text = Text(tokenizer)
    rows = [text.encode(TextRow("r", row["prompt"], row["completion"])) for row in pairs(4)]
    rows.append(text.encode(conversation("hello", "red yes", "which?", "blue")))  # two runs of trained tokens
    with torch.no_grad():
        found = Scorer(model, text).class_logits(text.collate(rows))
        for row, value in zip(rows, found, strict=True):
            ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
            log_probs = model(ids).logits[0].log_softmax(dim=-1)
            positions = torch.nonzero(labels != IGNORED)[:, 0]
            expected = log_probs[positions - 1, labels[positions]].sum()
            torch.testing.assert_close(value[0], expected, rtol=1e-4, atol=1e-4)


def test_a_role_that_the_template_refuses_names_the_row() -> None:
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        "<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = TextRow("s", (), (Message("system", "be brief"), *said("a", "red")))
    with pytest.raises(UserError, match=r"^Row s: .*\(no system\)"):
        Text(with_template(template)).encode(row)
