"""torch.compile around a run: what it is given, and what it needs.

One process, and each of several with the whole model, compile the network with its loss as one graph. A sharded one is
compiled block by block, inside what gathers a block's parameters: all blocks have the same code and the same shapes,
so they share one graph, however many there are. tests/train/test_compile.py checks that no graph breaks: pieces cost
minutes of compiling and the fusion that compiling is for.

Masters and saves are the same as without. Figures are not, in the last bits: fused sums are added in another order.
"""

import os
import shutil
import sys
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from bitnet.errors import BitNetError


def missing_compiler(device: torch.device) -> str | None:
    """The name of the compiler that torch.compile would not find; None where it has all it needs."""
    # What torch runs on a CPU, found as it finds it; it would say so in a page, after the text is tokenised.
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    found = device.type != "cpu" or shutil.which(name) or os.environ.get("TORCH_INDUCTOR_INSTALL_GXX")
    return None if found else name


def check_compiler(device: torch.device) -> None:
    """Raise BitNetError where torch.compile would find no compiler: on a CPU it writes C++."""
    if name := missing_compiler(device):
        raise BitNetError(
            f"train.compile: got no compiler '{name}', expected one: on a CPU torch.compile writes C++; install it, "
            "name another in CXX, or leave --compile away"
        )


def compiled(network: nn.Module) -> nn.Module:
    """The network as one graph, which shares its parameters. Graphs of other networks are forgotten."""
    torch.compiler.reset()  # torch keeps eight graphs of a function and makes no ninth; the models of a sweep are more
    return cast(nn.Module, torch.compile(network))


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block's own pass; hooks around it, such as those that gather its parameters, stay outside.

    Graphs of other models are forgotten.
    """
    torch.compiler.reset()
    for block in blocks:
        block.forward = torch.compile(block.forward)
