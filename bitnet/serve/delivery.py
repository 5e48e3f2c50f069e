"""From the events of jobs to a response, at once or as a stream of server-sent events. All on the event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bitnet.serve.guard import ClientGoneError, Receive, Send
from bitnet.serve.jobs import Delta, Event, Failure, Finished, Job, Token
from bitnet.serve.protocol import RequestError
from bitnet.serve.replies import SSE_END, SSE_WAITING, Reply, Usage, json_reply, sse

SEND_SECONDS = 60.0  # a client that accepts no data for so long is taken for gone
WAITING_SECONDS = 10.0  # between keep-alive comments while a request waits
MOST_EVENTS = 1024  # unsent events of a request; a client that reads more slowly loses its text


class Mailbox(asyncio.Queue[Any]):
    """The events of one request: (index of the job, event), or "gone" once the client has disconnected."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__()
        self._jobs = jobs
        for index, job in enumerate(jobs):
            job.owner = (self, index)

    def add(self, index: int, event: Event) -> None:
        """Add an event. When there are too many, a failure is added instead and the jobs are cancelled."""
        if self.qsize() < MOST_EVENTS:
            self.put_nowait((index, event))
        elif not self._jobs[index].cancelled:
            self.put_nowait((index, Failure(503, "the response was read too slowly")))
            self.cancel()

    def cancel(self) -> None:
        """Cancel the jobs; for finished ones this does nothing."""
        for job in self._jobs:
            job.cancelled = True

    async def events(self, receive: Receive) -> AsyncIterator[tuple[int, Event] | None]:
        """The events until every job has finished; None after each WAITING_SECONDS without one.

        Raises ClientGoneError. However the iteration ends, the jobs are cancelled.
        """

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.put_nowait("gone")

        watcher = asyncio.create_task(watch())
        running = len(self._jobs)
        try:
            while running:
                try:
                    async with asyncio.timeout(WAITING_SECONDS):
                        found = await self.get()
                except TimeoutError:
                    yield None
                    continue
                if found == "gone":
                    raise ClientGoneError
                running -= not isinstance(found[1], Delta)
                yield found
        finally:
            self.cancel()
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher


def deliver(events: Sequence[tuple[Job, Event]]) -> None:
    """Put events that the scheduler has posted into the mailboxes of their requests."""
    for job, event in events:
        mailbox, index = job.owner
        mailbox.add(index, event)


async def collect(request: Request, jobs: Sequence[Job], mailbox: Mailbox, reply: Reply, usage: Usage) -> Response:
    """Wait for all jobs and answer in one piece. Raises RequestError for a failed job, and ClientGoneError."""
    texts: list[list[str]] = [[] for _ in jobs]
    tokens: list[list[Token]] = [[] for _ in jobs]
    reasons = [""] * len(jobs)
    async for found in mailbox.events(request.receive):
        if found is None:
            continue
        index, event = found
        if isinstance(event, Delta):
            texts[index].append(event.text)
            tokens[index].extend(event.tokens)
        elif isinstance(event, Finished):
            usage.add(index, event)
            reasons[index] = event.reason
        else:
            raise RequestError(event.status, event.message)
    return json_reply(reply.complete(list(zip(map("".join, texts), tokens, reasons, strict=True)), usage))


class EventStream(Response):
    """A response that is sent while it is generated."""

    def __init__(self, count: int, mailbox: Mailbox, reply: Reply, usage: Usage, include_usage: bool) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._count, self._mailbox, self._reply = count, mailbox, reply
        self._usage, self._include_usage = usage, include_usage

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        events = self._mailbox.events(receive)
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for index in range(self._count):
                for chunk in self._reply.opening(index):
                    await _send_data(send, sse(chunk))
            await self._send_events(events, send)
            if self._include_usage:
                await _send_data(send, sse(self._reply.closing(self._usage)))
            await _send_data(send, SSE_END)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ClientGoneError, TimeoutError):
            pass  # nobody reads an error; the response is incomplete, so the server closes the connection
        finally:
            self._mailbox.cancel()  # a generator that has not started would run no `finally` when it is closed
            await events.aclose()  # type: ignore[attr-defined]

    async def _send_events(self, events: AsyncIterator[tuple[int, Event] | None], send: Send) -> None:
        async for found in events:
            if found is None:
                await _send_data(send, SSE_WAITING)
                continue
            index, event = found
            if isinstance(event, Delta):
                await _send_data(send, sse(self._reply.chunk(index, event, None)))
            elif isinstance(event, Finished):
                self._usage.add(index, event)
                await _send_data(send, sse(self._reply.chunk(index, Delta("", ()), event.reason)))
            else:
                await _send_data(send, sse(RequestError(event.status, event.message).body()))
                return


async def _send_data(send: Send, data: bytes) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": True})
