"""Saved banks on the Hugging Face hub: found there by `user/repo`, and uploaded.

The arguments are those of huggingface_hub's ModelHubMixin, which is not used: its `save_pretrained` takes config.json
away before it writes, so that a save that is cut short loses the bank that was there, and its `from_pretrained` passes
what config.json holds to the class.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from fewshot_diti.bank_files import CARD, PICTURE

_REPO = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_FILES = ["*.json", "*.safetensors", CARD, PICTURE]  # of a bank; nothing else is downloaded


def is_repo(name: str) -> bool:
    """Whether a text has the form of a repository's name, user/repo."""
    return _REPO.fullmatch(name) is not None


def saved_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder of a saved bank: the path itself where something is there, else that of `user/repo`, downloaded.

    HF_HUB_OFFLINE=1 in the environment, or `local_files_only`, takes what was downloaded before. Files are JSON and
    safetensors, so that reading them runs no code.

    Args:
        revision, token, cache_dir, local_files_only, force_download: as of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: there is no such repository or revision, or the hub cannot be reached.
    """
    if os.path.exists(name_or_path) or not (isinstance(name_or_path, str) and is_repo(name_or_path)):
        return Path(name_or_path)
    try:
        folder = snapshot_download(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=_FILES,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"There is no folder {name_or_path}, and no repository of that name{f' ({revision})' if revision else ''} "
            f"that can be had from the hub: {reason}"
        ) from error
    return Path(folder)


def upload(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Makes the repository where it is missing, and puts what `save` writes into it in one commit; a bank that was
    there is replaced.

    Returns what `HfApi.upload_folder` does.

    Raises:
        HfHubHTTPError: the hub refuses, for want of a token, say.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=_FILES,
        )
