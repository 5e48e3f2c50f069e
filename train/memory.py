"""What a training run holds at its peak, from its configuration: each term with the code that makes it.

A run has phases, and needs its largest:

    passes     masters, gradients or optimiser state, what the forward pass of all blocks has kept for the backward one,
               and at its begin the logits with their gradient or the last block's gradients, whichever takes more
    update     masters, gradients, optimiser state, and what a matrix of the update takes
    validate   masters, optimiser state, codes of all weights, logits of a batch of windows
    save       masters, optimiser state; with `train.async_save` a second copy of both, which lives during passes

What is kept is counted tensor by tensor (`kept_by_block`), as the modules in bitnet/layers.py and bitnet/quant.py keep
it: tests/train/test_memory.py counts it again with hooks. On a CPU, freed tensors below 32 MB return to the allocator's
heap, not to the system, and leave holes that others do not fill (`_HOLES`).

Not counted: the tokens (read from a mapped file), and training a tokenizer, which ends before the model is made.

Dimensions: B batch, T time, M = B * T tokens, D model, F ffn, H heads, V vocabulary.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bitnet.config import PRESETS, ModelConfig
from bitnet.files import checkpoint
from bitnet.files.tensors import embedding_parameters, linear_parameters, norm_parameters, parameters
from bitnet.layers import SHORT
from bitnet.memory import Need, Way, budget, check, gigabytes, halves
from bitnet.quant import trains_fused
from bitnet.train.config import RunConfig
from bitnet.train.data.windows import batch_for
from bitnet.train.parallel.batches import micro_batches, sequences_per_step
from bitnet.train.precision import resolve_dtype
from bitnet.train.runs.run import Run

_TRAINER = 0.42e9  # bytes of a process that is about to train, its model aside: torch, optimisers, numpy, measured
_ON_GPU = 0.3e9  # on a GPU instead: compiled kernels, cuBLAS workspaces, cached blocks that do not fit
_COMPILER = 0.15e9  # of torch.compile in this process: its modules and the graphs, measured
# What a compiled graph keeps and holds of logits, against the eager one: it computes again what is cheap, and fuses the
# loss. Measured on one shape (nano in bf16, quantisers half in: 0.97 GB in all).
_COMPILED = 0.7
_HEAP = 32 << 20  # bytes from which glibc's allocator maps a tensor by itself and gives it back when it is freed
# Of kept tensors below that: memory between them that is held and unused. Measured 0.35 to 1.3, the more of the small
# models, whose total it does not move far.
_HOLES = 0.6
_BUCKETS = 2 * 25 * 2**20  # of DistributedDataParallel: gradients on their way, one bucket sent and one received


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a run, resolved."""

    model: ModelConfig  # with the context of the run
    config: RunConfig
    batch: int  # sequences of the largest micro-batch
    micro: int  # micro-batches a step
    width: int  # bytes of a value in the run's dtype
    mixes: bool  # float operands are mixed with quantised ones: quantisation warm-up
    device: torch.device
    processes: int = 1

    @classmethod
    def of(
        cls, config: RunConfig, device: torch.device, processes: int = 1, model: ModelConfig | None = None
    ) -> "Setting":
        """model: the one that is trained, where its vocabulary is known already."""
        settings = config.train
        model = (model or config.model).replace(max_position_embeddings=config.context)
        counts = micro_batches(sequences_per_step(settings, processes), processes, settings.batch_size)
        width = 2 if resolve_dtype(settings.dtype, device) == "bf16" else 4
        warms_up = model.linear != "float" and (settings.quant_warmup > 0 or settings.float_share > 0)
        return cls(model, config, max(counts), len(counts), width, warms_up, device, processes)

    @property
    def rows(self) -> int:
        """M, tokens of a micro-batch."""
        return self.batch * self.model.context

    @property
    def fused(self) -> bool:
        """Whether linears are those of kernels/gpu/training.py, which keep less (never while operands are mixed)."""
        return self.model.linear == "ternary" and not self.mixes and trains_fused(self.device)

    @property
    def sharded(self) -> bool:
        return self.config.train.parallel == "fsdp" and self.processes > 1


@dataclass(frozen=True)
class OtherModel:
    """A model that a run starts from or learns from, before it is opened.

    trained: a run of ours, with its masters; mapped: bytes of a packed file, which is mapped and read whole.
    """

    config: ModelConfig
    trained: bool
    mapped: float = 0.0

    @property
    def initial_bytes(self) -> float:
        """Host memory while weights start from it, which is as long as the run: other sources are read by tensor."""
        return 4.0 * parameters(self.config) if self.trained else 0.0

    @property
    def teacher_bytes(self) -> float:
        """On the device: masters and codes of projections, or packed projections in two layouts and fp32 tables."""
        linear = 0 if self.config.linear == "float" else linear_parameters(self.config)
        if self.trained or not linear:
            return 4.0 * parameters(self.config) + linear
        return 4.0 * (parameters(self.config) - linear) + linear / 2


