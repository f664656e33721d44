"""What benchmark/README.md says of runs is what their committed files say: its tables, and differences in sentences.

Everything is computed from the lines of the files with NumPy, not by plot.py.
"""

import functools
import json
import math
import re
from typing import NamedTuple

import numpy as np
import pytest
from helpers import ROOT

RESULTS = ROOT / "benchmark/results"
LINES = (ROOT / "benchmark/README.md").read_text().splitlines()
TEXT = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(" ".join(LINES).split())).replace("**", "")
ALGORITHMS = {"MAPPO": "mappo", "CoPPO": "coppo", "HAPPO": "happo", "A2PO": "a2po"}
THREE, SIX = (1, 2, 3), (1, 2, 3, 4, 5, 6)


# ------------------------------------------------------------------------------------------------- numbers of a run
@functools.cache
def curve(run: str, seed: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and means of the evaluations. `run` is folder/script; A+B are the files of A, and of B where A has none."""
    files = [RESULTS / f"{one}__{seed}.jsonl" for one in run.split("+")]
    file = next((file for file in files if file.exists()), files[0])
    records = [json.loads(line) for line in file.read_text().splitlines()]
    name = {"win rate": "won", "return": "returns"}.get(metric, metric)
    values = [np.mean(record[name]) for record in records]
    return np.array([record["step"] for record in records]), np.array(values)


class Measure(NamedTuple):
    """A number of a run's evaluations up to a step."""

    what: str
    until: float = math.inf
    metric: str = "return"
    scale: float = 1

    def __call__(self, run: str, seed: int) -> float:
        steps, values = curve(run, seed, self.metric)
        values = self.scale * values[steps <= self.until]
        if self.what == "area":
            return values.mean()
        last_ten = values[-10:]
        numbers = {"score": np.median(last_ten), "mean of ten": last_ten.mean(), "first": values[0], "last": values[-1]}
        return numbers[self.what]


class Reaches(NamedTuple):
    """The step of the first evaluation of this value or more."""

    value: float
    metric: str = "return"

    def __call__(self, run: str, seed: int) -> float:
        steps, values = curve(run, seed, self.metric)
        return steps[np.argmax(values >= self.value)] if (values >= self.value).any() else math.inf


class Elsewhere(NamedTuple):
    """A measure of the run of the same name in another folder."""

    measure: Measure
    old: str
    new: str

    def __call__(self, run: str, seed: int) -> float:
        return self.measure(run.replace(self.old, self.new), seed)


def percent(what: str, until: float = math.inf) -> Measure:
    return Measure(what, until, "win rate", 100)


AREA, SCORE, FIRST, LAST = map(Measure, ("area", "score", "first", "last"))
TO_2M, TO_1M, TO_500K = (Measure("area", until) for until in (2.02e6, 1.02e6, 5.03e5))


# ------------------------------------------------------------------------------------------------- what is written
def shows(text: str, value: float) -> bool:
    """Whether this number, such as 0.5, 301k, 1.3M or never, is the rounded value."""
    if text in ("never", "not yet"):
        return math.isinf(value)
    digits, unit = re.fullmatch(r"(-?[\d.]+)([kM]?)", text).groups()
    unit = {"": 1, "k": 1e3, "M": 1e6}[unit]
    half = 0.5 * unit / 10 ** len(digits.partition(".")[2])
    return abs(float(digits) * unit - value) <= half + 1e-9


def difference(text: str, x, y, seeds) -> list[str]:
    """What is wrong with the first `5 (3 to 7, p = 0.1), 2 of 3` in a text, where x and y are functions of a seed: the
    mean of x - y or its size, a bootstrap interval of 95%, the p of a t test, how often x is above y."""
    pairs, wrong = np.array([x(seed) - y(seed) for seed in seeds]), []
    mean, low, high = re.search(r"(-?[\d.]*\d)[^()]*? \([^()]*?(-?[\d.]*\d) to (-?[\d.]*\d)", text).groups()
    if not shows(mean, pairs.mean()) and not shows(mean, -pairs.mean()):
        wrong.append(f"mean {pairs.mean():.4f}")
    means = np.random.default_rng(1).choice(pairs, (20_000, len(pairs))).mean(1)
    ends = np.percentile(means, (2.5, 97.5))
    # plot.py draws 2,000 times, so that its ends may be others by some of the width; of three seeds they are the least
    # and the largest difference.
    error = 0.06 * np.ptp(ends) if len(pairs) > 3 else 0
    for shown, end in zip((low, high), ends, strict=True):
        if abs(float(shown) - end) > error + 0.5 / 10 ** len(shown.partition(".")[2]) + 1e-9:
            wrong.append(f"interval {ends[0]:.4f} to {ends[1]:.4f}")
    words = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    ahead = re.search(rf"\b({'|'.join(words)}|\d+)(?: seeds?)? of (six|three|\d+)\b", text)
    if ahead:
        count, of = (words.get(word) or int(word) for word in ahead.groups())
        if (count, of) != ((pairs > 0).sum(), len(pairs)):
            wrong.append(f"ahead with {(pairs > 0).sum()} of {len(pairs)}")
    p = re.search(r"p = ([\d.]*\d)", text)
    if p:
        stats = pytest.importorskip("scipy.stats")
        if not shows(p[1], stats.ttest_1samp(pairs, 0).pvalue):
            wrong.append(f"p = {stats.ttest_1samp(pairs, 0).pvalue:.4f}")
    return wrong


# ------------------------------------------------------------------------------------------------------------- tables
class Table(NamedTuple):
    before: str
    """how the line begins that it is the next table after"""
    rows: list[tuple[str, str | None]]
    """for each how its label begins, and folder/script; None where there is nothing to check"""
    columns: dict[str, object]
    """how the heads begin -> a measure, by seed; "mean", of the column before; a Difference or Over"""


class Difference(NamedTuple):
    """X - Y, measures of the row's run, paired by seed."""

    x: Measure
    y: Measure


class Over(NamedTuple):
    """The difference of the row's mean to that of these runs' seeds 1 to 6, which are no pairs, by the last measure."""

    others: tuple[str, ...]
    sign: int = 1
    measure: Measure | None = None

    def wrong(self, text: str, run: str, last, seeds: int) -> list[str]:
        measure = self.measure or last
        others = np.array([measure(other, seed) for other in self.others for seed in SIX])
        random, sides = np.random.default_rng(1), (np.array([measure(run, k + 1) for k in range(seeds)]), others)
        mine, theirs = (random.choice(side, (20_000, len(side))).mean(1) for side in sides)
        ends = np.percentile(self.sign * (mine - theirs), (2.5, 97.5))
        shown, *interval = re.fullmatch(r"(-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)", text).groups()
        error, mean = 0.5 / 10 ** len(shown.partition(".")[2]), self.sign * (sides[0].mean() - others.mean())
        far = max(abs(float(end) - found) for end, found in zip(interval, ends, strict=True))
        if shows(shown, mean) and far <= 0.06 * np.ptp(ends) + error:
            return []
        return [f"{mean:.4f} ({ends[0]:.4f} to {ends[1]:.4f})"]


def rows(folder: str, script: str, **labels: str | None) -> list[tuple[str, str | None]]:
    """The four algorithms', or those that are named: A2PO_without="a2po_smac-no-preopc" begins with "A2PO without"."""
    labels = labels or {label: f"{name}_{script}" for label, name in ALGORITHMS.items()}
    return [(label.replace("_", " "), name and f"{folder}/{name}") for label, name in labels.items()]


def equal_settings() -> Table:
    """Table 10's for all on MPE, with one critic step and with two."""
    once = rows("figure10-critic-once/spread-3-0-jaxmarl", "mpe")
    _, a2po = once[-1]
    twice = Elsewhere(TO_500K, "critic-once", "critic-twice")
    columns = {"area, one": TO_500K, "mean": "mean", "area, two": twice, "two over one": Difference(twice, TO_500K)}
    columns |= {
        "A2PO over it, one": Difference(lambda run, seed: TO_500K(a2po, seed), TO_500K),
        "A2PO over it, two": Difference(lambda run, seed: twice(a2po, seed), twice),
    }
    return Table("**The same settings for all, Table 10's", once, columns)


def hard_map() -> Table:
    """3s5z_vs_3s6z to 1M steps: the runs to 2M until there, and further seeds."""
    folder, area = "table2/3s5z_vs_3s6z-smax", percent("area", 1.02e6)
    runs = [(label, f"{folder}/{name}_smac+{folder}-1M/{name}_smac") for label, name in ALGORITHMS.items()]
    over = Difference(lambda run, seed: area(runs[-1][1], seed), area)
    columns = {"area": area, "mean": "mean", "A2PO over it": over, "score": percent("score", 1.02e6)}
    return Table("**3s5z_vs_3s6z with six seeds", runs, columns)


def second_step_for_all() -> Table:
    """On 3s5z, with the epochs of the authors' launch scripts."""
    area, a2po = percent("area"), "critic-twice/3s5z-smax/a2po_smac"
    columns = {
        "area, two": area,
        "mean": "mean",
        "A2PO over it": Difference(lambda run, seed: area(a2po, seed), area),
        "two over one": Difference(area, Elsewhere(area, "critic-twice-baselines", "authors-baselines")),
        "win rate": percent("score"),
    }
    return Table("**The second step for all", rows("critic-twice-baselines/3s5z-smax", "smac")[:3], columns)


def eight_epochs_and_second_step_for_all() -> Table:
    """On 3s5z, where nothing differs but the algorithm."""
    area, a2po = percent("area"), "equal-critic/3s5z-smax/a2po_smac"
    columns = {
        "area": area,
        "mean": "mean",
        "A2PO over it": Difference(lambda run, seed: area(a2po, seed), area),
        "8 epochs over 5": Difference(area, Elsewhere(area, "equal-critic", "critic-twice-baselines")),
        "win rate": percent("score"),
    }
    runs = [*rows("equal-critic/3s5z-smax", "smac"), ("A2PO, five", "critic-five/3s5z-smax/a2po_smac")]
    return Table("**8 epochs and the second step for all", runs, columns)


def two_steps_for_all() -> Table:
    """Table 10's settings in MPE's general-sum game."""
    a2po = "equal-critic/spread-3-0.5-jaxmarl/a2po_mpe"
    columns = {
        "area": TO_500K,
        "mean": "mean",
        "A2PO over it": Difference(lambda run, seed: TO_500K(a2po, seed), TO_500K),
        "over the launch": Difference(TO_500K, Elsewhere(TO_500K, "equal-critic", "figure10-authors")),
        "score": Measure("score", 5.03e5),
    }
    return Table("**General-sum with the same settings", rows("equal-critic/spread-3-0.5-jaxmarl", "mpe"), columns)


def launch(before: str, game: str) -> Table:
    """The settings of the authors' launch scripts on MPE."""
    once, twice = (f"figure10-critic-{times}/{game}/a2po_mpe" for times in ("once", "twice"))
    a2po = f"figure10-authors/{game}/a2po_mpe"
    runs = rows(f"figure10-authors/{game}", "mpe") + [
        ("A2PO, lambda 0.97, one", once),
        ("A2PO, lambda 0.97, two", twice),
    ]
    over = Difference(lambda run, seed: TO_500K(a2po, seed), TO_500K)
    columns = {"area": TO_500K, "mean": "mean", "score": Measure("score", 5.03e5)}
    return Table(before, runs, columns | {"A2PO over it": over})


RETURNS = {"area": AREA, "mean": "mean", "score": SCORE, "last evaluation": LAST}
WINS = {"area": percent("area"), "mean": "mean", "score": percent("score"), "last evaluation": percent("last")}
AREA_OF_RETURNS = {"area": AREA, "mean": "mean", "win rate": percent("score"), "score": percent("score")}
HUMANOID = RETURNS | {"first return of 4,000": Reaches(4000)}
TO_1M_AND_2M = {"area,": AREA, "area to 1M": TO_1M, "mean": "mean", "score": SCORE, "last evaluation": LAST}
FORMER = {"first evaluation": FIRST, "last evaluation": LAST, "score": SCORE}
ORDERS = {"cyclic": "cyclic", "random": "random", "greedy": "greedy", "reverse greedy": "reverse-greedy"}
ORDERS |= {"reverse semi-greedy": "reverse-semi-greedy"}
TO_3M = {name: Elsewhere(m, "6x1/", "6x1-3M/") for name, m in {"area to 3M": AREA, "last evaluation": LAST}.items()}
BEHAVIOUR = {"passes": "pass", "assists": "assist", "goals": "goal"}
BEHAVIOUR = {name: Measure("mean of ten", metric=metric) for name, metric in BEHAVIOUR.items()}
TWELVE = ("figure5-7/3s5z-smax/a2po_smac", "smac-depth/a2po_smac+preopc/again/3s5z-smax/a2po_smac")
TWELVE_WITHOUT = ("figure5-7/3s5z-smax/a2po_smac-no-preopc", "preopc/again/3s5z-smax/a2po_smac-no-preopc")
TABLES = [
    Table(
        "**3s5z**, default",
        rows("table2/3s5z-smax", "smac"),
        WINS | {"first evaluation of 0.9": Reaches(0.9, "win rate")},
    ),
    Table("**3s5z_vs_3s6z**, nine", rows("table2/3s5z_vs_3s6z-smax", "smac"), WINS),
    hard_map(),
    Table("**HalfCheetah 2x3**, 2.0M", rows("figure3/HalfCheetah-2x3", "mamujoco"), RETURNS),
    Table("**HalfCheetah 2x3 at", rows("figure3/HalfCheetah-2x3-10M", "mamujoco"), RETURNS),
    Table(
        "**Walker2d 2x3**, the same",
        rows("figure3/Walker2d-2x3", "mamujoco")
        + [("A2PO, two", "figure3/Walker2d-2x3-3M/a2po_mamujoco-critic-twice")],
        {"area": TO_2M, "mean": "mean", "score": Measure("score", 2.02e6)},
    ),
    Table(
        "**To 3M steps**",
        rows("figure3/Walker2d-2x3-3M", "mamujoco")
        + [("A2PO, two", "figure3/Walker2d-2x3-3M/a2po_mamujoco-critic-twice")],
        RETURNS,
    ),
    Table("**Ant 4x2**, four", rows("figure3/Ant-4x2", "mamujoco"), RETURNS),
    Table(
        "**Humanoid 9|8**, two agents with 9 and 8 joints, 2.0M steps, six",
        rows("figure3/Humanoid-9_8", "mamujoco"),
        HUMANOID,
    ),
    *(
        Table(
            before,
            [("mean", f"figure3/{robot}/a2po_mamujoco"), ("product", f"action-ratio/{robot}/a2po_mamujoco")],
            RETURNS,
        )
        for before, robot in {
            "**Agent i's own": "HalfCheetah-2x3",
            "**On Walker2d 2x3**": "Walker2d-2x3",
            "**On Humanoid 9|8**": "Humanoid-9_8",
            "**On Ant 4x2**": "Ant-4x2",
        }.items()
    ),
    Table(
        "**40 environments of 100",
        [
            ("HalfCheetah 2x3 MAPPO", "figure3/HalfCheetah-2x3/mappo_mamujoco"),
            ("HalfCheetah 2x3 A2PO", "figure3/HalfCheetah-2x3/a2po_mamujoco"),
            ("Walker2d 2x3 MAPPO", "figure3/Walker2d-2x3/mappo_mamujoco"),
            ("Walker2d 2x3 A2PO", "figure3/Walker2d-2x3/a2po_mamujoco"),
        ],
        {
            "16 x 250": TO_2M,
            "40 x 100": Elsewhere(AREA, "figure3", "rollout-40x100"),
            "difference": Difference(Elsewhere(AREA, "figure3", "rollout-40x100"), TO_2M),
        },
    ),
    Table(
        "**A2PO with the former ratio",
        [
            ("HalfCheetah 2x3", "figure3-former-ratio/HalfCheetah-2x3/a2po_mamujoco"),
            ("Ant 4x2", "figure3-former-ratio/Ant-4x2/a2po_mamujoco"),
            ("Hopper 3x1", "figure3-former-ratio/Hopper-3x1/a2po_mamujoco"),
            ("Humanoid 17x1", "figure3-former-ratio/Humanoid-17x1/a2po_mamujoco"),
            ("Humanoid 9|8", "figure3-former-ratio/Humanoid-9_8/a2po_mamujoco"),
        ],
        FORMER,
    ),
    Table(
        "Football. Greedy win rate",
        [
            (drill, f"figure4/{drill}/a2po_grf")
            for drill in ("academy_empty_goal_close", "academy_run_to_score", "academy_pass_and_shoot_with_keeper")
        ],
        {name: measure._replace(metric="win rate") for name, measure in FORMER.items()},
    ),
    Table(
        "**The third drill with all",
        rows("figure4/academy_pass_and_shoot_with_keeper", "grf"),
        {"area": percent("area", 4.1e5), "score": percent("score"), "last evaluation": percent("last")} | BEHAVIOUR,
    ),
    Table(
        "**academy_3_vs_1_with_keeper**",
        rows("figure4/academy_3_vs_1_with_keeper", "", MAPPO="mappo_grf", A2PO="a2po_grf"),
        WINS | BEHAVIOUR,
    ),
    Table(
        "PreOPC, order of the agents",
        rows(
            "figure5-7/3s5z-smax",
            "",
            A2PO="a2po_smac",
            without_PreOPC="a2po_smac-no-preopc",
            without_the_adaptive_clip="a2po_smac-fixed-clip",
        )
        + [(f"{label} order", f"figure5-7/3s5z-smax/a2po_smac-{name}") for label, name in ORDERS.items()],
        {"seeds 1, 2, 3": percent("score"), "mean": "mean", "first evaluation of 90": Reaches(0.9, "win rate")},
    ),
    Table(
        "**Figure 5**",
        rows(
            "figure5/3s5z-smax",
            "",
            CoPPO="coppo_smac-vtrace",
            MAPPO="mappo_smac-vtrace",
            HAPPO="happo_smac-preopc",
            RPISA="rpisa_smac",
        ),
        {"area,": AREA, "mean": "mean", "A2PO's area over it": Over(TWELVE, -1, AREA), "win rate": percent("score")},
    ),
    Table(
        "V-trace, PreOPC and RPISA-PPO where",
        [
            (label, f"figure13/HalfCheetah-6x1/{name}+figure13/HalfCheetah-6x1-3M/{name}")
            for label, name in {
                "MAPPO": "mappo_mamujoco",
                "MAPPO with": "mappo_mamujoco-vtrace",
                "HAPPO": "happo_mamujoco",
                "HAPPO with": "happo_mamujoco-preopc",
                "RPISA": "rpisa_mamujoco",
                "A2PO": "a2po_mamujoco",
                "A2PO without": "a2po_mamujoco-no-preopc",
            }.items()
        ],
        {"area to 2M": TO_2M, "mean": "mean"} | TO_3M,
    ),
    Table(
        "**Humanoid 9|8**, two agents with 9 and 8 joints, 2.0M steps, three",
        [
            ("MAPPO", "figure3/Humanoid-9_8/mappo_mamujoco"),
            ("MAPPO with", "figure13/Humanoid-9_8/mappo_mamujoco-vtrace"),
            ("CoPPO", "figure3/Humanoid-9_8/coppo_mamujoco"),
            ("HAPPO", "figure3/Humanoid-9_8/happo_mamujoco"),
            ("HAPPO with", "figure13/Humanoid-9_8/happo_mamujoco-preopc"),
            ("RPISA", "figure13/Humanoid-9_8/rpisa_mamujoco"),
            ("A2PO", "figure3/Humanoid-9_8/a2po_mamujoco"),
            ("A2PO without", "figure13/Humanoid-9_8/a2po_mamujoco-no-preopc"),
        ],
        HUMANOID,
    ),
    Table(
        "**3 agents, cooperative**, 2.0M",
        rows("figure10/spread-3-0-jaxmarl", "mpe")
        + [("A2PO without", "figure10/spread-3-0-jaxmarl/a2po_mpe-no-preopc")],
        TO_1M_AND_2M,
    ),
    Table("**3 agents, general-sum**", rows("figure10/spread-3-0.5-jaxmarl", "mpe"), TO_1M_AND_2M),
    Table("**5 agents, cooperative**", rows("figure10/spread-5-0-jaxmarl", "mpe"), RETURNS),
    launch("**The same with the settings", "spread-3-0-jaxmarl"),
    equal_settings(),
    launch("**General-sum with the settings", "spread-3-0.5-jaxmarl"),
    two_steps_for_all(),
    Table(
        "**Depth, cumulative blocks, length of the rollout.** A2PO",
        rows(
            "mpe-depth",
            "",
            two_layers="a2po_mpe",
            the_same="a2po_mpe-cumulative",
            three="a2po_mpe-deep",
            the_same_="a2po_mpe-deep-cumulative",
            two_and_none="a2po_mpe-rollout-26",
        ),
        {"area": AREA},
    ),
    Table(
        "**Depth and cumulative blocks on SMAX",
        rows(
            "smac-depth",
            "",
            two_layers="a2po_smac",
            the_same="a2po_smac-cumulative",
            three="a2po_smac-deep",
            the_same_="a2po_smac-deep-cumulative",
        ),
        AREA_OF_RETURNS,
    ),
    Table(
        "number. But A2PO with more passes",
        [
            ("3 1, 3", "passes/epochs-3/3s5z-smax/a2po_smac"),
            ("8 (Table 7)", None),
            ("24 8, 24", "passes/epochs-24/3s5z-smax/a2po_smac"),
        ],
        AREA_OF_RETURNS | {"over the default": Over(TWELVE)},
    ),
    Table(
        "**Looking for the reason: the baselines' settings",
        rows("authors-baselines/3s5z-smax", "", A2PO=None, CoPPO="coppo_smac", MAPPO="mappo_smac", HAPPO="happo_smac"),
        AREA_OF_RETURNS | {"A2PO over it": Over(TWELVE, -1)},
    ),
    Table(
        "**Looking for the reason: the critic", rows("critic-twice/3s5z-smax", "", A2PO="a2po_smac"), AREA_OF_RETURNS
    ),
    second_step_for_all(),
    eight_epochs_and_second_step_for_all(),
    Table(
        "The measure is the area under",
        [
            ("A2PO", "figure5-7/3s5z-smax/a2po_smac"),
            ("A2PO again", "smac-depth/a2po_smac+preopc/again/3s5z-smax/a2po_smac"),
            ("without PreOPC", "figure5-7/3s5z-smax/a2po_smac-no-preopc"),
            ("without PreOPC again", "preopc/again/3s5z-smax/a2po_smac-no-preopc"),
        ],
        AREA_OF_RETURNS,
    ),
    Table(
        "**With 10 environments of 320",
        rows("preopc/10x320/3s5z-smax", "", A2PO="a2po_smac", without="a2po_smac-no-preopc"),
        AREA_OF_RETURNS,
    ),
    Table(
        "**What rho does",
        [
            ("min(1, rho) replaced", "preopc/rho-mean/3s5z-smax/a2po_smac"),
            ("min(1, rho) over", "preopc/rho-variation/3s5z-smax/a2po_smac"),
            ("rho of another", "preopc/rho-other/3s5z-smax/a2po_smac"),
            ("rho by a policy", "preopc/rho-held-out/3s5z-smax/a2po_smac"),
            ("A2PO with lambda 0.98", "preopc/lambda-0.98/3s5z-smax/a2po_smac"),
        ],
        AREA_OF_RETURNS | {"over A2PO": Over(TWELVE), "over without": Over(TWELVE_WITHOUT)},
    ),
]


def cells(line: str) -> list[str]:
    """Of a row, without links and bold letters."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line.strip().replace(r"\|", "\0")).replace("**", "")
    return [cell.strip().replace("\0", "|") for cell in text[1:-1].split("|")]


def read_table(before: str) -> tuple[list[str], list[list[str]]]:
    """The head and the rows; where two columns have no head the first goes on until it is another, and both are one."""
    (place,) = (k for k, line in enumerate(LINES) if line.startswith(before))
    place += next(k for k, line in enumerate(LINES[place:]) if line.startswith("|"))
    lines = [cells(line) for line in LINES[place:]][: next(k for k, line in enumerate(LINES[place:]) if not line)]
    head, _, *rows = lines
    if head[1] in ("", "passes, updates an iteration"):
        head = head[1:]
        for above, row in zip(rows, rows[1:], strict=False):
            row[0] = row[0] or above[0]
        rows = [[f"{row[0]} {row[1]}", *row[2:]] for row in rows]
    return head, rows


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.before)
def test_table(table):
    head, found = read_table(table.before)
    columns = [next((m for begin, m in table.columns.items() if name.startswith(begin)), None) for name in head]
    assert len(found) == len(table.rows)
    wrong, checked = [], set()
    for row, (label, run) in zip(found, table.rows, strict=True):
        assert row[0].startswith(label.strip())
        values, last, seeds = [], None, 0
        for name, cell, measure in zip(head, row, columns, strict=True):
            if run is None or measure is None or not cell:
                continue
            checked.add(name)
            what = f"{row[0]}, {name}: {cell}, by the files"
            if isinstance(measure, Difference):
                x, y = (functools.partial(one, run) for one in measure)
                wrong += [f"{what} {error}" for error in difference(cell, x, y, range(1, seeds + 1))]
                continue
            if isinstance(measure, Over):
                wrong += [f"{what} {error}" for error in measure.wrong(cell, run, last, seeds)]
                continue
            shown = [number.strip() for number in re.sub(r"\(.*\)", "", cell).split(",")]
            if measure != "mean":
                last, seeds = measure, len(shown)
                values = [measure(run, seed) for seed in range(1, seeds + 1)]
            numbers = [np.mean(values)] if measure == "mean" else values
            if len(shown) != len(numbers) or not all(map(shows, shown, numbers)):
                wrong.append(f"{what} {', '.join(f'{x:.4f}' for x in numbers)}")
    assert checked == {name for name, measure in zip(head, columns, strict=True) if measure} != set()
    assert not wrong, "\n".join(wrong)


# --------------------------------------------------------------------------------------------------- over several tasks
class Game(NamedTuple):
    """A task with its runs: label -> folder/script."""

    runs: dict[str, str]
    metric: str = "return"
    until: float = math.inf

    def seeds(self, label: str) -> set[int]:
        return {
            k for k in range(1, 13) if any((RESULTS / f"{r}__{k}.jsonl").exists() for r in self.runs[label].split("+"))
        }

    def differences(self, x: str, y: str) -> np.ndarray:
        """Of the areas, in per cent: of games won, or of the way from the task's lowest evaluation to its highest."""
        every = [curve(self.runs[label], k, self.metric) for label in self.runs for k in self.seeds(label)]
        values = np.concatenate([values[steps <= self.until] for steps, values in every])
        low, span = (0, 1) if self.metric == "win rate" else (values.min(), np.ptp(values))
        end = 1.005 * min(min(steps[-1], self.until) for steps, _ in every)
        area = Measure("area", end, self.metric)
        pairs = [area(self.runs[x], k) - area(self.runs[y], k) for k in sorted(self.seeds(x) & self.seeds(y))]
        return 100 * np.array(pairs) / span


def over_tasks(text: str, x: str, y: str, games: list[Game]) -> list[str]:
    """What is wrong with `5 (3 to 7), 8 of 9, p = 0.1`: the mean over tasks, seeds drawn for each task, Welch's p."""
    samples, wrong = [game.differences(x, y) for game in games], []
    mean = np.mean([sample.mean() for sample in samples])
    random = np.random.default_rng(1)
    drawn = np.mean([random.choice(sample, (20_000, len(sample))).mean(1) for sample in samples], 0)
    ends = np.percentile(drawn, (2.5, 97.5))
    shown, *interval = re.search(r"(-?[\d.]+)\D*? \(\D*?(-?[\d.]*\d) to (-?[\d.]*\d)", text).groups()
    if not shows(shown, mean):
        wrong.append(f"mean {mean:.4f}")
    if any(abs(float(end) - mine) > 0.06 * np.ptp(ends) + 0.05 for end, mine in zip(interval, ends, strict=True)):
        wrong.append(f"interval {ends[0]:.3f} to {ends[1]:.3f}")
    ahead, pairs = sum((sample > 0).sum() for sample in samples), sum(map(len, samples))
    if f"{ahead} of {pairs}" not in text:
        wrong.append(f"ahead in {ahead} of {pairs}")
    stats = pytest.importorskip("scipy.stats")
    variances = [sample.var(ddof=1) / len(sample) for sample in samples]
    freedom = sum(variances) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(variances, samples, strict=True))
    p = 2 * stats.t.sf(abs(mean) * len(samples) / math.sqrt(sum(variances)), freedom)
    sign, said = re.search(r"p ([=<]) ([\d.]*\d)", text).groups()
    if not (shows(said, p) if sign == "=" else p < float(said)):
        wrong.append(f"p = {p:.4f}")
    return wrong


