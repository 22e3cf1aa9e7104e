"""The rooms stand at the root, are imported under `sft`, and all of them are in the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["adapters", "kernels", "optim", "recipes"]
SOURCES = ["sft", *ROOMS, "pyproject.toml", "README.md", "LICENSE"]


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that must succeed, in an environment without our search path."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_the_link_is_relative_and_resolves(room: str) -> None:
    link = ROOT / "sft" / room
    assert link.is_symlink(), f"sft/{room} is no link: was git's core.symlinks off at checkout?"
    assert os.readlink(link) == f"../{room}"
    assert link.resolve() == ROOT / room
    assert link.is_dir()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_no_regular_package(room: str) -> None:
    """A top-level package `kernels` of ours would shadow the one that transformers imports."""
    assert list((ROOT / room).rglob("__init__.py")) == []
    probe = f"import importlib.util as u; s = u.find_spec({room!r}); print(s.origin if s else None)"
    found = run(sys.executable, "-c", probe, cwd=ROOT).strip()
    assert not found.startswith(str(ROOT))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy of what a wheel is made from, so that building leaves nothing in this tree."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    """Wheel built from that copy by the installed setuptools, without a network."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-v", "-w", "dist", "."]
    log = run(*pip, *build, cwd=checkout)
    assert "absent from the `packages` configuration" not in log
    (built,) = (checkout / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_the_whole_tree(checkout: Path, wheel: Path) -> None:
    folders = [("sft", checkout / "sft")] + [(f"sft/{room}", checkout / room) for room in ROOMS]
    wanted = {"sft/py.typed"}
    for name, folder in folders:
        for file in folder.rglob("*"):
            if file.is_file() and (
                file.suffix in {".py", ".yaml", ".cpp"} or file.parent.name == "builtin"
            ):
                wanted.add(f"{name}/{file.relative_to(folder).as_posix()}")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert wanted <= held, sorted(wanted - held)
    assert {name.split("/")[0].split("-")[0] for name in held} == {"sft", "sparse_sft"}
    assert any(name.endswith("/licenses/LICENSE") for name in held)


PROBE = """
import importlib.metadata, importlib.resources, importlib.util, sys, sysconfig
import sft, sft.adapters, sft.kernels, sft.optim, sft.recipes
site = sysconfig.get_path("purelib")
for package in (sft, sft.adapters, sft.kernels, sft.optim, sft.recipes):
    (place,) = list(package.__path__)
    assert place.startswith(site), place
for name in sys.argv[1:]:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin.startswith(site), (name, spec)
assert importlib.metadata.version("sparse-sft") == sft.__version__
recipes = importlib.resources.files("sft.recipes")
assert all(file.name.endswith(".yaml") for file in recipes.iterdir())
"""


def test_the_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """Installed alone, seen from another folder: every module is found, none is the checkout's."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies come from this environment, by a line that does not carry over its own
    # .pth files: the editable install of this checkout stays out of sight.
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", ask, cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
    modules = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in names]
    run(python, "-W", "error", "-c", PROBE, *modules, cwd=tmp_path)
    assert (tmp_path / "env" / "bin" / "sft").is_file()
