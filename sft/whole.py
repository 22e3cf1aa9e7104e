"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from sft.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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

    A folder that is replaced steps aside first, and is deleted once the new one has its name.

    Raises:
        UserError: there is no writing where it lies, or no room.
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
        _replace(folder, temporary)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); free some space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(folder: Path, new: Path) -> None:
    """Give a folder's name to another one beside it."""
    if not folder.is_dir():
        os.replace(new, folder)
        return
    aside = new.with_name(f"{new.name}-old")
    os.replace(folder, aside)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
