"""The environments of a2po_mpe.py: mpe2 in worker processes that may fail, JaxMARL, and both side by side."""

import copy
import functools
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import a2po_mpe as script

ROOT = Path(__file__).parents[1]
N, AGENTS = 4, 3


def make_games(n_agents=AGENTS, local_ratio=0.25, seed=5, num_workers=2, num_envs=N, timeout=60.0, game=None):
    """Four games in two processes; local_ratio 1/4, so that both parts of the reward show."""
    pytest.importorskip("mpe2")
    game = functools.partial(game or script.Navigation, n_agents, local_ratio)
    return script.Games(game, num_envs, seed, num_workers, timeout)


@pytest.fixture(scope="module")
def workers():
    envs = make_games()
    yield envs
    envs.close()


def random_play(envs, steps, seed=0):
    """Results of some steps with random actions."""
    rng = np.random.default_rng(seed)
    return [envs.step(rng.integers(5, size=envs.action_space.shape)) for _ in range(steps)]


def same(a, b):
    """Whether two lists of step results are equal to the last bit."""
    pairs = [(x[0][name], y[0][name]) for x, y in zip(a, b, strict=True) for name in x[0].keys() | y[0].keys()]
    pairs += [(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in (1, 2, 3)]
    return all(np.array_equal(x, y) for x, y in pairs)


# ------------------------------------------------------------------------------------------------ mpe2's processes
def test_state_fits_new_games(workers, tmp_path):
    """As on resume: the state goes through a file into games that never played, in other processes."""
    workers.reset(seed=3)
    random_play(workers, 20)
    torch.save(workers.get_state(), tmp_path / "state")
    expected, fresh = random_play(workers, 10), make_games(seed=0, num_workers=3)
    fresh.set_state(torch.load(tmp_path / "state", weights_only=True))
    assert same(expected, random_play(fresh, 10))
    fresh.close()


def test_number_of_workers_changes_nothing(workers):
    """One, two, three and four processes play the same games."""
    workers.reset(seed=4)
    expected = random_play(workers, 60)
    for count in (1, 3, 9):
        envs = make_games(seed=0, num_workers=count)
        assert len(envs.processes) == min(count, N)
        envs.reset(seed=4)
        assert same(expected, random_play(envs, 60))
        envs.close()


def test_episodes_come_from_seed_build_and_number(workers):
    """Game e of seed s plays what game 0 of seed s + e does; an episode does not depend on how others went."""
    workers.reset(seed=20)
    starts = [random_play(workers, 26, seed=k)[-1][0]["state"] for k in range(2)]
    workers.reset(seed=22)
    assert np.array_equal(starts[0][2:], random_play(workers, 26, seed=9)[-1][0]["state"][:2])
    assert not np.isclose(starts[0], starts[1]).all(-1).any()
    first, again = (script.Navigation(AGENTS, 0.0, 20, build) for build in (0, 1))
    first.reset(), again.reset()
    assert not np.isclose(first.observe()["state"], again.observe()["state"]).all(), "a replaced game is another"


def bodies_of(state):
    """Positions and velocities (2 n, 4) in what Navigation.get_state gives."""
    return np.array([[*position, *velocity] for position, velocity in state[-1]])


def parallel_game(envs, e, **options):
    """mpe2's parallel environment in the situation of game e."""
    from mpe2 import simple_spread_v3

    game = simple_spread_v3.parallel_env(max_cycles=25, **options)
    game.reset(seed=0)
    _, state = pickle.loads(envs.get_state()[e].numpy().tobytes())
    for body, numbers in zip(game.unwrapped.world.entities, bodies_of(state), strict=True):
        body.state.p_pos, body.state.p_vel = numbers[:2].copy(), numbers[2:].copy()
    return game


@pytest.mark.parametrize(("n", "local_ratio"), [(2, 1.0), (3, 0.0), (4, 0.25)])
def test_games_are_mpe2s(n, local_ratio):
    """Whole episodes beside the parallel environment: observations, state, rewards by agent, the end."""
    envs, rng, collided = make_games(n, local_ratio, 11, num_envs=6), np.random.default_rng(0), 0
    envs.reset()
    for _ in range(2):
        others = [parallel_game(envs, e, N=n, local_ratio=local_ratio) for e in range(6)]
        agents = others[0].possible_agents
        for t in range(25):
            actions = rng.integers(5, size=(6, n))
            obs, reward, _, truncated, _ = envs.step(actions)
            for e, game in enumerate(others):
                seen, paid, ended, out_of_time, _ = game.step(dict(zip(agents, actions[e].tolist(), strict=True)))
                assert np.array_equal(obs["obs"][e], [seen[agent] for agent in agents])
                assert np.array_equal(obs["state"][e], game.state())
                assert np.array_equal(reward[e], np.float32([paid[agent] for agent in agents]))
                assert set(out_of_time.values()) == {truncated[e]} == {t == 24} and not any(ended.values())
            collided += (reward != reward[:, :1]).any()
        envs.step(actions)
    envs.close()
    assert (collided > 0) == (n > 2 and local_ratio > 0)  # two agents always collide both


# ---------------------------------------------------------------------------------------------- games that fail
class Faulty(script.Navigation):
    """In its third step game 6, as long as it is of the first build, hangs, dies or raises an error."""

    fault, always = "", False

    def step(self, action):
        if self.always or (self.seed == 6 and self.build == 0 and self.game.steps == 2):
            getattr(self, self.fault)()
        return super().step(action)

    def hangs(self):
        time.sleep(600)

    def dies(self):
        os._exit(1)

    def raises(self):
        raise RuntimeError("out of order")


FAULTS = {"hangs": "did not answer for 3 s", "dies": "worker 1 died", "raises": "failed: RuntimeError.'out of order'"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_fails_is_replaced(fault):
    """Its two games crash, are no sample, and begin new episodes; the other games never notice; returns are right."""
    pytest.importorskip("mpe2")
    game = type("Game", (Faulty,), {"fault": fault})
    envs, sound = script.Episodes(make_games(game=game, timeout=3.0)), script.Episodes(make_games())
    first, _ = envs.reset()
    sound.reset()
    old, rng, begin = envs.env.processes[1].pid, np.random.default_rng(0), time.perf_counter()
    for t in range(55):
        actions = torch.from_numpy(rng.integers(5, size=(N, AGENTS)))
        expected = sound.play(actions)
        if t == 2:
            with pytest.warns(UserWarning, match=FAULTS[fault]):
                rewards, terminated, crashed = envs.play(actions)
            assert crashed.tolist() == [0, 1, 0, 1] and not terminated.any() and not rewards[1::2].any()
            assert envs.look("cpu")["final"].tolist() == [0, 1, 0, 1], "the next action is ignored"
        else:
            rewards, terminated, crashed = envs.play(actions)
            assert not crashed.any()
        assert torch.equal(rewards[::2], expected[0][::2])
        if t == 3:
            assert envs.look("cpu")["start"].tolist() == [0, 1, 0, 1] and not rewards[1::2].any()
            starts = np.stack([first["state"], envs.obs["state"]])[:, 1::2]
            assert not np.isclose(*starts).all(-1).any(), "a new build plays other episodes"
    assert time.perf_counter() - begin < 60 and envs.crashes == 2
    assert envs.env.processes[1].pid != old and not Path(f"/proc/{old}").exists(), "the old worker is gone"
    whole, others = sound.finished(), envs.finished()
    assert [e for e in others if e["env"] in (0, 2)] == [e for e in whole if e["env"] in (0, 2)]
    # Whole episodes alone: they begin at step 4 and end 25 steps later, then after a filler.
    assert [(e["env"], e["length"]) for e in others if e["env"] in (1, 3)] == [(1, 25), (3, 25)] * 2
    envs.close(), sound.close()


def test_games_that_fail_again_and_again():
    """After the third time without a whole episode, one line; the other workers end, and there is no state to save."""
    pytest.importorskip("mpe2")
    envs = make_games(game=type("Game", (Faulty,), {"fault": "raises", "always": True}))
    envs.reset()
    with pytest.warns(UserWarning), pytest.raises(script.GamesFailed, match="games failed 3 times without a whole"):
        random_play(envs, 9)
    assert envs.get_state() is None and not any(p.is_alive() for p in envs.processes)


def test_a_worker_is_killed_between_two_steps(workers):
    """Also while the state is asked for: the rest is saved, and what was lost begins anew when it is set."""
    assert all(os.getsid(p.pid) == p.pid for p in workers.processes), "out of Ctrl-C's reach"
    envs = make_games()
    envs.reset(seed=1)
    random_play(envs, 3)
    os.kill(envs.processes[1].pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="worker 1 died"):
        state = envs.get_state()
    assert [game is None for game in state] == [False, True, False, True]
    expected = random_play(envs, 5)
    crashed = [result[4]["crashed"].tolist() for result in expected]
    assert crashed[0] == [False, True, False, True] and not np.any(crashed[1:])
    envs.reset(seed=2)
    envs.set_state(state)
    again = random_play(envs, 5)
    assert again[0][4]["crashed"].tolist() == crashed[0]
    assert all(np.array_equal(x[1][::2], y[1][::2]) for x, y in zip(expected, again, strict=True))
    envs.close()


def test_workers_leave_with_the_main_process(tmp_path):
    """Even where it is killed: nothing is left behind."""
    pytest.importorskip("mpe2")
    code = "import a2po_mpe as s, functools, os; e = s.Games(functools.partial(s.Navigation, 2, 0.0), 3, 0, 3, 9.0); "
    code += "e.reset(); print(*[p.pid for p in e.processes], flush=True); os.kill(os.getpid(), 9)"
    with (tmp_path / "out").open("w") as out:  # a pipe would stay open as long as they live
        process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=out)
    pids = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    assert process.returncode == -9 and len(pids) == 3
    for _ in range(100):
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if not left:
            return
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    pytest.fail("workers live on")


# ------------------------------------------------------------------ both simulators; JAX's threads and forks do not mix
@pytest.fixture(scope="module")
def jax_games(tmp_path_factory):
    """JaxMARL's games by (n_agents, local_ratio). To compile them is most of this file's time: never the same twice."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("jaxmarl")
    settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("jax"))}
    settings |= {"jax_persistent_cache_min_compile_time_secs": 0.1}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield functools.cache(lambda n_agents, local_ratio: script.JaxMARL(n_agents, local_ratio, N, seed=5))
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", params=["mpe2", "jaxmarl"])
def games(request):
    """Four games of three agents by either simulator."""
    if request.param == "mpe2":
        return request.getfixturevalue("workers")
    return request.getfixturevalue("jax_games")(AGENTS, 0.5)


def test_spaces(games):
    """Observations lie in the declared spaces with the declared types; the state is all observations in a row."""
    obs, _ = games.reset(seed=0)
    assert obs in games.observation_space
    obs, reward, terminated, truncated, _ = games.step(np.zeros((N, AGENTS), int))
    assert obs in games.observation_space
    assert obs["obs"].shape == (N, AGENTS, 18) and obs["state"].shape == (N, 54)
    assert np.array_equal(obs["state"], obs["obs"].reshape(N, 54))
    assert obs["action_mask"].shape == (N, AGENTS, 5) and obs["alive"].shape == (N, AGENTS)
    assert obs["action_mask"].all() and obs["alive"].all()
    assert reward.shape == (N, AGENTS) and terminated.shape == truncated.shape == (N,)
    assert terminated.dtype == truncated.dtype == bool and reward.dtype == np.float32
    assert games.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    assert games.single_action_space.nvec.tolist() == [5] * AGENTS


def test_episodes(games):
    """25 steps, truncated and never terminated; the 26th ignores its action, pays nothing and begins an episode."""
    games.reset(seed=1)
    for _ in range(2):
        before = random_play(games, 25)
        assert not any(terminated.any() for _, _, terminated, _, _ in before)
        assert [truncated.all() for _, _, _, truncated, _ in before] == [False] * 24 + [True]
        assert not any(truncated.any() for _, _, _, truncated, _ in before[:-1])
        assert (np.array([reward for _, reward, *_ in before]) < 0).all()
        saved, firsts = games.get_state(), []
        for action in (1, 4):
            games.set_state(saved)
            firsts.append(games.step(np.full((N, AGENTS), action)))
        assert same(firsts[:1], firsts[1:])
        obs, reward, terminated, truncated, _ = firsts[1]
        assert not terminated.any() and not truncated.any() and (reward == 0).all()
        assert (obs["obs"][..., :2] == 0).all(), "they start from rest"
        assert (np.abs(obs["obs"][..., 2:4]) <= 1).all()
        assert not np.isclose(obs["obs"], before[-1][0]["obs"]).all(-1).any()


def test_seeds(games):
    """A seed fixes all episodes; environments and episodes differ; reset without a seed goes on to new episodes."""
    first, _ = games.reset(seed=1000)
    whole = random_play(games, 30)
    again, _ = games.reset(seed=1000)
    assert np.array_equal(first["obs"], again["obs"]) and same(whole, random_play(games, 30))
    other, _ = games.reset(seed=2000)
    new, _ = games.reset()
    starts = np.concatenate([first["state"], other["state"], new["state"], whole[25][0]["state"]])
    assert len(np.unique(starts, axis=0)) == 4 * N


def test_state_round_trip(games):
    """The saved state brings back everything to come, the filler step and the next episodes included; it is plain."""
    games.reset(seed=2)
    for steps in (10, 15):  # in the middle, and with the filler step ahead
        random_play(games, steps, seed=steps)
        saved = [x.clone() for x in games.get_state()]
        expected = random_play(games, 40)
        games.reset(seed=9)
        random_play(games, 3)
        games.set_state(saved)
        assert all(torch.equal(a, b) for a, b in zip(saved, games.get_state(), strict=True))
        assert same(expected, random_play(games, 40))
        games.set_state(saved)


@pytest.mark.parametrize("local_ratio", [0.0, 0.5])
@pytest.mark.parametrize("n", [3, 5])
def test_jaxmarl_is_mpe2(n, local_ratio, jax_games):
    """From equal states, equal actions: the same observations, rewards, states and ends, step by step.

    JaxMARL is in single precision, so a distance within 1e-5 of a collision's may count on one side alone: left out.
    """
    pytest.importorskip("mpe2")
    fast, rng, collisions = jax_games(n, local_ratio), np.random.default_rng(1), 0
    slow = [script.Navigation(n, local_ratio, e) for e in range(N)]
    fast.reset(seed=1)
    for t in range(104):
        positions, velocities = np.asarray(fast._state.p_pos), np.asarray(fast._state.p_vel)
        if t % 3 == 0:  # bring the agents together, so that they collide
            positions = np.concatenate([positions[:, :n] * np.float32(0.4), positions[:, n:]], 1)
            fast._state = fast._state.replace(p_pos=fast._to_jax(positions))
        for e, game in enumerate(slow):
            pairs = zip(positions[e].astype(float), velocities[e].astype(float), strict=True)
            game.set_state(((e, 0, 0), int(fast._state.step[e]), [(x.copy(), v.copy()) for x, v in pairs]))
        actions = rng.integers(5, size=(N, n))
        obs, reward, terminated, truncated, _ = fast.step(actions)
        if t % 26 == 25:  # the filler step; the other tests are about it
            assert not truncated.any() and (np.asarray(fast._state.step) == 0).all()
            continue
        results = [game.step(action) for game, action in zip(slow, actions, strict=True)]
        bodies = np.array([bodies_of(game.get_state()) for game in slow])
        for name, value in obs.items():
            np.testing.assert_allclose(value, [game.observe()[name] for game in slow], atol=1e-5)
        np.testing.assert_allclose(fast._state.p_pos, bodies[..., :2], atol=1e-5)
        np.testing.assert_allclose(fast._state.p_vel, bodies[..., 2:], atol=1e-5)
        distances = np.linalg.norm(bodies[:, :n, None, :2] - bodies[:, None, :n, :2], axis=-1)
        clear = (np.abs(distances - 0.3) > 1e-5).all((1, 2))
        expected = np.array([rewards for rewards, *_ in results])
        np.testing.assert_allclose(reward[clear], expected[clear], atol=1e-5)
        ends = [[end, out_of_time] for _, end, out_of_time, _ in results]
        assert np.array_equal(np.stack([terminated, truncated], 1), ends)
        assert truncated.all() == (t % 26 == 24) and not terminated.any()
        assert np.array_equal(np.asarray(fast._state.step), [game.game.steps for game in slow])
        collisions += (distances[clear] < 0.3).sum() - n * clear.sum()
    assert collisions > 100


def test_starts_are_alike(workers, jax_games):
    """Both draw agents and landmarks uniformly from the square of side 2, at rest."""
    for games in (workers, jax_games(AGENTS, 0.5)):
        seen = []
        for seed in range(40):
            obs = games.reset(seed=1000 * seed)[0]["obs"]
            own = obs[:, :, 2:4]
            seen.append(np.concatenate([own, obs[:, 0, 4:10].reshape(N, 3, 2) + own[:, :1]], 1))
        positions = np.array(seen).reshape(-1, 12)
        assert np.abs(positions).max() <= 1 and (np.abs(positions.mean(0)) < 0.2).all()
        assert (np.abs(positions.std(0) - 1 / math.sqrt(3)) < 0.1).all()


def test_jaxmarl_state_fits_new_games(jax_games):
    """As on resume: new games take over the state."""
    old = jax_games(AGENTS, 0.5)
    old.reset(seed=3)
    random_play(old, 20)
    saved, expected, fresh = old.get_state(), random_play(old, 10), copy.copy(old)
    fresh.reset(seed=5)  # as Episodes does before it hands over a state
    fresh.set_state(saved)
    assert same(expected, random_play(fresh, 10))
