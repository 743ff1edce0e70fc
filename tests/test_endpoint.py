"""
Models behind an endpoint: a server in a thread that does everything wrong, and counts what it is asked.

    python -m pytest tests/test_endpoint.py

No test waits for a retry: asking.pause() is replaced and writes down how long it would have waited.
"""

import collections
import contextlib
import email.utils
import http.server
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time

import pytest

import arbitrage
import asking
import endpoint
import generate
import reward
import tiny
import train_dpo
from asking import Ask, answers, complete, draw_seed, journal_of
from chat import Chat
from common import atomic_dir
from endpoint import Answer, Endpoint, retry_after
from reward import load_reward_model, new_reward_model, score, write_reward_model

cpu = tiny.cpu
SECRET = "sk-3f/8a+Q"
SCRIPTS = "مرحبا नमस्ते שָׁלוֹם 你好 👩\u200d🚀 می\u200cروم \u2028"


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds that would have been waited, in order."""
    waited = []
    monkeypatch.delenv(endpoint.KEY, raising=False)
    monkeypatch.setattr(asking, "pause", lambda stop, seconds: waited.append(seconds))
    return waited


def said(payload):
    """What the server's model answers: all that it was asked, so that no two asks have one answer."""
    turns, settings = payload["messages"], [payload[k] for k in ("temperature", "top_p", "max_tokens", "seed")]
    return f"{SCRIPTS} {turns[-1]['content']} {len(turns)} {settings}"


