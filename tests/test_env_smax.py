"""JaxMARL's SMAX behind the scripts' vector environment, and whole runs on the real simulator."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ROOT, differences, load

STOP, N = 4, 4
script = load("a2po_smac")
WIN, LOSS, DRAW, NORMAL = range(N)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for compiled code, which the processes of the command line run find there again."""
    jax = pytest.importorskip("jax")
    folder = str(tmp_path_factory.mktemp("jax"))
    settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 1}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def games(cache):
    """Four environments of 3m; its compilation is most of this file's time, so everyone shares it."""
    pytest.importorskip("jaxmarl")
    return script.SMAX("3m", N, seed=5)


def units(games):
    return games._state.state


def change(games, **fields):
    """Overwrite parts of all environments' unit state."""
    games._state = games._state.replace(state=units(games).replace(**fields))


def stop(games):
    return games.step(np.full((N, 3), STOP))


def random_actions(obs, rng):
    """Available actions, shots before moves: so that units die."""
    scores = rng.random(obs["action_mask"].shape) + 2.0 * (np.arange(obs["action_mask"].shape[-1]) > STOP)
    return np.where(obs["action_mask"] > 0, scores, -1.0).argmax(-1)


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------- adapter
def test_spaces(games):
    """Observations lie in the declared spaces, with the declared types."""
    obs, _ = games.reset(seed=0)
    assert obs in games.observation_space
    obs, reward, terminated, truncated, info = stop(games)
    assert obs in games.observation_space
    assert obs["obs"].shape == (N, 3, 13 * 5 + 10) and obs["action_mask"].shape == (N, 3, 8)
    assert reward.shape == terminated.shape == truncated.shape == info["episode"]["won"].shape == (N,)
    assert terminated.dtype == truncated.dtype == bool and reward.dtype == np.float32
    assert games.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    assert games.single_action_space.nvec.tolist() == [8] * 3


def force_ends(games):
    """One win, one loss, one draw and one game that goes on, in the four environments."""
    health = np.array(units(games).unit_health)
    health[WIN, 3:] = 0
    health[LOSS, :3] = 0
    health[DRAW] = 0
    change(games, unit_health=games._to_jax(health), unit_alive=games._to_jax(health > 0))


def test_ends_and_autoreset(games):
    """Won is: they are dead and we are not. The step after the end ignores its actions and starts a new episode."""
    games.reset(seed=1)
    stop(games)
    force_ends(games)
    obs, reward, terminated, truncated, info = stop(games)
    assert terminated.tolist() == [True, True, True, False] and not truncated.any()
    assert info["episode"]["won"].tolist() == [True, False, False, False]
    assert reward[WIN] >= 1.0 and reward[LOSS] < 1.0 and reward[DRAW] < 1.0
    assert obs["alive"][LOSS].sum() == obs["alive"][DRAW].sum() == 0 < obs["alive"][WIN].sum()
    saved, results = games.get_state(), []
    for action in (STOP, 0):
        games.set_state(saved)
        actions = np.full((N, 3), action)
        actions[NORMAL] = STOP
        obs, reward, terminated, truncated, info = games.step(actions)
        results.append(obs)
        assert not (terminated | truncated | info["episode"]["won"]).any() and (reward[:NORMAL] == 0).all()
        assert np.array(units(games).step).tolist() == [0, 0, 0, 3]
        assert (np.array(units(games).unit_health)[:NORMAL] == 45).all() and obs["alive"][:NORMAL].all()
    assert same(*results)
    obs, *_ = stop(games)
    assert np.array(units(games).step).tolist() == [1, 1, 1, 4]


def test_time_limit(games):
    """Out of time is truncated, not terminated and no win; a win in the last step is a win."""
    games.reset(seed=2)
    change(games, step=games._to_jax(np.array([99] * N, np.asarray(units(games).step).dtype)))
    *_, terminated, truncated, _ = stop(games)
    assert not (terminated | truncated).any()
    health = np.array(units(games).unit_health)
    health[WIN, 3:] = 0
    change(games, unit_health=games._to_jax(health), unit_alive=games._to_jax(health > 0))
    *_, terminated, truncated, info = stop(games)
    assert terminated.tolist() == [True, False, False, False] and truncated.tolist() == [False, True, True, True]
    assert info["episode"]["won"].tolist() == [True, False, False, False]
    *_, terminated, truncated, _ = stop(games)
    assert not (terminated | truncated).any() and (np.array(units(games).step) == 0).all()


