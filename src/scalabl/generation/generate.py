"""`scalabl.generate`: prompts in, answers out, each with a confidence and with figures for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.core.modules import eval_mode
from scalabl.generation.answer import AnswerEnd, GeneratedAnswer, answer_span, tokens_of
from scalabl.generation.confidence import AnswerSettings, Confidence
from scalabl.generation.decoding import Decoded, decode, with_stop_criterion
from scalabl.generation.equivalence import Equivalence, equivalence
from scalabl.generation.fan_out import Draws, MeanDraws, honours_padding
from scalabl.generation.scores import sampled_scores, sequence_scores
from scalabl.runs.loading import load_run, run_in_memory
from scalabl.runs.method import Run, load_method
from scalabl.scoring.text import Text
from scalabl.tuner.threads import alone

# a model's own defaults (its generation_config.json) would take other tokens than the average's
PLAIN: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_ENDS = ("eos_token_id", "min_new_tokens")  # settings of where a text ends, beside criteria
CONFIDENCE = "confidence.json"  # in a run's directory: what `scalabl evaluate` fitted on validation answers


@dataclass(frozen=True)
class AnswerSampling:
    """How further answers are sampled for the scores that need them.

    Attributes:
        number: k further answers to each prompt, 0 for none, else 2 or more.
        temperature, top_p: of the samples.
        equivalence: which answers mean the same, a name of `scalabl.generation.equivalence`.
    """

    number: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    equivalence: str = "normalised"


@overload
def generate(run: Run | Path | str, prompts: Sequence[str], /, **options: Any) -> list[GeneratedAnswer]: ...


@overload
def generate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], /, **options: Any
) -> list[GeneratedAnswer]: ...


def generate(
    run: Run | Path | str | PreTrainedModel | PeftModel,
    /,
    *given: Any,
    samples: int = 10,
    seed: int = 0,
    max_new_tokens: int = 64,
    chat: bool | None = None,
    stop: Sequence[str] | None = None,
    sampling: AnswerSampling | None = None,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
    **generation: Any,
) -> list[GeneratedAnswer]:
    """Answer prompts with the average over particles: `generate(run, prompts)`, `generate(model, tokenizer, prompts)`.

    Args:
        run: a finished run, its directory or that of an adapter that another trainer saved; or a model in memory.
        given: the prompts, texts; in front of them a model's tokenizer.
        samples: N particles; 0 is the posterior mean. A plain LoRA has one, itself.
        seed: of the particles, and of the texts where they are sampled.
        max_new_tokens: the limit of an answer's tokens.
        chat: put prompts into the model's chat template; None is what the run was trained with.
        stop: texts that end an answer, for example a line's end; None takes those of the run's fitted confidence,
            where there is one.
        sampling: further answers for self-consistency and semantic entropy; none by default.
        batch_size: prompts at a time.
        advance: called with the number of prompts done.
        **generation: of transformers' `generate` (do_sample, temperature, top_p, ...); greedy if it says nothing.

    Returns:
        one answer a prompt. Its confidence is the fitted one where the run's directory has a `confidence.json` of
        answers that were made alike: of this adapter, so many particles, the same stop texts and chat template, and no
        `generation` that takes other tokens.

    Raises:
        UserError: not a finished run, no prompt, an empty prompt, numbers out of range.
    """
    prompts = _prompts(run, given)
    sampling = sampling or AnswerSampling()
    check(samples, max_new_tokens, batch_size, sampling)
    if isinstance(run, PreTrainedModel | PeftModel):
        run = run_in_memory(run, given[0])
    elif not isinstance(run, Run):
        run = load_run(Path(run), generating=True)
    # sampled texts take their numbers from one stream, which the seed begins
    fitted = fitted_confidence(run)
    with alone(run.model), eval_mode(run.model):
        found = answers_with_samples(
            run, prompts, draws_of(run, samples, seed), seed=seed, chat=chat, stop=_stop(fitted, stop),
            sampling=sampling, max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance, fitted=fitted,
            **generation,
        )  # fmt: skip
        return [answer for answer, _, _ in found]


def _prompts(run: Any, given: Sequence[Any]) -> Sequence[str]:
    """What is to be answered, of `generate`'s arguments."""
    in_memory = isinstance(run, PreTrainedModel | PeftModel)
    if len(given) != 1 + in_memory or (in_memory and not isinstance(given[0], PreTrainedTokenizerBase)):
        raise UserError("generate takes (run, prompts), or (model, tokenizer, prompts) of a model in memory.")
    prompts: Sequence[str] = [given[-1]] if isinstance(given[-1], str) else given[-1]
    if not prompts:
        raise UserError("There is no prompt to answer; give at least one.")
    return prompts


