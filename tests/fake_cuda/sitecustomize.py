"""Python imports this by itself at its start where PYTHONPATH has this folder."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("fake_cuda.py")))["install_for_good"]()
