"""torch.compile around the model: one graph, not a dozen pieces with Python between them."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet.cli import main
from bitnet.config import ModelConfig
from bitnet.kernels import ops
from bitnet.model import Transformer
from bitnet.quant import training_precision
from bitnet.train.compiling import check_compiler, compile_blocks
from bitnet.train.config import TrainConfig
from bitnet.train.network import build_network, write_first_weights
from bitnet.train.objective import Objective
from bitnet.train.parallel.distributed import Processes

# torch's compiler warns about its own code.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # tracing takes seconds a graph
CONFIG = ModelConfig(
    vocab_size=53,
    hidden_size=36,
    intermediate_size=50,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)
    torch._dynamo.reset()


class Graphs:
    """A compiler that leaves graphs as they are and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        self.made += 1
        return graph


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("linear", ["ternary", "binary", "float"])
def test_a_model_is_one_graph(linear: str, amp: bool, seed: int, rng: torch.Generator) -> None:
    """A second one is a second shape, as a last batch may have."""
    model = Transformer(CONFIG.replace(linear=linear))
    model.init_weights(seed)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for batch in (3, 3):
        ids = torch.randint(CONFIG.vocab_size, (batch, 11), generator=rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            wanted, got = (F.cross_entropy(f(ids).flatten(0, 1).float(), ids.flatten()) for f in (model, compiled))
        assert torch.equal(got, wanted)
        expected, found = gradients(model, wanted), gradients(model, got)
        assert expected.keys() == found.keys() == dict(model.named_parameters()).keys()
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    assert graphs.made == 1


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_all_blocks_share_one_graph(recompute: bool, seed: int, rng: torch.Generator) -> None:
    """As in a sharded run, which compiles block by block: torch gives up on code that it has compiled eight times."""
    layers = torch._dynamo.config.recompile_limit + 2
    model = Transformer(CONFIG.replace(num_hidden_layers=layers), recompute=recompute)
    model.init_weights(seed)
    ids = torch.randint(CONFIG.vocab_size, (2, 16), generator=rng)
    wanted, graphs = model(ids), Graphs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.compile", partial(torch.compile, backend=graphs, fullgraph=True))
        compile_blocks(model.blocks())
    assert torch.equal(model(ids), wanted)
    assert graphs.made == 1


def test_every_model_of_a_process_is_one_graph(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    """As in a sweep, whose models are more than the graphs of one function that torch keeps."""
    graphs, models = Graphs(), torch._dynamo.config.recompile_limit + 1
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=graphs, fullgraph=True))
    with Processes(torch.device("cpu")) as processes:
        for number in range(1, models + 1):
            config = CONFIG.replace(intermediate_size=10 * number)
            model, network = build_network(config, TrainConfig(compile=True), processes, sharded=False)
            write_first_weights(model, TrainConfig())
            for _ in range(2):  # the second step compiles nothing new
                ids = torch.randint(CONFIG.vocab_size, (2, 16), generator=rng)
                network(ids, ids)
            assert graphs.made == number


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "by block"])
def test_quant_warmup_is_one_more_graph(blocks: bool, seed: int, rng: torch.Generator) -> None:
    """Not one for every fraction; an evaluation in between, fully quantised, compiles nothing."""
    model, graphs = Transformer(CONFIG.replace(num_hidden_layers=3)), Graphs()
    model.init_weights(seed)
    reference = Transformer(model.config)
    reference.load_state_dict(model.state_dict())
    model.rotary(0, 16, torch.device("cpu"))  # before, as a run has it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.compile", partial(torch.compile, backend=graphs, fullgraph=True))
        if blocks:
            compile_blocks(model.blocks())
        compiled = model if blocks else torch.compile(model)
    ids = torch.randint(CONFIG.vocab_size, (2, 16), generator=rng)
    for share in (0.0, 0.25, 1.0, 0.5, 0.75, 1.0):
        precision = training_precision(share)
        wanted, got = reference(ids, precision), compiled(ids, precision)
        assert torch.equal(got, wanted), share
        expected, found = gradients(reference, wanted.sum()), gradients(model, got.sum())
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    assert graphs.made == 2


@pytest.mark.parametrize("chunk", [0, 7])
def test_the_loss_is_in_the_graph(chunk: int, seed: int, rng: torch.Generator) -> None:
    """With a teacher, the z term and logits in pieces."""
    model, teacher = Transformer(CONFIG), Transformer(CONFIG.replace(hidden_size=24, linear="float"))
    model.init_weights(seed)
    teacher.init_weights(seed + 1)
    settings = TrainConfig(teacher="x", z_loss=1e-3, loss_chunk=chunk)
    ids = torch.randint(CONFIG.vocab_size, (2, 2, 16), generator=rng)
    objective, graphs = Objective(model, settings, teacher), Graphs()
    compiled = torch.compile(objective, backend=graphs, fullgraph=True)
    for got, wanted in zip(compiled(*ids), objective(*ids), strict=True):
        assert torch.equal(got, wanted)
    assert graphs.made == 1


def test_without_a_compiler_nothing_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.delenv("TORCH_INDUCTOR_INSTALL_GXX", raising=False)
    args = ["--device", "cpu", "--data", str(tmp_path / "missing.txt"), "--out", str(tmp_path / "out")]
    assert main(["train", "-q", "--compile", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.compile: got no compiler" in line
    assert not (tmp_path / "out").exists()
    check_compiler(torch.device("cuda"))  # what Triton needs is its own affair
    (tmp_path / "c++").touch(0o755)
    check_compiler(torch.device("cpu"))
