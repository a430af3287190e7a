"""The requests of the page. One model computes at a time, in a thread, and the event loop stays free for the others.

A request is answered only if it is addressed to this machine by name (against DNS rebinding: a foreign name that
resolves to 127.0.0.1), comes from no other page (its Origin), and has the token in its path.
"""

from __future__ import annotations

import asyncio
import json
import re
import reprlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from charlm._errors import UserError
from charlm.lm.sample import SamplingOptions
from charlm.lm.terminal import visible
from charlm.serve.coin import coin
from charlm.serve.models import Served

MAX_CHARACTERS = 5_000  # of a text or a prompt
MAX_BODY = 65_536  # bytes of a request: a character takes at most 12 in JSON
TOO_LONG = f"the text is too long: the page takes at most {MAX_CHARACTERS:,} characters"
RATE, BURST = 200, 400  # requests of all clients in a second, and at once
LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")
PAGE = {"": ("page.html", "text/html"), "page.js": ("page.js", "text/javascript"), "page.css": ("page.css", "text/css")}
NUMBER = (float, int)  # of JSON
SAMPLING = {"prompt": (str,), "temperature": NUMBER, "top_k": (int, None), "top_p": (*NUMBER, None), "seed": (int,)}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",  # the address holds the token
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Rate:
    """At most `burst` requests at once and `per_second` in the long run (a token bucket)."""

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self.burst, self.clock = per_second, burst, clock
        self.left, self.at = burst, clock()

    def allows(self) -> bool:
        """Counts a request; False if it is one too many."""
        before, self.at = self.at, self.clock()
        self.left = min(self.burst, self.left + (self.at - before) * self.per_second)
        allowed = self.left >= 1
        self.left -= allowed
        return allowed


def guarded(app: ASGIApp, token: str, rate: Rate) -> ASGIApp:
    """`app` with HEADERS in its answers; requests that are not of the page, or too many, are refused."""

    def refusal(headers: Headers, path: str) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not LOOPBACK.fullmatch(host):
            return failure(403, "this server is for this machine alone: its address begins with http://127.0.0.1")
        if origin not in (None, f"http://{host}"):
            return failure(403, "this server answers its own page only, not one of another origin")
        if not secrets.compare_digest("".join(path.split("/")[1:2]).encode(), token.encode()):
            return failure(403, "the address lacks the token: open the whole address that `charlm serve` printed")
        if not rate.allows():
            return failure(429, f"there are more than {rate.per_second:g} requests a second: try again")
        return None

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (refusal(Headers(scope=scope), scope["path"]) or app)(scope, receive, send_guarded)

    return answer


def new_app(models: list[Served], token: str, is_stopping: Callable[[], bool], rate: Rate | None = None) -> ASGIApp:
    """The page's application, which shows `models` below the path `token`.

    Streams end when `is_stopping`. `rate` limits the requests.
    """
    turn = asyncio.Lock()  # one model computes at a time

    async def compute(work: Callable[[], Any]) -> Any:
        async with turn:
            return await run_in_threadpool(work)

    async def page(request: Request) -> Response:
        name, media_type = PAGE[request.url.path.rpartition("/")[2]]
        return Response(files("charlm.serve").joinpath(name).read_bytes(), media_type=media_type)

    async def describe(request: Request) -> Response:
        found = await compute(lambda: [model.describe() for model in models])
        return reply({"models": found, "most": MAX_CHARACTERS})

    async def score(request: Request) -> Response:
        values = await read(request)
        text, start = take(values, "text", str), take(values, "start", int)
        return reply({"models": await compute(lambda: [model.score(text, start) for model in models])})

    async def sample(request: Request) -> Response:
        values = await read(request)
        number = take(values, "model", int)
        if not 0 <= number < len(models):
            raise UserError(f"model is {number}, but must be at least 0 and below {len(models)}")
        options = SamplingOptions(**{name: take(values, name, *types) for name, types in SAMPLING.items()})
        pieces = models[number].sample(options)

        async def lines() -> AsyncIterator[str]:
            try:
                while piece := await compute(lambda: next(pieces, None)):
                    if is_stopping():
                        raise UserError("the server was stopped before the sample was complete")
                    yield dumps({"number": piece[0], "text": piece[1]}) + "\n"
            except UserError as error:  # no status 400, which browsers print on the console
                yield dumps({"error": visible(str(error))}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def toss(request: Request) -> Response:
        values = await read(request)
        p, q = (take(values, name, *NUMBER) for name in "pq")
        return reply(await compute(lambda: coin(p, q)))

    posts = {"score": score, "sample": sample, "coin": toss}
    app = Starlette(
        routes=[
            *(Route(f"/{{token}}/{name}", page) for name in PAGE),
            Route("/{token}/models", describe),
            *(Route(f"/{{token}}/{name}", answer, methods=["POST"]) for name, answer in posts.items()),
        ],
        exception_handlers={
            UserError: lambda request, error: failure(400, str(error)),
            HTTPException: lambda request, error: failure(error.status_code, error.detail),
            Exception: lambda request, error: failure(500, repr(error)),
        },
    )
    return guarded(app, token, rate or Rate(RATE, BURST))


async def read(request: Request) -> dict[str, Any]:
    """The JSON object of a request, of which no more than MAX_BODY and a block of the network is in memory."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, TOO_LONG)
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError("the request is not a JSON object")
    return values


def take(values: dict[str, Any], name: str, *types: type | None) -> Any:
    """values[name], None if it is not there; UserError unless it has exactly one of `types`, or a text is too long."""
    value = values.get(name)
    if (None if value is None else type(value)) not in types:
        expected = " or ".join("null" if wanted is None else wanted.__name__ for wanted in types)
        raise UserError(f"{name} is {reprlib.repr(value)}, but must be {expected}")
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        raise HTTPException(413, TOO_LONG)
    return value


def failure(status: int, sentence: str) -> Response:
    return reply({"error": visible(sentence)}, status)


def reply(value: Any, status: int = 200) -> Response:
    return Response(dumps(value), status, media_type="application/json")


def dumps(value: Any) -> str:
    """ASCII, with every lone surrogate as an escape, and "NaN" and "Infinity", which JSON does not have, as texts."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=str))
