"""llama.cpp as a contender: a TQ2_0 model of random ternary weights in a given shape, prefill and decode timed.

Runs in a Python that has gguf and llama-cpp-python, compiled for this CPU (pip install --no-binary llama-cpp-python):

    python llama_worker.py '{"hidden_size": 2560, ...}' MODEL.gguf THREADS

The block is BitNet's with SiLU, which llama.cpp's `bitnet` architecture computes (its time does not depend on that).
Embedding and head are Q6_K, as llama-quantize makes them.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from worker import serve

ZEROS = 0.4  # of the weights, as trained models have


def write_model(config: dict, path: Path) -> None:
    """Write a GGUF file of random ternary weights, scale 1, embedding in F16."""
    rng = np.random.default_rng(0)
    d, f, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "bitnet")
    writer.add_name("random ternary weights")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(f)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(d // heads)
    writer.add_file_type(37)
    writer.add_quantization_version(2)
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("token_embd.weight", (rng.standard_normal((config["vocab_size"], d)) * 0.02).astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(d, np.float32))

    def ternary(name: str, n: int, k: int) -> None:
        codes = rng.choice(3, size=(n, k // 256, 2, 4, 32), p=[(1 - ZEROS) / 2, ZEROS, (1 - ZEROS) / 2]).astype(
            np.uint8
        )
        qs = codes[:, :, :, 0] | codes[:, :, :, 1] << 2 | codes[:, :, :, 2] << 4 | codes[:, :, :, 3] << 6
        scale = np.full((n, k // 256, 1), 1 / np.sqrt(k), np.float16).view(np.uint8).reshape(n, k // 256, 2)
        blocks = np.concatenate([qs.reshape(n, k // 256, 64), scale], axis=-1).reshape(n, -1)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.TQ2_0)

    kv = kv_heads * (d // heads)
    for i in range(layers):
        for name, width in (("attn_norm", d), ("attn_sub_norm", d), ("ffn_norm", d), ("ffn_sub_norm", f)):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(width, np.float32))
        for name, n, k in (("attn_q", d, d), ("attn_k", kv, d), ("attn_v", kv, d), ("attn_output", d, d)):
            ternary(f"blk.{i}.{name}.weight", n, k)
        for name, n, k in (("ffn_gate", f, d), ("ffn_up", f, d), ("ffn_down", d, f)):
            ternary(f"blk.{i}.{name}.weight", n, k)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_embedding(source: Path, target: Path) -> None:
    """F16 embedding -> Q6_K; the ternary tensors are copied as they are."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_TQ2_0
    params.token_embedding_type = 14  # GGML_TYPE_Q6_K
    params.nthread = 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError("llama.cpp could not quantise the embedding")


class Llama:
    """A loaded model and a context on `threads` threads."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)

    def decode(self, ids: list[int]) -> None:
        """Read ids behind what the context holds; logits of the last one."""
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_get_logits_ith(self.context, -1)

    def answer(self, command: dict) -> dict:
        """{"prefill": n, "decode": m} -> seconds of each, from an empty context."""
        rng = np.random.default_rng(1)
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        ids = rng.integers(0, vocab, command["prefill"] + command["decode"]).tolist()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        started = time.perf_counter()
        self.decode(ids[: command["prefill"]])
        read = time.perf_counter()
        for token in ids[command["prefill"] :]:
            self.decode([token])
        return {"prefill": read - started, "decode": time.perf_counter() - read}


def main() -> None:
    """Build the file if need be, load it and serve."""
    config, path, threads = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    if not path.exists():
        raw = path.with_suffix(".f16-embedding.gguf")
        write_model(config, raw)
        quantize_embedding(raw, path)
        raw.unlink()
    llama = Llama(path, threads, 1024)
    print(llama_cpp.llama_print_system_info().decode(), file=sys.stderr)
    serve(llama.answer)


if __name__ == "__main__":
    main()
