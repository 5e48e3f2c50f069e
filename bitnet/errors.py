"""The one error type a user can cause; the command line turns it into one line and exit code 2."""


class BitNetError(ValueError):
    """Bad input from outside: the message says what was got, what was expected and what to do."""
