"""What a comparison looks like: the rows of figures, the terminal table, and one self-contained HTML file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
