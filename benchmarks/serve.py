"""Measure the server: throughput and first tokens under load, a soak, and mutated requests.

    python benchmarks/serve.py -m model.safetensors                     # 1, 4 and 16 clients; first token under load
    python benchmarks/serve.py -m model.safetensors --minutes 10        # mixed traffic; no leak, no 5xx
    python benchmarks/serve.py -m model.safetensors --fuzz 100000       # mutated requests; no 5xx, still alive

Each call starts `bitnet serve` on a free loopback port and ends it. Throughput counts streamed tokens of texts that
ignore stop tokens. The sum of single streams is the rate of one client alone times the number of clients: what clients
would get if each had a server and a machine of its own. Exit code 1 where a requirement is missed; the last line of
stdout is one JSON document.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from bitnet.benchmarks.bench.machine import describe
from bitnet.benchmarks.bench.table import machine_line
from bitnet.cli import guarded
from bitnet.threads import check_threads

CLIENTS = (1, 4, 16)
JSON = {"Content-Type": "application/json"}
LEAK = 32 << 20  # bytes that the server may grow after the first tenth of a soak: allocators settle, leaks do not
FILES = 4  # that may be open after a soak beyond those before it: connections that are closing
WORDS = "the a of it was is and in to that he she they said for with on as had at but his her not".split()


class Server:
    """A running `bitnet serve`."""

    def __init__(self, options: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "bitnet.cli", "serve", "-m", options.model, "--port", 0]
        command += ["--slots", 16, "--queue", 64, "--head", options.head]
        command += [] if options.threads is None else ["-t", options.threads]
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise SystemExit("the server did not start")
        with httpx.Client(base_url=self.url) as http:
            self.info = http.get("/info").json()

    def resident(self) -> int:
        """Bytes of memory in use."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]

    def files(self) -> int:
        """Open files."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208 - not a path worth an object

    def metrics(self) -> dict[str, float]:
        """Unlabelled figures of /metrics, and `5xx`."""
        with httpx.Client(base_url=self.url) as http:
            text = http.get("/metrics").text
        found = {name: float(value) for name, value in re.findall(r"^bitnet_(\w+) (\S+)$", text, re.MULTILINE)}
        found["5xx"] = sum(float(v) for v in re.findall(r'status="5\d\d"} (\S+)', text))
        return found

    def stop(self) -> int:
        """End it by SIGTERM. Returns its exit code."""
        self.process.terminate()
        return self.process.wait(timeout=60)


def prompt(words: int) -> str:
    """So many random words."""
    return " ".join(random.choice(WORDS) for _ in range(words))


async def stream(http: httpx.AsyncClient, text: str, tokens: int, limit: int | None = None) -> list[float]:
    """Times (`perf_counter`) of a request and of each token of its text. limit: disconnect after so many tokens."""
    body = {"prompt": text, "max_tokens": tokens, "ignore_eos": True, "stream": True, "logprobs": 0}
    times = [time.perf_counter()]
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith('data: {"id"') and '"tokens":[]' not in line:
                times.append(time.perf_counter())
                if limit and len(times) > limit:
                    break
    return times


# ---- speed -------------------------------------------------------------------------------------------------


async def speed(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of 1, 4 and 16 clients, and milliseconds to the first token, idle and under load."""
    tokens = min(options.tokens, server.info["context"] - 40)
    rates: dict[int, list[float]] = {count: [] for count in CLIENTS}
    firsts: dict[str, list[float]] = {"idle": [], "busy": []}
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
        await stream(http, prompt(8), 16)  # warm
        for _ in range(options.repeats):  # interleaved, so that a slow minute affects all of them
            for count in CLIENTS:
                runs = await asyncio.gather(*(stream(http, prompt(8), tokens) for _ in range(count)))
                spent = max(run[-1] for run in runs) - min(run[0] for run in runs)
                rates[count].append(sum(len(run) - 1 for run in runs) / spent)
            for name, beside in (("idle", 0), ("busy", server.info["slots"] - 1)):
                load = [asyncio.create_task(stream(http, prompt(8), tokens)) for _ in range(beside)]
                await asyncio.sleep(0.05)
                for _ in range(4):
                    begun, first = (await stream(http, prompt(40), 4, limit=1))[:2]
                    firsts[name].append(1000 * (first - begun))
                await asyncio.gather(*load)
    alone = statistics.median(rates[1])
    return {
        "tokens_a_text": tokens,
        "clients": {
            count: {
                "tokens_per_second": round(statistics.median(found), 1),
                "against_sum_of_singles": round(statistics.median(found) / (alone * count), 3),
                "against_one": round(statistics.median(found) / alone, 2),
            }
            for count, found in rates.items()
        },
        "first_token_ms": {
            name: {"median": round(statistics.median(found), 1), "worst": round(max(found), 1)}
            for name, found in firsts.items()
        },
        "prompt_words": 40,
    }


