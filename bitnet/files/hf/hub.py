"""Models by their name on the Hugging Face hub, where there is a network."""

import re
from pathlib import Path

from bitnet.errors import BitNetError

# Safetensors, GGUF and JSON only: no pickles, no code.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "chat_template.jinja"]
_BELOW = ["*/*"]  # a star matches slashes as well, and other models lie in sub-folders


def download(name: str) -> Path:
    """The folder or GGUF file of a model "owner/model", fetched unless it is in the cache.

    Raises BitNetError for an invalid name, without huggingface_hub, and where the hub cannot be reached.
    """
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name):
        raise BitNetError(f"got nothing at '{name}', expected a file, a folder, or a hub name such as owner/model")
    try:
        from huggingface_hub import list_repo_files, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise BitNetError(
            f"got no file or folder '{name}'; to fetch it from the hub: from a clone: pip install '.[hub]'"
        ) from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=_PATTERNS, ignore_patterns=_BELOW))
        if (folder / "config.json").is_file():
            return folder
        found = sorted(file for file in list_repo_files(name) if "/" not in file and file.endswith(".gguf"))
        if len(found) == 1:
            return Path(snapshot_download(name, allow_patterns=found, ignore_patterns=_BELOW)) / found[0]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BitNetError(
            f"got the hub name '{name}', which cannot be fetched ({reason}); check the network"
        ) from error
    listed = ", ".join(found) if len(found) < 20 else f"{len(found)} of them"
    raise BitNetError(
        f"got the hub name '{name}', which has no config.json and the GGUF files [{listed}], expected one such file; "
        "download one and give its path"
    )
