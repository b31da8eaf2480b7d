# SPDX-License-Identifier: Apache-2.0
"""What a package index shows; `make dist` checks the wheel itself."""

import re
from pathlib import Path

import setuptools

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#]+)")


def metadata(monkeypatch, source):
    """What setup.py hands to setuptools once the owner has filled in the repository's address."""
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **named: found.update(named))
    text = (ROOT / "setup.py").read_text(encoding="utf-8").replace('\nSOURCE = ""', f'\nSOURCE = "{source}"')
    exec(compile(text, "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    return found


def test_links_of_the_readme_lead_into_the_repository(monkeypatch):
    source = "https://github.com/someone/mir-callback"
    filled = metadata(monkeypatch, source)
    version = filled["version"]
    shown = LINK.findall(filled["long_description"])
    written = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(shown) == len(written) > 20
    for link, was in zip(shown, written, strict=True):
        if was.startswith("https:"):
            assert link == was
        else:
            assert (ROOT / was).exists(), was
            assert link == f"{source}/{'raw' if was.endswith('.png') else 'blob'}/v{version}/{was}"
    assert all(url.startswith(source) for url in filled["project_urls"].values())
