"""Files of rows, and what comes of loading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.data.load import Examples, load_data
from sft.data.spec import DataSpec
from sft.errors import UserError


@pytest.fixture
def jsonl(tmp_path):
    """Write rows, each a dict, or a line as it is."""

    def write(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def load():
    """Load with the fields of a `data:` section."""

    def found(train: Any, formats: Any = None, seed: int = 0, **fields: Any) -> Examples:
        train = train if isinstance(train, list) else str(train)
        return load_data(DataSpec(train=train, **fields), seed, formats)

    return found


@pytest.fixture
def refused(load):
    """Load, and return what is wrong."""

    def message(*args: Any, **fields: Any) -> str:
        with pytest.raises(UserError) as caught:
            found = load(*args, **fields)
            list(found.train)  # a stream is refused as it is read
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message
