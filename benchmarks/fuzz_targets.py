"""What `fuzz.py` mutates: small valid files of every kind that we read, with their mutations and readers."""

import io
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files import json_file, safetensors_file, ternary
from bitnet.files.checkpoint import read_save, write_save
from bitnet.files.gguf import file as gguf_file
from bitnet.files.gguf.export import TYPES, export_gguf
from bitnet.files.gguf.file import Float32, write_gguf
from bitnet.files.gguf.read import BLOCKS, GgufSource
from bitnet.files.hf import config as hf_config
from bitnet.files.hf.export import export_hf
from bitnet.files.hf.read import HfSource
from bitnet.files.hf.tokenizer_json import byte_level_json, sentencepiece_json
from bitnet.files.importing import import_model
from bitnet.files.packed import read_packed, write_packed
from bitnet.files.packed_layout import content_digest
from bitnet.files.safetensors_file import INDEX, TensorFiles, TensorWriter
from bitnet.files.sentencepiece_model import SentencePieceModel, read_pieces, write_pieces
from bitnet.files.source import TrainedSource
from bitnet.kernels.reference import WeightCodes
from bitnet.model import Transformer
from bitnet.text.json_tokenizer import JsonTokenizer, Settings, byte_alphabet, load_json_tokenizer
from bitnet.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from bitnet.text.tokenizer import Tokenizer

Random = random.Random


@dataclass(frozen=True)
class Target:
    """A reader, its valid inputs, and how they are mutated. share: how many of 100 inputs it gets."""

    name: str
    share: int
    seeds: list[bytes]
    mutate: Callable[[bytes, Random], bytes]
    read: Callable[[bytes], object]


def make_targets(folder: Path) -> list[Target]:
    """All readers. folder: where inputs are written for readers of files."""
    tokenizer = train_sentencepiece(["ab abc abcd\n" * 50], 264)
    byte_level = make_byte_level()
    bitnet, llama = make_model(tokenizer, 256), make_model(byte_level, 64, sub_norms=False)
    return [
        *gguf_targets(folder, bitnet, llama),
        *safetensors_targets(folder, bitnet),
        *json_targets(),
        *tokenizer_targets(tokenizer, byte_level),
        packed_target(folder, bitnet, llama),
        *folder_targets(folder, bitnet, llama),
        save_target(folder),
    ]


def make_byte_level() -> JsonTokenizer:
    """A byte-level BPE with two control tokens and a chat template."""
    tokens = [*byte_alphabet(), "ab", "abc", "<s>", "</s>"]
    text = byte_level_json(tokens, ["a b", "ab c"], [258, 259], {258, 259}, "llama-bpe", 258)
    return JsonTokenizer(text, Settings(264, 258, (259,), "{{ messages[0]['content'] }}"))


def make_model(tokenizer: Tokenizer, width: int, **changes: Any) -> TrainedSource:
    shape = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, num_key_value_heads=1, max_position_embeddings=16, **shape)
    model = Transformer(config.replace(hidden_act="silu", qk_norm=False, **changes))
    model.init_weights(0)
    return TrainedSource(model, tokenizer, {})


# ---- readers -----------------------------------------------------------------------------------------------


def gguf_targets(folder: Path, bitnet: TrainedSource, llama: TrainedSource) -> list[Target]:
    path, out = folder / "m.gguf", folder / "gguf.safetensors"
    wide = [kind for kind in TYPES if kind != "f32"]
    models = [export_gguf(bitnet, path, kind).read_bytes() for kind in wide]
    models += [export_gguf(llama, path, kind).read_bytes() for kind in ("q2_0", "f32")]
    containers = [gguf_container(kind) for kind in gguf_file.TYPE_IDS]

    def header(data: bytes) -> None:
        found = gguf_file.parse_header(data)
        for value in found.keys.values():
            if isinstance(value, gguf_file.StringArray):
                list(value)
        for place in found.tensors.values():
            content, k = np.frombuffer(data, np.uint8, place.size, place.offset), place.shape[-1]
            n = math.prod(place.shape) // k
            if place.type in BLOCKS:
                BLOCKS[place.type].decode(content, n, k, place.name)
            elif place.type == "I2_S":
                ternary.decode_i2_s(content, n, k, place.name)

    def model(data: bytes) -> None:
        path.write_bytes(data)
        source = GgufSource(path)
        import_model(source, out, source.tokenizer)

    return [
        Target("gguf container", 26, containers, lambda seed, rng: mutate_bytes(seed, rng, 400), header),
        Target("gguf model", 5, models, lambda seed, rng: mutate_bytes(seed, rng, 12_000), model),
    ]


