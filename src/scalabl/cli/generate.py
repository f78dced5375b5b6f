"""`scalabl generate`: prompts in, answers out, shaded by what the posterior does not know."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from scalabl.cli import options
from scalabl.cli.app import app
from scalabl.core.console import progress_bar, quiet, words_console
from scalabl.core.errors import UserError

_COLDEST = 1e-3  # of --temperature
_DECODING, _SEMANTIC = "Decoding", "Several answers to a prompt"


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, or an adapter's.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given again; \\n is a line's end.")] = None,
    input: Annotated[Path | None, typer.Option("--input", help="JSONL prompts: {prompt} or {question}.")] = None,
    samples: Annotated[int, options.samples_option("Particles; 0 is the posterior mean.")] = 10,
    seed: options.Seed = 0,
    max_new_tokens: Annotated[
        int, typer.Option(help="The limit of an answer's tokens.", rich_help_panel=_DECODING)
    ] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="Sample at it; greedy if left out.", rich_help_panel=_DECODING)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most probable tokens that hold so much.", rich_help_panel=_DECODING),
    ] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help=options.CHAT)] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="A text that ends an answer; \\n is a line's end; left out: as the run's confidence was fitted.",
            rich_help_panel=_DECODING,
        ),
    ] = None,
    answers: Annotated[
        int, typer.Option(help="Further, sampled answers, for semantic entropy.", rich_help_panel=_SEMANTIC)
    ] = 0,
    equivalence: Annotated[
        str,
        typer.Option(
            help="Which answers mean the same: exact, normalised, embedding[:MODEL], entailment:MODEL.",
            rich_help_panel=_SEMANTIC,
        ),
    ] = "normalised",
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    json: Annotated[Path | None, typer.Option(help="Write text, confidence, scores and token figures here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with figures for each token here.")] = None,
    model: options.BaseModel = None,
) -> None:
    """Answer prompts with the average over the posterior; each token's ground is its epistemic uncertainty.

    The confidence is a probability of being right where `scalabl evaluate` has fitted one on validation answers of an
    open task that were made alike, else the length-normalised probability of the text.
    """
    from scalabl.core.files import write_json
    from scalabl.core.outputs import require_writable
    from scalabl.runs.stock import read_generating

    if answers == 0:
        options.refuse_unread(generate, "of --answers, of which there are none; leave it out", equivalence=equivalence)
    prompts = _prompts(prompt, input)
    require_writable(json, html, reads=(run, input, model, equivalence.partition(":")[2] or None))
    read_generating(run, model=model)
    sampled = _sampled(temperature, top_p)

    quiet()

    from scalabl.generation.answer import in_terminal, write_page
    from scalabl.generation.generate import AnswerSampling, check, unused_confidence
    from scalabl.generation.generate import generate as answer_prompts
    from scalabl.runs.loading import load_run

    sampling = AnswerSampling(answers, equivalence=equivalence)
    check(samples, max_new_tokens, batch_size, sampling)
    loaded = load_run(run, model=model, generating=True)
    stops = None if stop is None else _with_line_ends(stop)
    with progress_bar() as progress:
        bar = progress.add_task("generating", total=len(prompts), detail="")
        found = answer_prompts(
            loaded, prompts, samples=samples, seed=seed, max_new_tokens=max_new_tokens, chat=chat,
            stop=stops, sampling=sampling, batch_size=batch_size,
            advance=lambda done: progress.advance(bar, done), **sampled,
        )  # fmt: skip
    if json is not None:
        write_json(json, [answer.as_dict() for answer in found])
    if html is not None:
        recipe = loaded.record.recipe
        kind = f"{samples} particles" if samples and loaded.is_sampled else "one pass"
        made = f"{recipe['model']}, {recipe['method']} trained on {recipe['data']}, {kind}, seed {seed}"
        write_page(found, html, title="Answers with their uncertainty", made=made)
    console = words_console()
    console.print(in_terminal(found))
    why = unused_confidence(loaded, found[0].scores, samples=samples, chat=chat, stop=stops, **sampled)
    if why is not None:
        console.print(why, style="yellow", highlight=False)


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the options.

    Raises:
        UserError: none, both, or a row without one.
    """
    if bool(given) == (file is not None):
        raise UserError('Give prompts by --prompt "..." or by --input rows.jsonl, one of the two.')
    if file is None:
        prompts = _with_line_ends(given)
    else:
        from scalabl.data.open_questions import load_prompts

        prompts = load_prompts(file)
    if any(not text.strip() for text in prompts):
        raise UserError("A prompt is blank; write what is asked.")
    return prompts


def _with_line_ends(texts: list[str] | None) -> list[str]:
    """Texts of the command line, where a shell leaves a line's end as a backslash and an n."""
    return [str(options.with_line_ends(text)) for text in texts or ()]


def _sampled(temperature: float | None, top_p: float | None) -> dict[str, object]:
    """What of transformers' generation decides between greedy decoding and sampling."""
    if temperature is None and top_p is None:
        return {}
    temperature, top_p = 1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p
    # logits divided by less overflow float32
    if not _COLDEST <= temperature < math.inf:
        raise UserError(
            f"--temperature is {temperature}; it must be above 0 ({_COLDEST} or more); leave it out for greedy "
            "decoding."
        )
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}; it must be above 0 and at most 1.")
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
