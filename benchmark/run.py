"""The runs of a table or figure of the paper: starts what is missing, resumes what was cut off, skips what is done.

    python benchmark/run.py table2 --smax --tasks 3s5z --total-timesteps 500000 --dry-run     # prints its 12 commands
    python benchmark/run.py table2 --smax --tasks 3s5z --total-timesteps 500000
    python benchmark/run.py table2 --smax --tasks 3s5z --total-timesteps 500000 --collect results

Every run is a process of its own, `python {script}.py ...`, with one line in a live view and a log in runs/logs/. Ray
shares out the CPUs (and GPUs) of this machine, or with --address those of a cluster, whose machines must share this
folder and have this Python under the same path. A run whose machine is lost goes on from its checkpoint on another one,
which may happen twice; a run that fails is told, not repeated.
What a script refuses as it reads its options, such as a game that is not installed here, ends this program before
anything is started.
Ctrl-C stops the runs at the end of their iteration and saves them, a second one ends them at once; the same command
later goes on. What is done and what was cut off is read from the run directories: a run belongs to a job if all of
its settings do that change the numbers, whoever started it.

What scales with cores is the number of runs at a time: the CPUs of all machines / --cpus-per-job. A single run stays on
one machine. That option is the threads of its PyTorch and of EnvPool, and the workers of mpe2 and of Football (here of
each half of the games). It bounds neither JAX (SMAX, JaxMARL), which has a pool of threads of its own, nor StarCraft
II, a process for each game: they share the machine with the other runs. Ray counts CPUs, it holds no run to its own.

The paper's text does not name the tasks of figures 5 to 7, 13 and 14, so --tasks has defaults of ours there; figure5
and figure13 run the paper's algorithms and A2PO without PreOPC; figure14's lambdas are those of Tables 7 to 11. Table 6
runs one job at a time, on all cores; seconds for rollout and update are in the runs' TensorBoard files.
"""

