"""Table 6 here: seconds per iteration of the scripts in rollout and update, ratios to the first script, peak memory.

    python benchmark/speed.py --out speed                          # four algorithms at 3s5z's shapes: about 4 minutes
    python benchmark/speed.py --sweep length --out speed-length    # rollouts of 25 to 3,000 steps
    python benchmark/speed.py --sweep agents --out speed-agents    # 2 to 27 agents
    python benchmark/speed.py --real --options map=3s5z simulator=smax --seconds 60 --out speed-smax  # with SMAX

Without --real no simulator is needed: the script is imported, its `make_envs` replaced by environments that play back
random data with the right spaces, and its `main` runs as it is, up to a number of iterations. The seconds are the run's
own time/rollout_seconds and time/update_seconds; what a real simulator adds to the rollout is missing, and nobody dies.
Each measurement is a process of its own. Scripts take turns, so that a noisy machine is noisy for all of them, and the
numbers are medians over all turns. Peak memory is that of the process, without simulators in processes of their own.
Writes speed.json and speed.md into --out.
"""

import contextlib
import functools
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.cli import check_writable, parse_args, write  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TAGS = {"rollout": "time/rollout_seconds", "update": "time/update_seconds", "steps_per_second": "charts/SPS"}


@dataclass
class Args:
    out: Path
    """folder for speed.json and speed.md"""
    scripts: tuple[str, ...] = ("mappo_smac", "coppo_smac", "happo_smac", "a2po_smac")
    """scripts to measure; ratios are to the first"""
    sweep: Literal["none", "length", "agents"] = "none"
    """measure one shape, or the growth with the rollout's length or with the number of agents"""
    real: bool = False
    """play the script's own simulator, not synthetic data"""
    lengths: tuple[int, ...] = (25, 100, 400, 1500, 3000)
    """steps of the rollout in --sweep length"""
    agents: tuple[int, ...] = (2, 3, 5, 8, 14, 27)
    """numbers of agents in --sweep agents"""

    n_agents: int | None = None
    """agents of the synthetic data; by default those of the benchmark's first task"""
    obs_dim: int | None = None
    """numbers in an observation of the synthetic data; the same for any number of agents"""
    state_dim: int | None = None
    """numbers in the state of the synthetic data, where the script has one"""
    n_actions: int | None = None
    """actions to choose from, or joints of an agent, of the synthetic data"""
    num_envs: int | None = None
    """environments; by default the script's own number, 2 in --sweep length and 16 in --sweep agents"""
    num_steps: int | None = None
    """steps of each environment per iteration; by default the script's own number, 50 in --sweep agents"""
    options: tuple[str, ...] = ()
    """more settings of the scripts as NAME=VALUE, such as update_epochs=5; for the scripts that have them"""

    turns: int = 2
    """measurements of each script at each shape"""
    iterations: int = 8
    """iterations of a measurement that count"""
    warmup: int = 2
    """iterations before them that do not"""
    seconds: float = 15.0
    """a measurement ends after this time, with at least one iteration that counts"""
    threads: int | None = None
    """CPU threads of PyTorch; by default all cores"""


