"""The picture in README.md: the first screen of the demo's own report, in headless Chromium.

python -m pipeline demo && python data/make_picture.py demo/report.html
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).parent / "report.png"
SIZE = "1440,900"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def main(report: Path) -> None:
    """Take the picture; it shows no path of this machine, since the report has none there."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("error: no chromium here; install it (Debian: apt-get install chromium)")
    if not report.is_file():
        sys.exit(f"error: {report}: no such file; run `python -m pipeline demo` first")
    with tempfile.TemporaryDirectory() as profile:
        place = (f"--user-data-dir={profile}", f"--screenshot={OUT}", f"--window-size={SIZE}")
        subprocess.run([chromium, *FLAGS, *QUIET, *place, report.resolve().as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
