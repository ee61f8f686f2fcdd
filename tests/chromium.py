"""A real headless Chromium over its DevTools protocol: open a page, type, read, take a picture. No driver package needed."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

import loopback
from timescale import limit

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Debian package chromium")


class Page:
    """One tab. `problems` collects console errors, exceptions and requests that failed."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0
        self.problems: list[str] = []
        self.hosts: set[str] = set()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result; events that come before it are noted."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=limit(30)))
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                found: dict[str, Any] = message["result"]
                return found
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method", ""), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"].get("exception", {}).get("description", parameters)))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.problems.append(str([argument.get("value") for argument in parameters["args"]]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if url.startswith("http"):
                self.hosts.add(httpx.URL(url).netloc.decode())

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        there = f"location.href.startsWith({json.dumps(url)})"  # the blank page before it is complete too
        self.until(f"{there} && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 15) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + limit(seconds)
        while not self.js(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.problems}"
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({json.dumps(selector)}).innerText"))

    def type(self, text: str) -> None:
        """Text into the field that has the focus, as a keyboard would."""
        self.until("document.activeElement instanceof HTMLInputElement")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """One key, down and up."""
        codes = {"Enter": 13, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9, "/": 191}
        text = {"Enter": "\r", "/": "/"}.get(key, "")
        common = {"key": key, "windowsVirtualKeyCode": codes[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **({"text": text} if text else {}), **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def picture(self, path: Path) -> bytes:
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])
        path.write_bytes(data)
        return data


@contextmanager
def browser(profile: Path, *, width: int = 1000, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """A Chromium of its own, ended with the block."""
    profile.mkdir(parents=True, exist_ok=True)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-background-networking"]
    command = [
        "chromium",
        *flags,
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        f"--window-size={width},{height}",
        "about:blank",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, end = profile / "DevToolsActivePort", time.monotonic() + limit(30)
        while not port_file.exists() or not port_file.read_text().strip():
            assert process.poll() is None, "chromium ended"
            assert time.monotonic() < end, "chromium did not start"
            time.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        tabs = loopback.get(f"http://127.0.0.1:{port}/json").json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=2**26, open_timeout=limit(30)) as socket:
            page = Page(socket)
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            page.call("Emulation.setDeviceMetricsOverride", **size)
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
            yield page
    finally:
        process.terminate()
        process.wait(limit(20))