def game(folder: str, script: str, metric: str = "return", until: float = math.inf, **others: str) -> Game:
    return Game({label: f"{folder}/{name}_{script}" for label, name in ALGORITHMS.items()} | others, metric, until)


SHARED = [game(f"table2/{name}-smax", "smac", "win rate") for name in ("3s5z", "3s5z_vs_3s6z")]
SHARED += [game(f"figure10/spread-3-{ratio}-jaxmarl", "mpe") for ratio in ("0", "0.5")]
EACH = [
    game(f"figure3/{robot}", "mamujoco") for robot in ("HalfCheetah-2x3", "Walker2d-2x3", "Ant-4x2", "Humanoid-9_8")
]


def launched(mpe: str = "", easy: str = "critic-twice/3s5z-smax/a2po_smac") -> list[Game]:
    """With the launch settings, but for A2PO's runs of these folders."""
    games = [game("authors-baselines/3s5z-smax", "smac", "win rate", 5.03e5, A2PO=easy)]
    for name in ("spread-3-0-jaxmarl", "spread-3-0.5-jaxmarl"):
        folder = f"figure10-authors/{name}"
        games.append(game(folder, "mpe", "return", 5.03e5, A2PO=f"{mpe or folder.split('/')[0]}/{name}/a2po_mpe"))
    return games


