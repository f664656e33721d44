# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "numpy==2.4.6",
#   "gymnasium==1.4.0",
#   "jax==0.10.2",
#   "jaxlib==0.10.2",
#   "jaxmarl==0.2.0",
#   "tyro==1.0.17",
#   "tensorboard==2.20.0",
#   "tqdm==4.70.1",
# ]
# ///
"""MAPPO (multi-agent PPO, Yu et al., 2022) on SMAC, with parameters shared by all agents.

The baseline that updates all agents simultaneously: one rollout, GAE, and PPO's clipped objective for each agent for
itself. Actor and critic are recurrent. The game is StarCraft II where it is installed and SMAX, its JAX double,
everywhere else.

    python mappo_smac.py --map 3s5z
    python mappo_smac.py --eval-only --checkpoint runs/<run>/checkpoint.pt
"""

import dataclasses
import glob
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import warnings
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
    map: str = "3s5z"
    """SMAC map, such as 3s5z or 5m_vs_6m; with StarCraft II also SMACv2's, such as protoss_5_vs_5"""
    simulator: Literal["auto", "starcraft2", "smax"] = "auto"
    """the game; auto takes StarCraft II where it is installed, else SMAX"""
    seed: int = 1
    """seed of the networks, the sampling and the simulator"""
    total_timesteps: int = 10_000_000
    """environment steps of the run (the authors' setting for most maps); a step of all agents counts once"""
    num_envs: int | None = None
    """environments stepped at once; by default 64 for SMAX and 8 games for StarCraft II"""
    num_steps: int | None = None
    """steps of each environment per iteration; by default what makes 3,200 in all (MAPPO default)"""

    learning_rate: float = 5e-4
    """of actor and critic (MAPPO default)"""
    gamma: float = 0.99
    """discount factor (MAPPO default)"""
    gae_lambda: float | None = None
    """lambda of the advantage's trace (Table 7 by map)"""
    clip_coef: float | None = None
    """base clipping parameter epsilon (Table 7 by map)"""
    update_epochs: int | None = None
    """P, passes over the rollout (Table 7 by map)"""
    chunk_length: int = 10
    """steps of back-propagation through time (MAPPO default)"""
    ent_coef: float = 0.01
    """weight of the entropy bonus (MAPPO default)"""
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


def table_7(agent_blocks, update_epochs, gae_lambda, clip_coef):
    return locals()


# Table 7. The blocks are for the algorithms that update agents one after the other. Other maps: as 3s5z.
TABLE_7 = {
    "MMM": table_7(3, 12, 0.95, 0.2),
    "3s_vs_5z": table_7(3, 15, 0.95, 0.05),
    "2c_vs_64zg": table_7(2, 5, 0.95, 0.2),
    "3s5z": table_7(3, 8, 0.95, 0.2),
    "5m_vs_6m": table_7(2, 10, 0.93, 0.05),
    "8m_vs_9m": table_7(5, 15, 0.95, 0.05),
    "10m_vs_11m": table_7(2, 10, 0.97, 0.2),
    "6h_vs_8z": table_7(2, 8, 0.99, 0.2),
    "3s5z_vs_3s6z": table_7(2, 5, 0.90, 0.2),
    "MMM2": table_7(2, 5, 0.95, 0.2),
    "27m_vs_30m": table_7(3, 5, 0.95, 0.2),
    "corridor": table_7(2, 5, 0.95, 0.2),
}


