"""The text of a reply: stop strings, which are never sent, and the spelling of single tokens."""

from collections.abc import Sequence

from bitnet.text.tokenizer import Tokenizer


class StopFilter:
    """Passes text on until a stop string is complete, and holds back what may be the beginning of one.

    The result does not depend on how the text is cut into pieces: the stop string that is complete first ends the text;
    of several that end at the same place, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.passed = 0  # characters passed on
        self.stopped = False

    def push(self, piece: str) -> str:
        """Add text that was generated; returns the text that may be sent now."""
        if self.stopped:
            return ""
        self._held += piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._pass(min(ends)[1])
        return self._pass(len(self._held) - self._partial_stop())

    def flush(self) -> str:
        """The text held back, at the end of the text; nothing after a stop string."""
        return "" if self.stopped else self._pass(len(self._held))

    def _pass(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self.passed += count
        return text

    def _partial_stop(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        for length in range(min(len(self._held), max(map(len, self._stops), default=1) - 1), 0, -1):
            suffix = self._held[-length:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0


class Speller:
    """The text that stands for one token in a reply; control tokens and partial characters have one too."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {tokenizer.eos_id: "<eos>", tokenizer.bos_id: "<bos>"}

    def bytes(self, id: int) -> bytes:
        """The bytes that a token adds to the text; none for a control token."""
        return self._tokenizer.spelling(id)

    def name(self, id: int) -> str:
        """Its text; `<bos>`, `<eos>` or `<control N>`; for a partial character `bytes:\\x..`, as OpenAI writes it."""
        data = self.bytes(id)
        if not data:
            return self._names.get(id, f"<control {id}>")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
