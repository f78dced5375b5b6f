"""From a plain LoRA and rows to a finished run with a posterior.

It is Laplace's (`laplace.py`), or variational inference on the mean and sigma of s alone, A and B frozen:

    maximise E_q[log p(y | x, s)] - KL(q || p),   q(s) = N(s_mu, Sigma), started at s_mu = 1       [ScalaBL, ELBO]

The trainer and the KL's callback are those of `scalabl train`. The mean moves too, so that the mean prediction does.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, LOG, sha256, write_json, writing
from scalabl.data.example import Example, Task
from scalabl.predictive.base import MeanPredictive, predict
from scalabl.runs.card import write_cards
from scalabl.runs.directory import posterior_warnings, reading_config
from scalabl.runs.loading import load_adapter, longest_row, require_base
from scalabl.runs.method import Run
from scalabl.runs.models import load_base, saved_tokenizer
from scalabl.runs.record import CONFIG, RowCounts, RunRecord, config_digest
from scalabl.runs.settings import Settings
from scalabl.runs.stock import is_stock
from scalabl.scoring.base import Encoded, Scoring
from scalabl.scoring.scorer import Scorer, make_scoring
from scalabl.scoring.trunk import Trunk
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.training.checkpoints import remove_checkpoints
from scalabl.training.choose_scoring import candidates, choose_scoring
from scalabl.training.features import fit_distance, write_features
from scalabl.training.monitors import finite
from scalabl.training.posthoc.laplace import fit_laplace, used_components
from scalabl.training.posthoc.settings import PosthocSettings, SourceAdapter, refuse_options
from scalabl.training.posthoc.svd import scalabl_config, scalabl_tensors
from scalabl.training.run import Calibrating, optimise, record_of, row_warnings, tell_prompt
from scalabl.tuner.config import SUPPORTED_LORA_OPTIONS, ScalaBLConfig
from scalabl.tuner.joint import save_joint, set_joint
from scalabl.tuner.layers import stochastic_layers, without_rows
from scalabl.tuner.mean_adapter import MEAN_DIRECTORY
from scalabl.tuner.model import fingerprint

# a finished run, rows, what the adapter itself said of them, whether they were held out
Judging = Callable[[Run, Sequence[Example], Tensor, bool], None]
# of the rows that choose a scoring, where the adapter does not say what it was trained with
_CHOOSING_ROWS = 300


def bayesianize(
    source: SourceAdapter,
    task: Task,
    rows: tuple[Example, ...],
    held_out: tuple[Example, ...],
    output: Path,
    settings: PosthocSettings,
    calibrate: Calibrating | None = None,
    *,
    tell: Callable[[str], None] | None = None,
    judge: Judging | None = None,
) -> RunRecord:
    """Fit the posterior and write a finished run directory; it appears whole or not at all.

    `mean/` of Laplace's result is the adapter as it was given, byte for byte.

    Args:
        source: the plain LoRA.
        task: where the rows are from.
        rows: labelled rows.
        held_out: rows that choose the precision of Laplace's prior, and the scoring where neither source nor settings
            name one; some of `rows` if none for the latter.
        output: an empty or missing directory.
        settings: what decides the posterior.
        calibrate, tell: as in `scalabl.training.run.train`.
        judge: called at the end with the finished run, rows, the adapter's own log class probabilities of them before
            anything was fitted, and whether they were held out; they are some of `rows` where none were.

    Returns:
        the run's record.

    Raises:
        UserError: the adapter cannot be made Bayesian, or the rows cannot be scored.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output) as unfinished:
        return _build(source, task, rows, held_out, unfinished, settings, calibrate, tell, judge)