Look = Callable[[str], OtherModel]  # reads what lies at a path, but for its weights


@dataclass(frozen=True)
class Others:
    """The other models of a run."""

    initial: OtherModel | None = None
    teacher: OtherModel | None = None


NONE = Others()


def training_need(setting: Setting, others: Others = NONE, *, resumes: bool = False) -> Need:
    """Bytes that one process of a run holds, by phase. resumes: the optimiser has its state before the first pass."""
    settings = setting.config.train
    state = _state(setting)
    held = {"libraries": _ON_GPU if setting.device.type == "cuda" else _TRAINER, "masters": state["masters"]}
    if settings.compile:
        held["libraries"] += _COMPILER
    if others.teacher is not None:
        held["teacher"] = others.teacher.teacher_bytes
    if others.initial is not None and setting.device.type == "cpu":
        held["initial model"] = others.initial.initial_bytes
    if settings.async_save:  # all tensors are copied, and live on while the next steps run
        held["copy that is saved"] = state["masters"] + state["optimiser"]
    gradients, optimiser = state["gradients"], state["optimiser"]
    logits, backward = _logits(setting, others.teacher is not None), _backward(setting)
    # A fresh run has no optimiser state while it times its first passes, and its gradients are dropped after each step.
    both = resumes or setting.micro > 1
    passes = {
        **held,
        **({"gradients": gradients, "optimiser": optimiser} if both else {}),
        **({} if both else {"gradients or optimiser": max(gradients, optimiser)}),
        "activations": _activations(setting) + _parallel(setting),
        **({"logits": logits} if logits > backward else {"backward pass of a block": backward}),
    }
    update = {**held, "gradients": gradients, "optimiser": optimiser, "update": _update(setting)}
    validate = {**held, "optimiser": optimiser, "validation": _validation(setting)}
    return Need({"passes": passes, "update": update, "validate": validate})


# ---- masters, gradients, optimiser -------------------------------------------------------------------------


def _state(setting: Setting) -> dict[str, float]:
    """Masters, gradients and optimiser state of this process, fp32: four bytes a value."""
    linear = linear_parameters(setting.model)
    rest = embedding_parameters(setting.model) + norm_parameters(setting.model)
    share = setting.processes if setting.sharded else 1
    # AdamW keeps two moments of each parameter; Muon, for the matrices of the blocks, one momentum.
    moments = 2 * rest + (1 if setting.config.train.optimizer == "muon" else 2) * linear
    return {
        "masters": 4.0 * (linear + rest) / share,
        "gradients": 4.0 * (linear + rest) / share,
        "optimiser": 4.0 * moments / share,
    }


def _update(setting: Setting) -> float:
    """Temporaries of the optimiser: Muon's iteration of the largest matrix, two bf16 products and fp32 in and out."""
    if setting.config.train.optimizer != "muon":
        return 0.0  # AdamW is fused: in place
    return 16.0 * setting.model.hidden_size * setting.model.intermediate_size


def _parallel(setting: Setting) -> float:
    """What several processes hold beside their share while gradients are made."""
    if setting.processes == 1:
        return 0.0
    if not setting.sharded:
        return float(_BUCKETS)
    tables, block = (
        embedding_parameters(setting.model),
        linear_parameters(setting.model) / setting.model.num_hidden_layers,
    )
    # Tables whole until the backward pass has ended, and their gradient; of blocks one in use and the next one on its
    # way, and the gradient of one with what is scattered.
    return 4.0 * (2 * tables + 4 * block)


# ---- activations -------------------------------------------------------------------------------------------


def _activations(setting: Setting) -> float:
    """What blocks and the final norm keep for the backward pass, and the holes between."""
    return _with_holes(setting, _kept_by_blocks(setting) + _kept_behind(setting))


def _backward(setting: Setting) -> float:
    """What the backward pass of the last block takes, when the logits are gone: the block anew under recompute.

    Gradients of gate, up and their product, copies side by side for one product of both, and with their scales.
    """
    own = kept_by_block(setting) if setting.config.train.recompute else []
    return _with_holes(setting, own + [4 * setting.rows * setting.model.intermediate_size] * 8)


def _with_holes(setting: Setting, sizes: Sequence[float]) -> float:
    if setting.config.train.compile:
        return _COMPILED * sum(sizes)
    small = sum(size for size in sizes if size < _HEAP)
    return sum(sizes) + (_HOLES * small if setting.device.type == "cpu" else 0.0)


def kept(setting: Setting) -> list[int]:
    """Bytes of every tensor, masters aside, that one forward pass keeps for its backward pass."""
    return _kept_by_blocks(setting) + _kept_behind(setting) + _kept_by_head(setting)


