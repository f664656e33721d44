"""Multi-agent MuJoCo: the actions' way to the joints, EnvPool's episodes, and Algorithm 1 against plain loops.

The training runs on a small robot of ours in place of the simulator, except where the simulator is what is tested.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import a2po_mamujoco as script

ROOT = Path(__file__).parents[1]
TASKS = [(scenario, partition) for scenario, partitions in script.PARTITIONS.items() for partition in partitions]
VERSIONS = {s: ("v2" if s == "HumanoidStandup" else "v3", "v4", "v5") for s in script.PARTITIONS}
PAPER = "Ant 2x4, Ant 2x4d, Ant 4x2, Ant 8x1, Walker2d 2x3, Walker2d 3x2, Walker2d 6x1, Hopper 3x1, HalfCheetah 2x3, "
PAPER += "HalfCheetah 3x2, HalfCheetah 6x1, Humanoid 9|8, Humanoid 17x1, HumanoidStandup 9|8"
# What Gymnasium-Robotics lacks of the paper's partitions or has otherwise; the names are MuJoCo's.
OTHERS = {
    ("Ant", "2x4d"): [["hip_1", "ankle_1", "hip_3", "ankle_3"], ["hip_2", "ankle_2", "hip_4", "ankle_4"]],
    ("HalfCheetah", "3x2"): [["bfoot", "bshin"], ["bthigh", "ffoot"], ["fshin", "fthigh"]],
    ("Walker2d", "3x2"): [
        ["foot_joint", "leg_joint"],
        ["thigh_joint", "foot_left_joint"],
        ["leg_left_joint", "thigh_left_joint"],
    ],
}
every_task = pytest.mark.parametrize(("scenario", "partition"), TASKS, ids=["-".join(task) for task in TASKS])


# ------------------------------------------------------------------------------------------------ actions and joints
@functools.cache
def simulator(scenario):
    """Gymnasium's own environment of the whole robot."""
    return gym.make(f"{scenario}-v5").unwrapped


@functools.cache
def actuators(scenario):
    """The name of the joint that each number of the robot's action moves."""
    import mujoco

    model = simulator(scenario).model
    return [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, joint) for joint in model.actuator_trnid[:, 0]]


@functools.cache
def library(scenario, partition):
    """MaMuJoCo of Gymnasium-Robotics, or None where it lacks the paper's partition."""
    from gymnasium_robotics import mamujoco_v1

    if (scenario, partition) in OTHERS:
        return None
    try:
        return mamujoco_v1.parallel_env(scenario, partition, agent_obsk=0)
    except Exception as error:
        assert "UNKNOWN partitioning" in str(error)
        return None


def joints_by_name(scenario, partition):
    """The joints of each agent, by MuJoCo's names: from the library's, or from the table above, or one for each."""
    if library(scenario, partition):
        parts = library(scenario, partition).agent_action_partitions
        names = {name.replace("_", ""): name for name in actuators(scenario)}
        return [[names[node.label.replace("_", "")] for node in part] for part in parts]
    if (scenario, partition) in OTHERS:
        return OTHERS[scenario, partition]
    return [[actuators(scenario)[k] for k in mine] for mine in script.agent_joints(scenario, partition)]


def robots(scenario, partition, version="v5", num_envs=3, seed=7, threads=1):
    return script.MaMuJoCo(scenario, partition, version, num_envs, seed, threads)


@every_task
def test_actions_reach_the_joints_of_the_partition(scenario, partition):
    """By the joints' names, and as MaMuJoCo of Gymnasium-Robotics does it; every joint has one agent."""
    envs, names = robots(scenario, partition), joints_by_name(scenario, partition)
    assert sorted(sum(names, [])) == sorted(actuators(scenario))
    sizes = {"9|8": [9, 8]}.get(partition) or [int(partition.split("x")[1].rstrip("d"))] * int(partition.split("x")[0])
    assert [len(mine) for mine in names] == sizes and envs.has_joint.sum(1).tolist() == sizes
    assert envs.single_action_space.shape == envs.has_joint.shape == (len(sizes), max(sizes))
    actions = np.random.default_rng(0).uniform(-1, 1, (3, *envs.has_joint.shape)).astype(np.float32)
    actions[1:] = np.array([1, -1])[:, None, None]
    space = simulator(scenario).action_space
    scaled = space.low[0] + (actions + 1) / 2 * (space.high[0] - space.low[0])
    whole = envs.joint_actions(actions)
    assert whole.shape == (3, len(actuators(scenario)))
    np.testing.assert_allclose(whole[1:], [space.high, space.low], rtol=1e-6)
    for i, mine in enumerate(names):
        for k, name in enumerate(mine):
            np.testing.assert_allclose(whole[:, actuators(scenario).index(name)], scaled[:, i, k], rtol=1e-6)
    for e in range(3):
        if theirs := library(scenario, partition):
            local = {f"agent_{i}": scaled[e, i, : len(mine)] for i, mine in enumerate(names)}
            np.testing.assert_allclose(whole[e], theirs.map_local_actions_to_global_action(local), rtol=1e-6)
    envs.close()


def test_diagonal_legs_are_diagonal():
    """Ant 2x4d: the two legs of an agent point in opposite directions; 2x4: they are neighbours."""
    model = simulator("Ant").model

    def direction(hip):
        return model.body_pos[model.jnt_bodyid[model.joint(hip).id]][:2]

    for partition, cosine in (("2x4d", -1.0), ("2x4", 0.0)):
        for mine in joints_by_name("Ant", partition):
            one, other = (direction(name) for name in mine if name.startswith("hip"))
            assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) == pytest.approx(cosine)


PHYSICS = [(*task, "v5") for task in TASKS]
PHYSICS += [(s, script.PARTITIONS[s][-1], version) for s in VERSIONS for version in VERSIONS[s][:-1]]


