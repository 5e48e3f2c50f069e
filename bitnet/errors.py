"""The one error type a user can cause; the command line turns it into one line and exit code 2."""


class BitNetError(ValueError):
    """Bad input from outside: the message says what was got, what was expected and what to do."""


def is_thread_shortage(error: BaseException) -> bool:
    """Whether Python or a C++ library says that the system starts no more threads."""
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("resource temporarily unavailable" in words or "new thread" in words)