# ---------------------------------------------------------------------------------------------- synthetic simulators
class Synthetic(gym.vector.VectorEnv):
    """Plays back random data, prepared once, with the spaces of a benchmark; next-step autoreset, all agents alive."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, observation_space, action_space, num_envs: int, rewards=(), numbers=(), seed: int = 0):
        """rewards: the shape of a reward, () for a team's; numbers: names of what an episode's end tells."""
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = gym.vector.utils.batch_space(observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(action_space, num_envs)
        self.has_joint = np.ones(action_space.shape, bool)  # MuJoCo's
        self._random, self._rewards = np.random.default_rng(seed), rewards
        self._info = {"episode": {name: np.zeros(num_envs) for name in numbers}}
        self._data = [self._draw() for _ in range(8)]
        self._time, self._final = 0, np.zeros(num_envs, bool)

    def _draw(self):
        obs = {}
        for name, space in self.observation_space.items():
            if np.issubdtype(space.dtype, np.floating):
                obs[name] = self._random.standard_normal(space.shape).astype(space.dtype)
            else:
                obs[name] = np.ones(space.shape, space.dtype)
        if "action_mask" in obs:  # the first action is always there
            others = obs["action_mask"][..., 1:]
            others[:] = self._random.random(others.shape) < 0.7
        return obs, self._random.standard_normal((self.num_envs, *self._rewards)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self._final = np.zeros(self.num_envs, bool)
        return self._data[0][0], {}

    def step(self, actions):
        return self.step_wait()

    def step_async(self, actions):
        pass

    def step_wait(self):
        self._time += 1
        obs, reward = self._data[self._time % len(self._data)]
        # Episodes of 60 steps on average, half of them ended by the time limit.
        ends = (self._random.random(self.num_envs) < 1 / 60) & ~self._final
        self._final, limit = ends, self._time % 2 == 0
        return obs, reward, ends & (not limit), ends & limit, self._info


TYPICAL = {  # the shapes of each benchmark's typical task
    "smac": {"n": 8, "obs_dim": 205, "state_dim": 192, "n_actions": 13},  # SMAX 3s5z
    "mpe": {"n": 3, "n_actions": 5},  # with sizes that go with the number of agents
    "mamujoco": {"n": 4, "obs_dim": 105, "n_actions": 2},  # Ant 4x2
    "grf": {"n": 4, "obs_dim": 128, "state_dim": 126, "n_actions": 19},  # 5_vs_5
}


def complete_shape(benchmark: str, shape: dict) -> dict:
    """With the typical task's numbers where none were asked for."""
    shape = TYPICAL[benchmark] | shape
    if benchmark == "mpe":
        n = shape["n"]
        shape = {"obs_dim": 4 + 2 * n + 4 * (n - 1)} | shape
        shape = {"state_dim": n * shape["obs_dim"]} | shape
    return shape


def spaces(n: int, obs_dim: int, n_actions: int, state_dim: int | None = None) -> tuple:
    """Of observations and actions; without a state it is MuJoCo, where all see the same and actions are continuous."""
    numbers = functools.partial(gym.spaces.Box, -np.inf, np.inf)
    if state_dim is None:
        return gym.spaces.Dict(obs=numbers((obs_dim,), np.float64)), gym.spaces.Box(-1, 1, (n, n_actions), np.float32)
    observations = gym.spaces.Dict(
        obs=numbers((n, obs_dim), np.float32),
        state=numbers((state_dim,), np.float32),
        action_mask=gym.spaces.MultiBinary((n, n_actions)),
        alive=gym.spaces.MultiBinary(n),
    )
    return observations, gym.spaces.MultiDiscrete([n_actions] * n)


def synthetic_script(name: str, shape: dict):
    """The imported script with `make_envs` replaced, settings that go with the shape, and the number of agents."""
    script, benchmark = importlib.import_module(name), name.rsplit("_", 1)[-1]
    shape, settings = complete_shape(benchmark, shape), {}
    n = shape["n"]
    if benchmark == "smac":
        script.choose_simulator = lambda simulator, map_name: "smax"
    elif benchmark == "mpe":
        settings = {"n_agents": n}
    elif benchmark == "mamujoco":
        script.PARTITIONS["Ant"] = (f"{n}x{shape['n_actions']}",)
        settings = {"scenario": "Ant"}
    elif benchmark == "grf":
        script.SCENARIOS["5_vs_5"] = script.SCENARIOS["5_vs_5"]._replace(agents=n)
        script.find_football = lambda: True
        settings = {"scenario": "5_vs_5"}
    numbers = set(script.RAW.values()) - {"return", "length"}

    def make_envs(args):
        def episodes(num_envs):
            rewards = (n,) if benchmark == "mpe" else ()
            kind = script.AgentIds if getattr(args, "agent_id", False) else script.Episodes
            return kind(Synthetic(*spaces(**shape), num_envs, rewards, numbers))

        if benchmark != "grf":
            return episodes(args.num_envs)
        sizes = args.num_envs - args.num_envs // 2, args.num_envs // 2
        return script.Halves([episodes(size) for size in sizes if size > 0])

    script.make_envs = make_envs
    return script, settings, n


