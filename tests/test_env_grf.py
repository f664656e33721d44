"""The football environment: scripted raw observations, a double of the game in workers, the engine."""

import functools
import math
import multiprocessing
import os
import signal
import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

import a2po_grf
from a2po_grf import (
    DRIBBLE,
    HALF_PITCH,
    HIGH_PASS,
    LONG_PASS,
    N_ACTIONS,
    NORMAL,
    PASSES,
    RELEASE_DIRECTION,
    RELEASE_SPRINT,
    SCENARIOS,
    SHORT_PASS,
    SHOT,
    SLIDE,
    SPRINT,
    STOP_DRIBBLE,
    THROW_IN,
    Behaviour,
    Episodes,
    Football,
    Games,
    GamesFailed,
    Reward,
    action_mask,
    feature_bounds,
    feature_layout,
    nearest_player,
    observe_agents,
    observe_state,
    summarize,
)

WEIGHTS = dict.fromkeys(Reward.TERMS, 1.0)
IDLE, RUNNING, BOTTOM = 0, tuple(range(1, 9)), 7
KICK_OFF, GOAL_KICK, FREE_KICK, CORNER, _, PENALTY = range(1, 7)
engine = pytest.mark.skipif(not a2po_grf.find_football(), reason="gfootball is not installed, the README says how")
quiet = pytest.mark.filterwarnings("ignore:worker")
NUMBERS = ("won", "score", "goal", "lost", "assist", "pass", "attempts", "pass_rate")


def raw(owner=None, mode=NORMAL, score=(0, 0), ball=(0.0, 0.0, 0.0), steps_left=3000, sticky=None, **changes):
    """A raw observation: a goalkeeper and three agents against a goalkeeper and two; `owner` is (team, player)."""
    left = np.array([[-1.0, 0.0], [0.0, 0.0], [-0.5, 0.2], [0.5, -0.3]])
    right = np.array([[1.0, 0.0], [0.25, 0.1], [-0.25, 0.3]])
    observation = {
        "ball": np.array(ball, float),
        "ball_direction": np.zeros(3),
        "left_team": left,
        "right_team": right,
        "game_mode": mode,
        "score": list(score),
        "steps_left": steps_left,
        "ball_owned_team": -1 if owner is None else owner[0],
        "ball_owned_player": -1 if owner is None else owner[1],
        "left_agent_controlled_player": [1, 2, 3],
        "left_agent_sticky_actions": [np.zeros(10, np.uint8) for _ in range(3)],
    }
    for agent, buttons in (sticky or {}).items():
        observation["left_agent_sticky_actions"][agent][list(buttons)] = 1
    for side, team in (("left", left), ("right", right)):
        observation[f"{side}_team_direction"] = np.zeros_like(team)
        observation[f"{side}_team_tired_factor"] = np.zeros(len(team))
        observation[f"{side}_team_active"] = np.ones(len(team), bool)
        observation[f"{side}_team_yellow_card"] = np.zeros(len(team), bool)
        observation[f"{side}_team_roles"] = np.arange(len(team)) % 10
    assert set(changes) <= set(observation)
    return observation | changes


def away(team, *players):
    """Who is sent off: the engine's `active` flags without these players."""
    flags = np.ones(4 if team == "left" else 3, bool)
    flags[list(players)] = False
    return {f"{team}_team_active": flags}


# --------------------------------------------------------------------------------------------- behaviour, Table 3
def played(*steps, start=None):
    """Metrics after (raw observation, {agent: action}) steps; agents 0, 1, 2 are players 1, 2, 3."""
    behaviour = Behaviour(start or raw())
    for observation, actions in steps:
        behaviour.update(observation, [actions.get(agent, IDLE) for agent in range(3)])
    return behaviour.result()


MINE, HIS, KEEPER, ENEMY = (0, 1), (0, 2), (0, 0), (1, 1)


def expect(result, **numbers):
    wanted = dict.fromkeys(NUMBERS, 0) | {"pass_rate": math.nan} | numbers
    wanted["score"] = wanted["goal"] - wanted["lost"]
    assert result == pytest.approx(wanted, nan_ok=True)


def test_nothing_happens():
    expect(played((raw(MINE), {}), (raw(), {}), (raw(MINE), {})))


@pytest.mark.parametrize("action", PASSES)
def test_pass_completed(action):
    result = played((raw(MINE), {}), (raw(MINE), {0: action}), (raw(), {}), (raw(), {}), (raw(HIS), {}))
    expect(result, **{"pass": 1, "attempts": 1, "pass_rate": 100})


def test_pass_to_the_goalkeeper_is_completed():
    expect(
        played((raw(MINE), {}), (raw(), {0: LONG_PASS}), (raw(KEEPER), {})),
        **{"pass": 1, "attempts": 1, "pass_rate": 100},
    )


def test_pass_intercepted():
    expect(played((raw(MINE), {}), (raw(), {0: SHORT_PASS}), (raw(ENEMY), {})), attempts=1, pass_rate=0)


def test_pass_into_touch():
    expect(
        played((raw(MINE), {}), (raw(), {0: HIGH_PASS}), (raw(mode=THROW_IN), {}), (raw(HIS), {})),
        attempts=1,
        pass_rate=0,
    )


def test_two_of_three_passes_arrive():
    steps = [(raw(MINE), {}), (raw(), {0: SHORT_PASS}), (raw(HIS), {}), (raw(), {1: SHORT_PASS}), (raw(MINE), {})]
    steps += [(raw(), {0: SHORT_PASS}), (raw(ENEMY), {})]
    expect(played(*steps), **{"pass": 2, "attempts": 3, "pass_rate": 200 / 3})


def test_pressing_pass_again_is_one_attempt():
    steps = [(raw(MINE), {}), *[(raw(MINE), {0: SHORT_PASS})] * 4, (raw(), {0: LONG_PASS}), (raw(HIS), {})]
    expect(played(*steps), **{"pass": 1, "attempts": 1, "pass_rate": 100})


def test_ball_that_changes_feet_without_a_pass_is_none():
    expect(played((raw(MINE), {}), (raw(), {}), (raw(HIS), {}), (raw(ENEMY), {})))


def test_pass_button_of_another_agent_is_no_attempt():
    expect(played((raw(MINE), {}), (raw(), {1: SHORT_PASS}), (raw(ENEMY), {})))


def test_ball_back_at_the_passer_is_not_counted_yet():
    steps = [(raw(MINE), {}), (raw(), {0: SHORT_PASS}), (raw(MINE), {}), (raw(), {})]
    expect(played(*steps))
    expect(played(*steps, (raw(HIS), {})), **{"pass": 1, "attempts": 1, "pass_rate": 100})


@pytest.mark.parametrize("waiting, counted", [(20, 1), (21, 0)])
def test_the_engine_forgets_a_pass_after_two_seconds(waiting, counted):
    steps = [(raw(MINE), {0: SHORT_PASS}), *[(raw(MINE), {})] * waiting, *[(raw(), {})] * 30, (raw(ENEMY), {})]
    assert played(*steps)["attempts"] == counted


