"""Training on multi-agent MuJoCo: the policies, the ratios, the update against plain loops, what is no sample, seeds,
interruption and resumption, evaluation, the run directory. On a small robot of ours in place of the simulator, except
where the simulator is what is tested; on every script, except where they share what is tested.
"""

import dataclasses
import importlib.metadata
import json
import math
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from helpers import SCRIPTS, assert_same_training, differences, evaluations, in_double, leaves, load, orders, scalars
from reference import Reference, Step

import a2po_mamujoco as a2po

MUJOCO_SCRIPTS = [name for name in SCRIPTS if name.endswith("_mamujoco")]
TASKS = [(scenario, partition) for scenario, partitions in a2po.PARTITIONS.items() for partition in partitions]
PAPER = "Ant 2x4, Ant 2x4d, Ant 4x2, Ant 8x1, Walker2d 2x3, Walker2d 3x2, Walker2d 6x1, Hopper 3x1, HalfCheetah 2x3, "
PAPER += "HalfCheetah 3x2, HalfCheetah 6x1, Humanoid 9|8, Humanoid 17x1, HumanoidStandup 9|8"


@pytest.fixture(params=MUJOCO_SCRIPTS)
def script(request):
    return load(request.param)


# ------------------------------------------------------------------------------------------- policies and their ratios
def test_network_is_the_layers_one_after_the_other():
    """With the first LayerNorm in two parts, output and gradients are those of the whole, in double."""
    torch.manual_seed(0)
    with in_double():
        network, obs = a2po.MLP(5, 3, 8, gain=1.0), torch.randn(6, 5) * 3 + 2
        with torch.no_grad():  # at first a LayerNorm's scales are 1 and its shifts 0
            for parameter in network.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        assert isinstance(network[0], torch.nn.LayerNorm)
        apart, whole = network(torch.nn.functional.layer_norm(obs, (5,))), torch.nn.Sequential(*network)(obs)
        torch.testing.assert_close(apart, whole)
        gradients = [torch.autograd.grad(out.pow(3).sum(), list(network.parameters())) for out in (apart, whole)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("n", "obs_dim", "d", "hidden"), [(1, 3, 2, 8), (4, 27, 3, 16), (17, 5, 1, 8)])
def test_joint_policies_are_the_separate_actors(n, obs_dim, d, hidden):
    torch.manual_seed(0)
    actors = torch.nn.ModuleList([a2po.GaussianActor(obs_dim, d, hidden) for _ in range(n)])
    obs = torch.randn(6, obs_dim)
    for _ in range(2):
        mean, std = a2po.joint_policies(actors)(obs)
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
    actor = a2po.GaussianActor(7, 3, 16)
    mean, std = actor(torch.randn(50, 7))
    assert mean.abs().max() < 0.1 and (std.log() + 0.5).abs().max() < 1e-6
    with torch.no_grad():
        actor.mean[-1].bias.copy_(torch.tensor([0.5, -0.5, 99.0]))
        mean, _ = actor(torch.randn(50, 7))
    assert torch.allclose(mean.mean(0), torch.tensor([math.tanh(0.5), -math.tanh(0.5), 1.0]), atol=0.05)


def test_acting():
    """Samples of each agent's Gaussian with the log-probability of each joint, or the means; the actions of agent i
    stand in place i."""
    torch.manual_seed(0)
    actors = torch.nn.ModuleList([a2po.GaussianActor(5, 2, 8) for _ in range(3)])
    with torch.no_grad():
        for parameter in actors.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    policies, obs = a2po.joint_policies(actors), torch.randn(4000, 5)
    actions, log_probs = a2po.act(policies, obs)
    greedy, _ = a2po.act(policies, obs, greedy=True)
    assert actions.shape == log_probs.shape == greedy.shape == (4000, 3, 2)
    for i, actor in enumerate(actors):
        mean, std = actor(obs)
        torch.testing.assert_close(greedy[:, i], mean, rtol=1e-3, atol=1e-3)
        noise = ((actions[:, i] - mean) / std).double()
        assert noise.mean(0).abs().max() < 0.1 and (noise.std(0) - 1).abs().max() < 0.05
        expected = -noise.square() / 2 - std.double().log() - math.log(2 * math.pi) / 2
        torch.testing.assert_close(log_probs[:, i].double(), expected, rtol=1e-3, atol=1e-3)


def density(mean, std, action, joints):
    """Of an agent's whole action: the product of its joints' Gaussian densities."""
    parts = [math.exp(-(((action[k] - mean[k]) / std[k]) ** 2) / 2) / (std[k] * math.sqrt(2 * math.pi)) for k in joints]
    return math.prod(parts)


