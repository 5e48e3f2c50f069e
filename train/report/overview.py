"""What a run is about to do, in a line a subject."""

from bitnet.config import ModelConfig
from bitnet.files.packed_layout import packed_bytes
from bitnet.files.tensors import float16_bytes, parameters
from bitnet.train.config import RunConfig
from bitnet.train.data.shards import TokenDataset
from bitnet.train.parallel.distributed import Processes


def overview(
    config: RunConfig, model: ModelConfig, dataset: TokenDataset, processes: Processes, dtype: str, sequences: int
) -> dict[str, str]:
    """Subject and text: the model's sizes, the data's, and what a step of so many sequences is."""
    settings = config.train
    tokens = sequences * config.context
    several = f", {processes.size} processes ({settings.parallel})" if processes.size > 1 else ""
    return {
        "model": f"{parameters(model) / 1e6:.2f}M parameters, {model.linear}; packed {size(packed_bytes(model))}, "
        f"fp16 {size(float16_bytes(model))}",
        "data": f"{len(dataset.train):,} training tokens, {len(dataset.val):,} for validation, "
        f"{model.vocab_size:,} in the vocabulary",
        "training": f"{settings.steps} steps of {tokens:,} tokens on {processes.device.type} in {dtype}{several}",
    }


def duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """Bytes as a person says them."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
