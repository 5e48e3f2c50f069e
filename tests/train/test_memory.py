"""Memory asked first: the estimates against what real tensors take, and the refusals of every verb."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet import machine
from bitnet.cli import main
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.memory import INTERPRETER, Need, Way, check, useful
from bitnet.model import Transformer
from bitnet.quant import training_precision
from bitnet.train import memory
from bitnet.train.config import RunConfig, TrainConfig
from bitnet.train.objective import Objective
from bitnet.train.optim import Optimizer
from bitnet.train.runs.run import Run

CPU = torch.device("cpu")
# Sizes that are all different, so that no term can stand for another.
TINY = ModelConfig(
    vocab_size=91,
    hidden_size=56,
    intermediate_size=76,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)
BLOCKS = {
    "relu2-sub": TINY,
    "silu": TINY.replace(hidden_act="silu", sub_norms=False),
    "no-qk-norm": TINY.replace(qk_norm=False),
    "untied": TINY.replace(tie_word_embeddings=False, sub_norms=False),
}


def run_of(model: ModelConfig = TINY, **settings: Any) -> RunConfig:
    return RunConfig(model=model, train=TrainConfig(**{"batch_size": 3, "dtype": "fp32", **settings}))


def setting(config: RunConfig) -> memory.Setting:
    return memory.Setting.of(config, CPU)


def step(config: RunConfig, share: float) -> tuple[Transformer, Optimizer, int]:
    """One step of a real model; also the bytes that its forward pass kept, each storage once, parameters aside."""
    model = Transformer(config.model, recompute=config.train.recompute)
    model.init_weights(0)
    optimizer = Optimizer(model, config.train)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # an address is that of one tensor only as long as it lives

    def count(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(config.model.vocab_size, (config.train.batch_size, config.model.context + 1))
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=config.train.dtype == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), bf16:
        loss, _ = Objective(model, config.train)(ids[:, :-1], ids[:, 1:], training_precision(share))
    loss.backward()
    optimizer.set_step(0)
    return model, optimizer, sum(kept.values())


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- training: tensor by tensor ----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("block", BLOCKS)
def test_state_is_what_torch_holds(block: str, optimizer: str) -> None:
    config = run_of(BLOCKS[block], optimizer=optimizer)
    model, real, _ = step(config, 1.0)
    state = memory._state(setting(config))
    assert state["masters"] == size(model.parameters())
    assert state["gradients"] == size(parameter.grad for parameter in model.parameters())
    for one in real._optimizers:
        one.step()
    # AdamW counts its steps in a number a parameter.
    assert state["optimiser"] == size(value for value in real.tensors().values() if value.dim())


MODES = {
    "ternary": {"quant_warmup": 0.0},
    "warm-up": {"quant_warmup": 0.8},
    "recompute": {"quant_warmup": 0.0, "recompute": True},
    "recompute-warm-up": {"quant_warmup": 0.8, "recompute": True},
    "chunks": {"quant_warmup": 0.0, "loss_chunk": 10},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", [*MODES, "float"])
@pytest.mark.parametrize("block", BLOCKS)
def test_activations_are_what_autograd_keeps(block: str, mode: str, dtype: str) -> None:
    model = BLOCKS[block].replace(linear="float") if mode == "float" else BLOCKS[block]
    config = run_of(model, dtype=dtype, **MODES.get(mode, {}))
    _, _, kept = step(config, 0.5 if setting(config).mixes else 1.0)
    expected = sum(memory.kept(setting(config)))
    # Left out of the formula: ids, rotary tables, masks, scales of weights, targets; a few hundred bytes each here.
    small = 8 * 4 * (3 * 16) + 2 * 4 * 16 * 14 + 2000
    assert abs(kept - expected) <= 0.01 * expected + small, (kept, expected)


def test_the_parts_of_training_only_grow() -> None:
    """More of anything takes no less, and what saves memory saves some."""

    wordy = TINY.replace(vocab_size=4000)  # logits count for more than the gradients of a block

    def many(model: ModelConfig = wordy, **settings: Any) -> RunConfig:
        """Enough windows a batch for the passes of training to be the largest phase."""
        return run_of(model, **{"batch_size": 96, "quant_warmup": 0.0, **settings})

    base = many()

    def total(config: RunConfig, **options: Any) -> float:
        return memory.training_need(setting(config), **options).total

    before = total(base)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
        assert total(many(wordy.replace(**{field: 2 * getattr(wordy, field)}))) > before, field
    larger: dict[str, dict[str, Any]] = {
        "batch": {"batch_size": 97},
        "warm-up": {"quant_warmup": 0.8},
        "adamw": {"optimizer": "adamw"},
        "async save": {"async_save": True},
        "accumulate": {"accumulate": 2},
        "z-loss": {"z_loss": 1e-4},
    }
    for name, settings in larger.items():
        assert total(many(**settings)) > before, name
    assert total(many(recompute=True)) < before
    assert total(many(loss_chunk=4)) < before
    assert total(many(dtype="bf16")) < before
    other = memory.OtherModel(TINY, trained=True)
    assert total(base, others=memory.Others(initial=other)) > before
    assert total(base, others=memory.Others(teacher=other)) > before
    assert total(base, resumes=True) > before


def test_shares_of_fsdp_are_smaller_than_whole_models() -> None:
    """State is spread; what blocks gather is not, so the model has to be more than a block."""
    large = TINY.replace(num_hidden_layers=24, hidden_size=256, intermediate_size=768)
    whole, spread = (
        memory.training_need(memory.Setting.of(run_of(large, parallel=parallel), CPU, processes=4)).total
        for parallel in ("ddp", "fsdp")
    )
    assert spread < whole


def test_a_need_is_its_largest_phase() -> None:
    need = Need({"first": {"a": 3e9, "b": 1e9}, "second": {"c": 3.5e9, "d": 0.01e9}})
    assert need.total == 4e9
    assert str(need) == "a 3.0, b 1.0"
    assert str(Need({"": {"c": 3.5e9, "d": 0.01e9}})) == "c 3.5"  # crumbs are left out


# ---- asking ------------------------------------------------------------------------------------------------


def machine_with(monkeypatch: pytest.MonkeyPatch, size: float | None) -> None:
    """A machine with so many bytes left, and a process that holds its libraries already."""
    monkeypatch.setattr(machine, "available_memory", lambda: size)
    monkeypatch.setattr(machine, "resident_memory", lambda: int(INTERPRETER))


def test_what_fits_passes_and_what_does_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    need = Need.of(libraries=INTERPRETER, weights=2e9)
    machine_with(monkeypatch, 2e9)
    check("job", need, CPU)
    machine_with(monkeypatch, 2e9 - 1)
    with pytest.raises(BitNetError, match=r"job needs about 2\.3 GB .*\(weights 2\.0, libraries 0\.3\).*2\.3 GB"):
        check("job", need, CPU)
    machine_with(monkeypatch, None)  # a system that does not tell
    check("job", need, CPU)


def test_force_warns_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    machine_with(monkeypatch, 1e9)
    check("job", Need.of(weights=2e9), CPU, force=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--force" in caplog.text


def test_processes_of_one_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    need = Need.of(libraries=INTERPRETER, weights=1e9)
    machine_with(monkeypatch, 3.5e9)
    check("job", need, CPU, processes=3)
    with pytest.raises(BitNetError, match="in 4 processes"):
        check("job", need, CPU, processes=4)


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 80 * 10**9))
    gpu = torch.device("cuda", 0)
    check("job", Need.of(weights=2.9e9), gpu, processes=8)  # each has a GPU of its own
    with pytest.raises(BitNetError, match=r"on the GPU .* 3\.0 GB"):
        check("job", Need.of(weights=3.1e9), gpu)


def test_torchrun_counts_all_processes_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, run = run_of(TINY, batch_size=512), Run(tmp_path / "run")
    one = memory.run_need(config, CPU, run).total
    machine_with(monkeypatch, 2 * one - 2 * INTERPRETER)
    memory.check_run(config, CPU, run)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(BitNetError, match="in 2 processes"):  # each holds buckets of gradients as well
        memory.check_run(config, CPU, run)


def test_torchrun_asks_each_process_for_its_own_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 0, 80 * 10**9

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BitNetError, match="on the GPU"):
        memory.check_run(run_of(TINY), torch.device("cuda"), Run(tmp_path / "run"))
    assert set(asked) == {torch.device("cuda", 1)}


@pytest.mark.parametrize(
    ("sizes", "have", "named"),
    [
        ([9, 5, 3], 6, ["b", "c"]),  # those that fit, in the order given
        ([9, 8, 7], 6, ["c", "b"]),  # none fits: those that help, the best first
        ([9.5, 9.9], 6, []),  # a twentieth is no help
    ],
    ids=["some-fit", "none-fits", "none-helps"],
)
def test_ways_out(sizes: list[float], have: float, named: list[str]) -> None:
    ways = [Way(name, size) for name, size in zip("abc", sizes, strict=False)]
    assert [way.change for way in useful(ways, 10, have)] == named


# ---- every verb --------------------------------------------------------------------------------------------


def settings_of(model: ModelConfig) -> list[str]:
    names = [field for field in model.to_dict() if field.endswith("_size") or "num_" in field or "max_" in field]
    return [part for name in names for part in ("--set", f"model.{name}={getattr(model, name)}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary run, its float baseline, a packed file and a Hugging Face folder of it."""
    folder = tmp_path_factory.mktemp("memory")
    rng = random.Random(1)
    (folder / "text.txt").write_text(" ".join(rng.choice(["def", "return", "one", "two"]) for _ in range(3000)))
    shape = settings_of(TINY.replace(vocab_size=300, qk_norm=False, hidden_act="relu2"))
    shape += ["--set", "model.qk_norm=false", "--set", "model.hidden_act=relu2", "--set", "model.sub_norms=true"]
    for linear in ("ternary", "float"):
        words = ["train", "--data", folder / "text.txt", "--out", folder / linear, "--steps", 1, "-q", *shape]
        words += [
            "--linear",
            linear,
            "--set",
            "data.val_fraction=0.2",
            "--set",
            "train.quant_warmup=0",
            "--dtype",
            "fp32",
        ]
        assert main([str(word) for word in words]) == 0
    assert main(["pack", str(folder / "ternary"), "-o", str(folder / "model.safetensors")]) == 0
    assert main(["export", str(folder / "ternary"), "-o", str(folder / "hf"), "--to", "hf"]) == 0
    spec = 'preset = "nano"\n[base]\ndata.paths = ["nowhere.txt"]\n[grid]\ntrain.batch_size = [4, 64]\n'
    (folder / "spec.toml").write_text(spec)
    return folder


