"""How much of EnvPool's speed the rollout of the MuJoCo scripts keeps: a script beside EnvPool alone on the same work.

    python benchmark/speed_mujoco.py --out benchmark/results/speed/mujoco-rollout-ant-4x2.json

A process trains as the script does, and writes down what its robots do in a rollout; after each of them EnvPool alone,
with the same seed, environments and threads, plays the same actions again: the same physics, step for step, a second
later. So a machine's moods hit both. It does so twice: made as the script makes it, and "unpinned", its default, which
leaves to the system on which cores the threads are. The script's seconds are its own time/rollout_seconds: policy,
sampling, normalisers, the episodes' books, the stacking of the rollout and the critics' values. The processes of
different numbers of environments take turns.
"""

import contextlib
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import speed  # noqa: E402
from benchmark.cli import check_writable, parse_args, write  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ROLLOUT = 4000  # steps of an iteration, of all environments (Table 8)


@dataclass
class Args:
    out: Path
    """JSON file of all turns"""
    script: str = "a2po_mamujoco"
    """script to measure"""
    scenario: str = "Ant"
    """the robot, as of the script"""
    partition: str = "4x2"
    """how its joints are shared out, as of the script"""
    num_envs: tuple[int, ...] = (16, 40)
    """environments, one measurement each; 4,000 steps an iteration"""
    turns: int = 3
    """measurements of each"""
    iterations: int = 8
    """iterations of a measurement that count"""
    warmup: int = 2
    """iterations before them that do not"""
    threads: int = speed.cores()
    """CPU threads of PyTorch and of EnvPool"""


def measure(job: dict) -> dict:
    """Seconds of every counted iteration's rollout, by the script and by EnvPool alone, in this process and folder."""
    import envpool

    make, made, played, alone = envpool.make, {}, [], {"envpool": [], "unpinned": []}

    def recording_make(*arguments, **options):
        envs = make(*arguments, **options)
        step = envs.step

        def recording_step(actions):
            result = step(actions)
            played.append((actions, result[0]))
            return result

        envs.step = recording_step
        made["envpool"] = make(*arguments, **options)
        made["unpinned"] = make(*arguments, **options | {"thread_affinity_offset": -1})
        for again in made.values():
            again.reset()
        return envs

    def lap(run, name: str):
        script_lap(run, name)
        if name == "rollout":
            for who, envs in made.items():
                begin = time.perf_counter()
                for actions, _ in played:
                    obs, *_ = envs.step(actions)
                alone[who].append(time.perf_counter() - begin)
                if not np.array_equal(obs, played[-1][1]):
                    raise SystemExit("EnvPool alone came to other observations: it was not the same work")
            played.clear()
            run.lap_begin = time.perf_counter()

    script = importlib.import_module(job["script"])
    script_lap, script.Run.lap, envpool.make = script.Run.lap, lap, recording_make
    rollouts = speed.measure(job | {"real": True})["rollout"]
    return {"script": rollouts} | {who: seconds[job["warmup"] :] for who, seconds in alone.items()}


def run_measurement(job: dict) -> dict:
    """`measure` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--measure", json.dumps(job)]
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["no output"]
            status = 2 if process.returncode == 2 else 1
            fail(f"{job['script']} ended with status {process.returncode}: {lines[-1]}", status)
        return json.loads(Path(folder, "result.json").read_text())


def fail(message: str, status: int = 2):
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


@contextlib.contextmanager
def writing(out: Path):
    """What cannot be written in here is an error in --out."""
    try:
        yield
    except OSError as error:
        fail(f"--out {out}: cannot be written: {error.strerror}")


def table(result: dict) -> str:
    """A row for each number of environments: medians over all iterations of all turns."""
    title = f"{result['scenario']} {result['partition']}, {result['threads']} threads"
    lines = [f"| {title} | steps/s | EnvPool alone | share of it (by turn) | unpinned | share of it (by turn) |"]
    lines += ["|---|---|---|---|---|---|"]
    for count in dict.fromkeys(turn["num_envs"] for turn in result["turns"]):
        turns = [turn for turn in result["turns"] if turn["num_envs"] == count]
        seconds = {who: np.concatenate([turn[who] for turn in turns]) for who in ("script", "envpool", "unpinned")}
        speeds = {who: f"{count * (ROLLOUT // count) / np.median(seconds[who]):.0f}" for who in seconds}
        cells = [f"{count} environments", speeds["script"]]
        for who in ("envpool", "unpinned"):
            by_turn = ", ".join(f"{np.median(np.divide(turn[who], turn['script'])):.2f}" for turn in turns)
            cells += [speeds[who], f"{np.median(seconds[who] / seconds['script']):.2f} ({by_turn})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check_args(args: Args):
    known = sorted(path.stem for path in ROOT.glob("*_mamujoco.py"))
    if args.script not in known:
        fail(f"--script {args.script}: must be one of {', '.join(known)}")
    if not args.num_envs or not all(1 <= count <= ROLLOUT for count in args.num_envs):
        numbers = " ".join(map(str, args.num_envs))
        fail(f"{f'--num-envs {numbers}'.rstrip()}: must be numbers from 1 to {ROLLOUT}")
    for name in ("turns", "iterations", "warmup", "threads"):
        value, low = getattr(args, name), 0 if name == "warmup" else 1
        if value < low:
            fail(f"--{name} {value}: must be at least {low}")
    with writing(args.out):  # before there is something to write
        check_writable(args.out)


def main(args: Args):
    check_args(args)
    result = {"script": args.script, "scenario": args.scenario, "partition": args.partition, "threads": args.threads}
    result |= {"machine": speed.cpu_name(), "load": os.getloadavg()[0], "turns": []}
    common = {"script": args.script, "options": {"scenario": args.scenario, "partition": args.partition}}
    common |= {"threads": args.threads, "iterations": args.iterations, "warmup": args.warmup, "seconds": math.inf}
    for count in tqdm(args.num_envs * args.turns, unit="run"):
        numbers = run_measurement(common | {"num_envs": count, "num_steps": ROLLOUT // count})
        result["turns"].append({"num_envs": count} | {who: [round(x, 5) for x in numbers[who]] for who in numbers})
    with writing(args.out):
        write(args.out, json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        Path("result.json").write_text(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        try:
            main(parse_args(Args, __doc__))
        except KeyboardInterrupt:
            sys.exit(130)