# ------------------------------------------------------------------------------------------------- one measurement
def measure(job: dict) -> dict:
    """Run a script in this process and in this folder until it has done what `job` asks for: seconds by iteration."""
    if job["real"]:
        script, settings, n = importlib.import_module(job["script"]), {}, None
    else:
        script, settings, n = synthetic_script(job["script"], job["shape"])
    fields = script.Args.__dataclass_fields__
    never = 10**15
    settings |= {"total_timesteps": never, "eval_every": never, "save_every": never}
    settings |= {name: job[name] for name in ("num_envs", "num_steps") if job[name] is not None}
    settings |= {"torch_threads": job["threads"]}
    settings |= {name: value for name, value in job["options"].items() if name in fields}
    arguments = []
    for name, value in settings.items():
        if str(value).lower() in ("true", "false"):
            arguments.append(f"--{'' if str(value).lower() == 'true' else 'no-'}{name.replace('_', '-')}")
        else:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    args = script.complete_args(script.parse_args(arguments))
    if n and "agent_blocks" in fields:  # a table's are for more agents than a sweep may have
        args.agent_blocks = min(args.agent_blocks, n)

    seconds, begin = {name: [] for name in TAGS}, time.perf_counter()

    class Recorder:
        def __init__(self, *arguments, **options):
            pass

        def add_scalar(self, tag, value, *_):
            for name in TAGS:
                if tag == TAGS[name]:
                    seconds[name].append(float(value))
            counted = min(map(len, seconds.values())) - job["warmup"]
            enough = counted >= job["iterations"] or (counted >= 1 and time.perf_counter() - begin > job["seconds"])
            if enough and not job.get("done"):
                job["done"] = True
                signal.raise_signal(signal.SIGINT)  # the script ends after this iteration

        def __getattr__(self, name):
            return lambda *arguments, **options: None

    script.SummaryWriter = Recorder
    script.Run.save = lambda run: True
    try:
        script.main(args)
    except (SystemExit, KeyboardInterrupt) as end:
        if not job.get("done"):
            raise SystemExit(getattr(end, "code", 130)) from end
    configs = [json.loads(path.read_text()) for path in Path("runs").glob("*/config.json")]
    result = {name: values[job["warmup"] :] for name, values in seconds.items()}
    return result | {"settings": configs[0] if configs else {}}


class Failed(Exception):
    """A measurement's last line, and the exit status for it."""


