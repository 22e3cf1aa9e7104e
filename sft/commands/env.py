"""`sft env`: what a bug report needs."""

from __future__ import annotations


def env() -> None:
    """Print versions, devices and threads, to paste into a bug report."""
    from sft.environment import report

    print(report())
