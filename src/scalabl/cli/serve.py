"""`scalabl serve`: adapters on one base model behind HTTP."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scalabl.cli import options
from scalabl.cli.app import app
from scalabl.core.console import say
from scalabl.core.errors import UserError

if TYPE_CHECKING:
    from scalabl.runs.record import RunRecord

TOKEN = "SCALABL_TOKEN"
_EXTRA = ("fastapi", "uvicorn", "prometheus_client")
_PANEL = "Limits"


@app.command()
def serve(
    runs: Annotated[list[str], typer.Argument(metavar="DIR [NAME=DIR ...]", help="Run directories on one base.")],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(callback=options.within(0, 65535), help="0 takes a free one.")] = 8000,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help=f"Serve other machines without a token ({TOKEN}).")
    ] = False,
    predictive: options.Predictive = None,
    samples: options.Samples = 10,
    seed: options.Seed = 0,
    raw: options.Raw = False,
    abstain: Annotated[
        float | None, typer.Option(help="Answer null below this confidence.", rich_help_panel=options.ABSTENTION)
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Promise this error rate among answers.", rich_help_panel=options.ABSTENTION)
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Of --max-error: that it is kept.", rich_help_panel=options.ABSTENTION)
    ] = 0.95,
    max_false_alarms: Annotated[
        float | None,
        typer.Option(
            help="Answer null out of scope, at this share of false alarms among rows in scope.",
            rich_help_panel=options.ABSTENTION,
        ),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(help="Give the set that holds the right label at this rate.", rich_help_panel=options.ABSTENTION),
    ] = None,
    model: options.BaseModel = None,
    batch_size: Annotated[int, typer.Option(help="Rows or texts at a time.", rich_help_panel=_PANEL)] = 16,
    queue: Annotated[int, typer.Option(help="Rows that may wait; beyond, 429.", rich_help_panel=_PANEL)] = 1024,
    max_rows: Annotated[int, typer.Option(help="Of a request.", rich_help_panel=_PANEL)] = 256,
    max_tokens: Annotated[int, typer.Option(help="That a text may have.", rich_help_panel=_PANEL)] = 512,
    max_prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", rich_help_panel=_PANEL)] = 4096,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.", rich_help_panel=_PANEL)] = 1 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds until an answer is there.", rich_help_panel=_PANEL)] = 120.0,
) -> None:
    """Answer over HTTP: labels (POST /v1/classify), texts as OpenAI's (/v1/chat/completions, /v1/completions),
    GET /v1/models, /healthz and /metrics, and a page at /.

    An adapter is asked for by the name of its directory, or by NAME. What --predictive to --coverage say is as in
    scalabl predict, for every adapter that gives labels. A token in the environment, SCALABL_TOKEN, is asked of every
    request; without one a server answers this machine alone.
    """
    from scalabl.runs.record import CHOICES

    _require_extra()
    directories = _named(runs)
    options.require_counts(
        queue=queue, max_rows=max_rows, max_tokens=max_tokens, max_prompt=max_prompt, max_body=max_body,
        batch_size=batch_size,
    )  # fmt: skip
    if samples < 0:
        raise UserError(f"--samples is {samples}; it must be at least 0.")
    if queue < max_rows:
        raise UserError(
            f"--queue is {queue:,}, but a request may have {max_rows:,} rows (--max-rows), for which there would "
            "never be room; raise --queue or lower --max-rows."
        )
    if not timeout > 0:
        raise UserError(f"--timeout is {timeout}; it must be above 0.")
    if max_error is None:
        options.refuse_unread(serve, "of --max-error; leave it out", confidence=confidence)
    token = _token(host, anonymous)
    records, settings = {}, {}
    for name, directory in directories.items():
        records[name] = record = _record(directory, model)
        if record.kind != CHOICES:
            continue
        settings[name] = options.prediction_settings(
            record, predictive=predictive, samples=samples, seed=seed, draws="independent", adaptive=False,
            confidence=confidence, stochastic_layers=None, batch_size=batch_size, abstain=abstain, max_error=max_error,
            raw=raw, max_false_alarms=max_false_alarms, coverage=coverage,
        )  # fmt: skip
    if not settings:
        options.refuse_unread(
            serve, "for adapters that give labels, of which there are none; leave it out", predictive=predictive,
            raw=raw, abstain=abstain, max_error=max_error, confidence=confidence, max_false_alarms=max_false_alarms,
            coverage=coverage,
        )  # fmt: skip

    from scalabl.core.console import quiet, quiet_imports

    quiet_imports()
    from scalabl.serving.server.adapters import load_adapters
    from scalabl.serving.server.app import Server
    from scalabl.serving.server.limits import LOOPBACK, Limits
    from scalabl.serving.server.run import bound, run

    quiet()
    known_by = None if token is not None or anonymous else (*LOOPBACK, host.lower())
    limits = Limits(max_body, max_rows, max_tokens, max_prompt, timeout, token=token, hosts=known_by)
    with bound(host, port) as at:  # before the minutes of loading
        adapters = load_adapters(
            directories, records, settings, samples=samples, seed=seed, batch_size=batch_size, model=model
        )
        made = Server(adapters, limits, batch_size=batch_size, most_waiting=queue)
        for name, adapter in adapters.items():
            say(f"{name}: {adapter.sentence}")
        place = f"[{host}]" if ":" in host else host
        say(f"listening at http://{place}:{at.getsockname()[1]}")
        sys.stdout.flush()  # a program that started this one waits for the line
        run(made, at)


def _named(given: list[str]) -> dict[str, Path]:
    """Directories by the names that requests have for them.

    Raises:
        UserError: two have the same name, or one has none.
    """
    found: dict[str, Path] = {}
    for each in given:
        name, is_named, place = each.partition("=")
        if not is_named or Path(each).is_dir():
            name, place = Path(each).resolve().name, each
        if not name.strip() or not name.isprintable():
            raise UserError(f"{each} names no adapter; write NAME=DIR.")
        if name in found:
            raise UserError(f"Two adapters are called {name}; give one of them another name: NAME=DIR.")
        found[name] = Path(place)
    return found


def _record(directory: Path, model: str | None) -> RunRecord:
    """What is known of an adapter that gives labels or writes texts.

    Raises:
        UserError: as `scalabl predict` and `scalabl generate` have it.
    """
    from scalabl.runs.record import LANGUAGE, RECORD, RunRecord
    from scalabl.runs.stock import read_classifier

    if (directory / RECORD).is_file() and RunRecord.read(directory).kind == LANGUAGE:
        return RunRecord.read_generating(directory)
    return read_classifier(directory, model=model)


def _token(host: str, anonymous: bool) -> str | None:
    """The token of the environment.

    Raises:
        UserError: other machines could ask without one, or it is one that no header can have.
    """
    token = os.environ.get(TOKEN)
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token and token):
        raise UserError(f"{TOKEN} in the environment is no token; give it visible ASCII characters, or unset it.")
    if token is None and not anonymous and not _is_loopback(host):
        raise UserError(
            f"{host} is reached by other machines; set a token in the environment ({TOKEN}), or say --anonymous."
        )
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _require_extra() -> None:
    """Refuse before any work.

    Raises:
        UserError: what serves over HTTP is not installed.
    """
    for package in _EXTRA:
        if importlib.util.find_spec(package) is None:
            raise UserError('scalabl serve needs packages that are not installed: pip install "scalabl[serve]"')
