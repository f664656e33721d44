"""Return of uniformly random actions on MPE Navigation, the level to compare learning curves with.

    python benchmark/random_mpe.py benchmark/results/figure10/random.json

1,000 episodes for each of the paper's settings. Returns as a2po_mpe.py has them: per agent, undiscounted, 25 steps.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import a2po_mpe  # noqa: E402
from benchmark.cli import check_writable, parse_args, write  # noqa: E402


@dataclass
class Args:
    out: tyro.conf.Positional[Path]
    """JSON file to write"""
    episodes: int = 1000
    """of each setting"""


def usage_error(what, why: str):
    """One line; exit status 2."""
    print(f"random_mpe.py: error: {what}: {why}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def writing(out: Path):
    """What cannot be written in here is an error in the file to write."""
    try:
        yield
    except OSError as error:
        usage_error(out, f"cannot be written: {error.strerror}")


def random_returns(n_agents: int, local_ratio: float, episodes: int) -> list[float]:
    try:
        envs = a2po_mpe.JaxMARL(n_agents, local_ratio, episodes, seed=0)
    except ImportError as error:
        usage_error("JaxMARL", f"{error}; pip install -r requirements.txt")
    rng, total = np.random.default_rng(0), np.zeros(episodes)
    envs.reset(seed=0)
    for _ in range(a2po_mpe.EPISODE_STEPS):
        _, reward, _, truncated, _ = envs.step(rng.integers(5, size=(episodes, n_agents)))
        total += reward.mean(-1)
    assert truncated.all()
    return total.tolist()


def main(args: Args):
    if args.episodes < 2:
        usage_error(f"--episodes {args.episodes}", "must be at least 2")
    with writing(args.out):  # before there is something to write
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(args.out)
    levels = {}
    for n_agents in (3, 5):
        for local_ratio in (0.0, 0.5):
            returns = random_returns(n_agents, local_ratio, args.episodes)
            error = np.std(returns) / len(returns) ** 0.5
            levels[f"spread-{n_agents}-{local_ratio:g}"] = {
                "episodes": len(returns),
                "mean": round(float(np.mean(returns)), 3),
                "standard_error": round(float(error), 3),
            }
    with writing(args.out):
        write(args.out, json.dumps(levels, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(parse_args(Args, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
