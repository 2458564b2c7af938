"""Pushing a model folder to the Hugging Face Hub."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from minnow.config import UserError
from minnow.errors import first_line

# What a model folder and minnow's exports consist of: nothing else that lies there is published.
FILES = ("*.json", "*.safetensors", "*.jinja", "README.md", "curves.png", "*.gguf", "Modelfile", "onnx/*")


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload the model in `folder` to `repo` (OWNER/NAME), in one commit; returns its address.

    A missing repository is created. UserError where the Hub refuses or the upload fails.
    """
    # By name: in the Hub's patterns a star stands for folders too.
    files = [path.relative_to(folder).as_posix() for pattern in FILES for path in folder.glob(pattern)]
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(map(escape, files)),
            commit_message="Upload model with minnow",
        )
    except LocalTokenNotFoundError as error:
        raise UserError("the Hugging Face Hub does not know you: run `hf auth login`, or set HF_TOKEN") from error
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise UserError(f"{repo}: the Hugging Face Hub refused ({first_line(error)})") from error
    except Exception as error:  # a network that fails raises what the hub's own HTTP client raises, by version another
        raise UserError(f"{repo}: the upload to the Hugging Face Hub failed ({first_line(error)})") from error
    return str(commit.repo_url)