@pytest.mark.parametrize(("scenario", "partition", "version"), PHYSICS, ids=["-".join(case) for case in PHYSICS])
def test_each_action_moves_its_joint_in_the_simulator(scenario, partition, version):
    """From one state, with and without one action: EnvPool's change of velocities is what MuJoCo makes of its joint."""
    import mujoco

    model, names = simulator(scenario).model, joints_by_name(scenario, partition)
    moves = [(i, k, name) for i, mine in enumerate(names) for k, name in enumerate(mine)]
    still, moved = (robots(scenario, partition, version, len(moves)) for _ in range(2))
    first, _ = still.reset()
    assert np.array_equal(first, moved.reset()[0])
    actions = np.zeros((len(moves), *still.has_joint.shape), np.float32)
    actions[:, ~still.has_joint] = 1.0  # joints that do not exist
    after = still.step(actions)[0]
    for e, (i, k, _) in enumerate(moves):
        actions[e, i, k] = 0.5
    hidden = {"Ant": 2, "Humanoid": 2, "HumanoidStandup": 2}.get(scenario, 1)  # the robot's place is not observed
    velocities = slice(model.nq - hidden, model.nq - hidden + model.nv)
    change = (moved.step(actions)[0] - after)[:, velocities]
    for e, (_, _, name) in enumerate(moves):
        actuator, results = actuators(scenario).index(name), []
        for force in (0.0, 0.5 * model.actuator_ctrlrange[actuator, 1]):
            data = mujoco.MjData(model)
            data.qpos[hidden:], data.qvel[:] = first[e, : velocities.start], first[e, velocities]
            data.ctrl[actuator] = force
            mujoco.mj_step(model, data, nstep=simulator(scenario).frame_skip)
            results.append(data.qvel.copy())
        expected = results[1] - results[0]
        np.testing.assert_allclose(change[e], expected, atol=1e-3 * abs(expected).max(), err_msg=name)
        own = change[e, model.jnt_dofadr[model.actuator_trnid[actuator, 0]]]
        assert own > 0.5 * abs(change[e]).max(), name
    still.close(), moved.close()


# ------------------------------------------------------------------------------------------------------- episodes
@pytest.mark.parametrize("version", VERSIONS["Hopper"])
def test_falls_terminate_and_the_next_step_resets(version):
    """A fall is no time limit; its observation is the last one's; the step behind it ignores the action, reward 0."""
    envs, twins = robots("Hopper", "3x1", version), robots("Hopper", "3x1", version)
    rng, falls, final = np.random.default_rng(0), 0, np.zeros(3, bool)
    obs, _ = envs.reset()
    twins.reset()
    assert obs.shape == envs.observation_space.shape and envs.metadata["autoreset_mode"].value == "NextStep"
    for _ in range(150):
        actions = rng.uniform(-1, 1, (3, 3, 1)).astype(np.float32)
        others = np.where(final[:, None, None], -actions, actions)
        obs, reward, terminated, truncated, _ = envs.step(actions)
        assert all(np.array_equal(a, b) for a, b in zip((obs, reward), twins.step(others), strict=False))
        assert not truncated.any() and not (terminated & final).any()
        assert (reward[final] == 0).all() and (reward[~final] != 0).all()
        upright, start = np.full(11, 0.0), abs(obs[final])
        upright[0] = 1.25
        np.testing.assert_allclose(start, np.broadcast_to(upright, start.shape), atol=6e-3)
        healthy = (obs[:, 0] > 0.7) & (abs(obs[:, 1]) < 0.2)
        assert (terminated == ~healthy).all(), "the observation of a fall is the fallen robot's"
        falls, final = falls + terminated.sum(), terminated
    assert falls > 5
    envs.close(), twins.close()


@pytest.mark.parametrize("version", VERSIONS["HalfCheetah"])
def test_time_limit_truncates(version):
    """After exactly 1,000 steps, with a reward; again after a filler step and 1,000 more."""
    envs = robots("HalfCheetah", "6x1", version, num_envs=2)
    envs.reset()
    ends, actions = [], np.full((2, 6, 1), 0.3, np.float32)
    for t in range(1, 2002):
        _, reward, terminated, truncated, _ = envs.step(actions)
        assert not terminated.any() and (reward == 0).all() == (t == 1001)
        if truncated.any():
            assert truncated.all()
            ends.append(t)
    assert ends == [1000, 2001]
    envs.close()


@pytest.mark.parametrize(("scenario", "partition"), [("Ant", "4x2"), ("Humanoid", "9|8")])
def test_actions_are_clipped(scenario, partition):
    """What lies beyond the joints' range counts as its end."""
    envs, twins = robots(scenario, partition), robots(scenario, partition)
    envs.reset(), twins.reset()
    rng = np.random.default_rng(0)
    for _ in range(3):
        actions = rng.normal(0, 3, (3, *envs.has_joint.shape)).astype(np.float32)
        results = zip(envs.step(actions), twins.step(actions.clip(-1, 1)), strict=True)
        assert all(np.array_equal(a, b) for a, b in results if not isinstance(a, dict))
    envs.close(), twins.close()


def test_seeds_streams_and_threads():
    """Equal seeds and streams have equal episodes with any number of threads; all others share none."""
    firsts = []
    for seed in (1, 2):
        for stream in range(4):
            args = small(scenario="Hopper", partition="3x1", env_version="v5", seed=seed)
            envs = script.make_envs(args, 5, stream)
            again = script.make_envs(dataclasses.replace(args, torch_threads=2), 5, stream)
            first = envs.reset()[0]
            firsts += first.tolist()
            assert np.array_equal(first, again.reset()[0])
            rng = np.random.default_rng(0)
            for _ in range(30 if stream == 0 else 0):
                actions = rng.uniform(-1, 1, (5, 3, 1)).astype(np.float32)
                results = zip(envs.step(actions), again.step(actions), strict=True)
                assert all(np.array_equal(a, b) for a, b in results if not isinstance(a, dict))
            envs.close(), again.close()
    assert len(np.unique(firsts, axis=0)) == 2 * 4 * 5


# -------------------------------------------------------------------------------------------- networks and statistics
def test_observation_normalizer():
    """Mean and variance of all data so far, whatever the batches; constant numbers and outliers stay finite."""
    rng, normalizer, seen = np.random.default_rng(0), script.ObservationNormalizer(4), np.zeros((0, 4))
    for size in (1, 7, 64, 3, 500):
        batch = rng.normal([0, 5, -30, 2], [1, 0.1, 20, 0], (size, 4)) + rng.normal(size=4) * [1, 1, 1, 0]
        normalizer.update(torch.as_tensor(batch))
        seen = np.concatenate([seen, batch])
    np.testing.assert_allclose(normalizer.mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normalizer.variance, seen.var(0), rtol=1e-3, atol=1e-5)
    normal = normalizer(torch.as_tensor(seen))
    assert normal.dtype == torch.float32 and normal.abs().max() <= 10
    expected = (seen[:, :3] - seen[:, :3].mean(0)) / seen[:, :3].std(0)
    np.testing.assert_allclose(normal[:, :3], expected.clip(-10, 10), atol=1e-3)
    assert normalizer(torch.tensor([[1e9, -1e9, 0.0, 2.0]]))[0, :2].tolist() == [10, -10]
    before = {name: x.clone() for name, x in normalizer.state_dict().items()}
    assert all(torch.equal(x, before[name]) for name, x in normalizer.state_dict().items())


