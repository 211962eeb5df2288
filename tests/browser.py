"""A headless Chromium under test: opens a page, runs JavaScript in it, remembers what went wrong.

Speaks the DevTools protocol over a pipe (file descriptors 3 and 4; messages end with a zero byte).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0
# Chromium reads commands from descriptor 3 and answers on 4; pytest has taken both already.
LAUNCHER = """
import os, sys
pipes = [os.dup(int(number)) for number in sys.argv[1:3]]
for pipe, place in zip(pipes, (3, 4)):
    os.dup2(pipe, place)
    os.set_inheritable(place, True)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """Chromium's program on PATH."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One page of a headless Chromium; a context manager.

    Attributes:
        errors: console errors, uncaught exceptions and refused requests since the page opened.
        requests: addresses that the page asked for.
    """

    def __init__(self, profile: Path):
        program = find_chromium()
        assert program, "tests that need chromium skip without it"
        commands_in, self._commands = os.pipe()
        self._answers, answers_out = os.pipe()
        arguments = [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(commands_in), str(answers_out), *arguments],
            pass_fds=(commands_in, answers_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_in)
        os.close(answers_out)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._buffer = b""
        self._num_sent = 0
        self._session: str | None = None
        self._events: set[str] = set()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False):
        """Load a page in a window of that size and colour scheme and wait until it has loaded."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        # By way of an empty page: another fragment alone would not load anything.
        for stop in ("about:blank", address):
            self._events.discard("Page.loadEventFired")
            self.errors, self.requests = [], []
            self.send("Page.navigate", url=stop)
            if "Page.loadEventFired" not in self._events:
                self._receive(lambda message: message.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """A JavaScript expression's value, as JSON; promises are awaited."""
        result = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a named key (Enter, Escape, ArrowRight)."""
        codes = {"Enter": 13, "Escape": 27, "ArrowRight": 39}
        text = {"text": "\r"} if key == "Enter" else {}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def send(self, method: str, **parameters) -> dict:
        """Call a DevTools method and wait for its result."""
        self._num_sent += 1
        message = {"id": self._num_sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        answer = self._receive(lambda received: received.get("id") == self._num_sent)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self, is_wanted) -> dict:
        """Read messages until one is wanted, noting events on the way."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._answers], [], [], deadline - time.monotonic())
                part = os.read(self._answers, 1 << 20) if ready else b""
                assert part, "chromium ended, or did not answer in time"
                self._buffer += part
            line, self._buffer = self._buffer.split(b"\0", 1)
            message = json.loads(line)
            self._note(message.get("method", ""), message.get("params", {}))
            if is_wanted(message):
                return message

    def _note(self, method: str, parameters: dict) -> None:
        self._events.add(method)
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.errors.append(json.dumps(parameters["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
