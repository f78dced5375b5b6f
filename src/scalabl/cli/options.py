"""Options that commands share, and their checks.

Of `evaluate` and `predict`: how a run's posterior is turned into predictions. Of `train` and `plan`: made of the
settings' fields, with their names, types, defaults, help and panels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scalabl.core.errors import UserError
from scalabl.core.modules import check_spec
from scalabl.predictive.sampling import PREDICTIVES, Sampling
from scalabl.runs.registry import OVER_S, SAMPLED
from scalabl.runs.settings import FIELDS, LARGEST_SEED, PLACES, kind_of

if TYPE_CHECKING:
    from scalabl.inference.settings import PredictionSettings
    from scalabl.runs.record import RunRecord
    from scalabl.runs.stock import Asked


PREDICTION, ABSTENTION, MACHINE = "Prediction", "When not to answer", "Machine"  # panels that commands share
Predictive = Annotated[
    str | None, typer.Option(help="mean, mc, linearized or auto, the default.", rich_help_panel=PREDICTION)
]


def within(low: int | None, high: int) -> Callable[..., int]:
    """What an option calls with its value, so that its help has no column of ranges; None leaves the lower end open."""

    def check(parameter: typer.CallbackParam, value: int) -> int:
        if value > high or (low is not None and value < low):
            words = f"at most {high}" if low is None else f"between {low} and {high}"
            raise UserError(f"{parameter.opts[0]} is {value}; it must be {words}.")
        return value

    return check


def samples_option(help: str) -> Any:
    """The option of N, the number of particles."""
    return typer.Option(callback=within(None, 10**6), help=help, rich_help_panel=PREDICTION)


def seed_option(help: str) -> Any:
    """The option of a seed."""
    return typer.Option(callback=within(0, LARGEST_SEED), help=help, rich_help_panel=PREDICTION)


Samples = Annotated[int, samples_option("Particles of mc.")]
Seed = Annotated[int, seed_option("Of the particles.")]
Draws = Annotated[
    str,
    typer.Option(help="independent, antithetic, sobol or moments: how they are drawn.", rich_help_panel=PREDICTION),
]
Adaptive = Annotated[
    bool,
    typer.Option("--adaptive", help="Stop a row early when its answer is settled.", rich_help_panel=PREDICTION),
]
Confidence = Annotated[
    float,
    typer.Option(
        help="Of --adaptive: that all particles decide alike; of --max-error: that it is kept.",
        rich_help_panel=PREDICTION,
    ),
]


def _only_t(bound: str) -> str:
    if bound != "t":
        raise UserError(f"--bound is {bound!r}, but t is the only bound of --adaptive; leave it out.")
    return bound


Bound = Annotated[str, typer.Option(hidden=True, callback=_only_t)]  # of older versions' command lines
StochasticLayers = Annotated[
    str | None,
    typer.Option(help="Draw s in the top layers alone: last:K, last:0.25 or variance:0.9.", rich_help_panel=PREDICTION),
]
Raw = Annotated[bool, typer.Option("--raw", help="Without the run's own calibration.", rich_help_panel=PREDICTION)]
BatchSize = Annotated[int, typer.Option(help="Questions at a time.")]
Priors = Annotated[
    Path | None,
    typer.Option(
        help="JSON {label: probability}: how often each is here, if not as in training.", rich_help_panel=PREDICTION
    ),
]
BaseModel = Annotated[str | None, typer.Option(help="The base model, if it has moved.")]


_ASKED = "Of an adapter that another trainer saved"
Labels = Annotated[
    str | None,
    typer.Option(help="a,b,c; of a head in the order of its outputs, else as in the rows.", rich_help_panel=_ASKED),
]
Scoring = Annotated[str | None, typer.Option(help="auto, letters or continuation.", rich_help_panel=_ASKED)]
Template = Annotated[
    str | None,
    typer.Option(
        help='How its rows became prompts, "{text}\\nLabel:" if left out.', rich_help_panel=_ASKED,
        callback=lambda text: with_line_ends(text),
    ),
]  # fmt: skip
CHAT = "Use the chat template; --no-chat does not."
Chat = Annotated[bool | None, typer.Option("--chat/--no-chat", help=CHAT, rich_help_panel=_ASKED)]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of a row.", rich_help_panel=_ASKED)]


def asked_of(
    run: Path,
    data: str | Path | None,
    *,
    labels: str | None,
    scoring: str | None,
    template: str | None,
    chat: bool | None,
    max_length: int | None,
) -> Asked:
    """How the rows of an adapter without a record are scored: as the options say, and as the rows are.

    Args:
        run: the directory.
        data: the rows, which tell their labels, and whether they are prompts already.
        labels, scoring, template, chat, max_length: the options.

    Raises:
        UserError: what the options say is none, or the rows cannot be read.
    """
    from scalabl.core.files import read_if_whole
    from scalabl.data.load import labels_in
    from scalabl.data.template import template_of_prompts
    from scalabl.runs.record import CONFIG, RECORD
    from scalabl.runs.stock import Asked, has_head

    given = names_in(labels)
    asked = Asked(given, scoring, template, chat, max_length)
    config = read_if_whole(run / CONFIG)
    if data is None or (run / RECORD).is_file() or not isinstance(config, dict) or has_head(config):
        return asked
    if given is not None and template is not None:
        return asked
    shared, first = labels_in(data) if given is None else (given, None)
    if first is not None and first.rendered and template is None:
        template = template_of_prompts([first])
    return Asked(shared, scoring, template, chat, max_length)


def names_in(listed: str | None) -> tuple[str, ...] | None:
    """The names of an option "a,b,c"."""
    return None if listed is None else tuple(name.strip() for name in listed.split(","))


def with_line_ends(text: str | None) -> str | None:
    """A text of the command line, where a shell leaves a line's end as a backslash and an n."""
    return None if text is None else text.replace("\\n", "\n")


