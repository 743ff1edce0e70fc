"""
The client of an OpenAI-compatible endpoint: vLLM's server, or any other that answers POST .../v1/chat/completions.

`http://localhost:8000/v1#my-model` names a model: the address, then the name under which the server knows it. This file
is one request, and all that servers and networks do wrong with it: each becomes a Failure that says whether another try
may help. asking.py tries again, asks many at once and keeps the answers.

The key, if the server wants one, is read from NANOAYA_API_KEY and goes nowhere but into the request's header. TLS is
verified (SSL_CERT_FILE names other authorities), redirects are not followed, and nothing in a response is believed.
"""

import email.utils
import http.client
import json
import os
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from common import die

KEY = "NANOAYA_API_KEY"  # a name of our own: the key of another service is not sent to a server by accident
CONNECT_SECONDS = 10
MOST_BYTES = 16 * 2**20  # of a response: an answer of 256 thousand tokens is some 1 MB
LONGEST_WAIT = 60.0  # seconds before another try, whatever the server asks for


def is_endpoint(name):
    """Is this name of a model an endpoint's, and not a folder's or the hub's?"""
    return "://" in str(name)


@dataclass(frozen=True)
class Ask:
    key: str  # names the ask in the journal; two samples of one prompt have two keys
    messages: list  # of {"role", "content"}
    max_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0  # of the server's draws
    min_p: float = 0.0  # not every server knows it (vLLM does): sent only if it is not 0
    stop: tuple = ()  # strings that end the text, which then ends before them


@dataclass(frozen=True)
class Answer:
    text: str | None = None  # None: the ask failed
    ended: bool = False  # the model ended it (finish_reason "stop"), it was not cut off
    prompt_tokens: int | None = None  # as the server counts them; None: it did not say
    completion_tokens: int | None = None
    failure: str = ""  # why there is no text


class Failure(Exception):
    """A try without an answer. `again`: another may succeed. `everyone`: other asks would fail the same way."""

    def __init__(self, reason, again, everyone=False, wait=None):
        super().__init__(reason)
        self.again, self.everyone, self.wait = again, everyone, wait  # wait: seconds the server asks for, or None


class Endpoint:
    """`url`: http(s)://host:port/v1#model. The key is read here, once; a bad form is one line."""

    def __init__(self, url):
        self.url, mark, self.model = url.partition("#")
        if "@" in self.url or "?" in self.url:  # not shown: it may hold a secret
            die(f"an endpoint's address has no user, password or query in it; put the key into {KEY}")
        try:
            parts = urlsplit(self.url)
            self.host, self.port, self.path = parts.hostname, parts.port, parts.path.rstrip("/") + "/chat/completions"
        except ValueError as e:  # a port that is no number, half of an IPv6 address
            die(f"{url}: {e}; an endpoint is http(s)://host:port/v1#model")
        if not mark or not self.model.strip():
            die(f"{url} names no model; an endpoint is http(s)://host:port/v1#model")
        clean = self.url.isascii() and self.url.isprintable() and " " not in self.url
        if parts.scheme not in ("http", "https") or not self.host or not parts.path or not clean:
            die(f"{url} is not an endpoint's address, http(s)://host:port/v1#model")
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.secret = os.environ.get(KEY, "").strip()
        if not (self.secret.isascii() and self.secret.isprintable()) or set(self.secret) & set(" \"\\"):  # hide()
            die(f"{KEY} holds a character that no key has: a line break, a space, a quote ...")

    def hide(self, text):
        """Words of a server or a library as one short printable line without the key."""
        text = (text.replace(self.secret, "[key]") if self.secret else text)[:4000]  # cut first, half of it would show
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= 300 else text[:300] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# one try

