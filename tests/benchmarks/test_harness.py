"""lm-evaluation-harness on a model of ours: figures of log-softmax and of `bitnet eval`, and lines known by heart.

The library is no part of a test install. What answers needs none of it; what joins the two is tested with a stand-in
where the library is missing.
"""

import abc
import importlib.util
import json
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import PIPE
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import child_process
import pytest
import torch
from torch import Tensor

from bitnet.benchmarks.harness import adapter as harness
from bitnet.benchmarks.harness.adapter import TextModel, cut
from bitnet.cli import main
from bitnet.engine.base import Engine
from bitnet.engine.cpu import CACHES, HEADS
from bitnet.engine.load import load
from bitnet.engine.sampling import GREEDY
from bitnet.errors import BitNetError
from bitnet.kernels import native, ops
from bitnet.text.tokenizer import Tokenizer
from bitnet.train import scoring

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_library = pytest.mark.skipif(not INSTALLED, reason="from a clone: pip install '.[eval]'")
SHAPE = "hidden_size=32 intermediate_size=44 num_hidden_layers=1 num_attention_heads=2 num_key_value_heads=1"
CONTEXT = 16
# Learnt by heart, each a document that its beginning gives away: the likeliest text is known without any engine.
LINES = {"the fox": " dug a hole\n", "my hen": " hid in hay\n", "we sat": " by a lake\n"}
WORDS = " ".join(start + rest.rstrip() for start, rest in LINES.items()).split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, fixed = tmp_path_factory.mktemp("harness"), random.Random(0)
    (folder / "toy.txt").write_text("".join("".join(fixed.choice([*LINES.items()])) for _ in range(1000)))
    (folder / "other.txt").write_text("old ants eat rice\n")  # for validation, or one of the lines would be
    sets = [f"model.{setting}" for setting in (*SHAPE.split(), f"max_position_embeddings={CONTEXT}", "vocab_size=280")]
    sets += ["train.eval_every=0", "train.batch_size=8"]
    flags = ["--data", str(folder / "toy.txt"), "--val-data", str(folder / "other.txt"), "--documents", "line"]
    flags += ["--out", str(folder / "run"), "--steps", "400", "--dtype", "fp32", "-q"]
    assert main(["train", *flags, *[part for s in sets for part in ("--set", s)]]) == 0
    assert main(["pack", str(folder / "run"), "-o", str(folder / "m.safetensors")]) == 0
    return folder / "m.safetensors"


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ENVIRONMENT, raising=False)
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def plain(model: Path) -> Engine:
    """The torch engine: the readable truth."""
    return load(model, engine="torch")


@pytest.fixture(scope="module")
def tokenizer(plain: Engine) -> Tokenizer:
    return plain.tokenizer


def words(count: int) -> str:
    return "".join(random.choice(WORDS) + random.choice("   \n") for _ in range(count))


def text_of(count: int, tokenizer: Tokenizer) -> str:
    """Text of so many tokens."""
    while True:
        text = words(40)
        for i in range(len(text)):
            if len(tokenizer.encode(text[:i])) == count:
                return text[:i]


def log_probabilities(engine: Engine, ids: Sequence[int], count: int) -> tuple[Tensor, bool]:
    """Those of the last `count` ids, [count] fp64, and whether each of them is the likeliest."""
    scores = engine.logits(torch.tensor(ids[:-1])).double().log_softmax(-1)[-count:]
    targets = torch.tensor(ids[-count:])
    return scores.gather(1, targets[:, None])[:, 0], scores.argmax(-1).tolist() == targets.tolist()


# ---- every engine ------------------------------------------------------------------------------------------

# KL to the torch engine in nats a token that rounding costs, as the README has it of a trained model.
KL_EXACT, KL_HEAD = 4e-6, {"file": 0.0, "int8": 2e-5, "int4": 3e-3}
KL_CACHE = {"fp32": 0.0, "bf16": 1.1e-4, "int8": 1.4e-4}


