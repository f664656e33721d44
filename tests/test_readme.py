"""What the README says of the scripts is true: the diff that it shows, the lines that it points to, its options.

`python tests/test_readme.py` writes the diff and the line numbers anew.
"""

import difflib
import importlib
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
UPDATE = re.compile(r" *# -+ update\n(.*?)(?= *# -+ log, evaluate, save\n)", re.DOTALL)
DIFF = re.compile(r"(<!-- update diff -->\n```diff\n)(?:(?!```).*\n)*(```\n)")
# TensorBoard's, tyro's, pip's, and those of benchmark/.
OTHER_OPTIONS = set("logdir help no-build-isolation out real scripts options iterations warmup".split())
OTHER_OPTIONS |= set("seconds turns reference reference-label smax algorithms".split())
# [`name`](script.py#L1) points to a definition, [`some text`](script.py#L1) to the one line that holds this text.
LINK = re.compile(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)")


def update_diff() -> str:
    """`diff -wU1` of the updates of MAPPO and A2PO, without line numbers and common indentation."""
    mappo, a2po = (
        [line[12:] for line in UPDATE.search((ROOT / name).read_text())[1].splitlines()]
        for name in ("mappo_smac.py", "a2po_smac.py")
    )
    stripped = [[line.strip() for line in lines] for lines in (mappo, a2po)]
    lines = []
    for group in difflib.SequenceMatcher(None, *stripped, autojunk=False).get_grouped_opcodes(1):
        lines.append("@@")
        for kind, a, b, c, d in group:
            if kind != "equal":
                lines += [f"-{line}" for line in mappo[a:b]]
            lines += [("+" if kind != "equal" else " ") + line for line in a2po[c:d]]
    return "\n".join(line.rstrip() for line in lines)


def line_of(text: str, script: str) -> int:
    """Number of the one line of a script that defines `text` or holds it."""
    lines = (ROOT / script).read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if re.match(rf"(def|class) {re.escape(text)}\b", line)]
    found = found or [i for i, line in enumerate(lines, 1) if text in line]
    assert len(found) == 1, f"{text} stands {len(found)} times in {script}"
    return found[0]


def updated(readme: str) -> str:
    readme = DIFF.sub(lambda m: m[1] + update_diff() + "\n" + m[2], readme)
    return LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[1], m[2])})", readme)


def test_diff_and_lines_are_those_of_the_scripts():
    readme = README.read_text()
    assert DIFF.search(readme) and len(LINK.findall(readme)) >= 10
    assert updated(readme) == readme, "run python tests/test_readme.py"


def test_diff_is_short_enough_to_be_read():
    assert 20 < len(update_diff().splitlines()) <= 63


def options() -> set[str]:
    """The options of all scripts, --no-… included."""
    names = set()
    for path in ROOT.glob("*_*.py"):
        for name, kind in typing.get_type_hints(importlib.import_module(path.stem).Args).items():
            option = name.replace("_", "-")
            names |= {option, f"no-{option}"} if kind is bool else {option}
    return names


def test_options_exist():
    """Every --option in the README is one of a script's; --help has them all."""
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", README.read_text()))
    assert len(named) > 5 and named - options() <= OTHER_OPTIONS


def test_sections():
    """What a reader looks for is there, in 300 lines, and the details are numbered."""
    readme = README.read_text()
    found = re.findall(r"^## (.*)$", readme, re.MULTILINE)
    wanted = ["Set-up", "A first run", "It learns", "From the paper to the code", "From MAPPO to A2PO, step by step"]
    wanted += ["Implementation details", "Something of your own", "SMAC", "MPE", "Google Research Football"]
    assert found == [*wanted, "Multi-agent MuJoCo", "Limits"]
    details = readme[readme.index("\n## Implementation details") :]
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", details, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 37
    assert len(readme.splitlines()) <= 300


def test_ci_knows_the_commands():
    """.ci/readme.py runs them; what it does not run, or not to the end, stands in the README."""
    sys.path.insert(0, str(ROOT / ".ci"))
    import readme

    text = README.read_text()
    found = readme.commands(text)
    assert len(found) > 10 and all(entry in found for entry in [".venv/bin/tensorboard --logdir runs"])
    for begin in [*readme.NOT_RUN, *readme.FIRST_OUTPUT]:
        assert any(command.startswith(begin) for command in found) or f"`{begin}" in text, begin


def test_tables_of_tasks():
    """SMAC's maps by game; the robots with their partitions and settings."""
    import a2po_mamujoco
    import a2po_smac

    rows = [[c.strip() for c in line.replace("\\|", "/").split("|")] for line in README.read_text().splitlines()]
    smac = {name: row[2:4] for row in rows if len(row) == 5 for name in row[1].split()}
    for name in {*a2po_smac.SMAX_MAPS, *a2po_smac.SMAC_MAPS}:
        assert smac[name] == ["yes" * (name in a2po_smac.SMAX_MAPS), "yes" * (name in a2po_smac.SMAC_MAPS)], name
    for robot, partitions in a2po_mamujoco.PARTITIONS.items():
        (row,) = [row for row in rows if len(row) == 5 and row[1] == robot]
        assert row[2].replace("/", "|").split() == list(partitions)
        assert [float(number) for number in row[3].split(",")] == list(a2po_mamujoco.TABLE_9[robot])


def test_every_script_is_in_the_matrix():
    readme = README.read_text()
    assert not [path.name for path in ROOT.glob("*_*.py") if f"]({path.name})" not in readme]


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+?)(?:#L?\w+)?\)", README.read_text())
    assert links and not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]


def test_an_environment_of_your_own(tmp_path):
    """tests/own.py in a copy of a2po_mpe.py, as the README says: it trains, is learned, resumed and evaluated."""
    own, script = (ROOT / "tests" / "own.py").read_text(), (ROOT / "a2po_mpe.py").read_text()
    begin, end = script.index("class Navigation:"), script.index("class Share:")
    script = script[:begin] + own[own.index("class Meeting:") :] + "\n\n" + script[end:]
    for old, new in (
        (r'    (local_ratio|simulator): .*\n    """[^"]*"""\n', ""),
        (r'    if args.simulator == "jaxmarl":\n        return .*\n', ""),
        (r"\(Navigation, args.n_agents, args.local_ratio\)", "(Meeting, args.n_agents)"),
        (r'"local_ratio", "simulator", "num_envs"\)', '"num_envs",)'),
        (r'return f"spread-.*"', 'return f"meeting-{args.n_agents}"'),
        (r'(args\.|    |TASK = \(")n_agents(?=\W)(?! = )', r"\1friends"),
    ):
        script, times = re.subn(old, new, script)
        assert times > 0, old
    (tmp_path / "a2po_meeting.py").write_text(script)

    def run(words):
        command = [sys.executable, "a2po_meeting.py", *words.split(), "--torch-threads", "1", "--num-workers", "1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--friends 3 --total-timesteps 800 --eval-every 8000 --learning-rate 1e-3")
    (folder,) = (tmp_path / "runs").iterdir()
    run(f"--resume {folder} --total-timesteps 8000")
    assert "greedy episodes: return" in run(f"--eval-only --checkpoint {folder / 'checkpoint.pt'} --out scores.jsonl")
    last = json.loads((folder / "eval.jsonl").read_text().splitlines()[-1])
    assert last["episodic_return"] > 2 * 25 * 3 / 9, "twice what random steps are paid"


if __name__ == "__main__":
    sys.exit(README.write_text(updated(README.read_text())) < 0)