@pytest.mark.parametrize("joints", [(0,), (0, 1), (0, 1, 2)])
def test_ratios_are_of_probabilities(script, joints):
    """By definition: the density of the whole action under the new policy over that under the old one, in float64."""
    torch.manual_seed(0)
    T, N, d = 6, 2, 3
    old, new = (script.GaussianActor(4, d, 8) for _ in range(2))
    with torch.no_grad():
        new.log_std += 0.3 * torch.randn(d)
    has_joint = torch.tensor([[1.0, 0.0, 0.0], [float(k in joints) for k in range(d)]])
    obs, sample = torch.randn(T + 1, N, 4), torch.ones(T, N, 2)
    sample[3, 1] = 0
    with torch.no_grad():
        policy = torch.distributions.Normal(*old(obs[:-1]))
        actions = policy.sample()
        log_probs = policy.log_prob(actions)
    actions, log_probs = (torch.stack([torch.full_like(x, math.nan), x], 2) for x in (actions, log_probs))
    rollout = script.SimpleNamespace(obs=obs, actions=actions, log_probs=log_probs, sample=sample, has_joint=has_joint)
    log_ratios, entropy = script.policy_change(new, rollout, 1)
    product, mean = (script.action_ratio(log_ratios, has_joint[1], rule) for rule in ("product", "mean"))
    for t in range(T):
        for e in range(N):
            (old_mean, old_std), (new_mean, new_std) = ([x.tolist() for x in actor(obs[t, e])] for actor in (old, new))
            action = actions[t, e, 1].tolist()
            apart = [density(new_mean, new_std, action, [k]) / density(old_mean, old_std, action, [k]) for k in joints]
            whole = density(new_mean, new_std, action, joints) / density(old_mean, old_std, action, joints)
            if not sample[t, e, 1]:
                whole, apart = 1.0, [1.0]
            assert product[t, e].item() == pytest.approx(whole, rel=1e-4)
            assert log_ratios[t, e].sum().exp().item() == pytest.approx(whole, rel=1e-4)
            assert mean[t, e].item() == pytest.approx(np.mean(apart), rel=1e-4)
            gaussian = sum(0.5 + math.log(2 * math.pi) / 2 + math.log(new_std[k]) for k in joints)
            assert entropy[t, e].item() == pytest.approx(gaussian, rel=1e-5)
    product.sum().backward()
    idle = [k for k in range(d) if k not in joints]
    assert (new.log_std.grad[idle] == 0).all() and (new.log_std.grad[list(joints)] != 0).all()


def test_action_ratio(script):
    """Appendix B.4.2: the mean of the ratios of the agent's own joints, or their product; and where they overflow."""
    log_ratios = torch.tensor([[2.0, 0.5, 1.0], [0.25, 0.25, 1.0], [1.0, 3.0, 1.0]]).log().requires_grad_()
    two = torch.tensor([1.0, 1.0, 0.0])
    assert script.action_ratio(log_ratios, two, "product").tolist() == pytest.approx([1.0, 0.0625, 3.0])
    ratio = script.action_ratio(log_ratios, two, "mean")
    assert ratio.tolist() == pytest.approx([1.25, 0.25, 2.0])
    ratio.sum().backward()
    expected = torch.tensor([[1.0, 0.25, 0.0], [0.125, 0.125, 0.0], [0.5, 1.5, 0.0]])
    torch.testing.assert_close(log_ratios.grad, expected)
    far = torch.tensor([[20.0, 20.0, 20.0], [-20.0, -20.0, -20.0]])
    for rule in ("mean", "product"):
        assert torch.isfinite(script.action_ratio(far, torch.ones(3), rule).log()).all()