# ---------------------------------------------------------------------------------------------------- environments
SMAX_MAPS = (
    "3m 8m 25m 2s3z 3s5z 5m_vs_6m 8m_vs_9m 10m_vs_11m 27m_vs_30m 3s5z_vs_3s6z 3s_vs_5z 6h_vs_8z corridor "
    "smacv2_5_units smacv2_10_units smacv2_20_units"
).split()
SMAC_MAPS = (
    "3m 8m 25m 5m_vs_6m 8m_vs_9m 10m_vs_11m 27m_vs_30m MMM MMM2 2s3z 3s5z 3s5z_vs_3s6z 3s_vs_3z 3s_vs_4z 3s_vs_5z "
    "1c3s5z 2m_vs_1z corridor 6h_vs_8z 2s_vs_1sc so_many_baneling bane_vs_bane 2c_vs_64zg"
).split()
# SMACv2 draws each unit of a team with these weights; types in the last list cannot make up a whole team.
SMACV2_TEAMS = {
    "protoss": (["stalker", "zealot", "colossus"], [0.45, 0.45, 0.1], []),
    "terran": (["marine", "marauder", "medivac"], [0.45, 0.45, 0.1], ["medivac"]),
    "zerg": (["zergling", "baneling", "hydralisk"], [0.45, 0.1, 0.45], ["baneling"]),
}
SMACV2_MAP = r"(protoss|terran|zerg)_([1-9]\d*)_vs_([1-9]\d*)"
STARCRAFT2_HELP = (
    "to play StarCraft II: pip install 'protobuf<3.21' "
    "git+https://github.com/oxwhirl/smacv2.git@577ab5a2cff2391f8df582da5731ea9cd6adf3c6 (`smac` on PyPI is another "
    "project); unpack Blizzard's Linux package 4.10 (github.com/Blizzard/s2client-proto) and set SC2PATH to its "
    "StarCraftII folder; copy smacv2/env/starcraft2/maps/SMAC_Maps of that repository to $SC2PATH/Maps/SMAC_Maps"
)


def find_starcraft2() -> tuple[bool, str]:
    """Whether StarCraft II can be played here, and what was found or is missing; nothing is imported or started."""
    if importlib.util.find_spec("smacv2") is None:
        return False, "the Python package smacv2 is not installed"
    home = os.path.expanduser(os.environ.get("SC2PATH", "~/StarCraftII"))
    if not glob.glob(os.path.join(glob.escape(home), "Versions", "Base*", "SC2*")):
        return False, f"no game (Versions/Base*/SC2_x64) in {home}, where SC2PATH or the default points"
    if not glob.glob(os.path.join(glob.escape(home), "Maps", "SMAC_Maps", "*.SC2Map")):
        return False, f"no maps (*.SC2Map) in {os.path.join(home, 'Maps', 'SMAC_Maps')}"
    return True, f"smacv2 and the game in {home}"


def choose_simulator(simulator: str, map_name: str) -> tuple[str, str]:
    """`starcraft2` or `smax` for --simulator, and the reason in one line; ends the program if there is no way."""
    on_smax, on_starcraft2 = map_name in SMAX_MAPS, map_name in SMAC_MAPS or re.fullmatch(SMACV2_MAP, map_name)
    if not on_smax and not on_starcraft2:
        races = ", ".join(f"{race}_5_vs_5" for race in SMACV2_TEAMS)
        names = " ".join(dict.fromkeys(SMAC_MAPS + SMAX_MAPS))
        usage_error("--map", map_name, f"must be one of {names}, or with StarCraft II a SMACv2 map such as {races}")
    found, reason = find_starcraft2()
    if simulator == "starcraft2" and not on_starcraft2:
        usage_error("--map", map_name, f"StarCraft II has no such map, it has {' '.join(SMAC_MAPS)}")
    if simulator == "starcraft2" and not found:
        usage_error("--simulator", simulator, f"{reason}; {STARCRAFT2_HELP}")
    if simulator == "starcraft2" or (simulator == "auto" and found and on_starcraft2):
        return "starcraft2", reason
    if not on_smax:
        why = f"; {reason}" if simulator == "auto" else ""
        usage_error("--map", map_name, f"needs StarCraft II, SMAX lacks its units{why}; {STARCRAFT2_HELP}")
    if simulator == "smax":
        return "smax", "as asked for"
    return "smax", "StarCraft II does not have this map" if found else f"not StarCraft II: {reason}"


