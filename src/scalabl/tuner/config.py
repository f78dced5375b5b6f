"""ScalaBLConfig: LoraConfig with a posterior."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from scalabl.core.errors import UserError
from scalabl.core.modules import check_spec
from scalabl.posterior.gaussian import POSTERIORS, Prior
from scalabl.tuner.mean_adapter import (
    MEAN_DIRECTORY,
    fold,
    refuse_pickled_weights,
    remove_mean_adapter,
    write_plain_adapter,
)


class ScalaBLType(str):
    """PEFT's `peft_type` of this tuner: a string with the `value` and `name` that enum members have."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)


SCALABL = ScalaBLType("SCALABL")

# LoraConfig's options whose meaning is unchanged here, each covered by a test; every other one is refused.
SUPPORTED_LORA_OPTIONS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
}  # fmt: skip


@dataclass
class ScalaBLConfig(LoraConfig):
    """The configuration of a ScalaBL adapter: LoRA's own options and the posterior over s.

    Args:
        covariance: "diagonal" (2 r numbers a layer, the paper's default) or "full" (r (r + 3) / 2).
        prior_mean: mean of the Gaussian prior on each s_j; by default where LoRA's draw puts every s, 1 / sqrt(3)
            [ScalaBL: 0].
        prior_std: its standard deviation, positive: the noise that is expected before any data are seen, by default a
            third of s [ScalaBL: 1].
        empirical_prior: take for each layer the prior std of the highest ELBO, sqrt(mean_j(mu_j^2 + sigma_j^2)),
            instead of `prior_std` (empirical Bayes).
        init_sigma: sigma starts as U(init_sigma / sqrt(2), init_sigma) [ScalaBL: 0.05].
        unit_rows: keep the rows of A at unit length in the forward pass. Without it (the paper's form) A and s
            share a free scale: the KL can be lowered by moving scale from s into A at no cost in likelihood.
        draws: while training, one draw of s a "sequence", or one a "batch", shared by its rows (the reference code).
        stochastic_modules: the modules, by the end of their path, whose s is uncertain; the other adapted ones are
            plain LoRA. All of them if None.
        stochastic_layers: the layers whose s is uncertain, "last:K" of these modules' or a fraction "last:0.25"; what
            is adapted behind the decoder layers (lm_head) is the last. All of them if None.
        base_fingerprint: written when the adapter is made, checked when it is loaded onto a base model.

    Raises:
        UserError: a value out of range, or an option of LoRA that this tuner does not support.
    """

    covariance: Literal["diagonal", "full"] = field(
        default="diagonal", metadata={"help": "Covariance of the posterior over s: diagonal or full."}
    )
    prior_mean: float = field(default=0.577, metadata={"help": "Mean of the prior on each s."})
    prior_std: float = field(default=0.2, metadata={"help": "Standard deviation of the prior on each s."})
    empirical_prior: bool = field(
        default=False, metadata={"help": "Take each layer's prior std from its posterior (empirical Bayes)."}
    )
    init_sigma: float = field(default=0.1, metadata={"help": "Upper end of the uniform initial sigma."})
    unit_rows: bool = field(default=True, metadata={"help": "Keep the rows of A at unit length."})
    draws: Literal["sequence", "batch"] = field(
        default="sequence", metadata={"help": "One draw of s a sequence, or one a batch."}
    )
    stochastic_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Ends of the names of the modules whose s is uncertain; all adapted ones if None."},
    )
    stochastic_layers: str | None = field(
        default=None, metadata={"help": "last:K or last:FRACTION: the layers whose s is uncertain; all if None."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Identity of the base model that the adapter was trained on."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SCALABL  # type: ignore[assignment]
        if self.covariance not in POSTERIORS:
            raise UserError(f"covariance is {self.covariance!r}; it must be one of {', '.join(POSTERIORS)}.")
        for r in (self.r, *(self.rank_pattern or {}).values()):
            if r < 1:
                raise UserError(f"r is {r}; it must be a positive integer, 8 is the usual choice.")
        if not (math.isfinite(self.init_sigma) and self.init_sigma > 0):
            raise UserError(f"init_sigma is {self.init_sigma}; it must be positive, 0.1 is the default.")
        if self.draws not in ("sequence", "batch"):
            raise UserError(f"draws is {self.draws!r}; it must be sequence or batch.")
        if self.stochastic_modules is not None:
            names = self.stochastic_modules
            self.stochastic_modules = [names] if isinstance(names, str) else list(names)
            if not self.stochastic_modules or not all(self.stochastic_modules):
                raise UserError(
                    "stochastic_modules names no module; name at least one, or leave it out for all of them."
                )
        if self.stochastic_layers is not None:
            check_spec(self.stochastic_layers)
        _ = self.prior
        refuse_unsupported(self)

    @property
    def prior(self) -> Prior:
        """The prior p(s), checked."""
        return Prior(self.prior_mean, self.prior_std, self.empirical_prior)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and `mean/`, a plain LoRA of the weights just saved beside it.

        PEFT's `model.save_pretrained` writes the weights first. Transformers' own saving of an injected adapter (and
        a configuration saved alone) does not, so that a `mean/` of older weights is removed instead; nor does a
        Trainer write one, into a checkpoint or by `save_model`: where it resumes, it would take `mean/` for a second
        adapter. Write one afterwards with `write_mean_adapter`.

        Raises:
            UserError: the weights beside it were pickled (`safe_serialization=False`).
        """
        refuse_pickled_weights(save_directory)
        super().save_pretrained(save_directory, **kwargs)
        if "auto_mapping_dict" in kwargs and not _saved_by_trainer():  # PEFT's alone
            write_mean_adapter(save_directory, self)
        else:
            remove_mean_adapter(save_directory)


def _saved_by_trainer() -> bool:
    """Whether Transformers' Trainer, or one made of it, is what saves; it says so to nobody, but is among the callers.

    By name, since the module that has it imports PEFT, whose import loads this one.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "save_model":
            kinds = type(frame.f_locals.get("self")).__mro__
            if any(kind.__name__ == "Trainer" and kind.__module__.startswith("transformers.") for kind in kinds):
                return True
        frame = frame.f_back
    return False


def lora_defaults() -> dict[str, Any]:
    """LoraConfig's fields at their defaults."""
    plain = LoraConfig()
    return {f.name: getattr(plain, f.name) for f in fields(plain)}


def refuse_unsupported(config: LoraConfig) -> None:
    """Refuse LoRA's options that a stochastic A does not support.

    Raises:
        UserError: one of them is set.
    """
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise UserError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights or sets A and B itself, which "
            "the SVD initialisation of ScalaBL replaces; leave it at True."
        )
    for name, default in lora_defaults().items():
        if name in SUPPORTED_LORA_OPTIONS:
            continue
        value = getattr(config, name)
        if value != default and value:
            raise UserError(f"ScalaBL does not support LoRA's option {name}; remove it from the configuration.")


def write_mean_adapter(save_directory: str | Path, config: ScalaBLConfig) -> None:
    """Write `mean/` beside the adapter's weights; does nothing where there are none (a configuration alone)."""
    weights = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists():
        return
    plain = fold(load_file(weights), config.unit_rows, lambda _prefix, mean: mean)
    write_plain_adapter(Path(save_directory) / MEAN_DIRECTORY, plain, config)