class Case(NamedTuple):
    """An engine as --model_args names it, and how far from the torch engine it may be."""

    options: dict[str, str]
    kl: float

    def slack(self, scores: Tensor) -> float:
        """How far a sum of likely tokens' log-probabilities may be off.

        KL is half the variance of the error of log p, drawn as the model draws. A token of probability p adds
        p error^2 to that variance, so its error is at most sqrt(2 KL / p). Room for four times the mean KL.
        """
        return math.sqrt(2 * 4 * self.kl) * float((-scores / 2).exp().sum())


no_cpp = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
CASES = [
    pytest.param(Case({"engine": "torch"}, 0.0), id="torch"),
    pytest.param(Case({"engine": "auto"}, KL_EXACT), id="auto"),
    pytest.param(Case({"engine": "triton", "device": "cuda"}, KL_EXACT), id="triton", marks=pytest.mark.gpu),
]
CASES += [
    pytest.param(
        Case({"engine": "cpu", "head": head, "cache": cache}, KL_EXACT + KL_HEAD[head] + KL_CACHE[cache]),
        id=f"cpu-{head}-{cache}",
        marks=no_cpp,
    )
    for head in HEADS
    for cache in CACHES
]
every_engine = pytest.mark.parametrize("case", CASES)


def pairs(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Contexts and continuations: every way their border and their length can be."""
    return [
        ("", text_of(CONTEXT, tokenizer)),
        (words(1).rstrip(), " " + words(1)),
        (words(1).rstrip() + " ", words(1)),
        (words(1).rstrip() + "\n\n", words(1)),
        ("  ", words(1)),
        (words(30), random.choice(WORDS)),  # the end counts
        crossed(tokenizer),
    ]


def crossed(tokenizer: Tokenizer) -> tuple[str, str]:
    """A text cut within a piece, so that whole it has no more tokens than its beginning."""
    for word in WORDS:
        for i in range(1, len(word)):
            if len(tokenizer.encode(word)) <= len(tokenizer.encode(word[:i])):
                return word[:i], word[i:]
    raise AssertionError("no piece of two letters: another text has to be learnt")


@every_engine
def test_a_continuation_is_scored_by_log_softmax(case: Case, model: Path, tokenizer: Tokenizer) -> None:
    ours = TextModel(str(model), **case.options)
    for context, continuation in pairs(tokenizer):
        kept = context.rstrip()
        before, whole = tokenizer.encode(kept), tokenizer.encode(context + continuation)
        if len(whole) <= len(before):
            whole = before + tokenizer.encode(continuation)
        ids = [tokenizer.bos_id, *whole][-CONTEXT - 1 :]
        wanted, likeliest = log_probabilities(ours.engine, ids, len(whole) - len(before))
        got, greedy = ours.loglikelihood(context, continuation)
        assert got == pytest.approx(float(wanted.sum()), abs=1e-9)  # fp64 on both sides
        assert greedy is likeliest


@every_engine
def test_engines_agree(case: Case, model: Path, plain: Engine, tokenizer: Tokenizer) -> None:
    ours = TextModel(str(model), **case.options)
    chosen = load(model, case.options.get("device", "cpu")) if case.options["engine"] == "auto" else None
    assert ours.engine.name == (chosen.name if chosen else case.options["engine"])
    for context in LINES:
        for begins, continuation in LINES.items():
            got, greedy = ours.loglikelihood(context, continuation)
            assert greedy is (begins == context)
            if not greedy:  # of unlikely tokens KL says little
                assert got < math.log(1e-3)
                continue
            ids = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
            wanted, _ = log_probabilities(plain, ids, len(ids) - 1 - len(tokenizer.encode(context)))
            assert float(wanted.min()) > math.log(0.5), "not known by heart"
            assert got == pytest.approx(float(wanted.sum()), abs=case.slack(wanted) + 1e-9)


@every_engine
@pytest.mark.parametrize("context", [5, CONTEXT])
def test_a_document_gets_what_eval_gives(
    case: Case, context: int, model: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, text = TextModel(str(model), context=context, **case.options), words(40)
    if ours.engine.name != "cpu":
        # Rows of other shapes have other bits there, and `eval` has batches of padded windows. In C++ they have not.
        monkeypatch.setattr(scoring, "batch_for", lambda *sizes: 1)
        while len(tokenizer.encode(text)) % context:
            text = text[:-1]
    (tmp_path / "document.txt").write_text(text)
    options = {name: value for name, value in case.options.items() if name != "device"}
    device = torch.device(case.options.get("device", "cpu"))
    found = scoring.score_text(model, [str(tmp_path / "document.txt")], device, context=context, **options)
    assert found["tokens"] == len(tokenizer.encode(text)) > 2 * CONTEXT
    # `eval` takes the log-softmax in fp32: three roundings of numbers up to the spread of the logits, below 64 here.
    noise = found["tokens"] * 3 * 64 * 2.0**-24
    assert ours.rolling(text) == pytest.approx(-found["loss"] * found["tokens"], abs=noise)


@every_engine
def test_a_line_known_by_heart_goes_on_to_its_end_or_a_stop(case: Case, model: Path) -> None:
    ours = TextModel(str(model), **case.options)
    for start, rest in LINES.items():
        assert ours.generate(start, {"until": []}) == rest  # and then BOS, which ends every text
        for stop in (rest[:1], rest[2:5], rest[-2:], rest):
            for until in (stop, [stop], ["\x00", stop, ""]):
                assert ours.generate(start, {"until": until}) == rest[: rest.index(stop)]


# ---- what does not depend on the engine --------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(model: Path) -> TextModel:
    return TextModel(str(model), engine="torch")


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31, 32])
def test_windows_of_a_document_do_not_overlap(count: int, ours: TextModel, tokenizer: Tokenizer) -> None:
    text = text_of(count, tokenizer)
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    parts = [ids[start : start + CONTEXT + 1] for start in (0, CONTEXT) if start < count]
    wanted = sum(float(log_probabilities(ours.engine, part, len(part) - 1)[0].sum()) for part in parts)
    assert ours.rolling(text) == pytest.approx(wanted, abs=1e-9)


LENGTHS = [
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
]  # as its normalize_gen_kwargs has it


@pytest.mark.parametrize("name", LENGTHS)
def test_a_text_has_as_many_tokens_as_asked_for(
    name: str, ours: TextModel, plain: Engine, tokenizer: Tokenizer
) -> None:
    """Under any of the names; where there are several, the one that the harness puts first counts."""
    others = dict.fromkeys(LENGTHS[LENGTHS.index(name) :], 9)
    for start in LINES:
        ids = [tokenizer.bos_id, *tokenizer.encode(start)]
        for count in (0, 1, 3):
            wanted = tokenizer.decode(plain.generate(ids, count, GREEDY))
            assert ours.generate(start, others | {name: count}) == wanted


def test_nothing_is_computed_behind_a_stop(
    ours: TextModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, stream = [], Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda *args: (drawn.append(id) or id for id in stream(*args)))
    for start, rest in LINES.items():
        drawn.clear()
        assert ours.generate(start, {"until": [rest[:3]]}) == ""
        assert rest[:3] in tokenizer.decode(drawn)
        assert rest[:3] not in tokenizer.decode(drawn[:-1])


def test_drawing_is_asked_for_by_a_temperature(model: Path, ours: TextModel) -> None:
    start, rest = next(iter(LINES.items()))
    for settings in ({"do_sample": False, "temperature": 9.0}, {"do_sample": True}, {"temperature": 0.0}):
        assert ours.generate(start, settings) == rest
    for settings in ({"temperature": 9.0}, {"do_sample": True, "temperature": 9.0}):
        fresh = [TextModel(str(model), engine="torch") for _ in range(2)]
        drawn = [[one.generate(start, settings | {"max_gen_toks": 8}) for _ in range(4)] for one in fresh]
        assert len({*drawn[0]}) > 1, "a task that asks for several texts got one"
        assert drawn[0] == drawn[1], "the same requests got other texts"
        for filtered in ({"top_k": 1}, {"top_p": 1e-6}):
            assert ours.generate(start, settings | filtered) == rest


def test_settings_without_effect_are_named_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh = TextModel(str(model), engine="torch")
    for settings in ({"num_beams": 2, "until": ["x"], "max_gen_toks": 1}, {"num_beams": 2, "max_gen_toks": 1}):
        fresh.generate("we", settings)
    assert [record.message for record in caplog.records] == ["harness: tasks set num_beams, which has no effect here"]


@pytest.mark.parametrize(("context", "continuation"), [("we sat", ""), ("", ""), ("", "we sat" * 9)])
def test_a_continuation_of_no_tokens_or_too_many(
    context: str, continuation: str, ours: TextModel, tokenizer: Tokenizer
) -> None:
    count = len(tokenizer.encode(continuation))
    with pytest.raises(BitNetError, match=f"got a continuation with {count} tokens to score, expected 1 to {CONTEXT}"):
        ours.loglikelihood(context, continuation)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_the_cpu(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The harness asks for the first one unless --device names another."""
    got = TextModel(str(model), engine="torch", device="cuda:0").loglikelihood("we", " sat")
    assert got == TextModel(str(model), engine="torch").loglikelihood("we", " sat")
    assert "and no GPU; using the CPU" in caplog.text


def test_cut() -> None:
    assert cut("one two three", ["two", "three"]) == "one "
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["x"]) == "one"
    assert cut("one", []) == "one"


