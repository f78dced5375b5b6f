"""What the fields of an adapter's configuration may hold, checked when the file is read. Imports no torch.

PEFT takes whatever JSON it finds, and fails far from it or not at all. Fields that are not named here are PEFT's own
business: they change nothing that is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from scalabl.core.errors import UserError
from scalabl.core.modules import check_spec
from scalabl.runs.patterns import require_patterns
from scalabl.runs.settings import BELOW_ONE, COUNT, NOT_NEGATIVE, NUMBER, POSITIVE, Range

_MEND = "restore the file"
_OF_LORA = ("LORA", "SCALABL", "SCALABL_BLOB")


class Kind(NamedTuple):
    """The values that a field may have: of a type, in words and as a test, and in a range."""

    words: str
    fits: Callable[[Any], bool]
    within: Range | None = None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _by_pattern(fits: Callable[[Any], bool], within: Range) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(fits(v) and within.contains(v) for v in value.values())


def _one_of(*choices: str) -> Kind:
    return Kind(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


_TEXT = Kind("a text", _is_text)
_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_NAMES = Kind("a list of names", _list_of(_is_text))
_PATTERN = Kind("a pattern, or a list of names", lambda value: _is_text(value) or _list_of(_is_text)(value))
_MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))

# what a field that is there must be; None too where it is in the second table
_FIELDS: dict[str, Kind] = {
    "r": Kind("a whole number", _is_whole, COUNT),
    "lora_alpha": Kind("a number", _is_number, NUMBER),
    "lora_dropout": Kind("a number", _is_number, BELOW_ONE),
    "bias": _one_of("none", "all", "lora_only"),
    "fan_in_fan_out": _FLAG,
    "use_rslora": _FLAG,
    "inference_mode": _FLAG,
    "covariance": _one_of("diagonal", "full"),
    "prior_mean": Kind("a number", _is_number, NUMBER),
    "prior_std": Kind("a number", _is_number, POSITIVE),
    "init_sigma": Kind("a number", _is_number, POSITIVE),
    "init_eps": Kind("a number", _is_number, NOT_NEGATIVE),
    "empirical_prior": _FLAG,
    "unit_rows": _FLAG,
    "draws": _one_of("sequence", "batch"),
}
_OR_NULL: dict[str, Kind] = {
    "peft_type": _TEXT,
    "task_type": _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "peft_version": _TEXT,
    "base_fingerprint": _TEXT,
    "auto_mapping": _MAPPING,
    "init_lora_weights": Kind("true, false or a name", lambda value: isinstance(value, bool | str)),
    "target_modules": _PATTERN,
    "exclude_modules": _PATTERN,
    "modules_to_save": _NAMES,
    "layers_pattern": _PATTERN,
    "layers_to_transform": Kind(
        "a whole number, or a list of them", lambda value: _is_whole(value) or _list_of(_is_whole)(value)
    ),
    "rank_pattern": Kind("a mapping of whole numbers, at least 1", _by_pattern(_is_whole, COUNT)),
    "alpha_pattern": Kind("a mapping of numbers", _by_pattern(_is_number, NUMBER)),
    "stochastic_modules": _PATTERN,
    "stochastic_layers": _TEXT,
}


def require_sound(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration with a value that no adapter has.

    Args:
        config: as JSON.
        where: its file, for the message.

    Raises:
        UserError: a field is missing, a value is of another kind than its field's or out of its range, or a pattern
            could run for long; the sentence names the field.
    """
    if config.get("peft_type") in _OF_LORA and (lost := [name for name in ("r", "lora_alpha") if name not in config]):
        raise UserError(f"{where} has no {lost[0]}; {_MEND}.")
    for name, value in config.items():
        kind = _FIELDS.get(name) or _OR_NULL.get(name)
        if kind is None or (value is None and name in _OR_NULL):
            continue
        shown = f"{where}: {name} is {repr(value)[:80]}"
        if not kind.fits(value):
            raise UserError(f"{shown}; it must be {kind.words}; {_MEND}.")
        if kind.within is not None and not kind.within.contains(value):
            raise UserError(f"{shown}; it must be {kind.within.words}; {_MEND}.")
    if config.get("stochastic_layers") is not None:
        try:
            check_spec(config["stochastic_layers"])
        except UserError as error:
            raise UserError(f"{where}: {str(error).rstrip('.')}; {_MEND}.") from error
    require_patterns(config, where)
