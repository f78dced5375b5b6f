"""Progress where there is no terminal: whole lines, and none for what is soon over."""

import pytest
from rich.text import Text

from scalabl.core import console


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress_bar() as progress:
        bar = progress.add_task("training [mle]", total=2500, detail="")
        progress.advance(bar, 100)
        assert capsys.readouterr().err == ""
        now[0] += console.SECONDS
        progress.update(bar, completed=1200, detail="loss 0.7")
        progress.advance(bar, 1)
        now[0] += console.SECONDS
        progress.advance(bar, 100)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "training [mle]: 1,200 of 2,500, loss 0.7\ntraining [mle]: 1,301 of 2,500, loss 0.7\n"


def test_only_the_main_process_shows_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "is_main", lambda: False)
    monkeypatch.setattr(console, "SECONDS", 0.0)
    with console.progress_bar() as progress:
        progress.advance(progress.add_task("predicting", total=None, detail=""), 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("heeded", [False, True])
def test_no_color_is_heeded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, heeded: bool) -> None:
    """https://no-color.org: bold letters stay, colours go."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if heeded:
        monkeypatch.setenv("NO_COLOR", "1")
    console.words_console().print(Text("warning", "bold yellow"))
    assert capsys.readouterr().out == ("\x1b[1mwarning\x1b[0m\n" if heeded else "\x1b[1;33mwarning\x1b[0m\n")
