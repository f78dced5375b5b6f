"""Where rows lie and answers go: a path of the machines' own file system, or an address of a store.

A `StorePath` answers to what is asked of a `pathlib.Path` here, so that what reads and writes takes either. The file
systems are pyarrow's (s3://, gs://, abfs://, hdfs://, and fsspec+NAME:// for any of fsspec's). An object of a store
appears whole, when it is closed; it is not renamed and nothing is added to it. Credentials are those that pyarrow finds
in the environment, of every process for itself. Imports no torch.
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote, urlsplit

from scalabl.core.errors import UserError, one_line

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a drive of Windows has one letter
_AT_ONCE = 1 << 20  # bytes of an object that one request reads
_WITHOUT_DIRECTORIES = ("s3", "gcs")  # where making one asks for more rights than writing below it does


def expanded(text: str | Path) -> Path:
    """A path with its ~ as a home directory; as it is where there is no such user, so that it is said to be missing."""
    return Path(os.path.expanduser(text))


def real_path(path: Path) -> Path:
    """A path without its links; one whose links lead in a circle, of which `Path.resolve` makes an error, as it is."""
    return Path(os.path.realpath(path))


def is_address(text: str) -> bool:
    """Whether a text is an address (file:// is one) and not a path."""
    return _ADDRESS.match(text) is not None and not os.path.exists(text)


def locate(given: str | Path | StorePath) -> Location:
    """The absolute path, or the address, that a user means.

    Raises:
        UserError: an address that is not well-formed, or that carries a password.
    """
    if isinstance(given, StorePath):
        return given
    text = str(given)
    if not is_address(text):
        return Path(os.path.abspath(os.path.expanduser(text)))
    scheme, _, rest = text.partition(":")
    if not rest.startswith("//"):  # what Path makes of an address
        raise UserError(f"{text} is no address; write {scheme}://{rest.lstrip('/')}, as text and not as a Path.")
    try:
        host, password = urlsplit(text).hostname, urlsplit(text).password
    except ValueError as error:
        raise UserError(f"{text} is no address ({error}); write it as {scheme}://BUCKET/PATH.") from error
    if password is not None:
        raise UserError(
            f"An address of {scheme}:// with a password would be shown to others; set it in the environment."
        )
    if scheme == "file":
        if host not in (None, "localhost"):
            raise UserError(f"{text} names the machine {host}; write file:///PATH, or the path alone.")
        return Path(os.path.abspath(unquote(urlsplit(text).path)))
    base, mark, options = text.partition("?")
    return StorePath(base.rstrip("/") + mark + options)


@dataclass(frozen=True)
class StorePath:
    """A file or a directory of a store.

    Attributes:
        address: as the user has given it; what is behind a "?" are pyarrow's options for the store.
        below: the path of this one below it; empty: itself.
    """

    address: str
    below: str = ""

    def __str__(self) -> str:
        """The address without its options."""
        base = self.address.partition("?")[0]
        return f"{base}/{self.below}" if self.below else base

    def __truediv__(self, name: str | Path) -> StorePath:
        return StorePath(self.address, str(PurePosixPath(self.below) / PurePosixPath(name)))

    @property
    def path(self) -> str:
        """What its file system calls it."""
        base = self._opened[1].rstrip("/")
        return f"{base}/{self.below}" if self.below else base

    @property
    def filesystem(self) -> FileSystem:
        """Its pyarrow file system, opened once a process."""
        return self._opened[0]

    @property
    def _opened(self) -> tuple[FileSystem, str]:
        with _told(self, "opened"):
            return _open(self.address)

    @property
    def has_directories(self) -> bool:
        """Whether directories have to be made, as on HDFS and unlike on S3."""
        return self.filesystem.type_name not in _WITHOUT_DIRECTORIES

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(str(self)).name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return PurePosixPath(str(self)).stem

    @property
    def suffix(self) -> str:
        """With its dot."""
        return PurePosixPath(str(self)).suffix

    @property
    def parent(self) -> StorePath:
        """The directory it lies in."""
        if self.below:
            parent = str(PurePosixPath(self.below).parent)
            return StorePath(self.address, "" if parent == "." else parent)
        base, mark, options = self.address.partition("?")
        return StorePath(base.rpartition("/")[0] + mark + options)

    def info(self) -> FileInfo:
        """Kind, size and time of the last change.

        Raises:
            UserError: the store cannot be reached, or refuses.
        """
        with _told(self, "read"):
            return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        """Whether there is an object, or one below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is an object."""
        return bool(self.info().is_file)

    def is_dir(self) -> bool:
        """Whether there is an object below it."""
        return self.info().type.name == "Directory"

    def iterdir(self, *, recursive: bool = False) -> Iterator[StorePath]:
        """What lies in it; with `recursive` the files at any depth. Nothing if it is not there."""
        from pyarrow.fs import FileSelector

        with _told(self, "listed"):
            found = self.filesystem.get_file_info(FileSelector(self.path, recursive=recursive, allow_not_found=True))
        start = len(self.path) + 1
        for info in found:
            if info.is_file or not recursive:
                yield self / info.path[start:]

    def open(self, mode: str = "r", encoding: str | None = None) -> Any:
        """For reading, at any place of it: an object is read in ranges.

        Raises:
            FileNotFoundError: there is none.
            UserError: the store cannot be reached, or refuses.
        """
        binary = io.BufferedReader(_Object(self), _AT_ONCE)
        return binary if mode == "rb" else io.TextIOWrapper(binary, encoding=encoding)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object."""
        with self.open(encoding=encoding) as file:
            return str(file.read())

    def write_bytes(self, content: bytes) -> None:
        """Write the whole object, in place of one that was there.

        Raises:
            UserError: the store cannot be reached, or refuses.
        """
        self.parent.mkdir()
        # pyarrow publishes at the close even after an error; with one write all is in it, or the close fails too
        with _told(self, "written"), self.filesystem.open_output_stream(self.path) as stream:
            stream.write(content)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Make the directory, where the store has any."""
        if self.has_directories:
            with _told(self, "made"):
                self.filesystem.create_dir(self.path, recursive=True)

    def unlink(self, missing_ok: bool = False) -> None:
        """Take the object away.

        Raises:
            UserError: the store cannot be reached, or refuses.
        """
        with _told(self, "removed"), suppress(*[FileNotFoundError] if missing_ok else []):
            self.filesystem.delete_file(self.path)

    def remove_all(self) -> None:
        """Take away everything below it."""
        with _told(self, "removed"), suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path)

    def is_relative_to(self, other: StorePath) -> bool:
        """Whether it is the other, or lies below."""
        return f"{self}/".startswith(f"{other}/")


