"""OpenAI's chat and text completions: their requests, answers and chunks, each choice with a `scalabl` field.

What OpenAI's interface has and Bayesian decoding does not is refused by its name, and not passed over.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from scalabl.core.errors import UserError
from scalabl.data.text_rows import Message
from scalabl.serving.server.texts import Piece, PromptReader, TextAsked, Written, WrittenToken

Fields = dict[str, Any]
_MOST_CHOICES = 8
_USUAL = 16  # tokens of a text completion that says no number, as OpenAI has it
Number = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart]

    def as_message(self) -> Message:
        """Its parts as one text."""
        parts = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, parts)


class StreamOptions(_Strict):
    """What a stream has beside the text."""

    include_usage: bool = False


class _Asked(_Strict):
    """What both kinds of completion read. Without a temperature decoding is greedy, as in `scalabl generate`."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # at OpenAI's defaults alone
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    # of OpenAI's own service: read over
    user: str | None = None
    metadata: Fields | None = None
    store: bool | None = None

    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def texts(
        self,
        reader: PromptReader,
        prompts: Sequence[list[int]],
        limit: int | None,
        most: int,
        top: int,
        chat: bool | None,
        usual: int | None = None,
    ) -> list[TextAsked]:
        """One text for each prompt and choice.

        Args:
            reader: of the adapter's prompts.
            prompts: as tokens.
            limit: the longest that the request says, or None.
            most: the longest that the server writes.
            top: so many likeliest tokens are told with each.
            chat: whether the prompts stand in the chat template; None where they do not say.
            usual: the longest where the request says none; None for all that there is room for.

        Raises:
            UserError: longer than the server writes, or than the model has positions for.
        """
        if limit is not None and limit > most:
            raise UserError(f"{limit:,} tokens are asked for, and this server writes at most {most:,} (--max-tokens).")
        seed = secrets.randbits(62) if self.seed is None else self.seed
        made: list[TextAsked] = []
        top_p = 1.0 if self.top_p is None else self.top_p
        # a top_p alone asks for sampling too
        temperature = self.temperature if self.temperature is not None else 0.0 if self.top_p is None else 1.0
        for prompt in prompts:
            room = reader.room(prompt)
            allowed = most if room is None else min(most, room)
            longest = limit if limit is not None else allowed if usual is None else min(usual, allowed)
            if room is not None and not 0 < longest <= room:
                raise UserError(
                    f"A prompt of {len(prompt):,} tokens and an answer of {max(longest, 1):,} are more than the "
                    f"{reader.positions:,} that the model has positions for; shorten one of them."
                )
            for _ in range(self.n or 1):
                made.append(TextAsked(prompt, longest, temperature, top_p, seed + len(made), self.stops(), top, chat))
        return made


class ChatRequest(_Asked):
    """What `POST /v1/chat/completions` reads."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Number | None = None
    max_completion_tokens: Number | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def number(self) -> int:
        """How many texts are asked for."""
        return self.n or 1

    def asked(self, reader: PromptReader, most: int) -> list[TextAsked]:
        """The texts of the request.

        Raises:
            UserError: as `texts` and `PromptReader.tokens`.
        """
        prompt = reader.tokens(tuple(message.as_message() for message in self.messages))
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs are given with logprobs alone; set it to true.")
        return self.texts(reader, [prompt], limit, most, self.top_logprobs or 0, True)


class CompletionRequest(_Asked):
    """What `POST /v1/completions` reads."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: Number | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[Any]:
        """Each a text or tokens."""
        given: Any = self.prompt
        several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        return given if several else [given]

    @property
    def number(self) -> int:
        """How many texts are asked for."""
        return len(self.prompts) * (self.n or 1)

    def asked(self, reader: PromptReader, most: int) -> list[TextAsked]:
        """The texts of the request.

        Raises:
            UserError: as `texts` and `PromptReader.tokens`.
        """
        prompts = [reader.tokens(each) for each in self.prompts]
        chat = False if isinstance(self.prompts[0], str) else None
        usual = None if "max_tokens" in self.model_fields_set else _USUAL
        return self.texts(reader, prompts, self.max_tokens, most, self.logprobs or 0, chat, usual)


