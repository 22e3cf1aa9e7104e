"""Runs PEFT's own test-suite against our methods, as an outside check: `make conformance`.

The source distribution of the installed PEFT is fetched into a temporary folder; its tests are
pointed at our configurations by `suites.py` and at tiny models made on the spot. Nothing of it is
kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
# PEFT's common tests import this class for isinstance checks; `object` would match everything.
DIFFUSERS = "class StableDiffusionPipeline: ...\n"


def main(arguments: list[str]) -> int:
    """Fetch, point, run, count; return pytest's exit status. Arguments go to pytest."""
    with tempfile.TemporaryDirectory(prefix="peft-conformance-") as name:
        folder = Path(name)
        tests = fetch_tests(folder)
        shutil.copy(HERE / "suites.py", tests / "test_ours.py")
        (tests / "__init__.py").touch()
        (folder / "diffusers.py").write_text(DIFFUSERS)
        report = folder / "report.xml"
        status = subprocess.run(
            [
                sys.executable, "-m", "pytest", "tests/test_ours.py", "-q", "--tb=short",
                "-c", os.devnull, "--rootdir", name, "-p", "no:cacheprovider",
                "-W", "ignore", f"--junit-xml={report}", *arguments,
            ],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": name, "CONFORMANCE_MODELS": str(folder / "models")},
            check=False,
        ).returncode  # fmt: skip
        if report.is_file():
            print_counts(report)
    return status


def fetch_tests(folder: Path) -> Path:
    """Unpack the tests of the installed PEFT's source distribution; return their folder."""
    release = f"peft=={version('peft')}"
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", release, "--quiet", "--no-deps",
            "--no-binary", ":all:", "--dest", str(folder),
        ],
        check=True,
    )  # fmt: skip
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as content:
        wanted = [m for m in content.getmembers() if "/tests/" in m.name]
        content.extractall(folder, members=wanted, filter="data")
    (unpacked,) = folder.glob("peft-*/tests")
    return unpacked.rename(folder / "tests")


def print_counts(report: Path) -> None:
    """Print how many tests of each class passed, failed and were skipped."""
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case} & {"failure", "error", "skipped"}
        owner = case.get("classname", "").rsplit(".", 1)[-1]
        counts.setdefault(owner, Counter())[min(outcomes, default="passed")] += 1
    print(f"\nPEFT {version('peft')}, its own tests on our methods:")
    for owner, count in counts.items():
        shown = ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items()))
        print(f"  {owner:<32} {shown}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
