"""`Games`, the worker processes that several benchmarks share, and `Episodes` around it, with a small game of ours:
what goes wrong with a game costs its episodes, not the run, and nothing is left behind. Every script has the same."""

import dataclasses
import functools
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
from helpers import ROOT, SCRIPTS, load

script = load("a2po_smac")
dropped = pytest.mark.filterwarnings("ignore:worker .* dropped")


class Clock:
    """Episodes of three steps that show (seed, build, episode, time); the sum of the actions is the reward.

    `trouble` has what goes wrong: (seed, build, episode, time) -> error, hang, die; time 0 is the reset.
    """

    observation_space = gym.spaces.Dict(now=gym.spaces.Box(-np.inf, np.inf, (4,), np.float64))
    action_space = gym.spaces.MultiDiscrete([9, 9])

    def __init__(self, trouble, seed, build=0):
        self.trouble, self.seed, self.build, self.episode, self.time = trouble, seed, build, -1, 0

    def _meet(self):
        what = self.trouble.get((self.seed, self.build, self.episode, self.time))
        if what == "error":
            raise ValueError("the game is broken")
        if what == "file":
            raise FileNotFoundError("no such map")
        if what == "hang":
            time.sleep(100)
        if what == "die":
            os._exit(1)

    def reset(self, seed=None):
        if seed is not None:
            self.seed, self.episode = seed, -1
        self.episode, self.time = self.episode + 1, 0
        self._meet()

    def step(self, action):
        self.time += 1
        self._meet()
        over = self.time == 3
        terminated = over and self.episode % 2 == 0
        return float(sum(action)), terminated, over and not terminated, {"won": self.episode} if over else {}

    def observe(self):
        return {"now": np.array([self.seed, self.build, self.episode, self.time])}

    def close(self):
        folder = self.trouble.get("folder")
        if folder:
            Path(folder, f"closed {os.getpid()}").touch()

    def get_state(self):
        return self.seed, self.episode, self.time

    def set_state(self, state):
        self.seed, self.episode, self.time = state


class Forgetful(Clock):
    get_state = set_state = property()  # hasattr says no


@pytest.fixture
def games():
    """games(number of environments, of workers, trouble=..., timeout=...), all closed in the end."""
    made = []

    def make(num_envs=4, num_workers=2, trouble=None, timeout=20.0, game=Clock):
        made.append(script.Games(functools.partial(game, trouble or {}), num_envs, 100, num_workers, timeout))
        return made[-1]

    yield make
    for envs in made:
        envs.close()
        assert not any(process.is_alive() for process in envs.processes)


def play(envs, steps, begin=0):
    """Steps in which environment e's actions are e and the number of the step: what they returned."""
    numbers = np.arange(envs.num_envs)
    actions = [np.stack([numbers % 9, np.full(envs.num_envs, t % 9)], -1) for t in range(begin, begin + steps)]
    return [envs.step(action) for action in actions]


# ------------------------------------------------------------------------------------------------------------ play
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_games_are_stepped(games, workers):
    """Rewards, ends and numbers of each game, next-step autoreset; the number of workers changes nothing."""
    envs = games(3, workers)
    obs, info = envs.reset()
    assert obs["now"].tolist() == [[100, 0, 0, 0], [101, 0, 0, 0], [102, 0, 0, 0]] and info == {}
    assert envs.observation_space["now"].shape == (3, 4) and envs.action_space.shape == (3, 2)
    assert envs.single_observation_space == Clock.observation_space
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    assert len(envs.processes) == min(workers, 3)
    for t, (obs, rewards, terminated, truncated, info) in enumerate(play(envs, 9)):
        episode, now = divmod(t + 1, 4)
        assert obs["now"][:, 2:].tolist() == [[episode, now]] * 3 and obs["now"][:, 0].tolist() == [100, 101, 102]
        assert rewards.dtype == np.float32 and rewards.shape == (3, 2), "the team's, for every agent"
        assert (rewards[:, 0] == rewards[:, 1]).all() and terminated.dtype == truncated.dtype == bool
        rewards = rewards[:, 0].tolist()
        assert rewards == ([0.0] * 3 if now == 0 else [e + t for e in range(3)]), "the filler's action is ignored"
        assert terminated.all() == terminated.any() == (t == 2) and truncated.all() == truncated.any() == (t == 6)
        assert not info["crashed"].any() and info["crashed"].shape == (3,)
        assert info["episode"] == {} if now != 3 else info["episode"]["won"].tolist() == [episode] * 3


