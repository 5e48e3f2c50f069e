"""What importing and exporting hold: a source, the largest tensor on its way, and nothing of what is written.

Files are written tensor by tensor (safetensors_file.py, gguf/file.py), so that of the target only the pages in the
system's cache remain, which no process owns. Sources of Hugging Face's and GGUF are read by tensor as well; a packed
file is mapped and read whole for its checksum; a run is loaded, as fp32 masters out of a mapped save.

Dimensions: N out-features, K in-features, V vocabulary, D model.
"""

from bitnet.config import ModelConfig
from bitnet.files.tensors import parameters
from bitnet.memory import INTERPRETER, Need

_LIBRARIES = INTERPRETER + 0.02e9  # readers and writers beside what every verb imports

# Bytes a weight of the largest tensor while it is converted, at most. A projection from masters: as stored and in fp32
# (8), scaled, rounded and absolute values (12), codes (1); packing needs less. `steady` of an export of masters: four
# fp32 temporaries and the result. A table: as stored, in fp32, in the target's type and its check, which goes by rows.
_IMPORT_PROJECTION, _EXPORT_PROJECTION, _TABLE = 18.0, 26.0, 12.0


def import_need(config: ModelConfig, mapped: float = 0.0) -> Need:
    """Bytes of importing a model of this shape. mapped: of a source that is mapped and read whole."""
    return Need.of(libraries=_LIBRARIES, source=mapped, largest_tensor=_largest(config, _IMPORT_PROJECTION))


def export_need(config: ModelConfig, *, trained: bool, mapped: float = 0.0) -> Need:
    """Bytes of exporting one. trained: from a run, whose save is mapped beside the model that is made of it."""
    source = 8.0 * parameters(config) if trained else mapped
    return Need.of(libraries=_LIBRARIES, source=source, largest_tensor=_largest(config, _EXPORT_PROJECTION))


def _largest(config: ModelConfig, projection: float) -> float:
    """Of a matrix of the feed-forward or a table, whichever takes more on its way."""
    table = _TABLE * config.vocab_size * config.hidden_size
    return max(table, projection * config.hidden_size * max(config.intermediate_size, config.hidden_size))