# ---- soak --------------------------------------------------------------------------------------------------


async def client(server: Server, until: float, counts: Counter[str]) -> None:
    """One client of mixed traffic until `until` (`monotonic`); what it did and how it was answered is counted."""
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        while time.monotonic() < until:
            kind = random.choice(["stream", "leave", "whole", "score", "wrong", "look", "hang up"])
            counts[kind] += 1
            try:
                status = await request(http, server, kind)
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status == 429:
                    await asyncio.sleep(0.1)
            counts[f"status {status}"] += 1


async def request(http: httpx.AsyncClient, server: Server, kind: str) -> int:
    """One request of a kind. Returns its status, 0 where none was waited for."""
    text, tokens = prompt(random.randint(1, 60)), random.randint(1, 100)
    if kind in ("stream", "leave"):
        await stream(http, text, tokens, limit=3 if kind == "leave" else None)
        return 200
    if kind == "look":
        return (await http.get(random.choice(["/", "/info", "/metrics", "/v1/models", "/health", "/none"]))).status_code
    if kind == "hang up":
        address = httpx.URL(server.url)
        _, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        await writer.drain()
        writer.close()
        return 0
    body: dict[str, Any] = {"prompt": text, "max_tokens": tokens, "seed": 1, "stop": ["the"]}
    if kind == "score":
        body = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 2}
    if kind == "wrong":
        body["temperature"] = -1
    return (await http.post("/v1/completions", json=body)).status_code