class SMAX(gym.vector.VectorEnv):
    """JaxMARL's SMAX with the heuristic enemy: all environments in one jitted, vmapped function, next-step autoreset.

    Observations are dictionaries: `obs` (N, n, obs_dim), `state` (N, state_dim), `action_mask` (N, n, n_actions),
    `alive` (N, n). Rewards are the team's, (N,); `info["won"]` (N,) tells of the episode that the step ended.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, map_name: str, num_envs: int, seed: int):
        import jax
        import jax.numpy as jnp
        from jaxmarl.environments.smax import HeuristicEnemySMAX, Scenario, map_name_to_scenario

        if map_name == "8m_vs_9m":
            scenario = Scenario(jnp.zeros(17, jnp.uint8), 8, 9, False, False)
        elif map_name == "corridor":  # 6 zealots against 24 zerglings
            scenario = Scenario(jnp.array([3] * 6 + [4] * 24, jnp.uint8), 6, 24, False, False)
        else:
            scenario = map_name_to_scenario(map_name)
        env = HeuristicEnemySMAX(scenario=scenario)
        n, n_actions = env.num_allies, env.num_ally_actions
        # The state has positions in map units beside features within [0, 1]: bring them to the same range.
        unit_scale = np.ones(len(env.own_features), np.float32)
        unit_scale[1:3] = env.map_width, env.map_height
        state_scale = np.ones(env.state_size, np.float32)
        state_scale[: env._env.num_agents * len(unit_scale)] = np.tile(unit_scale, env._env.num_agents)

        def observe(state):
            obs, masks = env.get_obs(state), env.get_avail_actions(state)
            return {
                "obs": jnp.stack([obs[agent] for agent in env.agents]),
                "state": env.get_world_state(state) / state_scale,
                "action_mask": jnp.stack([masks[agent] for agent in env.agents]).astype(jnp.int8),
                "alive": state.state.unit_alive[:n].astype(jnp.int8),
            }

        def reset_one(key):
            _, state = env.reset(key)
            return state, observe(state)

        def step_one(key, state, final, action):
            step_key, reset_key = jax.random.split(key)
            _, stepped, rewards, dones, _ = env.step_env(step_key, state, dict(zip(env.agents, action, strict=True)))
            fresh = env.reset(reset_key)[1]
            state = jax.tree.map(lambda new, old: jnp.where(final, new, old), fresh, stepped)
            allies_left, enemies_left = state.state.unit_alive[:n].any(), state.state.unit_alive[n:].any()
            done, wiped_out = dones["__all__"] & ~final, ~allies_left | ~enemies_left
            won = done & allies_left & ~enemies_left
            reward = jnp.where(final, 0.0, rewards[env.agents[0]])
            return state, observe(state), reward, done & wiped_out, done & ~wiped_out, won

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
        self.single_observation_space = gym.spaces.Dict(
            obs=gym.spaces.Box(-np.inf, np.inf, (n, env.obs_size), np.float32),
            state=gym.spaces.Box(-np.inf, np.inf, (env.state_size,), np.float32),
            action_mask=gym.spaces.MultiBinary((n, n_actions)),
            alive=gym.spaces.MultiBinary(n),
        )
        self.single_action_space = gym.spaces.MultiDiscrete([n_actions] * n)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self._key = self._new_key(seed)
        self._key, self._state, obs = self._reset(self._key)
        self._final = np.zeros(self.num_envs, bool)
        return {name: np.array(value) for name, value in obs.items()}, {"won": np.zeros(self.num_envs, bool)}

    def step(self, actions):
        self._key, self._state, obs, reward, terminated, truncated, won = self._step(
            self._key, self._state, self._final, np.asarray(actions, np.int32)
        )
        reward, terminated, truncated, won = (np.array(x) for x in (reward, terminated, truncated, won))
        self._final = terminated | truncated
        return {name: np.array(value) for name, value in obs.items()}, reward, terminated, truncated, {"won": won}

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


class StarCraft2(gym.Env):
    """A SMAC or SMACv2 map as one environment for the whole team, with one reward.

    Building it starts no game, so that AsyncVectorEnv can read the spaces in the main process; `reset` starts it.
    `info` always has `won`, and `crashed` for an episode that was cut off because the game broke.
    """

    def __init__(self, map_name: str, seed: int = 0):
        self.generated = re.fullmatch(SMACV2_MAP, map_name)
        self.map_name, self.seed = map_name, seed
        self.game, self.builds, self.episodes, self.failures = None, 0, 0, 0
        if multiprocessing.parent_process() is not None:
            # Ctrl-C reaches the whole process group, but ending the workers is the main process's task, and the game
            # inherits the ignored signal. On SIGTERM leave through Python, where the worker closes its game.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        sizes = self._build().get_env_info()
        n_agents, n_actions = sizes["n_agents"], sizes["n_actions"]
        self.observation_space = gym.spaces.Dict(
            obs=gym.spaces.Box(-np.inf, np.inf, (n_agents, sizes["obs_shape"]), np.float32),
            state=gym.spaces.Box(-np.inf, np.inf, (sizes["state_shape"],), np.float32),
            action_mask=gym.spaces.MultiBinary((n_agents, n_actions)),
            alive=gym.spaces.MultiBinary(n_agents),
        )
        self.action_space = gym.spaces.MultiDiscrete([n_actions] * n_agents)

    def _build(self):
        from smacv2.env import StarCraft2Env, StarCraftCapabilityEnvWrapper
        from smacv2.env.starcraft2 import distributions, starcraft2

        # smacv2 hands its seed to the game alone. Its draws of teams and positions are unseeded, so give it generators
        # of ours; a rebuilt game gets new ones, for it should not play the same episodes again.
        seeds = np.random.SeedSequence((self.seed, self.builds))
        seed = int(seeds.generate_state(1)[0])
        distributions.default_rng = lambda: np.random.default_rng(seeds.spawn(1)[0])
        starcraft2.random = random.Random(seed)
        distributions.shuffle = starcraft2.random.shuffle
        # All that continuing_episode does is to report the step limit in info, which else looks like a defeat.
        options = {"seed": seed, "continuing_episode": True}
        if self.generated:
            race, n_units, n_enemies = self.generated[1], int(self.generated[2]), int(self.generated[3])
            units, weights, exceptions = SMACV2_TEAMS[race]
            team = {"dist_type": "weighted_teams", "unit_types": units, "weights": weights, "observe": True}
            team["exception_unit_types"] = exceptions
            start = {"dist_type": "surrounded_and_reflect", "p": 0.5, "map_x": 32, "map_y": 32}
            config = {"n_units": n_units, "n_enemies": n_enemies, "team_gen": team, "start_positions": start}
            options.update(obs_own_pos=True, use_unit_ranges=True, min_attack_range=2, conic_fov=False)
            game = StarCraftCapabilityEnvWrapper(capability_config=config, map_name=f"10gen_{race}", **options)
            core = game.env
        else:
            game = core = StarCraft2Env(map_name=self.map_name, **options)
            # SMAC's maps have allies of their own unit types, counted from the lowest. smacv2 goes on to overwrite that
            # with the rule for enemies: an index out of range on 3s5z, one type for all on MMM. Obs and state use it.
            type_id = core.get_unit_type_id
            core.get_unit_type_id = lambda u, ally: u.unit_type - core._min_unit_type if ally else type_id(u, ally)

        def raise_again():
            # smacv2 meets a broken connection with a new game, but keeps the units of the old one and can wait for
            # ever for them to die. It calls this inside its except clause: the error goes on to our reset or step.
            raise

        core.full_restart = raise_again
        self.builds, self.episodes = self.builds + 1, 0
        return game

    def _observe(self):
        mask = np.array(self.game.get_avail_actions(), dtype=np.int8)
        if not self.generated:
            # smacv2 keeps a table of reported enemies, and one not in it (unseen so far, or dead and out of sight)
            # wipes the features of all enemies before it. In SMAC only the sight range counts: report them all.
            self.game.obs_enemies[:] = 1
        obs, state = np.array(self.game.get_obs(), np.float32), np.array(self.game.get_state(), np.float32)
        return {"obs": obs, "state": state, "action_mask": mask, "alive": 1 - mask[:, 0]}  # no-op: for the dead only

    def _fail(self, error: Exception):
        self.failures += 1
        warnings.warn(f"StarCraft II failed on {self.map_name}: {error!r}", stacklevel=2)
        self.close()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.seed, self.builds = seed, 0
        if seed is not None or self.episodes == 0:
            self.close()  # a seed takes a new game, and before its first episode has ended smacv2 starts a second one
        while self.failures < 3:
            try:
                if self.game is None:
                    self.game = self._build()
                self.game.reset()
                self.last_obs = self._observe()
                return self.last_obs, {"won": False, "crashed": False}
            except Exception as error:
                self._fail(error)
        raise RuntimeError(f"StarCraft II failed {self.failures} times without a whole episode on {self.map_name}")

    def step(self, action):
        # smacv2 stops with an error at an unavailable action: the first available one takes its place, which is no-op
        # for the dead and stop for the living.
        mask, action = self.last_obs["action_mask"], np.asarray(action)
        action = np.where(mask[np.arange(len(action)), action] == 1, action, mask.argmax(axis=1))
        try:
            reward, done, info = self.game.step(action)
            won, out_of_time = bool(info["battle_won"]), bool(info.get("episode_limit", False))
            self.last_obs = self._observe()
        except Exception as error:
            self._fail(error)
            return self.last_obs, 0.0, False, True, {"won": False, "crashed": True}
        if done:
            self.episodes, self.failures = self.episodes + 1, 0
        return self.last_obs, float(reward), done and not out_of_time, out_of_time, {"won": won, "crashed": False}

    def close(self):
        game, self.game = self.game, None
        if game is not None:
            try:
                game.close()
            except Exception as error:  # a broken game may also fail to close
                warnings.warn(f"StarCraft II did not close: {error!r}", stacklevel=2)


class GameDied(SystemExit):
    """A game's process is gone, or its game failed too often. Not caught, it ends the program with its one line."""


