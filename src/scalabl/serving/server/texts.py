"""Prompts -> texts that grow a token at a time, in batches that requests share.

Every text of a batch has settings, random numbers and an end of its own: what it becomes does not depend on the others,
and it is over when it is, though others go on.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from scalabl.core.errors import UserError
from scalabl.data.text_rows import Words
from scalabl.generation.answer import GeneratedAnswer, Token, tokens_of
from scalabl.generation.decoding import Decoded, DecodedStep, Pieces, TokenFigures, decode, end_tokens
from scalabl.generation.fan_out import honours_padding
from scalabl.generation.generate import PLAIN, answer_settings, make_answer, positions_of
from scalabl.scoring.text import Text
from scalabl.serving.server.adapters import ServedAdapter
from scalabl.serving.server.metrics import Metrics
from scalabl.serving.server.worker import Job
from scalabl.tuner.threads import alone

AT_ONCE = 8192  # tokens of a batch of texts, padding and those to come counted; one text may have more


@dataclass(frozen=True)
class TextAsked:
    """One text that is asked for.

    Attributes:
        prompt: tokens.
        max_tokens: its longest.
        temperature, top_p: of sampling; a temperature of 0 is greedy decoding.
        seed: of its random numbers.
        stop: texts that end it, and are not part of it.
        top: so many likeliest tokens are told with each.
        chat: whether the prompt stands in the chat template; None where it came as tokens, which do not say.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top: int = 0
    chat: bool | None = None


@dataclass(frozen=True)
class WrittenToken:
    """A token with its figures, its log-probability, the likeliest ones, and whether it ends the text unseen."""

    token: Token
    log_prob: float
    top: tuple[tuple[str, float], ...]
    is_end: bool


@dataclass(frozen=True)
class Piece:
    """What a text has more than before: letters, and the tokens that they came with."""

    text: str
    tokens: tuple[WrittenToken, ...]


@dataclass(frozen=True)
class Written:
    """A text that is over.

    Attributes:
        text: what was told of it, piece by piece.
        tokens: of all pieces.
        reason: "stop", by its end token or a stop text, or "length".
        answer: its confidence, scores and figures.
        samples: how many particles it was averaged over.
    """

    text: str
    tokens: tuple[WrittenToken, ...]
    reason: str
    answer: GeneratedAnswer
    samples: int


Told = Callable[[int, Piece], None]


class PromptReader:
    """Prompts as tokens, for the threads that read requests.

    Args:
        adapter: one that writes texts. Its tokenizer is copied: the model's thread uses it at the same time.
        most: tokens that a prompt may have.
    """

    def __init__(self, adapter: ServedAdapter, most: int) -> None:
        self.most = most
        self.text = Text(copy.deepcopy(adapter.run.tokenizer))
        self.reading = threading.Lock()  # a tokenizer is for one thread at a time
        self.positions = positions_of(adapter.run)
        embedding: Tensor = adapter.run.scorer.model.get_input_embeddings().weight
        self.vocabulary = embedding.shape[0]

    def tokens(self, prompt: Words | list[int]) -> list[int]:
        """A text, messages, or tokens as they are.

        Raises:
            UserError: it is empty or too long, has a token that is none, or messages and no template that writes them.
        """
        if isinstance(prompt, list):
            found = prompt
        else:
            with self.reading:
                found = self.text.prompt_tokens(prompt)
        if not found:
            raise UserError("A prompt is empty; give at least one word.")
        if not all(0 <= token < self.vocabulary for token in found):
            raise UserError(
                f"A prompt has a token that is none; the model has those from 0 to {self.vocabulary - 1:,}."
            )
        if len(found) > self.most:
            raise UserError(
                f"A prompt has {len(found):,} tokens; this server reads at most {self.most:,} (--max-prompt)."
            )
        return found

    def room(self, prompt: list[int]) -> int | None:
        """How many tokens may follow a prompt; None for any number."""
        return None if self.positions is None else self.positions - len(prompt)