def whole(payload, text=None, finish="stop"):
    """The body of a good response, as bytes."""
    return json.dumps({"id": "x", "choices": [{"index": 0, "message": {
        "role": "assistant", "content": said(payload) if text is None else text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}}, ensure_ascii=False).encode("utf-8")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True  # else 40 ms between headers and body
    log_message = lambda *_: None

    def setup(self):
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode("utf-8"))
        name = (payload["messages"][-1]["content"], payload["seed"])
        with self.server.lock:
            times = self.server.count[name]
            self.server.count[name] += 1
            self.server.seen.append((self.path, payload, self.headers))
        with contextlib.suppress(ConnectionError):  # the client has left, or was killed
            (self.server.behave or Handler.fine)(self, payload, times)

    do_GET = do_POST

    def send(self, status, body, headers=()):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def fine(self, payload, times):
        self.send(200, whole(payload))

    def raw(self, data):
        """These bytes, then the end of the connection."""
        self.wfile.write(data)
        self.close_connection = True


@contextlib.contextmanager
def serving(behave=None, certificate=None):
    """`behave`(handler, payload, how often this was asked before). -> the server: its url, what it saw and counted."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close, server.request_queue_size = True, False, 64
    server.behave, server.lock, server.connections = behave, threading.Lock(), 0
    server.count, server.seen = collections.Counter(), []
    server.handle_error = lambda *_: None  # a refused handshake
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}/v1#my/model"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def asks(n, **settings):
    return [Ask(f"q{i}", [{"role": "user", "content": f"سؤال {i}"}], 30, seed=i, **settings) for i in range(n)]


def read(path):
    """Rows of a file. Lines end at line breaks alone: a text may hold U+2028, where str.splitlines() would cut."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def expected(ask):
    return Answer(said({"messages": ask.messages, "temperature": ask.temperature, "top_p": ask.top_p,
                        "max_tokens": ask.max_tokens, "seed": ask.seed}), True, 11, 7)


def refusal(function, *words):
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as e:
        function()
    line = str(e.value)
    assert line.startswith("error: ") and "\n" not in line and len(line) < 1000 and all(w in line for w in words), line
    return line


# --- the address, the request, the connection ---

def test_addresses():
    e = Endpoint("http://localhost:8000/v1#CohereLabs/aya-expanse-8b")
    assert (e.host, e.port, e.path, e.model, e.tls) == (
        "localhost", 8000, "/v1/chat/completions", "CohereLabs/aya-expanse-8b", None)
    e = Endpoint("https://[::1]/deep/v1/#m#2")
    assert (e.host, e.port, e.path, e.model) == ("::1", None, "/deep/v1/chat/completions", "m#2")
    assert e.tls.verify_mode == ssl.CERT_REQUIRED and e.tls.check_hostname


@pytest.mark.parametrize("url, words", [
    ("http://localhost:8000/v1", "names no model"), ("http://localhost:8000/v1#", "names no model"),
    ("http://localhost:8000/v1# ", "names no model"), ("ftp://localhost/v1#m", "is not an endpoint's address"),
    ("http:///v1#m", "is not an endpoint's address"), ("http://localhost:8000#m", "is not an endpoint's address"),
    ("http://localhost:port/v1#m", "http(s)://host:port/v1#model"), ("http://[::1/v1#m", "an endpoint is http"),
    ("http://localhost:99999/v1#m", "http(s)://host:port/v1#model"), ("http://local host/v1#m", "is not an endpoint's"),
    ("http://localhost/v\n1#m", "is not an endpoint's"), ("http://хост/v1#m", "is not an endpoint's")])
def test_bad_addresses(url, words):
    refusal(lambda: Endpoint(url), words)


def test_an_address_with_a_secret_in_it_is_refused_and_not_shown():
    for url in ("https://me:hunter2@localhost/v1#m", "https://localhost/v1?key=hunter2#m"):
        assert "hunter2" not in refusal(lambda: Endpoint(url), endpoint.KEY)


def test_a_request(tmp_path):
    messages = [{"role": "system", "content": "कृपया"}, {"role": "user", "content": SCRIPTS}]
    with serving() as server:
        [answer] = answers(Endpoint(server.url), [Ask("q", messages, 30, 0.5, 0.9, 7)], tmp_path / "j")
    [(path, payload, headers)] = server.seen
    assert path == "/v1/chat/completions" and payload == {
        "model": "my/model", "messages": messages, "max_tokens": 30, "temperature": 0.5, "top_p": 0.9, "seed": 7,
        "n": 1, "stream": False}
    assert headers["Content-Type"] == "application/json" and headers["Authorization"] is None
    assert answer == Answer(f"{SCRIPTS} {SCRIPTS} 2 [0.5, 0.9, 30, 7]", True, 11, 7)


def test_min_p_and_stop_strings_are_sent_if_asked_for(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    tiny.write(prompts, [{"id": "a", "language": "en", "prompt": "x"}])
    with serving() as server:
        cfg = generate.Config(model=server.url, prompts=str(prompts), out=str(tmp_path / "out.jsonl"), min_p=0.05, stop=["\n\n", "。"])
        generate.main(cfg)
    [(_, payload, _)] = server.seen
    assert payload["min_p"] == 0.05 and payload["stop"] == ["\n\n", "。"]


def test_one_connection_a_thread_and_all_threads_at_once(tmp_path):
    together = threading.Barrier(4)

    def behave(handler, payload, times):
        if int(payload["seed"]) < 4:
            together.wait(timeout=5)  # breaks, and the connection with it, unless four requests are under way
        handler.fine(payload, times)
    with serving(behave) as server:
        found = answers(Endpoint(server.url), asks(40), tmp_path / "j", threads=4, retries=0)
    assert found == [expected(a) for a in asks(40)]
    assert server.connections == 4 and len(server.seen) == 40


def test_a_connection_that_the_server_closes_after_each_answer(tmp_path, waits):
    """Announced (Connection: close) it costs a new connection; unannounced a try."""
    def announced(handler, payload, times):
        handler.send(200, whole(payload), [("Connection", "close")])

    def unannounced(handler, payload, times):
        handler.fine(payload, times)
        handler.close_connection = True
    for behave, tries in ((announced, 0), (unannounced, 4)):
        with serving(behave) as server:
            found = answers(Endpoint(server.url), asks(5), tmp_path / behave.__name__, threads=1)
        assert found == [expected(a) for a in asks(5)] and len(server.seen) == 5 and len(waits) == tries


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_text_in_many_scripts_arrives_in_pieces(tmp_path, size):
    """Chunked, and with a length but a pause after every piece, so that characters are cut in the middle."""
    def chunked(handler, payload, times):
        body = whole(payload)
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for i in range(0, len(body), size):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(body[i:i + size]), body[i:i + size]))
        handler.wfile.write(b"0\r\n\r\n")

    def pieces(handler, payload, times):
        body = whole(payload)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        for i in range(0, len(body), size):
            handler.wfile.write(body[i:i + size])
            handler.wfile.flush()

    def until_closed(handler, payload, times):
        handler.raw(b"HTTP/1.0 200 OK\r\n\r\n" + whole(payload))

    def escaped(handler, payload, times):
        handler.send(200, json.dumps(json.loads(whole(payload))).encode("ascii"))
    for behave in (chunked, pieces, until_closed, escaped):
        with serving(behave) as server:
            found = answers(Endpoint(server.url), asks(3), tmp_path / behave.__name__, threads=1)
            assert found == [expected(a) for a in asks(3)] and len(server.seen) == 3, behave.__name__
            assert server.connections == (3 if behave is until_closed else 1)
            again = answers(Endpoint(server.url), asks(3), tmp_path / behave.__name__)
        assert again == found and len(server.seen) == 3  # the same text from the journal


# --- what goes wrong once ---

def status(code, body=b'{"error": {"message": "busy"}}', *headers):
    return lambda handler, payload: handler.send(code, body, headers)


def broken(data):
    return lambda handler, payload: handler.raw(data)


def body(change):
    """A good response with something changed in its JSON."""
    def behave(handler, payload):
        reply = json.loads(whole(payload))
        changed = change(reply, reply["choices"][0])
        handler.send(200, json.dumps(reply if changed is None else changed).encode("utf-8"))
    return behave


def silence(handler, payload):
    time.sleep(0.6)
    handler.raw(b"")


