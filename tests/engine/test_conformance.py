"""What every engine has in common: the same ids, the same refusals, and sequences that do not disturb each other.

Triton's kernels run here on a machine with a GPU; elsewhere tests/kernels/test_gpu_interpreter.py starts this file in
Triton's interpreter.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_model
import torch
from torch import Tensor

from bitnet.engine.base import BatchEntry, Engine, SequenceBatch, SessionBatch
from bitnet.engine.load import load
from bitnet.engine.sampling import GREEDY
from bitnet.errors import BitNetError
from bitnet.files.packed import write_packed
from bitnet.files.tensors import norm_parameters
from bitnet.kernels import native, ops
from bitnet.kernels.gpu import device as gpu

LIMIT = 40
CHANGES = {"max_position_embeddings": LIMIT, "initializer_range": 0.02}  # so small that an int8 flip moves little
CONFIG = tiny_model.CONFIG.replace(**CHANGES)
ON_GPU = torch.cuda.is_available() and not gpu.INTERPRET
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# All that run here; in the interpreter only the one that needs it.
ENGINES = ("triton",) if gpu.INTERPRET else ("cpu", "torch", "triton") if ON_GPU else ("cpu", "torch")
Batches = Callable[[int, int | None], SequenceBatch]


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_TUNE", "0")  # the tuner would write into the user's cache
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model.transformer(7, **CHANGES)
    return write_packed(tmp_path_factory.mktemp("engines") / "model.safetensors", model, None)


def loaded(name: str, file: Path) -> Engine:
    reason = {"cpu": native.why_not(), "triton": gpu.why_not(DEVICE)}.get(name)
    if reason is not None:
        pytest.skip(reason)
    return load(file, DEVICE if name == "triton" else "cpu", engine=name)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, file: Path) -> Engine:
    return loaded(request.param, file)


@pytest.fixture(params=ENGINES if gpu.INTERPRET else (*ENGINES, "sessions"))
def batches(request: pytest.FixtureRequest, file: Path) -> tuple[Engine, Batches]:
    """An engine and its sequence batches; "sessions": the C++ engine with one session per sequence."""
    if request.param != "sessions":
        engine = loaded(request.param, file)
        return engine, engine.sequence_batch
    engine = loaded("cpu", file)
    return engine, lambda count, limit: SessionBatch(engine, count, limit or LIMIT)


def assert_same(engine: Engine, got: Tensor, expected: Tensor) -> None:
    if engine.name == "cpu":  # a row's arithmetic does not depend on the rows beside it
        assert torch.equal(got, expected)
        return
    # The others pick kernels by shape; a flipped rounding is a step of 1/127 of an activation.
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0.3)
    assert float((got.cpu() - expected).abs().median()) < 1e-3


# ---- ids ---------------------------------------------------------------------------------------------------


def test_greedy_ids_are_those_of_torch(engine: Engine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A near tie, which an int8 flip may decide, ends the comparison."""
    monkeypatch.setenv(ops.ENVIRONMENT, "reference")
    reference = load(file, engine="torch")
    wanted = reference.generate([5, 9, 2], 8, GREEDY)
    logits = reference.logits(torch.tensor([5, 9, 2, *wanted]))[2:-1]
    first, second = logits.topk(2).values.unbind(-1)
    monkeypatch.delenv(ops.ENVIRONMENT)
    got = engine.generate([5, 9, 2], 8, GREEDY)
    assert len(got) == 8
    for a, b, gap in zip(got, wanted, first - second, strict=True):
        if float(gap) < 0.02 * float(logits.abs().max()):
            break
        assert a == b


def test_a_text_may_outgrow_the_context(engine: Engine) -> None:
    got = engine.generate([1, 2, 3], 12, GREEDY, limit=5)
    assert len(got) == 12
    assert all(0 <= token < CONFIG.vocab_size for token in got)
    assert len(engine.generate(list(range(9)), 2, GREEDY, limit=5)) == 2  # a prompt longer than the limit


