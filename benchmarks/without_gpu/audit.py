"""Read back what hardware would run: registers, spills, instructions of a compiled kernel."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

Histogram = collections.Counter[str]

# registers, shared bytes, warps and blocks of a multiprocessor
_MULTIPROCESSOR = {
    80: (65536, 167936, 64, 32),
    90: (65536, 233472, 64, 32),
    100: (65536, 233472, 64, 32),
}
_TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "QGMMA", "IMMA", "UTCQMMA", "v_mfma")


@dataclass
class Audit:
    """What was read.

    Args:
        name: of the kernel.
        registers: of a thread (of vectors, on AMD).
        spills: instructions that move registers to memory (spilled registers, on AMD).
        stack: bytes of a thread.
        shared: bytes of a program.
        warps: of a program.
        occupancy: share of a multiprocessor's warps that fit (NVIDIA).
        instructions: all of them, by name.
        loops: the instructions of each innermost loop, in the order of the code.
    """

    name: str
    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    occupancy: float = 0.0
    instructions: Histogram = field(default_factory=collections.Counter)
    loops: list[Histogram] = field(default_factory=list)

    @property
    def hot(self) -> Histogram:
        """The longest innermost loop, or all of the code if there is none."""
        return max(self.loops, key=lambda loop: loop.total(), default=self.instructions)

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether matrices are multiplied by the units made for it."""
        return any(name.startswith(_TENSOR_CORES) for name in self.instructions)

    @property
    def compares_and_swaps(self) -> int:
        """Atomic instructions that are loops: none is wanted."""
        return count(self.instructions, r"ATOM.*CAS.*|.*cmpswap.*")


def count(histogram: Histogram, pattern: str) -> int:
    """Return how many instructions match."""
    return sum(n for name, n in histogram.items() if re.fullmatch(pattern, name))


def loads(histogram: Histogram) -> tuple[int, int]:
    """Return how many loads from global memory there are, and how many of 128 bits."""
    every = count(histogram, r"(LDG|LDGSTS)\b.*|(global|flat|buffer)_load_.*")
    wide = count(histogram, r"(LDG|LDGSTS)\b.*128.*|(global|flat|buffer)_load_dwordx4.*")
    # copies in bulk, of whole tiles
    bulk = count(histogram, r"(UTMALDG|UBLKCP)\b.*")
    return every + bulk, wide + bulk


def audit(compiled: Any) -> Audit:
    """Read a kernel that `compiled_for` made."""
    if compiled.metadata.target.backend == "hip":
        return _amd(compiled)
    return _nvidia(compiled)


def _nvidia(compiled: Any) -> Audit:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tools = triton.knobs.nvidia
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", str(cubin))
        listing = _output(tools.nvdisasm.path, "-c", str(cubin))
    used = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    code = list(_sass(listing))
    names = collections.Counter(name for name, _ in code if name)
    meta = compiled.metadata
    return Audit(
        name=meta.name,
        registers=used["REG"],
        spills=count(names, r"(STL|LDL)\b.*"),
        stack=used["STACK"] + used["LOCAL"],
        shared=meta.shared,
        warps=meta.num_warps,
        occupancy=_occupancy(meta.target.arch, used["REG"], meta.shared, meta.num_warps),
        instructions=names,
        loops=_loops(code),
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")


def _sass(listing: str) -> Iterator[tuple[str, str]]:
    """Yield (instruction, operands), and ("", label) where a label stands."""
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            yield "", label[1]
        elif instruction := _INSTRUCTION.match(line):
            yield instruction[1], instruction[2]


def _loops(code: list[tuple[str, str]]) -> list[Histogram]:
    """Return the instructions between each backward branch and its target, innermost alone."""
    labels = {text: place for place, (name, text) in enumerate(code) if not name}
    spans = []
    for place, (name, text) in enumerate(code):
        target = re.search(r"\((\.L_\w+)\)|`(\.L_\w+)", text)
        if re.match(r"U?BRA\b", name) and target:
            start = labels.get(target[1] or target[2], place)
            # what follows the end of a kernel branches to itself
            if start < place - 2:
                spans.append((start, place))
    inner = [s for s in spans if not any(s[0] <= o[0] and o[1] <= s[1] and o != s for o in spans)]
    return [collections.Counter(n for n, _ in code[a : b + 1] if n) for a, b in inner]


def _occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    all_registers, all_shared, all_warps, blocks = _MULTIPROCESSOR[arch]
    a_warp = -(-registers * 32 // 256) * 256
    fitting = (
        all_registers // a_warp // warps,
        all_shared // (shared + 1024) if shared else blocks,
        all_warps // warps,
        blocks,
    )
    return min(fitting) * warps / all_warps


def _amd(compiled: Any) -> Audit:
    code, meta = compiled.asm["amdgcn"], compiled.metadata

    def number(key: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", code))

    lines = [(m[1], m[2]) for m in re.finditer(r"^\s+([a-z]\w+)(.*)$", code, re.M)]
    return Audit(
        name=meta.name,
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        stack=number("private_segment_fixed_size"),
        shared=meta.shared,
        warps=meta.num_warps,
        instructions=collections.Counter(name for name, _ in lines),
    )
