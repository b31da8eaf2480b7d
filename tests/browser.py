# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for tests, spoken to through two pipes (the DevTools protocol), and what it complains of."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "google-chrome")
_SECONDS = 60
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--remote-debugging-pipe", "--hide-scrollbars"),
)


def find_chromium() -> str | None:
    """The path of a Chromium, None if there is none; one from a snap sees neither our folders nor our pipes."""
    return next((path for name in NAMES if (path := shutil.which(name)) and not path.startswith("/snap/")), None)


class Browser:
    """A browser with one page.

    Args:
        folder: an empty one, for its profile.

    Attributes:
        complaints: what the console, the network and the page's scripts had to say against a page since it was opened.
        requests: addresses asked for since it was opened, the page's own first.
    """

    def __init__(self, folder: Path) -> None:
        chromium = find_chromium()
        if chromium is None:
            raise RuntimeError(f"a Chromium is needed, but none of {', '.join(NAMES)} was found; apt install chromium")
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._folder = folder
        self._number = 0
        self._rest = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[str] = []
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # Chromium reads from 3 and writes to 4; a shell puts our ends there.
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, chromium, *_FLAGS, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder.parent / "chromium.log").open("wb"),
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = next(t for t in self._ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = ""
        self._session = self._ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")

    _session = ""

    def open(self, page: Path, *, width: int = 1200, dark: bool = False, fragment: str = "") -> None:
        """Load a file and wait until it is there."""
        self.resize(width)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", media="", features=[scheme])
        self._ask("Page.navigate", url="about:blank")
        self._wait_for("Page.loadEventFired")
        self.complaints.clear()
        self.requests.clear()
        self._ask("Page.navigate", url=page.resolve().as_uri() + fragment)
        self._wait_for("Page.loadEventFired")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def resize(self, width: int, height: int = 900) -> None:
        """Give the page a window of this size."""
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        answer = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window."""
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press a key that has a name, such as ArrowLeft."""
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Save a picture of the page, or of the window only."""
        answer = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def print_media(self) -> None:
        """Show the page as it would be printed from a dark screen."""
        scheme = {"name": "prefers-color-scheme", "value": "dark"}
        self._ask("Emulation.setEmulatedMedia", media="print", features=[scheme])

    def pdf(self, path: Path) -> None:
        """Print the page."""
        path.write_bytes(base64.b64decode(self._ask("Page.printToPDF", printBackground=False)["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._to)  # its end of the pipe gone, Chromium ends
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _SECONDS
        while number not in self._answers:
            self._read(end)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _wait_for(self, event: str) -> None:
        end = time.monotonic() + _SECONDS
        while event not in self._events:
            self._read(end)
        self._events.clear()

    def _read(self, end: float) -> None:
        ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
        part = os.read(self._from, 1 << 20) if ready else b""
        if not part:
            log = (self._folder.parent / "chromium.log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"Chromium has {'ended' if ready else 'not answered in time'}: {log}")
        *messages, self._rest = (self._rest + part).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._notice(message["method"], message["params"])

    def _notice(self, event: str, told: dict[str, Any]) -> None:
        self._events.append(event)
        if event == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{told['type']}: {told['args']}")
        elif event == "Log.entryAdded":
            self.complaints.append(str(told["entry"]))
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event == "Network.loadingFailed":
            self.complaints.append(f"not loaded: {told}")
