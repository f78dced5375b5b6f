"""The images of a row: ``"image"`` names one file or a list of them, relative to the file that the row stands in."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError, one_line
from scalabl.core.files import sha256

KEY = "image"


def images_of(raw: Any, folder: Path, where: str) -> tuple[str, ...]:
    """The row's images as whole paths, none where it has no ``"image"``.

    Args:
        raw: the row's fields.
        folder: what the paths are relative to.
        where: how the message names the row.

    Raises:
        UserError: not a path or a list of paths, no such file, or a file that begins as no image.
    """
    if KEY not in raw:
        return ()
    named = raw[KEY]
    paths = named if isinstance(named, list) else [named]
    if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
        raise UserError(f'{where}: "{KEY}" is {named!r}; write the path of an image, or a list of paths.')
    return tuple(_checked(folder / Path(path).expanduser(), where) for path in paths)


def _checked(path: Path, where: str) -> str:
    from PIL import Image

    if not path.is_file():
        raise UserError(f"{where}: there is no image {path}; give its path relative to the file of the row.")
    try:
        with Image.open(path):  # the header alone
            return str(path.resolve())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(path, f"{where}: ", error)) from None


def open_image(path: str, row: str) -> Any:
    """The image in red, green and blue: a `PIL.Image.Image`.

    Args:
        path: of the file.
        row: whose it is, for the message.

    Raises:
        UserError: it is missing, truncated or of a kind that cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(path, f"Row {row}: ", error)) from None


def image_digest(path: str) -> str:
    """SHA-256 of the file: what an image is, wherever it lies."""
    stat = Path(path).stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def _digest(path: str, _size: int, _changed: int) -> str:
    return sha256(Path(path))


def _unreadable(path: str | Path, where: str, error: BaseException) -> str:
    why = one_line(error)
    return f"{where}the image {path} cannot be read ({why.rstrip('.')}); replace the file or take the row out."
