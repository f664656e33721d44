"""The runs of a table or figure of the paper: starts what is missing, resumes what was cut off, skips what is done.

    python benchmark/run.py table2 --smax --total-timesteps 1000000 --dry-run     # what it would do, as commands
    python benchmark/run.py table2 --smax --total-timesteps 1000000
    python benchmark/run.py table2 --smax --total-timesteps 1000000 --collect benchmark/results/table2

Every run is a process of its own, `python {script}.py ...`, with one line in a live view and a log in runs/logs/. Ray
shares out the CPUs (and GPUs) of this machine, or with --address those of a cluster, whose machines need this folder
and this Python under the same paths (and where the cluster asks for a token, RAY_AUTH_MODE=token and the token here).
What a script refuses, such as a game that is not installed here, ends this program before anything is started.
Ctrl-C stops the runs at the end of their iteration and saves them, a second one ends them at once; the same command
later goes on. What is done and what was cut off is read from the run directories: a run belongs to a job if all of
its settings do that change the numbers, whoever started it.

The paper's text does not name the tasks of figures 5 to 7, so --tasks has defaults of ours there. Of figure 5 there is
A2PO with and without PreOPC; V-trace for the simultaneous algorithms, PreOPC for HAPPO and RPISA-PPO have no script.
Table 6 runs one job at a time, on all cores; seconds for rollout and update are in the runs' TensorBoard files.
"""

import contextlib
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
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
SMAC_MAPS = (  # Tables 2 and 5
    "MMM 3s_vs_5z 2c_vs_64zg 3s5z 5m_vs_6m 8m_vs_9m 10m_vs_11m 6h_vs_8z 3s5z_vs_3s6z MMM2 27m_vs_30m corridor"
).split()
NOT_ON_SMAX = ("MMM", "MMM2", "2c_vs_64zg")  # it lacks their units
MUJOCO_TASKS = (
    "Ant-2x4 Ant-2x4d Ant-4x2 Ant-8x1 HalfCheetah-2x3 HalfCheetah-3x2 HalfCheetah-6x1 Hopper-3x1 Humanoid-9|8 "
    "Humanoid-17x1 HumanoidStandup-9|8 Walker2d-2x3 Walker2d-3x2 Walker2d-6x1"
).split()
ABLATION_TASKS = ("3s5z", "MMM2", "Humanoid-9|8")
ALL = ("mappo", "coppo", "happo", "a2po")
# What sets a run apart from the script's defaults, by the name that plot.py gives it.
PREOPC = {"": (), "-no-preopc": ("--no-preopc",)}
CLIP = {"": (), "-fixed-clip": ("--clip-adaptation", "1.0")}
RULES = ("cyclic", "random", "greedy", "reverse-greedy", "reverse-semi-greedy")
ORDER = {"": ()} | {f"-{rule}": ("--agent-order", rule) for rule in RULES}
# Name: tasks, algorithms, variants.
MATRICES = {
    "table2": (SMAC_MAPS, ALL, {"": ()}),
    "figure3": (MUJOCO_TASKS, ALL, {"": ()}),
    "figure4": (("5_vs_5", "11_vs_11_stochastic"), ALL, {"": ()}),  # Table 3 too
    "figure5": (ABLATION_TASKS, ("a2po",), PREOPC),
    "figure6": (ABLATION_TASKS, ("a2po",), ORDER),
    "figure7": (ABLATION_TASKS, ("a2po",), CLIP),
    "figure5-7": (ABLATION_TASKS, ("a2po",), PREOPC | ORDER | CLIP),
    "figure10": (("spread-3-0", "spread-5-0", "spread-3-0.5", "spread-5-0.5"), ALL, {"": ()}),
    "table6": (("3s5z", "27m_vs_30m", "Humanoid-9|8", "Ant-4x2", "Humanoid-17x1"), ALL, {"": ()}),
}
# Settings that do not change a run's numbers, or say how far it goes.
FREE = set(
    "total_timesteps save_every resume eval_only checkpoint track wandb_project cuda compile torch_threads num_workers "
    "worker_timeout".split()
)


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
    """only these of mappo coppo happo a2po"""
    total_timesteps: int | None = None
    """environment steps of each run; by default the script's"""
    options: str = ""
    """further options for every run, in one word: --options='--eval-every 20000'"""
    dry_run: bool = False
    """print the commands and leave"""
    collect: Path | None = None
    """copy the finished runs to {DIR}/{task}/{script}[-variant]__{seed}.jsonl and .config.json, and leave"""
    dir: Path = Path(".")
    """where the runs/ folder is or shall be"""
    cpus_per_job: int | None = None
    """CPUs of each run, and threads of its PyTorch; by default 1, for table6 all"""
    gpus_per_job: float = 0.0
    """GPUs of each run, such as 0.25; with 0 the runs see none"""
    address: str = ""
    """address of a running Ray cluster, or auto; without it the runs stay on this machine"""


