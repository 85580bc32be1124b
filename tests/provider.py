"""A paid provider that stands still for tests: OpenAI's chat protocol on a real socket, with every fault that such a provider has."""
import contextlib, json, socket, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATUS = {
    "400": (400, "This model's maximum context length is 2048 tokens."), "401": (401, "Incorrect API key provided."),
    "403": (403, "Your organisation may not use this model."), "404": (404, "The model does not exist."),
    "429": (429, "Rate limit reached."), "429-after": (429, "Rate limit reached."),
    "500": (500, "The server had an error."), "503": (503, "The engine is overloaded."),
}
FAULTS = (*STATUS, "hang", "hang-mid-stream", "cut-json", "html", "empty-choices", "null-content", "length", "close")


class Provider:
    "Answers `answer` as `model`; `fault` makes every request fail in that way, `faults` the next ones in turn."
    def __init__(self, model="acme-large", answer="Use `mlflow.log_metric` [1]. It logs a metric.", key="sk-right", pace=0.0):
        self.model, self.answer, self.key, self.pace, self.fault, self.faults, self.asked, self.released = (
            model, answer, key, pace, None, [], [], threading.Event(),
        )
        self.answer_to = lambda text: self.answer   # from the text of the request

    @property
    def url(self): return f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        provider = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
            def log_message(self, *args): pass
            def do_POST(self): provider.reply(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *args): pass             # a client that gave up
        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.released.set()                         # those who hang may go
        self.server.shutdown(); self.server.server_close()

    def send(self, handler, status, content, kind="application/json", headers={}, length=None):
        content = content.encode() if isinstance(content, str) else content
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(length or len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def reply(self, handler, body):
        fault = self.faults.pop(0) if self.faults else self.fault
        self.asked.append(
            dict(
                body=body, path=handler.path, fault=fault, at=time.monotonic(),
                headers={name.lower(): value for name, value in handler.headers.items()},
            )
        )
        if handler.headers.get("Authorization") != f"Bearer {self.key}" and self.key: fault = "401"
        if fault in STATUS:
            status, message = STATUS[fault]
            return self.send(
                handler, status, json.dumps(dict(error=dict(message=message, type="error", code=fault))),
                headers={"Retry-After": "1"} if fault == "429-after" else {},
            )
        if fault == "close": return handler.connection.shutdown(socket.SHUT_RDWR)
        if fault == "hang": return self.released.wait(60)
        if fault == "html": return self.send(handler, 200, "<html><body><h1>Welcome to the corporate proxy</h1></body></html>", "text/html")
        if body.get("stream"): return self.stream(handler, body, fault)
        message = dict(role="assistant", content=None if fault == "null-content" else self.answer_to(str(body["messages"])))
        choice = dict(index=0, message=message, finish_reason="length" if fault == "length" else "stop")
        content = json.dumps(
            dict(
                id="chatcmpl-1", object="chat.completion", created=1, model=self.model,
                choices=[] if fault == "empty-choices" else [choice], usage=self.usage(body),
            )
        )
        if fault == "cut-json": return self.send(handler, 200, content[:len(content) // 2])
        self.send(handler, 200, content)

    def usage(self, body):
        read, written = sum(len(str(m["content"]).split()) for m in body["messages"]), len(self.answer.split())
        return dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    def stream(self, handler, body, fault):
        handler.send_response(200)
        for name, value in {"Content-Type": "text/event-stream", "Connection": "close"}.items(): handler.send_header(name, value)
        handler.end_headers()
        def chunk(choices, **more):
            handler.wfile.write(
                b"data: "
                + json.dumps(
                    dict(id="chatcmpl-1", object="chat.completion.chunk", created=1, model=self.model, choices=choices, **more)
                ).encode()
                + b"\n\n"
            )
        words = [word + " " for word in self.answer.split(" ")]
        if fault == "null-content": words = [None]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for number, word in enumerate(words):
                if fault == "hang-mid-stream" and number == 2: return self.released.wait(60)
                if fault == "cut-json" and number == 2: return handler.wfile.write(b'data: {"id": "chatcmpl-1", "choi')
                if fault != "empty-choices": chunk([dict(index=0, delta=dict(role="assistant", content=word), finish_reason=None)])
                handler.wfile.flush()
                time.sleep(self.pace)
            if fault != "empty-choices": chunk([dict(index=0, delta={}, finish_reason="length" if fault == "length" else "stop")])
            if (body.get("stream_options") or {}).get("include_usage"): chunk([], usage=self.usage(body))
            handler.wfile.write(b"data: [DONE]\n\n")
        handler.close_connection = True
