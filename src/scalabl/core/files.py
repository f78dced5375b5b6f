"""Files: mappings read whole or refused in a sentence, everything written whole or not at all, and the cache's place.

Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from scalabl.core.errors import UserError
from scalabl.core.locations import Location, StorePath, real_path

OTHER_CACHE = "set SCALABL_CACHE to a directory that you may write"
ADAPTER = "adapter_model.safetensors"
JOINT = "joint_covariance.safetensors"
FEATURES = "features.safetensors"
LOG = "training_log.json"


def read_json(path: Location, *, missing: str, mend: str, expected: str, key: str | None = None) -> dict[str, Any]:
    """The mapping in a JSON file.

    Args:
        path: the file.
        missing: what to say where it is not there.
        mend: what to do about a file that is not JSON: the end of a sentence, without its full stop.
        expected: what the file must hold, and what to do where it does not: the end of a sentence likewise.
        key: a name that the mapping must have.

    Raises:
        UserError: the file is not there, cannot be read, or has something else in it.
    """
    parse = functools.partial(json.loads, object_pairs_hook=each_key_once)
    return _read(path, parse, "readable JSON", missing, mend, expected, key)


class RepeatedKeyError(ValueError):
    """An object names a key twice."""


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of JSON in which no object names a key twice, of which Python's own would take the last.

    Raises:
        RepeatedKeyError: one does; the text names the key.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def read_if_whole(path: Location) -> Any:
    """What a JSON file holds; None where it is missing or half written, as a killed process leaves it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


LONGEST_YAML = 1 << 20  # characters
MOST_VALUES = 100_000  # with those that aliases stand for


def read_yaml(path: Path, *, missing: str, mend: str, expected: str, key: str | None = None) -> dict[str, Any]:
    """The mapping in a YAML file; as `read_json`."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a mapping that names a key twice, of which YAML's own would take the last, and aliases that stand for
        too much: nine lines of them are billions of values."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
            node = super().compose_node(parent, index)
            if not hasattr(self, "sizes"):
                self.sizes: dict[int, int] = {}  # how many values each finished node stands for
            if alias is not None and id(node) not in self.sizes:
                self.refuse(f"the alias *{alias.anchor} stands inside its own value", alias)
            children = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = (each for child in children for each in (child if isinstance(child, tuple) else (child,)))
            size = self.sizes.setdefault(id(node), 1 + sum(self.sizes[id(part)] for part in parts))
            if size > MOST_VALUES:
                self.refuse(f"it stands for more than {MOST_VALUES:,} values", node)
            return node

        def refuse(self, problem: str, event: Any) -> NoReturn:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[tuple[str, str]] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} is there twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
            return node

    def parse(text: str) -> Any:
        if len(text) > LONGEST_YAML:
            raise ValueError(f"it is longer than {LONGEST_YAML >> 20} MiB")
        try:
            return yaml.load(text, Loader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            raise ValueError(f"line {line}: {error.problem or error.context}") from error
        except yaml.YAMLError as error:
            raise ValueError(str(error).splitlines()[0]) from error
        except (LookupError, AttributeError, TypeError, OverflowError) as error:  # !!bool perhaps
            raise ValueError("a value is not of the type that its tag names") from error

    return _read(path, parse, "YAML", missing, mend, expected, key)


def _read(
    path: Location, parse: Callable[[str], Any], kind: str, missing: str, mend: str, expected: str, key: str | None
) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(missing)
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); change its permissions.") from error
    except UserError:  # of a store
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not {kind} (it is not text); {mend}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is not {kind} (it is nested too deeply); {mend}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not {kind} ({error}); {mend}.") from error
    if not isinstance(content, dict) or (key is not None and key not in content):
        raise UserError(f"{path} must hold {expected}.")
    return content


def cache_directory() -> Path:
    """`$SCALABL_CACHE`, or `~/.cache/scalabl`.

    Raises:
        UserError: there is neither; a user of a container may have no home.
    """
    given = os.environ.get("SCALABL_CACHE")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "scalabl"
    except RuntimeError as error:
        raise UserError(f"There is no home directory to keep files in; {OTHER_CACHE}.") from error


@contextmanager
def writing(path: Location) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a directory, that is put in its place when all is written.

    Whole or not at all: a file's bytes are on the disk before it gets its name, what fails within leaves nothing, and
    two writers of one path do not meet. What a killed writer of this machine has left, the next one takes away. For a
    store it is a file of this machine, sent as one object.
    """
    if isinstance(path, StorePath):
        with tempfile.TemporaryDirectory(prefix="scalabl-") as directory:
            yield (whole := Path(directory, path.name))
            path.write_bytes(whole.read_bytes())
        return
    unfinished = _beside(path)
    try:
        yield unfinished
        if unfinished.is_file():
            with unfinished.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(unfinished, path)
    finally:
        remove(unfinished)


def _beside(path: Path) -> Path:
    """A hidden name beside a path, of this process alone; what killed processes of this machine left there goes."""
    machine = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{machine}\.(\d+)\.[0-9a-f]{{8}}")
    with suppress(OSError):
        left = [(name, found) for name in os.listdir(path.parent) if (found := pattern.fullmatch(name))]
        if left:
            import psutil

            for name, found in left:
                if not psutil.pid_exists(int(found[1])):
                    remove(path.with_name(name))
    return path.with_name(f".{path.name}.{machine}.{os.getpid()}.{uuid.uuid4().hex[:8]}")


def remove(path: Location) -> None:
    """Take away a file or a directory, as far as it is there."""
    if isinstance(path, StorePath):
        path.remove_all()
        path.unlink(missing_ok=True)
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def write_json(path: Location, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Location, content: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, content.encode())


def write_bytes(path: Location, content: bytes) -> None:
    """Write a file whole or not at all."""
    with writing(path) as unfinished:
        unfinished.write_bytes(content)


def require_place(directory: Location, *, named: Location | None = None, mend: str = "choose another --output") -> None:
    """Refuse a directory in which no file can be made, or, where it is missing, in the nearest of its parents.

    Args:
        directory: tried with an empty file, which is removed.
        named: what the sentence names; the directory if None.
        mend: the end of the sentence, without its full stop.

    Raises:
        UserError: the operating system refuses.
    """
    if isinstance(directory, StorePath):
        probe = directory / f".probe.{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"")
        probe.unlink()
        return
    place = real_path(directory)
    while not place.exists():
        place = place.parent
    beside = _beside(place / "probe")
    try:
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise UserError(f"{named or directory} cannot be written ({error.strerror}); {mend}.") from error


def sha256(path: Location) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(opened: int, taken: str) -> None:
    """Keep other processes from an open file or directory until this one closes it or dies.

    Nothing is locked where the system or its files have no such locks.

    Args:
        opened: its number.
        taken: the sentence where another process has it.

    Raises:
        UserError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(taken) from None
    except OSError:  # a file system without locks
        return