def gguf_container(kind: str) -> bytes:
    """A file with keys of every type and one tensor of `kind`."""
    codes = torch.randint(-1, 2, (2, 256), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    if kind in BLOCKS:
        data = BLOCKS[kind].encode(WeightCodes(codes, torch.tensor(0.5)))
    else:
        size = {"F32": 2048, "F16": 1024, "BF16": 1024, "I2_S": 160}[kind]
        data = np.full(size, 0x55, np.uint8)
    keys = {"general.architecture": "bitnet", "a": True, "b": 7, "c": Float32(1.5), "d": ["x", "", "yz"]}
    file = io.BytesIO()
    write_gguf(file, {**keys, "e": [1, 2], "f": [0.5]}, [("t", (2, 256), kind)], iter([data]))
    return file.getvalue()


def safetensors_targets(folder: Path, bitnet: TrainedSource) -> list[Target]:
    hf = export_hf(bitnet, folder / "whole", packed=True)
    one = (hf / "model.safetensors").read_bytes()
    small = io.BytesIO()
    plan = {name: (dtype, (2, 3)) for name, dtype in safetensors_file.DTYPES.items()}
    writer = TensorWriter(small, plan, {"format": "pt"})
    for name, (dtype, shape) in plan.items():
        writer.write(name, torch.zeros(shape, dtype=dtype))
    sharded = write_shards(folder / "sharded", hf)

    def header(data: bytes) -> None:
        _, places = safetensors_file.parse_header(data, len(data))
        start = 8 + int.from_bytes(data[:8], "little")
        for place in places.values():
            np.frombuffer(data, np.uint8, place.size, start + place.start)

    def index(data: bytes) -> None:
        (sharded / INDEX).write_bytes(data)
        files = TensorFiles(sharded)
        for name in files.entries:
            files.read(name)

    return [
        Target("safetensors", 24, [small.getvalue(), small.getvalue(), one], mutate_safetensors, header),
        Target("sharded index", 6, [(sharded / INDEX).read_bytes()], mutate_json, index),
    ]


def write_shards(folder: Path, hf: Path) -> Path:
    """The tensors of a folder in two shards with an index."""
    folder.mkdir()
    tensors = TensorFiles(hf)
    listed = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors.entries)}
    for shard in sorted(set(listed.values())):
        plan = {name: (p.dtype, p.shape) for name, (_, p) in tensors.entries.items() if listed[name] == shard}
        with (folder / shard).open("wb") as file:
            writer = TensorWriter(file, plan, {})
            for name in plan:
                writer.write(name, tensors.read(name))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    return folder


def json_targets() -> list[Target]:
    """config.json of all kinds, read in memory."""
    shape = ModelConfig(vocab_size=9, hidden_size=64, intermediate_size=64, num_hidden_layers=1, qk_norm=False)
    seeds = []
    for kind in hf_config.WeightForm:
        config = shape.replace(sub_norms=kind is not hf_config.WeightForm.DIVIDE)
        seeds.append(
            json.dumps(hf_config.to_config(config, kind, {"bos_token_id": 1, "eos_token_id": [2, 3]})).encode()
        )
    path = Path("config.json")

    def config_json(data: bytes) -> None:
        values = json_file.parse_json(data)
        hf_config.from_config(path, values, hf_config.read_form(path, values), ["lm_head.weight"])

    return [Target("config.json", 14, seeds, mutate_json, config_json)]