def test_masks_and_observations_are_jaxmarls(games):
    """After some fighting: masks, observations and state are SMAX's own, and follow the rules of the game."""
    import jax
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    env = HeuristicEnemySMAX(scenario=map_name_to_scenario("3m"))
    obs, _ = games.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(60):
        obs, *_ = games.step(random_actions(obs, rng))
        if (obs["alive"] == 0).any() and (obs["action_mask"][..., STOP + 1 :] == 1).any():
            break
    else:
        pytest.fail("nobody died in 60 steps")
    state = jax.tree.map(np.asarray, games._state)
    positions, alive = state.state.unit_positions, state.state.unit_health > 0
    assert np.array_equal(obs["alive"], alive[:, :3])
    distance = np.linalg.norm(positions[:, :3, None] - positions[:, None, 3:], axis=-1)
    shots = (distance < 5.0) & alive[:, :3, None] & alive[:, None, 3:]
    moves = np.repeat(alive[:, :3, None], 4, -1)
    expected = np.concatenate([moves, np.ones((N, 3, 1), bool), shots], -1)
    assert np.array_equal(obs["action_mask"], expected)
    for e in (int((obs["alive"] == 0).any(1).argmax()), NORMAL):
        one = jax.tree.map(lambda x, e=e: x[e], games._state)
        masks, seen = env.get_avail_actions(one), env.get_obs(one)
        for i, agent in enumerate(env.agents):
            assert np.array_equal(obs["action_mask"][e, i], masks[agent])
            np.testing.assert_allclose(obs["obs"][e, i], seen[agent], atol=1e-6)
        world = np.array(env.get_world_state(one)).copy()
        world[:60].reshape(6, 10)[:, 1:3] /= 32.0
        np.testing.assert_allclose(obs["state"][e], world, atol=1e-6)


def test_state_is_scaled(games):
    """Positions in the state are shares of the map, like all its other features."""
    obs, _ = games.reset(seed=4)
    units_seen = obs["state"][:, :60].reshape(N, 6, 10)
    np.testing.assert_allclose(units_seen[..., 1:3] * 32, np.array(units(games).unit_positions), rtol=1e-5)
    assert (units_seen >= 0).all() and (units_seen <= 1).all() and (units_seen[..., 0] == 1).all()


