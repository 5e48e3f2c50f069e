"""llama.cpp in a child process, through llama-cpp-python or cyllama in whichever Python has one of them.

Imports nothing of ours. `load` returns one of three, by `purpose`:

    drive       `LlamaDriver`: a GGUF file with TQ2_0 projections under `bitnet bench`; llama-cpp-python only
    score       `LlamaScorer`: any GGUF file under `bitnet compare`
    quantize    `LlamaQuantizer`: a float GGUF file to a smaller type

Keys and values are F16, llama.cpp's default.
"""

import ctypes
import importlib.metadata
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

try:
    import llama_cpp
except ImportError:  # no llama-cpp-python: cyllama's prebuilt wheel
    llama_cpp = None  # type: ignore[assignment, unused-ignore]
    import cyllama.llama.llama_cpp as cyllama

_Q6_K = 14  # GGML_TYPE_Q6_K

_UBATCH = 512  # tokens computed at once, llama.cpp's default


class LlamaCppPython:
    """llama.cpp through llama-cpp-python, which pip compiles for the CPU it is on."""

    def __init__(self) -> None:
        llama_cpp.llama_backend_init()
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        self.name = f"llama-cpp-python {llama_cpp.__version__}"
        self.model: Any = None
        self.context: Any = None

    def features(self) -> str:
        """The instruction sets this build uses, as llama.cpp prints them."""
        return str(llama_cpp.llama_print_system_info().decode())

    def quantize(self, source: str, target: str, file_type: int, threads: int, embedding: int | None = None) -> None:
        """Write `target` in a `llama_ftype`. embedding: a `ggml_type` for embedding and head, or the type's own."""
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = file_type, threads
        if embedding is not None:
            params.token_embedding_type = params.output_tensor_type = embedding
        if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
            raise RuntimeError("llama.cpp could not quantise the GGUF file")

    def load(self, path: str, repacking: bool = True) -> None:
        """Load a model. repacking: lay its weights out for this CPU."""
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = repacking
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp could not load the GGUF file")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def open(self, threads: int, sequences: int, capacity: int, ubatch: int) -> None:
        """A fresh context for `sequences` of `capacity` tokens, computed `ubatch` tokens at once."""
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * capacity, sequences
        params.n_batch = params.n_ubatch = ubatch
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context of {sequences} x {capacity} tokens")

    def clear(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def batch_of(self, entries: list[tuple[int, int, int]], scored: set[int]) -> Any:
        """entries: token, position and sequence. scored: indices of the entries whose logits are computed."""
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in scored
        return batch

    def decode(self, batch: Any) -> None:
        """Compute one batch."""
        failed = llama_cpp.llama_decode(self.context, batch)
        if failed:
            raise RuntimeError(f"llama_decode failed with {failed}")

    def read(self, ids: list[int], start: int, every: bool) -> np.ndarray:
        """Logits [T, V] of ids at positions start ..., or [1, V] of the last one."""
        count = len(ids)
        scored = set(range(count)) if every else {count - 1}
        batch = self.batch_of([(token, start + i, 0) for i, token in enumerate(ids)], scored)
        try:
            self.decode(batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        values = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(values, shape=(len(scored), self.vocab))


class Cyllama:
    """llama.cpp through cyllama's prebuilt wheel."""

    def __init__(self) -> None:
        cyllama.disable_logging()
        self.name = f"cyllama {importlib.metadata.version('cyllama')}"

    def features(self) -> str:
        """Unknown: the wheel does not say."""
        return ""

    def quantize(self, source: str, target: str, file_type: int, threads: int, embedding: int | None = None) -> None:
        """Write `target` in a `llama_ftype`."""
        assert embedding is None, embedding
        params = cyllama.LlamaModelQuantizeParams()
        params.ftype, params.nthread = file_type, threads
        cyllama.model_quantize(source, target, params)

    def load(self, path: str, repacking: bool = True) -> None:
        """Load a model."""
        if not repacking:
            raise RuntimeError("cyllama always repacks weights")
        # The wheel's logits ask the model object for the number of tokens, which only its vocabulary has.
        kind = type("Model", (cyllama.LlamaModel,), {"n_vocab": property(lambda model: model.get_vocab().n_vocab)})
        self.model = kind(path)

    def open(self, threads: int, sequences: int, capacity: int, ubatch: int) -> None:
        """A fresh context for one sequence of `capacity` tokens, computed `ubatch` tokens at once."""
        assert sequences == 1, sequences
        params = cyllama.LlamaContextParams()
        params.n_ctx = capacity
        params.n_batch = params.n_ubatch = ubatch
        params.n_threads = params.n_threads_batch = threads
        self.context = cyllama.LlamaContext(self.model, params)

    def clear(self) -> None:
        """Forget all tokens."""
        self.context.kv_cache_clear()

    def read(self, ids: list[int], start: int, every: bool) -> np.ndarray:
        """Logits [T, V] of ids at positions start ..., or [1, V] of the last one."""
        batch = cyllama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(ids, start, every)
        self.context.decode(batch)
        which = range(len(ids)) if every else [len(ids) - 1]
        return np.array([self.context.get_logits_ith(i) for i in which], dtype=np.float32)


def library() -> Any:
    """llama-cpp-python where it is installed, else cyllama."""
    return Cyllama() if llama_cpp is None else LlamaCppPython()


class LlamaQuantizer:
    """Quantises GGUF files."""

    def __init__(self) -> None:
        self._library = library()
        self.facts: dict[str, Any] = {"library": self._library.name}

    def quantize(self, source: str, target: str, file_type: int, threads: int) -> dict[str, Any]:
        """Write `target` in a `llama_ftype`."""
        self._library.quantize(source, target, file_type, threads)
        return {}


class LlamaScorer:
    """A GGUF file that is timed and that scores text. logits: the file that `score` writes."""

    def __init__(self, path: str, threads: int, context: int, logits: str, repacking: bool = True) -> None:
        self._llama, self._logits = library(), logits
        self._llama.load(path, repacking)
        self._llama.open(threads, 1, context, context)
        self.facts: dict[str, Any] = {"library": self._llama.name, "features": self._llama.features()}

    def time(self, ids: list[int], prefill: int) -> dict[str, Any]:
        """Seconds of reading the first `prefill` ids, and of the rest one by one, from an empty context."""
        self._llama.clear()
        started = time.perf_counter()
        self._llama.read(ids[:prefill], 0, False)
        read = time.perf_counter()
        for i in range(prefill, len(ids)):
            self._llama.read([ids[i]], i, False)
        return {"prefill": read - started, "decode": time.perf_counter() - read}

    def score(self, rows: list[list[int]]) -> dict[str, Any]:
        """Write the logits of every position of every row, each from an empty context: fp32 [rows, T, V]."""
        return write_logits(self._llama, rows, self._logits)


def write_logits(llama: Any, rows: list[list[int]], path: str) -> dict[str, Any]:
    """Write fp32 logits [rows, T, V] to `path`, replacing what was there. Returns V."""
    vocab = 0
    with Path(path).open("wb") as file:
        for row in rows:
            llama.clear()
            logits = np.ascontiguousarray(llama.read(row, 0, True))
            vocab = logits.shape[1]
            file.write(logits.tobytes())
    return {"vocab": vocab}


class LlamaDriver:
    """A GGUF file as a benchmark drives it."""

    def __init__(self, path: str, threads: int) -> None:
        self._llama, self._threads = LlamaCppPython(), threads
        self._llama.load(path)
        self._position = self._sequences = 0
        self._tokens: Any = None
        self._batches: dict[int, list[Any]] = {}  # position -> batches that are read from there
        model = self._llama.model
        width = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
        self.facts: dict[str, Any] = {
            "what": f"llama.cpp ({self._llama.name}), TQ2_0, Q6_K embedding, F16 cache",
            "system": self._llama.features(),
            "backend": "llama.cpp",
            "weight_bytes": llama_cpp.llama_model_size(model),
            "kv_bytes": 2 * llama_cpp.llama_model_n_layer(model) * llama_cpp.llama_model_n_head_kv(model) * width * 2,
            "peak": "int8 dot products",
        }

    def start(self, batch: int, depth: int, capacity: int) -> None:
        """A context of `batch` sequences of `capacity` tokens, `depth` of them read."""
        self._llama.open(self._threads, batch, capacity, max(_UBATCH, batch))
        self._position, self._sequences = 0, batch
        # Drawn before the test: what is timed is llama.cpp, not Python's random numbers.
        drawn = (random.randrange(self._llama.vocab) for _ in range(capacity))
        self._tokens = (llama_cpp.llama_token * capacity)(*drawn)
        if depth:
            self.prefill(depth)

    def lay_out(self, prompt: int, predict: int) -> None:
        """Make the batches before the test: what is timed is llama.cpp, not Python's loops."""
        position = self._position
        counts = [prompt] * bool(prompt) + [1] * predict
        for count in counts:
            self._batches[position] = self._batches_of(position, count)
            position += count

    def prefill(self, tokens: int) -> None:
        """Read `tokens` random ids into each sequence."""
        self._read(tokens)

    def decode(self, tokens: int) -> None:
        """Read `tokens` random ids into each sequence, one at a time."""
        for _ in range(tokens):
            self._read(1)

    def _read(self, count: int) -> None:
        """Append `count` ids to every sequence, up to the logits of its last one."""
        start, self._position = self._position, self._position + count
        for batch in self._batches.pop(start, None) or self._batches_of(start, count):
            self._llama.decode(batch)
            if self._sequences > 1:
                llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_get_logits_ith(self._llama.context, -1)  # waits for them

    def _batches_of(self, start: int, count: int) -> list[Any]:
        """Batches of `count` positions of every sequence, with logits of the last position."""
        if self._sequences == 1:
            return [self._view(at, min(_UBATCH, start + count - at)) for at in range(start, start + count, _UBATCH)]
        entries = [
            (self._tokens[position], position, sequence)
            for sequence in range(self._sequences)
            for position in range(start, start + count)
        ]
        groups = [entries[first : first + _UBATCH] for first in range(0, len(entries), _UBATCH)]
        last = start + count - 1
        return [
            self._llama.batch_of(group, {i for i, entry in enumerate(group) if entry[1] == last}) for group in groups
        ]

    def _view(self, at: int, length: int) -> Any:
        width = ctypes.sizeof(llama_cpp.llama_token)
        tokens = (llama_cpp.llama_token * length).from_buffer(self._tokens, at * width)
        return llama_cpp.llama_batch_get_one(tokens, length)  # points into self._tokens


def prepare(purpose: str, threads: int = 1, raw: str = "", path: str = "", **_options: Any) -> None:
    """For `drive`: bring the embedding, which is the head too, from F16 in `raw` to Q6_K in `path`.

    llama-quantize does the same; the ternary tensors are copied as they are.
    """
    if purpose == "drive" and not Path(path).exists():
        LlamaCppPython().quantize(raw, path, llama_cpp.LLAMA_FTYPE_MOSTLY_TQ2_0, threads, _Q6_K)


def load(purpose: str, **options: Any) -> Any:
    """The object for a purpose."""
    options.pop("raw", None)  # of `prepare` alone
    return {"drive": LlamaDriver, "score": LlamaScorer, "quantize": LlamaQuantizer}[purpose](**options)
