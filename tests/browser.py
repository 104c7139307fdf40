"""The browser of the page tests: any Chromium or Chrome on this machine.

    python -m tests.browser     # prints its path; as root on Debian, installs it if there is none

`LEADLINE_CHROMIUM` names another executable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MACOS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
PLAYWRIGHT = (  # what `playwright install chromium` downloads
    *("~/.cache/ms-playwright", "~/Library/Caches/ms-playwright"),
)
MISSING = (
    "no Chromium or Chrome found, which the tests of the report pages need: install one "
    "(Debian: apt-get install chromium; elsewhere: .venv/bin/playwright install chromium), or name "
    "it in LEADLINE_CHROMIUM"
)


def find() -> Path | None:
    """The path of a Chromium or Chrome executable, or None."""
    if named := os.environ.get("LEADLINE_CHROMIUM"):
        found = shutil.which(named)
        return Path(found) if found else None
    for name in NAMES:
        if found := shutil.which(name):
            return Path(found)
    caches = [Path(folder).expanduser() for folder in PLAYWRIGHT]
    downloaded = [
        path
        for cache in caches
        for pattern in ("chromium-*/chrome-linux*/chrome", "chromium-*/chrome-mac*/*.app/**/*")
        for path in sorted(cache.glob(pattern), reverse=True)
        if path.name in ("chrome", "Chromium", "Google Chrome for Testing") and path.is_file()
    ]
    return next((p for p in [*map(Path, MACOS), *downloaded] if p.is_file()), None)


def install() -> None:
    """Install Chromium where that needs no question: as root with apt."""
    if not (shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0):
        return
    print("installing chromium for the tests of the report pages (apt-get)", file=sys.stderr)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    package = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
    for command in (["apt-get", "update", "-qq"], package):
        subprocess.run(command, env=quiet, stdout=subprocess.DEVNULL, check=False)


def main() -> int:
    """Print the browser's path; 1 and one line on standard error where there is none."""
    if find() is None:
        install()
    if (found := find()) is None:
        print(MISSING, file=sys.stderr)
        return 1
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
