"""A hub and a web server for tests, both on this machine."""

import functools
import http.server
import json
import threading
from types import SimpleNamespace

import pytest


@pytest.fixture
def fake_hub(monkeypatch):
    """Replaces ``datasets.load_dataset``: returns ``rows`` or raises ``error``, and records ``requests``."""
    hub = SimpleNamespace(rows=[], error=None, requests=[])

    def load_dataset(dataset, configuration, split):
        hub.requests.append((dataset, configuration, split))
        if hub.error is not None:
            raise hub.error
        return hub.rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return hub


class _WebServer:
    """Serves the files in ``folder`` at ``url``, and records the ``requests`` for them."""

    def __init__(self, folder):
        self.folder, self.requests = folder, []
        folder.mkdir()
        requests = self.requests

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                super().do_GET()

            def log_message(self, *_):
                pass

        handler = functools.partial(Handler, directory=folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()

    def put(self, name, content):
        """Store bytes, text, or anything else as JSON, and return the URL."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"{self.url}/{name}"


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server on this machine, with a download cache for this test alone."""
    import datasets

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    web = _WebServer(tmp_path / "web")
    yield web
    web.server.shutdown()
    web.server.server_close()
