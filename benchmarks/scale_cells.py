"""What `scale.py` measures on one base model: a training step, a prediction, a new token; and the base itself.

A base has a published shape and random weights, made where they stay. Methods share its tensors and are stepped in
turn, in an order drawn anew for each round; a ratio is of two times of one round. Memory is measured apart from time,
with one adapter on the base at a time.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from extra_parameters import SHAPES, TARGETS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from training_cost import RANK, adapt, step_of, synchronise
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import scalabl
from scalabl.predictive import AutoPredictive, MeanPredictive, MonteCarloPredictive, Predictive
from scalabl.predictive.base import chosen
from scalabl.runs.models import keep_differentiable, quantization_config
from scalabl.scoring import Encoded, Scorer
from scalabl.scoring.letters import Letters
from scalabl.study.work import measured

DTYPE = torch.bfloat16
METHODS = ("lora", "scalabl", "blob")  # what the others are divided by comes first
CHOICES = 4
AUTO_ROWS = 8  # on which `auto` chooses
WARMUP = 2
LEAST = 5  # rounds, without which a median says nothing


def build(shape: str, bits: int, device: str, seed: int) -> PreTrainedModel:
    """The model on the device, of bfloat16 weights or (all but embedding and output layer) of 4-bit nf4 with double
    quantisation.

    Weights are drawn one module at a time at the place where they stay, and a 4-bit layer's are packed before the next
    layer's are drawn: the peak is the model itself and one matrix.

    Raises:
        UserError: 4 bit without bitsandbytes.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(SHAPES[shape].config(), dtype=DTYPE)
    if bits == 4:
        from transformers.integrations import replace_with_bnb_linear

        replace_with_bnb_linear(model, ["lm_head"], quantization_config("bitsandbytes", 4, DTYPE))
        model.is_loaded_in_4bit = True  # PEFT asks for it
    for module in model.modules():
        if bits == 4 and type(module).__name__ == "Linear4bit":
            _draw_4bit(module, device, model.config.initializer_range)
        else:
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
    model.tie_weights()
    keep_differentiable(model)
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def _draw_4bit(module: Any, device: str, std: float) -> None:
    from bitsandbytes.nn import Params4bit

    drawn = torch.empty(module.out_features, module.in_features, dtype=DTYPE, device=device).normal_(std=std)
    same = {name: getattr(module.weight, name) for name in ("compress_statistics", "quant_type", "quant_storage")}
    packed: Any = Params4bit(drawn, requires_grad=False, **same)
    module.weight = packed.to(device)
    if module.bias is not None:
        module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=DTYPE, device=device), requires_grad=False)


def base_bytes(shape: str, bits: int) -> int:
    """Of the weights: 2 a number, or at 4 bit half a one and a byte of scale for 64, but for the two embeddings."""
    total, config = SHAPES[shape].parameters, SHAPES[shape].config()
    if bits == 16:
        return 2 * total
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return round(2 * embeddings + (total - embeddings) * (1 / 2 + 1 / 64))


def adapter_numbers(config: PretrainedConfig, method: str) -> int:
    """Trained numbers of an adapter on the targets; BLoB has a second one for each of A, ScalaBL 2 r a layer."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    value = hidden // config.num_attention_heads * config.num_key_value_heads
    inputs = (2 * layers + 1) * RANK * hidden
    outputs = RANK * (layers * (hidden + value) + config.vocab_size)
    more = {"blob": inputs, "scalabl": (2 * layers + 1) * 2 * RANK}
    return inputs + outputs + more.get(method, 0)


def training_bytes(shape: str, bits: int, tokens: int, methods: tuple[str, ...]) -> int:
    """An estimate, on the large side, of the peak of a step with gradient checkpointing, all adapters being there."""
    config = SHAPES[shape].config()
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    adapters = 16 * sum(adapter_numbers(config, method) for method in methods)  # float32: weight, gradient, AdamW's two
    kept = 2 * tokens * hidden * config.num_hidden_layers
    of_a_layer = 2 * tokens * (16 * hidden + 8 * inner)
    # logits in bfloat16; in float32 the adapter's, the sum, the copy for the loss, its softmax and its gradient
    logits = tokens * vocabulary * (2 + 5 * 4)
    packing = 8 * hidden * inner if bits == 4 else 0  # a matrix unpacked
    return base_bytes(shape, bits) + adapters + kept + of_a_layer + logits + packing


def free_bytes(device: str) -> int:
    """What a device has left, the caching allocator's unused blocks included."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Freed tensors back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class OutOfTime(Exception):
    """The time was up before a few rounds were measured."""


class Clock:
    """Counts down from `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def rounds_of(
    names: Sequence[str], rounds: int, seed: int, clock: Clock, measure: Callable[[str], float], warmup: int = WARMUP
) -> dict[str, list[float]]:
    """Name -> its seconds in every round; fewer rounds where the time is up, but not fewer than `LEAST` (or all).

    Raises:
        OutOfTime: it is up before.
    """
    generator = random.Random(seed)
    found: dict[str, list[float]] = {name: [] for name in names}
    longest = 0.0
    for number in range(-warmup, rounds):
        done, start = max(0, number), time.monotonic()
        if clock.left() < 1.2 * longest:
            if done < min(LEAST, rounds):
                raise OutOfTime(f"the time was up after {done} rounds")
            break
        for name in generator.sample(list(names), len(names)):
            seconds = measure(name)
            if number >= 0:
                found[name].append(seconds)
        longest = max(longest, time.monotonic() - start) if number > -warmup else 0.0
    return found


def peak_of(device: torch.device, work: Callable[[], Any]) -> int:
    """Peak bytes while something is done: of the device's tensors, or of the process on a CPU."""
    if device.type == "cuda":
        give_back()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device)
    with measured() as cost:
        work()
    return round(cost.peak_memory * 2**20)


