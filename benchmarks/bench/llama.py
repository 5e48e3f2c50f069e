"""llama.cpp as a contender, through llama-cpp-python in whichever Python has it; run by worker.py, imports no bitnet.

The model is a GGUF file with TQ2_0 projections; its embedding, which is the head too, is brought to Q6_K, as
llama-quantize does. Keys and values are F16, llama.cpp's default.
"""

import ctypes
import random
from pathlib import Path
from typing import Any

import llama_cpp

_Q6_K = 14  # GGML_TYPE_Q6_K
_UBATCH = 512  # tokens computed at once, llama.cpp's default


def prepare(raw: str, path: str, threads: int) -> None:
    """F16 embedding -> Q6_K; the ternary tensors are copied as they are."""
    if Path(path).exists():
        return
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_TQ2_0
    params.token_embedding_type = params.output_tensor_type = _Q6_K
    params.nthread = threads
    llama_cpp.llama_backend_init()
    if llama_cpp.llama_model_quantize(raw.encode(), path.encode(), ctypes.byref(params)):
        raise RuntimeError("llama.cpp could not bring the embedding to Q6_K")


class Contender:
    """A GGUF file on `threads` threads."""

    def __init__(self, raw: str, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise RuntimeError("llama.cpp could not load the GGUF file")
        self._threads = threads
        self._context: Any = None
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._position = self._batch_size = 0
        self._tokens: Any = None
        self._batches: dict[int, list[Any]] = {}  # position -> what is read from there
        layers = llama_cpp.llama_model_n_layer(self._model)
        width = llama_cpp.llama_model_n_embd(self._model) // llama_cpp.llama_model_n_head(self._model)
        system = llama_cpp.llama_print_system_info().decode()
        self.facts: dict[str, Any] = {
            "what": f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), TQ2_0, Q6_K embedding, F16 cache",
            "system": system,
            "backend": "llama.cpp",
            "weight_bytes": llama_cpp.llama_model_size(self._model),
            "kv_bytes": 2 * layers * llama_cpp.llama_model_n_head_kv(self._model) * width * 2,
            "peak": "int8 dot products",
        }

    def start(self, batch: int, depth: int, room: int) -> None:
        """A context of `batch` sequences of `room` tokens, `depth` of them read."""
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = batch * room, batch
        params.n_batch, params.n_ubatch = max(_UBATCH, batch), max(_UBATCH, batch)
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not make a context of {batch} x {room} tokens")
        self._position, self._batch_size = 0, batch
        # Drawn here: what is timed is llama.cpp, not Python's random numbers.
        self._tokens = (llama_cpp.llama_token * room)(*(random.randrange(self._vocab) for _ in range(room)))
        if depth:
            self.prefill(depth)

    def ready(self, prompt: int, predict: int) -> None:
        """Lay out what will be read: what is timed is llama.cpp, not Python's loops."""
        at = self._position
        counts = [prompt] * bool(prompt) + [1] * predict
        for count in counts:
            self._batches[at] = self._laid_out(at, count)
            at += count

    def prefill(self, tokens: int) -> None:
        """Read `tokens` random ids a sequence."""
        self._read(tokens)

    def decode(self, tokens: int) -> None:
        """Read `tokens` random ids a sequence, one at a time."""
        for _ in range(tokens):
            self._read(1)

    def _read(self, count: int) -> None:
        """Append `count` ids to every sequence, up to the logits of its last one."""
        start, self._position = self._position, self._position + count
        for batch in self._batches.pop(start, None) or self._laid_out(start, count):
            failed = llama_cpp.llama_decode(self._context, batch)
            if failed:
                raise RuntimeError(f"llama_decode failed with {failed}")
            if self._batch_size > 1:
                llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_get_logits_ith(self._context, -1)  # waits for them

    def _laid_out(self, start: int, count: int) -> list[Any]:
        """Batches of `count` positions of every sequence."""
        if self._batch_size == 1:
            return [self._part(at, min(_UBATCH, start + count - at)) for at in range(start, start + count, _UBATCH)]
        rows = [(at, sequence) for sequence in range(self._batch_size) for at in range(start, start + count)]
        return [self._rows(rows[first : first + _UBATCH], start + count - 1) for first in range(0, len(rows), _UBATCH)]

    def _part(self, at: int, length: int) -> Any:
        width = ctypes.sizeof(llama_cpp.llama_token)
        part = (llama_cpp.llama_token * length).from_buffer(self._tokens, at * width)
        return llama_cpp.llama_batch_get_one(part, length)  # points into self._tokens

    def _rows(self, rows: list[tuple[int, int]], last: int) -> Any:
        """rows: position and sequence; logits of position `last`."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = self._tokens[position], position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = position == last
        return batch
