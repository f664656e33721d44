# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "jax==0.10.2", "jaxlib==0.10.2", "jaxmarl==0.2.0",
#   "tyro==1.0.17", "tensorboard==2.20.0", "tqdm==4.70.1"]
# ///
"""A2PO (agent-by-agent policy optimization, Wang et al., ICLR 2023) on SMAC, with parameters shared by all agents.

The paper's Algorithm 2: a rollout, then epochs, in each blocks of agents one after the other (semi-greedy order), every
update with PreOPC (Eq. 2), the twice-clipped objective (Eq. 6) and adaptive clip. Without StarCraft II it plays SMAX.

    python a2po_smac.py --map 3s5z
    python a2po_smac.py --eval-only --checkpoint runs/<run>/checkpoint.pt

Read to the end of `main`: that is the algorithm, with MAPPO's networks and value loss; what stands below makes it run.
"""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import importlib.metadata
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
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
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# -------------------------------------------------------------------------------------------------------- settings
@dataclasses.dataclass
class Settings:
    """The game and the algorithm; `Args`, in the section "the run", adds what only a run needs."""

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
    """P (Table 7 by map); ceil(P / blocks) passes over the rollout, each with one step per block (Algorithm 2)"""
    critic_steps: int = 1
    """steps of the critic in an update, where the policy takes one (authors' A2PO: 2 on most tasks)"""
    agent_blocks: int | None = None
    """number of blocks; the agents of a block are updated together (Table 7 by map; at most one block per agent)"""
    cumulative_blocks: bool = False
    """every update trains earlier blocks again (authors' scripts; 1.5 times the seconds, learns no faster)"""
    agent_order: Literal["semi-greedy", "greedy", "random", "cyclic", "reverse-greedy", "reverse-semi-greedy"] = (
        "semi-greedy"
    )
    """order of the agents' updates (Sec. 4; the others are the paper's ablations)"""
    preopc: bool = True
    """correct advantages for the policies that have changed, Eq. (2); without it they are plain GAE"""
    preopc_targets: bool = True
    """the critic's targets are the corrected advantages plus V (Algorithms 1, 2); else GAE's (authors' code)"""
    clip_adaptation: float = 0.5
    """c of the adaptive clip (appendix B.4); 1 switches it off"""
    recurrent: bool = True
    """keep the GRU's state from step to step, else it is zeroed before each (never kept where MAPPO has no GRU)"""
    chunk_length: int = 10
    """steps of back-propagation through time (MAPPO default)"""
    ent_coef: float = 0.01
    """weight of the entropy bonus (MAPPO default)"""
    huber_delta: float = 10.0
    """where the value loss turns from square to linear, in units of the normalised return (MAPPO default)"""
    max_grad_norm: float = 10.0
    """gradients are scaled down to this norm, actor and critic apart (MAPPO default)"""
    agent_id: bool = False
    """agents see their number, one-hot, as in the authors' environments; two seeds on SMAX 3s5z learned no faster"""
    hidden_size: int = 64
    """width of all hidden layers and of the GRU (MAPPO default)"""
    deep: bool = False
    """three layers before the GRU and one after it, as in the authors' code; else two and none (MAPPO default)"""


# Table 7; the blocks are for algorithms that update agents one after the other. Other maps: as 3s5z.
TABLE_7_COLUMNS = ("agent_blocks", "update_epochs", "gae_lambda", "clip_coef")
TABLE_7 = {
    "MMM": (3, 12, 0.95, 0.2),
    "3s_vs_5z": (3, 15, 0.95, 0.05),
    "2c_vs_64zg": (2, 5, 0.95, 0.2),
    "3s5z": (3, 8, 0.95, 0.2),
    "5m_vs_6m": (2, 10, 0.93, 0.05),
    "8m_vs_9m": (5, 15, 0.95, 0.05),
    "10m_vs_11m": (2, 10, 0.97, 0.2),
    "6h_vs_8z": (2, 8, 0.99, 0.2),
    "3s5z_vs_3s6z": (2, 5, 0.90, 0.2),
    "MMM2": (2, 5, 0.95, 0.2),
    "27m_vs_30m": (3, 5, 0.95, 0.2),
    "corridor": (2, 5, 0.95, 0.2),
    **dict.fromkeys(("2m_vs_1z", "2s_vs_1sc"), (2, 8, 0.95, 0.2)),  # not in Table 7: two agents
}
NOT_RECURRENT = ("3s_vs_4z", "3s_vs_5z", "6h_vs_8z", "corridor")  # maps where MAPPO has no GRU, by its launch scripts


# ------------------------------------------------------------------------------------------------------- equations
def preopc_advantages(rewards, values, terminated, done, joint_ratio, gamma, gae_lambda):
    """Preceding-agent off-policy correction, Eq. (2), as a backward recursion; O(T).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lambda min(1, rho_{t+1}) A_{t+1}        (at t + 1, as the action at t is given)

    rewards (T, N, n): T steps, N environments, n agents; values (T+1, N, n), units of return; terminated, done (T, N):
    a terminal state is worth nothing, a time limit (done, not terminated) only ends the trace; joint_ratio (T, N),
    rho = pi_hat / pi of the joint action, with pi_hat as it is by now. Returns (T, N, n). With rho = 1 this is GAE.
    """
    terminated, done = terminated.float().unsqueeze(-1), done.float().unsqueeze(-1)
    deltas = rewards + gamma * (1 - terminated) * values[1:] - values[:-1]
    decay = gamma * gae_lambda * (1 - done[:-1]) * joint_ratio[1:].clamp(max=1.0).unsqueeze(-1)
    advantages = deltas.clone()
    for t in reversed(range(len(decay))):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages


def agent_order(scores, rule, generator):
    """Order in which the agents are updated (Sec. 4): scores (n,) = E|A_i| -> list of agent indices.

    semi-greedy: even positions, from 0, take the remaining agent with the largest score, odd ones a random one (as the
    authors' code; the paper's k, from 1, would start at random). The reverse rules take the smallest score.
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
    """Clipping parameter of the k-th agent or block of n (Sec. 4): eps_k = eps c + eps (1 - c) k / n, k = 1..n."""
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


def values_for_the_dead(values, alive):
    """Values (..., n); those of dead or sent-off agents, not trained, are replaced by the living's mean (ours)."""
    return torch.where(alive.bool(), values, masked_mean(values, alive, dim=-1).unsqueeze(-1))


# -------------------------------------------------------------------------------------------------------- networks
def layer_init(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weights and zero bias (MAPPO default)."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def hidden_layer(inputs: int, outputs: int) -> list[nn.Module]:
    return [layer_init(nn.Linear(inputs, outputs)), nn.ReLU(), nn.LayerNorm(outputs)]


class RecurrentNetwork(nn.Module):
    """LayerNorm, ReLU layers, GRU, with LayerNorm after each, and a linear head (MAPPO default). Actor and critic."""

    def __init__(self, inputs: int, outputs: int, hidden_size: int, gain: float, recurrent=True, deep=False):
        super().__init__()
        self.recurrent = recurrent  # else the GRU's state is zeroed before every step
        before, after = hidden_layer(inputs, hidden_size) + hidden_layer(hidden_size, hidden_size), []
        if deep:  # three before the GRU and one after it (authors' code)
            before += hidden_layer(hidden_size, hidden_size)
            after = hidden_layer(hidden_size, hidden_size)
        self.base = nn.Sequential(nn.LayerNorm(inputs), *before)
        self.gru = nn.GRUCell(hidden_size, hidden_size)
        for name, parameter in self.gru.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)
        self.head = nn.Sequential(nn.LayerNorm(hidden_size), *after, layer_init(nn.Linear(hidden_size, outputs), gain))

    def forward(self, inputs, hidden, start):
        """inputs (L, B, inputs), hidden (B, H) before the first step, start (L, B), 1 where an episode begins.

        Returns outputs (L, B, outputs) and the GRU's state after each step (L, B, H).
        """
        keep = (1.0 - start.unsqueeze(-1)) * self.recurrent
        states = []
        for t, features in enumerate(self.base(inputs)):
            hidden = self.gru(features, hidden * keep[t])
            states.append(hidden)
        states = torch.stack(states)
        return self.head(states), states


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


def masked_policy(logits, action_mask) -> Categorical:
    """Unavailable actions get probability zero; with -inf for -1e10 NaN would come where none is available."""
    return Categorical(logits=torch.where(action_mask.bool(), logits, -1e10), validate_args=False)


# ---------------------------------------------------------------------------------------- networks over a rollout
@torch.no_grad()
def act(actor, seen, hidden, greedy=False):
    """A step of all agents from what is `seen` (obs, action_mask, start) and the GRU's state (N, n, H) before it.

    Returns actions and their log-probabilities, (N, n), and the GRU's state after it.
    """
    start = seen["start"].unsqueeze(-1).expand(hidden.shape[:2])
    logits, states = actor(seen["obs"].flatten(0, 1)[None], hidden.flatten(0, 1), start.flatten()[None])
    policy = masked_policy(logits.view(seen["action_mask"].shape), seen["action_mask"])
    actions = policy.mode if greedy else policy.sample()
    return actions, policy.log_prob(actions), states.view(hidden.shape)


@torch.no_grad()
def rollout_values(critic, inputs, hidden, start):
    """The critic's outputs (T+1, N, n) for all steps at once, and its GRU's state before each step (T+1, N, n, H)."""
    shape = inputs.shape[:3]
    start = start.unsqueeze(-1).expand(shape)
    values, states = critic(inputs.flatten(1, 2), hidden.flatten(0, 1), start.flatten(1))
    return values.view(shape), torch.cat([hidden[None], states.view(*shape, -1)[:-1]])


def run_chunks(network, inputs, hidden, rollout, agents):
    """A network's outputs (T, N, k, outputs) for the k agents at hand, for back-propagation through time.

    inputs (T, N, n, inputs) and hidden (T, N, n, H) are everyone's; what they have beyond step T is not used. Gradients
    go back through chunks of the rollout, each from the GRU's state that was stored before it. Chunks without a sample
    are left out; their outputs are zeros.
    """
    T, N, n = rollout.sample.shape
    # Where the steps of each chunk stand among all T * N * n: (chunk_length, chunks with a sample).
    places = torch.arange(T * N * n, device=agents.device).view(-1, rollout.chunk_length, N, n)[..., agents]
    places = places.transpose(0, 1).flatten(1)
    places = places[:, rollout.sample.flatten()[places].any(0)]

    def fold(x):  # (T, N, n, ...) -> (chunk_length, chunks, ...)
        return x.flatten(0, 2).index_select(0, places.flatten()).unflatten(0, places.shape)

    start = fold(rollout.start.unsqueeze(-1).expand(-1, -1, n))
    outputs, _ = network(fold(inputs), hidden.flatten(0, 2)[places[0]], start)
    whole = outputs.new_zeros(T * N * n, outputs.shape[-1])
    whole = whole.index_copy(0, places.flatten(), outputs.flatten(0, 1)).unflatten(0, (T, N, n))
    return whole.index_select(2, agents)


