"""A training recipe: everything that decides a run, checked before any long work. Imports nothing heavy."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import read_yaml
from scalabl.core.top_layers import check_spec
from scalabl.runs.quantization import QUANTIZATIONS, check_bits
from scalabl.runs.registry import SETTINGS
from scalabl.runs.registry import TRAINED as METHODS

SCORINGS = ("auto", "letters", "continuation")
SCHEDULES = ("elbo", "warmup", "minibatch")
COVARIANCES = ("diagonal", "full")
DRAWS = ("sequence", "batch")
KLS = ("reverse", "forward")
NORMALIZATIONS = ("auto", "sum", "token")
KL_NORMALIZATIONS = ("token", "sequence")
LARGEST_SEED = 2**32 - 1  # that torch and numpy both take
LARGEST = 1e30  # of a setting: float32, in which all is trained, ends at 3e38
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run.

    Raises:
        UserError: a value is out of its range; the sentence names it.
    """

    model: str = "smollm2-135m-instruct"
    data: str = "arc-easy"
    method: str = "scalabl"
    # optimisation
    steps: int = 200
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    optimizer: str = "adamw_torch"
    # the posterior
    variational_learning_rate: float = 2e-2
    beta: float = 1.0
    schedule: str = "elbo"
    kl_warmup: float = 0.1
    covariance: str = "diagonal"
    prior_std: float = 1.0
    empirical_prior: bool = False
    init_sigma: float = 0.05
    unit_rows: bool = True
    draws: str = "sequence"
    kl: str = "reverse"
    stochastic_modules: str | None = None
    stochastic_layers: str | None = None
    # the adapter
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str = "q_proj,v_proj"
    layers: str = "all"
    # the rows
    scoring: str = "auto"
    normalization: str = "auto"
    chat: bool = False
    max_length: int = 300
    train_rows: int | None = None
    validation_rows: int = 300
    # the machine
    seed: int = 0
    dtype: str = "auto"
    bits: int | None = None
    save_steps: int = 50
    quantization: str = "bitsandbytes"
    # rows of text: what the KL is divided by, trained tokens (the exact ELBO) or rows
    kl_normalization: str = "token"
    # the posterior, again: 0.577 is where LoRA's draw puts every s (the singular values of A are near 1 / sqrt(3))
    prior_mean: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", METHODS),
            ("scoring", SCORINGS),
            ("schedule", SCHEDULES),
            ("covariance", COVARIANCES),
            ("draws", DRAWS),
            ("kl", KLS),
            ("normalization", NORMALIZATIONS),
            ("dtype", DTYPES),
            ("quantization", QUANTIZATIONS),
            ("kl_normalization", KL_NORMALIZATIONS),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        for name in ("steps", "batch_size", "gradient_accumulation", "r", "save_steps", "max_length"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "variational_learning_rate", "prior_std", "init_sigma", "lora_alpha"):
            value = getattr(self, name)
            _require(name, value, 0 < value <= LARGEST, f"a positive number, at most {LARGEST:g}")
        for name in ("beta", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            _require(name, value, 0 <= value <= LARGEST, f"zero or more, at most {LARGEST:g}")
        _require(
            "prior_mean", self.prior_mean, abs(self.prior_mean) <= LARGEST, f"a number, at most {LARGEST:g} in size"
        )
        _require("kl_warmup", self.kl_warmup, 0 <= self.kl_warmup <= 1, "between 0 and 1")
        _require("warmup", self.warmup, 0 <= self.warmup < 1, "between 0 and 1")
        _require("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "between 0 and 1")
        _require("validation_rows", self.validation_rows, self.validation_rows >= 0, "zero or more")
        _require("train_rows", self.train_rows, self.train_rows is None or self.train_rows >= 1, "at least 1")
        check_bits(self.quantization, self.bits)
        _require("seed", self.seed, 0 <= self.seed <= LARGEST_SEED, "between 0 and 2^32 - 1")
        layer_fraction(self.layers)
        if not self.targets:
            raise UserError("target_modules is empty; name the modules to adapt, for example q_proj,v_proj.")
        if self.stochastic_layers is not None:
            check_spec(self.stochastic_layers)
        if self.stochastic == []:
            raise UserError("stochastic_modules names no module; name at least one, or leave it out for all of them.")
        adapted = {target.rpartition(".")[2] for target in self.targets}
        for name in self.stochastic or ():
            if name.rpartition(".")[2] not in adapted:
                raise UserError(
                    f"stochastic_modules names {name}, which target_modules ({self.target_modules}) does not adapt."
                )
        if self.kl == "forward" and (self.empirical_prior or self.covariance != "diagonal"):
            raise UserError(
                "kl is forward, which is for a diagonal covariance and a fixed prior, as in the reference code; set kl "
                "to reverse."
            )

    @property
    def targets(self) -> list[str]:
        """The names in `target_modules`."""
        return _names(self.target_modules)

    @property
    def stochastic(self) -> list[str] | None:
        """The names in `stochastic_modules`; None for all."""
        return None if self.stochastic_modules is None else _names(self.stochastic_modules)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return asdict(self)

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Every setting's default."""
        return {field.name: field.default for field in fields(Recipe)}


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
    if head == "last" and number.isdigit() and int(number) >= 1:
        return int(number)
    raise UserError(f"layers is {layers!r}; it must be all or last:K, for example last:8.")


def make_recipe(values: dict[str, Any], config: Path | None = None) -> Recipe:
    """A recipe from a YAML file, overridden by the values that are not None; the method's own settings come first.

    Raises:
        UserError: the file cannot be read, or names something that is no setting.
    """
    merged: dict[str, Any] = {}
    if config is not None:
        form = "settings as name: value lines"
        merged |= read_yaml(config, missing=f"There is no recipe {config}.", mend=f"write {form}", holds=form)
    merged |= {name: value for name, value in values.items() if value is not None}
    known = {f.name: f for f in fields(Recipe)}
    merged = SETTINGS.get(str(merged.get("method")), {}) | merged
    for name, value in merged.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise UserError(f"{config or 'The recipe'} names {name!r}, which is no setting{hint}")
        merged[name] = typed_setting(name, value)
    return Recipe(**merged)


def typed_setting(name: str, value: Any) -> Any:
    """YAML reads 1e-4 as text and 16 as a whole number: bring a value to the setting's own type.

    Raises:
        UserError: it cannot be one.
    """
    kind = str(next(f.type for f in fields(Recipe) if f.name == name))
    if name in ("target_modules", "stochastic_modules") and isinstance(value, list):
        return ",".join(map(str, value))
    if value is None and "None" in kind:
        return None
    wanted: Any = {"int": int, "float": float, "str": str, "bool": bool}[kind.split(" ")[0]]
    word = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[wanted]
    if value is None or isinstance(value, list | dict):
        raise UserError(f"{name} is {value!r}; it must be {word}.")
    if wanted is bool:
        if not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}; it must be {word}.")
        return value
    try:
        converted = wanted(value)
        whole = wanted is not int or converted == float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is {value!r}; it must be {word}.") from error
    if isinstance(value, bool) or not whole:
        raise UserError(f"{name} is {value!r}; it must be {word}.")
    return converted


def _require(name: str, value: Any, holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value}; it must be {what}.")
