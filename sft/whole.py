"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from sft.errors import UserError


def refuse_target(
    to: Path, *, overwrite: bool, sources: Iterable[Path | str] = (), option: str = "--to"
) -> None:
    """Raise when a command cannot write a folder.

    Args:
        to: the folder.
        overwrite: it may be replaced when it holds something.
        sources: files and folders that are read; those that do not exist are hub ids.
        option: where the user named the folder.

    Raises:
        UserError: it is a file, is filled, or would take a source along when it is replaced.
    """
    if to.exists() and not to.is_dir():
        raise UserError(f"{option}: {to}: is a file; give a folder")
    if not overwrite and to.is_dir() and any(to.iterdir()):
        raise UserError(f"{option}: {to}: is not empty; pass --overwrite to replace it")
    for source in map(Path, sources):
        if source.exists() and source.resolve().is_relative_to(to.resolve()):
            raise UserError(
                f"{option}: {to}: would replace {source}, which is read; give another folder"
            )


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling that replaces `folder` when the block ends without an error.

    Raises:
        UserError: there is no writing where it lies.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
