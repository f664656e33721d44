"""The football script's training loop, on a small game of ours in place of the engine: Algorithms 1 and 2 in plain
loops, steps that are no samples, and the batched step of several networks."""

import functools
import importlib.metadata
import math
import types

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_smac_training import Skirmish

import a2po_grf
from a2po_grf import METRICS, RecurrentNetwork, by_agent, by_network, joint_step

# The options of the last line are such that both clips, the line of the value loss and the norm matter.
SMALL = {"scenario": "academy_3_vs_1_with_keeper", "seed": 3, "total_timesteps": 40, "num_envs": 3, "num_steps": 12}
SMALL |= {"chunk_length": 4, "hidden_size": 8, "update_epochs": 4, "agent_blocks": 2, "eval_every": 10**9}
SMALL |= {"eval_episodes": 2, "save_every": 10**9, "torch_threads": 1, "cuda": False, "learning_rate": 3e-3}
SMALL |= {"gae_lambda": 0.9, "clip_adaptation": 0.25, "ent_coef": 0.1}
SMALL |= {"clip_coef": 0.03, "huber_delta": 0.5, "max_grad_norm": 0.15}


class Match(Skirmish):
    """Skirmish as FootballGames would show it, with players who are sent off and games that crash.

    `CRASHES` has (step, environment): within an episode, at the start of a rollout, and where a new game should begin.
    """

    CRASHES = {(7, 0), (12, 1), (13, 0)}

    def __init__(self, num_envs, junk):
        super().__init__(num_envs, junk)
        self.crashes, self.halves = 0, [slice(0, 1), slice(1, num_envs)]
        self.asked = np.zeros((num_envs, self.n), int)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset()
        return {name: value.copy() for name, value in obs.items()}, info

    def step_async(self, actions, half):
        self.asked[half] = actions

    def step_wait(self, half):
        """Both halves have been asked for their step by the time that one waits for the first."""
        if half == self.halves[0]:
            self.both = self.step(self.asked)
        obs, *results, info = self.both
        metrics = {name: values[half] for name, values in info["metrics"].items()}
        obs = {name: value[half].copy() for name, value in obs.items()}
        return obs, *(part[half] for part in results), {"crashed": info["crashed"][half], "metrics": metrics}

    def step(self, actions):
        crashed = np.array([(len(self.record), e) in self.CRASHES for e in range(self.num_envs)])
        before = [part[crashed].copy() for part in self._parts()]
        _, reward, terminated, truncated, info = super().step(actions)
        for part, value in zip(self._parts(), before, strict=True):
            part[crashed] = value  # the last observation once more
        terminated[crashed], truncated[crashed], self.final[crashed] = False, True, True
        reward[crashed] = 9.0 * self.junk
        ended = terminated | truncated
        info = {"crashed": crashed, "metrics": {name: np.where(ended & ~crashed, 1.0, np.nan) for name in METRICS}}
        self.crashes += int(crashed.sum())
        self.seen = self._observe()
        self.record[-1] = (self.record[-1][0], np.array(actions), reward, terminated, ended, crashed, self.seen)
        return self.seen, reward, terminated, truncated, info


def small(**options):
    return a2po_grf.Args(**SMALL | options)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(where, junk, **options of Args) -> checkpoint, what was logged, the game's record of the training."""
    version = importlib.metadata.version
    monkeypatch.setattr(a2po_grf, "find_football", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "gfootball" else version(name))

    def run(where="run", junk=1, **options):
        games = []
        (tmp_path / where).mkdir()
        monkeypatch.chdir(tmp_path / where)
        monkeypatch.setattr(a2po_grf, "make_envs", lambda args: games.append(Match(args.num_envs, junk)) or games[-1])
        a2po_grf.main(small(**options))
        (run_dir,) = (tmp_path / where / "runs").iterdir()
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        logged = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        assert checkpoint["progress"]["iteration"] == 2
        return checkpoint, logged, games[0].record[: 2 * SMALL["num_steps"]]

    return run