def answers_with_samples(
    run: Run,
    prompts: Sequence[str],
    draws: Draws,
    *,
    seed: int,
    sampling: AnswerSampling,
    max_new_tokens: int,
    batch_size: int,
    chat: bool | None = None,
    stop: Sequence[str] = (),
    advance: Callable[[int], None] | None = None,
    fitted: Confidence | None = None,
    **generation: Any,
) -> Iterator[tuple[GeneratedAnswer, Decoded, list[Decoded]]]:
    """Each answer, the decoded text that it was made of, and the further ones; a batch of prompts at a time.

    Args:
        fitted: the confidence of the answers, where they are made as it asks; else it is the length-normalised
            probability.

    The others are those of `generate`.
    """
    tokens = [prompt_tokens(run, prompt, chat) for prompt in prompts]
    for each in tokens:  # none is refused after others were answered
        _require_room(run, len(each), max_new_tokens)
    if not honours_padding(run.model, tokens):
        batch_size = 1
    same = equivalence(sampling.equivalence) if sampling.number else None
    made = answer_settings(run, draws, chat=chat, stop=stop, **generation)
    generation = with_stop_criterion(run.tokenizer, generation)
    torch.manual_seed(seed)
    for start in range(0, len(prompts), batch_size):
        rows = decoded_with_samples(
            run, prompts[start : start + batch_size], draws, chat=chat, stop=stop, sampling=sampling,
            max_new_tokens=max_new_tokens, **generation,
        )  # fmt: skip
        for prompt, decoded, others in rows:
            yield make_answer(prompt, decoded, others, same, fitted, made), decoded, others
        if advance is not None:
            advance(len(rows))


def positions_of(run: Run) -> int | None:
    """How many tokens the model has positions for, where it says so."""
    found: int | None = getattr(run.scorer.model.config.get_text_config(), "max_position_embeddings", None)
    return found


def _require_room(run: Run, tokens: int, max_new_tokens: int) -> None:
    """Refuse a prompt and an answer that the model has no positions for: its tokens would be noise, or an error."""
    room = positions_of(run)
    if room is not None and tokens + max_new_tokens > room:
        raise UserError(
            f"A prompt of {tokens:,} tokens and an answer of up to {max_new_tokens:,} are more than the {room:,} that "
            "the model has positions for; shorten the prompt or lower --max-new-tokens."
        )


def decoded_with_samples(
    run: Run,
    prompts: Sequence[str],
    draws: Draws,
    *,
    sampling: AnswerSampling,
    max_new_tokens: int,
    chat: bool | None = None,
    stop: Sequence[str] = (),
    **generation: Any,
) -> list[tuple[str, Decoded, list[Decoded]]]:
    """Each prompt with its answer and k further, sampled ones, all cut behind the first stop text, and ended where
    `generation` ends the answer."""
    tokens = [prompt_tokens(run, prompt, chat) for prompt in prompts]
    generation = with_stop_criterion(run.tokenizer, generation)
    ends = [AnswerEnd(run.tokenizer, stop, max(map(len, tokens)))] if stop else []
    ends += generation.get("stopping_criteria") or ()
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, **PLAIN}
    own = settings | generation | {"stopping_criteria": ends}
    config = generation.get("generation_config")
    if config is not None:  # it says itself how a token is taken
        own = {name: value for name, value in own.items() if name not in PLAIN or name in generation}
        own.setdefault("do_sample", bool(config.do_sample))
    first = decode(run.model, run.tokenizer, tokens, draws, **own)
    further: list[list[Decoded]] = [[] for _ in prompts]
    if sampling.number:
        sampled = {
            "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": 0.0,
            "typical_p": 1.0, "num_return_sequences": sampling.number,
        }  # fmt: skip
        said = {name: generation.get(name, getattr(config, name, None)) for name in _ENDS}
        ended = {name: value for name, value in said.items() if value is not None} | {"stopping_criteria": ends}
        further = decode(run.model, run.tokenizer, tokens, draws, **settings | sampled | ended)

    def cut(decoded: Decoded) -> Decoded:
        return answer_span(decoded, stop) if stop else decoded

    rows = zip(prompts, first, further, strict=True)
    return [(prompt, cut(answer[0]), [cut(other) for other in others]) for prompt, answer, others in rows]


