"""`bitnet serve` from outside: a real server in its own process, OpenAI's client, sockets, signals.

Its texts are those of the engine, every limit has its status, and a client that disconnects is forgotten.
"""

import json
import random
import re
import signal
import socket
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any, Self

import child_process
import httpx
import openai
import pytest
import torch
from compiler import without_build_warning
from text_models import chat_tokenizer, packed_model, text_tokenizer

from bitnet.cli import main
from bitnet.engine.load import load
from bitnet.engine.sampling import GREEDY, Sampling
from bitnet.generation import prompt_ids, stop_ids
from bitnet.serve.guard import MAX_BODY, allowed_hosts, host_name
from bitnet.serve.protocol import RequestError, parse_completion, parse_json
from bitnet.text.json_tokenizer import JsonTokenizer

ROOT = Path(__file__).resolve().parents[2]
KEY = "correct-horse"
CONTEXT = 2048
SEQUENCES, QUEUE = 2, 3
POST = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
JSON = {"Content-Type": "application/json"}


class Server:
    """A process of `bitnet serve`, ready."""

    def __init__(
        self,
        model: Path,
        *args: object,
        environment: dict[str, str] | None = None,
        threads: tuple[object, ...] = ("-t", 1),
    ) -> None:
        command = child_process.bitnet("serve", "-m", model, "--port", 0, *threads, *args)
        variables = child_process.environment(**(environment or {}))
        self.process = child_process.start(command, stdout=PIPE, stderr=PIPE, env=variables)
        try:
            self.url = child_process.line_from(self.process)
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", self.url)
            self.port = int(self.url.rstrip("/").rpartition(":")[2])
            self.http = httpx.Client(base_url=self.url, timeout=child_process.LIMIT)
        except BaseException:
            child_process.end(self.process)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.http.close()
        child_process.end(self.process)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, the rest of stdout, stderr."""
        self.http.close()
        return child_process.finish(self.process, number)

    def post(self, path: str, **fields: Any) -> Any:
        return self.http.post(path, json=fields)

    def complete(self, **fields: Any) -> Any:
        reply = self.post("/v1/completions", **fields)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def metric(self, name: str) -> float:
        found = re.search(rf"^bitnet_{name} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def until(self, name: str, value: float) -> None:
        child_process.wait_until(
            lambda: self.metric(name) == value, lambda: f"{name} stays {self.metric(name)}, expected {value}"
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_model(tmp_path_factory.mktemp("serve") / "toy.safetensors", text_tokenizer(), 5, CONTEXT)


@pytest.fixture(scope="module")
def engine(model: Path) -> Any:
    torch.set_num_threads(1)
    return load(model)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with Server(model, "--sequences", SEQUENCES, "--queue", QUEUE) as made:
        yield made
        code, out, err = made.stop()
        assert (code, out) == (143, "")
        # A test that failed may have left a request running.
        lines = without_build_warning(err).splitlines()
        assert [line for line in lines if not re.search("toy.safetensors ready|^stopping: ", line)] == []


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, JsonTokenizer, Path]]:
    """A server with a chat model and a key, which comes from the environment."""
    tokenizer = chat_tokenizer()
    path = packed_model(tmp_path_factory.mktemp("chat") / "chatty.safetensors", tokenizer, 6, CONTEXT)
    with Server(path, environment={"BITNET_API_KEY": KEY}) as made:
        made.http.headers["Authorization"] = f"Bearer {KEY}"
        yield made, tokenizer, path
        assert made.stop(signal.SIGINT)[0] == 130


def words(count: int) -> str:
    return " ".join(random.choice(["the", "fox", "né", "dog,", "🙂", "lazy"]) for _ in range(count))


# ---- texts -------------------------------------------------------------------------------------------------


def test_greedy_text_is_the_same_as_the_engines(client: Any, engine: Any) -> None:
    tokenizer = engine.tokenizer
    for _ in range(3):
        prompt, n = words(random.randint(1, 40)), random.randint(1, 50)
        expected = engine.generate(prompt_ids(tokenizer, prompt), n, GREEDY, stop_ids(tokenizer))
        reply = client.completions.create(model="toy", prompt=prompt, max_tokens=n, temperature=0)
        assert reply.choices[0].text == tokenizer.decode(expected)
        assert reply.choices[0].finish_reason == ("length" if len(expected) == n else "stop")
        assert reply.usage.prompt_tokens == len(prompt_ids(tokenizer, prompt))
        assert reply.usage.completion_tokens == len(expected)
        stream = client.completions.create(model="toy", prompt=prompt, max_tokens=n, temperature=0, stream=True)
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks) == tokenizer.decode(expected)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == reply.choices[0].finish_reason


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(server: Server, engine: Any) -> None:
    """Five requests for two sequences, sampled and streamed; each text is the engine's own."""
    tokenizer = engine.tokenizer
    asked = [(words(random.randint(1, 30)), random.getrandbits(30)) for _ in range(SEQUENCES + QUEUE)]
    seeds = {"max_tokens": 30, "temperature": 0.9, "top_k": 20, "min_p": 0.02, "top_p": 0.9, "ignore_eos": True}
    streams = []
    for prompt, seed in asked:
        request = server.http.build_request(
            "POST", "/v1/completions", json={"prompt": prompt, "seed": seed, "stream": True, **seeds}
        )
        streams.append(server.http.send(request, stream=True))
    for (prompt, seed), stream in zip(asked, streams, strict=True):
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
        sampling = Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, seed=seed)
        assert text == tokenizer.decode(engine.generate(prompt_ids(tokenizer, prompt), 30, sampling))
        stream.close()


