"""The reports of `eval`, `inspect` and `doctor` as tables for a terminal, with the numbers of --json."""

import re
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bitnet.tables import facts, machine_rows, plus_minus


def evaluation_table(report: dict[str, Any]) -> Table:
    """The result of `bitnet eval`."""
    return facts(
        {
            "bits per byte": f"{report['bits_per_byte']:.4f}{plus_minus(report['bits_per_byte_error'], 4)}",
            "perplexity": f"{report['perplexity']:.3f}{plus_minus(report['perplexity_error'], 3)} per token",
            "loss": f"{report['loss']:.4f} nats per token",
            "text": f"{report['bytes']:,} bytes, {report['tokens']:,} tokens in windows of {report['context']}",
            "speed": f"{report['tokens_per_second']:,.0f} tokens/s ({report['engine']} engine)",
        }
    )


def inspection_tables(report: dict[str, Any]) -> list[RenderableType]:
    """The result of `bitnet inspect`: the model, its bytes, and a row per block."""
    config = report["config"]
    attention = f"{config['num_attention_heads']} heads, {config['num_key_value_heads']} for keys and values"
    options = [
        "ReLU²" if config["hidden_act"] == "relu2" else "SiLU",
        "sub-norms" if config["sub_norms"] else "no sub-norms",
        "QK norm" if config["qk_norm"] else "no QK norm",
        "tied head" if config["tie_word_embeddings"] else "untied head",
    ]
    rows = {
        "model": f"{report['parameters'] / 1e6:.2f}M parameters, {config['linear']}",
        "shape": f"{config['num_hidden_layers']} layers, width {config['hidden_size']}, "
        f"ffn {config['intermediate_size']}, {attention}",
        "block": ", ".join(options),
        "tokens": f"{config['vocab_size']:,} in the vocabulary ({report['tokenizer'] or 'no tokenizer'}), "
        f"context {config['max_position_embeddings']}",
        "file": f"{report['file_bytes']:,} bytes, {report['ratio_to_float16']:.2f} times smaller than fp16 "
        f"({report['float16_bytes']:,})",
        "projections": f"{report['projection_bytes']:,} bytes, {report['bits_per_weight']:.3f} bits per weight",
        "embedding": f"{report['table_bytes']:,} bytes, the head included",
        "KV cache": f"{report['kv_cache_bytes'] / 1e6:.1f} MB for one full context in fp32",
        "training": ", ".join(f"{key.replace('_', ' ')} {_shorten(v)}" for key, v in report["training"].items())
        or "unknown",
    }
    if report["zero_fraction"] is None:
        return [facts(rows)]
    rows["zeros"] = f"{report['zero_fraction']:.1%} of the ternary weights"
    return [facts(rows), "", zero_table(report["layers"])]


def zero_table(layers: list[dict[str, Any]]) -> Table:
    """Share of zeros by block and projection, with the weight scale below it."""
    blocks: dict[int, dict[str, dict[str, Any]]] = {}
    for layer in layers:
        parts = layer["name"].split(".")
        blocks.setdefault(int(parts[2]), {})[parts[-1].removesuffix("_proj")] = layer
    table = Table(
        title="zeros by layer (weight scale below)", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("block", justify="right")
    kinds = list(next(iter(blocks.values())))
    for kind in kinds:
        table.add_column(kind, justify="right")
    for index, block in blocks.items():
        table.add_row(str(index), *(f"{block[kind]['zero_fraction']:.1%}" for kind in kinds))
        table.add_row("", *(Text(f"{block[kind]['scale']:.4f}", style="dim") for kind in kinds))
    return table


def doctor_tables(report: dict[str, Any]) -> list[RenderableType]:
    """The result of `bitnet doctor`."""
    cpu = report["cpu"]
    present = {name: version for name, version in report["packages"].items() if version}
    missing = [name for name, version in report["packages"].items() if not version]
    optional = [f"{name} ({item['for']})" for name, item in report["optional"].items() if not item["version"]]
    rows = {
        "bitnet": f"{report['bitnet']} on Python {report['python']}",
        "platform": report["platform"],
        "packages": ", ".join(f"{name} {version}" for name, version in present.items()),
        "missing": ", ".join(missing) or "nothing that is needed",
        "optional": ("not installed: " + ", ".join(optional)) if optional else "all installed",
        "cpu": f"{cpu['name']}, {cpu['threads']} threads in use",
        **machine_rows(report["machine"]),
        "features": " ".join(cpu["features"]) or "unknown to this version of torch",
        "devices": ", ".join(f"{device} ({name})" for device, name in report["devices"].items()),
    }
    verdict = Text("everything works", style="bold green")
    if not report["healthy"]:
        verdict = Text(report["problem"] or "a kernel computes wrong sums: do not trust results", style="bold red")
    remarks = [Text(f"note: {remark}", style="yellow") for remark in report["machine"]["remarks"]]
    return [facts(rows), "", _backend_table(report), _instruction_set_table(report), *remarks, verdict]


_STATUS_STYLES = {"ok": "green", "failed": "bold red", "unavailable": "dim"}


def _status(row: dict[str, Any], chosen: bool) -> Text:
    """The status of a kernel backend; "in use" for the working one that is chosen."""
    status = row["status"]
    return Text("in use" if chosen and status == "ok" else status, style=_STATUS_STYLES[status])


def _check_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _backend_table(report: dict[str, Any]) -> Table:
    table = _check_table("kernel backends", "device", "backend", "status", "reason")
    for row in report["backends"]:
        status = _status(row, report["selected"].get(row["device"]) == row["backend"])
        table.add_row(row["device"], row["backend"], status, row["reason"])
    return table


def _instruction_set_table(report: dict[str, Any]) -> Table:
    table = _check_table("C++ instruction sets", "name", "status", "description", "reason")
    for row in report["instruction_sets"]:
        status = _status(row, report["instruction_set"] == row["instruction_set"])
        table.add_row(row["instruction_set"], status, row["summary"], row["reason"])
    if not report["instruction_sets"]:
        table.add_row("none", Text("unavailable", style=_STATUS_STYLES["unavailable"]), "", report["native_problem"])
    return table


def _shorten(value: Any) -> str:
    """A number for people: four decimals, or thousands separated by commas."""
    return f"{value:.4f}" if isinstance(value, float) else re.sub(r"\B(?=(\d{3})+$)", ",", str(value))