Location: TypeAlias = Path | StorePath


class _Object(io.RawIOBase):
    """An object for Python's own readers, which pyarrow's streams are not; its errors are sentences."""

    def __init__(self, path: StorePath) -> None:
        self._path = path
        with _told(path, "read"):
            self._stream = path.filesystem.open_input_file(path.path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _told(self._path, "read"):
            return int(self._stream.readinto(buffer))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        self._stream.close()
        super().close()


def for_arrow(location: Location) -> Any:
    """What pyarrow reads a file from."""
    return location if isinstance(location, Path) else location.open("rb")


@functools.cache
def _open(address: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem

    # for a bucket without a region pyarrow asks Amazon, whatever endpoint the environment names
    elsewhere = any(name in os.environ for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"))
    region = (
        os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if elsewhere else None)
    )
    if address.startswith("s3://") and region and "region=" not in address:
        address += f"{'&' if '?' in address else '?'}region={region}"
    return FileSystem.from_uri(address)


@contextmanager
def _told(path: StorePath, doing: str) -> Iterator[None]:
    """What a store refuses, in a sentence; that nothing is there is left to the caller."""
    from pyarrow import ArrowException

    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except (OSError, ArrowException, ValueError, ImportError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be {doing} ({one_line(error).rstrip('.')}); check the address, the network, and the "
            "credentials in the environment."
        ) from error