@pytest.mark.parametrize(("n", "obs_dim", "d", "hidden"), [(1, 3, 2, 8), (4, 27, 3, 16), (17, 5, 1, 8)])
def test_joint_policies_are_the_separate_actors(n, obs_dim, d, hidden):
    torch.manual_seed(0)
    actors = torch.nn.ModuleList([script.GaussianActor(obs_dim, d, hidden) for _ in range(n)])
    obs = torch.randn(6, obs_dim)
    for _ in range(2):
        mean, std = script.joint_policies(actors)(obs)
        assert mean.shape == (n, 6, d) and std.expand(n, 6, d).shape == mean.shape
        for i, actor in enumerate(actors):
            torch.testing.assert_close(mean[i], actor(obs)[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(std[i].expand(6, d), actor(obs)[1].expand(6, d))
        with torch.no_grad():  # at first many parameters are alike: once more where none are
            for parameter in actors.parameters():
                parameter += 0.3 * torch.randn_like(parameter)


def test_initial_policy():
    """Appendix B.4.2: mean near 0 (gain 0.01) and kept within -1 and 1 by tanh, log std -0.5."""
    torch.manual_seed(0)
    actor = script.GaussianActor(7, 3, 16)
    mean, std = actor(torch.randn(50, 7))
    assert mean.abs().max() < 0.1 and (std.log() + 0.5).abs().max() < 1e-6
    with torch.no_grad():
        actor.mean[-1].bias.copy_(torch.tensor([0.5, -0.5, 99.0]))
        mean, _ = actor(torch.randn(50, 7))
    assert torch.allclose(mean.mean(0), torch.tensor([math.tanh(0.5), -math.tanh(0.5), 1.0]), atol=0.05)


def test_action_ratio():
    """Appendix B.4.2: the mean of the ratios of the agent's own joints; others have no value and no gradient."""
    log_ratios = torch.tensor([[2.0, 0.5, 7.0], [0.25, 0.25, 1e-9], [1.0, 3.0, 1.0]]).log().requires_grad_()
    ratio = script.action_ratio(log_ratios, torch.tensor([1.0, 1.0, 0.0]))
    assert ratio.tolist() == pytest.approx([1.25, 0.25, 2.0])
    ratio.sum().backward()
    expected = torch.tensor([[1.0, 0.25, 0.0], [0.125, 0.125, 0.0], [0.5, 1.5, 0.0]])
    torch.testing.assert_close(log_ratios.grad, expected)
    one = script.action_ratio(torch.tensor([[math.log(3), 900.0], [500.0, -900.0]]), torch.tensor([1.0, 0.0]))
    assert one[0].item() == pytest.approx(3) and torch.isfinite(one).all()


# ------------------------------------------------------------------------------------------ a robot without simulator
class Rig(gym.vector.VectorEnv):
    """Four agents with 2, 1, 3 and 1 joints whose actions feed a memory, which is most of the reward. Deterministic.

    Episodes take 3 to 8 steps and end by turns terminated and truncated. `junk` seeds what must not matter: the last
    observation of a terminated episode and the reward of the filler step. In step `signal_at` the process sends itself
    `signal_number`. `stream` is another Rig's episodes.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    has_joint = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]], bool)
    obs_dim = 5

    def __init__(self, num_envs, stream=0, junk=0, signal_at=None, signal_number=None):
        self.num_envs, self.stream, self.junk = num_envs, stream, junk
        self.signal_at, self.signal_number = signal_at, signal_number
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (self.obs_dim,), np.float64)
        self.single_action_space = gym.spaces.Box(-1, 1, self.has_joint.shape, np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.record, self.closed_by_script = [], False

    def _observe(self):
        obs = np.zeros((self.num_envs, self.obs_dim))
        for e in range(self.num_envs):
            junk = self.junk if self.terminated[e] else 0
            seed = [self.stream, e, self.episode[e], self.time[e], junk]
            obs[e] = np.random.default_rng(seed).normal([0, 20, 0, -1, 0], [1, 5, 0.1, 1, 1])
            obs[e, 0] = self.memory[e] + 5 * junk
        return obs

    def reset(self, *, seed=None, options=None):
        self.episode, self.time = np.zeros((2, self.num_envs), int)
        self.memory, self.final = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        self.terminated = self.final.copy()
        self.seen = self._observe()
        return self.seen, {}

    def step(self, actions):
        if len(self.record) == self.signal_at:
            signal.raise_signal(self.signal_number)
            assert signal.getsignal(self.signal_number) == signal.SIG_DFL, "a second signal must end the run at once"
        assert actions.shape == self.action_space.shape
        reward, ends = np.zeros(self.num_envs, np.float32), np.zeros((2, self.num_envs), bool)
        for e in range(self.num_envs):
            if self.final[e]:
                self.episode[e], self.time[e], self.memory[e] = self.episode[e] + 1, 0, 0.0
                self.final[e] = self.terminated[e] = False
                reward[e] = 9.0 * self.junk  # the filler step
                continue
            pulls = (actions[e] * [[1, -1, 9], [1, 9, 9], [0.5, 1, -1], [-1, 9, 9]])[self.has_joint]
            self.memory[e] = 0.6 * self.memory[e] + 0.3 * pulls.clip(-1, 1).sum()
            reward[e] = self.memory[e] + 0.2 * (-1) ** self.time[e]
            self.time[e] += 1
            if self.time[e] == 3 + (2 * e + 3 * self.episode[e] + self.stream) % 6:
                self.final[e] = True
                self.terminated[e] = (e + self.episode[e]) % 2 == 0
                ends[:, e] = self.terminated[e], not self.terminated[e]
        before, self.seen = self.seen, self._observe()
        self.record.append((before, np.array(actions), reward, *ends, self.seen))
        return self.seen, reward, *ends, {}

    def close(self, **_):
        self.closed_by_script = True


SMALL = {"scenario": "Ant", "partition": "4x2", "seed": 3, "total_timesteps": 40, "num_envs": 2, "num_steps": 12}
SMALL |= {"hidden_size": 8, "update_epochs": 4, "agent_blocks": 3, "eval_every": 10**9, "eval_episodes": 2}
SMALL |= {"save_every": 10**9, "torch_threads": 1, "cuda": False, "learning_rate": 3e-3, "max_grad_norm": 0.3}
SMALL |= {"huber_delta": 0.5, "clip_coef": 0.03, "gae_lambda": 0.9, "clip_adaptation": 0.25, "env_version": "v5"}


def small(**options):
    return script.Args(**SMALL | options)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(where, **options of Rig or Args, argv=None) -> (checkpoint, run directory, Rigs, exit status)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(where="run", argv=None, simulator=False, **options):
        game = {name: options.pop(name) for name in ("junk", "signal_at", "signal_number") if name in options}
        games, status = [], 0
        (tmp_path / where).mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / where)
            if not simulator:
                patch.setattr(
                    script, "make_envs", lambda _, N, stream: games.append(Rig(N, stream, **game)) or games[-1]
                )
            try:
                script.main(script.parse_args(argv) if argv else small(**options))
            except SystemExit as error:
                status = error.code
        (run_dir,) = (tmp_path / where / "runs").iterdir()
        saved = run_dir / "checkpoint.pt"
        checkpoint = torch.load(saved, weights_only=True) if saved.exists() else None
        return checkpoint, tmp_path / where / run_dir, games, status

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def leaves(tree, path=""):
    """(path, tensor or number) of all numbers in nested dictionaries and lists."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    elif tree is not None:
        yield path, tree


def differences(a, b, but=()):
    """Paths at which two checkpoints are not the same to the last bit, leaving out settings and times."""
    but = {"args", "script", *but}
    a, b = (dict(leaves({k: v for k, v in c.items() if k not in but})) for c in (a, b))
    assert a.keys() == b.keys() and a
    return [p for p in a if p != "/progress/seconds" and not torch.equal(torch.as_tensor(a[p]), torch.as_tensor(b[p]))]


def evaluations(run_dir):
    return [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]


def scalars(run_dir):
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def orders(run_dir):
    """The agents in the order of their updates, by iteration."""
    places = [[event.value for event in scalars(run_dir)[f"a2po/position_of_agent/{i}"]] for i in range(4)]
    return [sorted(range(4), key=lambda i, k=k: places[i][k]) for k in range(len(places[0]))]


# --------------------------------------------------------------------------------- the whole training in plain loops
class Plain:
    """A whole run again, one sample at a time, from the games' record and the orders: Algorithm 1 of the paper."""

    def __init__(self, args):
        self.args, self.n = args, len(Rig.has_joint)
        self.joints = [np.flatnonzero(mine).tolist() for mine in Rig.has_joint]
        torch.manual_seed(args.seed)
        self.actors = [script.GaussianActor(Rig.obs_dim, 3, args.hidden_size) for _ in range(self.n)]
        self.critics = [script.mlp(Rig.obs_dim, 1, args.hidden_size, gain=1.0) for _ in range(self.n)]
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, eps=1e-5)
        self.optimizers = {id(net): adam(net.parameters()) for net in self.actors + self.critics}
        self.mean = self.square = self.weight = 0.0
        self.seen, self.steps_done = [], 0
        self.active = dict.fromkeys(["own clip", "inner clip", "trace cut", "actor norm", "critic norm", "huber"], 0)
        self.active |= {"value clip": 0}

    def unit(self):
        """Mean and standard deviation of the returns so far."""
        weight = max(self.weight, 1e-5)
        mean = self.mean / weight
        return mean, math.sqrt(max(self.square / weight - mean**2, 0.01))

    def normal(self, obs):
        """With mean and variance of all observations before; at the very first 0 and 1."""
        mean, variance = np.zeros(Rig.obs_dim), np.ones(Rig.obs_dim)
        if self.seen:  # the start counts as a ten-thousandth of an observation
            data, weights = np.array([mean, *self.seen]), np.array([1e-4] + [1.0] * len(self.seen))
            mean = np.average(data, 0, weights)
            spread = (data - mean) ** 2
            spread[0] += 1
            variance = np.average(spread, 0, weights)
        return torch.tensor(((obs - mean) / np.sqrt(variance + 1e-8)).clip(-10, 10), dtype=torch.float32)

    def log_probs(self, i, t, e):
        """Of each of the agent's own joints."""
        mean, std = self.actors[i](self.obs[t, e])
        action = self.steps[t][1][e, i]
        squares = [((float(action[k]) - mean[k]) / std[k]) ** 2 for k in self.joints[i]]
        return [-s / 2 - std[k].log() - math.log(2 * math.pi) / 2 for k, s in zip(self.joints[i], squares, strict=True)]

    def ratio(self, i, t, e):
        """Appendix B.4.2: the mean over the agent's joints."""
        new = self.log_probs(i, t, e)
        return sum((p - q).exp() for p, q in zip(new, self.old[t, e, i], strict=True)) / len(new)

    @torch.no_grad()
    def collect(self, steps, starting):
        """`starting`: with new episodes, as at the beginning and after --resume."""
        self.steps, self.obs, self.old, self.values, self.samples = steps, {}, {}, {}, []
        mean, std = self.unit()
        final = [False] * self.args.num_envs if starting else self.final
        for t in range(len(steps) + 1):
            raw = steps[t][0] if t < len(steps) else steps[-1][5]
            for e in range(self.args.num_envs):
                self.obs[t, e] = self.normal(raw[e])
                for i, critic in enumerate(self.critics):
                    self.values[t, e, i] = critic(self.obs[t, e]).item() * std + mean
                    if t < len(steps):
                        self.old[t, e, i] = self.log_probs(i, t, e)
                if t < len(steps) and not final[e]:
                    self.samples.append((t, e))
            if t < len(steps):
                self.seen += list(raw)
                final = [bool(x) for x in steps[t][3] | steps[t][4]]
        self.final = final
        self.steps_done += len(self.samples)

    def advantages(self, i, rho):
        """Eq. (2); rho maps (t, e) to the joint ratio, and what is missing is 1."""
        A, args = {}, self.args
        for e in range(args.num_envs):
            for t in reversed(range(len(self.steps))):
                _, _, reward, terminated, truncated, _ = self.steps[t]
                successor = 0.0 if terminated[e] else self.values[t + 1, e, i]
                A[t, e] = float(reward[e]) + args.gamma * successor - self.values[t, e, i]
                if t + 1 < len(self.steps) and not (terminated[e] or truncated[e]):
                    weight = min(1.0, rho.get((t + 1, e), 1.0))
                    self.active["trace cut"] += weight < 0.99
                    A[t, e] += args.gamma * args.gae_lambda * weight * A[t + 1, e]
        return A

    def update(self, order):
        args = self.args
        gae = [self.advantages(i, {}) for i in range(self.n)]
        scores = [np.mean([abs(gae[i][s]) for s in self.samples]) for i in range(self.n)]
        assert order[0] == np.argmax(scores), "semi-greedy: the largest first, and the third of those left"
        assert scores[order[2]] > scores[order[3]]
        returns = [gae[i][s] + self.values[*s, i] for i in range(self.n) for s in self.samples]
        for name, value in (("mean", np.mean(returns)), ("square", np.mean(np.square(returns))), ("weight", 1.0)):
            setattr(self, name, 0.99999 * getattr(self, name) + (1 - 0.99999) * value)
        size, more = divmod(self.n, args.agent_blocks)  # blocks as equal as can be, the larger ones first
        ends = [k * size + min(k, more) for k in range(args.agent_blocks + 1)]
        g = dict.fromkeys(self.samples, 1.0)  # the product of the preceding agents' ratios
        for k, (begin, end) in enumerate(zip(ends, ends[1:], strict=False), 1):
            block = order[begin:end]
            for i in block:
                self.update_agent(i, g, self.advantages(i, g if args.preopc else {}), k / args.agent_blocks)
            for s in self.samples:
                g[s] *= math.prod(self.ratio(i, *s).item() for i in block)

    def update_agent(self, i, g, A, place):
        args, (mean, std) = self.args, self.unit()
        average = np.mean([A[s] for s in self.samples])
        deviation = np.sqrt(np.mean([(A[s] - average) ** 2 for s in self.samples])) + 1e-5
        eps = args.clip_coef * args.clip_adaptation + args.clip_coef * (1 - args.clip_adaptation) * place
        for _ in range(args.update_epochs):
            loss = 0.0
            for s in self.samples:
                inner = min(max(g[s], 1 - eps / 2), 1 + eps / 2)
                joint, advantage = self.ratio(i, *s) * inner, (A[s] - average) / deviation
                self.active["own clip"] += abs(joint.item() - 1) > eps
                self.active["inner clip"] += inner != g[s]
                surrogate = min(joint * advantage, joint.clamp(1 - eps, 1 + eps) * advantage)
                value, old = self.critics[i](self.obs[s])[0], (self.values[*s, i] - mean) / std
                target = (A[s] + self.values[*s, i] - mean) / std
                near = old + (value - old).clamp(-args.clip_coef, args.clip_coef)
                self.active["value clip"] += abs(value.item() - old) > args.clip_coef
                worst = max(self.huber(value - target), self.huber(near - target))
                log_std = self.actors[i].log_std
                entropy = sum(0.5 + 0.5 * math.log(2 * math.pi) + log_std[k] for k in self.joints[i])
                loss = loss + (worst - surrogate - args.ent_coef * entropy) / len(self.samples)
            for network in (self.actors[i], self.critics[i]):
                self.optimizers[id(network)].zero_grad()
            loss.backward()
            for kind, network in (("actor", self.actors[i]), ("critic", self.critics[i])):
                gradients = [p.grad for p in network.parameters()]
                norm = math.sqrt(sum(x.square().sum().item() for x in gradients))
                self.active[f"{kind} norm"] += norm > args.max_grad_norm
                for x in gradients:
                    x *= min(1.0, args.max_grad_norm / (norm + 1e-6))
                self.optimizers[id(network)].step()

    def huber(self, error):
        size, delta = error.abs(), self.args.huber_delta
        self.active["huber"] += size.item() > delta
        return 0.5 * error**2 if size < delta else delta * (size - 0.5 * delta)

    def assert_same(self, checkpoint):
        assert checkpoint["progress"]["global_step"] == self.steps_done
        for name, networks in (("actor", self.actors), ("critic", self.critics)):
            weights = torch.nn.ModuleList(networks).state_dict()
            assert weights.keys() == checkpoint[name].keys()
            for parameter, value in weights.items():
                expected = checkpoint[name][parameter]
                torch.testing.assert_close(value, expected, atol=1e-5, rtol=0, msg=lambda m, p=parameter: f"{p}: {m}")
        statistics = checkpoint["obs_normalizer"]
        assert statistics["count"].item() == pytest.approx(len(self.seen), abs=1e-3)
        np.testing.assert_allclose(statistics["mean"], np.mean(self.seen, 0), atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"agent_blocks": 4, "ent_coef": 0.1}, {"preopc": False, "agent_blocks": 2}], ids=str
)
def test_training_is_algorithm_1_in_plain_loops(train, options):
    """Two iterations of main and of loops over samples, written from the paper and DESIGN: the same weights."""
    checkpoint, run_dir, games, _ = train(**options)
    plain, T = Plain(small(**options)), SMALL["num_steps"]
    assert len(orders(run_dir)) == checkpoint["progress"]["iteration"] == 2
    for k, order in enumerate(orders(run_dir)):
        plain.collect(games[0].record[k * T : (k + 1) * T], starting=k == 0)
        plain.update(order)
    plain.assert_same(checkpoint)
    idle = [name for name, times in plain.active.items() if times < 5]
    assert idle == ([] if options.get("preopc", True) else ["trace cut"]), "everything must matter in this test"


