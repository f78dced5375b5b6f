"""A row as requests to one particle on an OpenAI-compatible server, and its choices' log-probabilities in the answers.

    next      the log-probabilities of chosen tokens behind a text, `logprob_token_ids`: the labels behind the prompt
              (letters); each token of each choice text behind the prompt and the tokens before it (continuation)
    prompt    continuation alone: a prompt a choice, and `prompt_logprobs`, which is the log-probability of every token
    head      the logits of a classification head, POST /classify

The second is for servers that do not know `logprob_token_ids` (vLLM's completions have it since pull request 43463).
Texts are sent as token ids, so that the server's tokenizer has no say. Log-probabilities are over the whole vocabulary;
what is common to all choices falls out in the softmax over them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.scoring.base import Encoded, Scoring
from scalabl.scoring.continuation import Continuation
from scalabl.scoring.head import Head
from scalabl.scoring.letters import Letters

By = Literal["next", "prompt"]
BY: tuple[By, ...] = ("next", "prompt")
Text = tuple[int, ...]

# a server may put its model's generation_config.json in place of what is not given; with these it leaves the
# distribution as it is, in every one of vLLM's logprobs modes
_AS_IT_IS = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "n": 1, "stream": False, "max_tokens": 1,
}  # fmt: skip
_MOST_TOKENS = 128  # that a request may name in logprob_token_ids (vllm/sampling_params.py)
_CLAMPED = -9999.0  # what vLLM writes for minus infinity


def path_of(scoring: Scoring) -> str:
    """Where a scoring's requests go."""
    return "/classify" if isinstance(scoring, Head) else "/v1/completions"


def requests_of(scoring: Scoring, row: Encoded, adapter: str, *, by: By, top_logprobs: int) -> list[dict[str, Any]]:
    """The bodies of POST `path_of` for one row and one particle; one in nearly all cases.

    Args:
        scoring: how rows are scored.
        row: the encoded row.
        adapter: the particle's name on the server.
        by: "next" or "prompt".
        top_logprobs: how many of the most probable tokens a server gives that passes over `logprob_token_ids`.
    """
    if isinstance(scoring, Head):
        return [{"model": adapter, "input": [row.input_ids], "use_activation": False}]
    common = {"model": adapter, **_AS_IT_IS}
    if by == "prompt":
        prompt, choices = split(row)
        return [common | {"prompt": [prompt + ids for ids in choices], "prompt_logprobs": 0}]
    wanted = _wanted(scoring, row)
    named = {"logprobs": top_logprobs, "return_tokens_as_token_ids": True}
    return [
        common | named | {"prompt": [list(text) for text in texts], "logprob_token_ids": _tokens(wanted, texts)}
        for texts in _groups(wanted)
    ]


def log_probs_of(scoring: Scoring, row: Encoded, answers: Sequence[Any], *, by: By, url: str) -> Tensor:
    """(C,) float64 log p(choice | question) of a row's C choices, from the answers to its requests.

    Where rows may have several of C labels: (C, 2), of no and of yes for each.

    Raises:
        UserError: a token's log-probability or a label's logit is not in the answers, or is no number.
    """
    asked = "logits" if isinstance(scoring, Head) else "log-probabilities"
    try:
        if isinstance(scoring, Head):
            return _from_logits(scoring, row, answers[0], url)
        if by == "prompt":
            sums = _from_prompts(row, _in_order(answers[0]), url)
        else:
            sums = _from_next(scoring, row, answers, url)
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"The server at {url} answered without the {asked} that were asked for ({error!r}); it must be a vLLM, or "
            "as compatible."
        ) from error
    if isinstance(scoring, Continuation) and scoring.normalization == "token":
        sums = [total / len(ids) for total, ids in zip(sums, split(row)[1], strict=True)]
    return torch.tensor(sums, dtype=torch.float64).log_softmax(dim=0)


def split(row: Encoded) -> tuple[list[int], list[list[int]]]:
    """The prompt's tokens, and those of each choice text."""
    pairs = list(zip(row.input_ids, row.segments, strict=True))
    of = [[token for token, segment in pairs if segment == number] for number in range(row.num_choices + 1)]
    return of[0], of[1:]


