"""Whether there is a C++ compiler that works: `CXX=false make test` is a machine without one."""

import functools
import os
import shutil
import subprocess


@functools.cache
def why_no_compiler(name: str = "g++") -> str | None:
    """The reason why neither $CXX nor, where that is not set, `name` compiles C++; None if it does."""
    command = os.environ.get("CXX", name)
    if shutil.which(command) is None:
        return f"needs a C++ compiler, there is no '{command}'"
    asked = [command, "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(asked, input=b"#include <vector>\n", capture_output=True, timeout=120, check=False)
    return f"needs a C++ compiler, '{command}' compiles nothing" if done.returncode else None
