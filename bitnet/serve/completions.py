"""/v1/completions and /v1/chat/completions: a request becomes jobs, and their events its response."""

from collections.abc import Sequence
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from bitnet.generation import prompt_ids, stop_ids
from bitnet.serve.delivery import EventStream, Mailbox, collect
from bitnet.serve.jobs import ClosedError, Job, QueueFullError
from bitnet.serve.protocol import RequestError, RequestParams, parse_chat, parse_completion
from bitnet.serve.replies import ChatReply, CompletionReply, Reply, Usage
from bitnet.serve.service import ServedModel, read_json, service_of
from bitnet.serve.text import Speller


async def completions(request: Request) -> Response:
    """Continue texts or token ids."""
    service, parsed = service_of(request), parse_completion(await read_json(request))
    model, params = service.model, parsed.params
    service.check_model(params.model)
    _check_count(len(parsed.prompts) * params.n, model.scheduler.most_jobs)
    jobs, prompt_tokens = [], 0
    for prompt in parsed.prompts:
        if isinstance(prompt, str):
            ids = await service.encode(lambda text=prompt: prompt_ids(model.tokenizer, text), prompt)  # type: ignore[misc]
        else:
            ids = prompt
        service.check_ids(ids)
        echo = None
        if parsed.echo:
            echo = prompt if isinstance(prompt, str) else model.tokenizer.decode(ids)
        prompt_tokens += len(ids)
        jobs += [_job(model, ids, params, choice, echo) for choice in range(params.n)]
    reply = CompletionReply(model.name, Speller(model.tokenizer), params.top, params.include_usage)
    return await _respond(request, jobs, reply, params, Usage(prompt_tokens, params.n))


async def chat_completions(request: Request) -> Response:
    """Answer the last message of a conversation."""
    service, parsed = service_of(request), parse_chat(await read_json(request))
    model, params = service.model, parsed.params
    service.check_model(params.model)
    tokenizer = model.tokenizer
    if model.tokenizer.chat_template is None:
        raise RequestError(
            400, "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
        )
    content = "".join(message["content"] for message in parsed.messages)
    ids = await service.encode(lambda: tokenizer.encode_chat(parsed.messages), content)
    service.check_ids(ids)
    _check_count(params.n, model.scheduler.most_jobs)
    jobs = [_job(model, ids, params, choice, None) for choice in range(params.n)]
    reply = ChatReply(model.name, Speller(tokenizer), params.top, params.include_usage)
    return await _respond(request, jobs, reply, params, Usage(len(ids), params.n))


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise RequestError(
            400,
            f"prompt, n: got {count} texts in one request, expected at most {most}; send fewer or raise the server's "
            "--queue",
            param="prompt",
        )


def _job(model: ServedModel, ids: Sequence[int], params: RequestParams, choice: int, echo: str | None) -> Job:
    room = model.limit - len(ids) + 1  # the last token is generated but never read
    return Job(
        prompt=ids,
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        sampling=replace(params.sampling, seed=(params.sampling.seed + choice) % 2**63),
        stop=params.stop,
        stop_ids=frozenset() if params.ignore_eos else frozenset(stop_ids(model.tokenizer)),
        top=params.top,
        echo=echo,
    )


async def _respond(request: Request, jobs: list[Job], reply: Reply, params: RequestParams, usage: Usage) -> Response:
    """Submit the jobs of a request and answer with their events."""
    mailbox = Mailbox(jobs)
    try:
        service_of(request).model.scheduler.submit(jobs)
    except QueueFullError as error:
        raise RequestError(429, f"too many requests: {error}", code="queue_full", retry=error.retry) from None
    except ClosedError:
        raise RequestError(503, "the server is shutting down", code="shutting_down") from None
    if params.stream:
        return EventStream(len(jobs), mailbox, reply, usage, params.include_usage)
    return await collect(request, jobs, mailbox, reply, usage)
