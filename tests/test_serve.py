"""charlm serve: what the page is told, who is refused, the limits, files that change, and the end of the server."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from browser_support import until
from lm_support import fails, succeeds, untrained_checkpoint
from serve_support import ITEMS, SAMPLE, TEXT, Page, save, serving

import charlm
import charlm.functional as F
from charlm import _extras
from charlm.lm import checkpoint
from charlm.lm.models import MODELS
from charlm.lm.sample import MAX_NEW_TOKENS
from charlm.serve import app
from charlm.serve.coin import coin
from charlm.serve.models import PIECE, Served

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ("ngram", "bigram", "unigram", "uniform")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    with serving(save(folder / "items"), save(folder / "text", TEXT, "gpt", n_embd=8, n_head=2)) as page:
        yield page


# ---- answers


@pytest.mark.parametrize("mix", [0, 3])
@pytest.mark.parametrize("type", MODELS)
def test_what_is_typed_has_the_surprisal_of_score_under_every_model(tmp_path, type, mix):
    for corpus, lines in ((ITEMS, ["emma", "ava", "", "mia"]), (TEXT, ["to be, or not"])):
        text = "\n".join(lines)
        mixture = {} if type in COUNTS else {"mix_ngram": mix}
        served = Served(
            save(tmp_path / corpus.format, corpus, type, n_embd=8, n_head=2, **mixture), torch.device("cpu")
        )
        model = served.model
        expected = torch.cat(model.surprisals(lines, unit="bits")).tolist()[: len(text)]
        for start in (0, 3, 4, 5, 9, len(text)):  # also at the end of an item, and in an empty one
            assert served.score(text, start)["bits"] == pytest.approx(expected[start:], rel=1e-5)
        # What is said of the next character is its surprisal once it is typed.
        p = model.next_log_probs(lines[-1]).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-6)
        typed = served.score(f"{text}o", len(text))["bits"]
        assert typed == pytest.approx([-math.log2(p[model.vocabulary.stoi["o"]])], rel=1e-5)


def test_the_next_characters_are_ranked_with_their_entropy(page):
    for served, answer in zip(page.models, page.ask("score", {"text": "em", "start": 2})["models"], strict=True):
        log_p = served.model.next_log_probs("em", unknown="escape")
        found = answer["next"]
        assert [p for _, p in found["top"]] == pytest.approx(log_p.exp().topk(12)[0].tolist())
        assert found["entropy"] == pytest.approx(F.entropy(log_p).item() / math.log(2))
        assert found["others"] == len(served.model.vocabulary) - 12
        assert ("end" in dict(found["top"])) is (served.model.format == "line")


def test_a_long_text_is_scored_in_pieces_that_add_up(page):
    text = ("to be, or not to be:\n" * 30)[: 2 * PIECE + 7]
    answers = [page.ask("score", {"text": text, "start": start})["models"] for start in (0, PIECE, 2 * PIECE)]
    for index, served in enumerate(page.models):
        texts, unknown = (text.split("\n"), "escape") if served.model.format == "line" else ([text], "error")
        expected = torch.cat(served.model.surprisals(texts, unit="bits", unknown=unknown)).tolist()[: len(text)]
        bits = [each for answer in answers for each in answer[index]["bits"]]
        assert bits == pytest.approx(expected, rel=1e-5)
        assert [answer[index]["next"] is None for answer in answers] == [True, True, False]


def test_unknown_and_hostile_characters_are_text_with_a_cost(page):
    (answer, _) = page.ask("score", {"text": "em<b>\x1b[31m\u202e\ud800\n", "start": 0})["models"]
    assert answer["names"] == [*"em<b>", "U+001B", *"[31m", "U+202E", "U+D800", "↵"]
    assert answer["unknown"] == [2, 4, 5, 6, 7, 8, 10, 11]  # b and m are letters of names, a newline is their end
    assert answer["bits"][2] == pytest.approx(32, abs=0.5)
    assert answer["basis"] == "1 escape"


def test_samples_are_those_of_generate_and_arrive_while_they_are_made(page):
    options = {"prompt": "em", "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    expected = [page.models[0].model.generate(num_samples=1, seed=seed, **options)[0] for seed in range(3, 13)]
    assert page.sample(**options, seed=3) == expected
    assert page.sample(model=1, temperature=0, top_k=10**6) == page.models[1].model.generate("", 1, temperature=0)
    connection = page.send("sample", {**SAMPLE, "model": 1})
    answer = connection.getresponse()
    assert json.loads(answer.readline()) == {"number": 0, "text": ""}
    assert page.ask("coin", {"p": 0.5, "q": 0.5})["kl"] == pytest.approx(0, abs=1e-12)  # between two characters
    assert page.server.server_state.tasks  # the stream goes on
    connection.close()


def test_minimise_follows_the_gradient_of_the_op_to_the_coin():
    found = coin(0.8, 0.3)
    entropy, cross = (-0.8 * math.log2(q) - 0.2 * math.log2(1 - q) for q in (0.8, 0.3))
    expected = {"entropy": entropy, "cross_entropy": cross, "kl": cross - entropy, "gradient": 0.3 - 0.8}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    divergences = [found["kl"]]
    while divergences[-1] > 1e-6:
        found = coin(0.8, found["next"])
        divergences.append(found["kl"])
    assert divergences == sorted(divergences, reverse=True)
    assert len(divergences) < 60
    assert (coin(0, 0.5)["entropy"], coin(1, 0.5)["cross_entropy"]) == (0, pytest.approx(1))


def test_a_model_that_predicts_nan_and_a_run_without_metrics_are_shown(tmp_path):
    saved = untrained_checkpoint(ITEMS)
    for weight in saved.weights.values():
        weight.fill_(math.nan)
    checkpoint.save(tmp_path / "run", saved)
    with serving(tmp_path / "run") as page:
        (answer,) = page.ask("score", {"text": "em", "start": 0})["models"]
        assert (answer["bits"], answer["next"]["top"][0][1]) == (["NaN", "NaN"], "NaN")
        for temperature in (0, 1):
            answer = page.ask("sample", {**SAMPLE, "temperature": temperature}).splitlines()[-1]
            assert "its training diverged" in json.loads(answer)["error"]
        assert page.ask("models")["models"][0]["bits"] is None


def test_a_character_of_probability_zero_has_an_infinite_surprisal(tmp_path):
    saved = untrained_checkpoint(ITEMS, "bigram")
    saved.weights["log_probs"][:, ITEMS.vocabulary.stoi["m"]] = -math.inf
    checkpoint.save(tmp_path / "run", saved)
    with serving(tmp_path / "run") as page:
        (answer,) = page.ask("score", {"text": "em", "start": 0})["models"]
        assert answer["bits"] == [pytest.approx(math.log2(len(ITEMS.vocabulary))), "Infinity"]


# ---- who is refused


def test_the_page_has_its_parts_and_a_strict_policy(page):
    for name in ("", "page.js", "page.css"):
        text = page.ask(name)
        assert text == (ROOT / "charlm/serve" / (name or "page.html")).read_text(encoding="utf-8")
        assert "://" not in text
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src")
        assert "unsafe" not in policy
        assert page.headers["cache-control"] == "no-store"
        assert not {"access-control-allow-origin", "server"} & set(page.headers)


def test_requests_without_the_token_from_elsewhere_or_by_another_name_are_refused(page):
    for path in ("/", "/x/", "//", "/models", "/toke/models", "/*"):
        assert "lacks the token" in page.refused(path, status=403)
    values, own, local = {"p": 0.5, "q": 0.5}, f"127.0.0.1:{page.port}", f"localhost:{page.port}"
    for host in ("evil.example", f"evil.example:{page.port}", "127.0.0.1.evil.example", "[::1]", ""):
        assert "this machine alone" in page.refused("coin", values, 403, Host=host)
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"https://{own}", f"http://{local}"):
        assert "another origin" in page.refused("coin", values, 403, Origin=origin)
    page.ask("coin", values, Origin=f"http://{own}")
    page.ask("coin", values, Host=local, Origin=f"http://{local}")
    with socket.create_connection(("127.0.0.1", page.port)) as every:
        every.sendall(b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert every.recv(100).startswith(b"HTTP/1.1 403")
    sockets = [listener for server in page.server.servers for listener in server.sockets]
    assert [listener.getsockname() for listener in sockets] == [("127.0.0.1", page.port)]


# ---- bad input


def test_bad_requests_are_sentences(page, monkeypatch):
    for path, values, sentence in (
        ("score", b"{", "not a JSON object"),
        ("score", b"[" * 20_000, "not a JSON object"),
        ("score", b"\xff", "not a JSON object"),
        ("score", [], "not a JSON object"),
        ("score", {"text": 3, "start": 0}, "text is 3, but must be str"),
        ("score", {"text": "e", "start": True}, "start is True, but must be int"),
        ("score", {"text": "e", "start": 2}, "start is 2, but must be at least 0 and at most 1"),
        ("coin", {"p": 2, "q": 0.5}, "p is 2 and q"),
        ("coin", {"p": 0.5, "q": 0}, "q is 0, but"),
        ("coin", b'{"p": NaN, "q": 0.5}', "p is nan"),
        ("coin", {"p": 10**400, "q": 0.5}, "p is 1000"),
        ("sample", {**SAMPLE, "model": 2}, "model is 2"),
        ("sample", {**SAMPLE, "temperature": -1}, "temperature is -1"),
        ("sample", {**SAMPLE, "temperature": "\x1b[31m"}, "temperature is '\\x1b[31m'"),
        ("sample", {**SAMPLE, "top_k": 10**30}, "integer of 64 bits"),
        ("sample", {**SAMPLE, "top_p": 2}, "top_p is 2"),
        ("sample", {**SAMPLE, "seed": 10**30}, "seed is"),
    ):
        assert sentence in page.refused(path, values), (path, values)
    assert "'<' at position 1 of the prompt" in json.loads(page.ask("sample", {**SAMPLE, "prompt": "e<"}))["error"]
    page.ask("nothing", status=404)
    page.ask("coin", status=405)
    monkeypatch.setattr(Served, "describe", lambda model: 1 / 0)
    assert "ZeroDivisionError" in page.refused("models", status=500)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_text_is_refused_and_100_mb_are_not_held(page, chunked):
    text = "é\U0001f600\x01" * (app.MAX_CHARACTERS // 3)
    page.ask("score", {"text": text, "start": len(text)})
    for path, values in (("score", {"text": f"{text}aaa", "start": 0}), ("sample", {**SAMPLE, "prompt": f"{text}aaa"})):
        assert "at most 5,000 characters" in page.refused(path, values, 413)
    block, held, before = b"a" * (1 << 20), [], memory()
    connection = page.send("models")
    connection.getresponse().read()
    connection.putrequest("POST", "/token/score")
    connection.putheader(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(100 << 20))))
    connection.endheaders()
    for _ in range(100):
        connection.send(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
        held.append(memory() - before)
    connection.send(b"0\r\n\r\n" if chunked else b"")
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())) == (413, {"error": app.TOO_LONG})
    assert max(held) < 30e6
    connection.close()


def memory() -> int:
    """The bytes of this process, the server's, that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_rate_is_limited_and_recovers(tmp_path):
    now = [0.0]
    rate = app.Rate(2, 3, lambda: now[0])
    assert [rate.allows() for _ in range(5)] == [True, True, True, False, False]
    now[0] = 0.5
    assert [rate.allows() for _ in range(2)] == [True, False]
    now[0] = 100
    assert [rate.allows() for _ in range(4)] == [True, True, True, False]
    with serving(save(tmp_path / "run"), rate=app.Rate(0.001, 2)) as page:
        assert [len(page.ask("models")["models"]) for _ in range(2)] == [1, 1]
        assert "requests a second: try again" in page.refused("models", status=429)