# ---- the harness's class of it -----------------------------------------------------------------------------


def stand_in() -> dict[str, ModuleType]:
    """What a model type of one process meets of lm_eval 0.4.10 to 0.4.13."""
    registry: dict[str, Any] = {}

    class LM(abc.ABC):
        def __init__(self) -> None:
            self._rank, self._world_size, self._device, self.cache_hook = 0, 1, None, None

        @abc.abstractmethod
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

        @abc.abstractmethod
        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]: ...

        @abc.abstractmethod
        def generate_until(self, requests: list[Any]) -> list[str]: ...

        @classmethod
        def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any]) -> Any:
            return cls(**arg_dict, **{k: v for k, v in additional_config.items() if v is not None})

        @property
        def world_size(self) -> int:
            return self._world_size

    class Instance:
        def __init__(self, request_type: str, doc: dict[str, Any], arguments: tuple[Any, ...], idx: int) -> None:
            self.args = arguments

    def register_model(*names: str) -> Callable[[type], type]:
        def decorate(kind: type) -> type:
            assert issubclass(kind, LM)
            assert not registry.keys() & {*names}
            registry.update(dict.fromkeys(names, kind))
            return kind

        return decorate

    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.instance": {"Instance": Instance},
        "lm_eval.api.registry": {"register_model": register_model, "get_model": registry.__getitem__},
    }
    made = {name: ModuleType(name) for name in contents}
    for name, values in contents.items():
        vars(made[name]).update(values)
    return made


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """lm_eval, or a stand-in for it."""
    if not INSTALLED:
        harness.model_type.cache_clear()
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        from lm_eval.api.instance import Instance
        from lm_eval.api.registry import get_model

        yield SimpleNamespace(Instance=Instance, get_model=get_model)
    if not INSTALLED:
        harness.model_type.cache_clear()