def test_resuming_goes_on_with_new_episodes(train):
    """Weights, optimisers, statistics and counters as they were, to the last bit; the simulator's episodes are new."""
    first, run_dir, games, _ = train("a", update_epochs=2)
    argv = ["--resume", str(run_dir), "--total-timesteps", "60"]
    with (run_dir / "eval.jsonl").open("a") as file:  # as if it had gone on after its last checkpoint
        file.write(json.dumps({"step": first["progress"]["global_step"] + 1, "episodic_return": 0.5}) + "\n")
    lines = evaluations(run_dir)
    last, again, others, status = train("a", argv=argv)
    assert status == 0 and again == run_dir and last["progress"]["iteration"] == 3
    assert last["progress"]["seconds"] > first["progress"]["seconds"]
    assert last["args"] == first["args"] | {"total_timesteps": 60}
    (played,) = [game for game in others if game.record and game.stream != 1]
    assert played.stream not in [game.stream for game in games]
    plain, T, order = Plain(small(update_epochs=2)), SMALL["num_steps"], orders(run_dir)
    assert len(order) == 3
    for k in range(3):
        steps = games[0].record[k * T : (k + 1) * T] if k < 2 else played.record
        plain.collect(steps, starting=k != 1)
        plain.update(order[k])
    plain.assert_same(last)
    after = evaluations(run_dir)
    assert len(lines) == 2 and after[:1] == lines[:1] and after[1]["step"] == last["progress"]["global_step"]
    assert len(after) == 2

    def noise(iteration, game):  # what was drawn in an iteration's first step, nearly: the means are about 0
        return game.record[iteration * T][1]

    assert not np.allclose(noise(0, played), noise(0, games[0]), atol=0.1), "the random state goes on"


