# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "numpy==2.4.6",
#   "gymnasium==1.4.0",
#   "tyro==1.0.17",
#   "tensorboard==2.20.0",
#   "tqdm==4.70.1",
# ]
# ///
"""A2PO (agent-by-agent policy optimization, Wang et al., ICLR 2023) on Google Research Football's game engine.

Parameters are each agent's own (the paper's Algorithm 1) or shared by all (Algorithm 2): one rollout, then agents or
blocks of agents one after the other (semi-greedy order), each with its own PreOPC advantage (Eq. 2), the twice-clipped
objective (Eq. 6) and the adaptive clip. Actor and critic are recurrent. All outfield players of the left team are
agents; the engine's built-in AI plays the goalkeeper and the right team.

    python a2po_grf.py --scenario 5_vs_5
    python a2po_grf.py --eval-only --checkpoint runs/<run>/checkpoint.pt
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import types
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
from torch.func import stack_module_state
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    scenario: str = "5_vs_5"
    """5_vs_5, 11_vs_11_stochastic (also easy and hard) or an academy drill such as academy_3_vs_1_with_keeper"""
    seed: int = 1
    """seed of the networks, the sampling and the simulator"""
    total_timesteps: int = 100_000_000
    """environment steps of the run (the authors' setting for 5-vs-5); a step of all agents counts once"""
    num_envs: int | None = None
    """games played at once, in two halves that take turns; by default 4 per core"""
    num_steps: int | None = None
    """steps of each game per iteration; by default 1,000 in a match and 400, the whole of it, in a drill"""
    num_workers: int | None = None
    """processes that share the games; by default one per core"""
    worker_timeout: float = 120.0
    """seconds after which a worker whose game does not answer is given up and begun anew"""

    reward_goal: float = 5.0
    """weight of a goal: +1 scored, -1 conceded (the authors' setting)"""
    reward_win: float = 5.0
    """weight of the result at the end of the game: +1 won, 0 drawn, -1 lost (the authors' weight)"""
    reward_position: float = 1.0
    """weight of the distance, in half pitches, that the ball has come closer to the opponent's goal"""
    reward_ball_gained: float = 0.1
    """weight of +1 for winning the ball from the opponent (the authors' setting)"""
    reward_ball_lost: float = 0.1
    """weight of -1 for losing the ball to the opponent (the authors' setting)"""
    reward_out: float = 0.1
    """weight of -1 when play stops and the opponent has the restart"""

    share_parameters: bool = False
    """one actor and critic for all agents (Algorithm 2), else each has its own (Algorithm 1); the paper shares them in
    11-vs-11 and has both in 5-vs-5"""
    learning_rate: float = 5e-4
    """of actors and critics (Table 11)"""
    gamma: float = 0.995
    """discount factor (Table 11)"""
    gae_lambda: float = 0.95
    """lambda of the advantage's trace (Table 11)"""
    clip_coef: float = 0.25
    """base clipping parameter epsilon (Table 11)"""
    update_epochs: int = 10
    """P, passes over the rollout (Table 11): of every agent with parameters of its own (Algorithm 1), else each block
    gets ceil(P / blocks) of them (Algorithm 2)"""
    agent_blocks: int | None = None
    """number of blocks that the agents are updated in; by default each agent is one"""
    agent_order: Literal["semi-greedy", "greedy", "random", "cyclic", "reverse-greedy", "reverse-semi-greedy"] = (
        "semi-greedy"
    )
    """order of the agents' updates (Sec. 4; the others are the paper's ablations)"""
    preopc: bool = True
    """correct advantages for the policies that have changed, Eq. (2); without it they are plain GAE"""
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
    hidden_size: int = 64
    """width of all hidden layers and of the GRU (MAPPO default)"""

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
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    wandb_project: str = "a2po"
    """Weights & Biases project"""
    cuda: bool = True
    """use a GPU for the networks if there is one"""
    torch_threads: int | None = None
    """CPU threads of PyTorch; by default all cores"""


# ---------------------------------------------------------------------------------------------------- environments
def scenario(agents, left, right, steps):
    return locals()


# Agents, players of both teams with their goalkeepers, and steps until the final whistle.
SCENARIOS = {
    "5_vs_5": scenario(4, 5, 5, 3000),
    "11_vs_11_easy_stochastic": scenario(10, 11, 11, 3000),
    "11_vs_11_stochastic": scenario(10, 11, 11, 3000),
    "11_vs_11_hard_stochastic": scenario(10, 11, 11, 3000),
    "academy_empty_goal_close": scenario(1, 2, 1, 400),
    "academy_empty_goal": scenario(1, 2, 1, 400),
    "academy_run_to_score": scenario(1, 2, 6, 400),
    "academy_run_to_score_with_keeper": scenario(1, 2, 6, 400),
    "academy_pass_and_shoot_with_keeper": scenario(2, 3, 2, 400),
    "academy_run_pass_and_shoot_with_keeper": scenario(2, 3, 2, 400),
    "academy_3_vs_1_with_keeper": scenario(3, 4, 2, 400),
    "academy_counterattack_easy": scenario(4, 11, 11, 400),  # the four attackers, as in other papers
    "academy_counterattack_hard": scenario(4, 11, 11, 400),
    "academy_corner": scenario(10, 11, 11, 400),
    "academy_single_goal_versus_lazy": scenario(10, 11, 11, 3000),
}
FOOTBALL_HELP = (
    "to play football: apt-get install -y cmake build-essential libgl1-mesa-dev libsdl2-dev libsdl2-image-dev "
    "libsdl2-ttf-dev libsdl2-gfx-dev libboost-all-dev libdirectfb-dev libst-dev; in an activated virtual environment: "
    "pip install psutil wheel setuptools six; pip install --no-build-isolation gfootball==2.10.2"
)
# The 19 actions of gfootball's default set.
N_ACTIONS = 19
IDLE = 0  # 1 to 8 run left, top left, top, ... bottom left
LONG_PASS = 9
HIGH_PASS = 10
SHORT_PASS = 11
SHOT = 12
SPRINT = 13
RELEASE_DIRECTION = 14
RELEASE_SPRINT = 15
SLIDE = 16
DRIBBLE = 17
STOP_DRIBBLE = 18
PASSES = (LONG_PASS, HIGH_PASS, SHORT_PASS)
# The engine's game modes; the others, 1 to 6, are kick-off, goal kick, free kick, corner, throw-in, penalty.
NORMAL = 0
THROW_IN = 5
TEAMS = ("left", "right")
US = 0
THEM = 1
# The engine's x runs from -1 to 1 over 108.8 m, its y from -0.42 to 0.42 over 70.2 m: one y is longer than one x. Here
# all lengths are in half pitches of 54.4 m, and all speeds in units of 10 m/s (the engine moves 0.1 s per step).
HALF_PITCH = 54.4
ISOTROPIC = np.array([1.0, 83.6 / HALF_PITCH])
PER_SECOND = ISOTROPIC * HALF_PITCH
TEN_METRES = 10 / HALF_PITCH
OPPONENT_GOAL = np.array([1.0, 0.0])
OWN_GOAL = -OPPONENT_GOAL
ROLES = np.eye(10)  # one-hot
GAME_MODES = np.eye(7)


@functools.cache
def feature_layout(left: int, right: int) -> dict[str, tuple[int, float, float]]:
    """Blocks of an agent's observation in their order: name -> (size, lowest, highest value).

    `left` and `right` are the numbers of players. `observe_agents` says what is in the blocks and clips them to this.
    """
    return {
        "position": (2, -1.3, 1.3),
        "direction": (2, -1, 1),
        "speed": (1, 0, 1.5),
        "tired": (1, 0, 1),
        "role": (10, 0, 1),
        "card": (1, 0, 1),
        "offside": (2, -2.5, 2.5),
        "goals": (2, 0, 3),
        "ball": (3, -1.5, 1.5),
        "ball velocity": (3, -6, 6),
        "ball owner": (4, 0, 1),
        "to ball": (3, -2.8, 2.8),
        "ball to goals": (2, 0, 3),
        "nearest": (1, 0, 1),
        "team-mates": (8 * (left - 1), -2.8, 2.8),
        "opponents": (8 * right, -2.8, 2.8),
        "score": (1, -1, 1),
        "steps left": (1, 0, 1),
        "game mode": (7, 0, 1),
        "sticky": (10, 0, 1),
    }


@functools.cache
def feature_places(left: int, right: int) -> dict[str, slice]:
    """Where the blocks are."""
    layout = feature_layout(left, right)
    ends = np.cumsum([size for size, _, _ in layout.values()]).tolist()
    return {name: slice(end - layout[name][0], end) for name, end in zip(layout, ends, strict=True)}


@functools.cache
def feature_bounds(left: int, right: int) -> np.ndarray:
    """Lowest and highest values of an agent's observation, (2, obs_dim)."""
    sizes, low, high = zip(*feature_layout(left, right).values(), strict=True)
    return np.repeat([low, high], sizes, axis=1).astype(np.float32)


def positions(raw, side: str):
    """Where the players of a team are and how fast they move, (players, 2) each, in half pitches and 10 m/s."""
    return raw[f"{side}_team"] * ISOTROPIC, raw[f"{side}_team_direction"] * PER_SECOND


def length(vectors):
    return np.hypot(vectors[..., 0], vectors[..., 1])


def observe_agents(raw) -> np.ndarray:
    """What each agent sees, (n, obs_dim), from the engine's raw observation, all agents at once.

    Coordinates are absolute, the opponent's goal is at (1, 0) and ours at (-1, 0); lengths are in half pitches (54.4 m)
    in both directions, speeds in 10 m/s. `feature_layout` has the sizes and ranges; the blocks are

        position      x, y of the agent (left_team)
        direction     unit vector of its movement, 0 when it stands (left_team_direction)
        speed         of its movement (left_team_direction)
        tired         0 fresh to 1 exhausted (left_team_tired_factor)
        role          one of ten, from goalkeeper to central front (left_team_roles)
        card          1 if it has a yellow card (left_team_yellow_card)
        offside       1 if its position is offside, and how far it is beyond the offside line, which is the last but
                      one opponent's x, the ball's or the half-way line, whichever is the greatest
        goals         distance from the opponent's goal, distance from our goal
        ball          x, y and height in units of 10 m (ball)
        ball velocity in the three directions (ball_direction)
        ball owner    nobody, our team, the opponent, this agent (ball_owned_team, ball_owned_player)
        to ball       x and y from the agent to the ball, and the distance
        ball to goals distance of the ball from the opponent's goal and from ours
        nearest       1 if no team-mate is nearer to the ball
        team-mates    of each, the nearest first: x and y from the agent, distance, velocity less the agent's (2),
                      tired, 1 if it has the ball, 1 as a sign that it is there; zeros for one who is sent off
        opponents     of each, the same
        score         goals scored less conceded, in units of 5 (score)
        steps left    in units of 3,000 (steps_left)
        game mode     one of normal, kick-off, goal kick, free kick, corner, throw-in, penalty (game_mode)
        sticky        what the agent holds pressed: eight directions, sprint, dribble (left_agent_sticky_actions)

    An agent who is sent off sees zeros.
    """
    agent = np.asarray(raw["left_agent_controlled_player"])
    present, agent = agent >= 0, np.maximum(agent, 0)
    n = np.arange(len(agent))
    (left, left_speed), (right, right_speed) = positions(raw, "left"), positions(raw, "right")
    left_active, right_active = raw["left_team_active"], raw["right_team_active"]
    here, moving = left[agent], left_speed[agent]
    speed = length(moving)[:, None]
    ball, ball_speed = raw["ball"].copy(), raw["ball_direction"].copy()
    ball[:2] *= ISOTROPIC
    ball[2] /= 10
    ball_speed[:2] *= PER_SECOND
    owned_team, owned_player = raw["ball_owned_team"], raw["ball_owned_player"]
    to_ball = ball[:2] - here
    from_ball = np.where(left_active, length(left - ball[:2]), np.inf)

    depth = np.sort(right[right_active, 0])
    line = max(0.0, ball[0], depth[-2] if len(depth) > 1 else 0.0)
    beyond = here[:, :1] - line

    def others(where, velocity, active, side, besides):
        offset = where - here[:, None]
        distance = length(offset)
        key = np.where(active, distance, np.inf)
        if besides is not None:
            key[n, besides] = -1.0  # the first one, which is then left out
        order = key.argsort(1)[:, besides is not None :]
        rows = np.empty((len(n), len(where), 8))
        rows[..., :2], rows[..., 2] = offset, distance
        rows[..., 3:5] = velocity - moving[:, None]
        rows[..., 5], rows[..., 6], rows[..., 7] = raw[f"{TEAMS[side]}_team_tired_factor"], 0.0, 1.0
        if owned_team == side:
            rows[:, owned_player, 6] = 1.0
        rows *= active[:, None]
        return rows[n[:, None], order].reshape(len(n), -1)

    owner = np.zeros((len(n), 4))
    owner[:, owned_team + 1] = 1.0
    owner[:, 3] = (owned_team == US) & (owned_player == agent)

    blocks = {
        "position": here,
        "direction": moving / np.maximum(speed, 1e-3),
        "speed": speed,
        "tired": raw["left_team_tired_factor"][agent, None],
        "role": ROLES[raw["left_team_roles"][agent]],
        "card": raw["left_team_yellow_card"][agent, None],
        "offside": np.concatenate([beyond > 0, beyond], 1),
        "goals": np.array([length(OPPONENT_GOAL - here), length(OWN_GOAL - here)]).T,
        "ball": ball,
        "ball velocity": ball_speed,
        "ball owner": owner,
        "to ball": np.concatenate([to_ball, length(to_ball)[:, None]], 1),
        "ball to goals": [length(OPPONENT_GOAL - ball[:2]), length(OWN_GOAL - ball[:2])],
        "nearest": (from_ball[agent] <= from_ball.min())[:, None],
        "team-mates": others(left, left_speed, left_active, US, agent),
        "opponents": others(right, right_speed, right_active, THEM, None),
        "score": (raw["score"][0] - raw["score"][1]) / 5,
        "steps left": raw["steps_left"] / 3000,
        "game mode": GAME_MODES[raw["game_mode"]],
        "sticky": raw["left_agent_sticky_actions"],
    }
    low, high = feature_bounds(len(left), len(right))
    features, places = np.empty((len(n), len(low))), feature_places(len(left), len(right))
    for name, values in blocks.items():
        features[:, places[name]] = values
    features *= present[:, None]
    return features.clip(low, high).astype(np.float32)


def observe_state(raw) -> np.ndarray:
    """What the critic sees beside the agents' observations, (state_dim,): the game without a point of view.

    Of each player of both teams in the engine's order x, y, velocity (2), tired, on the pitch; the ball's position and
    velocity; its owner, one of nobody and all players; score, steps left and game mode; what all agents hold pressed.
    Units as in `observe_agents`.
    """
    teams = [
        np.column_stack([*positions(raw, side), raw[f"{side}_team_tired_factor"], raw[f"{side}_team_active"]])
        for side in TEAMS
    ]
    owner = np.zeros(1 + len(teams[US]) + len(teams[THEM]))
    team = raw["ball_owned_team"]
    owner[0 if team == -1 else 1 + raw["ball_owned_player"] + team * len(teams[US])] = 1.0
    match = [(raw["score"][0] - raw["score"][1]) / 5, raw["steps_left"] / 3000, *GAME_MODES[raw["game_mode"]]]
    ball = [*(raw["ball"][:2] * ISOTROPIC), raw["ball"][2] / 10]
    ball_speed = [*(raw["ball_direction"][:2] * PER_SECOND), raw["ball_direction"][2]]
    parts = (teams[US].ravel(), teams[THEM].ravel(), ball, ball_speed, owner, match, *raw["left_agent_sticky_actions"])
    return np.concatenate(parts).astype(np.float32)


def action_mask(raw) -> np.ndarray:
    """Which actions each agent may take, (n, 19); idling and running in any direction always.

    Masked is what the engine would ignore and what makes no sense:

    - a pass or a shot by an agent who cannot play the ball. It can if it owns the ball, or if nobody does and no
      team-mate is nearer to it, within 10 m: the engine keeps the button in mind for 2 s, so that one can play the ball
      on at the first touch. At a set piece nobody owns the ball before it is taken, so that this is its taker;
    - a high pass or a shot at a throw-in, which the engine ignores, and a shot while the ball is in our half;
    - to start to dribble for an agent who cannot play the ball: it would only run slower;
    - a slide while our team has the ball, with the ball more than 10 m away, or at a set piece, where the engine
      ignores it;
    - to press sprint or dribble when it is pressed, and to release sprint, dribble or direction when it is not. (A
      direction that is pressed may be chosen again, so that "run right" is one action whatever was before.)

    An agent who is sent off can only idle.
    """
    agent = np.asarray(raw["left_agent_controlled_player"])
    present, agent = agent >= 0, np.maximum(agent, 0)
    sticky = np.array(raw["left_agent_sticky_actions"], bool)
    direction, sprint, dribble = sticky[:, :8].any(1), sticky[:, 8], sticky[:, 9]
    team, set_piece = raw["ball_owned_team"], raw["game_mode"] != NORMAL
    distance = length((raw["left_team"] - raw["ball"][:2]) * ISOTROPIC)
    distance = np.where(raw["left_team_active"], distance, np.inf)
    close = distance[agent] <= TEN_METRES
    if team == -1:
        plays = close & (distance[agent] <= distance.min())
    else:
        plays = (raw["ball_owned_player"] == agent) & (team == US)

    mask = np.ones((len(agent), N_ACTIONS), bool)
    mask[:, [*PASSES, SHOT, DRIBBLE]] = plays[:, None]
    if raw["game_mode"] == THROW_IN:
        mask[:, [HIGH_PASS, SHOT]] = False
    if raw["ball"][0] < 0:
        mask[:, SHOT] = False
    mask[:, DRIBBLE] &= ~dribble
    mask[:, SLIDE] = close & (team != US) & (not set_piece)
    mask[:, SPRINT], mask[:, RELEASE_SPRINT] = ~sprint, sprint
    mask[:, STOP_DRIBBLE], mask[:, RELEASE_DIRECTION] = dribble, direction
    mask[~present, 1:] = False
    return mask


def nearest_player(raw) -> tuple[int, int]:
    """Team and index of the player who is nearest to the ball: at a set piece, the one who takes it."""
    distances = [length((raw[f"{side}_team"] - raw["ball"][:2]) * ISOTROPIC) for side in TEAMS]
    distances = [np.where(raw[f"{side}_team_active"], d, np.inf) for side, d in zip(TEAMS, distances, strict=True)]
    team = US if distances[US].min() <= distances[THEM].min() else THEM
    return team, int(distances[team].argmin())


class Behaviour:
    """What Table 3 counts, from the stream of raw observations and actions of one episode.

    "Owns" is the engine's word (ball_owned_team and ball_owned_player): the last one to touch the ball, as long as he
    has it under control; while the ball is on its way nobody owns it. At a set piece, where the engine has no owner, it
    is the nearest player. Play *stops* when the game mode leaves normal or when the score changes.

    goal        goals that the left team scored.
    lost        goals that it conceded. (The paper does not say what "Lost" is; with 0.5 to 1 of them in a game of some
                ten passes that mostly fail it cannot be lost balls.)
    win         1 if more goals were scored than conceded, else 0.
    pass        passes completed: an agent chose a pass no more than 20 steps before it last owned the ball (the engine
                executes it within those 2 s or forgets it), or later, and no shot since; and the next owner is a
                team-mate, the goalkeeper included.
    attempts    passes attempted: the completed ones, and those where the next owner is an opponent or play stops first
                without a goal of ours. Where the passer owns the ball again first, nothing is counted yet.
    pass_rate   100 * pass / attempts; not a number without attempts.
    assist      goals whose scorer, the last one of our team who owned the ball, got it by a completed pass, with
                nobody else owning it and no stop in between.
    """

    NAMES, MEMORY = ("goal", "lost", "assist", "pass", "attempts", "pass_rate", "win"), 20

    def __init__(self, raw):
        self.counts = dict.fromkeys(self.NAMES[:5], 0)
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
        scored, conceded = (raw["score"][team] - self.raw["score"][team] for team in (US, THEM))
        stopped = scored or conceded or (raw["game_mode"] != NORMAL and self.raw["game_mode"] == NORMAL)
        self.counts["goal"] += scored
        self.counts["lost"] += conceded
        owner, passed = self._owner(raw), False
        if self.owner and self.owner[0] == US:
            passed = self.pressed.get(self.owner[1], -math.inf) >= self.last_owned - self.MEMORY
        if stopped:
            self.counts["assist"] += bool(scored and self.assistant is not None and self.owner and self.owner[0] == US)
            self.counts["attempts"] += passed and not scored
            self.pressed, self.assistant, self.owner = {}, None, owner
        elif owner and owner != self.owner:
            self.counts["attempts"] += passed
            self.counts["pass"] += passed and owner[0] == US
            self.assistant = self.owner[1] if passed and owner[0] == US else None
            # A pass that was chosen before the ball came is played at the first touch.
            self.pressed = {player: time for player, time in self.pressed.items() if owner == (US, player)}
            self.owner = owner
        if owner:
            self.last_owned = self.time
        self.raw = raw

    def result(self) -> dict[str, float]:
        counts = self.counts
        rate = 100 * counts["pass"] / counts["attempts"] if counts["attempts"] else math.nan
        return counts | {"pass_rate": rate, "win": int(counts["goal"] > counts["lost"])}


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
        stopped = raw["game_mode"] != NORMAL and before["game_mode"] == NORMAL
        if goal or stopped:
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


METRICS = (*Behaviour.NAMES, *(f"reward_{term}" for term in Reward.TERMS))  # what an episode leaves behind


def find_football() -> bool:
    """Whether gfootball is installed; nothing is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("gfootball", "gfootball_engine"))


def check_scenario(name: str):
    """Ends the program if there is no such scenario, or no engine to play it."""
    if name not in SCENARIOS:
        usage_error("--scenario", name, f"must be one of {' '.join(SCENARIOS)}")
    if not find_football():
        usage_error("--scenario", name, f"the Python package gfootball is not installed; {FOOTBALL_HELP}")


class Football(gym.Env):
    """A scenario as one environment for the whole team, with one reward.

    Building it starts no game, `reset` does. Observations are dictionaries as those of FootballGames. `info` always has
    `won`; at the end of an episode `metrics` too, the numbers of Behaviour and the weighted terms of Reward. A match is
    over at the final whistle, which is `terminated`; a drill's steps are a time limit, `truncated`.
    """

    def __init__(self, scenario: str, weights: dict[str, float], seed: int = 0, build: int = 0):
        self.scenario, self.sizes, self.weights = scenario, SCENARIOS[scenario], weights
        self.seed, self.build, self.episode, self.game = seed, build, 0, None
        n, left, right = (self.sizes[name] for name in ("agents", "left", "right"))
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
        agents = self.sizes["agents"]

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
        football_env_core.copy = types.SimpleNamespace(deepcopy=lambda observation: observation)
        observation_processor.PAST_STEPS_TRACE_SIZE = 1
        self.game = football_env_core.FootballEnvCore(self.config)

    def observe(self) -> dict[str, np.ndarray]:
        raw = self.raw
        alive = np.array([player >= 0 for player in raw["left_agent_controlled_player"]], np.int8)
        mask = action_mask(raw).astype(np.int8)
        return {"obs": observe_agents(raw), "state": observe_state(raw), "action_mask": mask, "alive": alive}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.begin(seed)
        return self.observe(), {"won": False}

    def begin(self, seed=None):
        """A new episode: `reset` without the observation."""
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

    def step(self, action):
        results = self.advance(action)
        return self.observe(), *results

    def advance(self, action) -> tuple[float, bool, bool, dict]:
        """`step` without the observation."""
        actions = [int(choice) for choice in action]
        self.raw, _, done, _ = self.game.step(actions)
        self.behaviour.update(self.raw, actions)
        reward = self.reward.update(self.raw, done)
        info = {"won": bool(done and self.raw["score"][US] > self.raw["score"][THEM])}
        if done:
            info["metrics"] = self.behaviour.result()
            info["metrics"] |= {f"reward_{term}": total for term, total in self.reward.totals.items()}
        timed_out = done and self.raw["steps_left"] <= 0 and "academy" in self.scenario
        return reward, done and not timed_out, timed_out, info

    def get_state(self) -> bytes:
        """Everything that the rest of the episode and the next ones depend on; the engine pickles what it is given."""
        numbers = {"seed": self.seed, "build": self.build, "episode": self.episode}
        return self.game.get_state(numbers | {"behaviour": vars(self.behaviour), "reward": vars(self.reward)})

    def set_state(self, state: bytes):
        """Back to what get_state was called on, in this process or another one."""
        if self.game is None:
            self.begin()
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


def play_football(connection, main_end, scenario: str, weights: dict[str, float], games: list[tuple[int, int]]):
    """A worker process: a Football for each (seed, build). A message is a list of (game, method, arguments), the answer
    a list of (observation, result), until the main process is gone.
    """
    os.setsid()  # Ctrl-C and the like reach a whole session, but to end the workers is the main process's task
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a worker that is started later inherits the main process's handler
    main_end.close()  # else the connection would stay open when the main process has died
    games = [Football(scenario, weights, seed, build) for seed, build in games]
    try:
        while True:
            requests = connection.recv()
            results = [getattr(games[number], method)(**inputs) for number, method, inputs in requests]
            # All features after all steps: the engine drives what they work with out of the caches.
            connection.send([(games[k].observe(), result) for (k, *_), result in zip(requests, results, strict=True)])
    except (EOFError, OSError):
        pass


class GameDied(SystemExit):
    """A game's process is gone, or its game failed too often. Not caught, it ends the program with its one line."""


class FootballGames(gym.vector.VectorEnv):
    """Games of football, shared out to worker processes, next-step autoreset.

    Observations are dictionaries: `obs` (N, n, obs_dim), `state` (N, state_dim), `action_mask` (N, n, 19), `alive`
    (N, n), 0 for a player who is sent off. Rewards are the team's, (N,). `info["won"]` (N,) tells of the episode that
    the step ended, `info["metrics"]`, name -> (N,), its numbers: Behaviour's and Reward's, nan where no episode ended.

    `step` is `step_async` and `step_wait`, which take a part of the games too. Whoever plays the two `halves` in turn
    keeps the workers busy while it looks at one of them: all workers have games of both.

    A worker that dies, or does not answer for `timeout` seconds, is replaced: `info["crashed"]` (N,) marks the step of
    its games in which that happened, which ends their episodes and is no sample; `crashes` counts these episodes. But
    for that the number of workers changes nothing.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(
        self, scenario: str, num_envs: int, seed: int, weights: dict[str, float], num_workers: int, timeout=120.0
    ):
        self.num_envs, self.closed, self.timeout, self.weights, self.seed = num_envs, False, timeout, weights, seed
        self.scenario, self.crashes = scenario, 0
        game = Football(scenario, weights)
        self.single_observation_space, self.single_action_space = game.observation_space, game.action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.obs = gym.vector.utils.create_empty_array(self.single_observation_space, num_envs)
        self.builds, self.final, self.lost = [0] * num_envs, np.ones(num_envs, bool), np.zeros(num_envs, bool)
        middle, workers = (num_envs + 1) // 2, min(num_workers, num_envs)
        self.halves = [slice(0, middle), slice(middle, num_envs)][:num_envs]
        self.shares = [range(w, num_envs, workers) for w in range(workers)]  # games of each worker
        self.processes, self.connections, self.failures = [None] * workers, [None] * workers, [0] * workers
        for w in range(workers):
            self._start(w)

    def _start(self, w: int):
        """A new process for the games of worker w; they do not play again what those before them played."""
        self.connections[w], worker_end = multiprocessing.Pipe()
        # Environment e of seed s gets 1000 s + e: runs with neighbouring seeds do not share games.
        games = [(1000 * self.seed + e, self.builds[e]) for e in self.shares[w]]
        arguments = (worker_end, self.connections[w], self.scenario, self.weights, games)
        self.processes[w] = multiprocessing.Process(target=play_football, args=arguments, daemon=True)
        self.processes[w].start()
        worker_end.close()
        for e in self.shares[w]:
            self.builds[e] += 1

    def _stop(self, w: int):
        self.connections[w].close()
        self.processes[w].kill()
        self.processes[w].join()

    def _replace(self, w: int, reason: str):
        """All that its games were asked for is lost, and the games are."""
        self.failures[w], self.lost[self.shares[w]] = self.failures[w] + 1, True
        games = ", ".join(map(str, self.shares[w]))
        warnings.warn(f"football's worker {w} {reason}; the episodes of its games {games} are dropped", stacklevel=2)
        self._stop(w)
        self._start(w)
        if self.failures[w] >= 3:
            self.close()
            raise GameDied(f"football failed {self.failures[w]} times without a whole episode on {self.scenario}")

    def _send(self, requests: dict):
        """Environment -> (method, arguments); one message to each worker, but nothing for games that are lost."""
        for w, share in enumerate(self.shares):
            if message := [(k, *requests[e]) for k, e in enumerate(share) if e in requests and not self.lost[e]]:
                with contextlib.suppress(OSError):  # it is dead, as its answers will show
                    self.connections[w].send(message)

    def _receive(self, asked) -> dict:
        """Environment -> result of the oldest message to these environments, without those that are lost; what they
        observe goes into `obs`."""
        answers = {}
        for w, share in enumerate(self.shares):
            games = [e for e in share if e in asked and not self.lost[e]]
            if not games:
                continue
            try:
                if self.connections[w].poll(self.timeout):
                    for e, (obs, answers[e]) in zip(games, self.connections[w].recv(), strict=True):
                        for name, value in obs.items():
                            self.obs[name][e] = value
                    continue
                reason = f"did not answer for {self.timeout:g} s"
            except (EOFError, OSError):
                reason = "died"
            self._replace(w, reason)
        return answers

    def reset(self, *, seed=None, options=None):
        self.seed = self.seed if seed is None else seed
        missing = {e: ("begin", {} if seed is None else {"seed": 1000 * seed + e}) for e in range(self.num_envs)}
        while missing:
            self.lost[:] = False
            self._send(missing)
            self._receive(missing)
            missing = {e: ("begin", {}) for e in missing if self.lost[e]}
        self.final[:] = False
        return {name: value.copy() for name, value in self.obs.items()}, {}

    def step(self, actions):
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions, part=slice(None)):
        """Ask the games of a part for a step, those whose episode has ended for the next one's beginning."""
        actions = zip(range(self.num_envs)[part], np.asarray(actions).tolist(), strict=True)
        self._send({e: ("begin", {}) if self.final[e] else ("advance", {"action": action}) for e, action in actions})

    def step_wait(self, part=slice(None)):
        """The results of `step` for a part; parts are waited for in the order in which they were asked."""
        games = range(self.num_envs)[part]
        answers, reward, ended = self._receive(games), np.zeros(len(games), np.float32), np.zeros((2, len(games)), bool)
        info = {"won": np.zeros(len(games), bool), "crashed": np.zeros(len(games), bool)}
        info["metrics"] = {name: np.full(len(games), np.nan) for name in METRICS}
        for k, e in enumerate(games):
            if e not in answers:  # the game is lost; its last observation once more
                info["crashed"][k] = ended[1, k] = True
                self.crashes += not self.final[e]
                continue
            if not self.final[e]:
                reward[k], *ended[:, k], about = answers[e]
                info["won"][k] = about["won"]
                for name, value in about.get("metrics", {}).items():
                    info["metrics"][name][k] = value
                if ended[:, k].any():
                    self.failures[e % len(self.shares)] = 0
        self.lost[part], self.final[part] = False, ended.any(0)
        return {name: value[part].copy() for name, value in self.obs.items()}, reward, *ended, info

    def get_state(self) -> list[torch.Tensor]:
        """All games, for checkpoints and to leave training untouched by an evaluation.

        They hold pickles of the engine's making: `--resume` no run that you would not run code of.
        """
        self._send({e: ("get_state", {}) for e in range(self.num_envs)})
        answers = self._receive(range(self.num_envs))
        games = [torch.frombuffer(bytearray(answers.get(e, b"-")), dtype=torch.uint8) for e in range(self.num_envs)]
        return [torch.from_numpy(self.final.copy()), torch.tensor(self.builds), *games]

    def set_state(self, tensors: list[torch.Tensor]):
        """A game that was or is lost on the way ends its episode with the next step, as one that breaks there."""
        self.final, self.builds = tensors[0].numpy().copy(), tensors[1].tolist()
        games = [tensor.numpy().tobytes() for tensor in tensors[2:]]
        self.lost[:] = [len(game) == 1 for game in games]
        self._send({e: ("set_state", {"state": game}) for e, game in enumerate(games)})
        self._receive(range(self.num_envs))

    def close_extras(self, **options):
        for w in range(len(self.shares)):
            self._stop(w)


def make_envs(args: Args) -> gym.vector.VectorEnv:
    weights = {term: getattr(args, f"reward_{term}") for term in Reward.TERMS}
    return FootballGames(args.scenario, args.num_envs, args.seed, weights, args.num_workers, args.worker_timeout)


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


def joint_step(networks: nn.ModuleList):
    """A step of several RecurrentNetworks in one batched pass: a function of their inputs (m, B, inputs), their states
    (m, B, H) and start (m, B) to outputs (m, B, outputs) and states.

    It works on a copy of the parameters: make it anew when they have changed.
    """
    weights, _ = stack_module_state(list(networks))  # (m, ...)
    weights = {name: weight if weight.dim() == 3 else weight.unsqueeze(1) for name, weight in weights.items()}

    def normalize(x, layer):
        x = F.layer_norm(x, x.shape[-1:])
        return torch.addcmul(weights[f"{layer}.bias"], x, weights[f"{layer}.weight"])

    def multiply(x, layer, kind=""):
        return torch.baddbmm(weights[f"{layer}.bias{kind}"], x, weights[f"{layer}.weight{kind}"].mT)

    def step(inputs, hidden, start):
        features = multiply(normalize(inputs, "base.0"), "base.1").relu()
        features = normalize(multiply(normalize(features, "base.3"), "base.4").relu(), "base.6")
        hidden = hidden * (1.0 - start.unsqueeze(-1))
        new, old = multiply(features, "gru", "_ih").chunk(3, -1), multiply(hidden, "gru", "_hh").chunk(3, -1)
        reset, update = (new[0] + old[0]).sigmoid(), (new[1] + old[1]).sigmoid()
        hidden = torch.lerp((new[2] + reset * old[2]).tanh(), hidden, update)
        return multiply(normalize(hidden, "head.0"), "head.1"), hidden

    return step


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


def by_network(x, networks: int):
    """(N, n, ...) -> (m, B, ...) for m networks: all agents' rows for the one that they share, else one by one."""
    return x.flatten(0, 1).unsqueeze(0) if networks == 1 else x.transpose(0, 1)


def by_agent(x, agents: int):
    """The inverse of by_network for n agents."""
    return x[0].unflatten(0, (-1, agents)) if len(x) == 1 else x.transpose(0, 1)


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
def evaluate(actors, envs, episodes: int, device) -> dict[str, list[float]]:
    """Greedy episodes from new starts: the numbers of Behaviour for each of them, with the unshaped score.

    Every environment plays a fixed share, so that short episodes are not favoured; crashed ones are played again.
    """
    n, share = envs.single_action_space.shape[0], np.full(envs.num_envs, episodes // envs.num_envs)
    share[: episodes % envs.num_envs] += 1
    act, m, results = joint_step(actors), len(actors), {name: [] for name in ("score", *Behaviour.NAMES)}
    obs, _ = envs.reset()
    hidden = torch.zeros(envs.num_envs, n, actors[0].gru.hidden_size, device=device)
    start, final = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs, bool)
    while (share > 0).any():
        inputs = torch.as_tensor(obs["obs"], device=device)
        starts = torch.as_tensor(start, dtype=torch.float32, device=device).unsqueeze(-1).expand(-1, n)
        logits, states = act(*(by_network(x, m) for x in (inputs, hidden, starts)))
        mask = torch.as_tensor(obs["action_mask"], device=device).bool()
        actions = masked_policy(by_agent(logits, n), mask).logits.argmax(-1)
        hidden, start = by_agent(states, n), final
        obs, _, terminated, truncated, info = envs.step(actions.cpu().numpy())
        final = terminated | truncated
        for e in np.flatnonzero(final & ~info["crashed"] & (share > 0)):
            metrics = {name: float(info["metrics"][name][e]) for name in Behaviour.NAMES}
            for name, value in (metrics | {"score": metrics["goal"] - metrics["lost"]}).items():
                results[name].append(value)
            share[e] -= 1
    return results


def behaviour_means(results: dict[str, list[float]]) -> dict[str, float]:
    """Means over episodes; the pass rate is the percentage of all their attempts."""
    means = {name: float(np.mean(values)) for name, values in results.items()}
    attempts = sum(results["attempts"])
    return means | {"pass_rate": 100 * sum(results["pass"]) / attempts if attempts else math.nan}


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
    """Fill in what depends on the scenario and the machine, and check what can be checked without them."""
    check_scenario(args.scenario)
    n_agents = SCENARIOS[args.scenario]["agents"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chunk = max(1, args.chunk_length)
    defaults = {
        "num_envs": 4 * cores,
        "num_steps": max(1, (400 if "academy" in args.scenario else 1000) // chunk) * chunk,
        "agent_blocks": n_agents,
        "num_workers": cores,
        "torch_threads": cores,
    }
    missing = [field.name for field in dataclasses.fields(args) if getattr(args, field.name) is None]
    args = dataclasses.replace(args, **{name: defaults[name] for name in missing})
    check_args(args)
    if args.num_steps % args.chunk_length:
        usage_error("--num-steps", args.num_steps, f"must be a multiple of --chunk-length {args.chunk_length}")
    if args.agent_blocks > n_agents:
        usage_error("--agent-blocks", args.agent_blocks, f"must be at most {n_agents}, the number of agents")
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

    # m networks of each kind: one that all agents share, or one for each agent.
    shared, inputs = args.share_parameters, state_dim + obs_dim
    m = 1 if shared else n
    actors = nn.ModuleList([RecurrentNetwork(obs_dim, n_actions, H, gain=0.01) for _ in range(m)]).to(device)
    critics = nn.ModuleList([RecurrentNetwork(inputs, 1, H, gain=1.0) for _ in range(m)]).to(device)
    normalizer = ValueNormalizer().to(device)
    # Adam leaves parameters without a gradient alone, so that every network has an optimiser of its own in here.
    actor_optimizer = torch.optim.Adam(actors.parameters(), lr=args.learning_rate, eps=1e-5)
    critic_optimizer = torch.optim.Adam(critics.parameters(), lr=args.learning_rate, eps=1e-5)
    learned = {
        "actor": actors,
        "critic": critics,
        "normalizer": normalizer,
        "actor_optimizer": actor_optimizer,
        "critic_optimizer": critic_optimizer,
    }

    checkpoint = None
    if args.resume or args.eval_only:
        source, option = (args.resume, "--resume") if args.resume else (args.checkpoint, "--checkpoint")
        checkpoint = read_checkpoint(Path(source) / "checkpoint.pt" if args.resume else Path(source), option)
        same = {"scenario": args.scenario, "share_parameters": args.share_parameters}
        if args.resume:  # the saved games are this many
            same |= {"script": Path(__file__).stem, "num_envs": N}
        for name, value in same.items():
            saved = (checkpoint["args"] | {"script": checkpoint["script"]})[name]
            if saved != value:
                usage_error(option, source, f"is of {name} {saved}, not of {value}")
        try:
            for name, part in learned.items():
                part.load_state_dict(checkpoint[name])
        except (KeyError, ValueError, RuntimeError):
            usage_error(option, source, f"does not fit networks with --hidden-size {H} on {args.scenario}")
        for optimizer in (actor_optimizer, critic_optimizer):
            optimizer.param_groups[0]["lr"] = args.learning_rate
    if args.eval_only:
        means = behaviour_means(evaluate(actors, envs, args.eval_episodes, device))
        print(f"{args.eval_episodes} greedy episodes: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()))
        envs.close()
        return

    run_name = f"{args.scenario}__{Path(__file__).stem}__{args.seed}"
    run_dir = Path(args.resume) if args.resume else new_run_dir(run_name)
    packages = ("torch", "numpy", "gymnasium", "gfootball")
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
    alive = torch.zeros(T + 1, N, n, device=device)
    start = torch.zeros(T + 1, N, device=device)  # 1: the first observation of an episode
    final = torch.zeros(T + 1, N, device=device)  # 1: the last one, its action is ignored and it is no sample
    masks = torch.zeros(T, N, n, n_actions, dtype=torch.bool, device=device)
    actions = torch.zeros(T, N, n, dtype=torch.long, device=device)
    log_probs = torch.zeros(T, N, n, device=device)
    rewards = torch.zeros(T, N, 1, device=device)
    terminated = torch.zeros(T, N, device=device)
    values = torch.zeros(T + 1, N, n, device=device)
    # Before the first step of each chunk.
    actor_hidden, critic_hidden = (torch.zeros(T // L, N, n, H, device=device) for _ in range(2))

    # Where the run stands; all of it goes into checkpoints.
    progress = {"global_step": 0, "iteration": 0, "seconds": 0.0, "crashes": 0}
    hidden = {name: torch.zeros(N, n, H, device=device) for name in ("actor", "critic")}
    next_start, next_final = torch.ones(N), torch.zeros(N)
    episode_return, episode_length = torch.zeros(N), torch.zeros(N)
    if checkpoint:
        progress = checkpoint["progress"]
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and "cuda_rng" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
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

    stop_signals = []  # Ctrl-C and SIGTERM are seen to between two iterations; a second one ends the run at once

    def ask_to_stop(number, _):
        stop_signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    old_handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.total_timesteps, initial=progress["global_step"], unit="step", unit_scale=True)
    recent, win_rate, greedy_win_rate = {}, math.nan, math.nan
    begin = time.perf_counter() - progress["seconds"]
    while progress["global_step"] < args.total_timesteps and not stop_signals:
        # ---------------------------------------------------------------------------------------- collect a rollout
        rollout_begin, crashes_before = time.perf_counter(), envs.crashes
        with torch.no_grad():
            act = joint_step(actors)
            # One half of the games after the other: the workers play the one while the policy looks at the other.
            for t, half in itertools.product(range(T + 1), envs.halves):
                if t > 0:  # the step that was asked for at t - 1
                    new_obs, reward, term, trunc, info = envs.step_wait(half)
                    for name, value in new_obs.items():
                        next_obs[name][half] = value
                    crashed, reward = torch.as_tensor(info["crashed"]), torch.as_tensor(reward)
                    lost = torch.max(final[t - 1, half], crashed.to(device))
                    final[t - 1, half] = lost  # no sample; the one before it ends the trace
                    rewards[t - 1, half, 0], terminated[t - 1, half] = reward, torch.as_tensor(term)
                    next_start[half], next_final[half] = next_final[half], torch.as_tensor(term | trunc).float()
                    episode_return[half] = (episode_return[half] + reward) * (1 - next_start[half])
                    episode_length[half] = (episode_length[half] + 1) * (1 - next_start[half])
                    for k in np.flatnonzero((term | trunc) & ~info["crashed"]):
                        episode = {name: float(numbers[k]) for name, numbers in info["metrics"].items()}
                        episode |= {"episodic_return": float(episode_return[half][k])}
                        episode |= {"episodic_length": float(episode_length[half][k])}
                        for name, value in episode.items():
                            recent.setdefault(name, []).append(value)

                for buffer, name in ((obs, "obs"), (state, "state"), (alive, "alive")):
                    buffer[t, half] = torch.as_tensor(next_obs[name][half])
                start[t, half], final[t, half] = next_start[half], next_final[half]
                if t == T:
                    continue
                masks[t, half] = torch.as_tensor(next_obs["action_mask"][half])
                if t % L == 0:
                    actor_hidden[t // L, half] = hidden["actor"][half]
                starts = start[t, half].unsqueeze(-1).expand(-1, n)
                logits, states = act(*(by_network(x, m) for x in (obs[t, half], hidden["actor"][half], starts)))
                policy = masked_policy(by_agent(logits, n), masks[t, half])
                choice = policy.sample()
                envs.step_async(choice.cpu().numpy(), half)
                actions[t, half], log_probs[t, half] = choice, policy.log_prob(choice)
                hidden["actor"][half] = by_agent(states, n)

            # Critic values for the whole rollout, in units of return, as the normaliser is now.
            critic_inputs = torch.cat([state.unsqueeze(2).expand(-1, -1, n, -1), obs], -1)
            look, before_last = joint_step(critics), None
            for t in range(T + 1):
                if t % L == 0 and t < T:
                    critic_hidden[t // L] = hidden["critic"]
                if t == T:
                    before_last = hidden["critic"]
                starts = start[t].unsqueeze(-1).expand(-1, n)
                value, states = look(*(by_network(x, m) for x in (critic_inputs[t], hidden["critic"], starts)))
                values[t], hidden["critic"] = by_agent(value, n).squeeze(-1), by_agent(states, n)
            hidden["critic"] = before_last
            values = values_for_the_dead(normalizer.denormalize(values), alive)
        done, sample = final[1:], alive[:-1] * (1 - final[:-1]).unsqueeze(-1)  # (T, N), (T, N, n)
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
        sequences = {"obs": obs[:-1], "critic_inputs": critic_inputs[:-1], "masks": masks, "actions": actions}
        sequences |= {"log_probs": log_probs, "old_values": old_values, "sample": sample}
        sequences["start"] = start[:-1].unsqueeze(-1).expand(-1, -1, n)
        sequences = {name: to_sequences(x, L, rows) for name, x in sequences.items()}
        sequences["actor_hidden"] = actor_hidden.flatten(0, 2)[rows]
        sequences["critic_hidden"] = critic_hidden.flatten(0, 2)[rows]

        def log_ratio_of(agents, actor, sequences=sequences, rows=rows, sample=sample):
            """Which sequences are these agents', log r of their samples, and their entropy."""
            columns = torch.isin(rows % n, agents).nonzero().squeeze(-1)
            new_log_probs, entropy = sequence_policy(actor, sequences, columns)
            log_ratio = (new_log_probs - sequences["log_probs"][:, columns]) * sequences["sample"][:, columns]
            return columns, log_ratio.clamp(-20, 20), entropy

        # The order of the agents by E|A_i| under pi, and its blocks. With parameters of their own (Algorithm 1) each
        # block has all epochs at once; with shared ones (Algorithm 2) there are ceil(P / blocks) rounds of one epoch.
        scores = (advantages.abs() * sample).sum((0, 1)) / sample.sum((0, 1)).clamp(min=1)
        order = agent_order(scores.cpu(), args.agent_order, torch.default_generator)
        blocks = torch.tensor(order, device=device).tensor_split(args.agent_blocks)
        rounds, epochs = (math.ceil(args.update_epochs / len(blocks)), 1) if shared else (1, args.update_epochs)
        joint_log_ratio = torch.zeros_like(done)  # over all agents whose policies have changed
        metrics = []
        for position, block in list(enumerate(blocks, 1)) * rounds:
            if shared:  # every update moves all policies, so everyone's ratio is needed anew
                with torch.no_grad():
                    columns, log_ratio, _ = log_ratio_of(torch.arange(n, device=device), actors[0])
                    joint_log_ratio = from_sequences(log_ratio, rows[columns], sample.shape).sum(-1)

            # Eq. (2): the block's advantages, corrected for all policies that have changed.
            joint_ratio = joint_log_ratio.clamp(-20, 20).exp() if args.preopc else torch.ones_like(done)
            advantages = preopc_advantages(*trace, joint_ratio, args.gamma, args.gae_lambda)
            targets = normalizer.normalize(advantages + values[:-1])  # of the value
            clip_coef = adaptive_clip(args.clip_coef, position, len(blocks), args.clip_adaptation)

            # Eq. (6) with the clip of this position: for the whole block, or for one agent with its network at a time.
            groups = [(block, actors[0], critics[0])]
            if not shared:
                groups = [(block[k : k + 1], actors[i], critics[i]) for k, i in enumerate(block.tolist())]
            for agents, actor, critic in groups:
                for _ in range(epochs):
                    columns, log_ratio, entropy = log_ratio_of(agents, actor)
                    weight, ratio = sequences["sample"][:, columns], log_ratio.exp()
                    # The preceding agents are those updated before, or, with shared parameters, everyone but i.
                    preceding = to_sequences(joint_log_ratio.unsqueeze(-1).expand(-1, -1, n), L, rows[columns])
                    preceding = preceding - log_ratio.detach() if shared else preceding
                    preceding_ratio = preceding.clamp(-20, 20).exp()
                    advantage = normalize_advantages(to_sequences(advantages, L, rows[columns]), weight)
                    surrogate = clipped_surrogate(ratio, preceding_ratio, advantage, clip_coef)
                    policy_loss, entropy = -masked_mean(surrogate, weight), masked_mean(entropy, weight)
                    new_values, _ = critic(
                        sequences["critic_inputs"].index_select(1, columns),
                        sequences["critic_hidden"][columns],
                        sequences["start"][:, columns],
                    )
                    old, target = sequences["old_values"][:, columns], to_sequences(targets, L, rows[columns])
                    losses = value_loss(new_values.squeeze(-1), old, target, args.clip_coef, args.huber_delta)
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
                        preceding_clipped = (preceding != preceding_ratio).float()
                        update[f"{place}/preceding_clipfrac"] = masked_mean(preceding_clipped, weight)
                        metrics.append(update)
            if not shared:  # the ratio is extended by the block just updated: one forward pass of its agents alone
                with torch.no_grad():
                    for agents, actor, _ in groups:
                        columns, log_ratio, _ = log_ratio_of(agents, actor)
                        joint_log_ratio += from_sequences(log_ratio, rows[columns], sample.shape).sum(-1)
        names = list(dict.fromkeys(name for update in metrics for name in update))
        means = {name: torch.stack([u[name].detach() for u in metrics if name in u]).mean() for name in names}
        means = dict(zip(names, torch.stack(list(means.values())).tolist(), strict=True))
        update_seconds = time.perf_counter() - update_begin
        if not all(math.isfinite(value) for value in means.values()):
            number = progress["iteration"] + 1
            sys.exit(f"iteration {number}: a loss or gradient is not finite; the last checkpoint is as it was")

        # ------------------------------------------------------------------------------------- log, evaluate, save
        progress["iteration"] += 1
        progress["global_step"] += steps
        progress["crashes"] += envs.crashes - crashes_before
        progress["seconds"] = time.perf_counter() - begin
        if recent:
            episodes = behaviour_means(recent)
            win_rate = episodes.pop("win")
            for name in ("episodic_return", "episodic_length"):
                writer.add_scalar(f"charts/{name}", episodes.pop(name), progress["global_step"])
            writer.add_scalar("charts/win_rate", win_rate, progress["global_step"])
            writer.add_scalar("charts/score", episodes["goal"] - episodes["lost"], progress["global_step"])
            for name, value in episodes.items():
                place = name.replace("reward_", "reward/") if name.startswith("reward_") else f"behaviour/{name}"
                writer.add_scalar(place, value, progress["global_step"])
            recent = {}
        means |= {"losses/explained_variance": float(explained), "charts/learning_rate": args.learning_rate}
        means |= {"time/rollout_seconds": rollout_seconds, "time/update_seconds": update_seconds}
        means |= {"charts/SPS": steps / (rollout_seconds + update_seconds), "charts/crashes": progress["crashes"]}
        means |= {f"a2po/position_of_agent/{agent}": place for place, agent in enumerate(order, 1)}
        for name, value in means.items():
            writer.add_scalar(name, value, progress["global_step"])
        before, now = progress["global_step"] - steps, progress["global_step"]
        if before // args.eval_every < now // args.eval_every or now >= args.total_timesteps:
            simulator_state = envs.get_state()
            results = evaluate(actors, envs, args.eval_episodes, device)
            envs.set_state(simulator_state)
            greedy = behaviour_means(results)
            greedy_win_rate = greedy.pop("win")
            record = {"step": progress["global_step"], "seconds": round(progress["seconds"], 2)}
            record |= {"win_rate": greedy_win_rate, "won": [int(win) for win in results["win"]]}
            record |= {name: results[name] for name in ("score", "goal", "lost", "assist", "pass", "attempts")}
            with eval_file.open("a") as file:
                file.write(json.dumps(record) + "\n")
            writer.add_scalar("eval/win_rate", greedy_win_rate, progress["global_step"])
            for name, value in greedy.items():
                writer.add_scalar(f"eval/{name}", value, progress["global_step"])
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
