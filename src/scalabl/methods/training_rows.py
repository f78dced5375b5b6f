"""How the fit of a post-hoc method on training rows begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scalabl.errors import UserError
from scalabl.methods.saved import require_plain_lora
from scalabl.scoring import Encoded
from scalabl.tasks import Example
from scalabl.trunk_store import with_stored_trunk

if TYPE_CHECKING:
    from scalabl.loading import Run


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