def test_resuming_twice_is_the_same(train, tmp_path):
    """And with the same total nothing is left to do: the checkpoint stays."""
    first, run_dir, _, _ = train("a")
    saved = (run_dir / "checkpoint.pt").read_bytes()
    results = []
    for _ in range(2):
        (run_dir / "checkpoint.pt").write_bytes(saved)
        results.append(train("a", argv=["--resume", str(run_dir), "--total-timesteps", "60"])[0])
    assert differences(*results) == [] and differences(first, results[0]) != []
    (run_dir / "checkpoint.pt").write_bytes(saved)
    assert differences(first, train("a", argv=["--resume", str(run_dir)])[0]) == []


# ----------------------------------------------------------------------------------------------- what is no sample
def test_what_is_no_sample_changes_nothing(train, monkeypatch):
    """Filler rewards and the last observations of terminated episodes leave no trace in the weights.

    (Except in the statistics of observations, which are stopped here.)
    """
    monkeypatch.setattr(script.ObservationNormalizer, "update", lambda *_: None)
    first, _, games, _ = train("a", junk=1)
    second, _, others, _ = train("b", junk=2)
    shown = [(a[5] != b[5]).any() for a, b in zip(games[0].record, others[0].record, strict=True)]
    assert sum(shown) >= 2 and first["progress"]["iteration"] == 2
    assert differences(first, second) == []
    observe = Rig._observe

    def changed(self):
        return observe(self) + 0.5 * (self.final & ~self.terminated)[:, None] * np.arange(5)

    monkeypatch.setattr(Rig, "_observe", changed)
    third, *_ = train("c", junk=1)
    assert any(path.startswith("/critic") for path in differences(first, third)), "truncated episodes bootstrap"