# --------------------------------------------------------------------------------- the whole training in plain loops
class Plain:
    """A whole run again, one sample at a time, from the games' record and the orders: Algorithms 1 and 2 of the paper.

    A sample is (t, e, i): step, environment, agent.
    """

    def __init__(self, args):
        self.args, self.n, self.T, self.N = args, Match.n, args.num_steps, args.num_envs
        torch.manual_seed(args.seed)
        self.actors = self.networks(Match.obs_dim, Match.n_actions, 0.01)
        self.critics = self.networks(Match.state_dim + Match.obs_dim, 1, 1.0)
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, eps=1e-5)
        self.optimizers = {id(network): adam(network.parameters()) for network in {*self.actors, *self.critics}}
        self.mean = self.square = self.weight = 0.0
        self.agents = [(e, i) for e in range(self.N) for i in range(self.n)]
        self.hidden = {(kind, *a): torch.zeros(args.hidden_size) for kind in ("actor", "critic") for a in self.agents}
        self.begins, self.over = [True] * self.N, [False] * self.N
        self.score, self.length, self.steps_done = [0.0] * self.N, [0] * self.N, 0
        kinds = ("own clip", "inner clip", "trace cut", "value clip", "huber", "actor norm", "critic norm")
        self.active = dict.fromkeys(kinds, 0)

    def networks(self, inputs, outputs, gain):
        """The network of each agent: with shared parameters n times the same."""
        made = [RecurrentNetwork(inputs, outputs, self.args.hidden_size, gain)]
        while len(made) < self.n:
            again = self.args.share_parameters
            made.append(made[0] if again else RecurrentNetwork(inputs, outputs, self.args.hidden_size, gain))
        return made

    def unit(self):
        """Mean and standard deviation of the returns so far."""
        weight = max(self.weight, 1e-5)
        mean = self.mean / weight
        return mean, math.sqrt(max(self.square / weight - mean**2, 0.01))

    def step(self, network, features, hidden, begins):
        """A step of the recurrent network: its output and its next state."""
        hidden = network.gru(network.base(features)[None], (0.0 if begins else 1.0) * hidden[None])[0]
        return network.head(hidden), hidden

    def inputs(self, t, e, i):
        """What the actor sees, and the critic."""
        seen = self.steps[t].before if t < self.T else self.steps[-1].after
        own = torch.as_tensor(seen["obs"][e, i])
        return own, torch.cat([torch.as_tensor(seen["state"][e]), own])

    def policy(self, logits, t, e, i):
        """log pi(action) and the entropy, over the available actions alone."""
        available = np.flatnonzero(self.steps[t].before["action_mask"][e, i]).tolist()
        log_p = logits[available].log_softmax(-1)
        return log_p[available.index(self.steps[t].actions[e, i])], -(log_p.exp() * log_p).sum()

    @torch.no_grad()
    def collect(self, record):
        names = "before actions reward terminated ended crashed after".split()
        self.steps = [types.SimpleNamespace(**dict(zip(names, step, strict=True))) for step in record]
        self.log_prob, self.values, self.stored, self.first, self.valid = {}, {}, {}, {}, set()
        self.scores, self.lengths = [], []
        mean, std = self.unit()
        for t in range(self.T + 1):
            alive = (self.steps[t].before if t < self.T else self.steps[-1].after)["alive"]
            for e, i in self.agents:
                self.first[t, e] = self.begins[e]
                own, joint = self.inputs(t, e, i)
                if t % self.args.chunk_length == 0:
                    self.stored["actor", t, e, i] = self.hidden["actor", e, i]
                    self.stored["critic", t, e, i] = self.hidden["critic", e, i]
                value, after = self.step(self.critics[i], joint, self.hidden["critic", e, i], self.begins[e])
                self.values[t, e, i] = value.item() * std + mean
                if t < self.T:
                    self.hidden["critic", e, i] = after
                    logits, after = self.step(self.actors[i], own, self.hidden["actor", e, i], self.begins[e])
                    self.hidden["actor", e, i] = after
                    self.log_prob[t, e, i] = self.policy(logits, t, e, i)[0].item()
            for e in range(self.N):
                living = [self.values[t, e, i] for i in range(self.n) if alive[e, i]]
                for i in range(self.n):
                    if not alive[e, i]:  # the rest of the team gets the same reward
                        self.values[t, e, i] = sum(living) / max(len(living), 1)
            if t < self.T:
                self.follow(t)
        self.samples = [(t, e, i) for t, e in sorted(self.valid) for i in range(self.n) if self.alive(t, e, i)]
        self.steps_done += len(self.valid)

    def follow(self, t):
        """Where the games stand after step t, and whether it was one that counts."""
        for e in range(self.N):
            crashed, ended = self.steps[t].crashed[e], self.steps[t].ended[e]
            if not (self.over[e] or crashed):
                self.valid.add((t, e))
                self.score[e] += float(self.steps[t].reward[e])
                self.length[e] += 1
                if ended:
                    self.scores.append(self.score[e])
                    self.lengths.append(self.length[e])
            self.begins[e] = self.over[e] and not crashed
            self.over[e] = bool(ended)
            self.score[e] *= not self.over[e]
            self.length[e] *= not self.over[e]

    def alive(self, t, e, i):
        return self.steps[t].before["alive"][e, i]

    def advantages(self, rho):
        """Eq. (2); rho maps (t, e) to the joint ratio, and what is missing is 1. The trace ends before what is none."""
        A, args = {}, self.args
        for e, i in self.agents:
            for t in reversed(range(self.T)):
                successor = 0.0 if self.steps[t].terminated[e] else self.values[t + 1, e, i]
                A[t, e, i] = float(self.steps[t].reward[e]) + args.gamma * successor - self.values[t, e, i]
                if (t + 1, e) in self.valid:
                    weight = min(1.0, rho.get((t + 1, e), 1.0))
                    self.active["trace cut"] += weight < 0.99
                    A[t, e, i] += args.gamma * args.gae_lambda * weight * A[t + 1, e, i]
        return A

    def replay(self, kind, agents):
        """Sample -> what these agents' networks give for it, chunk by chunk from the stored states."""
        outputs = {}
        for e, i in self.agents:
            for t in range(self.T) if i in agents else ():
                if t % self.args.chunk_length == 0:
                    hidden = self.stored[kind, t, e, i]
                network, x = (self.actors, self.critics)[kind == "critic"][i], self.inputs(t, e, i)[kind == "critic"]
                out, hidden = self.step(network, x, hidden, self.first[t, e])
                outputs[t, e, i] = self.policy(out, t, e, i) if kind == "actor" else out[0]
        return {s: outputs[s] for s in self.samples if s[2] in agents}

    @torch.no_grad()
    def ratios(self, agents):
        return {s: math.exp(p.item() - self.log_prob[s]) for s, (p, _) in self.replay("actor", agents).items()}

    def update(self, order):
        args, everyone = self.args, range(self.n)
        gae = self.advantages({})
        scores = [np.mean([abs(gae[s]) for s in self.samples if s[2] == i]) for i in everyone]
        assert sorted(order) == list(everyone) and order[0] == np.argmax(scores), "semi-greedy: the largest first"
        returns = [gae[s] + self.values[s] for s in self.samples]
        for name, value in (("mean", np.mean(returns)), ("square", np.mean(np.square(returns))), ("weight", 1.0)):
            setattr(self, name, 0.99999 * getattr(self, name) + (1 - 0.99999) * value)
        size, more = divmod(self.n, args.agent_blocks)  # blocks as equal as can be, the larger ones first
        ends = [k * size + min(k, more) for k in range(args.agent_blocks + 1)]
        blocks = [order[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        (self.algorithm_2 if args.share_parameters else self.algorithm_1)(blocks)

    def algorithm_1(self, blocks):
        rho = dict.fromkeys(self.valid, 1.0)  # the product of the preceding blocks' ratios
        for k, block in enumerate(blocks, 1):
            A = self.advantages(rho)
            for i in block:
                for _ in range(self.args.update_epochs):
                    self.descend([i], A, {(t, e, i): rho[t, e] for t, e in rho}, k / len(blocks))
            for (t, e, _), r in self.ratios(block).items():
                rho[t, e] *= r

    def algorithm_2(self, blocks):
        for _ in range(math.ceil(self.args.update_epochs / len(blocks))):
            for k, block in enumerate(blocks, 1):
                rho, others = dict.fromkeys(self.valid, 1.0), dict.fromkeys(self.samples, 1.0)
                for (t, e, j), r in self.ratios(range(self.n)).items():  # every update moves every agent
                    rho[t, e] *= r
                    for i in range(self.n):
                        if i != j and (t, e, i) in others:
                            others[t, e, i] *= r
                A = self.advantages(rho)
                self.descend(block, A, others, k / len(blocks))

    def descend(self, agents, A, preceding, place):
        """A step of the agents, who are one or share their networks; `preceding` ratios, in product and not clipped."""
        args, (mean, std) = self.args, self.unit()
        policies, values = self.replay("actor", agents), self.replay("critic", agents)
        average = np.mean([A[s] for s in policies])
        deviation = np.sqrt(np.mean([(A[s] - average) ** 2 for s in policies])) + 1e-5
        eps, loss = args.clip_coef * (args.clip_adaptation + (1 - args.clip_adaptation) * place), 0.0
        for s, (log_prob, entropy) in policies.items():
            inner = min(max(preceding[s], 1 - eps / 2), 1 + eps / 2)
            joint, advantage = (log_prob - self.log_prob[s]).exp() * inner, (A[s] - average) / deviation
            surrogate = min(joint * advantage, joint.clamp(1 - eps, 1 + eps) * advantage)
            target, old = (A[s] + self.values[s] - mean) / std, (self.values[s] - mean) / std
            near = old + (values[s] - old).clamp(-args.clip_coef, args.clip_coef)
            worst = max(self.huber(values[s] - target), self.huber(near - target))
            loss = loss + (worst - surrogate - args.ent_coef * entropy) / len(policies)
            self.active["own clip"] += abs(joint.item() - 1) > eps
            self.active["inner clip"] += inner != preceding[s]
            self.active["value clip"] += near.item() != values[s].item()
        networks = {"actor": self.actors[agents[0]], "critic": self.critics[agents[0]]}
        for network in networks.values():
            self.optimizers[id(network)].zero_grad()
        loss.backward()
        for kind, network in networks.items():
            gradients = [parameter.grad for parameter in network.parameters()]
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
            self.active[f"{kind} norm"] += norm > args.max_grad_norm
            for g in gradients:
                g *= min(1.0, args.max_grad_norm / (norm + 1e-6))
            self.optimizers[id(network)].step()

    def huber(self, error):
        size, delta = error.abs(), self.args.huber_delta
        self.active["huber"] += size.item() > delta
        return 0.5 * error**2 if size < delta else delta * (size - 0.5 * delta)

    def assert_same(self, checkpoint):
        for name, networks in (("actor", self.actors), ("critic", self.critics)):
            own = networks[: 1 if self.args.share_parameters else self.n]
            weights = torch.nn.ModuleList(own).state_dict()
            assert weights.keys() == checkpoint[name].keys()
            for parameter, value in weights.items():
                expected = checkpoint[name][parameter]
                torch.testing.assert_close(value, expected, atol=1e-5, rtol=0, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("shared, blocks", [(False, 2), (False, 3), (True, 2), (True, 3)])
def test_training_is_the_algorithm_in_plain_loops(shared, blocks, train):
    """Two iterations of main and of loops over samples, written from the paper and DESIGN: the same weights."""
    options = {"share_parameters": shared, "agent_blocks": blocks}
    options |= {"update_epochs": 5 if shared else 3}  # Algorithm 2 makes six of them, in rounds of two or three
    checkpoint, logged, record = train(**options)
    plain, T = Plain(small(**options)), SMALL["num_steps"]
    places = [logged[f"a2po/position_of_agent/{i}"] for i in range(plain.n)]
    for k in range(2):
        plain.collect(record[k * T : (k + 1) * T])
        plain.update(sorted(range(plain.n), key=lambda i, k=k: places[i][k]))
        assert logged["charts/episodic_return"][k] == pytest.approx(np.mean(plain.scores), rel=1e-5)
        assert logged["charts/episodic_length"][k] == pytest.approx(np.mean(plain.lengths))
    plain.assert_same(checkpoint)
    assert checkpoint["progress"]["global_step"] == plain.steps_done
    assert checkpoint["progress"]["crashes"] == len(Match.CRASHES)
    idle = [name for name, times in plain.active.items() if times < 5]
    assert idle == [], "everything must matter in this test"


@pytest.mark.parametrize("shared", [False, True], ids=["algorithm 1", "algorithm 2"])
def test_what_is_no_sample_changes_nothing(shared, train):
    """What players who are off see and may do, terminal observations and the rewards of fillers and crashed steps."""
    (one, _, record), (other, _, others) = (train(str(junk), junk, share_parameters=shared) for junk in (1, 2))
    assert any((a[0]["obs"] != b[0]["obs"]).any() for a, b in zip(record, others, strict=True))
    for part in ("actor", "critic", "normalizer"):
        assert [name for name in one[part] if not torch.equal(one[part][name], other[part][name])] == []


def test_the_game_has_what_the_tests_are_about(train):
    """Crashes in an episode, at a rollout's start and where a game should begin; ends of both kinds; agents off."""
    _, _, record = train()
    ended = {(t, e): bool(step[4][e]) for t, step in enumerate(record) for e in range(SMALL["num_envs"])}
    assert {(t, e) for t, step in enumerate(record) for e in np.flatnonzero(step[5]).tolist()} == Match.CRASHES
    assert [ended[t - 1, e] for t, e in sorted(Match.CRASHES)] == [False, False, True]
    assert sum(step[3].sum() for step in record) >= 2
    assert sum((step[4] & ~step[3] & ~step[5]).sum() for step in record) >= 2
    assert sum((step[0]["alive"] == 0).sum() for step in record) >= 10


# ------------------------------------------------------------------------------------------ several networks at once
@pytest.mark.parametrize("m", [1, 3])
def test_joint_steps_are_the_networks_own_forward_passes(m):
    """Over several steps, in which environments begin anew, with the states that the steps hand on."""
    torch.manual_seed(0)
    T, N, n, inputs, outputs, H = 7, 4, 3, 5, 6, 8
    networks = torch.nn.ModuleList([RecurrentNetwork(inputs, outputs, H, gain=1.0) for _ in range(m)])
    for parameter in networks.parameters():  # biases and scales that are not trivial
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, first, start = torch.randn(T, N, n, inputs), torch.randn(N, n, H), (torch.rand(T, N) < 0.3).float()
    start[0] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    act, hidden, results, states = joint_step(networks), first, [], []
    for t in range(T):
        starts = start[t].unsqueeze(-1).expand(-1, n)
        result, state = act(*(by_network(part, m) for part in (x[t], hidden, starts)))
        hidden = by_agent(state, n)
        results.append(by_agent(result, n)), states.append(hidden)
    for e in range(N):
        for i in range(n):
            network = networks[i if m > 1 else 0]
            expected, expected_states = network(x[:, e, i][:, None], first[e, i][None], start[:, e][:, None])
            torch.testing.assert_close(torch.stack(results)[:, e, i], expected[:, 0], atol=1e-5, rtol=0)
            torch.testing.assert_close(torch.stack(states)[:, e, i], expected_states[:, 0], atol=1e-5, rtol=0)


def test_a_lone_agent_has_no_predecessors(train, monkeypatch):
    """A drill with one agent is Algorithm 1 unless told otherwise: PreOPC has nothing to correct."""
    monkeypatch.setattr(Match, "n", 1)

    def weights(where, **options):
        checkpoint, *_ = train(where, agent_blocks=1, **options)
        return torch.cat([x.flatten() for part in ("actor", "critic") for x in checkpoint[part].values()])

    assert torch.equal(weights("with"), weights("without", preopc=False))
    shared = [weights(f"shared{preopc}", share_parameters=True, preopc=preopc) for preopc in (True, False)]
    assert not torch.equal(*shared), "with shared parameters its own ratio counts"
