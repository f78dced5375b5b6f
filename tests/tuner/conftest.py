"""Fixtures of the tuner's tests."""

import pytest
from matrix import CASE_IDS, CASES, Architecture, Format


@pytest.fixture(params=CASES, ids=CASE_IDS)
def case(request: pytest.FixtureRequest) -> tuple[Architecture, Format]:
    """Every architecture in every format of base weights."""
    return request.param


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """Keep PEFT's and bitsandbytes' own hints out of the summary."""
