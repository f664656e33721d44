"""The SMAC scripts' training loop, on a small game of ours in place of the simulator: masks, the update against plain
loops, seeds, interruption and resumption, the run directory, and wrong input. Each test runs on every script."""

import dataclasses
import importlib.metadata
import json
import math
import signal
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*_smac.py"))
SMALL = {"map": "3m", "seed": 3, "total_timesteps": 30, "num_envs": 2, "num_steps": 12, "chunk_length": 4}
SMALL |= {"hidden_size": 8, "update_epochs": 4, "agent_blocks": 2, "eval_every": 10**9, "eval_episodes": 2}
SMALL |= {"save_every": 10**9, "torch_threads": 1, "cuda": False, "learning_rate": 3e-3, "max_grad_norm": 0.3}
SMALL |= {"huber_delta": 0.5, "clip_coef": 0.05, "gae_lambda": 0.9}


class Skirmish(gym.vector.VectorEnv):
    """Three agents whose actions feed a common memory, which is most of the reward. Deterministic, but for `junk`.

    Episodes take 4 to 9 steps and end by turns terminated and truncated; one agent dies after 2 steps, one after 5.
    `junk` seeds all that must not matter: what dead agents observe and may do, the last observation of a terminated
    episode, and the reward of the filler step. In step `signal_at` the process sends itself `signal_number`.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    n, n_actions, obs_dim, state_dim = 3, 4, 5, 6

    def __init__(self, num_envs, junk=0, signal_at=None, signal_number=None):
        self.num_envs, self.junk, self.signal_at, self.signal_number = num_envs, junk, signal_at, signal_number
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
        self.record, self.junk_shown = [], 0

    def _begin(self, e):
        self.episode[e], self.time[e], self.memory[e], self.alive[e] = self.episode[e] + 1, 0, 0.0, True
        self.final[e] = self.terminated[e] = False

    def _observe(self):
        N, n = self.num_envs, self.n
        obs, state = np.zeros((N, n, self.obs_dim), np.float32), np.zeros((N, self.state_dim), np.float32)
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
        self.seen = self._observe()
        return self.seen, {"won": np.zeros(self.num_envs, bool)}

    def step(self, actions):
        if len(self.record) == self.signal_at:
            signal.raise_signal(self.signal_number)
            assert signal.getsignal(self.signal_number) == signal.SIG_DFL, "a second signal must end the run at once"
        reward, truncated, won = np.zeros(self.num_envs, np.float32), *np.zeros((2, self.num_envs), bool)
        terminated = truncated.copy()
        for e in range(self.num_envs):
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
        before, self.seen = self.seen, self._observe()
        self.record.append((before, np.array(actions), reward, terminated, truncated, self.seen))
        return self.seen, reward, terminated, truncated, {"won": won}

    def _parts(self):
        return [self.episode, self.time, self.memory, self.alive, self.final, self.terminated]

    def get_state(self):
        return [torch.from_numpy(part.copy()) for part in self._parts()]

    def set_state(self, tensors):
        for part, saved in zip(self._parts(), tensors, strict=True):
            part[:] = saved.numpy()
        self.seen = self._observe()


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """train(where, **options of Skirmish or Args, argv=None) -> (checkpoint, run directory, games, exit status)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(script, "choose_simulator", lambda *_: ("smax", "a test"))

    def run(where="run", argv=None, **options):
        game = {name: options.pop(name) for name in ("junk", "signal_at", "signal_number") if name in options}
        games = []
        monkeypatch.setattr(script, "make_envs", lambda _, __, N, ___: games.append(Skirmish(N, **game)) or games[-1])
        (tmp_path / where).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / where)
        status = 0
        try:
            script.main(script.parse_args(argv) if argv else make_args(script, **options))
        except SystemExit as error:
            status = error.code
        (run_dir,) = (tmp_path / where / "runs").iterdir()
        saved = run_dir / "checkpoint.pt"
        return torch.load(saved, weights_only=True) if saved.exists() else None, run_dir, games[0], status

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_args(script, **options):
    names = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(**{name: value for name, value in (SMALL | options).items() if name in names})


