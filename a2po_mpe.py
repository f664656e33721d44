# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "numpy==2.4.6",
#   "gymnasium==1.4.0",
#   "mpe2==1.1.1",
#   "jax==0.10.2",
#   "jaxlib==0.10.2",
#   "jaxmarl==0.2.0",
#   "tyro==1.0.17",
#   "tensorboard==2.20.0",
#   "tqdm==4.70.1",
# ]
# ///
"""A2PO (agent-by-agent policy optimization, Wang et al., ICLR 2023) on MPE Navigation, parameters shared by all agents.

The method is the paper's Algorithm 2: one rollout, then blocks of agents one after the other (semi-greedy order), each
with its own PreOPC advantage (Eq. 2), the twice-clipped objective (Eq. 6) and the adaptive clip. Actor and critic are
recurrent. The game is mpe2's simple_spread_v3, and its double in JaxMARL where speed counts.

    python a2po_mpe.py --n-agents 3
    python a2po_mpe.py --eval-only --checkpoint runs/<run>/checkpoint.pt
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    n_agents: int = 3
    """number of agents, and of landmarks that they shall cover (the paper has 3 and 5)"""
    local_ratio: float = 0.0
    """weight of an agent's own collisions in its reward, against the team's distances: 0 is the paper's fully
    cooperative setting, above it is the general-sum one (0.5 in the authors' code)"""
    simulator: Literal["mpe2", "jaxmarl"] = "mpe2"
    """the game: mpe2 (PettingZoo's) in worker processes, or JaxMARL's double of it, which is faster"""
    seed: int = 1
    """seed of the networks, the sampling and the simulator"""
    total_timesteps: int = 10_000_000
    """environment steps of the run (the authors' setting); a step of all agents counts once"""
    num_envs: int = 32
    """environments stepped at once (the authors' setting; MAPPO has 128 on MPE)"""
    num_steps: int = 25
    """steps of each environment per iteration: an episode (MAPPO default, and the authors' setting)"""
    num_workers: int | None = None
    """processes that share mpe2's environments; by default one per core"""

    learning_rate: float = 2e-4
    """of actor and critic (Table 10)"""
    gamma: float = 0.99
    """discount factor (MAPPO default)"""
    gae_lambda: float = 0.97
    """lambda of the advantage's trace (Table 10)"""
    clip_coef: float = 0.2
    """base clipping parameter epsilon (Table 10)"""
    update_epochs: int = 8
    """P, passes over the rollout (Table 10); each block gets ceil(P / blocks) of them (Algorithm 2)"""
    agent_blocks: int | None = None
    """number of blocks that the agents are updated in; by default each agent is one (Algorithm 2)"""
    agent_order: Literal["semi-greedy", "greedy", "random", "cyclic", "reverse-greedy", "reverse-semi-greedy"] = (
        "semi-greedy"
    )
    """order of the agents' updates (Sec. 4; the others are the paper's ablations)"""
    preopc: bool = True
    """correct advantages for the policies that have changed, Eq. (2); without it they are plain GAE"""
    clip_adaptation: float = 0.5
    """c of the adaptive clip (appendix B.4); 1 switches it off"""
    chunk_length: int = 5
    """steps of back-propagation through time (Table 10)"""
    ent_coef: float = 0.05
    """weight of the entropy bonus (Table 10)"""
    huber_delta: float = 10.0
    """where the value loss turns from square to linear, in units of the normalised return (MAPPO default)"""
    max_grad_norm: float = 10.0
    """gradients are scaled down to this norm, actor and critic apart (MAPPO default)"""
    hidden_size: int = 64
    """width of all hidden layers and of the GRU (MAPPO default)"""

    eval_every: int = 50_000
    """environment steps between evaluations"""
    eval_episodes: int = 32
    """greedy episodes per evaluation (MAPPO default)"""
    save_every: int = 100_000
    """environment steps between checkpoints"""
    resume: str = ""
    """run directory to continue; its settings hold, but for the options given beside it"""
    eval_only: bool = False
    """play eval_episodes with --checkpoint, print the result and leave"""
    checkpoint: str = ""
    """checkpoint file for --eval-only"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    wandb_project: str = "a2po"
    """Weights & Biases project"""
    cuda: bool = True
    """use a GPU for the networks if there is one"""
    compile: bool = False
    """compile the networks' update with torch.compile; needs a C++ compiler, starts a minute later"""
    torch_threads: int | None = None
    """CPU threads of PyTorch; by default all cores"""


# ---------------------------------------------------------------------------------------------------- environments
EPISODE_STEPS = 25  # PettingZoo's default; episodes end in no other way


def set_spaces(envs: gym.vector.VectorEnv, n_agents: int):
    """Both simulators' spaces: velocity, position, n landmarks, n - 1 others and their messages, two numbers each."""
    obs_dim = 4 + 2 * n_agents + 4 * (n_agents - 1)
    envs.single_observation_space = gym.spaces.Dict(
        obs=gym.spaces.Box(-np.inf, np.inf, (n_agents, obs_dim), np.float32),
        state=gym.spaces.Box(-np.inf, np.inf, (n_agents * obs_dim,), np.float32),
    )
    envs.single_action_space = gym.spaces.MultiDiscrete([5] * n_agents)
    envs.observation_space = gym.vector.utils.batch_space(envs.single_observation_space, envs.num_envs)
    envs.action_space = gym.vector.utils.batch_space(envs.single_action_space, envs.num_envs)


class JaxMARL(gym.vector.VectorEnv):
    """JaxMARL's simple_spread: all environments in one jitted, vmapped function, next-step autoreset.

    The same observations, actions and rewards as MPE2 below, in single precision and with other random starts.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, n_agents: int, local_ratio: float, num_envs: int, seed: int):
        import jax
        import jax.numpy as jnp
        from jaxmarl.environments.mpe import SimpleSpreadMPE

        # Its landmarks are 3 unless told otherwise, and it ends an episode a step after max_steps.
        env = SimpleSpreadMPE(n_agents, n_agents, local_ratio, max_steps=EPISODE_STEPS - 1)

        def observe(state):
            obs = env.get_obs(state)
            obs = jnp.stack([obs[agent] for agent in env.agents])
            return {"obs": obs, "state": obs.flatten()}

        def reset_one(key):
            _, state = env.reset(key)
            return state, observe(state)

        def step_one(key, state, final, action):
            step_key, reset_key = jax.random.split(key)
            _, stepped, rewards, dones, _ = env.step_env(step_key, state, dict(zip(env.agents, action, strict=True)))
            fresh = env.reset(reset_key)[1]
            state = jax.tree.map(lambda new, old: jnp.where(final, new, old), fresh, stepped)
            reward = jnp.where(final, 0.0, jnp.stack([rewards[agent] for agent in env.agents]))
            return state, observe(state), reward, dones["__all__"] & ~final

        def batched(function):
            """Split the key, map over the environments, and give all results fixed types, so as to compile once."""

            @jax.jit
            def run(key, *batch):
                key, subkey = jax.random.split(key)
                results = jax.vmap(function)(jax.random.split(subkey, num_envs), *batch)
                return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), (key, *results))

            return run

        self._reset, self._step = batched(reset_one), batched(step_one)
        self._to_jax, self._tree = jnp.asarray, jax.tree
        self._key, self._new_key = jax.random.PRNGKey(seed), jax.random.PRNGKey
        self.num_envs = num_envs
        set_spaces(self, n_agents)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self._key = self._new_key(seed)
        self._key, self._state, obs = self._reset(self._key)
        self._final = np.zeros(self.num_envs, bool)
        return {name: np.array(value) for name, value in obs.items()}, {}

    def step(self, actions):
        self._key, self._state, obs, reward, truncated = self._step(
            self._key, self._state, self._final, np.asarray(actions, np.int32)
        )
        self._final = np.array(truncated)
        obs = {name: np.array(value) for name, value in obs.items()}
        return obs, np.array(reward), np.zeros(self.num_envs, bool), self._final.copy(), {}

    def get_state(self) -> list[torch.Tensor]:
        """The whole state of the simulator, for checkpoints and to leave training untouched by an evaluation."""
        return [torch.from_numpy(np.array(x)) for x in self._tree.leaves((self._key, self._state, self._final))]

    def set_state(self, tensors: list[torch.Tensor]):
        if not hasattr(self, "_state"):
            self.reset()
        structure = self._tree.structure((self._key, self._state, self._final))
        leaves = [self._to_jax(x.numpy()) for x in tensors]
        self._key, self._state, self._final = self._tree.unflatten(structure, leaves)
        self._final = np.asarray(self._final)


class Games:
    """Several mpe2 games, played one after the other in the process that builds them.

    PettingZoo's parallel wrapper and its checks would halve the speed; this is its agent-by-agent interface, in which
    the world moves when the last agent has acted.
    """

    def __init__(self, n_agents: int, local_ratio: float, num_games: int):
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        from mpe2.simple_spread_v3 import raw_env

        options = {"N": n_agents, "local_ratio": local_ratio, "max_cycles": EPISODE_STEPS}
        self.games = [raw_env(**options) for _ in range(num_games)]

    def play(self, seeds: list[int | None], actions):
        """A step of every game, or a new episode where there is a seed.

        actions (games, n) -> observations (games, n, obs_dim), rewards (games, n), truncated (games,).
        """
        observations, rewards, truncated = [], [], []
        for game, seed, action in zip(self.games, seeds, actions, strict=True):
            if seed is not None:
                game.reset(seed=seed)
            else:
                for choice in action.tolist():
                    game.step(choice)
            agents = game.possible_agents
            observations.append([game.observe(agent) for agent in agents])
            rewards.append([game.rewards[agent] for agent in agents])
            truncated.append(game.truncations[agents[0]])
        return np.array(observations, np.float32), np.array(rewards, np.float32), np.array(truncated)

    def get_state(self):
        """Positions and velocities of the agents, then of the landmarks (games, 2 n, 4); steps played (games,)."""
        bodies = [[[*body.state.p_pos, *body.state.p_vel] for body in game.world.entities] for game in self.games]
        return np.array(bodies), np.array([game.steps for game in self.games])

    def set_state(self, bodies, steps):
        for game, numbers, played in zip(self.games, bodies, steps, strict=True):
            game.reset()
            game.steps = int(played)
            for body, row in zip(game.world.entities, numbers, strict=True):
                body.state.p_pos, body.state.p_vel = row[:2].copy(), row[2:].copy()


def serve(connection, main_end, *arguments):
    """A worker process: builds Games and answers (method, arguments) until the main process closes the connection."""
    os.setsid()  # Ctrl-C and the like reach a whole session, but to end the workers is the main process's task
    main_end.close()  # else the connection would stay open when the main process has died
    games = Games(*arguments)
    try:
        while True:
            method, inputs = connection.recv()
            connection.send(getattr(games, method)(*inputs))
    except (EOFError, OSError):
        pass


class GameDied(SystemExit):
    """A game's process is gone, or its game failed too often. Not caught, it ends the program with its one line."""


class MPE2(gym.vector.VectorEnv):
    """mpe2's simple_spread_v3 in a few worker processes that play several games each, next-step autoreset.

    Observations are dictionaries: `obs` (N, n, obs_dim), own velocity and position, then all landmarks, the other
    agents and their silent messages, seen from there; `state` (N, n * obs_dim), all observations in a row. Actions:
    stay, left, right, down, up. Rewards are (N, n): the sum over the landmarks of minus the distance of the closest
    agent, times 1 - local_ratio, minus local_ratio for every agent that one collides with. Always truncated at step 25.

    The world moves without chance, so that a game's state is its bodies and the seed of its next episode, which is a
    function of the environment and the episode alone: the number of workers changes nothing.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, n_agents: int, local_ratio: float, num_envs: int, seed: int, num_workers: int):
        self.num_envs, self.closed, self.processes, self.connections = num_envs, False, [], []
        set_spaces(self, n_agents)
        self.shares = np.array_split(np.arange(num_envs), min(num_workers, num_envs))
        for share in self.shares:
            main_end, worker_end = multiprocessing.Pipe()
            arguments = (worker_end, main_end, n_agents, local_ratio, len(share))
            self.processes.append(multiprocessing.Process(target=serve, args=arguments, daemon=True))
            self.processes[-1].start()
            worker_end.close()
            self.connections.append(main_end)
        self.seed, self.episode, self.final = seed, np.zeros(num_envs, np.int64), np.ones(num_envs, bool)

    def _ask(self, method: str, *inputs) -> list[np.ndarray]:
        """Call a method of all workers' games; inputs and results have one entry per environment."""
        try:
            for connection, share in zip(self.connections, self.shares, strict=True):
                connection.send((method, [x[share[0] : share[-1] + 1] for x in inputs]))
            answers = [connection.recv() for connection in self.connections]
        except (EOFError, OSError) as error:
            self.close()
            raise GameDied(f"a process that plays mpe2 is gone: {error!r}") from error
        return [np.concatenate(parts) for parts in zip(*answers, strict=True)] if answers[0] is not None else []

    def _play(self, actions):
        seeds = [None] * self.num_envs
        for e in np.flatnonzero(self.final):
            source = np.random.SeedSequence((self.seed, e, self.episode[e]))
            seeds[e] = int(source.generate_state(1, np.uint64)[0])
        self.episode += self.final
        obs, reward, self.final = self._ask("play", seeds, actions)
        return {"obs": obs, "state": obs.reshape(self.num_envs, -1)}, reward

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seed, self.episode = seed, np.zeros(self.num_envs, np.int64)
        self.final = np.ones(self.num_envs, bool)
        return self._play(np.zeros(self.action_space.shape, int))[0], {}

    def step(self, actions):
        obs, reward = self._play(np.asarray(actions))
        return obs, reward, np.zeros(self.num_envs, bool), self.final.copy(), {}

    def get_state(self) -> list[torch.Tensor] | None:
        """The whole state of the simulator, for checkpoints and to leave training untouched by an evaluation.

        None when a worker is gone, and then the run goes on with new episodes.
        """
        if self.closed:
            return None
        parts = np.full(self.num_envs, self.seed), self.episode, self.final, *self._ask("get_state")
        return [torch.from_numpy(part.copy()) for part in parts]

    def set_state(self, tensors: list[torch.Tensor]):
        seeds, self.episode, self.final, bodies, steps = (x.numpy().copy() for x in tensors)
        self.seed = int(seeds[0])
        self._ask("set_state", bodies, steps)

    def close_extras(self, **options):
        for process, connection in zip(self.processes, self.connections, strict=True):
            connection.close()
            process.terminate()
            process.join(5)


def make_envs(args: Args) -> gym.vector.VectorEnv:
    task = args.n_agents, args.local_ratio, args.num_envs, args.seed
    return JaxMARL(*task) if args.simulator == "jaxmarl" else MPE2(*task, args.num_workers)


# -------------------------------------------------------------------------------------------------------- networks
def layer_init(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weights and zero bias (MAPPO default)."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class RecurrentNetwork(nn.Module):
    """LayerNorm, two ReLU layers, GRU, linear head, with LayerNorm after each (MAPPO default). Actor and critic."""

    def __init__(self, inputs: int, outputs: int, hidden_size: int, gain: float):
        super().__init__()
        self.base = nn.Sequential(
            nn.LayerNorm(inputs),
            layer_init(nn.Linear(inputs, hidden_size)),
            nn.ReLU(),
            nn.LayerNorm(hidden_size),
            layer_init(nn.Linear(hidden_size, hidden_size)),
            nn.ReLU(),
            nn.LayerNorm(hidden_size),
        )
        self.gru = nn.GRUCell(hidden_size, hidden_size)
        for name, parameter in self.gru.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)
        self.head = nn.Sequential(nn.LayerNorm(hidden_size), layer_init(nn.Linear(hidden_size, outputs), gain))

    def forward(self, inputs, hidden, start):
        """inputs (L, B, inputs), hidden (B, H) before the first step, start (L, B), 1 where an episode begins.

        Returns outputs (L, B, outputs) and the GRU's state after each step (L, B, H).
        """
        states = []
        for features, keep in zip(self.base(inputs).unbind(), (1.0 - start.unsqueeze(-1)).unbind(), strict=True):
            hidden = self.gru(features, hidden * keep)
            states.append(hidden)
        states = torch.stack(states)
        return self.head(states), states


class ValueNormalizer(nn.Module):
    """Running mean and variance of the returns, debiased (MAPPO default, beta 0.99999); the critic's unit is 1 std."""

    def __init__(self, beta: float = 0.99999):
        super().__init__()
        self.beta = beta
        for name in ("mean", "mean_square", "weight"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def update(self, returns):
        if returns.numel() == 0:
            return
        returns = returns.double()
        self.mean.lerp_(returns.mean(), 1 - self.beta)
        self.mean_square.lerp_(returns.square().mean(), 1 - self.beta)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.beta)

    def statistics(self):
        weight = self.weight.clamp(min=1e-5)
        mean = self.mean / weight
        variance = (self.mean_square / weight - mean.square()).clamp(min=1e-2)
        return mean.float(), variance.sqrt().float()

    def normalize(self, returns):
        mean, std = self.statistics()
        return (returns - mean) / std

    def denormalize(self, values):
        mean, std = self.statistics()
        return values * std + mean


# ------------------------------------------------------------------------------------------------------- algorithm
def preopc_advantages(rewards, values, terminated, done, joint_ratio, gamma, gae_lambda):
    """Preceding-agent off-policy correction, Eq. (2), as a backward recursion; O(T).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lambda min(1, rho_{t+1}) A_{t+1}

    rewards (T, N, n) or (T, N, 1); values (T+1, N, n) in units of return; terminated, done (T, N): a terminal state is
    worth nothing, a time limit (done, not terminated) only ends the trace; joint_ratio (T, N), rho = pi_hat / pi of the
    joint action. Returns (T, N, n). With rho = 1 this is GAE.
    """
    terminated, done = terminated.float().unsqueeze(-1), done.float().unsqueeze(-1)
    deltas = rewards + gamma * (1 - terminated) * values[1:] - values[:-1]
    weights = gamma * gae_lambda * joint_ratio.clamp(max=1.0).unsqueeze(-1)
    advantages = torch.empty_like(deltas)
    advantages[-1] = deltas[-1]
    for t in reversed(range(len(deltas) - 1)):
        advantages[t] = deltas[t] + (1 - done[t]) * weights[t + 1] * advantages[t + 1]
    return advantages


def agent_order(scores, rule, generator):
    """Order in which the agents are updated (Sec. 4): scores (n,) = E|A_i| -> list of agent indices.

    semi-greedy: counting from 0, even positions take the remaining agent with the largest score and odd ones a random
    remaining agent. (The paper's rule makes even k greedy but its Algorithm 1 counts k from 1: with greed first the
    agent that has most to gain is not left to chance.) `reverse` takes the smallest scores.
    """
    remaining = torch.argsort(scores, descending=not rule.startswith("reverse"), stable=True).tolist()
    if rule == "cyclic":
        return sorted(remaining)
    order = []
    for position in range(len(remaining)):
        at_random = rule == "random" or ("semi" in rule and position % 2 == 1)
        pick = int(torch.randint(len(remaining), (), generator=generator)) if at_random else 0
        order.append(remaining.pop(pick))
    return order


def adaptive_clip(clip_coef, position, n_agents, c_eps):
    """Clipping parameter of the k-th agent of n (Sec. 4): eps_k = eps c + eps (1 - c) k / n, k = 1..n."""
    return clip_coef * c_eps + clip_coef * (1 - c_eps) * position / n_agents


def clipped_surrogate(ratio, preceding_ratio, advantages, clip_coef):
    """The objective of Eq. (6) per sample, to be maximised: min(l A, clip(l, 1 +- eps) A).

    l = ratio * g, where g is the product of the preceding agents' ratios, clipped to 1 +- eps / 2, without gradient.
    """
    preceding = preceding_ratio.detach().clamp(1 - clip_coef / 2, 1 + clip_coef / 2)
    joint = ratio * preceding
    return torch.min(joint * advantages, joint.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def value_loss(values, old_values, targets, clip_coef, huber_delta):
    """Clipped Huber loss per sample, all in normalised units (MAPPO default): the worse of free and clipped value."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    free_loss = F.huber_loss(values, targets, reduction="none", delta=huber_delta)
    return torch.max(free_loss, F.huber_loss(clipped, targets, reduction="none", delta=huber_delta))


def masked_mean(x, mask):
    """Mean over the samples alone; mask is 1 for a sample, 0 for a dead agent's step or a filler step."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def normalize_advantages(advantages, mask):
    """Zero mean and unit variance over the samples of the update at hand."""
    mean = masked_mean(advantages, mask)
    std = masked_mean((advantages - mean).square(), mask).sqrt()
    return (advantages - mean) / (std + 1e-5)


def to_sequences(x, length, rows):
    """(T, N, n, ...) -> (length, S, ...): one sequence per chunk, environment and agent; `rows` of them."""
    return x.unflatten(0, (-1, length)).transpose(0, 1).flatten(1, 3).index_select(1, rows)


def from_sequences(x, rows, shape):
    """The inverse of to_sequences for shape (T, N, n), with zeros where `rows` left a sequence out."""
    T, N, n = shape
    whole = x.new_zeros(len(x), T // len(x) * N * n).index_copy(1, rows, x)
    return whole.unflatten(1, (-1, N, n)).transpose(0, 1).flatten(0, 1)


def sequence_policy(actor, sequences, columns):
    """log pi(a) and entropy (L, s) of some sequences, by the actor as it is now, from their stored first GRU states."""
    obs, start, actions = (sequences[k].index_select(1, columns) for k in ("obs", "start", "actions"))
    logits, _ = actor(obs, sequences["actor_hidden"][columns], start)
    policy = Categorical(logits=logits, validate_args=False)
    return policy.log_prob(actions), policy.entropy()


# ------------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def evaluate(actor, envs, episodes: int, device) -> list[float]:
    """Greedy episodes from new starts: the return of each, an agent's sum of rewards over 25 steps, undiscounted,
    averaged over the agents.

    Every environment plays a fixed share.
    """
    n, share = envs.single_action_space.shape[0], np.full(envs.num_envs, episodes // envs.num_envs)
    share[: episodes % envs.num_envs] += 1
    returns, running = [], np.zeros(envs.num_envs)
    obs, _ = envs.reset()
    hidden = torch.zeros(envs.num_envs * n, actor.gru.hidden_size, device=device)
    start, final = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs, bool)
    while (share > 0).any():
        inputs = torch.as_tensor(obs["obs"], device=device).flatten(0, 1)
        starts = torch.as_tensor(start, dtype=torch.float32, device=device).repeat_interleave(n)
        logits, states = actor(inputs[None], hidden, starts[None])
        actions = logits.view(envs.num_envs, n, -1).argmax(-1)
        hidden, start = states[0], final
        obs, reward, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        final, running = terminated | truncated, running + reward.mean(-1)
        for e in np.flatnonzero(final):
            if share[e] > 0:
                returns.append(round(float(running[e]), 4))
                share[e] -= 1
            running[e] = 0.0
    return returns


# ------------------------------------------------------------------------------------------------------------ runs
def usage_error(option: str, value, allowed: str):
    """One line that names the option, the value and what is allowed; exit status 2."""
    print(f"{Path(__file__).name}: error: {option} {value}: {allowed}", file=sys.stderr)
    raise SystemExit(2)


def read_checkpoint(path: Path, option: str) -> dict:
    """A checkpoint of one of these scripts; anything else is an error in `option`."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not {"args", "script", "actor"} <= set(checkpoint):
            raise ValueError("other contents")
    except FileNotFoundError:
        usage_error(option, path, "no such file")
    except Exception:
        usage_error(option, path, "is not a checkpoint of this script")
    return checkpoint


def write_checkpoint(path: Path, checkpoint: dict):
    """To a temporary file that is then renamed: a crash while writing leaves the last good one."""
    torch.save(checkpoint, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def new_run_dir(name: str) -> Path:
    """runs/{name}__{time}, made here: where another run has started in the same second this one waits for the next."""
    while True:
        run_dir = Path("runs") / f"{name}__{int(time.time())}"
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            time.sleep(0.1)


def parse_args(argv=None) -> Args:
    """The command line; with --resume or --eval-only the run's own settings take the place of the defaults."""
    args = tyro.cli(Args, args=argv)
    saved_in, option = (Path(args.resume) / "checkpoint.pt", "--resume") if args.resume else ("", "")
    if args.eval_only:
        if not args.checkpoint or args.resume:
            usage_error("--eval-only", args.eval_only, "needs --checkpoint FILE, and no --resume")
        saved_in, option = Path(args.checkpoint), "--checkpoint"
    elif args.checkpoint:
        usage_error("--checkpoint", args.checkpoint, "is for --eval-only; to go on with a run use --resume RUN_DIR")
    if not option:
        return args
    if args.resume and not saved_in.is_file():
        usage_error(option, args.resume, "must be a run directory with a checkpoint.pt in it")
    checkpoint = read_checkpoint(saved_in, option)
    try:
        defaults = Args(**checkpoint["args"])
    except TypeError:
        usage_error(option, saved_in, f"was written by another script than {Path(__file__).name}")
    return tyro.cli(Args, default=defaults, args=argv)


def complete_args(args: Args) -> Args:
    """Fill in what depends on the task and the machine, and check what can be checked without them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    defaults = {"agent_blocks": max(1, args.n_agents), "num_workers": cores, "torch_threads": cores}
    missing = [field.name for field in dataclasses.fields(args) if getattr(args, field.name) is None]
    args = dataclasses.replace(args, **{name: defaults[name] for name in missing})
    check_args(args)
    if args.n_agents < 2:
        usage_error("--n-agents", args.n_agents, "must be at least 2")
    if args.local_ratio > 1:
        usage_error("--local-ratio", args.local_ratio, "must be within 0 and 1")
    if args.agent_blocks > args.n_agents:
        usage_error("--agent-blocks", args.agent_blocks, f"must be at most {args.n_agents}, the number of agents")
    if args.num_steps % args.chunk_length:
        usage_error("--num-steps", args.num_steps, f"must be a multiple of --chunk-length {args.chunk_length}")
    return args


def check_args(args: Args):
    """What holds for all options of a kind."""
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name == "seed":
            if not 0 <= value <= 2147483:
                usage_error(option, value, "must be within 0 and 2147483")
        elif type(value) is int and value < 1:
            usage_error(option, value, "must be at least 1")
        elif name in ("gamma", "gae_lambda", "clip_adaptation") and not 0 <= value <= 1:
            usage_error(option, value, "must be within 0 and 1")
        elif type(value) is float and not 0 <= value < math.inf:
            usage_error(option, value, "must be a number of at least 0")
    if args.track and importlib.util.find_spec("wandb") is None:
        usage_error("--track", args.track, "needs Weights & Biases: pip install wandb")


def main(args: Args):
    args = complete_args(args)
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    envs = make_envs(args)
    spaces = envs.single_observation_space
    T, N, (n, obs_dim), state_dim = args.num_steps, args.num_envs, spaces["obs"].shape, spaces["state"].shape[0]
    n_actions, H, L = int(envs.single_action_space.nvec[0]), args.hidden_size, args.chunk_length

    actor = RecurrentNetwork(obs_dim, n_actions, H, gain=0.01).to(device)
    critic = RecurrentNetwork(state_dim + obs_dim, 1, H, gain=1.0).to(device)
    normalizer = ValueNormalizer().to(device)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, eps=1e-5)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.learning_rate, eps=1e-5)
    learned = {
        "actor": actor,
        "critic": critic,
        "normalizer": normalizer,
        "actor_optimizer": actor_optimizer,
        "critic_optimizer": critic_optimizer,
    }

    checkpoint = None
    if args.resume or args.eval_only:
        source, option = (args.resume, "--resume") if args.resume else (args.checkpoint, "--checkpoint")
        checkpoint = read_checkpoint(Path(source) / "checkpoint.pt" if args.resume else Path(source), option)
        same = {"n_agents": n}
        if args.resume:  # the saved simulator state is of this game, and has this many environments
            same |= {"script": Path(__file__).stem, "num_envs": N}
            same |= {"local_ratio": args.local_ratio, "simulator": args.simulator}
        for name, value in same.items():
            saved = (checkpoint["args"] | {"script": checkpoint["script"]})[name]
            if saved != value:
                usage_error(option, source, f"is of {name} {saved}, not of {value}")
        try:
            for name, part in learned.items():
                part.load_state_dict(checkpoint[name])
        except (KeyError, ValueError, RuntimeError):
            usage_error(option, source, f"does not fit networks with --hidden-size {H}")
        for optimizer in (actor_optimizer, critic_optimizer):
            optimizer.param_groups[0]["lr"] = args.learning_rate
    if args.eval_only:
        returns = evaluate(actor, envs, args.eval_episodes, device)
        print(f"{len(returns)} greedy episodes: mean return {np.mean(returns):.3f} (per agent, {EPISODE_STEPS} steps)")
        envs.close()
        return

    task = f"spread-{n}-{args.local_ratio:g}-{args.simulator}"
    run_name = f"{task}__{Path(__file__).stem}__{args.seed}"
    run_dir = Path(args.resume) if args.resume else new_run_dir(run_name)
    packages = ("torch", "numpy", "gymnasium", args.simulator)
    config = dataclasses.asdict(args) | {"resume": "", "script": Path(__file__).stem}
    config |= {"device": str(device), "versions": {name: importlib.metadata.version(name) for name in packages}}
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{run_dir}: " + ", ".join(f"{k} {v}" for k, v in config.items() if k in Args.__annotations__))
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project, name=run_dir.name, config=config, sync_tensorboard=True)

    # The rollout, time-major: (T, N, n, ...), and one more step where the last value needs it.
    obs = torch.zeros(T + 1, N, n, obs_dim, device=device)
    state = torch.zeros(T + 1, N, state_dim, device=device)
    start = torch.zeros(T + 1, N, device=device)  # 1: the first observation of an episode
    final = torch.zeros(T + 1, N, device=device)  # 1: the last one, its action is ignored and it is no sample
    actions = torch.zeros(T, N, n, dtype=torch.long, device=device)
    log_probs = torch.zeros(T, N, n, device=device)
    rewards = torch.zeros(T, N, n, device=device)
    terminated = torch.zeros(T, N, device=device)
    actor_hidden = torch.zeros(T // L, N, n, H, device=device)  # before the first step of each chunk

    # Where the run stands; all of it goes into checkpoints.
    progress = {"global_step": 0, "iteration": 0, "seconds": 0.0}
    hidden = {name: torch.zeros(N, n, H, device=device) for name in ("actor", "critic")}
    next_start, next_final = torch.ones(N), torch.zeros(N)
    episode_return, episode_length = torch.zeros(N), torch.zeros(N)
    if checkpoint:
        progress = checkpoint["progress"]
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and "cuda_rng" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    if checkpoint and checkpoint["envs"] is not None:
        envs.set_state(checkpoint["envs"])
        next_obs = {name: value.numpy() for name, value in checkpoint["next_obs"].items()}
        hidden = {name: value.to(device) for name, value in checkpoint["hidden"].items()}
        next_start, next_final, episode_return, episode_length = checkpoint["episode"]
    else:
        next_obs, _ = envs.reset(seed=args.seed)
    eval_file = run_dir / "eval.jsonl"
    if args.resume and eval_file.exists():  # evaluations after the checkpoint will be done again
        lines = [r for r in eval_file.read_text().splitlines() if r.endswith("}")]  # not one that was cut off
        kept = [r for r in lines if json.loads(r)["step"] <= progress["global_step"]]
        eval_file.write_text("".join(f"{r}\n" for r in kept))
    writer = SummaryWriter(run_dir, purge_step=progress["global_step"] + 1 if checkpoint else None)
    if not checkpoint:
        writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def save():
        contents = {name: part.state_dict() for name, part in learned.items()}
        contents |= {"args": dataclasses.asdict(args) | {"resume": ""}}
        contents |= {"script": Path(__file__).stem, "progress": progress, "rng": torch.get_rng_state()}
        contents |= {"envs": envs.get_state(), "hidden": hidden}
        contents |= {"next_obs": {name: torch.from_numpy(np.array(value)) for name, value in next_obs.items()}}
        contents |= {"episode": [next_start, next_final, episode_return, episode_length]}
        if device.type == "cuda":
            contents["cuda_rng"] = torch.cuda.get_rng_state()
        write_checkpoint(run_dir / "checkpoint.pt", contents)

    def leave(error):
        save()
        sys.exit(f"{error}; go on with --resume {run_dir}")

    stop_signals = []  # Ctrl-C and SIGTERM are seen to between two iterations; a second one ends the run at once

    def ask_to_stop(number, _):
        stop_signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    old_handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    policy_update = torch.compile(actor, dynamic=True) if args.compile else actor
    value_update = torch.compile(critic, dynamic=True) if args.compile else critic
    bar = tqdm(total=args.total_timesteps, initial=progress["global_step"], unit="step", unit_scale=True)
    recent_returns, recent_lengths, mean_return, greedy_return = [], [], math.nan, math.nan
    begin = time.perf_counter() - progress["seconds"]
    while progress["global_step"] < args.total_timesteps and not stop_signals:
        # ---------------------------------------------------------------------------------------- collect a rollout
        rollout_begin = time.perf_counter()
        first_critic_hidden = hidden["critic"]
        with torch.no_grad():
            for t in range(T + 1):
                for buffer, name in ((obs, "obs"), (state, "state")):
                    buffer[t] = torch.as_tensor(next_obs[name])
                start[t], final[t] = next_start, next_final
                if t == T:
                    break
                if t % L == 0:
                    actor_hidden[t // L] = hidden["actor"]
                starts = start[t].repeat_interleave(n)
                logits, states = actor(obs[t].flatten(0, 1)[None], hidden["actor"].flatten(0, 1), starts[None])
                policy = Categorical(logits=logits.view(N, n, n_actions), validate_args=False)
                actions[t] = policy.sample()
                log_probs[t] = policy.log_prob(actions[t])
                hidden["actor"] = states.view(N, n, H)

                try:
                    next_obs, reward, term, trunc, _ = envs.step(actions[t].cpu().numpy())
                except GameDied as error:
                    leave(error)
                rewards[t], terminated[t] = torch.as_tensor(reward), torch.as_tensor(term)
                next_start, next_final = next_final, torch.as_tensor(term | trunc).float()
                episode_return = (episode_return + torch.as_tensor(reward).mean(-1)) * (1 - next_start)
                episode_length = (episode_length + 1) * (1 - next_start)
                for e in np.flatnonzero(term | trunc):
                    recent_returns.append(float(episode_return[e]))
                    recent_lengths.append(float(episode_length[e]))

            # Critic values for the whole rollout at once, in units of return, as the normaliser is now.
            critic_inputs = torch.cat([state.unsqueeze(2).expand(-1, -1, n, -1), obs], -1)
            starts = start.repeat_interleave(n, dim=1)
            values, states = critic(critic_inputs.flatten(1, 2), first_critic_hidden.flatten(0, 1), starts)
            old_values = values.view(T + 1, N, n)
            values = normalizer.denormalize(old_values)
            states = states.view(T + 1, N, n, H)
            critic_hidden = torch.cat([first_critic_hidden[None], states[L - 1 : T - 1 : L]])
            hidden["critic"] = states[-2]
        done, sample = final[1:], (1 - final[:-1]).unsqueeze(-1).repeat(1, 1, n)  # (T, N), (T, N, n)
        steps = int((1 - final[:-1]).sum())
        rollout_seconds = time.perf_counter() - rollout_begin

        # --------------------------------------------------------------------------------------------------- update
        update_begin = time.perf_counter()
        trace = (rewards, values, terminated, done)
        advantages = preopc_advantages(*trace, torch.ones_like(done), args.gamma, args.gae_lambda)  # under pi: GAE
        returns = advantages + values[:-1]
        normalizer.update(returns[sample.bool()])
        old_values = normalizer.normalize(values[:-1])
        explained = 1 - (advantages[sample.bool()].var() / returns[sample.bool()].var())

        # Sequences for truncated back-propagation, without those that hold no sample; `rows % n` are their agents.
        rows = sample.unflatten(0, (-1, L)).any(1).flatten().nonzero().squeeze(-1)
        sequences = {"obs": obs[:-1], "critic_inputs": critic_inputs[:-1], "actions": actions}
        sequences |= {"log_probs": log_probs, "old_values": old_values, "sample": sample}
        sequences["start"] = start[:-1].unsqueeze(-1).expand(-1, -1, n)
        sequences = {name: to_sequences(x, L, rows) for name, x in sequences.items()}
        sequences["actor_hidden"] = actor_hidden.flatten(0, 2)[rows]
        sequences["critic_hidden"] = critic_hidden.flatten(0, 2)[rows]

        # The order of the agents by E|A_i| under pi, and its blocks; ceil(P / blocks) times through them (Algorithm 2).
        scores = (advantages.abs() * sample).sum((0, 1)) / sample.sum((0, 1)).clamp(min=1)
        order = agent_order(scores.cpu(), args.agent_order, torch.default_generator)
        blocks = torch.tensor(order, device=device).tensor_split(args.agent_blocks)
        metrics = []
        for position, block in list(enumerate(blocks, 1)) * math.ceil(args.update_epochs / len(blocks)):
            in_block = torch.isin(rows % n, block)
            columns, others = in_block.nonzero().squeeze(-1), (~in_block).nonzero().squeeze(-1)
            weight = sequences["sample"][:, columns]
            new_log_probs, entropy = sequence_policy(policy_update, sequences, columns)
            log_ratio = ((new_log_probs - sequences["log_probs"][:, columns]) * weight).clamp(-20, 20)
            ratio = log_ratio.exp()

            # The parameters are shared: every update moves all policies, so everyone's ratio is needed anew.
            with torch.no_grad():
                others_log_probs, _ = sequence_policy(policy_update, sequences, others)
                others_log_ratio = others_log_probs - sequences["log_probs"][:, others]
                log_ratios = torch.cat([log_ratio, others_log_ratio * sequences["sample"][:, others]], 1)
                joint_log_ratio = from_sequences(log_ratios, rows[torch.cat([columns, others])], sample.shape).sum(-1)

            # Eq. (2): the block's advantages, corrected for all policies that have changed.
            joint_ratio = joint_log_ratio.clamp(-20, 20).exp() if args.preopc else torch.ones_like(done)
            advantages = preopc_advantages(*trace, joint_ratio, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1]  # targets of the value

            # Eq. (6) with the clip of this position; the preceding agents are everyone but i.
            clip_coef = adaptive_clip(args.clip_coef, position, len(blocks), args.clip_adaptation)
            joint_log_ratio = to_sequences(joint_log_ratio.unsqueeze(-1).expand(-1, -1, n), L, rows[columns])
            preceding_ratio = (joint_log_ratio - log_ratio.detach()).clamp(-20, 20).exp()
            advantage = normalize_advantages(to_sequences(advantages, L, rows[columns]), weight)
            surrogate = clipped_surrogate(ratio, preceding_ratio, advantage, clip_coef)
            policy_loss, entropy = -masked_mean(surrogate, weight), masked_mean(entropy, weight)
            targets = to_sequences(normalizer.normalize(returns), L, rows[columns])
            new_values, _ = value_update(
                sequences["critic_inputs"].index_select(1, columns),
                sequences["critic_hidden"][columns],
                sequences["start"][:, columns],
            )
            old = sequences["old_values"][:, columns]
            losses = value_loss(new_values.squeeze(-1), old, targets, args.clip_coef, args.huber_delta)
            critic_loss = masked_mean(losses, weight)

            actor_optimizer.zero_grad()
            critic_optimizer.zero_grad()
            (policy_loss - args.ent_coef * entropy + critic_loss).backward()
            actor_norm = nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
            critic_norm = nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
            actor_optimizer.step()
            critic_optimizer.step()

            with torch.no_grad():
                preceding = preceding_ratio.clamp(1 - clip_coef / 2, 1 + clip_coef / 2)
                clipped = masked_mean(((ratio * preceding - 1).abs() > clip_coef).float(), weight)
                update = {"losses/policy_loss": policy_loss, "losses/value_loss": critic_loss}
                update |= {"losses/entropy": entropy, "losses/clipfrac": clipped}
                update |= {"losses/actor_grad_norm": actor_norm, "losses/critic_grad_norm": critic_norm}
                update["losses/approx_kl"] = masked_mean(ratio - 1 - log_ratio, weight)
                place = f"a2po/position_{position}"
                update |= {f"{place}/clipfrac": clipped, f"{place}/ratio": masked_mean(ratio, weight)}
                update[f"{place}/preceding_clipfrac"] = masked_mean((preceding != preceding_ratio).float(), weight)
                metrics.append(update)
        names = list(dict.fromkeys(name for update in metrics for name in update))
        means = {name: torch.stack([m[name].detach() for m in metrics if name in m]).mean() for name in names}
        means = dict(zip(names, torch.stack(list(means.values())).tolist(), strict=True))
        update_seconds = time.perf_counter() - update_begin
        if not all(math.isfinite(value) for value in means.values()):
            number = progress["iteration"] + 1
            sys.exit(f"iteration {number}: a loss or gradient is not finite; the last checkpoint is as it was")

        # ------------------------------------------------------------------------------------- log, evaluate, save
        progress["iteration"] += 1
        progress["global_step"] += steps
        progress["seconds"] = time.perf_counter() - begin
        if recent_returns:
            mean_return = float(np.mean(recent_returns))
            writer.add_scalar("charts/episodic_return", mean_return, progress["global_step"])
            writer.add_scalar("charts/episodic_length", np.mean(recent_lengths), progress["global_step"])
            recent_returns, recent_lengths = [], []
        means |= {"losses/explained_variance": float(explained), "charts/learning_rate": args.learning_rate}
        means |= {"time/rollout_seconds": rollout_seconds, "time/update_seconds": update_seconds}
        means |= {"charts/SPS": steps / (rollout_seconds + update_seconds)}
        means |= {f"a2po/position_of_agent/{agent}": place for place, agent in enumerate(order, 1)}
        for name, value in means.items():
            writer.add_scalar(name, value, progress["global_step"])
        before, now = progress["global_step"] - steps, progress["global_step"]
        if before // args.eval_every < now // args.eval_every or now >= args.total_timesteps:
            simulator_state = envs.get_state()
            try:
                returns = evaluate(actor, envs, args.eval_episodes, device)
                envs.set_state(simulator_state)
            except GameDied as error:
                leave(error)
            greedy_return = float(np.mean(returns))
            record = {"step": progress["global_step"], "seconds": round(progress["seconds"], 2)}
            record |= {"episodic_return": greedy_return, "returns": returns}
            with eval_file.open("a") as file:
                file.write(json.dumps(record) + "\n")
            writer.add_scalar("eval/episodic_return", greedy_return, progress["global_step"])
        if before // args.save_every < now // args.save_every:
            save()
        bar.update(steps)
        bar.set_postfix_str(f"SPS {means['charts/SPS']:.0f}, return {mean_return:.1f}, greedy {greedy_return:.1f}")

    save()
    bar.close()
    writer.close()
    envs.close()
    for number, handler in old_handlers.items():
        signal.signal(number, handler)
    if stop_signals:
        print(f"stopped by signal {stop_signals[0]}; go on with --resume {run_dir}", file=sys.stderr)
        sys.exit(128 + stop_signals[0])


if __name__ == "__main__":
    main(parse_args())
