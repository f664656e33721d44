# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "envpool==1.2.5",
#   "tyro==1.0.17", "tensorboard==2.20.0", "tqdm==4.70.1"]
# ///
"""CoPPO (coordinated PPO, Wu et al., 2021) on multi-agent MuJoCo, with a network per agent.

The baseline that updates all agents simultaneously but weighs each with the clipped ratio of all others. It is CoPPO
without its mixer of values, which the paper has in Sec. 2 alone. Every agent has its own actor and critic;
each moves some joints of a robot, and all of them see the whole robot.
The paper, its tables and figures, and the authors are A2PO's (Wang et al., ICLR 2023).

    python coppo_mamujoco.py --scenario Ant --partition 4x2
    python coppo_mamujoco.py --eval-only --checkpoint runs/<run>/checkpoint.pt

Read to the end of `main`: that is the algorithm, with MAPPO's networks and value loss; what stands below makes it run.
"""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
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


# -------------------------------------------------------------------------------------------------------- settings
@dataclasses.dataclass
class Settings:
    """The game and the algorithm; `Args`, in the section "the run", adds what only a run needs."""

    scenario: Literal["Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "Walker2d"] = "Ant"
    """the robot"""
    partition: str | None = None
    """how its joints are shared out, such as 4x2 (4 agents with 2 joints) or 9|8; by default the robot's first one"""
    env_version: Literal["v2", "v3", "v4", "v5"] = "v5"
    """version of the task in Gymnasium's numbering; the paper's are v2, the nearest today v3 (HumanoidStandup: v2)"""
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
    action_ratio: Literal["mean", "product"] = "mean"
    """an agent's own ratio in its objective: of its joints' the mean (appendix B.4.2) or product (authors' code)"""
    update_epochs: int | None = None
    """P, passes of every agent over the rollout (Table 9 by robot)"""
    critic_steps: int = 1
    """steps of the critic in an update, where the policy takes one (authors' A2PO: 2 on most tasks)"""
    vtrace: bool = False
    """correct advantages for the policies that have changed by V-trace, anew in every epoch (Figures 5 and 13)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus (Table 8)"""
    huber_delta: float = 10.0
    """where the value loss turns from square to linear, in units of the normalised return (MAPPO default)"""
    max_grad_norm: float = 10.0
    """gradients are scaled down to this norm, actor and critic apart (MAPPO default)"""
    hidden_size: int = 64
    """width of all hidden layers (MAPPO default)"""


# Table 9; the blocks are for algorithms that update agents one after the other, by default one for each agent.
TABLE_9_COLUMNS = ("update_epochs", "learning_rate", "gae_lambda", "clip_coef")
TABLE_9 = {
    "Ant": (8, 3e-4, 0.93, 0.2),
    "HalfCheetah": (5, 3e-4, 0.93, 0.2),
    "Hopper": (8, 1e-4, 0.95, 0.1),
    "Humanoid": (5, 3e-4, 0.9, 0.2),
    "HumanoidStandup": (5, 3e-4, 0.93, 0.2),
    "Walker2d": (5, 3e-4, 0.93, 0.2),
}
TABLE_9_BLOCKS = {("Ant", "8x1"): 4, ("Humanoid", "17x1"): 5, ("HumanoidStandup", "17x1"): 4}


# ------------------------------------------------------------------------------------------------------- equations
def gae_advantages(rewards, values, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al., 2016), as a backward recursion; O(T).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lambda A_{t+1}

    rewards (T, N, n): T steps, N environments, n agents; values (T+1, N, n), units of return; terminated, done (T, N):
    a terminal state is worth nothing, a time limit (done, not terminated) only ends the trace. Returns (T, N, n).
    """
    terminated, done = terminated.float().unsqueeze(-1), done.float().unsqueeze(-1)
    deltas = rewards + gamma * (1 - terminated) * values[1:] - values[:-1]
    decay = gamma * gae_lambda * (1 - done[:-1])
    advantages = deltas.clone()
    for t in reversed(range(len(decay))):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages


def vtrace(rewards, values, terminated, done, joint_ratio, gamma, gae_lambda):
    """V-trace (Espeholt et al., 2018) for the policies that have changed, c_t = lambda min(1, rho_t); O(T).

        x_t = min(1, rho_t) delta_t + gamma c_t x_{t+1}, where V(s_t) + x_t = v_t is the value's target
        A_t = r_t + gamma v_{t+1} - V(s_t) = delta_t + gamma x_{t+1}

    Shapes and delta_t as in `gae_advantages`; joint_ratio (T, N), rho = pi_bar / pi of the joint action. Returns A and
    the targets, (T, N, n). With rho = 1 the targets are GAE's, but in A each later delta counts 1 / lambda times more.
    """
    terminated, done = terminated.float().unsqueeze(-1), done.float().unsqueeze(-1)
    deltas = rewards + gamma * (1 - terminated) * values[1:] - values[:-1]
    rho = joint_ratio.clamp(max=1.0).unsqueeze(-1)
    advantages, corrections = deltas.clone(), rho * deltas
    for t in reversed(range(len(deltas) - 1)):
        successor = gamma * (1 - done[t]) * corrections[t + 1]
        advantages[t] += successor
        corrections[t] += gae_lambda * rho[t] * successor
    return advantages, corrections + values[:-1]


def clipped_surrogate(ratio, preceding_ratio, advantages, clip_coef):
    """CoPPO's objective per sample, to be maximised: min(l A, clip(l, 1 +- eps) A).

    l = ratio * g, where g is the product of all other agents' ratios, clipped to 1 +- eps / 2, without gradient.
    """
    preceding = preceding_ratio.detach().clamp(1 - clip_coef / 2, 1 + clip_coef / 2)
    joint = ratio * preceding
    return torch.min(joint * advantages, joint.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def action_ratio(log_ratios, has_joint, rule):
    """An agent's own ratio (...,) in the objective, from log_ratios (..., d) of its joints; has_joint (d,).

    product: that of its whole action's probabilities (authors' code); mean: the mean of its joints' (appendix B.4.2).
    """
    if rule == "product":
        return log_ratios.sum(-1).clamp(-20, 20).exp()
    return (log_ratios.exp() * has_joint).sum(-1) / has_joint.sum(-1)


def value_loss(values, old_values, targets, clip_coef, huber_delta):
    """Clipped Huber loss per sample, all in normalised units (MAPPO default): the worse of free and clipped value."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    free_loss = F.huber_loss(values, targets, reduction="none", delta=huber_delta)
    clipped_loss = F.huber_loss(clipped, targets, reduction="none", delta=huber_delta)
    return torch.max(free_loss, clipped_loss)


