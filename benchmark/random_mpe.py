"""Return of uniformly random actions on MPE Navigation, the level to compare learning curves with.

    python benchmark/random_mpe.py benchmark/results/figure10/random.json

1,000 episodes for each of the paper's settings. Returns as a2po_mpe.py has them: per agent, undiscounted, 25 steps.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import a2po_mpe  # noqa: E402


def random_returns(n_agents: int, local_ratio: float, episodes: int = 1000) -> list[float]:
    envs = a2po_mpe.JaxMARL(n_agents, local_ratio, episodes, seed=0)
    rng, total = np.random.default_rng(0), np.zeros(episodes)
    envs.reset(seed=0)
    for _ in range(a2po_mpe.EPISODE_STEPS):
        _, reward, _, truncated, _ = envs.step(rng.integers(5, size=(episodes, n_agents)))
        total += reward.mean(-1)
    assert truncated.all()
    return total.tolist()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python benchmark/random_mpe.py FILE.json", file=sys.stderr)
        sys.exit(2)
    levels = {}
    for n_agents in (3, 5):
        for local_ratio in (0.0, 0.5):
            returns = random_returns(n_agents, local_ratio)
            error = np.std(returns) / len(returns) ** 0.5
            levels[f"spread-{n_agents}-{local_ratio:g}"] = {
                "episodes": len(returns),
                "mean": round(float(np.mean(returns)), 3),
                "standard_error": round(float(error), 3),
            }
    Path(sys.argv[1]).write_text(json.dumps(levels, indent=1) + "\n")
