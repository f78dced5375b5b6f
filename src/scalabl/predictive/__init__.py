"""How a posterior becomes predictions: one interface, one strategy a file.

A predictive takes a scorer and a batch and returns log class probabilities (N, B, C) of its N particles.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