def test_two_halves(games):
    """step_async and step_wait: other games can be stepped in between."""
    first, second = games(2, 1), games(2, 1)
    first.reset(), second.reset()
    first.step_async(np.ones((2, 2), int))
    second.step_async(np.full((2, 2), 2))
    assert (first.step_wait()[1] == 2).all() and (second.step_wait()[1] == 4).all()


def test_seeds(games):
    """reset(seed) gives game e the seed + e; observations are copies."""
    envs = games()
    first, _ = envs.reset(seed=7)
    assert first["now"][:, 0].tolist() == [7, 8, 9, 10]
    play(envs, 1)
    assert first["now"][:, 3].tolist() == [0] * 4
    again, _ = envs.reset()
    assert again["now"][:, 0].tolist() == [7, 8, 9, 10] and again["now"][:, 2].tolist() == [1] * 4


def test_states(games, tmp_path):
    """All games as they were, filler steps included, in new workers of another number, and through a file."""
    envs = games(3, 2)
    envs.reset()
    play(envs, 3)
    torch.save(envs.get_state(), tmp_path / "state.pt")
    expected = play(envs, 5, begin=3)
    other = games(3, 3)
    other.reset()
    other.set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for a, b in zip(expected, play(other, 5, begin=3), strict=True):
        assert np.array_equal(a[0]["now"], b[0]["now"]) and all(np.array_equal(a[i], b[i]) for i in (1, 2, 3))


def test_games_without_a_state(games):
    """Those that cannot be saved say None."""
    envs = games(game=Forgetful)
    envs.reset()
    assert not envs.can_be_saved and envs.get_state() is None
    saved = games()
    saved.reset()
    assert saved.get_state() is not None
    saved.close()
    assert saved.get_state() is None


# ---------------------------------------------------------------------------------------------------------- trouble
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("error", r"ValueError.'the game is broken'. .test_env_games.py, line \d\d."),
        ("file", "FileNotFoundError.'no such map'"),
        ("die", "died"),
        ("hang", "not answer for 0.5 s"),
    ],
)
def test_a_game_fails_in_a_step(games, what, said):
    """The games of its worker are lost, the others go on. The lost ones' step has no reward, the last observation once
    more, and ends the episode; then come other games, with `build` one higher."""
    envs = games(5, 2, {(102, 0, 0, 2): what}, timeout=0.5 if what == "hang" else 20.0)
    envs.reset()
    play(envs, 1)
    with pytest.warns(UserWarning, match=f"worker 0 .*{said}.* dropped"):
        ((obs, rewards, terminated, truncated, info),) = play(envs, 1, begin=1)
    lost = [True, False, True, False, True]  # those of worker 0
    assert info["crashed"].tolist() == truncated.tolist() == lost and not terminated.any()
    assert rewards[:, 0].tolist() == [0.0 if x else e + 1 for e, x in enumerate(lost)]
    assert obs["now"].tolist() == [[100 + e, 0, 0, 1 if x else 2] for e, x in enumerate(lost)]
    obs, rewards, terminated, truncated, info = play(envs, 1, begin=2)[0]
    assert obs["now"].tolist() == [[100 + e, 1, 0, 0] if x else [100 + e, 0, 0, 3] for e, x in enumerate(lost)]
    assert (rewards[lost] == 0).all() and not info["crashed"].any() and terminated.tolist() == [not x for x in lost]
    obs, rewards, *_ = play(envs, 1, begin=3)[0]
    assert obs["now"].tolist() == [[100 + e, 1, 0, 1] if x else [100 + e, 0, 1, 0] for e, x in enumerate(lost)]
    assert rewards[:, 0].tolist() == [e + 3 if x else 0.0 for e, x in enumerate(lost)]


