"""A run's directory: whether it is free for a training, kept from a second one meanwhile, read without its model.

DIR/scalabl.json                 recipe, task, scoring, versions, status, sha256 of the adapter
DIR/adapter_model.safetensors    the adapter, with adapter_config.json
DIR/mean/                        a plain LoRA of the posterior mean (method scalabl)
DIR/joint_covariance.safetensors    covariance between layers (scalabl bayesianize)
DIR/features.safetensors         the distance to the training rows (a classification head)
DIR/training_log.json            what the trainer logged
DIR/checkpoints/                 while it runs

Where its base model's directory is: how a record names it, and how it is found again. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalabl.core.errors import UserError, one_line
from scalabl.core.files import ADAPTER, LOG, lock, read_if_whole, read_json, require_place
from scalabl.core.modules import split_leaf
from scalabl.runs.adapter_fields import require_sound
from scalabl.runs.record import CONFIG, RECORD, RunRecord
from scalabl.runs.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from scalabl.posterior.gaussian import Prior
    from scalabl.tuner.diagnostics import LayerSummary, LayerWeights


EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_ENCODER = "minilm-l6"
_NAMES = (EMBEDDED, EMBEDDED_ENCODER)
_PLAIN = "a plain LoRA: it has no posterior"
_OLDER = "the posterior has not converged ("  # older versions' records judge by the KL, which falls at every rate


def as_recorded(name: str) -> str:
    """A base model as a record names it: a directory by its whole path, other names as they are."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if name not in _NAMES and os.path.isdir(path) else name


def find_base(name: str, run: Path) -> str:
    """A run's base model where it is now.

    A relative path, as older records have it, is looked for from here, from the run's directory and from each of its
    parents; a whole path that is not there any more likewise by its ends, for a project that was moved. What is found
    is still held against the fingerprint of the run's base.

    Args:
        name: as a record or an adapter's configuration names it.
        run: the directory that it lies in.

    Returns:
        the directory; a name that is no path as it is.

    Raises:
        UserError: it is a path to no directory.
    """
    path = Path(os.path.expanduser(name))
    if name in _NAMES or path.is_dir():
        return name
    parts = path.parts[1:] if path.is_absolute() else path.parts
    ends = [Path(*parts[i:]) for i in range(len(parts))] if path.is_absolute() else [path]
    for place in (Path.cwd(), run.resolve(), *run.resolve().parents):
        for end in ends:
            if (place / end / "config.json").is_file():
                return str(place / end)
    if name.startswith((".", "/", "~")):
        raise UserError(
            f"The base model of {run} was in {name}, which is not there; say where it is with --model (model=... in "
            "Python)."
        )
    return name


