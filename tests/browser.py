"""A page in headless Chromium, driven by Choreographer, which comes with Kaleido."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import choreographer

#: Longest that a page may take until what is waited for is there, seconds.
PATIENCE = 20
KEYS = {"Enter": "\r"}


class Page:
    """complaints: what the page wrote to the console as errors or warnings, and what it threw; requests: URLs asked for."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tab: choreographer.Tab):
        self._loop, self._tab = loop, tab
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def open(self, file: Path) -> None:
        for event, listener in (
            ("Runtime.exceptionThrown", self._on_exception),
            ("Runtime.consoleAPICalled", self._on_console),
            ("Log.entryAdded", self._on_log),
            ("Network.requestWillBeSent", self._on_request),
        ):
            self._tab.subscribe(event, listener)
            self.send(event.partition(".")[0] + ".enable")
        self.send("Page.navigate", url=file.absolute().as_uri())

    def send(self, command: str, **params: Any) -> dict[str, Any]:
        response = self._loop.run_until_complete(self._tab.send_command(command, params=params))
        assert "error" not in response, f"{command}: {response['error']}"
        return response["result"]

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression; promises are awaited."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        async def poll() -> None:
            while not (await self._evaluate(condition)):
                await asyncio.sleep(0.05)

        self._loop.run_until_complete(asyncio.wait_for(poll(), PATIENCE))

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": KEYS[key]} if key in KEYS and kind == "keyDown" else {}
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=13 if text else 0, **text
            )

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )  # fmt: skip

    def prefer(self, scheme: str) -> None:
        """ "dark" or "light", as the system's setting."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, file: Path) -> None:
        """Of the whole page, as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    async def _evaluate(self, expression: str) -> Any:
        response = await self._tab.send_command(
            "Runtime.evaluate", params={"expression": expression, "returnByValue": True}
        )
        return response["result"]["result"].get("value")

    async def _on_exception(self, event: dict[str, Any]) -> None:
        self.complaints.append(str(event["params"]["exceptionDetails"]))

    async def _on_console(self, event: dict[str, Any]) -> None:
        if event["params"]["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(event["params"]["args"]))

    async def _on_log(self, event: dict[str, Any]) -> None:
        if event["params"]["entry"]["level"] in ("error", "warning"):
            self.complaints.append(event["params"]["entry"]["text"])

    async def _on_request(self, event: dict[str, Any]) -> None:
        self.requests.append(event["params"]["request"]["url"])


@contextmanager
def opened(file: Path) -> Iterator[Page]:
    """The file, in a browser of its own."""
    loop = asyncio.new_event_loop()
    browser = choreographer.Browser()
    try:
        loop.run_until_complete(browser.open())
        page = Page(loop, loop.run_until_complete(browser.create_tab()))
        page.open(file)
        yield page
    finally:
        loop.run_until_complete(browser.close())
        loop.close()
