"""StarCraft II as one game for `Games`: against a double of smacv2, and the real package without the game."""

import functools
import importlib.machinery
import importlib.util
import json
import os
import re
import signal
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import load

script = load("a2po_smac")
SMAC_MAPS, STARCRAFT2_HELP, StarCraft2 = script.SMAC_MAPS, script.STARCRAFT2_HELP, script.StarCraft2
dropped = pytest.mark.filterwarnings("ignore:worker .* dropped")
N_AGENTS, N_ACTIONS, OBS, STATE = 3, 9, 7, 11


class Broken(Exception):
    """Stands for pysc2's own connection error."""


class Double:
    """Behaves like smacv2's StarCraft2Env as far as the adapter can see: episodes of three steps ending as told."""

    made: list = []
    plan: list = []  # how the coming episodes go, one word each, "win" once it is empty

    def __init__(self, map_name, seed=None, continuing_episode=False, **options):
        self.map_name, self._seed, self.continuing, self.options = map_name, seed, continuing_episode, options
        self.running = self.closed = 0
        self._episode_count, self._min_unit_type, self.seen = 0, 100, []
        Double.made.append(self)

    def get_env_info(self):
        return {"n_agents": N_AGENTS, "n_actions": N_ACTIONS, "obs_shape": OBS, "state_shape": STATE}

    def get_unit_type_id(self, unit, ally):
        return unit.unit_type - 73

    def full_restart(self):
        self.restarted = True

    def reset(self):
        self.ending, self.time, self.dead = Double.plan.pop(0) if Double.plan else "win", 0, 0
        if self._episode_count == 0:
            assert not self.running, "a second game was started"
            self.running = 1
        self.obs_enemies = np.zeros((4, N_AGENTS))
        if self.ending == "no start":
            raise OSError("no game")
        if self.ending == "never starts":
            time.sleep(100)
        try:
            if self.ending == "breaks at reset":
                raise Broken("reset")
        except Broken:
            self.full_restart()
        return self.get_obs(), self.get_state()

    def step(self, actions):
        self.seen.append([int(action) for action in actions])
        for mask, action in zip(self.get_avail_actions(), actions, strict=True):
            assert mask[action] == 1, "unavailable"
        try:
            if self.ending == "breaks" and self.time == 1:
                raise Broken("step")
        except Broken:
            self.full_restart()
            return 0, True, {}
        if self.ending == "empty" and self.time == 1:
            return 0, True, {}
        if self.ending == "dies" and self.time == 1:  # the game takes its worker with it
            os._exit(1)
        self.time, self.dead = self.time + 1, 1
        done, info = self.time == 3, {"battle_won": self.time == 3 and self.ending == "win", "dead_allies": 1}
        if done and self.ending == "limit" and self.continuing:
            info["episode_limit"] = True
        self._episode_count += done
        return self.time / 2, done, info

    def get_obs(self):
        return [np.full(OBS, self.time, np.float32) for _ in range(N_AGENTS)]

    def get_state(self):
        return np.full(STATE, self.time, np.float64)

    def get_avail_actions(self):
        alive = [0, 1, 1] + [0] * (N_ACTIONS - 3)
        return [[1] + [0] * (N_ACTIONS - 1) if agent < self.dead else alive for agent in range(N_AGENTS)]

    def close(self):
        self.running, self.closed = 0, self.closed + 1


class DoubleWrapper:
    def __init__(self, **options):
        self.env = Double(**options)

    def __getattr__(self, name):
        return getattr(self.env, name)


@pytest.fixture
def double(monkeypatch):
    """Puts the double where the adapter imports smacv2 from."""
    names = ("smacv2", "smacv2.env", "smacv2.env.starcraft2", "smacv2.env.starcraft2.distributions")
    modules = {name: types.ModuleType(name) for name in names + ("smacv2.env.starcraft2.starcraft2",)}
    modules["smacv2.env"].StarCraft2Env = Double
    modules["smacv2.env"].StarCraftCapabilityEnvWrapper = DoubleWrapper
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    Double.made, Double.plan = [], []
    return Double


def play(game, ending=None):
    """One episode with everybody stopping: the last step's answer and the sum of the rewards."""
    if ending is not None:
        Double.plan.append(ending)
    game.reset()
    total = 0.0
    while True:
        answer = game.step(np.ones(N_AGENTS, int))
        total += answer[0]
        assert game.observation_space.contains(game.observe()) and type(answer[3]["won"]) is int
        if answer[1] or answer[2]:
            return answer, total


