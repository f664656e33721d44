# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "numpy==2.4.6",
#   "gymnasium==1.4.0",
#   "gymnasium-robotics==1.4.2",
#   "envpool==1.2.5",
#   "tyro==1.0.17",
#   "tensorboard==2.20.0",
#   "tqdm==4.70.1",
# ]
# ///
"""A2PO (agent-by-agent policy optimization, Wang et al., ICLR 2023) on multi-agent MuJoCo, with a network per agent.

The method is the paper's Algorithm 1: one rollout, then blocks of agents one after the other (semi-greedy order), each
with its own PreOPC advantage (Eq. 2), the twice-clipped objective (Eq. 6) and the adaptive clip. Every agent has its
own actor, critic and optimisers; each moves some joints of a robot and all of them see the whole robot.

    python a2po_mamujoco.py --scenario Ant --partition 4x2
    python a2po_mamujoco.py --eval-only --checkpoint runs/<run>/checkpoint.pt
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
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
from torch.distributions import Normal
from torch.func import stack_module_state
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    scenario: Literal["Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "Walker2d"] = "Ant"
    """the robot"""
    partition: str | None = None
    """how its joints are shared out, such as 4x2 (4 agents with 2 joints) or 9|8; by default the robot's first one"""
    env_version: Literal["v2", "v3", "v4", "v5"] = "v5"
    """version of the task in Gymnasium's numbering; the paper's are v2, the nearest that runs today is v3"""
    seed: int = 1
    """seed of the networks, the sampling and the simulator"""
    total_timesteps: int = 10_000_000
    """environment steps of the run (Fig. 9); a step of all agents counts once"""
    num_envs: int = 16
    """environments stepped at once"""
    num_steps: int | None = None
    """steps of each environment per iteration; by default what makes 4,000 in all (Table 8, batch size)"""

    learning_rate: float | None = None
    """of actors and critics (Table 9 by robot)"""
    gamma: float = 0.99
    """discount factor (MAPPO default)"""
    gae_lambda: float | None = None
    """lambda of the advantage's trace (Table 9 by robot)"""
    clip_coef: float | None = None
    """base clipping parameter epsilon (Table 9 by robot)"""
    update_epochs: int | None = None
    """P, passes of every agent over the rollout (Table 9 by robot)"""
    agent_blocks: int | None = None
    """number of blocks that the agents are updated in (Table 9; where it has none, one for each agent)"""
    agent_order: Literal["semi-greedy", "greedy", "random", "cyclic", "reverse-greedy", "reverse-semi-greedy"] = (
        "semi-greedy"
    )
    """order of the agents' updates (Sec. 4; the others are the paper's ablations)"""
    preopc: bool = True
    """correct advantages for the policies that have changed, Eq. (2); without it they are plain GAE"""
    clip_adaptation: float = 0.5
    """c of the adaptive clip (appendix B.4); 1 switches it off"""
    ent_coef: float = 0.0
    """weight of the entropy bonus (Table 8)"""
    huber_delta: float = 10.0
    """where the value loss turns from square to linear, in units of the normalised return (MAPPO default)"""
    max_grad_norm: float = 10.0
    """gradients are scaled down to this norm, actor and critic apart (MAPPO default)"""
    hidden_size: int = 64
    """width of all hidden layers (MAPPO default)"""

    eval_every: int = 100_000
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
    torch_threads: int | None = None
    """CPU threads of PyTorch; by default all cores"""


def table_9(update_epochs, learning_rate, gae_lambda, clip_coef):
    return locals()


TABLE_9 = {
    "Ant": table_9(8, 3e-4, 0.93, 0.2),
    "HalfCheetah": table_9(5, 3e-4, 0.93, 0.2),
    "Hopper": table_9(8, 1e-4, 0.95, 0.1),
    "Humanoid": table_9(5, 3e-4, 0.9, 0.2),
    "HumanoidStandup": table_9(5, 3e-4, 0.93, 0.2),
    "Walker2d": table_9(5, 3e-4, 0.93, 0.2),
}
TABLE_9_BLOCKS = {("Ant", "8x1"): 4, ("Humanoid", "17x1"): 5, ("HumanoidStandup", "17x1"): 4}


