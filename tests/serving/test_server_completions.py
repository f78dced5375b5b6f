"""OpenAI's own client, unchanged: chat and text completions, streamed or whole, each text with its doubt."""

from __future__ import annotations

import json
import math
import re
import shlex
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from answering import Answering, adapters, answering
from openai import OpenAI
from page_blocks import ROOT, run_blocks
from server_runs import WORDS

import scalabl
from scalabl.generation.confidence import AnswerSettings, Confidence
from scalabl.generation.decoding import decode
from scalabl.serving.server import texts
from scalabl.serving.server.adapters import ServedAdapter
from scalabl.serving.server.limits import Limits
from scalabl.serving.server.metrics import Metrics
from scalabl.serving.server.texts import Piece, TextAsked, Write

LONG = 24
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 0}  # which `generate` draws particles by too


@pytest.fixture(scope="module")
def served(runs: dict[str, Path]) -> dict[str, ServedAdapter]:
    return adapters(writer=runs["writer"], words=runs["words"], plain=runs["plain"], head=runs["head"])


@pytest.fixture(scope="module")
def running(served: dict[str, ServedAdapter]) -> Iterator[Answering]:
    with answering(served, Limits(tokens=400, rows=16, prompt=480)) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: Answering) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0) as found:
        yield found


def turn(text: str) -> Any:
    """One user's message."""
    return [{"role": "user", "content": text}]


def field(choice: Any) -> dict[str, Any]:
    """The `scalabl` field of a choice."""
    found: dict[str, Any] = choice.model_extra["scalabl"]
    return found


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model", ["writer", "plain"])
def test_a_chat_is_answered_as_generate_does(
    client: OpenAI, served: dict[str, ServedAdapter], model: str, settings: dict[str, Any]
) -> None:
    made = client.chat.completions.create(
        model=model, messages=turn("say red stone"), max_tokens=LONG, logprobs=True, top_logprobs=3, **settings
    )
    sampled = {"do_sample": True, "top_k": 0, **settings} if settings else {}
    [expected] = scalabl.generate(
        served[model].run, ["say red stone"], chat=True, max_new_tokens=LONG, samples=10, **sampled
    )
    [choice] = made.choices
    assert choice.message.content is not None and choice.message.content.strip() == expected.text
    assert field(choice)["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
    assert field(choice)["scores"] == pytest.approx(expected.scores, abs=1e-3)
    assert [token["text"] for token in field(choice)["tokens"]] == [token.text for token in expected.tokens]
    epistemic = [token["epistemic"] for token in field(choice)["tokens"]]
    assert epistemic == pytest.approx([token.epistemic for token in expected.tokens], abs=1e-5)
    assert (max(epistemic) > 1e-4) == (model == "writer") and field(choice)["particles"] == (
        10 if model == "writer" else 1
    )
    assert choice.logprobs is not None and choice.logprobs.content is not None
    for told, token in zip(choice.logprobs.content, expected.tokens, strict=False):
        assert told.token == token.text and told.logprob == pytest.approx(math.log(token.probability), abs=1e-4)
        assert len(told.top_logprobs) == 3 and told.top_logprobs[0].logprob >= told.logprob - 1e-6
    assert made.usage is not None and made.usage.completion_tokens == len(expected.tokens)


@pytest.mark.parametrize("settings", [{}, SAMPLED, {"n": 3, **SAMPLED}], ids=["greedy", "sampled", "several"])
def test_a_stream_is_the_whole_in_pieces(client: OpenAI, settings: dict[str, Any]) -> None:
    asked: Any = {"model": "writer", "messages": turn("say bee"), "max_tokens": LONG, "logprobs": True, **settings}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    for i, choice in enumerate(whole.choices):
        own = [each for chunk in chunks for each in chunk.choices if each.index == i]
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == choice.finish_reason
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        tokens = [token for each in own[1:-1] for token in field(each)["tokens"]]
        assert tokens == [pytest.approx(token, abs=1e-5) for token in field(choice)["tokens"]]
        told = [content.token for each in own if each.logprobs for content in each.logprobs.content or ()]
        assert choice.logprobs and told == [content.token for content in choice.logprobs.content or ()]
        assert field(own[-1])["confidence"] == pytest.approx(field(choice)["confidence"], abs=1e-5)


def test_completions_of_several_prompts_and_their_stream(client: OpenAI, served: dict[str, ServedAdapter]) -> None:
    asked: Any = {"model": "words", "max_tokens": 6, "logprobs": 2, "n": 2, **SAMPLED}
    made = client.completions.create(prompt=["say red", "say bee"], **asked)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3] and made.object == "text_completion"
    for choice in made.choices:
        assert choice.logprobs and "".join(choice.logprobs.tokens or ()) == choice.text
        assert choice.logprobs.text_offset and choice.logprobs.text_offset[0] == 0
        assert len(field(choice)["tokens"]) == 6 and choice.finish_reason == "length"
    chunks = list(client.completions.create(prompt=["say red", "say bee"], stream=True, **asked))
    for choice in made.choices:
        own = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in own) == choice.text
    tokens = served["words"].run.tokenizer("say red")["input_ids"]
    [by_tokens, *_] = client.completions.create(prompt=tokens, **asked).choices
    assert by_tokens.text == made.choices[0].text


