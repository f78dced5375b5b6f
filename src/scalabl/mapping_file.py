"""Files that hold one mapping, as JSON or YAML: read whole, or refused in a sentence that says how to mend it.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalabl.errors import UserError


def read_json(path: Path, *, missing: str, mend: str, holds: str, key: str | None = None) -> dict[str, Any]:
    """The mapping in a JSON file.

    Args:
        path: the file.
        missing: what to say where it is not there.
        mend: what to do about a file that is not JSON: the end of a sentence, without its full stop.
        holds: what the file must hold, and what to do where it does not: the end of a sentence likewise.
        key: a name that the mapping must have.

    Raises:
        UserError: the file is not there, cannot be read, or holds something else.
    """
    return _read(path, json.loads, "readable JSON", missing, mend, holds, key)


def read_yaml(path: Path, *, missing: str, mend: str, holds: str, key: str | None = None) -> dict[str, Any]:
    """The mapping in a YAML file; as `read_json`."""
    import yaml

    def parse(text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            raise ValueError(f"line {line}: {error.problem or error.context}") from error
        except yaml.YAMLError as error:
            raise ValueError(str(error).splitlines()[0]) from error

    return _read(path, parse, "YAML", missing, mend, holds, key)


def _read(
    path: Path, parse: Callable[[str], Any], kind: str, missing: str, mend: str, holds: str, key: str | None
) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(missing)
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); change its permissions.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not {kind} (it is not text); {mend}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not {kind} ({error}); {mend}.") from error
    if not isinstance(content, dict) or (key is not None and key not in content):
        raise UserError(f"{path} must hold {holds}.")
    return content