COOPERATIVE = "spread-3-0-jaxmarl"
EQUAL = [
    game("equal-critic/3s5z-smax", "smac", "win rate", 5.03e5),
    game(f"figure10-critic-twice/{COOPERATIVE}", "mpe", "return", 5.03e5, A2PO=f"value-clip/{COOPERATIVE}/a2po_mpe"),
    game("equal-critic/spread-3-0.5-jaxmarl", "mpe", "return", 5.03e5),
]


def test_all_tasks_together():
    _, found = read_table("Our question: does the paper's claim")
    wrong = []
    assert len(found) == 6
    for x, y, _, _, gap, ahead, p, _ in found:
        text = f"{gap}, {ahead}, p = {p}"
        wrong += [f"{x}, {y}: {text}, by the files {error}" for error in over_tasks(text, x, y, SHARED + EACH)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("before", "rows"),
    [
        ("**No: in the first 10", {"SMAX and MPE": SHARED, "MuJoCo": EACH}),
        (
            "**The launch scripts' settings",
            {
                "as in the": launched(),
                "on MPE": launched("figure10-critic-twice"),
                "so, with": launched("figure10-critic-once", "figure5-7/3s5z-smax/a2po_smac"),
                "Tables 7 and 10": EQUAL,
            },
        ),
    ],
)
def test_tasks_of_a_kind(before, rows):
    head, found = read_table(before)
    wrong = []
    for row, (label, games) in zip(found, rows.items(), strict=True):
        assert row[0].startswith(label)
        for y, text in zip(head[1:], row[1:], strict=True):
            wrong += [f"{row[0]}, {y}: {text}, by the files {error}" for error in over_tasks(text, "A2PO", y, games)]
    assert not wrong, "\n".join(wrong)


