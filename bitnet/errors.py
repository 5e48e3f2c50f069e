"""The error type for what users cause; the command line prints it as one line and exits with code 2."""


class BitNetError(ValueError):
    """Bad input from a user: the message says what was got, what was expected and what to do."""


def is_thread_shortage(error: BaseException) -> bool:
    """Whether an error of Python or of a C++ library means that the system starts no more threads."""
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("resource temporarily unavailable" in words or "new thread" in words)