# ---------------------------------------------------------------------------------------------------- environments
PARTITIONS = {
    "Ant": ("4x2", "2x4", "2x4d", "8x1"),
    "HalfCheetah": ("2x3", "3x2", "6x1"),
    "Hopper": ("3x1",),
    "Humanoid": ("9|8", "17x1"),
    "HumanoidStandup": ("9|8", "17x1"),
    "Walker2d": ("2x3", "3x2", "6x1"),
}
# The paper's partitions that Gymnasium-Robotics lacks or, like Ant's diagonal legs, has otherwise, by the names of its
# joints. In Nx1 every agent has one joint.
OTHER_PARTITIONS = {
    ("Ant", "2x4d"): (("hip1", "ankle1", "hip3", "ankle3"), ("hip2", "ankle2", "hip4", "ankle4")),
    ("HalfCheetah", "3x2"): (("bfoot", "bshin"), ("bthigh", "ffoot"), ("fshin", "fthigh")),
    ("Walker2d", "3x2"): (
        ("foot_joint", "leg_joint"),
        ("thigh_joint", "foot_left_joint"),
        ("leg_left_joint", "thigh_left_joint"),
    ),
}


def agent_joints(scenario: str, partition: str) -> list[list[int]]:
    """For each agent the indices of its joints in the action of the whole robot."""
    from gymnasium_robotics.envs.multiagent_mujoco.obsk import get_parts_and_edges

    joints = {joint.label: joint.act_ids for joint in get_parts_and_edges(scenario, None)[0][0]}
    if partition.endswith("x1"):
        return [[index] for index in joints.values()]
    if (scenario, partition) in OTHER_PARTITIONS:
        return [[joints[name] for name in part] for part in OTHER_PARTITIONS[scenario, partition]]
    return [[joint.act_ids for joint in part] for part in get_parts_and_edges(scenario, partition)[0]]


class MaMuJoCo(gym.vector.VectorEnv):
    """Several copies of a robot in EnvPool's threads (next-step autoreset), its action shared out among the agents.

    Observations are the whole robot's, (N, obs_dim), and every agent's; rewards are the team's, (N,). Actions are
    (N, n, d) with the d of the agent that has most joints: `has_joint` (n, d) tells which count. They are in units of
    the joints' range, -1 to 1, and clipped to it.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, scenario: str, partition: str, version: str, num_envs: int, seed: int, threads: int):
        import envpool

        self.envs = envpool.make(
            f"{scenario}-{version}",
            env_type="gymnasium",
            num_envs=num_envs,
            num_threads=min(threads, num_envs),
            seed=seed,
        )
        joints = agent_joints(scenario, partition)
        n, d = len(joints), max(map(len, joints))
        self.has_joint = np.array([[k < len(mine) for k in range(d)] for mine in joints])
        self._place = np.argsort(np.concatenate(joints))  # of the robot's joints in the agents' joints, end to end
        self._low, self._high = self.envs.action_space.low, self.envs.action_space.high
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, self.envs.observation_space.shape, np.float64)
        self.single_action_space = gym.spaces.Box(-1, 1, (n, d), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        """EnvPool takes its seed when it is made; `seed` is not used."""
        return self.envs.reset()[0], {}

    def joint_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions of the agents (N, n, d) -> action of the robot (N, joints), in the simulator's order and units."""
        whole = actions[:, self.has_joint][:, self._place].clip(-1, 1)
        return self._low + (whole + 1) / 2 * (self._high - self._low)

    def step(self, actions):
        obs, reward, terminated, truncated, _ = self.envs.step(self.joint_actions(actions))
        return obs, reward, terminated, truncated, {}

    def close(self):
        self.envs.close()


def make_envs(args: Args, num_envs: int, stream: int) -> gym.vector.VectorEnv:
    """Environments for training or evaluation; those of another seed or stream have other episodes."""
    seed = int(np.random.SeedSequence((args.seed, stream)).generate_state(1)[0] >> 1)
    return MaMuJoCo(args.scenario, args.partition, args.env_version, num_envs, seed, args.torch_threads)