def run_measurement(job: dict) -> dict:
    """`measure` in a process of its own, with its peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        command = [sys.executable, __file__, "--measure", json.dumps(job)]
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if code:
            log.seek(0)
            lines = [line.strip(" │╭╮╰╯─\n") for line in log.read().replace("\r", "\n").splitlines()]
            lines = [line for line in lines if line] or ["no output"]
            raise Failed(f"{job['script']} ended with status {code}: {lines[-1]}", 2 if code == 2 else 1)
        result = json.loads(Path(folder, "result.json").read_text())
    return result | {"peak_memory_mib": usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)}


# ------------------------------------------------------------------------------------------------------------ tables
def summarize(turns: dict[str, list[dict]]) -> dict[str, dict]:
    """script -> its measurements, one per turn, to script -> medians, ratios to the first script and all numbers."""
    rows = {}
    for script, results in turns.items():
        whole = [[sum(pair) for pair in zip(r["rollout"], r["update"], strict=True)] for r in results]
        row = {name: statistics.median(x for r in results for x in r[name]) for name in TAGS}
        row["iteration"] = statistics.median(x for turn in whole for x in turn)
        row["iteration_by_turn"] = [statistics.median(turn) for turn in whole]
        row["peak_memory_mib"] = max(r["peak_memory_mib"] for r in results)
        row["settings"] = results[0]["settings"]
        row["turns"] = [{name: [round(x, 5) for x in r[name]] for name in TAGS} for r in results]
        rows[script] = row
    first = next(iter(rows.values()))
    for row in rows.values():
        row["ratio"] = row["iteration"] / first["iteration"]
        row["rollout_ratio"] = row["rollout"] / first["iteration"]  # both in units of the first one's iteration,
        row["update_ratio"] = row["update"] / first["iteration"]  # as in the second line of the paper's Table 6
        both = zip(row["iteration_by_turn"], first["iteration_by_turn"], strict=True)
        row["ratio_by_turn"] = [mine / others for mine, others in both]
    return rows


def markdown(result: dict) -> str:
    """One table per shape."""
    data = "with the simulator" if result["real"] else "synthetic data, no simulator"
    machine = f"{result['machine']}, threads: {result['threads']}, {result['device']}"
    lines = [f"Seconds per iteration, {data}; {machine}.", ""]
    for point in result["points"]:
        first = next(iter(point["scripts"]))
        lines += [f"{point['title']}:", ""]
        lines.append(
            f"| script | rollout, s | update, s | iteration, s | over {first} (rollout + update) | by turn | steps/s "
            "| peak memory, MiB |"
        )
        lines.append("|---|---|---|---|---|---|---|---|")
        for script, row in point["scripts"].items():
            by_turn = sorted(row["ratio_by_turn"])
            cells = [script, *(f"{row[name]:.3f}" for name in ("rollout", "update", "iteration"))]
            cells.append(f"{row['ratio']:.2f} ({row['rollout_ratio']:.2f} + {row['update_ratio']:.2f})")
            cells.append(f"{by_turn[0]:.2f} to {by_turn[-1]:.2f}")
            cells += [f"{row[name]:.0f}" for name in ("steps_per_second", "peak_memory_mib")]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def growth(result: dict) -> str:
    """For a sweep: the seconds of an iteration and the peak memory, a row per shape."""
    scripts = list(result["points"][0]["scripts"])
    heads = [f"{script}, s (update)" for script in scripts] + [f"{script}, MiB" for script in scripts]
    what = {"length": "steps of the rollout", "agents": "agents"}[result["sweep"]]
    lines = [f"| {what} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for point in result["points"]:
        rows = point["scripts"].values()
        cells = [f"{row['iteration']:.3f} ({row['update']:.3f})" for row in rows]
        cells += [f"{row['peak_memory_mib']:.0f}" for row in rows]
        lines.append(f"| {point[result['sweep']]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------------- main
def fail(message: str, status: int = 2):
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def check_args(args: Args) -> dict[str, str]:
    """End the program at the first wrong value; returns --options as a dictionary."""
    if not args.scripts:
        fail("--scripts: needs at least one")
    known = sorted(path.stem for name in TYPICAL for path in ROOT.glob(f"*_{name}.py"))
    for script in args.scripts:
        if script not in known:
            fail(f"--scripts {script}: must be one of {', '.join(known)}")
    if len(set(args.scripts)) < len(args.scripts):
        fail(f"--scripts {' '.join(args.scripts)}: each once")
    for name, value in asdict(args).items():
        low = 0 if name == "warmup" else 1
        for number in value if name in ("lengths", "agents") else [value]:
            if type(number) is int and number < low:
                fail(f"--{name.replace('_', '-')} {number}: must be at least {low}")
    if not args.seconds > 0:
        fail(f"--seconds {args.seconds}: must be above 0")
    if args.sweep != "none" and not getattr(args, {"length": "lengths", "agents": "agents"}[args.sweep]):
        fail(f"--sweep {args.sweep}: needs values")
    shape = [name for name in ("n_agents", "obs_dim", "state_dim", "n_actions") if getattr(args, name) is not None]
    if args.real and shape:
        fail(f"--{shape[0].replace('_', '-')}: is for synthetic data; with --real use --options")
    if args.real and args.sweep == "agents":
        fail("--sweep agents: is for synthetic data")
    if any(script.endswith("_mpe") for script in args.scripts) and 1 in (args.n_agents, *args.agents):
        fail("--n-agents 1: MPE needs at least 2")
    options = {}
    for option in args.options:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            fail(f"--options {option}: must be NAME=VALUE, such as update_epochs=5")
        sources = [(ROOT / f"{script}.py").read_text() for script in args.scripts]
        if not any(f"\n    {name}: " in source for source in sources):
            fail(f"--options {option}: none of the scripts has {name}")
        options[name] = value
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        for file in (args.out / "speed.json", args.out / "speed.md"):  # before there is something to write
            check_writable(file)
    return options


@contextlib.contextmanager
def writing(folder: Path):
    """What cannot be written in here is an error in --out."""
    try:
        yield
    except OSError as error:
        fail(f"--out {folder}: cannot be written: {error.strerror}")


def plan(args: Args, options: dict[str, str]) -> list[dict]:
    """The shapes to measure, each as what all scripts' jobs have in common."""
    common = {"real": args.real, "threads": args.threads or cores()}
    common |= {"num_envs": args.num_envs, "num_steps": args.num_steps}
    common |= {"iterations": args.iterations, "warmup": args.warmup, "seconds": args.seconds, "options": options}
    names = {"n": args.n_agents, "obs_dim": args.obs_dim, "state_dim": args.state_dim, "n_actions": args.n_actions}
    shape = {name: value for name, value in names.items() if value is not None}
    if args.sweep == "length":
        common |= {"num_envs": args.num_envs or 2}
        chunk = {"chunk_length": "5"} if "chunk_length" not in options else {}  # divides 25
        common["options"] = chunk | options
        return [common | {"shape": shape, "num_steps": length, "length": length} for length in args.lengths]
    if args.sweep == "agents":
        common |= {"num_envs": args.num_envs or 16, "num_steps": args.num_steps or 50}
        sizes = {"obs_dim": 128, "state_dim": 128} | shape  # the same for all, so that agents alone make the difference
        return [common | {"shape": sizes | {"n": n}, "agents": n} for n in args.agents]
    return [common | {"shape": shape}]