class ChatForm:
    """Answers of `POST /v1/chat/completions` on the wire.

    Args:
        model: the adapter's name.
        logprobs: whether choices have them.
    """

    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(self, model: str, logprobs: bool) -> None:
        self.logprobs = logprobs
        self.own: Fields = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, texts: Sequence[Written], usage: Fields) -> Fields:
        """The answer of a request that does not stream."""
        choices = [
            self._choice(i, {"message": {"role": "assistant", "content": text.text, "refusal": None}}, text.tokens)
            | {"finish_reason": text.reason, "scalabl": figures(text)}
            for i, text in enumerate(texts)
        ]
        return {**self.own, "object": self.kind, "choices": choices, "usage": usage}

    def first(self, index: int) -> Fields | None:
        """The chunk that begins a choice."""
        return self._chunk(self._choice(index, {"delta": {"role": "assistant", "content": ""}}, ()))

    def next(self, index: int, piece: Piece) -> Fields:
        """A chunk with a piece of a choice."""
        choice = self._choice(index, {"delta": {"content": piece.text}}, piece.tokens)
        return self._chunk(choice | {"scalabl": {"tokens": [asdict(each.token) for each in piece.tokens]}})

    def last(self, index: int, text: Written) -> Fields:
        """The chunk that ends a choice."""
        end = {"finish_reason": text.reason, "scalabl": figures(text, tokens=False)}
        return self._chunk(self._choice(index, {"delta": {}}, ()) | end)

    def counted(self, usage: Fields) -> Fields:
        """The chunk behind all choices that says what they took."""
        return self._chunk(None) | {"usage": usage}

    def _chunk(self, choice: Fields | None) -> Fields:
        return {**self.own, "object": f"{self.kind}.chunk", "choices": [] if choice is None else [choice]}

    def _choice(self, index: int, content: Fields, tokens: Sequence[WrittenToken]) -> Fields:
        known = {"content": [_chat_logprob(each) for each in tokens if not each.is_end], "refusal": None}
        return {
            "index": index,
            **content,
            "logprobs": known if self.logprobs and tokens else None,
            "finish_reason": None,
        }


class TextForm(ChatForm):
    """Answers of `POST /v1/completions` on the wire."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, model: str, logprobs: bool) -> None:
        super().__init__(model, logprobs)
        self._offsets: dict[int, int] = {}  # letters of each choice before its next token

    def whole(self, texts: Sequence[Written], usage: Fields) -> Fields:
        choices = [
            self._choice(i, {"text": text.text}, text.tokens) | {"finish_reason": text.reason, "scalabl": figures(text)}
            for i, text in enumerate(texts)
        ]
        return {**self.own, "object": self.kind, "choices": choices, "usage": usage}

    def first(self, index: int) -> Fields | None:
        return None

    def next(self, index: int, piece: Piece) -> Fields:
        choice = self._choice(index, {"text": piece.text}, piece.tokens)
        return self._chunk(choice | {"scalabl": {"tokens": [asdict(each.token) for each in piece.tokens]}})

    def last(self, index: int, text: Written) -> Fields:
        end = {"finish_reason": text.reason, "scalabl": figures(text, tokens=False)}
        return self._chunk(self._choice(index, {"text": ""}, ()) | end)

    def _chunk(self, choice: Fields | None) -> Fields:
        return {**self.own, "object": self.kind, "choices": [] if choice is None else [choice]}

    def _choice(self, index: int, content: Fields, tokens: Sequence[WrittenToken]) -> Fields:
        known = self._logprobs(index, tokens) if self.logprobs and tokens else None
        return {"index": index, **content, "logprobs": known, "finish_reason": None}

    def _logprobs(self, index: int, tokens: Sequence[WrittenToken]) -> Fields:
        seen = [each for each in tokens if not each.is_end]
        offsets = []
        for each in seen:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(each.token.text)
        return {
            "tokens": [each.token.text for each in seen],
            "token_logprobs": [each.log_prob for each in seen],
            "top_logprobs": [dict(each.top) for each in seen],
            "text_offset": offsets,
        }


def figures(text: Written, *, tokens: bool = True) -> Fields:
    """The `scalabl` field of a choice: the confidence in the text, whether it was fitted, the scores behind it, of how
    many particles they are, and for each token its probability and its uncertainties in nats."""
    answer = text.answer
    known: Fields = {
        "confidence": answer.confidence,
        "calibrated": answer.calibrated,
        "scores": answer.scores,
        "particles": text.samples,
    }
    return known | ({"tokens": [asdict(token) for token in answer.tokens]} if tokens else {})


def usage(asked: Sequence[TextAsked], texts: Sequence[Written]) -> Fields:
    """Tokens of a request: a prompt counts once for all its choices."""
    prompts = {id(each.prompt): len(each.prompt) for each in asked}
    given, written = sum(prompts.values()), sum(len(text.tokens) for text in texts)
    return {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}


def event(content: Fields | str) -> str:
    """A server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)}\n\n"


def _chat_logprob(each: WrittenToken) -> Fields:
    top = [_logprob(text, value) for text, value in each.top]
    return _logprob(each.token.text, each.log_prob) | {"top_logprobs": top}


def _logprob(text: str, value: float) -> Fields:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}