def leaves(tree, path=""):
    """(path, tensor or number) of all numbers in nested dictionaries and lists."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    elif tree is not None:  # Adam's options have some
        yield path, tree


LEARNED = ("actor", "critic", "normalizer", "actor_optimizer", "critic_optimizer")
RUN_STATE = (*LEARNED, "rng", "envs", "hidden", "next_obs", "episode")


def differences(a, b, parts=LEARNED):
    """Paths at which two checkpoints are not the same to the last bit."""
    a, b = (dict(leaves({part: checkpoint[part] for part in parts})) for checkpoint in (a, b))
    assert a.keys() == b.keys() and a
    return [path for path in a if not torch.equal(torch.as_tensor(a[path]), torch.as_tensor(b[path]))]


def evaluations(run_dir):
    return [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]


def scalars(run_dir):
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


# ---------------------------------------------------------------------------------------------------------- masks
def test_what_is_no_sample_changes_nothing(train):
    """Dead agents' observations and masks, terminal observations and filler rewards leave no trace in the weights."""
    first, _, games, _ = train("a", junk=1)
    second, _, others, _ = train("b", junk=2)
    assert first["progress"]["iteration"] == 2 and games.junk_shown > 20
    assert any((a[0]["obs"] != b[0]["obs"]).any() for a, b in zip(games.record, others.record, strict=False))
    assert differences(first, second) == []


def test_truncated_episodes_bootstrap(train, monkeypatch):
    """The counter-check: a change in the last observation of a truncated episode does change the weights."""
    first, *_ = train("a")
    observe = Skirmish._observe

    def changed(self):
        seen = observe(self)
        seen["obs"][self.final & ~self.terminated] += 1.0 - 2.0 * np.arange(self.obs_dim, dtype=np.float32) % 2
        return seen

    monkeypatch.setattr(Skirmish, "_observe", changed)
    second, *_ = train("b")
    assert differences(first, second, ["critic"]) != []


def test_masked_gradient(script):
    """Through the loss's own functions: garbage in masked samples changes no gradient, in the others it does."""

    def gradient(where):
        torch.manual_seed(0)
        mask = (torch.rand(6, 5) < 0.6).float()
        new, old, advantages, targets, old_values = torch.randn(5, 6, 5)
        if where is not None:
            spot = tuple((mask == where).nonzero()[0])
            for x in (old, advantages, targets, old_values):
                x[spot] += 3.0
        new, values = new.requires_grad_(), torch.randn(6, 5).requires_grad_()
        log_ratio = (new - old) * mask
        advantages = script.normalize_advantages(advantages, mask)
        extra = [torch.ones(6, 5)] if "mappo" not in script.__name__ else []
        surrogate = script.clipped_surrogate(log_ratio.exp(), *extra, advantages, 0.2)
        losses = script.value_loss(values, old_values, targets, 0.2, 10.0)
        (script.masked_mean(losses, mask) - script.masked_mean(surrogate, mask)).backward()
        return torch.cat([new.grad, values.grad]), torch.cat([mask, mask])

    clean, mask = gradient(None)
    assert torch.equal(gradient(0)[0], clean) and (clean[mask == 0] == 0).all()
    assert not torch.equal(gradient(1)[0], clean)


