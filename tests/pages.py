"""Pages as tests read them: the one script that their policy allows is looked at once and taken away."""

import base64
import hashlib
import re
import shutil
from pathlib import Path

import whence

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
NO_BROWSER = "pages are not looked at in a browser: there is no Chromium (apt-get install chromium)"
SCRIPT = (Path(whence.__file__).parent / "report" / "templates" / "report.js").read_text()


def unscripted(page: str) -> str:
    """A page without its script, which is the one of the package and the only one that its policy lets run."""
    codes = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert page.count("<script") == len(codes)
    assert codes in ([SCRIPT], [])
    if not page.startswith("<!doctype"):  # a part of a page
        return page.replace(f"<script>{SCRIPT}</script>", "")
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert len(policy) == 1
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" for code in codes]
    assert re.findall(r"script-src ([^;]*);", policy[0]) == hashes
    return page.replace(f"<script>{SCRIPT}</script>", "")
