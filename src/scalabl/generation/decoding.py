"""Bayesian decoding: text from the average over particles, and for every token how sure it is and why.

The figures of a token come from the particles' (N, B, V) log-probabilities of its position, in nats.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from scalabl.core.errors import UserError
from scalabl.core.modules import eval_mode
from scalabl.generation.fan_out import Draws, averaged, can_share, honours_padding, left_padded, shared_prompts
from scalabl.scoring.conversation import begun_tokens
from scalabl.tuner.threads import alone


@dataclass(frozen=True)
class TokenFigures:
    """Figures of the next-token distribution, each (B,).

    Attributes:
        total: entropy of the average, H[1/N sum_n p_n].
        aleatoric: mean entropy of the particles, 1/N sum_n H[p_n].
        epistemic: total - aleatoric, the mutual information of token and parameters, >= 0.
        intersection: entropy of the intersection probability of the particles.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    intersection: Tensor


def token_figures(log_probs: Tensor) -> TokenFigures:
    """Figures of (N, B, V) log-probabilities.

    The intersection probability of the interval [l, u] that the particles span, l(v) = min_n p_n(v) and
    u(v) = max_n p_n(v), is l + beta (u - l) with the one beta that lets it sum to one [Cuzzolin 2009]: every token
    takes the same share of its own disagreement.

    Sources: Houlsby et al. 2011 (BALD, eq. 2) for the split; Cuzzolin 2009 for the intersection probability.
    """
    number = log_probs.shape[0]
    mean = log_probs.logsumexp(dim=0) - math.log(number)
    total = _entropy(mean)
    aleatoric = torch.minimum(torch.stack([_entropy(one) for one in log_probs]).mean(dim=0), total)
    return TokenFigures(total, aleatoric, total - aleatoric, _entropy(intersection_probability(log_probs)))


def intersection_probability(log_probs: Tensor) -> Tensor:
    """Logarithm (B, V) of the intersection probability of N distributions (N, B, V)."""
    low, high = log_probs.amin(dim=0).exp().double(), log_probs.amax(dim=0).exp().double()
    width = high - low
    open_mass = (1 - low.sum(dim=-1, keepdim=True)).clamp_min(0)
    spread = width.sum(dim=-1, keepdim=True)
    beta = torch.where(spread > 0, open_mass / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0.0)
    chosen = low + beta * width
    return (chosen / chosen.sum(dim=-1, keepdim=True)).log().to(log_probs.dtype)


def _entropy(log_probs: Tensor) -> Tensor:
    """-sum p log p over the last axis, with 0 log 0 = 0."""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(dim=-1)


# what moves rows about, or passes the model more than once a token
_REFUSED = (
    "num_beams", "num_beam_groups", "assistant_model", "prompt_lookup_num_tokens", "custom_generate", "penalty_alpha",
    "dola_layers", "guidance_scale", "prefill_chunk_size",
)  # fmt: skip


@dataclass(frozen=True)
class Decoded:
    """One generated text.

    Attributes:
        prompt: what it follows.
        text: what was generated, without special tokens.
        token_ids: the T generated tokens, a final end token included.
        tokens: their texts, T; joined they are the text (and the end token).
        log_probs: (N, T) log-probability of each token under each particle, given the shared text before it.
        total, aleatoric, epistemic, intersection: (T,) nats, of the distribution that the token was taken from.
        finished: whether it ended by itself or by a stopping criterion, rather than at the limit of tokens.
    """

    prompt: str
    text: str
    token_ids: list[int]
    tokens: list[str]
    log_probs: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    intersection: Tensor
    finished: bool

    @property
    def average_log_probs(self) -> Tensor:
        """(T,) log-probability of each token under the average over particles."""
        return self.log_probs.logsumexp(dim=0) - math.log(self.log_probs.shape[0])


@dataclass(frozen=True)
class DecodedStep:
    """The token that each of B texts took last.

    Attributes:
        token_ids: (B,) the tokens.
        log_probs: (N, B) their log-probabilities under each particle.
        figures: of the distributions that they were taken from.
        top_ids, top_log_probs: (B, k) the k likeliest tokens of the average over particles.
    """

    token_ids: Tensor
    log_probs: Tensor
    figures: TokenFigures
    top_ids: Tensor
    top_log_probs: Tensor


