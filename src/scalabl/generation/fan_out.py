"""Particles while generating: one shared text of B rows, N of every row from the lowest stochastic layer on.

Below that layer all particles are one, so it runs once; there every row becomes N, each with keys and values of its own
above; behind the output layer they are averaged, so that `generate` sees one distribution a row and knows nothing of
particles. Sampling, stopping criteria, streaming: all of transformers' own decoding stays as it is.

Several texts for one prompt: the prompt is encoded once a particle, and its keys and values serve all of them.

Particles that are no posterior's: the mean alone, and the members of an ensemble.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from scalabl.core.errors import UserError
from scalabl.core.modules import eval_mode
from scalabl.predictive.lora_particles import removed_after
from scalabl.predictive.monte_carlo import first_difference, restricted
from scalabl.scoring.reading import CACHE, gap, tolerance
from scalabl.scoring.trunk import final_norm, lowest_adapted_layer
from scalabl.tuner.layers import decoder_layers, stochastic_layers, unwrap
from scalabl.tuner.state import mean
from scalabl.tuner.threads import own

Averaged = Callable[[Tensor, Tensor], None]


class Draws(Protocol):
    """What the particles are: `MonteCarloPredictive` and the baselines' of its kind."""

    samples: int

    def context(self, model: nn.Module, first: int, number: int) -> AbstractContextManager[None]:
        """Context in which a batch of `number` B rows carries the particles first .. first + number - 1."""
        ...


class MeanDraws:
    """One particle: the posterior mean, or a plain LoRA as it is."""

    samples = 1

    def context(self, model: nn.Module, first: int, number: int) -> AbstractContextManager[None]:
        try:
            stochastic_layers(model)
        except UserError:
            return nullcontext()
        return mean(model)


class EnsembleDraws:
    """M adapters of one base model, member m on the rows m B .. (m + 1) B - 1 [Lakshminarayanan et al. 2017].

    Args:
        adapters: names of the members' plain LoRA adapters in the model.

    Raises:
        UserError: there is no member.
    """

    def __init__(self, adapters: Sequence[str]) -> None:
        if not adapters:
            raise UserError("An ensemble needs members; give the directories of runs of other seeds.")
        self.adapters, self.samples = list(adapters), len(adapters)

    @contextmanager
    def context(self, model: nn.Module, first: int, number: int) -> Iterator[None]:
        """Every adapted layer adds scaling B_m A_m x to the rows of member m."""
        chosen = self.adapters[first : first + number]
        handles = []
        for module in unwrap(model).modules():
            if isinstance(module, LoraLayer) and any(name in module.lora_A for name in chosen):
                handles.append(module.register_forward_hook(own(_members(chosen))))
        with removed_after(handles), model.disable_adapter():  # type: ignore[operator]
            yield


def _members(adapters: list[str]) -> Any:
    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].unflatten(0, (len(adapters), -1))
        added = []
        for rows, name in zip(x, adapters, strict=True):
            if name in layer.lora_A:
                a, b = layer.lora_A[name], layer.lora_B[name]
                added.append(b(a(rows.to(a.weight.dtype))) * layer.scaling[name])
            else:
                added.append(rows.new_zeros(*rows.shape[:-1], output.shape[-1]))
        return output + torch.cat(added).to(output.dtype)

    return hook