def test_in_short():
    """Its rows are those of the longer tables, without their intervals."""
    _, found = read_table("**Is A2PO ahead?**")
    _, every = read_table("Our question: does the paper's claim")
    (_, shared), (_, launch) = (
        read_table(f"**{words}") for words in ("No: in the first 10", "The launch scripts' set")
    )
    longer = [[f"{gap}, {ahead}, p = {p}" for x, _, _, _, gap, ahead, p, _ in every if x == "A2PO"]]
    longer += [row[1:] for row in (*shared, launch[0], launch[-1])]
    short = [[re.sub(r" \([^)]*\)|ahead in ", "", cell) for cell in row] for row in longer]
    assert [row[2:] for row in found] == short


# ---------------------------------------------------------------------------------------------------------- sentences
class Said(NamedTuple):
    """Differences of runs that are paired by seed, X - Y, each followed by a bracket with its interval."""

    folder: str
    measure: Measure
    seeds: tuple[int, ...]
    differences: dict[str, tuple[str, str]]
    """how what is said begins -> scripts X and Y; with a folder where it is another"""


CRITIC_TWICE = "figure3/Walker2d-2x3-3M/a2po_mamujoco-critic-twice"
V_TRACE, WITH, WITHOUT = "mappo_mamujoco-vtrace", "happo_mamujoco-preopc", "a2po_mamujoco-no-preopc"
MAPPO, COPPO, HAPPO, A2PO = (f"{name}_mamujoco" for name in ALGORITHMS.values())
MAPPO_MPE, COPPO_MPE, HAPPO_MPE, A2PO_MPE = (f"{name}_mpe" for name in ALGORITHMS.values())
MAPPO_SMAC, COPPO_SMAC, HAPPO_SMAC, A2PO_SMAC = (f"{name}_smac" for name in ALGORITHMS.values())
LAUNCH_3S5Z, HARD_TWICE = "authors-baselines/3s5z-smax", "critic-twice/3s5z_vs_3s6z-smax/a2po_smac"
HUMANOID_RUNS, ONCE, TWICE = "figure3/Humanoid-9_8", "figure10-critic-once", "figure10-critic-twice"
SENTENCES = [
    Said(
        "value-clip/3s5z_vs_3s6z-smax",
        percent("area"),
        (4, 5, 6),
        {"0.9 lower than with it": ("mappo_smac-former-clip", "table2/3s5z_vs_3s6z-smax-1M/mappo_smac")},
    ),
    Said(
        "table2/3s5z_vs_3s6z-smax",
        percent("area"),
        THREE,
        {
            "15.0 (95% interval": (COPPO_SMAC, A2PO_SMAC),
            "11.6 (5.8": (MAPPO_SMAC, A2PO_SMAC),
            "6.7 behind HAPPO": (HAPPO_SMAC, A2PO_SMAC),
        },
    ),
    Said(
        "figure3/HalfCheetah-2x3",
        AREA,
        SIX,
        {"182 below HAPPO's": (A2PO, HAPPO), "387 below CoPPO's": (A2PO, COPPO), "397 below MAPPO's": (A2PO, MAPPO)},
    ),
    Said(
        "figure3/HalfCheetah-2x3-10M",
        AREA,
        THREE,
        {"10 above HAPPO's": (A2PO, HAPPO), "788 below MAPPO's": (A2PO, MAPPO), "1883 below CoPPO's": (A2PO, COPPO)},
    ),
    Said(
        "figure3/Walker2d-2x3",
        TO_2M,
        SIX,
        {
            "107 below MAPPO's": (A2PO, MAPPO),
            "148 above HAPPO's": (A2PO, HAPPO),
            "426 above CoPPO's": (A2PO, COPPO),
            "533 above CoPPO": (MAPPO, COPPO),
            "The second critic step is worth 124": (CRITIC_TWICE, A2PO),
            "17 above MAPPO": (CRITIC_TWICE, MAPPO),
            "272 above HAPPO": (CRITIC_TWICE, HAPPO),
            "550 above CoPPO": (CRITIC_TWICE, COPPO),
            "the difference is 52": ("action-ratio/Walker2d-2x3/a2po_mamujoco", A2PO),
        },
    ),
    Said(
        "figure3/Walker2d-2x3-3M",
        AREA,
        SIX,
        {
            "143 below MAPPO's": (A2PO, MAPPO),
            "161 above CoPPO's": (A2PO, COPPO),
            "164 above HAPPO's": (A2PO, HAPPO),
            "305 above CoPPO": (MAPPO, COPPO),
            "314 above itself": (CRITIC_TWICE, A2PO),
            "171 above MAPPO": (CRITIC_TWICE, MAPPO),
            "478 above HAPPO": (CRITIC_TWICE, HAPPO),
            "476 above CoPPO": (CRITIC_TWICE, COPPO),
        },
    ),
    Said(
        "figure3/Ant-4x2",
        AREA,
        THREE,
        {
            "57 above MAPPO's": (A2PO, MAPPO),
            "103 below CoPPO's": (A2PO, COPPO),
            "247 above HAPPO's": (A2PO, HAPPO),
            "350 (235": (COPPO, HAPPO),
            "160 (58": (COPPO, MAPPO),
        },
    ),
    Said(
        HUMANOID_RUNS,
        AREA,
        SIX,
        {
            "290 above MAPPO's": (A2PO, MAPPO),
            "139 below it": (A2PO, HAPPO),
            "429 above MAPPO's": (HAPPO, MAPPO),
            "326 above MAPPO's": (COPPO, MAPPO),
            "291 above the mean's": ("action-ratio/Humanoid-9_8/a2po_mamujoco", A2PO),
        },
    ),
    Said(
        HUMANOID_RUNS,
        AREA,
        THREE,
        {
            "210 below that": (A2PO, f"figure13/Humanoid-9_8/{WITHOUT}"),
            "238 below HAPPO's": (f"figure13/Humanoid-9_8/{WITH}", HAPPO),
            "674 above MAPPO's": (f"figure13/Humanoid-9_8/{V_TRACE}", MAPPO),
            "327 above A2PO's": (f"figure13/Humanoid-9_8/{V_TRACE}", A2PO),
            "181 above HAPPO with": (A2PO, f"figure13/Humanoid-9_8/{WITH}"),
            "557 above MAPPO": (f"figure13/Humanoid-9_8/{WITHOUT}", MAPPO),
            "1690 below A2PO": (A2PO, "figure13/Humanoid-9_8/rpisa_mamujoco"),
        },
    ),
    Said(
        "figure3/HalfCheetah-2x3",
        AREA,
        THREE,
        {
            "The difference, 442": ("action-ratio/HalfCheetah-2x3/a2po_mamujoco", A2PO),
            "127 below it on HalfCheetah": (
                f"rollout-40x100/HalfCheetah-2x3/{A2PO}",
                f"rollout-40x100/HalfCheetah-2x3/{MAPPO}",
            ),
            "296 above MAPPO on Walker2d": (
                f"rollout-40x100/Walker2d-2x3/{A2PO}",
                f"rollout-40x100/Walker2d-2x3/{MAPPO}",
            ),
        },
    ),
    Said(
        "figure13/HalfCheetah-6x1",
        TO_2M,
        SIX,
        {
            "338 below MAPPO": (A2PO, MAPPO),
            "281 below HAPPO": (A2PO, HAPPO),
            "329 below itself": (A2PO, WITHOUT),
            "it is 57 below (": (HAPPO, MAPPO),
        },
    ),
    Said(
        "figure13/HalfCheetah-6x1-3M",
        AREA,
        THREE,
        {
            "three seeds have -354": (A2PO, WITHOUT),
            "154 below HAPPO": (WITH, HAPPO),
            "145 below MAPPO": (V_TRACE, MAPPO),
            "by 921 to": (HAPPO, MAPPO),
            "526 to 3M": (WITH, A2PO),
            "by 1508 to": (A2PO, "rpisa_mamujoco"),
        },
    ),
    Said(
        "figure10/spread-3-0-jaxmarl",
        AREA,
        THREE,
        {
            "0.6 below HAPPO's": (A2PO_MPE, HAPPO_MPE),
            "0.5 below CoPPO's": (A2PO_MPE, COPPO_MPE),
            "0.2 below MAPPO's": (A2PO_MPE, MAPPO_MPE),
        },
    ),
    Said("figure10/spread-3-0-jaxmarl", SCORE, THREE, {"its score is 0.6 above MAPPO's": (A2PO_MPE, MAPPO_MPE)}),
    Said(
        "figure10/spread-3-0-jaxmarl",
        TO_1M,
        THREE,
        {"without PreOPC its area to 1M steps is 0.8": (f"{A2PO_MPE}-no-preopc", A2PO_MPE)},
    ),
    Said(
        "figure10/spread-3-0.5-jaxmarl",
        AREA,
        THREE,
        {
            "0.44 below MAPPO's": (MAPPO_MPE, A2PO_MPE),
            "0.8 below CoPPO's": (COPPO_MPE, A2PO_MPE),
            "0.8 below HAPPO's": (HAPPO_MPE, A2PO_MPE),
        },
    ),
    Said(
        "figure10-authors/spread-3-0-jaxmarl",
        TO_500K,
        SIX,
        {
            "The step's own part is 1.0": (
                f"{TWICE}/spread-3-0-jaxmarl/a2po_mpe",
                f"{ONCE}/spread-3-0-jaxmarl/a2po_mpe",
            ),
            "1.5 above MAPPO (": (f"{ONCE}/spread-3-0-jaxmarl/a2po_mpe", MAPPO_MPE),
            "0.9 above CoPPO": (f"{ONCE}/spread-3-0-jaxmarl/a2po_mpe", COPPO_MPE),
            "0.4 above HAPPO": (f"{ONCE}/spread-3-0-jaxmarl/a2po_mpe", HAPPO_MPE),
            "0.1 lower than before": ("value-clip/spread-3-0-jaxmarl/a2po_mpe", f"{TWICE}/spread-3-0-jaxmarl/a2po_mpe"),
        },
    ),
    Said(
        "value-clip/spread-3-0-jaxmarl",
        TO_500K,
        SIX,
        {
            "0.37 above MAPPO": (A2PO_MPE, f"{TWICE}/spread-3-0-jaxmarl/mappo_mpe"),
            "0.38 above CoPPO": (A2PO_MPE, f"{TWICE}/spread-3-0-jaxmarl/coppo_mpe"),
            "0.04 above HAPPO": (A2PO_MPE, f"{TWICE}/spread-3-0-jaxmarl/happo_mpe"),
        },
    ),
    Said(
        "figure10-authors/spread-3-0-jaxmarl",
        TO_1M,
        SIX,
        {"a difference of 2.5": (f"{TWICE}/spread-3-0-jaxmarl/a2po_mpe", MAPPO_MPE)},
    ),
    Said(
        "figure10-authors/spread-3-0.5-jaxmarl",
        TO_500K,
        SIX,
        {
            "by 0.7 (0.2 to 1.3": (f"{TWICE}/spread-3-0.5-jaxmarl/a2po_mpe", MAPPO_MPE),
            "1.2 (0.4 to 2.1": (f"{TWICE}/spread-3-0.5-jaxmarl/a2po_mpe", COPPO_MPE),
            "0.4 (-0.2 to 0.9; p = 0.25": (f"{TWICE}/spread-3-0.5-jaxmarl/a2po_mpe", HAPPO_MPE),
            "of MAPPO by 0.7": (f"{ONCE}/spread-3-0.5-jaxmarl/a2po_mpe", MAPPO_MPE),
            "of CoPPO by 1.1": (f"{ONCE}/spread-3-0.5-jaxmarl/a2po_mpe", COPPO_MPE),
            "of HAPPO by 0.4": (f"{ONCE}/spread-3-0.5-jaxmarl/a2po_mpe", HAPPO_MPE),
        },
    ),
    Said(
        "critic-twice/3s5z-smax",
        percent("area"),
        SIX,
        {
            "above MAPPO's by 16.5": (A2PO_SMAC, f"{LAUNCH_3S5Z}/mappo_smac"),
            "CoPPO's by 9.6": (A2PO_SMAC, f"{LAUNCH_3S5Z}/coppo_smac"),
            "HAPPO's by 18.3": (A2PO_SMAC, f"{LAUNCH_3S5Z}/happo_smac"),
            "11.0 over its six": (A2PO_SMAC, TWELVE[1]),
        },
    ),
    Said(
        "table2/3s5z_vs_3s6z-smax",
        percent("area", 1.02e6),
        THREE,
        {
            "by 13.9 above its own": (HARD_TWICE, A2PO_SMAC),
            "4.0 above MAPPO's": (HARD_TWICE, "authors-baselines/3s5z_vs_3s6z-smax/mappo_smac"),
            "2.8 below CoPPO's": (HARD_TWICE, "authors-baselines/3s5z_vs_3s6z-smax/coppo_smac"),
        },
    ),
    Said(
        "critic-twice-baselines/3s5z_vs_3s6z-smax",
        percent("area"),
        THREE,
        {
            "14.7 above MAPPO": (HARD_TWICE, MAPPO_SMAC),
            "3.5 above CoPPO": (HARD_TWICE, COPPO_SMAC),
        },
    ),
    Said(
        "critic-twice-baselines/3s5z_vs_3s6z-smax",
        percent("area", 1.02e6),
        THREE,
        {
            "-10.1 (-21.6": (MAPPO_SMAC, "table2/3s5z_vs_3s6z-smax/mappo_smac"),
            "-4.8 (-17.7": (COPPO_SMAC, "table2/3s5z_vs_3s6z-smax/coppo_smac"),
        },
    ),
    Said(
        "figure5-7/3s5z-smax",
        percent("area"),
        SIX,
        {
            "2.6 (-2.4 to": (A2PO_SMAC, "critic-twice-baselines/3s5z-smax/mappo_smac"),
            "-1.4 (-11.6 to": (A2PO_SMAC, "critic-twice-baselines/3s5z-smax/coppo_smac"),
            "-0.8 (-10.2 to": (A2PO_SMAC, "critic-twice-baselines/3s5z-smax/happo_smac"),
            "9.7 over those of": ("critic-twice/3s5z-smax/a2po_smac", A2PO_SMAC),
        },
    ),
    Said(
        "equal-critic/3s5z-smax",
        percent("area"),
        SIX,
        {
            "1.4 lower (-6.6": ("critic-twice/3s5z-smax/a2po_smac", A2PO_SMAC),
            "10.9 above MAPPO": (A2PO_SMAC, "critic-twice-baselines/3s5z-smax/mappo_smac"),
            "6.9 above CoPPO": (A2PO_SMAC, "critic-twice-baselines/3s5z-smax/coppo_smac"),
            "7.6 above HAPPO": (A2PO_SMAC, "critic-twice-baselines/3s5z-smax/happo_smac"),
            "13.0 (7.6 to": (A2PO_SMAC, "value-clip/3s5z-smax/a2po_smac"),
        },
    ),
    Said(
        "equal-critic/3s5z-smax",
        percent("area"),
        SIX,
        {
            "1.7 below MAPPO (-7.6": ("critic-five/3s5z-smax/a2po_smac", "mappo_smac"),
            "0.5 above CoPPO (-7.3": ("critic-five/3s5z-smax/a2po_smac", "coppo_smac"),
            "4.7 above HAPPO (-4.0": ("critic-five/3s5z-smax/a2po_smac", "happo_smac"),
        },
    ),
    Said(
        "equal-critic/spread-3-0.5-jaxmarl",
        TO_500K,
        SIX,
        {"0.1 above them (-0.6": ("a2po_mpe", "figure10-critic-twice/spread-3-0.5-jaxmarl/a2po_mpe")},
    ),
    Said(
        "preopc/10x320/3s5z-smax",
        AREA,
        SIX,
        {"Paired by seed it is 0.005": (A2PO_SMAC, f"{A2PO_SMAC}-no-preopc")},
    ),
]


