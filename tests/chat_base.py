"""Chat templates, tokenizers that have them, and rows of text: what the tests here share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tiny_base import tiny_base, tiny_tokenizer

from scalabl.data import Message, TextRow

_TURN = "<{{ m['role'] }}>{{ m['content'] }}</s>\n"
_BEGIN = "{% if add_generation_prompt %}<assistant>{% endif %}"
# earlier turns are written alike whatever follows
PLAIN = "{% for m in messages %}" + _TURN + "{% endfor %}" + _BEGIN
# the assistant's turns are marked, end token included
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{{ '\n' }}{% else %}" + _TURN + "{% endif %}{% endfor %}" + _BEGIN
)
# as templates of thinking models do: the last turn is written otherwise than those before it
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}<assistant>so </s>{{ m['content'] }}</s>\n"
    "{% else %}" + _TURN + "{% endif %}{% endfor %}" + _BEGIN
)
# no mark ends a turn
OPEN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_template(template: str) -> Any:
    """The tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat_base(directory: Path, template: str) -> Path:
    """The tiny model with a tokenizer that has a chat template."""
    shutil.copytree(tiny_base(), directory)
    with_template(template).save_pretrained(directory)
    return directory


def said(*turns: str) -> tuple[Message, ...]:
    """A conversation: a user's and the assistant's turns in alternation."""
    return tuple(Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns))


def conversation(*turns: str, name: str = "c") -> TextRow:
    """The row of a whole conversation."""
    return TextRow(name, (), said(*turns))


def pairs(number: int = 12) -> list[dict[str, str]]:
    """Prompts and completions of very unequal length, as JSON."""
    words = ("red", "blue", "green", "yes", "no", "maybe")
    return [
        {
            "prompt": f"Question: which word {i}?\nAnswer:",
            "completion": " " + " ".join([words[i % 6]] * (1 + i**2 % 9)),
        }
        for i in range(number)
    ]