# ------------------------------------------------------------------------------------------ a robot without simulator
class Rig(gym.vector.VectorEnv):
    """Four agents with 2, 1, 3 and 1 joints whose actions feed a memory, which is most of the reward. Deterministic.

    Episodes take 3 to 8 steps and end by turns terminated and truncated. `junk` seeds what must not matter: the last
    observation of a terminated episode and the reward of the filler step. In step `signal_at` the process sends itself
    `signal_number`. Another `stream` has other episodes.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    has_joint = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]], bool)
    obs_dim = 5

    def __init__(self, num_envs, stream=0, junk=0, signal_at=None, signal_number=None):
        self.num_envs, self.stream, self.junk = num_envs, stream, junk
        self.signal_at, self.signal_number = signal_at, signal_number
        self.single_observation_space = gym.spaces.Dict(
            obs=gym.spaces.Box(-np.inf, np.inf, (self.obs_dim,), np.float64)
        )
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
        return {"obs": obs}

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
            reward[e] = 0.5 + self.memory[e] + 0.2 * (-1) ** self.time[e]
            self.time[e] += 1
            if self.time[e] == 3 + (2 * e + 3 * self.episode[e] + self.stream) % 6:
                self.final[e] = True
                self.terminated[e] = (e + self.episode[e]) % 2 == 0
                ends[:, e] = self.terminated[e], not self.terminated[e]
        before, self.seen = self.seen, self._observe()
        terminated, crashed = ends[0], np.zeros(self.num_envs, bool)
        self.record.append(Step(before, np.array(actions), reward, terminated, ends.any(0), crashed, self.seen))
        return self.seen, reward, *ends, {}

    def get_state(self):
        """As EnvPool."""

    def close(self, **_):
        self.closed_by_script = True


SMALL = {"scenario": "Ant", "partition": "4x2", "seed": 3, "total_timesteps": 40, "num_envs": 2, "num_steps": 12}
SMALL |= {"hidden_size": 8, "update_epochs": 4, "agent_blocks": 3, "eval_every": 10**9, "eval_episodes": 2}
SMALL |= {"save_every": 10**9, "torch_threads": 1, "cuda": False, "learning_rate": 3e-3, "max_grad_norm": 0.3}
SMALL |= {"huber_delta": 0.5, "clip_coef": 0.03, "gae_lambda": 0.9, "clip_adaptation": 0.25, "env_version": "v5"}


def make_args(script, **options):
    """The small settings, as far as a script has them."""
    names = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(**{name: value for name, value in (SMALL | options).items() if name in names})


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """train(where, **options of Rig or Args, argv=None) -> what was seen of a training and what it left."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(where="run", argv=None, simulator=False, **options):
        game = {name: options.pop(name) for name in ("junk", "signal_at", "signal_number") if name in options}
        seen = script.SimpleNamespace(games=[], status=0, checkpoint=None)

        def rig(scenario, partition, version, num_envs, seed, threads):
            seen.games.append(Rig(num_envs, seed, **game))
            return seen.games[-1]

        class Watched(script.Run):
            def __enter__(self):
                seen.args = self.args
                copies = [{k: v.clone() for k, v in self.learned[name].state_dict().items()} for name in PARTS]
                seen.initial = dict(zip(PARTS, copies, strict=True))
                return super().__enter__()

        (tmp_path / where).mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / where)
            patch.setattr(script, "Run", Watched)
            if not simulator:
                patch.setattr(script, "MaMuJoCo", rig)
            try:
                script.main(script.parse_args(argv) if argv else make_args(script, **options))
            except SystemExit as error:
                seen.status = error.code
        (folder,) = (tmp_path / where / "runs").iterdir()
        seen.folder, saved = tmp_path / where / folder, tmp_path / where / folder / "checkpoint.pt"
        seen.checkpoint = torch.load(saved, weights_only=True) if saved.exists() else None
        return seen

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


PARTS = ("actor", "critic")


# ------------------------------------------------------------------------------------- the update in plain loops
class Unchanged(torch.nn.Module):
    """In place of ObservationNormalizer, so that the reference need not have one."""

    def __init__(self, size):
        super().__init__()

    def update(self, obs):
        pass

    def forward(self, obs):
        return obs.to(torch.get_default_dtype())


CASES = [
    *[(name, {}) for name in MUJOCO_SCRIPTS],
    *[(name, {"action_ratio": "product", "agent_blocks": 4}) for name in MUJOCO_SCRIPTS],
    *[(name, {"critic_steps": 2}) for name in MUJOCO_SCRIPTS],
    ("a2po_mamujoco", {"agent_blocks": 2, "ent_coef": 0.1}),
    ("a2po_mamujoco", {"preopc": False}),
    ("a2po_mamujoco", {"preopc_targets": False, "agent_blocks": 4}),
    ("happo_mamujoco", {"preopc": True, "agent_blocks": 4}),
    ("mappo_mamujoco", {"vtrace": True}),
    ("coppo_mamujoco", {"vtrace": True, "action_ratio": "product"}),
]


@pytest.mark.parametrize(("script", "options"), CASES, ids=str, indirect=["script"])
def test_training_is_the_algorithm_in_plain_loops(script, train, options, monkeypatch):
    """Two iterations of main, in double, and of loops over samples: the same losses, weights, steps and episodes."""
    monkeypatch.setattr(script, "ObservationNormalizer", Unchanged)
    joints = [np.flatnonzero(mine).tolist() for mine in Rig.has_joint]
    with in_double():
        run = train(**{"update_epochs": 5, "max_grad_norm": 0.15} | options)
        actors = [script.GaussianActor(Rig.obs_dim, 3, SMALL["hidden_size"]) for _ in joints]
        critics = [script.MLP(Rig.obs_dim, 1, SMALL["hidden_size"], gain=1.0) for _ in joints]
    for name, networks in zip(PARTS, (actors, critics), strict=True):
        torch.nn.ModuleList(networks).load_state_dict(run.initial[name])
    method, rule = script.__name__.split("_")[0], run.args.action_ratio
    reference = Reference(method, actors, critics, run.args, joints, rule)
    assert_same_training(run, reference, [as_seen_by_all(step) for step in run.games[0].record])
    missing = {"dead", "crashed"} | ({"inner clip"} if method == "rpisa" else set())
    idle = {name for name, times in reference.active.items() if times < 5} - missing
    is_corrected = getattr(run.args, "preopc", False) or getattr(run.args, "vtrace", False)
    assert idle == (set() if is_corrected else {"trace cut"}), "everything else must matter in this test"