def test_a_long_flight_is_still_a_pass():
    assert played((raw(MINE), {}), (raw(MINE), {0: LONG_PASS}), *[(raw(), {})] * 50, (raw(HIS), {}))["pass"] == 1


def test_a_pass_counts_once():
    """The ball comes back to him without another, and then goes lost."""
    steps = [(raw(MINE), {}), (raw(), {0: SHORT_PASS}), (raw(HIS), {}), (raw(), {}), (raw(MINE), {}), (raw(), {})]
    expect(played(*steps, (raw(ENEMY), {})), **{"pass": 1, "attempts": 1, "pass_rate": 100})


def test_a_shot_takes_the_pass_back():
    expect(played((raw(MINE), {}), (raw(MINE), {0: SHORT_PASS}), (raw(), {0: SHOT}), (raw(ENEMY), {})))
    assert played((raw(MINE), {}), (raw(MINE), {0: SHOT}), (raw(), {0: SHORT_PASS}), (raw(ENEMY), {}))["attempts"] == 1


def test_pass_at_the_first_touch():
    steps = [(raw(ENEMY), {}), (raw(), {}), (raw(), {0: SHORT_PASS}), (raw(MINE), {}), (raw(), {}), (raw(HIS), {})]
    expect(played(*steps), **{"pass": 1, "attempts": 1, "pass_rate": 100})


def test_throw_in_is_a_pass_by_its_taker():
    ball = (-0.5, 0.21, 0.1)  # next to player 2, agent 1, whom the engine does not call its owner
    steps = [(raw(ENEMY), {}), (raw(mode=THROW_IN, ball=ball), {}), (raw(mode=THROW_IN, ball=ball), {1: SHORT_PASS})]
    steps += [(raw(ball=(-0.4, 0.2, 0.1)), {}), (raw(MINE), {})]
    expect(played(*steps), **{"pass": 1, "attempts": 1, "pass_rate": 100})


def test_sent_off_agents_press_nothing():
    start = raw(MINE, left_agent_controlled_player=[-1, 2, 3])
    expect(played((raw(), {0: SHORT_PASS}), (raw(ENEMY), {}), start=start))


def test_goal_with_assist():
    steps = [(raw(MINE), {}), (raw(), {0: SHORT_PASS}), (raw(HIS), {}), (raw(HIS), {}), (raw(), {1: SHOT})]
    result = played(*steps, (raw(score=(1, 0)), {}))
    expect(result, **{"goal": 1, "assist": 1, "pass": 1, "attempts": 1, "pass_rate": 100, "won": 1})


def test_goal_straight_from_the_ball_won_has_no_assist():
    expect(played((raw(ENEMY), {}), (raw(MINE), {}), (raw(), {0: SHOT}), (raw(score=(1, 0)), {})), goal=1, won=1)


@pytest.mark.parametrize("between", [ENEMY, KEEPER])
def test_assist_is_lost_when_somebody_else_had_the_ball(between):
    steps = [(raw(MINE), {}), (raw(), {0: SHORT_PASS}), (raw(HIS), {}), (raw(between), {}), (raw(HIS), {})]
    result = played(*steps, (raw(score=(1, 0)), {}))
    assert (result["goal"], result["assist"]) == (1, 0)


def test_assist_is_lost_when_play_stops():
    steps = [(raw(MINE), {}), (raw(), {0: SHORT_PASS}), (raw(HIS), {}), (raw(mode=FREE_KICK, ball=(-0.5, 0.21, 0)), {})]
    result = played(
        *steps, (raw(HIS), {}), (raw(score=(1, 0)), {})
    )  # he is fouled, takes the free kick himself, scores
    assert (result["goal"], result["assist"]) == (1, 0)


def test_goal_by_a_pass_is_no_failed_attempt():
    expect(played((raw(MINE), {}), (raw(), {0: LONG_PASS}), (raw(score=(1, 0)), {})), goal=1, won=1)


def test_own_goal_by_a_pass_is_a_failed_attempt():
    expect(played((raw(MINE), {}), (raw(), {0: LONG_PASS}), (raw(score=(0, 1)), {})), lost=1, attempts=1, pass_rate=0)


def test_goals_of_an_earlier_score_are_not_counted():
    result = played((raw(score=(2, 1)), {}), (raw(score=(2, 2)), {}), start=raw(score=(2, 1)))
    expect(result, lost=1)


@pytest.mark.parametrize("score, win", [((1, 0), 1), ((1, 1), 0), ((0, 1), 0)])
def test_win(score, win):
    result = played((raw(score=score), {}))
    assert (result["won"], result["score"]) == (win, score[0] - score[1])


# ------------------------------------------------------------------------------------------------------- reward
def rewarded(*observations, ended=False, weights=WEIGHTS):
    """Unweighted terms of the last step, and its reward."""
    reward = Reward(observations[0], weights)
    for observation in observations[1:-1]:
        reward.update(observation, False)
    before = dict(reward.totals)
    value = reward.update(observations[-1], ended)
    return {
        name: reward.totals[name] - before[name] for name in Reward.TERMS if reward.totals[name] != before[name]
    }, value


@pytest.mark.parametrize("score, goal", [((2, 1), 1), ((1, 2), -1), ((3, 1), 2), ((1, 1), 0)])
def test_reward_goal(score, goal):
    terms, value = rewarded(raw(score=(1, 1), ball=(0.9, 0, 0)), raw(score=score, ball=(0.9, 0, 0)))
    assert terms == ({"goal": goal} if goal else {}) and value == goal


@pytest.mark.parametrize("score, win", [((2, 1), 1), ((0, 3), -1), ((1, 1), 0)])
@pytest.mark.parametrize("ended", [True, False])
def test_reward_win_comes_at_the_end(score, win, ended):
    terms, _ = rewarded(raw(score=score), raw(score=score), ended=ended)
    assert terms == ({"win": win} if ended and win else {})


def test_reward_position():
    terms, value = rewarded(raw(ball=(0.0, 0, 0)), raw(ball=(0.25, 0, 1.5)))
    assert terms == {"position": pytest.approx(0.25)} and value == pytest.approx(0.25)
    y = 0.3 * 83.6 / 54.4  # the same length in both directions
    terms, _ = rewarded(raw(ball=(0.5, 0, 0)), raw(ball=(0.5, 0.3, 0)))
    assert terms == {"position": pytest.approx(0.5 - math.hypot(0.5, y))}


def test_moving_the_ball_around_gains_nothing():
    rng = np.random.default_rng(0)
    path = [(0.1, 0.2, 0), *rng.uniform(-0.4, 0.4, (20, 3)), (0.1, 0.2, 0)]
    reward = Reward(raw(ball=path[0]), WEIGHTS)
    assert sum(reward.update(raw(ball=ball), False) for ball in path[1:]) == pytest.approx(0)