def test_joints_that_do_not_exist_are_not_trained(train):
    """Their log std and weights stay as they were drawn, also with an entropy bonus; those that exist move."""
    checkpoint, *_ = train(ent_coef=0.1)
    fresh = torch.nn.ModuleList(Plain(small()).actors).state_dict()
    for i, mine in enumerate(Rig.has_joint):
        for name in (f"{i}.log_std", f"{i}.mean.7.weight", f"{i}.mean.7.bias"):
            moved = (checkpoint["actor"][name] - fresh[name]).flatten(1 if "weight" in name else 0)
            moved = moved.abs().sum(1) > 0 if moved.dim() > 1 else moved != 0
            assert moved.tolist() == mine.tolist(), name


def test_steps_and_returns(train):
    """global_step counts real steps, and the score of an episode is its own rewards'."""
    checkpoint, run_dir, games, _ = train(junk=1)
    T, N, record = SMALL["num_steps"], SMALL["num_envs"], games[0].record
    ends = np.array([terminated | truncated for _, _, _, terminated, truncated, _ in record])
    assert checkpoint["progress"]["global_step"] == len(record) * N - ends[:-1].sum()
    returns, lengths, running, length = [], [], np.zeros(N), np.zeros(N)
    for t in range(T):
        real = ~ends[t - 1] if t else np.ones(N, bool)
        running, length = running + record[t][2] * real, length + real
        returns, lengths = returns + running[ends[t]].tolist(), lengths + length[ends[t]].tolist()
        running[ends[t]], length[ends[t]] = 0.0, 0.0
    logged = scalars(run_dir)
    assert logged["charts/episodic_return"][0].value == pytest.approx(np.mean(returns), rel=1e-5)
    assert logged["charts/episodic_length"][0].value == pytest.approx(np.mean(lengths))


# ------------------------------------------------------------------------------------------------------- evaluation
def test_evaluation():
    """The sum of the rewards of each environment's first episode, with the policies' means; nothing is changed."""
    torch.manual_seed(0)
    actors = torch.nn.ModuleList([script.GaussianActor(Rig.obs_dim, 3, 8) for _ in range(4)])
    normalizer = script.ObservationNormalizer(Rig.obs_dim)
    normalizer.update(torch.randn(50, Rig.obs_dim, dtype=torch.float64) * 3 + 4)
    with torch.no_grad():
        for actor in actors:
            actor.mean[-1].weight *= 100
    state = {k: v.clone() for k, v in [*normalizer.state_dict().items(), *actors.state_dict().items()]}
    rng = torch.get_rng_state()
    rig = Rig(4, stream=1, junk=1)
    returns = script.evaluate(actors, normalizer, rig, torch.device("cpu"))
    assert torch.equal(rng, torch.get_rng_state())
    now = {**normalizer.state_dict(), **actors.state_dict()}
    assert all(torch.equal(state[name], now[name]) for name in state)
    expected, running = np.zeros(4), np.ones(4, bool)
    for seen, actions, reward, terminated, truncated, _ in rig.record:
        for i, actor in enumerate(actors):
            mean = actor(normalizer(torch.as_tensor(seen)))[0].detach().numpy()
            np.testing.assert_allclose(actions[:, i], mean, atol=1e-5)
        expected += reward * running
        running &= ~(terminated | truncated)
    assert not running.any() and returns == pytest.approx(expected.tolist(), abs=1e-3)


def test_seeds_and_evaluation_in_training(train):
    """The same seed gives the same run, whether or not there are evaluations between; another seed another one."""
    first, run_dir, games, _ = train("a")
    assert [game.stream for game in games] == [0, 1] and games[0].closed_by_script
    second, often, games, _ = train("b", eval_every=1)
    assert differences(first, second) == [] and [game.stream for game in games] == [0, 1, 1]
    assert len(evaluations(run_dir)) == 1 and len(evaluations(often)) == 2
    assert evaluations(often)[1]["returns"] == evaluations(run_dir)[0]["returns"]
    other, *_ = train("c", seed=4)
    assert any(path.startswith("/actor/") for path in differences(first, other))


def test_same_seed_in_the_simulator(train):
    """Same seed, same machine, CPU: same numbers; after --resume the counters go on, with other episodes."""
    options = {"scenario": "Hopper", "partition": "3x1", "num_envs": 3, "num_steps": 20, "total_timesteps": 110}
    first, run_dir, _, _ = train("a", simulator=True, **options)
    second, other_dir, _, _ = train("b", simulator=True, **options)
    assert differences(first, second) == [] and first["progress"]["iteration"] == 2
    assert evaluations(run_dir)[-1]["returns"] == evaluations(other_dir)[-1]["returns"]
    assert first["obs_normalizer"]["count"].item() == pytest.approx(120, abs=0.01)
    argv = ["--resume", str(run_dir), "--total-timesteps", "170"]
    longer, _, _, status = train("a", simulator=True, argv=argv)
    assert status == 0 and longer["progress"]["iteration"] == 3 and len(evaluations(run_dir)) == 2
    assert longer["obs_normalizer"]["count"].item() == pytest.approx(180, abs=0.01)