def test_the_harness_gets_the_answers(library: SimpleNamespace, model: Path, ours: TextModel) -> None:
    """Made and asked as the harness does it: each request is an Instance, each answer a plain value in its place."""
    made_by = harness.model_type()
    assert library.get_model("bitnet") is made_by is harness.model_type()
    given = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    found = made_by.create_from_arg_obj({"path": str(model), "engine": "torch", "context": 9}, given)
    assert found.world_size == 1
    direct = TextModel(str(model), engine="torch", context=9)

    def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [library.Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    asked = [(words(4), " " + random.choice(WORDS)) for _ in range(5)]
    assert found.loglikelihood(requests("loglikelihood", asked)) == [direct.loglikelihood(*each) for each in asked]
    documents = [words(9) for _ in range(3)]
    got = found.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in documents]))
    assert got == [direct.rolling(text) for text in documents]
    starts = [(start, {"until": [rest[-4:]], "max_gen_toks": 20}) for start, rest in LINES.items()]
    got = found.generate_until(requests("generate_until", starts))
    assert got == [rest[:-4] for rest in LINES.values()]


def test_an_unknown_argument_is_refused(library: SimpleNamespace, model: Path) -> None:
    with pytest.raises(TypeError, match="pretrained"):
        harness.model_type().create_from_arg_obj({"path": str(model), "pretrained": "x"}, {"device": "cpu"})


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)  # an import of it fails
    with pytest.raises(BitNetError, match=r"pip install '\.\[eval\]'"):
        harness.model_type.__wrapped__()