def test_reward_ignores_where_the_ball_is_put():
    assert rewarded(raw(ball=(0.95, 0, 0)), raw(ball=(0, 0, 0), score=(1, 0)))[0] == {"goal": 1}
    ours = raw(ball=(-0.5, 0.2, 0), mode=FREE_KICK)
    assert rewarded(raw(ball=(0.5, 0, 0)), ours)[0] == {}


def test_reward_ball_gained_and_lost():
    assert rewarded(raw(ENEMY), raw(), raw(), raw(MINE))[0] == {"ball_gained": 1}
    assert rewarded(raw(MINE), raw(), raw(ENEMY))[0] == {"ball_lost": -1}
    assert rewarded(raw(MINE), raw(), raw(HIS))[0] == {}
    assert rewarded(raw(), raw(MINE))[0] == {} and rewarded(raw(), raw(ENEMY))[0] == {}
    assert rewarded(raw(ENEMY), raw(MINE), raw(MINE))[0] == {}  # once


def test_ball_after_a_stop_is_neither_gained_nor_lost():
    assert rewarded(raw(ENEMY), raw(mode=THROW_IN, ball=(-0.5, 0.2, 0)), raw(), raw(MINE))[0] == {}
    assert rewarded(raw(MINE), raw(score=(1, 0)), raw(), raw(ENEMY))[0] == {}


@pytest.mark.parametrize("mode", [GOAL_KICK, FREE_KICK, CORNER, THROW_IN, PENALTY])
def test_reward_out_is_for_a_restart_of_the_opponent(mode):
    theirs, ours = (0.25, 0.1, 0.0), (0.5, -0.3, 0.0)
    assert rewarded(raw(MINE, ball=theirs), raw(mode=mode, ball=theirs))[0] == {"out": -1}
    assert rewarded(raw(MINE, ball=ours), raw(mode=mode, ball=ours))[0] == {}
    assert rewarded(raw(MINE), raw(mode=mode, ball=theirs), raw(mode=mode, ball=theirs))[0] == {}  # once


def test_weights_of_the_reward():
    weights = {"goal": 5.0, "win": 3.0, "position": 0.0, "ball_gained": 0.0, "ball_lost": 0.0, "out": 0.0}
    terms, value = rewarded(raw(), raw(score=(1, 0)), ended=True, weights=weights)
    assert terms == {"goal": 5, "win": 3} and value == 8


def test_nearest_player():
    assert nearest_player(raw(ball=(0.24, 0.1, 0))) == (1, 1)
    assert nearest_player(raw(ball=(-0.5, 0.1, 0))) == (0, 2)
    assert nearest_player(raw(ball=(0.24, 0.1, 0), **away("right", 1))) == (0, 1)


# ------------------------------------------------------------------------------------------------------ the mask
def allowed(observation, agent):
    return set(np.flatnonzero(action_mask(observation)[agent]).tolist())


ALWAYS = {IDLE, *RUNNING}


def test_mask_with_the_ball():
    mine = raw(MINE, ball=(0.01, 0, 0))
    assert allowed(mine, 0) == ALWAYS | {*PASSES, SHOT, DRIBBLE, SPRINT}
    assert allowed(mine, 1) == allowed(mine, 2) == ALWAYS | {SPRINT}


def test_mask_when_the_opponent_has_the_ball():
    near = 9.9 / HALF_PITCH
    theirs = raw(ENEMY, ball=(near, 0, 0))
    assert allowed(theirs, 0) == ALWAYS | {SPRINT, SLIDE}
    assert allowed(theirs, 1) == ALWAYS | {SPRINT}
    assert SLIDE not in allowed(raw(ENEMY, ball=(10.1 / HALF_PITCH, 0, 0)), 0)


def test_mask_of_a_free_ball():
    free = raw(ball=(9.9 / HALF_PITCH, 0, 0))
    assert allowed(free, 0) == ALWAYS | {*PASSES, SHOT, DRIBBLE, SPRINT, SLIDE}
    assert allowed(raw(ball=(10.1 / HALF_PITCH, 0, 0)), 0) == ALWAYS | {SPRINT}
    left = raw()["left_team"]
    left[2] = (0.05, 0)  # now a team-mate is nearer; both are close
    assert not set(PASSES) & allowed(raw(ball=(0.1, 0, 0), left_team=left), 0)
    assert set(PASSES) < allowed(raw(ball=(0.1, 0, 0), left_team=left), 1)
    assert set(PASSES) < allowed(raw(ball=(0.1, 0, 0), left_team=left, **away("left", 2)), 0)


def test_no_shot_from_our_half():
    assert SHOT not in allowed(raw(MINE, ball=(-0.01, 0, 0)), 0)


def test_mask_at_a_throw_in():
    taker = allowed(raw(mode=THROW_IN, ball=(0.51, -0.3, 0)), 2)
    assert taker == ALWAYS | {LONG_PASS, SHORT_PASS, DRIBBLE, SPRINT}
    held = allowed(raw((0, 3), mode=THROW_IN, ball=(0.51, -0.3, 0)), 2)
    assert held == taker


@pytest.mark.parametrize("mode", [KICK_OFF, GOAL_KICK, FREE_KICK, CORNER, THROW_IN, PENALTY])
def test_no_slide_at_a_set_piece(mode):
    assert SLIDE not in allowed(raw(mode=mode), 0)
    assert (HIGH_PASS in allowed(raw(mode=mode), 0)) == (mode != THROW_IN)


def test_mask_of_what_is_pressed():
    pressed = raw(MINE, sticky={0: (8,), 1: (2,), 2: (9,)})
    assert allowed(pressed, 0) == ALWAYS | {*PASSES, SHOT, DRIBBLE, RELEASE_SPRINT}
    assert allowed(pressed, 1) == ALWAYS | {SPRINT, RELEASE_DIRECTION}
    assert allowed(pressed, 2) == ALWAYS | {SPRINT, STOP_DRIBBLE}
    assert DRIBBLE not in allowed(raw(MINE, sticky={0: (9,)}), 0)


@pytest.mark.parametrize("direction", range(8))
def test_every_direction_can_be_released(direction):
    assert RELEASE_DIRECTION in allowed(raw(sticky={1: (direction,)}), 1)


def test_an_agent_who_is_sent_off_idles():
    gone = raw(MINE, left_agent_controlled_player=[-1, 2, 3], **away("left", 1))
    assert allowed(gone, 0) == {IDLE}
    assert allowed(gone, 1) > ALWAYS


# ------------------------------------------------------------------------------------------------------- features
def blocks(observation, agent):
    """Name -> values of an agent's blocks."""
    left, right = len(observation["left_team"]), len(observation["right_team"])
    sizes = [size for size, _, _ in feature_layout(left, right).values()]
    row = observe_agents(observation)[agent]
    assert len(row) == sum(sizes)
    return dict(zip(feature_layout(left, right), np.split(row, np.cumsum(sizes)[:-1]), strict=True))


STRETCH = 83.6 / 54.4


def same(values, *expected):
    np.testing.assert_allclose(values, np.array(expected, np.float32), rtol=1e-5, atol=1e-6)


