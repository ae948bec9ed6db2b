"""python -m model.write, over HTTP: three streams, one queue, cancelled by hanging up; closed to other origins."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from model import GPT2, GPT2Config
from model.write import writer as writer_module
from model.write.__main__ import main
from model.write.server import MOST_BYTES, Server
from model.write.writer import Speaker, Writer
from tokenizer import GPT2Tokenizer

ASKED = {"text": "Hello", "model": "tiny", "temperature": 0.9, "length": 7, "seed": 3}
TOKENIZER = GPT2Tokenizer.from_pretrained("gpt2")


@pytest.fixture(scope="module")
def speaker():
    return Speaker(GPT2(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64)).eval(), TOKENIZER)


@pytest.fixture
def server(speaker):
    writer = Writer({"tiny": speaker})
    with Server("127.0.0.1", 0, writer) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.02,))
        thread.start()
        yield served
        served.shutdown()
        thread.join()
    writer.close()


@pytest.fixture
def slow(speaker, monkeypatch):
    """Each step waits for the test: `slow.release()` lets one go."""
    steps, generate = threading.Semaphore(0), speaker.model.generate

    def waiting(*args, stopping_criteria, **kwargs):
        (tell,) = stopping_criteria
        return generate(*args, stopping_criteria=[lambda *a: (steps.acquire(), tell(*a))[1]], **kwargs)

    monkeypatch.setattr(speaker.model, "generate", waiting)
    yield steps
    steps.release(1000)


def ask(server, method="POST", path="/continue", body=None, **headers):
    """(status, headers, body) of one request; the body of a POST is ASKED, but for what is given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    if method == "POST":
        body = json.dumps({**ASKED, **(body or {})}) if body is None or isinstance(body, dict) else body
        headers = {"Content-Type": "application/json", **headers}
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


def events(body):
    return [json.loads(line) for line in body.splitlines()]


def rows(told):
    texts = ["", "", ""]
    for event in told:
        if "row" in event:
            texts[event["row"]] += event["text"]
    return texts


def start(server, **fields):
    """A socket on which a request was sent, and a file to read its lines from."""
    body = json.dumps({**ASKED, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=30)
    head = f"POST /continue HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    lines = connection.makefile("rb")
    while lines.readline() not in (b"\r\n", b""):
        pass
    return connection, lines


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_three_continuations_are_what_generate_samples(server, speaker):
    status, _, body = ask(server)
    told = events(body)
    assert status == 200
    assert told[0] == {"before": 0}
    assert told[1] == {"read": 1, "left_out": 0}
    assert told[-1] == {"end": "done"}
    ids = speaker.model.generate(
        [TOKENIZER.encode("Hello")] * 3, max_new_tokens=7, do_sample=True, temperature=0.9, top_k=50, seed=[3, 4, 5]
    )
    assert rows(told) == [TOKENIZER.decode(row[1:].tolist()) for row in ids]
    assert len(set(rows(told))) == 3
    assert sum("row" in event for event in told) > 15  # as they come, not at the end
    assert rows(events(ask(server)[2])) == rows(told)
    assert rows(events(ask(server, body={"temperature": 0.1})[2])) != rows(told)


def test_a_row_ends_with_the_text_and_the_others_go_on(server, speaker, monkeypatch):
    free = rows(events(ask(server)[2]))
    ids = speaker.model.generate([TOKENIZER.encode("Hello")], max_new_tokens=7, do_sample=True, temperature=0.9, seed=3)
    monkeypatch.setitem(vars(speaker.model.generation_config), "eos_token_id", int(ids[0, 4]))
    cut = rows(events(ask(server)[2]))
    assert cut[0] == TOKENIZER.decode(ids[0, 1:4].tolist())
    assert cut[1:] == free[1:]


def test_a_text_that_ends_in_a_space_goes_on_with_a_word(server):
    plain, spaced = (rows(events(ask(server, body={"text": text})[2])) for text in ("Hello", "Hello "))
    assert spaced == [text.removeprefix(" ") for text in plain]


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("<script>alert(1)</script>&amp;<|endoftext|>", None),
        ("\ud83d", "\ufffd"),
        ("a\udc00\ud800b", "a\ufffd\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ("\x00\u202e\u2028", None),
        ("", "<empty>"),
        (" ", None),
    ],
    ids=ascii,
)
def test_hostile_texts_are_texts(text, same_as, server, speaker):
    status, _, body = ask(server, body={"text": text})
    assert status == 200
    told = events(body)
    assert told[-1] == {"end": "done"}
    assert body.isascii()
    if same_as == "<empty>":
        assert told[1]["read"] == 1
    elif same_as is not None:
        assert rows(told) == rows(events(ask(server, body={"text": same_as})[2]))
    else:
        assert told[1]["read"] == len(TOKENIZER.encode(text, disallowed_special=()))  # special tokens are text