def _kept_by_blocks(setting: Setting) -> list[int]:
    layers = setting.model.num_hidden_layers
    if setting.config.train.recompute:
        return [4 * setting.rows * setting.model.hidden_size] * layers  # what each block began with
    return kept_by_block(setting) * layers


def _kept_behind(setting: Setting) -> list[int]:
    """The final norm, and its result as the head reads it: in chunks, in fp32."""
    values = setting.rows * setting.model.hidden_size
    chunked = 0 < setting.config.train.loss_chunk < setting.rows
    width = 4 if chunked else setting.width
    return [*_norm(setting, values, setting.rows, False), width * values]


def _kept_by_head(setting: Setting) -> list[int]:
    """Log-probabilities and the head's values; the logits of chunks are made again instead."""
    model, chunked = setting.model, 0 < setting.config.train.loss_chunk < setting.rows
    table = model.vocab_size * model.hidden_size
    return [4 * table] if chunked else [setting.width * table, 4 * setting.rows * model.vocab_size]


def kept_by_block(setting: Setting) -> list[int]:
    """Bytes of every tensor that one block keeps for its backward pass."""
    model, m, a = setting.model, setting.rows, setting.width
    d, f, kv = model.hidden_size, model.intermediate_size, model.num_key_value_heads * model.head_dim
    fused = setting.fused
    kept = [
        *_norm(setting, m * d, m, fused),  # input_layernorm of the residual stream
        *_linear(setting, d, (d, kv, kv)),
        *_attention(setting),
    ]
    if model.sub_norms:  # of attention's result: kept as it came, or as the fp32 copy that it is without fusing
        kept += _norm(setting, m * d, m, fused, a if fused else 4)
    kept += _linear(setting, d, (d,))
    kept += _norm(setting, m * d, m, fused)  # post_attention_layernorm
    kept += _linear(setting, d, (f, f))
    kept += 3 * [a * m * f]  # gate or its ReLU, its activation, and up: factors of products
    if model.sub_norms:
        kept += [] if a == 4 or fused else [4 * m * f]  # the fp32 copy; in fp32 it is the product itself, counted next
        kept += [a * m * f if a == 4 or fused else 0, 0 if fused else 4 * m * f, 4 * m]
    return kept + _linear(setting, f, (d,))


def _norm(setting: Setting, values: int, rows: int, fused: bool, width: int = 4) -> list[int]:
    """An RMSNorm: its input, one number a row, and on a CPU the normalised values before the gain."""
    one_kernel = fused or setting.device.type == "cuda"
    return [width * values, 4 * rows, *([] if one_kernel else [4 * values])]


def _linear(setting: Setting, k: int, outputs: Sequence[int]) -> list[int]:
    """Linears of `k` inputs that share them: what they keep of the input and of the weights."""
    m, a, weights = setting.rows, setting.width, [k * n for n in outputs]
    if setting.model.linear == "float":
        if a == 4:
            return [4 * m * k]  # the masters are the weights
        return [2 * m * k] * len(outputs) + [2 * w for w in weights]  # autocast casts for each of them
    if setting.mixes:  # the mixed operands in the run's dtype
        return [a * m * k, *(a * w for w in weights)]
    return [m * k, 4 * m, sum(weights)]  # int8 activations and codes, a scale a row


def _attention(setting: Setting) -> list[int]:
    model, m, a, t = setting.model, setting.rows, setting.width, setting.model.context
    d, kv, heads = model.hidden_size, model.num_key_value_heads * model.head_dim, model.num_attention_heads
    kept: list[int] = []
    if model.qk_norm:
        kept += _norm(setting, m * d, m * heads, fused=False)
        kept += _norm(setting, m * kv, m * model.num_key_value_heads, fused=False)
    if setting.device.type == "cpu" and a == 2 and t <= SHORT:  # `_attend_by_products`: keys and values a query head
        return [*kept, *[2 * m * d] * 3, 2 * m * t * heads]
    # Without a QK norm the result has the order of q, heads inside of a token: the next fp32 layer reads it as it is.
    shared = not model.qk_norm and a == 4 and (model.sub_norms or model.linear == "float")
    return [*kept, a * m * d, a * m * kv, a * m * kv, 4 * m * heads, *([] if shared else [a * m * d])]


# ---- logits ------------------------------------------------------------------------------------------------


def _logits(setting: Setting, taught: bool) -> float:
    """Logits at their peak in units of M V fp32, the head's values and their gradient.

    Three: the log-probabilities that were kept, the gradient of the loss, that of the logits.
    """
    settings, model = setting.config.train, setting.model
    rows = min(settings.loss_chunk or setting.rows, setting.rows)
    copies = 3
    if taught:  # in the forward pass: logits and log-probabilities of both, and four terms of the divergence
        copies = 8
    if settings.z_loss:  # the logits themselves, and the gradient through logsumexp
        copies += 1 if taught else 2
    head = (4 + setting.width) * model.vocab_size * model.hidden_size
    return (_COMPILED if settings.compile else 1.0) * 4.0 * copies * rows * model.vocab_size + 2 * head


