"""`sft verify`: run the checks that fit a folder, and print their verdicts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from sft.errors import UserError
from sft.export.delta import is_delta
from sft.tools.verify import FAILED, verify_adapter
from sft.tools.verify_delta import verify_delta


def run(folder: Path, *, base: str | None, support: str | None, as_json: bool) -> bool:
    """Print what was checked; return whether nothing failed.

    Args:
        folder: of an adapter, a run, or a delta.
        base: what it belongs on; default: as it says.
        support: the start of the hash that its support must have.
        as_json: print data alone.
    """
    if support == "":
        raise UserError("--support: got nothing; give the start of a SHA-256, or leave it out")
    if is_delta(folder):
        if support is not None:
            raise UserError("--support: a delta notes its own hashes; leave it out")
        checks = verify_delta(folder, base)
    else:
        checks = verify_adapter(folder, base, support)
    good = all(check.verdict != FAILED for check in checks)
    if as_json:
        found = {"folder": str(folder), "ok": good, "checks": [asdict(check) for check in checks]}
        print(json.dumps(found, indent=2))
    else:
        for check in checks:
            print(f"{check.name:<9} {check.verdict:<7} {check.text}")
    return good
