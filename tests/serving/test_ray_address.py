"""A local Ray: its workers import nothing from the current directory, and it listens on this machine alone."""

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from scalabl.serving.ray_address import connected


def test_a_local_ray_is_of_this_machine_and_imports_nothing_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    mark = tmp_path / "typer.mark"
    (tmp_path / "typer.py").write_text(f"open({str(mark)!r}, 'w')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = os.environ.get("PYTHONSAFEPATH")

    def imported() -> str:
        import typer

        return str(typer.__file__)

    with connected("local") as ray:
        task: Any = ray.remote(num_cpus=1)(imported)
        assert "site-packages" in ray.get(task.remote())
        listening = [
            connection.laddr.ip
            for child in psutil.Process().children(recursive=True)
            for connection in child.net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
    assert not mark.exists()
    assert listening and set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening
    assert os.environ.get("PYTHONSAFEPATH") == before
