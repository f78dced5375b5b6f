"""One call at a time in a directory of a disk and of a store; what a killed one has left keeps nobody out."""

import contextlib
import os
import platform
import re
import time
from pathlib import Path

import pytest

import scalabl.serving.alone as module
from scalabl.core.errors import UserError
from scalabl.core.locations import Location, locate
from scalabl.serving.alone import EXPIRY, alone


@pytest.fixture(params=["{}", "fsspec+file://{}"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    (tmp_path / "answers" / ".work").mkdir(parents=True)
    return locate(request.param.format(tmp_path / "answers" / ".work"))


def test_a_second_call_is_refused_until_the_first_has_ended(work: Location) -> None:
    with pytest.raises(RuntimeError), alone(work):
        with pytest.raises(UserError, match=r"Another call writes into .*/answers; wait for its end"), alone(work):
            pass
        with pytest.raises(UserError), alone(work):  # whom the refused one has left in peace
            pass
        raise RuntimeError
    with alone(work):
        pass


def test_an_owner_renews_its_lock_and_a_lock_that_nobody_renews_is_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RENEWED", 0.01)
    work = locate(f"fsspec+file://{tmp_path}")
    machine, gone = re.sub(r"[^A-Za-z0-9-]", "-", platform.node()), 2**22 + 1
    (tmp_path / f"lock.{machine}.{gone}.0123abcd").touch()  # a process of this machine that is no more
    elsewhere = tmp_path / "lock.elsewhere.1.0123abcd"
    elsewhere.touch()
    with pytest.raises(UserError, match="Another call"), alone(work):
        pass
    os.utime(elsewhere, (time.time() - EXPIRY - 5,) * 2)
    with alone(work):
        (mine,) = tmp_path.iterdir()
        first = mine.stat().st_mtime_ns
        while mine.stat().st_mtime_ns == first:
            time.sleep(0.01)
        with contextlib.suppress(OSError):
            mine.unlink()  # the directory of work is taken away before the end
    assert list(tmp_path.iterdir()) == []
