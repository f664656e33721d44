"""A small game in place of the simulators, a training on it, and what a run left behind."""

import contextlib
import copy
import dataclasses
import importlib
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from reference import Step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*_*.py"))
SMAC_SCRIPTS = [name for name in SCRIPTS if name.endswith("_smac")]
# Sizes that take a second, and the settings of the last line are such that clips, Huber's line and the norm matter.
SMALL = {"map": "3m", "seed": 3, "total_timesteps": 30, "num_envs": 2, "num_steps": 12, "chunk_length": 4}
SMALL |= {"hidden_size": 8, "update_epochs": 4, "agent_blocks": 2, "eval_every": 10**9, "eval_episodes": 2}
SMALL |= {"save_every": 10**9, "torch_threads": 1, "cuda": False, "learning_rate": 3e-3, "gae_lambda": 0.9}
SMALL |= {"max_grad_norm": 0.3, "huber_delta": 0.5, "clip_coef": 0.05}
# Steps so large that the correction changes the agents' ranks by E|A|.
LARGE = {"seed": 6, "learning_rate": 0.1, "max_grad_norm": 10.0, "clip_coef": 0.5, "gamma": 1.0, "gae_lambda": 1.0}


class Skirmish(gym.vector.VectorEnv):
    """Three agents whose actions feed a common memory, which is most of the reward. Deterministic, but for `junk`.

    Episodes take 4 to 9 steps and end by turns terminated and truncated; one agent dies after 2 steps, one after 5.
    `crashes` has (step, environment) at which a game is lost. `junk` seeds all that must not matter: what dead agents
    observe and may do, the last observation of a terminated episode, and the rewards of steps that are none. In step
    `signal_at` the process sends itself `signal_number`. In a `general`-sum game each agent has rewards of its own.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    n, n_actions, obs_dim, state_dim = 3, 4, 5, 6

    def __init__(
        self, num_envs, junk=1, crashes=(), signal_at=None, signal_number=None, dtype=np.float32, general=False
    ):
        self.num_envs, self.junk, self.crashes, self.dtype = num_envs, junk, crashes, dtype
        self.signal_at, self.signal_number, self.general = signal_at, signal_number, general
        n, space = self.n, gym.spaces
        self.single_observation_space = space.Dict(
            obs=space.Box(-np.inf, np.inf, (n, self.obs_dim), np.float32),
            state=space.Box(-np.inf, np.inf, (self.state_dim,), np.float32),
            action_mask=space.MultiBinary((n, self.n_actions)),
            alive=space.MultiBinary(n),
        )
        self.single_action_space = space.MultiDiscrete([self.n_actions] * n)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.episode, self.time = np.full(num_envs, -1), np.zeros(num_envs, int)
        self.memory, self.alive = np.zeros(num_envs), np.ones((num_envs, n), bool)
        self.final, self.terminated = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        self.record, self.junk_shown, self.resets = [], 0, 0

    def _begin(self, e):
        self.episode[e], self.time[e], self.memory[e], self.alive[e] = self.episode[e] + 1, 0, 0.0, True
        self.final[e] = self.terminated[e] = False

    def _observe(self):
        N, n = self.num_envs, self.n
        obs, state = np.zeros((N, n, self.obs_dim), self.dtype), np.zeros((N, self.state_dim), self.dtype)
        mask, alive = np.zeros((N, n, self.n_actions), np.int8), self.alive.astype(np.int8)
        for e in range(N):
            rng = np.random.default_rng([7, e, self.episode[e], self.time[e]])
            obs[e], state[e] = rng.normal(size=obs[e].shape), rng.normal(size=state[e].shape)
            obs[e, :, 0] = state[e, 0] = self.memory[e]
            mask[e] = rng.random(mask[e].shape) < 0.7
            mask[e, :, 0], mask[e, :, 3] = 0, 1
            mask[e, ~self.alive[e]] = [1, 0, 0, 0]
            junk = np.random.default_rng([self.junk, 1, e, self.episode[e], self.time[e]])
            junk_obs, junk_mask = 5 * junk.normal(size=obs[e].shape), junk.random(mask[e].shape) < 0.5
            junk_mask[:, junk.integers(self.n_actions)] = True
            ignored = np.ones(n, bool) if self.terminated[e] else ~self.alive[e]
            obs[e, ignored], mask[e, ignored] = junk_obs[ignored], junk_mask[ignored]
            if self.final[e]:  # its action is ignored
                mask[e] = junk_mask
            if self.terminated[e]:
                state[e], alive[e] = 5 * junk.normal(size=state[e].shape), junk.random(n) < 0.5
            self.junk_shown += ignored.sum()
        return {"obs": obs, "state": state, "action_mask": mask, "alive": alive}

    def reset(self, *, seed=None, options=None):
        for e in range(self.num_envs):
            self._begin(e)
        self.seen, self.resets = self._observe(), self.resets + 1
        return self.seen, {}

    def step(self, actions):
        if len(self.record) == self.signal_at:
            signal.raise_signal(self.signal_number)
            if self.signal_number == signal.SIGHUP:  # a terminal may send two
                signal.raise_signal(self.signal_number)
            else:
                left = signal.getsignal(self.signal_number)
                assert left == signal.SIG_DFL, "a second signal must end the run at once"
        reward, won = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, int)
        terminated, truncated, crashed = np.zeros((3, self.num_envs), bool)
        for e in range(self.num_envs):
            crashed[e] = (len(self.record), e) in self.crashes
            if crashed[e]:
                reward[e], truncated[e], self.final[e] = 9.0 * self.junk, True, True
                continue
            if self.final[e]:
                self._begin(e)
                reward[e] = 9.0 * self.junk  # the filler step
                continue
            self.memory[e] = 0.6 * self.memory[e] + 0.3 * ((actions[e] - 1.8) * self.alive[e]).sum()
            reward[e] = self.memory[e] + 0.2 * (-1) ** self.time[e]
            self.time[e] += 1
            unlucky = (e + self.episode[e]) % self.n
            if self.time[e] in (2, 5):
                self.alive[e, (unlucky + self.time[e]) % self.n] = False
            if self.time[e] == 4 + (2 * e + 3 * self.episode[e]) % 6:
                self.final[e] = True
                terminated[e] = self.terminated[e] = (e + self.episode[e]) % 2 == 0
                truncated[e] = not terminated[e]
                won[e] = self.memory[e] > 0
        if self.general:
            reward = reward[:, None] + 0.5 * actions.astype(np.float32) - 0.5 * np.arange(self.n, dtype=np.float32)
        before, self.seen = self.seen, self._observe()
        ended = terminated | truncated
        self.record.append(Step(before, np.array(actions), reward, terminated, ended, crashed, self.seen))
        return self.seen, reward, terminated, truncated, {"crashed": crashed, "episode": {"won": won}}

    def _parts(self):
        return [self.episode, self.time, self.memory, self.alive, self.final, self.terminated]

    def get_state(self):
        return [torch.from_numpy(part.copy()) for part in self._parts()]

    def set_state(self, tensors):
        for part, saved in zip(self._parts(), tensors, strict=True):
            part[:] = saved.numpy()
        self.seen = self._observe()


def make_args(script, **options):
    """The small settings, as far as a script has them."""
    names = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(**{name: value for name, value in (SMALL | options).items() if name in names})


@contextlib.contextmanager
def in_place_of_the_simulator(script, game):
    """`game(num_envs)` is played; yields the list of those that were made. StarCraft II is not here."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(script, "find_starcraft2"):
            patch.setattr(script, "find_starcraft2", lambda: (False, "the Python package smacv2 is not installed"))

        def make_envs(args):
            made.append(game(args.num_envs))
            return (script.AgentIds if getattr(args, "agent_id", False) else script.Episodes)(made[-1])

        patch.setattr(script, "make_envs", make_envs)
        yield made


