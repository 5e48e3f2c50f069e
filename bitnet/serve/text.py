"""Text on its way out: stop strings that never show, and how one token is spelt in a reply."""

from collections.abc import Sequence

from bitnet.text.tokenizer import Tokenizer


class StopWriter:
    """Lets text through until a stop string is complete; of one that may still complete, nothing is let through.

    Where pieces of the text end makes no difference: the stop string that is complete first ends the text, of
    several that end together the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.shown = 0  # characters let through
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that may be shown now that `piece` has been written."""
        if self.stopped:
            return ""
        self._held += piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._partial())

    def flush(self) -> str:
        """What is left at the end of the text; nothing after a stop string."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self.shown += count
        return text

    def _partial(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(len(self._held), max(map(len, self._stops), default=1) - 1), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class Speller:
    """The text that stands for one token in a reply: every id has one, control tokens and parts of characters too."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {tokenizer.eos_id: "<eos>", tokenizer.bos_id: "<bos>"}

    def bytes(self, id: int) -> bytes:
        """The bytes a token adds to the text; none for a control token."""
        return self._tokenizer.spelling(id)

    def name(self, id: int) -> str:
        """Its text; `<bos>`, `<eos>` or `<control N>`; `bytes:\\x..` for a part of a character, as OpenAI writes it."""
        data = self.bytes(id)
        if not data:
            return self._names.get(id, f"<control {id}>")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