def _validation(setting: Setting) -> float:
    """Scoring windows in fp32 (train/evaluate.py): codes of all weights, logits and log-probabilities of a batch."""
    model = setting.model
    rows = batch_for(model.context, model.vocab_size) * model.context
    codes = linear_parameters(model) if model.linear != "float" else 0
    one_block = 4.0 * rows * (6 * model.hidden_size + 5 * model.intermediate_size)
    return codes + 2 * 4.0 * rows * model.vocab_size + one_block


# ---- checking ----------------------------------------------------------------------------------------------

_SMALLER = ("medium", "small", "mini", "micro", "nano")  # presets by size, to suggest


def known_vocabulary(config: RunConfig, run: Run) -> RunConfig:
    """The config with the vocabulary that a run's tokenizer has, once there is one: what is asked for is a bound."""
    if not (run.data / "manifest.json").is_file():
        return config
    return replace(config, model=config.model.replace(vocab_size=run.tokenizer().vocab_size))


def run_need(config: RunConfig, device: torch.device, run: Run, others: Others = NONE) -> Need:
    """What one process of a run into the folder `run` will hold."""
    setting = Setting.of(known_vocabulary(config, run), device, _processes())
    return training_need(setting, others, resumes=bool(checkpoint.folders(run.saves)))


def check_run(
    config: RunConfig,
    device: torch.device,
    run: Run,
    others: Others = NONE,
    *,
    verb: str = "train",
    force: bool = False,
) -> None:
    """Refuse a run that does not fit where it would train; one warning instead under `force`.

    run: its folder; of one that has begun only settings that may still change are suggested.
    """
    if device.type == "cuda" and _processes() > 1:  # as train/parallel/distributed.py will choose
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    here = _processes_here(device)
    need, have = run_need(config, device, run, others), budget(device, here)
    if have is None or here * need.total <= have:
        return

    def total(changed: RunConfig) -> float:
        return run_need(changed, device, run, others).total

    ways = _ways(config, total, have / here, begun=run.exists(), flag="--set " if verb == "train" else "")
    if verb == "train" and others.initial is None and not run.exists():
        ways += _smaller_preset(config, total, have / here)
    size = parameters(config.model) / 1e6
    what = f"{verb}: {size:,.0f}M parameters on {config.train.batch_size} x {config.context} tokens"
    check(what, need, device, ways=ways, processes=here, force=force)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _processes_here(device: torch.device) -> int:
    """Processes that share the memory of this device: on a CPU all of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1


def summary(need: Need, device: torch.device) -> str:
    """What a run needs, for its overview."""
    here = _processes_here(device)
    have = budget(device, here)
    each = f" in each of {here} processes" if here > 1 else ""
    return f"about {gigabytes(need.total)}{each}" + (f" of {gigabytes(have)} available" if have is not None else "")


def _ways(config: RunConfig, total: Callable[[RunConfig], float], have: float, *, begun: bool, flag: str) -> list[Way]:
    """Settings that make a run smaller: each alone, and all together where none alone is enough.

    flag: what goes before a setting, "--set " on the command line of `train`.
    """
    settings = config.train
    changes: dict[str, Any] = {}
    if not begun or settings.global_batch:  # how a global batch is cut into micro-batches may change
        batches = halves(settings.batch_size)
        if batches:
            fits = (n for n in batches if total(_with(config, batch_size=n)) <= have)
            changes["batch_size"] = next(fits, 1)
    if not settings.recompute:
        changes["recompute"] = True
    if not settings.loss_chunk:
        changes["loss_chunk"] = 1024
    if not begun and settings.optimizer == "adamw":
        changes["optimizer"] = "muon"

    def way(**chosen: Any) -> Way:
        words = (f"{flag}train.{key}={str(value).lower()}" for key, value in chosen.items())
        return Way(" ".join(words), total(_with(config, **chosen)))

    found = [way(**{key: value}) for key, value in changes.items()]
    if len(found) > 1 and all(one.total > have for one in found):
        found.append(way(**changes))
    return found


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def _smaller_preset(config: RunConfig, total: Callable[[RunConfig], float], have: float) -> list[Way]:
    """The largest preset that fits, with its own context where that is the shorter one."""
    for name in _SMALLER:
        model = PRESETS[name].replace(linear=config.model.linear)
        context = config.train.context if config.train.context <= model.context else 0
        smaller = replace(config, model=model, train=replace(config.train, context=context))
        if parameters(model) < parameters(config.model) and total(smaller) <= have:
            return [Way(f"--preset {name}", total(smaller))]
    return []