@dropped
def test_a_game_that_does_not_show_all(games):
    """What its space has and `observe` has not is no array of zeros."""

    class Blind(Clock):
        def observe(self):
            return {}

    envs = games(1, 1, game=Blind)
    with pytest.raises(script.GamesFailed, match="KeyError.'now'"):
        envs.reset()


@dropped
@pytest.mark.parametrize("what", ["error", "hang", "die"])
def test_a_game_fails_where_an_episode_should_begin(games, what):
    """A reset that never returns is the reason for the time-out: StarCraft II is known for it."""
    envs = games(2, 2, {(100, 0, 1, 0): what}, timeout=0.5 if what == "hang" else 20.0)
    envs.reset()
    play(envs, 3)
    began = time.time()
    (obs, _, _, truncated, info), after = play(envs, 2, begin=3)
    assert time.time() - began < 15
    assert info["crashed"].tolist() == truncated.tolist() == [True, False]
    assert obs["now"].tolist() == [[100, 0, 0, 3], [101, 0, 1, 0]]
    assert after[0]["now"].tolist() == [[100, 1, 0, 0], [101, 0, 1, 1]] and not after[4]["crashed"].any()


@dropped
@pytest.mark.parametrize("what", ["error", "hang", "die"])
def test_a_game_fails_at_the_first_reset(games, what):
    """All are reset again, until they all stand at a start; that costs no crashed step."""
    envs = games(2, 2, {(101, 0, 0, 0): what}, timeout=0.5 if what == "hang" else 20.0)
    obs, _ = envs.reset()
    assert obs["now"][:, 1].tolist() == [0, 1] and obs["now"][:, 3].tolist() == [0, 0]
    obs, rewards, terminated, truncated, info = play(envs, 1)[0]
    assert not info["crashed"].any() and not truncated.any() and obs["now"][:, 3].tolist() == [1, 1]


@dropped
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_worker_that_is_killed(games, number):
    """Between two steps: the next one tells."""
    envs = games(2, 2)
    envs.reset()
    os.kill(envs.processes[1].pid, number)
    envs.processes[1].join()
    (_, _, _, _, info), (obs, *_) = play(envs, 2)
    assert info["crashed"].tolist() == [False, True] and obs["now"][1].tolist() == [101, 1, 0, 0]


@dropped
@pytest.mark.parametrize("where", ["step", "reset"])
def test_three_failures_without_a_whole_episode_end_it(games, where):
    """One line, and no process is left."""
    at = 1 if where == "step" else 0
    envs = games(2, 2, {(101, build, 0, at): "error" for build in range(9)})
    with pytest.raises(script.GamesFailed, match="failed 3 times") as failed:
        envs.reset()
        play(envs, 9)
    assert "the game is broken" in str(failed.value) and "\n" not in str(failed.value)
    assert isinstance(failed.value, SystemExit) and envs.closed
    assert not any(process.is_alive() for process in envs.processes)


@dropped
def test_a_whole_episode_in_between_makes_good(games):
    """A game that fails now and then goes on for ever."""
    envs = games(2, 2, {(101, build, 1, 2): "error" for build in range(9)})
    envs.reset()
    infos = [step[4]["crashed"].tolist() for step in play(envs, 40)]
    assert infos.count([False, True]) == 5 and infos.count([False, False]) == 35


