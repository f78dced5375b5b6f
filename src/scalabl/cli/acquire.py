"""`scalabl acquire`: the rows of an unlabelled pool that are worth labelling next."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from scalabl.cli import options
from scalabl.cli.app import app
from scalabl.core.console import is_utf8, say
from scalabl.core.errors import UserError
from scalabl.core.files import write_text


@app.command()
def acquire(
    pool: Annotated[Path, typer.Argument(metavar="POOL", help="JSONL rows without answers; answers are ignored.")],
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, or an adapter's.")],
    k: Annotated[int, typer.Option("-k", help="How many rows.")],
    by: Annotated[
        str, typer.Option(help="margin (closest calls), bald (mutual information), entropy or random.")
    ] = "margin",
    output: Annotated[Path | None, typer.Option(help="JSONL; standard output if left out.")] = None,
    samples: Annotated[int, typer.Option(help="Particles.", rich_help_panel=options.PREDICTION)] = 10,
    seed: Annotated[int, options.seed_option("Of the particles, or of the random order.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    model: options.BaseModel = None,
    labels: options.Labels = None,
    scoring: options.Scoring = None,
    template: options.Template = None,
    chat: options.Chat = None,
    max_length: options.MaxLength = None,
) -> None:
    """The k rows to label next, most informative first: each as it stands in the pool, with its score."""
    from scalabl.core.outputs import require_writable
    from scalabl.data.jsonl import load_rows
    from scalabl.data.load import with_labels
    from scalabl.data.records import read_fields
    from scalabl.inference.acquisition import STRATEGIES
    from scalabl.inference.acquisition import acquire as chosen_rows
    from scalabl.runs.registry import SAMPLED
    from scalabl.runs.stock import read_classifier

    if by not in STRATEGIES:
        raise UserError(f"--by is {by!r}; it must be one of {', '.join(STRATEGIES)}.")
    asked = options.asked_of(
        run, pool, labels=labels, scoring=scoring, template=template, chat=chat, max_length=max_length
    )
    record = read_classifier(run, model=model, asked=asked)
    options.require_counts(samples=samples, batch_size=batch_size)
    if by == "bald" and (record.method not in SAMPLED or samples == 1):
        raise UserError(
            "BALD ranks by what particles disagree about, and here is a single prediction; use --by margin, or a run "
            "with a posterior and more --samples."
        )
    require_writable(output, reads=(pool, run, model))
    known = record.labels
    rows = with_labels(load_rows(pool, labels=known, require_answer=False, foreign=True), known, pool, whole=True)
    if not 1 <= k <= len(rows):
        raise UserError(f"-k is {k}; it must be between 1 and the {len(rows)} rows of {pool}.")
    originals = [original for _, _, original in read_fields(pool)]

    if by != "random":
        import scalabl.inference.predictor  # noqa: F401  (torch and transformers, before they are turned down)
        from scalabl.core.console import quiet

        quiet()
    chosen = chosen_rows(
        run, rows, k, by=by, samples=samples, seed=seed, batch_size=batch_size, model=model, asked=asked
    )
    # images by whole paths: the rows may be written to another directory
    images = [{"image": list(row.images)} if row.images else {} for row in rows]
    _write(({**originals[i], **images[i], "score": score} for i, score in chosen), output)


def _write(rows: Iterable[dict[str, Any]], output: Path | None) -> None:
    # on a console of another encoding, characters are escaped: JSON of any encoding is then the same rows
    ascii_alone = output is None and not is_utf8(sys.stdout)
    text = "".join(json.dumps(row, ensure_ascii=ascii_alone) + "\n" for row in rows)
    if output is None:
        say(text, end="")
    else:
        write_text(output, text)