import collections
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.cli import parse_args, write  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SMAC_MAPS = (  # Tables 2 and 5
    "MMM 3s_vs_5z 2c_vs_64zg 3s5z 5m_vs_6m 8m_vs_9m 10m_vs_11m 6h_vs_8z 3s5z_vs_3s6z MMM2 27m_vs_30m corridor"
).split()
OTHER_MAPS = (  # of SMAC, SMACv2 on SMAX
    "3m 8m 25m 2s3z 3s_vs_3z 3s_vs_4z 1c3s5z 2m_vs_1z 2s_vs_1sc so_many_baneling bane_vs_bane smacv2_5_units "
    "smacv2_10_units smacv2_20_units"
).split()
SMACV2_MAP = r"(protoss|terran|zerg)_[1-9]\d*_vs_[1-9]\d*"
NOT_ON_SMAX = ("MMM", "MMM2", "2c_vs_64zg")  # it lacks their units
MUJOCO_TASKS = (
    "Ant-2x4 Ant-2x4d Ant-4x2 Ant-8x1 HalfCheetah-2x3 HalfCheetah-3x2 HalfCheetah-6x1 Hopper-3x1 Humanoid-9|8 "
    "Humanoid-17x1 HumanoidStandup-9|8 Walker2d-2x3 Walker2d-3x2 Walker2d-6x1"
).split()
OTHER_ROBOTS = ("HumanoidStandup-17x1",)
FOOTBALL_TASKS = (
    "5_vs_5 11_vs_11_easy_stochastic 11_vs_11_stochastic 11_vs_11_hard_stochastic academy_empty_goal_close "
    "academy_empty_goal academy_run_to_score academy_run_to_score_with_keeper academy_pass_and_shoot_with_keeper "
    "academy_run_pass_and_shoot_with_keeper academy_3_vs_1_with_keeper academy_counterattack_easy "
    "academy_counterattack_hard academy_corner academy_single_goal_versus_lazy"
).split()
SPREAD_TASKS = ("spread-3-0", "spread-5-0", "spread-3-0.5", "spread-5-0.5")
TASK_FORMS = (
    "SMAC's maps (3s5z; protoss_5_vs_5), {robot}-{partition} (Ant-4x2, 'Humanoid-9|8'), Football's scenarios (5_vs_5, "
    "academy_corner), spread-{agents}-{local ratio} (spread-3-0)"
)
ABLATION_TASKS = ("3s5z", "MMM2", "Humanoid-9|8")
ALL = ("mappo", "coppo", "happo", "a2po")
# What sets a run apart from the script's defaults, by the name that plot.py gives it.
PREOPC = {"": (), "-no-preopc": ("--no-preopc",)}
GAE_TARGETS = {"-gae-targets": ("--no-preopc-targets",)}
VTRACE = {"": (), "-vtrace": ("--vtrace",)}
CORRECTIONS = {"mappo": VTRACE, "coppo": VTRACE, "happo": {"": (), "-preopc": ("--preopc",)}, "rpisa": {"": ()}}
CORRECTIONS |= {"a2po": PREOPC}  # without PreOPC: ours, the paper has it not
CLIP = {"": (), "-fixed-clip": ("--clip-adaptation", "1.0")}
RULES = ("cyclic", "random", "greedy", "reverse-greedy", "reverse-semi-greedy")
ORDER = {"": ()} | {f"-{rule}": ("--agent-order", rule) for rule in RULES}
LAMBDAS = ("0.9", "0.93", "0.95", "0.97", "0.99")  # of Tables 7 to 11
LAMBDA = {f"{name} gae_lambda={x}": (*options, "--gae-lambda", x) for x in LAMBDAS for name, options in PREOPC.items()}
# By the authors' launch scripts (c953380) MAPPO, CoPPO and HAPPO always have a lambda of 0.95, and on these maps,
# robots and games other epochs than A2PO.
BASELINE_EPOCHS = {"3s5z": 5, "3s_vs_5z": 10, "6h_vs_8z": 5, "MMM": 10, "Ant": 5, "Hopper": 5, "spread": 5}
# Where they give A2PO's critic a second step (--use_two_stage): not on 3s5z_vs_3s6z, 3s_vs_5z and 6h_vs_8z.
TWO_CRITIC_STEPS = "MMM MMM2 2c_vs_64zg 3s5z 5m_vs_6m 8m_vs_9m 10m_vs_11m 27m_vs_30m corridor".split()
TWO_CRITIC_STEPS += "HalfCheetah Walker2d Hopper Ant Humanoid HumanoidStandup spread 5_vs_5".split()
# A2PO's other settings, and the blocks, are those of Tables 7 to 11, but for these; on MPE up to five agents have
# another lambda, more have blocks.
BESIDE_TABLES = {("a2po", f"spread-{n}"): ("--gae-lambda", "0.95") for n in range(2, 6)}
BESIDE_TABLES |= {("a2po", "spread"): ("--agent-blocks", "3")}
BESIDE_TABLES |= {(name, "Humanoid-17x1"): ("--agent-blocks", "3") for name in ("a2po", "happo")}
BESIDE_TABLES |= {("a2po", "HumanoidStandup-9|8"): ("--update-epochs", "8")}
BESIDE_TABLES |= {("a2po", "HumanoidStandup-17x1"): ("--gae-lambda", "0.95", "--agent-blocks", "5")}
# Name: tasks, algorithms, variants (of each algorithm, or of all).
MATRICES = {
    "table2": (SMAC_MAPS, ALL, {"": ()}),
    "figure3": (MUJOCO_TASKS, ALL, {"": ()}),
    "figure4": (("5_vs_5", "11_vs_11_stochastic"), ALL, {"": ()}),  # Table 3 too
    "figure5": (ABLATION_TASKS, tuple(CORRECTIONS), CORRECTIONS),
    "figure6": (ABLATION_TASKS, ("a2po",), ORDER),
    "figure7": (ABLATION_TASKS, ("a2po",), CLIP),
    "figure5-7": (ABLATION_TASKS, ("a2po",), PREOPC | ORDER | CLIP),
    "preopc": (ABLATION_TASKS, ("a2po",), PREOPC | GAE_TARGETS),  # ours
    "figure10": (SPREAD_TASKS, ALL, {"": ()}),
    "figure13": (("HalfCheetah-6x1", "Humanoid-9|8"), tuple(CORRECTIONS), CORRECTIONS),
    "figure14": (ABLATION_TASKS, ("a2po",), LAMBDA),
    "table6": (("3s5z", "27m_vs_30m", "Humanoid-9|8", "Ant-4x2", "Humanoid-17x1", "5_vs_5"), ALL, {"": ()}),
}
# Settings that do not change a run's numbers, or say how far it goes. plot.py pools runs that differ in nothing else.
FREE = set(
    "total_timesteps save_every resume eval_only checkpoint out exp_name track wandb_project wandb_entity wandb_group "
    "cuda compile torch_threads num_workers worker_timeout".split()
)

# What else is in a config.json.
NO_SETTINGS = set("device versions git_commit stretches reason".split())


def whole_number(words: list[str]) -> int:
    """Of 1000000, 1_000_000 or 1e6, as in the scripts."""
    number = float(words[0])
    if not number.is_integer():
        raise ValueError(f"{words[0]} is no whole number")
    return int(words[0]) if words[0].isdecimal() else int(number)


COUNT = tyro.constructors.PrimitiveConstructorSpec(1, "INT", whole_number, lambda x: type(x) is int, lambda x: [str(x)])
Count = Annotated[int, COUNT]