def claim(directory: Path, settings: Settings, processes: int = 1) -> bool:
    """Make a directory ready for a run; True if it already holds this very run, finished.

    A run of other processes is the same one where batch size, accumulation and processes make the same rows a step.

    Args:
        directory: the run's.
        settings: its own.
        processes: how many train.

    Raises:
        UserError: it holds another run or other files, or cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; choose another --output.")
    if (directory / RECORD).exists():
        record, now = RunRecord.read(directory), settings.as_dict()
        different = [name for name, value in now.items() if record.recipe.get(name) != value]
        if as_recorded(record.model) == as_recorded(settings.model):
            different = [name for name in different if name != "model"]
        if processes != record.processes:
            _require_same_rows(directory, record, now, processes)
            different = [name for name in different if name not in _CUT]
        if different:
            name = different[0]
            raise UserError(
                f"{directory} holds another run ({name} was {record.recipe[name]}, now {now[name]}); "
                "choose another --output or delete it."
            )
        return record.is_finished
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty and holds no run; choose another --output.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}); choose another --output.") from error
    require_place(directory)
    return False


def begin(directory: Path, record: RunRecord, *, goes_on: bool) -> None:
    """Write the record of a run that begins, or goes on.

    Args:
        directory: the run's.
        record: what is known of it before training.
        goes_on: whether a checkpoint is there.

    Raises:
        UserError: what was begun has a head over other labels, other class weights, other rows, another base.
    """
    if goes_on:
        before = RunRecord.read(directory)
        of_head = {"labels": "labels", "several": "numbers of labels a row", "class_weights": "class weights"}
        of_all = {
            "trained_sha256": "training rows", "held_out_sha256": "validation rows", "base_fingerprint": "base weights",
            "scoring": "ways to score a row",
        }  # fmt: skip
        now = json.loads(json.dumps(record.as_dict()))  # as the one before was read
        others = [
            f"{words}, with which a head of these cannot go on"
            for name, words in of_head.items()
            if before.scoring.get(name) != now["scoring"].get(name)
        ]
        others += [
            f"{words}, and would go on as another run"
            for name, words in of_all.items()
            if (was := getattr(before, name)) is not None and was != now[name]
        ]
        if others:
            raise UserError(
                f"{directory} was begun with other {others[0]}; restore the files that it was begun with, or choose "
                "another --output."
            )
    record.write(directory)


def lock_directory(directory: Path) -> int | None:
    """Keep a second call from training into a run's directory as long as this process runs.

    The lock is on the directory itself, so that nothing is left of it when the process is killed.

    Returns:
        the open directory, closing which lets go of it; None where the system opens none.

    Raises:
        UserError: another process has locked it.
    """
    if os.name == "nt":
        return None
    opened = os.open(directory, os.O_RDONLY)
    try:
        lock(opened, f"Another call trains into {directory}; wait for its end, or choose another --output.")
    except UserError:
        os.close(opened)
        raise
    return opened


_CUT = ("batch_size", "gradient_accumulation")  # how the rows of a step are cut, beside the processes


def _require_same_rows(directory: Path, before: RunRecord, now: Mapping[str, Any], processes: int) -> None:
    was, wanted = (
        number * math.prod(recipe[name] for name in _CUT)
        for number, recipe in ((before.processes, before.recipe), (processes, now))
    )
    if was != wanted:
        cut = f"batch_size {now['batch_size']} x gradient_accumulation {now['gradient_accumulation']}"
        raise UserError(
            f"{directory} holds a run of {was} rows a step (in {before.processes} processes), but {cut} x {processes} "
            f"processes are {wanted}; choose a batch size that makes {was}, or another --output."
        )


# what Python and PEFT raise where a value is of another kind than they take it to be
_OF_VALUES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)


@contextmanager
def reading_config(directory: Path) -> Iterator[None]:
    """Context in which an adapter's configuration is read and used: what fails on one of its values is a sentence.

    Raises:
        UserError: the file is no JSON, or a value in it is none that an adapter has.
    """
    try:
        if isinstance(config := read_if_whole(directory / CONFIG), dict):
            require_sound(config, str(directory / CONFIG))
        yield
    except UserError:
        raise
    except _OF_VALUES as error:
        raise UserError(
            f"{directory / CONFIG} has a value that no adapter has ({one_line(error)[:200]}); restore the file."
        ) from error


def require_adapter(directory: Path) -> dict[str, Any]:
    """The configuration of a ScalaBL adapter or a plain LoRA as JSON; imports no torch.

    Raises:
        UserError: there is no adapter in the directory, or its configuration cannot be read.
    """
    config = adapter_config(directory, "scalabl train or save_pretrained")
    if config.get("peft_type") not in ("SCALABL", "LORA"):
        raise UserError(f"{directory / CONFIG} is not the configuration of a ScalaBL or LoRA adapter.")
    return config


def adapter_config(directory: Path, made_by: str) -> dict[str, Any]:
    """The configuration of an adapter of any kind, whose weights are there too.

    Args:
        directory: the adapter's.
        made_by: what makes such a directory, for the message.

    Raises:
        UserError: either file is missing, or the configuration cannot be read or has a value that no adapter has.
    """
    missing = f"{directory} holds no {{}}; give a directory made by {made_by}."
    config = read_json(
        directory / CONFIG,
        missing=missing.format(CONFIG),
        mend="restore the file",
        expected="an adapter's configuration; restore the file",
    )
    if not (directory / ADAPTER).is_file():
        raise UserError(missing.format(ADAPTER))
    require_sound(config, str(directory / CONFIG))
    return config


def saved_shapes(directory: Path) -> dict[str, list[int]]:
    """The shape of every tensor of an adapter's file, by its name there.

    Raises:
        UserError: the file is lost, truncated or altered.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / ADAPTER, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory / ADAPTER} is truncated or altered ({error}); restore the file.") from error


def describe_adapter(directory: Path) -> dict[str, Any]:
    """What `scalabl inspect` shows.

    Returns:
        base_model, target_modules, stochastic_modules, stochastic_layers (None for all), r, lora_alpha, covariance,
        prior, lora_parameters, variational_parameters, kl, layers (those with a posterior: name, r, mean, sigma, noise,
        prior_std, kl, effect; of a plain LoRA all, with None for what a posterior has), warnings.

    Raises:
        UserError: missing, truncated or altered files.
    """
    with reading_config(directory):
        return _described(directory, require_adapter(directory))