class StarCraft2Games(gym.vector.AsyncVectorEnv):
    """One StarCraft II process per environment, next-step autoreset, the same observations as SMAX."""

    def __init__(self, map_name: str, num_envs: int, seed: int):
        # Environment e of seed s gets 1000 s + e: runs with neighbouring seeds do not share games.
        super().__init__([lambda e=e: StarCraft2(map_name, 1000 * seed + e) for e in range(num_envs)])

    def get_state(self):
        """None: a game cannot be saved; after an evaluation or on resume, training goes on with new episodes."""
        return None

    def step(self, actions):
        return self._play(super().step, actions)

    def reset(self, **options):
        return self._play(super().reset, **options)

    def _play(self, method, *arguments, **options):
        try:
            return method(*arguments, **options)
        except (EOFError, OSError, RuntimeError) as error:
            # End all workers at once: after the death of one of them AsyncVectorEnv.close() waits for ever.
            for process in self.processes:
                process.terminate()
                process.join(5)
            self.closed = True
            raise GameDied(f"a StarCraft II process is gone: {error!r}") from error


def make_envs(simulator: str, map_name: str, num_envs: int, seed: int) -> gym.vector.VectorEnv:
    return (SMAX if simulator == "smax" else StarCraft2Games)(map_name, num_envs, seed)


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


