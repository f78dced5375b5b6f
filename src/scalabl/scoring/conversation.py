"""A conversation as tokens, which of them are the assistant's, and how a text goes on behind a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from scalabl.core.errors import UserError, first_line
from scalabl.data.text_rows import ASSISTANT, Message

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def require_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse messages where nothing writes them.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: messages need a chat template, but the model's tokenizer has none; write prompt and completion "
            "as texts."
        )


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, where: str, generation: bool = False
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: with a chat template.
        messages: the turns.
        where: how a refusal names the row.
        generation: end with the beginning of the assistant's turn.

    Raises:
        UserError: the template refuses the conversation.
    """
    return through_template(tokenizer, _dicts(messages), where, generation=generation)


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], first: int, where: str
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and for each whether it is trained on: those of the assistant's turns.

    A template that marks what the assistant says ({% generation %}) decides by itself. Otherwise a turn is what the
    text of the conversation up to it has more than the text of the turns before it and the beginning of its own, up to
    the last mark that ends it; the template must then write earlier turns alike whatever follows. A template without
    such a mark gets an end token behind the last turn.

    Args:
        tokenizer: with a chat template.
        messages: the turns.
        first: turns before this one are not trained on.
        where: how a refusal names the row.

    Raises:
        UserError: the template neither marks the assistant's turns nor do they show by what is before them.
    """
    if _GENERATION.search(tokenizer.get_chat_template()):
        return _by_mask(tokenizer, messages, first, where)
    return _by_difference(tokenizer, messages, first, where)


def _by_mask(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], first: int, where: str
) -> tuple[list[int], list[bool]]:
    rendered(tokenizer, messages, where=where)  # refuses what the template does
    found: Any = tokenizer.apply_chat_template(
        _dicts(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
    if first:
        before = rendered(tokenizer, messages[:first], where=where, generation=True)
        prompt = list(tokenizer(before, add_special_tokens=False)["input_ids"])
        alike = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        trained = [mark and i >= alike for i, mark in enumerate(trained)]
    if not any(trained):
        raise UserError(
            f"{where}: the chat template marks no token as the assistant's; mend its generation block, or take it out "
            "to have turns told by what is before them."
        )
    return ids, trained


def _by_difference(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], first: int, where: str
) -> tuple[list[int], list[bool]]:
    whole = rendered(tokenizer, messages, where=where)
    pieces: list[tuple[str, bool]] = []
    end = 0
    for i, message in enumerate(messages):
        if i < first or message.role != ASSISTANT:
            continue
        before = rendered(tokenizer, messages[:i], where=where, generation=True)
        after = rendered(tokenizer, messages[: i + 1], where=where)
        # white space behind the end mark is the template's own
        turn = after[len(before) :].rstrip()
        if not (whole.startswith(before + turn) and after.startswith(before) and turn):
            raise UserError(
                f"{where}: the chat template does not mark what the assistant says, and writes its turns otherwise "
                "when others follow; use a template with a {% generation %} block, or rows with one such turn, the "
                "last."
            )
        pieces += [(whole[end : len(before)], False), (turn, True)]
        end = len(before) + len(turn)
    ids: list[int] = []
    trained: list[bool] = []
    # piece by piece: while generating, a prompt ends where the assistant's turn begins
    for number, (text, mark) in enumerate(pieces):
        anchor = pieces[number - 1][0][-1:] if number else ""
        tokens = tokens_behind(tokenizer, anchor, text)
        ids, trained = ids + tokens, trained + [mark] * len(tokens)
    last = messages[-1]
    if last.role == ASSISTANT and pieces[-1][0].endswith(last.content.rstrip()) and tokenizer.eos_token_id is not None:
        ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
    return ids, trained


def _dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [message.as_dict() for message in messages]


def through_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], what: str, *, generation: bool = True
) -> str:
    """Messages as the tokenizer's chat template writes them.

    Args:
        tokenizer: with a chat template.
        messages: the turns.
        what: how a refusal names them.
        generation: end with the beginning of the assistant's turn.

    Raises:
        UserError: the template refuses the messages, or is none that can be read.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except Exception as error:  # a program of the model's: it may raise anything
        raise UserError(
            f"{what}: the model's chat template cannot write this conversation ({first_line(error)}); give turns that "
            "it knows, or a tokenizer with another template."
        ) from error


def begun_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on: with what the tokenizer puts in front of one, without what it puts behind.

    Raises:
        UserError: there are none, so that nothing could be read behind them.
    """
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        framed = list(tokenizer("a")["input_ids"])
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        ends = (n for n in range(len(framed)) if framed[: len(framed) - n][-len(bare) :] == bare)
        behind = next(ends, 0)
        ids = ids[: len(ids) - behind]
    if not ids:
        raise UserError(f"The prompt {text!r} is empty for this tokenizer; write what is asked.")
    return ids


@dataclass(frozen=True)
class Opening:
    """What a chat template writes between the beginning of an assistant's turn and what the assistant says.

    Attributes:
        before: what the prompt has more, as an empty block of thoughts.
        lead: white space in front of the answer's first word, which its first token may hold.
        anchor: what stands before that, for tokens of the answer alone.
    """

    before: str = ""
    lead: str = ""
    anchor: str = "\n"


def opening(tokenizer: PreTrainedTokenizerBase) -> Opening:
    """How a tokenizer's template opens what the assistant says, as training on conversations has it: read off a turn
    that the template writes. A template that writes no such turn, or in another way than it begins one, has none."""
    said, question = "a0said0a", {"role": "user", "content": "a0asked0a"}
    answered = [question, {"role": "assistant", "content": said}]
    try:
        begun = through_template(tokenizer, [question], "The prompt")
        whole = through_template(tokenizer, answered, "The answer", generation=False)
    except UserError:  # it knows no assistant's turn
        return Opening()
    head, found, _ = whole.partition(said)
    if not found or not head.startswith(begun):
        return Opening()
    more = head[len(begun) :]
    if more.strip():
        return Opening(before=more, anchor=more[-1])
    return Opening(lead=more, anchor=begun[-1:] or "\n")


def tokens_behind(tokenizer: PreTrainedTokenizerBase, anchor: str, text: str) -> list[int]:
    """The tokens of a text that follows another one, of which `anchor` is the end; the two share no token."""
    # behind what ends the prompt: SentencePiece tokenizers put a space of their own in front of a lone text
    before = list(tokenizer(anchor, add_special_tokens=False)["input_ids"])
    together = list(tokenizer(anchor + text, add_special_tokens=False)["input_ids"])
    if together[: len(before)] == before and len(together) > len(before):
        return together[len(before) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