def test_features_of_oneself():
    speed = np.zeros((4, 2))
    speed[2] = 0.3 / 54.4, 0.4 / 83.6  # 0.5 m in 0.1 s
    scene = raw(
        left_team_direction=speed,
        left_team_tired_factor=np.array([0, 0.1, 0.2, 0.3]),
        left_team_yellow_card=np.array([False, False, True, False]),
        left_team_roles=np.array([0, 9, 5, 1]),
    )
    agent = blocks(scene, 1)
    same(agent["position"], -0.5, 0.2 * STRETCH)
    same(agent["direction"], 0.6, 0.8)
    same(agent["speed"], 0.5)
    same(agent["tired"], 0.2)
    same(agent["role"], *np.eye(10)[5])
    same(agent["card"], 1)
    same(agent["goals"], math.hypot(1.5, 0.2 * STRETCH), math.hypot(0.5, 0.2 * STRETCH))
    other = blocks(scene, 0)
    same(other["direction"], 0, 0)
    same(other["speed"], 0)
    same(other["card"], 0)


def test_feature_offside():
    ahead = raw()["left_team"]
    ahead[1] = 0.8, 0.0
    same(blocks(raw(left_team=ahead), 0)["offside"], 1, 0.8 - 0.25)  # the last but one opponent is at 0.25
    same(blocks(raw(left_team=ahead, ball=(0.9, 0, 0)), 0)["offside"], 0, -0.1)  # behind the ball
    same(blocks(raw(left_team=ahead, **away("right", 1)), 0)["offside"], 1, 0.8)  # the half-way line
    same(blocks(raw(left_team=ahead, **away("right", 1, 2)), 0)["offside"], 1, 0.8)
    same(blocks(raw(), 1)["offside"], 0, -0.75)


def test_features_of_the_ball():
    scene = raw(MINE, ball=(0.5, 0.1, 2.0), ball_direction=np.array([1 / 54.4, -0.5 / 83.6, 0.3]))
    agent = blocks(scene, 0)
    same(agent["ball"], 0.5, 0.1 * STRETCH, 0.2)
    same(agent["ball velocity"], 1, -0.5, 0.3)
    same(agent["ball owner"], 0, 1, 0, 1)
    same(agent["to ball"], 0.5, 0.1 * STRETCH, math.hypot(0.5, 0.1 * STRETCH))
    same(agent["ball to goals"], math.hypot(0.5, 0.1 * STRETCH), math.hypot(1.5, 0.1 * STRETCH))
    same(agent["nearest"], 1)
    same(blocks(scene, 1)["ball owner"], 0, 1, 0, 0)
    same(blocks(scene, 1)["to ball"], 1, -0.1 * STRETCH, math.hypot(1, 0.1 * STRETCH))
    same(blocks(scene, 1)["nearest"], 0)
    same(blocks(raw(), 0)["ball owner"], 1, 0, 0, 0)
    same(blocks(raw((1, 1)), 0)["ball owner"], 0, 0, 1, 0)  # an opponent with the agent's number


def test_features_of_the_others_are_sorted_by_distance():
    speed = np.zeros((4, 2))
    speed[1], speed[3] = (0.2 / 54.4, 0), (0.5 / 54.4, 0)
    scene = raw((0, 3), left_team_direction=speed, left_team_tired_factor=np.array([0.1, 0.2, 0.3, 0.4]))
    mates = blocks(scene, 0)["team-mates"].reshape(3, 8)
    # Player 3 is 0.5 away in x and -0.3 in y, player 2 is -0.5 and 0.2: in metres the second one is nearer.
    y = 0.2 * STRETCH
    same(mates[0], -0.5, y, math.hypot(0.5, y), -0.2, 0, 0.3, 0, 1)
    y = -0.3 * STRETCH
    same(mates[1], 0.5, y, math.hypot(0.5, y), 0.3, 0, 0.4, 1, 1)
    same(mates[2], -1, 0, 1, -0.2, 0, 0.1, 0, 1)
    enemies = blocks(scene, 0)["opponents"].reshape(3, 8)
    assert enemies[:, 2].tolist() == sorted(enemies[:, 2].tolist())
    y = 0.1 * STRETCH
    same(enemies[0], 0.25, y, math.hypot(0.25, y), -0.2, 0, 0, 0, 1)
    same(blocks(raw((1, 1)), 0)["opponents"].reshape(3, 8)[:, 6], 1, 0, 0)


def test_features_of_those_who_are_sent_off():
    scene = raw(left_agent_controlled_player=[-1, 2, 3], **away("left", 1))
    assert not observe_agents(scene)[0].any()
    mates = blocks(scene, 1)["team-mates"].reshape(3, 8)
    same(mates[:, 7], 1, 1, 0)
    same(mates[2], *[0] * 8)
    same(blocks(raw(**away("right", 1)), 0)["opponents"].reshape(3, 8)[:, 7], 1, 1, 0)
    same(blocks(scene, 1)["nearest"], 1)


def test_features_of_the_match():
    agent = blocks(raw(mode=CORNER, score=(1, 3), steps_left=1500, sticky={1: (4, 8)}), 1)
    same(agent["score"], -0.4)
    same(agent["steps left"], 0.5)
    same(agent["game mode"], *np.eye(7)[CORNER])
    same(agent["sticky"], 0, 0, 0, 0, 1, 0, 0, 0, 1, 0)


def test_features_are_clipped_to_their_ranges():
    low, high = feature_bounds(4, 3)
    wild = observe_agents(raw(score=(9, 0), ball=(7, 7, 70), steps_left=3001))
    assert (wild >= low).all() and (wild <= high).all()


def test_state():
    state = observe_state(raw((1, 2), ball=(0.5, 0.1, 2.0), score=(2, 1), sticky={0: (4,)}))
    players = state[: 7 * 6].reshape(7, 6)
    same(players[2], -0.5, 0.2 * STRETCH, 0, 0, 0, 1)
    same(players[5], 0.25, 0.1 * STRETCH, 0, 0, 0, 1)
    same(state[42:48], 0.5, 0.1 * STRETCH, 0.2, 0, 0, 0)
    same(state[48:56], *np.eye(8)[7])  # nobody, 4 of ours, 3 of theirs
    same(state[56:65], 0.2, 1, *np.eye(7)[NORMAL])
    same(state[65:], 0, 0, 0, 0, 1, *[0] * 25)