async def soak(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Mixed traffic of 24 clients: memory and open files must not grow, and nothing may be answered by 5xx."""
    begun, seconds = time.monotonic(), 60 * options.minutes
    counts: Counter[str] = Counter()
    files = server.files()
    clients = [asyncio.create_task(client(server, begun + seconds, counts)) for _ in range(24)]
    await asyncio.sleep(seconds / 10)
    memory = [server.resident()]
    while time.monotonic() < begun + seconds:
        await asyncio.sleep(min(10.0, seconds / 20))
        memory.append(server.resident())
    await asyncio.gather(*clients)
    await asyncio.sleep(1.0)
    figures = server.metrics()
    grown, more_files = memory[-1] - memory[0], server.files() - files
    good = grown <= LEAK and more_files <= FILES
    good = good and not figures["5xx"] and not figures["slots_busy"] and not figures["queue_length"]
    return {
        "minutes": options.minutes,
        "counts": dict(sorted(counts.items())),
        "generated_tokens": figures["generated_tokens_total"],
        "cancelled": figures["cancelled_total"],
        "server_errors": figures["5xx"],
        "resident_bytes": {"after_a_tenth": memory[0], "end": memory[-1], "most": max(memory), "grown": grown},
        "open_files": {"start": files, "end": files + more_files},
        "good": good,
    }


# ---- fuzz --------------------------------------------------------------------------------------------------

SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "the", "max_tokens": 3, "logprobs": 2, "echo": True, "stop": ["a"], "n": 2}),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 2, "stream": True, "stream_options": {}, "seed": 5}),
    ("/v1/completions", {"prompt": "it", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "logprobs": True}),
    ("/tokenize", {"prompt": "the cat", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]  # fmt: skip
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, -0.0, 0.5, 1e-320, 5e-324),
    *("", "a", "\0", "\ud800", "\U0001f600", "x" * 5000, "null", "NaN", "\u2581", "<s>"),
    *([], [[]], [None], [0], [-1], [10**9], [[1], 2], ["a", 1], [""], {}, {"a": {}}, [[[[]]]], {"role": "user"}),
]
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "X"]


def mutated(values: Any) -> Any:
    """A JSON value with one part of it replaced, dropped or added."""
    if isinstance(values, dict) and values and random.random() < 0.9:
        name = random.choice(list(values))
        made = dict(values)
        action = random.random()
        if action < 0.1:
            del made[name]
        elif action < 0.2:
            made[
                random.choice(["n", "seed", "stop", "top_logprobs", "logit_bias", "best_of", "model", "\0", "x" * 300])
            ] = random.choice(VALUES)
        else:
            made[name] = mutated(made[name])
        return made
    if isinstance(values, list) and values and random.random() < 0.5:
        made_list = list(values)
        made_list[random.randrange(len(values))] = mutated(random.choice(values))
        return made_list
    return random.choice(VALUES)


def damaged(data: bytes) -> bytes:
    """Bytes with some of them replaced, cut or repeated."""
    made = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(made) + 1)
        made[at : at + random.choice([0, 0, 1, 1, 9])] = random.choice(
            [
                b"",
                random.randbytes(1),
                random.randbytes(3),
                b'"',
                b"{",
                b"[" * 50,
                b"\xff",
                b"9" * 30,
                made[at : at + 20],
            ]
        )
    return bytes(made)


async def fuzz_one(http: httpx.AsyncClient, server: Server) -> str:
    """Send one mutated request. Returns its status, or the name of the error."""
    path, seed = random.choice(SEEDS)
    values = seed
    for _ in range(random.choice([1, 1, 2, 3])):
        values = mutated(values) if isinstance(values, dict) else values
    body = json.dumps(values).encode()
    kind = random.random()
    if kind < 0.1:
        return await fuzz_raw(server, path, body)
    if kind < 0.3:
        body = damaged(body)
    if kind > 0.95:
        path = random.choice(
            ["/", "//", "/v1", "/v1/completions/", "/%00", "/..%2f", "/metrics", "/info", "/" + "a" * 3000]
        )
    method = random.choice(METHODS) if kind > 0.97 else "POST"
    headers = (
        JSON
        if random.random() < 0.95
        else {"Content-Type": random.choice(["", "text/plain", "application/json;x", "\x7f"])}
    )
    try:
        reply = await http.request(method, path, content=body, headers=headers)
    except httpx.HTTPError as error:
        return type(error).__name__
    if reply.status_code >= 400 and method != "HEAD":
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}, reply.text
    return str(reply.status_code)


async def fuzz_raw(server: Server, path: str, body: bytes) -> str:
    """Send damaged HTTP over a socket. Returns its status, or the name of the error."""
    address = httpx.URL(server.url)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(address.host, address.port)
    answer = b""
    try:
        writer.write(damaged(head.encode() + body))
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(200), 60)
    except (ConnectionError, TimeoutError) as error:
        return f"raw {type(error).__name__}"
    finally:
        writer.close()
    found = re.match(rb"HTTP/1\.1 (\d+)", answer)
    return f"raw {found[1].decode()}" if found else "raw closed"


async def fuzz(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Mutated requests of 8 clients: none may be answered by 5xx or hang."""
    counts: Counter[str] = Counter()
    left = iter(range(options.fuzz))

    async def worker() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            for _ in left:
                counts[await fuzz_one(http, server)] += 1

    before = server.resident()
    await asyncio.gather(*(worker() for _ in range(8)))
    figures = server.metrics()
    alive = server.process.poll() is None
    statuses = [name.removeprefix("raw ") for name in counts]
    bad = [name for name in statuses if name.startswith("5") or name in ("TimeoutError", "ReadTimeout")]
    return {
        "requests": options.fuzz,
        "seed": options.seed,
        "answers": dict(sorted(counts.items())),
        "server_errors": figures["5xx"],
        "grown_bytes": server.resident() - before,
        "slots_busy": figures["slots_busy"],
        "good": alive and not bad and not figures["5xx"] and not figures["slots_busy"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-t", "--threads")
    parser.add_argument("--head", default="file")
    parser.add_argument("--tokens", type=int, default=200, help="per text, for the speeds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=0.0, help="soak for so many minutes instead")
    parser.add_argument("--fuzz", type=int, default=0, help="send so many mutated requests instead")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
    options = parser.parse_args()
    if options.threads is not None:
        check_threads(options.threads)
    random.seed(options.seed)
    machine = describe()
    print(machine_line(machine))
    server = Server(options)
    task = fuzz if options.fuzz else soak if options.minutes else speed
    try:
        result = asyncio.run(task(server, options))
    finally:
        code = server.stop()
    inside = server.info["inside"] or {}
    print(
        json.dumps(
            {
                "benchmark": f"serve {task.__name__}",
                "machine": machine,
                "model": {"name": server.info["name"], "parameters": inside.get("parameters")},
                "engine": server.info["engine"],
                **result,
                "exit_code_of_the_server": code,
            }
        )
    )
    return 0 if result.get("good", True) and code == 143 else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
