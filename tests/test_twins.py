"""The scripts side by side: one name has one source, sections and definitions stand in one order, and two neighbouring
algorithms differ in the algorithm alone."""

import ast
import collections
import difflib
import functools
import itertools
import re
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPTS

BENCHMARKS = sorted({name.split("_")[1] for name in SCRIPTS})
ALGORITHMS = ("mappo", "coppo", "happo", "a2po")  # from one to the next is a step of the paper
# Definitions that differ between the algorithms on one benchmark, each with the reason.
OF_THE_ALGORITHM = {
    "Settings": "its own options",
    "clipped_surrogate": "its row of the paper's comparison",
    "main": "the update",
}
# Definitions that differ from benchmark to benchmark.
OF_THE_BENCHMARK = {
    "Settings": "its own options, defaults from its own table",
    "Args": "its own simulator's processes",
    "act": "discrete or continuous actions, one network or several",
    "policy_change": "discrete or continuous actions",
    "ratio_statistics": "ratios of actions or of joints",
    "main": "Algorithm 1 where parameters are not shared, halves of games where a step takes long",
    "evaluate": "what has to be seen of several networks",
    "summarize": "its own scores",
    "make_envs": "its own environments",
    "PACKAGES": "its own simulator",
    "TASK": "its own names",
    "GAMES": "its own names",
    "SCORE": "its own scores",
    "RAW": "its own scores",
    "task_name": "its own names",
    "complete_args": "defaults from its own table",
}
# Where two algorithms on one benchmark may differ: the docstring, these options, functions, and the update.
ALGORITHM_OPTIONS = {"update_epochs", "agent_blocks", "agent_order", "preopc", "vtrace", "clip_adaptation"}
ALGORITHM_OPTIONS |= {"cumulative_blocks", "preopc_targets"}
ALGORITHM_FUNCTIONS = {"gae_advantages", "preopc_advantages", "vtrace", "clipped_surrogate"}
ALGORITHM_FUNCTIONS |= {"agent_order", "adaptive_clip"}
# Outside of them: the check of an option that some have, and an import that Football needs for A2PO's options alone.
ALGORITHM_LINES = r'if args\.(agent_blocks > n|cumulative_blocks and)|usage_error\("--(agent|cumulative)-blocks"'
ALGORITHM_LINES += "|from typing import (Literal, )?NamedTuple"
SECTIONS = ["settings", "equations", "networks", "networks over a rollout", "main", "evaluation, what is logged"]
SECTIONS += ["environments", "the run"]
STEPS = ["rollout", "update", "log, evaluate, save"]
# Script: last line of main, where the paper ends, and the number of lines.
BUDGETS = {
    "a2po_smac": (473, 1590),
    "a2po_mpe": (456, 1469),
    "a2po_mamujoco": (469, 1183),
    "a2po_grf": (505, 1910),
}


@functools.cache
def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


@functools.cache
def definitions(name: str) -> dict[str, ast.stmt]:
    """Name -> every function, class and constant at the top level."""
    found = {}
    for node in ast.parse(source(name)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {part.id: node for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)}
    return found


def text_of(name: str, node: ast.stmt) -> str:
    """Its source, decorators included."""
    begin = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return "\n".join(source(name).splitlines()[begin - 1 : node.end_lineno])


@functools.cache
def variants() -> dict[str, dict[str, str]]:
    """Name of a definition -> script -> its source there."""
    by_name = collections.defaultdict(dict)
    for script in SCRIPTS:
        for name, node in definitions(script).items():
            by_name[name][script] = text_of(script, node)
    return by_name


def test_one_name_has_one_source():
    drifted = collections.defaultdict(set)
    for name, by_script in variants().items():
        for one, other in itertools.combinations(by_script, 2):
            (algorithm, benchmark), (other_algorithm, other_benchmark) = one.split("_"), other.split("_")
            allowed = set(OF_THE_ALGORITHM) if algorithm != other_algorithm else set()
            allowed |= set(OF_THE_BENCHMARK) if benchmark != other_benchmark else set()
            if by_script[one] != by_script[other] and name not in allowed:
                drifted[name] |= {one, other}
    assert not drifted