def test_the_update_sees_what_the_policies_saw(script, train, monkeypatch):
    """Each observation as the statistics of the steps before it brought it to size, and never again by later ones; the
    last one, for V(s_{t+1}), too."""
    rollouts, change = [], script.policy_change

    def watched(actor, rollout, i):
        rollouts.append(rollout)
        return change(actor, rollout, i)

    monkeypatch.setattr(script, "policy_change", watched)
    steps = train(total_timesteps=10, update_epochs=1).games[0].record[: SMALL["num_steps"]]
    normalizer, expected = script.ObservationNormalizer(Rig.obs_dim), []
    for step in steps:
        obs = torch.as_tensor(step.seen["obs"])
        expected.append(normalizer(obs))
        normalizer.update(obs)
    expected.append(normalizer(torch.as_tensor(steps[-1].after["obs"])))
    assert rollouts and all(torch.equal(rollout.obs, torch.stack(expected)) for rollout in rollouts)


@pytest.mark.parametrize("script", ["a2po_mamujoco"], indirect=True)
def test_the_order_is_by_the_rule_asked_for(train, script, monkeypatch):
    """Drawn from the generator that checkpoints have."""
    asked, order = [], script.agent_order
    monkeypatch.setattr(script, "agent_order", lambda *words: asked.append(words[1:]) or order(*words))
    train(agent_order="reverse-greedy", total_timesteps=10, update_epochs=1)
    assert set(asked) == {("reverse-greedy", torch.default_generator)}


@pytest.mark.parametrize("script", ["happo_mamujoco"], indirect=True)
def test_happo_draws_its_order(train):
    drawn = orders(train(total_timesteps=300, update_epochs=1).folder, 4)
    assert len(drawn) > 10 and all(len({order[k] for order in drawn}) > 2 for k in range(4))


def test_first_weights_of_the_critics(train):
    """The head's gain is 1."""
    initial = train(total_timesteps=1, update_epochs=1).initial["critic"]
    heads = [weight for name, weight in initial.items() if name.endswith(".7.weight")]
    assert len(heads) == 4 and all(head.square().sum().item() == pytest.approx(1.0) for head in heads)


def as_seen_by_all(step):
    """Every agent sees the whole robot, and the critic no more than that."""

    def share(seen):
        obs = seen["obs"][:, None].repeat(len(Rig.has_joint), 1)
        return {"obs": obs, "state": np.zeros((len(obs), 0))}

    return step._replace(seen=share(step.seen), after=share(step.after))


# ---------------------------------------------------------------------------------------------- seeds and resuming
def stream(iteration=0, evaluation=False, seed=SMALL["seed"]):
    """The seed of a training's robots, as they are made anew at an iteration, or of an evaluation's."""
    return int(np.random.SeedSequence((seed, 1 if evaluation else 2 * iteration)).generate_state(1)[0] >> 1)


def test_seeds_and_evaluation_in_training(train):
    """The same seed gives the same run, whether or not there are evaluations between; another seed another one."""
    first, second = train("a"), train("b", eval_every=1)
    streams = [stream(), stream(evaluation=True)]
    assert [game.stream for game in first.games] == streams and all(game.closed_by_script for game in first.games)
    assert differences(first.checkpoint, second.checkpoint) == []
    assert [game.stream for game in second.games] == [*streams, streams[1]]
    once, often = evaluations(first.folder), evaluations(second.folder)
    assert len(once) == 1 and len(often) == 2 and often[1]["returns"] == once[0]["returns"]
    other = train("c", seed=4)
    assert any("/actor/" in path for path in differences(first.checkpoint, other.checkpoint, ["learned"]))


def test_resuming_goes_on_with_new_episodes(train, script):
    """Weights, optimiser, statistics, random state and counters as they were; the robots are made once, with episodes
    of their own; options given beside --resume hold; evaluations after the checkpoint are dropped."""
    first = train("a", update_epochs=2)
    progress, learned = first.checkpoint["progress"], first.checkpoint["learned"]
    kept = evaluations(first.folder)
    with (first.folder / "eval.jsonl").open("a") as file:  # as if it had gone on after its last checkpoint
        file.write(json.dumps({"step": progress["global_step"] + 1, "episodic_return": 0.5}) + "\n")
    argv = ["--resume", str(first.folder), "--total-timesteps", "60", "--learning-rate", "0.1"]
    last = train("a", argv=argv)
    assert last.status == 0 and last.folder == first.folder and last.checkpoint["progress"]["iteration"] == 3
    assert last.checkpoint["progress"]["seconds"] > progress["seconds"]
    assert last.checkpoint["args"] == first.checkpoint["args"] | {"total_timesteps": 60, "learning_rate": 0.1}
    assert [value for path, value in leaves(last.checkpoint["learned"]) if path.endswith("/lr")] == [0.1] * 2
    after = evaluations(first.folder)
    assert after[:-1] == kept and after[-1]["step"] == last.checkpoint["progress"]["global_step"]
    (played, evaluated) = last.games
    assert (played.stream, evaluated.stream) == (stream(iteration=2), stream(evaluation=True))

    # What was done in the first step, again from what had been saved.
    n, obs_dim = len(Rig.has_joint), Rig.obs_dim
    actors = torch.nn.ModuleList([script.GaussianActor(obs_dim, 3, SMALL["hidden_size"]) for _ in range(n)])
    normalizer = script.ObservationNormalizer(obs_dim)
    actors.load_state_dict(learned["actor"]), normalizer.load_state_dict(learned["obs_normalizer"])
    torch.set_rng_state(first.checkpoint["rng"])
    obs = normalizer(torch.as_tensor(played.record[0].seen["obs"]))
    actions, _ = script.act(script.joint_policies(actors), obs)
    np.testing.assert_array_equal(played.record[0].actions, actions)