def run_of(folder: str, script: str) -> str:
    return script if "/" in script else f"{folder}/{script}"


@pytest.mark.parametrize("said", SENTENCES, ids=lambda said: f"{said.folder} {next(iter(said.differences))}")
def test_sentences(said):
    wrong = []
    for begin, scripts in said.differences.items():
        place = TEXT.find(begin)
        assert TEXT.count(begin) == 1, begin
        text = TEXT[place : TEXT.index(")", place) + 1]
        x, y = (functools.partial(said.measure, run_of(said.folder, script)) for script in scripts)
        wrong += [f"{text}, by the files {error}" for error in difference(text, x, y, said.seeds)]
    assert not wrong, "\n".join(wrong)


def test_behaviour():
    """Table 3's, over the last ten evaluations; passes that arrived, in per cent of those tried."""
    head, found = read_table("In Table 3's format")
    wrong = []
    for label, *row in found:
        for name, cell in zip(head[1:], row, strict=True):
            values = []
            for seed in (1, 2):
                file = RESULTS / f"figure4/academy_pass_and_shoot_with_keeper/{ALGORITHMS[name]}_grf__{seed}.jsonl"
                last = [json.loads(line) for line in file.read_text().splitlines()][-10:]
                means = {
                    k: np.mean([record[k] for record in last]) for k in ("assist", "goal", "lost", "pass", "attempts")
                }
                means["pass rate, %"] = 100 * means["pass"] / means["attempts"]
                values.append(means[label.lower()])
            mean, std = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", cell).groups()
            if not shows(mean, np.mean(values)) or not shows(std, np.std(values, ddof=1)):
                wrong.append(f"{label}, {name}: {cell}, by the files {values}")
    assert len(found) == 5 and not wrong, "\n".join(wrong)