def train(script, folder, game, args):
    """main in `folder`; args are a script's Args or a command line. Returns what was seen of it and what it left."""
    seen = SimpleNamespace(status=0, checkpoint=None, initial=None)

    class Watched(script.Run):
        def __enter__(self):
            parts = {k: part for k, part in self.learned.items() if isinstance(part, torch.nn.Module)}
            seen.args, seen.initial = self.args, copy.deepcopy(parts)
            return super().__enter__()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    folder.mkdir(exist_ok=True)
    with in_place_of_the_simulator(script, game) as games, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(script, "Run", Watched)
        try:
            script.main(script.parse_args(args) if isinstance(args, list) else args)
        except SystemExit as error:
            seen.status = error.code
    seen.handlers_are_back = handlers == {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    (seen.folder,) = (folder / "runs").iterdir()
    saved = seen.folder / "checkpoint.pt"
    if saved.exists():
        seen.checkpoint = torch.load(saved, weights_only=True)
    seen.games = games
    return seen


def leaves(tree, path=""):
    """(path, tensor or number) of all numbers in nested dictionaries and lists."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    elif tree is not None:  # Adam's options have some
        yield path, tree


RUN_STATE = ("learned", "hidden", "envs", "rng", "progress")


def differences(a, b, parts=RUN_STATE):
    """Paths at which two checkpoints are not the same to the last bit, but for the seconds that they took."""
    a, b = (dict(leaves({part: checkpoint[part] for part in parts})) for checkpoint in (a, b))
    assert a.keys() == b.keys() and a
    paths = a.keys() - {"/progress/seconds"}
    return sorted(path for path in paths if not torch.equal(torch.as_tensor(a[path]), torch.as_tensor(b[path])))


def evaluations(folder):
    return [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def of_agents(folder, what):
    """`position` or `rank` of each agent, by iteration; none where it is not logged."""
    tags = sorted(scalars(folder).items())
    by_agent = [[event.value for event in events] for tag, events in tags if f"{what}_of_agent" in tag]
    return list(zip(*by_agent, strict=True))


def orders(folder, n):
    """The agents in the order of their updates, by iteration; none where they are updated at once."""
    return [sorted(range(n), key=places.__getitem__) for places in of_agents(folder, "position")]


def assert_same_training(run, reference, record, tolerance=1e-6):
    """The reference follows the record of a run's game: the same losses, episodes, steps and weights."""
    method, T, logged = reference.algorithm, run.args.num_steps, scalars(run.folder)
    order, iterations = orders(run.folder, reference.n), run.checkpoint["progress"]["iteration"]
    ranks = of_agents(run.folder, "rank")
    assert run.status == 0 and iterations == 2
    assert len(order) == (iterations if method in ("a2po", "happo") else 0)
    assert len(ranks) == (iterations if method == "a2po" else 0)
    for k in range(iterations):
        reference.collect(record[k * T : (k + 1) * T])
        updates = reference.update(order[k] if order else None)
        if method == "a2po":
            assert order[k][0] == np.argmax(reference.scores), "semi-greedy: the largest first"
            assert list(ranks[k]) == reference.ranks()
        expected = {"losses/explained_variance": reference.explained_variance}
        for name in set(updates[0]) - {"block"}:
            expected[f"losses/{name}"] = np.mean([u[name] for u in updates])
        for block in {u["block"] for u in updates} if method == "a2po" else ():
            for name in ("ratio", "approx_kl", "clipfrac", "preceding_clipfrac"):
                expected[f"a2po/position_{block}/{name}"] = np.mean([u[name] for u in updates if u["block"] == block])
        expected["charts/episodic_return"] = np.mean([score for score, _ in reference.episodes])
        expected["charts/episodic_length"] = np.mean([length for _, length in reference.episodes])
        for name, number in expected.items():
            assert logged[name][k].value == pytest.approx(number, rel=100 * tolerance, abs=tolerance), name
    assert run.checkpoint["progress"]["global_step"] == reference.global_step
    for name, networks in (("actor", reference.actors), ("critic", reference.critics)):
        networks = networks[0] if reference.shared else torch.nn.ModuleList(networks)
        weights, trained = networks.state_dict(), run.checkpoint["learned"][name]
        assert weights.keys() == trained.keys()
        for part, value in weights.items():
            error = (trained[part] - value).abs().max().item()
            assert error < tolerance, f"{name}.{part}: {error}"


@contextlib.contextmanager
def in_double():
    """What the scripts make is float64 then, as the reference is."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def load(name):
    return importlib.import_module(name)