def title(point: dict, config: dict) -> str:
    shape = {"n": "agents", "obs_dim": "numbers observed", "state_dim": "of state", "n_actions": "actions"}
    parts = [f"{config['num_steps']} steps of {config['num_envs']} environments"]
    parts += [f"{point['shape'][name]} {text}" for name, text in shape.items() if name in point["shape"]]
    return ", ".join(parts + [f"{name} {value}" for name, value in point["options"].items()])


def main(args: Args):
    options = check_args(args)
    points = plan(args, options)
    result = {"real": args.real, "sweep": args.sweep, "machine": cpu_name(), "cores": os.cpu_count()}
    result |= {"threads": points[0]["threads"], "python": platform.python_version(), "points": []}
    try:
        with tqdm(total=len(points) * args.turns * len(args.scripts), unit="run") as bar:
            for point in points:
                turns = {script: [] for script in args.scripts}
                where = [f"{name} {point[name]}" for name in ("length", "agents") if name in point]
                for turn in range(args.turns):
                    for script in args.scripts:
                        bar.set_description(", ".join([*where, f"turn {turn + 1}", script]))
                        turns[script].append(run_measurement(point | {"script": script}))
                        bar.update()
                rows = summarize(turns)
                config = next(iter(rows.values()))["settings"]
                result["points"].append(point | {"scripts": rows, "title": title(point, config)})
                result |= {"device": config["device"], "versions": config["versions"]}
                text = markdown(result) + ("\n" + growth(result) if args.sweep != "none" else "")
                # After each shape: a run may be cut off.
                with writing(args.out):
                    write(args.out / "speed.json", json.dumps(result, indent=1) + "\n")
                    write(args.out / "speed.md", text)
    except Failed as failure:
        fail(*failure.args)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        numbers = measure(json.loads(sys.argv[2]))
        Path("result.json").write_text(json.dumps(numbers))
    else:
        try:
            main(parse_args(Args, __doc__))
        except KeyboardInterrupt:
            sys.exit(130)
