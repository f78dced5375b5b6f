"""Rows to train and test on: benchmarks by name, and the user's own JSONL. Nothing here imports torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