def trickle(handler, payload):
    """A byte at a time, each in time."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(12):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)
    handler.close_connection = True


ONCE = {
    "429": (status(429), "429 Too Many Requests: busy"), "500": (status(500), "500 Internal Server Error: busy"),
    "503, not JSON": (status(503, b"<h1>no</h1>"), "503 Service Unavailable: <h1>no</h1>"),
    "closed at once": (broken(b""), "the connection broke"),
    "no HTTP": (broken(b"SSH-2.0\r\n"), "the connection broke (SSH-2.0"),
    "closed in the headers": (broken(b"HTTP/1.1 200 OK\r\nContent-Le"), "not JSON (0 bytes)"),
    "closed in the body": (broken(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"choices\""), "connection broke"),
    "a length that is too long": (lambda handler, payload: handler.raw(
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + whole(payload)), "the connection broke"),
    "closed in a chunk": (
        broken(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n{\"choi"), "the connection broke"),
    "closed between chunks": (lambda handler, payload: handler.raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(whole(payload)), whole(payload))),
        "the connection broke"),
    "a chunk of no size": (broken(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "connection broke"),
    "silence": (silence, "no answer in time (10 s to connect, 0.3 s for all of it)"),
    "a trickle": (trickle, "no answer in time"),
    "nothing": (status(200, b""), "not JSON (0 bytes)"), "a page": (status(200, b"<html>"), "not JSON (6 bytes)"),
    "half of JSON": (status(200, b'{"choices": [{"message": {"content": "x'), "not JSON"),
    "not UTF-8": (lambda handler, payload: handler.send(200, whole(payload).replace(b"q", b"q") + b"\xff"), "not JSON"),
    "deep": (status(200, b"[" * 40_000), "not JSON"), "too long": (status(200, b"1" * 60_000), "longer than 50000"),
    "a list": (body(lambda reply, choice: [1]), "holds no answer"), "null": (status(200, b"null"), "holds no answer"),
    "a number": (status(200, b"1" * 4000), "holds no answer"), "a string": (status(200, b'"choices"'), "choices"),
    "an error with 200": (status(200, b'{"error": {"message": "no GPU"}}'), "the response holds no answer: no GPU"),
    "no choices": (body(lambda reply, choice: reply.update(choices=[])), "holds no answer"),
    "choices null": (body(lambda reply, choice: reply.update(choices=None)), "holds no answer"),
    "choices a word": (body(lambda reply, choice: reply.update(choices="stop")), "holds no answer"),
    "no message": (body(lambda reply, choice: choice.pop("message") and None), "holds no answer"),
    "message a word": (body(lambda reply, choice: choice.update(message="x")), "holds no answer"),
    "content null": (body(lambda reply, choice: choice["message"].update(content=None)), "not NoneType and str"),
    "content a list": (body(lambda reply, choice: choice["message"].update(content=["x"])), "not list and str"),
    "content a number": (body(lambda reply, choice: choice["message"].update(content=7)), "not int and str"),
    "finish_reason null": (body(lambda reply, choice: choice.update(finish_reason=None)), "not str and NoneType"),
    "half a character": (body(lambda reply, choice: choice["message"].update(content="\ud83d")), "half of a character"),
}


@pytest.mark.parametrize("name", ONCE)
def test_once_wrong_then_fine(name, tmp_path, waits, monkeypatch, capsys):
    """One more try, after a wait of up to a second; the reason is said, and the answer is whole."""
    wrong, reason = ONCE[name]
    monkeypatch.setattr(endpoint, "MOST_BYTES", 50_000)
    behave = lambda handler, payload, times: handler.fine(payload, 1) if times else wrong(handler, payload)
    with serving(behave) as server:
        timeout = 0.3 if wrong in (silence, trickle) else 30
        found = answers(Endpoint(server.url), asks(2), tmp_path / "j", threads=1, timeout=timeout)
    assert found == [expected(a) for a in asks(2)] and set(server.count.values()) == {2}
    assert len(waits) == 2 and all(0 <= w <= 1 for w in waits)
    shown = capsys.readouterr().err
    assert reason in shown and shown.count("trying again") == 2
    assert [row["answer"]["failure"] for row in read(tmp_path / "j")] == ["", ""]


@pytest.mark.parametrize("usage, counts", [
    (None, (None, None)), ([], (None, None)), ({"prompt_tokens": 3}, (3, None)),
    ({"prompt_tokens": "3", "completion_tokens": True}, (None, None)), ({"prompt_tokens": -1}, (None, None)),
    ({"prompt_tokens": 2.5, "completion_tokens": 0}, (None, 0))])
def test_usage_is_not_believed_either(usage, counts, tmp_path):
    wrong = body(lambda reply, choice: reply.update(usage=usage))
    with serving(lambda handler, payload, times: wrong(handler, payload)) as server:
        [answer] = answers(Endpoint(server.url), asks(1), tmp_path / "j")
    assert (answer.prompt_tokens, answer.completion_tokens) == counts and answer.text == expected(asks(1)[0]).text


@pytest.mark.parametrize("finish", ["length", "content_filter", "tool_calls", "STOP"])
def test_ended_means_that_the_model_stopped(finish, tmp_path):
    with serving(lambda handler, payload, times: handler.send(200, whole(payload, "", finish))) as server:
        assert answers(Endpoint(server.url), asks(1), tmp_path / "j") == [Answer("", False, 11, 7)]


# --- waits ---

def test_waits_double_up_to_a_minute_and_have_full_jitter(tmp_path, waits, monkeypatch):
    class Highest:
        uniform = staticmethod(lambda low, high: drawn.append(low) or high)
    drawn = []
    monkeypatch.setattr(asking, "jitter", Highest)
    with serving(lambda handler, payload, times: handler.send(500, b"")) as server:
        [answer] = answers(Endpoint(server.url), asks(1), tmp_path / "j", retries=8)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60] and drawn == [0] * 8 and len(server.seen) == 9
    assert answer == Answer(failure="500 Internal Server Error")


def date(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize("value, low, high", [
    ("0", 0, 0), (" 7 ", 7, 7), ("3600", 60, 60), ("9" * 400, 60, 60), (30, 20, 30), (-30, 0, 0), (9000, 60, 60),
    ("soon", None, None), ("", None, None), ("-5", None, None), ("nan", None, None),
    ("Fri, 99 Nov 2026 00:00:00 GMT", None, None)])
def test_retry_after(value, low, high):
    found = retry_after({"Retry-After": value if isinstance(value, str) else date(value)})  # a number: a date so far away
    assert found is None if low is None else low <= found <= high


def test_retry_after_is_waited_for(tmp_path, waits):
    behave = lambda handler, payload, times: handler.fine(payload, 1) if times else status(
        (429, 503)[payload["seed"]], b"", ("Retry-After", ("20", date(40))[payload["seed"]]))(handler, payload)
    with serving(behave) as server:
        found = answers(Endpoint(server.url), asks(2), tmp_path / "j", threads=1)
    assert found == [expected(a) for a in asks(2)]
    assert len(waits) == 2 and 20 <= waits[0] <= 21 and 30 <= waits[1] <= 41


# --- what stays wrong ---

def test_one_ask_fails_and_the_others_go_on(tmp_path, waits):
    """One is refused (asked once), one is never answered (1 + retries times); a second run asks only for these two."""
    long, mended = "x" * 5000, []

    def behave(handler, payload, times):
        if payload["seed"] == 3 and not mended:
            return handler.send(400, json.dumps({"error": {"message": f"too long\n\x1b[31m {long}"}}).encode())
        return handler.raw(b"") if payload["seed"] == 5 and not mended else handler.fine(payload, times)
    with serving(behave) as server:
        found = answers(Endpoint(server.url), asks(9), tmp_path / "j", threads=3, retries=2)
        noted, count = read(tmp_path / "j"), sorted(server.count.values())
        mended.append(True)
        assert answers(Endpoint(server.url), asks(9), tmp_path / "j") == [expected(a) for a in asks(9)]
        assert sorted(server.count.values()) == [1] * 7 + [2, 4]
    assert [a for i, a in enumerate(found) if i not in (3, 5)] == [expected(a) for a in asks(9) if a.seed not in (3, 5)]
    assert found[3].text is None and found[3].failure.startswith("400 Bad Request: too long [31m xxx")
    assert len(found[3].failure) < 350 and "the connection broke" in found[5].failure
    assert count == [1] * 8 + [3] and len(waits) == 2
    assert {row["key"]: row["answer"]["failure"] for row in noted} == {f"q{i}": a.failure for i, a in enumerate(found)}


@pytest.mark.parametrize("code, words", [
    (401, (f"401 Unauthorized: no ({endpoint.KEY} is not set)",)),
    (404, ("404 Not Found: no", "does it serve a model 'my/model'")),
    (308, ("redirects are not followed",)), (403, ("403 Forbidden: no",)), (400, ("400 Bad Request: no",)),
    (500, ("500 Internal Server Error: no",))])
def test_nothing_succeeds(code, words, tmp_path):
    """Thousands of asks end with one line after a few; at once where the reason is the same for all of them."""
    with serving() as other, serving(status_for(code, other)) as server:
        line = refusal(lambda: answers(Endpoint(server.url), asks(3000), tmp_path / "j", threads=4, retries=2), *words)
        assert len(server.seen) < 500 and not other.seen  # some more of them leave before the main thread has its turn
    assert ("49 before it failed" in line) == (code not in (401, 404, 308)) and not (tmp_path / "j").exists()


def status_for(code, other):
    wrong = status(code, b'{"detail": "no"}', ("Location", other.url.partition("#")[0] + "/chat/completions"))
    return lambda handler, payload, times: wrong(handler, payload)


def test_no_server(tmp_path, waits):
    with serving() as server:
        pass  # gone: its port refuses connections
    refusal(lambda: answers(Endpoint(server.url), asks(3000), tmp_path / "j"), "no server there (Connection refused)")
    refusal(lambda: answers(Endpoint("http://a..b/v1#m"), asks(9), tmp_path / "j"), "no server there")
    assert not waits and not (tmp_path / "j").exists()


def test_a_server_that_goes_away_in_the_middle(tmp_path, waits):
    """What was answered is kept; refused connections are now tried again, and end the run after 50 asks."""
    def behave(handler, payload, times):
        handler.fine(payload, times)
        if len(handler.server.seen) == 6:
            handler.close_connection = True
            handler.server.socket.close()
    with serving(behave) as server:
        line = refusal(lambda: answers(Endpoint(server.url), asks(300), tmp_path / "j", threads=1, retries=1),
                       "no server there", "49 before it failed", f"6 answers are kept in {tmp_path / 'j'}")
        assert len(server.seen) == 6 and len(waits) >= 50 and line
    kept = [row for row in read(tmp_path / "j") if row["answer"]["text"] is not None]
    assert [row["key"] for row in kept] == [f"q{i}" for i in range(6)]


def test_refusals_of_single_prompts_do_not_end_a_run(tmp_path):
    """More of them in a row than a dead server is given, but something has succeeded before."""
    behave = lambda handler, payload, times: handler.fine(payload, 0) if payload["seed"] in (0, 79) else handler.send(
        400, b'{"message": "too long"}')
    with serving(behave) as server:
        found = answers(Endpoint(server.url), asks(80), tmp_path / "j", threads=1)
    assert [a.failure for a in found] == [""] + ["400 Bad Request: too long"] * 78 + [""]


def test_failures_with_answers_between_them_do_not_end_a_run(tmp_path):
    """A server that manages one ask in ten, however often one asks."""
    with serving(lambda handler, payload, times: status(500 if payload["seed"] % 10 else 200, whole(payload))(
            handler, payload)) as server:
        found = answers(Endpoint(server.url), asks(100), tmp_path / "j", threads=1, retries=0)
    assert [a.text is None for a in found] == [i % 10 > 0 for i in range(100)]


def test_a_bug_in_a_thread_is_an_error_here(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint.Connection, "post", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        answers(Endpoint("http://localhost:1/v1#m"), asks(5), tmp_path / "j")


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"timeout": 0}, {"retries": -1}])
def test_settings_of_sending(wrong, tmp_path):
    refusal(lambda: answers(Endpoint("http://localhost:1/v1#m"), asks(1), tmp_path / "j", **wrong), "threads >= 1")


# --- the key, and TLS ---

@pytest.mark.parametrize("echo", [
    status(400, json.dumps({"error": {"message": f"key {SECRET} may not"}}).encode()),
    status(400, json.dumps({"error": {"code": SECRET}}).encode()),
    status(400, f"<html> {' ' * 200}Bearer {SECRET}".encode()), status(400, (" " * 3993 + SECRET).encode()),
    status(400, ("x" * 295 + SECRET).encode()),
    status(200, json.dumps({"error": SECRET}).encode()), broken(f"HTTP/1.1 {SECRET}\r\n\r\n".encode()),
    lambda handler, payload: handler.send(200, whole(payload, f"Your key is {SECRET}."))])
def test_the_key_is_sent_and_nothing_else(echo, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(endpoint.KEY, f" {SECRET}\n")
    rows = [{"id": f"q{i}", "language": "ar", "prompt": f"سؤال {i}"} for i in range(3)]
    with serving(lambda handler, payload, times: echo(handler, payload) if "1" in payload["messages"][0]["content"]
                 else handler.fine(payload, times)) as server:
        line = refusal(lambda: complete(server.url, rows, tmp_path / "j", 30, threads=1, retries=1), "1 of 3 asks")
    assert {headers["Authorization"] for _, _, headers in server.seen} == {f"Bearer {SECRET}"}
    shown = capsys.readouterr()
    for text in (line, shown.out, shown.err, (tmp_path / "j").read_text(encoding="utf-8")):
        assert SECRET[:6] not in text and SECRET[-6:] not in text


def test_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    with serving() as server:
        answers(Endpoint(server.url), asks(1), tmp_path / "j")
    assert server.seen[0][2]["Authorization"] is None
    for key in ("sk-a\nX-Header: b", "sk-é", 'sk-"a'):
        monkeypatch.setenv(endpoint.KEY, key)
        assert "sk-" not in refusal(lambda: Endpoint("http://localhost/v1#m"), endpoint.KEY)
    monkeypatch.setenv(endpoint.KEY, SECRET)
    with serving(lambda handler, payload, times: handler.send(401, b"")) as server:
        refusal(lambda: answers(Endpoint(server.url), asks(1), tmp_path / "j2"), f"({endpoint.KEY} is set)")


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate")
def test_tls_is_verified(tmp_path, monkeypatch):
    """A certificate that nobody signed is refused before anything is sent, and accepted where it is an authority."""
    pem = tmp_path / "both.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=x",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", pem, "-out", tmp_path / "c.pem"],
                   check=True, capture_output=True)
    pem.write_bytes(pem.read_bytes() + (tmp_path / "c.pem").read_bytes())
    with serving(certificate=pem) as server:
        refusal(lambda: answers(Endpoint(server.url), asks(9), tmp_path / "j"), "certificate is not trusted: self")
        assert not server.seen
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "c.pem"))
        assert answers(Endpoint(server.url), asks(9), tmp_path / "j", threads=2) == [expected(a) for a in asks(9)]
        assert server.connections <= 2 + 16  # those that were refused, and one a thread
        wrong_name = server.url.replace("127.0.0.1", "localhost")
        refusal(lambda: answers(Endpoint(wrong_name), asks(1), tmp_path / "j3"), "certificate is not trusted")


# --- the journal ---

def test_every_answer_is_on_disk_before_the_next_ask(tmp_path, monkeypatch):
    synced, lines = [], []
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(1) or plain(fd))

    def behave(handler, payload, times):
        lines.append(((tmp_path / "j").read_bytes().count(b"\n"), len(synced)))
        handler.fine(payload, times)
    with serving(behave) as server:
        answers(Endpoint(server.url), asks(6), tmp_path / "j", threads=1)
    assert [n for n, _ in lines] == list(range(6)) and [s - lines[0][1] for _, s in lines] == list(range(6))


def test_no_answer_counts_before_it_is_on_a_slow_disk(tmp_path, monkeypatch):
    plain = asking.Journal.add
    monkeypatch.setattr(asking.Journal, "add", lambda *args: time.sleep(0.1) or plain(*args))
    with serving() as server:
        answers(Endpoint(server.url), asks(8), tmp_path / "j", threads=8)
    assert {row["key"] for row in read(tmp_path / "j")} == {a.key for a in asks(8)}


def test_a_journal_answers_only_what_it_was_asked(tmp_path):
    """Another message, key, setting, model or server is another ask; the same one is asked once, whoever asks."""
    base = dict(key="q", messages=[{"role": "user", "content": "a"}], max_tokens=30, temperature=0.0, top_p=1.0, seed=0)
    others = [{"key": "r"}, {"messages": [{"role": "user", "content": "b"}]}, {"max_tokens": 31}, {"temperature": 0.5},
              {"messages": [{"role": "system", "content": "a"}]}, {"top_p": 0.9}, {"seed": 1}]
    with serving() as server, serving() as second:
        for n, change in enumerate([{}, *others], 1):
            answers(Endpoint(server.url), [Ask(**base | change)], tmp_path / "j")
            assert len(server.seen) == n, change
        answers(Endpoint(server.url + "2"), [Ask(**base)], tmp_path / "j")
        answers(Endpoint(second.url), [Ask(**base)], tmp_path / "j")
        assert (len(server.seen), len(second.seen)) == (9, 1)
        everything = [Ask(**base | change) for change in [{}, *others, {}]]  # the first one twice
        found = answers(Endpoint(server.url), everything, tmp_path / "j")
        assert found == [expected(a) for a in everything] and len(server.seen) == 9


@pytest.mark.parametrize("torn", [b'{"digest": "', '{"digest": "a", "key": "é'.encode()[:-1], b"\0\0\0", b""])
def test_a_torn_last_line_is_dropped(torn, tmp_path):
    with serving() as server:
        answers(Endpoint(server.url), asks(3), tmp_path / "j", threads=1)
        good = (tmp_path / "j").read_bytes()
        (tmp_path / "j").write_bytes(good + torn if torn else good[:-1])  # the last one: only its line break is missing
        found = answers(Endpoint(server.url), asks(5), tmp_path / "j")
        assert found == [expected(a) for a in asks(5)] and set(server.count.values()) == {1}
    assert (tmp_path / "j").read_bytes().startswith(good) and len(read(tmp_path / "j")) == 5


def test_a_full_disk(tmp_path):
    with serving() as server, tiny.largest_file(1500):
        refusal(lambda: answers(Endpoint(server.url), asks(100), tmp_path / "j", threads=4), f"cannot write {tmp_path}")
        assert len(server.seen) < 20
    kept = (tmp_path / "j").read_bytes().count(b"\n")
    assert kept >= 2 and len(asking.Journal(tmp_path / "j").kept) == kept


# --- completions ---

PROMPTS = ["three", "ثلاثة", [{"role": "system", "content": "short"}, {"role": "user", "content": "तीन"}], "三", "three"]
ROWS = [{"id": i, "language": "en", "prompt": p} for i, p in zip(("a", "b", "c", "d", "a"), PROMPTS)]


def test_seeds_are_stable():
    """The same on every machine, and spread over all that a server takes."""
    assert draw_seed(0, "a/0", 0) == 0x8199885D >> 1  # printf '[0, "a/0", 0]' | sha256sum
    assert draw_seed(0, "a/0", 1) == 0x67D63BD3 >> 1 and draw_seed(1, "é/0", 0) == 0x4E9FB4C3 >> 1
    drawn = {draw_seed(s, f"{p}/0", k) for s in range(5) for p in range(20) for k in range(5)}
    assert len(drawn) == 500 and 0 <= min(drawn) < 2**26 and 2**31 - 2**26 < max(drawn) < 2**31


def test_completions_do_not_depend_on_threads_or_on_other_rows(tmp_path):
    with serving() as server:
        one = complete(server.url, ROWS, tmp_path / "1", 20, 0.8, 0.9, samples=3, seed=4, threads=1)
        assert len(server.count) == len(server.seen) == 15  # a/0 and a/1 ask the same, with other seeds
        many = complete(server.url, ROWS, tmp_path / "2", 20, 0.8, 0.9, samples=3, seed=4, threads=8)
        assert many == one and set(server.count.values()) == {2}
        fewer = complete(server.url, ROWS[:1] + ROWS[2:], tmp_path / "1", 20, 0.8, 0.9, samples=3, seed=4)
        assert fewer == one[:3] + one[6:] and len(server.seen) == 30  # all from the journal
        complete(server.url, ROWS, tmp_path / "1", 20, 0.8, 0.9, samples=3, seed=5)
        assert len(server.seen) == 45
    assert [(r["id"], r["sample"], r["prompt"]) for r in one] == [
        (r["id"], k, r["prompt"]) for r in ROWS for k in range(3)]
    seen = {json.dumps(payload["messages"]) for _, payload, _ in server.seen}
    assert seen == {json.dumps(p if isinstance(p, list) else [{"role": "user", "content": p}]) for p in PROMPTS}


def main(server, tmp_path, **settings):
    tiny.write(tmp_path / "prompts.jsonl", ROWS)
    generate.main(generate.Config(**{"model": server.url, "prompts": str(tmp_path / "prompts.jsonl"), "out": str(
        tmp_path / "deep" / "out.jsonl"), "max_new_tokens": 20} | settings))
    return read(tmp_path / "deep" / "out.jsonl")


def test_generate(tmp_path, capsys):
    def behave(handler, payload, times):
        text = "" if payload["messages"][-1]["content"] == "三" else None
        handler.send(200, whole(payload, text, "length" if "ثلاثة" in payload["messages"][-1]["content"] else "stop"))
    with serving(behave) as server:
        rows = main(server, tmp_path, samples=2, temperature=0.8, top_p=0.9, seed=3, threads=2)
    assert [list(r) for r in rows] == [["id", "language", "prompt", "completion", "teacher", "sample", "ended", "tokens"]] * 10
    assert all(r["tokens"] == 7 for r in rows)
    assert [(r["id"], r["sample"]) for r in rows] == [(i, k) for i in "abcda" for k in range(2)]
    assert [r["prompt"] for r in rows[::2]] == PROMPTS and {r["teacher"] for r in rows} == {"my/model"}
    assert [r["ended"] for r in rows] == [r["id"] != "b" for r in rows]
    assert all((r["completion"] == "") == (r["id"] == "d") for r in rows)
    assert rows[1]["completion"] == f"{SCRIPTS} three 1 {[0.8, 0.9, 20, draw_seed(3, 'a/0', 1)]}"
    assert {payload["temperature"] for _, payload, _ in server.seen} == {0.8}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.jsonl"]
    assert f"10 completions of 5 prompts -> {tmp_path}/deep/out.jsonl (2 cut off at 20 tokens) (2 empty)" in (
        capsys.readouterr().out)


def test_generate_with_failures(tmp_path):
    """How many and why; the output appears when all are there, and what was answered is not asked again."""
    broken_now = [True]

    def behave(handler, payload, times):
        bad = broken_now[0] and payload["messages"][-1]["content"] in ("ثلاثة", "三")
        handler.send(400 if bad else 200, b'{"message": "no"}' if bad else whole(payload))
    with serving(behave) as server:
        refusal(lambda: main(server, tmp_path), f"2 of 5 asks of {server.url} failed: 2 x 400 Bad Request: no",
                "deep/out.jsonl.journal keeps")
        assert not (tmp_path / "deep" / "out.jsonl").exists() and (tmp_path / "deep" / "out.jsonl.journal").exists()
        broken_now[0] = False
        assert [r["id"] for r in main(server, tmp_path)] == list("abcda")
        assert len(server.seen) == 7 and not list(tmp_path.glob("deep/*.journal"))


@pytest.mark.parametrize("settings, words", [
    ({"prompts": None}, "give --prompts FILE"), ({"languages": ["de"]}, "no prompt in de"),
    ({"temperature": -1.0}, "temperature >= 0"), ({"top_p": 0.0}, "top_p"), ({"samples": 0}, "samples >= 1"),
    ({"model": "http://localhost:1#m"}, "not an endpoint's address")])
def test_refusals(settings, words, tmp_path, monkeypatch):
    with serving() as server:
        refusal(lambda: main(server, tmp_path, **settings), words)
        monkeypatch.setenv("WORLD_SIZE", "2")
        refusal(lambda: main(server, tmp_path), "without torchrun")
    assert not server.seen and not (tmp_path / "deep" / "out.jsonl").exists()


def test_killed_interrupted_and_run_again(tmp_path):
    """kill -9 in the middle, then Ctrl-C while the server is silent, then to the end: as if nothing had happened."""
    rows = [{"id": f"q{i}", "language": "hi", "prompt": f"प्रश्न {i}"} for i in range(60)]
    tiny.write(tmp_path / "prompts.jsonl", rows)
    out, journal, asleep = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal", threading.Event()
    silent_after = [10**9]

    def behave(handler, payload, times):
        if len(handler.server.seen) > silent_after[0]:
            asleep.set()
            time.sleep(30)
        time.sleep(0.01)
        handler.fine(payload, times)
    words = ["--prompts", tmp_path / "prompts.jsonl", "--out", out, "--samples", "2", "--temperature", "0.8",
             "--max_new_tokens", "20", "--threads", "3"]
    lines = lambda: journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    kept = lambda: [json.loads(line)["key"] for line in lines()]

    def start(server):
        # a suite in the background of a shell ignores Ctrl-C, and its children would
        listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([sys.executable, "generate.py", "--model", server.url, *map(str, words)], cwd=tiny.ROOT,
                                env=tiny.environment(), stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    with serving(behave) as server:
        process = start(server)
        while len(kept()) < 30:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.kill()
        process.wait()
        first, asked = kept(), len(server.seen)
        assert not out.exists() and 30 <= len(first) <= asked <= len(first) + 3 and asked < 110
        journal.write_bytes(journal.read_bytes() + b'{"digest": "torn')

        silent_after[0] = asked + 30
        process = start(server)
        assert asleep.wait(60)
        time.sleep(0.1)
        begin = time.time()
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
        assert time.time() - begin < 15 and process.returncode == 1 and "Traceback" not in shown
        second = kept()
        assert second[:len(first)] == first and len(second) == len(first) + 30
        assert f"error: stopped; {len(second)} of 120 answers are kept in {journal}" in shown
        at_stop, seed = dict(server.count), lambda key: draw_seed(0, key.rpartition("/")[0], int(key[-1]))
        assert {n for (_, s), n in at_stop.items() if s in map(seed, first)} == {1}
        assert sum(n > 1 for n in at_stop.values()) <= 3  # the three that were under way at the kill

        silent_after[0] = 10**9
        main_again = generate.Config(model=server.url, prompts=str(words[1]), out=str(out), samples=2, temperature=0.8,
                                     max_new_tokens=20, threads=3)
        generate.main(main_again)
        made, again = out.read_bytes(), {s for (x, s), n in server.count.items() if n != at_stop.get((x, s), 1)}
        assert not journal.exists() and len(server.count) == 120
        assert len(again) <= 3 and not again & set(map(seed, second))
    with serving() as other:  # undisturbed
        main_again.model, main_again.out = other.url, str(tmp_path / "undisturbed.jsonl")
        generate.main(main_again)
        assert made == (tmp_path / "undisturbed.jsonl").read_bytes() and set(other.count.values()) == {1}


def test_a_pool_with_an_endpoint(tmp_path, waits):
    """arbitrage.py with a folder and a URL: what is missing is said before anything is asked; rewards as for any teacher."""
    tiny.make_checkpoint(tmp_path / "north", 0)
    with atomic_dir(tmp_path / "rm") as folder:
        write_reward_model(folder, new_reward_model(tmp_path / "north"), tmp_path / "north")
    prompts = [{"id": f"q{i}", "language": "ar", "prompt": p} for i, p in enumerate(["three", "ثلاثمائة", "347"])]
    cfg = {"prompts": tiny.write(tmp_path / "prompts.jsonl", prompts), "reward_model": str(tmp_path / "rm"),
           "samples": 2, "temperature": 0.7, "max_new_tokens": 12, "out": str(tmp_path / "out/"), "seed": 6, "guards": ["empty"]}
    with serving() as server:
        teachers = [server.url, str(tmp_path / "north")]
        refusal(lambda: arbitrage.main(arbitrage.Config(teachers=[server.url, str(tmp_path / "none")], **cfg)), "none")
        assert not server.seen and not list(tmp_path.glob("out*"))
        arbitrage.main(arbitrage.Config(teachers=teachers, **cfg))
        assert len(server.seen) == 6 and not (tmp_path / "out.unfinished").exists()
        of_server = complete(server.url, prompts, tmp_path / "j", 12, 0.7, samples=2, seed=6)
    rows = read(tmp_path / "out" / "completions.jsonl")
    assert [{k: v for k, v in r.items() if k not in ("flags", "reward")} for r in rows if r["teacher"] == "my/model"] == of_server
    assert [r["teacher"] for r in rows] == ["my/model", "my/model", "north", "north"] * 3
    pairs = [(r["prompt"], r["completion"]) for r in rows]
    rewards = score(load_reward_model(tmp_path / "rm"), Chat(tmp_path / "rm"), pairs)
    assert [r["reward"] for r in rows] == pytest.approx(rewards, abs=1e-3)


def test_a_round_of_online_dpo_through_a_server(tmp_path):
    """README's loop: samples of a server, their rewards, best against worst, and a step of DPO on those pairs."""
    tiny.make_checkpoint(tmp_path / "north", 0)
    with atomic_dir(tmp_path / "rm") as folder:
        write_reward_model(folder, new_reward_model(tmp_path / "north"), tmp_path / "north")
    answered = lambda handler, payload, times: handler.send(200, whole(payload, f"{payload['seed'] % 97} cent"))
    with serving(answered) as server:
        samples = main(server, tmp_path, samples=8, temperature=0.8)
    scored, pairs = str(tmp_path / "scored.jsonl"), tmp_path / "pairs" / "pairs.jsonl"
    reward.main(reward.Config(model=str(tmp_path / "rm"), rows=str(tmp_path / "deep" / "out.jsonl"), out=scored))
    arbitrage.main(arbitrage.Config(completions=[scored], guards=["truncated", "empty"], out=str(tmp_path / "pairs")))
    rewards = {(r["id"], r["completion"]): r["reward"] for r in read(tmp_path / "scored.jsonl")}
    assert len(rewards) > 24 and len(samples) == 40 and [r["id"] for r in read(pairs)] == list("abcd")
    for r in read(pairs):
        of_prompt = [x for (i, _), x in rewards.items() if i == r["id"]]
        assert (rewards[r["id"], r["chosen"]], rewards[r["id"], r["rejected"]]) == (max(of_prompt), min(of_prompt))
    train_dpo.main(train_dpo.Config(model=str(tmp_path / "north"), pairs=[str(pairs)], out=str(tmp_path / "dpo"),
                                    max_steps=1, batch_size=4))
    assert (tmp_path / "dpo" / "model.safetensors").exists()
