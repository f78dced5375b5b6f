"""Every format of a base model's weights, every image-text architecture, and rows of images."""

from pathlib import Path

import pytest
from formats import FORMATS, Format
from image_text import ARCHITECTURES, write_image_task


@pytest.fixture(params=FORMATS, ids=[form.name for form in FORMATS], scope="module")
def form(request: pytest.FixtureRequest) -> Format:
    """One format after the other."""
    made: Format = request.param
    return made


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    """One image-text architecture after the other."""
    made: str = request.param
    return made


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about the colour of images; not to be changed."""
    return write_image_task(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """Keep PEFT's, torchao's and bitsandbytes' own hints out of the summary."""
