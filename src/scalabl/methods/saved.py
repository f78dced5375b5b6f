"""What a post-hoc method is fitted on, and where its numbers lie: DIR/posthoc/NAME/, JSON and safetensors, tied to the
run's adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.core.files import read_json, write_json, writing
from scalabl.data.example import Example
from scalabl.runs.method import PostHocMethod, Run
from scalabl.runs.registry import PLAIN_LORA
from scalabl.scoring.base import Encoded
from scalabl.scoring.trunk_store import with_stored_trunk

POST_HOC_DIRECTORY = "posthoc"


class SavedMethod(PostHocMethod):
    """A post-hoc method whose facts and tensors are files of the run."""

    def directory_of(self, run: Run) -> Path:
        """DIR/posthoc/NAME.

        Raises:
            UserError: the run was not loaded from a directory.
        """
        if run.directory is None:
            raise UserError(f"{self.name} is kept beside a run's adapter; load the run with load_run(DIR).")
        return run.directory / POST_HOC_DIRECTORY / self.name

    def save(self, run: Run, facts: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """Write what was fitted; the JSON file comes last, and that of an earlier fit goes first, so that half a fit is
        no fit.

        Returns:
            the facts, with the digest of the adapter that they belong to.
        """
        directory = self.directory_of(run)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{self.name}.json").unlink(missing_ok=True)
        if tensors is not None:
            with writing(directory / f"{self.name}.safetensors") as unfinished:
                save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, unfinished)
        whole = {**facts, "adapter_sha256": run.record.adapter_sha256}
        write_json(directory / f"{self.name}.json", whole)
        return whole

    def facts(self, run: Run) -> dict[str, Any]:
        """The facts that `save` wrote.

        Raises:
            UserError: the method was not fitted on this run, its file cannot be read, or the adapter has changed since.
        """
        path = self.directory_of(run) / f"{self.name}.json"
        missing = f"{self.name} was not fitted on the run in {run.directory}; call load_post_hoc({self.name!r}).fit."
        mend = f"fit {self.name} again"
        facts = read_json(path, missing=missing, mend=mend, expected=f"what {self.name} fitted; {mend}")
        if facts.get("adapter_sha256") != run.record.adapter_sha256:
            raise UserError(f"{path} was fitted on another adapter than the one in {run.directory}; {mend}.")
        return facts

    def tensors(self, run: Run) -> dict[str, Tensor]:
        """The tensors that `save` wrote, on the model's device.

        Raises:
            UserError: the file is missing or altered.
        """
        path = self.directory_of(run) / f"{self.name}.safetensors"
        try:
            return load_file(path, device=str(run.scorer.device))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is missing or altered; fit {self.name} again.") from error

    def encoded(self, run: Run, rows: Sequence[Example], *, batch_size: int = 8) -> list[Encoded]:
        """The training rows that a plain LoRA is refitted on, as tokens with the frozen layers' output.

        Raises:
            UserError: the run's adapter is no plain LoRA, it has a posterior or a sampler; or there are no rows.
        """
        trained_by = run.record.method
        if trained_by not in PLAIN_LORA:
            raise UserError(
                f"{self.name} is fitted on a plain LoRA, but this run was trained by {trained_by}; give an mle run."
            )
        if not rows:
            raise UserError(f"{self.name} is fitted on training rows, but there are none; give those of the run.")
        return with_stored_trunk(run.scorer, run.encode(list(rows)), batch_size=batch_size)
