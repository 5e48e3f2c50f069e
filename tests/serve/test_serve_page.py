"""The page in a real browser: generating, stopping, inspecting tokens, errors. Skipped without Chromium."""

import json
import os
import re
import select
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import child_process
import pytest
from text_models import packed_model, text_tokenizer

from bitnet.engine.load import load
from bitnet.engine.sampling import Sampling
from bitnet.generation import prompt_ids

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe"
)


class Browser:
    """Chromium, controlled by its DevTools protocol over two pipes: JSON messages that end with a zero byte."""

    def __init__(self, profile: Path) -> None:
        theirs_in, self.out = os.pipe()
        self.inp, theirs_out = os.pipe()
        # The protocol uses the descriptors 3 and 4; a shell sets them up.
        script = f"exec {CHROMIUM} {FLAGS} --user-data-dir={profile} about:blank 3<&{theirs_in} 4>&{theirs_out}"
        self.process = child_process.start(["bash", "-c", script], pass_fds=(theirs_in, theirs_out), stderr=DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.rest, self.number, self.session = b"", 0, ""
        self.requests: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.inp], [], [], child_process.LIMIT)[0], f"no answer to {method}"
                data = os.read(self.inp, 1 << 16)
                assert data, "the browser has exited"
                self.rest += data
            answer, _, self.rest = self.rest.partition(b"\0")
            found = json.loads(answer)
            if found.get("method") == "Network.requestWillBeSent":
                self.requests.append(found["params"]["request"]["url"])
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def js(self, expression: str) -> Any:
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str) -> Any:
        found: list[Any] = []

        def true() -> bool:
            found.append(self.js(expression))
            return bool(found[-1])

        child_process.wait_until(true, lambda: f"{expression}; the page says: {self.js('document.body.innerText')}")
        return found[-1]

    def press(self, key: str, modifiers: int = 0) -> None:
        code = {"Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37}[key]
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers
            )

    def close(self) -> None:
        child_process.end(self.process)
        os.close(self.inp)
        os.close(self.out)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_model(tmp_path_factory.mktemp("page") / "toy.safetensors", text_tokenizer(), 8)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[tuple[Popen[str], str]]:
    command = child_process.bitnet("serve", "-m", model, "--port", 0, "-t", 1)
    with child_process.started(command, stdout=PIPE) as process:
        yield process, child_process.line_from(process)


@pytest.fixture
def browser(server: tuple[Any, str], tmp_path: Path) -> Iterator[Browser]:
    made = Browser(tmp_path / "profile")
    try:
        made.ask("Page.navigate", url=server[1])
        made.until("document.getElementById('server')?.dataset.state === 'ready'")
        yield made
    finally:
        made.close()


def setting(name: str, value: str) -> str:
    return f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('input')) }})(document.getElementById('{name}'))"


WRITING = "document.body.classList.contains('writing')"
TEXT = "[...document.querySelectorAll('.token')].map(e => e.textContent).join('')"


def test_a_visit(browser: Browser, server: tuple[Any, str], model: Path) -> None:
    """In one test, since a browser takes seconds to start: settings, tokens, stopping, and a server that has gone."""
    process, url = server
    for name, value in (("seed", "5"), ("temperature", "1.2"), ("max_tokens", "40"), ("top_k", "0"), ("min_p", "0")):
        browser.js(setting(name, value))
    browser.js(setting("top_p", "1"))
    assert browser.js("document.querySelector('output[for=top_k]').textContent") == "off"
    browser.js("document.getElementById('prompt').focus()")
    browser.ask("Input.insertText", text="the fox 🙂")
    browser.press("Enter", modifiers=2)  # Ctrl
    browser.until(f"!{WRITING} && document.querySelectorAll('.token').length > 0")
    engine: Any = load(model)
    sampling = Sampling(temperature=1.2, top_k=0, top_p=1.0, min_p=0.0, seed=5)
    stop = [i for i in (engine.tokenizer.bos_id, engine.tokenizer.eos_id) if i is not None]
    ids = engine.generate(prompt_ids(engine.tokenizer, "the fox 🙂"), 40, sampling, stop)
    assert browser.js(TEXT) == engine.tokenizer.decode(ids)
    assert browser.js("document.querySelector('.given').textContent") == "the fox 🙂"
    stats = browser.js("document.getElementById('stats').textContent")
    assert re.match(rf"{len(ids)} tokens? · \d+ tokens/s · first token after \d+ ms", stats)
    assert browser.js("document.getElementById('status').textContent").startswith("Done.")

    browser.js("document.querySelector('.token').focus()")
    first = browser.js("document.getElementById('token-name').textContent")
    rows = "[...document.querySelectorAll('#alternatives li')].map(e => e.querySelector('.share').textContent)"
    assert 5 <= len(browser.js(rows)) <= 6
    assert browser.js("document.querySelectorAll('#alternatives .taken').length") == 1
    assert browser.js("likeliest({7: -3, a: -1, 12: -2}).map(([name]) => name).join()") == "a,12,7"
    browser.press("ArrowRight")
    assert browser.js("document.activeElement.dataset.index") == "1"
    browser.press("ArrowLeft")
    assert browser.js("document.getElementById('token-name').textContent") == first

    browser.js(setting("max_tokens", "2048"))
    browser.js(setting("temperature", "0"))  # repeats itself: long enough to be stopped
    browser.js("document.getElementById('write').focus()")
    assert browser.js("document.getElementById('write').click(), document.activeElement.id") == "stop"
    browser.until(
        f"{WRITING} && document.querySelectorAll('.token').length > 1 && document.activeElement.id === 'stop'"
    )
    browser.press("Escape")
    browser.until(f"!{WRITING}")
    assert browser.js("document.activeElement.id") == "write"
    assert browser.js("document.querySelectorAll('#zeros-table tbody tr').length") == 2
    assert "C++" in browser.js("document.getElementById('facts').textContent") or engine.name != "cpu"
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
    unnamed = "e => !e.labels?.length && !e.textContent"
    assert browser.js(f"[...document.querySelectorAll('input, textarea, button')].filter({unnamed}).length") == 0

    browser.js(setting("stop-at", "x" * 1500))
    browser.js("document.getElementById('write').click()")
    assert "stop: got" in browser.until("document.getElementById('error').textContent")
    assert [address for address in browser.requests if not address.startswith((url, "about:"))] == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    browser.js("document.getElementById('write').click()")
    browser.until("document.getElementById('error').textContent.includes('does not answer')")
    assert browser.js("document.getElementById('server').dataset.state") == "gone"