def test_a_confidence_is_that_of_texts_made_as_those_it_was_fitted_on(served: dict[str, ServedAdapter]) -> None:
    adapter = served["words"]
    settings = AnswerSettings(10, ("\n",), False, adapter.run.record.adapter_sha256)
    fitted = Confidence(
        "isotonic", ("mean_entropy",), (-1,), 0.1, 0.9, 20, 8, knots=(-20.0, 0.0), heights=(0.25, 0.25), made=settings
    )
    with answering({"words": replace(adapter, confidence=fitted)}, Limits()) as running:
        client = OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0)

        def calibrated(**asked: Any) -> bool:
            made = {"model": "words", "prompt": "say red", "max_tokens": 4, "stop": "\n"} | asked
            [choice] = client.completions.create(**made).choices
            assert choice.text.strip() and (field(choice)["confidence"] == 0.25) == field(choice)["calibrated"]
            return bool(field(choice)["calibrated"])

        assert calibrated() and calibrated(stop=["\n", ""])
        otherwise: list[dict[str, Any]] = [
            {"stop": None}, {"stop": ["\n", "nowhere"]}, SAMPLED,
            {"prompt": adapter.run.tokenizer("say red")["input_ids"]},
        ]  # fmt: skip
        assert not any(calibrated(**asked) for asked in otherwise)
        [turned] = client.chat.completions.create(
            model="words", messages=turn("say red"), max_tokens=4, stop="\n"
        ).choices
        assert not field(turned)["calibrated"]


def test_texts_share_batches_and_none_depends_on_it(client: OpenAI, running: Answering) -> None:
    """Each has its own length, temperature, seed and end."""
    asked: list[dict[str, Any]] = [
        {"model": "writer", "messages": turn(f"{text} " * (1 + i % 4)), "max_tokens": 3 + i}
        | ({"temperature": 0.5 + i / 20, "seed": i} if i % 2 else {})
        | ({"stop": ["y", "WW"]} if i % 3 == 0 else {})
        for i, text in enumerate(WORDS)
    ]

    def answer(settings: dict[str, Any]) -> tuple[Any, ...]:
        [choice] = client.chat.completions.create(**settings).choices
        return choice.message.content, choice.finish_reason, field(choice)

    alone = [answer(settings) for settings in asked]
    before = running.metric("scalabl_batch_rows_count")
    with ThreadPoolExecutor(len(asked)) as threads:
        together = list(threads.map(answer, asked))
    assert running.metric("scalabl_batch_rows_count") - before < len(asked) / 2
    for one, other in zip(alone, together, strict=True):
        assert one[:2] == other[:2] and one[2]["confidence"] == pytest.approx(other[2]["confidence"], abs=1e-5)
    assert {reason for _, reason, _ in alone} == {"stop", "length"}