def test_state_of_a_game_in_motion():
    """Velocities in the units of the features, fatigue, who is on the pitch, whose ball it is, and nobody's."""
    ours, theirs = np.zeros((4, 2)), np.zeros((3, 2))
    ours[2], theirs[1] = (0.3 / 54.4, 0.4 / 83.6), (0.1 / 54.4, -0.2 / 83.6)
    moves = {"left_team_direction": ours, "right_team_direction": theirs}
    moves |= {"ball_direction": np.array([1 / 54.4, -0.5 / 83.6, 0.3])}
    moves |= {"left_team_tired_factor": np.arange(4) / 10, "right_team_tired_factor": np.arange(4, 7) / 10}
    state = observe_state(raw(HIS, **moves, **away("left", 1)))
    players = state[: 7 * 6].reshape(7, 6)
    same(players[2], -0.5, 0.2 * STRETCH, 0.3, 0.4, 0.2, 1)
    same(players[5], 0.25, 0.1 * STRETCH, 0.1, -0.2, 0.5, 1)
    same(players[:, 5], 1, 0, 1, 1, 1, 1, 1)
    same(state[45:48], 1, -0.5, 0.3)
    same(state[48:56], *np.eye(8)[3])
    same(observe_state(raw())[48:56], *np.eye(8)[0])
    same(blocks(raw(left_team_direction=ours), 0)["team-mates"].reshape(3, 8)[:, 4], *sorted([0, 0.4, 0], reverse=True))


@pytest.mark.parametrize("name", SCENARIOS)
def test_spaces_have_the_sizes_of_the_layout(name):
    sizes = SCENARIOS[name]
    layout = feature_layout(sizes.left, sizes.right)
    space = Football(name, WEIGHTS, seed=0).observation_space
    assert space["obs"].shape == (sizes.agents, sum(size for size, _, _ in layout.values()))
    assert all(low < high for _, low, high in layout.values())


# ----------------------------------------------------------------------------------------- a double of the engine
class Engine:
    """What Football asks of gfootball; shows these (raw observation, whether the episode is over)."""

    def __init__(self, *shown):
        self.shown = list(shown)

    def reset(self):
        pass

    def observation(self):
        return raw()

    def step(self, actions):
        observation, done = self.shown.pop(0)
        return observation, 0, done, {}


@pytest.mark.parametrize("name, drill", [("academy_3_vs_1_with_keeper", True), ("5_vs_5", False)])
@pytest.mark.parametrize("steps_left", [0, 7])
def test_an_episode(name, drill, steps_left):
    """Who is present, the reward of an end, what is told of it, and that the next one is another."""
    game = Football(name, WEIGHTS, seed=0)
    off = raw(left_agent_controlled_player=[-1, 2, 3], **away("left", 1))
    game.game, game.config = Engine((off, False), (raw(score=(1, 0), steps_left=steps_left), True)), {}
    game.reset()
    assert game.step([IDLE] * 3) == (0.0, False, False, {}) and game.observe()["alive"].tolist() == [0, 1, 1]
    reward, terminated, truncated, numbers = game.step([IDLE] * 3)
    assert truncated == (drill and steps_left == 0) and terminated == (not truncated) and reward == 2.0
    assert set(numbers) == {*NUMBERS, *(f"reward_{term}" for term in Reward.TERMS)}
    assert (numbers["goal"], numbers["won"], numbers["reward_goal"], numbers["reward_win"]) == (1, 1, 1, 1)
    first = dict(game.config)
    game.reset()
    assert (first["episode_number"], game.config["episode_number"]) == (0, 1)
    assert first["game_engine_random_seed"] != game.config["game_engine_random_seed"]


# ------------------------------------------------------------------------------------------- a double of the game
class Double:
    """Stands for Football in its process: episodes of three steps; an action of the first agent tells it to break."""

    DIE, HANG, FAIL = 1, 2, 3
    broken_builds = ()  # of environment 0

    def __init__(self, seed, build=0):
        self.seed, self.build, self.episode, self.time = seed, build, 0, 0
        self.observation_space = gym.spaces.Dict(obs=gym.spaces.Box(-np.inf, np.inf, (1, 4), np.float32))
        self.action_space = gym.spaces.MultiDiscrete([9])

    def observe(self):
        return {"obs": np.array([[self.seed, self.build, self.episode, self.time]], np.float32)}

    def reset(self, seed=None):
        if self.build in Double.broken_builds and self.seed % 1000 == 0:
            os._exit(1)
        self.episode, self.time = self.episode + 1, 0
        if seed is not None:
            self.seed, self.build, self.episode = seed, 0, 1

    def step(self, action):
        if action[0] == self.DIE:
            os._exit(1)
        if action[0] == self.HANG:
            time.sleep(1000)
        if action[0] == self.FAIL:
            raise RuntimeError("the engine says no")
        self.time += 1
        ended = self.time == 3
        numbers = {"won": 1, "goal": self.episode} if ended else {}
        return float(self.time), ended and self.seed % 2 == 0, ended and self.seed % 2 == 1, numbers

    def get_state(self):
        return self.seed, self.build, self.episode, self.time

    def set_state(self, state):
        self.seed, self.build, self.episode, self.time = state

    def close(self):
        pass


@pytest.fixture
def games(monkeypatch):
    monkeypatch.setattr(Double, "broken_builds", ())
    made = []

    def make(num_envs=2, seed=3000, timeout=20.0, num_workers=2):
        made.append(Games(Double, num_envs, seed, num_workers, timeout))
        return made[-1]

    yield make
    for envs in made:
        envs.close()
        assert not any(process.is_alive() for process in envs.processes)


def step(envs, *actions):
    obs, reward, terminated, truncated, info = envs.step([[action] for action in actions])
    return obs["obs"][:, 0, :].tolist(), reward[:, 0].tolist(), terminated.tolist(), truncated.tolist(), info


@pytest.mark.filterwarnings("error:worker")
def test_next_step_autoreset(games):
    envs = games()
    obs, _ = envs.reset()
    assert obs["obs"][:, 0].tolist() == [[3000, 0, 1, 0], [3001, 0, 1, 0]]
    step(envs, 0, 0)
    obs, reward, terminated, truncated, info = step(envs, 0, 0)
    assert obs == [[3000, 0, 1, 2], [3001, 0, 1, 2]] and info["episode"] == {}
    obs, reward, terminated, truncated, info = step(envs, 0, 0)
    assert (obs, reward) == ([[3000, 0, 1, 3], [3001, 0, 1, 3]], [3, 3])
    assert (terminated, truncated) == ([True, False], [False, True])
    assert {name: numbers.tolist() for name, numbers in info["episode"].items()} == {"won": [1, 1], "goal": [1, 1]}
    # The next step takes no action: it is the first observation of the next episode.
    obs, reward, terminated, truncated, info = step(envs, Double.DIE, Double.HANG)
    assert (obs, reward) == ([[3000, 0, 2, 0], [3001, 0, 2, 0]], [0, 0])
    assert not any(terminated + truncated) and info["episode"] == {} and not info["crashed"].any()


def test_observations_are_not_written_over(games):
    envs = games()
    seen = [envs.reset()[0], *(envs.step([[0], [0]])[0] for _ in range(2))]
    assert [obs["obs"][0, 0, 3] for obs in seen] == [0, 1, 2]