@pytest.mark.parametrize(
    ("name", "among"), [(n, "_smac") for n in OF_THE_ALGORITHM] + [(n, "a2po") for n in OF_THE_BENCHMARK]
)
def test_the_exceptions_are_needed(name, among):
    assert len({text for script, text in variants()[name].items() if among in script}) > 1


def test_definitions_stand_in_the_same_order():
    orders = {script: list(definitions(script)) for script in SCRIPTS}
    for one, other in itertools.combinations(SCRIPTS, 2):
        shared = set(orders[one]) & set(orders[other])
        first, second = ([name for name in orders[script] if name in shared] for script in (one, other))
        assert first == second, (one, other)


# ---------------------------------------------------------------------------------------- algorithm against algorithm
def regions(name: str) -> list[str]:
    """For each line of a script whether it is of the algorithm, or else something with the line in it."""
    tree, lines = ast.parse(source(name)), source(name).splitlines()
    of_the_algorithm = set(range(tree.body[0].lineno, tree.body[0].end_lineno + 1))
    fields = {}
    for node in ast.walk(definitions(name)["Settings"]):
        if isinstance(node, ast.AnnAssign):
            fields[node.end_lineno + 1] = node
    for doc in (node for node in definitions(name)["Settings"].body if isinstance(node, ast.Expr)):
        field = fields.get(doc.lineno)
        if field and field.target.id in ALGORITHM_OPTIONS:
            of_the_algorithm |= set(range(field.lineno, doc.end_lineno + 1))
    for function, node in definitions(name).items():
        if function in ALGORITHM_FUNCTIONS:
            of_the_algorithm |= set(range(node.lineno, node.end_lineno + 1))
    begin, end = (step_line(lines, step) for step in STEPS[1:])
    of_the_algorithm |= set(range(begin, end))
    return [
        "the algorithm" if number in of_the_algorithm or not line.strip() or re.search(ALGORITHM_LINES, line) else line
        for number, line in enumerate(lines, 1)
    ]


def step_line(lines: list[str], step: str) -> int:
    (number,) = [n for n, line in enumerate(lines, 1) if re.fullmatch(rf" {{12}}# -+ {step}", line)]
    return number


