"""A Bayesian classifier whose model is a vLLM server: one adapter a particle, probabilities averaged here.

    scalabl export runs/mine --particles 10          # writes the particles and prints the next line
    vllm serve BASE --enable-lora --max-loras 10 --lora-modules particle-0=runs/mine/particles/0 ...

    classifier = scalabl.serving.vllm.VLLMClassifier.from_export("runs/mine", url="http://127.0.0.1:8000")
    classifier(rows).epistemic

Any server that speaks the OpenAI completions protocol with vLLM's fields will do, and vLLM's /classify for the head of
a decoder; vLLM itself is not needed here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.data.questions import rows_of
from scalabl.inference.adapter import head_over, letters_of, refuse_unread, shared_labels
from scalabl.inference.answer import Answer, answer_of
from scalabl.metrics.uncertainty import apply_temperature
from scalabl.runs.models import load_tokenizer, saved_tokenizer
from scalabl.scoring.base import Encoded, Scoring
from scalabl.scoring.continuation import Continuation
from scalabl.scoring.letters import Letters
from scalabl.scoring.scorer import make_scoring
from scalabl.serving.http import HTTPError, JSONClient
from scalabl.serving.manifest import (
    OUTPUT_LAYER_ISSUE,
    TOKENIZER,
    ParticleManifest,
    particles_directory,
    read_manifest,
    refuse_head,
)
from scalabl.serving.requests import BY, By, log_probs_of, path_of, requests_of

__all__ = ["VLLMClassifier"]


class VLLMClassifier:
    """Questions in, averaged class probabilities and their uncertainty out, as `scalabl.Classifier` gives them.

    Args:
        manifest: of the exported particles.
        scoring: how rows become tokens and class log-probabilities.
        url: the server's, with or without the /v1 behind it.
        name: the adapters are NAME-0 .. NAME-(N-1) on the server; the manifest's by default.
        concurrency: requests under way at a time.
        timeout: seconds for each request.
        retries: how often a request is sent again after a lost connection, a time-out or a busy server.
        by: how tokens are looked up: "next" names them to the server (`logprob_token_ids`); "prompt" is for choice
            texts on a server that takes no names (`prompt_logprobs`).
        top_logprobs: of "next", on such a server: how many of the most probable tokens to look in; a token that is not
            among them is an error. -1 is the whole vocabulary.
        temperature: T of the particles' log-probabilities, log softmax(log p / T); `manifest.temperature` is the
            fitted one. None leaves them as they are.
        api_key: sent as a bearer token; the environment's VLLM_API_KEY by default.

    Attributes:
        takes_prompts: whether texts are prompts already.

    Raises:
        UserError: a value out of range, a classification head that vLLM does not load, or log-probabilities that it
            would get wrong.
    """

    def __init__(
        self,
        manifest: ParticleManifest,
        scoring: Scoring,
        *,
        url: str = "http://127.0.0.1:8000",
        name: str | None = None,
        concurrency: int = 32,
        timeout: float = 60.0,
        retries: int = 3,
        by: By = "next",
        top_logprobs: int = 20,
        temperature: float | None = None,
        api_key: str | None = None,
    ) -> None:
        refuse_head(manifest)
        if concurrency < 1:
            raise UserError(f"concurrency is {concurrency}; it must be at least 1.")
        if temperature is not None and not temperature > 0:
            raise UserError(f"temperature is {temperature}; it must be positive.")
        if top_logprobs < 1 and top_logprobs != -1:
            raise UserError(f"top_logprobs is {top_logprobs}; it must be at least 1, or -1 for the whole vocabulary.")
        if by not in BY:
            raise UserError(f"by is {by!r}; it must be one of {', '.join(BY)}.")
        if by == "prompt" and not isinstance(scoring, Continuation):
            raise UserError('by="prompt" is for choice texts (continuation); leave it out for letters.')
        if by == "prompt" and manifest.adapts_output_layer:
            raise UserError(
                "The adapter is on the output layer, which vLLM leaves out of the log-probabilities of a prompt "
                f'({OUTPUT_LAYER_ISSUE}); leave by="prompt" out.'
            )
        self.manifest, self.scoring, self.temperature = manifest, scoring, temperature
        number = manifest.identity.number
        self.adapters = tuple(f"{name}-{k}" for k in range(number)) if name else manifest.adapters
        key = api_key if api_key is not None else os.environ.get("VLLM_API_KEY")
        self._client = JSONClient(_root(url), timeout=timeout, retries=retries, api_key=key)
        self._concurrency, self._top_logprobs, self._by = concurrency, top_logprobs, by
        self.takes_prompts = False
        self._checked = False

    @classmethod
    def from_export(
        cls,
        directory: str | Path,
        *,
        labels: Sequence[str] | None = None,
        template: str | None = None,
        chat: bool | None = None,
        max_length: int | None = None,
        prefix: str = "",
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        **options: Any,
    ) -> VLLMClassifier:
        """From a directory that `scalabl export` wrote; of the base model the tokenizer alone is loaded.

        Args:
            directory: OUT, or OUT/particles.
            labels: label words, each one token; texts are then prompts, used as they are, but for a `template`. Of a
                head the labels in the order of its outputs. None takes labels or choices from the manifest, as the
                run was trained.
            template: with `labels`: how a text becomes a prompt, "{text}\\nLabel:".
            chat: with `labels`: put each prompt through the tokenizer's chat template; None is False.
            max_length: with `labels`: longest prompt in tokens, 4096 if None; longer ones lose their beginning.
            prefix: in front of every prompt; the server encodes it once a particle (its prefix caching).
            tokenizer: the tokenizer, or where one lies; by default the one that was saved beside the adapter, else that
                of the base model that the manifest names.
            options: of `VLLMClassifier`; a calibrated run's temperature by default, where its own rows are asked.

        Raises:
            UserError: no exported particles, or those of a head that vLLM does not load; no tokenizer, a label of
                several tokens, or as `VLLMClassifier`.
        """
        manifest = read_manifest(Path(directory))
        refuse_head(manifest)
        if labels is None and manifest.scoring is None:
            raise UserError(f"{directory} does not say how rows are scored; pass labels=[...].")
        if labels is None and manifest.scoring is not None:
            refuse_unread(manifest.scoring, template=template, chat=chat, max_length=max_length)
        if tokenizer is None:
            tokenizer = saved_tokenizer(particles_directory(Path(directory)) / TOKENIZER)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            where = tokenizer or manifest.base_model
            if where is None:
                raise UserError(f"{directory} does not name its base model; pass tokenizer=...")
            tokenizer = load_tokenizer(where)
        scoring: Scoring
        if labels is not None and manifest.head:
            scoring = head_over(labels, tokenizer, template=template, chat=chat, max_length=max_length)
        elif labels is not None:
            scoring = letters_of(labels, tokenizer, template=template, chat=chat, max_length=max_length)
        else:
            assert manifest.scoring is not None
            scoring = make_scoring(manifest.scoring, tokenizer)
        if manifest.calibrated and labels is None and not prefix:
            options.setdefault("temperature", manifest.temperature)
        made = cls(manifest, scoring.with_prefix(prefix) if prefix else scoring, **options)
        made.takes_prompts = labels is not None and template is None and not manifest.head
        return made

    def __call__(self, questions: str | Sequence[str | Mapping[str, Any] | Example]) -> Answer:
        """Classify questions.

        Args:
            questions: prompts (with label words), or rows {"question", "choices"} or `Example`s.

        Raises:
            UserError: questions that cannot be scored; a server that is not there, lacks an adapter, does not answer,
                or leaves a token out of its answer. Nothing is answered then: no probability is ever made up.
        """
        rows = rows_of(questions, shared_labels(self.scoring, self.manifest.labels), prompts=self.takes_prompts)
        encoded = [self.scoring.encode(row) for row in rows]
        self.check()
        log_probs = self.log_probs(encoded)
        if self.temperature is not None:
            log_probs = apply_temperature(log_probs, self.temperature)
        return answer_of(rows, log_probs, per_row=self.scoring.per_row)

    def check(self) -> None:
        """Ask the server, once, whether it has all adapters.

        Raises:
            UserError: it is not there, or lacks one.
        """
        if self._checked:
            return
        try:
            listed = self._client.get("/v1/models")
            there = {str(model["id"]) for model in listed["data"]}
        except HTTPError as error:
            raise self._refused(error) from error
        except (KeyError, TypeError) as error:
            raise UserError(f"The server at {self._client.url} lists no models; is it vLLM's?") from error
        missing = [adapter for adapter in self.adapters if adapter not in there]
        if missing:
            raise UserError(
                f"The server at {self._client.url} has not loaded {', '.join(missing[:3])}"
                f"{' ...' if len(missing) > 3 else ''} ({len(missing)} of {len(self.adapters)} adapters); start it "
                "with the command that scalabl export prints."
            )
        self._checked = True

    def log_probs(self, rows: Sequence[Encoded]) -> Tensor:
        """(N, n, C) float64 log class probabilities of every particle, -inf where a row has no such choice.

        Where rows may have several of C labels: (N, n C, 2), of no and of yes for each.

        Raises:
            UserError: as a call.
        """
        particles, per = len(self.adapters), self.scoring.per_row
        widest = 2 if per > 1 else max(row.num_choices for row in rows)
        classes = len(self.scoring.label_ids) if isinstance(self.scoring, Letters) else widest
        out = torch.full((particles, len(rows), per, classes), -torch.inf, dtype=torch.float64)
        # a row's particles follow each other, so that all adapters are in a server's batch
        jobs = ((k, i) for i in range(len(rows)) for k in range(particles))
        pool = ThreadPoolExecutor(min(self._concurrency, particles * len(rows)), thread_name_prefix="scalabl-vllm")
        stop = threading.Event()
        try:
            with progress_bar() as progress:
                bar = progress.add_task("asking the server", total=particles * len(rows), detail="")
                waiting: dict[Future[Tensor], tuple[int, int]] = {}
                while True:
                    for k, i in islice(jobs, 2 * self._concurrency - len(waiting)):
                        waiting[pool.submit(self._ask, rows[i], self.adapters[k], stop)] = (k, i)
                    if not waiting:
                        break
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        k, i = waiting.pop(future)
                        found = future.result().view(per, -1)
                        out[k, i, :, : found.shape[1]] = found
                        progress.advance(bar)
        finally:
            stop.set()  # after a failure, what is under way is not tried again
            pool.shutdown(wait=False, cancel_futures=True)
        return out.flatten(1, 2)

    def _ask(self, row: Encoded, adapter: str, stop: threading.Event) -> Tensor:
        bodies = requests_of(self.scoring, row, adapter, by=self._by, top_logprobs=self._top_logprobs)
        try:
            answers = [self._client.post(path_of(self.scoring), body, stop) for body in bodies]
        except HTTPError as error:
            raise self._refused(error, adapter) from error
        return log_probs_of(self.scoring, row, answers, by=self._by, url=self._client.url)

    def _refused(self, error: HTTPError, adapter: str | None = None) -> UserError:
        reason, url = str(error).rstrip("."), self._client.url
        if error.status in (401, 403):
            return UserError(f"The server at {url} wants another key ({reason}); pass api_key=... or set VLLM_API_KEY.")
        if error.status == 404 and adapter is not None:
            return UserError(
                f"The server at {url} has no adapter {adapter} ({reason}); start it with the command that scalabl "
                "export prints."
            )
        return UserError(f"The server at {url} refused a request (status {error.status}): {reason}.")


def _root(url: str) -> str:
    """Without the /v1 that clients of OpenAI's protocol put behind an address."""
    return url.rstrip("/").removesuffix("/v1")