def tokenizer_targets(tokenizer: SentencePieceTokenizer, byte_level: JsonTokenizer) -> list[Target]:
    model = tokenizer.to_bytes()
    pieces = read_pieces(model).pieces
    settings = byte_level.settings

    def tokenizer_json(data: bytes) -> None:
        found = JsonTokenizer(text_of(data), settings)
        found.decode(found.encode("ab abc \u00e9"))

    def packed_tokenizer(data: bytes) -> None:
        load_json_tokenizer(data)

    def sentencepiece(data: bytes) -> None:
        sentencepiece_json(read_pieces(data), None)

    def sentencepiece_library(data: bytes) -> None:
        found = SentencePieceTokenizer(data)
        found.decode(found.encode("ab abc \u00e9"))

    def proto(seed: bytes, rng: Random) -> bytes:
        return mutate_bytes(seed, rng, len(seed))

    jsons = [byte_level.tokenizer_json.encode(), sentencepiece_json(read_pieces(model), 1).encode()]
    return [
        Target("tokenizer.json", 3, jsons, mutate_json, tokenizer_json),
        Target("tokenizer settings", 2, [byte_level.to_bytes()], mutate_json, packed_tokenizer),
        Target("sentencepiece", 6, [write_pieces(SentencePieceModel(pieces[:9], True)), model], proto, sentencepiece),
        Target("sentencepiece library", 3, [model], proto, sentencepiece_library),
    ]


def packed_target(folder: Path, bitnet: TrainedSource, llama: TrainedSource) -> Target:
    path = folder / "packed.safetensors"
    seeds = []
    for source, embedding in ((bitnet, "int8"), (llama, "bf16")):
        seeds.append(write_packed(path, source.model, source.tokenizer, embedding=embedding).read_bytes())

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_packed(path)

    return Target("packed file", 4, seeds, lambda seed, rng: sealed(mutate_safetensors(seed, rng), rng), read)


def sealed(data: bytes, rng: Random) -> bytes:
    """The mutated file, usually with a corrected checksum: otherwise no mutation would get past the check."""
    found = re.search(rb'"sha256":"([0-9a-f]{64})"', data[: 1 << 16])
    if rng.random() < 0.2 or not found:
        return data
    try:
        metadata, places = safetensors_file.parse_header(data, len(data))
    except BitNetError:
        return data
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, place in places.items():
        content = torch.frombuffer(
            bytearray(data[start + place.start :][: place.size]) or bytearray(8), dtype=torch.uint8
        )
        tensors[name] = content[: place.size].view(place.dtype).view(place.shape)
    digest = content_digest(metadata, tensors).encode()
    return data[: found.start(1)] + digest + data[found.end(1) :]


def folder_targets(folder: Path, bitnet: TrainedSource, llama: TrainedSource) -> list[Target]:
    """A Hugging Face folder with one of its files mutated, imported to a packed file as `bitnet import` does."""
    targets = []
    for label, source, packed in (("bitnet", bitnet, True), ("llama", llama, False)):
        hf = export_hf(source, folder / label, packed=packed)
        names = sorted(path.name for path in hf.iterdir())
        contents = [(hf / name).read_bytes() for name in names]
        # The first byte is the number of the mutated file.
        seeds = [bytes([i]) + content for i, content in enumerate(contents)]

        def mutate(seed: bytes, rng: Random, names: list[str] = names) -> bytes:
            kind = Path(names[seed[0]]).suffix
            change = {".json": mutate_json, ".safetensors": mutate_safetensors}.get(kind, mutate_bytes)
            return seed[:1] + change(seed[1:], rng)

        def read(
            data: bytes, hf: Path = hf, names: list[str] = names, contents: list[bytes] = contents, label: str = label
        ) -> None:
            name = names[data[0]]
            (hf / name).write_bytes(data[1:])
            try:
                found = HfSource(hf)
                import_model(found, folder / f"{label}.safetensors", found.tokenizer)
            finally:
                (hf / name).write_bytes(contents[data[0]])

        targets.append(Target(f"folder, {label}", 2, seeds, mutate, read))
    return targets


def save_target(folder: Path) -> Target:
    saves = folder / "saves"
    path = write_save(saves, 1, {"model": {"a": torch.zeros(3)}}, {"step": 1, "rng": [1, 2]})

    def read(data: bytes) -> None:
        (path / "manifest.json").write_bytes(data)
        read_save(path)

    return Target("save manifest", 3, [(path / "manifest.json").read_bytes()], mutate_json, read)