def test_training_on_a_gpu(script, train):
    """Pretended: nothing there meets a tensor of the CPU, and the numbers are the CPU's, also after --resume."""
    options = {"total_timesteps": 10, "update_epochs": 2}
    here = train("here", **options)
    with elsewhere(script):
        there = train("there", cuda=True, **options)
    assert there.status == 0 and differences(here.checkpoint, there.checkpoint) == []
    assert [e["returns"] for e in evaluations(here.folder)] == [e["returns"] for e in evaluations(there.folder)] != []
    here = train("here", argv=["--resume", str(here.folder), "--total-timesteps", "30"])
    with elsewhere(script):
        there = train("there", argv=["--resume", str(there.folder), "--total-timesteps", "30"])
    assert there.args.cuda and differences(here.checkpoint, there.checkpoint) == []


def test_resuming_twice_is_the_same(train):
    """And with the same total nothing is left to do: the checkpoint stays."""
    first = train("a", agent_blocks=2)
    saved = (first.folder / "checkpoint.pt").read_bytes()
    results = []
    for _ in range(2):
        (first.folder / "checkpoint.pt").write_bytes(saved)
        results.append(train("a", argv=["--resume", str(first.folder), "--total-timesteps", "60"]).checkpoint)
    assert differences(*results) == [] and differences(first.checkpoint, results[0]) != []
    (first.folder / "checkpoint.pt").write_bytes(saved)
    assert differences(first.checkpoint, train("a", argv=["--resume", str(first.folder)]).checkpoint) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_saves(train, number, capsys):
    """Status 143 or 130, and a checkpoint after the iteration from which --resume goes on."""
    handlers = signal.getsignal(number)
    half = train("half", signal_at=3, signal_number=number, total_timesteps=60, update_epochs=1)
    assert half.status == 128 + number and half.checkpoint["progress"]["iteration"] == 1
    assert half.games[0].closed_by_script
    assert "--resume" in capsys.readouterr().err and signal.getsignal(number) == handlers
    resumed = train("half", argv=["--resume", str(half.folder)])
    assert resumed.status == 0 and resumed.folder == half.folder
    assert resumed.checkpoint["progress"]["global_step"] >= 60
    assert json.loads((half.folder / "config.json").read_text())["total_timesteps"] == 60


def test_same_seed_in_the_simulator(train):
    """Same seed, same machine, CPU: same numbers; after --resume the counters go on, with other episodes."""
    options = {"scenario": "Hopper", "partition": "3x1", "num_envs": 3, "num_steps": 20, "total_timesteps": 110}
    first, second = (train(where, simulator=True, **options) for where in "ab")
    assert differences(first.checkpoint, second.checkpoint) == [] and first.checkpoint["progress"]["iteration"] == 2
    assert evaluations(first.folder)[-1]["returns"] == evaluations(second.folder)[-1]["returns"]
    assert seen_by(first.checkpoint) == pytest.approx(120, abs=0.01)
    argv = ["--resume", str(first.folder), "--total-timesteps", "170"]
    longer = train("a", simulator=True, argv=argv)
    assert longer.status == 0 and longer.checkpoint["progress"]["iteration"] == 3
    assert len(evaluations(first.folder)) == 2 and seen_by(longer.checkpoint) == pytest.approx(180, abs=0.01)


def seen_by(checkpoint):
    """The number of observations in the statistics."""
    return checkpoint["learned"]["obs_normalizer"]["count"].item()


# ----------------------------------------------------------------------------------------------- what is no sample
def test_what_is_no_sample_changes_nothing(script, train, monkeypatch):
    """Filler rewards and the last observations of terminated episodes leave no trace in the weights.

    (Except in the statistics of observations, which are stopped here.)
    """
    monkeypatch.setattr(script.ObservationNormalizer, "update", lambda *_: None)
    first, second = (train(str(junk), junk=junk) for junk in (1, 2))
    pairs = zip(first.games[0].record, second.games[0].record, strict=True)
    assert sum((a.after["obs"] != b.after["obs"]).any() for a, b in pairs) >= 2
    assert first.checkpoint["progress"]["iteration"] == 2 and differences(first.checkpoint, second.checkpoint) == []
    observe = Rig._observe

    def changed(self):
        return {"obs": observe(self)["obs"] + 0.5 * (self.final & ~self.terminated)[:, None] * np.arange(5)}

    monkeypatch.setattr(Rig, "_observe", changed)
    third = train("c", junk=1)
    paths = differences(first.checkpoint, third.checkpoint)
    assert any("/critic/" in path for path in paths), "truncated episodes bootstrap"