@pytest.mark.parametrize("way", ["dies", "hangs", "raises", "killed", "stopped"])
def test_a_worker_that_breaks_is_replaced_and_its_episode_dropped(games, way, capfd):
    envs = games(timeout=1.0 if way in ("hangs", "stopped") else 20.0)
    envs.reset()
    step(envs, 0, 0)
    old = envs.processes[0]
    action = {"dies": Double.DIE, "hangs": Double.HANG, "raises": Double.FAIL}.get(way, 0)
    if way == "killed":
        os.kill(old.pid, signal.SIGKILL)
    if way == "stopped":
        os.kill(old.pid, signal.SIGSTOP)
    reason = {"hangs": "did not answer for 1 s", "raises": "failed: RuntimeError.'the engine says no'..*"}
    reason = (reason | {"stopped": reason["hangs"]}).get(way, "died")
    with pytest.warns(UserWarning, match=f"worker 0 {reason}; the episodes of its games are dropped"):
        obs, reward, terminated, truncated, info = step(envs, action, 0)
    # Its step is no sample and ends the episode; the other game goes on.
    assert (obs, reward) == ([[3000, 0, 1, 1], [3001, 0, 1, 2]], [0, 2])
    assert (terminated, truncated) == ([False, False], [True, False])
    assert info["crashed"].tolist() == [True, False] and info["episode"] == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        obs, reward, terminated, truncated, info = step(envs, 0, 0)
        assert (obs, reward) == ([[3000, 1, 1, 0], [3001, 0, 1, 3]], [0, 3])  # a new process, a fresh episode
        assert not info["crashed"].any() and truncated == [False, True]
        assert step(envs, 0, 0)[0] == [[3000, 1, 1, 1], [3001, 0, 2, 0]]
    assert not old.is_alive()


@quiet
@pytest.mark.parametrize("way", [Double.DIE, Double.HANG])
def test_a_worker_s_other_games_are_lost_with_it(games, way):
    """Five games in two workers, 0 2 4 and 1 3. Game 2 breaks its worker after game 0 has played and before game 4."""
    envs = games(5, timeout=1.0)
    envs.reset()
    obs, reward, terminated, truncated, info = step(envs, 0, 0, way, 0, 0)
    assert info["crashed"].tolist() == truncated == [True, False, True, False, True] and not any(terminated)
    assert obs[1] == [3001, 0, 1, 1] and obs[3] == [3003, 0, 1, 1] and reward == [0, 1, 0, 1, 0]
    obs, _, _, _, info = step(envs, 0, 0, 0, 0, 0)
    assert not info["crashed"].any()
    assert obs == [[3000, 1, 1, 0], [3001, 0, 1, 2], [3002, 1, 1, 0], [3003, 0, 1, 2], [3004, 1, 1, 0]]


@quiet
def test_a_game_that_breaks_at_every_other_start_takes_its_worker_along_each_time(games):
    """Game 0's first two processes break as it begins; game 1, in the same worker, begins a third time with it."""
    Double.broken_builds = (0, 1)
    envs = games(3, num_workers=1)
    assert envs.reset()[0]["obs"][:, 0].tolist() == [[3000, 2, 1, 0], [3001, 2, 1, 0], [3002, 2, 1, 0]]
    assert step(envs, 0, 0, 0)[0] == [[3000, 2, 1, 1], [3001, 2, 1, 1], [3002, 2, 1, 1]]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 9])
def test_the_number_of_workers_changes_nothing(games, num_workers):
    played = []
    for workers in (num_workers, 5):
        envs = games(5, num_workers=workers)
        envs.reset()
        assert len(envs.processes) == min(workers, 5)
        results = [step(envs, 0, 0, 0, 0, 0) for _ in range(6)]
        played.append([*results, [part.tolist() for part in envs.get_state()]])
    assert str(played[0]) == str(played[1])


@quiet
def test_a_worker_that_breaks_at_the_reset_is_replaced_too(games):
    Double.broken_builds = (0, 1)
    envs = Episodes(games())
    obs, _ = envs.reset()
    assert obs["obs"][:, 0].tolist() == [[3000, 2, 1, 0], [3001, 0, 3, 0]], "all begin again"
    assert envs.crashes == 0, "no episode had begun"


@quiet
def test_a_game_that_never_starts_ends_the_program_with_one_line(games):
    Double.broken_builds = range(100)
    envs = games()
    with pytest.raises(GamesFailed, match="games failed 3 times without a whole episode; at last a worker died"):
        envs.reset()
    assert envs.closed and not any(process.is_alive() for process in envs.processes)


@quiet
def test_a_whole_episode_forgives_the_failures(games):
    envs = games(1)
    envs.reset()
    for _ in range(5):
        step(envs, Double.DIE)
        for _ in range(4):
            step(envs, 0)
        assert envs.failures == [0]
        step(envs, 0)
    with pytest.raises(GamesFailed):
        for _ in range(6):
            step(envs, Double.DIE)


def test_seeds_of_the_games(games):
    envs = games(2, seed=7000)
    envs.reset()
    assert envs.reset(seed=8000)[0]["obs"][:, 0].tolist() == [[8000, 0, 1, 0], [8001, 0, 1, 0]]


def test_get_and_set_state(games):
    envs, other = games(), games()
    envs.reset(), other.reset()
    for _ in range(3):
        step(envs, 0, 0)
    state = envs.get_state()
    for _ in range(5):
        step(envs, 0, 0)
    for restored in (envs, other):
        restored.set_state(state)
        assert step(restored, 0, 0)[0] == [[3000, 0, 2, 0], [3001, 0, 2, 0]]
        assert step(restored, 0, 0)[0] == [[3000, 0, 2, 1], [3001, 0, 2, 1]]


@quiet
@pytest.mark.parametrize("moment", ["get_state", "between", "set_state"])
def test_a_game_lost_around_an_evaluation_ends_its_episode(games, moment):
    envs = games()
    envs.reset()
    step(envs, 0, 0)
    if moment == "get_state":
        os.kill(envs.processes[0].pid, signal.SIGKILL)
    state = envs.get_state()
    assert (state[0] is None) == (moment == "get_state")
    envs.reset()
    if moment == "set_state":
        os.kill(envs.processes[0].pid, signal.SIGKILL)
    if moment == "between":
        state = [None, state[1]]
    envs.set_state(state)
    obs, _, _, truncated, info = step(envs, 0, 0)
    assert info["crashed"].tolist() == truncated == [True, False] and obs[1] == [3001, 0, 1, 2]
    obs, _, _, truncated, info = step(envs, 0, 0)
    assert not info["crashed"].any() and obs[0][3] == 0 and obs[1] == [3001, 0, 1, 3]


def orphaning(pipe):
    envs = Games(Double, 2, 0, 2, 20.0)
    envs.reset()
    pipe.send([process.pid for process in envs.processes])
    time.sleep(1000)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc")
def test_workers_end_when_the_main_process_is_killed():
    ours, theirs = multiprocessing.Pipe()
    main = multiprocessing.get_context("fork").Process(target=orphaning, args=(theirs,))
    main.start()
    pids = ours.recv()
    assert all(alive(pid) for pid in pids)
    main.kill()
    main.join()
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_ctrl_c_is_left_to_the_main_process(games):
    envs = games()
    envs.reset()
    assert all(os.getsid(process.pid) != os.getsid(0) for process in envs.processes)


