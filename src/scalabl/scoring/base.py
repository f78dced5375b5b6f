"""What a scoring is, and the batch that it makes: one row a question, padded to a common length."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.scoring.conversation import Opening, begun_tokens, opening, through_template, tokens_behind
from scalabl.scoring.images import BatchImages, ImageReader, RowImages, batch_images, image_reader
from scalabl.scoring.likelihood import Likelihood, OneLabel


class Prefix(Protocol):
    """What the rows of a batch stand behind, encoded once a particle (`scalabl.scoring.prefix.SharedPrefix`)."""

    length: int
    batch: Batch

    def below(self, scorer: Any, start: int) -> Any: ...

    def cache(self, scorer: Any, batch: Batch) -> Any: ...


@dataclass(frozen=True)
class Encoded:
    """One row as tokens, unpadded. `segments` is 0 for the prompt and k for choice k = 1, 2, ..."""

    input_ids: list[int]
    position_ids: list[int]
    segments: list[int]
    num_choices: int
    answer: int | None
    trunk: Tensor | None = None  # (T, d) the frozen trunk's output, where it is cached
    images: RowImages | None = None
    dropped: int = 0  # tokens that did not fit, of its beginning or, before a classification head, of its end
    token_types: list[int] | None = None  # of a pair of texts: which of them each token is of
    marks: tuple[int, ...] | None = None  # of a labelled row of several labels: 1 for each that it has, else 0

    @property
    def is_labelled(self) -> bool:
        """Whether the right answer is known, or all labels of the row are."""
        return self.answer is not None or self.marks is not None

    def part(self, where: slice | list[int]) -> Self:
        """The row with some of its tokens alone."""
        at = list(range(len(self.input_ids)))[where] if isinstance(where, slice) else where
        return replace(
            self,
            input_ids=[self.input_ids[i] for i in at],
            position_ids=[self.position_ids[i] for i in at],
            segments=[self.segments[i] for i in at],
            token_types=None if self.token_types is None else [self.token_types[i] for i in at],
            trunk=None if self.trunk is None else self.trunk[at],
        )


@dataclass
class Batch:
    """Rows padded to a common length, on the left but for a classification head.

    Shapes: input_ids, position_ids, segments (B, T), with segment -1 where padded; num_choices, answers (B,), of
    several labels a row answers (B, C) of 0 and 1; -100 where unknown; trunk (B, T, d) or None; token_types (B, T), of
    pairs of texts alone. `keep` is how many last positions need logits.

    `start` is the decoder layer that `trunk` enters, None for the one below which everything is frozen. `prefix` is
    what stands before every row; it is encoded once for each of `particles`, which equal parts of the rows carry in
    this order (None: the model's state without particles).

    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    num_choices: Tensor
    answers: Tensor
    keep: int
    trunk: Tensor | None = None
    start: int | None = None
    prefix: Prefix | None = None
    particles: tuple[Hashable, ...] = (None,)
    images: BatchImages | None = None
    token_types: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def _map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        values = {x.name: getattr(self, x.name) for x in fields(self)}
        changed: dict[str, Any] = {name: f(value) for name, value in values.items() if isinstance(value, Tensor)}
        if self.images is not None:
            changed["images"] = self.images.map(f)
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Batch:
        moved = self._map(lambda t: t.to(device))
        if moved.images is not None:
            moved.images = moved.images.with_pixels_on(device)
        return moved

    def select(self, rows: Tensor) -> Batch:
        """Some of the rows, by their indices, at the same padded length."""
        return self._map(lambda t: t[rows])

    def repeat(self, number: int, particles: Sequence[Hashable] | None = None) -> Batch:
        """N copies behind each other: rows i B .. (i + 1) B - 1 are for particle i, or for particles[i]."""
        copies = self._map(lambda t: t.repeat(number, *([1] * (t.dim() - 1))))
        return replace(copies, particles=tuple(range(number) if particles is None else particles))


class Scoring(ABC):
    """How a model's logits become one number a choice, and what that is a distribution of.

    Args:
        tokenizer: the base model's.
        chat: put the question through the tokenizer's chat template.
        max_length: longest row in tokens; longer prompts lose their beginning.
        turn: how an answer stands behind a chat's prompt: as the "template" writes an assistant's turn, or "bare", the
            way of runs that are older.
    """

    name: str
    padding_side = "left"
    shares_prefix = True  # whether rows may stand behind what they all begin with, encoded once
    loses = "beginning"  # of a row that is too long
    likelihood: Likelihood = OneLabel()

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False, max_length: int = 512, turn: str = "template"
    ) -> None:
        if chat and not getattr(tokenizer, "chat_template", None):
            raise UserError("The task asks for a chat template, but the tokenizer has none; leave out --chat.")
        self.tokenizer = tokenizer
        self.chat = chat
        self.max_length = max_length
        self.turn = turn if chat else "bare"
        self.prefix = ""  # in front of every prompt

    def with_prefix(self, text: str) -> Self:
        """The same scoring with a text in front of every prompt: an instruction, or examples with their answers."""
        made = copy.copy(self)
        made.prefix = text
        return made

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What `make_scoring` needs to build it again, JSON-able."""

    def common_settings(self) -> dict[str, Any]:
        """The settings of every kind; records of runs that are older lack `turn`."""
        turn = {"turn": self.turn} if self.chat else {}
        return {"chat": self.chat, "max_length": self.max_length, **turn}

    @abstractmethod
    def encode(self, example: Example) -> Encoded:
        """Tokens of one row."""

    @abstractmethod
    def positions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows (M,) and columns (M,) of the M positions of a batch whose logits are needed; a vocabulary is large."""

    @abstractmethod
    def class_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits (M, V) at `positions` -> class logits (B, C), -inf where a row has no such choice; `likelihood` says
        what they are the logits of."""

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Pad rows on the scoring's side into a batch."""
        length = max(len(row.input_ids) for row in rows)
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        left = self.padding_side == "left"

        def padded(values: Sequence[Sequence[int]], pad: int) -> Tensor:
            blanks = [[pad] * (length - len(v)) for v in values]
            return torch.tensor([b + list(v) if left else list(v) + b for b, v in zip(blanks, values, strict=True)])

        trunk = None
        if rows[0].trunk is not None:
            trunk = torch.zeros(len(rows), length, rows[0].trunk.shape[-1], dtype=rows[0].trunk.dtype)
            for i, row in enumerate(rows):
                assert row.trunk is not None
                first = length - len(row.input_ids) if left else 0
                trunk[i, first : first + len(row.input_ids)] = row.trunk
        input_ids = padded([row.input_ids for row in rows], pad_id)
        pairs = any(row.token_types is not None for row in rows)  # a single text is as the first one of a pair
        return Batch(
            input_ids=input_ids,
            position_ids=padded([row.position_ids for row in rows], 0),
            segments=padded([row.segments for row in rows], -1),
            num_choices=torch.tensor([row.num_choices for row in rows]),
            answers=self.answers(rows),
            keep=max(1 + sum(segment > 0 for segment in row.segments) for row in rows),
            trunk=trunk,
            images=batch_images([row.images for row in rows], input_ids),
            token_types=padded([row.token_types or [0] * len(row.input_ids) for row in rows], 0) if pairs else None,
        )

    @property
    def per_row(self) -> int:
        """Questions of a row: C where it may have several of C labels, else 1."""
        return 1

    def answers(self, rows: Sequence[Encoded]) -> Tensor:
        """(B,) the right choices, -100 where unknown."""
        return torch.tensor([-100 if row.answer is None else row.answer for row in rows])

    def images_of(self, example: Example) -> RowImages | None:
        """The row's images and how they are read; None for a row of text.

        Raises:
            UserError: the model has no image side that is known here.
        """
        return RowImages(example.images, example.id, self._image_reader) if example.images else None

    @cached_property
    def _image_reader(self) -> ImageReader:
        return image_reader(self.tokenizer)

    def prompt_ids(self, question: str, images: RowImages | None = None) -> list[int]:
        """The prompt's tokens, through the chat template where `chat`; images stand in front of the question.

        Raises:
            UserError: an image cannot be read.
        """
        content: Any = self.prefix + question
        if images is not None and self.chat:
            content = [*[{"type": "image"}] * len(images.paths), {"type": "text", "text": content}]
        elif images is not None:
            content = f"{self.prefix}{images.reader.marks(len(images.paths))}\n{question}"
        if self.chat:
            message = [{"role": "user", "content": content}]
            content = through_template(self.tokenizer, message, "The prompt") + self._opening.before
        if images is not None:
            content = images.reader.expand(content, images.paths, images.row)
        if self.chat:
            return list(self.tokenizer(content, add_special_tokens=False)["input_ids"])
        return begun_tokens(self.tokenizer, content)

    def continuation_ids(self, text: str) -> list[int]:
        """The tokens of an answer that follows a prompt: after a space, or as the chat template writes its turn."""
        if not self.chat:
            return tokens_behind(self.tokenizer, ":", " " + text.strip())
        return tokens_behind(self.tokenizer, self._opening.anchor, self._opening.lead + text.strip())

    @cached_property
    def _opening(self) -> Opening:
        return opening(self.tokenizer) if self.turn == "template" else Opening()

    def clip(self, prompt: list[int], tail: int, images: RowImages | None = None) -> list[int]:
        """Drop the prompt's beginning where the row would be longer than `max_length`, keeping a leading BOS.

        Raises:
            UserError: the choices alone are longer, or the row has images, which cannot be cut.
        """
        room = self.max_length - tail
        if room < 1:
            raise UserError(
                f"The choices of a row take {tail} tokens, over the limit of {self.max_length}; raise --max-length."
            )
        if len(prompt) <= room:
            return prompt
        if images is not None:
            raise UserError(
                f"Row {images.row} takes {len(prompt) + tail} tokens with its images, which cannot be cut to the limit "
                f"of {self.max_length}; raise --max-length, or make the images smaller."
            )
        if prompt[0] == self.tokenizer.bos_token_id and room > 1:
            return [prompt[0], *prompt[-(room - 1) :]]
        return prompt[-room:]


