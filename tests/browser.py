"""A headless Chromium, driven by the DevTools protocol over two pipes: no package, no driver, no port."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40, "z": 90}


class Browser:
    """One page of a browser. Raises AssertionError where the protocol reports an error or `seconds` pass."""

    def __init__(self, process, write, read, seconds=60):
        self.process, self._write, self._read, self.seconds = process, write, read, seconds
        self._left, self._calls, self._session = b"", 0, None
        self.errors = []  # what scripts threw, and what the policy refused
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for message in self._messages():
            if message.get("id") == self._calls:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"])

    def _messages(self):
        end = time.monotonic() + self.seconds
        while True:
            while b"\0" not in self._left:
                readable, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
                assert readable, f"the browser said nothing for {self.seconds} s"
                read = os.read(self._read, 1 << 16)
                assert read, "the browser has ended"
                self._left += read
            message, _, self._left = self._left.partition(b"\0")
            yield json.loads(message)

    def evaluate(self, expression):
        """The value of a JavaScript expression, a promise's awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression):
        """Until the expression is true; its value."""
        end = time.monotonic() + self.seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def open(self, url, ready="document.documentElement?.dataset.ready"):
        self.call("Page.navigate", url=url)
        self.wait(ready)

    def press(self, key, modifiers=0, commands=()):
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", commands=list(commands), **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def screenshot(self):
        """A PNG, in base64."""
        return self.call("Page.captureScreenshot")["data"]


@contextlib.contextmanager
def browser():
    """A Browser; the test is skipped where there is none of NAMES on the PATH."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt install chromium)")
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()

    def hand_over():
        """The protocol's pipes are the browser's descriptors 3 and 4."""
        ends = os.dup(to_browser), os.dup(from_browser)
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        process = subprocess.Popen(
            [path, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "--window-size=1000,900"],
            preexec_fn=hand_over,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Browser(process, write, read)
        finally:
            os.close(write)
            os.close(read)
            process.terminate()
            process.wait(20)
