"""Whether a Python has llama.cpp, and what its build of it lacks on this CPU."""

import subprocess
from collections.abc import Sequence

from bitnet.errors import BitNetError

INSTALL = "pip install --no-binary llama-cpp-python llama-cpp-python"  # compiles it for the CPU it runs on
_IMPORT = 60.0  # seconds for an import, which takes less than one


def check_python(python: str, verb: str) -> None:
    """Raise BitNetError, with the way to install it, where this Python cannot import llama_cpp."""
    try:
        found = subprocess.run(
            [python, "-c", "import llama_cpp, numpy"], capture_output=True, text=True, check=False, timeout=_IMPORT
        )
    except subprocess.TimeoutExpired:
        raise BitNetError(
            f"{verb}: --llama: '{python}' did not import llama_cpp within {_IMPORT:.0f} s, expected less than one; "
            "leave llama.cpp out, or find out what it waits for"
        ) from None
    except OSError as error:
        raise BitNetError(
            f"{verb}: --llama: got '{python}', which cannot be run ({error.strerror}), expected a Python interpreter"
        ) from None
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BitNetError(
            f"{verb}: --llama: '{python}' cannot import llama_cpp ({last}); build it for this CPU with {INSTALL} and "
            "name that environment's interpreter with --llama"
        )


def lacks(library: str, system: str, features: Sequence[str]) -> str:
    """What a build of llama.cpp lacks, or "". system: llama.cpp's own list; features: the CPU's."""
    if library.startswith("cyllama"):
        return "prebuilt wheel, not built for this CPU: --llama PYTHON names a better build"
    if "avx512_f" in features and "AVX512 = 1" not in system:
        return f"built without AVX-512, which this CPU has: {INSTALL}, and --llama PYTHON"
    return ""