PAIRS = [
    (f"{one}_{benchmark}", f"{other}_{benchmark}")
    for benchmark in BENCHMARKS
    for one, other in itertools.pairwise(ALGORITHMS)
    if {f"{one}_{benchmark}", f"{other}_{benchmark}"} <= set(SCRIPTS)
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_neighbouring_algorithms_differ_in_the_algorithm_alone(one, other):
    left, right = (source(name).splitlines() for name in (one, other))
    where = regions(one), regions(other)
    for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if kind != "equal":
            assert {*where[0][a:b], *where[1][c:d]} <= {"the algorithm"}, "\n".join(left[a:b] + ["---"] + right[c:d])


# ---------------------------------------------------------------------------------------- benchmark against benchmark
def rollout_and_update(name: str) -> str:
    lines = source(name).splitlines()
    return "\n".join(lines[step_line(lines, "rollout") - 1 : step_line(lines, "log, evaluate, save")])


@pytest.mark.parametrize("algorithm", [name.split("_")[0] for name in SCRIPTS if name.endswith("_mpe")])
def test_rollout_and_update_on_smac_and_mpe_are_one_text(algorithm):
    """Without death and masks there are all-ones; rewards are the team's or each agent's."""
    assert rollout_and_update(f"{algorithm}_smac") == rollout_and_update(f"{algorithm}_mpe")


# ------------------------------------------------------------------------------------------------------------ anatomy
@pytest.mark.parametrize("name", SCRIPTS)
def test_sections(name):
    """The same in the same order: whoever reads to the end of main has met settings, equations and networks, and no
    environment; what stands below `main` runs it."""
    lines = source(name).splitlines()
    assert [line.lstrip("# -") for line in lines if re.match(r"# -{20}", line)] == SECTIONS
    steps = [line.lstrip("# -") for line in lines if re.match(r" +# -{20}", line)]
    assert steps == STEPS
    assert lines[-3] == 'if __name__ == "__main__":' and lines[-1] == "    main(parse_args())"


@pytest.mark.parametrize("name", SCRIPTS)
def test_read_to_the_end_of_main(name):
    """What main calls stands above it, but for the environments, the run, evaluation and what is only logged."""
    lines = source(name).splitlines()
    assert any("Read to the end of `main`" in line for line in lines[:40])
    end = next(n for n, line in enumerate(lines, 1) if line.endswith("- evaluation, what is logged"))
    found = definitions(name)
    main = found["main"]
    assert main.end_lineno < end and list(found).index("main") == len([n for n in found.values() if n.lineno < end]) - 1
    used = {node.id for node in ast.walk(main) if isinstance(node, ast.Name)} & set(found)
    below = {used_name for used_name in used if found[used_name].lineno > end}
    run_only = {"complete_args", "make_envs", "usage_error", "Run", "Halves"}
    assert below <= run_only | {"evaluate", "explained_variance", "ratio_statistics"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_threads(name):
    """One for rollouts and evaluations, all for values and updates; test_train_smac sees them at work."""
    text = source(name)
    one, all_of_them = "torch.set_num_threads(1)", "torch.set_num_threads(args.torch_threads)"
    marks = [one, "- rollout\n", all_of_them, "- update\n", 'run.lap("update")', one, "- log, evaluate, save\n"]
    place = 0
    for mark in marks:
        place = text.index(mark, place) + 1
    assert text.count("set_num_threads") == 3


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets(name):
    main_ends, lines = BUDGETS[name]
    assert definitions(name)["main"].end_lineno <= main_ends
    assert len(source(name).splitlines()) <= lines


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.startswith("a2po")])
def test_baselines_are_shorter(name):
    """Than A2PO on their benchmark, to the end of main and in all."""
    a2po = f"a2po_{name.split('_')[1]}"
    assert definitions(name)["main"].end_lineno < definitions(a2po)["main"].end_lineno
    assert len(source(name).splitlines()) < len(source(a2po).splitlines())


def test_no_module_is_shared():
    """A script imports libraries and nothing of ours."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"benchmark", "tests"}
    for name in SCRIPTS:
        imported = set()
        for node in ast.walk(ast.parse(source(name))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert not imported & ours
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS), "nothing but scripts"


# ------------------------------------------------------------------------------------------------------------ options
def options(name: str) -> dict[str, tuple[str, str]]:
    """Option -> its source and docstring, in Settings or in Args."""
    body = definitions(name)["Settings"].body[1:] + definitions(name)["Args"].body
    fields = zip(body[::2], body[1::2], strict=True)
    return {field.target.id: (text_of(name, field), text_of(name, doc)) for field, doc in fields}


# Options that are not the same in all scripts of a benchmark.
OWN_OPTIONS = {"update_epochs": "blocks share the epochs", "preopc": "HAPPO has GAE, the paper's figures have both"}


def test_options_of_one_name_are_the_same():
    by_name = collections.defaultdict(lambda: collections.defaultdict(set))
    for script in SCRIPTS:
        for name, text in options(script).items():
            by_name[script.split("_")[1]][name].add(text)
    differing = {name for by_option in by_name.values() for name, texts in by_option.items() if len(texts) > 1}
    assert differing <= set(OWN_OPTIONS)


def test_every_test_file_is_found_by_name():
    """By layer: equations, environments, training, the run, command line, twins, README, benchmark."""
    layers = r"test_(equations|cli|twins|readme|run|(env|train|benchmark)_\w+)\.py"
    layers += r"|(reference|helpers|elsewhere|own|conftest)\.py"
    assert not [path.name for path in Path(__file__).parent.glob("*.py") if not re.fullmatch(layers, path.name)]