def test_states_replay_exactly(games):
    """get_state and set_state, over the ends of episodes, as plain tensors that a checkpoint can hold."""

    def play(steps):
        rng, results = np.random.default_rng(1), []
        obs = {"action_mask": mask}
        for _ in range(steps):
            obs, *rest, info = games.step(random_actions(obs, rng))
            results.append([*obs.values(), *rest, info["episode"]["won"]])
        return results

    games.reset(seed=5)
    force_ends(games)
    mask = stop(games)[0]["action_mask"]
    saved = games.get_state()
    assert all(isinstance(x, torch.Tensor) for x in saved)
    first = play(12)
    games.reset(seed=99)
    games.set_state(saved)
    assert games._final.tolist() == [True, True, True, False]
    for a, b in zip(first, play(12), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_seeds(games):
    """A seed gives the same first observations again, another seed others, and environments differ among themselves."""
    first, again, other = (games.reset(seed=seed)[0] for seed in (6, 6, 7))
    later = games.reset()[0]
    assert same(first, again)
    assert not np.array_equal(first["obs"], other["obs"]) and not np.array_equal(other["obs"], later["obs"])
    assert not np.array_equal(first["obs"][0], first["obs"][1])


@pytest.mark.parametrize("map_name", script.SMAX_MAPS)
def test_every_map_can_be_made(map_name):
    """The sizes of each SMAX map's observations and actions."""
    pytest.importorskip("jaxmarl")
    made = script.SMAX(map_name, 2, seed=0)
    allies, enemies = {
        "3m": (3, 3), "8m": (8, 8), "25m": (25, 25), "2s3z": (5, 5), "3s5z": (8, 8), "5m_vs_6m": (5, 6),
        "8m_vs_9m": (8, 9), "10m_vs_11m": (10, 11), "27m_vs_30m": (27, 30), "3s5z_vs_3s6z": (8, 9),
        "3s_vs_5z": (3, 5), "6h_vs_8z": (6, 8), "corridor": (6, 24), "smacv2_5_units": (5, 5),
        "smacv2_10_units": (10, 10), "smacv2_20_units": (20, 20),
    }[map_name]  # fmt: skip
    assert made.single_observation_space["obs"].shape == (allies, 13 * (allies + enemies - 1) + 10)
    assert made.single_observation_space["state"].shape == (12 * (allies + enemies),)
    assert made.single_action_space.nvec.tolist() == [5 + enemies] * allies


@pytest.mark.parametrize(
    ("map_name", "ally", "enemy"), [("8m_vs_9m", (8, 45), (9, 45)), ("corridor", (6, 150), (24, 35))]
)
def test_maps_of_ours(map_name, ally, enemy):
    """The maps that SMAX lacks: numbers, health and first positions of their units."""
    pytest.importorskip("jaxmarl")
    made = script.SMAX(map_name, 4, seed=0)
    obs, _ = made.reset(seed=0)
    assert obs in made.observation_space
    across = np.array(units(made).unit_positions)[..., 0]
    assert across[:, : ally[0]].max() < 16 < across[:, ally[0] :].min(), "each team begins on its own side"
    assert np.array(units(made).unit_health)[0].tolist() == [ally[1]] * ally[0] + [enemy[1]] * enemy[0]


# ----------------------------------------------------------------------------------------------------- whole runs
def test_resumed_smax_run_is_the_uninterrupted_one(games, tmp_path, monkeypatch):
    """Real SMAX, stopped by SIGTERM in the middle: the same weights and evaluations as in one go."""

    def make_envs(args):
        games.reset(seed=77 if args.resume else args.seed)
        return script.Episodes(games)

    monkeypatch.setattr(script, "make_envs", make_envs)
    options = {"map": "3m", "simulator": "smax", "num_envs": N, "num_steps": 20, "hidden_size": 16, "cuda": False}
    options |= {"total_timesteps": 300, "eval_every": 150, "eval_episodes": 4, "update_epochs": 3, "torch_threads": 1}
    checkpoints, records = [], []
    for stopped in (False, True):
        (tmp_path / str(stopped)).mkdir()
        monkeypatch.chdir(tmp_path / str(stopped))
        with monkeypatch.context() as patch:
            calls, step = [], games.step

            def counted(actions, calls=calls, step=step):
                calls.append(1)
                if len(calls) == 30:
                    signal.raise_signal(signal.SIGTERM)
                return step(actions)

            if stopped:
                patch.setattr(games, "step", counted)
                with pytest.raises(SystemExit) as left:
                    script.main(script.Args(**options))
                assert left.value.code == 143
            else:
                script.main(script.Args(**options))
        (run_dir,) = Path("runs").iterdir()
        if stopped:
            script.main(script.parse_args(["--resume", str(run_dir)]))
        checkpoints.append(torch.load(run_dir / "checkpoint.pt", weights_only=True))
        lines = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
        records.append([(line["step"], line["won"], line["returns"]) for line in lines])
    assert records[0] == records[1] and len(records[0]) == 2
    assert differences(*checkpoints) == []


def test_command_line_run(cache, tmp_path):
    """Train, go on until Ctrl-C, and evaluate: three processes, as a user would."""
    pytest.importorskip("jaxmarl")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_COMPILATION_CACHE_DIR": cache}
    everywhere = {"cwd": tmp_path, "env": environment, "text": True}

    def command(words):
        return [sys.executable, str(ROOT / "a2po_smac.py"), *words.split(), "--torch-threads", "1"]

    settings = "--map 3m --simulator smax --total-timesteps 600 --num-envs 4 --num-steps 20 --eval-every 300"
    done = subprocess.run(command(f"{settings} --eval-episodes 4"), capture_output=True, timeout=200, **everywhere)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    lines = (run_dir / "eval.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(len(json.loads(line)["won"]) == 4 for line in lines)
    assert json.loads((run_dir / "config.json").read_text())["agent_blocks"] == 3

    process = subprocess.Popen(
        command(f"--resume {run_dir} --total-timesteps 10000000"), stderr=-1, stdout=-1, **everywhere
    )
    try:
        deadline = time.time() + 200
        while time.time() < deadline and len((run_dir / "eval.jsonl").read_text().splitlines()) < 4:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and f"--resume {run_dir}" in errors and "Traceback" not in errors, errors
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert saved["progress"]["global_step"] > 1100 and saved["args"]["num_steps"] == 20

    words = f"--eval-only --checkpoint {run_dir / 'checkpoint.pt'} --eval-episodes 6"
    done = subprocess.run(command(words), capture_output=True, timeout=200, **everywhere)
    assert done.returncode == 0 and "6 greedy episodes: won" in done.stdout, done.stderr
    assert list((tmp_path / "runs").iterdir()) == [run_dir]


def test_ctrl_c_while_the_game_starts(cache, tmp_path):
    """Nothing was begun: no traceback, no run."""
    pytest.importorskip("jaxmarl")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "a2po_smac.py"), "--map", "3m", "--simulator", "smax"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=tmp_path, env=environment) as process:
        try:
            assert process.stdout.readline().startswith("simulator: smax")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
