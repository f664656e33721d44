"""Twins: what stands under one name in two scripts has one source."""

import ast
import collections
import difflib
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("*_*.py"))
# Definitions that may differ between the scripts of one benchmark, each with the reason.
MAY_DIFFER = {
    "Args": "the options of the algorithm itself",
    "clipped_surrogate": "the row of the paper's comparison that the script is about",
    "main": "the update; everything around it is compared line by line below",
}
# Definitions that may also differ from benchmark to benchmark.
OF_THE_BENCHMARK = {
    "Args": "its own options, defaults from its own table",
    "make_envs": "its own environments",
    "sequence_policy": "action masks, or none",
    "evaluate": "its own score",
    "complete_args": "defaults from its own table",
    "main": "its own buffers and scores, and Algorithm 1 where parameters are not shared",
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


def benchmark(script: str) -> str:
    return script.removesuffix(".py").split("_", 1)[1]


def test_one_name_has_one_source():
    """Within a benchmark, and among the A2PO scripts of all of them."""
    drifted = collections.defaultdict(set)
    for name, by_script in variants().items():
        for one, other in itertools.combinations(by_script, 2):
            same_algorithm = one.split("_")[0] == other.split("_")[0]
            allowed = MAY_DIFFER if benchmark(one) == benchmark(other) else OF_THE_BENCHMARK
            if not same_algorithm:
                allowed = allowed | MAY_DIFFER
            if by_script[one] != by_script[other] and name not in allowed:
                drifted[name] |= {one, other}
    assert not drifted


@pytest.mark.parametrize(("name", "among"), [(n, "smac") for n in MAY_DIFFER] + [(n, "a2po") for n in OF_THE_BENCHMARK])
def test_the_exceptions_are_needed(name, among):
    assert len({source for script, source in variants()[name].items() if among in script}) > 1


def test_definitions_stand_in_the_same_order():
    orders = [list(definitions(script)) for script in SCRIPTS]
    for order in orders[1:]:
        shared = [name for name in order if name in orders[0]]
        assert shared == [name for name in orders[0] if name in shared]


@pytest.mark.parametrize("name", ["mappo_smac", "coppo_smac", "happo_smac"])
def test_main_is_the_same_but_for_the_update(name):
    mains = [UPDATE.sub("", definitions(ROOT / f"{s}.py")["main"]).splitlines() for s in ("a2po_smac", name)]
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


# Options whose defaults or sources differ: Table 7 to 11 say so.
OWN_OPTIONS = {"update_epochs": "blocks share the epochs"}


def test_options_of_one_name_are_the_same():
    by_name = collections.defaultdict(lambda: collections.defaultdict(set))
    for script in SCRIPTS:
        for name, source in fields(script).items():
            by_name[benchmark(script.name)][name].add(source)
    differing = {name for options in by_name.values() for name, sources in options.items() if len(sources) > 1}
    assert differing <= set(OWN_OPTIONS)
