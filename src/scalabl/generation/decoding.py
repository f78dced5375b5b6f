"""Bayesian decoding: text from the average over particles, and for every token how sure it is and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from scalabl.errors import UserError
from scalabl.generation.fan_out import Draws, averaged
from scalabl.generation.prompt_cache import can_share, shared_prompts
from scalabl.generation.token_figures import TokenFigures, token_figures


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
        finished: whether it ended by itself, rather than at the limit of tokens.
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


class _Recorder:
    """Keeps what the particles said about every generated token.

    A step's distribution is held until the token is known that was taken from it: the next step's input.
    """

    def __init__(self) -> None:
        self.figures: list[TokenFigures] = []
        self.log_probs: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, log_probs: Tensor) -> None:
        if self._last is not None:
            self.take(input_ids[:, -1])
        self._last = log_probs
        figures = token_figures(log_probs)
        self.figures.append(TokenFigures(*(getattr(figures, name).cpu() for name in TokenFigures.__dataclass_fields__)))

    def take(self, tokens: Tensor) -> None:
        """The tokens (B,) that were taken from the last distribution."""
        assert self._last is not None
        index = tokens.to(self._last.device)[None, :, None].expand(self._last.shape[0], -1, 1)
        self.log_probs.append(self._last.gather(-1, index)[..., 0].cpu())
        self._last = None

    def figure(self, name: str) -> Tensor:
        """(B, steps) of one figure."""
        return torch.stack([getattr(figures, name) for figures in self.figures], dim=1)


@torch.no_grad()
def decode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    draws: Draws,
    *,
    num_return_sequences: int = 1,
    **generation: Any,
) -> list[list[Decoded]]:
    """Generate from the average over particles, which advance together on one shared text.

    Args:
        model: a PEFT model with an adapter.
        tokenizer: the base model's.
        prompts: texts, or token numbers, each at least one token.
        draws: the particles (`MonteCarloPredictive(samples, seed=seed)`).
        num_return_sequences: texts for each prompt; more than one needs do_sample=True.
        **generation: of transformers' `generate`: max_new_tokens, do_sample, temperature, top_p, stopping_criteria,
            streamer (one prompt), generation_config ...

    Returns:
        for each prompt its texts.

    Raises:
        UserError: an empty prompt, beam search or assisted decoding, which move rows about.
    """
    for name in ("num_beams", "num_beam_groups", "assistant_model", "prompt_lookup_num_tokens", "custom_generate"):
        if generation.get(name) not in (None, 1):
            raise UserError(
                f"{name} cannot be given to Bayesian decoding: greedy decoding and sampling are what it does."
            )
    ids = [_tokens(tokenizer, prompt) for prompt in prompts]
    inputs = _left_padded(ids, tokenizer.pad_token_id or 0, _device(model))
    recorder, length = _Recorder(), inputs["input_ids"].shape[1]
    generation.setdefault("pad_token_id", tokenizer.pad_token_id)
    if generation.get("stop_strings"):
        generation["tokenizer"] = tokenizer
    was_training = model.training
    model.eval()
    try:
        texts: dict[str, Any] = {**inputs, "num_return_sequences": num_return_sequences}
        if can_share(inputs, num_return_sequences, generation):
            texts = shared_prompts(model, draws, inputs, num_return_sequences)
        with averaged(model, draws, recorder):
            sequences = model.generate(**texts, return_dict_in_generate=False, **generation)  # type: ignore[operator]
    finally:
        model.train(was_training)
    recorder.take(sequences[:, -1])
    new, ends = sequences[:, length:].cpu(), _end_tokens(model, tokenizer, generation)
    log_probs = torch.stack(recorder.log_probs, dim=2)
    out: list[list[Decoded]] = []
    for i, prompt in enumerate(prompts):
        out.append([])
        for row in range(i * num_return_sequences, (i + 1) * num_return_sequences):
            taken, finished = _cut(new[row].tolist(), ends)
            steps = slice(0, len(taken))
            figures = {n: recorder.figure(n)[row, steps] for n in TokenFigures.__dataclass_fields__}
            text = str(tokenizer.decode(taken, skip_special_tokens=True))
            pieces, shown = (
                _pieces(tokenizer, taken),
                prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt)),
            )
            out[-1].append(Decoded(shown, text, taken, pieces, log_probs[:, row, steps], **figures, finished=finished))
    return out


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str | list[int]) -> list[int]:
    found = list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt)
    if not found:
        raise UserError("A prompt is empty; give at least one token.")
    return found


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, generation: dict[str, Any]) -> set[int]:
    config = generation.get("generation_config") or getattr(model, "generation_config", None)
    found = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    if found is None:
        found = tokenizer.eos_token_id
    return set(found) if isinstance(found, list | tuple) else {found}


def _cut(tokens: list[int], ends: set[int]) -> tuple[list[int], bool]:
    """The tokens up to the first end token, that one included, and whether there is one."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1], True
    return tokens, False


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """The text of each token: what it adds to the text before it, so that letters of several tokens are not lost."""
    pieces: list[str] = []
    before = ""
    for i in range(len(tokens)):
        text = str(tokenizer.decode(tokens[: i + 1]))
        if text.endswith("\ufffd") and i + 1 < len(tokens):  # half a letter: the token that completes it shows it
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        before = text
    return pieces