def usage_error(what, why: str):
    """One line; exit status 2."""
    print(f"run.py: error: {what}: {why}", file=sys.stderr)
    raise SystemExit(2)


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
    """The benchmark of a task and the options that choose it."""
    if found := re.fullmatch(r"spread-(\d+)-([\d.]+)", task):
        return "mpe", ("--n-agents", found[1], "--local-ratio", found[2])
    if found := re.fullmatch(r"([A-Z][A-Za-z\d]+)-(\d+x\d+d?|\d+\|\d+)", task):
        return "mujoco", ("--scenario", found[1], "--partition", found[2])
    if re.fullmatch(r"5_vs_5|11_vs_11_\w+|academy_\w+", task):
        return "grf", ("--scenario", task, *(["--share-parameters"] if task.startswith("11_vs_11") else []))
    return "smac", ("--map", task, "--simulator", "smax" if smax else "starcraft2")


def make_jobs(args: Args) -> tuple[list[Job], list[str]]:
    """The jobs, all of the first seed first, and the names of scripts that they would need but that do not exist."""
    tasks, algorithms, variants = MATRICES[args.matrix]
    tasks, algorithms = args.tasks or tasks, [a for a in algorithms if not args.algorithms or a in args.algorithms]
    if args.smax:
        tasks = [t for t in tasks if task_options(t, True)[0] == "smac" and t not in NOT_ON_SMAX]
    jobs, missing = [], []
    for seed in args.seeds or ((1,) if args.matrix == "table6" else (1, 2, 3)):
        for task in dict.fromkeys(tasks):
            benchmark, task_choice = task_options(task, args.smax)
            for algorithm in algorithms:
                script = ROOT / f"{algorithm}_{'mamujoco' if benchmark == 'mujoco' else benchmark}.py"
                if not script.exists():
                    missing.append(script.name)
                    continue
                for variant, variant_options in variants.items():
                    options = (*task_choice, "--seed", str(seed), *variant_options, *shlex.split(args.options))
                    name = f"{task}-smax" if args.smax else task
                    jobs.append(Job(script, name, variant, seed, options, args.total_timesteps))
    return jobs, sorted(set(missing))


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
def last_step(run_dir: Path) -> int:
    """Step of the last whole line of eval.jsonl, 0 if there is none."""
    try:
        lines = (run_dir / "eval.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def belongs(run_dir: Path, job: Job) -> bool:
    """Whether the settings of a run are those of a job."""
    try:
        config = json.loads((run_dir / "config.json").read_text())
    except (OSError, ValueError):
        return False
    wanted = vars(load(job.script).complete_args(settings(job)))
    return all(config.get(name, value) == value for name, value in wanted.items() if name not in FREE)


def log_of(job: Job, base: Path) -> Path:
    return base / "runs" / "logs" / f"{job.name}.log"


def is_locked(path: Path) -> bool:
    """Whether a process that we started, or its child, still writes this log."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def is_foreign_and_busy(run_dir: Path, log: Path) -> bool:
    """Whether somebody else seems to be running it: not in our log, and written to within TensorBoard's two minutes."""
    if log.exists() and run_dir.name in log.read_text(errors="replace"):
        return False
    return any(time.time() - file.stat().st_mtime < 150 for file in run_dir.iterdir())


def find_run(job: Job, base: Path) -> tuple[str, Path | None]:
    """`done`, `running`, `cut off` or `new`, and the run's directory (relative to base)."""
    pattern = f"*__{job.script.stem}__{job.seed}__*"
    candidates = [d for d in sorted((base / "runs").glob(pattern)) if d.is_dir() and belongs(d, job)]
    candidates.sort(key=last_step)  # the one that got furthest; of equals the newest
    for run_dir in reversed(candidates):
        if last_step(run_dir) >= settings(job).total_timesteps:
            return "done", run_dir.relative_to(base)
    if is_locked(log_of(job, base)):
        return "running", None
    for run_dir in candidates:
        if is_foreign_and_busy(run_dir, log_of(job, base)):
            return "running", run_dir.relative_to(base)
    for run_dir in reversed(candidates):
        if (run_dir / "checkpoint.pt").is_file():
            return "cut off", run_dir.relative_to(base)
    return "new", None


def collect(jobs: list[Job], base: Path, target: Path) -> int:
    """Copy what is done; returns the number of jobs that are not."""
    missing = 0
    for job in jobs:
        state, run_dir = find_run(job, base)
        if state != "done":
            print(f"not finished ({state}): {job.name}")
            missing += 1
            continue
        folder = target / run_dir.name.split("__")[0].replace("|", "_")  # | is not allowed in names on Windows
        folder.mkdir(parents=True, exist_ok=True)
        for source, ending in (("eval.jsonl", ".jsonl"), ("config.json", ".config.json")):
            shutil.copyfile(base / run_dir / source, folder / f"{job.algorithm}__{job.seed}{ending}")
        print(f"{run_dir} -> {folder / f'{job.algorithm}__{job.seed}.jsonl'}")
    return missing


# --------------------------------------------------------------------------------------------------------- running
def run_process(command: list[str], base: Path, log: Path, gpus: float) -> int | str:
    """Run a command to its end with its output in a log: its exit status, or why it was not started.

    KeyboardInterrupt, which is how Ray cancels, becomes SIGTERM; the script saves and ends.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup and the like it is ignored, by heritage
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process keeps it as long as it lives
        except OSError:
            return "it is still running from an earlier call"
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=base, env=environment, start_new_session=True, **options)
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
    """One block that is drawn anew in place on a terminal; elsewhere a line a minute."""

    def __init__(self, stream, now: float):
        self.stream, self.begin, self.live = stream, now, stream.isatty()
        self.height, self.next_line = 0, now

    def clear(self):
        if self.height:
            self.stream.write(f"\x1b[{self.height}F\x1b[J")
        self.height = 0

    def event(self, text: str):
        self.clear()
        self.stream.write(text + "\n")
        self.stream.flush()

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
        self.clear()
        self.stream.write("".join(line[: width - 1] + "\n" for line in lines))
        self.stream.flush()
        self.height = len(lines)


def start_ray(args: Args, cpus: int):
    """Ray on this machine or a cluster, without dashboard, usage reports and logs on the screen."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    try:
        import ray
    except ImportError as error:
        usage_error("Ray", f"{error}; pip install -r benchmark/requirements.txt")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if args.address:
        try:
            if args.address != "auto":  # Ray itself would go on trying for minutes
                host, _, port = args.address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), 10).close()
            ray.init(address=args.address, **quiet)
        except (OSError, RuntimeError, ValueError, OverflowError) as error:
            usage_error(f"--address {args.address}", f"no Ray cluster there, {str(error).splitlines()[0]}")
    else:
        own = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
        # `local`: not a cluster that happens to run on this machine
        ray.init(address="local", **own, object_store_memory=100 * 2**20, **quiet)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(n.get("CPU", 0) >= cpus and n.get("GPU", 0) >= args.gpus_per_job for n in nodes):
        ray.shutdown()
        usage_error(f"{cpus} CPUs and {args.gpus_per_job:g} GPUs per job", "no machine has as many")
    return ray