class _Recorder:
    """Keeps the particles' figures of every generated token.

    A step's distribution is kept until the token is known that was taken from it: from `take`, or the next step's
    input.
    """

    def __init__(self, top: int = 0) -> None:
        self.figures: list[TokenFigures] = []
        self.log_probs: list[Tensor] = []
        self.top = top
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, log_probs: Tensor) -> None:
        self.take(input_ids[:, -1])
        if log_probs.isnan().any():
            raise UserError("The model gives logits that are NaN or infinite; check its weights and its precision.")
        self._last = log_probs
        figures = token_figures(log_probs)
        self.figures.append(TokenFigures(*(getattr(figures, name).cpu() for name in TokenFigures.__dataclass_fields__)))

    def take(self, tokens: Tensor) -> None:
        """The tokens (B,) that were taken from the last distribution, if they are not known yet."""
        if self._last is None:
            return
        index = tokens.to(self._last.device)[None, :, None].expand(self._last.shape[0], -1, 1)
        self.log_probs.append(self._last.gather(-1, index)[..., 0].cpu())
        self._last = None

    def step(self, tokens: Tensor) -> DecodedStep:
        """The tokens (B,) with what is known of them and of the distribution that they are taken from now."""
        assert self._last is not None
        average = self._last.logsumexp(dim=0) - math.log(self._last.shape[0])
        log_probs, ids = average.topk(self.top, dim=-1)
        self.take(tokens)
        return DecodedStep(tokens.cpu(), self.log_probs[-1], self.figures[-1], ids.cpu(), log_probs.cpu())

    def figure(self, name: str) -> Tensor:
        """(B, steps) of one figure."""
        return torch.stack([getattr(figures, name) for figures in self.figures], dim=1)


class _Stops(StoppingCriteria):  # type: ignore[misc]
    """The caller's criteria, and after how many tokens they ended each text, behind which `generate` pads."""

    def __init__(self, criteria: StoppingCriteriaList, begin: int) -> None:
        self.criteria, self.begin = criteria, begin
        self.lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = self.criteria(input_ids, scores, **kwargs)
        if self.lengths is None:
            self.lengths = torch.zeros_like(done, dtype=torch.long)
        self.lengths[done & (self.lengths == 0)] = input_ids.shape[1] - self.begin
        return done

    def of(self, row: int) -> int:
        """How many tokens a text has, 0 if none of the criteria ended it."""
        return 0 if self.lengths is None else int(self.lengths[row])


class _Told(StoppingCriteria):  # type: ignore[misc]
    """Tells each step, and ends the texts that it is said to."""

    def __init__(self, recorder: _Recorder, told: Callable[[DecodedStep], Tensor]) -> None:
        self.recorder, self.told = recorder, told

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.told(self.recorder.step(input_ids[:, -1])).to(input_ids.device)


@torch.no_grad()
def decode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    draws: Draws,
    *,
    num_return_sequences: int = 1,
    told: Callable[[DecodedStep], Tensor] | None = None,
    top: int = 0,
    **generation: Any,
) -> list[list[Decoded]]:
    """Generate from the average over particles, which advance together on one shared text.

    Args:
        model: a PEFT model with an adapter.
        tokenizer: the base model's.
        prompts: texts, or token numbers, each at least one token.
        draws: the particles (`MonteCarloPredictive(samples, seed=seed)`).
        num_return_sequences: texts for each prompt; more than one needs do_sample=True.
        told: called with every step as soon as its tokens are taken; gives (B,) which texts end there. An end token
            ends a text all the same; what it takes behind it says nothing. Of prompts that share a batch: those of a
            model that does not honour padding (`honours_padding`) are given one by one.
        top: so many likeliest tokens each step tells.
        **generation: of transformers' `generate`: max_new_tokens, do_sample, temperature, top_p, stopping_criteria,
            streamer (one prompt), generation_config ...

    Returns:
        for each prompt its texts.

    Raises:
        UserError: an empty prompt; beam search, assisted decoding and others that move rows about or pass the model
            more than once a token; logits that are NaN.
    """
    for name in _REFUSED:
        if any(value not in (None, 1) for value in _given(generation, name)):
            raise UserError(
                f"{name} cannot be given to Bayesian decoding: greedy decoding and sampling are what it does."
            )
    generation["num_beams"] = 1  # whatever the model's own default is
    ids = [_tokens(tokenizer, prompt) for prompt in prompts]
    if not honours_padding(model, ids):
        each = {"num_return_sequences": num_return_sequences, "told": told, "top": top} | generation
        return [decode(model, tokenizer, [prompt], draws, **each)[0] for prompt in prompts]
    inputs = left_padded(ids, tokenizer.pad_token_id or 0, next(model.parameters()).device)
    recorder, length = _Recorder(top), inputs["input_ids"].shape[1]
    generation.setdefault("pad_token_id", tokenizer.pad_token_id)
    generation = with_stop_criterion(tokenizer, generation)
    criteria = [*(generation.pop("stopping_criteria", None) or []), *([] if told is None else [_Told(recorder, told)])]
    stops = _Stops(StoppingCriteriaList(criteria), length)
    if stops.criteria:
        generation["stopping_criteria"] = StoppingCriteriaList([stops])
    with alone(model), eval_mode(model):
        texts: dict[str, Any] = {**inputs, "num_return_sequences": num_return_sequences}
        if can_share(model, inputs, num_return_sequences, generation):
            texts = shared_prompts(model, draws, inputs, num_return_sequences)
        with averaged(model, draws, recorder):
            sequences = model.generate(**texts, return_dict_in_generate=False, **generation)  # type: ignore[operator]
    recorder.take(sequences[:, -1])
    new, ends = sequences[:, length:].cpu(), end_tokens(model, tokenizer, generation)
    log_probs = torch.stack(recorder.log_probs, dim=2)
    out: list[list[Decoded]] = []
    for i, prompt in enumerate(prompts):
        shown = prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt))
        out.append([])
        for row in range(i * num_return_sequences, (i + 1) * num_return_sequences):
            taken, finished = _cut(new[row].tolist(), ends, stops.of(row))
            steps = slice(0, len(taken))
            figures = {n: recorder.figure(n)[row, steps] for n in TokenFigures.__dataclass_fields__}
            text, pieces = str(tokenizer.decode(taken, skip_special_tokens=True)), _pieces(tokenizer, taken)
            out[-1].append(Decoded(shown, text, taken, pieces, log_probs[:, row, steps], **figures, finished=finished))
    return out


