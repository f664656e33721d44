"""Tables and figures of runs: learning curves, sample efficiency, probability of improvement, the paper's table.

    python benchmark/plot.py benchmark/results/table2/3s5z-smax --out curves.png curves.svg
    python benchmark/plot.py runs --statistic iqm --out curves.png --efficiency efficiency.svg --table table.md
    python benchmark/plot.py runs --orders orders.png --algorithms a2po_smac-cyclic a2po_smac-random a2po_smac-greedy

What it reads: run directories (`runs/{task}__{name}__{seed}__{time}/` with an eval.jsonl), folders with files
`{script}[-variant]__{seed}.jsonl` of one task, which is called as the folder (`run.py --collect` writes them), and
folders of either. Beside each run are its settings, config.json or .config.json; and for --orders TensorBoard's events,
or what run.py has counted of them, .orders.json.

Pooled over seeds is what has the same settings, but for those that do not change the numbers, such as threads. The name
of an algorithm is its script or --exp-name; the paper's ablations -no-preopc, -vtrace, -random ...; the settings in
which runs of one task differ; and what was changed when a run was resumed. A run without settings is taken as it is
called, and a setting that an older one does not have tells nothing apart. From task to task settings may differ, as the
paper's do. --methods puts the scripts of several benchmarks side by side, whose areas are then compared over all tasks.

The score of a run is the median of its last ten evaluations, a table's cell the median (standard deviation, n - 1 in
the denominator) of the scores over the seeds, as in the paper. Intervals are 95% stratified bootstrap intervals
(rliable); beside those of areas stands p of a t test. With fewer than four runs the interquartile mean cuts nothing
off: it is the mean. Runs on Football have the paper's Table 3 besides.
"""

import collections
import contextlib
import io
import itertools
import json
import math
import re
import signal
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.cli import check_writable, parse_args, write  # noqa: E402
from benchmark.run import FREE, NO_SETTINGS, RULES, count_orders, read_config, resumed_with, variant  # noqa: E402


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """run directories, {script}__{seed}.jsonl files, or folders with either"""
    out: tuple[Path, ...] = ()
    """learning curves, a panel per task: files to write, .png or .svg"""
    efficiency: tuple[Path, ...] = ()
    """sample efficiency, the IQM over tasks and seeds at every step: files to write, .png or .svg"""
    improvement: tuple[Path, ...] = ()
    """probability that a run of one algorithm scores better than one of another: files to write, .png or .svg"""
    orders: tuple[Path, ...] = ()
    """A2PO's runs: how often each agent had each rank by E|A| (the paper's Figures 16 and 17), and each place in the
    order of the updates; a panel per task and algorithm: files to write, .png or .svg"""
    table: Path | None = None
    """Markdown file for the tables, which are printed in any case"""
    tasks: tuple[str, ...] = ()
    """only these tasks, in this order"""
    algorithms: tuple[str, ...] = ()
    """only these, in this order: a2po_smac or a2po_smac-no-preopc, or with settings, 'a2po_smac gae_lambda=0.91'"""
    methods: bool = False
    """call scripts by their method, so that a2po_smac and a2po_mpe are both a2po, to compare over several benchmarks"""
    until: float = math.inf
    """leave out later evaluations than at this step, to compare runs that went on with those that did not"""
    metric: Literal["auto", "win_rate", "episodic_return"] = "auto"
    """what counts; auto takes the win rate of tasks that have one, else the return"""
    over: Literal["steps", "hours"] = "steps"
    """what curves and areas are over: environment steps, or the hours that a run has taken, evaluations included (the
    paper's Figure 19); hours compare runs of one machine, with as much beside them"""
    statistic: Literal["mean", "iqm"] = "mean"
    """middle of the learning curves over the seeds"""
    title: str = ""
    """title of the figures"""
    reference: float | None = None
    """a horizontal line in the learning curves of a single task, such as a random policy's return"""
    reference_label: str = "reference"
    """its name"""
    reach: float = 0.9
    """the win rate for which the table of runs tells the first evaluation that reached it"""
    reps: int = 2000
    """bootstrap resamplings"""
    seed: int = 0
    """seed of the resampling"""


AXES = {"steps": "environment steps", "hours": "hours"}
METRICS = {"win_rate": "greedy win rate", "episodic_return": "greedy episodic return"}
ORDERS = {"rank": "rank by E|A|, 1 is the largest", "position": "place in the order"}
COUNTED = ("assist", "goal", "lost", "pass", "attempts")  # by episode, on Football
BEHAVIOUR = ("Assist", "Goal", "Lost", "Pass", "Pass Rate, %")
GRID_POINTS = 200
# Seaborn's colour-blind palette; with more algorithms the same colours come again with other dashes.
COLORS = "#0173b2 #de8f05 #029e73 #d55e00 #cc78bc #ca9161 #fbafe4 #949494 #ece133 #56b4e9".split()
DASHES = ("-", "--", ":", "-.")
PAPER = ("a2po", "mappo", "coppo", "happo")  # they have the first colours
ALGORITHM = rf"({'|'.join(PAPER)})(?:_[a-z0-9]+)?"  # one of them, with its benchmark or without, and without a variant
# Settings that runs of one name are not told apart by: the last five are in the name.
NOT_NAMED = FREE | NO_SETTINGS | set("seed preopc preopc_targets vtrace clip_adaptation agent_order".split())
# How variant() ends the name of a file, where there is no config to tell.
VARIANT = rf"(-vtrace|-preopc|-no-preopc)?(-gae-targets)?(-fixed-clip)?(-({'|'.join(RULES)}))?"


