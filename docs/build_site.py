"""Build the site: pages of this folder, README as the first one, and what they link to, by Sphinx, strictly.

python docs/build_site.py      # or make docs; the site is build/site/index.html
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
CONTENTS = "".join(
    f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{chr(10).join(pages.split())}\n```\n"
    for title, pages in {
        "Tutorials": """docs/tutorials/scratch docs/tutorials/prune docs/tutorials/budget docs/tutorials/ranks
            docs/tutorials/deploy docs/tutorials/method docs/coming-from""",
        "Guide": """docs/methods docs/loops docs/report docs/kernels docs/lowering docs/files docs/distributed docs/tracing
            docs/experiments docs/limits docs/reference""",
        "Measured": "docs/gallery examples/STUDY benchmarks/RESULTS benchmarks/ZOO benchmarks/FOREIGN benchmarks/README",
        "The house": "docs/layout CONTRIBUTING CHANGELOG",
    }.items()
)
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#]+)(?=[)#])")


def gather() -> None:
    """Copy every page, and whatever pages link to; links to folders go to the page about the layout."""
    shutil.rmtree(PAGES, ignore_errors=True)
    found = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    found += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"), ROOT / "examples" / "STUDY.md"]
    for page in found:
        target = PAGES / ("index.md" if page.name == "README.md" and page.parent == ROOT else page.relative_to(ROOT))
        target.parent.mkdir(parents=True, exist_ok=True)
        text = LINK.sub(lambda link, page=page: _linked(page, link[1]), page.read_text())
        target.write_text(text + (CONTENTS if target.name == "index.md" else ""))


def _linked(page: Path, link: str) -> str:
    """Return a link as the site has it, and copy what it leads to."""
    leads = (page.parent / link).resolve()
    if leads == ROOT / "README.md":
        return link.replace("README.md", "index.md")
    if leads.is_dir():
        return "docs/layout.md"
    if leads.suffix != ".md":
        copy = PAGES / leads.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(leads, copy)
    return link


def main() -> None:
    """Build."""
    gather()
    sphinx = [sys.executable, "-W", "ignore", "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / "docs")]
    raise SystemExit(subprocess.run([*sphinx, str(PAGES), str(ROOT / "build" / "site")]).returncode)


if __name__ == "__main__":
    main()
