"""A real browser without a window, driven through a pipe: no network, no other package."""

import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_TIMEOUT = 120.0


class Page:
    """A page, and whatever it complains of or asks the network for.

    Attributes:
      complaints: Messages of the console, and exceptions.
      requests: Addresses that were asked for.
    """

    def __init__(self, to: int, source: int):
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._to, self._source = to, source
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self._seen: list[str] = []

    def call(self, method: str, **params: Any) -> Any:
        """A command of the DevTools protocol, and its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (got := self._next()).get("id") != number:
            self._note(got)
        assert "error" not in got, got
        return got["result"]

    def open(self, path: pathlib.Path) -> None:
        """Loads a file and waits for it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self._seen.clear()
        self.call("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._note(self._next())

    def run(self, expression: str) -> Any:
        """The value of an expression in JavaScript."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._source], [], [], _TIMEOUT)
            assert ready, f"the browser says nothing for {_TIMEOUT:.0f} s"
            data = os.read(self._source, 1 << 20)
            assert data, "the browser is gone"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        self._seen.append(method)
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(params)[:500])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"a dialog: {params['message']}")


@contextmanager
def page(profile: pathlib.Path) -> Iterator[Page]:
    """A page of a browser of its own; skips the test where there is no browser.

    Args:
      profile: An empty folder.
    """
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    their_source, to = os.pipe()
    source, their_to = os.pipe()
    command = (
        f'exec "{found}" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage '
        "--no-first-run --disable-extensions --disable-background-networking "
        f'--user-data-dir="{profile}" --remote-debugging-pipe about:blank '
        f"3<&{their_source} 4>&{their_to}"
    )
    process = subprocess.Popen(
        ["bash", "-c", command],
        pass_fds=(their_source, their_to),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_source)
    os.close(their_to)
    try:
        yield Page(to, source)
    finally:
        process.terminate()
        process.wait(_TIMEOUT)
        os.close(to)
        os.close(source)
