"""An environment of one's own, as the README describes it: what takes Navigation's place in a copy of a2po_mpe.py.

A class of one game for the whole team, made in a worker process by `game(..., seed, build)`:

- It is seeded when it is made, with a seed of its own for each environment. `build` counts the games that took the
  place of one that failed, so that it does not play the same again. `reset()` without a seed goes on from there.
- `observe()` has obs (n, size), state (size,), and action_mask (n, actions) and alive (n,), ones where all is allowed
  and nobody dies. An action that the mask forbids is never asked for. Agents with less to see or to do are padded.
- `step(action)` gets one number per agent. The reward is the team's, or an array (n,) with each agent's own. Terminated
  is an end of the game itself, after which nothing is worth anything; truncated is a time limit. Every episode must
  end by one or the other: evaluations wait for it.
- `get_state()` and `set_state(state)` may be left out: evaluations and --resume begin new episodes then. Where they are
  there, they must hold everything that the rest of the episode depends on.
"""

import gymnasium as gym
import numpy as np


class Meeting:
    """Agents on a ring of nine places step left, stay or step right; the team is paid for each pair in one place."""

    def __init__(self, n_agents: int, seed: int, build: int = 0):
        self.n, self.random = n_agents, np.random.default_rng((seed, build))
        self.observation_space = gym.spaces.Dict(
            obs=gym.spaces.Box(0, 1, (n_agents, n_agents + 9), np.float32),
            state=gym.spaces.Box(0, 1, (n_agents * 9,), np.float32),
            action_mask=gym.spaces.MultiBinary((n_agents, 3)),
            alive=gym.spaces.MultiBinary(n_agents),
        )
        self.action_space = gym.spaces.MultiDiscrete([3] * n_agents)

    def reset(self, seed: int | None = None):
        self.random = self.random if seed is None else np.random.default_rng(seed)
        self.places, self.time = self.random.integers(9, size=self.n), 0

    def step(self, action) -> tuple[float, bool, bool, dict]:
        """The team's reward; terminated; truncated; numbers of an episode that ends, for `summarize` and RAW."""
        self.places, self.time = (self.places + action - 1) % 9, self.time + 1
        pairs = sum(self.places[i] == self.places[j] for i in range(self.n) for j in range(i))
        return float(pairs), False, self.time == 25, {}

    def observe(self) -> dict[str, np.ndarray]:
        places = np.eye(9, dtype=np.float32)[self.places]
        obs = np.concatenate([np.eye(self.n, dtype=np.float32), places], 1)  # who and where the agent is
        ones = {"action_mask": np.ones((self.n, 3), np.int8), "alive": np.ones(self.n, np.int8)}
        return {"obs": obs, "state": places.flatten()} | ones

    def close(self):
        pass