@dataclass
class Args:
    matrix: tyro.conf.Positional[Literal[tuple(MATRICES)]]
    """table or figure of the paper"""
    seeds: tuple[int, ...] | None = None
    """seeds; by default 1 2 3, for table6 1"""
    smax: bool = False
    """play on SMAX: only the tasks that it has; without it SMAC's maps need StarCraft II"""
    tasks: tuple[str, ...] = ()
    """other tasks than the matrix's: SMAC maps, Football's scenarios, or such as Ant-4x2 'Humanoid-9|8' spread-3-0"""
    algorithms: tuple[str, ...] = ()
    """only these of mappo coppo happo a2po, for figure5 and figure13 rpisa; or your own, such as kl where there is a
    kl_smac.py beside the others"""
    total_timesteps: Count | None = None
    """environment steps of each run, such as 1e6; by default the script's"""
    authors_settings: bool = False
    """as the authors' launch scripts: MAPPO, CoPPO and HAPPO with epochs and lambda of their own, A2PO with a second
    step of the critic where it has one, on MPE up to five agents with lambda 0.95; else all have A2PO's of the paper's
    tables. Settings alone: where their code does otherwise than the paper, ours does not"""
    options: str = ""
    """further options for every run, in one word: --options='--eval-every 20000'"""
    dry_run: bool = False
    """print the commands and leave"""
    collect: Path | None = None
    """copy the finished runs to {DIR}/{task}/{script}[-variant]__{seed}.jsonl and .config.json, with A2PO also the
    agents' ranks and places, .orders.json, and leave"""
    dir: Path = Path(".")
    """where the runs/ folder is; made if it is not there"""
    cpus_per_job: Count | None = None
    """CPUs of each run, and threads of its PyTorch; by default 1, for table6 all"""
    gpus_per_job: float = 0.0
    """GPUs of each run, such as 0.25; with 0 the runs see none"""
    address: str = ""
    """address of a running Ray cluster, or auto; without it the runs stay on this machine"""


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def usage_error(what, why: str):
    """One line; exit status 2."""
    print(f"run.py: error: {what}: {why}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def writing(what):
    """What cannot be written in here is a usage error in `what`."""
    try:
        yield
    except OSError as error:
        usage_error(what, f"cannot be written: {error.strerror}")


# ------------------------------------------------------------------------------------------------------------ jobs
@dataclass(frozen=True)
class Job:
    script: Path
    task: str
    variant: str
    seed: int
    options: tuple[str, ...]
    """of the script, without those of FREE"""
    total_timesteps: int | None

    @property
    def algorithm(self) -> str:
        return self.script.stem + self.variant

    @property
    def name(self) -> str:
        return f"{self.task}__{self.algorithm}__{self.seed}"

    def command(self, cpus: int, run_dir: Path | None = None) -> list[str]:
        """To start the run, or to go on with the one in run_dir."""
        command = [sys.executable, str(self.script)]
        if run_dir is not None:
            total = self.total_timesteps if self.total_timesteps is not None else settings(self).total_timesteps
            command += ["--resume", str(run_dir), "--total-timesteps", str(total)]
        else:
            command += self.options
            command += ["--total-timesteps", str(self.total_timesteps)] if self.total_timesteps is not None else []
        command += ["--torch-threads", str(cpus)]
        return command + (["--num-workers", str(cpus)] if self.script.stem.endswith(("_mpe", "_grf")) else [])


def task_options(task: str, smax: bool) -> tuple[str, tuple[str, ...]]:
    """The benchmark of a task, as in the scripts' names, and the options that choose it; an error if it is none."""
    if found := re.fullmatch(r"spread-([2-9]|[1-9]\d+)-(0(?:\.\d+)?|1(?:\.0+)?)", task):
        return "mpe", ("--n-agents", found[1], "--local-ratio", found[2])
    if task in (*MUJOCO_TASKS, *OTHER_ROBOTS):
        scenario, partition = task.split("-")
        return "mamujoco", ("--scenario", scenario, "--partition", partition)
    if task in FOOTBALL_TASKS:
        return "grf", ("--scenario", task, *(["--share-parameters"] if task.startswith("11_vs_11") else []))
    if task in (*SMAC_MAPS, *OTHER_MAPS) or re.fullmatch(SMACV2_MAP, task):
        return "smac", ("--map", task, "--simulator", "smax" if smax else "starcraft2")
    known = (*SMAC_MAPS, *OTHER_MAPS, *MUJOCO_TASKS, *OTHER_ROBOTS, *FOOTBALL_TASKS, *SPREAD_TASKS)
    by_letters = {name.lower(): name for name in known}
    near = difflib.get_close_matches(task.lower(), by_letters, 1)
    meant = f"did you mean {by_letters[near[0]]}? It" if near else "it"
    usage_error(f"--tasks {task}", f"{meant} must be one of {TASK_FORMS}")


def authors_options(task: str, algorithm: str) -> tuple[str, ...]:
    """What the authors' launch scripts have on a task, where the scripts have the paper's tables."""
    game, options = task.split("-")[0], ()
    if algorithm == "a2po" and game in TWO_CRITIC_STEPS:
        options = ("--critic-steps", "2")
    if algorithm in ("mappo", "coppo", "happo"):
        epochs = BASELINE_EPOCHS.get(game)
        options = ("--gae-lambda", "0.95", *(("--update-epochs", str(epochs)) if epochs else ()))
    names = (task, task.rpartition("-")[0], game)
    return options + next((BESIDE_TABLES[algorithm, x] for x in names if (algorithm, x) in BESIDE_TABLES), ())


def make_jobs(args: Args) -> tuple[list[Job], list[str]]:
    """The jobs, all of the first seed first, and the names of scripts that they would need but that do not exist."""
    tasks, algorithms, variants = MATRICES[args.matrix]
    tasks = dict.fromkeys(args.tasks or tasks)
    benchmarks = {task: task_options(task, args.smax)[0] for task in tasks}
    if args.algorithms:
        scripts = {(path, name) for name in benchmarks.values() for path in ROOT.glob(f"*_{name}.py")}
        there = {path.stem.removesuffix(f"_{name}") for path, name in scripts}
        unknown = sorted(set(args.algorithms) - there - set(ALL))
        if unknown:
            allowed = f"for these tasks there are {' '.join(sorted(there))}"
            usage_error(f"--algorithms {' '.join(unknown)}", f"no such script; {allowed}")
        algorithms = [name for name in args.algorithms if name in algorithms or name not in ALL]
    if args.smax:
        left_out = [task for task in tasks if benchmarks[task] != "smac" or task in NOT_ON_SMAX]
        tasks = [task for task in tasks if task not in left_out]
        if args.tasks and left_out and tasks:
            print(f"left out, SMAX does not have {', '.join(left_out)}", file=sys.stderr)
    jobs, missing = [], []
    for seed in dict.fromkeys(args.seeds or ((1,) if args.matrix == "table6" else (1, 2, 3))):
        for task in tasks:
            benchmark, task_choice = task_options(task, args.smax)
            for algorithm in dict.fromkeys(algorithms):
                script = ROOT / f"{algorithm}_{benchmark}.py"
                if not script.exists():
                    missing.append(script.name)
                    continue
                of_it = variants.get(algorithm, {"": ()}) if variants is CORRECTIONS else variants
                for variant, variant_options in of_it.items():
                    chosen = (*task_choice, "--seed", str(seed), *variant_options)
                    chosen += authors_options(task, algorithm) if args.authors_settings else ()
                    options = (*chosen, *further_options(args, chosen))
                    name = f"{task}-smax" if args.smax else task
                    jobs.append(Job(script, name, variant, seed, options, args.total_timesteps))
    return jobs, sorted(set(missing))


def further_options(args: Args, chosen: tuple[str, ...]) -> list[str]:
    """The words of --options, which may not set again what the matrix or this program chooses for a run."""
    try:
        words = shlex.split(args.options)
    except ValueError as error:
        usage_error(f"--options {args.options}", str(error).lower())
    names = [word.split("=")[0].replace("_", "-").replace("--no-", "--") for word in words if word.startswith("--")]
    if words and not words[0].startswith("--"):
        usage_error(f"--options {args.options}", f"{words[0]} is no option")
    for name in names:
        if name in ("--eval-only", "--checkpoint", "--out"):
            usage_error(f"--options {args.options}", f"{name} is not for trainings")
    taken = [word.replace("--no-", "--") for word in chosen] + ["--torch-threads", "--num-workers", "--resume"]
    taken += ["--total-timesteps"] if args.total_timesteps is not None else []
    for name in names:
        if name in taken:
            usage_error(f"--options {args.options}", f"{name} is set already, by {args.matrix} or another option")
    return words


@functools.cache
def load(script: Path):
    """The script as a module: its own parser and defaults say what a command means."""
    loaded = sys.modules.get(script.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(script):
        return loaded
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def settings(job: Job):
    """The script's Args of a job as they are on its command line; what the script refuses ends the program."""
    total = ("--total-timesteps", str(job.total_timesteps)) if job.total_timesteps is not None else ()
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            module = load(job.script)
            args = module.parse_args([*job.options, *total])
            module.complete_args(args)  # its checks
    except SystemExit:
        lines = [line.strip("│╭╰─╮╯ ") for line in output.getvalue().splitlines()]
        reason = next((line for line in lines if line and "Parsing error" not in line), "refused")
        usage_error(f"{job.script.name} {shlex.join(job.options)}", reason)
    return args


# ------------------------------------------------------------------------------------------------- run directories
def last_step(folder: Path, file: str = "eval.jsonl") -> int:
    """Step of the last whole line of a file of evaluations, 0 if there is none."""
    try:
        lines = (folder / file).read_text(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def read_config(path: Path) -> dict:
    """The settings of a run; none where they cannot be read."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    try:
        whole = all(type(s["step"]) is int and type(s["changed"]) is dict for s in config.get("stretches", []))
    except (AttributeError, KeyError, TypeError):
        return {}
    return config if whole else {}


def count_orders(run_dir: Path) -> dict[str, list[list[int]]]:
    """In how many of a run's iterations each of its n agents (a list of n numbers) had each rank by E|A|, and each
    position in the order of the updates, from 1 to n; by its TensorBoard events. Nothing where no ranks are logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, counts = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload(), {}
    for what in ("rank", "position"):
        tags = [tag for tag in events.Tags()["scalars"] if re.fullmatch(rf"\w+/{what}_of_agent/\d+", tag)]
        tags.sort(key=lambda tag: int(tag.split("/")[-1]))
        by_agent = [collections.Counter(event.value for event in events.Scalars(tag)) for tag in tags]
        counts[what] = [[of_agent[k] for k in range(1, len(tags) + 1)] for of_agent in by_agent]
    return counts if counts["rank"] else {}


def resumed_with(config: dict) -> list[tuple[int, dict]]:
    """Where a run was resumed with other settings, of those that change its numbers: (step, what differs from the ones
    that it began with)."""
    found, before = [], {}
    for stretch in config.get("stretches", []):
        changed = {name: value for name, value in stretch["changed"].items() if name not in FREE}
        if changed != before:
            found.append((stretch["step"], changed))
        before = changed
    return found


def variant(config: dict) -> str:
    """What an ablation is called, by the settings of its run: `` for none, else such as -no-preopc or -random."""
    c, order = config.get("clip_adaptation"), config.get("agent_order", "semi-greedy")
    if c is None:  # a baseline, which PreOPC has to be asked for
        return "-vtrace" if config.get("vtrace") else "-preopc" if config.get("preopc") else ""
    name = "" if config.get("preopc", True) else "-no-preopc"
    name += "" if config.get("preopc_targets", True) else "-gae-targets"
    name += "-fixed-clip" if c == 1 else ""
    name += f"-{order}" if order != "semi-greedy" else ""
    return name if c in (0.5, 1) else f"{name} clip_adaptation={c}"


def as_saved(run_dir: Path) -> dict:
    """The settings of a run, without the stretches that were never saved, such as after a mistyped --resume."""
    import torch

    config = read_config(run_dir / "config.json")
    if resumed_with(config):
        with contextlib.suppress(Exception):  # where the checkpoint cannot be read they all count
            saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
            step, settings = saved["progress"]["global_step"], saved["args"]
            config["stretches"] = [
                stretch
                for stretch in config["stretches"]
                if stretch["step"] < step or all(settings.get(k) == v for k, v in stretch["changed"].items())
            ]
    return config


def belongs(run_dir: Path, job: Job) -> bool:
    """Whether the settings of a run are those of a job, and its name is, from its first step to its last."""
    config = as_saved(run_dir)
    if config.get("script") != job.script.stem or resumed_with(config):
        return False
    module, name = load(job.script), job.script.stem
    wanted = vars(module.complete_args(settings(job)))
    if config.get("exp_name", name) != wanted.get("exp_name", name):
        return False
    # What an older run does not have is as by default; None there is what depends on the task.
    defaults = {field.name: field.default for field in dataclasses.fields(module.Args) if field.default is not None}
    run = {option: config.get(option, defaults.get(option, value)) for option, value in wanted.items()}
    return all(run[option] == value for option, value in wanted.items() if option not in FREE)


def log_of(job: Job, base: Path) -> Path:
    return base / "runs" / "logs" / f"{job.name}.log"


def is_locked(path: Path) -> bool:
    """Whether a process still works on this log or run: it, or its child, holds a lock on the file."""
    if not path.exists():
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # an exclusive one would have to be writable on NFS
    except BlockingIOError:
        return True
    except OSError:  # no locks there
        return False
    finally:
        os.close(file)
    return False


def find_run(job: Job, base: Path) -> tuple[str, Path | None]:
    """`done`, `running`, `cut off` or `new`, and the run's directory (relative to base)."""
    candidates = [d for d in sorted((base / "runs").glob(f"*__*__{job.seed}__*")) if d.is_dir() and belongs(d, job)]
    candidates.sort(key=last_step)  # the one that got furthest; of equals the newest
    for run_dir in reversed(candidates):
        if last_step(run_dir) >= settings(job).total_timesteps:
            return "done", run_dir.relative_to(base)
    if is_locked(log_of(job, base)):
        return "running", None
    for run_dir in candidates:
        if is_locked(run_dir / "config.json"):  # somebody else's process
            return "running", run_dir.relative_to(base)
    for run_dir in reversed(candidates):
        if (run_dir / "checkpoint.pt").is_file():
            return "cut off", run_dir.relative_to(base)
    return "new", None


def collect(jobs: list[Job], base: Path, target: Path) -> int:
    """Copy what is done; returns the number of jobs that are not."""
    with writing(f"--collect {target}"):
        target.mkdir(parents=True, exist_ok=True)
    missing = 0
    for job in jobs:
        state, run_dir = find_run(job, base)
        if state != "done":
            print(f"not finished ({state}): {job.name}")
            missing += 1
            continue
        config = as_saved(base / run_dir)
        task, name, *_ = run_dir.name.split("__")
        folder = target / task.replace("|", "_")  # | is not allowed in names on Windows
        _, space, setting = job.variant.partition(" ")  # such as gae_lambda=0.9, which is no ablation
        stem = f"{name}{variant(config)}{space}{setting}__{job.seed}"
        there = read_config(folder / f"{stem}.config.json")
        for option, value in there.items():
            if option not in FREE | NO_SETTINGS and config.get(option, value) != value:
                why = f"is there already, of a run with {option} {value}, not {config[option]}; give another folder"
                usage_error(f"--collect {target}", f"{folder / stem}.jsonl {why}")
        steps, steps_there = last_step(base / run_dir), last_step(folder, f"{stem}.jsonl")
        if steps < steps_there:
            why = f"is there already, of a run of {steps_there} steps, not {steps}; give another folder"
            usage_error(f"--collect {target}", f"{folder / stem}.jsonl {why}")
        with writing(f"--collect {target}"):
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / f"{stem}.config.json", json.dumps(config, indent=2) + "\n")
            write(folder / f"{stem}.jsonl", (base / run_dir / "eval.jsonl").read_bytes())
            if counts := count_orders(base / run_dir):
                write(folder / f"{stem}.orders.json", json.dumps(counts).encode() + b"\n")
        print(f"{run_dir} -> {folder / stem}.jsonl")
    return missing


# --------------------------------------------------------------------------------------------------------- running
# Before a script begins: it is told to stop, and saves, when the worker that started it dies, as it does with its node.
STOP_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


def run_process(command: list[str], base: Path, log: Path, gpus: float) -> int | str:
    """Run a command to its end with its output in a log: its exit status, or why it was not started.

    KeyboardInterrupt, which is how Ray cancels, becomes SIGTERM; the script saves and ends.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup and the like it is ignored, by heritage
    if not base.is_dir():
        return f"{socket.gethostname()} has no folder {base}, which all machines must share"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process keeps it as long as it lives
            file.write(f"\n$ {shlex.join(command)}\n".encode())  # what was killed has left half a line
            file.flush()
            options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            options |= {"cwd": base, "env": environment, "start_new_session": True}
            process = subprocess.Popen([command[0], "-c", STOP_WITH_PARENT, *command], **options)
    except BlockingIOError:
        return "it is still running from an earlier call"
    except OSError as error:
        return f"not started on {socket.gethostname()}: {error}"
    try:
        while process.poll() is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
    return process.returncode


def log_tail(log: Path) -> list[str]:
    """The last lines of a log; a progress bar's states are lines too."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4000))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


BAR = re.compile(r"\s*(\d+)%\|[^|]*\|\s*(.*)")


def newest(log: Path) -> list[str]:
    """What the log's last run has written, the newest line first."""
    lines = log_tail(log)[::-1]
    return lines[: next((place for place, line in enumerate(lines) if line.startswith("$ ")), len(lines))]


def progress_of(log: Path) -> tuple[float, str]:
    """Share of the run that is done, and its bar's text (or last line)."""
    lines = newest(log)
    for found in filter(None, map(BAR.match, lines)):
        return int(found[1]) / 100, found[2]
    return 0.0, lines[0] if lines else ""


def reason_of(log: Path) -> str:
    """The last line of a log that is no progress bar."""
    return next((line for line in newest(log) if not BAR.match(line)), "no output")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


class View:
    """One block that is drawn anew in place on a terminal; elsewhere a line a minute. Where nobody reads any more, as
    after Ctrl-C in `... 2>&1 | tee log`, nothing."""

    def __init__(self, stream, now: float):
        self.stream, self.begin, self.live = stream, now, stream.isatty()
        self.height, self.next_line = 0, now

    def write(self, text: str, height: int = 0):
        """In the place of the block, if there is one; the next time in the place of this, if it has a height."""
        try:
            self.stream.write((f"\x1b[{self.height}F\x1b[J" if self.height else "") + text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        self.height = height

    def event(self, text: str):
        self.write(text + "\n")

    def update(self, counts: dict[str, int], running: dict[str, tuple[float, str]], fraction: float, now: float):
        """counts by state; running: name -> (share done, text); fraction: of all work of this call."""
        seconds = now - self.begin
        left = f", about {clock(seconds * (1 - fraction) / fraction)} left" if fraction > 0.01 else ""
        summary = ", ".join(f"{number} {state}" for state, number in counts.items())
        summary = f"{clock(seconds)}  {summary}; {100 * fraction:.0f}% of the steps{left}"
        if not self.live:
            if now >= self.next_line:
                self.next_line = now + 60
                self.event(summary + "".join(f"; {name} {100 * share:.0f}%" for name, (share, _) in running.items()))
            return
        width, lines = shutil.get_terminal_size().columns, [summary]
        for name, (share, text) in running.items():
            bar = "█" * int(12 * share) + "·" * (12 - int(12 * share))
            lines.append(f"{bar} {100 * share:3.0f}% {name}  {text}")
        self.write("".join(line[: width - 1] + "\n" for line in lines), len(lines))


@contextlib.contextmanager
def silence():
    """Of everything that writes to stderr, in whatever language."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def start_ray(args: Args, cpus: int):
    """Ray on this machine or a cluster, without dashboard, usage reports and logs on the screen."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    os.environ["RAY_kill_child_processes_on_worker_exit"] = "0"  # STOP_WITH_PARENT ends them, and they save
    token = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    if args.address and ("RAY_AUTH_TOKEN" in os.environ or Path(token).expanduser().is_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start --head` does; a cluster may ask for none
    try:
        import ray
    except ImportError as error:
        usage_error("Ray", f"{error}; pip install -r benchmark/requirements.txt")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if args.address:
        try:  # Ray itself would go on trying for minutes
            address = ray._private.services.get_ray_address_from_environment(args.address, None)  # of auto
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), 10).close()
        except (OSError, ValueError, OverflowError) as error:
            usage_error(f"--address {args.address}", f"no Ray cluster there, {first_line(error)}")
        try:
            with silence():  # a line a second
                ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = f"{first_line(error)} (if it asks for a token, it must be in {token})"
            usage_error(f"--address {args.address}", f"this cluster cannot be joined, {reason}")
    else:
        own = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
        services = ray._private.services
        # In a process group of their own, Ray's processes outlive what a closing terminal, or `timeout`, sends to ours.
        in_own_group = functools.partial(services.ConsolePopen, process_group=0)
        # `local`: not a cluster that happens to run on this machine
        try:
            with mock.patch.object(services, "ConsolePopen", in_own_group):
                ray.init(address="local", **own, object_store_memory=100 * 2**20, **quiet)
        except Exception as error:  # of many kinds, such as that of a machine too busy to start it in time
            sys.exit(f"run.py: Ray did not start: {first_line(error)}")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(n.get("CPU", 0) >= cpus and n.get("GPU", 0) >= args.gpus_per_job for n in nodes):
        ray.shutdown()
        usage_error(f"{cpus} CPUs and {args.gpus_per_job:g} GPUs per job", "no machine has as many")
    return ray


LOSSES = 3  # of machines by one job, after which it has failed


def run_all(jobs: list[tuple[Job, Path | None]], args: Args, cpus: int, base: Path) -> int:
    """Run the jobs that are not done; the program's exit status. A job whose machine is lost goes on on another."""
    ray = start_ray(args, cpus)
    no_machine = (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError, ray.exceptions.LocalRayletDiedError)
    stops = []

    def stop(number, _):
        stops.append(number)
        if number == signal.SIGHUP:  # a terminal that closes may send it twice
            signal.signal(number, signal.SIG_IGN)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, stop)
    task = ray.remote(max_retries=0, num_cpus=cpus, num_gpus=args.gpus_per_job)(run_process)
    begin, waiting, lost, losses = time.time(), {}, [], collections.Counter()
    begun = {}  # job's name: share that was done before this call

    def start(job: Job, run_dir: Path | None):
        if job.name not in begun:
            total = job.total_timesteps or settings(job).total_timesteps
            begun[job.name] = min(1.0, last_step(base / run_dir) / total) if run_dir else 0.0
        waiting[task.remote(job.command(cpus, run_dir), base, log_of(job, base), args.gpus_per_job)] = job

    for job, run_dir in jobs:
        start(job, run_dir)
    view, ended, cancelled = View(sys.stderr, begin), {"finished": 0, "failed": 0}, 0
    while waiting or lost:
        ready = ray.wait(list(waiting), timeout=1)[0] if waiting else []
        for reference in ready:
            job = waiting.pop(reference)
            try:
                status = ray.get(reference)
            except (ray.exceptions.TaskCancelledError, KeyboardInterrupt):
                continue
            except no_machine:
                losses[job] += 1
                lost.append(job)
                view.event(f"lost its machine, {losses[job]} of at most {LOSSES} times: {job.name}")
                continue
            except ray.exceptions.RayError as error:
                status = first_line(error)
            if status == 0:
                view.event(f"finished: {job.name}")
            elif stops and status in (128 + signal.SIGTERM, -signal.SIGTERM):
                view.event(f"stopped: {job.name}: {reason_of(log_of(job, base))}")
                continue
            elif isinstance(status, int):
                log = log_of(job, base)
                view.event(f"failed: {job.name}: status {status}: {reason_of(log)} (log: {log})")
            else:
                view.event(f"failed: {job.name}: {status}")
            ended["finished" if status == 0 else "failed"] += 1
        for job in list(lost):
            state, run_dir = find_run(job, base)
            if state == "running" and not stops:  # its process has outlived the machine's Ray, and saves
                continue
            lost.remove(job)
            if state == "done":
                ended["finished"] += 1
                view.event(f"finished: {job.name}")
            elif stops:
                view.event(f"stopped: {job.name}: its machine is lost")
            elif losses[job] >= LOSSES:
                ended["failed"] += 1
                view.event(f"failed: {job.name}: has lost {LOSSES} machines")
            else:
                step = last_step(base / run_dir) if run_dir else 0
                view.event(f"goes on elsewhere, {f'evaluated until step {step}' if run_dir else 'anew'}: {job.name}")
                start(job, run_dir)
        if not waiting:
            time.sleep(1)
        running = {}
        for job in waiting.values():
            log = log_of(job, base)
            if log.exists() and log.stat().st_mtime >= begin:
                running[job.name] = progress_of(log)
        # Of a resumed run only what is left counts as work of this call.
        shares = [max(0.0, share - begun[name]) / max(1e-9, 1 - begun[name]) for name, (share, _) in running.items()]
        counts = ended | {"running": len(running), "waiting": len(waiting) - len(running) + len(lost)}
        view.update(counts, running, (sum(ended.values()) + sum(shares)) / len(jobs), time.time())
        if len(stops) > cancelled:
            cancelled = len(stops)
            if cancelled > 1:
                view.event("killed; the runs go on from their last checkpoints with the same command")
                break
            view.event("stopping: each run saves at the end of its iteration; once more to end them at once")
            for reference in waiting:
                ray.cancel(reference, force=False)
    ray.shutdown()
    if stops:
        return 128 + stops[0]
    return 1 if ended["failed"] else 0


# ------------------------------------------------------------------------------------------------------------ main
def check_args(args: Args):
    for name in ("total_timesteps", "cpus_per_job"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            usage_error(f"--{name.replace('_', '-')} {getattr(args, name)}", "must be at least 1")
    for seed in args.seeds or ():
        if not 0 <= seed <= 2147483:
            usage_error(f"--seeds {seed}", "must be within 0 and 2147483")
    gpus = args.gpus_per_job
    if not (0 <= gpus <= 1 or gpus.is_integer() and gpus > 0):
        usage_error(f"--gpus-per-job {gpus:g}", "must be within 0 and 1, or a whole number")
    if not args.dir.is_dir() and (args.collect or args.dir.exists()):
        usage_error(f"--dir {args.dir}", "is no folder" if args.dir.exists() else "no such folder")


def main(args: Args) -> int:
    check_args(args)
    base = args.dir.resolve()
    cores = len(os.sched_getaffinity(0))
    cpus = args.cpus_per_job or (cores if args.matrix == "table6" else 1)
    jobs, missing = make_jobs(args)
    if missing:
        print(f"left out, there is no such script: {', '.join(missing)}", file=sys.stderr)
    if not jobs:
        chosen = f"--tasks {' '.join(args.tasks)}" if args.tasks else args.matrix
        usage_error(chosen, "no job is left" + (", SMAX has none of these tasks" if args.smax else ""))
    if args.collect:
        return 1 if collect(jobs, base, args.collect) == len(jobs) else 0
    if not args.dry_run:
        for job in jobs:
            settings(job)
        with writing(f"--dir {args.dir}"):
            (base / "runs" / "logs").mkdir(parents=True, exist_ok=True)
            lock = (base / "runs" / "logs" / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            usage_error(f"--dir {args.dir}", "another run.py is at work in its runs/")
        except OSError as error:
            usage_error(f"--dir {args.dir}", f"files there cannot be locked: {error.strerror}")
    states = [(job, *find_run(job, base)) for job in jobs]
    to_do = [(job, run_dir) for job, state, run_dir in states if state in ("new", "cut off")]
    if args.dry_run:
        for job, run_dir in to_do:
            print(shlex.join(job.command(cpus, run_dir)))
    for job, state, run_dir in states:
        if state == "running":
            print(f"left alone, it seems to be running: {job.name} {run_dir or ''}", file=sys.stderr)
    numbers = {state: sum(s == state for _, s, _ in states) for state in ("done", "running", "cut off", "new")}
    print(f"{len(jobs)} jobs: " + ", ".join(f"{n} {state}" for state, n in numbers.items() if n), file=sys.stderr)
    if args.dry_run or not to_do:
        return 0
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # Ray's reports; ours go to stderr
        return run_all(to_do, args, cpus, base)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    try:
        sys.exit(main(parse_args(Args, __doc__)))
    except KeyboardInterrupt:
        sys.exit(130)
