"""SequenceBatch: sequences join and leave; each gives what it gives alone, whatever the others do."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.engine.base import BatchEntry, Engine, SessionBatch
from bitnet.engine.load import load
from bitnet.errors import BitNetError
from bitnet.files.packed import write_packed
from bitnet.kernels import native
from bitnet.model import Transformer

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=68,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=40,
)
LIMIT = 40


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Transformer(CONFIG)
    model.init_weights(7)
    return write_packed(tmp_path_factory.mktemp("slots") / "model.safetensors", model, None)


@pytest.fixture(params=["cpu", "torch", "sessions"])
def make(request: pytest.FixtureRequest, file: Path) -> tuple[Engine, Callable[..., object]]:
    """An engine and its slots: the C++ ones, torch's, and the C++ engine behind a session a slot."""
    if request.param != "torch" and native.why_not() is not None:
        pytest.skip(str(native.why_not()))
    engine = load(file, engine="torch" if request.param == "torch" else "cpu")
    if request.param == "sessions":
        return engine, lambda count, limit: SessionBatch(engine, count, limit)
    return engine, engine.slots


def alone(engine: Engine, ids: list[int], start: int) -> Tensor:
    """Logits of the ids from `start` on, of a sequence read in one piece."""
    return engine.logits(torch.tensor(ids))[start:]


def check(engine: Engine, exact: bool, ids: list[int], part: BatchEntry, got: Tensor) -> None:
    expected = alone(engine, ids, len(ids) - len(part.ids))
    assert got.shape == ((len(part.ids), CONFIG.vocab_size) if part.every else (CONFIG.vocab_size,))
    assert got.dtype == torch.float32
    if exact:  # C++: a row's arithmetic does not depend on the rows beside it
        assert torch.equal(got, expected if part.every else expected[-1])
    else:  # torch's products pick kernels by shape; a flipped rounding is a step of 1/127 of an activation
        torch.testing.assert_close(got, expected if part.every else expected[-1], rtol=0, atol=0.3)
        assert float((got - (expected if part.every else expected[-1])).abs().median()) < 1e-3


def test_a_slot_says_what_its_sequence_says_alone(make: tuple[Engine, Callable[..., object]], seed: int) -> None:
    engine, slots_of = make
    draw = random.Random(seed)
    slots, count = slots_of(5, LIMIT), 5
    held: list[list[int]] = [[] for _ in range(count)]
    for _ in range(12):
        parts = []
        for slot in draw.sample(range(count), draw.randint(1, count)):
            if held[slot] and draw.random() < 0.4:
                keep = draw.choice([0, draw.randint(0, len(held[slot]))])
                slots.truncate(slot, keep)
                del held[slot][keep:]
            room = LIMIT - len(held[slot])
            new = [draw.randrange(CONFIG.vocab_size) for _ in range(min(room, draw.choice([1, 1, 2, 9, 30])))]
            if new:
                parts.append(BatchEntry(slot, new, draw.random() < 0.5))
                held[slot] += new
        if not parts:
            continue
        for part, got in zip(parts, slots.forward(parts), strict=True):
            check(engine, engine.name == "cpu", held[part.slot], part, got)
        assert [slots.length(slot) for slot in range(count)] == [len(ids) for ids in held]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "one part or more"),
        ([BatchEntry(0, [1]), BatchEntry(0, [2])], "each of another slot"),
        ([BatchEntry(0, [1]), BatchEntry(3, [2])], "slot: got 3, expected 0 to 2"),
        ([BatchEntry(-1, [1])], "slot: got -1"),
        ([BatchEntry(0, [1]), BatchEntry(1, [])], "T >= 1"),
        ([BatchEntry(0, [1]), BatchEntry(1, [97])], "expected 0..96"),
        ([BatchEntry(0, [-1])], "expected 0..96"),
        ([BatchEntry(0, [1]), BatchEntry(1, [1] * 9)], "context is full: got 9 tokens after 0, expected at most 8"),
    ],
)
def test_a_refused_pass_changes_nothing(
    parts: list[BatchEntry], message: str, make: tuple[Engine, Callable[..., object]]
) -> None:
    slots = make[1](3, 8)
    slots.forward([BatchEntry(2, [5, 6])])
    with pytest.raises(BitNetError, match=message):
        slots.forward(parts)
    assert [slots.length(i) for i in range(3)] == [0, 0, 2]


def test_wrong_lengths(make: tuple[Engine, Callable[..., object]]) -> None:
    slots = make[1](2, 8)
    slots.forward([BatchEntry(1, [5, 6, 7])])
    for slot, length in ((1, 4), (1, -1), (0, 1)):
        with pytest.raises(BitNetError, match="truncate: got"):
            slots.truncate(slot, length)
    with pytest.raises(BitNetError, match="slot: got 2"):
        slots.truncate(2, 0)
    with pytest.raises(BitNetError, match="slot: got 2"):
        slots.length(2)
    with pytest.raises(BitNetError, match="expected 1 or more"):
        make[1](0, 8)


def test_a_session_falls_back(make: tuple[Engine, Callable[..., object]], seed: int) -> None:
    engine, _ = make
    ids = torch.randint(CONFIG.vocab_size, (2, 20), generator=torch.Generator().manual_seed(seed))
    session = engine.session(2, 20)
    session.prefill(ids)
    session.truncate(7)
    assert session.position == 7
    with pytest.raises(BitNetError, match="truncate: got 8 tokens to keep, expected 0 to 7"):
        session.truncate(8)
    again = session.score(ids[:, 7:])
    torch.testing.assert_close(again, engine.logits(ids)[:, 7:], rtol=0, atol=0 if engine.name == "cpu" else 0.3)
