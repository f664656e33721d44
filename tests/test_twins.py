"""Twins: what stands under one name in two scripts has one source."""

import ast
import collections
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("*_*.py"))
# Definitions that may differ between scripts, each with the reason.
MAY_DIFFER = {
    "Args": "the options of the algorithm itself",
    "clipped_surrogate": "the row of the paper's comparison that the script is about",
    "main": "the update; everything around it is compared line by line below",
}
# Lines of main() outside the update that only some scripts have: each names an option or a log of its algorithm.
OWN_LINES = r"agent_blocks|clip_adaptation|position_of_agent"
UPDATE = re.compile(r"( *# -+ update\n)(.*?)(?= *# -+ log, evaluate, save\n)", re.DOTALL)


def definitions(script: Path) -> dict[str, str]:
    """Name -> source of every function, class and constant at the top level."""
    text, found = script.read_text(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.get_source_segment(text, node)
    return found


def variants() -> dict[str, dict[str, str]]:
    by_name = collections.defaultdict(dict)
    for script in SCRIPTS:
        for name, source in definitions(script).items():
            by_name[name][script.name] = source
    return by_name


def test_one_name_has_one_source():
    drifted = {name: list(by) for name, by in variants().items() if len(set(by.values())) > 1}
    assert set(drifted) <= set(MAY_DIFFER), drifted


@pytest.mark.parametrize("name", MAY_DIFFER)
def test_the_exceptions_are_needed(name):
    assert len(set(variants()[name].values())) > 1


def test_definitions_stand_in_the_same_order():
    orders = [list(definitions(script)) for script in SCRIPTS]
    for order in orders[1:]:
        shared = [name for name in order if name in orders[0]]
        assert shared == [name for name in orders[0] if name in shared]


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda path: path.stem)
def test_main_is_the_same_but_for_the_update(script):
    mains = [UPDATE.sub("", definitions(path)["main"]).splitlines() for path in (SCRIPTS[0], script)]
    changes = [line[2:] for line in difflib.ndiff(*mains) if line[0] in "+-"]
    assert not [line for line in changes if line.strip() and not re.search(OWN_LINES, line)]


def fields(script: Path) -> dict[str, tuple[str, str]]:
    """Option -> its source and docstring in Args."""
    text = script.read_text()
    (args,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    return {
        field.target.id: (ast.get_source_segment(text, field), ast.get_source_segment(text, doc))
        for field, doc in zip(args.body[::2], args.body[1::2], strict=True)
    }


def test_options_of_one_name_are_the_same():
    by_name = collections.defaultdict(set)
    for script in SCRIPTS:
        for name, source in fields(script).items():
            by_name[name].add(source)
    assert {name for name, sources in by_name.items() if len(sources) > 1} <= {
        "update_epochs"
    }  # blocks share the epochs