def refuse_unread(command: Callable[..., None], where: str, **given: Any) -> None:
    """Refuse options that a command would not read, where they are not at their defaults.

    Args:
        command: whose options they are.
        where: what they are for, and when to leave them out: the end of a sentence, without its full stop.
        given: their values, by name.

    Raises:
        UserError: one of them was given.
    """
    parameters = signature(command).parameters
    for name, value in given.items():
        if value not in (parameters[name].default, []):
            raise UserError(f"--{name.replace('_', '-')} is {where}.")


def require_counts(**given: int | None) -> None:
    """Refuse numbers below 1, by the names of their options; None is left out."""
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


def prediction_settings(
    record: RunRecord,
    *,
    predictive: str | None,
    samples: int,
    seed: int,
    draws: str,
    adaptive: bool,
    confidence: float,
    stochastic_layers: str | None,
    batch_size: int,
    limit: int | None = None,
    abstain: float | None = None,
    max_error: float | None = None,
    score: str = "probability",
    guarantee: str = "exact",
    priors: Path | None = None,
    raw: bool = False,
    max_false_alarms: float | None = None,
    oos_score: str | None = None,
    coverage: float | None = None,
    set_score: str = "lac",
    per_class: bool = False,
) -> PredictionSettings:
    """What the options of evaluate and predict say, refused where the run of a record cannot do it.

    Raises:
        UserError: bad values, or a run that has no such predictive, particles, layers, promise, scope or sets.
    """
    from scalabl.inference.promise import Promise, held_out_rows
    from scalabl.inference.scope import require_coverage, require_scope
    from scalabl.inference.settings import PredictionSettings, refuse_of_one_label

    method = record.method
    if record.several:
        refuse_of_one_label(**{"--adaptive": adaptive, "--priors": priors, "--coverage": coverage})
    if predictive not in (None, *PREDICTIVES):
        raise UserError(f"--predictive is {predictive!r}; it must be mean, mc or linearized, or auto, the default.")
    if predictive == "linearized" and method not in OVER_S:
        raise UserError("Only ScalaBL runs have a linearised predictive; use --predictive mean or mc.")
    if predictive == "mc" and method not in SAMPLED:
        raise UserError("This run is a plain LoRA without a posterior; use --predictive mean.")
    require_counts(samples=samples, batch_size=batch_size, limit=limit)
    sampling = Sampling(draws=draws, confidence=confidence if adaptive else None)
    sampled = predictive == "mc" or (predictive in (None, "auto") and method in SAMPLED)
    if adaptive and not sampled:
        raise UserError("--adaptive is for the mc predictive of runs that draw particles; leave it out here.")
    if draws != "independent" and not (sampled and method in OVER_S):
        raise UserError(f"--draws {draws} is for the mc predictive of ScalaBL runs; leave it out here.")
    if draws == "moments" and samples < 2:
        raise UserError("--draws moments needs at least 2 --samples: one particle has no variance to match.")
    if stochastic_layers is not None:
        check_spec(stochastic_layers, variance=True)
        if predictive == "mean" or method not in OVER_S:
            raise UserError(
                "--stochastic-layers is for the mc and linearized predictives of ScalaBL runs; leave it out here."
            )
    if abstain is not None and not 0 <= abstain <= 1:
        raise UserError(f"--abstain is {abstain}; it must be between 0 and 1.")
    if abstain is not None and max_error is not None:
        raise UserError("--abstain and --max-error both say when to answer; give one of them.")
    promise = None if max_error is None else Promise(max_error, confidence, score, guarantee)
    if promise is not None:
        promise.require(record, predictive)
    settings = PredictionSettings(
        predictive, samples, seed, sampling, stochastic_layers, abstain=abstain, promise=promise,
        priors=_priors(record, priors), raw=raw, max_false_alarms=max_false_alarms, oos_score=oos_score,
        coverage=coverage, set_score=set_score, per_class=per_class,
    )  # fmt: skip
    if max_false_alarms is not None:
        require_scope(record, max_false_alarms, oos_score, predictive)
    if coverage is not None:
        require_coverage(record, coverage, held_out_rows(record) if per_class else None)
    return settings


