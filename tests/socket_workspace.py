"""A Databricks workspace that stands still for tests: a REST service on a real socket, which the SDK's own client asks.

A test's service says what it answers; what it reads and writes, it reads and writes with the SDK's own classes, so a
field that the API does not know is found. It can also fail as a service does: say no, or break the connection after it
has done what it was asked.
"""
import contextlib, json, os, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from databricks.sdk import WorkspaceClient
from databricks.sdk.core import Config

MISSING = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "It does not exist."}
BREAKS = "carry it out, and break the connection"


class SocketWorkspace:
    "What a service was asked, and how it is to fail."
    prefix = "/api/2.0/"

    def __init__(self):
        self.asked = []                                 # (method, path, query, body) of each request
        self.refuse = []  # one entry a request, from the next on: (status, headers), BREAKS, or None for an answer

    def answer(self, method, path, query, body): raise NotImplementedError

    def requests(self, ending): return [body for method, path, query, body in self.asked if f"{method} {path}".endswith(ending)]


def strict(kind, body: dict):
    "A body as an object of the SDK; fails if it holds what the API does not know."
    read = kind.from_dict(body)
    assert read.as_dict() == body, f"{kind.__name__} does not hold {body}"
    return read


@contextlib.contextmanager
def on_a_socket(state: SocketWorkspace, monkeypatch):
    "Serve it, and give it a `client`; nothing of the machine's own Databricks configuration is used."
    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
        def log_message(self, *args): pass

        def reply(self):
            size = int(self.headers.get("Content-Length") or 0)
            body, address = self.rfile.read(size) if size else None, urlsplit(self.path)
            if body and "json" in self.headers.get("Content-Type", ""): body = json.loads(body)
            state.authorization = self.headers.get("Authorization", "")
            headers, path = {}, unquote(address.path)
            if not path.startswith(state.prefix): status, answer = 404, {}          # the SDK looks for the host's metadata
            else:
                state.asked.append((self.command, path, parse_qs(address.query), body))
                how = state.refuse.pop(0) if state.refuse else None
                if how in (None, BREAKS): status, answer = state.answer(self.command, path, parse_qs(address.query), body)
                else: status, headers, answer = *how, {"error_code": "SAID_NO", "message": "The service says no."}
                if how == BREAKS:
                    self.close_connection = True
                    return self.connection.close()
            content = json.dumps(answer).encode()
            self.send_response(status)
            for key, value in (headers | {"Content-Type": "application/json", "Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)
        do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = reply

    for key in [k for k in os.environ if k.startswith("DATABRICKS_")]: monkeypatch.delenv(key)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", os.devnull)
    monkeypatch.setattr("databricks.sdk.retries.random", lambda: 0)                 # its jitter, up to a second
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None                                           # connections that break are meant to
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.host = f"http://127.0.0.1:{server.server_port}"
    state.client = WorkspaceClient(config=Config(host=state.host, token="x", retry_timeout_seconds=5))
    try: yield state
    finally: server.shutdown(); server.server_close()
