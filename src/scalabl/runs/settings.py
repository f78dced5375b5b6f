"""The settings of a training run: name, default, range, help and panel of each, once. Imports nothing heavy.

From the fields here are derived the checks, the options of `scalabl train` and `scalabl plan`, and the reading of a
recipe, which is a YAML file of settings, flat or by panel. On disk (a run's record, a study's cells) they are flat.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from scalabl.core.errors import UserError
from scalabl.core.files import read_yaml
from scalabl.core.modules import check_spec
from scalabl.data.template import Template
from scalabl.runs.registry import SETTINGS, TRAINED

LARGEST_SEED = 2**32 - 1  # that torch and numpy both take
LARGEST = 1e30  # of a setting: float32, in which all is trained, ends at 3e38
KL_NORMALIZATIONS = ("token", "sequence")
QUANTIZATIONS = ("bitsandbytes", "torchao")
SCORINGS = ("auto", "letters", "continuation", "head")
ALL_LINEAR = "all-linear"  # of target_modules: as PEFT names them


class Range(NamedTuple):
    """The values that a setting may have, in words and as a test."""

    words: str
    contains: Callable[[Any], bool]


COUNT = Range("at least 1", lambda value: value >= 1)
POSITIVE = Range(f"a positive number, at most {LARGEST:g}", lambda value: 0 < value <= LARGEST)
NOT_NEGATIVE = Range(f"zero or more, at most {LARGEST:g}", lambda value: 0 <= value <= LARGEST)
NUMBER = Range(f"a number, at most {LARGEST:g} in size", lambda value: abs(value) <= LARGEST)
FRACTION = Range("between 0 and 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Range("between 0 and 1", lambda value: 0 <= value < 1)
SEED = Range("between 0 and 2^32 - 1", lambda value: 0 <= value <= LARGEST_SEED)

T = TypeVar("T")


def setting(
    default: T,
    help: str | None = None,
    within: Range | tuple[str, ...] | None = None,
    *,
    option: str | None = None,
    first: bool = False,
) -> T:
    """A field of the settings.

    Args:
        default: its value where nothing is given.
        help: of its option on the command line; None for one that only a recipe sets.
        within: its range, or its choices; None is always allowed where it is the default.
        option: the option's names, where they are not the setting's own.
        first: whether its option stands among those that most people need, instead of its panel.
    """
    metadata = {"help": help, "within": within, "option": option, "first": first}
    made: T = field(default=default, metadata=metadata)
    return made


class Checked:
    """Settings that are each in its own range.

    Raises:
        UserError: a value is out of its range; the sentence names it.
    """

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            value, within = getattr(self, each.name), each.metadata.get("within")
            if within is None or (value is None and each.default is None):
                continue
            if isinstance(within, Range):
                if not within.contains(value):
                    raise UserError(f"{each.name} is {value}; it must be {within.words}.")
            elif value not in within:
                raise UserError(f"{each.name} is {value!r}; it must be one of {', '.join(within)}.")


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def layer_fraction(layers: str) -> int | None:
    """The K of "last:K"; None for "all".

    Raises:
        UserError: it is neither.
    """
    if layers == "all":
        return None
    head, _, number = layers.partition(":")
    if head == "last" and number.isdecimal() and len(number) < 10 and int(number) >= 1:
        return int(number)
    raise UserError(f"layers is {layers!r}; it must be all or last:K, for example last:8.")


def check_bits(quantization: str, bits: int | None) -> None:
    """Refuse a combination that there is not; None for a base that is not quantised.

    Raises:
        UserError: the sentence says which there are.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"quantization is {quantization!r}; it must be one of {', '.join(QUANTIZATIONS)}.")
    if bits not in (None, 4, 8):
        raise UserError(f"bits is {bits}; it must be 4, 8 or left out.")
    if quantization == "torchao" and bits != 8:
        why = "bits is left out, so nothing would be quantised" if bits is None else "it holds 8 bit here"
        raise UserError(f"quantization is torchao, but {why}; set bits to 8, or quantization to bitsandbytes.")


