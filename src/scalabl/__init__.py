"""scalabl: LoRA fine-tuned language models that know what they do not know.

`import scalabl` registers the tuner with PEFT as soon as PEFT itself is imported, and costs nothing more: the names
below are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from scalabl.errors import UserError

__version__ = "0.1.0"

_PUBLIC = {
    "ScalaBLConfig": "scalabl.tuner",
    "ScalaBLModel": "scalabl.tuner",
    "kl_divergence": "scalabl.tuner",
    "mean": "scalabl.tuner",
    "particles": "scalabl.tuner",
    "sample": "scalabl.tuner",
    "stochastic_layers": "scalabl.tuner",
    "ELBOCallback": "scalabl.training.callback",
    "Classifier": "scalabl.classifier",
    "generate": "scalabl.generation.generate",
    "load_task": "scalabl.tasks",
}

if TYPE_CHECKING:
    from scalabl.classifier import Classifier as Classifier
    from scalabl.generation.generate import generate as generate
    from scalabl.tasks import load_task as load_task
    from scalabl.training.callback import ELBOCallback as ELBOCallback
    from scalabl.tuner import ScalaBLConfig as ScalaBLConfig
    from scalabl.tuner import ScalaBLModel as ScalaBLModel
    from scalabl.tuner import kl_divergence as kl_divergence
    from scalabl.tuner import mean as mean
    from scalabl.tuner import particles as particles
    from scalabl.tuner import sample as sample
    from scalabl.tuner import stochastic_layers as stochastic_layers

__all__ = ["UserError", "__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'scalabl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# PEFT's registry is filled the moment PEFT is there, so that PeftModel.from_pretrained knows our adapters
wrapt.register_post_import_hook(lambda _peft: importlib.import_module("scalabl.tuner"), "peft")