@dataclass
class Run:
    task: str
    script: str
    """or --exp-name, or what the file is called"""
    name: str
    """script and ablation, such as a2po_smac-no-preopc"""
    seed: int
    path: Path
    records: list[dict]
    """the evaluations by step"""
    resumed: str = ""
    """what was changed on the way"""
    settings: dict = field(default_factory=dict)
    """those that change the numbers and are not in the name"""
    algorithm: str = ""
    """what its group is called: name, settings that tell it apart, what was changed on the way"""

    def __post_init__(self):
        self.algorithm = self.name + self.resumed

    def curve(self, metric: str, over: str = "steps") -> tuple[np.ndarray, np.ndarray]:
        """Where its evaluations are, in steps or hours, and what they found."""
        if over == "hours" and not all(isinstance(record.get("seconds"), int | float) for record in self.records):
            usage_error("--over hours", f"{self.path} does not say the seconds of every evaluation")
        where = [record["seconds"] / 3600 if over == "hours" else record["step"] for record in self.records]
        return np.array(where, float), np.array([value_of(record, metric) for record in self.records], float)

    def score(self, metric: str) -> float:
        return float(np.median(self.curve(metric)[1][-10:]))


Runs = dict[str, dict[str, list[Run]]]  # task -> algorithm -> runs


