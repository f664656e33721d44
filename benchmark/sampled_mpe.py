"""The sampled and the greedy return of A2PO on MPE Navigation, 3 agents, cooperative: ours, and the authors' trainer's.

    python benchmark/sampled_mpe.py runs/spread-3-0-jaxmarl__a2po_mpe__1__1795932780 --out ours.jsonl
    git clone https://github.com/xihuai18/A2PO-ICLR2023
    python benchmark/sampled_mpe.py A2PO-ICLR2023 --seed 1 --out authors.jsonl    # trains, half an hour or more

Adds a line to --out: the mean return per agent of the training episodes that ended in each window of steps, and of 32
greedy episodes with the steps before them. What a run of ours has it reads from TensorBoard and its evaluations. Theirs
is trained here, on one thread, with the settings of speed_peers.py, of which are our batch and one network for all
agents, and a second step of the critic and a lambda of 0.95, which enters its trace twice, as its launch script for MPE
has them; it evaluates as it does itself, every 24,800 steps. Its games are played in this process, one after the other.
"""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import speed_peers  # noqa: E402
from benchmark.cli import check_writable, parse_args  # noqa: E402
from benchmark.run import read_config  # noqa: E402

RETURN = "charts/episodic_return"  # in TensorBoard


@dataclass
class Args:
    path: tyro.conf.Positional[Path]
    """a run directory of a2po_mpe.py, or a checkout of the authors' code"""
    out: Path
    """JSON lines file, a line is added"""
    seed: int = 1
    """of the authors' trainer; ours has its own"""
    total_timesteps: int = 600_000
    """environment steps, from the first"""
    window: int = 20_000
    """environment steps of a window"""


def usage_error(what, why: str):
    """One line; exit status 2."""
    print(f"sampled_mpe.py: error: {what}: {why}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def writing(out: Path):
    """What cannot be written in here is an error in --out."""
    try:
        yield
    except OSError as error:
        usage_error(f"--out {out}", f"cannot be written: {error.strerror}")


class Returns:
    """Of the authors' runner what it logs in every iteration and evaluation; takes the place of speed_peers' clock,
    which is told of the runner when all is imported."""

    def __init__(self):
        self.by_step, self.greedy = [], []

    def around(self, runner, method: str):
        def log_train(_, numbers: dict, step: int):
            if "average_episode_rewards" in numbers:
                self.by_step.append((step, float(numbers["average_episode_rewards"])))

        def log_env(_, numbers: dict, step: int):
            self.greedy.append((step, round(float(np.mean(numbers["eval_average_episode_rewards"])), 3)))

        from onpolicy.scripts.train import train_pettingzoo

        train_pettingzoo.ShareSubprocVecEnv = train_pettingzoo.ShareDummyVecEnv
        runner.log_train, runner.log_env = log_train, log_env


def train_theirs(folder: Path, seed: int, steps: int) -> Returns:
    """by_step: (step, mean return of the episodes that ended in the iteration); greedy: (step, mean return)"""
    returns, here = Returns(), Path.cwd()
    with tempfile.TemporaryDirectory() as copy, contextlib.redirect_stdout(io.StringIO()):
        speed_peers.copy_of(folder, Path(copy))
        os.chdir(copy)
        sys.path.insert(0, copy)
        game = {"env_args": {"local_ratio": 0.0, "max_cycles": 25}, "num_env_steps": steps}
        game |= {"use_eval": True, "eval_interval": 31, "eval_episodes": 32, "n_eval_rollout_threads": 32}
        flags = f"--seed {seed} --use_two_stage True --log_interval 1"
        speed_peers.authors(returns, 1, flags, **game)
        os.chdir(here)
    return returns


def read_ours(run: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    by_step = []
    for file in sorted(run.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if RETURN in events.Tags()["scalars"]:  # else it was stopped before its first iteration
            new = [(event.step, event.value) for event in events.Scalars(RETURN)]
            by_step = [old for old in by_step if old[0] < new[0][0]] + new  # a resumed run goes on in a new file
    return by_step


def read_evaluations(run: Path) -> list[tuple[int, float]]:
    """(step, mean return of the greedy episodes)"""
    lines = (run / "eval.jsonl").read_text().splitlines() if (run / "eval.jsonl").exists() else []
    evaluations = []
    for line in lines:
        with contextlib.suppress(ValueError):  # it was cut off
            record = json.loads(line)
            evaluations.append((record["step"], round(float(np.mean(record["returns"])), 3)))
    return evaluations


def in_windows(by_step: list[tuple[int, float]], window: int, steps: int) -> list[float]:
    """Means over (0, window], (window, 2 window], ..."""
    windows = [[] for _ in range(steps // window)]
    for step, value in by_step:
        if 0 < step <= len(windows) * window:
            windows[math.ceil(step / window) - 1].append(value)
    return [round(float(np.mean(values)), 3) if values else math.nan for values in windows]


def main(args: Args):
    theirs = (args.path / "onpolicy/config/pettingzoo.yaml").is_file()
    if not theirs and not (args.path / "config.json").is_file():
        usage_error(args.path, "is neither a run directory nor a checkout of the authors' code")
    if not 1000 <= args.window <= args.total_timesteps:
        usage_error(f"--window {args.window}", f"must be within 1000 and --total-timesteps, {args.total_timesteps}")
    with writing(args.out):  # before there is something to write
        check_writable(args.out)
    if theirs:
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=args.path, capture_output=True, text=True).stdout.strip()
        record = {"trainer": "authors", "commit": commit, "seed": args.seed}
        try:
            returns = train_theirs(args.path.resolve(), args.seed, args.total_timesteps)
        except ImportError as error:
            usage_error(args.path, f"this environment lacks what it needs: {error}")
        by_step, greedy = returns.by_step, returns.greedy
    else:
        config = read_config(args.path / "config.json")
        if not str(config.get("script")).endswith("_mpe"):
            usage_error(args.path, "its config.json is not of a script for MPE")
        names = ["script", "git_commit", "seed", "critic_steps", "update_epochs", "gae_lambda", "cumulative_blocks"]
        names += ["agent_id", "deep", "preopc_targets"]
        record = {"trainer": "ours"} | {name: config.get(name) for name in names}
        by_step, greedy = read_ours(args.path), read_evaluations(args.path)
        if not by_step or by_step[-1][0] < args.total_timesteps:
            usage_error(args.path, f"has not come to step {args.total_timesteps}")
    returns = in_windows(by_step, args.window, args.total_timesteps)
    if not all(map(math.isfinite, returns)):
        usage_error(f"--window {args.window}", "must be so large that episodes end in each")
    greedy = [evaluation for evaluation in greedy if evaluation[0] <= args.total_timesteps]
    record |= {"window": args.window, "returns": returns, "greedy": greedy}
    with writing(args.out), args.out.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    try:
        main(parse_args(Args, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