@dropped
def test_a_state_of_lost_games(games):
    """What was lost while its state was asked for is lost whole when it is set, and the next step tells."""
    trouble = {}
    envs = games(4, 2, trouble)
    envs.reset()
    play(envs, 1)
    os.kill(envs.processes[1].pid, signal.SIGKILL)
    envs.processes[1].join()
    state = envs.get_state()
    assert [x is None for x in state] == [False, True, False, True]
    other = games(4, 2)
    other.reset()
    other.set_state(state)
    (obs, _, _, _, info), (after, *_) = play(other, 2)
    assert info["crashed"].tolist() == [False, True, False, True]
    assert obs["now"][[0, 2], 3].tolist() == [2, 2] and after["now"][[1, 3], 3].tolist() == [0, 0]


# --------------------------------------------------------------------------------------------------------- episodes
@dropped
def test_episodes(games):
    """start, final, returns, lengths and finished episodes; crashed ones are dropped and counted, but no fillers."""
    # Environment 1 is lost in its first episode; then, of the new game, where the second episode should begin.
    envs = script.Episodes(games(2, 2, {(101, 0, 0, 2): "error", (101, 1, 1, 0): "error"}))
    envs.reset()
    shown, made = [], []
    for t in range(9):
        seen = envs.look("cpu")
        shown.append((seen["start"].tolist(), seen["final"].tolist()))
        rewards, terminated, crashed = envs.play(torch.full((2, 2), t % 9))
        assert rewards.shape == (2, 2) and (rewards[:, 0] == rewards[:, 1]).all(), "the team's, for every agent"
        made.append((rewards[:, 0].tolist(), terminated.tolist(), crashed.tolist()))
    first = [(1, 0), (0, 0), (0, 0), (0, 1)]
    assert [(start[0], final[0]) for start, final in shown] == [*first, *first, (1, 0)]
    second = [(1, 0), (0, 0), (0, 1), (1, 0), (0, 0), (0, 0), (0, 1), (1, 1), (1, 0)]
    assert [(start[1], final[1]) for start, final in shown] == second
    assert [crashed for _, _, crashed in made] == [[0, int(t in (1, 6))] for t in range(9)]
    assert [terminated for _, terminated, _ in made] == [[int(t == 2), int(t == 5)] for t in range(9)]
    ended = [
        {"env": 0, "won": 0, "return": 2.0 * (0 + 1 + 2), "length": 3},
        {"env": 1, "won": 0, "return": 2.0 * (3 + 4 + 5), "length": 3},
        {"env": 0, "won": 1, "return": 2.0 * (4 + 5 + 6), "length": 3},
    ]
    assert envs.finished() == ended and envs.finished() == []
    assert envs.crashes == 1, "the second time no episode was under way"


def test_episodes_go_on_where_they_were(games):
    """get_state and set_state, with the returns so far; without a state of the games new episodes begin."""
    envs = script.Episodes(games(2, 1))
    assert envs.get_state() is None, "before the first reset"
    envs.reset()
    ones = torch.ones(2, 2, dtype=torch.long)
    envs.play(ones), envs.play(ones)
    state = envs.get_state()
    envs.play(ones)
    expected = envs.finished()
    assert expected[0]["return"] == 6.0
    other = script.Episodes(games(2, 2))
    other.set_state(state)
    other.play(ones)
    assert other.finished() == expected
    other.set_state(None)
    assert other.look("cpu")["start"].tolist() == [1, 1] and other.look("cpu")["now"][:, 3].tolist() == [0, 0]


def test_rewards_of_each_agent():
    """Where the agents are paid differently, the return of an episode is their mean."""

    class Paid(gym.vector.VectorEnv):
        metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        num_envs = 1
        single_action_space = gym.spaces.MultiDiscrete([2, 2])
        action_space = gym.vector.utils.batch_space(single_action_space, 1)

        def reset(self, *, seed=None, options=None):
            return {"now": np.zeros((1, 1))}, {}

        def step(self, actions):
            return {"now": np.ones((1, 1))}, np.array([[1.0, 4.0]]), np.array([True]), np.array([False]), {}

    envs = script.Episodes(Paid())
    envs.reset()
    rewards, *_ = envs.play(torch.zeros(1, 2))
    assert rewards.tolist() == [[1.0, 4.0]] and envs.finished() == [{"env": 0, "return": 2.5, "length": 1}]


