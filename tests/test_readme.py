"""What the README says of the scripts is true: the diff that it shows, the lines that it points to, its options.

`python tests/test_readme.py` writes the diff and the line numbers anew.
"""

import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
UPDATE = re.compile(r" *# -+ update\n(.*?)(?= *# -+ log, evaluate, save\n)", re.DOTALL)
DIFF = re.compile(r"(<!-- update diff -->\n```diff\n).*?(\n```\n)", re.DOTALL)
# [`name`](script.py#L1) points to a definition, [`some text`](script.py#L1) to the one line that holds this text.
LINK = re.compile(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)")


def update_diff() -> str:
    """`diff -U1` of the updates of MAPPO and A2PO, without line numbers and common indentation."""
    updates = [UPDATE.search((ROOT / name).read_text())[1].splitlines() for name in ("mappo_smac.py", "a2po_smac.py")]
    lines = list(difflib.unified_diff(*updates, n=1, lineterm=""))[2:]
    return "\n".join("@@" if line.startswith("@@") else (line[0] + line[9:]).rstrip() for line in lines)


def line_of(text: str, script: str) -> int:
    """Number of the one line of a script that defines `text` or holds it."""
    lines = (ROOT / script).read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if re.match(rf"(def|class) {re.escape(text)}\b", line)]
    found = found or [i for i, line in enumerate(lines, 1) if text in line]
    assert len(found) == 1, f"{text} stands {len(found)} times in {script}"
    return found[0]


def updated(readme: str) -> str:
    readme = DIFF.sub(lambda m: m[1] + update_diff() + m[2], readme)
    return LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[1], m[2])})", readme)


def test_diff_and_lines_are_those_of_the_scripts():
    readme = README.read_text()
    assert DIFF.search(readme) and len(LINK.findall(readme)) >= 10
    assert updated(readme) == readme, "run python tests/test_readme.py"


def test_diff_is_short_enough_to_be_read():
    assert 20 < len(update_diff().splitlines()) <= 60


def test_options_exist():
    """Every --option in the README is one of A2PO's."""
    import a2po_smac

    fields = {name.replace("_", "-") for name in a2po_smac.Args.__annotations__} | {"no-preopc", "no-cuda"}
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", README.read_text()))
    assert named - fields <= {"logdir", "out"}  # TensorBoard's and benchmark/curves.py's


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+?)(?:#L?\w+)?\)", README.read_text())
    assert links and not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]


if __name__ == "__main__":
    sys.exit(README.write_text(updated(README.read_text())) < 0)