def with_stop_criterion(tokenizer: PreTrainedTokenizerBase, generation: dict[str, Any]) -> dict[str, Any]:
    """Settings of `generate` with their stop strings as a criterion.

    It is made of the whole vocabulary: whoever decodes many batches makes it once.
    """
    strings = next((value for value in _given(generation, "stop_strings") if value), None)
    if strings is None:
        return generation
    made = {name: value for name, value in generation.items() if name != "stop_strings"}
    if made.get("generation_config") is not None:
        made["generation_config"] = copy.deepcopy(made["generation_config"])
        made["generation_config"].stop_strings = None
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    return made | {"stopping_criteria": [*(made.get("stopping_criteria") or ()), criterion]}


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str | list[int]) -> list[int]:
    found = begun_tokens(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    if not found:
        raise UserError("A prompt is empty; give at least one token.")
    return found


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, generation: dict[str, Any]) -> set[int]:
    """The tokens that end a text under settings of `generate`."""
    default = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    given = [*_given(generation, "eos_token_id"), default, tokenizer.eos_token_id]
    found: Any = next((value for value in given if value is not None), None)
    return set(found) if isinstance(found, list | tuple) else {found}


def _given(generation: dict[str, Any], name: str) -> list[Any]:
    """What the caller gave for a setting, as an argument and in a configuration, in the order that `generate` has."""
    return [generation.get(name), getattr(generation.get("generation_config"), name, None)]


def _cut(tokens: list[int], ends: set[int], stopped: int) -> tuple[list[int], bool]:
    """The tokens up to the first end token, that one included, or up to where a criterion `stopped` them (0 for never),
    and whether either did."""
    for i, token in enumerate(tokens[:stopped] if stopped else tokens):
        if token in ends:
            return tokens[: i + 1], True
    return (tokens[:stopped], True) if stopped else (tokens, False)


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """The text of each token."""
    growing = Pieces(tokenizer)
    pieces = [growing.add(token) for token in tokens]
    return [*pieces[:-1], pieces[-1] + growing.rest()] if pieces else []


class Pieces:
    """What each token adds to the text before it, so that letters of several tokens are not lost.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = ""

    def add(self, token: int) -> str:
        """What the next token adds; nothing, where it is half a letter: the token that completes it shows it."""
        self._ids.append(token)
        text = str(self.tokenizer.decode(self._ids))
        return "" if text.endswith("\ufffd") else self._added(text)

    def rest(self) -> str:
        """Half a letter that nothing completes."""
        return self._added(str(self.tokenizer.decode(self._ids)))

    def _added(self, text: str) -> str:
        added, self._before = text[len(self._before) :], text
        return added
