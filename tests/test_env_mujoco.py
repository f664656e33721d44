"""Multi-agent MuJoCo's environments: the actions' way to the joints, EnvPool's episodes, and what is seen of them."""

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch

import a2po_mamujoco as script

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


def assert_equal_steps(one, other):
    """Two results of `step`."""
    one, other = ((result[0]["obs"], *result[1:4]) for result in (one, other))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


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
    first = still.reset()[0]["obs"]
    assert np.array_equal(first, moved.reset()[0]["obs"])
    actions = np.zeros((len(moves), *still.has_joint.shape), np.float32)
    actions[:, ~still.has_joint] = 1.0  # joints that do not exist
    after = still.step(actions)[0]["obs"]
    for e, (i, k, _) in enumerate(moves):
        actions[e, i, k] = 0.5
    hidden = {"Ant": 2, "Humanoid": 2, "HumanoidStandup": 2}.get(scenario, 1)  # the robot's place is not observed
    velocities = slice(model.nq - hidden, model.nq - hidden + model.nv)
    change = (moved.step(actions)[0]["obs"] - after)[:, velocities]
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
    seen, _ = envs.reset()
    twins.reset()
    assert (
        seen["obs"].shape == envs.observation_space["obs"].shape and envs.metadata["autoreset_mode"].value == "NextStep"
    )
    for _ in range(150):
        actions = rng.uniform(-1, 1, (3, 3, 1)).astype(np.float32)
        others = np.where(final[:, None, None], -actions, actions)
        assert_equal_steps(result := envs.step(actions), twins.step(others))
        obs, reward, terminated, truncated = result[0]["obs"], *result[1:4]
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
        assert_equal_steps(envs.step(actions), twins.step(actions.clip(-1, 1)))
    envs.close(), twins.close()


def hoppers(tmp_path, iteration=0, evaluation=False, **options):
    """make_envs for Hopper, after --resume with a checkpoint of that iteration if it is not 0."""
    if iteration:
        torch.save(
            {"args": {}, "script": "", "learned": {}, "progress": {"iteration": iteration}}, tmp_path / "checkpoint.pt"
        )
        options["resume"] = str(tmp_path)
    args = script.complete_args(script.Args(scenario="Hopper", num_envs=5, eval_episodes=5, **options))
    return script.make_envs(args, evaluation=True) if evaluation else script.make_envs(args)


def test_seeds_iterations_and_threads(tmp_path):
    """Equal seeds have equal episodes with any number of threads; other seeds, evaluations and what is resumed at
    other iterations have other ones; and evaluations always the same."""
    firsts = []
    for seed in (1, 2):
        for kind in ({}, {"iteration": 1}, {"iteration": 2}, {"evaluation": True}):
            envs, again = (hoppers(tmp_path, seed=seed, torch_threads=threads, **kind) for threads in (1, 2))
            first = envs.reset()[0]["obs"]
            firsts += first.tolist()
            assert np.array_equal(first, again.reset()[0]["obs"])
            rng = np.random.default_rng(0)
            for _ in range(0 if kind else 30):
                actions = rng.uniform(-1, 1, (5, 3, 1)).astype(np.float32)
                assert_equal_steps(envs.step(actions), again.step(actions))
            envs.close(), again.close()
    assert len(np.unique(firsts, axis=0)) == 2 * 4 * 5
    later = hoppers(tmp_path, seed=2, iteration=3, evaluation=True)
    assert np.array_equal(first, later.reset()[0]["obs"])
    later.close()


@pytest.mark.parametrize(("threads", "cores", "first_core"), [(2, 2, 0), (2, 4, -1), (8, 8, -1), (5, 5, 0)])
def test_threads_have_cores_of_their_own_where_they_take_all(threads, cores, first_core, tmp_path, monkeypatch):
    """With five environments there are five threads at most; on a larger machine others may be at work as well."""
    import envpool

    made, make = {}, envpool.make
    monkeypatch.setattr(envpool, "make", lambda *words, **options: made.update(options) or make(*words, **options))
    monkeypatch.setattr(script.os, "cpu_count", lambda: cores)
    hoppers(tmp_path, torch_threads=threads).close()
    assert (made["num_threads"], made["thread_affinity_offset"]) == (min(threads, 5), first_core)


def test_what_is_seen():
    """All agents see the whole robot; every agent has the team's reward; there is nothing that could be saved."""
    envs = script.make_envs(script.complete_args(script.Args(scenario="Humanoid", num_envs=3, torch_threads=1)))
    envs.reset()
    seen = envs.look("cpu")
    assert seen["obs"].shape == (3, 348) and seen["start"].tolist() == [1, 1, 1] and envs.get_state() is None
    rewards, terminated, crashed = envs.play(torch.zeros(envs.action_space.shape))
    assert rewards.shape == (3, 2) and torch.equal(rewards[:, 0], rewards[:, 1]) and not crashed.any()
    envs.close()


# -------------------------------------------------------------------------------------------- their statistics
def test_observation_normalizer():
    """Mean and variance of all data so far, whatever the batches; outliers are clipped, constants are finite."""
    rng, normalizer, seen = np.random.default_rng(0), script.ObservationNormalizer(4), np.zeros((0, 4))
    for size in (1, 7, 64, 3, 500):
        batch = rng.normal([0, 5, -30, 2], [1, 0.1, 20, 0], (size, 4)) + rng.normal(size=4) * [1, 1, 1, 0]
        normalizer.update(torch.as_tensor(batch.astype(np.float32 if size == 64 else np.float64)))
        seen = np.concatenate([seen, batch])
    np.testing.assert_allclose(normalizer.mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normalizer.variance, seen.var(0), rtol=1e-3, atol=1e-5)
    seen[:2] = [0, 5, 1e9, 2], [0, 5, -1e9, 2]  # clipped to 10 and -10
    clipped = ((seen - normalizer.mean.numpy()) / np.sqrt(normalizer.variance.numpy() + 1e-8)).clip(-10, 10)
    centred = clipped - clipped.mean(1, keepdims=True)  # then the LayerNorm's part: mean 0 and variance 1 of each
    expected = centred / np.sqrt(centred.var(1, keepdims=True) + 1e-5)
    normal = normalizer(torch.as_tensor(seen))
    assert normal.dtype == torch.float32 and clipped[:2, 2].tolist() == [10, -10]
    np.testing.assert_allclose(normal, expected, atol=1e-4)
    before = {name: x.clone() for name, x in normalizer.state_dict().items()}
    assert all(torch.equal(x, before[name]) for name, x in normalizer.state_dict().items())