def usage_error(what, why: str):
    """One line; exit status 2."""
    print(f"plot.py: error: {what}: {why}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def writing(what):
    """What cannot be written in here is an error in `what`."""
    try:
        yield
    except OSError as error:
        usage_error(what, f"cannot be written: {error.strerror}")


def make_room(what, file: Path):
    """A file's folder is made; whether the file can be written is found out before there is something to write."""
    with writing(what):
        file.parent.mkdir(parents=True, exist_ok=True)
        check_writable(file)


def warn(what, why: str):
    print(f"plot.py: warning: {what}: {why}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------- reading
def value_of(record: dict, metric: str) -> float | None:
    """A metric of an evaluation; the return is that of its episodes where it is not written down itself."""
    if metric == "episodic_return" and metric not in record and record.get("returns"):
        return float(np.mean(record["returns"]))
    return record.get(metric)


def read_records(path: Path) -> list[dict]:
    """The lines of an eval.jsonl by step. A last line that was cut off is left out, with a warning."""
    try:
        lines, records = path.read_text(errors="replace").splitlines(), {}
    except OSError as error:
        usage_error(path, f"cannot be read: {error.strerror}")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number < len(lines):
                usage_error(f"{path}:{number}", "is not a line of JSON")
            warn(f"{path}:{number}", "the last line is cut off and left out")
            continue
        values = []
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # not even of the right kind
            values = [value_of(record, metric) for metric in METRICS]
        values = [value for value in values if value is not None]
        numbers = [record.get("step"), *values] if values else []
        if not numbers or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
            usage_error(f"{path}:{number}", "must have a step and a win_rate or an episodic_return, all finite numbers")
        records[record["step"]] = record  # of two evaluations at one step, the later one
    if list(records) != sorted(records):
        warn(path, "its steps are not in order; have two runs written it?")
    return [records[step] for step in sorted(records)]


def named(settings: dict) -> str:
    return "".join(f" {name}={value}" for name, value in sorted(settings.items()))


def without_settings(called: str) -> str:
    """What `named` has not added."""
    return re.sub(r"( \w+=\S+)+$", "", called)


def read_run(path: Path, until: float = math.inf) -> Run | None:
    """The run of an eval.jsonl or a {script}__{seed}.jsonl; None, with a warning, if there is nothing in it."""
    parts = path.stem.split("__")
    if path.name == "eval.jsonl":
        directory = path.resolve().parent.name
        if len(directory.split("__")) != 4:
            usage_error(path, "its directory must be called {task}__{script}__{seed}__{time}")
        (task, called, seed, _), settings = directory.split("__"), path.with_name("config.json")
    elif len(parts) == 2 and all(parts):
        (called, seed), task, settings = parts, path.resolve().parent.name, path.with_suffix(".config.json")
    else:
        usage_error(path, "must be called {script}__{seed}.jsonl, or eval.jsonl in a run directory")
    if not seed.isdecimal():
        usage_error(path, f"its seed {seed} is no number")
    records = [record for record in read_records(path) if record["step"] <= until]
    if not records:
        warn(path, f"has no evaluation{' so early' if until < math.inf else ''} and is left out")
        return None
    config = read_config(settings)
    if not config and (settings.exists() or path.name == "eval.jsonl"):
        warn(settings, "cannot be read, the run is taken as it is called")
    script, ending = re.fullmatch(f"(.+?)({VARIANT})", called).group(1, 2)
    if config:
        ending = variant(config)
        script = without_settings(called).removesuffix(without_settings(ending))
    if config.get("exp_name", config.get("script")) != config.get("script"):
        script = config["exp_name"]
    elif str(config.get("script", "")).startswith(script):
        script = config["script"]
    resumed = ""
    for step, changed in resumed_with(config):
        resumed += f" resumed at {step} with" + (named(changed) or " its first settings")
    settings = {name: str(value) for name, value in config.items() if name not in NOT_NAMED}
    return Run(task, script, script + ending, int(seed), path, records, resumed, settings)


def name_groups(runs: list[Run]):
    """Give those that belong together one name, and no others."""
    values = collections.defaultdict(set)
    for run in runs:
        for setting, value in run.settings.items():
            values[run.task, run.script, setting].add(value)
    alike = collections.defaultdict(list)
    for run in runs:
        differ = {name for name in run.settings if len(values[run.task, run.script, name]) > 1}
        run.settings = {name: value for name, value in run.settings.items() if name in differ}
        alike[run.task, run.name, run.resumed].append(run)
    for some in alike.values():
        groups = {named(run.settings): run.settings for run in some}
        for run in some:
            # An older run may lack settings; if there is one group that it fits in, it is of that one.
            fit = [settings for settings in groups.values() if settings.items() >= run.settings.items()]
            widest = [settings for settings in fit if not any(settings.items() < other.items() for other in fit)]
            run.algorithm = run.name + named(widest[0] if len(widest) == 1 else run.settings) + run.resumed


def find_files(path: Path) -> list[Path]:
    """All evaluations in a file or folder."""
    if not path.exists():
        usage_error(path, "no such file or folder")
    if path.is_file():
        return [path]
    files = sorted([*path.rglob("eval.jsonl"), *path.rglob("*__*.jsonl")])
    if not files:
        usage_error(path, "has neither a run directory with an eval.jsonl nor a {script}__{seed}.jsonl in it")
    return files


def method(name: str) -> str:
    """a2po-no-preopc for a2po_smac-no-preopc."""
    return re.sub(r"_(smac|mamujoco|mpe|grf)\b", "", name, count=1)


def read(paths, tasks=(), algorithms=(), methods=False, until: float = math.inf) -> Runs:
    """Task -> algorithm (or with `methods` its name without the benchmark) -> its runs by seed, up to a step."""
    files = list(dict.fromkeys(file for path in paths for file in find_files(path)))
    every = [run for run in (read_run(file, until) for file in files) if run]
    if not every:
        usage_error(" ".join(map(str, paths)), "no run with an evaluation")
    check_names("--tasks", tasks, {run.task for run in every})
    every = [run for run in every if not tasks or run.task in tasks]
    name_groups(every)
    for run in every if methods else ():
        run.name, run.algorithm = method(run.name), method(run.algorithm)
    check_names("--algorithms", algorithms, {name for run in every for name in (run.algorithm, run.name)})
    found = {}
    for run in every:
        if algorithms and not {run.algorithm, run.name} & set(algorithms):
            continue
        key = run.task, run.algorithm, run.seed
        if key in found:
            further, other = sorted((found[key], run), key=lambda r: (r.records[-1]["step"], r.path.name))[::-1]
            warn(
                other.path,
                f"is left out: {further.path} has the same task, algorithm and seed, and is further or newer",
            )
            run = further
        found[key] = run
    runs = collections.defaultdict(lambda: collections.defaultdict(list))

    def order(run: Run):
        """As asked for, then by name."""
        asked = run.algorithm if run.algorithm in algorithms else run.name
        first = tasks.index(run.task) if tasks else 0, algorithms.index(asked) if algorithms else 0
        return first[0], run.task, first[1], run.algorithm, run.seed

    for run in sorted(found.values(), key=order):
        runs[run.task][run.algorithm].append(run)
    return runs


def check_names(option: str, wanted, there: set[str]):
    unknown = sorted(set(wanted) - there)
    if unknown:
        usage_error(f"{option} {' '.join(unknown)}", f"not among {', '.join(sorted(there))}")


def read_orders(runs: Runs) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Task -> algorithm -> rank or position -> (agents, 1 to n): the share of its runs' iterations in which an agent
    had it. A run that has not logged them is an error."""
    shares = collections.defaultdict(lambda: collections.defaultdict(dict))
    for task, by in runs.items():
        for name, some in by.items():
            counts = [run_orders(run.path) for run in some]
            for what in ORDERS:
                if len({len(of_run[what]) for of_run in counts}) > 1:
                    usage_error(f"--orders {task} {name}", "its runs have different numbers of agents")
                total = np.sum([of_run[what] for of_run in counts], 0)
                shares[task][name][what] = total / total.sum(1, keepdims=True)
    return shares


def run_orders(path: Path) -> dict[str, np.ndarray]:
    """What run.py's count_orders says of the run with these evaluations."""
    file = path.parent if path.name == "eval.jsonl" else path.with_suffix(".orders.json")
    try:
        counts = count_orders(file) if file.is_dir() else json.loads(file.read_text())
        counts = {what: np.array(counts[what], float) for what in ORDERS}
    except (OSError, ValueError, KeyError, TypeError):
        counts = {}
    n = len(counts.get("rank", ()))
    if n == 0 or any(x.shape != (n, n) or not (x >= 0).all() or not x.any(1).all() for x in counts.values()):
        why = "has no ranks of agents, as baselines and older runs of A2PO have none; choose by --algorithms"
        usage_error(f"--orders, {file}", why)
    return counts


def choose_metrics(runs: Runs, metric: str) -> dict[str, str]:
    """The metric of every task: one that all of its evaluations have."""
    chosen = {}
    for task, algorithms in runs.items():
        records = [record for some in algorithms.values() for run in some for record in run.records]
        there = [name for name in METRICS if all(value_of(record, name) is not None for record in records)]
        if not there or metric not in ("auto", *there):
            usage_error(task, f"not all of its evaluations have {'the same metric' if metric == 'auto' else metric}")
        chosen[task] = there[0] if metric == "auto" else metric
    return chosen


def check(runs: Runs):
    """Say what a reader of the figures should know."""
    longest = {task: max(r.records[-1]["step"] for some in by.values() for r in some) for task, by in runs.items()}
    for run in (run for by in runs.values() for some in by.values() for run in some):
        if run.records[-1]["step"] < 0.95 * longest[run.task]:
            warn(run.path, f"ends at step {run.records[-1]['step']}, others of {run.task} at {longest[run.task]}")
        if len(run.records) < 10:
            warn(run.path, f"has {len(run.records)} evaluations, its score is the median of those")
    single = [f"{task} {name}" for task, by in runs.items() for name, some in by.items() if len(some) == 1]
    if single:
        warn(", ".join(single), "one seed, therefore no interval and no standard deviation")


# ------------------------------------------------------------------------------------------------------ statistics
def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over the first axis: without the lowest and the highest quarter, rounded down."""
    cut = len(values) // 4
    return np.sort(values, 0)[cut : len(values) - cut].mean(0)


def common_grid(curves) -> np.ndarray:
    """Steps, or hours, that all curves (steps, values) span."""
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    return np.linspace(first, last, GRID_POINTS) if first < last else np.array([min(first, last)])


def on_grid(curves, grid) -> np.ndarray:
    """(curves, grid points), interpolated linearly."""
    return np.array([np.interp(grid, steps, values) for steps, values in curves])


def intervals(scores, statistic, args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95% stratified bootstrap interval of statistic(scores).

    scores (runs, tasks) or (runs, tasks, points), or two of them for a comparison; the runs of each task are drawn
    for themselves.
    """
    try:
        from rliable import library
    except ImportError as error:
        usage_error("rliable", f"{error}; pip install -r benchmark/requirements.txt")
    state = np.random.get_state()
    np.random.seed(args.seed)  # rliable draws from NumPy's global generator, whatever its random_state is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arch's, on resamples that are all the same
        _, ends = library.get_interval_estimates({"": scores}, statistic, reps=args.reps)
    np.random.set_state(state)
    return ends[""][0], ends[""][1]


def interval_over_tasks(samples: list[np.ndarray], args: Args) -> tuple[float, float]:
    """The same of the mean over tasks of each sample's mean; the tasks may have different numbers of seeds."""
    from arch.bootstrap import IndependentSamplesBootstrap

    bootstrap = IndependentSamplesBootstrap(*samples, seed=args.seed)
    ends = bootstrap.conf_int(lambda *drawn: np.mean([x.mean() for x in drawn]), args.reps, method="percentile")
    return tuple(ends[:, 0])


def t_test(samples: list[np.ndarray]) -> float:
    """Two-sided p of no difference in the mean over tasks, from a task's differences by seed each: of one task the
    paired t test, of several, each with a variance of its own, Welch's. With few seeds bootstrap intervals are too
    narrow."""
    from scipy import stats

    variances = np.array([x.var(ddof=1) / len(x) for x in samples])  # of each task's mean
    if not variances.any():
        return 0.0 if any(x.any() for x in samples) else 1.0
    freedom = variances.sum() ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(variances, samples, strict=True))
    t = sum(x.mean() for x in samples) / math.sqrt(variances.sum())
    return float(2 * stats.t.sf(abs(t), freedom))  # degrees of freedom by Welch and Satterthwaite


def middle_of(values: np.ndarray, statistic: str) -> np.ndarray:
    """values (runs, tasks, ...) -> (...): mean or IQM over runs and tasks."""
    flat = values.reshape(-1, *values.shape[2:])
    return np.atleast_1d(flat.mean(0) if statistic == "mean" else iqm(flat))


def score_matrices(runs: Runs, metrics: dict[str, str]) -> dict[str, np.ndarray]:
    """Algorithm -> scores (runs, tasks), over the tasks that all algorithms have, with as many runs for each."""
    tasks = shared_tasks(runs)
    matrices = {}
    for name in algorithms_of(runs):
        columns = [[run.score(metrics[task]) for run in runs[task][name]] for task in tasks]
        matrices[name] = rectangle(columns, name)
    return matrices


def rectangle(columns: list[list], name: str) -> np.ndarray:
    """Columns -> (runs, tasks, ...); where they have not as many runs each, the first ones."""
    fewest = min(map(len, columns))
    if max(map(len, columns)) > fewest:
        warn(name, f"has not as many seeds on all tasks: over tasks, the first {fewest} of each count")
    return np.stack([np.array(column[:fewest]) for column in columns], 1)


def algorithms_of(runs: Runs) -> list[str]:
    return list(dict.fromkeys(name for by in runs.values() for name in by))


def shared_tasks(runs: Runs) -> list[str]:
    names = algorithms_of(runs)
    tasks = [task for task, by in runs.items() if len(by) == len(names)]
    if not tasks:
        usage_error("these runs", "no task was run with all algorithms, nothing can be compared over tasks")
    if len(tasks) < len(runs):
        warn(", ".join(task for task in runs if task not in tasks), "not run with all algorithms, left out over tasks")
    return tasks


def scales(runs: Runs, metrics: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Task -> (low, span): over tasks, returns become (return - low) / span, within 0 and 1 by the task's lowest and
    highest evaluation (paper, Sec. 5.1); win rates stay as they are."""
    found = {}
    for task, by in runs.items():
        values = np.concatenate([run.curve(metrics[task])[1] for some in by.values() for run in some])
        found[task] = (0.0, 1.0)
        if metrics[task] != "win_rate":
            found[task] = float(values.min()), max(float(np.ptp(values)), 1e-12)
    return found


# ---------------------------------------------------------------------------------------------------------- tables
def number(value: float, metric: str, digits: int = 1) -> str:
    """A win rate in per cent, a return with three digits or more."""
    if metric == "win_rate":
        return f"{100 * value:.{digits}f}"
    return f"{value:.{max(0, 2 - int(math.log10(max(1, abs(value)))))}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    # A | in a name, such as Humanoid-9|8, would end its cell.
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paper_table(runs: Runs, metrics: dict[str, str]) -> str:
    """Median (standard deviation) over the seeds of every task and algorithm; and the paper's overall line."""
    names, rows, cells = algorithms_of(runs), [], {}
    for task, by in runs.items():
        row = [task]
        for name in names:
            scores = [run.score(metrics[task]) for run in by.get(name, [])]
            if not scores:
                row.append("")
                continue
            median = float(np.median(scores))
            deviation = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
            cells[task, name] = median, deviation
            spread = "one seed" if deviation is None else number(deviation, metrics[task], 2)
            row.append(f"{number(median, metrics[task])} ({spread})")
        rows.append(row)
    whole = [name for name in names if all((task, name) in cells for task in runs)]
    if len(runs) > 1 and set(metrics.values()) == {"win_rate"} and whole:
        row = ["overall (mean)"]
        for name in names:
            medians, deviations = zip(*[cells[task, name] for task in runs], strict=True) if name in whole else ((), ())
            spread = f" ({100 * np.mean(deviations):.2f})" if deviations and None not in deviations else ""
            row.append(f"{100 * np.mean(medians):.1f}{spread}" if medians else "")
        rows.append(row)
    return markdown(["task", *names], rows)


def interval_table(runs: Runs, metrics: dict[str, str], args: Args) -> str:
    """IQM [95% interval] of the scores, by task and, if all are win rates, over all tasks."""
    names, rows = algorithms_of(runs), []

    def cell(matrix, metric):
        middle = number(float(middle_of(matrix, "iqm")[0]), metric)
        if len(matrix) == 1:
            return f"{middle} [one seed]"
        low, high = intervals(matrix, lambda x: middle_of(x, "iqm"), args)
        return f"{middle} [{number(float(low[0]), metric)}, {number(float(high[0]), metric)}]"

    for task, by in runs.items():
        columns = [np.array([[run.score(metrics[task])] for run in by.get(name, [])]) for name in names]
        rows.append([task, *(cell(column, metrics[task]) if len(column) else "" for column in columns)])
    if len(runs) > 1 and set(metrics.values()) == {"win_rate"} and any(len(by) == len(names) for by in runs.values()):
        matrices = score_matrices(runs, metrics)
        rows.append(["all tasks", *(cell(matrices[name], "win_rate") for name in names)])
    return markdown(["task", *names], rows)


def run_table(runs: Runs, metrics: dict[str, str], reach: float) -> str:
    """Every run's score and, for win rates, the first evaluation that reached `reach`."""
    rows = []
    for task, by in runs.items():
        for name, some in by.items():
            curves, row = [run.curve(metrics[task]) for run in some], [task, name]
            row.append(", ".join(str(run.seed) for run in some))
            row.append(", ".join(str(int(steps[-1])) for steps, _ in curves))
            row.append(", ".join(str(round(run.score(metrics[task]), 3)) for run in some))
            first = [next((int(s) for s, v in zip(*curve, strict=True) if v >= reach), None) for curve in curves]
            row.append(", ".join(map(str, first)) if metrics[task] == "win_rate" else "")
            rows.append(row)
    header = ["task", "algorithm", "seeds", "last step", "median of the last ten evaluations, by seed"]
    return markdown([*header, f"first evaluation of {reach:g} or more, by seed"], rows)


def areas(by: dict[str, list[Run]], metric: str, over: str) -> dict[str, dict[int, float]]:
    """Algorithm -> seed -> area under the learning curve. Over steps the mean of the evaluations up to the step that
    all runs of the task have reached; over hours, where runs have not as many in the same time, of the curve between
    the hours that all span."""
    if over == "hours":
        grid = common_grid([run.curve(metric, over) for some in by.values() for run in some])
        return {
            name: {run.seed: float(on_grid([run.curve(metric, over)], grid).mean()) for run in some}
            for name, some in by.items()
        }
    end = 1.005 * min(run.records[-1]["step"] for some in by.values() for run in some)  # steps come in iterations
    found, times = collections.defaultdict(dict), set()
    for name, some in by.items():
        for run in some:
            steps, values = run.curve(metric)
            found[name][run.seed] = float(values[steps <= end].mean())
            times.add(int((steps <= end).sum()))
    if max(times) > min(times) + 1 and len(by) > 1:
        why = f"areas are means over {min(times)} to {max(times)} evaluations, more and less dense ones"
        warn(next(iter(by.values()))[0].task, why)
    return found


def area_table(runs: Runs, metrics: dict[str, str], args: Args) -> str:
    """The areas of every pair of algorithms over the seeds that both have, the mean of the differences by seed, with
    its 95% bootstrap interval over the seeds, with how many of them X has the larger area, and `t_test`'s p. Then the
    same over all tasks that both have, in per cent of the task's scale; each task's seeds are drawn for themselves."""
    rows, scale, pairs = [], scales(runs, metrics), collections.defaultdict(dict)

    def row(task, x, y, seeds, both: list[np.ndarray], metric):
        """both: of every task (seeds, 2)"""
        samples, interval, p = [areas_of_task[:, 0] - areas_of_task[:, 1] for areas_of_task in both], "one seed", ""
        if min(map(len, samples)) > 1:
            if len(samples) == 1:
                ends = [float(end[0]) for end in intervals(samples[0][:, None], lambda z: middle_of(z, "mean"), args)]
            else:
                ends = interval_over_tasks(samples, args)
            interval, p = ", ".join(number(end, metric, 2) for end in ends), f"{t_test(samples):.3f}"
        means = np.mean([areas_of_task.mean(0) for areas_of_task in both], 0)
        cells = [number(float(value), metric, 2) for value in (*means, means[0] - means[1])]
        ahead = f"{sum((x > 0).sum() for x in samples)} of {sum(map(len, samples))}"
        rows.append([task, x, y, seeds, *cells[:2], f"{cells[2]} [{interval}]", ahead, p])

    for task, by in runs.items():
        found = areas(by, metrics[task], args.over)
        for x, y in itertools.combinations(by, 2):
            of_x, of_y = found[x], found[y]
            seeds = sorted(of_x.keys() & of_y.keys())
            if seeds:
                both = np.array([[of_x[seed], of_y[seed]] for seed in seeds])
                row(task, x, y, ", ".join(map(str, seeds)), [both], metrics[task])
                pairs[x, y][task] = (both - scale[task][0]) / scale[task][1]
    for (x, y), by_task in pairs.items():
        if len(by_task) > 1:
            fewest, most = min(map(len, by_task.values())), max(map(len, by_task.values()))
            seeds = f"{fewest}{f' to {most}' if most > fewest else ''} of each"
            row(f"{len(by_task)} tasks", x, y, seeds, list(by_task.values()), "win_rate")
    return markdown(["task", "X", "Y", "seeds", "area X", "area Y", "X - Y", "X ahead", "p"], rows)


def behaviour(run: Run) -> tuple[float, ...] | None:
    """Table 3's metrics over the episodes of the last ten evaluations: means by episode, and the passes that arrived in
    per cent of those tried, NaN if there were none. None where they are not counted."""
    last = run.records[-10:]
    if not all(set(COUNTED) <= record.keys() for record in last):
        return None
    assists, goals, lost, passes, attempts = (np.mean([x for r in last for x in r[name]]) for name in COUNTED)
    return assists, goals, lost, passes, float(100 * passes / attempts) if attempts else math.nan


def behaviour_table(runs: Runs) -> str:
    """Mean (standard deviation) over the seeds, for the pass rate over those that tried; nothing where none counts."""
    names, rows = algorithms_of(runs), []
    for task, by in runs.items():
        found = {name: [behaviour(run) for run in some] for name, some in by.items()}
        found = {name: some for name, some in found.items() if None not in some}
        for k, metric in enumerate(BEHAVIOUR if found else ()):
            row, digits = [task, metric], 1 if "%" in metric else 2
            for name in names:
                values = [numbers[k] for numbers in found.get(name, []) if math.isfinite(numbers[k])]
                spread = f"{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "one seed"
                row.append(f"{np.mean(values):.{digits}f} ({spread})" if values else "")
            rows.append(row)
    return markdown(["task", "metric", *names], rows) if rows else ""


def improvements(runs: Runs, metrics: dict[str, str], args: Args) -> list[tuple[str, str, float, float, float]]:
    """(X, Y, P(X > Y), its interval) for every pair of algorithms; over tasks it is the mean of the tasks."""
    matrices, found = score_matrices(runs, metrics), []
    for x, y in itertools.combinations(matrices, 2):
        pair = matrices[x], matrices[y]
        point, low, high = float(improvement(*pair)[0]), math.nan, math.nan
        if min(map(len, pair)) > 1:
            low, high = (float(end[0]) for end in intervals(pair, improvement, args))
        found.append((x, y, point, low, high))
    return found


def improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(a run of x scores better than one of y), scores (runs, tasks); a tie counts one half."""
    better = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    return np.atleast_1d(better.mean())


# --------------------------------------------------------------------------------------------------------- figures
def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        usage_error("matplotlib", f"{error}; pip install -r benchmark/requirements.txt")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "a2po"  # the same picture is the same file
    import matplotlib.pyplot as plt

    return plt


def save(figure, files, title: str):
    if title:
        figure.suptitle(title)
    for file in files:
        picture, kind = io.BytesIO(), file.suffix[1:]
        try:
            figure.savefig(picture, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
        except ValueError as error:  # of mathematics in the titles
            usage_error(file, f"cannot be drawn: {str(error).strip().splitlines()[-1]}")
        with writing(file):
            write(file, picture.getvalue())
        print(f"wrote {file}", file=sys.stderr)


def styles(names: list[str]) -> dict[str, dict]:
    """Colour and dashes of lines. The paper's four algorithms have the same in every picture; where one is not
    in it, its first variant has its colour."""
    places = {name: PAPER.index(name.partition("_")[0]) for name in names if re.fullmatch(ALGORITHM, name)}
    others = itertools.count(len(PAPER))
    for name in names:
        place = PAPER.index(found[1]) if (found := re.match(ALGORITHM, name)) else None
        if name not in places:
            places[name] = next(others) if place is None or place in places.values() else place
    return {
        name: {"color": COLORS[place % len(COLORS)], "linestyle": DASHES[place // len(COLORS) % len(DASHES)]}
        for name, place in places.items()
    }


def draw(axes, curves_by_task: list[list], name: str, style: dict, statistic: str, label: str, args: Args):
    """The middle of curves (tasks x runs of (steps, values)) as a line with its interval."""
    grid = common_grid([curve for curves in curves_by_task for curve in curves])
    values = rectangle([list(on_grid(curves, grid)) for curves in curves_by_task], name)  # (runs, tasks, points)
    marker = {"marker": "o"} if len(grid) == 1 else {}
    axes.plot(grid, middle_of(values, statistic), **marker, label=label, **style)
    if len(values) > 1:
        low, high = intervals(values, lambda x: middle_of(x, statistic), args)
        axes.fill_between(grid, low, high, alpha=0.15, linewidth=0, color=style["color"])


def finish(axes, over: str):
    from matplotlib.ticker import EngFormatter

    if over == "steps":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
    axes.grid(alpha=0.3)


def seeds_label(name: str, counts: list[int]) -> str:
    if max(counts) == 1:
        return f"{name} (1 seed, no interval)"
    return f"{name} ({min(counts)}{f' to {max(counts)}' if max(counts) > min(counts) else ''} seeds)"


def plot_curves(runs: Runs, metrics: dict[str, str], args: Args):
    plt, style = pyplot(), styles(algorithms_of(runs))
    columns = min(len(runs), 4 if len(runs) > 6 else 3)
    rows = math.ceil(len(runs) / columns)
    size = (7, 4) if len(runs) == 1 else (3.6 * columns, 2.8 * rows + 0.6)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(runs) :]:
        axes.set_visible(False)
    handles = {}
    for (task, by), axes in zip(runs.items(), grid.flat, strict=False):
        metric = metrics[task]
        for name, some in by.items():
            counts = [len(other[name]) for other in runs.values() if name in other]
            label = seeds_label(name, counts)
            curves = [run.curve(metric, args.over) for run in some]
            draw(axes, [curves], name, style[name], args.statistic, label, args)
            handles[label] = axes.get_lines()[-1]
        if args.reference is not None:
            line = axes.axhline(args.reference, color="0.3", linestyle="--", linewidth=1, label=args.reference_label)
            handles[args.reference_label] = line
        episodes = {len(r["returns"]) for some in by.values() for run in some for r in run.records if r.get("returns")}
        ylabel = METRICS[metric] + (f" ({episodes.pop()} episodes)" if len(episodes) == len(runs) == 1 else "")
        axes.set(xlabel=AXES[args.over], ylabel=ylabel)
        axes.set_title(task if len(runs) > 1 else "", fontsize="medium")
        if metric == "win_rate":
            axes.set_ylim(-0.02, 1.02)
        finish(axes, args.over)
    heading = f"{'IQM' if args.statistic == 'iqm' else 'mean'} and 95% interval over seeds"
    if len(runs) == 1:
        axes.legend(title=heading, title_fontsize="small", fontsize="small")
    else:
        inches = 0.65 + 0.075 * max(map(len, handles))  # of the widest entry
        legend = {"loc": "outside lower center", "ncols": max(1, int(size[0] / inches)), "title": heading}
        figure.legend(handles.values(), handles.keys(), **legend)
    save(figure, args.out, args.title)


def plot_efficiency(runs: Runs, metrics: dict[str, str], args: Args):
    """Returns of several tasks are brought to 0..1, see `scales`."""
    tasks, names, plt = shared_tasks(runs), algorithms_of(runs), pyplot()
    curves = {(t, a): [run.curve(metrics[t], args.over) for run in runs[t][a]] for t in tasks for a in names}
    scaled = [task for task in tasks if metrics[task] != "win_rate"] if len(tasks) > 1 else []
    scale = scales(runs, metrics)
    for task in scaled:
        low, span = scale[task]
        for a in names:
            curves[task, a] = [(steps, (values - low) / span) for steps, values in curves[task, a]]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    style = styles(names)
    for name in names:
        label = seeds_label(name, [len(curves[task, name]) for task in tasks])
        draw(axes, [curves[task, name] for task in tasks], name, style[name], "iqm", label, args)
    over = f"{len(tasks)} tasks and their seeds" if len(tasks) > 1 else f"the seeds of {tasks[0]}"
    ylabel = "normalised score" if scaled else METRICS[metrics[tasks[0]]]
    axes.set(xlabel=AXES[args.over], ylabel=ylabel)
    if ylabel != METRICS["episodic_return"]:
        axes.set_ylim(-0.02, 1.02)
    finish(axes, args.over)
    axes.legend(title=f"IQM and 95% interval over {over}", title_fontsize="small", fontsize="small")
    save(figure, args.efficiency, args.title)


def plot_improvement(pairs, args: Args):
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.4 * len(pairs)), layout="constrained")
    for row, (_, _, point, low, high) in enumerate(reversed(pairs)):
        if math.isfinite(low):
            axes.barh(row, high - low, left=low, height=0.5, color=COLORS[0], alpha=0.3)
        axes.plot([point, point], [row - 0.25, row + 0.25], color=COLORS[0], linewidth=2)
    axes.set_yticks(range(len(pairs)), [f"{x} > {y}" for x, y, *_ in reversed(pairs)])
    axes.axvline(0.5, color="0.3", linestyle="--", linewidth=1)
    axes.set(xlim=(-0.02, 1.02), xlabel="probability of improvement, P(X > Y), and 95% interval")
    axes.grid(alpha=0.3, axis="x")
    save(figure, args.improvement, args.title)


def plot_orders(runs: Runs, shares, args: Args):
    """Stacked bars, one for each agent; of every task a row of panels for ranks and one for places."""
    plt, width = pyplot(), max(map(len, runs.values()))
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    rows = [(task, what) for task in runs for what in ORDERS]
    size = (3.2 * width + 1.2, 2.7 * len(rows) + 0.4)
    figure, grid = plt.subplots(len(rows), width, figsize=size, layout="constrained", squeeze=False)
    for (task, what), line in zip(rows, grid, strict=True):
        for axes in line[len(runs[task]) :]:
            axes.set_visible(False)
        for (name, some), axes in zip(runs[task].items(), line, strict=False):
            columns = shares[task][name][what].T  # of rank or place 1, 2, ...: a share for each agent
            n = len(columns)
            colors, agents, bottom = plt.get_cmap("viridis", n), np.arange(1, n + 1), np.zeros(n)
            for k, column in enumerate(columns):
                axes.bar(agents, column, bottom=bottom, color=colors(k), width=0.85)
                bottom += column
            label = f"{name} ({len(some)} seed{'s' * (len(some) > 1)})"
            axes.set_title(f"{task}\n{label}" if len(runs) > 1 else label, fontsize="medium")
            axes.set(xlabel="agent, from 1", ylabel="share of iterations", xlim=(0.4, n + 0.6), ylim=(0, 1))
            axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        colors = ScalarMappable(BoundaryNorm(np.arange(n + 1) + 0.5, n), colors)
        figure.colorbar(colors, ax=list(line), label=ORDERS[what], ticks=MaxNLocator(10, integer=True))
    save(figure, args.orders, args.title)


# ------------------------------------------------------------------------------------------------------------ main
MOST_CURVES = 30  # a longer legend leaves no room for the panels


def check_args(args: Args):
    if not args.paths:
        usage_error("paths", "name at least one run directory, file or folder")
    for option in ("out", "efficiency", "improvement", "orders"):
        for file in getattr(args, option):
            if file.suffix not in (".png", ".svg"):
                usage_error(f"--{option} {file}", "must end in .png or .svg")
            make_room(f"--{option} {file}", file)
    if args.table:
        make_room(f"--table {args.table}", args.table)
    if not 0 <= args.seed < 2**32:
        usage_error(f"--seed {args.seed}", f"must be within 0 and {2**32 - 1}")
    if args.reference is not None and not math.isfinite(args.reference):
        usage_error(f"--reference {args.reference}", "must be a number")
    if not args.until > 0:
        usage_error(f"--until {args.until:g}", "must be a number above 0")
    if args.orders and args.until < math.inf:
        usage_error(f"--until {args.until:g}", "is not for --orders, which counts all iterations of a run")
    if args.reps < 1:
        usage_error(f"--reps {args.reps}", "must be at least 1")


def main(args: Args):
    check_args(args)
    runs = read(args.paths, args.tasks, args.algorithms, args.methods, args.until)
    if (names := len(algorithms_of(runs))) > MOST_CURVES and args.out:
        usage_error("--out", f"{names} names of algorithms are too many for one picture; choose some by --algorithms")
    if args.reference is not None and len(runs) > 1:
        usage_error(f"--reference {args.reference:g}", f"is for one task, not for {', '.join(runs)}")
    metrics = choose_metrics(runs, args.metric)
    shares = read_orders(runs) if args.orders else {}
    check(runs)
    unit = "; win rates in per cent" if "win_rate" in metrics.values() else ""
    parts = [f"Median (standard deviation) over seeds of the median of the last ten evaluations{unit}:"]
    parts += [paper_table(runs, metrics), f"IQM of the same, [95% stratified bootstrap interval]{unit}:"]
    parts += [interval_table(runs, metrics, args), "Every run:", run_table(runs, metrics, args.reach)]
    if any(len(by) > 1 for by in runs.values()):
        heading = "mean over the evaluations up to the last step that all have"
        if args.over == "hours":
            heading = "mean over the hours from the last run's first evaluation to the first run's end"
        heading = f"Area under the learning curve ({heading}), paired by seed, [95% interval], p by a t test"
        if len(runs) > 1:
            heading += "; over tasks in per cent, returns of 0 to 100 by the task's lowest and highest evaluation"
        parts += [f"{heading}{unit}:", area_table(runs, metrics, args)]
    if table := behaviour_table(runs):
        heading = (
            "Behaviour (Table 3) in the episodes of the last ten evaluations, mean (standard deviation) over seeds"
        )
        parts += [f"{heading}; pass rate in per cent:", table]
    if args.improvement:
        if len(algorithms_of(runs)) < 2:
            usage_error("--improvement", "needs two algorithms")
        pairs = improvements(runs, metrics, args)
        ends = ["one seed" if math.isnan(low) else f"{low:.2f}, {high:.2f}" for *_, low, high in pairs]
        rows = [[x, y, f"{p:.2f} [{e}]"] for (x, y, p, *_), e in zip(pairs, ends, strict=True)]
        parts += ["Probability that a run of X scores better than one of Y:", markdown(["X", "Y", "P(X > Y)"], rows)]
        plot_improvement(pairs, args)
    text = "\n\n".join(parts)
    print(text)
    if args.table:
        with writing(args.table):
            write(args.table, text + "\n")
        print(f"wrote {args.table}", file=sys.stderr)
    if args.out:
        plot_curves(runs, metrics, args)
    if args.efficiency:
        plot_efficiency(runs, metrics, args)
    if args.orders:
        plot_orders(runs, shares, args)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    try:
        main(parse_args(Args, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