def masked_policy(logits, action_mask) -> Categorical:
    """Unavailable actions get probability zero; -1e10 instead of -inf keeps the entropy finite."""
    return Categorical(logits=torch.where(action_mask, logits, -1e10), validate_args=False)


# ------------------------------------------------------------------------------------------------------- algorithm
def gae_advantages(rewards, values, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al., 2016), as a backward recursion; O(T).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lambda A_{t+1}

    rewards (T, N, n) or (T, N, 1); values (T+1, N, n) in units of return; terminated, done (T, N): a terminal state is
    worth nothing, a time limit (done, not terminated) only ends the trace. Returns (T, N, n).
    """
    terminated, done = terminated.float().unsqueeze(-1), done.float().unsqueeze(-1)
    deltas = rewards + gamma * (1 - terminated) * values[1:] - values[:-1]
    advantages = torch.empty_like(deltas)
    advantages[-1] = deltas[-1]
    for t in reversed(range(len(deltas) - 1)):
        advantages[t] = deltas[t] + (1 - done[t]) * gamma * gae_lambda * advantages[t + 1]
    return advantages


def clipped_surrogate(ratio, advantages, clip_coef):
    """PPO's objective per sample, to be maximised: min(r A, clip(r, 1 +- eps) A), each agent for itself."""
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


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


def values_for_the_dead(values, alive):
    """Values (..., n) with a dead agent's replaced by the mean of its living team-mates'.

    The reward is the team's, so they estimate the same return; the critic is not trained on dead agents' steps.
    """
    team = (values * alive).sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(alive.bool(), values, team)


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
    obs, start, masks, actions = (sequences[k].index_select(1, columns) for k in ("obs", "start", "masks", "actions"))
    logits, _ = actor(obs, sequences["actor_hidden"][columns], start)
    policy = masked_policy(logits, masks)
    return policy.log_prob(actions), policy.entropy()