VERBS = {
    "train": "train --preset nano --data {0}/text.txt --out {0}/new",
    "train-init": "train --init {0}/ternary --data {0}/text.txt --out {0}/new",
    "train-resume": "train --out {0}/ternary --steps 2",
    "sweep": "sweep {0}/spec.toml --out {0}/sweep",
    "generate": "generate -m {0}/model.safetensors -p one -n 4",
    "generate-torch": "generate -m {0}/model.safetensors -p one -n 4 --engine torch",
    "eval": "eval -m {0}/model.safetensors --data {0}/text.txt",
    "serve": "serve -m {0}/model.safetensors --port 0",
    "export": "export {0}/ternary -o {0}/out --to hf",
    "export-packed": "export {0}/model.safetensors -o {0}/out --to hf-packed",
    "import": "import {0}/hf -o {0}/out.safetensors",
    "compare": "compare {0}/ternary --baseline {0}/plain --data {0}/text.txt --methods float,bitnet",
}


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_refuses_before_it_starts(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_with(monkeypatch, 0)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("read or written before memory was asked for")

    for name in (  # those who import the function first: an import while it is replaced would keep the replacement
        "bitnet.engine.load.read_packed",
        "bitnet.files.opening.read_packed",
        "bitnet.inspection.read_packed",
        "bitnet.benchmarks.bench.command.read_packed",
        "bitnet.files.packed.read_packed",
        "bitnet.train.runs.run.Run.load",
        "bitnet.train.setup.prepare_data",
    ):
        monkeypatch.setattr(name, refuse)
    before = sorted(folder.iterdir())
    assert main(VERBS[verb].format(folder).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bitnet: error: {verb.partition('-')[0]}: ")
    assert re.search(
        r"needs about \d+\.\d GB of memory \(.*\), expected at most the 0\.3 GB available; .*--force runs it anyway$",
        line,
    )
    assert [path for path in sorted(folder.iterdir()) if path not in before] in ([], [folder / "sweep"])


RUNS = [verb for verb in VERBS if verb not in ("serve", "sweep", "compare", "train")]  # of those, tests have others


@pytest.mark.parametrize("verb", RUNS)
def test_force_goes_through(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    machine_with(monkeypatch, 0)
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
    words = (
        VERBS[verb].format(folder).replace(f"{folder}/new", f"{tmp_path}/new").replace(f"{folder}/out", f"{tmp_path}/o")
    )
    if verb == "train-init":
        words += " --steps 1 --set data.val_fraction=0.2"
    assert main([*words.split(), "--force"]) == 0
    assert sum("running it anyway" in line for line in capsys.readouterr().err.splitlines()) == 1


def test_a_sweep_names_its_largest_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_with(monkeypatch, 0)
    assert main(["sweep", str(folder / "spec.toml"), "--out", str(folder / "sweep")]) == 2
    line = capsys.readouterr().err
    assert "sweep: batch-size=64-ternary-s0: 4M parameters on 64 x 256 tokens" in line
    assert "train.batch_size=1 (" in line  # as a sweep file has it, not as a flag of train


def test_the_largest_preset_is_refused_with_ways_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_with(monkeypatch, 24e9)
    assert main(["train", "--preset", "2b4t", "--out", str(tmp_path / "run"), "--dtype", "bf16"]) == 2
    line = capsys.readouterr().err
    assert "--preset small" in line
    machine_with(monkeypatch, 48e9)
    assert main(["train", "--preset", "small", "--out", str(tmp_path / "run"), "--batch-size", "64"]) == 2
    for change, figure in re.findall(r"(--[\w-]+ [\w.=]+) \((\d+\.\d) GB\)", capsys.readouterr().err.partition(";")[2]):
        assert float(figure) <= 48.3, change
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_begun_is_told_what_may_still_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_with(monkeypatch, 0)
    assert main(["train", "--out", str(folder / "ternary"), "--steps", "2"]) == 2
    line = capsys.readouterr().err
    assert "batch_size" not in line
    assert "--preset" not in line