def run_all(jobs: list[tuple[Job, Path | None]], args: Args, cpus: int, base: Path) -> int:
    """Run the jobs that are not done; the program's exit status."""
    ray = start_ray(args, cpus)
    stops = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stops.append(number))
    task = ray.remote(max_retries=0, num_cpus=cpus, num_gpus=args.gpus_per_job)(run_process)
    begin = time.time()
    waiting = {
        task.remote(job.command(cpus, run_dir), base, log_of(job, base), args.gpus_per_job): job
        for job, run_dir in jobs
    }
    view, ended, cancelled, first_share = View(sys.stderr, begin), {"finished": 0, "failed": 0}, 0, {}
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=1)
        for reference in ready:
            job = waiting.pop(reference)
            try:
                status = ray.get(reference)
            except (ray.exceptions.TaskCancelledError, KeyboardInterrupt):
                continue
            except ray.exceptions.RayError as error:
                status = str(error).splitlines()[0]
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
        running = {}
        for job in waiting.values():
            log = log_of(job, base)
            if log.exists() and log.stat().st_mtime >= begin:
                running[job.name] = progress_of(log)
                first_share.setdefault(job.name, running[job.name][0])
        # Of a resumed run only what is left counts as work of this call.
        shares = [
            (share - first_share[name]) / max(1e-9, 1 - first_share[name]) for name, (share, _) in running.items()
        ]
        counts = ended | {"running": len(running), "waiting": len(waiting) - len(running)}
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
    if args.gpus_per_job < 0:
        usage_error(f"--gpus-per-job {args.gpus_per_job}", "must not be negative")
    unknown = sorted(set(args.algorithms) - set(ALL))
    if unknown:
        usage_error(f"--algorithms {' '.join(unknown)}", f"must be of {' '.join(ALL)}")
    if not args.dir.is_dir():
        usage_error(f"--dir {args.dir}", "no such folder")


def main(args: Args) -> int:
    check_args(args)
    base = args.dir.resolve()
    cores = len(os.sched_getaffinity(0))
    cpus = args.cpus_per_job or (cores if args.matrix == "table6" else 1)
    jobs, missing = make_jobs(args)
    if missing:
        print(f"left out, there is no such script: {', '.join(missing)}", file=sys.stderr)
    if not jobs:
        usage_error(args.matrix, "no job is left" + (", SMAX has none of these tasks" if args.smax else ""))
    if args.collect:
        return 1 if collect(jobs, base, args.collect) == len(jobs) else 0
    if not args.dry_run:
        for job in jobs:
            settings(job)
        (base / "runs" / "logs").mkdir(parents=True, exist_ok=True)
        lock = (base / "runs" / "logs" / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            usage_error(base / "runs", "another run.py is at work there")
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
    return run_all(to_do, args, cpus, base)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
