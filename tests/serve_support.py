"""A page under test: its server in a thread of this process, and requests to it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_support import untrained_checkpoint

from charlm.lm import checkpoint
from charlm.lm.data import build_corpus
from charlm.serve import listening_on, new_server
from charlm.serve.models import Served

ITEMS = build_corpus("emma\nolivia\nava\nisabella\nsophia\nmia\n" * 5, format="line")
TEXT = build_corpus("to be, or not to be: that is the question,\n" * 20, format="text")
SAMPLE = {"model": 0, "prompt": "", "temperature": 1.0, "top_k": None, "top_p": None, "seed": 7}


def save(folder: Path, corpus: Any = ITEMS, type: str = "mlp", **config: Any) -> Path:
    """An untrained model in a folder."""
    checkpoint.save(folder, untrained_checkpoint(corpus, type, **config))
    return folder


class Page:
    """Requests to a server, each on a connection of its own."""

    def __init__(self, port: int, token: str, server: Any = None, models: Any = ()) -> None:
        self.port, self.token, self.server, self.models = port, token, server, models

    def send(self, path: str, values: Any = None, **headers: str) -> http.client.HTTPConnection:
        """A request to a path, absolute or below the token; `values` are JSON, or the bytes of the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        body = values if values is None or isinstance(values, bytes) else json.dumps(values)
        path = path if path.startswith("/") else f"/{self.token}/{path}"
        connection.request("GET" if body is None else "POST", path, body, headers)
        return connection

    def ask(self, path: str, values: Any = None, status: int = 200, **headers: str) -> Any:
        """The JSON or the text of the answer, which has `status`."""
        connection = self.send(path, values, **headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        self.headers = {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        assert answer.status == status, text
        return json.loads(text) if self.headers["content-type"] == "application/json" else text

    def refused(self, path: str, values: Any = None, status: int = 400, **headers: str) -> str:
        """The sentence of a refusal."""
        return self.ask(path, values, status, **headers)["error"]

    def sample(self, **options: Any) -> list[str]:
        pieces = [json.loads(line) for line in self.ask("sample", {**SAMPLE, **options}).splitlines()]
        numbers = sorted({piece["number"] for piece in pieces})
        return ["".join(piece["text"] for piece in pieces if piece["number"] == number) for number in numbers]


@contextmanager
def serving(*folders: Path, **options: Any) -> Iterator[Page]:
    """A page about the models in `folders`."""
    models = [Served(folder, torch.device("cpu")) for folder in folders]
    with listening_on(0) as listener:
        server = new_server(models, "token", **options)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Page(listener.getsockname()[1], "token", server, models)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