def test_normalised_advantages_and_team_values(script):
    """Mean 0 and deviation 1 over the samples alone; the dead get the living's mean value."""
    x, mask = torch.tensor([1.0, 3.0, 5.0, 100.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    expected = torch.tensor([-1.0, 0.0, 1.0]) * math.sqrt(3 / 2)
    torch.testing.assert_close(script.normalize_advantages(x, mask)[:3], expected, atol=1e-4, rtol=0)
    values, alive = torch.tensor([[1.0, 3.0, 50.0], [7.0, 8.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert script.values_for_the_dead(values, alive).tolist() == [[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]]
    assert script.masked_mean(x, mask) == 3.0 and script.masked_mean(x, 0 * mask) == 0.0


def test_masked_policy(script):
    """Unavailable actions have probability 0 and are never drawn; the entropy is that of the others."""
    logits, mask = torch.tensor([50.0, 1.0, 1.0, -3.0]).expand(500, 4), torch.tensor([False, True, True, False])
    policy = script.masked_policy(logits, mask.expand(500, 4))
    assert set(policy.sample().tolist()) == {1, 2}
    torch.testing.assert_close(policy.entropy()[0], torch.tensor(math.log(2.0)))


# ------------------------------------------------------------------------------------------------ recurrent replay
def test_chunks_replay_the_rollout(script):
    """From the hidden states stored at chunk starts, with episodes starting inside chunks: the log-probs of acting."""
    T, L, N, n, H = 12, 4, 2, 3, 8
    torch.manual_seed(0)
    actor = script.RecurrentNetwork(5, 4, H, gain=1.0)
    obs, start = torch.randn(T, N, n, 5), torch.zeros(T, N)
    start[0, 0] = start[2, 1] = start[4, 0] = start[7, 1] = start[10, 0] = 1
    masks, hidden = torch.ones(T, N, n, 4, dtype=torch.bool), torch.randn(N, n, H)
    masks[::2, ..., 1] = False
    actions, log_probs, stored = torch.zeros(T, N, n, dtype=torch.long), torch.zeros(T, N, n), []
    with torch.no_grad():
        for t in range(T):
            if t % L == 0:
                stored.append(hidden)
            for e in range(N):
                if start[t, e]:
                    hidden = hidden.clone()
                    hidden[e] = 0
            hidden = actor.gru(actor.base(obs[t]).view(-1, H), hidden.view(-1, H)).view(N, n, H)
            policy = script.masked_policy(actor.head(hidden), masks[t])
            actions[t] = policy.sample()
            log_probs[t] = policy.log_prob(actions[t])
    rows = torch.tensor([17, 0, 3, 8, 12, 4, 10, 15])  # chunk * N * n + e * n + agent
    whole = {"obs": obs, "masks": masks, "actions": actions, "start": start.unsqueeze(-1).expand(T, N, n)}
    sequences = {name: script.to_sequences(x, L, rows) for name, x in whole.items()}
    sequences["actor_hidden"] = torch.stack(stored).flatten(0, 2)[rows]
    replayed, entropy = script.sequence_policy(actor, sequences, torch.arange(len(rows)))
    expected = torch.zeros(T, N, n)
    for row in rows.tolist():
        chunk, e, i = row // (N * n), row // n % N, row % n
        expected[chunk * L : (chunk + 1) * L, e, i] = log_probs[chunk * L : (chunk + 1) * L, e, i]
    torch.testing.assert_close(script.from_sequences(replayed, rows, (T, N, n)), expected)
    assert (entropy > 0).all()


def test_sequences_and_back(script):
    """to_sequences puts a chunk of one agent in one column; from_sequences inverts it and leaves zeros elsewhere."""
    T, N, n, L = 6, 2, 3, 3
    x = torch.arange(1.0, 1 + T * N * n).view(T, N, n)
    rows = torch.arange(T // L * N * n)
    columns = script.to_sequences(x, L, rows)
    for c in range(T // L):
        for e in range(N):
            for i in range(n):
                assert torch.equal(columns[:, c * N * n + e * n + i], x[c * L : (c + 1) * L, e, i])
    assert torch.equal(script.from_sequences(columns, rows, x.shape), x)
    some = torch.tensor([7, 2])
    back = script.from_sequences(columns[:, some], some, x.shape)
    assert torch.equal(back[3:, 0, 1], x[3:, 0, 1]) and torch.equal(back[:3, 0, 2], x[:3, 0, 2])
    assert (back != 0).sum() == 2 * L


# ------------------------------------------------------------------------------------- the update in plain loops
class Plain:
    """A whole run again, one sample at a time: Algorithm 2 or a baseline, from the games' record and the orders."""

    def __init__(self, script, record, orders, args):
        self.method, self.args = script.__name__.split("_")[0], args
        self.T, self.N, self.n, self.L = args.num_steps, args.num_envs, Skirmish.n, args.chunk_length
        torch.manual_seed(args.seed)
        self.actor = script.RecurrentNetwork(Skirmish.obs_dim, Skirmish.n_actions, args.hidden_size, gain=0.01)
        self.critic = script.RecurrentNetwork(Skirmish.obs_dim + Skirmish.state_dim, 1, args.hidden_size, gain=1.0)
        self.optimizers = [torch.optim.Adam(m.parameters(), args.learning_rate, eps=1e-5) for m in self.networks()]
        self.mean = self.square = self.weight = 0.0
        self.agents = [(e, i) for e in range(self.N) for i in range(self.n)]
        self.hidden = {(m, *a): torch.zeros(args.hidden_size) for m in ("actor", "critic") for a in self.agents}
        self.starts, self.finals = [True] * self.N, [False] * self.N
        self.clipped = 0
        for iteration, order in enumerate(orders):
            self.collect(record[iteration * self.T : (iteration + 1) * self.T])
            self.update(order)

    def networks(self):
        return self.actor, self.critic

    def unit(self):
        """Mean and standard deviation of the returns so far."""
        weight = max(self.weight, 1e-5)
        mean = self.mean / weight
        return mean, math.sqrt(max(self.square / weight - mean**2, 0.01))

    def step(self, network, features, hidden, start):
        hidden = torch.zeros_like(hidden) if start else hidden
        hidden = network.gru(network.base(features)[None], hidden[None])[0]
        return network.head(hidden), hidden

    def inputs(self, seen, e, i):
        own = torch.as_tensor(seen["obs"][e, i])
        return own, torch.cat([torch.as_tensor(seen["state"][e]), own])

    def policy(self, logits, mask, action):
        """log pi(action) and the entropy, over the available actions alone."""
        available = np.flatnonzero(mask).tolist()
        log_p = logits[available].log_softmax(-1)
        return log_p[available.index(action)], -(log_p.exp() * log_p).sum()

    @torch.no_grad()
    def collect(self, steps):
        self.steps, self.stored, self.start, self.final = steps, {}, [], []
        self.log_prob, self.values, self.sample = {}, {}, set()
        mean, std = self.unit()
        for t in range(self.T + 1):
            self.start.append(self.starts), self.final.append(self.finals)
            seen = steps[t][0] if t < self.T else steps[-1][5]
            for e, i in self.agents:
                own, joint = self.inputs(seen, e, i)
                if t % self.L == 0:
                    self.stored[t, e, i] = self.hidden["actor", e, i], self.hidden["critic", e, i]
                value, after = self.step(self.critic, joint, self.hidden["critic", e, i], self.starts[e])
                self.values[t, e, i] = value.item() * std + mean
                if t == self.T:
                    continue
                self.hidden["critic", e, i] = after
                logits, after = self.step(self.actor, own, self.hidden["actor", e, i], self.starts[e])
                self.hidden["actor", e, i] = after
                mask = seen["action_mask"][e, i]
                self.log_prob[t, e, i] = self.policy(logits, mask, steps[t][1][e, i])[0].item()
                if seen["alive"][e, i] and not self.finals[e]:
                    self.sample.add((t, e, i))
            for e in range(self.N):
                living = [i for i in range(self.n) if seen["alive"][e, i]]
                team = sum(self.values[t, e, i] for i in living) / max(len(living), 1)
                for i in set(range(self.n)) - set(living):
                    self.values[t, e, i] = team
            if t < self.T:
                self.starts, self.finals = self.finals, [bool(d) for d in steps[t][3] | steps[t][4]]

    def advantages(self, rho):
        """Eq. (2); rho maps (t, e) to the joint ratio, and what is missing is 1."""
        A, decay = {}, self.args.gamma * self.args.gae_lambda
        for e, i in self.agents:
            for t in reversed(range(self.T)):
                _, _, reward, terminated, truncated, _ = self.steps[t]
                successor = 0.0 if terminated[e] else self.values[t + 1, e, i]
                A[t, e, i] = float(reward[e]) + self.args.gamma * successor - self.values[t, e, i]
                if t + 1 < self.T and not (terminated[e] or truncated[e]):
                    A[t, e, i] += decay * min(1.0, rho.get((t + 1, e), 1.0)) * A[t + 1, e, i]
        return A

    def replay(self, network, agents, output):
        """output(logits or value, t, e, i) of each sample, chunk by chunk from the stored hidden states."""
        results = {}
        for e, i in self.agents:
            for t in range(self.T) if i in agents else ():
                if t % self.L == 0:
                    hidden = self.stored[t, e, i][0 if network is self.actor else 1]
                own, joint = self.inputs(self.steps[t][0], e, i)
                out, hidden = self.step(network, own if network is self.actor else joint, hidden, self.start[t][e])
                if (t, e, i) in self.sample:
                    results[t, e, i] = output(out, t, e, i)
        return results

    def update(self, order):
        args, n = self.args, self.n
        gae = self.advantages({})
        returns = [gae[s] + self.values[s] for s in sorted(self.sample)]
        for name, value in (("mean", np.mean(returns)), ("square", np.mean(np.square(returns))), ("weight", 1.0)):
            setattr(self, name, 0.99999 * getattr(self, name) + (1 - 0.99999) * value)
        mean, std = self.unit()
        blocks = [list(range(n))]
        if self.method in ("a2po", "happo"):  # as equal as can be, the larger ones first
            size, more = divmod(n, args.agent_blocks)
            ends = [k * size + min(k, more) for k in range(args.agent_blocks + 1)]
            blocks = [order[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        for _ in range(-(-args.update_epochs // len(blocks))):
            for k, block in enumerate(blocks, 1):
                outcome = self.replay(
                    self.actor,
                    range(n),
                    lambda x, t, e, i: self.policy(x, self.steps[t][0]["action_mask"][e, i], self.steps[t][1][e, i]),
                )
                ratio = {s: (outcome[s][0] - self.log_prob[s]).exp() for s in self.sample}
                r = {s: ratio[s].item() for s in self.sample}
                joint = {(t, e): math.prod(r.get((t, e, i), 1.0) for i in range(n)) for t, e, _ in self.sample}
                A = self.advantages(joint) if self.method == "a2po" else gae
                own = [s for s in sorted(self.sample) if s[2] in block]
                average = np.mean([A[s] for s in own])
                deviation = np.sqrt(np.mean([(A[s] - average) ** 2 for s in own])) + 1e-5
                eps = args.clip_coef
                if self.method == "a2po":
                    eps = eps * args.clip_adaptation + eps * (1 - args.clip_adaptation) * k / len(blocks)
                values = self.replay(self.critic, block, lambda x, t, e, i: x[0])
                loss = 0.0
                for s in own:
                    t, e, i = s
                    others = math.prod(r.get((t, e, j), 1.0) for j in range(n) if j != i)
                    clipped = min(max(others, 1 - eps / 2), 1 + eps / 2)
                    normal = (A[s] - average) / deviation
                    joint_ratio, weight = {
                        "a2po": (ratio[s] * clipped, normal),
                        "coppo": (ratio[s] * clipped, normal),
                        "happo": (ratio[s], normal * others),
                        "mappo": (ratio[s], normal),
                    }[self.method]
                    self.clipped += abs(joint_ratio.item() - 1) > eps
                    surrogate = min(joint_ratio * weight, joint_ratio.clamp(1 - eps, 1 + eps) * weight)
                    target, old = (A[s] + self.values[s] - mean) / std, (self.values[s] - mean) / std
                    near = old + (values[s] - old).clamp(-args.clip_coef, args.clip_coef)
                    worst = max(self.huber(values[s] - target), self.huber(near - target))
                    loss = loss + (worst - surrogate - args.ent_coef * outcome[s][1]) / len(own)
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for network, optimizer in zip(self.networks(), self.optimizers, strict=True):
                    gradients = [p.grad for p in network.parameters()]
                    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
                    for g in gradients:
                        g *= min(1.0, args.max_grad_norm / (norm + 1e-6))
                    optimizer.step()

    def huber(self, error):
        size = error.abs()
        delta = self.args.huber_delta
        return 0.5 * error**2 if size < delta else delta * (size - 0.5 * delta)


def test_training_is_the_algorithm_in_plain_loops(script, train):
    """Two iterations of main and of loops over samples, written from DESIGN: the same weights."""
    options = {"clip_adaptation": 0.25, "update_epochs": 5, "clip_coef": 0.03}
    checkpoint, run_dir, games, _ = train(**options)
    args = script.complete_args(make_args(script, **options))
    logged = scalars(run_dir)
    places = [logged.get(f"{script.__name__.split('_')[0]}/position_of_agent/{i}") for i in range(Skirmish.n)]
    orders = [None] * checkpoint["progress"]["iteration"]
    if places[0]:
        orders = [sorted(range(3), key=lambda i, k=k: places[i][k].value) for k in range(len(orders))]
    assert len(orders) == 2
    plain = Plain(script, games.record, orders, args)
    assert plain.clipped > 10, "the clip must matter in this test"
    for name, network in zip(("actor", "critic"), plain.networks(), strict=True):
        for parameter, value in network.state_dict().items():
            expected = checkpoint[name][parameter]
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=0, msg=lambda m, p=parameter: f"{p}: {m}")


def test_steps_are_counted_without_fillers(train):
    """global_step counts real environment steps, and the score of an episode is its own rewards'."""
    checkpoint, run_dir, games, _ = train()
    T, N = SMALL["num_steps"], SMALL["num_envs"]
    training = games.record[: checkpoint["progress"]["iteration"] * T]
    ends = np.array([terminated | truncated for _, _, _, terminated, truncated, _ in training])
    assert checkpoint["progress"]["global_step"] == len(training) * N - ends[:-1].sum()
    returns, lengths, running, length = [], [], np.zeros(N), np.zeros(N)
    for t, (_, _, reward, _, _, _) in enumerate(training[:T]):
        running, length = running + reward, length + (1 if t == 0 else 1 - ends[t - 1])
        returns += running[ends[t]].tolist()
        lengths += length[ends[t]].tolist()
        running[ends[t]], length[ends[t]] = 0.0, 0.0
    logged = scalars(run_dir)
    assert logged["charts/episodic_return"][0].value == pytest.approx(np.mean(returns), rel=1e-5)
    assert logged["charts/episodic_length"][0].value == pytest.approx(np.mean(lengths))


# -------------------------------------------------------------------------------------------------- seeds, resuming
def test_seeds_and_evaluation(train):
    """The same seed gives the same weights, whether or not there are evaluations between; another seed others."""
    first, run_dir, _, _ = train("a")
    assert differences(first, train("b", eval_every=1)[0], RUN_STATE) == []
    other, *_ = train("c", seed=4)
    assert any(path.startswith("/actor/") for path in differences(first, other))
    assert len(evaluations(run_dir)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_saves_and_resuming_changes_nothing(train, number, capsys):
    """Status 143 or 130, a checkpoint after the iteration, and --resume ends where an uninterrupted run does."""
    options = {"total_timesteps": 100, "eval_every": 30, "save_every": 40}
    whole, whole_dir, _, status = train("whole", **options)
    assert status == 0
    handlers = signal.getsignal(number)
    half, run_dir, _, status = train("half", signal_at=SMALL["num_steps"] + 3, signal_number=number, **options)
    assert status == 128 + number and half["progress"]["iteration"] == 2
    assert "--resume" in capsys.readouterr().err and signal.getsignal(number) == handlers
    with (run_dir / "eval.jsonl").open("a") as file:  # as if it had gone on after its last checkpoint
        file.write(json.dumps({"step": half["progress"]["global_step"] + 1, "win_rate": 0.5}) + "\n")
    resumed, again, _, status = train("half", argv=["--resume", str(run_dir)])
    assert status == 0 and again == run_dir
    assert differences(whole, resumed, RUN_STATE) == []
    assert resumed["progress"]["global_step"] == whole["progress"]["global_step"]
    kept, expected = ([{**e, "seconds": 0} for e in evaluations(d)] for d in (run_dir, whole_dir))
    assert kept == expected and len(expected) >= 3
    assert json.loads((run_dir / "config.json").read_text())["total_timesteps"] == 100
    reruns = [event.step for event in scalars(run_dir)["losses/value_loss"]]
    assert reruns == [event.step for event in scalars(whole_dir)["losses/value_loss"]]


def test_resume_with_more_steps(train):
    """An option given beside --resume holds: a finished run goes on to a larger total."""
    _, run_dir, _, _ = train("a")
    longer, again, _, status = train("a", argv=["--resume", str(run_dir), "--total-timesteps", "60"])
    assert status == 0 and again == run_dir and longer["progress"]["global_step"] >= 60
    assert longer["args"]["total_timesteps"] == 60 and longer["args"]["resume"] == ""
    assert longer["args"]["hidden_size"] == SMALL["hidden_size"]


def test_a_loss_that_is_not_finite_ends_the_run(script, train, monkeypatch):
    """The message has the iteration's number, and the checkpoint of the iteration before is untouched and usable."""
    options = {"total_timesteps": 60, "save_every": 1}
    whole, *_ = train("whole", **options)
    good, calls = script.value_loss, []
    per_iteration = 4  # update_epochs, and 2 blocks * ceil(4 / 2)

    def bad(*inputs):
        calls.append(1)
        return good(*inputs) * (math.nan if len(calls) > 2 * per_iteration else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(script, "value_loss", bad)
        saved, run_dir, _, status = train("broken", **options)
    assert "iteration 3" in status and "finite" in status
    assert saved["progress"]["iteration"] == 2
    assert all(torch.isfinite(torch.as_tensor(x)).all() for _, x in leaves({k: saved[k] for k in LEARNED}))
    resumed, *_ = train("broken", argv=["--resume", str(run_dir)])
    assert differences(whole, resumed, RUN_STATE) == []


def test_a_gradient_that_is_not_finite_is_not_saved(script, train, monkeypatch):
    """Even where it is the iteration's last and all losses are finite: the weights would be lost with the next save."""
    good, calls = script.value_loss, []

    def bad(values, *inputs):
        calls.append(1)
        if len(calls) == 8:  # the last of the second iteration
            values.register_hook(lambda gradient: gradient * math.nan)
        return good(values, *inputs)

    monkeypatch.setattr(script, "value_loss", bad)
    saved, _, _, status = train("broken", total_timesteps=60, save_every=1)
    assert "iteration 2" in status and "finite" in status
    assert saved["progress"]["iteration"] == 1


# -------------------------------------------------------------------------------------------------- run directory
def test_run_directory(script, train):
    """config.json, eval.jsonl, TensorBoard keys and the checkpoint, as DESIGN section 7 has them."""
    _, run_dir, _, _ = train(
        total_timesteps=60, eval_every=20, num_envs=3, eval_episodes=4, clip_coef=None, agent_blocks=None
    )
    assert run_dir.name.startswith(f"3m-smax__{script.__name__}__3__")
    files = {path.name.split(".")[0] for path in run_dir.iterdir()}
    assert files == {"config", "eval", "checkpoint", "events"} and not list(run_dir.glob("*.tmp"))
    config = json.loads((run_dir / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(script.Args)} <= config.keys()
    assert None not in config.values(), "config.json has the values that were used"
    assert config["simulator"] == "smax" and config["script"] == script.__name__ and config["num_envs"] == 3
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    lines = evaluations(run_dir)
    assert len(lines) >= 2 and sorted(e["step"] for e in lines) == [e["step"] for e in lines]
    for line in lines:
        assert line.keys() == {"step", "seconds", "win_rate", "won", "returns"}
        assert len(line["won"]) == len(line["returns"]) == 4 and set(line["won"]) <= {0, 1}
        assert line["win_rate"] == np.mean(line["won"]) and line["seconds"] > 0
    charts = "episodic_return episodic_length SPS learning_rate win_rate".split()
    losses = "policy_loss value_loss entropy approx_kl clipfrac explained_variance".split()
    expected = {f"charts/{c}" for c in charts} | {f"losses/{x}" for x in losses}
    expected |= {"eval/win_rate", "time/rollout_seconds", "time/update_seconds"}
    if script.__name__ == "a2po_smac":
        parts = ("clipfrac", "preceding_clipfrac", "ratio")
        expected |= {f"a2po/position_{k}/{part}" for k in (1, 2, 3) for part in parts}
    if script.__name__.startswith(("a2po", "happo")):
        expected |= {f"{script.__name__.split('_')[0]}/position_of_agent/{i}" for i in range(3)}
    logged = scalars(run_dir)
    assert expected <= logged.keys()
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    assert [event.step for event in logged["eval/win_rate"]] == [e["step"] for e in lines]
    assert [event.value for event in logged["eval/win_rate"]] == pytest.approx([e["win_rate"] for e in lines])


def test_checkpoints_are_renamed_into_place(script, tmp_path, monkeypatch):
    """A crash while writing leaves the last good checkpoint."""
    path = tmp_path / "checkpoint.pt"
    script.write_checkpoint(path, {"number": 1})

    def crash(_, file):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        script.write_checkpoint(path, {"number": 2})
    assert torch.load(path)["number"] == 1


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock, naps = iter([7.2, 7.3, 7.9, 8.1]), []
    monkeypatch.setattr(script, "time", types.SimpleNamespace(time=lambda: next(clock), sleep=naps.append))
    assert [str(script.new_run_dir("a__1")) for _ in range(2)] == ["runs/a__1__7", "runs/a__1__8"]
    assert len(naps) == 2 and all(Path("runs", name).is_dir() for name in ("a__1__7", "a__1__8"))


# ---------------------------------------------------------------------------------------------------- wrong input
WRONG = [
    ("--map 3x", "--map 3x"),
    ("--map MMM", "--map MMM"),
    ("--map MMM --simulator smax", "--map MMM"),
    ("--map zerg_0_vs_5", "--map zerg_0_vs_5"),
    ("--simulator starcraft2", "--simulator starcraft2"),
    ("--simulator starcraft2 --map smacv2_5_units", "--map smacv2_5_units"),
    ("--num-envs 0", "--num-envs 0"),
    ("--num-envs -3", "--num-envs -3"),
    ("--num-steps 25", "--num-steps 25"),
    ("--num-steps 0", "--num-steps 0"),
    ("--chunk-length 0", "--chunk-length 0"),
    ("--total-timesteps 0", "--total-timesteps 0"),
    ("--learning-rate -0.1", "--learning-rate -0.1"),
    ("--learning-rate nan", "--learning-rate nan"),
    ("--learning-rate inf", "--learning-rate inf"),
    ("--gamma 1.5", "--gamma 1.5"),
    ("--gae-lambda -0.5", "--gae-lambda -0.5"),
    ("--clip-coef -1.0", "--clip-coef -1.0"),
    ("--seed -1", "--seed -1"),
    ("--eval-episodes 0", "--eval-episodes 0"),
    ("--agent-blocks 4", "--agent-blocks 4"),
    ("--agent-blocks 0", "--agent-blocks 0"),
    ("--clip-adaptation 1.5", "--clip-adaptation 1.5"),
    ("--eval-only", "--eval-only"),
    ("--checkpoint good.pt", "--checkpoint good.pt"),
    ("--eval-only --checkpoint none.pt", "--checkpoint none.pt"),
    ("--eval-only --checkpoint corrupt.pt", "--checkpoint corrupt.pt"),
    ("--eval-only --checkpoint half.pt", "--checkpoint half.pt"),
    ("--eval-only --checkpoint foreign.pt", "--checkpoint foreign.pt"),
    ("--eval-only --checkpoint weights.pt", "--checkpoint weights.pt"),
    ("--eval-only --checkpoint other_options.pt", "--checkpoint other_options.pt"),
    ("--eval-only --checkpoint .", "--checkpoint ."),
    ("--eval-only --checkpoint good.pt --map 8m", "--checkpoint good.pt"),
    ("--eval-only --checkpoint good.pt --hidden-size 16", "--checkpoint good.pt"),
    ("--resume nowhere", "--resume nowhere"),
    ("--resume empty", "--resume empty"),
    ("--resume corrupt", "--resume corrupt"),
    ("--resume run --num-envs 3", "--resume run"),
    ("--resume other_script", "--resume other_script"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """For each script a folder with good and bad checkpoints and run directories."""
    made = {}

    def make(script, checkpoint_of):
        if script.__name__ not in made:
            folder = made[script.__name__] = tmp_path_factory.mktemp(script.__name__)
            good = checkpoint_of()
            torch.save(good, folder / "good.pt")
            whole = (folder / "good.pt").read_bytes()
            (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
            (folder / "corrupt.pt").write_bytes(b"no checkpoint at all")
            torch.save({"model": torch.ones(3)}, folder / "foreign.pt")
            torch.save([torch.ones(3)], folder / "weights.pt")
            torch.save(good | {"args": good["args"] | {"warp_speed": 9}}, folder / "other_options.pt")
            for name, contents in (
                ("empty", None),
                ("corrupt", b"nothing"),
                ("run", good),
                ("other_script", good | {"script": "ppo"}),
            ):
                (folder / name).mkdir()
                if isinstance(contents, bytes):
                    (folder / name / "checkpoint.pt").write_bytes(contents)
                elif contents:
                    torch.save(contents, folder / name / "checkpoint.pt")
        return made[script.__name__]

    return make


@pytest.mark.parametrize(("command", "named"), WRONG, ids=[command for command, _ in WRONG])
def test_wrong_input(script, command, named, files, tmp_path, monkeypatch, capsys, request):
    """Status 2 and one line on stderr with the option and its value."""
    fields = {field.name for field in dataclasses.fields(script.Args)}
    if any(word[2:].replace("-", "_") not in fields for word in command.split() if word.startswith("--")):
        pytest.skip("the script has no such option")
    folder = files(script, lambda: request.getfixturevalue("train")()[0])
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(script, "find_starcraft2", lambda: (False, "the Python package smacv2 is not installed"))
    monkeypatch.setattr(script, "make_envs", lambda _, __, N, ___: Skirmish(N))
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        words = command.split()
        script.main(script.parse_args(words + ([] if {"--map", "--resume", "--eval-only"} & set(words) else MAP)))
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script.__name__}.py: error: ") and named in lines[0]
    assert not (folder / "runs").exists(), "nothing is left behind"


MAP = ["--map", "3m"]


def test_eval_only(script, train, monkeypatch, capsys):
    """--eval-only plays as many episodes as asked for with the checkpoint's networks, and trains and writes nothing."""
    _, run_dir, _, _ = train()
    before = sorted(run_dir.parent.rglob("*"))
    capsys.readouterr()
    checkpoint = str(run_dir / "checkpoint.pt")
    _, _, games, status = train(argv=["--eval-only", "--checkpoint", checkpoint, "--eval-episodes", "5"])
    assert status == 0 and "5 greedy episodes: win rate" in capsys.readouterr().out
    assert sorted(run_dir.parent.rglob("*")) == before
    assert sum((terminated | truncated).sum() for _, _, _, terminated, truncated, _ in games.record) >= 5


def test_command_line():
    """The real thing: a wrong map in a process of its own."""
    process = subprocess.run([sys.executable, ROOT / "a2po_smac.py", "--map", "4x"], capture_output=True, text=True)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1 and "--map 4x" in process.stderr


# -------------------------------------------------------------------------------------------------- files, imports
def test_import_needs_no_simulator():
    """Importing the scripts imports neither JAX nor StarCraft II."""
    code = f"import {', '.join(SCRIPTS)}, sys; print([m for m in ('jax', 'jaxmarl', 'smacv2') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.strip() == "[]", process.stdout + process.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_pins(name):
    """The script's PEP 723 block and requirements.txt pin the same versions, which are the installed ones' names."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    block = lines[lines.index("# /// script") + 1 : lines.index("# ///")]
    pinned = tomllib.loads("\n".join(line[2:] for line in block))["dependencies"]
    required = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    versions = dict(line.split("==") for line in required if "==" in line)
    assert pinned and all("==" in pin for pin in pinned)
    assert {p: v for p, v in (pin.split("==") for pin in pinned)}.items() <= versions.items()