class Write:
    """Jobs of texts for one server.

    Args:
        metrics: where tokens are counted.
        batch_size: texts that share a batch.
    """

    def __init__(self, metrics: Metrics, batch_size: int = 16) -> None:
        self.metrics = metrics
        self.batch_size = batch_size

    def job(self, adapter: ServedAdapter, asked: Sequence[TextAsked], told: Told | None = None) -> Job:
        """What gives the texts, a `Written` each.

        Args:
            adapter: who writes them.
            asked: the texts of one request.
            told: called in the model's thread with each piece and the number of its text.
        """

        def work(jobs: Sequence[Job]) -> list[list[Written]]:
            of_jobs = [[_Growing(adapter, each, job, i) for i, each in enumerate(job.given[0])] for job in jobs]
            self._write(adapter, [text for texts in of_jobs for text in texts], of_jobs)
            return [[text.written for text in texts] for texts in of_jobs]

        key = ("texts", adapter.name)
        return Job(key, len(asked), self.batch_size, work, (asked, told), again=False)

    def _write(self, adapter: ServedAdapter, texts: list[_Growing], of_jobs: list[list[_Growing]]) -> None:
        model = adapter.run.model
        with alone(model):
            prompts = [text.asked.prompt for text in texts]
            most = self.batch_size if honours_padding(model, prompts) else 1
            for batch in _within(texts, most, positions_of(adapter.run)):
                self._decode(adapter, batch, of_jobs)

    def _decode(self, adapter: ServedAdapter, texts: list[_Growing], of_jobs: list[list[_Growing]]) -> None:
        def told(step: DecodedStep) -> Tensor:
            for i, text in enumerate(texts):
                if not text.is_over:
                    text.take(step, i)
                    self.metrics.tokens.labels(adapter.name).inc()
            for own in of_jobs:
                job = own[0].job
                if all(text.is_over for text in own) and not job.answer.done():
                    job.answer.set_result([text.written for text in own])
            return torch.tensor([text.is_over for text in texts])

        assert adapter.draws is not None
        decode(
            adapter.run.model, adapter.run.tokenizer, [text.asked.prompt for text in texts], adapter.draws, told=told,
            top=max(text.asked.top for text in texts), max_new_tokens=max(text.asked.max_tokens for text in texts),
            logits_processor=LogitsProcessorList([_Sampled(texts)]), **PLAIN,
        )  # fmt: skip


def _within(texts: Sequence[_Growing], most: int, positions: int | None) -> list[list[_Growing]]:
    """Texts in batches of at most so many, those of like length together, whose tokens' keys and values fit beside
    each other and whose positions the model has.

    Every text is as wide as the longest prompt and the most tokens to come: it is led through the model as long as its
    neighbours are.
    """
    batches: list[list[_Growing]] = []
    for text in sorted(texts, key=lambda text: -text.longest):
        if batches and len(batches[-1]) < most:
            together = [each.asked for each in (*batches[-1], text)]
            width = max(len(each.prompt) for each in together) + max(each.max_tokens for each in together)
            if len(together) * width <= AT_ONCE and (positions is None or width <= positions):
                batches[-1].append(text)
                continue
        batches.append([text])
    return batches


class _Sampled(LogitsProcessor):  # type: ignore[misc]
    """Leaves each sampled text one token, drawn by numbers of its own; greedy decoding then takes it."""

    def __init__(self, texts: Sequence[_Growing]) -> None:
        self.texts = texts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        given, scores = scores, scores.clone()
        for i, text in enumerate(self.texts):
            if text.asked.temperature > 0 and not text.is_over:
                token = text.drawn(input_ids[i : i + 1], given[i : i + 1])
                scores[i] = -torch.inf
                scores[i, token] = 0.0
        return scores


