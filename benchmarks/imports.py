"""Time the import of the package against transformers + peft, and the command's help.

    python benchmarks/imports.py [--rounds 3] [--out FILE]

Each start is a new process; the figure is the median of its own CPU seconds, all interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from machine import machine
from rounds import interleave, medians, ratios

STARTS = {
    "python": "",
    "transformers + peft": "import transformers, peft",
    "transformers + peft + sft": "import transformers, peft, sft; sft.SpielConfig",
    "import sft": "import sft",
    "sft --help": "import sys; sys.argv = ['sft', '--help']; from sft.cli import main; main()",
}


def start(code: str) -> float:
    """Run code in a new process; return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path(__file__).parent / "results/imports.json"
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    steps = {name: lambda code=code: start(code) for name, code in STARTS.items()}
    seconds = medians(interleave(steps, args.rounds))
    result = {
        "machine": machine(),
        "rounds": args.rounds,
        "cpu_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "to_transformers_and_peft": ratios(seconds, "transformers + peft"),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(result["cpu_seconds"])
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