def require_single(example: Example) -> None:
    """Refuse a pair of texts, and a row of several labels.

    Raises:
        UserError: the row is one, which only a classification head reads.
    """
    if example.answers is not None:
        raise UserError(
            f'Row {example.id} has "labels", several or none, which only a classification head learns; give it one '
            '"label", or train with --scoring head.'
        )
    if example.pair is not None:
        raise UserError(
            f'Row {example.id} has a "text_pair", which only a classification head reads; leave it out, or train with '
            "--scoring head."
        )


def cut_rows_sentence(rows: Sequence[Encoded], scoring: Scoring, kind: str = "rows") -> str | None:
    """How many rows were cut, and the mend; None where none was."""
    whole = [len(row.input_ids) + row.dropped for row in rows if row.dropped]
    if not whole:
        return None
    return (
        f"{len(whole):,} of {len(rows):,} {kind} are longer than {scoring.max_length} tokens and were read without "
        f"their {scoring.loses}; --max-length {max(whole)} (max_length in Python) keeps all of them whole."
    )


def attention_mask(batch: Batch, dtype: torch.dtype, window: int | None = None, chunk: int | None = None) -> Tensor:
    """(B, 1, T, P + T) additive mask: a token sees the prompt and its own choice, up to itself; behind a shared prefix
    of P tokens, that too.

    So the choices of a question stand in one row, share its prompt and its draw of s, and never see each other.

    Args:
        batch: the rows.
        dtype: the model's.
        window: how many positions a sliding layer sees, the token's own included; None for all.
        chunk: how many positions stand in one chunk of a chunked layer, which sees no other; None for all.
    """
    segments, positions = batch.segments, batch.position_ids
    rows, length = segments.shape
    before = batch.prefix.length if batch.prefix is not None else 0
    causal = torch.ones(length, before + length, dtype=torch.bool, device=segments.device).tril(before)
    prefix = torch.arange(before, device=segments.device).expand(rows, -1)
    key = torch.cat([torch.zeros_like(prefix), segments], dim=1)[:, None, :]
    allowed = causal & (key >= 0) & ((key == 0) | (key == segments[:, :, None]))
    if batch.images is not None and batch.images.both_ways:
        of = batch.images.of
        allowed = allowed | ((of > 0)[:, None, :] & (of[:, None, :] == of[:, :, None]))
    if window is not None:
        near = positions[:, :, None] - torch.cat([prefix, positions], dim=1)[:, None, :] < window
        allowed = allowed & near
    if chunk is not None:
        of_key = torch.cat([prefix, positions], dim=1)[:, None, :] // chunk
        allowed = allowed & (of_key == positions[:, :, None] // chunk)
    # a padded position sees itself, so that no row of the softmax is empty
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    allowed = allowed | torch.nn.functional.pad(itself, (before, 0))
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )[:, None]


def attention_masks(batch: Batch, dtype: torch.dtype, config: Any) -> Tensor | dict[str, Tensor]:
    """The mask of a model's layers, or one for each kind of layer where some see a window or a chunk alone."""
    whole = attention_mask(batch, dtype)
    kinds = set(getattr(config, "layer_types", None) or ())

    def size(name: str) -> int | None:
        value = getattr(config, name, None)
        return None if value is None or value >= whole.shape[-1] else int(value)

    window = size("sliding_window")
    chunk = size("attention_chunk_size") if "chunked_attention" in kinds else None
    if window is None and chunk is None:
        return whole
    if not kinds:
        return attention_mask(batch, dtype, window)
    masks = dict.fromkeys(kinds, whole)
    if window is not None and "sliding_attention" in kinds:
        masks["sliding_attention"] = attention_mask(batch, dtype, window)
    if chunk is not None:
        masks["chunked_attention"] = attention_mask(batch, dtype, chunk=chunk)
    return masks