def posterior_warnings(
    directory: Path, record: RunRecord | None, layers: Sequence[LayerSummary] | None = None
) -> list[str]:
    """What is wrong with a run, each sentence once: its record's, and what its posterior and its training log say.
    `train`, `inspect`, `evaluate` and the card say the same.

    Args:
        directory: the run's, or an adapter's.
        record: the run's, which need not be written yet; None for an adapter without one.
        layers: a summary of every layer of its posterior, none for a plain LoRA; read from its file if None.

    Raises:
        UserError: missing, truncated or altered files.
    """
    from scalabl.tuner.diagnostics import drift_of, summarize, warnings_of

    if layers is None:
        with reading_config(directory):
            _, weights, prior = _read(directory, require_adapter(directory))
        layers = summarize(weights, prior)
    if record is None:
        return warnings_of(layers)
    log = read_if_whole(directory / LOG)
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    numbers = [{k: v for k, v in entry.items() if isinstance(v, int | float)} for entry in entries]
    kept = [sentence for sentence in record.warnings if not sentence.startswith(_OLDER)]
    drift = drift_of(numbers, record.recipe, record.bayesianized is not None)
    return list(dict.fromkeys([*kept, *warnings_of(layers, drift, record.predictive == "linearized")]))


def _read(directory: Path, config: dict[str, Any]) -> tuple[dict[str, Tensor], list[LayerWeights], Prior]:
    """The tensors of an adapter's file, what a summary of its layers is made from (none of a plain LoRA), its prior."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from scalabl.posterior.gaussian import Prior

    bayesian = config["peft_type"] == "SCALABL"
    try:
        tensors = load_file(directory / ADAPTER)
        weights = _stochastic_layers(tensors, config) if bayesian else []
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{directory / ADAPTER} is truncated or altered ({error}); restore the file.") from error
    if bayesian and not weights:
        raise UserError(f"{directory / ADAPTER} holds no posterior, it was altered; restore the file.")
    empirical = config.get("empirical_prior", False)
    return tensors, weights, Prior(config["prior_mean"], config["prior_std"], empirical) if bayesian else Prior()


def _described(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    from scalabl.tuner.diagnostics import summarize
    from scalabl.tuner.joint import load_joint

    bayesian = config["peft_type"] == "SCALABL"
    tensors, weights, prior = _read(directory, config)
    summaries = summarize(weights, prior)
    record = RunRecord.read(directory) if (directory / RECORD).is_file() else None
    joint = load_joint(directory) if bayesian else None
    correlated = 0.0 if joint is None else joint.kl(joint.restricted("layer"))  # what the layers' own KLs leave out
    variational = sum(t.numel() for n, t in tensors.items() if ".posterior." in n)
    targets = config.get("target_modules") or []
    return {
        "base_model": config.get("base_model_name_or_path"),
        "target_modules": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        "stochastic_modules": ", ".join(config.get("stochastic_modules") or ()) or None,
        "stochastic_layers": config.get("stochastic_layers"),
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "covariance": config.get("covariance"),
        "prior": _prior_in_words(prior) if bayesian else None,
        "lora_parameters": sum(t.numel() for n, t in tensors.items() if ".lora_" in n) - variational,
        "variational_parameters": variational,
        "kl": sum(s.kl for s in summaries) + correlated if bayesian else None,
        "layers": [asdict(s) for s in summaries] or _plain_layers(tensors),
        "warnings": posterior_warnings(directory, record, summaries) if bayesian else [_PLAIN],
    }


def _prior_in_words(prior: Prior) -> str:
    if prior.empirical:
        return f"N({prior.mean}, std^2), each layer's std from its posterior (empirical Bayes)"
    return f"N({prior.mean}, {prior.std}^2)"


def _stochastic_layers(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[LayerWeights]:
    from peft.utils.other import get_pattern_key

    from scalabl.tuner.diagnostics import LayerWeights
    from scalabl.tuner.mean_adapter import projection_rows, stored_leaves

    found = []
    for name, leaf in stored_leaves(tensors, config["covariance"]).items():
        patterns, r = config["alpha_pattern"], leaf.posterior.r
        alpha = patterns.get(get_pattern_key(patterns, name), config["lora_alpha"])
        rows = projection_rows(leaf.direction, config["unit_rows"])
        scaling = alpha / (r**0.5 if config["use_rslora"] else r)
        found.append(LayerWeights(name, leaf.posterior, rows, leaf.up, scaling))
    return found


def _plain_layers(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    empty = dict.fromkeys(("mean", "sigma", "noise", "prior_std", "kl", "effect"))
    layers = {split_leaf(name)[0]: tensor.shape[0] for name, tensor in tensors.items() if split_leaf(name)[1]}
    return [{"name": layer, "r": r, **empty} for layer, r in layers.items()]
