"""Machines without a C++ compiler: whether this is one (`CXX=false make test` is), and what differs there."""

import functools
import os
import shutil
import subprocess

from bitnet.kernels import native


@functools.cache
def why_no_compiler(name: str = "g++") -> str | None:
    """The reason why neither $CXX nor, where that is not set, `name` compiles C++; None if it does."""
    command = os.environ.get("CXX", name)
    if shutil.which(command) is None:
        return f"needs a C++ compiler, there is no '{command}'"
    asked = [command, "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(asked, input=b"#include <vector>\n", capture_output=True, timeout=120, check=False)
    return f"needs a C++ compiler, '{command}' compiles nothing" if done.returncode else None


def without_build_warning(err: str) -> str:
    """What a verb wrote to stderr, less the line that warns where the C++ kernels are not built."""
    warning = f"bitnet: {native.why_not()}; running through torch"
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith(warning))