def test_stop_ids_end_the_text_and_are_not_part_of_it(engine: Engine) -> None:
    free = engine.generate([3, 1], 6, GREEDY)
    first = free.index(free[4])
    assert engine.generate([3, 1], 6, GREEDY, stop=[free[4]]) == free[:first]
    assert engine.generate([3, 1], 6, GREEDY, stop={free[0]}) == []
    assert engine.generate([3, 1], 0, GREEDY) == []


def test_stream_gives_one_id_at_a_time(engine: Engine) -> None:
    prompt = [3, 1]
    ids = engine.stream(prompt, 10**9, GREEDY)
    first = [next(ids) for _ in range(3)]
    ids.close()
    assert first == engine.generate((3, 1), 3, GREEDY)
    assert prompt == [3, 1]


# ---- logits and sessions -----------------------------------------------------------------------------------


def test_logits_of_one_sequence_and_of_a_batch(engine: Engine) -> None:
    ids = torch.randint(CONFIG.vocab_size, (2, 5))
    batch = engine.logits(ids)
    assert (batch.shape, batch.dtype, batch.device.type) == ((2, 5, 61), torch.float32, "cpu")
    assert not batch.requires_grad
    assert_same(engine, engine.logits(ids[0].int()), batch[0])


def test_sessions_are_one_pass(engine: Engine) -> None:
    ids = torch.randint(CONFIG.vocab_size, (2, 7))
    full = engine.logits(ids)
    session = engine.session(2, 7)
    assert_same(engine, session.prefill(ids[:, :4]), full[:, 3])
    assert_same(engine, session.decode(ids[:, 4]), full[:, 4])
    assert_same(engine, session.score(ids[:, 5:]), full[:, 5:])
    assert (session.position, session.limit) == (7, 7)
    assert engine.session().limit == CONFIG.context


def test_a_truncated_session_continues(engine: Engine, seed: int) -> None:
    ids = torch.randint(CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))
    session = engine.session(2, 9)
    session.prefill(ids)
    session.truncate(6)
    assert session.position == 6
    with pytest.raises(BitNetError, match="truncate: got 7 tokens to keep, expected 0 to 6"):
        session.truncate(7)
    assert_same(engine, session.score(ids[:, 6:]), engine.logits(ids)[:, 6:])


def test_weight_bytes_are_what_a_token_reads(engine: Engine) -> None:
    """At least two bits per projection weight, the tied head and the gains; at most bytes and an fp32 head."""
    d, f, kv = CONFIG.hidden_size, CONFIG.intermediate_size, 12
    projections, head = 2 * (2 * d * d + 2 * d * kv + 3 * d * f), CONFIG.vocab_size * d
    fill = 256 / d if engine.name == "triton" else 4  # the layouts fill K up to whole blocks
    assert engine.weight_bytes >= projections // 4 + 2 * head + 4 * norm_parameters(CONFIG)
    assert engine.weight_bytes <= fill * projections + 4 * (head + norm_parameters(CONFIG))


# ---- wrong requests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "n", "message"),
    [
        ([], 5, "got an empty prompt, expected at least one token"),
        ([1, 61], 5, r"got 1\.\.61, expected 0\.\.60"),
        ([-1, 3], 5, r"got -1\.\.3, expected 0\.\.60"),
        ([1], -1, "got -1 new tokens, expected 0 or more"),
        ([1.5], 3, "expected int64"),
    ],
)
def test_wrong_requests(ids: list[int], n: int, message: str, engine: Engine) -> None:
    with pytest.raises(BitNetError, match=message):
        engine.generate(ids, n, GREEDY)


@pytest.mark.parametrize(("batch", "limit"), [(0, 5), (-1, 5), (1, 0), (1, -4)])
def test_wrong_sessions(batch: int, limit: int, engine: Engine) -> None:
    for start in (engine.session, engine.sequence_batch):
        with pytest.raises(BitNetError, match=rf"got batch {batch} and limit {limit}, expected"):
            start(batch, limit)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.zeros(2, 1, 3, dtype=torch.int64),
        torch.full((2, 3), 61),
        torch.full((2, 3), -1),
        torch.full((2, 3), 2**62),
    ],
    ids=lambda ids: f"{str(ids.dtype)[6:]}-{list(ids.shape)}-{ids.flatten()[:1].tolist()}",
)
def test_wrong_ids(ids: Tensor, engine: Engine) -> None:
    session = engine.session(2)
    with pytest.raises(BitNetError, match=r"(ids|prefill): got .*expected"):
        session.prefill(ids)
    assert session.position == 0  # nothing of it was taken


