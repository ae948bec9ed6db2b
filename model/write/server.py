"""The page over HTTP, for the browser of this machine: nothing is stored, and no other site may ask.

GET /          the page
GET /models    {"models": [{"name", "longest"}], "temperature": [least, most]}
POST /continue {"text", "model", "temperature", "length", "seed"} -> one JSON object a line, as they come:
               {"before"}, {"read", "left_out"}, {"row", "text"} ..., {"end"} or {"error"}

A page of another origin cannot ask: its Origin, its Sec-Fetch-Site or its Content-Type says so. A name that somebody
has pointed at this machine (DNS rebinding) is refused by the Host header: it must be the address that the connection
came in on, localhost, or the --host that was given. Closing the connection cancels what it asked for.
"""

import ipaddress
import json
import secrets
import select
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from model.write.writer import Busy, Job, Request, Writer

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 1 << 20  # of a request
TEMPERATURES = (0.1, 2.0)
LOOKS = 0.1  # seconds between looks at whether the reader is still there
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server(ThreadingHTTPServer):
    """host: a name or an address, IPv4 or IPv6. port: 0 for a free one. Raises OSError where it cannot be had."""

    daemon_threads = True

    def __init__(self, host: str, port: int, writer: Writer) -> None:
        self.host, self.writer = host, writer
        self.page = PAGE.read_text(encoding="utf-8")
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        super().__init__(address[:2], Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """As HTTPServer's, without its search for the machine's name, which can take seconds."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/"


class Refused(Exception):
    """A request that is answered by an error: its status, and what is required."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30  # seconds for a request to come, or a reply to go

    def do_GET(self) -> None:
        try:
            self._check_origin()
            if self.path == "/":
                nonce = secrets.token_urlsafe(16)
                self._start(HTTPStatus.OK, "text/html; charset=utf-8", POLICY.format(nonce=nonce))
                self.wfile.write(self.server.page.replace("{nonce}", nonce).encode())
            elif self.path == "/models":
                speakers = self.server.writer.speakers
                models = [{"name": name, "longest": speaker.longest} for name, speaker in speakers.items()]
                self._start(HTTPStatus.OK, "application/json")
                self._tell({"models": models, "temperature": TEMPERATURES})
            else:
                raise Refused(HTTPStatus.NOT_FOUND, "the page is at /")
        except Refused as refusal:
            self._refuse(refusal)
        except OSError:
            pass  # the reader is gone

    def do_POST(self) -> None:
        try:
            self._check_origin()
            if self.path != "/continue":
                raise Refused(HTTPStatus.NOT_FOUND, "POST goes to /continue")
            if self.headers.get_content_type() != "application/json":
                raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type: application/json is required")
            job = self._ask(self._body())
        except Refused as refusal:
            self._refuse(refusal)
            return
        except OSError:
            return
        try:
            self._start(HTTPStatus.OK, "application/x-ndjson")
            self._stream(job)
        except OSError:
            pass
        finally:
            job.cancel()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is stored, nor told to the terminal."""

    def _check_origin(self) -> None:
        host = self.headers.get("Host", "")
        if not self._is_ours(host):
            raise Refused(HTTPStatus.FORBIDDEN, f"the page is at {self.server.url}, not at another name")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, "another origin may not ask")
        # A link from elsewhere may lead to the page; nothing else from elsewhere may be loaded.
        is_link = self.command == "GET" and self.path == "/" and self.headers.get("Sec-Fetch-Mode") == "navigate"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and not is_link:
            raise Refused(HTTPStatus.FORBIDDEN, "another site may not ask")

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server: name, or address, and port."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        if port != self.server.server_port or parts.netloc != host or "@" in host:
            return False
        local = _address(self.connection.getsockname()[0])
        if name == "localhost":
            return local is not None and local.is_loopback
        return name == self.server.host.lower() or (local is not None and _address(name) == local)

    def _body(self) -> bytes:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is required") from None
        if not 0 <= length <= MOST_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {MOST_BYTES} bytes")
        return self.rfile.read(length)

    def _ask(self, body: bytes) -> Job:
        try:
            return self.server.writer.ask(read_request(body, self.server.writer))
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        except Busy as error:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None

    def _stream(self, job: Job) -> None:
        event: dict | None = {}
        while event is None or not event.keys() & {"end", "error"}:
            event = job.next(LOOKS)
            if self._is_alone():
                return
            if event is not None:
                self._tell(event)

    def _is_alone(self) -> bool:
        """Whether the other side has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _start(self, status: HTTPStatus, kind: str, policy: str = "default-src 'none'") -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Security-Policy": policy, **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()

    def _tell(self, event: object) -> None:
        self.wfile.write(json.dumps(event).encode() + b"\n")  # in ASCII: whatever a model says is a valid line
        self.wfile.flush()

    def _refuse(self, refusal: Refused) -> None:
        try:
            self._start(refusal.status, "application/json")
            self._tell({"error": str(refusal)})
        except OSError:
            pass


def read_request(body: bytes, writer: Writer) -> Request:
    """The request of a JSON body, its fields checked; a seed where it has none. Raises ValueError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the request is not JSON in UTF-8") from None
    names = {"text", "model", "temperature", "length"}
    if not isinstance(fields, dict) or not names <= fields.keys() <= names | {"seed"}:
        raise ValueError("an object with text, model, temperature, length and perhaps seed is required")
    text, model, temperature, length = (fields[name] for name in ("text", "model", "temperature", "length"))
    seed = fields.get("seed", secrets.randbits(32))
    if not isinstance(text, str):
        raise ValueError("text must be a string")
    if not isinstance(model, str) or model not in writer.speakers:
        raise ValueError(f"model must be one of {', '.join(writer.speakers)}")
    least, most = TEMPERATURES
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not least <= temperature <= most:
        raise ValueError(f"temperature must be a number from {least} to {most}")
    longest = writer.speakers[model].longest
    if not _is_whole(length) or not 1 <= length <= longest:
        raise ValueError(f"length must be a whole number of tokens from 1 to {longest}")
    if not _is_whole(seed) or not 0 <= seed < 1 << 32:
        raise ValueError("seed must be a whole number from 0 to 2^32 - 1")
    return Request(text, model, float(temperature), length, seed)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None
