"""Python imports this by itself at its start where PYTHONPATH has this folder."""

import fake_cuda

fake_cuda.install_for_good()