# ------------------------------------------------------------------------------------------------------- two halves
@pytest.fixture
def halves(games, monkeypatch):
    """halves(num_envs) as the script makes them, with doubles in place of the games."""

    def make(num_envs, num_workers=2, seed=3):
        monkeypatch.setattr(a2po_grf, "Football", lambda scenario, weights, seed, build: Double(seed, build))
        made = a2po_grf.make_envs(a2po_grf.Args(num_envs=num_envs, num_workers=num_workers, seed=seed))
        closing.append(made)
        return made

    closing = []
    yield make
    for made in closing:
        made.close()


def seen(envs):
    return envs.look("cpu")["obs"][:, 0].tolist()


def play_in_turns(envs, actions):
    """As in a rollout, with actions (steps, N): for each step what is seen after it, and (N,) crashed."""
    played, asked = [[] for _ in actions], {}
    for t in range(len(actions) + 1):
        first = 0
        for h, half in enumerate(envs.halves):
            if t > 0:
                _, _, crashed = half.record(asked[h], *half.env.step_wait())
                obs = half.look("cpu")["obs"][:, 0].tolist()
                played[t - 1] += zip(obs, crashed.tolist(), strict=True)
            if t < len(actions):
                asked[h] = torch.tensor(actions[t][first : first + half.num_envs])[:, None]
                half.env.step_async(asked[h].numpy())
            first += half.num_envs
    return played


@pytest.mark.parametrize("num_envs", [1, 2, 5, 8])
@pytest.mark.parametrize("num_workers", [1, 9])
def test_halves_play_what_all_games_would(games, halves, num_envs, num_workers):
    """In turns and at once: the episodes, their numbers and the states are those of one set of games."""
    turns, at_once, whole = halves(num_envs, num_workers), halves(num_envs, num_workers), Episodes(games(num_envs))
    assert len(turns.halves) == min(num_envs, 2) and turns.num_envs == num_envs
    turns.reset(), at_once.reset(), whole.reset()
    assert seen(turns) == seen(at_once) == seen(whole) == [[3000 + e, 0, 1, 0] for e in range(num_envs)]
    actions = torch.zeros(num_envs, 1, dtype=torch.long)
    for results in play_in_turns(turns, np.zeros((9, num_envs), int)):
        whole.play(actions), at_once.play(actions)
        assert [obs for obs, _ in results] == seen(whole) == seen(at_once)
    ended = [sorted(envs.finished(), key=lambda one: (one["env"], one["goal"])) for envs in (turns, at_once, whole)]
    assert ended[0] == ended[1] == ended[2] and len(ended[0]) == 2 * num_envs
    assert turns.finished() == []


@quiet
@pytest.mark.parametrize("broken", [0, 2])
def test_a_worker_breaks_while_both_halves_are_under_way(halves, broken):
    """Of two games in one worker the other loses its step, too; those of the other half go on."""
    envs = halves(4, num_workers=1)
    envs.reset()
    actions = np.zeros((5, 4), int)
    actions[1, broken] = Double.DIE
    lost = {broken, broken + 1}
    for t, results in enumerate(play_in_turns(envs, actions)):
        for e, (obs, crashed) in enumerate(results):
            assert crashed == (t == 1 and e in lost), (t, e)
            if e in lost and t > 1:
                assert obs == [3000 + e, 1, 1, t - 2], (t, e)
            if e not in lost:
                assert obs == [3000 + e, 0, *((1, t + 1) if t < 3 else (2, t - 3))], (t, e)
    assert envs.crashes == 2
    envs.crashes = 7  # as on resume
    assert envs.crashes == 7


def test_the_state_of_halves(halves):
    envs, other = halves(3), halves(3, num_workers=1, seed=4)
    envs.reset(), other.reset()
    actions = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(2):
        envs.play(actions)
    state = envs.get_state()
    for restored in (envs, other):
        restored.play(actions)
        restored.set_state(state)
        assert seen(restored) == [[3000 + e, 0, 1, 2] for e in range(3)]
        restored.play(actions)
        assert [episode["length"] for episode in restored.finished()[-3:]] == [3, 3, 3]


@quiet
def test_halves_cannot_be_saved_when_the_games_of_one_have_failed(halves):
    """The other half is amidst a step."""
    envs = halves(2)
    envs.reset()
    with pytest.raises(GamesFailed):
        play_in_turns(envs, [[Double.DIE, 0]] * 9)
    assert envs.get_state() is None
    envs.close()
    assert not any(process.is_alive() for half in envs.halves for process in half.env.processes)


def test_pass_rate_over_episodes_is_that_of_all_attempts():
    numbers = {"env": 0, "won": 0, "return": 1.5, "length": 9}
    episodes = [numbers | {"pass": p, "attempts": a, "goal": g} for p, a, g in ((1, 1, 0), (0, 0, 1), (4, 9, 2))]
    means = summarize(episodes)
    assert (means["pass_rate"], means["goal"], means["win_rate"]) == (50, 1, 0)
    assert (means["episodic_return"], means["episodic_length"]) == (1.5, 9) and "env" not in means
    assert math.isnan(summarize([numbers | {"pass": 0, "attempts": 0}])["pass_rate"])


# --------------------------------------------------------------------------------------------------- bad input
def test_a_wrong_scenario_is_one_line_with_the_names(capsys):
    with pytest.raises(SystemExit) as error:
        a2po_grf.check_scenario("6_vs_6")
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1
    assert "--scenario 6_vs_6" in message and all(name in message for name in SCENARIOS)


def test_a_missing_engine_is_one_line_with_the_commands(capsys, monkeypatch):
    monkeypatch.setattr(a2po_grf, "find_football", lambda: False)
    with pytest.raises(SystemExit) as error:
        a2po_grf.check_scenario("5_vs_5")
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1
    assert "gfootball is not installed" in message and "pip install --no-build-isolation gfootball==2.10.2" in message


def test_find_football_looks_for_the_package_and_its_engine(monkeypatch):
    for missing in ("gfootball", "gfootball_engine"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, missing=missing: None if name == missing else 1)
        assert not a2po_grf.find_football()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: 1)
    assert a2po_grf.find_football()


# ------------------------------------------------------------------------------------------------- the real engine
def random_actions(obs, rng):
    return (obs["action_mask"] * rng.random(obs["action_mask"].shape)).argmax(-1)


def play(game, steps, seed=0):
    """(observation, reward, terminated, truncated, numbers) of random steps; new episodes begin where one ends."""
    rng, stream = np.random.default_rng(seed), []
    obs = game.observe()
    for _ in range(steps):
        results = game.step(random_actions(obs, rng))
        obs = game.observe()
        stream.append((obs, *results))
        if results[1] or results[2]:
            game.reset()
            obs = game.observe()
    return stream


def equal(one, other):
    return all(
        a[1:4] == b[1:4] and all(np.array_equal(a[0][name], b[0][name]) for name in a[0])
        for a, b in zip(one, other, strict=True)
    )


