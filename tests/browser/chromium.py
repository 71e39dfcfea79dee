"""A headless Chromium driven over its DevTools pipe (NUL-separated JSON on descriptors 3 and 4): no driver needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE = 60.0
# Named keys: code and Windows key code; letters and digits carry their own text.
NAMED = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}


class Browser:
    """One page of one browser. Every wait ends in a TimeoutError after `PATIENCE` seconds."""

    def __init__(self, process: subprocess.Popen[bytes], read: int, write: int) -> None:
        self._process, self._read, self._write = process, read, write
        self._buffer, self._sent, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command; events that come before it are kept in `events`."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": params}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._sent:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            chunk = os.read(self._read, 1 << 16)
            if not chunk:
                raise RuntimeError("Chromium has ended")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The value of an expression as soon as it is true; meanwhile the page may load."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if value := self.run(script):
                    return value
            except RuntimeError as error:
                if "context" not in str(error).lower() and "is not defined" not in str(error):
                    raise
            time.sleep(0.02)
        raise TimeoutError(script)

    def open(self, page: Path, fragment: str = "") -> None:
        """Load a local file, from a page that is none, so that a new fragment is a new load."""
        for url in ("about:blank", page.as_uri() + fragment):
            self.send("Page.navigate", url=url)
            self.wait_for(
                f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url[:12])})"
            )

    def reload(self) -> None:
        """Load the page again; what scripts left in it is gone."""
        self.run("window.stale = true")
        self.send("Page.reload")
        self.wait_for("!window.stale && document.readyState === 'complete'")

    def press(self, *keys: str) -> None:
        """Press and release keys one after the other, as a keyboard would."""
        for key in keys:
            text = {} if key in NAMED else {"text": key}
            code = NAMED.get(key, ord(key[0].upper()))
            text |= {"text": "\r"} if key == "Enter" else {}
            for kind in ("keyDown", "keyUp"):
                extra = text if kind == "keyDown" else {}
                self.send(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    windowsVirtualKeyCode=code,
                    **extra,
                )

    def screenshot(
        self, file: Path, width: int, height: int, dark: bool = False, touch: bool = False
    ) -> None:
        """A picture of the visible part of the page at this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        data = self.send("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(data))


@contextmanager
def launched(profile: Path, downloads: Path) -> Iterator[Browser]:
    """A fresh browser with its own profile; files it downloads go to `downloads`."""
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
    # The shell puts the pipes where Chromium looks for them.
    command = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$0" {options} --user-data-dir="$1"'
    process = subprocess.Popen(
        ["bash", "-c", command, str(PROGRAM), str(profile)],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        browser = Browser(process, read, write)
        browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        yield browser
    finally:
        process.kill()
        process.wait()
        os.close(read)
        os.close(write)
