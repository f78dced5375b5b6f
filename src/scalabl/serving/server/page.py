"""The page at `/`: a text, its label or its answer, and the doubt in it. One file, no network but the server's own."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.responses import HTMLResponse

from scalabl.core.pages import page_style
from scalabl.generation.answer import LIMITS


def page() -> HTMLResponse:
    """The page, which may run its own script and style alone and speak with this server alone."""
    source = files("scalabl.serving.server").joinpath("page.html").read_text(encoding="utf-8")
    text = source.replace("{{ limits }}", str(list(LIMITS))).replace("{{ style }}", page_style())
    script, style = (_digest(text, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def _digest(text: str, tag: str) -> str:
    """The source of a policy for the one element of a tag."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
