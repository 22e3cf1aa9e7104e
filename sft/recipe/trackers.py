"""`training.report_to`: trackers that transformers knows and finds installed."""

from __future__ import annotations

from typing import Any

from sft.errors import UserError, unknown_name


def check_trackers(report_to: Any) -> None:
    """Refuse a tracker that cannot be reported to, before a model is loaded for it.

    Args:
        report_to: a name, or a list of names.

    Raises:
        UserError: one of them is not known, or not installed.
    """
    from transformers.integrations import (
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )

    names = [report_to] if isinstance(report_to, str) else report_to or []
    installed = {*get_available_reporting_integrations(), "all", "none", "flyte"}  # or not asked
    for name in names:
        try:
            get_reporting_integration_callbacks(name)
        except ValueError as error:
            near = unknown_name(str(name), installed, kind="tracker")
            raise UserError(f"training.report_to: got {name!r}: {near}; {error}") from error
        if name not in installed:
            raise UserError(
                f"training.report_to: got {name!r}, whose package is not installed; install it, "
                "or set none: log.jsonl is written anyway"
            )
