"""Malformed rows: an error that names file and line, or a list of what was left out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sft.errors import UserError, one_line

LISTED = 1000  # rows that are listed; all are counted


@dataclass(frozen=True)
class BadRow:
    """A row that was left out."""

    file: str
    line: int  # of the file, or number of the example where a format has no lines
    reason: str


@dataclass
class BadRows:
    """What happens to malformed rows, and which ones there were.

    Args:
        key: of the recipe that names the data.
        rule: raise at the first, or leave all out.
    """

    key: str
    rule: Literal["error", "skip"] = "error"
    count: int = 0
    rows: list[BadRow] = field(default_factory=list)
    _seen: set[tuple[str, int]] = field(default_factory=set)

    def found(self, file: str, line: int, reason: object, *, unit: str = "") -> None:
        """Take note of a row.

        Args:
            file: path or name of its source.
            line: of the file.
            reason: what is wrong.
            unit: what is counted, where it is not lines: "example ".

        Raises:
            UserError: under the rule "error".
        """
        if self.rule == "error":
            skip = ", or set data.on_bad_row: skip" if self.key.startswith("data.") else ""
            raise UserError(
                f"{self.key}: {file}:{unit and ' ' + unit}{line}: {one_line(reason)}; mend the "
                f"row{skip}"
            )
        if (file, line) in self._seen:  # a stream is read again
            return
        self._seen.add((file, line))
        self.count += 1
        if len(self.rows) < LISTED:
            self.rows.append(BadRow(file, line, one_line(reason)))

    def listed(self) -> list[dict[str, Any]]:
        """Return the rows as run.json has them."""
        return [asdict(row) for row in self.rows]