def make_answer(
    prompt: str,
    decoded: Decoded,
    others: Sequence[Decoded],
    same: Equivalence | None,
    fitted: Confidence | None,
    made: AnswerSettings | None,
) -> GeneratedAnswer:
    """The answer of a decoded text: its scores, and the confidence that they give."""
    scores = sequence_scores(decoded)
    if same is not None:
        scores |= sampled_scores(decoded, others, same, prompt)
    usable = fitted is not None and fitted.unlike(made, scores) is None
    if fitted is not None and usable:
        confidence = float(fitted(scores)[0])
    else:
        confidence = float(torch.tensor(scores["mean_log_probability"]).exp())
    return GeneratedAnswer(
        prompt, decoded.text.strip(), confidence, usable, scores, tokens_of(decoded), decoded.finished
    )


def check(samples: int, max_new_tokens: int, batch_size: int, sampling: AnswerSampling) -> None:
    """Refuse numbers out of range before anything is loaded.

    Raises:
        UserError: the sentence names it.
    """
    for name, value, least in (
        ("samples", samples, 0),
        ("max_new_tokens", max_new_tokens, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}.")
    if sampling.number < 0 or sampling.number == 1:
        raise UserError(f"The number of further answers is {sampling.number}; it must be 0 or at least 2, 10 is usual.")
    if not sampling.temperature > 0 or not 0 < sampling.top_p <= 1:
        raise UserError("Further answers need a temperature above 0 and a top_p between 0 and 1.")


def fitted_confidence(run: Run) -> Confidence | None:
    """The confidence that was fitted on validation answers of the run's adapter, if there is one."""
    kept = _kept_confidence(run)
    of_another = kept is None or kept.made is None or kept.made.adapter_sha256 != run.record.adapter_sha256
    return None if of_another else kept


def unused_confidence(
    run: Run,
    scores: Mapping[str, float],
    *,
    samples: int,
    chat: bool | None = None,
    stop: Sequence[str] | None = None,
    **generation: Any,
) -> str | None:
    """Why the confidence in a run's directory is not that of answers, a sentence; None where it is, or there is none.

    Args:
        scores: those that the answers have.

    The others are those of `generate`.
    """
    kept = _kept_confidence(run)
    if kept is None:
        return None
    stop = _stop(fitted_confidence(run), stop)
    made = answer_settings(run, draws_of(run, samples, 0), chat=chat, stop=stop, **generation)
    why = kept.unlike(made, scores)
    return None if why is None else f"The confidence that the run has is not used: {why}."


def _kept_confidence(run: Run) -> Confidence | None:
    path = None if run.directory is None else run.directory / CONFIDENCE
    return Confidence.load(path) if path is not None and path.exists() else None


def _stop(fitted: Confidence | None, given: Sequence[str] | None) -> Sequence[str]:
    """The texts that end an answer: those given, else those that the confidence was fitted with."""
    if given is not None:
        return given
    return () if fitted is None or fitted.made is None else fitted.made.stop


def answer_settings(
    run: Run, draws: Draws, *, chat: bool | None = None, stop: Sequence[str] = (), **generation: Any
) -> AnswerSettings | None:
    """How answers are made; None where `generation` may take other tokens than the likeliest ones, or end them
    elsewhere."""
    if any(value is not None for name, value in generation.items() if name not in ("do_sample", "streamer")):
        return None
    if generation.get("do_sample"):
        return None
    particles = 0 if isinstance(draws, MeanDraws) else draws.samples
    ends = tuple(sorted({text for text in stop if text}))
    return AnswerSettings(particles, ends, _is_chat(run, chat), run.record.adapter_sha256)


def _is_chat(run: Run, chat: bool | None) -> bool:
    return bool(run.record.scoring.get("chat", False)) if chat is None else chat


def draws_of(run: Run, samples: int, seed: int) -> Draws:
    """The particles of the run's own method; its mean for N = 0, and for a method that draws none."""
    if samples == 0 or not run.is_sampled:
        return MeanDraws()
    # the predictives of sampled methods all average over particles that are rows of a batch
    method: Any = load_method(run.record.method)
    draws: Draws = method.predictive(run, samples=samples, seed=seed)
    return draws


def prompt_tokens(run: Run, prompt: str, chat: bool | None) -> list[int]:
    """A prompt as tokens, in the chat template's user turn where `chat` says so.

    Raises:
        UserError: it is empty, not Unicode, or there is no chat template.
    """
    if not prompt.strip():
        raise UserError("A prompt is empty; give at least one word.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # half a surrogate pair, or bytes of a command line that are no UTF-8
        raise UserError(f"The prompt {ascii(prompt)} is not Unicode; write it in UTF-8.") from error
    chat = _is_chat(run, chat)
    if chat and not getattr(run.tokenizer, "chat_template", None):
        raise UserError("This model's tokenizer has no chat template; leave out --chat.")
    return Text(run.tokenizer, chat=chat).prompt_tokens(prompt)
