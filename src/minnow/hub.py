"""Names on the Hugging Face Hub."""

from __future__ import annotations


def is_hub_id(name: str) -> bool:
    """Whether `name` reads OWNER/NAME as the Hugging Face Hub's ids do: ../model and runs/小鱼 are folders."""
    # Imported here: a local file or folder needs no Hub client.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