# ---------------------------------------------------------------------------------------------- ratios over the robots
PRODUCT = ("action-ratio/{}/a2po_mamujoco", "figure3/{}/a2po_mamujoco")
WITHOUT_IT = ("figure13/{0}/a2po_mamujoco+figure3/{0}/a2po_mamujoco", "figure13/{0}/a2po_mamujoco-no-preopc")
RATIOS = {
    "its area 1.14 times": (PRODUCT, {"Ant-4x2": 2, "Humanoid-9_8": 2}),
    "with eight it is 1.12 times": (PRODUCT, {"Ant-4x2": 2, "Humanoid-9_8": 6}),
    "Walker2d's six 1.10 (": (PRODUCT, {"Ant-4x2": 2, "Humanoid-9_8": 6, "Walker2d-2x3": 6}),
    "over all seventeen 1.13 (": (PRODUCT, {"Ant-4x2": 2, "Humanoid-9_8": 6, "Walker2d-2x3": 6, "HalfCheetah-2x3": 3}),
    "nine pairs, A2PO's area is 0.88 times": (WITHOUT_IT, {"HalfCheetah-6x1": 6, "Humanoid-9_8": 3}),
}


@pytest.mark.parametrize("begin", RATIOS)
def test_ratios_over_robots(begin):
    """The geometric mean of the areas' ratios over all pairs of seeds, and the p of a t test of their logarithms."""
    stats = pytest.importorskip("scipy.stats")
    (x, y), robots = RATIOS[begin]
    runs = [(robot, seed) for robot, seeds in robots.items() for seed in range(1, seeds + 1)]
    logs = np.log([TO_2M(x.format(robot), seed) / TO_2M(y.format(robot), seed) for robot, seed in runs])
    (place,) = (match.start() for match in re.finditer(re.escape(begin), TEXT))
    mean = re.search(r"\d\.\d+", TEXT[place:])[0]
    p = re.search(r"p = ([\d.]*\d)", TEXT[place:])[1]
    assert shows(mean, np.exp(logs.mean())), np.exp(logs.mean())
    assert shows(p, stats.ttest_1samp(logs, 0).pvalue), stats.ttest_1samp(logs, 0).pvalue


