"""`charlm serve`: a live page about trained models, for this machine alone; it needs the extra `serve`.

models.py computes, app.py answers requests, coin.py is the biased coin, and page.* is what the browser shows.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charlm._errors import UserError

if TYPE_CHECKING:
    import uvicorn

    from charlm.serve.models import Served

PACKAGES = ("starlette", "uvicorn")  # the extra `serve`
HOST = "127.0.0.1"
MOST_CONNECTIONS = 512  # a further one is answered with the status 503
SECONDS_TO_STOP = 2  # for the requests in progress


def serve(
    directories: Sequence[str | PathLike[str]],
    *,
    port: int = 0,
    device: str = "cpu",
    on_start: Callable[[str, list[Served]], None] = lambda url, models: None,
) -> None:
    """Serves a page about the models in one folder or two until Ctrl-C.

    It listens on `port` of 127.0.0.1, or on any that is free for 0. `on_start` is called with the address, which holds
    a random token, and the models.

    Raises:
        UserError: A folder has no valid checkpoint, there are more than two, the port cannot be used, or the extra
            `serve` is not installed.
    """
    from charlm._extras import require_packages
    from charlm.lm.train import usable_device
    from charlm.serve.models import Served

    require_packages("a live page", "serve", PACKAGES)
    if not 1 <= len(directories) <= 2:
        raise UserError(f"a page shows one model or two, not {len(directories)}: give one folder or two")
    target = usable_device(device)
    with listening_on(port) as listener:
        models = [Served(Path(directory), target) for directory in directories]
        token = secrets.token_urlsafe(16)
        on_start(f"http://{HOST}:{listener.getsockname()[1]}/{token}/", models)
        with suppress(KeyboardInterrupt):  # uvicorn stops, and then raises the signal again
            new_server(models, token).run([listener])


def new_server(models: list[Served], token: str, **options: Any) -> uvicorn.Server:
    """The server of the page, with the arguments of `app.new_app`."""
    import uvicorn

    from charlm.serve.app import new_app

    config = uvicorn.Config(
        new_app(models, token, lambda: server.should_exit, **options),
        loop="asyncio", http="h11", ws="none", lifespan="off", proxy_headers=False, server_header=False,
        log_config=None, log_level="critical",  # a request that is cut off at the end is no error
        limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=SECONDS_TO_STOP,
    )  # fmt: skip
    server = uvicorn.Server(config)
    return server


def listening_on(port: int) -> socket.socket:
    """A socket that listens on `port` of the loopback interface; UserError if that is not possible."""
    if not 0 <= port <= 65535:
        raise UserError(f"port is {port}, but must be at least 0 and at most 65535")
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = (error.strerror or "").partition(" (while")[0]  # asyncio and socket add the address
        raise UserError(f"cannot listen on port {port}: {reason}; leave --port out to take a free one") from error
