"""The page in a browser: what it shows of a label and of a text, and that it speaks with its server alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import pytest
from answering import Answering, adapters, answering
from browser import CHROMIUM, Page, browser

from scalabl.inference.settings import PredictionSettings
from scalabl.serving.server.limits import Limits
from scalabl.serving.server.page import page

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def running(runs: dict[str, Path]) -> Iterator[Answering]:
    settings = PredictionSettings("mc", abstain=0.45, coverage=0.5)
    served = adapters(settings, head=runs["head"], words=runs["words"], writer=runs["writer"])
    with answering(served, Limits(tokens=24)) as found:
        yield found


def test_it_is_one_file_that_loads_nothing_from_elsewhere(running: Answering) -> None:
    said = running.client.get("/")
    policy = said.headers["content-security-policy"]
    assert said.status_code == 200 and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and said.text == bytes(page().body).decode()
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|src=|innerHTML|{{", said.text)


def test_every_field_has_a_label_and_every_control_is_a_plain_one() -> None:
    """What keyboards and screen readers go by."""
    text = bytes(page().body).decode()
    form = text[text.index("<form") : text.index("</form>")]
    fields = re.findall(r"<(?:input|select|textarea)[^>]*>", form)
    labelled = re.findall(r"<label[^>]*>(?:(?!</label>).)*<(?:input|select|textarea)", form, flags=re.DOTALL)
    assert len(fields) == len(labelled) == 6 and "<legend>" in form
    assert 'lang="en"' in text and 'role="status" aria-live="polite"' in text and "onclick" not in text


@pytest.fixture(scope="module")
def seen() -> Iterator[Page]:
    with browser() as found:
        yield found


def asked(seen: Page, running: Answering, **given: str) -> str:
    """The answer on the page after it has asked what its address says."""
    seen.open("about:blank")
    seen.open(f"http://localhost:{running.port}/#{urlencode(given)}")
    seen.until(
        "document.querySelector('h1') && document.getElementById('status').textContent.match(/confidence|reason|No/)"
    )
    found: str = seen.value("document.getElementById('answer').innerHTML")
    return found


@in_a_browser
def test_a_label_with_its_doubt_and_its_set(seen: Page, running: Answering) -> None:
    text = "red stone <b>bee</b>"
    [answer] = running.classify(text, "head")
    found = asked(seen, running, model="head", text=text)
    given = answer["label"] or f"No label: {answer['reason']}"
    assert f"<h2>{given}</h2>" in found and f"<dd>{answer['confidence']:.3f}</dd>" in found
    for label, p in answer["probs"].items():
        assert re.search(rf'{label}</th><td class="number">{p:.3f}</td>', found)
    assert all(f"<dt>{name}</dt>" in found for name in ("doubt, total", "of the model", "set"))
    assert seen.value("document.getElementById('text').value") == text and not seen.errors


@in_a_browser
def test_a_text_is_shaded_token_by_token(seen: Page, running: Answering) -> None:
    found = asked(seen, running, model="words", text="say red", kind="text")
    token = r'<span class="t l[0-5]" title="probability 0\.\d{3}, doubt of the model \d\.\d{3} nats">'
    assert len(re.findall(token, found)) == 24 and 'aria-busy="false"' in found and "(not calibrated)" in found
    assert "24, cut at the limit" in found and not seen.errors


@in_a_browser
def test_a_text_without_a_template_is_as_long_as_the_server_writes(seen: Page, running: Answering) -> None:
    words = running.server.adapters["words"]
    tokenizer = copy.deepcopy(words.run.tokenizer)
    tokenizer.chat_template = None
    bare = replace(words, run=replace(words.run, tokenizer=tokenizer))
    with answering({"words": bare}, Limits(tokens=24)) as closed:
        assert "24, cut at the limit" in asked(seen, closed, model="words", text="say red", kind="text")


@in_a_browser
def test_the_keyboard_is_enough(seen: Page, running: Answering) -> None:
    """Tab reaches every control in the order of the page, a model is chosen, a text typed and asked."""
    seen.open("about:blank")
    seen.open(f"http://localhost:{running.port}/")
    seen.until("document.getElementById('model') && document.getElementById('model').options.length == 3")
    order = []
    for _ in range(3):
        seen.press("Tab")
        order.append(seen.value("document.activeElement.id"))
        if order[-1] == "model":
            seen.press("ArrowDown")
            assert seen.value("document.activeElement.value") == "words"
        if seen.value("document.activeElement.id") == "text":
            seen.type("red stone")
    assert order == ["model", "", "text"] and seen.value("document.getElementById('kinds').hidden") is False
    seen.press("Enter", ctrl=True)
    said = seen.until(
        "document.getElementById('status').textContent.match(/confidence|No label/) && "
        "document.getElementById('status').textContent"
    )
    [answer] = running.classify("red stone", "words")
    assert said == f"Label: {answer['label']}, confidence {answer['confidence']:.3f}." and not seen.errors


@in_a_browser
def test_a_refusal_is_said_and_a_token_is_asked_for(seen: Page, running: Answering) -> None:
    with answering(running.server.adapters, Limits(token="ours")) as closed:
        seen.open(f"http://localhost:{closed.port}/")
        seen.until("document.getElementById('for-token').hidden === false")
        seen.value("document.getElementById('token').focus()")
        seen.type("ours")
        seen.press("Tab")
        seen.until("document.getElementById('model').options.length == 3")
        seen.value("document.getElementById('text').focus()")
        seen.type(" ")
        seen.press("Enter", ctrl=True)
        said = seen.until(
            "document.getElementById('status').className == 'error' && document.getElementById('status').textContent"
        )
    assert said.startswith('input[0]: "text" is blank')