# -------------------------------------------------------------------------------------------------------------- speed
class Peer(NamedTuple):
    """A row of the table of other collections' trainers."""

    begins: str
    file: str
    peer: str
    ours: str

    def turns(self) -> list[list[np.ndarray]]:
        """Of theirs, ours with mpe2, ours with jaxmarl: for each turn (2, iterations), rollout and update in s."""
        turns = json.loads((RESULTS / f"speed/{self.file}.json").read_text())["peers"][self.peer]["turns"]
        names = (self.peer, f"{self.ours}, mpe2", f"{self.ours}, jaxmarl")
        return [[np.array([turn["rollout"], turn["update"]]) for turn in turns[name]] for name in names]

    def numbers(self) -> list[list[float]]:
        """Of the same three: the mean of the turns' medians, rollout, update, and for ours theirs over it by turn."""
        turns = self.turns()
        medians = [[np.median(turn.sum(0)) for turn in of_one] for of_one in turns]
        numbers = [[np.mean(m), *np.median(np.hstack(of_one), 1)] for m, of_one in zip(medians, turns, strict=True)]
        return [numbers[0], *([*number, *self.ratios(k)] for k, number in enumerate(numbers[1:], 1))]

    def ratios(self, column: int) -> list[float]:
        theirs, ours = ([np.median(turn.sum(0)) for turn in self.turns()[k]] for k in (0, column))
        return [x / y for x, y in zip(theirs, ours, strict=True)]