@needs_library
def test_contexts_end_where_the_harness_ends_them(ours: TextModel, tokenizer: Tokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.model import TemplateLM
    theirs = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    for context, continuation in pairs(tokenizer)[1:-1]:  # it has no answer to an empty context and to a cut piece
        before, after = TemplateLM._encode_pair(theirs, context, continuation)
        ids = [tokenizer.bos_id, *before, *after][-CONTEXT - 1 :]
        wanted, likeliest = log_probabilities(ours.engine, ids, len(after))
        assert ours.loglikelihood(context, continuation) == (pytest.approx(float(wanted.sum()), abs=1e-9), likeliest)


# ---- its command line --------------------------------------------------------------------------------------


def run_task(folder: Path, documents: list[str], module: str, kind: str, arguments: str) -> float:
    """Bits per byte that the harness finds for a task of these documents, run as a person runs it."""
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "toy.yaml").write_text(
        f"""task: toy
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "documents.jsonl"}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
    )
    command = [sys.executable, "-m", module, "run", "--model", kind, "--model_args", arguments]
    command += ["--tasks", "toy", "--include_path", str(folder), "--output_path", str(folder / "out")]
    environment = child_process.environment(HF_HUB_OFFLINE=1, HF_HOME=folder / "cache", OMP_NUM_THREADS=1)
    child_process.run(command, env=environment)
    (result,) = (folder / "out").rglob("*.json")
    return float(json.loads(result.read_text())["results"]["toy"]["bits_per_byte,none"])


def bits_per_byte(model: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]) -> float:
    """What `bitnet eval` finds of all texts, each by itself: together their ends would share windows."""
    nats, size = 0.0, 0
    for text in texts:
        capsys.readouterr()
        assert main(["eval", "-m", str(model), "--data", str(text), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        nats, size = nats + found["loss"] * found["tokens"], size + found["bytes"]
    return nats / math.log(2) / size


@needs_library
@pytest.mark.slow
def test_a_task_from_a_file_gives_what_eval_gives(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = words(60)
    (tmp_path / "document.txt").write_text(document)
    got = run_task(tmp_path, [document], "bitnet.benchmarks.harness.adapter", "bitnet", f"path={model}")
    assert got == pytest.approx(bits_per_byte(model, [tmp_path / "document.txt"], capsys), rel=1e-5)


@needs_library
@pytest.mark.slow
def test_its_client_of_our_server_gives_what_eval_gives(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    # Documents that fit the context: of longer ones that client makes windows of its own, which overlap.
    documents = [words(random.randint(1, 2)) for _ in range(8)]
    files = [tmp_path / f"{number}.txt" for number in range(len(documents))]
    for file, document in zip(files, documents, strict=True):
        file.write_text(document)
    with child_process.started(child_process.bitnet("serve", "-m", model, "--port", 0), stdout=PIPE) as server:
        url = child_process.line_from(server).rstrip("/")
        arguments = f"model={model.stem},base_url={url}/v1/completions,tokenizer_backend=remote,max_length=16"
        got = run_task(tmp_path, documents, "lm_eval", "local-completions", arguments)
    assert got == pytest.approx(bits_per_byte(model, files, capsys), rel=1e-5)
