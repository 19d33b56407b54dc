"""A small OpenAI-compatible server on loopback that misbehaves as told, for `data_teacher_test`."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def event(text=None, finish=None):
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "served-7", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n".encode()


class Exchange:
    """One request being answered: its JSON body, and ways to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: dict, number: int) -> None:
        self.handler, self.body, self.number = handler, body, number
        self.asked = body["messages"][-1]["content"]

    def status(self, code: int, headers: dict[str, str] | None = None, text: str = '{"error": {"message": "no"}}'):
        self.handler.send_response(code)
        for name, value in {"Content-Type": "application/json", "Connection": "close", **(headers or {})}.items():
            self.handler.send_header(name, value)
        self.handler.end_headers()
        self.handler.wfile.write(text.encode())

    def begin(self, kind: str = "text/event-stream"):
        self.handler.send_response(200)
        self.handler.send_header("Content-Type", kind)
        self.handler.send_header("Connection", "close")
        self.handler.end_headers()

    def send(self, data: bytes):
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def stream(self, text: str, size: int = 7, finish: str | None = "stop", done: bool = True):
        """The whole answer in pieces of `size` characters; without `finish` the stream just ends."""
        self.begin()
        for start in range(0, len(text), size):
            self.send(event(text[start : start + size]))
        if finish:
            self.send(event(finish=finish))
        if done:
            self.send(b"data: [DONE]\n\n")


@contextmanager
def serve(behaviour: Callable[[Exchange], None]):
    """Yields (base URL, requests): every request is a dict of its body, key and time of arrival."""
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(requests)
                requests.append({"body": body, "key": self.headers["Authorization"], "time": time.monotonic()})
            try:
                behaviour(Exchange(self, body, number))
            except (BrokenPipeError, ConnectionResetError):
                requests[number]["hung_up"] = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