class Connection:
    """A kept-alive connection, of one thread; it is made, or made again, when something is to be sent."""

    def __init__(self, endpoint, timeout):
        self.endpoint, self.timeout, self.http = endpoint, timeout, None  # timeout: seconds for a whole response

    def close(self):
        if self.http:
            self.http.close()
        self.http = None

    def post(self, payload):
        """JSON as bytes -> (status, headers, body as bytes). Raises OSError, HTTPException; Failure if it is long."""
        to, begin = self.endpoint, time.monotonic()
        if self.http is None:
            tls = {"context": to.tls} if to.tls else {}
            make = http.client.HTTPSConnection if to.tls else http.client.HTTPConnection
            self.http = make(to.host, to.port, timeout=CONNECT_SECONDS, **tls)
        if self.http.sock is None:  # new, or the server said that it would close it
            self.http.connect()
            self.http.sock.settimeout(self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "nanoaya"}
        if to.secret:
            headers["Authorization"] = f"Bearer {to.secret}"
        self.http.request("POST", to.path, payload, headers)
        with self.http.getresponse() as response:
            body = bytearray()
            while piece := response.read1(65536):
                body += piece
                if len(body) > MOST_BYTES:
                    raise Failure(f"the response is longer than {MOST_BYTES} bytes", again=True)
                if time.monotonic() - begin > self.timeout:  # it trickles: every piece is in time, the whole is not
                    raise TimeoutError("timed out")
            if response.length:  # what Content-Length promised and read1() did not miss
                raise http.client.IncompleteRead(bytes(body), response.length)
            return response.status, response.headers, bytes(body)

    def answer(self, ask):
        """One try of an ask -> Answer. Raises Failure."""
        to = self.endpoint
        payload = {"model": to.model, "messages": ask.messages, "max_tokens": ask.max_tokens,
                   "temperature": ask.temperature, "top_p": ask.top_p, "seed": ask.seed, "n": 1, "stream": False}
        payload |= ({"min_p": ask.min_p} if ask.min_p else {}) | ({"stop": list(ask.stop)} if ask.stop else {})
        try:
            status, headers, body = self.post(json.dumps(payload).encode("ascii"))
        except ssl.SSLCertVerificationError as e:
            raise Failure(f"its certificate is not trusted: {e.verify_message}", again=False, everyone=True) from e
        except (ConnectionRefusedError, socket.gaierror, UnicodeError) as e:  # the last: a name like a..b
            raise Failure(f"no server there ({getattr(e, 'strerror', e)})", again=True, everyone=True) from e
        except TimeoutError as e:
            raise Failure(f"no answer in time ({CONNECT_SECONDS} s to connect, {self.timeout:g} s for all of it)",
                          again=True) from e
        except (OSError, http.client.HTTPException) as e:
            raise Failure(f"the connection broke ({to.hide(str(e)) or type(e).__name__})", again=True) from e
        if 200 <= status < 300:
            return self.read(body)
        reason = f"{status} {http.client.responses.get(status, '')}".strip() + (f": {said}" if (
            said := to.hide(message(body))) else "")
        if 300 <= status < 400:
            raise Failure(f"{reason} (redirects are not followed: give the address itself)", again=False, everyone=True)
        if status == 401:
            reason += f" ({KEY} is {'set' if to.secret else 'not set'})"
        if status == 404:
            reason += f" (does the address end in /v1, and does it serve a model {to.model!r}?)"
        raise Failure(reason, status == 429 or status >= 500, status in (401, 404), retry_after(headers))

    def read(self, body):
        """A response's bytes -> Answer; raises Failure for whatever is not what it should be."""
        try:
            reply = json.loads(body.decode("utf-8"))
        except (ValueError, RecursionError) as e:  # [[[[... nested thousands deep
            raise Failure(f"the response is not JSON ({len(body)} bytes)", again=True) from e
        try:
            choice = reply["choices"][0]
            text, finish, usage = choice["message"]["content"], choice["finish_reason"], reply.get("usage")
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            said = self.endpoint.hide(message(body))
            raise Failure("the response holds no answer" + (f": {said}" if said else ""), again=True) from e
        if not isinstance(text, str) or not isinstance(finish, str):
            raise Failure(f"content and finish_reason should be strings, not {type(text).__name__} and "
                          f"{type(finish).__name__}", again=True)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise Failure("the answer holds half of a character", again=True) from e
        if self.endpoint.secret and self.endpoint.secret in text:
            raise Failure(f"the answer repeats the key, which is written nowhere (unset {KEY} if none is needed)",
                          again=False)
        usage = usage if isinstance(usage, dict) else {}
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        return Answer(text, finish == "stop", *(n if type(n) is int and n >= 0 else None for n in counts))


def message(body):
    """What a server's error says: its "message", wherever servers put it, or the first words of what is not JSON."""
    try:
        said = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        return body.decode("utf-8", errors="replace")
    for name in ("error", "message", "detail"):  # {"error": {"message"}}, {"error": "..."}, {"message"}, {"detail"}
        said = said.get(name, said) if isinstance(said, dict) else said
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)


def retry_after(headers):
    """Seconds that the server asks to wait for (it may say a date, RFC 9110, 10.2.3) -> 0 to LONGEST_WAIT, or None."""
    text = headers.get("Retry-After", "").strip()
    try:
        seconds = float(text) if text.isdecimal() else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, min(LONGEST_WAIT, seconds))