# -------------------------------------------------------------------------------------------------------- networks
def layer_init(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weights and zero bias (MAPPO default)."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, hidden_size: int, gain: float) -> nn.Sequential:
    """LayerNorm, two ReLU layers with LayerNorm after each, linear head (MAPPO default)."""
    return nn.Sequential(
        nn.LayerNorm(inputs),
        layer_init(nn.Linear(inputs, hidden_size)),
        nn.ReLU(),
        nn.LayerNorm(hidden_size),
        layer_init(nn.Linear(hidden_size, hidden_size)),
        nn.ReLU(),
        nn.LayerNorm(hidden_size),
        layer_init(nn.Linear(hidden_size, outputs), gain),
    )


class GaussianActor(nn.Module):
    """Mean (B, d), kept within -1 and 1 by tanh, and std (d,), exp(-0.5) at first, of an agent (appendix B.4.2)."""

    def __init__(self, inputs: int, actions: int, hidden_size: int):
        super().__init__()
        self.mean = mlp(inputs, actions, hidden_size, gain=0.01)
        self.log_std = nn.Parameter(torch.full((actions,), -0.5))

    def forward(self, obs):
        return self.mean(obs).tanh(), self.log_std.exp()


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


class ObservationNormalizer(nn.Module):
    """Running mean and variance of the observations; normalised ones are clipped to 10 (as Gymnasium and SB3 do)."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, obs):
        """obs (B, size): merge the batch's moments into the running ones."""
        total, (variance, mean) = self.count + len(obs), torch.var_mean(obs, 0, correction=0)
        change, share = mean - self.mean, len(obs) / total
        self.mean = self.mean + change * share
        self.variance = torch.lerp(self.variance, variance, share) + change.square() * share * (1 - share)
        self.count = total

    def forward(self, obs):
        return ((obs - self.mean) / (self.variance + 1e-8).sqrt()).clamp(-10, 10).float()


def joint_policies(actors: nn.ModuleList):
    """All agents' policies in one batched pass: a function of obs (B, obs_dim) to mean (n, B, d) and std (n, 1, d).

    It works on a copy of the parameters: make it anew when they have changed.
    """
    weights, _ = stack_module_state(list(actors))  # (n, ...)
    std = weights["log_std"].exp().unsqueeze(1)

    def normalize_and_multiply(x, layer):  # a LayerNorm and the linear layer behind it
        scale, shift = (weights[f"mean.{layer}.{name}"].unsqueeze(1) for name in ("weight", "bias"))
        x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale)
        weight, bias = weights[f"mean.{layer + 1}.weight"], weights[f"mean.{layer + 1}.bias"]
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    def policies(obs):
        hidden = normalize_and_multiply(obs.unsqueeze(0), 0).relu()
        hidden = normalize_and_multiply(hidden, 3).relu()
        return normalize_and_multiply(hidden, 6).tanh(), std

    return policies


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


def action_ratio(log_ratios, has_joint):
    """An agent's ratio (...,): the mean of its joints' ratios exp(log_ratios (..., d)) (appendix B.4.2)."""
    return (log_ratios.clamp(-20, 20).exp() * has_joint).sum(-1) / has_joint.sum(-1)


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


