"""Checks of what is about to be committed, for pre-commit: `links` or `sizes`."""

from __future__ import annotations

import subprocess
import sys

ROOMS = ("adapters", "kernels", "optim", "recipes")
LARGEST = 500_000  # bytes; data that a test or a recipe needs is made or comes from a package
LINK_MODE = "120000"


def git(*arguments: str) -> str:
    """Output of a git command that must succeed."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout


def broken_links() -> list[str]:
    """Links of sft/ that the index holds as anything but a link (a checkout without symlinks)."""
    listed = git("ls-files", "-s", *(f"sft/{room}" for room in ROOMS)).splitlines()
    modes = {line.split("\t")[1]: line.split()[0] for line in listed}
    wrong = [name for name in (f"sft/{room}" for room in ROOMS) if modes.get(name) != LINK_MODE]
    return [f"{name}: not staged as a symbolic link" for name in wrong]


def large_files() -> list[str]:
    """Added or changed files over the limit."""
    names = git("diff", "--cached", "--name-only", "--diff-filter=AM", "-z").split("\0")
    sizes = {name: int(git("cat-file", "-s", f":{name}")) for name in names if name}
    return [f"{name}: {size} bytes" for name, size in sizes.items() if size > LARGEST]


if __name__ == "__main__":
    problems = {"links": broken_links, "sizes": large_files}[sys.argv[1]]()
    sys.exit("\n".join(problems) or 0)