def test_a_stop_text_ends_a_text_and_is_not_part_of_it(client: OpenAI) -> None:
    asked: Any = {"model": "words", "prompt": "say red stone", "max_tokens": LONG}
    text = client.completions.create(**asked).choices[0].text
    for stop in (text[5:8], [text[9:11], "nowhere"], text[4:12]):
        first = stop if isinstance(stop, str) else stop[0]
        made = client.completions.create(**asked, stop=stop).choices[0]
        assert made.text == text[: text.find(first)] and made.finish_reason == "stop"
        streamed = list(client.completions.create(**asked, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in streamed) == made.text


def test_a_text_is_over_though_others_of_its_batch_go_on(served: dict[str, ServedAdapter]) -> None:
    write, seen = Write(Metrics()), []
    prompt = served["writer"].run.tokenizer("say red")["input_ids"]
    short = write.job(served["writer"], [TextAsked(prompt, 2)])

    def told(_: int, piece: Piece) -> None:
        seen.append(short.answer.done())

    long = write.job(served["writer"], [TextAsked(prompt, 9, temperature=1.5, seed=3)], told)
    short.work([short, long])
    assert short.answer.result()[0].reason == "length" and len(short.answer.result()[0].tokens) == 2
    assert seen[-1] and len(long.answer.result()[0].tokens) == 9


def test_neighbours_do_not_lead_a_text_beyond_the_bounds(
    served: dict[str, ServedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one request too: a batch is as wide as its longest prompt and the most tokens to come."""
    batches: list[tuple[int, int]] = []

    def decoded(model: Any, tokenizer: Any, prompts: list[list[int]], *given: Any, **settings: Any) -> Any:
        batches.append((len(prompts), max(map(len, prompts)) + settings["max_new_tokens"]))
        return decode(model, tokenizer, prompts, *given, **settings)

    monkeypatch.setattr(texts, "decode", decoded)
    write, word = Write(Metrics(), batch_size=3), served["writer"].run.tokenizer("say red")["input_ids"]
    long = (word * 300)[:500]
    [written] = (job := write.job(served["writer"], [TextAsked(long, 8), TextAsked(word, 80)])).work([job])
    assert [len(each.tokens) for each in written] == [8, 80] and max(width for _, width in batches) <= 512
    batches.clear()
    job = write.job(served["writer"], [TextAsked(word, 2)] * 7)
    job.work([job])
    assert [rows for rows, _ in batches] == [3, 3, 1]
    batches.clear()
    monkeypatch.setattr(texts, "AT_ONCE", 300)
    asked = [TextAsked(word, 60), TextAsked((word * 30)[:50], 20), TextAsked(word, 70), TextAsked(word, 60)]
    job = write.job(served["writer"], asked)
    job.work([job])
    assert sum(rows for rows, _ in batches) == 4 and max(rows * width for rows, width in batches) <= 300


def test_a_stream_that_nobody_reads_is_not_written_on(client: OpenAI, running: Answering) -> None:
    before = running.metric("scalabl_tokens_total")
    stream = client.completions.create(model="words", prompt="say red", max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    client.completions.create(model="words", prompt="say red", max_tokens=1)  # behind it
    assert running.metric("scalabl_tokens_total") - before < 400


REFUSED: dict[str, dict[str, Any]] = {
    "tools: ": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "logit_bias: ": {"logit_bias": {"1": 5}},
    "response_format: ": {"response_format": {"type": "json_object"}},
    "n: ": {"n": 9},
    "temperature: ": {"temperature": 3},
    "frequency_penalty: ": {"frequency_penalty": 1},
    "messages: ": {"messages": []},
    "messages.0.content": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    },
    "401 tokens are asked for, and this server writes at most 400": {"max_tokens": 401},
    "are more than the 512 that the model has positions for": {"messages": turn("red " * 400), "max_tokens": 150},
    "tokens; this server reads at most 480": {"messages": turn("red " * 500)},
    "top_logprobs are given with logprobs alone": {"top_logprobs": 2},
}


@pytest.mark.parametrize("words", list(REFUSED))
def test_what_it_does_not_do_is_refused_by_its_name(client: OpenAI, words: str) -> None:
    asked: Any = {"model": "writer", "messages": turn("say red"), "max_tokens": 2} | REFUSED[words]
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(**asked)
    with pytest.raises(openai.BadRequestError, match=words):  # before a stream begins too
        client.chat.completions.create(**asked, stream=True)


def test_a_text_without_a_length_is_as_long_as_there_is_room_for(
    client: OpenAI, served: dict[str, ServedAdapter]
) -> None:
    def tokens(running: Answering, **asked: Any) -> int:
        said = running.client.post("/v1/completions", json={"model": "words", "prompt": "say red"} | asked)
        assert said.status_code == 200, said.text
        found: int = said.json()["usage"]["completion_tokens"]
        return found

    word = served["words"].run.tokenizer("say red")["input_ids"]
    with answering({"words": served["words"]}, Limits(tokens=24)) as running:
        assert (tokens(running), tokens(running, max_tokens=None)) == (16, 24)
        assert tokens(running, prompt=(word * 300)[:505]) == 7  # of 512 positions
    with answering({"words": served["words"]}, Limits(tokens=4)) as running:
        assert tokens(running) == 4


def test_prompts_that_are_none(client: OpenAI) -> None:
    for prompt in ([], [999_999], [-1], [[]], ["x"] * 17):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="words", prompt=prompt)


def test_prompts_are_counted_before_they_are_read_and_read_beside_the_server_s_loop(
    running: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, threads = running.server.readers["words"], []
    read = reader.tokens

    def tokens(prompt: Any) -> list[int]:
        threads.append(threading.current_thread())
        return read(prompt)

    monkeypatch.setattr(reader, "tokens", tokens)
    asked = {"model": "words", "prompt": ["say red"] * 6, "n": 3, "max_tokens": 1}
    assert running.refused("/v1/completions", 400, json=asked) == "18 texts are asked for; it must be 1 to 16."
    assert not threads
    assert len(running.client.post("/v1/completions", json=asked | {"n": 2}).json()["choices"]) == 12
    assert len(threads) == 6 and all("AnyIO" in thread.name for thread in threads)


def test_models_and_tokens_are_those_of_the_client(client: OpenAI, served: dict[str, ServedAdapter]) -> None:
    assert [model.id for model in client.models.list()] == ["writer", "words", "plain", "head"]
    for model in ("head", "nobody"):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=model, messages=turn("say red"))
    with answering(served, Limits(token="ours", hosts=None)) as running:
        url = f"http://127.0.0.1:{running.port}/v1"
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=url, api_key="theirs", max_retries=0).models.list()
        assert OpenAI(base_url=url, api_key="ours").models.list().data


def test_a_fault_within_a_stream_is_told_in_it(
    client: OpenAI, running: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, taken = texts._Growing.take, []

    def fails(self: Any, step: Any, row: int) -> None:
        taken.append(row)
        if len(taken) > 3:
            raise RuntimeError("/tmp/secret.py")
        take(self, step, row)

    with monkeypatch.context() as patch:
        patch.setattr(texts._Growing, "take", fails)
        with pytest.raises(openai.APIError, match="could not be written to its end"):
            list(client.completions.create(model="words", prompt="say red", max_tokens=9, stream=True))
        with pytest.raises(openai.InternalServerError, match="The server failed at this request"):
            client.completions.create(model="words", prompt="say red")
    assert client.completions.create(model="words", prompt="say red", max_tokens=2).choices[0].text


def test_what_the_page_shows(running: Answering) -> None:
    """Its block of Python and its request of curl, at this server's address."""
    here, there = "http://127.0.0.1:8000", f"http://127.0.0.1:{running.port}"
    made: Any = run_blocks("docs/serving.md", {}, {here: there})
    assert 0 < made["said"].choices[0].scalabl["confidence"] <= 1
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").replace("\\\n", " ")
    [line] = re.findall(r"^    (curl .*)$", page, re.MULTILINE)
    _, address, flag, header, data, body = shlex.split(line)
    assert address.startswith(here) and (flag, data) == ("-H", "-d")
    name, _, value = header.partition(": ")
    sent = json.loads(body) | {"model": "head"}
    said = running.client.post(address.removeprefix(here), content=json.dumps(sent), headers={name: value})
    assert said.status_code == 200, said.text
    assert len(said.json()["data"]) == len(sent["input"]) and said.json()["data"][1]["id"] == sent["input"][1]["id"]
