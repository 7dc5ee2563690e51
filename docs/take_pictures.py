"""Run the tutorials and take pictures of what they write: `make pictures`, with Chromium and its driver."""

import base64
import contextlib
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from torch import distributed

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
sys.path.insert(0, str(ROOT / "tests"))
from browser import chromium  # noqa: E402
from test_docs import BLOCK, names  # noqa: E402


def photograph(browser: Any, page: Path, picture: Path) -> None:
    """Take a picture of a page from top to bottom."""
    browser.set_window_size(1200, 900)
    browser.get(page.as_uri())
    time.sleep(1)  # until the graph has come to rest
    found = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    picture.write_bytes(base64.b64decode(found["data"]))


def take(browser: Any, page: Path, folder: Path) -> None:
    """Run a tutorial in a folder, and take the pictures that it shows."""
    text, known = page.read_text(), names()
    for language, code in BLOCK.findall(text):
        if language == "python":
            exec(compile(code, page.name, "exec"), known)
    for picture in re.findall(r"\(\.\./pictures/([^)]+)\)", text):
        written = folder / picture.partition("-")[2]
        if (html := written.with_suffix(".html")).exists():
            photograph(browser, html, PICTURES / picture)
        else:
            Image.open(written).convert("P", palette=Image.Palette.ADAPTIVE).save(PICTURES / picture, optimize=True)
        print(picture, os.path.getsize(PICTURES / picture) // 1000, "KB")


def main() -> None:
    """Take the pictures that the tutorials show, and no others."""
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        for page in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
                take(browser, page, Path(folder))
                distributed.destroy_process_group()


if __name__ == "__main__":
    main()