def _build(
    source: SourceAdapter,
    task: Task,
    rows: tuple[Example, ...],
    held_out: tuple[Example, ...],
    directory: Path,
    settings: PosthocSettings,
    calibrate: Calibrating | None,
    tell: Callable[[str], None] | None,
    judge: Judging | None,
) -> RunRecord:
    own = source.trained_here  # the adapter's run, where these are its rows
    if own is not None and not (own.held_out_sha256 and own.took(rows, held_out)):
        own = None
    if own is not None:  # how they were taken, so that they can be taken again
        limits = {name: own.recipe[name] for name in ("train_rows", "rows_per_class", "validation_rows")}
        settings = replace(settings, training=settings.training.changed(**limits))
    training = settings.training
    config, plain = _source(source, training)
    of_head = source.record.labels if source.record and source.has_head else None
    several = of_head is not None and rows[0].answers is not None
    base, tokenizer = load_base(
        training.model, **training.machine.of_base, adapter=source.directory, labels=of_head, several=several
    )
    tensors = scalabl_tensors(plain, config, without_rows(base))
    if source.record:
        require_base(base, source.record)
    config.base_fingerprint = fingerprint(base)
    # on disk first: from here on it is an adapter like any other
    directory.mkdir()
    save_file(tensors, directory / ADAPTER, metadata={"format": "pt"})
    config.save_pretrained(str(directory))
    model = load_adapter(base, directory)
    adapted, found = sum(name.endswith(".direction") for name in tensors), len(stochastic_layers(model))
    if found != adapted:
        raise UserError(
            f"The adapter is for {adapted} layers, but the base model has {found} of them; give its own with --model."
        )
    set_seed(training.seed)

    labels = source.record.labels if source.record else task.labels
    trunk = Trunk(model)
    shared = trunk if trunk.depth else None
    scoring, nll = _scoring(source, settings, model, shared, tokenizer, rows, held_out, labels)
    tell_prompt(scoring, rows[0], tell)
    scorer = Scorer(model, scoring, shared)
    judged = list(held_out) or _some(rows)
    before = None if judge is None else _log_probs(scorer, judged, training.optimisation.batch_size)
    used_components(scorer)
    encoded = _encoded(scorer, rows, training.optimisation.batch_size)
    fit = partial(_laplace, held_out=held_out) if settings.method == "laplace" else _variational
    counts = RowCounts(train=len(rows), validation=len(held_out))
    begun = record_of(training, task, labels, counts, scoring, nll, model, config.base_fingerprint)
    if source.record:  # the priors that were learnt are those of its own rows
        begun = replace(begun, class_counts=source.record.class_counts)
    fitted = fit(source, scorer, encoded, settings, directory)
    if own is not None:
        begun = replace(begun, held_out_sha256=own.held_out_sha256)
        fitted["bayesianized"]["own_rows"] = True  # held-out rows that its LoRA was not trained on either
    fitted["warnings"] = row_warnings(encoded, scoring, rows, held_out)
    features = write_features(directory, fit_distance(scorer, encoded))
    digest = sha256(directory / ADAPTER)
    record = replace(
        begun, **fitted, status="finished", adapter_sha256=digest, config_sha256=config_digest(directory),
        features_sha256=features,
    )  # fmt: skip
    record = replace(record, warnings=posterior_warnings(directory, record))
    if saved_tokenizer(source.directory) is not None:  # it is read beside the new adapter too
        tokenizer.save_pretrained(str(directory))
    run = Run(record, Scorer(model, scoring, trunk), tokenizer, directory)
    if calibrate is not None:
        record = replace(record, calibration=calibrate(run, held_out))
    if judge is not None and before is not None:
        judge(replace(run, record=record), judged, before, bool(held_out))
    write_cards(directory, record)
    record.write(directory)
    return record


def _source(source: SourceAdapter, training: Settings) -> tuple[ScalaBLConfig, dict[str, Tensor]]:
    refuse_options({k: v for k, v in source.config.items() if k not in SUPPORTED_LORA_OPTIONS})
    with reading_config(source.directory):
        plain = PeftConfig.from_pretrained(str(source.directory))
        assert isinstance(plain, LoraConfig)
        config = scalabl_config(
            plain,
            covariance=training.posterior.covariance,
            prior_mean=training.posterior.prior_mean,
            prior_std=training.posterior.prior_std,
            init_sigma=training.posterior.init_sigma,
            empirical_prior=training.posterior.empirical_prior,
            draws=training.posterior.draws,
        )
    config.base_model_name_or_path = source.model
    try:
        return config, load_file(source.directory / ADAPTER)
    except SafetensorError as error:
        raise UserError(f"{source.directory / ADAPTER} is truncated or altered ({error}); restore the file.") from error


