"""`report.html`: one file that needs no network, made from the folder of a run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.report.curves import curves
from sft.report.data import preview, skipped, sources
from sft.report.folder import RunFolder
from sft.report.maps import maps
from sft.report.numbers import count, figure, percent
from sft.report.summary import facts, metrics, phases, status, title
from sft.report.svg import svg

TEMPLATES = Path(__file__).parent / "templates"


def page(run: RunFolder) -> str:
    """Return the report of a run as HTML.

    Args:
        run: sections that it does not have are left out.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": svg, "figure": figure, "count": count, "percent": percent}
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(style=style, **_content(run))


def _content(run: RunFolder) -> dict[str, Any]:
    """Return what the template shows."""
    judged, others, course = curves(run.lines, run.section("before"))
    samples = run.record.get("samples")
    return {
        "name": run.path.resolve().name,
        "title": title(run),
        "status": status(run),
        "metrics": metrics(run),
        "facts": facts(run),
        "judged": judged,
        "others": others,
        "course": course,
        "maps": maps(run),
        "support": run.section("support"),
        "forgetting": run.section("forgetting"),
        "samples": samples if isinstance(samples, list) else [],
        "data": run.section("data"),
        "sources": sources(run.section("data")),
        "skipped": skipped(run.section("data")),
        "preview": preview(run.section("data")),
        "phases": phases(run),
        "versions": run.section("versions"),
        "recipe": run.recipe_text,
    }
