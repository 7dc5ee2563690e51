"""Run the tutorials and take pictures of what they write: `make pictures`, with Chromium and its driver."""

import base64
import contextlib
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from torch import distributed

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
sys.path.insert(0, str(ROOT / "tests"))
from test_docs import BLOCK, names  # noqa: E402


def photograph(page: Path, picture: Path) -> None:
    """Take a picture of a page from top to bottom."""
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options)
    try:
        driver.set_window_size(1200, 900)
        driver.get(page.as_uri())
        time.sleep(1)  # until the graph has come to rest
        found = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        picture.write_bytes(base64.b64decode(found["data"]))
    finally:
        driver.quit()


def main() -> None:
    """Take the pictures that the tutorials show, and no others."""
    for page in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
        text = page.read_text()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
            known = names()
            for language, code in BLOCK.findall(text):
                if language == "python":
                    exec(compile(code, page.name, "exec"), known)
            distributed.destroy_process_group()
            for picture in re.findall(r"\(\.\./pictures/([^)]+)\)", text):
                written = Path(folder, picture.partition("-")[2])
                if (html := written.with_suffix(".html")).exists():
                    photograph(html, PICTURES / picture)
                else:
                    Image.open(written).convert("P", palette=Image.Palette.ADAPTIVE).save(PICTURES / picture, optimize=True)
                print(picture, os.path.getsize(PICTURES / picture) // 1000, "KB")


if __name__ == "__main__":
    main()
