"""`serving.vllm` before servers that are away, slow, busy or wrong: tried again, or refused; never a made-up number."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from particle_server import Faults, ParticleServer
from served import LABELS, NUMBER, client
from tiny_base import loaded, questions

from scalabl.core.errors import UserError
from scalabl.scoring import Letters
from scalabl.serving.vllm import VLLMClassifier


def test_lost_connections_and_busy_servers_are_tried_again(exported: Path, server: ParticleServer) -> None:
    rows = questions(3)
    whole = client(exported, server)(rows)
    server.faults = Faults(drop=3, busy=2)
    again = client(exported, server, concurrency=2, retries=5)(rows)
    assert (server.faults.drop, server.faults.busy) == (0, 0)
    np.testing.assert_allclose(again.particle_log_probs, whole.particle_log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (Faults(drop=10**6), r"cannot be reached .* \(tried 2 times\)"),
        (Faults(busy=10**6), r"is busy \(status 503\); try later or lower concurrency \(tried 2 times\)"),
        (Faults(delay=1.0), r"did not answer within 0\.2 s; raise timeout"),
    ],
)
def test_what_stays_bad_is_said(exported: Path, server: ParticleServer, faults: Faults, said: str) -> None:
    timeout = 0.2 if faults.delay else 30
    asking = VLLMClassifier.from_export(exported, url=server.url, timeout=timeout, retries=1, concurrency=2)
    server.faults = faults
    with pytest.raises(UserError, match=said):
        asking(questions(4))
    assert len(server.bodies) < 4 * NUMBER, "the rest was asked for all the same"


def test_no_server_and_no_vllm_are_said(exported: Path, server: ParticleServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match="cannot be reached .*start it or mend the address"):
        VLLMClassifier.from_export(exported, url=url, retries=0)(questions(1))
    asking = client(exported, server)
    server.faults.answer = b"<html>"
    with pytest.raises(UserError, match="something else than JSON"):
        asking(questions(1))


def test_a_missing_adapter_is_named_before_anything_is_asked(exported: Path, server: ParticleServer) -> None:
    with pytest.raises(UserError, match=r"has not loaded other-0, other-1, other-2 \.\.\. \(4 of 4 adapters\)"):
        client(exported, server, name="other")(questions(1))
    assert not server.bodies


def test_an_adapter_that_is_taken_away_is_named(exported: Path, server: ParticleServer) -> None:
    asking = client(exported, server)
    asking.check()
    asking.adapters = ("particle-0", "gone")
    with pytest.raises(UserError, match="has no adapter gone"):
        asking(questions(1))


def test_a_label_among_no_top_tokens_is_never_a_zero(exported: Path, server: ParticleServer) -> None:
    server.faults.names_tokens = False
    prompts = ["text\nLabel:"]
    with pytest.raises(UserError, match=r"lacks ' \w+' \(token \d+\): it gives its 3 most probable"):
        client(exported, server, labels=LABELS, top_logprobs=3)(prompts)
    server.faults.max_logprobs = -1
    whole = client(exported, server, labels=LABELS, top_logprobs=-1)(prompts)
    server.faults.names_tokens = True
    named = client(exported, server, labels=LABELS)(prompts)
    np.testing.assert_allclose(whole.particle_log_probs, named.particle_log_probs, atol=1e-6)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"choices": []}, "without the log-probabilities that were asked for"),
        ({"choices": [{"index": 0, "logprobs": None}]}, "without the log-probabilities"),
        ({"choices": [{"index": 0, "logprobs": {"top_logprobs": [{}]}}]}, r"lacks ' yes' \(token"),
    ],
)
def test_an_answer_without_log_probabilities(exported: Path, server: ParticleServer, answer: Any, said: str) -> None:
    asking = client(exported, server, labels=LABELS)
    server.faults.answer = answer
    with pytest.raises(UserError, match=said):
        asking(["text\nLabel:"])


@pytest.mark.parametrize("value", [-9999.0, float("nan"), 0.5, "much", None])
def test_a_log_probability_that_is_none(exported: Path, server: ParticleServer, value: Any) -> None:
    asking = client(exported, server, labels=LABELS)
    ids = Letters(loaded()[1], labels=LABELS).label_ids.tolist()
    server.faults.answer = {
        "choices": [{"index": 0, "logprobs": {"top_logprobs": [{f"token_id:{i}": value for i in ids}]}}]
    }
    with pytest.raises(UserError, match="log-probabilit"):
        asking(["text\nLabel:"])


def test_a_choice_whose_tokens_are_others_is_refused(exported: Path, server: ParticleServer) -> None:
    """A server that cut or changed the prompt: its numbers belong to another text."""
    asking, row = client(exported, server, by="prompt"), questions(1)[0]
    length = len(asking.scoring.encode(row).input_ids)
    for given in ([None] + [{"0": {"logprob": -1.0}}] * (length - 1), [None]):
        server.faults.answer = {"choices": [{"index": k, "prompt_logprobs": given} for k in range(len(row.choices))]}
        with pytest.raises(UserError, match="without the log-probabilities"):
            asking([row])


def test_a_key_is_sent_and_a_wrong_one_named(
    exported: Path, server: ParticleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults.key = "secret"
    with pytest.raises(UserError, match=r"wants another key \(Unauthorized\)"):
        client(exported, server)(questions(1))
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert client(exported, server)(questions(1)).probs.shape == (1, 3)


def test_what_the_server_refuses_is_passed_on(exported: Path, server: ParticleServer) -> None:
    with pytest.raises(UserError, match=r"status 400\): Requested sample logprobs of 50"):
        client(exported, server, labels=LABELS, top_logprobs=50)(["text\nLabel:"])
