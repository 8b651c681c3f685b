"""The page at / in headless Chromium: plots that move, a chat that answers, nothing from outside."""

import json
import os
import pathlib
import shutil
import subprocess
import time

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)

# .ci/run installs it.
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"), pytest.mark.timeout(300)]


class Browser:
    """Chromium, by DevTools messages over a pair of pipes."""

    def __init__(self, profile):
        to_child, self.out = os.pipe()
        self.incoming, from_child = os.pipe()

        def take_3_and_4():
            a, b = os.dup(to_child), os.dup(from_child)
            os.dup2(a, 3), os.dup2(b, 4)
            for fd in (3, 4):
                os.set_inheritable(fd, True)

        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--disable-extensions", f"--user-data-dir={profile}",
             "--remote-debugging-pipe", "about:blank"],
            preexec_fn=take_3_and_4, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child), os.close(from_child)
        self.held, self.sent, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(domain + ".enable")

    def receive(self):
        while b"\0" not in self.held:
            data = os.read(self.incoming, 1 << 20)
            assert data, "Chromium ended"
            self.held += data
        message, _, self.held = self.held.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("id") == self.sent:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def evaluate(self, expression):
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait_for(self, expression, seconds=60):
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, (expression, self.evaluate("document.body.innerText"))
            time.sleep(0.1)
        return value

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.out), os.close(self.incoming)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


def test_page(browser, server, book):
    browser.call("Page.navigate", url=server.url + "/")
    browser.wait_for("document.querySelector('#state')?.textContent === 'live'")
    browser.wait_for("document.querySelector('#name').textContent === 'tiny-qwen3'")
    browser.evaluate("document.querySelector('#tokens').value = 12")
    browser.evaluate("document.querySelector('#attention').value = 'spot:k=64,sinks=16,recency=16'")
    question = "the pass key of Anna is"
    browser.evaluate(f"document.querySelector('#text').value = {json.dumps(question)}")
    browser.evaluate("document.querySelector('#send').click()")
    browser.wait_for("!document.querySelector('#send').disabled && document.querySelector('#log').children.length >= 2")
    kinds = browser.evaluate("[...document.querySelectorAll('#log > div')].map(e => e.className)")
    assert kinds[0] == "user" and "fault" not in kinds
    answer = browser.evaluate("[...document.querySelectorAll('#log > .answer')].map(e => e.textContent).join('')")
    same = server.client().chat.completions.create(
        model="tiny-qwen3", messages=[{"role": "user", "content": question}], max_tokens=12, temperature=0,
        extra_body={"attention": "spot:k=64,sinks=16,recency=16"},
    )  # fmt: skip
    assert answer == (same.choices[0].message.content or "")

    # The plots show what /metrics says, and move.
    browser.wait_for("Object.values(series).every(lines => lines.every(line => line.length >= 3))")
    server.client().completions.create(
        model="tiny-qwen3", prompt=book[:400], max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
    )
    browser.wait_for("Math.max(...series.tokens[0]) > 1 && series.latency[1].some(v => v > 0)")
    assert browser.evaluate("document.querySelectorAll('.plot svg path[d]').length") >= 12
    metrics = server.metrics()
    share = 100 * metrics["spot:attended_tokens_total"] / metrics["spot:visible_tokens_total"]
    browser.wait_for(f"Math.abs(series.attended[0].at(-1) - {share}) < 1e-6")

    # An error of the server is shown, and a stop stops.
    browser.evaluate("document.querySelector('#attention').value = 'nonsense'")
    browser.evaluate("document.querySelector('#text').value = 'a'; document.querySelector('#send').click()")
    browser.wait_for("document.querySelector('#log .fault')?.textContent.includes('nonsense')")
    browser.evaluate("document.querySelector('#attention').value = 'dense'")
    browser.evaluate("document.querySelector('#tokens').value = 3000")
    browser.evaluate("document.querySelector('#text').value = 'b'; document.querySelector('#send').click()")
    browser.wait_for("!document.querySelector('#stop').disabled")
    browser.evaluate("document.querySelector('#stop').click()")
    browser.wait_for("!document.querySelector('#send').disabled")
    server.wait_until_idle()

    if folder := os.environ.get("SPOT_SCREENSHOTS"):
        import base64

        browser.call("Emulation.setDeviceMetricsOverride", width=1100, height=900, deviceScaleFactor=1, mobile=False)
        image = browser.call("Page.captureScreenshot", format="png")["data"]
        pathlib.Path(folder, "page.png").write_bytes(base64.b64decode(image))
    urls = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(urls) > 5 and all(url.startswith((server.url, "data:")) for url in urls)
    faults = [
        event
        for event in browser.events
        if event["method"] == "Runtime.exceptionThrown"
        or (event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")
    ]
    # Of the requests that were to fail, Chromium writes a line each.
    assert all("status of 400" in json.dumps(fault) for fault in faults), faults
