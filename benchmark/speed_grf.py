"""How much of the engine's speed Football's workers keep: a2po_grf.py's games beside bare engine processes.

    python benchmark/speed_grf.py --out benchmark/results/speed/football-workers.json

One process of gfootball's own FootballEnv on each core against the script's games with random actions and no policy,
in turns of a few seconds, and the median of the turns' ratios. "CPU" is steps per second of CPU time, of all processes
together, which other work on the machine disturbs less than the clock.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import a2po_grf
from benchmark.cli import check_writable, parse_args, write  # noqa: E402


@dataclass
class Args:
    scenario: str = "5_vs_5"
    """as of a2po_grf.py"""
    num_envs: tuple[int, ...] = (2, 4, 8, 16)
    """games of the script, one measurement each"""
    processes: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    """bare engines, and workers of each half of the script's games"""
    turns: int = 10
    """turns of each"""
    seconds: float = 1.5
    """of a turn"""
    out: Path | None = None
    """JSON file of all turns"""


def bare_engine(connection, scenario: str, seed: int):
    """A worker process: plays for as many seconds as it is told and answers (steps, seconds, CPU seconds)."""
    from gfootball.env import config, football_env

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the program, and it its processes
    agents, rng = a2po_grf.SCENARIOS[scenario].agents, np.random.default_rng(seed)
    options = {"level": scenario, "players": [f"agent:left_players={agents}"], "game_engine_random_seed": seed}
    env = football_env.FootballEnv(config.Config(options))
    env.reset()
    connection.send(None)
    while True:
        seconds, steps = connection.recv(), 0
        begin, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < seconds:
            if env.step(rng.integers(0, a2po_grf.N_ACTIONS, agents).tolist())[2]:
                env.reset()
            steps += 1
        connection.send((steps, time.perf_counter() - begin, time.process_time() - cpu))


class BareEngines:
    def __init__(self, scenario: str, processes: int):
        self.connections = []
        for seed in range(processes):
            ours, theirs = multiprocessing.Pipe()
            multiprocessing.Process(target=bare_engine, args=(theirs, scenario, seed), daemon=True).start()
            self.connections.append(ours)
        for connection in self.connections:
            connection.recv()

    def play(self, seconds: float) -> dict[str, float]:
        for connection in self.connections:
            connection.send(seconds)
        steps, clock, cpu = zip(*(connection.recv() for connection in self.connections), strict=True)
        return {"clock": sum(s / c for s, c in zip(steps, clock, strict=True)), "cpu": sum(steps) / sum(cpu)}


class Games:
    def __init__(self, scenario: str, num_envs: int, processes: int):
        self.envs = a2po_grf.make_envs(a2po_grf.Args(scenario=scenario, num_envs=num_envs, num_workers=processes))
        self.halves = [half.env for half in self.envs.halves]
        self.rng = np.random.default_rng(0)
        self.envs.reset()

    def cpu(self) -> float:
        """CPU seconds of the workers and of this process."""
        ticks = 0
        for process in [process for games in self.halves for process in games.processes]:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()

    def ask(self, games):
        games.step_async(self.rng.integers(0, a2po_grf.N_ACTIONS, games.action_space.shape))

    def play(self, seconds: float) -> dict[str, float]:
        """As in a rollout: the two halves of the games in turn."""
        begin, cpu, steps = time.perf_counter(), self.cpu(), 0
        for games in self.halves:
            self.ask(games)
        while time.perf_counter() - begin < seconds:
            for games in self.halves:
                games.step_wait()
                self.ask(games)
            steps += self.envs.num_envs
        for games in self.halves:
            games.step_wait()
        steps += self.envs.num_envs
        return {"clock": steps / (time.perf_counter() - begin), "cpu": steps / (self.cpu() - cpu)}


def usage_error(option: str, value, allowed: str):
    """One line; exit status 2."""
    print(f"speed_grf.py: error: {option} {value}: {allowed}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def writing(out: Path):
    """What cannot be written in here is an error in --out."""
    try:
        yield
    except OSError as error:
        usage_error("--out", out, f"cannot be written: {error.strerror}")


def check_args(args: Args):
    for name, value, lowest in (
        ("--num-envs", min(args.num_envs, default=0), 1),
        ("--processes", args.processes, 1),
        ("--turns", args.turns, 1),
        ("--seconds", args.seconds, 0.1),
    ):
        if not value >= lowest:
            usage_error(name, value, f"must be at least {lowest}")
    if args.out:
        with writing(args.out):  # before there is something to write
            check_writable(args.out)
    a2po_grf.check_scenario(args.scenario)


def main(args: Args):
    check_args(args)
    torch.set_num_threads(1)
    players = {"bare": BareEngines(args.scenario, args.processes)}
    players |= {str(count): Games(args.scenario, count, args.processes) for count in args.num_envs}
    for player in players.values():
        player.play(args.seconds)  # warm-up
    turns = {name: [] for name in players}
    for _ in range(args.turns):
        for name, player in players.items():
            turns[name].append(player.play(args.seconds))
    print(f"| {args.scenario}, {args.processes} processes | steps/s | of the bare engines | by CPU time |")
    print("|---|---|---|---|")
    for name, results in turns.items():
        ratios = {
            unit: statistics.median(one[unit] / bare[unit] for one, bare in zip(results, turns["bare"], strict=True))
            for unit in ("clock", "cpu")
        }
        label = "bare engines" if name == "bare" else f"the script, {name} games"
        rate = statistics.median(one["clock"] for one in results)
        print(f"| {label} | {rate:.0f} | {ratios['clock']:.2f} | {ratios['cpu']:.2f} |")
    if args.out:
        settings = {"scenario": args.scenario, "processes": args.processes, "seconds": args.seconds}
        with writing(args.out):
            write(args.out, json.dumps(settings | {"load": os.getloadavg()[0], "turns": turns}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(parse_args(Args, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
