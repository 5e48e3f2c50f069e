"""llama.cpp in a process of its own: quantises a file, or loads one and answers.

    python llama_child.py FOLLOW PARENT-ID quantize IN.gguf OUT.gguf FILE_TYPE THREADS
    python llama_child.py FOLLOW PARENT-ID serve MODEL.gguf THREADS CONTEXT LOGITS [--no-repacking]

Runs in any Python that has numpy and llama-cpp-python or cyllama; it imports nothing of ours. FOLLOW is a script whose
follow(PARENT-ID) ends this process with its parent: bench's worker.py. `serve` reads one JSON
command a line and answers each with one JSON line: {"do": "time", "ids", "prefill"} -> seconds of reading the first
`prefill` ids and of the rest one by one; {"do": "score", "rows"} -> logits fp32 [rows, T, V] in the file LOGITS;
{"do": "memory"}.
"""

import ctypes
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def memory(field: str) -> int:
    """Bytes of this process: "VmHWM" is the most it ever had, "VmRSS" what it has now; 0 where the system tells not."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


class LlamaCppPython:
    """llama.cpp through llama-cpp-python, which pip compiles for the CPU it is on."""

    def __init__(self) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        self.name = f"llama-cpp-python {llama_cpp.__version__}"

    def features(self) -> str:
        """The instruction sets this build uses, as llama.cpp prints them."""
        return str(self.api.llama_print_system_info().decode())

    def quantize(self, source: str, target: str, file_type: int, threads: int) -> None:
        params = self.api.llama_model_quantize_default_params()
        params.ftype, params.nthread = file_type, threads
        if self.api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
            raise SystemExit("llama.cpp could not quantise the file")

    def load(self, path: str, threads: int, context: int, repacking: bool) -> None:
        options = self.api.llama_model_default_params()
        options.use_extra_bufts = repacking
        self.model = self.api.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise SystemExit("llama.cpp could not load the file")
        params = self.api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        self.context = self.api.llama_init_from_model(self.model, params)
        self.vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def read(self, ids: list[int], start: int, every: bool) -> np.ndarray:
        """Logits [T, V] of ids at positions start ..., or [1, V] of the last one."""
        count = len(ids)
        batch = self.api.llama_batch_init(count, 0, 1)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = every or i == count - 1
        batch.n_tokens = count
        failed = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if failed:
            raise SystemExit(f"llama_decode failed: {failed}")
        rows = count if every else 1
        values = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(values, shape=(rows, self.vocab))


class Cyllama:
    """llama.cpp through cyllama's prebuilt wheel."""

    def __init__(self) -> None:
        import importlib.metadata

        import cyllama.llama.llama_cpp as api

        self.api: Any = api
        api.disable_logging()
        self.name = f"cyllama {importlib.metadata.version('cyllama')}"

    def features(self) -> str:
        """Unknown: the wheel does not say."""
        return ""

    def quantize(self, source: str, target: str, file_type: int, threads: int) -> None:
        params = self.api.LlamaModelQuantizeParams()
        params.ftype, params.nthread = file_type, threads
        self.api.model_quantize(source, target, params)

    def load(self, path: str, threads: int, context: int, repacking: bool) -> None:
        if not repacking:
            raise SystemExit("cyllama repacks weights always")
        # The wheel's logits ask the model object for the number of tokens, which only its vocabulary has.
        kind = type("Model", (self.api.LlamaModel,), {"n_vocab": property(lambda model: model.get_vocab().n_vocab)})
        self.model = kind(path)
        settings = self.api.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        self.context = self.api.LlamaContext(self.model, settings)

    def clear(self) -> None:
        self.context.kv_cache_clear()

    def read(self, ids: list[int], start: int, every: bool) -> np.ndarray:
        """Logits [T, V] of ids at positions start ..., or [1, V] of the last one."""
        batch = self.api.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(ids, start, every)
        self.context.decode(batch)
        which = range(len(ids)) if every else [len(ids) - 1]
        return np.array([self.context.get_logits_ith(i) for i in which], dtype=np.float32)


def backend() -> Any:
    """llama-cpp-python where it is installed, else cyllama."""
    try:
        return LlamaCppPython()
    except ImportError:
        return Cyllama()


def timed(llama: Any, ids: list[int], prefill: int) -> dict[str, Any]:
    """Seconds of the prefill and of every token after it, from an empty context."""
    llama.clear()
    started = time.perf_counter()
    llama.read(ids[:prefill], 0, False)
    read = time.perf_counter()
    for i in range(prefill, len(ids)):
        llama.read([ids[i]], i, False)
    return {"prefill": read - started, "decode": time.perf_counter() - read}


def score(llama: Any, rows: list[list[int]], path: str) -> dict[str, Any]:
    """Logits of every position of every row, each from an empty context, as fp32 in the file `path`."""
    vocab = 0
    with open(path, "wb") as file:  # noqa: PTH123
        for row in rows:
            llama.clear()
            logits = np.ascontiguousarray(llama.read(row, 0, True))
            vocab = logits.shape[1]
            file.write(logits.tobytes())
    return {"vocab": vocab}


def serve(path: str, threads: int, context: int, logits: str, repacking: bool) -> None:
    """Load a model and answer commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    llama = backend()
    before = memory("VmRSS")
    started = time.perf_counter()
    llama.load(path, threads, context, repacking)
    loaded = time.perf_counter() - started
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "time":
            answer = timed(llama, command["ids"], command["prefill"])
        elif command["do"] == "score":
            answer = score(llama, command["rows"], logits)
        else:
            answer = {"peak": memory("VmHWM"), "before": before, "load_seconds": loaded, "library": llama.name}
            answer["features"] = llama.features()
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    runpy.run_path(sys.argv.pop(1))["follow"](int(sys.argv.pop(1)))
    if sys.argv[1] == "quantize":
        llama = backend()
        llama.quantize(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        print(llama.name)
    else:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], "--no-repacking" not in sys.argv)


if __name__ == "__main__":
    main()