# --------------------------------------------------------------------------------------- signals, numbers, directory
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_saves(train, number, capsys):
    """Status 143 or 130, and a checkpoint after the iteration from which --resume goes on."""
    handlers = signal.getsignal(number)
    options = {"total_timesteps": 60, "update_epochs": 1}
    whole, *_ = train("whole", **options)
    half, run_dir, games, status = train("half", signal_at=3, signal_number=number, **options)
    assert status == 128 + number and half["progress"]["iteration"] == 1 and games[0].closed_by_script
    assert "--resume" in capsys.readouterr().err and signal.getsignal(number) == handlers
    resumed, again, _, status = train("half", argv=["--resume", str(run_dir)])
    assert status == 0 and again == run_dir and resumed["progress"]["global_step"] >= 60
    assert json.loads((run_dir / "config.json").read_text())["total_timesteps"] == 60


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run(train, monkeypatch, what):
    """The message has the iteration's number, and the checkpoint of the iteration before is untouched and usable."""
    options = {"total_timesteps": 60, "save_every": 1, "update_epochs": 2}
    good, calls = script.value_loss, []

    def bad(values, *inputs):
        calls.append(1)
        if len(calls) == at and what == "gradient":
            values.register_hook(lambda gradient: gradient * math.nan)
        return good(values, *inputs) * (math.nan if len(calls) == at and what == "loss" else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(script, "value_loss", bad)
        at = 0
        whole, *_ = train("whole", **options)
        at = len(calls) * 2 // whole["progress"]["iteration"]  # the second iteration's last
        calls.clear()
        saved, run_dir, _, status = train("broken", **options)
    assert "iteration 2" in str(status) and "finite" in status and saved["progress"]["iteration"] == 1
    numbers = [x for path, x in leaves(saved) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert numbers and all(torch.isfinite(x).all() for x in numbers)
    assert train("broken", argv=["--resume", str(run_dir)])[3] == 0


def test_run_directory(train):
    """config.json, eval.jsonl, TensorBoard keys and the checkpoint, as DESIGN section 7 has them."""
    options = {"eval_every": 20, "num_envs": 3, "eval_episodes": 4, "clip_coef": None, "agent_blocks": None}
    checkpoint, run_dir, _, _ = train(total_timesteps=60, partition=None, **options)
    assert run_dir.name.startswith("Ant-4x2__a2po_mamujoco__3__")
    files = {path.name.split(".")[0] for path in run_dir.iterdir()}
    assert files == {"config", "eval", "checkpoint", "events"} and not list(run_dir.glob("*.tmp"))
    config = json.loads((run_dir / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(script.Args)} <= config.keys()
    assert None not in config.values(), "config.json has the values that were used"
    assert config["script"] == "a2po_mamujoco" and config["clip_coef"] == 0.2 and config["agent_blocks"] == 4
    assert config["versions"]["envpool"] == importlib.metadata.version("envpool")
    lines = evaluations(run_dir)
    assert len(lines) >= 2 and sorted(e["step"] for e in lines) == [e["step"] for e in lines]
    for line in lines:
        assert line.keys() == {"step", "seconds", "episodic_return", "returns"} and len(line["returns"]) == 4
        assert line["episodic_return"] == pytest.approx(np.mean(line["returns"])) and line["seconds"] > 0
    expected = {f"charts/{c}" for c in "episodic_return episodic_length SPS learning_rate".split()}
    expected |= {f"losses/{x}" for x in "policy_loss value_loss entropy approx_kl clipfrac explained_variance".split()}
    expected |= {"eval/episodic_return", "time/rollout_seconds", "time/update_seconds"}
    expected |= {f"a2po/position_{k}/{x}" for k in (1, 2, 3, 4) for x in ("clipfrac", "preceding_clipfrac", "ratio")}
    logged = scalars(run_dir)
    assert expected | {f"a2po/position_of_agent/{i}" for i in range(4)} <= logged.keys()
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    assert [event.step for event in logged["eval/episodic_return"]] == [e["step"] for e in lines]
    assert all(event.value == 0 for event in logged["a2po/position_1/preceding_clipfrac"])
    assert {"actor", "critic", "normalizer", "obs_normalizer", "progress", "rng", "args"} <= checkpoint.keys()


# ------------------------------------------------------------------------------------------------------- wrong input
WRONG = [
    ("--partition 3x2", "--partition 3x2"),
    ("--scenario Hopper --partition 4x2", "--partition 4x2"),
    ("--env-version v2", "--env-version v2"),
    ("--scenario HumanoidStandup --env-version v3", "--env-version v3"),
    ("--agent-blocks 5", "--agent-blocks 5"),
    ("--scenario Humanoid --agent-blocks 3", "--agent-blocks 3"),
    *[(f"--{name} {x}", f"--{name} {x}") for name in "num-envs agent-blocks torch-threads".split() for x in (0, -3)],
    *[(f"--{name} 0", f"--{name} 0") for name in "num-steps total-timesteps update-epochs hidden-size".split()],
    *[(f"--{name} 0", f"--{name} 0") for name in "eval-every eval-episodes save-every".split()],
    *[(f"--learning-rate {x}", f"--learning-rate {x}") for x in ("-0.1", "nan", "inf")],
    ("--gamma 1.5", "--gamma 1.5"),
    ("--gae-lambda -0.5", "--gae-lambda -0.5"),
    ("--clip-coef -1.0", "--clip-coef -1.0"),
    ("--clip-adaptation 1.5", "--clip-adaptation 1.5"),
    ("--seed -1", "--seed -1"),
    ("--eval-only", "--eval-only"),
    ("--checkpoint good.pt", "--checkpoint good.pt"),
    *[
        (f"--eval-only --checkpoint {x}", f"--checkpoint {x}")
        for x in "none.pt corrupt.pt half.pt foreign.pt .".split()
    ],
    *[(f"--eval-only --checkpoint {x}", f"--checkpoint {x}") for x in "weights.pt other_options.pt".split()],
    ("--eval-only --checkpoint good.pt --partition 2x4 --agent-blocks 2", "--checkpoint good.pt"),
    (
        "--eval-only --checkpoint good.pt --scenario HalfCheetah --partition 2x3 --agent-blocks 1",
        "--checkpoint good.pt",
    ),
    ("--eval-only --checkpoint good.pt --hidden-size 16", "--checkpoint good.pt"),
    ("--resume nowhere", "--resume nowhere"),
    ("--resume empty", "--resume empty"),
    ("--resume corrupt", "--resume corrupt"),
    ("--resume other_script", "--resume other_script"),
    ("--resume run --env-version v4", "--resume run"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with good and bad checkpoints and run directories."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_envs", lambda _, N, stream: Rig(N, stream))
        patch.chdir(folder)
        script.main(small(total_timesteps=20, update_epochs=1))
    (run_dir,) = (folder / "runs").iterdir()
    run_dir.rename(folder / "run")
    (folder / "runs").rmdir()
    whole = (folder / "run" / "checkpoint.pt").read_bytes()
    good = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
    (folder / "good.pt").write_bytes(whole)
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt.pt").write_bytes(b"no checkpoint at all")
    torch.save({"model": torch.ones(3)}, folder / "foreign.pt")
    torch.save([torch.ones(3)], folder / "weights.pt")
    torch.save(good | {"args": good["args"] | {"warp_speed": 9}}, folder / "other_options.pt")
    for name in ("empty", "corrupt", "other_script"):
        (folder / name).mkdir()
    (folder / "corrupt" / "checkpoint.pt").write_bytes(b"nothing")
    torch.save(good | {"script": "ppo"}, folder / "other_script" / "checkpoint.pt")
    return folder


@pytest.mark.parametrize(("command", "named"), WRONG, ids=[command for command, _ in WRONG])
def test_wrong_input(command, named, files, monkeypatch, capsys):
    """Status 2 and one line on stderr with the option and its value."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(script, "make_envs", lambda _, N, stream: Rig(N, stream))
    with pytest.raises(SystemExit) as left:
        script.main(script.parse_args(command.split()))
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("a2po_mamujoco.py: error: ") and named in lines[0]
    assert not (files / "runs").exists(), "nothing is left behind"


def test_eval_only(files, monkeypatch, capsys):
    """As many episodes as asked for with the checkpoint's networks; trains and writes nothing; statistics restored."""
    monkeypatch.chdir(files)
    games, returns, before = [], [], sorted(files.rglob("*"))
    monkeypatch.setattr(script, "make_envs", lambda _, N, stream: games.append(Rig(N, stream)) or games[-1])
    good, evaluate = torch.load("good.pt", weights_only=True), script.evaluate

    def watched(actors, obs_normalizer, *rest):
        for part, name in ((actors, "actor"), (obs_normalizer, "obs_normalizer")):
            assert all(torch.equal(x, good[name][key]) for key, x in part.state_dict().items())
        returns.extend(evaluate(actors, obs_normalizer, *rest))
        return returns

    monkeypatch.setattr(script, "evaluate", watched)
    script.main(script.parse_args("--eval-only --checkpoint good.pt --eval-episodes 5".split()))
    out = capsys.readouterr().out
    assert len(returns) == 5 and "5 greedy episodes" in out and f"{np.mean(returns):.3f}" in out
    assert sorted(files.rglob("*")) == before and games[-1].stream == 1


# ------------------------------------------------------------------------------------------- the paper's tasks, files
@every_task
def test_tasks_start_and_take_an_update(scenario, partition, train, monkeypatch):
    """Every task in the simulator with its own settings of Table 9, except for sizes: the networks of all agents move.

    Robots that do not fall soon are not evaluated here.
    """
    if scenario not in ("Hopper", "Humanoid", "Walker2d"):
        monkeypatch.setattr(script, "evaluate", lambda *_: [0.0])
    options = dict.fromkeys(["agent_blocks", "learning_rate", "gae_lambda", "clip_coef"])
    options |= {"num_steps": 6, "total_timesteps": 8, "update_epochs": 2, "eval_episodes": 1}
    checkpoint, run_dir, _, status = train(simulator=True, scenario=scenario, partition=partition, **options)
    assert status == 0 and checkpoint["progress"]["iteration"] == 1
    for part, enough in (("actor", all), ("critic", any)):  # a critic's only gradients may all be clipped away
        heads = [x for name, x in checkpoint[part].items() if name.endswith("7.bias")]
        assert len(heads) == len(script.agent_joints(scenario, partition))
        assert enough((x != 0).any() for x in heads) and all(torch.isfinite(x).all() for x in heads)
    assert torch.isfinite(checkpoint["obs_normalizer"]["variance"]).all() and len(evaluations(run_dir)) == 1


def test_the_papers_tasks_and_settings():
    """Tables 8 and 9, and all tasks of the appendix."""
    assert {tuple(task.split()) for task in PAPER.split(", ")} <= set(TASKS)
    table = {"Ant": (8, 3e-4, 0.93, 0.2), "HalfCheetah": (5, 3e-4, 0.93, 0.2), "Hopper": (8, 1e-4, 0.95, 0.1)}
    table |= {"Humanoid": (5, 3e-4, 0.9, 0.2), "HumanoidStandup": (5, 3e-4, 0.93, 0.2)}
    table |= {"Walker2d": (5, 3e-4, 0.93, 0.2)}
    blocks = {("Ant", "8x1"): 4, ("Humanoid", "17x1"): 5, ("HumanoidStandup", "17x1"): 4}
    for scenario, partition in TASKS:
        args = script.complete_args(script.Args(scenario=scenario, partition=partition))
        assert (args.update_epochs, args.learning_rate, args.gae_lambda, args.clip_coef) == table[scenario]
        agents = 2 if partition == "9|8" else int(partition.split("x")[0])
        assert args.agent_blocks == blocks.get((scenario, partition), agents)
        assert args.ent_coef == 0 and args.num_envs * args.num_steps == 4000 and args.total_timesteps == 10**7
        assert args.clip_adaptation == 0.5 and args.agent_order == "semi-greedy" and args.preopc
    assert script.complete_args(script.Args(clip_coef=0.3, update_epochs=2, num_envs=7)).num_steps == 571
    assert script.complete_args(script.Args(scenario="Hopper", clip_coef=0.3)).clip_coef == 0.3


def test_command_line_without_simulator():
    """In a process of its own, up to a wrong partition: one line, status 2, and no simulator is imported."""
    code = """if True:
        import runpy, sys
        sys.argv = ["a2po_mamujoco.py", "--scenario", "Hopper", "--partition", "4x2"]
        try:
            runpy.run_path("a2po_mamujoco.py", run_name="__main__")
        except SystemExit as left:
            print(left.code, [m for m in ("envpool", "mujoco", "gymnasium_robotics") if m in sys.modules])
    """
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "2 []", process.stdout + process.stderr
    assert len(process.stderr.splitlines()) == 1 and "--partition 4x2" in process.stderr


def test_pins():
    """The versions in the script's PEP 723 block are the installed ones and those of requirements.txt."""
    lines = (ROOT / "a2po_mamujoco.py").read_text().splitlines()
    block = lines[lines.index("# /// script") + 1 : lines.index("# ///")]
    required = (ROOT / "requirements.txt").read_text().split()
    for pin in tomllib.loads("\n".join(line[2:] for line in block))["dependencies"]:
        name, version = pin.split("==")
        assert importlib.metadata.version(name).split("+")[0] == version and pin in required
