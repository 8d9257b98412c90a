"""Pages as their readers see them: in Chromium, without a display and without a network."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

_FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@contextmanager
def opened(site: Path) -> Iterator[Any]:
    """Give a page of Playwright's, whose addresses are relative to a folder: `page.goto("index.html")`.

    At the end the test fails if a page raised an error, lacked a file, or asked another host for anything.
    """
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("there is no Chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    faults: list[str] = []
    with _served(site) as address, sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=_FLAGS, chromium_sandbox=False)
        page = chromium.new_page(base_url=address)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("request", lambda request: _at_home(request.url, address) or faults.append(f"asked for {request.url}"))
        page.on(
            "response", lambda response: response.status < 400 or faults.append(f"{response.status}: {response.url}")
        )
        try:
            yield page
        finally:
            chromium.close()
    assert not faults, "\n".join(faults)


def _at_home(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing of a request: the page's own faults tell more."""


@contextmanager
def _served(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