def test_joints_that_do_not_exist_are_not_trained(train):
    """Their log std and weights stay as they were drawn, also with an entropy bonus; those that exist move."""
    run = train(ent_coef=0.1, agent_blocks=2)
    for i, mine in enumerate(Rig.has_joint):
        for name in (f"{i}.log_std", f"{i}.mean.7.weight", f"{i}.mean.7.bias"):
            moved = run.checkpoint["learned"]["actor"][name] - run.initial["actor"][name]
            moved = moved.flatten(1).abs().sum(1) if moved.dim() > 1 else moved.abs()
            assert (moved > 0).tolist() == mine.tolist(), name


def test_observations_are_normalised_with_those_before(train):
    """Each is in the statistics once, from the next step on; the last one of a rollout is the next one's first."""
    run = train()
    record = run.games[0].record
    statistics = run.checkpoint["learned"]["obs_normalizer"]
    obs = np.concatenate([step.seen["obs"] for step in record])
    assert statistics["count"].item() == pytest.approx(len(obs), abs=1e-3)
    np.testing.assert_allclose(statistics["mean"], obs.mean(0), atol=1e-3)


# ------------------------------------------------------------------------------------------------------- evaluation
def test_evaluation(script):
    """The sum of the rewards of each environment's first episode, with the policies' means; nothing is changed."""
    torch.manual_seed(0)
    actors = torch.nn.ModuleList([script.GaussianActor(Rig.obs_dim, 3, 8) for _ in range(4)])
    normalizer = script.ObservationNormalizer(Rig.obs_dim)
    normalizer.update(torch.randn(50, Rig.obs_dim, dtype=torch.float64) * 3 + 4)
    with torch.no_grad():
        for actor in actors:
            actor.mean[-1].weight *= 100
    state = {k: v.clone() for k, v in [*normalizer.state_dict().items(), *actors.state_dict().items()]}
    rng, rig = torch.get_rng_state(), Rig(4, stream=1, junk=1)
    played = script.evaluate(actors, normalizer, script.Episodes(rig), torch.device("cpu"))
    assert torch.equal(rng, torch.get_rng_state()) and rig.closed_by_script
    now = {**normalizer.state_dict(), **actors.state_dict()}
    assert all(torch.equal(state[name], now[name]) for name in state)
    returns, lengths, running = np.zeros(4), np.zeros(4), np.ones(4, bool)
    for step in rig.record:
        for i, actor in enumerate(actors):
            mean = actor(normalizer(torch.as_tensor(step.seen["obs"])))[0].detach().numpy()
            np.testing.assert_allclose(step.actions[:, i], mean, atol=1e-5)
        returns, lengths = returns + step.rewards * running, lengths + running
        running &= ~step.ended
    assert not running.any() and [p["return"] for p in played] == pytest.approx(returns.tolist(), abs=1e-3)
    assert [p["length"] for p in played] == lengths.tolist() and [p["env"] for p in played] == [0, 1, 2, 3]


def test_eval_only(train, script, capsys, tmp_path):
    """As many episodes as asked for with the checkpoint's networks and statistics; trains and writes nothing. The
    policy's file of benchmark/policy.py, actors and statistics alone, will do."""
    run = train()
    small = run.checkpoint | {"learned": {k: run.checkpoint["learned"][k] for k in ("actor", "obs_normalizer")}}
    small = {name: small[name] for name in ("args", "script", "learned")}
    torch.save(small, tmp_path / "policy.pt")
    before, printed = sorted(run.folder.rglob("*")), []
    for path in (run.folder / "checkpoint.pt", tmp_path / "policy.pt"):
        capsys.readouterr()
        again = train(argv=["--eval-only", "--checkpoint", str(path), "--eval-episodes", "5"])
        printed.append(capsys.readouterr().out)
        assert again.status == 0 and "5 greedy episodes: return" in printed[-1]
        assert again.games[-1].stream == stream(evaluation=True) and again.games[-1].num_envs == 5
    assert sorted(run.folder.rglob("*")) == before and printed[0] == printed[1]


