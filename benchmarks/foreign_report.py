"""FOREIGN.md: what was found of other people's models, as text."""

import re
from collections import Counter, defaultdict
from typing import Any

from foreign_models import FAULTS
from tabulate import tabulate

Found = dict[tuple[str, str], dict[str, Any]]  # {(package, model): what a worker answered}
HEAD = """# Models of other libraries

`{command}` wrote this, with {versions}, on {processor}.

Every architecture that the packages register, or those listed in `benchmarks/foreign_packages.py`, is built small, with random
weights and inputs. Those that run densely, and twice alike, are checked:

| check | what is asked |
|-|-|
{checks}

"Multiplied" weights are those that torch's own dispatcher sees as operands of products, whatever code reads them; the share is
that of their elements that is masked. One MAC is one multiply-accumulate of one inference on these small inputs.

"""


def markdown(found: Found, command: str, versions: dict[str, str], processor: str, checks: dict[str, str]) -> str:
    """Return the whole document."""
    asked = "\n".join(f"| {name} | {text} |" for name, text in checks.items())
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [HEAD.format(command=command, versions=named, processor=processor, checks=asked)]
    parts += ["## Totals", totals(found), "## Failures", failures(found), "## Notes", _notes(found)]
    parts += ["## Not checked", _skipped(found), "## Models", _models(found)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def totals(found: Found) -> str:
    """Return the table of packages."""
    packages = dict.fromkeys(package for package, _ in found)
    rows = [_total(package, [f for (p, _), f in found.items() if p == package]) for package in packages]
    return _table([*rows, _total("all", list(found.values()))], "package", "tried", "ran densely", "passed all", "share")


def _total(package: str, results: list[dict[str, Any]]) -> tuple[Any, ...]:
    ran = [result for result in results if "failed" in result]
    passed = sum(not result["failed"] for result in ran)
    return package, len(results), len(ran), passed, f"{passed / max(1, len(ran)):.1%}"


def failures(found: Found) -> str:
    """Return the table of failed checks; checks of one model that fail alike share a row."""
    rows = []
    for (package, name), result in found.items():
        alike = defaultdict(list)
        for check, message in result.get("failed", {}).items():
            alike[message].append(check)
        rows += [(package, name, ", ".join(c), _cell(m), fault(package, name)) for m, c in alike.items()]
    return _table(rows, "package", "model", "check", "message", "whose fault") if rows else "None."


def fault(package: str, name: str) -> str:
    """Say whose fault the failures of a model are."""
    return next((why for pattern, why in FAULTS.items() if re.fullmatch(pattern, f"{package}/{name}")), "ours")


def _notes(found: Found) -> str:
    notes = Counter(re.sub(r":.*", "", note) for result in found.values() for note in result.get("notes", ()))
    return "\n".join(f"- {note}: {n} models" for note, n in notes.most_common()) or "None."


def _skipped(found: Found) -> str:
    """List what did not run, by its reason."""
    alike = defaultdict(list)
    for (package, name), result in found.items():
        if "skipped" in result:
            alike[package, _cell(result["skipped"])].append(name)
    return "\n".join(f"- {package}: {', '.join(names)}: {why}" for (package, why), names in alike.items()) or "None."


def _models(found: Found) -> str:
    rows = [_row(package, name, result) for (package, name), result in found.items() if "failed" in result]
    return _table(rows, "package", "model", "params", "masked", "share", "graphs", "dense MACs", "result")


def _row(package: str, name: str, result: dict[str, Any]) -> tuple[Any, ...]:
    size = f"{result['parameters']:,}" if "parameters" in result else ""
    outcome = ", ".join(result["failed"]) or "ok"
    if "share" not in result:
        return package, name, size, "", "", "", "", outcome
    masked = f"{result['masked']} / {result['multiplied']}"
    return package, name, size, masked, f"{result['share']:.3f}", result["graphs"], f"{result['macs']:,}", outcome


def _table(rows: list[tuple[Any, ...]], *head: str) -> str:
    return tabulate(rows, head, "github", disable_numparse=True)


def _cell(message: str) -> str:
    """Return a message that fits a cell of a table."""
    text = message.replace("|", "\\|")
    return text if len(text) <= 200 else text[:197] + "..."
