"""The torch engine: a cache changes nothing, batches change nothing, backends and threads change nothing.

What it has in common with the other engines is in test_conformance.py.
"""

import pytest
import torch
from tiny_model import CONFIG, transformer

from bitnet.engine.cache import KVCache
from bitnet.engine.load import load
from bitnet.engine.sampling import GREEDY, Sampling
from bitnet.engine.torch import TorchEngine
from bitnet.files.packed import write_packed
from bitnet.layers import BitLinear
from bitnet.model import Transformer

U = 2.0**-24


@pytest.fixture
def engine(seed: int) -> TorchEngine:
    return TorchEngine(transformer(seed))


def greedy_by_full_passes(model: Transformer, ids: list[int], n: int) -> tuple[list[int], float]:
    """Argmax of a whole forward pass a token, and the smallest gap between the two likeliest."""
    history, gap = list(ids), float("inf")
    with torch.no_grad():
        for _ in range(n):
            top = model(torch.tensor([history]))[0, -1].topk(2)
            gap = min(gap, float(top.values[0] - top.values[1]))
            history.append(int(top.indices[0]))
    return history[len(ids) :], gap


# ---- the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", ["ternary", "float"])
@pytest.mark.parametrize("prompt", [1, 2, 11])
def test_greedy_with_cache_is_argmax_of_full_passes(linear: str, prompt: int, seed: int) -> None:
    """Ternary: an int8 flip may decide a near tie, so a model with one is drawn again instead of compared."""
    for attempt in range(5):
        model = transformer(seed + attempt, linear=linear)
        ids = torch.randint(61, (prompt,)).tolist()
        expected, gap = greedy_by_full_passes(model, ids, 12)
        got = TorchEngine(model).generate(ids, 12, GREEDY)
        assert len(got) == 12
        if got == expected:
            return
        assert gap < 0.05, "not a near tie: the cache changes the text"
    pytest.fail("five models in a row with a near tie: the cache changes the text")


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2], [11, 1]], ids=str)
def test_session_logits_are_those_of_one_pass(chunks: list[int], seed: int) -> None:
    """Float linears, so that sums in another order stay next to each other instead of flipping an int8 code."""
    engine = TorchEngine(transformer(seed, linear="float"))
    ids = torch.randint(61, (2, 12))
    full = engine.logits(ids)
    session, start = engine.session(2), 0
    for length in chunks:
        part = ids[:, start : start + length]
        logits = session.decode(part[:, 0]) if length == 1 else session.prefill(part)
        start += length
        assert session.position == start
        assert (logits.shape, logits.dtype) == ((2, 61), torch.float32)
        # Two blocks of sums over at most 44 terms, normalised in between: 2^-24 times a few hundred.
        assert float((logits - full[:, start - 1]).abs().max()) <= 1000 * U * float(full.abs().max())


def test_logits_of_one_sequence_and_of_a_batch(engine: TorchEngine) -> None:
    ids = torch.randint(61, (3, 9))
    batch = engine.logits(ids)
    assert batch.shape == (3, 9, 61)
    assert batch.dtype == torch.float32
    assert not batch.requires_grad
    with torch.no_grad():
        assert torch.equal(batch, engine.model(ids))
    assert engine.logits(ids[0]).shape == (9, 61)
    assert torch.equal(engine.logits(ids[0].int()), engine.logits(ids[0]))


def test_batch_session_is_single_sessions(seed: int) -> None:
    """The greedy ids of each sequence alone; logits to the rounding of sums in another order (float linears)."""
    engine = TorchEngine(transformer(seed, linear="float"))
    ids = torch.randint(61, (3, 5))
    batch, singles = engine.session(3), [engine.session() for _ in range(3)]
    together = batch.prefill(ids)
    alone = torch.cat([single.prefill(ids[i : i + 1]) for i, single in enumerate(singles)])
    for _ in range(8):
        assert float((together - alone).abs().max()) <= 1000 * U * float(alone.abs().max())
        token = alone.argmax(-1)
        together = batch.decode(token)
        alone = torch.cat([single.decode(token[i : i + 1]) for i, single in enumerate(singles)])