class _Growing:
    """A text while it is written."""

    def __init__(self, adapter: ServedAdapter, asked: TextAsked, job: Job, number: int) -> None:
        self.adapter, self.asked, self.job, self.number = adapter, asked, job, number
        self.tokenizer = adapter.run.tokenizer
        self.ends = end_tokens(adapter.run.model, self.tokenizer, {})
        self.unseen = self.ends | set(self.tokenizer.all_special_ids)
        self.pieces = Pieces(self.tokenizer)
        self.generator = torch.Generator().manual_seed(asked.seed)
        self.tokens: list[WrittenToken] = []
        self.shown: list[Piece] = []
        self.waiting: list[WrittenToken] = []  # whose letters are not all shown yet
        self.letters = ""  # not shown yet: they may begin a stop text
        self.ids: list[int] = []
        self.log_probs: list[Tensor] = []
        self.figures: list[TokenFigures] = []
        self.reason: str | None = None

    @property
    def longest(self) -> int:
        """Tokens that it may come to, with its prompt."""
        return len(self.asked.prompt) + self.asked.max_tokens

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be taken."""
        return self.reason is not None

    def drawn(self, input_ids: Tensor, scores: Tensor) -> int:
        """The next token, sampled."""
        warped = TemperatureLogitsWarper(self.asked.temperature)(input_ids, scores)
        if self.asked.top_p < 1:
            warped = TopPLogitsWarper(self.asked.top_p)(input_ids, warped)
        return int(torch.multinomial(warped[0].softmax(dim=-1).cpu(), 1, generator=self.generator))

    def take(self, step: DecodedStep, row: int) -> None:
        """The token of a row of the batch."""
        token = int(step.token_ids[row])
        names = TokenFigures.__dataclass_fields__
        self.ids.append(token)
        self.log_probs.append(step.log_probs[:, row])
        self.figures.append(TokenFigures(*(getattr(step.figures, name)[row] for name in names)))
        piece = self.pieces.add(token)
        if token in self.ends:
            self.reason = "stop"
        elif len(self.ids) == self.asked.max_tokens:
            self.reason = "length"
            piece += self.pieces.rest()
        elif self.job.gone.is_set():
            self.reason = "stop"
        decoded = self._decoded([piece], [token], slice(-1, None))
        top = zip(step.top_ids[row].tolist(), step.top_log_probs[row].tolist(), strict=True)
        self.waiting.append(
            WrittenToken(
                tokens_of(decoded)[0], float(decoded.average_log_probs[0]),
                tuple((str(self.tokenizer.decode([each])), p) for each, p in top)[: self.asked.top],
                token in self.ends,
            )
        )  # fmt: skip
        self.tokens.append(self.waiting[-1])
        self.letters += "" if token in self.unseen else piece
        self._show()

    def _show(self) -> None:
        """Tell what is certain to be part of the text."""
        found = [at for stop in self.asked.stop if (at := self.letters.find(stop)) >= 0]
        if found:
            self.reason, self.letters = "stop", self.letters[: min(found)]
        kept = 0 if self.is_over else _begun(self.letters, self.asked.stop)
        letters = self.letters[: len(self.letters) - kept]
        if not letters and not self.is_over:
            return
        self.letters = self.letters[len(letters) :]
        self.shown.append(Piece(letters, tuple(self.waiting)))
        self.waiting = []
        told = self.job.given[1]
        if told is not None:
            told(self.number, self.shown[-1])

    @property
    def written(self) -> Written:
        """The text, once it is over."""
        assert self.reason is not None
        decoded = self._decoded([each.token.text for each in self.tokens], self.ids, slice(None))
        text, asked = "".join(piece.text for piece in self.shown), self.asked
        # a text that nothing was written of may have ended in front of an answer, where `generate` goes on
        alike = asked.temperature == 0 and asked.chat is not None and bool(text.strip())
        assert self.adapter.draws is not None
        run, draws = self.adapter.run, self.adapter.draws
        made = answer_settings(run, draws, chat=asked.chat, stop=asked.stop) if alike else None
        answer = make_answer("", decoded, [], None, self.adapter.confidence, made)
        return Written(text, tuple(self.tokens), self.reason, answer, len(self.log_probs[0]))

    def _decoded(self, pieces: list[str], ids: list[int], part: slice) -> Decoded:
        figures = {
            name: torch.stack([getattr(each, name) for each in self.figures[part]])
            for name in TokenFigures.__dataclass_fields__
        }
        log_probs = torch.stack(self.log_probs[part], dim=1)
        text = "".join(piece.text for piece in self.shown)
        return Decoded("", text, ids, pieces, log_probs, **figures, finished=self.reason == "stop")


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many letters at the end of a text may begin a stop text."""
    longest = max(map(len, stops), default=1) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0
    )
