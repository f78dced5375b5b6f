"""A conversation as tokens, and which of them are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.text_rows import ASSISTANT, Message
from scalabl.scoring.base import through_template, tokens_behind

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
