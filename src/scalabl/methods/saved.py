"""Where a post-hoc method's numbers lie: DIR/posthoc/NAME/, JSON and safetensors, tied to the run's adapter.

How the fit of a post-hoc method on training rows begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.core.files import read_json, write_json, writing
from scalabl.data.example import Example
from scalabl.scoring.base import Encoded
from scalabl.scoring.trunk_store import with_stored_trunk

if TYPE_CHECKING:
    from scalabl.runs.method import Run

if TYPE_CHECKING:
    from scalabl.runs.method import Run


POST_HOC_DIRECTORY = "posthoc"


def directory_of(run: Run, method: str) -> Path:
    """DIR/posthoc/NAME.

    Raises:
        UserError: the run was not loaded from a directory.
    """
    if run.directory is None:
        raise UserError(f"{method} is kept beside a run's adapter; load the run with load_run(DIR).")
    return run.directory / POST_HOC_DIRECTORY / method


def save(run: Run, method: str, facts: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Write what was fitted; the JSON file comes last, so that half a fit is no fit.

    Returns:
        the facts, with the digest of the adapter that they belong to.
    """
    directory = directory_of(run, method)
    directory.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        with writing(directory / f"{method}.safetensors") as unfinished:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, unfinished)
    whole = {**facts, "adapter_sha256": run.record.get("adapter_sha256")}
    write_json(directory / f"{method}.json", whole)
    return whole


def is_fitted(run: Run, method: str) -> bool:
    """Whether the method was fitted on this very adapter."""
    try:
        load_facts(run, method)
    except UserError:
        return False
    return True


def load_facts(run: Run, method: str) -> dict[str, Any]:
    """The facts that `save` wrote.

    Raises:
        UserError: the method was not fitted on this run, its file cannot be read, or the adapter has changed since.
    """
    path = directory_of(run, method) / f"{method}.json"
    missing = f"{method} was not fitted on the run in {run.directory}; call scalabl.runs.registry.{method}.fit."
    mend = f"fit {method} again"
    facts = read_json(path, missing=missing, mend=mend, holds=f"what {method} fitted; {mend}")
    if facts.get("adapter_sha256") != run.record.get("adapter_sha256"):
        raise UserError(f"{path} was fitted on another adapter than the one in {run.directory}; fit {method} again.")
    return facts


def load_tensors(run: Run, method: str) -> dict[str, Tensor]:
    """The tensors that `save` wrote, on the model's device.

    Raises:
        UserError: the file is missing or altered.
    """
    path = directory_of(run, method) / f"{method}.safetensors"
    try:
        return load_file(path, device=str(run.scorer.device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or altered; fit {method} again.") from error


def require_plain_lora(run: Run, method: str) -> None:
    """Refuse a run whose adapter is not a plain LoRA.

    Raises:
        UserError: it has a posterior or a sampler of its own.
    """
    trained_by = run.record["recipe"]["method"]
    if trained_by not in ("mle", "map", "mc_dropout"):
        raise UserError(
            f"{method} is fitted on a plain LoRA, but this run was trained by {trained_by}; give an mle run."
        )


def encoded_training_rows(run: Run, method: str, rows: Sequence[Example], *, batch_size: int = 8) -> list[Encoded]:
    """The rows that a plain LoRA is refitted on, as tokens with the frozen layers' output.

    Args:
        run: the loaded run.
        method: for the sentence of a refusal.
        rows: training rows.
        batch_size: rows at a time.

    Raises:
        UserError: the run is no plain LoRA, or there are no rows.
    """
    require_plain_lora(run, method)
    if not rows:
        raise UserError(f"{method} is fitted on training rows, but there are none; give those of the run.")
    return with_stored_trunk(run.scorer, run.encode(list(rows)), batch_size=batch_size)