# ------------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def evaluate(actors, obs_normalizer, envs, device) -> list[float]:
    """One greedy episode in each environment, from its start: the undiscounted return of each of them."""
    policies = joint_policies(actors)
    obs, _ = envs.reset()
    returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    while running.any():
        mean, _ = policies(obs_normalizer(torch.as_tensor(obs, device=device)))
        obs, reward, terminated, truncated, _ = envs.step(mean.transpose(0, 1).cpu().numpy())
        returns += reward * running
        running &= ~(terminated | truncated)
    return [round(float(x), 4) for x in returns]


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
    if args.partition is None:
        args = dataclasses.replace(args, partition=PARTITIONS[args.scenario][0])
    if args.partition not in PARTITIONS[args.scenario]:
        allowed = ", ".join(PARTITIONS[args.scenario])
        usage_error("--partition", args.partition, f"{args.scenario} can be shared out as {allowed}")
    n_agents = 2 if args.partition == "9|8" else int(args.partition.split("x")[0])
    defaults = TABLE_9[args.scenario] | {
        "agent_blocks": TABLE_9_BLOCKS.get((args.scenario, args.partition), n_agents),
        "num_steps": max(1, 4000 // max(1, args.num_envs)),
        "torch_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    missing = [field.name for field in dataclasses.fields(args) if getattr(args, field.name) is None]
    args = dataclasses.replace(args, **{name: defaults[name] for name in missing})
    check_args(args)
    if args.agent_blocks > n_agents:
        usage_error("--agent-blocks", args.agent_blocks, f"must be at most {n_agents}, the number of agents")
    oldest = "v2" if args.scenario == "HumanoidStandup" else "v3"
    versions = [oldest, "v4", "v5"]
    if args.env_version not in versions:
        usage_error("--env-version", args.env_version, f"{args.scenario} can be had as {', '.join(versions)}")
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

    envs = make_envs(args, args.num_envs, stream=0)
    obs_dim, (n, d) = envs.single_observation_space.shape[0], envs.single_action_space.shape
    T, N, H = args.num_steps, args.num_envs, args.hidden_size
    has_joint = torch.as_tensor(envs.has_joint, dtype=torch.float32, device=device)

    actors = nn.ModuleList([GaussianActor(obs_dim, d, H) for _ in range(n)]).to(device)
    critics = nn.ModuleList([mlp(obs_dim, 1, H, gain=1.0) for _ in range(n)]).to(device)
    normalizer = ValueNormalizer().to(device)
    obs_normalizer = ObservationNormalizer(obs_dim).to(device)
    actor_optimizers = [torch.optim.Adam(actor.parameters(), lr=args.learning_rate, eps=1e-5) for actor in actors]
    critic_optimizers = [torch.optim.Adam(critic.parameters(), lr=args.learning_rate, eps=1e-5) for critic in critics]
    learned = {"actor": actors, "critic": critics, "normalizer": normalizer, "obs_normalizer": obs_normalizer}
    for i in range(n):
        learned |= {f"actor_optimizer_{i}": actor_optimizers[i], f"critic_optimizer_{i}": critic_optimizers[i]}

    checkpoint = None
    if args.resume or args.eval_only:
        source, option = (args.resume, "--resume") if args.resume else (args.checkpoint, "--checkpoint")
        checkpoint = read_checkpoint(Path(source) / "checkpoint.pt" if args.resume else Path(source), option)
        same = {"scenario": args.scenario, "partition": args.partition, "env_version": args.env_version}
        same |= {"script": Path(__file__).stem}
        for name, value in same.items():
            saved = (checkpoint["args"] | {"script": checkpoint["script"]})[name]
            if saved != value:
                usage_error(option, source, f"is of {name} {saved}, not of {value}")
        try:
            for name, part in learned.items():
                part.load_state_dict(checkpoint[name])
        except (KeyError, ValueError, RuntimeError):
            usage_error(option, source, f"does not fit networks with --hidden-size {H} on {args.scenario}")
        for optimizer in actor_optimizers + critic_optimizers:
            optimizer.param_groups[0]["lr"] = args.learning_rate
    if args.eval_only:
        returns = evaluate(actors, obs_normalizer, make_envs(args, args.eval_episodes, stream=1), device)
        print(f"{len(returns)} greedy episodes: mean return {np.mean(returns):.3f}")
        return

    run_name = f"{args.scenario}-{args.partition}__{Path(__file__).stem}__{args.seed}"
    run_dir = Path(args.resume) if args.resume else new_run_dir(run_name)
    packages = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "envpool")
    config = dataclasses.asdict(args) | {"resume": "", "script": Path(__file__).stem}
    config |= {"device": str(device), "versions": {name: importlib.metadata.version(name) for name in packages}}
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{run_dir}: " + ", ".join(f"{k} {v}" for k, v in config.items() if k in Args.__annotations__))
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project, name=run_dir.name, config=config, sync_tensorboard=True)

    # The rollout, time-major: (T, N, n, ...), and one more step where the last value needs it.
    obs = torch.zeros(T + 1, N, obs_dim, device=device)  # normalised, and the same for all agents
    final = torch.zeros(T + 1, N, device=device)  # 1: an episode's last observation, its action is ignored, no sample
    actions = torch.zeros(T, N, n, d, device=device)
    log_probs = torch.zeros(T, N, n, d, device=device)  # of every joint
    rewards = torch.zeros(T, N, 1, device=device)
    terminated = torch.zeros(T, N, device=device)

    # Where the run stands; all of it goes into checkpoints, but for the simulator, which cannot be saved.
    progress = {"global_step": 0, "iteration": 0, "seconds": 0.0}
    if checkpoint:
        progress = checkpoint["progress"]
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and "cuda_rng" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        envs = make_envs(args, N, stream=2 * progress["iteration"])  # other episodes than at the run's beginning
    next_obs, _ = envs.reset()
    next_final, episode_return, episode_length = torch.zeros(N), torch.zeros(N), torch.zeros(N)
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
        if device.type == "cuda":
            contents["cuda_rng"] = torch.cuda.get_rng_state()
        write_checkpoint(run_dir / "checkpoint.pt", contents)

    stop_signals = []  # Ctrl-C and SIGTERM are seen to between two iterations; a second one ends the run at once

    def ask_to_stop(number, _):
        stop_signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    old_handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.total_timesteps, initial=progress["global_step"], unit="step", unit_scale=True)
    recent_returns, recent_lengths, mean_return, greedy_return = [], [], math.nan, math.nan
    begin = time.perf_counter() - progress["seconds"]
    while progress["global_step"] < args.total_timesteps and not stop_signals:
        # ---------------------------------------------------------------------------------------- collect a rollout
        rollout_begin = time.perf_counter()
        with torch.no_grad():
            policies = joint_policies(actors)
            for t in range(T + 1):
                raw_obs = torch.as_tensor(next_obs, device=device)
                obs[t], final[t] = obs_normalizer(raw_obs), next_final
                if t == T:
                    break
                obs_normalizer.update(raw_obs)
                policy = Normal(*policies(obs[t]), validate_args=False)
                action = policy.sample()  # (n, N, d)
                actions[t], log_probs[t] = action.transpose(0, 1), policy.log_prob(action).transpose(0, 1)

                next_obs, reward, term, trunc, _ = envs.step(actions[t].cpu().numpy())
                rewards[t, :, 0], terminated[t] = torch.as_tensor(reward), torch.as_tensor(term)
                next_start, next_final = next_final, torch.as_tensor(term | trunc).float()
                episode_return = (episode_return + torch.as_tensor(reward)) * (1 - next_start)
                episode_length = (episode_length + 1) * (1 - next_start)
                for e in np.flatnonzero(term | trunc):
                    recent_returns.append(float(episode_return[e]))
                    recent_lengths.append(float(episode_length[e]))

            # Critic values for the whole rollout at once, in units of return, as the normaliser is now.
            values = normalizer.denormalize(torch.cat([critic(obs) for critic in critics], -1))  # (T + 1, N, n)
        done, sample = final[1:], 1 - final[:-1]  # (T, N)
        steps = int(sample.sum())
        rollout_seconds = time.perf_counter() - rollout_begin

        # --------------------------------------------------------------------------------------------------- update
        update_begin = time.perf_counter()
        trace = (rewards, values, terminated, done)
        advantages = preopc_advantages(*trace, torch.ones_like(done), args.gamma, args.gae_lambda)  # under pi: GAE
        returns = advantages + values[:-1]
        normalizer.update(returns[sample.bool()])
        old_values = normalizer.normalize(values[:-1])
        explained = 1 - (advantages[sample.bool()].var() / returns[sample.bool()].var())

        # The order of the agents by E|A_i| under pi, and its blocks.
        scores = (advantages.abs() * sample.unsqueeze(-1)).sum((0, 1)) / sample.sum().clamp(min=1)
        order = agent_order(scores.cpu(), args.agent_order, torch.default_generator)
        blocks = torch.tensor(order).tensor_split(args.agent_blocks)
        joint_log_ratio = torch.zeros_like(done)  # over the agents that have been updated
        metrics = []
        for position, block in enumerate(blocks, 1):
            # Eq. (2): the block's advantages, corrected for the preceding agents.
            preceding_ratio = joint_log_ratio.clamp(-20, 20).exp()
            joint_ratio = preceding_ratio if args.preopc else torch.ones_like(done)
            trace = (rewards, values[..., block], terminated, done)
            advantages = preopc_advantages(*trace, joint_ratio, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1, :, block]  # targets of the value
            targets, clip_values = normalizer.normalize(returns), old_values[..., block]
            clip_coef = adaptive_clip(args.clip_coef, position, len(blocks), args.clip_adaptation)

            # Eq. (6), P times for each agent of the block; they share nothing, so it does not matter who is first.
            for column, agent in enumerate(block.tolist()):
                advantage = normalize_advantages(advantages[..., column], sample)
                for _ in range(args.update_epochs):
                    policy = Normal(*actors[agent](obs[:-1]), validate_args=False)
                    log_ratios = policy.log_prob(actions[:, :, agent]) - log_probs[:, :, agent]
                    ratio = action_ratio(log_ratios, has_joint[agent])
                    surrogate = clipped_surrogate(ratio, preceding_ratio, advantage, clip_coef)
                    entropy = (policy.entropy() * has_joint[agent]).sum(-1)
                    policy_loss, entropy = -masked_mean(surrogate, sample), masked_mean(entropy, sample)
                    new_values, old = critics[agent](obs[:-1]).squeeze(-1), clip_values[..., column]
                    losses = value_loss(new_values, old, targets[..., column], args.clip_coef, args.huber_delta)
                    critic_loss = masked_mean(losses, sample)

                    actor_optimizers[agent].zero_grad()
                    critic_optimizers[agent].zero_grad()
                    (policy_loss - args.ent_coef * entropy + critic_loss).backward()
                    actor_norm = nn.utils.clip_grad_norm_(actors[agent].parameters(), args.max_grad_norm)
                    critic_norm = nn.utils.clip_grad_norm_(critics[agent].parameters(), args.max_grad_norm)
                    actor_optimizers[agent].step()
                    critic_optimizers[agent].step()

                    with torch.no_grad():
                        preceding = preceding_ratio.clamp(1 - clip_coef / 2, 1 + clip_coef / 2)
                        clipped = masked_mean(((ratio * preceding - 1).abs() > clip_coef).float(), sample)
                        update = {"losses/policy_loss": policy_loss, "losses/value_loss": critic_loss}
                        update |= {"losses/entropy": entropy, "losses/clipfrac": clipped}
                        update |= {"losses/actor_grad_norm": actor_norm, "losses/critic_grad_norm": critic_norm}
                        divergence = ((log_ratios.exp() - 1 - log_ratios) * has_joint[agent]).sum(-1)
                        update["losses/approx_kl"] = masked_mean(divergence, sample)
                        place = f"a2po/position_{position}"
                        update |= {f"{place}/clipfrac": clipped, f"{place}/ratio": masked_mean(ratio, sample)}
                        preceding_clipped = (preceding != preceding_ratio).float()
                        update[f"{place}/preceding_clipfrac"] = masked_mean(preceding_clipped, sample)
                        metrics.append(update)

            # The ratio is extended by the block just updated: one forward pass of its agents alone.
            with torch.no_grad():
                for agent in block.tolist():
                    policy = Normal(*actors[agent](obs[:-1]), validate_args=False)
                    log_ratios = policy.log_prob(actions[:, :, agent]) - log_probs[:, :, agent]
                    joint_log_ratio += action_ratio(log_ratios, has_joint[agent]).log() * sample
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
            returns = evaluate(actors, obs_normalizer, make_envs(args, args.eval_episodes, stream=1), device)
            greedy_return = float(np.mean(returns))
            record = {"step": progress["global_step"], "seconds": round(progress["seconds"], 2)}
            record |= {"episodic_return": greedy_return, "returns": returns}
            with eval_file.open("a") as file:
                file.write(json.dumps(record) + "\n")
            writer.add_scalar("eval/episodic_return", greedy_return, progress["global_step"])
        if before // args.save_every < now // args.save_every:
            save()
        bar.update(steps)
        bar.set_postfix_str(f"SPS {means['charts/SPS']:.0f}, return {mean_return:.0f}, greedy {greedy_return:.0f}")

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
