"""Where examples come from: files, globs, folders, data sets of the hub, embedded words."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from sft.data.canonical import Piece
from sft.data.cmudict import EMBEDDED, load_embedded
from sft.data.files import BUILDERS, cause, check_file, quiet, read_file
from sft.data.spec import SourceSpec
from sft.errors import UserError, unknown_name

# org/name, org/name:split, org/name:config/split
HUB_ID = re.compile(r"((?:[\w.-]+/)?[\w.-]+)(?::(?:([\w.-]+)/)?([\w\[\]%:+-]+))?")
SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves


def open_source(source: SourceSpec, key: str) -> list[Piece]:
    """Return the rows of a source, file by file where it has files.

    Args:
        source: where to look.
        key: of the recipe that names it.

    Raises:
        UserError: there is nothing, or it cannot be read.
    """
    if source.path in EMBEDDED:
        train, held_out = load_embedded(source.path)
        return [Piece(source.path, held_out if key == "data.eval" else train)]
    files = local_files(source, key)
    if files is None:
        return [_loaded(source, key, locate(source))]
    return [Piece(str(path), read_file(str(path), key), path) for path in files]


def local_files(source: SourceSpec, key: str) -> list[Path] | None:
    """Return the files of a source, or None where it is a saved data set, images, or the hub's.

    Raises:
        UserError: a file, or what a glob stands for, is not there.
    """
    name, path = source.path, Path(source.path).expanduser()
    if path.is_file():
        check_file(key, path, name)
        return [path]
    if path.is_dir():
        return _files_of(path, source, key)
    if glob.has_magic(name) and not HUB_ID.fullmatch(name):
        found = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise UserError(f"{key}: {name}: no file is named so; mend the pattern")
        for file in found:
            check_file(key, file, str(file))
        return found
    if looks_local(name):
        raise UserError(f"{key}: {name}: no such file{_near(name)}")
    return None


def looks_local(name: str) -> bool:
    """Whether a name that is not there must have meant a file."""
    return (
        name.startswith((".", "/", "~"))
        or Path(name).suffix in BUILDERS
        or not HUB_ID.fullmatch(name)
    )


def locate(source: SourceSpec) -> tuple[str, str | None, str]:
    """Return the path or hub id of a source, its configuration, and its split."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return str(path), source.config, source.split or "train"
    found = HUB_ID.fullmatch(source.path)
    assert found is not None
    return found[1], source.config or found[2], source.split or found[3] or "train"


def cannot(key: str, name: str, error: Exception) -> UserError:
    """Say that a data set does not load."""
    return UserError(f"{key}: {name}: cannot be loaded ({cause(error)}){_near(name)}")


def _loaded(source: SourceSpec, key: str, where: tuple[str, str | None, str]) -> Piece:
    """Load a split of a saved data set, of a folder of images, or of a data set of the hub."""
    import datasets

    name, config, split = where
    try:
        with quiet():
            if is_saved(Path(name)):
                rows: Any = datasets.load_from_disk(name)
                rows = _split(rows, split, key, name)
            else:
                rows = datasets.load_dataset(name, config, split=split, revision=source.revision)
    except UserError:
        raise
    except Exception as error:
        raise cannot(key, source.path, error) from error
    if len(rows) == 0:
        raise UserError(f"{key}: {source.path}: split {split} holds no examples")
    return Piece(source.path, rows)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in SAVED)


def _split(found: Any, split: str, key: str, name: str) -> Any:
    from datasets import DatasetDict

    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise UserError(
            f"{key}: {name}: got the split {split!r}, allowed is {', '.join(found)}; set split"
        )
    return found[split]


def _files_of(folder: Path, source: SourceSpec, key: str) -> list[Path] | None:
    """Return the files of a folder that make up a split, named as `datasets` names them."""
    import datasets

    if is_saved(folder):
        return None
    try:
        with quiet():
            builder = datasets.load_dataset_builder(str(folder), source.config)
    except Exception as error:
        raise cannot(key, str(folder), error) from error
    files = {str(name): found for name, found in (builder.config.data_files or {}).items()}
    wanted = source.split or "train"
    if wanted not in files:
        raise UserError(
            f"{key}: {folder}: got the split {wanted!r}, allowed is {', '.join(files)}; set split"
        )
    if builder.dataset_name == "imagefolder" or not all(
        Path(file).suffix in BUILDERS for file in files[wanted]
    ):
        return None
    return [Path(file) for file in files[wanted]]


def _near(name: str) -> str:
    """Name the embedded data set that a name is near, if it is."""
    text = unknown_name(name, EMBEDDED, kind="data set")
    return f"; {text.partition('; ')[2]}" if "did you mean" in text else ""