@engine
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_of_the_engine(name, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    game = Football(name, WEIGHTS, seed=0)
    game.reset()
    sizes = SCENARIOS[name]
    assert len(game.raw["left_team"]) == sizes.left and len(game.raw["right_team"]) == sizes.right
    assert game.raw["steps_left"] == sizes.steps + 1
    agents = game.raw["left_agent_controlled_player"]
    assert len(agents) == sizes.agents and 0 not in agents and len(set(agents)) == len(agents)
    assert game.observation_space.contains(game.observe())
    for _ in range(3):
        for obs, reward, *_ in play(game, 25):
            assert game.observation_space.contains(obs) and math.isfinite(reward)
            assert game.raw["left_agent_controlled_player"] == agents
    game.close()
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


@engine
def test_features_keep_to_their_ranges_and_masks_leave_a_choice():
    game = Football("5_vs_5", WEIGHTS, seed=5)
    game.reset()
    low, high = feature_bounds(5, 5)
    names = np.repeat(list(feature_layout(5, 5)), [size for size, _, _ in feature_layout(5, 5).values()])
    stream = play(game, 600)
    obs = np.stack([step[0]["obs"] for step in stream])
    assert ((low <= obs) & (obs <= high)).all()
    touched = (obs == low) | (obs == high)
    # A bound that is met by more than flags, directions and clocks would clip the game.
    bounded = {"direction", "tired", "role", "card", "ball owner", "nearest", "steps left", "game mode", "sticky"}
    free = ~np.isin(names, [*bounded, "offside", "goals", "speed", "ball to goals"])
    assert not (touched & free).any(), set(names[(touched & free).any((0, 1))])
    masks = np.stack([step[0]["action_mask"] for step in stream])
    assert masks[..., : len(RUNNING) + 1].all() and masks.sum(-1).max() <= N_ACTIONS
    assert masks[..., SHORT_PASS].any() and not masks[..., SHORT_PASS].all()


@engine
def test_the_seed_and_the_number_of_the_episode_make_the_game():
    name = "academy_3_vs_1_with_keeper"
    one, other = Football(name, WEIGHTS, seed=4), Football(name, WEIGHTS, seed=4)
    one.reset(), other.reset()
    play(one, 30, seed=1), play(other, 90, seed=2)  # the engines have a past
    streams = []
    for game in (one, other):
        game.episode = 7
        game.reset()
        streams.append(play(game, 60))
    assert equal(*streams)
    one.reset(seed=9)
    other.reset(seed=10)
    assert not equal(play(one, 40), play(other, 40))
    one.close(), other.close()


@engine
def test_the_state_of_the_engine_is_the_whole_state():
    game, other = Football("5_vs_5", WEIGHTS, seed=1), Football("5_vs_5", WEIGHTS, seed=2)
    game.reset()
    play(game, 60)
    state = game.get_state()
    stream, totals = play(game, 60), (game.behaviour.result(), game.reward.totals)
    for restored in (game, other):
        restored.set_state(state)
        assert equal(stream, play(restored, 60))
        assert repr((restored.behaviour.result(), restored.reward.totals)) == repr(totals)
        assert restored.behaviour.time == 120 and restored.behaviour.owner == game.behaviour.owner
        assert restored.seed == 1
    game.close(), other.close()


@engine
def test_an_episode_may_end_with_the_first_step_after_its_restoration():
    game, other = (
        Football("academy_3_vs_1_with_keeper", WEIGHTS, seed=1),
        Football("academy_3_vs_1_with_keeper", WEIGHTS, seed=2),
    )
    game.reset()
    for _ in range(400):
        state = game.get_state()
        reward, terminated, truncated, _ = game.step([1, 1, 1])  # away from the goal
        if terminated or truncated:
            break
    for _ in range(2):
        other.set_state(state)
        assert other.step([1, 1, 1])[:3] == (reward, terminated, truncated)
    assert terminated or truncated
    game.close(), other.close()


@engine
def test_an_academy_episode_ends_with_its_metrics():
    game = Football("academy_empty_goal_close", WEIGHTS, seed=1)
    game.reset()
    for _ in range(400):  # walk into the empty goal
        reward, terminated, truncated, numbers = game.step([5])
        if terminated or truncated:
            break
    assert terminated and not truncated
    assert set(numbers) == {*NUMBERS, *(f"reward_{term}" for term in Reward.TERMS)}
    assert (numbers["goal"], numbers["won"], numbers["score"], numbers["assist"]) == (1, 1, 1, 0)
    assert numbers["reward_goal"] == numbers["reward_win"] == 1 and numbers["reward_position"] > 0.1
    assert reward >= 2
    game.close()


@engine
@pytest.mark.parametrize("name, drill", [("academy_3_vs_1_with_keeper", True), ("5_vs_5", False)])
@pytest.mark.parametrize("steps_left", [0, 7])
def test_the_final_whistle_is_an_end_and_the_end_of_a_drill_a_limit(name, drill, steps_left, monkeypatch):
    game = Football(name, WEIGHTS, seed=0)
    game.reset()
    last = game.raw | {"steps_left": steps_left}
    monkeypatch.setattr(game.game, "step", lambda actions: (last, 0, True, {}))
    _, terminated, truncated, numbers = game.step([IDLE] * game.agents)
    assert truncated == (drill and steps_left == 0) and terminated == (not truncated)
    assert numbers["won"] == 0 and set(NUMBERS) < set(numbers)
    game.close()


@engine
def test_a_pass_in_the_engine_is_counted():
    """Player 2 turns to player 1 and passes; nobody is near, so that the ball arrives."""
    game = Football("academy_pass_and_shoot_with_keeper", WEIGHTS, seed=1)
    game.reset()
    for time_step in range(60):
        can_pass = game.observe()["action_mask"][:, SHORT_PASS].astype(bool)
        if time_step == 3:
            assert can_pass.tolist() == [False, True]
        choice = BOTTOM if time_step < 3 else SHORT_PASS if time_step < 6 else IDLE
        game.step(np.where(can_pass, choice, IDLE))
        if game.raw["ball_owned_player"] == 1:
            break
    expect(game.behaviour.result(), **{"pass": 1, "attempts": 1, "pass_rate": 100})
    game.close()


@engine
@quiet
def test_a_killed_engine_is_replaced():
    envs = Games(functools.partial(Football, "academy_3_vs_1_with_keeper", WEIGHTS), 2, 1000, 2, 60.0)
    rng = np.random.default_rng(0)
    obs, _ = envs.reset()
    assert envs.observation_space.contains(obs)
    obs, *_ = envs.step(random_actions(obs, rng))
    os.kill(envs.processes[1].pid, signal.SIGKILL)
    obs, _, _, truncated, info = envs.step(random_actions(obs, rng))
    assert info["crashed"].tolist() == [False, True] and truncated.tolist() == [False, True]
    state = envs.get_state()  # the new engine has not begun its game
    assert None not in state
    envs.set_state(state)
    for _ in range(5):
        obs, _, _, _, info = envs.step(random_actions(obs, rng))
        assert not info["crashed"].any() and envs.observation_space.contains(obs)
    envs.close()