# --------------------------------------------------------------------------------------------------- agents' numbers
class Noise(gym.vector.VectorEnv):
    """Four games of three agents, who see two numbers."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    num_envs = 4
    spaces = {"obs": gym.spaces.Box(-np.inf, np.inf, (3, 2), np.float32), "alive": gym.spaces.MultiBinary(3)}
    single_observation_space = gym.spaces.Dict(spaces)
    single_action_space = gym.spaces.MultiDiscrete([2, 2, 2])
    action_space = gym.vector.utils.batch_space(single_action_space, 4)
    rng = np.random.default_rng(0)

    def reset(self, *, seed=None, options=None):
        self.obs = self.rng.normal(size=(4, 3, 2)).astype(np.float32)
        return {"obs": self.obs, "alive": np.ones((4, 3))}, {}

    def step(self, actions):
        seen, _ = self.reset()
        return seen | {"alive": np.zeros((4, 3))}, np.ones(4), np.zeros(4, bool), np.zeros(4, bool), {}

    def get_state(self):
        return ()


def test_agents_see_their_number():
    """One-hot behind the observation, whatever that is; everything else, and what is saved, as without it."""
    games = Noise()
    envs = script.AgentIds(games)
    assert envs.single_observation_space["obs"].shape == (3, 5)
    assert envs.single_observation_space["alive"] == games.spaces["alive"]
    envs.reset()
    for alive in (1, 0):
        seen = envs.look("cpu")
        assert seen["obs"].dtype == torch.float32 and (seen["alive"] == alive).all()
        for e in range(4):
            for agent in range(3):
                number = [float(other == agent) for other in range(3)]
                assert seen["obs"][e, agent].tolist() == games.obs[e, agent].tolist() + number
        assert envs.get_state()["obs"]["obs"].shape == (4, 3, 2)
        if alive:
            envs.play(torch.zeros(4, 3))


SIMULATORS = {"smac": ("smax", "starcraft2"), "mpe": ("jaxmarl", "mpe2"), "grf": (None,)}
SHARING = [name for name in SCRIPTS if name.split("_")[1] in SIMULATORS]


@pytest.mark.parametrize("agent_id", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_agent_id_is_an_option(name, agent_id, monkeypatch, capsys):
    """For every simulator."""
    module = load(name)
    for simulator in ("SMAX", "JaxMARL", "Games"):
        monkeypatch.setattr(module, simulator, lambda *_: Noise(), raising=False)
    for simulator in SIMULATORS[name.split("_")[1]]:
        options = {"simulator": simulator} if simulator else {}
        envs = module.make_envs(module.Args(num_envs=4, num_workers=1, agent_id=agent_id, **options))
        envs.reset()
        width = envs.look("cpu")["obs"].shape[-1]
        assert width == envs.single_observation_space["obs"].shape[-1] == (5 if agent_id else 2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_games_are_those_asked_for(name, monkeypatch):
    """Map, seed, number, rewards, workers and patience reach every simulator."""
    module, made = load(name), []
    benchmark, names = name.split("_")[1], {field.name for field in dataclasses.fields(module.Args)}
    for simulator in ("SMAX", "JaxMARL", "Games", "MaMuJoCo"):
        monkeypatch.setattr(module, simulator, lambda *words: made.append(words) or Noise(), raising=False)
    rewards = {name: k for k, name in enumerate(sorted(name for name in names if name.startswith("reward_")), start=1)}
    tasks = {"smac": {"map": "8m"}, "mpe": {"n_agents": 5, "local_ratio": 0.25}}
    tasks |= {"grf": {"scenario": "academy_corner"} | rewards}
    tasks |= {"mamujoco": {"scenario": "Hopper", "partition": "3x1", "env_version": "v4"}}
    task = tasks[benchmark]
    for simulator in SIMULATORS.get(benchmark, [None]):
        options = task | {"seed": 7, "num_envs": 4, "num_workers": 3, "worker_timeout": 9.0, "simulator": simulator}
        options |= {"torch_threads": 3}
        made.clear()
        module.make_envs(module.Args(**{name: value for name, value in options.items() if name in names}))
        if benchmark == "mamujoco":
            assert [(*words[:4], words[5]) for words in made] == [(*task.values(), 4, 3)]
        elif simulator in ("smax", "jaxmarl"):
            assert made == [(*task.values(), 4, 7)]
        else:
            parts = [(2, 7000), (2, 7002)] if benchmark == "grf" else [(4, 7000)]
            assert [words[1:] for words in made] == [(*part, 3, 9.0) for part in parts]
            weights = {name.removeprefix("reward_"): weight for name, weight in rewards.items()}
            wanted = ("academy_corner", weights) if benchmark == "grf" else tuple(task.values())
            assert all(words[0].args == wanted for words in made)


@pytest.mark.parametrize("name", SCRIPTS)
def test_vector_environments_of_ones_own(name, monkeypatch):
    """They need not have a state; they must begin a new episode with the step after the last."""
    module = load(name)
    monkeypatch.delattr(Noise, "get_state")
    envs = module.Episodes(Noise())
    envs.reset()
    assert envs.get_state() is None
    envs.set_state(None)
    monkeypatch.setattr(Noise, "metadata", {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP})
    with pytest.raises(AssertionError):
        module.Episodes(Noise())


# -------------------------------------------------------------------------------------------------- nothing is left
def gone(pid, seconds=10.0):
    """Whether a process ends in time."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_close(games, tmp_path):
    """The games are closed, by their workers, at once, and close may be called again."""
    envs = games(3, 3, {"folder": tmp_path})
    envs.reset()
    workers = [process.pid for process in envs.processes]
    began = time.time()
    envs.close()
    assert time.time() - began < 4
    envs.close()
    assert {path.name for path in tmp_path.iterdir()} == {f"closed {pid}" for pid in workers}