def text_of(data: bytes) -> str:
    """Decoded UTF-8; invalid bytes are refused as the folder's reader refuses them."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BitNetError(f"got text that is not UTF-8 ({error})") from None


# ---- mutations ---------------------------------------------------------------------------------------------

NUMBERS = [
    *(0, 1, 2, 3, 7, 8, 31, 32, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1),
]
VALUES = [
    *(b"null", b"true", b"false", b"0", b"-1", b"1e9", b"1e999", b"NaN", b"-0.0", b"1.5", b"9" * 20, b"9" * 5000),
    *(b'""', b'"F32"', b'"U8"', b'"\\ud800"', b'"../x"', b'"a"', b'"bitlinear"', b'"' + b"x" * 300 + b'"'),
    *(b"[]", b"{}", b"[1,2]", b"[[]]", b'{"a":1}', b"[" * 2000, b"[" * 40 + b"]" * 40, b'{"a":' * 2000),
    *(str(number).encode() for number in NUMBERS),
]
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null|[{}\[\],:]')


@cache
def spans(text: bytes) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The positions of the tokens of a JSON text, and of the values among them."""
    found = [match.span() for match in TOKEN.finditer(text)]
    values = [(start, end) for start, end in found if text[start] not in b"{}[],:" and text[end : end + 1] != b":"]
    return found, values or found


def mutate_json(seed: bytes, rng: Random) -> bytes:
    """One to three values replaced, or tokens of any kind doubled, moved or dropped; sometimes bytes instead."""
    if rng.random() < 0.1:
        return mutate_bytes(seed, rng)
    tokens, values = spans(seed)
    data, stop = bytearray(seed), len(seed)
    gentle = rng.random() < 0.6
    found = values if gentle else tokens
    places = {rng.randrange(len(found)) for _ in range(rng.choice((1, 1, 2, 3)))}
    for place in sorted(places, reverse=True):
        start, end = found[place]
        change = rng.randrange(2 if gentle else 4)
        if change == 0:
            data[start:end] = rng.choice(VALUES)
        elif change == 1:
            other = found[rng.randrange(len(found))]
            data[start:end] = seed[other[0] : other[1]]
        else:  # a range of tokens, such as a name with its value
            last = found[min(place + rng.choice((0, 3, 4, 8)), len(found) - 1)][1]
            data[start : min(last, stop)] = seed[start:last] * rng.choice((0, 2, 2))
        stop = start
    return bytes(data)


def mutate_safetensors(seed: bytes, rng: Random) -> bytes:
    """The header as JSON, with a length that fits; its tensors; or any bytes."""
    length = 8 + int.from_bytes(seed[:8], "little")
    draw = rng.random()
    if draw < 0.2:
        return mutate_bytes(seed, rng, length)
    if draw < 0.4:
        return seed[:length] + mutate_bytes(seed[length:] or b"x", rng)
    text = mutate_json(seed[8:length], rng)
    return len(text).to_bytes(8, "little") + text + seed[length:]


def mutate_bytes(seed: bytes, rng: Random, header: int = 1 << 20) -> bytes:
    """One to four changes, most of them where the header is: bits, numbers that overflow, cuts, repeats."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at = rng.randrange(min(header, len(data))) if rng.random() < 0.9 else rng.randrange(len(data))
        change = rng.randrange(8)
        if change == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at] = rng.randrange(256)
        elif change in (2, 3):
            size = rng.choice((1, 2, 4, 8))
            data[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        elif change == 4:
            del data[rng.randrange(1, len(data)) if len(data) > 1 else 0 :]
        elif change == 5:
            data[at:at] = data[at : at + rng.randrange(1, 200)] * rng.choice((1, 1, 2, 50))
        elif change == 6:
            del data[at : at + rng.randrange(1, 100)]
        else:
            part = rng.randbytes(rng.randrange(1, 16))
            data[at : at + rng.choice((0, len(part)))] = part
        if len(data) < 2:
            break
    return bytes(data)