def _scoring(
    source: SourceAdapter,
    settings: PosthocSettings,
    model: PeftModel,
    trunk: Trunk | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[Example, ...],
    held_out: tuple[Example, ...],
    labels: tuple[str, ...] | None,
) -> tuple[Scoring, dict[str, float]]:
    """The run's own scoring, or the one under which the adapter itself has the lowest NLL, with every option's."""
    if source.has_head and source.record and is_stock(source.record):
        stated = source.record.scoring.get("several")
        if stated is not None and stated != (rows[0].answers is not None):
            kind, others = ('several "labels"', 'one "label"') if stated else ('one "label"', 'several "labels"')
            raise UserError(
                f"The configuration of {source.directory} or its base says {kind} a row (problem_type), but the rows "
                f"have {others}; give rows of its kind."
            )
        length = min(settings.training.rows.max_length, longest_row(model))
        return candidates(settings.training.changed(max_length=length), tokenizer, rows, labels, head=True)[0], {}
    if source.record and not settings.scoring_given:
        return make_scoring(source.record.scoring, tokenizer), {}
    options = candidates(settings.training, tokenizer, (*rows, *held_out), labels)
    longest = max((options[-1].encode(row) for row in rows[:50]), key=lambda row: sum(map(bool, row.segments)))
    Scorer(model, options[-1]).check_packing(longest)
    return choose_scoring(options, model, trunk, _some(held_out or rows))


def _some(rows: Sequence[Example]) -> list[Example]:
    return random.Random(0).sample(list(rows), min(_CHOOSING_ROWS, len(rows)))


def _encoded(scorer: Scorer, rows: Sequence[Example], batch_size: int) -> list[Encoded]:
    return with_stored_trunk(scorer, [scorer.scoring.encode(row) for row in rows], batch_size=batch_size)


def _log_probs(scorer: Scorer, rows: list[Example], batch_size: int) -> Tensor:
    """(1, n, C) of the adapter as it was given."""
    found = predict(scorer, _encoded(scorer, rows, batch_size), MeanPredictive(), batch_size=batch_size)
    return scorer.scoring.likelihood.questions(found)


def _laplace(
    source: SourceAdapter,
    scorer: Scorer,
    rows: list[Encoded],
    settings: PosthocSettings,
    directory: Path,
    held_out: Sequence[Example],
) -> dict[str, Any]:
    size, precision = settings.training.optimisation.batch_size, settings.prior_precision
    choosing = _encoded(scorer, held_out, size) if precision is None else []
    joint, facts = fit_laplace(scorer, rows, choosing, batch_size=size, prior_precision=precision)
    joint = joint.restricted(settings.structure)  # type: ignore[arg-type]
    set_joint(scorer.model, joint)
    config = scorer.model.peft_config[scorer.model.active_adapter]
    config.prior_mean, config.prior_std = 0.0, facts["prior_precision"] ** -0.5
    scorer.model.save_pretrained(str(directory))
    for name in (CONFIG, ADAPTER):  # the adapter as it was given, instead of its mean in other factors
        shutil.copyfile(source.directory / name, directory / MEAN_DIRECTORY / name)
    return {
        "recipe": settings.training.as_dict() | {"steps": 0, "prior_std": config.prior_std},
        "joint_sha256": save_joint(directory, joint),
        "predictive": "linearized",  # the Gaussian is the posterior of the linearised model [Immer et al. 2021]
        "bayesianized": _origin(source, settings) | {"structure": settings.structure} | facts,
    }


def _variational(
    source: SourceAdapter, scorer: Scorer, rows: list[Encoded], settings: PosthocSettings, directory: Path
) -> dict[str, Any]:
    model: PeftModel = scorer.model
    model.requires_grad_(False)
    for leaf in stochastic_layers(model).values():
        leaf.posterior.requires_grad_(True)
    log, _ = optimise(settings.training, directory, model, scorer.scoring, scorer.trunk, rows)
    model.eval()
    remove_checkpoints(directory)
    model.save_pretrained(str(directory))
    write_json(directory / LOG, finite(log))
    return {"bayesianized": _origin(source, settings)}


def _origin(source: SourceAdapter, settings: PosthocSettings) -> dict[str, Any]:
    return {"method": settings.method, "adapter_sha256": sha256(source.directory / ADAPTER)}