def _priors(record: RunRecord, path: Path | None) -> dict[str, float] | None:
    """The priors in a file, checked against the run's record.

    Raises:
        UserError: the run has no labels, or the file is none of its priors.
    """
    if path is None:
        return None
    from scalabl.data.class_balance import prior_ratios, read_priors

    if record.labels is None:
        raise UserError("--priors is of labels that all rows share, but this run has rows with choices; leave it out.")
    priors = read_priors(path, record.labels)
    prior_ratios(priors, record.class_counts)
    return priors


def with_settings(chosen: Mapping[str, Mapping[str, str]] | None = None) -> Callable[[Callable[..., None]], Any]:
    """Give a command the options of settings, behind its own of the first panel.

    Args:
        chosen: which settings, with "names" and "help" where an option is to have others; all that have one if None.

    Returns:
        a decorator of a command whose first argument is the dict of what was given, None for what was not.
    """
    options = {name: {} for name, each in FIELDS.items() if each.metadata["help"]} if chosen is None else chosen

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            command({name: values.pop(name) for name in options}, **values)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        below = [each for each in own if each.annotation.__metadata__[0].rich_help_panel]
        above = [each for each in own if each not in below]
        made = [_option(name, **changes) for name, changes in options.items()]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        signature = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*above, *made, *below)]
        run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        return run

    return decorate


def _option(name: str, names: str | None = None, help: str | None = None) -> inspect.Parameter:
    """A setting as a parameter of a command; None where it is not given, so that a recipe's value holds."""
    each, kind = FIELDS[name], kind_of(name)
    long = f"--{name.replace('_', '-')}"
    text = help or each.metadata["help"]
    if kind is bool:
        text += f" {long.replace('--', '--no-')} turns it off."
    elif help is None and each.default is not None:
        text += f" Default: {each.default}."
    shown = None if each.metadata["first"] or PLACES[name] is None else str(PLACES[name]).capitalize()
    declared = f"{long}/{long.replace('--', '--no-')}" if kind is bool else names or each.metadata["option"] or long
    read = with_line_ends if name == "template" else None
    option = typer.Option(*declared.split(","), help=text, rich_help_panel=shown, callback=read)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
