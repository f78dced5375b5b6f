"""What a command may write: never over what it reads, and never what could not be written at its end.

Every command's files go through `require_writable` before any work. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from scalabl.core.errors import UserError
from scalabl.core.files import require_place
from scalabl.core.locations import expanded, is_address, real_path

# files of runs, adapters and models, which no option of a command names
_OWN = re.compile(
    r"scalabl\.json|training_log\.json|confidence\.json|((adapter|generation|tokenizer|(pre)?processor)_)?config\.json|"
    r"tokenizer\.(json|model)|vocab\.(json|txt)|merges\.txt|(special|added)_tokens(_map)?\.json|.*\.index\.json|"
    r".*\.(safetensors|bin|pt|pth|gguf)"
)
_RUN = ("scalabl.json", "adapter_config.json", "config.json")  # one of them tells such a directory from one of rows
_SUBDIRECTORIES = ("mean", "posthoc", "checkpoints", "particles")
_WRITTEN_AGAIN = (".json", ".html")  # what commands write of a directory, of a run answers too


def require_writable(*files: Path | None, reads: Iterable[str | Path | None] = ()) -> None:
    """Refuse files that could not be written at the end of long work, or that would overwrite what is read.

    Links, symbolic and hard, are followed. In a directory that is read, its own files are kept; what earlier calls
    wrote there of it (`--json DIR/figures.json`) may be written again. Files of runs and models are kept anywhere.

    Args:
        files: what will be written; None is left out.
        reads: what is read: files, directories of rows, runs, models; a text that names none of them (a benchmark, the
            Hub) is left out, as is None. A path that is not there is taken for one that will be.

    Raises:
        UserError: a file's directory does not exist or is not writable, the file is a directory, a device or a link to
            nowhere, or it would overwrite another one.
    """
    taken = [path for given in reads if (path := _path(given)) is not None]
    for file in files:
        if file is None:
            continue
        for other in taken:
            if _same(file, other):
                raise UserError(f"{file} is given twice, and one would overwrite the other; choose another file.")
            if other.is_dir() and _is_own(file, other):
                raise UserError(
                    f"{file} is a file of {other}, which is read, and would be overwritten; choose another file."
                )
        taken.append(file)
        if file.is_symlink() and not file.exists():
            raise UserError(f"{file} is a link to nowhere; remove it, or choose another file.")
        if file.exists() and _OWN.fullmatch(real_path(file).name):
            raise UserError(f"{file} is a file of a run or of a model, and would be overwritten; choose another file.")
        parent = real_path(file).parent
        if file.is_dir() or not parent.is_dir() or (file.exists() and not file.is_file()):
            raise UserError(f"{file} cannot be written; give a file in a directory that exists.")
        require_place(parent, named=file, mend="choose another directory")


def _path(given: str | Path | None) -> Path | None:
    if given is None or is_address(str(given)):
        return None
    path = expanded(given)
    return path if isinstance(given, Path) or path.exists() else None


def _same(file: Path, other: Path) -> bool:
    if file.exists() and other.exists():
        return file.samefile(other)
    return real_path(file) == real_path(other)


def _is_own(file: Path, directory: Path) -> bool:
    """Whether a file belongs to a directory that is read, by its place or as another name of one that lies there."""
    real, root = real_path(file), real_path(directory)
    if file.is_file() and file.stat().st_nlink > 1:
        real = next((path for path in root.rglob("*") if path.is_file() and path.samefile(file)), real)
    if not real.is_relative_to(root):
        return False
    is_run = any((root / name).is_file() for name in _RUN)
    has_its_name = _OWN.fullmatch(real.name) is not None
    if not real.exists():
        return is_run and has_its_name  # it would be taken for the run's own
    written_again = real.suffix in _WRITTEN_AGAIN or (is_run and real.suffix == ".jsonl")
    return has_its_name or real.relative_to(root).parts[0] in _SUBDIRECTORIES or not written_again