@dataclass(frozen=True)
class OptimisationSettings(Checked):
    """How the likelihood is fitted."""

    steps: int = setting(200, "Optimiser steps.", COUNT, first=True)
    batch_size: int = setting(8, "Questions a step and device.", COUNT, first=True)
    gradient_accumulation: int = setting(1, "Batches a step.", COUNT)
    learning_rate: float = setting(1e-3, "For A and B.", POSITIVE, first=True)
    warmup: float = setting(0.06, "Part of the steps over which the learning rate rises.", BELOW_ONE)
    weight_decay: float = setting(0.0, "AdamW's, of A and B.", NOT_NEGATIVE)
    max_grad_norm: float = setting(1.0, "Longer gradients are cut to this; 0 cuts none.", NOT_NEGATIVE)
    gradient_checkpointing: bool = setting(False, "Less memory, more time.")
    optimizer: str = setting("adamw_torch", "As Trainer names it, for example paged_adamw_8bit.")
    class_weights: str | None = setting(None, "Of a head's likelihood: balanced, or a JSON file {label: weight}.")


@dataclass(frozen=True)
class PosteriorSettings(Checked):
    """The Gaussian over s, its prior and the weight of its KL."""

    variational_learning_rate: float = setting(2e-2, "For means and sigmas of s.", POSITIVE)
    beta: float = setting(1.0, "Multiplies the KL; 1 is the exact ELBO.", NOT_NEGATIVE)
    schedule: str = setting("elbo", "Of the KL's weight: elbo, warmup or minibatch.", ("elbo", "warmup", "minibatch"))
    kl_warmup: float = setting(0.1, "Part of the steps over which the KL's weight rises.", FRACTION)
    covariance: str = setting("diagonal", "diagonal or full.", ("diagonal", "full"))
    prior_std: float = setting(0.2, "Of the prior on each s.", POSITIVE)
    empirical_prior: bool = setting(False, "Fit each layer's prior std.")
    init_sigma: float = setting(0.1, "Of each s at the first step.", POSITIVE)
    unit_rows: bool = setting(True)
    draws: str = setting("sequence", within=("sequence", "batch"))
    kl: str = setting("reverse", within=("reverse", "forward"))
    stochastic_modules: str | None = setting(None, "Draw s in these alone, for example v_proj.")
    stochastic_layers: str | None = setting(None, "Draw s in these alone: last:K, last:0.25.")
    # where LoRA's draw puts every s: the singular values of A are near 1 / sqrt(3)
    prior_mean: float = setting(0.577, "Of the prior on each s; 0.577 is where s begins.", NUMBER)
    # rows of text: what the KL is divided by, trained tokens (the exact ELBO) or rows
    kl_normalization: str = setting(
        "token", "Of rows of text: KL / trained tokens (token, exact) or rows (sequence).", KL_NORMALIZATIONS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stochastic_layers is not None:
            check_spec(self.stochastic_layers)
        if self.stochastic == []:
            raise UserError("stochastic_modules names no module; name at least one, or leave it out for all of them.")
        if self.kl == "forward" and (self.empirical_prior or self.covariance != "diagonal"):
            raise UserError(
                "kl is forward, which is for a diagonal covariance and a fixed prior, as in the reference code; set kl "
                "to reverse."
            )

    @property
    def stochastic(self) -> list[str] | None:
        """The names in `stochastic_modules`; None for all."""
        return None if self.stochastic_modules is None else _names(self.stochastic_modules)


@dataclass(frozen=True)
class AdapterSettings(Checked):
    """Where the LoRA layers lie, and how large they are."""

    r: int = setting(8, "LoRA's rank.", COUNT, option="--rank,-r", first=True)
    lora_alpha: float = setting(16, "LoRA's alpha.", POSITIVE)
    lora_dropout: float = setting(0.0, "Of the adapters' inputs.", BELOW_ONE)
    target_modules: str = setting("q_proj,v_proj", "For example q_proj,v_proj; all-linear, an encoder's default.")
    layers: str = setting("all", "all, or last:K.")

    def __post_init__(self) -> None:
        super().__post_init__()
        layer_fraction(self.layers)
        if not self.targets:
            raise UserError("target_modules is empty; name the modules to adapt, for example q_proj,v_proj.")

    @property
    def targets(self) -> list[str]:
        """The names in `target_modules`."""
        return _names(self.target_modules)


@dataclass(frozen=True)
class RowSettings(Checked):
    """Which rows are read, and how they are scored."""

    scoring: str = setting("auto", f"{', '.join(SCORINGS[:-1])} or {SCORINGS[-1]}.", SCORINGS)
    normalization: str = setting(
        "auto", "Of continuations: log-probability summed (sum) or a token (token), or auto.", ("auto", "sum", "token")
    )
    template: str | None = setting(
        None, 'How a row becomes a prompt, "{text}\\nLabel:" for texts with a label; \\n is a line\'s end.'
    )
    chat: bool = setting(False, "Use the chat template.")
    max_length: int = setting(300, "Tokens a row.", COUNT)
    train_rows: int | None = setting(None, "Take so many training rows.", COUNT)
    rows_per_class: int | None = setting(None, "Take so many training rows of each label.", COUNT)
    validation_rows: int = setting(
        300,
        "At most, of the data's own split or held out of the training rows.",
        Range("zero or more", lambda value: value >= 0),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None:
            Template(self.template)  # refuses what is none


@dataclass(frozen=True)
class MachineSettings(Checked):
    """What the machine is to bear."""

    dtype: str = setting("auto", "auto, float32, bfloat16 or float16.", ("auto", "float32", "bfloat16", "float16"))
    bits: int | None = setting(None, "Load the base in 4 or 8 bit.")
    save_steps: int = setting(50, "Steps between checkpoints.", COUNT)
    quantization: str = setting("bitsandbytes", "Quantises for --bits: bitsandbytes or torchao (8).", QUANTIZATIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.quantization, self.bits)

    @property
    def of_base(self) -> dict[str, Any]:
        """How the base model is loaded: keywords of `load_base`."""
        return {"dtype": self.dtype, "bits": self.bits, "quantization": self.quantization}


@dataclass(frozen=True)
class Settings(Checked):
    """Everything that decides the outcome of a training run.

    Raises:
        UserError: a value is out of its range; the sentence names it.
    """

    model: str = setting(
        "smollm2-135m-instruct", "A directory, a Hub id, smollm2-135m-instruct or minilm-l6.", first=True
    )
    data: str = setting(
        "arc-easy", "A benchmark or nq-open, triviaqa, sciq; a JSONL file, or a directory of them.", first=True
    )
    method: str = setting("scalabl", f"{', '.join(TRAINED[:-1])} or {TRAINED[-1]}.", TRAINED, first=True)
    optimisation: OptimisationSettings = OptimisationSettings()
    posterior: PosteriorSettings = PosteriorSettings()
    adapter: AdapterSettings = AdapterSettings()
    rows: RowSettings = RowSettings()
    seed: int = setting(0, "Of initialisation, order and draws.", SEED, first=True)
    machine: MachineSettings = MachineSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        adapted = {target.rpartition(".")[2] for target in self.adapter.targets}
        for name in self.posterior.stochastic or ():
            if adapted != {ALL_LINEAR} and name.rpartition(".")[2] not in adapted:
                raise UserError(
                    f"stochastic_modules names {name}, which target_modules ({self.adapter.target_modules}) does not "
                    "adapt."
                )

    @classmethod
    def flat(cls, **values: Any) -> Settings:
        """Settings from their names, whichever panel they belong to; the others keep their defaults."""
        panels: dict[str | None, dict[str, Any]] = {name: {} for name in (None, *PANELS)}
        for name, value in values.items():
            panels[PLACES[name]][name] = value
        top = panels.pop(None)
        return cls(**top, **{str(name): PANELS[str(name)](**given) for name, given in panels.items()})

    def changed(self, **values: Any) -> Settings:
        """These settings but for some of them, by their names."""
        return Settings.flat(**self.as_dict() | values)

    def as_dict(self) -> dict[str, Any]:
        """Plain values by their names, in the order of a run's record."""
        return {name: getattr(self if panel is None else getattr(self, panel), name) for name, panel in PLACES.items()}


PANELS: dict[str, Any] = {f.name: type(f.default) for f in fields(Settings) if is_dataclass(f.default)}  # type: ignore[misc]
# settings that came after the others of their panel: records name them last
_LATER = ("kl_normalization", "prior_mean", "class_weights", "rows_per_class", "template")


def _fields() -> dict[str, tuple[str | None, Field[Any]]]:
    """Every setting: its panel (None for one of `Settings` itself) and its field."""
    found: dict[str, tuple[str | None, Field[Any]]] = {}
    for each in fields(Settings):
        panel = PANELS.get(each.name)
        found |= {each.name: (None, each)} if panel is None else {f.name: (each.name, f) for f in fields(panel)}  # type: ignore[arg-type]
    return dict(sorted(found.items(), key=lambda item: _LATER.index(item[0]) + 1 if item[0] in _LATER else 0))


FIELDS: dict[str, Field[Any]] = {name: each for name, (_, each) in _fields().items()}
PLACES: dict[str, str | None] = {name: panel for name, (panel, _) in _fields().items()}
DEFAULTS: dict[str, Any] = {name: each.default for name, each in FIELDS.items()}
# what held in records that are older than a setting, where its default is another
BEFORE: dict[str, Any] = {"prior_mean": 0.0}


def make_settings(values: Mapping[str, Any], recipe: Path | None = None) -> Settings:
    """Settings from a recipe, overridden by the values that are not None; the method's own come first.

    Args:
        values: by name.
        recipe: a YAML file of settings, flat or by panel.

    Raises:
        UserError: the file cannot be read, or names something that is no setting.
    """
    named: dict[str, Any] = {}
    if recipe is not None:
        form = "settings as name: value lines"
        content = read_yaml(recipe, missing=f"There is no recipe {recipe}.", mend=f"write {form}", expected=form)
        for name, value in content.items():
            of_panel = value if name in PANELS and isinstance(value, dict) else {name: value}
            if twice := sorted(map(str, named.keys() & of_panel.keys())):
                raise UserError(f"{recipe} names {twice[0]} twice, once in its panel; keep one of them.")
            named |= of_panel
    named |= {name: value for name, value in values.items() if value is not None}
    named = SETTINGS.get(str(named.get("method")), {}) | named
    for name in named:
        if name not in FIELDS:
            close = difflib.get_close_matches(str(name), FIELDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise UserError(f"{recipe or 'The recipe'} names {name!r}, which is no setting{hint}")
    return Settings.flat(**{name: typed_setting(name, value) for name, value in named.items()})


def kind_of(name: str) -> Any:
    """The type of a setting's values: int, float, str or bool."""
    return {"int": int, "float": float, "str": str, "bool": bool}[str(FIELDS[name].type).split(" ")[0]]


def typed_setting(name: str, value: Any) -> Any:
    """YAML reads 1e-4 as text and 16 as a whole number: bring a value to the setting's own type.

    Raises:
        UserError: it cannot be one.
    """
    wanted = kind_of(name)
    if name in ("target_modules", "stochastic_modules") and isinstance(value, list):
        return ",".join(map(str, value))
    if value is None and FIELDS[name].default is None:
        return None
    word = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[wanted]
    wrong = UserError(f"{name} is {value!r}; it must be {word}.")
    if value is None or isinstance(value, list | dict) or isinstance(value, bool) != (wanted is bool):
        raise wrong
    try:
        converted = wanted(value)
        whole = wanted is not int or converted == float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error
    if not whole:
        raise wrong
    return converted
