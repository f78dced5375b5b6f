"""Where the cache is, on machines without a home or with a place that cannot be written."""

import os
from pathlib import Path

import pytest

from scalabl.core.errors import UserError
from scalabl.core.files import cache_directory


def test_without_a_home_a_sentence_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("SCALABL_CACHE", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # a user whom no list of users names
    with pytest.raises(UserError, match="There is no home directory to keep files in; set SCALABL_CACHE to"):
        cache_directory()
    monkeypatch.setenv("SCALABL_CACHE", "/somewhere")
    assert cache_directory() == Path("/somewhere")


def test_the_embedded_model_says_where_it_could_not_be_put(monkeypatch: pytest.MonkeyPatch) -> None:
    from scalabl.runs.models import embedded_directory

    monkeypatch.setenv("SCALABL_CACHE", "/proc/nowhere")  # which nobody may write, root included
    with pytest.raises(UserError, match="/proc/nowhere/models cannot be written .*; set SCALABL_CACHE to a directory"):
        embedded_directory()