# ------------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def evaluate(actor, envs, episodes: int, device) -> tuple[list[int], list[float]]:
    """Greedy episodes from new starts: who won (1 or 0) and the return, for each of them.

    Every environment plays a fixed share, so that short episodes are not favoured; crashed ones are played again.
    """
    n, share = envs.single_action_space.shape[0], np.full(envs.num_envs, episodes // envs.num_envs)
    share[: episodes % envs.num_envs] += 1
    won, returns, running = [], [], np.zeros(envs.num_envs)
    obs, _ = envs.reset()
    hidden = torch.zeros(envs.num_envs * n, actor.gru.hidden_size, device=device)
    start, final = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs, bool)
    while (share > 0).any():
        inputs = torch.as_tensor(obs["obs"], device=device).flatten(0, 1)
        starts = torch.as_tensor(start, dtype=torch.float32, device=device).repeat_interleave(n)
        logits, states = actor(inputs[None], hidden, starts[None])
        mask = torch.as_tensor(obs["action_mask"], device=device).bool()
        actions = masked_policy(logits.view(mask.shape), mask).logits.argmax(-1)
        hidden, start = states[0], final
        obs, reward, terminated, truncated, info = envs.step(actions.cpu().numpy())
        final, running = terminated | truncated, running + reward
        for e in np.flatnonzero(final):
            if share[e] > 0 and not info.get("crashed", final & False)[e]:
                won.append(int(info["won"][e]))
                returns.append(round(float(running[e]), 4))
                share[e] -= 1
            running[e] = 0.0
    return won, returns


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
    """Fill in what depends on the map, the simulator and the machine, and check what can be checked without them."""
    num_envs = args.num_envs if args.num_envs is not None else 64 if args.simulator == "smax" else 8
    defaults = TABLE_7.get(args.map, TABLE_7["3s5z"]) | {
        "num_envs": num_envs,
        "num_steps": max(1, 3200 // max(1, num_envs) // max(1, args.chunk_length)) * max(1, args.chunk_length),
        "torch_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    missing = [field.name for field in dataclasses.fields(args) if getattr(args, field.name) is None]
    args = dataclasses.replace(args, **{name: defaults[name] for name in missing})
    check_args(args)
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
    simulator, reason = choose_simulator(args.simulator, args.map)
    args = complete_args(dataclasses.replace(args, simulator=simulator))
    print(f"simulator: {simulator} ({reason})")
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    envs = make_envs(simulator, args.map, args.num_envs, args.seed)
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
        same = {"map": args.map, "simulator": simulator}
        if args.resume:  # the saved simulator state has this many environments
            same |= {"script": Path(__file__).stem, "num_envs": N}
        for name, value in same.items():
            saved = (checkpoint["args"] | {"script": checkpoint["script"]})[name]
            if saved != value:
                usage_error(option, source, f"is of {name} {saved}, not of {value}")
        try:
            for name, part in learned.items():
                part.load_state_dict(checkpoint[name])
        except (KeyError, ValueError, RuntimeError):
            usage_error(option, source, f"does not fit networks with --hidden-size {H} on {args.map}")
        for optimizer in (actor_optimizer, critic_optimizer):
            optimizer.param_groups[0]["lr"] = args.learning_rate
    if args.eval_only:
        won, returns = evaluate(actor, envs, args.eval_episodes, device)
        print(f"{len(won)} greedy episodes: win rate {np.mean(won):.3f}, mean return {np.mean(returns):.3f}")
        envs.close()
        return

    run_name = f"{args.map}-{simulator}__{Path(__file__).stem}__{args.seed}"
    run_dir = Path(args.resume) if args.resume else new_run_dir(run_name)
    packages = ("torch", "numpy", "gymnasium", "jaxmarl" if simulator == "smax" else "smacv2")
    config = dataclasses.asdict(args) | {"resume": "", "reason": reason, "script": Path(__file__).stem}
    config |= {"device": str(device), "versions": {name: importlib.metadata.version(name) for name in packages}}
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{run_dir}: " + ", ".join(f"{k} {v}" for k, v in config.items() if k in Args.__annotations__))
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project, name=run_dir.name, config=config, sync_tensorboard=True)

    # The rollout, time-major: (T, N, n, ...), and one more step where the last value needs it.
    obs = torch.zeros(T + 1, N, n, obs_dim, device=device)
    state = torch.zeros(T + 1, N, state_dim, device=device)
    alive = torch.zeros(T + 1, N, n, device=device)
    start = torch.zeros(T + 1, N, device=device)  # 1: the first observation of an episode
    final = torch.zeros(T + 1, N, device=device)  # 1: the last one, its action is ignored and it is no sample
    masks = torch.zeros(T, N, n, n_actions, dtype=torch.bool, device=device)
    actions = torch.zeros(T, N, n, dtype=torch.long, device=device)
    log_probs = torch.zeros(T, N, n, device=device)
    rewards = torch.zeros(T, N, 1, device=device)
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
        next_obs, _ = envs.reset(seed=None if simulator == "starcraft2" else args.seed)
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
    recent_wins, recent_returns, recent_lengths, win_rate, greedy_win_rate = [], [], [], math.nan, math.nan
    begin = time.perf_counter() - progress["seconds"]
    while progress["global_step"] < args.total_timesteps and not stop_signals:
        # ---------------------------------------------------------------------------------------- collect a rollout
        rollout_begin = time.perf_counter()
        first_critic_hidden = hidden["critic"]
        with torch.no_grad():
            for t in range(T + 1):
                for buffer, name in ((obs, "obs"), (state, "state"), (alive, "alive")):
                    buffer[t] = torch.as_tensor(next_obs[name])
                start[t], final[t] = next_start, next_final
                if t == T:
                    break
                masks[t] = torch.as_tensor(next_obs["action_mask"])
                if t % L == 0:
                    actor_hidden[t // L] = hidden["actor"]
                starts = start[t].repeat_interleave(n)
                logits, states = actor(obs[t].flatten(0, 1)[None], hidden["actor"].flatten(0, 1), starts[None])
                policy = masked_policy(logits.view(N, n, n_actions), masks[t])
                actions[t] = policy.sample()
                log_probs[t] = policy.log_prob(actions[t])
                hidden["actor"] = states.view(N, n, H)

                try:
                    next_obs, reward, term, trunc, info = envs.step(actions[t].cpu().numpy())
                except GameDied as error:
                    leave(error)
                crashed = torch.as_tensor(info.get("crashed", np.zeros(N, bool)))
                final[t] = torch.max(final[t], crashed.to(device))  # no sample; the one before it ends the trace
                rewards[t, :, 0], terminated[t] = torch.as_tensor(reward), torch.as_tensor(term)
                next_start, next_final = next_final, torch.as_tensor(term | trunc).float()
                episode_return = (episode_return + torch.as_tensor(reward)) * (1 - next_start)
                episode_length = (episode_length + 1) * (1 - next_start)
                for e in np.flatnonzero((term | trunc) & ~crashed.numpy()):
                    recent_wins.append(float(info["won"][e]))
                    recent_returns.append(float(episode_return[e]))
                    recent_lengths.append(float(episode_length[e]))

            # Critic values for the whole rollout at once, in units of return, as the normaliser is now.
            critic_inputs = torch.cat([state.unsqueeze(2).expand(-1, -1, n, -1), obs], -1)
            starts = start.repeat_interleave(n, dim=1)
            values, states = critic(critic_inputs.flatten(1, 2), first_critic_hidden.flatten(0, 1), starts)
            old_values = values.view(T + 1, N, n)
            values = values_for_the_dead(normalizer.denormalize(old_values), alive)
            states = states.view(T + 1, N, n, H)
            critic_hidden = torch.cat([first_critic_hidden[None], states[L - 1 : T - 1 : L]])
            hidden["critic"] = states[-2]
        done, sample = final[1:], alive[:-1] * (1 - final[:-1]).unsqueeze(-1)  # (T, N), (T, N, n)
        steps = int((1 - final[:-1]).sum())
        rollout_seconds = time.perf_counter() - rollout_begin

        # --------------------------------------------------------------------------------------------------- update
        update_begin = time.perf_counter()
        trace = (rewards, values, terminated, done)
        advantages = gae_advantages(*trace, args.gamma, args.gae_lambda)
        returns = advantages + values[:-1]
        normalizer.update(returns[sample.bool()])
        old_values = normalizer.normalize(values[:-1])
        explained = 1 - (advantages[sample.bool()].var() / returns[sample.bool()].var())

        # Sequences for truncated back-propagation, without those that hold no sample; `rows % n` are their agents.
        rows = sample.unflatten(0, (-1, L)).any(1).flatten().nonzero().squeeze(-1)
        sequences = {"obs": obs[:-1], "critic_inputs": critic_inputs[:-1], "masks": masks, "actions": actions}
        sequences |= {"log_probs": log_probs, "old_values": old_values, "sample": sample}
        sequences["start"] = start[:-1].unsqueeze(-1).expand(-1, -1, n)
        sequences = {name: to_sequences(x, L, rows) for name, x in sequences.items()}
        sequences["actor_hidden"] = actor_hidden.flatten(0, 2)[rows]
        sequences["critic_hidden"] = critic_hidden.flatten(0, 2)[rows]

        columns = torch.arange(len(rows), device=device)  # all agents at once
        metrics = []
        for _ in range(args.update_epochs):
            weight = sequences["sample"][:, columns]
            new_log_probs, entropy = sequence_policy(policy_update, sequences, columns)
            log_ratio = ((new_log_probs - sequences["log_probs"][:, columns]) * weight).clamp(-20, 20)
            ratio = log_ratio.exp()

            advantage = normalize_advantages(to_sequences(advantages, L, rows[columns]), weight)
            surrogate = clipped_surrogate(ratio, advantage, args.clip_coef)
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
                clipped = masked_mean(((ratio - 1).abs() > args.clip_coef).float(), weight)
                update = {"losses/policy_loss": policy_loss, "losses/value_loss": critic_loss}
                update |= {"losses/entropy": entropy, "losses/clipfrac": clipped}
                update |= {"losses/actor_grad_norm": actor_norm, "losses/critic_grad_norm": critic_norm}
                update["losses/approx_kl"] = masked_mean(ratio - 1 - log_ratio, weight)
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
        if recent_wins:
            win_rate = float(np.mean(recent_wins))
            writer.add_scalar("charts/win_rate", win_rate, progress["global_step"])
            writer.add_scalar("charts/episodic_return", np.mean(recent_returns), progress["global_step"])
            writer.add_scalar("charts/episodic_length", np.mean(recent_lengths), progress["global_step"])
            recent_wins, recent_returns, recent_lengths = [], [], []
        means |= {"losses/explained_variance": float(explained), "charts/learning_rate": args.learning_rate}
        means |= {"time/rollout_seconds": rollout_seconds, "time/update_seconds": update_seconds}
        means |= {"charts/SPS": steps / (rollout_seconds + update_seconds)}
        for name, value in means.items():
            writer.add_scalar(name, value, progress["global_step"])
        before, now = progress["global_step"] - steps, progress["global_step"]
        if before // args.eval_every < now // args.eval_every or now >= args.total_timesteps:
            simulator_state = envs.get_state()
            try:
                won, returns = evaluate(actor, envs, args.eval_episodes, device)
                if simulator_state is not None:
                    envs.set_state(simulator_state)
                else:
                    next_obs, _ = envs.reset()
                    next_start, next_final = torch.ones(N), torch.zeros(N)
                    episode_return, episode_length = torch.zeros(N), torch.zeros(N)
            except GameDied as error:
                leave(error)
            greedy_win_rate = float(np.mean(won))
            record = {"step": progress["global_step"], "seconds": round(progress["seconds"], 2)}
            record |= {"win_rate": greedy_win_rate, "won": won, "returns": returns}
            with eval_file.open("a") as file:
                file.write(json.dumps(record) + "\n")
            writer.add_scalar("eval/win_rate", greedy_win_rate, progress["global_step"])
            writer.add_scalar("eval/episodic_return", np.mean(returns), progress["global_step"])
        if before // args.save_every < now // args.save_every:
            save()
        bar.update(steps)
        bar.set_postfix_str(f"SPS {means['charts/SPS']:.0f}, win rate {win_rate:.2f}, greedy {greedy_win_rate:.2f}")

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
