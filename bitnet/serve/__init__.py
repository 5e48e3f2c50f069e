"""The HTTP server: OpenAI's API and a page, around an engine. An optional extra, opened by `bitnet serve` alone.

    client --HTTP--> app (event loop: requests, replies) --Job--> scheduler (one thread: slots of the engine)
                                                         <--Event--

guard.py stands before every request, protocol.py reads them, replies.py writes the answers, text.py holds back
stop strings, server.py opens the socket, loads the model and ends politely.
"""

import importlib.util

from bitnet.errors import BitNetError

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def check_packages() -> None:
    """Raise BitNetError where the packages of the extra are missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BitNetError(
            f"serve: got no package {', '.join(missing)}, expected the server's packages; "
            "pip install 'bitnet-ternary[serve]'"
        )
