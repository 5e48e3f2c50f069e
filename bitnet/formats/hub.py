"""Models by their name on the Hugging Face hub, where a network is there."""

import re
from pathlib import Path

from bitnet.errors import BitNetError

# No pickles, no code: a model here is safetensors, GGUF and JSON.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "chat_template.jinja"]


def download(name: str) -> Path:
    """The folder of a model that is fetched (or was), by its name "owner/model".

    Raises BitNetError for a name that is none, without huggingface_hub, and where the hub cannot be reached.
    """
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name):
        raise BitNetError(f"got nothing at '{name}', expected a file, a folder, or a hub name such as owner/model")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise BitNetError(
            f"got no file or folder '{name}'; to fetch it from the hub: pip install 'bitnet-ternary[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BitNetError(
            f"got the hub name '{name}', which cannot be fetched ({reason}); check the network"
        ) from error