def policy_change(actor, rollout, agents):
    """The policy now against the policy that sampled, for the k agents at hand.

    Returns log r (T, N, k), r = new / old probability of the action taken, with 0 where there is no sample; and the
    entropy of the policy now (T, N, k).
    """
    logits = run_chunks(actor, rollout.obs, rollout.actor_hidden, rollout, agents)
    policy = masked_policy(logits, rollout.action_mask[:-1, :, agents])
    log_ratio = policy.log_prob(rollout.actions[..., agents]) - rollout.log_probs[..., agents]
    return (log_ratio * rollout.sample[..., agents]).clamp(-20, 20), policy.entropy()


# ------------------------------------------------------------------------------------------------------------ main
def main(args: "Args"):
    args = complete_args(args)
    torch.set_num_threads(1)  # for single steps: threads that wait would take the cores from the simulator
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    gamma, gae_lambda = args.gamma, args.gae_lambda
    envs = make_envs(args)
    n, obs_dim = envs.single_observation_space["obs"].shape
    _, n_actions = envs.single_observation_space["action_mask"].shape
    (state_dim,) = envs.single_observation_space["state"].shape
    if args.agent_blocks > n:
        usage_error("--agent-blocks", args.agent_blocks, f"must be within 1 and {n}, the number of agents")

    actor = RecurrentNetwork(obs_dim, n_actions, args.hidden_size, 0.01, args.recurrent, args.deep).to(device)
    critic = RecurrentNetwork(state_dim + obs_dim, 1, args.hidden_size, 1.0, args.recurrent, args.deep).to(device)
    normalizer = ValueNormalizer().to(device)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    learned = {"actor": actor, "critic": critic, "normalizer": normalizer}
    learned |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    hidden = {name: torch.zeros(args.num_envs, n, args.hidden_size, device=device) for name in ("actor", "critic")}
    if args.compile:
        actor.compile(dynamic=True), critic.compile(dynamic=True)
    run = Run(args, envs, device, learned, hidden)  # counts the steps, logs, saves, resumes
    if args.eval_only:
        return run.report(evaluate(actor, envs, args.eval_episodes, device))

    with run:
        while run.goes_on():
            # ------------------------------------------------------------------------------------------- rollout
            steps = []
            for _ in range(args.num_steps):
                step = envs.look(device)  # obs, state, action_mask, alive, start, final: name -> (N, ...)
                step["actor_hidden"] = hidden["actor"]
                step["actions"], step["log_probs"], hidden["actor"] = act(actor, step, hidden["actor"])
                step["rewards"], step["terminated"], crashed = envs.play(step["actions"])
                step["final"] = torch.max(step["final"], crashed)  # a game that crashed: no sample, the trace ends
                steps.append(step)
            steps.append(envs.look(device))  # the observation after the last step, for V(s_{t+1})

            # Time-major: (T, N, n, ...), what is seen T + 1. final is 1 at an episode's last look, done a step earlier.
            rollout = SimpleNamespace(chunk_length=args.chunk_length)
            for name in steps[0]:
                setattr(rollout, name, torch.stack([step[name] for step in steps if name in step]))
            rollout.sample = rollout.alive[:-1] * (1 - rollout.final[:-1]).unsqueeze(-1)
            rewards, terminated, done = rollout.rewards, rollout.terminated, rollout.final[1:]

            torch.set_num_threads(args.torch_threads)
            # Values in units of return, by the normaliser before its update; the critic sees the state and obs.
            critic_inputs = torch.cat([rollout.state.unsqueeze(2).expand(-1, -1, n, -1), rollout.obs], -1)
            old_values, critic_hidden = rollout_values(critic, critic_inputs, hidden["critic"], rollout.start)
            values = values_for_the_dead(normalizer.denormalize(old_values), rollout.alive)
            hidden["critic"] = critic_hidden[-1]  # before the last look, which the next rollout begins with
            run.lap("rollout")

            # -------------------------------------------------------------------------------------------- update
            # No policy has changed yet: Eq. (2) is GAE. For the order, the normaliser, the log, --no-preopc-targets.
            unchanged = torch.ones_like(done)
            advantages = preopc_advantages(rewards, values, terminated, done, unchanged, gamma, gae_lambda)
            targets = advantages + values[:-1]
            normalizer.update(targets[rollout.sample.bool()])
            run.note("losses", explained_variance=explained_variance(advantages, targets, rollout.sample))

            # The order of the agents by E|A_i|, once an iteration (appendix B.1), cut into blocks.
            scores = masked_mean(advantages.abs(), rollout.sample, dim=(0, 1))
            order = torch.tensor(agent_order(scores.cpu(), args.agent_order, torch.default_generator), device=device)
            blocks = order.tensor_split(args.agent_blocks)
            if args.cumulative_blocks:
                blocks = [torch.cat(blocks[: k + 1]) for k in range(len(blocks))]

            # Algorithm 2, with blocks for agents: ceil(P / blocks) epochs, and in each the blocks one after the other.
            for _ in range(math.ceil(args.update_epochs / len(blocks))):
                for position, agents in enumerate(blocks, start=1):
                    # Parameters are shared: every update moves all policies, so everyone's ratio is needed anew.
                    others = order[~torch.isin(order, agents)]
                    log_ratio, entropy = policy_change(actor, rollout, agents)
                    with torch.no_grad():
                        others_log_ratio, _ = policy_change(actor, rollout, others)
                    joint_log_ratio = log_ratio.detach().sum(-1) + others_log_ratio.sum(-1)

                    # Eq. (2): advantages, corrected for all policies that have changed; the values stay the rollout's.
                    joint_ratio = joint_log_ratio.clamp(-20, 20).exp() if args.preopc else unchanged
                    advantages = preopc_advantages(rewards, values, terminated, done, joint_ratio, gamma, gae_lambda)
                    targets = advantages + values[:-1] if args.preopc_targets else targets  # A + V

                    # Eq. (6) with the clip of this position; the preceding agents are everyone but i, block-mates too.
                    ratio, sample = log_ratio.exp(), rollout.sample[..., agents]
                    preceding_ratio = (joint_log_ratio.unsqueeze(-1) - log_ratio.detach()).clamp(-20, 20).exp()
                    eps_k = adaptive_clip(args.clip_coef, position, len(blocks), args.clip_adaptation)
                    normalized_advantages = normalize_advantages(advantages[..., agents], sample)
                    surrogate = clipped_surrogate(ratio, preceding_ratio, normalized_advantages, eps_k)
                    policy_loss = -masked_mean(surrogate, sample)
                    entropy = masked_mean(entropy, sample)
                    actor_optimizer.zero_grad()
                    (policy_loss - args.ent_coef * entropy).backward()
                    actor_norm = nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
                    actor_optimizer.step()

                    normalized_targets, old = normalizer.normalize(targets[..., agents]), old_values[:-1, :, agents]
                    for _ in range(args.critic_steps):
                        new_values = run_chunks(critic, critic_inputs, critic_hidden, rollout, agents).squeeze(-1)
                        losses = value_loss(new_values, old, normalized_targets, args.clip_coef, args.huber_delta)
                        critic_loss = masked_mean(losses, sample)
                        critic_optimizer.zero_grad()
                        critic_loss.backward()
                        critic_norm = nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
                        critic_optimizer.step()
                    scores[agents] = masked_mean(advantages[..., agents].abs(), sample, dim=(0, 1))  # only logged
                    ratios = ratio_statistics(log_ratio, preceding_ratio, sample, eps_k)
                    run.note("losses", policy_loss=policy_loss, value_loss=critic_loss, entropy=entropy, **ratios)
                    run.note("losses", actor_grad_norm=actor_norm, critic_grad_norm=critic_norm)
                    run.note(f"a2po/position_{position}", **ratios)
            by_size = scores.argsort(descending=True, stable=True)  # ranks by E|A_i| at i's last update (Fig. 16)
            run.note("a2po/position_of_agent", **{str(i): place for place, i in enumerate(order.tolist(), start=1)})
            run.note("a2po/rank_of_agent", **{str(i): rank for rank, i in enumerate(by_size.tolist(), start=1)})
            run.lap("update")
            torch.set_num_threads(1)

            # --------------------------------------------------------------------------------- log, evaluate, save
            run.log(int((1 - rollout.final[:-1]).sum()), envs.finished())
            if run.is_due(args.eval_every):
                run.log_evaluation(evaluate(actor, envs, args.eval_episodes, device))
            if run.is_due(args.save_every):
                run.save()