def _steps(scoring: Scoring, row: Encoded) -> list[list[tuple[Text, int]]]:
    """For each choice: the texts behind which a token of it is looked up, with that token."""
    if isinstance(scoring, Letters):
        return [[(tuple(row.input_ids), token)] for token in scoring.label_ids[: row.num_choices].tolist()]
    prompt, choices = split(row)
    return [[(tuple(prompt + ids[:j]), token) for j, token in enumerate(ids)] for ids in choices]


def _wanted(scoring: Scoring, row: Encoded) -> dict[Text, list[int]]:
    """The texts of a row, each once, with the tokens that are looked up behind them."""
    wanted: dict[Text, list[int]] = {}
    for text, token in (step for steps in _steps(scoring, row) for step in steps):
        tokens = wanted.setdefault(text, [])
        if token not in tokens:
            tokens.append(token)
    return wanted


def _groups(wanted: Mapping[Text, list[int]]) -> list[list[Text]]:
    """Texts that share a request: it names the same tokens for all of them, of which there is a limit."""
    groups: list[list[Text]] = [[]]
    for text in wanted:
        if groups[-1] and len(_tokens(wanted, [*groups[-1], text])) > _MOST_TOKENS:
            groups.append([])
        groups[-1].append(text)
    return groups


def _tokens(wanted: Mapping[Text, list[int]], texts: Sequence[Text]) -> list[int]:
    return sorted({token for text in texts for token in wanted[text]})


def _from_next(scoring: Scoring, row: Encoded, answers: Sequence[Any], url: str) -> list[float]:
    groups = _groups(_wanted(scoring, row))
    given: dict[Text, Mapping[str, Any]] = {}
    for texts, answer in zip(groups, answers, strict=True):
        for text, choice in zip(texts, _in_order(answer), strict=True):
            given[text] = choice["logprobs"]["top_logprobs"][0]

    def looked_up(text: Text, token: int) -> float:
        found = given[text]
        if f"token_id:{token}" not in found:
            raise UserError(
                f"The answer of the server at {url} lacks {scoring.tokenizer.decode([token])!r} (token {token}): it "
                f"gives its {len(found)} most probable tokens alone. Serve with a vLLM whose completions know "
                "logprob_token_ids; or start it with --max-logprobs -1 and pass top_logprobs=-1; or, for choice texts, "
                'pass by="prompt".'
            )
        return _finite(found[f"token_id:{token}"], token, url)

    return [math.fsum(looked_up(text, token) for text, token in steps) for steps in _steps(scoring, row)]


def _from_prompts(row: Encoded, given: Sequence[Any], url: str) -> list[float]:
    prompt, choices = split(row)
    sums = []
    for ids, choice in zip(choices, given, strict=True):
        positions = choice["prompt_logprobs"]
        if len(positions) != len(prompt) + len(ids):
            raise ValueError(f"{len(positions)} log-probabilities for {len(prompt) + len(ids)} tokens")
        found = [positions[len(prompt) + j][str(token)]["logprob"] for j, token in enumerate(ids)]
        sums.append(math.fsum(_finite(value, token, url) for value, token in zip(found, ids, strict=True)))
    return sums


def _from_logits(scoring: Head, row: Encoded, answer: Any, url: str) -> Tensor:
    [found] = answer["data"]
    logits = torch.tensor([float(logit) for logit in found["probs"]], dtype=torch.float64)  # with use_activation false
    if len(logits) != len(scoring.labels):
        raise UserError(
            f"The server at {url} answered with {len(logits)} logits, but the run has {len(scoring.labels)} labels; "
            "start it with the command that scalabl export prints."
        )
    if not bool(logits.isfinite().all()):
        raise UserError(f"The server at {url} gives a label a logit that is no number.")
    log_probs = scoring.likelihood.log_probs(scoring.class_logits(logits[None], scoring.collate([row]))).double()
    return log_probs.view(-1, 2) if scoring.several else log_probs[0]


def _in_order(answer: Any) -> list[Any]:
    """A completion a text, in the order of the texts."""
    return sorted(answer["choices"], key=lambda choice: int(choice["index"]))


def _finite(value: Any, token: int, url: str) -> float:
    number = float(value)
    if not _CLAMPED < number <= 1e-3:
        raise UserError(f"The server at {url} gives token {token} the log-probability {number}, which is none.")
    return number