@pytest.mark.parametrize("text", ["Once upon a time ", "a", "\u4e00", "<", "\ud800"], ids=ascii)
def test_of_100_kB_the_model_reads_the_end_and_the_reply_says_so(text, server):
    text = text * (100_000 // len(text))
    told = events(ask(server, body={"text": text})[2])
    assert told[1]["read"] == 64 - 7
    assert told[1]["left_out"] > 0
    assert told[-1] == {"end": "done"}


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "an object with text, model"),
        (b'{"text": "a"}', 400, "an object with text, model"),
        ({"html": 1}, 400, "an object with text, model"),
        ({"text": 1}, 400, "text must be a string"),
        ({"text": None}, 400, "text must be a string"),
        ({"model": "/etc"}, 400, "model must be one of tiny"),
        ({"model": ["tiny"]}, 400, "model must be one of tiny"),
        ({"temperature": 0}, 400, "temperature must be a number from 0.1 to 2.0"),
        ({"temperature": True}, 400, "temperature must be"),
        ({"temperature": float("nan")}, 400, "temperature must be"),
        ({"temperature": float("inf")}, 400, "temperature must be"),
        ({"temperature": 10**400}, 400, "temperature must be"),
        ({"length": 33}, 400, "length must be a whole number of tokens from 1 to 32"),
        ({"length": 7.0}, 400, "length must be"),
        ({"length": True}, 400, "length must be"),
        ({"seed": -1}, 400, "seed must be"),
        (b" " * (MOST_BYTES + 1), 413, "a request has at most 1048576 bytes"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_wrong_requests_are_refused_in_words(body, status, reason, server):
    try:
        found, _, said = ask(server, body=body)
    except (BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
        assert status == 413
        return
    assert found == status
    assert reason in json.loads(said)["error"]


OTHERS = {
    "origin": {"Origin": "http://evil.example"},
    "port": {"Origin": "http://127.0.0.1:1"},
    "null": {"Origin": "null"},
    "site": {"Sec_Fetch_Site": "cross-site"},
    "same site, another port": {"Sec_Fetch_Site": "same-site"},
    "rebinding": {"Host": "evil.example"},
    "rebinding with a port": {"Host": "evil.example:{port}"},
    "another address": {"Host": "10.0.0.1:{port}"},
    "no port": {"Host": "127.0.0.1"},
    "user": {"Host": "127.0.0.1:{port}@evil.example"},
    "path": {"Host": "127.0.0.1:{port}/x"},
    "rubbish": {"Host": "[::1"},
    "nothing": {"Host": ""},
}


@pytest.mark.parametrize("headers", OTHERS.values(), ids=OTHERS.keys())
def test_it_is_closed_to_other_origins_and_names(headers, server):
    headers = {name: value.format(port=server.server_port) for name, value in headers.items()}
    for method, path in (("GET", "/models"), ("POST", "/continue"), ("GET", "/")):
        status, given, said = ask(server, method, path, **headers)
        assert status == 403
        assert "Access-Control-Allow-Origin" not in given
        assert "error" in json.loads(said)


def test_a_form_of_another_page_cannot_ask_even_where_a_browser_says_nothing_of_it(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask(server, Content_Type=kind)[0] == 415
    assert ask(server, "OPTIONS", Origin="http://evil.example")[0] == 501  # no preflight passes


def test_its_own_names_and_links_to_it_are_welcome(server):
    for host in ("127.0.0.1", "localhost", "LOCALHOST"):
        host = f"{host}:{server.server_port}"
        assert ask(server, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200
    status, headers, page = ask(server, "GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")
    assert status == 200
    nonce = headers["Content-Security-Policy"].split("script-src 'nonce-")[1].split("'")[0]
    assert page.count(f'nonce="{nonce}"'.encode()) == 2
    assert nonce.encode() not in ask(server, "GET", "/")[2]
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Set-Cookie"] is None
    assert json.loads(ask(server, "GET", "/models")[2])["models"] == [{"name": "tiny", "longest": 32}]
    assert ask(server, "GET", "/../write/writer.py")[0] == 404
    assert ask(server, "POST", "/")[0] == 404


def test_hanging_up_ends_the_generation(server, slow):
    connection, lines = start(server, length=30)
    slow.release(3)
    seen = [json.loads(lines.readline()) for _ in range(4)]
    assert "row" in seen[-1]
    job = server.writer._current
    lines.close()
    connection.close()
    until(lambda: job.is_cancelled)
    slow.release(1)  # the step under way, and no other of the 27
    other, lines = start(server, length=1)
    assert json.loads(lines.readline())["before"] in (0, 1)
    until(lambda: server.writer._current is not job)
    slow.release(1)
    assert json.loads(lines.readlines()[-1]) == {"end": "done"}
    lines.close()
    other.close()


def test_several_tabs_wait_in_the_order_of_asking_and_one_that_leaves_makes_room(server, slow, monkeypatch):
    monkeypatch.setattr(writer_module, "MOST_WAITING", 3)
    tabs = []
    for before in range(4):
        tabs.append(start(server, length=1))
        assert json.loads(tabs[-1][1].readline()) == {"before": before}
        if before == 0:
            assert "read" in json.loads(tabs[0][1].readline())  # it is being worked on
    assert ask(server)[0] == 503
    tabs[1][1].close()
    tabs[1][0].close()
    until(lambda: server.writer._waiting[0].is_cancelled)
    slow.release(3)
    for before, (_, lines) in ((0, tabs[0]), (2, tabs[2]), (3, tabs[3])):
        told = [json.loads(line) for line in lines.readlines()]
        assert told[-1] == {"end": "done"}
        assert [event["before"] for event in told if "before" in event] == sorted(
            {event["before"] for event in told if "before" in event}, reverse=True
        )
        assert all(event["before"] < before for event in told if "before" in event)
    for connection, lines in tabs:
        lines.close()
        connection.close()
    slow.release(1)
    assert ask(server, body={"length": 1})[0] == 200


def test_what_fails_is_said_and_the_next_one_has_their_turn(server, speaker, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(speaker.model, "generate", lambda *args, **kwargs: 1 / 0)
        assert events(ask(server)[2])[-1] == {"error": "division by zero"}
    assert events(ask(server)[2])[-1] == {"end": "done"}


def test_the_command_serves_until_ctrl_c(speaker, tmp_path):
    speaker.model.save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-m", "model.write", "--model", str(tmp_path / "tiny"), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        url = process.stdout.readline().split()[0]
        connection = http.client.HTTPConnection(url.split("/")[2], timeout=30)
        connection.request("GET", "/models")
        assert json.loads(connection.getresponse().read())["models"][0]["name"] == str(tmp_path / "tiny")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert err == f"model: {tmp_path / 'tiny'} has no tokenizer; GPT-2's is taken\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/dir"], "is neither a directory nor a repository"),
        (["--port", "70000"], "--port 70000: a port is from 0 to 65535"),
        (["--port", "{taken}"], "in use"),
        (["--host", "no.such.host.invalid"], "model.write: "),
        (["--device", "x"], "--device x: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_status_2(arguments, message, speaker, tmp_path, capsys):
    speaker.model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = [argument.format(taken=taken.getsockname()[1]) for argument in arguments]
        try:
            status = main([*([] if "--model" in arguments else ["--model", str(tmp_path)]), *arguments])
        except SystemExit as stop:  # argparse's own
            status = stop.code
    assert status == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1 or said.startswith("usage: ")


def test_torch_is_not_asked_to_generate_twice_at_a_time(server, speaker, monkeypatch):
    at_once, generate, most = threading.Semaphore(1), speaker.model.generate, []

    def alone(*args, **kwargs):
        most.append(at_once.acquire(blocking=False))
        try:
            assert not torch.is_inference_mode_enabled()
            return generate(*args, **kwargs)
        finally:
            at_once.release()

    monkeypatch.setattr(speaker.model, "generate", alone)
    threads = [threading.Thread(target=ask, args=(server,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [True] * 6
