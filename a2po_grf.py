# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "tyro==1.0.17", "tensorboard==2.20.0", "tqdm==4.70.1"]
# ///
"""A2PO (agent-by-agent policy optimization, Wang et al., ICLR 2023) on Google Research Football's game engine.

Parameters are each agent's own (the paper's Algorithm 1) or shared by all (Algorithm 2): one rollout, then agents or
blocks of agents one after the other (semi-greedy order), each with its own PreOPC advantage (Eq. 2), the twice-clipped
objective (Eq. 6) and the adaptive clip. Actor and critic are recurrent. All outfield players of the left team are
agents, in the counter-attack drills the four attackers; the engine's built-in AI plays everyone else.

    python a2po_grf.py --scenario 5_vs_5
    python a2po_grf.py --eval-only --checkpoint runs/<run>/checkpoint.pt

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
from typing import Literal, NamedTuple

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

    scenario: str = "5_vs_5"
    """5_vs_5, 11_vs_11_stochastic (also easy and hard) or an academy drill such as academy_3_vs_1_with_keeper"""
    seed: int = 1
    """seed of the networks, the sampling and the simulator"""
    total_timesteps: int = 100_000_000
    """environment steps of the run (the authors' setting for 5-vs-5); a step of all agents counts once"""
    num_envs: int = 24
    """games played at once (the authors' setting), in two halves that take turns"""
    num_steps: int | None = None
    """steps of each game per iteration; by default an episode's less one: 3,000 in a match, which makes the authors'
    72,000 in all, and 400 in a drill, which makes 9,600 (MAPPO has 10,000 there)"""

    reward_goal: float = 5.0
    """weight of a goal: +1 scored, -1 conceded (the authors' setting)"""
    reward_win: float = 5.0
    """weight of the result at the end of the game: +1 won, 0 drawn, -1 lost (the authors': the lead if it is won)"""
    reward_position: float = 1.0
    """weight of the distance, in half pitches, that the ball has come closer to the opponent's goal"""
    reward_ball_gained: float = 0.1
    """weight of +1 for winning the ball from the opponent (the authors' weight)"""
    reward_ball_lost: float = 0.1
    """weight of -1 for losing the ball to the opponent (the authors' weight)"""
    reward_out: float = 0.1
    """weight of -1 when play stops and the opponent has the restart"""

    share_parameters: bool = False
    """one actor and critic for all agents, else each has its own; the paper shares them in 11-vs-11 and has both in
    5-vs-5"""
    learning_rate: float = 5e-4
    """of actors and critics (Table 11)"""
    gamma: float = 0.995
    """discount factor (Table 11)"""
    gae_lambda: float = 0.95
    """lambda of the advantage's trace (Table 11)"""
    clip_coef: float = 0.25
    """base clipping parameter epsilon (Table 11)"""
    update_epochs: int = 10
    """P (Table 11): every agent with parameters of its own takes P passes over the rollout (Algorithm 1); with shared
    ones there are ceil(P / blocks) passes, each with one step per block (Algorithm 2)"""
    critic_steps: int = 1
    """steps of the critic in an update, where the policy takes one (authors' A2PO: 2 on most tasks)"""
    agent_blocks: int | None = None
    """number of blocks; the agents of a block are updated together; by default one agent a block"""
    cumulative_blocks: bool = False
    """with shared parameters every update trains earlier blocks again (authors' scripts; on MPE it learns no faster)"""
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
    chunk_length: int = 10
    """steps of back-propagation through time (Table 11)"""
    ent_coef: float = 0.001
    """weight of the entropy bonus (Table 11)"""
    huber_delta: float = 10.0
    """where the value loss turns from square to linear, in units of the normalised return (MAPPO default)"""
    max_grad_norm: float = 10.0
    """gradients are scaled down to this norm, actor and critic apart (MAPPO default)"""
    agent_id: bool = False
    """with --share-parameters: agents see their number, one-hot (an option in the authors' code, too)"""
    hidden_size: int = 64
    """width of all hidden layers and of the GRU (MAPPO default; the authors have deeper networks, in 5-vs-5 of 128)"""


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
def act(actors, seen, hidden, greedy=False):
    """A step of all agents from what is `seen` (obs, action_mask, start) and the GRU's state (N, n, H) before it.

    There is one actor for all agents, or one for each. Returns actions and their log-probabilities, (N, n), and the
    GRU's state after it.
    """
    logits, states = [], []
    for actor, obs, before in zip(actors, seen["obs"].chunk(len(actors), 1), hidden.chunk(len(actors), 1), strict=True):
        start = seen["start"].unsqueeze(-1).expand(before.shape[:2])
        output, after = actor(obs.flatten(0, 1)[None], before.flatten(0, 1), start.flatten()[None])
        logits.append(output.view(*before.shape[:2], -1))
        states.append(after.view(before.shape))
    policy = masked_policy(torch.cat(logits, 1), seen["action_mask"])
    actions = policy.mode if greedy else policy.sample()
    return actions, policy.log_prob(actions), torch.cat(states, 1)


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
    everyone = torch.arange(n, device=device)
    if args.agent_blocks > n:
        usage_error("--agent-blocks", args.agent_blocks, f"must be within 1 and {n}, the number of agents")
    if args.cumulative_blocks and not args.share_parameters:
        usage_error("--cumulative-blocks", args.cumulative_blocks, "needs --share-parameters")

    # One network of each kind that all agents share, or one for each agent.
    H, shared = args.hidden_size, args.share_parameters
    count = 1 if shared else n
    actors = nn.ModuleList([RecurrentNetwork(obs_dim, n_actions, H, 0.01) for _ in range(count)]).to(device)
    critics = nn.ModuleList([RecurrentNetwork(state_dim + obs_dim, 1, H, 1.0) for _ in range(count)]).to(device)
    normalizer = ValueNormalizer().to(device)
    # One optimiser for all actors, one for all critics: a step leaves networks without a gradient as they are.
    actor_optimizer = torch.optim.Adam(actors.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam(critics.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    learned = {"actor": actors, "critic": critics, "normalizer": normalizer}
    learned |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    hidden = {name: torch.zeros(args.num_envs, n, H, device=device) for name in ("actor", "critic")}
    run = Run(args, envs, device, learned, hidden)  # counts the steps, logs, saves, resumes
    if args.eval_only:
        return run.report(evaluate(actors, envs, args.eval_episodes, device))

    with run:
        while run.goes_on():
            # ------------------------------------------------------------------------------------------- rollout
            # In turns: the workers play one half of the games while the policy looks at the other.
            states = list(hidden["actor"].split(envs.sizes))
            taken = [[] for _ in envs.halves]  # the steps of each half
            for t in range(args.num_steps + 1):
                for h, half in enumerate(envs.halves):
                    if t > 0:
                        step = taken[h][-1]
                        step["rewards"], step["terminated"], crashed = half.record(
                            step["actions"], *half.env.step_wait()
                        )
                        step["final"] = torch.max(step["final"], crashed)  # a crashed game's: no sample, the trace ends
                    step = half.look(device)
                    taken[h].append(step)
                    if t < args.num_steps:  # the observation after the last step is only for V(s_{t+1})
                        step["actor_hidden"] = states[h]
                        step["actions"], step["log_probs"], states[h] = act(actors, step, states[h])
                        half.env.step_async(step["actions"].cpu().numpy())
            hidden["actor"] = torch.cat(states)

            # Time-major: (T, N, n, ...), what is seen T + 1. final is 1 at an episode's last look, done a step earlier.
            rollout = SimpleNamespace(chunk_length=args.chunk_length)
            for name in taken[0][0]:
                parts = [torch.stack([step[name] for step in steps if name in step]) for steps in taken]
                setattr(rollout, name, torch.cat(parts, 1))
            rollout.sample = rollout.alive[:-1] * (1 - rollout.final[:-1]).unsqueeze(-1)
            rewards, terminated, done = rollout.rewards, rollout.terminated, rollout.final[1:]

            torch.set_num_threads(args.torch_threads)
            # Values in units of return, by the normaliser before its update; the critic sees the state and obs.
            critic_inputs = torch.cat([rollout.state.unsqueeze(2).expand(-1, -1, n, -1), rollout.obs], -1)
            inputs, before = critic_inputs.chunk(count, 2), hidden["critic"].chunk(count, 1)
            results = [rollout_values(*one, rollout.start) for one in zip(critics, inputs, before, strict=True)]
            old_values, critic_hidden = (torch.cat(result, 2) for result in zip(*results, strict=True))
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

            # Algorithm 1, parameters of their own: the blocks one after the other, each with all P epochs.
            # Algorithm 2, shared parameters: ceil(P / blocks) epochs, and in each the blocks one after the other.
            rounds, epochs = (math.ceil(args.update_epochs / len(blocks)), 1) if shared else (1, args.update_epochs)
            joint_log_ratio = torch.zeros_like(done)  # of all agents whose policies have changed
            for _ in range(rounds):
                for position, block in enumerate(blocks, start=1):
                    if shared:  # every update moves all policies, so everyone's ratio is needed anew
                        with torch.no_grad():
                            joint_log_ratio = policy_change(actors[0], rollout, everyone)[0].sum(-1)

                    # Eq. (2): advantages, corrected for all policies that have changed; the values stay the rollout's.
                    joint_ratio = joint_log_ratio.clamp(-20, 20).exp() if args.preopc else unchanged
                    advantages = preopc_advantages(rewards, values, terminated, done, joint_ratio, gamma, gae_lambda)
                    targets = advantages + values[:-1] if args.preopc_targets else targets  # A + V
                    eps_k = adaptive_clip(args.clip_coef, position, len(blocks), args.clip_adaptation)

                    # A shared network learns from the whole block, one agent's own from that agent.
                    for agents in [block] if shared else block.split(1):
                        actor, critic = (actors[0], critics[0]) if shared else (actors[agents], critics[agents])
                        sample = rollout.sample[..., agents]
                        normalized_advantages = normalize_advantages(advantages[..., agents], sample)
                        normalized_targets, old = normalizer.normalize(targets[..., agents]), old_values[:-1, :, agents]

                        for _ in range(epochs):
                            log_ratio, entropy = policy_change(actor, rollout, agents)
                            # Eq. (6) with the clip of this position.
                            # The preceding agents: those of the blocks before; with shared parameters everyone but i.
                            ratio, preceding_log_ratio = log_ratio.exp(), joint_log_ratio.unsqueeze(-1)
                            if shared:
                                preceding_log_ratio = preceding_log_ratio - log_ratio.detach()
                            preceding_ratio = preceding_log_ratio.clamp(-20, 20).exp()
                            surrogate = clipped_surrogate(ratio, preceding_ratio, normalized_advantages, eps_k)
                            policy_loss = -masked_mean(surrogate, sample)
                            entropy = masked_mean(entropy, sample)
                            actor_optimizer.zero_grad()
                            (policy_loss - args.ent_coef * entropy).backward()
                            actor_norm = nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
                            actor_optimizer.step()

                            for _ in range(args.critic_steps):
                                new_values = run_chunks(critic, critic_inputs, critic_hidden, rollout, agents)
                                new_values = new_values.squeeze(-1)
                                losses = value_loss(
                                    new_values, old, normalized_targets, args.clip_coef, args.huber_delta
                                )
                                critic_loss = masked_mean(losses, sample)
                                critic_optimizer.zero_grad()
                                critic_loss.backward()
                                critic_norm = nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
                                critic_optimizer.step()
                            ratios = ratio_statistics(log_ratio, preceding_ratio, sample, eps_k)
                            run.note("losses", policy_loss=policy_loss, value_loss=critic_loss, entropy=entropy)
                            run.note("losses", actor_grad_norm=actor_norm, critic_grad_norm=critic_norm, **ratios)
                            run.note(f"a2po/position_{position}", **ratios)
                        scores[agents] = masked_mean(advantages[..., agents].abs(), sample, dim=(0, 1))  # only logged

                    if not shared:  # the ratio is extended by the block just updated
                        with torch.no_grad():
                            for agents in block.split(1):
                                joint_log_ratio += policy_change(actors[agents], rollout, agents)[0].sum(-1)
            by_size = scores.argsort(descending=True, stable=True)  # ranks by E|A_i| at i's last update (Fig. 16)
            run.note("a2po/position_of_agent", **{str(i): place for place, i in enumerate(order.tolist(), start=1)})
            run.note("a2po/rank_of_agent", **{str(i): rank for rank, i in enumerate(by_size.tolist(), start=1)})
            run.lap("update")
            torch.set_num_threads(1)

            # --------------------------------------------------------------------------------- log, evaluate, save
            run.log(int((1 - rollout.final[:-1]).sum()), envs.finished())
            if run.is_due(args.eval_every):
                run.log_evaluation(evaluate(actors, envs, args.eval_episodes, device))
            if run.is_due(args.save_every):
                run.save()


# ------------------------------------------------------------------------------------- evaluation, what is logged
def evaluate(actors, envs, episodes: int, device) -> list[dict[str, float]]:
    """Greedy episodes from new starts, each with what `Episodes.finished` says of it; then the games as they were.

    Every environment plays a fixed share, so that short episodes are not favoured; crashed ones are played again.
    Where games cannot be saved, as those of StarCraft II, training goes on with new ones.
    """
    training = envs.get_state()
    envs.reset()
    share = np.full(envs.num_envs, episodes // envs.num_envs)
    share[: episodes % envs.num_envs] += 1
    hidden = torch.zeros(envs.num_envs, *envs.single_action_space.shape, actors[0].gru.hidden_size, device=device)
    played = []
    while (share > 0).any():
        actions, _, hidden = act(actors, envs.look(device), hidden, greedy=True)
        envs.play(actions)
        for episode in envs.finished():
            if share[episode["env"]] > 0:
                share[episode["env"]] -= 1
                played.append(episode)
    envs.set_state(training)
    return played


def summarize(episodes: list[dict[str, float]]) -> dict[str, float]:
    """Means over episodes, by the names that they are logged under; the pass rate is that of all their attempts."""
    names = {"won": "win_rate", "return": "episodic_return", "length": "episodic_length"}
    means = {names.get(name, name): np.mean([e[name] for e in episodes]) for name in episodes[0] if name != "env"}
    rate = 100 * means["pass"] / means["attempts"] if means["attempts"] else math.nan
    return means | {"pass_rate": rate}


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
class Scenario(NamedTuple):
    agents: int
    left: int
    """players, the goalkeeper included"""
    right: int
    steps: int
    """the engine's game_duration; an episode has one step more"""


SCENARIOS = {
    "5_vs_5": Scenario(4, 5, 5, 3000),
    "11_vs_11_easy_stochastic": Scenario(10, 11, 11, 3000),
    "11_vs_11_stochastic": Scenario(10, 11, 11, 3000),
    "11_vs_11_hard_stochastic": Scenario(10, 11, 11, 3000),
    "academy_empty_goal_close": Scenario(1, 2, 1, 400),
    "academy_empty_goal": Scenario(1, 2, 1, 400),
    "academy_run_to_score": Scenario(1, 2, 6, 400),
    "academy_run_to_score_with_keeper": Scenario(1, 2, 6, 400),
    "academy_pass_and_shoot_with_keeper": Scenario(2, 3, 2, 400),
    "academy_run_pass_and_shoot_with_keeper": Scenario(2, 3, 2, 400),
    "academy_3_vs_1_with_keeper": Scenario(3, 4, 2, 400),
    "academy_counterattack_easy": Scenario(4, 11, 11, 400),  # the four attackers, as in other papers
    "academy_counterattack_hard": Scenario(4, 11, 11, 400),
    "academy_corner": Scenario(10, 11, 11, 400),
    "academy_single_goal_versus_lazy": Scenario(10, 11, 11, 3000),
}
FOOTBALL_HELP = (
    "to play football: apt-get install -y cmake build-essential libgl1-mesa-dev libsdl2-dev libsdl2-image-dev "
    "libsdl2-ttf-dev libsdl2-gfx-dev libboost-all-dev libdirectfb-dev libst-dev; in an activated virtual environment: "
    "pip install psutil wheel setuptools six; pip install --no-build-isolation gfootball==2.10.2"
)
# gfootball's default actions; 0 is to idle, 1 to 8 to run left, top left, top, ... bottom left.
N_ACTIONS = 19
LONG_PASS, HIGH_PASS, SHORT_PASS, SHOT, SPRINT = range(9, 14)
RELEASE_DIRECTION, RELEASE_SPRINT, SLIDE, DRIBBLE, STOP_DRIBBLE = range(14, 19)
PASSES = (LONG_PASS, HIGH_PASS, SHORT_PASS)
# The engine's game modes; the others, 1 to 6, are kick-off, goal kick, free kick, corner, throw-in, penalty.
NORMAL, THROW_IN = 0, 5
TEAMS = ("left", "right")
US, THEM = 0, 1
# The engine's x runs from -1 to 1 over 108.8 m, its y from -0.42 to 0.42 over 70.2 m: one y is longer than one x. Here
# all lengths are in half pitches of 54.4 m, and all speeds in units of 10 m/s (the engine moves 0.1 s per step).
HALF_PITCH = 54.4
ISOTROPIC = np.array([1.0, 83.6 / HALF_PITCH])
PER_SECOND = ISOTROPIC * HALF_PITCH
OPPONENT_GOAL = np.array([1.0, 0.0])
OWN_GOAL = -OPPONENT_GOAL
BALL, BALL_PER_SECOND = np.array([*ISOTROPIC, 0.1]), np.array([*PER_SECOND, 1.0])
TEN_METRES = 10 / HALF_PITCH
ROLES, GAME_MODES = np.eye(10), np.eye(7)  # one-hot


@functools.cache
def feature_layout(left: int, right: int) -> dict[str, tuple[int, float, float]]:
    """What an agent sees in teams of so many players, in order: name -> (size, lowest value, highest value).

    Coordinates are absolute, the opponent's goal is at (1, 0) and ours at (-1, 0); lengths are in half pitches (54.4 m)
    in both directions, speeds in 10 m/s.
    """
    return {
        "position": (2, -1.3, 1.3),  # x, y of the agent
        "direction": (2, -1, 1),  # unit vector of its movement, 0 when it stands
        "speed": (1, 0, 1.5),
        "tired": (1, 0, 1),  # 0 fresh to 1 exhausted
        "role": (10, 0, 1),  # from goalkeeper to central front
        "card": (1, 0, 1),  # 1 if it has a yellow card
        # 1 if it is offside, and how far beyond the last but one opponent, the ball or the half-way line
        "offside": (2, -2.5, 2.5),
        "goals": (2, 0, 3),  # distance from the opponent's goal and from ours
        "ball": (3, -1.5, 1.5),  # x, y, height in 10 m
        "ball velocity": (3, -6, 6),
        "ball owner": (4, 0, 1),  # nobody, our team, the opponent; this agent
        "to ball": (3, -2.8, 2.8),  # x and y from the agent to the ball, distance
        "ball to goals": (2, 0, 3),  # distance of the ball from the opponent's goal and from ours
        "nearest": (1, 0, 1),  # 1 if no team-mate is nearer to the ball
        # of each, the nearest first: x and y from the agent, distance, velocity less the agent's (2), tired, 1 if it
        # has the ball, 1 as a sign that it is there; zeros for one who is sent off
        "team-mates": (8 * (left - 1), -2.8, 2.8),
        "opponents": (8 * right, -2.8, 2.8),
        "score": (1, -1, 1),  # goals scored less conceded, in units of 5
        "steps left": (1, 0, 1),  # in units of 3,000
        "game mode": (7, 0, 1),
        "sticky": (10, 0, 1),  # what the agent holds pressed: eight directions, sprint, dribble
    }


@functools.cache
def feature_bounds(left: int, right: int) -> np.ndarray:
    """Lowest and highest values of an agent's observation, (2, obs_dim)."""
    sizes, low, high = zip(*feature_layout(left, right).values(), strict=True)
    return np.repeat([low, high], sizes, axis=1).astype(np.float32)


def length(vectors):
    return np.hypot(vectors[..., 0], vectors[..., 1])


def team(raw, side: int):
    """Where the players of a team are and how fast they move, (players, 2) each, and who is on the pitch."""
    name = f"{TEAMS[side]}_team"
    return raw[name] * ISOTROPIC, raw[f"{name}_direction"] * PER_SECOND, raw[f"{name}_active"]


def from_ball(raw, side: int) -> np.ndarray:
    """How far the players of a team are from the ball; for those who are sent off it is infinite."""
    distance = length((raw[f"{TEAMS[side]}_team"] - raw["ball"][:2]) * ISOTROPIC)
    return np.where(raw[f"{TEAMS[side]}_team_active"], distance, np.inf)


def match(raw) -> list[float]:
    """Score, steps left, game mode, as in `feature_layout`."""
    return [(raw["score"][US] - raw["score"][THEM]) / 5, raw["steps_left"] / 3000, *GAME_MODES[raw["game_mode"]]]


def controlled(raw):
    """Each agent's player, and whether it is on the pitch."""
    player = np.array(raw["left_agent_controlled_player"])
    return np.maximum(player, 0), player >= 0


def nearest_player(raw) -> tuple[int, int]:
    """Team and index of the player who is nearest to the ball: at a set piece, the one who takes it."""
    ours, theirs = from_ball(raw, US), from_ball(raw, THEM)
    return (US, int(ours.argmin())) if ours.min() <= theirs.min() else (THEM, int(theirs.argmin()))


def see_players(raw, side: int, agent) -> np.ndarray:
    """The team-mates or opponents of each agent as in `feature_layout`, (n, 8 * players)."""
    ours, moving, _ = team(raw, US)
    where, velocity, active = team(raw, side)
    offset = where - ours[agent][:, None]
    distance = length(offset)
    rows = np.zeros((*distance.shape, 8))
    rows[..., :2], rows[..., 2] = offset, distance
    rows[..., 3:5] = velocity - moving[agent][:, None]
    rows[..., 5], rows[..., 7] = raw[f"{TEAMS[side]}_team_tired_factor"], 1.0
    if raw["ball_owned_team"] == side:
        rows[:, raw["ball_owned_player"], 6] = 1.0
    rows *= active[:, None]
    distance = np.where(active, distance, np.inf)
    if side == US:
        distance[np.arange(len(agent)), agent] = -1.0  # the agent itself is the first one, which is left out
    order = distance.argsort(1)[:, int(side == US) :]
    return np.take_along_axis(rows, order[..., None], 1).reshape(len(agent), -1)


def observe_agents(raw) -> np.ndarray:
    """What each agent sees, (n, obs_dim), from the engine's raw observation; zeros for one who is sent off."""
    agent, present = controlled(raw)
    ours, velocity, _ = team(raw, US)
    theirs, _, on_pitch = team(raw, THEM)
    here, moving = ours[agent], velocity[agent]
    speed = length(moving)[:, None]
    ball = raw["ball"] * BALL
    to_ball, distances = ball[:2] - here, from_ball(raw, US)
    owned_team, owned_player = raw["ball_owned_team"], raw["ball_owned_player"]
    owner = np.zeros((len(agent), 4))
    owner[:, owned_team + 1] = 1.0
    owner[:, 3] = (owned_team == US) & (owned_player == agent)
    depth = np.sort(theirs[on_pitch, 0])
    beyond = here[:, :1] - max(0.0, ball[0], depth[-2] if len(depth) > 1 else 0.0)
    blocks = {
        "position": here,
        "direction": moving / np.maximum(speed, 1e-3),
        "speed": speed,
        "tired": raw["left_team_tired_factor"][agent, None],
        "role": ROLES[raw["left_team_roles"][agent]],
        "card": raw["left_team_yellow_card"][agent, None],
        "offside": np.hstack([beyond > 0, beyond]),
        "goals": np.array([length(OPPONENT_GOAL - here), length(OWN_GOAL - here)]).T,
        "ball": ball,
        "ball velocity": raw["ball_direction"] * BALL_PER_SECOND,
        "ball owner": owner,
        "to ball": np.hstack([to_ball, length(to_ball)[:, None]]),
        "ball to goals": [length(OPPONENT_GOAL - ball[:2]), length(OWN_GOAL - ball[:2])],
        "nearest": (distances[agent] <= distances.min())[:, None],
        "team-mates": see_players(raw, US, agent),
        "opponents": see_players(raw, THEM, agent),
        "score, steps left, game mode": match(raw),
        "sticky": raw["left_agent_sticky_actions"],
    }
    low, high = feature_bounds(len(ours), len(theirs))
    features, end = np.empty((len(agent), len(low))), 0
    for values in blocks.values():
        begin, end = end, end + np.shape(values)[-1]
        features[:, begin:end] = values
    features *= present[:, None]
    return features.clip(low, high).astype(np.float32)


def observe_state(raw) -> np.ndarray:
    """What the critic sees beside the agents' observations, (state_dim,): the game without a point of view.

    Of each player of both teams in the engine's order x, y, velocity (2), tired, on the pitch; the ball's position and
    velocity; its owner, one of nobody and all players; score, steps left and game mode; what all agents hold pressed.
    Units as in `feature_layout`.
    """
    players = []
    for side, name in enumerate(TEAMS):
        where, velocity, active = team(raw, side)
        players.append(np.column_stack([where, velocity, raw[f"{name}_team_tired_factor"], active]))
    ours, theirs = players
    owner = np.zeros(1 + len(ours) + len(theirs))
    if raw["ball_owned_team"] == -1:
        owner[0] = 1.0
    else:
        owner[1 + raw["ball_owned_player"] + raw["ball_owned_team"] * len(ours)] = 1.0
    ball, ball_velocity = raw["ball"] * BALL, raw["ball_direction"] * BALL_PER_SECOND
    parts = (ours.ravel(), theirs.ravel(), ball, ball_velocity, owner, match(raw), *raw["left_agent_sticky_actions"])
    return np.concatenate(parts).astype(np.float32)


def action_mask(raw) -> np.ndarray:
    """Which actions each agent may take, (n, 19); idling and running in any direction always.

    Masked is what the engine would ignore and what makes no sense. An agent who is sent off can only idle.
    """
    agent, present = controlled(raw)
    sticky = np.array(raw["left_agent_sticky_actions"], bool)
    direction, sprint, dribble = sticky[:, :8].any(1), sticky[:, 8], sticky[:, 9]
    owned_team, distances = raw["ball_owned_team"], from_ball(raw, US)
    close = distances[agent] <= TEN_METRES
    # Who can play the ball: its owner, or if nobody owns it who is nearest of the team, within 10 m: the engine keeps
    # the button in mind for 2 s, so that one can play the ball on at the first touch. At a set piece nobody owns the
    # ball before it is taken, so that this is its taker.
    plays = (raw["ball_owned_player"] == agent) & (owned_team == US)
    if owned_team == -1:
        plays = close & (distances[agent] <= distances.min())

    mask = np.ones((len(agent), N_ACTIONS), bool)
    mask[:, [*PASSES, SHOT, DRIBBLE]] = plays[:, None]  # without the ball one would only run slower for dribbling
    if raw["game_mode"] == THROW_IN:  # the engine ignores them
        mask[:, [HIGH_PASS, SHOT]] = False
    if raw["ball"][0] < 0:  # the ball is in our half
        mask[:, SHOT] = False
    # A slide is for a ball nearby that is not ours; at a set piece the engine ignores it.
    mask[:, SLIDE] = close & (owned_team != US) & (raw["game_mode"] == NORMAL)
    # Press what is not pressed, release what is. (A direction that is pressed may be chosen again, so that "run right"
    # is one action whatever was before.)
    mask[:, DRIBBLE] &= ~dribble
    mask[:, STOP_DRIBBLE], mask[:, RELEASE_DIRECTION] = dribble, direction
    mask[:, SPRINT], mask[:, RELEASE_SPRINT] = ~sprint, sprint
    mask[~present, 1:] = False
    return mask


class Behaviour:
    """What Table 3 counts, from the stream of raw observations and actions of one episode.

    "Owns" is the engine's word (ball_owned_team and ball_owned_player): the last one to touch the ball, as long as he
    has it under control; while the ball is on its way nobody owns it. At a set piece, where the engine has no owner, it
    is the nearest player. Play *stops* when the game mode leaves normal or when the score changes.

    goal        goals that the left team scored.
    lost        goals that it conceded. (The paper does not say what "Lost" is; with 0.5 to 1 of them in a game of
                eight to ten passes, of which three to six fail, it cannot be lost balls.)
    score       goals scored less conceded.
    won         1 if it is positive, else 0.
    pass        passes completed: an agent chose a pass no more than 20 steps before it last owned the ball (the engine
                executes it within those 2 s or forgets it), or later, and no shot since; and the next owner is a
                team-mate, the goalkeeper included.
    attempts    passes attempted: the completed ones, and those where the next owner is an opponent or play stops first
                without a goal of ours. Where the passer owns the ball again first, nothing is counted yet.
    pass_rate   100 * pass / attempts; not a number without attempts.
    assist      goals whose scorer, the last one of our team who owned the ball, got it by a completed pass, with
                nobody else owning it and no stop in between.
    """

    MEMORY = 20

    def __init__(self, raw):
        self.counts = dict.fromkeys(("goal", "lost", "assist", "pass", "attempts"), 0)
        self.time, self.last_owned, self.pressed = 0, 0, {}
        self.owner, self.assistant, self.raw = self._owner(raw), None, raw

    def _owner(self, raw):
        if raw["ball_owned_team"] != -1:
            return raw["ball_owned_team"], raw["ball_owned_player"]
        return nearest_player(raw) if raw["game_mode"] != NORMAL else None

    def update(self, raw, actions):
        """The raw observation after the agents' actions."""
        self.time += 1
        for player, action in zip(self.raw["left_agent_controlled_player"], actions, strict=True):
            if action in PASSES:
                self.pressed[player] = self.time
            elif action == SHOT:
                self.pressed.pop(player, None)
        scored, conceded = (raw["score"][side] - self.raw["score"][side] for side in (US, THEM))
        stopped = scored or conceded or (raw["game_mode"] != NORMAL and self.raw["game_mode"] == NORMAL)
        self.counts["goal"] += scored
        self.counts["lost"] += conceded
        owner, passed, ours = self._owner(raw), False, self.owner and self.owner[0] == US
        if ours:
            passed = self.pressed.get(self.owner[1], -math.inf) >= self.last_owned - self.MEMORY
        if stopped:
            self.counts["assist"] += bool(scored and ours and self.assistant is not None)
            self.counts["attempts"] += passed and not scored
            self.pressed, self.assistant, self.owner = {}, None, owner
        elif owner and owner != self.owner:
            completed = passed and owner[0] == US
            self.counts["attempts"] += passed
            self.counts["pass"] += completed
            self.assistant = self.owner[1] if completed else None
            # A pass that was chosen before the ball came is played at the first touch.
            self.pressed = {player: time for player, time in self.pressed.items() if owner == (US, player)}
            self.owner = owner
        if owner:
            self.last_owned = self.time
        self.raw = raw

    def result(self) -> dict[str, float]:
        score, attempts = self.counts["goal"] - self.counts["lost"], self.counts["attempts"]
        rate = 100 * self.counts["pass"] / attempts if attempts else math.nan
        return {"won": int(score > 0), "score": score} | self.counts | {"pass_rate": rate}


class Reward:
    """The team's reward: named terms, which `weights` turn into one number.

    goal        +1 for a goal, -1 for one conceded.
    win         when the episode ends +1 if we have more goals than the opponent, -1 if less.
    position    how much closer the ball has come to the opponent's goal, in half pitches; 0 over a stop of play, when
                the ball is put somewhere else. What is lost on the way back is what was gained on the way there.
    ball_gained +1 when we own the ball and the opponent was its last owner.
    ball_lost   -1 when the opponent owns the ball and we were its last owner.
    out         -1 when play stops without a goal (over a line, a foul, offside) and the restart is the opponent's:
                the player nearest to the ball is his. After a stop the next owner neither gains nor loses the ball.
    """

    TERMS = ("goal", "win", "position", "ball_gained", "ball_lost", "out")

    def __init__(self, raw, weights: dict[str, float]):
        self.raw, self.weights = raw, weights
        self.owner = raw["ball_owned_team"]
        self.totals = dict.fromkeys(self.TERMS, 0.0)

    def update(self, raw, ended: bool) -> float:
        """The reward of the step that led to this raw observation; `totals` has the weighted terms of the episode."""
        before, terms = self.raw, dict.fromkeys(self.TERMS, 0.0)
        lead, goal = raw["score"][US] - raw["score"][THEM], raw["score"] != before["score"]
        terms["goal"] = lead - before["score"][US] + before["score"][THEM]
        terms["win"] = float(np.sign(lead)) if ended else 0.0
        if goal or (raw["game_mode"] != NORMAL and before["game_mode"] == NORMAL):
            terms["out"] = -1.0 if not goal and nearest_player(raw)[0] == THEM else 0.0
            self.owner = raw["ball_owned_team"]
        else:
            was, now = (length(OPPONENT_GOAL - x["ball"][:2] * ISOTROPIC) for x in (before, raw))
            terms["position"] = float(was - now)
            if raw["ball_owned_team"] != -1:
                terms["ball_gained"] = float(self.owner == THEM and raw["ball_owned_team"] == US)
                terms["ball_lost"] = -float(self.owner == US and raw["ball_owned_team"] == THEM)
                self.owner = raw["ball_owned_team"]
        self.raw = raw
        for name in self.TERMS:
            terms[name] *= self.weights[name]
            self.totals[name] += terms[name]
        return sum(terms.values())


def find_football() -> bool:
    """Whether gfootball is installed; nothing is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("gfootball", "gfootball_engine"))


def check_scenario(name: str):
    """Ends the program if there is no such scenario, or no engine to play it."""
    if name not in SCENARIOS:
        usage_error("--scenario", name, one_of(name, SCENARIOS))
    if not find_football():
        usage_error("--scenario", name, f"the Python package gfootball is not installed; {FOOTBALL_HELP}")


class Football:
    """A scenario as one game for the whole team, with one reward, for `Games`. Making it starts nothing, `reset` does.

    An episode ends with the numbers of Behaviour and the weighted terms of Reward. A match is over at the final
    whistle, which is `terminated`; a drill's steps are a time limit, `truncated`.
    """

    def __init__(self, scenario: str, weights: dict[str, float], seed: int, build: int = 0):
        self.scenario, self.weights, self.agents = scenario, weights, SCENARIOS[scenario].agents
        self.seed, self.build, self.episode, self.game = seed, build, 0, None
        n, left, right, _ = SCENARIOS[scenario]
        low, high = feature_bounds(left, right)
        state_dim = 6 * (left + right) + 6 + 1 + left + right + 9 + 10 * n
        self.observation_space = gym.spaces.Dict(
            obs=gym.spaces.Box(np.tile(low, (n, 1)), np.tile(high, (n, 1)), dtype=np.float32),
            state=gym.spaces.Box(-np.inf, np.inf, (state_dim,), np.float32),
            action_mask=gym.spaces.MultiBinary((n, N_ACTIONS)),
            alive=gym.spaces.MultiBinary(n),
        )
        self.action_space = gym.spaces.MultiDiscrete([N_ACTIONS] * n)

    def _build(self):
        os.environ |= {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_VIDEODRIVER": "dummy"}
        with contextlib.redirect_stderr(io.StringIO()):  # gym asks everyone to move on to gymnasium
            from gfootball.env import football_env_core, observation_processor
            from gfootball.env.config import Config
        agents = self.agents

        class Controlled(Config):
            """Only the agents' players can be controlled.

            Else the engine hands the agents other players, the goalkeeper among them, as the ball goes; and it does so
            in every scenario but 5_vs_5.
            """

            def NewScenario(self, inc=1):
                super().NewScenario(inc)
                team = self.ScenarioConfig().left_team
                forward = sorted(range(1, len(team)), key=lambda player: -team[player].position[0])
                for player in range(len(team)):
                    team[player].controllable = player in forward[:agents]

        self.config = Controlled({"level": self.scenario, "players": [f"agent:left_players={agents}"]})
        # Not FootballEnv, which copies each agent its own dictionary of all arrays, twice a step. The core copies them
        # too, and keeps the last hundred for replays; nobody changes them or watches, and the copies fill the caches.
        football_env_core.copy = SimpleNamespace(deepcopy=lambda observation: observation)
        observation_processor.PAST_STEPS_TRACE_SIZE = 1
        self.game = football_env_core.FootballEnvCore(self.config)

    def reset(self, seed: int | None = None):
        if seed is not None:
            self.seed, self.build, self.episode = seed, 0, 0
        if self.game is None:
            self._build()
        # An episode follows from the seed and its number. The engine's seed also says which team it moves first, and
        # every other episode the other team kicks off.
        source = np.random.SeedSequence((self.seed, self.build, self.episode))
        engine_seed = int(source.generate_state(1)[0]) % 2_000_000_000
        self.config["game_engine_random_seed"] = engine_seed
        self.config["reverse_team_processing"] = bool(engine_seed % 2)
        self.config["episode_number"] = self.episode
        self.episode += 1
        self.game.reset()
        self.raw = self.game.observation()
        self.behaviour, self.reward = Behaviour(self.raw), Reward(self.raw, self.weights)

    def step(self, action) -> tuple[float, bool, bool, dict[str, float]]:
        actions = [int(choice) for choice in action]
        self.raw, _, done, _ = self.game.step(actions)
        self.behaviour.update(self.raw, actions)
        reward, numbers = self.reward.update(self.raw, done), {}
        if done:
            totals = {f"reward_{term}": total for term, total in self.reward.totals.items()}
            numbers = self.behaviour.result() | totals
        out_of_time = done and self.raw["steps_left"] <= 0 and "academy" in self.scenario
        return reward, done and not out_of_time, out_of_time, numbers

    def observe(self) -> dict[str, np.ndarray]:
        _, present = controlled(self.raw)
        mask = action_mask(self.raw).astype(np.int8)
        obs, state = observe_agents(self.raw), observe_state(self.raw)
        return {"obs": obs, "state": state, "action_mask": mask, "alive": present.astype(np.int8)}

    def get_state(self) -> bytes:
        """Everything that the rest of the episode and the next ones depend on; the engine pickles what it is given."""
        if self.game is None:  # it has just taken the place of one that failed
            self.reset()
        numbers = {"seed": self.seed, "build": self.build, "episode": self.episode}
        return self.game.get_state(numbers | {"behaviour": vars(self.behaviour), "reward": vars(self.reward)})

    def set_state(self, state: bytes):
        """Back to what get_state was called on, in this process or another one."""
        if self.game is None:
            self.reset()
        saved = self.game.set_state(state)
        self.game._step_count = 1  # gfootball raises an error where an episode ends with the first step after a reset
        self.raw = self.game.observation()
        self.seed, self.build, self.episode = saved["seed"], saved["build"], saved["episode"]
        vars(self.behaviour).update(saved["behaviour"])
        vars(self.reward).update(saved["reward"], weights=self.weights)

    def close(self):
        if self.game is not None:
            self.game.close()
        self.game = None


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


class Halves:
    """Two halves of the games (one, if there is one game), each with workers of its own.

    Whoever plays them in turn keeps the workers of one busy while it looks at the other.
    """

    def __init__(self, halves: list[Episodes]):
        self.halves, self.sizes = halves, [half.num_envs for half in halves]
        self.num_envs = sum(self.sizes)
        self.single_observation_space = halves[0].single_observation_space
        self.single_action_space = halves[0].single_action_space

    @property
    def crashes(self) -> int:
        return sum(half.crashes for half in self.halves)

    @crashes.setter
    def crashes(self, number: int):
        self.halves[0].crashes = number
        for half in self.halves[1:]:
            half.crashes = 0

    def reset(self):
        for half in self.halves:
            half.reset()

    def look(self, device) -> dict[str, torch.Tensor]:
        seen = [half.look(device) for half in self.halves]
        return {name: torch.cat([one[name] for one in seen]) for name in seen[0]}

    def play(self, actions):
        """A step of all games at once."""
        parts = actions.split(self.sizes)
        for half, part in zip(self.halves, parts, strict=True):
            half.env.step_async(part.cpu().numpy())
        for half, part in zip(self.halves, parts, strict=True):
            half.record(part, *half.env.step_wait())

    def finished(self) -> list[dict[str, float]]:
        """As `Episodes.finished`, with the second half's environments counted on."""
        episodes, first = [], 0
        for half in self.halves:
            episodes += [episode | {"env": first + episode["env"]} for episode in half.finished()]
            first += half.num_envs
        return episodes

    def get_state(self) -> list | None:
        if any(half.env.closed for half in self.halves):  # its games failed, and the others' are amidst a step
            return None
        return [half.get_state() for half in self.halves]

    def set_state(self, state: list | None):
        for half, saved in zip(self.halves, state or [None] * len(self.halves), strict=True):
            half.set_state(saved)

    def close(self):
        for half in self.halves:
            half.close()


def make_envs(args: "Args") -> Halves:
    weights = {term: getattr(args, f"reward_{term}") for term in Reward.TERMS}
    game = functools.partial(Football, args.scenario, weights)
    episodes = AgentIds if args.agent_id else Episodes
    # Environment e of seed s plays with 1000 s + e: runs with neighbouring seeds do not share games.
    halves, seed = [], 1000 * args.seed
    for size in (args.num_envs - args.num_envs // 2, args.num_envs // 2):
        if size > 0:
            halves.append(episodes(Games(game, size, seed, args.num_workers, args.worker_timeout)))
            seed += size
    return Halves(halves)


# --------------------------------------------------------------------------------------------------------- the run
PACKAGES = ("torch", "numpy", "gymnasium", "gfootball")  # whose versions are written down
TASK = ("scenario", "share_parameters", "agent_id", "hidden_size")  # a checkpoint's networks are for these
GAMES = ("num_envs",)  # its saved games are of these, too
SCORE = "win_rate"  # what evaluations are about
# Lists in eval.jsonl: number of each episode.
RAW = {name: name for name in ("won", "score", "goal", "lost", "assist", "pass", "attempts")}


@dataclasses.dataclass
class Args(Settings):
    eval_every: int = 500_000
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
    num_workers: int | None = None
    """processes that share the games of a half; by default one per core"""
    worker_timeout: float = 120.0
    """seconds after which a worker whose game does not answer is given up and begun anew"""
    torch_threads: int | None = None
    """CPU threads of PyTorch; by default all cores"""


def task_name(args: Args) -> str:
    return args.scenario


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
    """Fill in what depends on the scenario and the machine, and check the options."""
    check_scenario(args.scenario)
    n, _, _, steps = SCENARIOS[args.scenario]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chunk = max(1, args.chunk_length)
    defaults = {
        "num_steps": max(1, steps // chunk) * chunk,
        "num_workers": cores,
        "agent_blocks": n,
        "torch_threads": cores,
    }
    missing = {name: defaults[name] for name, value in vars(args).items() if value is None}
    args = dataclasses.replace(args, **missing)
    check_args(args)
    if args.num_steps % args.chunk_length:
        usage_error("--num-steps", args.num_steps, f"must be a multiple of --chunk-length {args.chunk_length}")
    if args.agent_id and not args.share_parameters:
        usage_error("--agent-id", args.agent_id, "needs --share-parameters")
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