def masked_mean(x, sample, dim=None):
    """Mean over the samples alone; sample is 0 where an agent is dead or after an episode's end, else 1."""
    return (x * sample).sum(dim) / sample.sum(dim).clamp(min=1)


def normalize_advantages(advantages, sample):
    """Zero mean and unit variance over the samples of the update at hand (the paper does not say over which)."""
    mean = masked_mean(advantages, sample)
    std = masked_mean((advantages - mean).square(), sample).sqrt()
    return (advantages - mean) / (std + 1e-5)


# -------------------------------------------------------------------------------------------------------- networks
def layer_init(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weights and zero bias (MAPPO default)."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def hidden_layer(inputs: int, outputs: int) -> list[nn.Module]:
    return [layer_init(nn.Linear(inputs, outputs)), nn.ReLU(), nn.LayerNorm(outputs)]


class MLP(nn.Sequential):
    """LayerNorm, two ReLU layers with LayerNorm after each, linear head (MAPPO default).

    An observation has mean 0 and variance 1 over its numbers already (`ObservationNormalizer`), for all networks.
    The first LayerNorm's scale and shift act on the weights behind it, of which there are fewer than of observations.
    """

    def __init__(self, inputs: int, outputs: int, hidden_size: int, gain: float):
        layers = hidden_layer(inputs, hidden_size) + hidden_layer(hidden_size, hidden_size)
        super().__init__(nn.LayerNorm(inputs), *layers, layer_init(nn.Linear(hidden_size, outputs), gain))

    def forward(self, obs):
        norm, first, *others = self
        x = F.linear(obs, first.weight * norm.weight, first.bias + first.weight @ norm.bias)
        for layer in others:
            x = layer(x)
        return x


class GaussianActor(nn.Module):
    """Mean (..., d), kept within -1 and 1 by tanh, and std (d,), exp(-0.5) at first, of an agent (appendix B.4.2)."""

    def __init__(self, inputs: int, actions: int, hidden_size: int):
        super().__init__()
        self.mean = MLP(inputs, actions, hidden_size, gain=0.01)
        self.log_std = nn.Parameter(torch.full((actions,), -0.5))

    def forward(self, obs):
        return self.mean(obs).tanh(), self.log_std.exp()


class ValueNormalizer(nn.Module):
    """Running mean and std of the returns, debiased (MAPPO default, beta 0.99999); the critic's unit is 1 std."""

    def __init__(self, beta: float = 0.99999):
        super().__init__()
        self.beta = beta
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))  # decaying means of 1, x and x^2

    def update(self, returns):
        if len(returns) > 0:
            new = torch.stack([returns.double() ** power for power in range(3)]).mean(1)
            self.moments.lerp_(new, 1 - self.beta)

    def statistics(self):
        _, mean, mean_square = self.moments / self.moments[0].clamp(min=1e-5)
        variance = (mean_square - mean.square()).clamp(min=1e-2)
        return mean.float(), variance.sqrt().float()

    def normalize(self, returns):
        mean, std = self.statistics()
        return (returns - mean) / std

    def denormalize(self, values):
        mean, std = self.statistics()
        return values * std + mean


class ObservationNormalizer(nn.Module):
    """Running mean and variance of the observations; normalised ones are clipped to 10 (as SB3 and CleanRL do), then
    each is brought to mean 0 and variance 1 over its numbers, which is the first part of the networks' LayerNorm."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, obs):
        """obs (B, size): merge the batch's moments into the running ones."""
        variance, mean = torch.var_mean(obs.double(), 0, correction=0)
        self.count += len(obs)
        change, share = mean - self.mean, len(obs) / self.count
        self.variance.lerp_(torch.addcmul(variance, change, change * (1 - share)), share)
        self.mean.lerp_(mean, share)

    def forward(self, obs):
        normalized = ((obs - self.mean) / (self.variance + 1e-8).sqrt()).clamp(-10, 10).float()
        return F.layer_norm(normalized, normalized.shape[-1:])


# ---------------------------------------------------------------------------------------- networks over a rollout
@torch.no_grad()
def joint_policies(actors: nn.ModuleList):
    """All agents' policies in one batched pass: a function of obs (B, obs_dim) to mean (n, B, d) and std (n, 1, d).

    The same as calling every actor, but faster; on a copy of the parameters: make it anew when they have changed.
    """
    weights, _ = stack_module_state(list(actors))  # (n, ...)
    std = weights["log_std"].exp().unsqueeze(1)
    layers = []
    for k in (0, 3, 6):  # a LayerNorm's scale and shift go into the linear layer behind it
        scale, shift = weights[f"mean.{k}.weight"].unsqueeze(1), weights[f"mean.{k}.bias"].unsqueeze(2)
        weight, bias = weights[f"mean.{k + 1}.weight"], weights[f"mean.{k + 1}.bias"].unsqueeze(2)
        layers.append(((bias + weight @ shift).mT, (weight * scale).mT.contiguous()))

    def policies(obs):
        x = obs.expand(len(std), *obs.shape)
        for bias, weight in layers[:-1]:
            x = torch.baddbmm(bias, x, weight).relu()
            x = F.layer_norm(x, x.shape[-1:])
        bias, weight = layers[-1]
        return torch.baddbmm(bias, x, weight).tanh(), std

    return policies


@torch.no_grad()
def act(policies, obs, greedy=False):
    """A step of all agents from obs (N, obs_dim): actions and the log-probability of each joint's, (N, n, d)."""
    policy = Normal(*policies(obs), validate_args=False)
    actions = policy.mean if greedy else policy.sample()
    return actions.transpose(0, 1), policy.log_prob(actions).transpose(0, 1)


def policy_change(actor, rollout, agent):
    """An agent's policy now against the policy that sampled.

    Returns log r (T, N, d) for each of its joints, r = new / old probability density of the action taken, with 0 where
    there is no sample or no such joint; and the entropy of the policy now (T, N).
    """
    policy = Normal(*actor(rollout.obs[:-1]), validate_args=False)
    has_joint, sample = rollout.has_joint[agent], rollout.sample[..., agent].unsqueeze(-1)
    log_ratios = policy.log_prob(rollout.actions[:, :, agent]) - rollout.log_probs[:, :, agent]
    return (log_ratios * has_joint * sample).clamp(-20, 20), (policy.entropy() * has_joint).sum(-1)


