"""scalabl: LoRA fine-tuned language models that know what they do not know.

`import scalabl` registers the tuner with PEFT as soon as PEFT itself is imported, and costs nothing more: the names
of `__init__.pyi` are loaded when they are first used.
"""

import importlib

import lazy_loader
import wrapt

from scalabl.core import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# PEFT's registry is filled the moment PEFT is there, so that PeftModel.from_pretrained knows our adapters
wrapt.register_post_import_hook(lambda _peft: importlib.import_module("scalabl.tuner"), "peft")