def test_spaces(double):
    game = StarCraft2("3m", seed=1)
    assert not any(core.running for core in double.made), "making it started a game"
    game.reset()
    obs = game.observe()
    assert game.observation_space.contains(obs)
    assert {key: value.shape for key, value in obs.items()} == {
        "obs": (N_AGENTS, OBS),
        "state": (STATE,),
        "action_mask": (N_AGENTS, N_ACTIONS),
        "alive": (N_AGENTS,),
    }
    assert obs["action_mask"].dtype == obs["alive"].dtype == np.int8
    assert obs["obs"].dtype == obs["state"].dtype == np.float32 and obs["alive"].tolist() == [1, 1, 1]
    assert game.action_space == gym.spaces.MultiDiscrete([N_ACTIONS] * N_AGENTS)
    game.step(np.ones(N_AGENTS, int))
    assert game.observe()["alive"].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "ending, terminated, truncated, won",
    [("win", True, False, 1), ("defeat", True, False, 0), ("limit", False, True, 0)],
)
def test_ends_of_an_episode(double, ending, terminated, truncated, won):
    answer, total = play(StarCraft2("3m", seed=1), ending)
    assert answer[1:] == (terminated, truncated, {"won": won})
    assert total == 0.5 + 1.0 + 1.5 and type(answer[0]) is float


@pytest.mark.parametrize("ending", ["breaks", "breaks at reset", "no start", "empty"])
def test_what_goes_wrong_is_an_error(double, ending):
    """smacv2 would start a new game and hang, or say that an episode has ended: it has not."""
    with pytest.raises((Broken, OSError, KeyError)):
        play(StarCraft2("3m", seed=1), ending)
    assert not hasattr(double.made[-1], "restarted")


def test_no_second_game(double):
    game = StarCraft2("3m", seed=1)
    game.reset()
    game.reset()  # the double complains about a second game in the same object
    assert double.made[-2].closed and double.made[-1].running
    assert double.made[-1]._seed != double.made[-2]._seed, "it would play the same episodes again"
    play(game, "win")
    games = len(double.made)
    play(game, "win")
    assert len(double.made) == games, "a game was thrown away after a whole episode"


def test_actions_are_made_available(double):
    game = StarCraft2("3m", seed=1)
    game.reset()
    game.step(np.array([8, 2, 0]))
    game.step(np.array([8, 8, 2]))
    assert double.made[-1].seen == [[1, 2, 1], [0, 1, 2]]


def test_close(double):
    game = StarCraft2("3m", seed=1)
    game.close()
    game.reset()
    game.close()
    assert not double.made[-1].running


def test_seeds(double):
    def seeds(seed, build=0, reset_seed=None, stream=0):
        game = StarCraft2("3m", seed, build, stream)
        game.reset(seed=reset_seed)
        distributions = sys.modules["smacv2.env.starcraft2.distributions"]
        deck = list(range(20))
        distributions.shuffle(deck)
        draws = [distributions.default_rng().random() for _ in range(2)]
        assert draws[0] != draws[1], "two generators of a game draw the same numbers"
        return double.made[-1]._seed, deck, draws

    assert seeds(1) == seeds(1) and seeds(1)[0] != seeds(2)[0] and seeds(1)[2] != seeds(2)[2]
    assert seeds(1, 1) == seeds(1, 1) and seeds(1, 1)[0] != seeds(1)[0], "another worker plays other episodes"
    assert seeds(1, 0, 5) == seeds(2, 1, 5) != seeds(1, 0, 6)
    assert all(a != b for a, b in zip(seeds(1), seeds(1, stream=2), strict=True)), "a resumed run plays other episodes"
    game = StarCraft2("3m", seed=1)
    game.reset(seed=5)
    first = double.made[-1]
    play(game, "win")
    game.reset(seed=5)
    assert double.made[-1] is not first and double.made[-1]._seed == first._seed and first.closed


def test_generated_maps(double):
    core = StarCraft2("zerg_10_vs_11", seed=1).game.env
    assert core.map_name == "10gen_zerg" and core.options["use_unit_ranges"] and core.options["obs_own_pos"]
    config = core.options["capability_config"]
    assert (config["n_units"], config["n_enemies"]) == (10, 11)
    assert config["team_gen"]["exception_unit_types"] == ["baneling"]
    assert config["team_gen"]["weights"][config["team_gen"]["unit_types"].index("baneling")] == 0.1