@contextmanager
def averaged(
    model: nn.Module, draws: Draws, seen: Averaged | None = None, *, whole: bool | None = None
) -> Iterator[None]:
    """Context in which the next-token distribution of a model is the average over N particles.

    p(y_t | y_<t, x) = 1/N sum_n p(y_t | y_<t, x, s_n): the particles share one text [ScalaBL's model average, a token].
    Logits come back as log-probabilities at the logits' own scale: a constant for each position is added, the mean
    over particles of the log-normaliser, so that with equal particles they are the model's logits themselves.

    Args:
        model: a PEFT model with an adapter.
        draws: the particles; one particle is left as it is, to the last bit.
        seen: called at each forward pass with (input_ids (B, T), log-probabilities (N, B, V) of the last position).
        whole: repeat the rows for the particles in front of the whole model, not only where these differ; None does so
            for a model that gives other answers else.

    Raises:
        UserError: in the forward pass, where the rows in the cache are not those that go in (beam search).
    """
    inner = unwrap(model)
    layers = decoder_layers(inner)
    drawn = getattr(draws, "stochastic_layers", None)
    start = first_difference(inner, drawn)
    if start is None:
        start = lowest_adapted_layer(inner, layers)
    number, rows = draws.samples, [0]
    output = _output_module(inner)
    if whole is None:
        whole = number > 1 and not _fans_out_inside(inner, draws, start)

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = _input_ids(args, kwargs)
        if kwargs.get("labels") is not None:
            raise UserError("Labels cannot be given while particles are averaged: there is no loss of an average here.")
        rows[0] = ids.shape[0]
        return fan_out(_module, args, kwargs) if whole else None

    def fan_out(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _repeated(args, rows[0], number), {k: _repeated(v, rows[0], number) for k, v in kwargs.items()}

    def average(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        logits = out.logits.unflatten(0, (number, rows[0]))
        normaliser = logits.float().logsumexp(dim=-1, keepdim=True)
        log_probs = logits.float() - normaliser
        if seen is not None:
            seen(_input_ids(args, kwargs)[: rows[0]], log_probs[:, :, -1])
        if number == 1:
            out.logits = logits[0]
        else:
            mixture = log_probs.logsumexp(dim=0) - math.log(number)
            out.logits = mixture + normaliser.mean(dim=0)  # float32: rounded to bfloat16, likely tokens would tie
        return out

    # the first of these repeats the hidden states; masks and positions are given to each layer anew
    inside = layers[start:] if start < len(layers) else [final_norm(inner)]
    entered = [] if whole else inside
    handles = [
        output.register_forward_pre_hook(own(begin), with_kwargs=True),
        output.register_forward_hook(own(average), with_kwargs=True),
        *(layer.register_forward_pre_hook(own(fan_out), with_kwargs=True) for layer in entered),
    ]
    with removed_after(handles), draws.context(model, 0, number), restricted(model, drawn):
        yield


# of base models, by the layer at which particles begin: whether rows can be repeated there; whether padding is honoured
_inside: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()
_padded: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_PROMPT = 8  # tokens of the prompts that are tried


def _fans_out_inside(model: Any, draws: Draws, start: int) -> bool:
    """Whether a model gives the same when its rows are repeated at a layer as in front of it, tried once: some build
    biases of rows and heads (ALiBi), hand hidden states of other shapes on, or keys and values from layer to layer."""
    known = _inside.setdefault(_output_module(model), {})
    if start not in known:
        device = next(model.parameters()).device
        ids = torch.arange(2 * _PROMPT, device=device).view(2, -1) % model.config.get_text_config().vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inside: Tensor | None = None
        try:
            inside = _two_steps(model, draws, inputs, whole=False)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model says to rows that it did not expect
            pass
        outside = _outside(model, draws, inputs)
        known[start] = inside is not None and _alike(model, inside, outside)
    return known[start]


def _outside(model: Any, draws: Draws, inputs: dict[str, Tensor]) -> Tensor:
    """`_two_steps` with rows in front of the model; refused where the cache is made for those of `generate` alone."""
    try:
        return _two_steps(model, draws, inputs, whole=True)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"Particles of {model.config.model_type} do not generate together under Transformers "
            f"{transformers.__version__}, which keeps this model's states for the prompts alone; upgrade it "
            "(pip install --upgrade transformers), or generate with the mean."
        ) from error


def honours_padding(model: Any, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether a padded prompt goes on as it does alone, tried once on a prompt beside one that is half as long.

    Rotary frequencies that follow a batch's longest position do so from a length on that no trial of a prompt reaches:
    such a model is known by its configuration.

    Args:
        model: a PEFT model with an adapter.
        prompts: as tokens.
    """
    base = _output_module(unwrap(model))
    if len({len(prompt) for prompt in prompts}) < 2:
        return True
    if _frequencies_follow_rows(unwrap(model)):
        return False
    if base not in _padded:
        longest: Sequence[int] = sorted(prompts, key=len)[-1]
        long = list(longest[-4 * _PROMPT :])
        rows = [long, long[-max(1, len(long) // 2) :]]
        device = next(model.parameters()).device
        with torch.no_grad(), eval_mode(model):
            together = _two_steps(model, MeanDraws(), left_padded(rows, 0, device))
            alone = [_two_steps(model, MeanDraws(), left_padded([row], 0, device)) for row in rows]
        _padded[base] = _alike(model, together, torch.cat(alone, dim=2))
    return _padded[base]


def _frequencies_follow_rows(model: Any) -> bool:
    """Whether rotary embeddings are chosen by the longest position of a batch."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    each = [found, *(of_layers for of_layers in found.values() if isinstance(of_layers, dict))]
    kinds = [str(parameters.get("rope_type")) for parameters in each]
    return any(kind == "longrope" or "dynamic" in kind for kind in kinds)


@torch.no_grad()
def _two_steps(model: Any, draws: Draws, inputs: dict[str, Tensor], whole: bool | None = None) -> Tensor:
    """(2, N, B, V) log-probabilities behind prompts, and behind one more token."""
    found: list[Tensor] = []
    ends = model.generation_config.eos_token_id
    more = next(token for token in itertools.count(3) if token not in (ends if isinstance(ends, list) else [ends]))

    def take(_ids: Tensor, scores: Tensor) -> Tensor:  # the same token in every way that is compared
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([more], device=scores.device), 0.0)

    with averaged(model, draws, lambda _ids, log_probs: found.append(log_probs.float()), whole=whole):
        model.generate(
            **inputs, logits_processor=LogitsProcessorList([take]), max_new_tokens=2, do_sample=False, num_beams=1,
            pad_token_id=0,
        )  # fmt: skip
    return torch.stack(found)


def _alike(model: nn.Module, found: Tensor, expected: Tensor) -> bool:
    return gap(found, expected) <= 2 * tolerance(model)  # of two steps


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, T) of rows of tokens."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _repeated(value: Any, rows: int, number: int) -> Any:
    """What a decoder layer is given, with every tensor of B rows repeated for N particles; what has N B already stays.

    A tensor of one row serves all (positions of a batch), a vector has no rows.
    """
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == rows:
        return value.repeat(number, *[1] * (value.dim() - 1))
    if type(value) in (tuple, list):
        return type(value)(_repeated(item, rows, number) for item in value)
    return value


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor):
        raise UserError("Give input_ids: particles are averaged for token numbers, not for embeddings.")
    return ids