PLAIN, PAUSED = "a2po_mpe, plain blocks", "long runs, paused"
PEERS = [
    Peer("MAPPO, on-policy", "peers-mpe", "on-policy", "mappo_mpe"),
    Peer("MAPPO, cleanmarl", "peers-mpe", "cleanmarl", "mappo_mpe"),
    Peer("HAPPO, HARL", "peers-mpe", "harl", "happo_mpe"),
    Peer("A2PO, the authors' c953380", "peers-mpe", "authors", "a2po_mpe"),
    Peer("the same on another day", "peers-mpe-authors", "authors", "a2po_mpe"),
    Peer("the same on a third day", "peers-mpe-authors-2", "authors", "a2po_mpe"),
    Peer("ours with the paper's plain", "peers-mpe-authors-2", "authors", PLAIN),
    Peer("and with `--compile`", "peers-mpe-authors-2", "authors", f"{PLAIN}, compiled"),
    Peer("A2PO, the authors', on a fourth", "peers-mpe-authors-3", "authors", "a2po_mpe"),
    Peer("ours with plain", "peers-mpe-authors-3", "authors", PLAIN),
    Peer("and with `--compile`", "peers-mpe-authors-3", "authors", f"{PLAIN}, compiled"),
    Peer("A2PO, the authors', on a fifth", "peers-mpe-authors-4", "authors", "a2po_mpe"),
    Peer("ours with plain", "peers-mpe-authors-4", "authors", PLAIN),
    Peer("and with `--compile`", "peers-mpe-authors-4", "authors", f"{PLAIN}, compiled"),
]


def test_speed_beside_other_collections():
    _, found = read_table("**Beside other collections**")
    wrong = []
    for row, peer in zip(found, PEERS, strict=True):
        assert row[0].startswith(peer.begins)
        for cell, numbers in zip(row[1:], peer.numbers(), strict=True):
            shown = re.findall(r"[\d.]+", cell)
            if shown and (len(shown) != len(numbers) or not all(map(shows, shown, numbers))):
                wrong.append(f"{row[0]}: {cell}, by the file {', '.join(f'{x:.4f}' for x in numbers)}")
    assert not wrong, "\n".join(wrong)


def test_speed_beside_the_authors():
    """The medians over the turns of the last three days."""
    said = re.search(
        r"days the medians are (.*?) \(mpe2\) and (.*?) \(jaxmarl\).*?, (.*?) and (.*?) compiled, (.*?) and (.*?) with",
        TEXT,
    )
    days = zip(PEERS[-9:-6], PEERS[-6:-3], PEERS[-3:], strict=True)
    medians = [np.median(sum((day.ratios(k) for day in same), [])) for same in days for k in (1, 2)]
    medians = [*medians[2:], *medians[:2]]  # plain, compiled, cumulative
    assert all(map(shows, said.groups(), medians)), medians


def test_speed_of_mujoco_beside_the_first_script():
    """Seconds of an iteration, the first script's over today's, by turn and by the medians."""
    turns = json.loads((RESULTS / "speed/mujoco-ant-4x2-first-2.json").read_text())["turns"]
    said = re.search(
        r"an update from ([\d.]+) to ([\d.]+) s, an iteration from ([\d.]+) to ([\d.]+) \(medians\).*?"
        r"iteration is ([\d., and]+) times as fast in these turns, ([\d.]+) by the medians; with nothing beside, in "
        r"six more, ([\d., and]+), by the medians ([\d.]+); on another day, long runs paused again, in four, "
        r"([\d., and]+), by the medians ([\d.]+) \(",
        TEXT,
    )
    numbers = [float(number) for group in said.groups() for number in re.findall(r"[\d.]+\d", group)]

    def of(commit: str, beside: str, what: str) -> np.ndarray:
        return np.array([t[what] for t in turns if t["commit"] == commit and t["beside"] == beside])

    expected = [np.median(of(c, PAUSED, what)) for what in ("update", "iteration") for c in ("aa74fee", "d2518ed")]
    for beside, commit in ((PAUSED, "d2518ed"), ("nothing", "3f5c3bc"), (f"{PAUSED}, another day", "bff5368")):
        first, today = of("e7c0077", beside, "iteration"), of(commit, beside, "iteration")
        expected += [*(first / today), np.median(first) / np.median(today)]
    assert len(numbers) == len(expected) and np.abs(np.array(numbers) - expected).max() < 0.00501, expected


def test_what_is_left_on_mujoco():
    """Medians of seconds: a rollout, EnvPool's steps in it, an update, its matrix products; rollouts in two halves."""
    raw = json.loads((RESULTS / "speed/mujoco-halves.json").read_text())
    rollout, physics, *halves = (np.median(seconds) for seconds in raw["seconds"].values())
    update, products = (np.median(raw["update"][name]) for name in ("update", "products"))
    said = re.search(
        r"Of a rollout of ([\d.]+) s ([\d.]+) are EnvPool's.*?of an update of ([\d.]+) s ([\d.]+) are the matrix "
        r"products.*?are slower, ([\d.]+) to ([\d.]+) s a rollout",
        TEXT,
    )
    numbers = (rollout, physics, update, products, min(halves), max(halves))
    assert all(map(shows, said.groups(), numbers)), numbers


def test_speed_on_smac():
    """The table's numbers are those of the file; by turn, what one copy of a chunk saves, and JaxMARL's over ours."""
    _, found = read_table("**SMAC's four scripts**")
    (point,) = json.loads((RESULTS / "speed/smax-3s5z.json").read_text())["points"]
    for script, *row in found:
        numbers, over = point["scripts"][script], point["scripts"]["mappo_smac"]["iteration"]
        expected = [numbers[name] for name in ("rollout", "update", "iteration")]
        expected += [numbers["iteration"] / over, numbers["steps_per_second"], numbers["peak_memory_mib"]]
        assert all(map(shows, row, expected)), (script, expected)
    turns = json.loads((RESULTS / "speed/smax-chunks.json").read_text())["turns"]
    faster = [turn["bff5368"]["update"] / turn["after"]["update"] for turn in turns]
    three = r"([\d.]+), ([\d.]+) and ([\d.]+)"
    said = re.search(rf"an update is {three} times as fast in MAPPO, {three} in A2PO", TEXT)
    assert all(map(shows, said.groups(), faster)) and not any(turn["largest_difference"] for turn in turns), faster
    over = []
    for day in ("", "-2"):
        raw = json.loads((RESULTS / f"speed/peers-smax{day}.json").read_text())["peers"]["jaxmarl"]["turns"]
        for theirs, ours in zip(raw["jaxmarl"], raw["mappo_smac, SMAX"], strict=True):
            over.append(np.median(theirs["update"]) / np.median(np.add(ours["rollout"], ours["update"])))
    said = re.search(r"theirs over ours ([\d.]+) and ([\d.]+), and 3.65.*?\), ([\d.]+) and ([\d.]+) \(raw\)", TEXT)
    assert all(map(shows, said.groups(), over)), over
