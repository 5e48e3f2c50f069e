"""torch.compile in training: what is compiled, and the compiler that it needs.

On one process and with DDP, the network with its loss is compiled as one graph. A sharded model is compiled block by
block, inside the hooks that gather a block's parameters; all blocks have the same code and shapes, so they share one
graph. tests/train/test_compile.py checks that there are no graph breaks: they cost minutes of compilation and prevent
fusion, which is the point of compiling.

Masters and saves have the same format with and without. Figures differ in their last bits, because fused sums are added
in another order.
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
    """The name of the C++ compiler that torch.compile needs on this device and would not find; None if it has all.

    torch would report that in a page of text, and only after the corpus is tokenised.
    """
    # The same search as torch's.
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    found = device.type != "cpu" or shutil.which(name) or os.environ.get("TORCH_INDUCTOR_INSTALL_GXX")
    return None if found else name


def check_compiler(device: torch.device) -> None:
    """Raise BitNetError if torch.compile would find no compiler for the code that it generates for this device."""
    if name := missing_compiler(device):
        raise BitNetError(
            f"train.compile: got no compiler '{name}', expected one: on a CPU torch.compile generates C++; install "
            "it, name another in CXX, or omit --compile"
        )


def compiled(network: nn.Module) -> nn.Module:
    """The network compiled as one graph, with the same parameters. Drops the graphs of earlier networks."""
    torch.compiler.reset()  # torch compiles a function at most eight times, and a sweep trains more models than that
    return cast(nn.Module, torch.compile(network))


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile the forward method of each block, without the hooks around it. Drops the graphs of earlier models."""
    torch.compiler.reset()
    for block in blocks:
        block.forward = torch.compile(block.forward)