def test_100_clients_at_once_get_their_own_answers_and_leave_nothing_behind(page):
    ready, model = threading.Barrier(100), page.models[0].model
    names = ["emaoliv"[number % 7] * (1 + number // 7) for number in range(100)]

    def client(number: int) -> list[str] | list[float]:
        mine = Page(page.port, page.token)
        ready.wait()
        if number % 4 == 0:
            return mine.sample(seed=number)[:1]
        if number % 4 == 1:  # leaves in the middle
            connection = mine.send("sample", {**SAMPLE, "model": 1})
            connection.getresponse().readline()
            connection.close()
            return []
        return mine.ask("score", {"text": names[number], "start": 0})["models"][0]["bits"]

    with ThreadPoolExecutor(100) as clients:
        found = list(clients.map(client, range(100)))
    assert found[::4] == [model.generate("", 1, seed=seed) for seed in range(0, 100, 4)]
    for number in range(2, 100, 4):
        assert found[number] == pytest.approx(model.surprisal(names[number], unit="bits").tolist()[:-1], rel=1e-4)
    with socket.create_connection(("127.0.0.1", page.port)) as broken:
        broken.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        assert broken.recv(100).startswith(b"HTTP/1.1 400")
    until(lambda: not page.server.server_state.tasks and not page.server.server_state.connections)
    assert page.ask("models")


# ---- files that change


def test_a_model_that_is_replaced_is_loaded_again_and_a_stream_goes_on_with_its_own(tmp_path):
    with serving(save(tmp_path / "run", TEXT)) as page:
        (before,) = page.ask("score", {"text": "to", "start": 0})["models"]
        expected = page.sample()
        assert page.ask("models")["models"][0]["notice"] == ""
        connection = page.send("sample", SAMPLE)
        stream = connection.getresponse()
        lines = [stream.readline()]
        save(tmp_path / "run", TEXT, "bigram")
        (described,) = page.ask("models")["models"]
        assert (described["label"], described["version"]) == ("bigram", 2)
        assert "run changed: the page shows the model of step 0, loaded at" in described["notice"]
        (after,) = page.ask("score", {"text": "to", "start": 0})["models"]
        assert (before["basis"], after["basis"]) == ("1 error", "2 error")
        assert after["bits"] == pytest.approx(charlm.load(tmp_path / "run").surprisal("to", unit="bits").tolist())
        lines += stream.read().splitlines()
        assert ["".join(json.loads(line)["text"] for line in lines)] == expected
        connection.close()


def test_a_sample_is_of_the_files_as_they_are_now(tmp_path):
    with serving(save(tmp_path / "run", TEXT)) as page:
        save(tmp_path / "run", TEXT, "bigram")
        assert page.sample() == charlm.load(tmp_path / "run").generate("", 1, seed=SAMPLE["seed"])


def test_a_model_that_is_damaged_or_removed_leaves_the_old_one_with_a_reason(tmp_path):
    with serving(save(tmp_path / "run")) as page:
        expected = page.ask("score", {"text": "em", "start": 0})
        (weights,) = (tmp_path / "run").glob("model-*")
        whole = weights.read_bytes()
        for damage, reason in (
            (lambda: weights.write_bytes(whole[:-1] + b"\x00"), "is altered"),
            (lambda: weights.write_bytes(whole[:-1]), "is truncated or altered"),
            (weights.unlink, "No such file"),
            (lambda: shutil.rmtree(tmp_path / "run"), "there is no checkpoint"),
        ):
            damage()
            (described,) = page.ask("models")["models"]
            assert "cannot be loaded, so the page keeps the model of step 0" in described["notice"]
            assert reason in described["notice"]
            assert page.ask("score", {"text": "em", "start": 0}) == expected
        save(tmp_path / "run")
        assert "run changed: the page shows the model" in page.ask("models")["models"][0]["notice"]


# ---- the command


def test_a_stream_that_the_end_of_the_server_cuts_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(MAX_NEW_TOKENS, "text", 1_000_000)
    with serving(save(tmp_path / "run", TEXT)) as page:
        stream = page.send("sample", SAMPLE).getresponse()
        stream.readline()
        page.server.should_exit = True
        assert "stopped before the sample was complete" in json.loads(stream.read().splitlines()[-1])["error"]


def test_errors_of_the_command_are_sentences(tmp_path, monkeypatch):
    run = save(tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on port {port}: Address already in use; leave" in fails("serve", run, "--port", port)
    assert "port is 70000" in fails("serve", run, "--port", 70000)
    assert "there is no checkpoint" in fails("serve", tmp_path / "none")
    assert "one model or two, not 3" in fails("serve", run, run, run)
    manifest = json.loads((run / "checkpoint.json").read_text())
    (run / "checkpoint.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "written by a newer charlm" in fails("serve", run)
    monkeypatch.setattr(_extras, "find_spec", lambda name: None)
    message = fails("serve", run)
    assert "a live page needs starlette and uvicorn, which the extra serve installs: pip install" in message


def test_the_command_opens_the_page_it_prints(monkeypatch):
    url, opened = "http://127.0.0.1:1/token/", []
    monkeypatch.setattr("charlm.serve.serve", lambda directories, port, device, on_start: on_start(url, []))
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert succeeds("serve", "out", "--open") == f"{url} (Ctrl-C stops it)\nstopped\n"
    assert opened == [url]


def test_ctrl_c_ends_the_command_cleanly_even_while_it_streams(tmp_path):
    command = [sys.executable, "-m", "charlm", "serve", save(tmp_path / "run", TEXT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == f"{tmp_path / 'run'}: mlp, step 0\n"
        url = process.stdout.readline().removesuffix(" (Ctrl-C stops it)\n")
        assert url.startswith("http://127.0.0.1:")
        port, token = url.removeprefix("http://127.0.0.1:").split("/")[:2]
        assert len(token) >= 22
        page = Page(int(port), token)
        idle, unfinished, stream = page.send(""), page.send("score", b"", **{"Content-Length": "9"}), None
        assert "<title>charlm serve</title>" in idle.getresponse().read().decode()
        stream = page.send("sample", SAMPLE)
        assert stream.getresponse().readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=90)
    assert unfinished.sock
    assert (process.returncode, output, errors) == (0, "stopped\n", "")
