"""Links between pages and files of the repository, and their anchors. Links to other sites are not followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import NAMES, ROOT, links, slugs


def broken(page: Path, text: str) -> list[str]:
    """Targets that lead nowhere."""
    found = list[str]()
    for target in links(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        to = (page.parent / name).resolve() if name else page
        missing = not to.exists() or not to.is_relative_to(ROOT)
        if missing or (anchor and anchor not in slugs(text if to == page else to.read_text(encoding="utf-8"))):
            found.append(target)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    assert broken(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "target",
    ["docs/absent.md", "docs/design.md#absent", "#absent", "../outside.md", "absent.svg", "docs/adr/0001.md"],
)
def test_broken_links_are_found(target: str) -> None:
    text = f"# Here\n\n[a](docs/design.md) [b](#here) [c](https://example.org/x) ![d]({target})\n"
    assert broken(ROOT / "README.md", text) == [target]


def test_anchors_are_those_of_headings() -> None:
    text = "# On a *Jetson*\n\n## `plan.toml`\n\n## 4. Calibration data\n\n## Twice\n\n## Twice\n"
    assert slugs(text) == {"on-a-jetson", "plantoml", "4-calibration-data", "twice", "twice-1"}
