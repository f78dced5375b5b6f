"""Threads on one model: each answer is that of a thread alone, and a plain pass meets the model as it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_base import adapted, loaded
from torch import Tensor

import scalabl
from scalabl.generation.decoding import decode
from scalabl.generation.fan_out import averaged
from scalabl.generation.generate import generate
from scalabl.inference.classifier import Classifier
from scalabl.predictive import MonteCarloPredictive
from scalabl.predictive.monte_carlo import first_difference
from scalabl.runs.method import Run
from scalabl.runs.record import RunRecord
from scalabl.runs.settings import DEFAULTS
from scalabl.scoring import Letters, Scorer
from scalabl.tuner import stochastic_layers

LABELS = ("yes", "no", "red")
PROMPTS = [("word " * (1 + 7 * i % 11)) + f"{i}\nLabel:" for i in range(12)]


def in_another_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


@torch.no_grad()
def plain(model: PeftModel) -> Tensor:
    return model(input_ids=torch.arange(3, 23).view(2, 10)).logits  # type: ignore[no-any-return]


@pytest.fixture
def model() -> PeftModel:
    """Adapted in its upper layers alone, so that predictions stand in for the lower ones."""
    return adapted(last=2)


def test_threads_on_one_classifier_answer_as_one_does_and_leave_the_model_as_it_was(model: PeftModel) -> None:
    _, tokenizer = loaded()
    classifier = Classifier(model, Letters(tokenizer, labels=LABELS, template="{text}"), samples=3, predictive="mc")
    assert classifier.scorer.trunk is not None and first_difference(model, None) == 1
    groups = [PROMPTS[i : i + 1 + i % 3] for i in range(9)]
    expected, before = [classifier(group) for group in groups], plain(model)
    passes: list[Tensor] = []
    done = threading.Event()

    def pass_plainly() -> None:
        while not done.is_set():
            passes.append(plain(model))

    def ask(number: int) -> None:
        for i in range(len(groups)):
            at = (i + number) % len(groups)
            answer = classifier(groups[at])
            np.testing.assert_array_equal(answer.particle_log_probs, expected[at].particle_log_probs)

    bystander = threading.Thread(target=pass_plainly)
    bystander.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(ask, number) for number in range(6)]:
                future.result(timeout=120)
    finally:
        done.set()
        bystander.join()
    assert passes and all(torch.equal(logits, before) for logits in passes)
    assert torch.equal(plain(model), before)


@pytest.mark.parametrize("context", ["particles", "sample", "averaged"])
def test_a_context_is_of_the_thread_that_entered_it(model: PeftModel, context: str) -> None:
    before = plain(model)
    inside = {
        "particles": lambda: scalabl.particles(model, 2),
        "sample": lambda: scalabl.sample(model),
        "averaged": lambda: averaged(model, MonteCarloPredictive(3)),
    }[context]()
    with inside:
        assert not torch.equal(plain(model), before)
        assert torch.equal(in_another_thread(lambda: plain(model)), before)

        def particles() -> Tensor:
            with scalabl.particles(model, 2, seed=5):
                return plain(model)

        theirs = in_another_thread(particles)
    assert torch.equal(plain(model), before)
    assert torch.equal(particles(), theirs)


def test_a_trunk_is_of_the_thread_that_resumes_from_it(model: PeftModel) -> None:
    _, tokenizer = loaded()
    scorer = Classifier(model, Letters(tokenizer, labels=LABELS, template="{text}")).scorer
    assert scorer.trunk is not None
    before = plain(model)
    with scorer.trunk.resume(model, torch.zeros(2, 10, 32), 2):
        assert not torch.equal(plain(model), before)
        assert torch.equal(in_another_thread(lambda: plain(model)), before)
    assert torch.equal(plain(model), before)


def test_a_state_is_put_back_by_whoever_closes_its_generator_and_in_whatever_order(model: PeftModel) -> None:
    before = plain(model)

    def held(seed: int) -> Iterator[None]:
        with scalabl.particles(model, 2, seed=seed):
            yield

    first, second = held(1), held(2)
    next(first)
    one = plain(model)
    next(second)
    two = plain(model)
    first.close()  # type: ignore[attr-defined]  # the older one, while the newer one is open
    assert torch.equal(plain(model), two) and not torch.equal(one, two)
    in_another_thread(second.close)  # type: ignore[attr-defined]
    assert torch.equal(plain(model), before)


def test_a_state_is_put_back_behind_an_error_and_an_interrupt(model: PeftModel) -> None:
    before = plain(model)
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), scalabl.particles(model, 2):
            raise error
        assert torch.equal(plain(model), before)
        assert all(leaf.state == "auto" for leaf in stochastic_layers(model).values())


def test_threads_sample_the_texts_that_their_seeds_say(model: PeftModel) -> None:
    scoring = Letters(loaded()[1], labels=LABELS, template="{text}")
    run = Run(RunRecord(recipe={**DEFAULTS}), Scorer(model, scoring), loaded()[1])

    def texts(seed: int) -> list[str]:
        found = generate(run, PROMPTS[:2], samples=2, seed=seed, max_new_tokens=6, do_sample=True, batch_size=1)
        return [answer.text for answer in found]

    expected = [texts(seed) for seed in range(4)]
    assert len({*map(tuple, expected)}) == 4
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert list(pool.map(texts, range(4))) == expected


def test_threads_generate_as_one_does(model: PeftModel) -> None:
    _, tokenizer = loaded()

    def text(prompt: str) -> tuple[list[int], Tensor]:
        made = decode(model, tokenizer, [prompt], MonteCarloPredictive(3), max_new_tokens=4, do_sample=False)[0][0]
        return made.token_ids, made.log_probs

    expected = [text(prompt) for prompt in PROMPTS[:6]]
    with ThreadPoolExecutor(6) as pool:
        for (ids, log_probs), (ids_before, before) in zip(pool.map(text, PROMPTS[:6]), expected, strict=True):
            assert ids == ids_before and torch.equal(log_probs, before)