class Launcher(Clock):
    """A game that starts a program of its own, as StarCraft II does, and does not end it."""

    def reset(self, seed=None):
        super().reset(seed)
        program = subprocess.Popen(["sleep", "100"])
        Path(self.trouble["folder"], str(program.pid)).touch()


@dropped
@pytest.mark.parametrize("how", ["close", "worker dies"])
def test_what_games_have_started_ends_with_them(games, tmp_path, how):
    envs = games(2, 1, {"folder": tmp_path}, game=Launcher)
    envs.reset()
    programs = [int(path.name) for path in tmp_path.iterdir()]
    assert len(programs) == 2
    if how == "close":
        envs.close()
    else:
        os.kill(envs.processes[0].pid, signal.SIGKILL)
        play(envs, 1)
    assert all(gone(pid) for pid in programs)


def test_ctrl_c_is_left_to_the_main_process(games):
    """Workers have sessions of their own, which the terminal's signals do not reach."""
    handler = signal.getsignal(signal.SIGINT)  # ignored, if the tests were started in the background
    envs = games(2, 2)
    envs.reset()
    assert all(os.getsid(p.pid) == p.pid != os.getsid(0) for p in envs.processes)
    assert signal.getsignal(signal.SIGINT) == handler


def test_workers_leave_with_the_main_process(tmp_path):
    """Killed with SIGKILL it can tell nobody; also when a worker has been replaced before."""
    code = f"""if True:
        import functools, os, signal, sys, warnings
        sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        from test_env_games import Clock, play, script
        warnings.simplefilter("ignore")
        envs = script.Games(functools.partial(Clock, {{(100, 0, 0, 1): "error"}}), 3, 100, 3, 20.0)
        envs.reset()
        play(envs, 2)
        print(*[process.pid for process in envs.processes], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 3 and process.wait(60) == -signal.SIGKILL
    assert all(gone(pid) for pid in workers)