def test_several_prompts_and_choices(client: Any, engine: Any) -> None:
    tokenizer = engine.tokenizer
    ids = [random.randrange(3, 300) for _ in range(9)]
    for prompts in (["the fox", "dog"], [ids, ids[:4]]):
        reply = client.completions.create(
            model="toy", prompt=prompts, n=2, max_tokens=6, seed=11, extra_body={"ignore_eos": True}, logprobs=0
        )
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        got = [choice.text for choice in reply.choices]
        starts = [p if isinstance(p, list) else prompt_ids(tokenizer, p) for p in prompts]
        drawn = [
            engine.generate(start, 6, Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=11 + i))
            for start in starts
            for i in range(2)
        ]
        assert got == [tokenizer.decode(one) for one in drawn]
        assert reply.usage.prompt_tokens == sum(map(len, starts))
        assert reply.usage.completion_tokens == 24
        assert [len(choice.logprobs.tokens) for choice in reply.choices] == [6] * 4


def test_a_cached_prompt_gives_the_same_text(server: Server, engine: Any) -> None:
    prompt = words(40)
    fields = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    fresh = engine.generate(prompt_ids(engine.tokenizer, prompt), 24, GREEDY)
    first = server.complete(prompt=prompt, **fields)
    longer = [*prompt_ids(engine.tokenizer, prompt), *fresh[:12]]
    again, more = server.complete(prompt=prompt, **fields), server.complete(prompt=longer, **fields)
    assert first["choices"][0]["text"] == again["choices"][0]["text"] == engine.tokenizer.decode(fresh[:12])
    assert more["choices"][0]["text"] == engine.tokenizer.decode(fresh[12:])
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"] - 1
    assert more["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]


def test_stop_strings_and_usage_in_a_stream(client: Any, engine: Any) -> None:
    whole = engine.generate(prompt_ids(engine.tokenizer, "the"), 60, GREEDY, stop_ids(engine.tokenizer))
    text = engine.tokenizer.decode(whole)
    stop = text[len(text) // 2 :][:3]
    stream = client.completions.create(
        model="toy",
        prompt="the",
        max_tokens=60,
        temperature=0,
        stop=[stop, "never"],
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert 0 < last.usage.completion_tokens <= len(whole)


def test_echoed_log_probabilities_are_the_engines(server: Server, engine: Any) -> None:
    """What an evaluation harness asks for: the prompt scored, no token or one generated."""
    tokenizer = engine.tokenizer
    prompts = [[random.randrange(300) for _ in range(random.randint(2, 400))] for _ in range(3)]
    reply = server.complete(prompt=prompts, echo=True, logprobs=1, max_tokens=0, temperature=0)
    for prompt, choice in zip(prompts, reply["choices"], strict=True):
        scores = engine.logits(torch.tensor(prompt)).double().log_softmax(-1)
        expected = [float(scores[i, id]) for i, id in enumerate(prompt[1:])]
        found = choice["logprobs"]
        assert choice["text"] == tokenizer.decode(prompt)
        assert found["token_logprobs"][0] is None
        # The same fp32 logits, a log-softmax in fp32 against one in fp64.
        assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
        assert found["top_logprobs"][0] is None
        best = [max(top.values()) for top in found["top_logprobs"][1:]]
        assert best == pytest.approx(scores[:-1].max(-1).values.tolist(), abs=1e-5)
        assert len(found["tokens"]) == len(found["text_offset"]) == len(prompt)
    one = server.complete(prompt=prompts[0], echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"][0]
    assert one["logprobs"]["token_logprobs"][:-1] == reply["choices"][0]["logprobs"]["token_logprobs"]
    text = server.complete(prompt="the fox 🙂", echo=True, logprobs=2, max_tokens=3, temperature=0, ignore_eos=True)
    found = text["choices"][0]["logprobs"]
    assert text["choices"][0]["text"].startswith("the fox 🙂")
    assert found["tokens"][0] == "<bos>"
    assert found["text_offset"][:2] == [0, 0]
    assert all(2 <= len(top) <= 3 for top in found["top_logprobs"][1:])


def test_tokenizer_routes(server: Server, engine: Any) -> None:
    text = words(20)
    ids = server.post("/tokenize", prompt=text, add_special_tokens=False).json()["tokens"]
    assert ids == engine.tokenizer.encode(text)
    with_bos = server.post("/tokenize", content=text).json()
    assert with_bos == {"tokens": prompt_ids(engine.tokenizer, text), "count": len(ids) + 1, "max_model_len": CONTEXT}
    assert server.post("/detokenize", tokens=ids).json()["prompt"] == text
    # What lm-eval's local-completions needs to leave tokenising to a server.
    info = server.http.get("/tokenizer_info").json()
    for name, id in (("bos_token", engine.tokenizer.bos_id), ("eos_token", engine.tokenizer.eos_id)):
        assert server.post("/tokenize", prompt=info[name], add_special_tokens=False).json()["tokens"] == [id]


@pytest.mark.slow
def test_one_core_is_left_to_connections(model: Path) -> None:
    code = "from bitnet.threads import default_threads; print(default_threads())"
    found = child_process.run([sys.executable, "-c", code])
    with Server(model, threads=()) as server:
        assert server.http.get("/info").json()["engine"]["threads"] == max(1, int(found.stdout) - 1)
        assert server.stop()[0] == 143


# ---- chat --------------------------------------------------------------------------------------------------


def test_chat(chatty: tuple[Server, JsonTokenizer, Path]) -> None:
    server, tokenizer, path = chatty
    engine = load(path)
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    ids = tokenizer.encode_chat(plain)
    expected = engine.generate(ids, 20, GREEDY, stop_ids(tokenizer))
    with openai.OpenAI(
        base_url=server.url + "v1", api_key="unused", default_headers=dict(server.http.headers)
    ) as client:
        ask = {"model": "chatty", "messages": messages, "temperature": 0, "max_completion_tokens": 20}
        reply = client.chat.completions.create(**ask, logprobs=True, top_logprobs=4)
        assert reply.choices[0].message.content == tokenizer.decode(expected)
        assert reply.usage.prompt_tokens == len(ids)
        entries = reply.choices[0].logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == tokenizer.decode(expected)
        assert [len(entry.top_logprobs) for entry in entries] == [4] * len(expected)
        assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy
        chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == tokenizer.decode(expected)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_no_chat_without_a_template(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
        client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", f"bearer {KEY}", KEY, f"Bearer {KEY}x"])
def test_a_key_opens_and_nothing_else(given: str | None, chatty: tuple[Server, JsonTokenizer, Path]) -> None:
    server = chatty[0]
    headers = {} if given is None else {"Authorization": given}
    with httpx.Client(base_url=server.url) as http:
        for path in ("/v1/models", "/metrics", "/info", "/v1/nothing"):
            reply = http.get(path, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert http.post("/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 401
        assert [http.get(path).status_code for path in ("/", "/app.js", "/health")] == [200] * 3
    assert server.http.get("/v1/models").status_code == 200


# ---- errors ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [5] * (CONTEXT + 1)}, "prompt"),
    ({"prompt": "a" * 900_000}, "prompt"),
    ({"prompt": ["a"] * (SEQUENCES + QUEUE + 1)}, "prompt"),
    ({"prompt": "a", "n": 6}, "prompt"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 17}, "n"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "temperature": 2.1}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "top_p": 1.1}, "top_p"),
    ({"prompt": "a", "top_p": -1}, "top_p"),
    ({"prompt": "a", "top_k": -2}, "top_k"),
    ({"prompt": "a", "min_p": 2}, "min_p"),
    ({"prompt": "a", "seed": 1.0}, "seed"),
    ({"prompt": "a", "seed": 2**63}, "seed"),
    ({"prompt": "a", "logprobs": 6}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "stop": 5}, "stop"),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ({"prompt": "a", "stop": "x" * 1025}, "stop"),
    ({"prompt": "a", "stream": "yes"}, "stream"),
    ({"prompt": "a", "stream_options": 1}, "stream_options"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": "a", "suffix": "end"}, "suffix"),
    ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
    ({"prompt": "a", "tools": [{}]}, "tools"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ({"prompt": "a", "model": 5}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda x: json.dumps(x)[:40] if isinstance(x, dict) else x)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str, server: Server) -> None:
    reply = server.post("/v1/completions", **fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert len(error["message"]) < 300


def test_unsupported_fields_that_ask_for_nothing_are_accepted(server: Server) -> None:
    harmless = {
        **dict.fromkeys(("suffix", "seed", "stop", "logprobs", "temperature", "max_tokens", "tools")),
        "best_of": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "unknown": [1],
        "response_format": {"type": "text"},
        "top_k": -1,
        "top_p": 0,
        "model": "toy",
        "stop": [],
    }
    assert server.complete(prompt="the", **harmless)["usage"]["completion_tokens"] <= 16  # OpenAI's default


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"prompt": NaN}', b"[" * 5000, b'{"seed": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "list", "null", "not-utf8", "nan", "deep", "long-number"],
)
def test_a_body_that_is_no_json_object(body: bytes, server: Server) -> None:
    reply = server.http.post("/v1/completions", content=body, headers=JSON)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json")


def test_a_deeply_nested_value_is_refused_at_every_depth() -> None:
    """Around the depth at which Python gives up, wherever that happens."""
    for depth in range(900, 1001):
        for start, end in (("[", "]"), ('{"a":', "}")):
            body = '{"prompt": ' + start * depth + "5" + end * depth + "}"
            with pytest.raises(RequestError) as refused:
                parse_completion(parse_json(body.encode()))
            assert refused.value.status == 400
            assert len(refused.value.message) < 300


def test_a_lone_surrogate_is_refused_wherever_it_stands(server: Server) -> None:
    for body, status in ((b'{"prompt": "\\ud800"}', 400), (b'{"prompt": "a", "model": "\\ud800"}', 404)):
        assert server.http.post("/v1/completions", content=body, headers=JSON).status_code == status
    reply = server.http.post("/v1/completions", content=b'{"prompt": "a", "stop": "\\ud800"}', headers=JSON)
    assert reply.status_code == 200  # it never occurs in the text


def test_statuses_of_bodies_paths_and_methods(server: Server, client: Any) -> None:
    http = server.http
    large = json.dumps({"prompt": "a" * MAX_BODY}).encode()
    assert http.post("/v1/completions", content=large, headers=JSON).status_code == 413
    assert http.post("/v1/completions", content=iter([large[:-99], b"x" * 99]), headers=JSON).status_code == 413
    assert http.post("/v1/completions", content=b'{"prompt": "a"}').status_code == 415
    assert http.post("/v1/completions", data={"prompt": "a"}).status_code == 415  # what a form on another page can send
    with pytest.raises(openai.NotFoundError, match="expected 'toy'"):
        client.completions.create(model="gpt", prompt="x")
    for path, method, status in (
        ("/v1/x", "GET", 404),
        ("/v1/completions", "GET", 405),
        ("/v1/models", "OPTIONS", 405),
    ):
        reply = http.request(method, path)
        assert (reply.status_code, set(reply.json()["error"])) == (status, {"message", "type", "param", "code"})
    assert not [
        name for name in http.get("/v1/models", headers={"Origin": "http://evil.example"}).headers if "allow" in name
    ]


@pytest.mark.parametrize(("host", "status"), [("evil.example", 421), ("", 421), ("localhost:1", 200), ("[::1]:8", 200)])
def test_only_names_of_this_machine(host: str, status: int, server: Server) -> None:
    assert server.http.get("/", headers={"Host": host}).status_code == status
    assert allowed_hosts("0.0.0.0", "0.0.0.0") is None
    assert allowed_hosts("192.0.2.7", "localhost") is None  # the address decides, not what it is called
    assert "mybox" in (allowed_hosts("127.0.1.1", "MyBox") or ())
    assert host_name(" LocalHost.:80 ") == "localhost"


def test_a_prompt_may_fill_the_context_and_no_more(server: Server) -> None:
    ids = [random.randrange(3, 300) for _ in range(CONTEXT)]
    reply = server.complete(prompt=ids, max_tokens=50, temperature=0, ignore_eos=True)
    assert reply["usage"]["completion_tokens"] == 1
    assert reply["choices"][0]["finish_reason"] == "length"


# ---- full, disconnected, incomplete ------------------------------------------------------------------------


def start_long(server: Server, count: int, tokens: int = CONTEXT) -> list[Any]:
    """Streams that generate until they are closed, or until the context is full."""
    made = []
    for _ in range(count):
        fields = {"prompt": "the", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        request = server.http.build_request("POST", "/v1/completions", json=fields)
        made.append(server.http.send(request, stream=True))
        assert made[-1].status_code == 200
    return made


def test_a_full_queue_says_when_to_retry_and_disconnecting_makes_room(server: Server) -> None:
    server.until("slots_busy", 0)
    cancelled = server.metric("cancelled_total")
    streams = start_long(server, SEQUENCES + QUEUE)
    refused = server.post("/v1/completions", prompt="the")
    assert refused.status_code == 429, "five texts of a full context were generated before this request came"
    assert refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    for stream in streams:
        stream.close()
    server.until("slots_busy", 0)
    server.until("queue_length", 0)
    assert server.metric("cancelled_total") > cancelled
    server.complete(prompt="the", max_tokens=2)


def test_disconnecting_before_the_answer_frees_the_sequence(server: Server) -> None:
    server.until("slots_busy", 0)
    cancelled = server.metric("cancelled_total")
    body = json.dumps({"prompt": "the", "max_tokens": CONTEXT, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = f"{POST}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        server.until("slots_busy", 1)
    server.until("slots_busy", 0)
    assert server.metric("cancelled_total") == cancelled + 1


def test_incomplete_requests_do_no_harm(server: Server) -> None:
    for part in (
        b"",
        b"GET ",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{",
        b"\0\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(part)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
        raw.sendall(b"no http\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert server.http.get("/health").json() == {"status": "ok"}


def test_the_page_and_what_is_inside(server: Server, engine: Any) -> None:
    page = server.http.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert set(links) == {"icon.svg", "style.css", "app.js"}
    for link in links:
        assert server.http.get(link).status_code == 200
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", server.http.get(link).text)
    assert not re.search(r"<(?:script|style)>|\son\w+=|style=", page.text)  # the policy would not run them
    info = server.http.get("/info").json()
    while info["inside"] is None:
        info = server.http.get("/info").json()
    assert (info["name"], info["context"], info["chat"]) == ("toy", CONTEXT, False)
    assert info["sequences"] == info["slots"] == SEQUENCES
    assert info["engine"]["name"] == engine.name
    assert len(info["inside"]["layers"]) == 14
    assert "file" not in info["inside"]
    models = server.http.get("/v1/models").json()["data"]
    assert [(entry["id"], entry["max_model_len"]) for entry in models] == [("toy", CONTEXT)]


def test_metrics_count(server: Server) -> None:
    before = {name: server.metric(name) for name in ("generated_tokens_total", "prompt_tokens_total")}
    server.complete(prompt=[7, 8, 9], max_tokens=5, ignore_eos=True, echo=True, logprobs=1)  # scored: read as a whole
    assert server.metric("generated_tokens_total") == before["generated_tokens_total"] + 5
    assert server.metric("prompt_tokens_total") == before["prompt_tokens_total"] + 3
    server.http.get("/v1/" + "x" * 50)
    text = server.http.get("/metrics").text
    assert 'route="other",status="404"' in text
    assert "xxxx" not in text


# ---- starting and stopping ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_lets_a_running_request_finish(model: Path) -> None:
    with Server(model) as server:
        stream = start_long(server, 1, 1000)[0]
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        stream.close()
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        code, _, err = child_process.finish(server.process)
    assert code == 143
    assert "stopping" in err


# Inspects the model for as long as the process lives; /info does not wait for it.
COUNTING = """
import itertools, sys, bitnet.serve.info as info
inspect_packed, info._WAIT_SECONDS = info.inspect_packed, 0
def counting(path):
    for _ in itertools.count():
        inspect_packed(path)
info.inspect_packed = counting
from bitnet.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_ends_it_while_a_thread_still_reads_the_file(model: Path) -> None:
    """And not by an abort, which Python causes when it ends a thread inside torch's C++ code."""
    command = [sys.executable, "-c", COUNTING, "serve", "-m", model, "--port", 0, "-t", 1]
    with child_process.started(command, stdout=PIPE, stderr=PIPE) as process:
        url = child_process.line_from(process)
        assert httpx.get(f"{url}info", timeout=child_process.LIMIT).json()["inside"] is None
        code, _, err = child_process.finish(process, signal.SIGTERM)
    assert code == 143, err
    assert "terminate" not in err


def test_what_cannot_be_served_is_reported_in_one_line(
    model: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    for args, word in (
        ([model, "--port", server.port], "expected a free one"),
        ([model, "--host", "no such host"], "expected an address of this machine"),
        ([model, "--api-key", ""], "api-key"),
        ([model, "--sequences", 0], "sequences: got 0, expected 1 to 256"),
        ([model, "--queue", -1], "queue: got -1, expected 0 to 100,000"),
        ([model, "--api-key", "schlüssel"], "api-key"),
        ([model, "-c", CONTEXT + 1, "--port", 0], "context"),
        ([tmp_path / "x.safetensors", "--port", 0], "expected a packed model"),
        ([tmp_path / "none", "--port", 0], "expected a packed model"),
    ):
        assert main(["serve", "-m", *map(str, args)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert word in captured.err
        assert len(without_build_warning(captured.err).splitlines()) == 1, captured.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "-m", str(model)]) == 2
    assert "from a clone: pip install '.[serve]'" in capsys.readouterr().err


def test_a_server_open_to_other_machines_without_a_key_is_warned_of(model: Path) -> None:
    command = child_process.bitnet("serve", "-m", model, "--port", 0, "--host", "0.0.0.0")
    with child_process.started(command, stdout=PIPE, stderr=PIPE) as process:
        assert child_process.line_from(process).startswith("http://127.0.0.1:")
        code, _, err = child_process.finish(process, signal.SIGINT)
    assert code == 130
    assert "no key is set" in err
    assert "interrupted" not in err


def test_health_says_503_while_loading(model: Path) -> None:
    from bitnet.serve.app import build_app
    from bitnet.serve.metrics import Metrics
    from bitnet.serve.service import Service

    async def ask() -> list[Any]:
        transport = httpx.ASGITransport(build_app(Service(Metrics())))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return [
                await http.get("/health"),
                await http.get("/v1/models"),
                await http.post("/v1/completions", json={"prompt": "a"}),
                await http.get("/"),
            ]

    import asyncio

    replies = asyncio.run(ask())
    assert [reply.status_code for reply in replies] == [503, 503, 503, 200]
    assert replies[1].headers["retry-after"] == "1"


def test_too_many_connections_are_told_to_retry() -> None:
    import asyncio

    from bitnet.serve.app import build_app
    from bitnet.serve.metrics import Metrics
    from bitnet.serve.service import Service

    async def ask() -> Any:
        transport = httpx.ASGITransport(build_app(Service(Metrics()), crowded=lambda: True))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.get("/health")

    reply = asyncio.run(ask())
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "crowded")
    assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")


def test_a_slowly_sent_header_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first request, and after one."""
    import asyncio

    import uvicorn

    from bitnet.serve import server as serving

    monkeypatch.setattr(serving, "_HEAD_SECONDS", 0.2)
    monkeypatch.setattr(serving, "_IDLE_SECONDS", 0.2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def drip(port: int, begin: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin)
        if begin:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.write(b"GET / HTTP/1.1\r\nX: ")
        end = asyncio.create_task(reader.read())
        while not end.done():
            writer.write(b"x")
            await asyncio.wait([end], timeout=0.05)
        writer.close()

    async def main() -> None:
        config = uvicorn.Config(app, http=serving._Protocol, ws="none", lifespan="off", log_config=None)
        with serving.open_socket("127.0.0.1", 0) as opened:
            run = serving._Server(config)
            task = asyncio.create_task(run.serve(sockets=[opened]))
            port = opened.getsockname()[1]
            async with asyncio.timeout(30):
                await drip(port, b"")
                await drip(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            run.should_exit = True
            await task

    asyncio.run(main())


def test_a_slow_reader_loses_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from bitnet.serve import delivery
    from bitnet.serve.jobs import Delta, Failure, Job

    async def read(count: int) -> tuple[list[Any], list[Job]]:
        jobs = [Job([1], 9, GREEDY) for _ in range(2)]
        mailbox = delivery.Mailbox(jobs)
        for i in range(count):
            delivery.deliver([(jobs[i % 2], Delta(str(i), ()))])
        return [mailbox.get_nowait() for _ in range(mailbox.qsize())], jobs

    monkeypatch.setattr(delivery, "MOST_EVENTS", most := random.randint(2, 20))
    for count in (most, most + random.randint(1, 9)):
        events, jobs = asyncio.run(read(count))
        assert [event.text for _, event in events[:most]] == [str(i) for i in range(most)]
        assert [type(event) for _, event in events[most:]] == [Failure] * (count > most)
        assert [job.cancelled for job in jobs] == [count > most] * 2


def test_a_prompt_of_several_choices_is_cached_once() -> None:
    from bitnet.serve.jobs import Finished
    from bitnet.serve.replies import Usage

    usage = Usage(30, 2)  # two prompts, two choices each
    for index, cached in random.sample(list(enumerate([0, 9, 14, 13])), 4):
        usage.add(index, Finished("stop", 3, cached))
    counted = usage.to_dict()
    assert (counted["completion_tokens"], counted["prompt_tokens_details"]) == (12, {"cached_tokens": 13})


def test_the_page_is_in_the_package() -> None:
    """In a checkout, in an editable install and in a wheel: the files lie beside the module."""
    from importlib import resources

    names = {entry.name for entry in resources.files("bitnet.serve").joinpath("page").iterdir()}
    assert names == {"index.html", "style.css", "app.js", "icon.svg"}
    for wheel in (ROOT / "dist").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            assert {f"bitnet/serve/page/{name}" for name in names} <= set(archive.namelist())