def test_context_overflow(engine: Engine) -> None:
    session = engine.session(1, 6)
    session.prefill(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(BitNetError, match=r"context is full: got 3 tokens after 4, expected at most 6 in all"):
        session.prefill(torch.zeros(1, 3, dtype=torch.int64))
    session.prefill(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(BitNetError, match="got 1 tokens after 6"):
        session.decode(torch.tensor([0]))
    assert session.position == 6


def test_logits_refuse_wrong_ids(engine: Engine) -> None:
    for ids in (torch.tensor([61]), torch.tensor([], dtype=torch.int64), torch.tensor([0.5])):
        with pytest.raises(BitNetError, match="ids: got"):
            engine.logits(ids)


# ---- sequences that join and leave -------------------------------------------------------------------------


def test_a_sequence_of_a_batch_gets_what_it_gets_alone(batches: tuple[Engine, Batches], seed: int) -> None:
    engine, start = batches
    draw, count = random.Random(seed), 5
    batch = start(count, LIMIT)
    held: list[list[int]] = [[] for _ in range(count)]
    for _ in range(3 if gpu.INTERPRET else 12):
        entries = []
        for sequence in draw.sample(range(count), draw.randint(1, count)):
            if held[sequence] and draw.random() < 0.4:
                keep = draw.choice([0, draw.randint(0, len(held[sequence]))])
                batch.truncate(sequence, keep)
                del held[sequence][keep:]
            room = LIMIT - len(held[sequence])
            new = [draw.randrange(CONFIG.vocab_size) for _ in range(min(room, draw.choice([1, 1, 2, 9, 30])))]
            if new:
                entries.append(BatchEntry(sequence, new, draw.random() < 0.5))
                held[sequence] += new
        for entry, got in zip(entries, batch.forward(entries) if entries else [], strict=True):
            expected = engine.logits(torch.tensor(held[entry.sequence]))[-len(entry.ids) :]
            assert got.dtype == torch.float32
            assert_same(engine, got, expected if entry.every else expected[-1])
        assert [batch.length(sequence) for sequence in range(count)] == [len(ids) for ids in held]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "one entry or more"),
        ([BatchEntry(0, [1]), BatchEntry(0, [2])], "each of another sequence"),
        ([BatchEntry(0, [1]), BatchEntry(3, [2])], "sequence: got 3, expected 0 to 2"),
        ([BatchEntry(-1, [1])], "sequence: got -1"),
        ([BatchEntry(0, [1]), BatchEntry(1, [])], "T >= 1"),
        ([BatchEntry(0, [1]), BatchEntry(1, [61])], "expected 0..60"),
        ([BatchEntry(0, [-1])], "expected 0..60"),
        ([BatchEntry(0, [1]), BatchEntry(1, [1] * 9)], "context is full: got 9 tokens after 0, expected at most 8"),
    ],
)
def test_a_refused_pass_changes_nothing(
    entries: list[BatchEntry], message: str, batches: tuple[Engine, Batches]
) -> None:
    batch = batches[1](3, 8)
    batch.forward([BatchEntry(2, [5, 6])])
    with pytest.raises(BitNetError, match=message):
        batch.forward(entries)
    assert [batch.length(i) for i in range(3)] == [0, 0, 2]


def test_wrong_lengths(batches: tuple[Engine, Batches]) -> None:
    batch = batches[1](2, 8)
    batch.forward([BatchEntry(1, [5, 6, 7])])
    for sequence, length in ((1, 4), (1, -1), (0, 1)):
        with pytest.raises(BitNetError, match="truncate: got"):
            batch.truncate(sequence, length)
    with pytest.raises(BitNetError, match="sequence: got 2"):
        batch.truncate(2, 0)
    with pytest.raises(BitNetError, match="sequence: got 2"):
        batch.length(2)
