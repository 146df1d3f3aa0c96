"""The report in a real browser: it shows its sections, makes no request and has nothing to complain about."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fstq_export.report import render

from tests.export.test_report import REPORTS

pytest.importorskip("matplotlib")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on PATH; Debian has it as chromium and chromium-driver"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
)  # fmt: skip


def browse(html: str, folder: Path) -> tuple[str, list[str], list[str]]:
    """(rendered DOM, console messages, requests made by the page itself; the browser's own do not count)."""
    page, log = folder / "page.html", folder / "net.json"
    page.write_text(html, encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER),
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    events = [event.get("params", {}) for event in json.loads(log.read_text(encoding="utf-8"))["events"]]
    requests = [str(event["url"]) for event in events if "file:" in str(event.get("network_isolation_key"))]
    return done.stdout, re.findall(r":CONSOLE.*", done.stderr), requests


@pytest.mark.parametrize("name", ["full", "hostile"])
def test_browser_shows_all_sections_and_asks_for_nothing(name: str, tmp_path: Path) -> None:
    html = render(REPORTS[name]())
    dom, console, requests = browse(html, tmp_path)
    assert (console, requests) == ([], [])
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert len(headings) == 8 and re.findall("<h2>(.*?)</h2>", dom) == headings
    assert dom.count("<svg ") == 3 and dom.count('<div class="stack">') == 2
    assert "<script" not in dom and "<img" not in dom


def test_the_check_itself_sees_console_errors_and_requests(tmp_path: Path) -> None:
    _, console, requests = browse(
        '<script>console.error("seen")</script><img src="http://127.0.0.1:9/pixel.png">', tmp_path
    )
    assert "seen" in "".join(console) and "http://127.0.0.1:9/pixel.png" in requests
