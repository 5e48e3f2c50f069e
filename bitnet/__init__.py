"""BitNet b1.58: ternary language models, from training to a packed model that runs.

import bitnet
model = bitnet.load("model.safetensors")            # an engine: token ids in, token ids out
ids = model.generate(model.tokenizer.encode("def main("), 50)
print(model.tokenizer.decode(ids))

bitnet.convert(any_torch_model)                     # nn.Linear -> BitLinear, in place
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bitnet.config import PRESETS, ModelConfig
    from bitnet.conversion import convert
    from bitnet.engine.load import load
    from bitnet.errors import BitNetError
    from bitnet.layers import BitLinear
    from bitnet.model import Transformer

__all__ = ["PRESETS", "BitLinear", "BitNetError", "ModelConfig", "Transformer", "convert", "load"]

# Imported on first use: `bitnet --help` must not wait for torch, and bitnet.kernels can be imported without the rest.
_MODULES = {
    "PRESETS": "config",
    "ModelConfig": "config",
    "convert": "conversion",  # a module named convert would replace the function as an attribute of the package
    "BitNetError": "errors",
    "BitLinear": "layers",
    "Transformer": "model",
    "load": "engine.load",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'bitnet' has no attribute '{name}'")
    return getattr(import_module(f"bitnet.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