# ------------------------------------------------------------------------------------------------------------ main
def main(args: "Args"):
    args = complete_args(args)
    torch.set_num_threads(1)  # for single steps: threads that wait would take the cores from the simulator
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    gamma, gae_lambda = args.gamma, args.gae_lambda
    envs = make_envs(args)
    (obs_dim,) = envs.single_observation_space["obs"].shape
    n, d = envs.single_action_space.shape  # agents, and the most joints that one has; has_joint (n, d)
    has_joint = torch.tensor(envs.unwrapped.has_joint, dtype=torch.float32, device=device)

    actors = nn.ModuleList([GaussianActor(obs_dim, d, args.hidden_size) for _ in range(n)]).to(device)
    critics = nn.ModuleList([MLP(obs_dim, 1, args.hidden_size, gain=1.0) for _ in range(n)]).to(device)
    normalizer = ValueNormalizer().to(device)
    obs_normalizer = ObservationNormalizer(obs_dim).to(device)
    # One optimiser for all actors, one for all critics: a step leaves networks without a gradient as they are.
    actor_optimizer = torch.optim.Adam(actors.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam(critics.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    learned = {"actor": actors, "critic": critics, "normalizer": normalizer, "obs_normalizer": obs_normalizer}
    learned |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    run = Run(args, envs, device, learned, hidden={})  # counts the steps, logs, saves, resumes
    if args.eval_only:
        return run.report(evaluate(actors, obs_normalizer, make_envs(args, evaluation=True), device))

    with run:
        while run.goes_on():
            # ------------------------------------------------------------------------------------------- rollout
            steps, policies = [], joint_policies(actors)
            for _ in range(args.num_steps):
                step = envs.look(device)  # obs, start, final: name -> (N, ...)
                seen = step["obs"]
                step["obs"] = obs_normalizer(seen)
                obs_normalizer.update(seen)
                step["actions"], step["log_probs"] = act(policies, step["obs"])
                step["rewards"], step["terminated"], _ = envs.play(step["actions"])
                steps.append(step)
            steps.append(envs.look(device))  # the observation after the last step, for V(s_{t+1})
            steps[-1]["obs"] = obs_normalizer(steps[-1]["obs"])

            # Time-major: (T, N, n, ...), and one step more of what was seen; obs (T+1, N, obs_dim) are all agents'.
            rollout = SimpleNamespace(has_joint=has_joint)
            for name in steps[0]:
                setattr(rollout, name, torch.stack([step[name] for step in steps if name in step]))
            rollout.sample = (1 - rollout.final[:-1]).unsqueeze(-1).expand(-1, -1, n)
            rewards, terminated, done = rollout.rewards, rollout.terminated, rollout.final[1:]

            torch.set_num_threads(args.torch_threads)
            # Values in units of return, by the normaliser before its update.
            with torch.no_grad():
                old_values = torch.cat([critic(rollout.obs) for critic in critics], -1)
                values = normalizer.denormalize(old_values)
            run.lap("rollout")

            # -------------------------------------------------------------------------------------------- update
            advantages = gae_advantages(rewards, values, terminated, done, gamma, gae_lambda)
            targets = advantages + values[:-1]
            normalizer.update(targets[rollout.sample.bool()])
            run.note("losses", explained_variance=explained_variance(advantages, targets, rollout.sample))

            for _ in range(args.update_epochs):
                # All agents move at the same time: in place of preceding agents there is everyone but i.
                changes = [policy_change(actor, rollout, i) for i, actor in enumerate(actors)]
                joint_log_ratio = sum(log_ratios.detach().sum(-1) for log_ratios, _ in changes)
                if args.vtrace:
                    joint_ratio = joint_log_ratio.clamp(-20, 20).exp()
                    advantages, targets = vtrace(rewards, values, terminated, done, joint_ratio, gamma, gae_lambda)
                for i, (log_ratios, entropy) in enumerate(changes):
                    preceding_ratio = (joint_log_ratio - log_ratios.detach().sum(-1)).clamp(-20, 20).exp()
                    ratio = action_ratio(log_ratios, has_joint[i], args.action_ratio)
                    sample = rollout.sample[..., i]
                    normalized_advantages = normalize_advantages(advantages[..., i], sample)
                    surrogate = clipped_surrogate(ratio, preceding_ratio, normalized_advantages, args.clip_coef)
                    policy_loss = -masked_mean(surrogate, sample)
                    entropy = masked_mean(entropy, sample)
                    actor_optimizer.zero_grad()
                    (policy_loss - args.ent_coef * entropy).backward()
                    actor_norm = nn.utils.clip_grad_norm_(actors[i].parameters(), args.max_grad_norm)
                    actor_optimizer.step()

                    normalized_targets, old = normalizer.normalize(targets[..., i]), old_values[:-1, :, i]
                    for _ in range(args.critic_steps):
                        new_values = critics[i](rollout.obs[:-1]).squeeze(-1)
                        losses = value_loss(new_values, old, normalized_targets, args.clip_coef, args.huber_delta)
                        critic_loss = masked_mean(losses, sample)
                        critic_optimizer.zero_grad()
                        critic_loss.backward()
                        critic_norm = nn.utils.clip_grad_norm_(critics[i].parameters(), args.max_grad_norm)
                        critic_optimizer.step()
                    ratios = ratio_statistics(ratio, log_ratios, preceding_ratio, sample, args.clip_coef)
                    run.note("losses", policy_loss=policy_loss, value_loss=critic_loss, entropy=entropy, **ratios)
                    run.note("losses", actor_grad_norm=actor_norm, critic_grad_norm=critic_norm)
            run.lap("update")
            torch.set_num_threads(1)

            # --------------------------------------------------------------------------------- log, evaluate, save
            run.log(int((1 - rollout.final[:-1]).sum()), envs.finished())
            if run.is_due(args.eval_every):
                run.log_evaluation(evaluate(actors, obs_normalizer, make_envs(args, evaluation=True), device))
            if run.is_due(args.save_every):
                run.save()


# ------------------------------------------------------------------------------------- evaluation, what is logged
def evaluate(actors, obs_normalizer, envs, device) -> list[dict[str, float]]:
    """A greedy episode in each environment, from its start, with what `Episodes.finished` says of it."""
    policies, played = joint_policies(actors), {}
    envs.reset()
    while len(played) < envs.num_envs:
        actions, _ = act(policies, obs_normalizer(envs.look(device)["obs"]), greedy=True)
        envs.play(actions)
        for episode in envs.finished():
            played.setdefault(episode["env"], episode)
    envs.close()
    return [played[env] for env in range(envs.num_envs)]


def summarize(episodes: list[dict[str, float]]) -> dict[str, float]:
    """Means over episodes, by the names that they are logged under."""
    returns, lengths = ([e[name] for e in episodes] for name in ("return", "length"))
    return {"episodic_return": np.mean(returns), "episodic_length": np.mean(lengths)}


def explained_variance(advantages, targets, sample):
    """1 - Var(target - value) / Var(target); 0 where the targets do not vary."""
    advantages, targets = advantages[sample.bool()], targets[sample.bool()]
    return (1 - advantages.var() / targets.var()).nan_to_num(0, 0, 0)


@torch.no_grad()
def ratio_statistics(ratio, log_ratios, preceding_ratio, sample, clip_coef):
    """Mean ratio, approximate KL divergence (of whole actions, from log_ratios), and the shares of what is clipped."""
    log_ratio = log_ratios.sum(-1).clamp(-20, 20)
    preceding = preceding_ratio.clamp(1 - clip_coef / 2, 1 + clip_coef / 2)
    return {
        "ratio": masked_mean(ratio, sample),
        "approx_kl": masked_mean(log_ratio.exp() - 1 - log_ratio, sample),
        "clipfrac": masked_mean(((ratio * preceding - 1).abs() > clip_coef).float(), sample),
        "preceding_clipfrac": masked_mean((preceding != preceding_ratio).float(), sample),
    }


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
    from unittest import mock

    with mock.patch("builtins.print"):  # it has a notice of other robots
        from gymnasium_robotics.envs.multiagent_mujoco.obsk import get_parts_and_edges

    joints = {joint.label: joint.act_ids for joint in get_parts_and_edges(scenario, None)[0][0]}
    if partition.endswith("x1"):
        return [[index] for index in joints.values()]
    if (scenario, partition) in OTHER_PARTITIONS:
        return [[joints[name] for name in part] for part in OTHER_PARTITIONS[scenario, partition]]
    return [[joint.act_ids for joint in part] for part in get_parts_and_edges(scenario, partition)[0]]


class MaMuJoCo(gym.vector.VectorEnv):
    """Several copies of a robot in EnvPool's threads (next-step autoreset), its action shared out among the agents.

    Observations are dictionaries of one: `obs` (N, obs_dim), the whole robot's and every agent's; rewards are the
    team's, (N,). Actions are (N, n, d) with the d of the agent that has most joints: `has_joint` (n, d) tells which
    count. They are in units of the joints' range, -1 to 1, and clipped to it.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, scenario: str, partition: str, version: str, num_envs: int, seed: int, threads: int):
        import envpool

        task, threads = f"{scenario}-{version}", min(threads, num_envs)
        # Where they are as many as the cores each gets one for its own: else two would at times share one.
        pool = {"num_threads": threads, "thread_affinity_offset": 0 if threads == os.cpu_count() else -1}
        self.envs = envpool.make(task, env_type="gymnasium", num_envs=num_envs, seed=seed, **pool)
        joints = agent_joints(scenario, partition)
        n, d = len(joints), max(map(len, joints))
        self.has_joint = np.array([[k < len(mine) for k in range(d)] for mine in joints])
        self._place = np.flatnonzero(self.has_joint)[np.argsort(np.concatenate(joints))]  # where in (n, d) a joint is
        self._low, self._high = self.envs.action_space.low, self.envs.action_space.high
        self.num_envs = num_envs
        obs_space = gym.spaces.Box(-np.inf, np.inf, self.envs.observation_space.shape, np.float64)
        self.single_observation_space = gym.spaces.Dict(obs=obs_space)
        self.single_action_space = gym.spaces.Box(-1, 1, (n, d), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        """EnvPool takes its seed when it is made; `seed` is not used."""
        obs, _ = self.envs.reset()
        return {"obs": obs}, {}

    def joint_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions of the agents (N, n, d) -> action of the robot (N, joints), in the simulator's order and units."""
        whole = actions.reshape(len(actions), -1)[:, self._place].clip(-1, 1)
        return self._low + (whole + 1) / 2 * (self._high - self._low)

    def step(self, actions):
        obs, reward, terminated, truncated, _ = self.envs.step(self.joint_actions(actions))
        return {"obs": obs}, reward, terminated, truncated, {}

    def get_state(self):
        """EnvPool cannot be saved."""

    def close(self):
        self.envs.close()


class GamesFailed(SystemExit):
    """Games failed again and again. Not caught, it ends the program with its one line."""


class Episodes(gym.vector.VectorWrapper):
    """What a rollout has to know of its episodes, with next-step autoreset.

    `start` (N,) is 1 where the last observation is the first of an episode; `final` (N,) where it is the last: then the
    next action is ignored, and the next step is no sample.
    """

    def __init__(self, envs: gym.vector.VectorEnv):
        super().__init__(envs)
        assert envs.metadata.get("autoreset_mode") == gym.vector.AutoresetMode.NEXT_STEP
        self.obs = None  # until the first reset
        self.crashes = 0  # episodes that were dropped because a game crashed

    def reset(self, *, seed=None, options=None):
        self.obs, info = self.env.reset(seed=seed, options=options)
        self.start, self.final = np.ones(self.num_envs, np.float32), np.zeros(self.num_envs, np.float32)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs)
        self.ended = []
        return self.obs, info

    def look(self, device) -> dict[str, torch.Tensor]:
        """What is seen now, name -> (N, ...)."""
        seen = self.obs | {"start": self.start, "final": self.final}
        return {name: torch.as_tensor(value, device=device) for name, value in seen.items()}

    def play(self, actions):
        """A step: rewards (N, n); and (N,) terminated, and crashed, 1 where a game did, which makes no sample."""
        return self.record(actions, *self.env.step(actions.cpu().numpy()))

    def record(self, actions, obs, rewards, terminated, truncated, info):
        ended, crashed = terminated | truncated, info.get("crashed", np.zeros(self.num_envs, bool))
        self.crashes += int(np.count_nonzero(crashed & (self.final == 0)))
        self.obs, self.start, self.final = obs, self.final, ended.astype(np.float32)
        rewards = rewards.reshape(self.num_envs, -1)  # the team's or every agent's
        self.returns = (self.returns + rewards.mean(1)) * (1 - self.start)
        self.lengths = (self.lengths + 1) * (1 - self.start)
        for e in np.flatnonzero(ended & ~crashed):
            numbers = {name: values[e].item() for name, values in info.get("episode", {}).items()}
            numbers |= {"return": round(float(self.returns[e]), 4), "length": int(self.lengths[e])}
            self.ended.append({"env": int(e)} | numbers)
        tensors = [torch.as_tensor(x, device=actions.device).float() for x in (rewards, terminated, crashed)]
        return tensors[0].expand(actions.shape[:2]), *tensors[1:]

    def finished(self) -> list[dict[str, float]]:
        """The episodes that have ended since the last call: env, return (the agents' mean, undiscounted), length, and
        the simulator's own numbers."""
        ended, self.ended = self.ended, []
        return ended

    def get_state(self) -> dict | None:
        simulator = None if self.obs is None else getattr(self.env, "get_state", lambda: None)()
        if simulator is None:
            return None
        obs = {name: torch.tensor(value) for name, value in self.obs.items()}
        episodes = [torch.tensor(x) for x in (self.start, self.final, self.returns, self.lengths)]
        return {"simulator": simulator, "obs": obs, "episodes": episodes}

    def set_state(self, state: dict | None):
        """Back to what get_state returned; to new episodes where the simulator cannot be saved."""
        self.reset()
        if state is not None:
            self.env.set_state(state["simulator"])
            self.obs = {name: value.numpy() for name, value in state["obs"].items()}
            self.start, self.final, self.returns, self.lengths = (x.numpy() for x in state["episodes"])


def make_envs(args: "Args", evaluation: bool = False) -> Episodes:
    """Environments for training, with other episodes after --resume, or for evaluation, always with the same ones."""
    iteration = read_checkpoint(*saved_in(args))["progress"]["iteration"] if args.resume and not evaluation else 0
    num_envs, stream = (args.eval_episodes, 1) if evaluation else (args.num_envs, 2 * iteration)
    seed = int(np.random.SeedSequence((args.seed, stream)).generate_state(1)[0] >> 1)
    threads = args.torch_threads
    return Episodes(MaMuJoCo(args.scenario, args.partition, args.env_version, num_envs, seed, threads))


# --------------------------------------------------------------------------------------------------------- the run
PACKAGES = ("torch", "numpy", "gymnasium", "gymnasium_robotics", "envpool")  # whose versions are written down
TASK = ("scenario", "partition", "env_version", "hidden_size")  # a checkpoint's networks are for these
GAMES = ()  # its saved games are of these, too: there are none
SCORE = "episodic_return"  # what evaluations are about
RAW = {"returns": "return"}  # list in eval.jsonl: number of each episode


@dataclasses.dataclass
class Args(Settings):
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
    out: str = ""
    """file to which --eval-only adds its result, as a line of JSON"""
    exp_name: str = Path(__file__).stem
    """what the run is called in its folder, plots and W&B"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb==0.31.0` and `wandb login`)"""
    wandb_project: str = "a2po"
    """Weights & Biases project"""
    wandb_entity: str = ""
    """Weights & Biases team; by default your own"""
    wandb_group: str = ""
    """Weights & Biases group, such as the seeds of one experiment"""
    cuda: bool = True
    """use a GPU for the networks if there is one"""
    torch_threads: int | None = None
    """CPU threads of PyTorch and of the simulator; by default all cores"""


def task_name(args: Args) -> str:
    return f"{args.scenario}-{args.partition}"


def usage_error(option: str, value, allowed: str):
    """One line that names the option, the value and what is allowed; exit status 2."""
    print(f"{Path(__file__).name}: error: {f'{option} {value}'.rstrip()}: {allowed}", file=sys.stderr)
    raise SystemExit(2)


def one_of(value: str, names, more: str = "") -> str:
    """What to say of a name that is none of `names`: what is allowed, and which may have been meant."""
    meant = difflib.get_close_matches(value, names, 1)
    return f"must be one of {', '.join(names)}{more}" + (f"; did you mean {meant[0]}?" if meant else "")


def read_checkpoint(path: Path, option: str) -> dict:
    """A checkpoint of one of these scripts; anything else is an error in `option`."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # what PyTorch does not look at
                raise ValueError("damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not {"args", "script", "learned"} <= set(checkpoint):
            raise ValueError("other contents")
    except FileNotFoundError:
        usage_error(option, path, "no such file")
    except Exception:
        usage_error(option, path, "is damaged, or not a checkpoint of this script, as it is now")
    return checkpoint


class Run:
    """A run and what it leaves behind: folder, settings, events, evaluations, checkpoints.

    It is over after total_timesteps, at the end of the iteration in which Ctrl-C, SIGTERM or SIGHUP comes, or when its
    games fail, and saves what was learned. A second signal ends it at once, but SIGHUP, which terminals may send twice.
    """

    def __init__(self, args: Args, envs: Episodes, device, learned: dict, hidden: dict[str, torch.Tensor]):
        """learned: networks, normalisers, optimisers; hidden: states of GRUs. Both go into checkpoints, by name."""
        self.args, self.envs, self.device, self.learned, self.hidden = args, envs, device, learned, hidden
        self.progress = {"global_step": 0, "iteration": 0, "seconds": 0.0}
        self.noted, self.scores, self.stop_signal = {}, {"sampled": math.nan, "greedy": math.nan}, 0
        self.checkpoint = self.load(*saved_in(args)) if args.resume or args.eval_only else None
        with writing("--out", args.out):
            self.out = open(args.out, "a") if args.out else None

    def load(self, path: Path, option: str) -> dict:
        checkpoint = read_checkpoint(path, option)
        try:
            for name, part in self.learned.items():
                if self.args.resume or name in checkpoint["learned"]:
                    part.load_state_dict(checkpoint["learned"][name])
        except KeyError as missing:
            usage_error(option, path, f"is of another version of this script: there is no {missing.args[0]} in it")
        except (ValueError, RuntimeError):
            usage_error(option, path, "is of other networks than this script's")
        for part in self.learned.values():
            if isinstance(part, torch.optim.Optimizer):
                part.param_groups[0]["lr"] = self.args.learning_rate
        done, total = checkpoint.get("progress", {}).get("global_step", 0), self.args.total_timesteps
        if self.args.resume and done >= total:
            print(f"{path.parent}: nothing is left to do, {done:,} steps are done and --total-timesteps is {total:,}")
            self.envs.close()
            raise SystemExit
        return checkpoint

    def report(self, episodes: list[dict[str, float]]):
        """Of --eval-only: mean and standard deviation over the episodes; everything goes to --out."""
        numbers = {name: [episode[name] for episode in episodes] for name in (*RAW.values(), "length")}
        if self.out:
            step = self.checkpoint.get("progress", {}).get("global_step")
            record = {"checkpoint": self.args.checkpoint, "script": self.checkpoint["script"], "step": step}
            record |= {name: getattr(self.args, name) for name in (*TASK, *GAMES, "seed")}
            with writing("--out", self.args.out), self.out:
                print(json.dumps(record | {SCORE: summarize(episodes)[SCORE]} | numbers), file=self.out)
        self.envs.close()
        text = ", ".join(f"{name} {np.mean(values):.3f} (std {np.std(values):.3f})" for name, values in numbers.items())
        print(f"{len(episodes)} greedy episodes: {text}")

    def __enter__(self):
        name = f"{task_name(self.args)}__{self.args.exp_name}__{self.args.seed}"
        self.folder = Path(self.args.resume) if self.args.resume else new_folder(name)
        self.evaluations = self.folder / "eval.jsonl"
        option = "--resume" if self.args.resume else "new run"
        with writing(option, self.folder):
            self.lock = lock_run(self.folder)
            if self.checkpoint:
                self.go_back()
            config = self.write_config()
        if self.args.track:  # before the writer is made: W&B follows no earlier one
            import wandb

            team, group = self.args.wandb_entity or None, self.args.wandb_group or None
            named = {"project": self.args.wandb_project, "entity": team, "group": group, "name": self.folder.name}
            named["id"] = re.sub(r"[^\w.-]", "-", self.folder.name)
            wandb.init(**named, resume="allow", config=config, allow_val_change=True, sync_tensorboard=True)
        step = self.progress["global_step"]
        with writing(option, self.folder):
            self.writer = SummaryWriter(self.folder, purge_step=step + 1 if step else None)
        if not self.checkpoint:
            self.envs.reset()
            rows = [f"|{name}|{value}|" for name, value in config.items() if name != "stretches"]
            self.writer.add_text("settings", "\n".join(["|setting|value|", "|-|-|", *rows]))
        hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]  # nohup has it ignored
        self.handlers = {s: signal.signal(s, self.ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM, *hangup)}
        self.bar = tqdm(total=self.args.total_timesteps, initial=step, unit="step", unit_scale=True)
        self.begin = time.perf_counter() - self.progress["seconds"]
        return self

    def write_config(self) -> dict:
        """config.json: the settings that the run began with; and of each stretch, one for every start of this program,
        its first step, the settings that were others by then, and what it ran on. A stretch never saved drops out."""
        settings = dataclasses.asdict(self.args) | {"resume": ""}
        versions = {p: importlib.metadata.version(p) for p in PACKAGES if importlib.util.find_spec(p)}
        ran_on = {"device": str(self.device), "git_commit": git_commit(), "versions": versions}
        config = settings | {"script": Path(__file__).stem} | ran_on | {"stretches": []}
        file, step = self.folder / "config.json", 0
        if self.checkpoint:
            step = self.checkpoint["progress"]["global_step"]
            with contextlib.suppress(OSError, ValueError, TypeError):  # else what it began with is not known any more
                config |= json.loads(file.read_text())
        changed = {name: value for name, value in settings.items() if config[name] != value}
        kept = [stretch for stretch in config["stretches"] if stretch["step"] < step]
        config["stretches"] = [*kept, {"step": step, "changed": changed} | ran_on]
        before = file.read_bytes()
        try:
            file.write_text(json.dumps(config, indent=2) + "\n")  # in its place, since it is locked
        except OSError:
            file.write_bytes(before)
            raise
        cells = [f"  {name:<18} {value!s:<16}" for name, value in settings.items() if value not in ("", None)]
        with telling(1):
            print(f"{self.folder}, from step {step:,}" if step else self.folder)
            print("\n".join("".join(cells[i : i + 3]).rstrip() for i in range(0, len(cells), 3)), flush=True)
        return config

    def __exit__(self, kind, error, trace):
        disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
        saved = kind not in (None, GamesFailed) or self.save()
        with telling():
            self.bar.close()
        with contextlib.suppress(OSError):  # its thread fails again where the disk is full
            self.writer.close()
        self.envs.close()
        self.lock.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if disk or not saved:
            sys.exit(f"{self.folder} cannot be written{f', {error}' if disk else ''}; the last checkpoint is as it was")
        if kind is GamesFailed:
            sys.exit(f"{error}; go on with --resume {shlex.quote(str(self.folder))}")
        if kind is None and self.progress["global_step"] >= self.args.total_timesteps:
            score = f"{SCORE.replace('_', ' ')} {self.scores['greedy']:.3f}"
            with telling():
                print(f"{self.folder} is complete; the last greedy {score}", file=sys.stderr)
        elif kind is None:
            folder = shlex.quote(str(self.folder))
            with telling():
                print(f"stopped by signal {self.stop_signal}; go on with --resume {folder}", file=sys.stderr)
            sys.exit(128 + self.stop_signal)

    def ask_to_stop(self, number, frame):
        self.stop_signal = number
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        text = "\nstopping: saves at the end of this iteration or evaluation; a second signal ends it at once\n"
        with telling():
            os.write(2, text.encode())  # print must not interrupt itself

    def go_back(self):
        """To where the checkpoint was written; evaluations after it will be done again."""
        self.progress = self.checkpoint["progress"]
        self.envs.crashes = self.progress["crashes"]
        torch.set_rng_state(self.checkpoint["rng"])
        if self.device.type == "cuda" and "cuda_rng" in self.checkpoint:
            torch.cuda.set_rng_state(self.checkpoint["cuda_rng"])
        self.envs.set_state(self.checkpoint["envs"])
        self.hidden |= {name: states.to(self.device) for name, states in self.checkpoint["hidden"].items()}
        if self.evaluations.exists():
            lines, steps = self.evaluations.read_bytes().splitlines(), {}
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # it was cut off, or is damaged
                    steps[line] = int(json.loads(line)["step"])
            if len(steps) < len(lines):
                print(f"{self.evaluations}: left out {len(lines) - len(steps)} damaged lines of {len(lines)}")
            kept = [line + b"\n" for line, step in steps.items() if step <= self.progress["global_step"]]
            replace_file(self.evaluations, b"".join(kept))

    def save(self) -> bool:
        """Whether it worked; with the next one there may be room on the disk again."""
        self.progress["crashes"] = self.envs.crashes
        contents = {"args": dataclasses.asdict(self.args) | {"resume": ""}, "script": Path(__file__).stem}
        contents |= {"learned": {name: part.state_dict() for name, part in self.learned.items()}}
        contents |= {"hidden": self.hidden, "envs": self.envs.get_state(), "progress": self.progress}
        contents |= {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            contents["cuda_rng"] = torch.cuda.get_rng_state()
        buffer = io.BytesIO()
        torch.save(contents, buffer)
        try:
            replace_file(self.folder / "checkpoint.pt", buffer.getbuffer())
        except OSError as error:
            with telling():
                print(f"\n{self.folder} was not saved: {error.strerror}", file=sys.stderr)
            return False
        return True

    def goes_on(self) -> bool:
        """Whether there is another iteration; its time begins."""
        self.lap_begin, self.seconds = time.perf_counter(), {}
        return self.progress["global_step"] < self.args.total_timesteps and not self.stop_signal

    def lap(self, name: str):
        """The seconds since the last call, or the iteration's begin, were for this part of it."""
        now = time.perf_counter()
        self.seconds[name], self.lap_begin = now - self.lap_begin, now

    def note(self, group: str, **numbers):
        """Numbers of which the iteration's mean will be logged, as group/name."""
        for name, number in numbers.items():
            self.noted.setdefault(f"{group}/{name}", []).append(torch.as_tensor(number, device=self.device).detach())

    def log(self, steps: int, episodes: list[dict[str, float]]):
        """An iteration is over: what was noted, the episodes that ended in it, and its speed."""
        means = torch.stack([torch.stack(values).float().mean() for values in self.noted.values()]).tolist()
        scalars = dict(zip(self.noted, means, strict=True))
        if not all(math.isfinite(mean) for mean in means):
            number = self.progress["iteration"] + 1
            sys.exit(f"iteration {number}: a loss or gradient is not finite; the last checkpoint is as it was")
        self.noted, self.steps = {}, steps
        self.progress["iteration"] += 1
        self.progress["global_step"] += steps
        self.progress["seconds"] = time.perf_counter() - self.begin
        scalars |= {f"time/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        scalars["charts/SPS"] = steps / sum(self.seconds.values())
        scalars |= {"charts/learning_rate": self.args.learning_rate, "charts/crashes": self.envs.crashes}
        if episodes:
            summary = summarize(episodes)
            self.scores["sampled"] = summary[SCORE]
            scalars |= {f"charts/{name}": value for name, value in summary.items()}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.progress["global_step"])
        scores = ", ".join(f"{kind} {score:.2f}" for kind, score in self.scores.items())
        with telling():
            self.bar.update(steps)
            self.bar.set_postfix_str(f"SPS {scalars['charts/SPS']:.0f}, {SCORE.replace('_', ' ')}: {scores}")

    def is_due(self, every: int) -> bool:
        """Whether the iteration passed a multiple of `every` steps, or the end of the run."""
        before, now = self.progress["global_step"] - self.steps, self.progress["global_step"]
        return before // every < now // every or now >= self.args.total_timesteps

    def log_evaluation(self, episodes: list[dict[str, float]]):
        summary = summarize(episodes)
        self.scores["greedy"] = summary[SCORE]
        step, seconds = self.progress["global_step"], round(self.progress["seconds"], 2)
        record = {"step": step, "seconds": seconds, SCORE: summary[SCORE]}
        record |= {name: [episode[number] for episode in episodes] for name, number in RAW.items()}
        with self.evaluations.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in summary.items():
            self.writer.add_scalar(f"eval/{name}", value, step)


@contextlib.contextmanager
def writing(option: str, path):
    """What cannot be written in here is an error in `option`."""
    try:
        yield
    except OSError as error:
        usage_error(option, path, f"cannot be written: {error.strerror}")


@contextlib.contextmanager
def telling(stream: int = 2):
    """What is told, on stderr (2) or stdout (1): where that fails, as after Ctrl-C in `... 2>&1 | tee log`, the run
    goes on, and tells nothing there any more."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def replace_file(path: Path, contents):
    """By way of a temporary file that is then renamed: a crash or a full disk leaves the old one."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(contents)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def new_folder(name: str) -> Path:
    """runs/{name}__{time}, made here: where another run has started in the same second this one waits for the next."""
    with writing("new run", f"runs/{name}"):
        Path("runs").mkdir(exist_ok=True)
    while True:
        folder = Path("runs") / f"{name}__{int(time.time())}"
        with writing("new run", folder), contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        time.sleep(0.1)


def lock_run(folder: Path):
    """From here on no other process may work on this run, until the result is closed or this process ends."""
    lock = (folder / "config.json").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        usage_error("--resume", folder, "another process is at work on it")
    return lock


def git_commit() -> str | None:
    """Of the repository that the script is in, with -dirty if something there was changed."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        found = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    except OSError:
        return None  # there is no git
    return found.stdout.strip() or None


def saved_in(args: Args) -> tuple[Path, str]:
    """The checkpoint that --resume or --eval-only asks for, and the option to blame if it is no good."""
    if args.eval_only:
        if not args.checkpoint or args.resume:
            usage_error("--eval-only", args.eval_only, "needs --checkpoint FILE, and no --resume")
        if Path(args.checkpoint).is_dir():
            usage_error("--checkpoint", args.checkpoint, f"is a folder; give {Path(args.checkpoint, 'checkpoint.pt')}")
        return Path(args.checkpoint), "--checkpoint"
    for option, value in (("--checkpoint", args.checkpoint), ("--out", args.out)):
        if value:
            usage_error(option, value, "is for --eval-only; to go on with a run use --resume RUN_DIR")
    if Path(args.resume).is_file():
        usage_error("--resume", args.resume, f"is a file; give its folder, {Path(args.resume).parent}")
    if args.resume and not Path(args.resume, "checkpoint.pt").is_file():
        usage_error("--resume", args.resume, "must be a run directory with a checkpoint.pt in it")
    return Path(args.resume, "checkpoint.pt"), "--resume"


def checked_words(argv: list[str]) -> list[str]:
    """The command line for tyro, with 1e6 written out. What tyro would refuse on several lines ends here in one."""
    words = [word for text in argv for word in (text.split("=", 1) if text.startswith("--") else [text])]
    kinds = {f"--{field.name.replace('_', '-')}": field.type for field in dataclasses.fields(Args)}
    kinds |= {f"--no-{option[2:]}": bool for option, kind in kinds.items() if kind is bool}
    checked = []
    while words:
        word = words.pop(0)
        option = word.replace("_", "-")
        if option not in (*kinds, "--help", "-h"):
            meant = difflib.get_close_matches(option, kinds, 1)
            usage_error("option", word, "is none of those in --help" + (f"; did you mean {meant[0]}?" if meant else ""))
        value = words.pop(0) if words and not words[0].startswith("--") else None
        kind = kinds.get(option, bool)
        choices = [choice for choice in getattr(kind, "__args__", ()) if type(choice) is str]
        if kind is bool and value is not None:
            switch = option.replace("--no-", "--")
            usage_error(option, value, f"is a switch, {switch} or --no-{switch[2:]}")
        if kind is not bool and (value is None or (value == "" and option in ("--resume", "--checkpoint"))):
            usage_error(option, "", "needs a value")
        if choices and value not in choices:
            usage_error(option, value, one_of(value, choices))
        if kind in (int, float) or (kind in (int | None, float | None) and value != "None"):
            whole = kind in (int, int | None)
            try:
                number = float(value)
            except ValueError:
                number = None
            if number is None or (whole and not number.is_integer()):
                usage_error(option, value, f"must be a {'whole ' if whole else ''}number")
            value = str(int(number)) if whole else value
        checked += [option] if value is None else [option, value]
    return checked


def parse_args(argv=None) -> Args:
    """The command line; with --resume or --eval-only the run's own settings take the place of the defaults."""
    words = checked_words(sys.argv[1:] if argv is None else argv)
    args = tyro.cli(Args, args=words)
    path, option = saved_in(args)
    if not (args.resume or args.eval_only):
        return args
    checkpoint = read_checkpoint(path, option)
    if args.resume and checkpoint["script"] != Path(__file__).stem:
        usage_error(option, path, f"is of {checkpoint['script']}, not of {Path(__file__).stem}")
    if args.resume and "progress" not in checkpoint:
        usage_error(option, path, "is a policy, without the run that it comes from")
    try:
        saved = Args(**checkpoint["args"])
    except TypeError:
        usage_error(option, path, f"was written by another script than {Path(__file__).name}, or a later version of it")
    args = tyro.cli(Args, default=saved, args=words)
    for name in (*TASK, *GAMES) if args.resume else TASK:
        if getattr(args, name) != getattr(saved, name):
            usage_error(f"--{name.replace('_', '-')}", getattr(args, name), f"{path} is of {getattr(saved, name)}")
    return args


def complete_args(args: Args) -> Args:
    """Fill in what depends on the task and the machine, and check the options."""
    partitions = PARTITIONS[args.scenario]
    partition = args.partition or partitions[0]
    if partition not in partitions:
        usage_error("--partition", partition, f"with --scenario {args.scenario} it {one_of(partition, partitions)}")
    n = 2 if partition == "9|8" else int(partition.split("x")[0])
    defaults = dict(zip(TABLE_9_COLUMNS, TABLE_9[args.scenario], strict=True)) | {
        "partition": partition,
        "agent_blocks": TABLE_9_BLOCKS.get((args.scenario, partition), n),
        "num_steps": max(1, 4000 // max(1, args.num_envs)),
        "torch_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    missing = {name: defaults[name] for name, value in vars(args).items() if value is None}
    args = dataclasses.replace(args, **missing)
    check_args(args)
    versions = ("v2" if args.scenario == "HumanoidStandup" else "v3", "v4", "v5")
    if args.env_version not in versions:
        usage_error(
            "--env-version",
            args.env_version,
            f"with --scenario {args.scenario} it {one_of(args.env_version, versions)}",
        )
    return args


def check_args(args: Args):
    """What holds for all options of a kind."""
    limits = {"seed": (0, 2147483), "torch_threads": (1, 1024), "hidden_size": (1, 8192)}
    limits |= dict.fromkeys(("num_envs", "eval_episodes"), (1, 65536))
    limits |= dict.fromkeys(("gamma", "gae_lambda", "clip_adaptation", "local_ratio"), (0, 1))
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in limits:
            low, high = limits[name]
            if not low <= value <= high:
                usage_error(option, value, f"must be within {low} and {high}")
        elif type(value) is int and value < 1:
            limit = ", and at most the number of agents" if name == "agent_blocks" else ""
            usage_error(option, value, "must be at least 1" + limit)
        elif name == "worker_timeout" and not 0 < value <= 1e6:
            usage_error(option, value, "must be a number above 0, and at most 1e6")
        elif name == "huber_delta" and not 0 < value < math.inf:
            usage_error(option, value, "must be a number above 0")
        elif type(value) is float and not 0 <= value < math.inf:
            usage_error(option, value, "must be a number of at least 0")
    if not re.fullmatch(r"[\w.=+-]+", args.exp_name) or "__" in args.exp_name:
        usage_error("--exp-name", args.exp_name, "must be of letters, digits and . = + - _, without __")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if getattr(args, "compile", False) and not shutil.which(compiler):
        usage_error("--compile", args.compile, f"needs a C++ compiler, {compiler}; the variable CXX may name another")
    if args.track and not args.eval_only:
        if importlib.util.find_spec("wandb") is None:
            usage_error("--track", args.track, "needs Weights & Biases: pip install wandb==0.31.0")
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            usage_error("--track", args.track, "needs `wandb login`, or WANDB_MODE=offline")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run takes it over: Ctrl-C leaves no traceback
    main(parse_args())
