"""Uploads go through the hub's public client; what fails is one line."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from sft.errors import UserError
from sft.export.hub import push


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub's client; what it is asked for is written down."""
    calls: list[tuple[str, dict]] = []

    class Api:
        fails: Exception | None = None

        def create_repo(self, repository, **more):
            if self.fails is not None:
                raise self.fails
            calls.append(("create", {"repository": repository} | more))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repository}")

        def upload_folder(self, **more):
            calls.append(("upload", more))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api, calls


def test_a_folder_is_uploaded_to_a_repository_that_is_made(hub, tmp_path) -> None:
    address = push(tmp_path, "me/model", private=True)
    assert address == "https://huggingface.co/me/model"
    create, upload = hub[1]
    assert create == ("create", {"repository": "me/model", "private": True, "exist_ok": True})
    assert upload[1]["repo_id"] == "me/model" and upload[1]["folder_path"] == tmp_path


@pytest.mark.parametrize(
    "error", [HFValidationError("bad\nname"), OfflineModeIsEnabled("offline"), OSError("no net")]
)
def test_a_refusal_is_one_line_that_names_the_folder(hub, tmp_path, error) -> None:
    hub[0].fails = error
    with pytest.raises(UserError, match=r"^export\.push_to_hub: me/m: not uploaded \(") as caught:
        push(tmp_path, "me/m", key="export.push_to_hub")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "hf auth login" in str(caught.value)


def test_the_command_pushes_what_it_wrote(hub, byte_base, tmp_path) -> None:
    from typer.testing import CliRunner

    from sft.cli import app

    out = tmp_path / "out"
    command = ["export", str(byte_base), "--to", "merged", "--out", str(out), "--push", "me/it"]
    result = CliRunner().invoke(app, [*command, "--private"])
    assert result.exit_code == 0, result.output
    assert "https://huggingface.co/me/it: uploaded" in result.output
    assert hub[1][1][1]["folder_path"] == out and (out / "README.md").is_file()