def _output_module(model: nn.Module) -> nn.Module:
    """The module whose forward gives the logits: the causal language model inside the adapter's wrappers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(base, nn.Module):
        raise UserError("This model has no causal language model inside.")
    return base


# what says that the cache is the caller's own affair
_OWN_CACHE = ("cache", "past_key_values", "use_cache", "cache_implementation", "generation_config")


def can_share(model: Any, inputs: dict[str, Tensor], texts: int, generation: dict[str, Any]) -> bool:
    """Whether there are several texts a prompt, a token to share, no wish for another cache, the model's own defaults
    included, and a cache of keys and values alone: the states of convolutions and linear attention cannot be repeated.
    """
    if texts == 1 or inputs["input_ids"].shape[1] == 1 or any(name in generation for name in _OWN_CACHE):
        return False
    defaults = model.generation_config
    if defaults.use_cache is False or defaults.cache_implementation not in (None, "dynamic", "hybrid"):
        return False  # "hybrid" is an old name of the default
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def shared_prompts(model: nn.Module, draws: Draws, inputs: dict[str, Tensor], texts: int) -> dict[str, Any]:
    """What `generate` is given for B prompts with several texts each: B times that many rows, and a cache of their
    prompts but for the last token, where the model has one of keys and values alone.

    Rows of a layer are particle by particle, of each the prompts: repeating every row in its place gives, particle by
    particle, of each the prompts' texts.

    Args:
        model: a PEFT model with an adapter.
        draws: the particles.
        inputs: input_ids and attention_mask, (B, T), padded on the left.
        texts: texts a prompt.
    """
    mask = inputs["attention_mask"][:, :-1]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)  # as `generate` counts them
    with averaged(model, draws):
        out = model(
            input_ids=inputs["input_ids"][:, :-1], attention_mask=mask, position_ids=positions, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
    cache = getattr(out, CACHE, None)
    repeated = {name: value.repeat_interleave(texts, dim=0) for name, value in inputs.items()}
    if type(cache) is not DynamicCache:  # older Transformers do not say beforehand that a model has states of its own
        return repeated
    cache.batch_repeat_interleave(texts)
    return {**repeated, CACHE: cache}
