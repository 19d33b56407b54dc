"""An application served on the loopback, in a thread."""

import threading
import time
from contextlib import contextmanager

from srl_jax.bounded_http import make_server


@contextmanager
def running(app, port=0, limits=None):
    """(its address, the server)."""
    server = make_server(app, host="127.0.0.1", port=port, limits=limits)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        host, bound = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{bound}", server
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