def test_find_starcraft2(double, tmp_path, monkeypatch):
    game = tmp_path / "with [brackets]"
    monkeypatch.setenv("SC2PATH", str(game))
    available, reason = script.find_starcraft2()
    assert not available and str(game) in reason and "no game" in reason
    binary = game / "Versions" / "Base75689" / "SC2_x64"
    binary.parent.mkdir(parents=True)
    assert "no game" in script.find_starcraft2()[1], "a folder without the binary is no game"
    binary.touch()
    available, reason = script.find_starcraft2()
    assert not available and "no maps" in reason
    (game / "Maps" / "SMAC_Maps").mkdir(parents=True)
    assert not script.find_starcraft2()[0]
    (game / "Maps" / "SMAC_Maps" / "3m.SC2Map").touch()
    assert script.find_starcraft2() == (True, f"smacv2 and the game in {game}")
    monkeypatch.delenv("SC2PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not script.find_starcraft2()[0] and str(tmp_path / "StarCraftII") in script.find_starcraft2()[1]
    game.rename(tmp_path / "StarCraftII")
    assert script.find_starcraft2()[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert script.find_starcraft2() == (False, "the Python package smacv2 is not installed")


def test_help_is_one_line():
    assert "\n" not in STARCRAFT2_HELP and re.search(r"smacv2\.git@[0-9a-f]{40}\b", STARCRAFT2_HELP)


# ------------------------------------------------------------------------------------------------ several, in workers
@pytest.fixture
def games(double):
    made = []

    def make(num_envs=3, timeout=20.0):
        made.append(script.Games(functools.partial(StarCraft2, "3m"), num_envs, 1000, num_envs, timeout))
        return made[-1]

    yield make
    for envs in made:
        envs.close()
        assert not any(process.is_alive() for process in envs.processes)


def stops(envs):
    return envs.step(np.ones(envs.action_space.shape, int))


@dropped
def test_games(double, games):
    double.plan = ["limit", "breaks", "win"]
    envs = games()
    obs, _ = envs.reset()
    assert obs["obs"].shape == (3, N_AGENTS, OBS) and obs["action_mask"].shape == (3, N_AGENTS, N_ACTIONS)
    ends = []
    for step in range(12):
        if step == 6:
            double.plan = ["win"]  # for the workers that take the place of those that crashed
        obs, reward, terminated, truncated, info = stops(envs)
        won = info["episode"].get("won", np.zeros(3, int))
        assert won.dtype == int and info["crashed"].dtype == bool
        ends.append((terminated.any(), truncated.any(), won.any(), info["crashed"].any()))
        assert (obs["state"][:, 0] == obs["obs"][:, 0, 0]).all()
        if info["crashed"].any():
            assert info["crashed"].all() and (reward == 0).all() and (obs["obs"][:, 0, 0] == 1).all()
    # Every game has its limit (three steps and a reset), crashes in its second step (two); the new one begins (one).
    no = (False, False, False, False)
    limit, crash, win = (False, True, False, False), (False, True, False, True), (True, False, True, False)
    assert ends[:6] == [no, no, limit, no, no, crash]
    assert envs.builds == [2, 2, 2]
    assert ends[6:] in ([no, no, no, win, no, no], [no, no, no, limit, no, no])


@dropped
@pytest.mark.parametrize("how", ["breaks", "empty", "dies"])
def test_three_crashes_end_it(double, games, how):
    double.plan = [how] * 9
    envs = games(1)
    envs.reset()
    with pytest.raises(script.GamesFailed, match="failed 3 times"):
        for _ in range(12):
            stops(envs)


@dropped
@pytest.mark.parametrize("how, why", [("no start", "no game"), ("breaks at reset", "reset"), ("never starts", "0.5 s")])
def test_games_that_do_not_start(double, games, how, why):
    """Among them the reset that never returns, which froze runs before there was a time-out."""
    double.plan = [how] * 9
    envs, began = games(1, timeout=0.5 if how == "never starts" else 20.0), time.time()
    with pytest.raises(script.GamesFailed, match=f"failed 3 times.*{why}"):
        envs.reset()
    assert time.time() - began < 15


def test_workers_close_their_games(double, games, tmp_path, monkeypatch):
    monkeypatch.setattr(double, "close", lambda self: (tmp_path / f"closed by {os.getpid()}").touch())
    envs = games(2)
    envs.reset()
    workers = {f"closed by {process.pid}" for process in envs.processes}
    envs.close()
    assert {path.name for path in tmp_path.iterdir()} == workers


# ------------------------------------------------------------------------------------------------- training on them
def train(folder, monkeypatch, **options):
    """A short training run on the double: 2 games, rollouts of 10 steps. The checkpoint and the run directory."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(script, "find_starcraft2", lambda: (True, "the double"))
    args = dict(map="3m", num_envs=2, num_steps=10, eval_episodes=3, eval_every=20, agent_blocks=2, torch_threads=1)
    args |= dict(update_epochs=2, hidden_size=8)
    version = importlib.metadata.version
    monkeypatch.setattr(script.importlib.metadata, "version", lambda name: "0" if name == "smacv2" else version(name))
    script.main(script.Args(**args | options))
    (run,) = Path("runs").iterdir()
    return torch.load(run / "checkpoint.pt", weights_only=True), run


@dropped
def test_training_on_the_double(double, tmp_path, monkeypatch):
    """auto takes StarCraft II; crashed episodes are neither samples nor scores; evaluations have their episodes."""
    double.plan = ["limit", "breaks", "win", "defeat", "breaks"]
    checkpoint, run = train(tmp_path, monkeypatch, total_timesteps=60)
    assert run.name.startswith("3m-starcraft2__a2po_smac__1__") and checkpoint["envs"] is None
    config = json.loads((run / "config.json").read_text())
    assert config["simulator"] == "starcraft2" and config["num_workers"] == 2
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert lines and all(len(line["won"]) == len(line["returns"]) == 3 for line in lines)
    assert lines[-1]["step"] >= 60
    double.plan, streams, made = [], set(), script.StarCraft2._build
    monkeypatch.setattr(script.StarCraft2, "_build", lambda game: streams.add(game.stream) or made(game))
    train(tmp_path, monkeypatch, total_timesteps=100, resume=str(run))
    assert streams == {checkpoint["progress"]["iteration"]} != {0}, "other episodes than those of the beginning"
    assert json.loads((run / "eval.jsonl").read_text().splitlines()[-1])["step"] >= 100


@dropped
def test_a_crash_is_no_sample(double, tmp_path, monkeypatch):
    """Ten steps of each game: a win of three, the filler, one, the crash, the filler, three more: seven samples."""
    plan = double.plan
    double.plan = ["win", "breaks"]
    replace = script.Games._replace

    def replaced(*arguments):
        double.plan = []  # the next worker's game is a sound one
        replace(*arguments)

    monkeypatch.setattr(script.Games, "_replace", replaced)
    checkpoint, _ = train(tmp_path, monkeypatch, total_timesteps=10, eval_every=10**6)
    assert checkpoint["progress"] | {"global_step": 14, "crashes": 2} == checkpoint["progress"], plan


@dropped
def test_games_that_fail_end_the_training_with_a_checkpoint(double, tmp_path, monkeypatch):
    """One line, status 1; the checkpoint is of the last whole iteration."""
    step = script.Games.step

    def failing(self, actions):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 24:
            os.kill(self.processes[0].pid, signal.SIGKILL)
            self.processes[0].join()
        return step(self, actions)

    monkeypatch.setattr(script.Games, "step", failing)
    with pytest.raises(SystemExit, match="--resume") as stop:
        train(tmp_path, monkeypatch, total_timesteps=1000, eval_every=10**6)
    assert "failed 3 times" in str(stop.value) and "died" in str(stop.value) and "\n" not in str(stop.value)
    (run,) = (tmp_path / "runs").iterdir()
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["iteration"] == 2 and checkpoint["envs"] is None


# From here on the real smacv2, with made-up units behind a made-up connection instead of the game.

STALKER, ZEALOT, MARAUDER, MARINE, MEDIVAC = 74, 73, 51, 48, 54
OWN = 1900  # where the unit types that SMAC's maps define for the allies begin
TEAMS = {
    "3s5z": ([OWN] * 3 + [OWN + 1] * 5, [STALKER] * 3 + [ZEALOT] * 5),
    "MMM": ([OWN] * 2 + [OWN + 1] * 7 + [OWN + 2], [MARAUDER] * 2 + [MARINE] * 7 + [MEDIVAC]),
    "3m": ([OWN] * 3, [MARINE] * 3),
}
HIDDEN = 30.0  # out of sight of a unit on the left side


class Connection:
    """Answers smacv2's requests: units as told, all of them back one step after they were killed."""

    def __init__(self, map_name):
        self.teams, self.units, self.failing, self.sent, self.tag = TEAMS.get(map_name), [], None, [], 0
        self.spawn()

    def unit(self, owner, unit_type, x, y):
        from s2clientprotocol import raw_pb2

        self.tag += 1
        unit = raw_pb2.Unit(unit_type=unit_type, owner=owner, tag=self.tag, health=40, health_max=80, shield=25)
        unit.shield_max, unit.pos.x, unit.pos.y = 50, x, y
        self.units.append(unit)

    def spawn(self):
        for owner, team in enumerate(self.teams or (), start=1):
            for i, unit_type in enumerate(team):
                self.unit(owner, unit_type, 8 + 4 * (owner - 1), 8 + i)

    def check(self, name):
        if self.failing == name:
            from pysc2.lib import protocol

            raise protocol.ConnectionError(f"lost during {name}")

    def observe(self):
        from s2clientprotocol import sc2api_pb2

        self.check("observe")
        observation = sc2api_pb2.ResponseObservation()
        observation.observation.raw_data.units.extend(self.units)
        return observation

    def step(self, count):
        self.check("step")
        if not self.units:
            self.spawn()

    def actions(self, request):
        self.check("actions")
        self.sent.append([action.action_raw.unit_command.ability_id for action in request.actions])

    def debug(self, commands):
        for command in commands:
            if command.HasField("kill_unit"):
                self.units = [unit for unit in self.units if unit.tag not in command.kill_unit.tag]
            else:
                new = command.create_unit
                self.unit(new.owner, new.unit_type, new.pos.x, new.pos.y)

    def data(self):
        return types.SimpleNamespace(units=range(OWN + 9))

    def kill(self, owner):
        self.units = [unit for unit in self.units if unit.owner != owner]


@pytest.fixture
def smacv2(monkeypatch):
    pytest.importorskip("smacv2")
    from smacv2.env import StarCraft2Env

    def launch(core):
        core._controller = Connection(core.map_name)
        core.map_x = core.map_y = core.max_distance_x = core.max_distance_y = 32
        core.pathing_grid = np.ones((32, 32), bool)

    monkeypatch.setattr(StarCraft2Env, "_launch", launch)
    monkeypatch.setattr(StarCraft2Env, "_kill_all_units", kill_all_units)
    return StarCraft2Env


def kill_all_units(core):
    """As smacv2 does it, but a wait that never ends is an error."""
    core._kill_units([unit.tag for unit in core._obs.observation.raw_data.units])
    core._obs = core._controller.observe()
    assert not core._obs.observation.raw_data.units, "waits for units that are not in this game"


def stop(game):
    return game.step(np.ones(len(game.action_space.nvec), int))


def test_map_names_are_those_of_smacv2():
    pytest.importorskip("smacv2")
    from smacv2.env.starcraft2.maps.smac_maps import get_smac_map_registry

    assert sorted(SMAC_MAPS) == sorted(name for name in get_smac_map_registry() if not name.startswith("10gen_"))


@pytest.mark.parametrize("map_name, bits", [("3s5z", 2), ("MMM", 3), ("3m", 0)])
def test_unit_types(smacv2, map_name, bits):
    game = StarCraft2(map_name, seed=1)
    game.reset()
    obs = game.observe()
    assert game.observation_space.contains(obs) and obs["alive"].all()
    if bits:
        expected = np.eye(bits)[np.array(TEAMS[map_name][0]) - OWN]
        n_agents = len(expected)
        np.testing.assert_array_equal(obs["obs"][:, -bits:], expected)
        features = len(game.game.get_env_info()["agent_features"])
        state = obs["state"][: n_agents * features].reshape(n_agents, -1)
        np.testing.assert_array_equal(state[:, -bits:], expected)
    stop(game)
    obs = game.observe()
    assert game.observation_space.contains(obs) and game.game._controller.sent == [[4] * len(obs["alive"])]


def test_unit_types_without_the_correction(smacv2):
    game = StarCraft2("3s5z", seed=1)
    game.reset()
    del game.game.get_unit_type_id
    with pytest.raises(IndexError):
        game.observe()
    game = StarCraft2("MMM", seed=1)
    game.reset()
    del game.game.get_unit_type_id
    assert (game.observe()["obs"][:, -3:].argmax(axis=1) == 2).all()


def test_action_masks(smacv2):
    game = StarCraft2("MMM", seed=1)
    game.reset()
    mask = game.observe()["action_mask"]
    assert (mask[:, 0] == 0).all() and (mask[:, 1:6] == 1).all()
    # Enemy j is 4 to the right and as far up as its number: those within 6 can be shot. The medivac heals its team.
    np.testing.assert_array_equal(mask[0, 6:], [np.hypot(4, j) <= 6 for j in range(10)])
    np.testing.assert_array_equal(mask[9, 6:], [9 - j <= 6 and j < 9 for j in range(10)])


def test_enemies_stay_visible(smacv2):
    """An enemy out of everybody's sight, the last in the list, must not hide the others."""
    game = StarCraft2("3s5z", seed=1)
    game.reset()
    connection = game.game._controller

    def enemies():
        stop(game)
        return game.observe()["obs"][:, 4 : 4 + 8 * 8].reshape(8, 8, 8)

    connection.units[-1].pos.x = HIDDEN
    seen = enemies()
    assert (seen[:, 0, 4] == 0.5).all() and not seen[:, 7].any()
    del connection.units[-1]  # it died there
    seen = enemies()
    assert (seen[:, 0, 4] == 0.5).all() and not seen[:, 7].any()
    assert not np.any([own[4 : 4 + 8 * 8] for own in smacv2_obs(game.game)]), "smacv2 no longer needs the correction"


def smacv2_obs(core):
    core.obs_enemies[-1] = 0
    core.enemy_tags[-1] = None
    return core.get_obs()


@pytest.mark.parametrize("map_name", ["3s5z", "terran_5_vs_5"])
def test_real_ends_of_an_episode(smacv2, map_name):
    game = StarCraft2(map_name, seed=1)
    game.reset()
    game.game._controller.kill(owner=2)
    reward, *ends = stop(game)
    assert ends == [True, False, {"won": 1}] and reward > 0
    game.reset()
    game.game._controller.kill(owner=1)
    reward, *ends = stop(game)
    obs = game.observe()
    assert ends == [True, False, {"won": 0}] and reward == 0
    assert not obs["alive"].any() and (obs["action_mask"].argmax(axis=1) == 0).all()
    game.reset()
    limit = game.game.get_env_info()["episode_limit"]
    for step in range(1, limit + 1):
        assert stop(game)[1:] == (False, step == limit, {"won": 0})


@pytest.mark.parametrize("map_name", ["3s5z", "protoss_5_vs_5"])
@pytest.mark.parametrize("request_name", ["actions", "step", "observe"])
def test_real_crash(smacv2, map_name, request_name):
    """A lost connection is an error in step and in reset, where smacv2 itself would go on with a new game."""
    from pysc2.lib import protocol

    game = StarCraft2(map_name, seed=1)
    game.reset()
    game.game._controller.kill(owner=2)
    stop(game)
    game.reset()
    game.game._controller.failing = request_name
    with pytest.raises(protocol.ConnectionError, match=f"lost during {request_name}"):
        stop(game)
    game = StarCraft2(map_name, seed=1, build=1)
    game.reset()
    game.game._controller.kill(owner=2)
    stop(game)
    game.game._controller.failing = "observe"
    with pytest.raises(protocol.ConnectionError, match="lost during observe"):
        game.reset()


def test_generated_maps_are_drawn_from_the_seed(smacv2):
    def draws(seed):
        game = StarCraft2("terran_10_vs_11", seed=seed)
        game.reset()
        assert game.observe()["obs"].shape[0] == 10 and len(game.game.enemies) == 11
        first = sorted(unit.SerializeToString() for unit in game.game._controller.units)
        game.game._controller.kill(owner=2)
        stop(game)
        game.reset()
        second = sorted(unit.SerializeToString() for unit in game.game._controller.units)
        return first, second, game.observe()["obs"].tobytes()

    assert draws(1) == draws(1) != draws(2) and draws(1)[0] != draws(1)[1]
