"""Put an exported folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from sft.errors import UserError, one_line


def push(folder: Path, repository: str, *, private: bool = False, key: str = "--push") -> str:
    """Upload a folder; the repository is made when it is not there.

    Args:
        folder: with its model card.
        repository: such as "me/my-model".
        private: of a new repository.
        key: where the user named it.

    Returns:
        The address.

    Raises:
        UserError: the hub refuses: no token, no such name, no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message=f"Upload {folder.name}"
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(
            f"{key}: {repository}: not uploaded ({one_line(error)[:300]}); log in with "
            "`hf auth login`; the folder is in " + str(folder)
        ) from error
    return str(address)
