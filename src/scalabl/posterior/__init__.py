"""The Gaussian over the r numbers s of a layer: diagonal or full, its prior, its KL divergence, its draws.

The mathematics alone: nothing here knows of transformers or PEFT.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
