"""An adapter to be made Bayesian."""

from pathlib import Path

import pytest
from plain_lora import plain_adapter


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of stock PEFT, with ranks and scalings by layer; not to be changed."""
    directory = tmp_path_factory.mktemp("stock") / "adapter"
    return plain_adapter(directory, rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 5}, use_rslora=True)
