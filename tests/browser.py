"""Headless Chromium, driven over a pipe by its DevTools protocol: no package is needed for it."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    """A page in a browser of its own."""

    def __init__(self, folder):
        asked, self._asking = os.pipe()
        self._answers, answering = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (asked, answering)]
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        # The browser reads from 3 and writes to 4. A shell puts them there: code between fork and exec
        # would make Python fork, which JAX warns of.
        place = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", place, PROGRAM, *arguments, f"--user-data-dir={folder}"],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (asked, answering, *ends):
            os.close(end)
        self._rest, self._count, self._session = b"", 0, None
        self.complaints = []  # what scripts and the policy of the page complained of
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def close(self):
        """End the browser."""
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self.call("Browser.close")
        self._process.wait(20)
        os.close(self._asking)
        os.close(self._answers)

    def call(self, method, **parameters):
        """Call a method of the protocol and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._asking, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"]))
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self._rest:
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        content, _, self._rest = self._rest.partition(b"\0")
        return json.loads(content)

    def size(self, width, height=900):
        """Give the window a size in pixels."""
        options = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **options)

    def open(self, address):
        """Open an address."""
        self.call("Page.navigate", url=address)

    def value(self, script):
        """Return the value of an expression of JavaScript; a promise is awaited."""
        options = {"returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script, seconds=60):
        """Wait until an expression is true; while the page loads it may fail."""
        guarded = f"(() => {{ try {{ return {script}; }} catch {{ return false; }} }})()"
        for _ in range(int(seconds / 0.05)):
            if value := self.value(guarded):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}; the page: {self.text()}")

    def text(self):
        """Return what can be read on the page."""
        return self.value("document.body.innerText")

    def choose(self, path, selector="input[type=file]"):
        """Choose a file, as a person does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def press(self, key):
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            code = {"ArrowRight": 39, "End": 35, "Tab": 9}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def picture(self, path):
        """Save the whole page as a PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