# ----------------------------------------------------------------------------------------------- numbers, directory
def test_steps_and_returns(train):
    """global_step counts real steps, and the score of an episode is its own rewards'."""
    run = train(junk=1)
    T, N, record = SMALL["num_steps"], SMALL["num_envs"], run.games[0].record
    ends = np.array([step.ended for step in record])
    assert run.checkpoint["progress"]["global_step"] == len(record) * N - ends[:-1].sum()
    returns, lengths, running, length = [], [], np.zeros(N), np.zeros(N)
    for t in range(T):
        real = ~ends[t - 1] if t else np.ones(N, bool)
        running, length = running + record[t].rewards * real, length + real
        returns, lengths = returns + running[ends[t]].tolist(), lengths + length[ends[t]].tolist()
        running[ends[t]], length[ends[t]] = 0.0, 0.0
    logged = scalars(run.folder)
    assert logged["charts/episodic_return"][0].value == pytest.approx(np.mean(returns), abs=1e-4)
    assert logged["charts/episodic_length"][0].value == pytest.approx(np.mean(lengths))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run(script, train, monkeypatch, what):
    """The message has the iteration's number, and the checkpoint of the iteration before is untouched and usable."""
    options = {"total_timesteps": 60, "save_every": 1, "update_epochs": 2, "agent_blocks": 1}
    good, calls, last = script.value_loss, [], 2 * 2 * len(Rig.has_joint)  # the second iteration's

    def bad(values, *inputs):
        calls.append(1)
        if len(calls) == last and what == "gradient":
            values.register_hook(lambda gradient: gradient * math.nan)
        return good(values, *inputs) * (math.nan if len(calls) == last and what == "loss" else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(script, "value_loss", bad)
        broken = train("broken", **options)
    assert "iteration 2" in broken.status and "finite" in broken.status
    assert broken.checkpoint["progress"]["iteration"] == 1
    numbers = [x for _, x in leaves(broken.checkpoint["learned"]) if isinstance(x, torch.Tensor)]
    assert numbers and all(torch.isfinite(x).all() for x in numbers)
    assert train("broken", argv=["--resume", str(broken.folder)]).status == 0


def test_run_directory(script, train):
    """config.json, eval.jsonl, TensorBoard keys and the checkpoint, as DESIGN section 7 has them."""
    options = {"eval_every": 20, "num_envs": 3, "eval_episodes": 4, "clip_coef": None, "agent_blocks": None}
    run = train(total_timesteps=60, partition=None, **options)
    name, folder = script.__name__, run.folder
    assert folder.name.startswith(f"Ant-4x2__{name}__3__")
    files = {path.name.split(".")[0] for path in folder.iterdir()}
    assert files == {"config", "eval", "checkpoint", "events"} and not list(folder.glob("*.tmp"))
    config = json.loads((folder / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(script.Args)} <= config.keys()
    assert None not in config.values(), "config.json has the values that were used"
    assert config["script"] == name and config["clip_coef"] == 0.2 and config.get("agent_blocks", 4) == 4
    assert config["action_ratio"] == "mean"
    for package in ("envpool", "gymnasium_robotics", "torch"):
        assert config["versions"][package] == importlib.metadata.version(package)
    lines = evaluations(folder)
    assert len(lines) >= 2 and sorted(e["step"] for e in lines) == [e["step"] for e in lines]
    for line in lines:
        assert line.keys() == {"step", "seconds", "episodic_return", "returns"} and len(line["returns"]) == 4
        assert line["episodic_return"] == pytest.approx(np.mean(line["returns"])) and line["seconds"] > 0
    expected = {f"charts/{c}" for c in "episodic_return episodic_length SPS learning_rate".split()}
    expected |= {f"losses/{x}" for x in "policy_loss value_loss entropy approx_kl clipfrac explained_variance".split()}
    expected |= {"eval/episodic_return", "time/rollout_seconds", "time/update_seconds"}
    if name.startswith("a2po"):
        parts = ("clipfrac", "preceding_clipfrac", "ratio")
        expected |= {f"a2po/position_{k}/{part}" for k in (1, 2, 3, 4) for part in parts}
        expected |= {f"a2po/rank_of_agent/{i}" for i in range(4)}
    if name.startswith(("a2po", "happo")):
        expected |= {f"{name.split('_')[0]}/position_of_agent/{i}" for i in range(4)}
    logged = scalars(folder)
    assert expected <= logged.keys()
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    assert [event.step for event in logged["eval/episodic_return"]] == [e["step"] for e in lines]
    if name.startswith("a2po"):
        assert all(event.value == 0 for event in logged["a2po/position_1/preceding_clipfrac"])
    parts = {"actor", "critic", "normalizer", "obs_normalizer", "actor_optimizer", "critic_optimizer"}
    assert run.checkpoint["learned"].keys() == parts and run.checkpoint["envs"] is None


# ------------------------------------------------------------------------------------------- the paper's tasks, input
@pytest.mark.parametrize(("scenario", "partition"), TASKS, ids=["-".join(task) for task in TASKS])
@pytest.mark.parametrize("script", ["a2po_mamujoco"], indirect=True)
def test_tasks_start_and_take_an_update(scenario, partition, script, train, monkeypatch):
    """Every task in the simulator with its own settings of Table 9, except for sizes: the networks of all agents move.

    Robots that do not fall soon are not evaluated here.
    """
    if scenario not in ("Hopper", "Humanoid", "Walker2d"):
        monkeypatch.setattr(script, "evaluate", lambda *_: [{"return": 0.0, "length": 1}])
    options = dict.fromkeys(["agent_blocks", "learning_rate", "gae_lambda", "clip_coef"])
    options |= {"num_steps": 6, "total_timesteps": 8, "update_epochs": 2, "eval_episodes": 1}
    run = train(simulator=True, scenario=scenario, partition=partition, **options)
    assert run.status == 0 and run.checkpoint["progress"]["iteration"] == 1 and len(evaluations(run.folder)) == 1
    learned = run.checkpoint["learned"]
    for part in ("actor", "critic"):
        heads = [x for name, x in learned[part].items() if name.endswith("7.bias")]
        assert len(heads) == len(script.agent_joints(scenario, partition))
        assert all((x != 0).any() and torch.isfinite(x).all() for x in heads)
    assert torch.isfinite(learned["obs_normalizer"]["variance"]).all()


def test_the_papers_tasks_and_settings(script):
    """Tables 8 and 9, and all tasks of the appendix: the same for all scripts."""
    assert {tuple(task.split()) for task in PAPER.split(", ")} <= set(TASKS)
    table = {"Ant": (8, 3e-4, 0.93, 0.2), "HalfCheetah": (5, 3e-4, 0.93, 0.2), "Hopper": (8, 1e-4, 0.95, 0.1)}
    table |= {"Humanoid": (5, 3e-4, 0.9, 0.2), "HumanoidStandup": (5, 3e-4, 0.93, 0.2)}
    table |= {"Walker2d": (5, 3e-4, 0.93, 0.2)}
    blocks = {("Ant", "8x1"): 4, ("Humanoid", "17x1"): 5, ("HumanoidStandup", "17x1"): 4}
    sequential = script.__name__.startswith(("a2po", "happo", "rpisa"))
    for scenario, partition in TASKS:
        args = script.complete_args(script.Args(scenario=scenario, partition=partition))
        assert (args.update_epochs, args.learning_rate, args.gae_lambda, args.clip_coef) == table[scenario]
        agents = 2 if partition == "9|8" else int(partition.split("x")[0])
        assert hasattr(args, "agent_blocks") == sequential
        assert not sequential or args.agent_blocks == blocks.get((scenario, partition), agents)
        assert args.ent_coef == 0 and args.num_envs * args.num_steps == 4000 and args.total_timesteps == 10**7
        assert args.action_ratio == "mean"
    assert script.complete_args(script.Args(clip_coef=0.3, update_epochs=2, num_envs=7)).num_steps == 571
    assert script.complete_args(script.Args(scenario="Hopper", clip_coef=0.3)).clip_coef == 0.3
    if script is a2po:
        args = script.complete_args(script.Args())
        assert (args.clip_adaptation, args.agent_order, args.preopc) == (0.5, "semi-greedy", True)


WRONG = [
    ("--partition 3x2", "--partition 3x2"),
    ("--scenario Hopper --partition 4x2", "--partition 4x2"),
    ("--env-version v2", "--env-version v2"),
    ("--scenario HumanoidStandup --env-version v3", "--env-version v3"),
    ("--agent-blocks 5", "--agent-blocks 5"),
    ("--eval-only --checkpoint good.pt --partition 2x4", "--partition 2x4: good.pt is of 4x2"),
    (
        "--eval-only --checkpoint good.pt --scenario HalfCheetah --partition 2x3",
        "--scenario HalfCheetah: good.pt is of Ant",
    ),
    ("--eval-only --checkpoint good.pt --hidden-size 16", "--hidden-size 16: good.pt is of 8"),
    ("--resume run --env-version v4", "--env-version v4: run/checkpoint.pt is of v5"),
    ("--resume run --hidden-size 16", "--hidden-size 16: run/checkpoint.pt is of 8"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a checkpoint and a run directory of A2PO's."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a2po, "MaMuJoCo", lambda *arguments: Rig(arguments[3], arguments[4]))
        patch.chdir(folder)
        a2po.main(make_args(a2po, total_timesteps=20, update_epochs=1))
    (run_directory,) = (folder / "runs").iterdir()
    run_directory.rename(folder / "run")
    (folder / "runs").rmdir()
    (folder / "good.pt").write_bytes((folder / "run" / "checkpoint.pt").read_bytes())
    return folder


@pytest.mark.parametrize(("command", "named"), WRONG, ids=[command for command, _ in WRONG])
def test_wrong_input(command, named, files, monkeypatch, capsys):
    """Status 2 and one line on stderr with the option and its value; what all scripts refuse is in test_cli.py."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(a2po, "MaMuJoCo", lambda *arguments: Rig(arguments[3], arguments[4]))
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        a2po.main(a2po.parse_args(command.split()))
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("a2po_mamujoco.py: error: ") and named in lines[0]
    assert not (files / "runs").exists(), "nothing is left behind"