def adapted(base: PreTrainedModel, method: str, seed: int) -> Any:
    """The base with a method's adapter, B as if trained: particles differ."""
    torch.manual_seed(seed)
    model: Any = adapt(base, method, TARGETS)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def train(base: PreTrainedModel, batch: int, length: int, rounds: int, seed: int, clock: Clock) -> dict[str, Any]:
    """{method: {"seconds": [...] a step, "peak": bytes}} with gradient checkpointing; the loss is of all tokens."""
    device = base.device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(base.config.vocab_size, (batch, length), generator=generator).to(device)
    with tempfile.TemporaryDirectory() as directory:

        def ready(method: str) -> Callable[[], None]:
            model = adapted(base, method, seed)
            model.config.use_cache = False
            model.gradient_checkpointing_enable({"use_reentrant": False})
            return step_of(model, method, tokens, Path(directory))

        peaks = {}
        for method in METHODS:
            step = ready(method)
            step()  # the optimiser's state is there from the first step on
            peaks[method] = peak_of(device, step)
            del step
            give_back()
        steps = {method: ready(method) for method in METHODS}
        times = rounds_of(METHODS, rounds, seed, clock, lambda method: _seconds(device, steps[method]))
    return {method: {"seconds": times[method], "peak": peaks[method]} for method in METHODS}


def predict(
    base: PreTrainedModel, batch: int, length: int, samples: int, rounds: int, seed: int, clock: Clock
) -> dict[str, Any]:
    """{strategy: {"seconds": [...] a batch, "peak": bytes}, or {"reason": why not} where the memory did not suffice}.

    One pass, N particles as rows, and what `auto` chooses; that choice is made before the clock runs, for it is made
    once for all rows, and {"choice": its name, "choice_seconds": what it took} says what it was.
    """
    device = base.device
    scorer = Scorer(adapted(base, "scalabl", seed).eval(), Letters(letters_tokenizer(), num_letters=CHOICES))
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(base.config.vocab_size, (max(batch, AUTO_ROWS), length), generator=generator).tolist()
    rows = [Encoded(ids, list(range(length)), [0] * length, CHOICES, None) for ids in few]
    tokens = scorer.scoring.collate(rows[:batch]).to(device)
    strategies: dict[str, Predictive] = {"one pass": MeanPredictive(), "particles": MonteCarloPredictive(samples)}
    found: dict[str, Any] = {}
    try:
        auto = AutoPredictive(samples)
        start = time.perf_counter()
        strategies["auto"] = chosen(auto, scorer, rows, batch)
        synchronise(device)
        assert auto.choice is not None
        choice = {"choice": auto.choice.name, "choice_seconds": time.perf_counter() - start}
    except torch.OutOfMemoryError:
        found["auto"], choice = {"reason": "out of memory while it chose"}, {}
    give_back()

    def run(name: str) -> None:
        with torch.no_grad():
            strategies[name](scorer, tokens)

    peaks = {}
    for name in list(strategies):
        try:
            peaks[name] = peak_of(device, lambda name=name: run(name))  # type: ignore[misc]
        except torch.OutOfMemoryError:
            found[name] = {"reason": "out of memory"}
            del strategies[name]
    times = rounds_of(list(strategies), rounds, seed, clock, lambda name: _seconds(device, lambda: run(name)), warmup=1)
    for name in strategies:
        found[name] = {"seconds": times[name], "peak": peaks[name]} | (choice if name == "auto" else {})
    return found


def decode(
    base: PreTrainedModel, length: int, new: int, samples: int, rounds: int, seed: int, clock: Clock
) -> dict[str, Any]:
    """{line: {"particles": rows that decode together, "seconds": [...] a new token, "peak": bytes}}, of one prompt.

    transformers' `generate` with its KV cache; a token's time is the mean over those after the first, whose pass over
    the prompt is not counted.
    """
    device = base.device
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(base.config.vocab_size, (1, length), generator=generator).to(device)
    plain, bayesian = adapted(base, "lora", seed).eval(), adapted(base, "scalabl", seed).eval()
    lines = {
        "lora": (plain, 0),
        "scalabl, 1 particle": (bayesian, 1),
        f"scalabl, {samples} particles": (bayesian, samples),
    }

    def measure(name: str) -> float:
        model, particles = lines[name]
        ids, ticks = prompt.repeat(max(1, particles), 1), Ticks(device)
        with scalabl.particles(model, particles, seed=seed) if particles else nullcontext():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([ticks]),
            )
        return (ticks.times[-1] - ticks.times[0]) / (len(ticks.times) - 1)

    peaks = {name: peak_of(device, lambda name=name: measure(name)) for name in lines}  # type: ignore[misc]
    times = rounds_of(list(lines), rounds, seed, clock, measure, warmup=1)
    return {name: {"particles": max(1, lines[name][1]), "seconds": times[name], "peak": peaks[name]} for name in lines}


class Ticks(LogitsProcessor):
    """Notes when the logits of each new token are there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        synchronise(self.device)
        self.times.append(time.perf_counter())
        return scores


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Of letters alone: the rows are tokens already, the scoring only asks which token a letter is."""
    words = {"<pad>": 0, ":": 1, "A": 2, "B": 3, "C": 4, "D": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def _seconds(device: torch.device, work: Callable[[], None]) -> float:
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start