def test_cache_is_never_read_where_it_was_not_written(seed: int, request: pytest.FixtureRequest) -> None:
    engine = TorchEngine(transformer(seed))
    ids = torch.randint(61, (6,)).tolist()
    clean = engine.generate(ids, 10, GREEDY)
    request.getfixturevalue("poisoned_empty")
    assert torch.isnan(KVCache(CONFIG, 1, 4, torch.device("cpu"))._store).all()
    assert engine.generate(ids, 10, GREEDY) == clean


# ---- the same ids everywhere -------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", ["ternary", "binary"])
@pytest.mark.parametrize("backend", ["onednn", "float", "reference"])
def test_packed_engine_gives_the_same_ids(
    linear: str, backend: str, seed: int, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformer(seed, linear=linear)
    ids = torch.randint(61, (5,)).tolist()
    expected = TorchEngine(model).generate(ids, 40, GREEDY)  # past the context of 32 as well
    sampled = TorchEngine(model).generate(ids, 20, Sampling(seed=seed))
    if backend == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setenv("BITNET_BACKEND", backend)
    engine = load(write_packed(tmp_path / "m.safetensors", model, None), engine="torch")
    assert engine.generate(ids, 40, GREEDY) == expected
    assert engine.generate(ids, 20, Sampling(seed=seed)) == sampled


@pytest.mark.slow
def test_threads_do_not_change_the_ids(seed: int) -> None:
    engine = TorchEngine(transformer(seed, hidden_size=128, intermediate_size=384, initializer_range=0.05))
    ids = torch.randint(61, (20,)).tolist()
    texts = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        texts.append(engine.generate(ids, 12, GREEDY))
    assert texts[0] == texts[1]


def test_same_seed_same_text(engine: TorchEngine, seed: int) -> None:
    hot = Sampling(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
    first = engine.generate([1, 2, 3], 30, hot)
    torch.manual_seed(seed + 1)
    assert engine.generate([1, 2, 3], 30, hot) == first
    other = Sampling(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed + 1)
    assert engine.generate([1, 2, 3], 30, other) != first  # equal by chance: far below 1e-20


def test_an_engine_leaves_the_training_model_trainable(seed: int) -> None:
    model = transformer(seed)
    TorchEngine(model).generate([1, 2], 5, GREEDY)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    assert all(layer.weight.grad is not None for layer in layers)


def test_masters_that_move_are_seen(seed: int) -> None:
    """Nothing of the last pass is kept: evaluation in the middle of training uses today's weights."""
    model = transformer(seed)
    engine = TorchEngine(model)
    before = engine.logits(torch.arange(8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape))
    with torch.no_grad():
        fresh = model(torch.arange(8)[None])[0]
    assert torch.equal(engine.logits(torch.arange(8)), fresh)
    assert not torch.equal(fresh, before)


# ---- past the context --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 8, 9])
def test_a_full_window_continues_from_its_last_half(limit: int, engine: TorchEngine) -> None:
    """Whatever the limit: n tokens come, and each is the argmax over what the window holds (rebuilt by hand)."""
    prompt = [5, 9, 2, 7]
    got = engine.generate(prompt, 20, GREEDY, limit=limit)
    assert len(got) == 20
    history, window = list(prompt), []
    for token in got:
        if not window and len(history) <= limit:
            window = history[:]
            session = engine.session(1, limit)
            logits = session.prefill(torch.tensor([window]))
        elif not window or len(window) >= limit:
            window = history[-max(1, limit // 2) :]
            session = engine.session(1, limit)
            logits = session.prefill(torch.tensor([window]))
        else:
            window.append(history[-1])
            logits = session.decode(torch.tensor(history[-1:]))
        assert token == int(logits.argmax())
        history.append(token)


def test_a_text_may_outgrow_the_context(engine: TorchEngine) -> None:
    got = engine.generate([1, 2, 3], 100, GREEDY)
    assert len(got) == 100
    assert all(0 <= id < 61 for id in got)
    assert len(engine.generate(list(range(50)), 3, GREEDY)) == 3  # a prompt longer than the context of 32