# ------------------------------------------------------------------------------------- evaluation, what is logged
def evaluate(actor, envs, episodes: int, device) -> list[dict[str, float]]:
    """Greedy episodes from new starts, each with what `Episodes.finished` says of it; then the games as they were.

    Every environment plays a fixed share, so that short episodes are not favoured; crashed ones are played again.
    Where games cannot be saved, as those of StarCraft II, training goes on with new ones.
    """
    training = envs.get_state()
    envs.reset()
    share = np.full(envs.num_envs, episodes // envs.num_envs)
    share[: episodes % envs.num_envs] += 1
    hidden = torch.zeros(*envs.action_space.shape, actor.gru.hidden_size, device=device)
    played = []
    while (share > 0).any():
        actions, _, hidden = act(actor, envs.look(device), hidden, greedy=True)
        envs.play(actions)
        for episode in envs.finished():
            if share[episode["env"]] > 0:
                share[episode["env"]] -= 1
                played.append(episode)
    envs.set_state(training)
    return played


def summarize(episodes: list[dict[str, float]]) -> dict[str, float]:
    """Means over episodes, by the names that they are logged under."""
    won, returns, lengths = ([e[name] for e in episodes] for name in ("won", "return", "length"))
    return {"win_rate": np.mean(won), "episodic_return": np.mean(returns), "episodic_length": np.mean(lengths)}


def explained_variance(advantages, targets, sample):
    """1 - Var(target - value) / Var(target); 0 where the targets do not vary."""
    advantages, targets = advantages[sample.bool()], targets[sample.bool()]
    return (1 - advantages.var() / targets.var()).nan_to_num(0, 0, 0)


@torch.no_grad()
def ratio_statistics(log_ratio, preceding_ratio, sample, clip_coef):
    """Of the ratios in an update: the mean, the approximate KL divergence, and the shares of what is clipped."""
    ratio, preceding = log_ratio.exp(), preceding_ratio.clamp(1 - clip_coef / 2, 1 + clip_coef / 2)
    return {
        "ratio": masked_mean(ratio, sample),
        "approx_kl": masked_mean(ratio - 1 - log_ratio, sample),
        "clipfrac": masked_mean(((ratio * preceding - 1).abs() > clip_coef).float(), sample),
        "preceding_clipfrac": masked_mean((preceding != preceding_ratio).float(), sample),
    }


# ---------------------------------------------------------------------------------------------------- environments
SMAC_MAPS = (
    "3m 8m 25m 5m_vs_6m 8m_vs_9m 10m_vs_11m 27m_vs_30m MMM MMM2 2s3z 3s5z 3s5z_vs_3s6z 3s_vs_3z 3s_vs_4z 3s_vs_5z "
    "1c3s5z 2m_vs_1z corridor 6h_vs_8z 2s_vs_1sc so_many_baneling bane_vs_bane 2c_vs_64zg"
).split()
SMAX_MAPS = (
    "3m 8m 25m 2s3z 3s5z 5m_vs_6m 8m_vs_9m 10m_vs_11m 27m_vs_30m 3s5z_vs_3s6z 3s_vs_5z 6h_vs_8z corridor "
    "smacv2_5_units smacv2_10_units smacv2_20_units"
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
    home = Path(os.environ.get("SC2PATH", "~/StarCraftII")).expanduser()
    if not any(home.glob("Versions/Base*/SC2*")):
        return False, f"no game (Versions/Base*/SC2_x64) in {home}, where SC2PATH or the default points"
    if not any(home.glob("Maps/SMAC_Maps/*.SC2Map")):
        return False, f"no maps (*.SC2Map) in {home / 'Maps' / 'SMAC_Maps'}"
    return True, f"smacv2 and the game in {home}"


def choose_simulator(simulator: str, map_name: str) -> str:
    """`starcraft2` or `smax` for --simulator; ends the program if there is no way to play the map."""
    found, reason = find_starcraft2()
    on_smax, on_starcraft2 = map_name in SMAX_MAPS, map_name in SMAC_MAPS or re.fullmatch(SMACV2_MAP, map_name)
    if not on_smax and not on_starcraft2:
        races = ", ".join(f"{race}_5_vs_5" for race in SMACV2_TEAMS)
        more = f", or with StarCraft II a SMACv2 map such as {races}"
        usage_error("--map", map_name, one_of(map_name, dict.fromkeys(SMAC_MAPS + SMAX_MAPS), more))
    if simulator == "starcraft2" and not on_starcraft2:
        usage_error("--map", map_name, f"with StarCraft II it {one_of(map_name, SMAC_MAPS)}")
    if simulator == "starcraft2" and not found:
        usage_error("--simulator", simulator, f"{reason}; {STARCRAFT2_HELP}")
    if simulator != "starcraft2" and not on_smax and not (simulator == "auto" and found):
        usage_error("--map", map_name, f"needs StarCraft II, SMAX lacks its units; {reason}; {STARCRAFT2_HELP}")
    if simulator == "auto":
        return "starcraft2" if found and on_starcraft2 else "smax"
    return simulator


def observation_space(n: int, obs_dim: int, state_dim: int, n_actions: int) -> gym.spaces.Dict:
    """What is seen of one game: by the n agents, by the critic, what they may do, and who is alive."""
    return gym.spaces.Dict(
        obs=gym.spaces.Box(-np.inf, np.inf, (n, obs_dim), np.float32),
        state=gym.spaces.Box(-np.inf, np.inf, (state_dim,), np.float32),
        action_mask=gym.spaces.MultiBinary((n, n_actions)),
        alive=gym.spaces.MultiBinary(n),
    )


class SMAX(gym.vector.VectorEnv):
    """JaxMARL's SMAX with the heuristic enemy: all environments in one jitted, vmapped function, next-step autoreset.

    Observations are dictionaries: `obs` (N, n, obs_dim), `state` (N, state_dim), `action_mask` (N, n, n_actions),
    `alive` (N, n). Rewards are the team's, (N,). `info["episode"]["won"]` (N,) tells of the episode that has ended.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, map_name: str, num_envs: int, seed: int):
        from unittest import mock

        import jax
        import jax.numpy as jnp

        with mock.patch("builtins.print"):  # it has a notice of environments that it does not find
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
        self.single_observation_space = observation_space(n, env.obs_size, env.state_size, n_actions)
        self.single_action_space = gym.spaces.MultiDiscrete([n_actions] * n)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self._key = self._new_key(seed)
        self._key, self._state, obs = self._reset(self._key)
        self._final = np.zeros(self.num_envs, bool)
        return {name: np.array(value) for name, value in obs.items()}, {}

    def step(self, actions):
        self._key, self._state, obs, reward, terminated, truncated, won = self._step(
            self._key, self._state, self._final, np.asarray(actions, np.int32)
        )
        reward, terminated, truncated, won = (np.array(x) for x in (reward, terminated, truncated, won))
        self._final = terminated | truncated
        obs = {name: np.array(value) for name, value in obs.items()}
        return obs, reward, terminated, truncated, {"episode": {"won": won.astype(int)}}

    def get_state(self) -> list[torch.Tensor]:
        """The whole state of the simulator, for checkpoints and to leave training untouched by an evaluation."""
        return [torch.from_numpy(np.array(x)) for x in self._tree.leaves((self._key, self._state, self._final))]

    def set_state(self, tensors: list[torch.Tensor]):
        structure = self._tree.structure((self._key, self._state, self._final))
        leaves = [self._to_jax(x.numpy()) for x in tensors]
        self._key, self._state, self._final = self._tree.unflatten(structure, leaves)
        self._final = np.asarray(self._final)


class StarCraft2:
    """A SMAC or SMACv2 map as one game for the whole team, for `Games`. Making it starts nothing, `reset` does.

    What goes wrong with the game is an error here; the worker ends, and another one takes its place.
    """

    def __init__(self, map_name: str, seed: int, build: int = 0, stream: int = 0):
        self.map_name, self.generated = map_name, re.fullmatch(SMACV2_MAP, map_name)
        self.seed, self.build, self.stream, self.made = seed, build, stream, 0
        self.game = self._build()
        sizes = self.game.get_env_info()
        n, n_actions = sizes["n_agents"], sizes["n_actions"]
        self.observation_space = observation_space(n, sizes["obs_shape"], sizes["state_shape"], n_actions)
        self.action_space = gym.spaces.MultiDiscrete([n_actions] * n)

    def _build(self):
        from smacv2.env import StarCraft2Env, StarCraftCapabilityEnvWrapper
        from smacv2.env.starcraft2 import distributions, starcraft2

        # smacv2 hands its seed to the game alone. Its draws of teams and positions are unseeded, so give it generators
        # of ours; a game that is made anew should not play the same episodes again.
        seeds = np.random.SeedSequence((self.seed, self.build, self.made, self.stream))
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
        self.made, self.running, self.episodes = self.made + 1, False, 0
        return game

    def reset(self, seed: int | None = None):
        if seed is not None:
            self.seed, self.build, self.made = seed, 0, 0
        if seed is not None or (self.running and self.episodes == 0):
            self.close()  # a seed takes a new game, and before its first episode has ended smacv2 starts a second one
            self.game = self._build()
        self.game.reset()
        self.running = True
        self.mask = np.array(self.game.get_avail_actions(), np.int8)

    def step(self, action) -> tuple[float, bool, bool, dict]:
        # smacv2 stops with an error at an unavailable action: the first available one takes its place, which is no-op
        # for the dead and stop for the living.
        available = self.mask[np.arange(len(action)), action] == 1
        reward, done, info = self.game.step(np.where(available, action, self.mask.argmax(axis=1)))
        self.mask = np.array(self.game.get_avail_actions(), np.int8)
        self.episodes += done
        out_of_time = bool(info.get("episode_limit", False))
        return float(reward), done and not out_of_time, out_of_time, {"won": int(info["battle_won"])}

    def observe(self) -> dict[str, np.ndarray]:
        if not self.generated:
            # smacv2 keeps a table of reported enemies, and one not in it (unseen so far, or dead and out of sight)
            # wipes the features of all enemies before it. In SMAC only the sight range counts: report them all.
            self.game.obs_enemies[:] = 1
        obs, state = np.array(self.game.get_obs(), np.float32), np.array(self.game.get_state(), np.float32)
        alive = 1 - self.mask[:, 0]  # no-op is for the dead only
        return {"obs": obs, "state": state, "action_mask": self.mask, "alive": alive}

    def close(self):
        self.game.close()


class Share:
    """The games of one worker process, which makes them; next-step autoreset.

    Methods return what is seen afterwards, name -> (games, ...), and a list of results.
    """

    def __init__(self, game, seeds: list[int], build: int):
        self.games = [game(seed, build) for seed in seeds]
        self.final = [True] * len(seeds)

    def observe(self) -> dict[str, np.ndarray]:
        """All games after all steps: a simulator drives what this works with out of the caches."""
        seen = [game.observe() for game in self.games]
        return {name: np.stack([one[name] for one in seen]) for name in self.games[0].observation_space}

    def reset(self, seeds: list):
        for game, seed in zip(self.games, seeds, strict=True):
            game.reset(seed)
        self.final = [False] * len(seeds)
        return self.observe(), self.final

    def step(self, actions):
        results = []
        for k, game in enumerate(self.games):
            results.append((0.0, False, False, {}) if self.final[k] else game.step(actions[k]))
            if self.final[k]:
                game.reset()
            _, terminated, truncated, _ = results[k]
            self.final[k] = terminated or truncated
        return self.observe(), results

    def get_state(self, _):
        return {}, [pickle.dumps((final, game.get_state())) for final, game in zip(self.final, self.games, strict=True)]

    def set_state(self, states: list[bytes | None]):
        """If one is of a game that crashed, all begin anew with the next step."""
        self.final = [True] * len(states)
        if None not in states:
            for k, state in enumerate(states):
                self.final[k], saved = pickle.loads(state)
                self.games[k].set_state(saved)
        return {}, self.final

    def close(self):
        for game in self.games:
            game.close()


def serve(connection, main_end, *arguments):
    """A worker process: answers (method, argument) with what a Share's method returns, or with an error's text."""
    os.setsid()  # a session of its own: Ctrl-C is the main process's task, and whatever a game starts dies with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the main process's handler
    main_end.close()  # else the connection would stay open when the main process has died
    try:
        share = Share(*arguments)
        with contextlib.closing(share):
            for method, argument in iter(connection.recv, None):
                connection.send(getattr(share, method)(argument))
    except Exception as error:  # an EOFError where the main process is gone: then nobody is told
        place = traceback.extract_tb(error.__traceback__)[-1]
        with contextlib.suppress(OSError):
            connection.send(f"failed: {error!r} ({Path(place.filename).name}, line {place.lineno})")


class GamesFailed(SystemExit):
    """Games failed again and again. Not caught, it ends the program with its one line."""


class Games(gym.vector.VectorEnv):
    """Games in worker processes, several in each, with next-step autoreset.

    `game(seed, build)` makes one: observation_space, action_space, reset(seed=None), step(action) -> (reward,
    terminated, truncated, numbers of an episode that ends), observe(), close(); get_state() and set_state() if it can
    be saved. Game e has seed + e. But for failures the number of workers changes nothing.

    A worker whose game raises an error, that dies or does not answer for `timeout` seconds is replaced, and `build`
    counts up, so that other episodes follow. Those of its games are dropped: info["crashed"] (N,) marks the step in
    which it happened; it ends the episode and is no sample.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, game, num_envs: int, seed: int, num_workers: int, timeout: float):
        self.game, self.num_envs, self.seed, self.timeout, self.closed = game, num_envs, seed, timeout, False
        example = game(seed, 0)  # never played
        self.single_observation_space, self.single_action_space = example.observation_space, example.action_space
        self.observation_space = gym.vector.utils.batch_space(example.observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(example.action_space, num_envs)
        self.can_be_saved = hasattr(example, "get_state")
        self.obs = gym.vector.utils.create_empty_array(self.single_observation_space, num_envs)
        workers = min(num_workers, num_envs)
        self.shares = [slice(w, num_envs, workers) for w in range(workers)]
        self.processes, self.connections = [None] * workers, [None] * workers
        self.builds, self.failures = [0] * workers, [0] * workers  # failures since a whole episode
        self.lost = [False] * workers  # replaced, which the next step will tell
        for w in range(workers):
            self._start(w)

    def _start(self, w: int):
        self.connections[w], worker_end = multiprocessing.Pipe()
        seeds = range(self.seed, self.seed + self.num_envs)[self.shares[w]]
        arguments = (worker_end, self.connections[w], self.game, seeds, self.builds[w])
        self.processes[w] = multiprocessing.Process(target=serve, args=arguments, daemon=True)
        self.processes[w].start()
        worker_end.close()
        self.builds[w] += 1

    def _stop(self, w: int, patience: float):
        """Wait `patience` seconds for a worker to leave, then end it, with all that its games have started."""
        self.connections[w].close()
        self.processes[w].join(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[w].pid, signal.SIGKILL)
        self.processes[w].kill()
        self.processes[w].join()

    def _replace(self, w: int, reason: str):
        warnings.warn(f"worker {w} {reason}; the episodes of its games are dropped", stacklevel=2)
        self.failures[w], self.lost[w] = self.failures[w] + 1, True
        self._stop(w, patience=0)
        if self.failures[w] == 3:
            self.close()
            raise GamesFailed(f"games failed 3 times without a whole episode; at last a worker {reason}")
        self._start(w)

    def _ask(self, method: str, inputs):
        """Call a method of all shares that are not lost; `inputs` has an entry for each environment."""
        for w, share in enumerate(self.shares):
            if not self.lost[w]:
                with contextlib.suppress(OSError):  # it is dead, as its answer will show
                    self.connections[w].send((method, inputs[share]))

    def _answers(self) -> list:
        """Their results, an entry for each environment, None of those that are lost; what is seen goes into `obs`."""
        answers = [None] * self.num_envs
        for w in [w for w, lost in enumerate(self.lost) if not lost]:
            answer = f"did not answer for {self.timeout:g} s"
            try:
                if self.connections[w].poll(self.timeout):
                    answer = self.connections[w].recv()
            except (EOFError, OSError):
                answer = "died"
            if isinstance(answer, str):
                self._replace(w, answer)
            else:
                seen, answers[self.shares[w]] = answer
                for name, value in seen.items():
                    self.obs[name][self.shares[w]] = value
        return answers

    def reset(self, *, seed=None, options=None):
        self.seed = self.seed if seed is None else seed
        answers = [None]
        while None in answers:
            self.lost = [False] * len(self.lost)
            self._ask("reset", [None if seed is None else seed + e for e in range(self.num_envs)])
            answers = self._answers()
        return {name: value.copy() for name, value in self.obs.items()}, {}

    def step(self, actions):
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions):
        self._ask("step", np.asarray(actions))

    def step_wait(self):
        answers = self._answers()
        self.lost = [False] * len(self.lost)
        crashed = np.array([answer is None for answer in answers])
        rewards, numbers = np.zeros(self.action_space.shape, np.float32), {}
        terminated, truncated = np.zeros(self.num_envs, bool), crashed.copy()
        for e in np.flatnonzero(~crashed):
            rewards[e], terminated[e], truncated[e], episode = answers[e]
            if terminated[e] or truncated[e]:
                self.failures[e % len(self.shares)] = 0
            for name, value in episode.items():
                numbers.setdefault(name, np.zeros(self.num_envs, type(value)))[e] = value
        obs = {name: value.copy() for name, value in self.obs.items()}
        return obs, rewards, terminated, truncated, {"crashed": crashed, "episode": numbers}

    def get_state(self) -> list[torch.Tensor | None] | None:
        """All games, for checkpoints and to leave training untouched by an evaluation; None if they cannot be saved.

        They hold pickles: `--resume` no run that you would not run code of.
        """
        if self.closed or not self.can_be_saved:
            return None
        self._ask("get_state", [None] * self.num_envs)
        games = self._answers()
        return [None if game is None else torch.frombuffer(bytearray(game), dtype=torch.uint8) for game in games]

    def set_state(self, state: list[torch.Tensor | None]):
        """A worker with a game that crashed on the way is lost whole."""
        games = [None if game is None else game.numpy().tobytes() for game in state]
        self._ask("set_state", games)
        self._answers()
        self.lost = [lost or None in games[share] for lost, share in zip(self.lost, self.shares, strict=True)]

    def close_extras(self, **options):
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(None)  # workers hold copies of each other's pipes: that one is closed shows to nobody
        for w in range(len(self.shares)):
            self._stop(w, patience=5)


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


class AgentIds(Episodes):
    """Episodes in which an agent sees its number, too: one-hot behind its observation, as in the authors' environments.

    Agents that share a network have one policy without it. The observation space is of what `look` gives.
    """

    def __init__(self, envs: gym.vector.VectorEnv):
        super().__init__(envs)
        n, obs_dim = envs.single_observation_space["obs"].shape
        obs = gym.spaces.Box(-np.inf, np.inf, (n, obs_dim + n), np.float32)
        self.single_observation_space = gym.spaces.Dict(dict(envs.single_observation_space) | {"obs": obs})
        self.ids = torch.eye(n).expand(self.num_envs, n, n)

    def look(self, device) -> dict[str, torch.Tensor]:
        seen = super().look(device)
        return seen | {"obs": torch.cat([seen["obs"], self.ids.to(device)], -1)}


def make_envs(args: "Args") -> Episodes:
    print(f"simulator: {args.simulator} (StarCraft II: {find_starcraft2()[1]})")
    episodes = AgentIds if args.agent_id else Episodes
    if args.simulator == "smax":
        return episodes(SMAX(args.map, args.num_envs, args.seed))
    # Environment e of seed s plays with 1000 s + e: runs with neighbouring seeds do not share games. These cannot be
    # saved: after --resume a stream of other episodes follows.
    iteration = read_checkpoint(*saved_in(args))["progress"]["iteration"] if args.resume else 0
    game = functools.partial(StarCraft2, args.map, stream=iteration)
    return episodes(Games(game, args.num_envs, 1000 * args.seed, args.num_workers, args.worker_timeout))


# --------------------------------------------------------------------------------------------------------- the run
PACKAGES = ("torch", "numpy", "gymnasium", "jax", "jaxmarl", "smacv2")  # whose versions are written down
TASK = ("map", "simulator", "agent_id", "hidden_size", "deep")  # a checkpoint's networks are for these
GAMES = ("num_envs",)  # its saved games are of these, too
SCORE = "win_rate"  # what evaluations are about
RAW = {"won": "won", "returns": "return"}  # list in eval.jsonl: number of each episode


@dataclasses.dataclass
class Args(Settings):
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
    compile: bool = False
    """compile the networks with torch.compile; needs a C++ compiler, starts minutes later"""
    num_workers: int | None = None
    """processes that share StarCraft II's games; by default one for each game"""
    worker_timeout: float = 120.0
    """seconds after which a worker whose game does not answer is given up and begun anew"""
    torch_threads: int | None = None
    """CPU threads of PyTorch; by default all cores"""


def task_name(args: Args) -> str:
    return f"{args.map}-{args.simulator}"


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
    """Fill in what depends on the map, the simulator and the machine, and check the options."""
    simulator = choose_simulator(args.simulator, args.map)
    num_envs = args.num_envs if args.num_envs is not None else 64 if simulator == "smax" else 8
    defaults = dict(zip(TABLE_7_COLUMNS, TABLE_7.get(args.map, TABLE_7["3s5z"]), strict=True)) | {
        "num_envs": num_envs,
        "num_steps": max(1, 3200 // max(1, num_envs) // max(1, args.chunk_length)) * max(1, args.chunk_length),
        "num_workers": num_envs,
        "torch_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    generated = re.fullmatch(SMACV2_MAP, args.map)
    if generated:
        defaults["agent_blocks"] = min(defaults["agent_blocks"], int(generated[2]))
    missing = {name: defaults[name] for name, value in vars(args).items() if value is None}
    recurrent = args.recurrent and args.map not in NOT_RECURRENT
    args = dataclasses.replace(args, simulator=simulator, recurrent=recurrent, **missing)
    check_args(args)
    if args.num_steps % args.chunk_length:
        usage_error("--num-steps", args.num_steps, f"must be a multiple of --chunk-length {args.chunk_length}")
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
