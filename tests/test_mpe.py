"""a2po_mpe.py: mpe2 in worker processes and JaxMARL behind one vector environment, the update against plain loops with
rewards per agent, interruption and resumption, the run directory, and wrong input."""

import copy
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_smac_training import RUN_STATE, differences, evaluations, scalars

import a2po_mpe as script

ROOT = Path(__file__).parents[1]
N, AGENTS = 4, 3
SMALL = {"n_agents": 3, "local_ratio": 0.5, "seed": 3, "total_timesteps": 30, "num_envs": 2, "num_steps": 10}
SMALL |= {"num_workers": 1, "hidden_size": 8, "update_epochs": 4, "eval_every": 10**9, "eval_episodes": 2}
SMALL |= {"save_every": 10**9, "torch_threads": 1, "cuda": False, "learning_rate": 3e-3, "max_grad_norm": 0.3}
SMALL |= {"huber_delta": 0.5, "clip_coef": 0.05}


@pytest.fixture(scope="module")
def workers():
    """Four games in two processes; local_ratio 1/4, so that both parts of the reward show."""
    pytest.importorskip("mpe2")
    envs = script.MPE2(AGENTS, 0.25, N, 5, 2)
    yield envs
    envs.close()


def random_play(envs, steps, seed=0):
    """Results of some steps with random actions."""
    rng = np.random.default_rng(seed)
    return [envs.step(rng.integers(5, size=(envs.num_envs, AGENTS))) for _ in range(steps)]


def same(a, b):
    """Whether two lists of step results are equal to the last bit."""
    pairs = [(x[0]["obs"], y[0]["obs"]) for x, y in zip(a, b, strict=True)]
    pairs += [(x[0]["state"], y[0]["state"]) for x, y in zip(a, b, strict=True)]
    pairs += [(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in (1, 2, 3)]
    return all(np.array_equal(x, y) for x, y in pairs)


# ------------------------------------------------------------------------------------------------ mpe2's processes
def test_state_fits_new_games(workers, tmp_path):
    """As on resume: the state goes through a file into games that never played, in other processes."""
    workers.reset(seed=3)
    random_play(workers, 20)
    torch.save(workers.get_state(), tmp_path / "state")
    expected, fresh = random_play(workers, 10), script.MPE2(AGENTS, 0.25, N, 0, 3)
    fresh.set_state(torch.load(tmp_path / "state", weights_only=True))
    assert same(expected, random_play(fresh, 10))
    fresh.close()


def test_number_of_workers_changes_nothing(workers):
    """One, two and four processes play the same games."""
    workers.reset(seed=4)
    expected = random_play(workers, 60)
    for count in (1, 3, 9):
        envs = script.MPE2(AGENTS, 0.25, N, 0, count)
        assert len(envs.processes) == min(count, N)
        envs.reset(seed=4)
        assert same(expected, random_play(envs, 60))
        envs.close()


def parallel_game(envs, e, **options):
    """mpe2's parallel environment in the situation of game e."""
    from mpe2 import simple_spread_v3

    game = simple_spread_v3.parallel_env(max_cycles=25, **options)
    game.reset(seed=0)
    bodies = envs.get_state()[3][e].numpy()
    for body, numbers in zip(game.unwrapped.world.entities, bodies, strict=True):
        body.state.p_pos, body.state.p_vel = numbers[:2].copy(), numbers[2:].copy()
    return game


@pytest.mark.parametrize(("n", "local_ratio"), [(2, 1.0), (3, 0.0), (4, 0.25)])
def test_games_are_mpe2s(n, local_ratio):
    """Whole episodes beside the parallel environment: observations, state, rewards by agent, the end."""
    pytest.importorskip("mpe2")
    envs, rng, collided = script.MPE2(n, local_ratio, 6, 11, 2), np.random.default_rng(0), 0
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


def test_a_dead_worker():
    """One clear line instead of an answer, the other workers end, and there is no state to save."""
    pytest.importorskip("mpe2")
    envs = script.MPE2(AGENTS, 0.25, N, 5, 2)
    envs.reset()
    assert all(os.getsid(p.pid) == p.pid for p in envs.processes), "out of Ctrl-C's reach"
    os.kill(envs.processes[1].pid, signal.SIGKILL)
    with pytest.raises(script.GameDied, match="a process that plays mpe2 is gone"):
        random_play(envs, 2)
    assert envs.get_state() is None and not any(p.is_alive() for p in envs.processes)
    with pytest.raises(script.GameDied):
        envs.reset()


def test_workers_leave_with_the_main_process(tmp_path):
    """Even where it is killed: nothing is left behind."""
    pytest.importorskip("mpe2")
    code = "import a2po_mpe as s, os; e = s.MPE2(2, 0.0, 3, 0, 3); e.reset(); "
    code += "print(*[p.pid for p in e.processes], flush=True); os.kill(os.getpid(), 9)"
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


# ------------------------------------------------------------------------------------------------------- training
class Recorder(gym.vector.VectorWrapper):
    """Keeps every step; in step `signal_at` sends a signal, or kills a worker."""

    def __init__(self, envs, signal_at=None, kill_at=None):
        super().__init__(envs)
        self.record, self.seen, self.signal_at, self.kill_at = [], None, signal_at, kill_at

    def reset(self, **options):
        self.seen, info = self.env.reset(**options)
        return self.seen, info

    def step(self, actions):
        if len(self.record) == self.signal_at:
            signal.raise_signal(signal.SIGTERM)
        if len(self.record) == self.kill_at:
            self.env.processes[0].kill()
        before, (self.seen, *results, info) = self.seen, self.env.step(actions)
        self.record.append((before, np.array(actions), *results, self.seen))
        return self.seen, *results, info

    def get_state(self):
        return self.env.get_state()

    def set_state(self, tensors):
        self.env.set_state(tensors)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(where, **options of Recorder or Args, argv=None) -> (checkpoint, run directory, games, exit status).

    Episodes take 6 steps here, so that they end within a rollout of 10.
    """
    pytest.importorskip("mpe2")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(script, "EPISODE_STEPS", 6)
    make_envs = script.make_envs

    def run(where="run", argv=None, **options):
        at = {name: options.pop(name) for name in ("signal_at", "kill_at") if name in options}
        games = []
        monkeypatch.setattr(script, "make_envs", lambda args: games.append(Recorder(make_envs(args), **at)) or games[0])
        (tmp_path / where).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / where)
        status = 0
        try:
            script.main(script.parse_args(argv) if argv else script.Args(**SMALL | options))
        except SystemExit as error:
            status = error.code
        (run_dir,) = (tmp_path / where / "runs").iterdir()
        saved = run_dir / "checkpoint.pt"
        return torch.load(saved, weights_only=True) if saved.exists() else None, run_dir, games[0], status

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Plain:
    """A whole run again, one sample at a time: Algorithm 2 with a reward, value and advantage for each agent."""

    def __init__(self, record, orders, args):
        self.args, self.n = args, args.n_agents
        torch.manual_seed(args.seed)
        own, joint = record[0][0]["obs"].shape[-1], record[0][0]["state"].shape[-1]
        self.actor = script.RecurrentNetwork(own, 5, args.hidden_size, gain=0.01)
        self.critic = script.RecurrentNetwork(joint + own, 1, args.hidden_size, gain=1.0)
        self.optimizers = [torch.optim.Adam(m.parameters(), args.learning_rate, eps=1e-5) for m in self.networks()]
        self.mean = self.square = self.weight = 0.0
        self.agents = [(e, i) for e in range(args.num_envs) for i in range(self.n)]
        self.hidden = {(m, *a): torch.zeros(args.hidden_size) for m in range(2) for a in self.agents}
        self.starts, self.finals = [True] * args.num_envs, [False] * args.num_envs
        self.clipped = 0
        for k, order in enumerate(orders):
            self.collect(record[k * args.num_steps : (k + 1) * args.num_steps])
            self.update(order)

    def networks(self):
        return self.actor, self.critic

    def unit(self):
        """Mean and standard deviation of the returns so far."""
        weight = max(self.weight, 1e-5)
        mean = self.mean / weight
        return mean, math.sqrt(max(self.square / weight - mean**2, 0.01))

    def step(self, m, seen, e, i, hidden, start):
        """Actor (m = 0) or critic (1): its output for agent i in environment e, and the GRU's next state."""
        network, inputs = self.networks()[m], torch.as_tensor(seen["obs"][e, i])
        if m == 1:
            inputs = torch.cat([torch.as_tensor(seen["state"][e]), inputs])
        hidden = network.gru(network.base(inputs)[None], (0 if start else 1) * hidden[None])[0]
        return network.head(hidden), hidden

    @torch.no_grad()
    def collect(self, steps):
        self.steps, self.stored, self.start = steps, {}, []
        self.log_prob, self.value, self.sample = {}, {}, set()
        mean, std = self.unit()
        for t in range(len(steps) + 1):
            self.start.append(self.starts)
            seen = steps[t][0] if t < len(steps) else steps[-1][5]
            for e, i in self.agents:
                if t % self.args.chunk_length == 0:
                    self.stored[t, e, i] = self.hidden[0, e, i], self.hidden[1, e, i]
                value, after = self.step(1, seen, e, i, self.hidden[1, e, i], self.starts[e])
                self.value[t, e, i] = value.item() * std + mean
                if t == len(steps):
                    continue
                self.hidden[1, e, i] = after
                logits, self.hidden[0, e, i] = self.step(0, seen, e, i, self.hidden[0, e, i], self.starts[e])
                self.log_prob[t, e, i] = logits.log_softmax(-1)[steps[t][1][e, i]].item()
                if not self.finals[e]:
                    self.sample.add((t, e, i))
            if t < len(steps):
                self.starts, self.finals = self.finals, [bool(d) for d in steps[t][3] | steps[t][4]]

    def advantages(self, rho):
        """Eq. (2) for each agent with its own rewards; rho maps (t, e) to the joint ratio, what is missing is 1."""
        A, gamma = {}, self.args.gamma
        for e, i in self.agents:
            for t in reversed(range(len(self.steps))):
                _, _, reward, _, truncated, _ = self.steps[t]
                A[t, e, i] = float(reward[e, i]) + gamma * self.value[t + 1, e, i] - self.value[t, e, i]
                if t + 1 < len(self.steps) and not truncated[e]:
                    A[t, e, i] += gamma * self.args.gae_lambda * min(1.0, rho.get((t + 1, e), 1.0)) * A[t + 1, e, i]
        return A

    def replay(self, m, agents):
        """Outputs for the samples of some agents, chunk by chunk from the stored hidden states."""
        results = {}
        for e, i in self.agents:
            for t in range(len(self.steps)) if i in agents else ():
                if t % self.args.chunk_length == 0:
                    hidden = self.stored[t, e, i][m]
                out, hidden = self.step(m, self.steps[t][0], e, i, hidden, self.start[t][e])
                if (t, e, i) in self.sample:
                    results[t, e, i] = out
        return results

    def update(self, order):
        args, n = self.args, self.n
        gae = self.advantages({})
        returns = [gae[s] + self.value[s] for s in sorted(self.sample)]
        for name, value in (("mean", np.mean(returns)), ("square", np.mean(np.square(returns))), ("weight", 1.0)):
            setattr(self, name, 0.99999 * getattr(self, name) + (1 - 0.99999) * value)
        mean, std = self.unit()
        for k, agent in list(enumerate(order, 1)) * -(-args.update_epochs // n):
            log_p = {s: x.log_softmax(-1) for s, x in self.replay(0, range(n)).items()}
            ratio = {s: (x[self.steps[s[0]][1][s[1], s[2]]] - self.log_prob[s]).exp() for s, x in log_p.items()}
            joint = {(t, e): math.prod(ratio[t, e, i].item() for i in range(n)) for t, e, _ in self.sample}
            A = self.advantages(joint)
            own = [s for s in sorted(self.sample) if s[2] == agent]
            average = np.mean([A[s] for s in own])
            deviation = np.sqrt(np.mean([(A[s] - average) ** 2 for s in own])) + 1e-5
            eps = args.clip_coef * args.clip_adaptation + args.clip_coef * (1 - args.clip_adaptation) * k / n
            values, loss = self.replay(1, [agent]), 0.0
            for s in own:
                others = math.prod(ratio[s[0], s[1], j].item() for j in range(n) if j != agent)
                both, normal = ratio[s] * min(max(others, 1 - eps / 2), 1 + eps / 2), (A[s] - average) / deviation
                self.clipped += abs(both.item() - 1) > eps
                surrogate = min(both * normal, both.clamp(1 - eps, 1 + eps) * normal)
                target, old = (A[s] + self.value[s] - mean) / std, (self.value[s] - mean) / std
                near = old + (values[s][0] - old).clamp(-args.clip_coef, args.clip_coef)
                worst = max(self.huber(values[s][0] - target), self.huber(near - target))
                entropy = -(log_p[s].exp() * log_p[s]).sum()
                loss = loss + (worst - surrogate - args.ent_coef * entropy) / len(own)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            for network, optimizer in zip(self.networks(), self.optimizers, strict=True):
                norm = math.sqrt(sum(p.grad.square().sum().item() for p in network.parameters()))
                for p in network.parameters():
                    p.grad *= min(1.0, args.max_grad_norm / (norm + 1e-6))
                optimizer.step()

    def huber(self, error):
        size, delta = error.abs(), self.args.huber_delta
        return 0.5 * error**2 if size < delta else delta * (size - 0.5 * delta)


def test_training_is_the_algorithm_in_plain_loops(train):
    """Two iterations of main and of loops over samples, written from DESIGN, general-sum: the same weights."""
    options = {"total_timesteps": 25, "clip_coef": 0.03, "clip_adaptation": 0.25, "local_ratio": 0.9}
    checkpoint, run_dir, games, status = train(**options)
    assert status == 0 and checkpoint["progress"]["iteration"] == 2
    rewards = np.array([reward for _, _, reward, *_ in games.record[:20]])
    assert (rewards != rewards[..., :1]).any(), "agents are paid differently in this test"
    logged = scalars(run_dir)
    orders = [sorted(range(3), key=lambda i, k=k: logged[f"a2po/position_of_agent/{i}"][k].value) for k in range(2)]
    plain = Plain(games.record, orders, script.complete_args(script.Args(**SMALL | options)))
    assert plain.clipped > 10, "the clip must matter in this test"
    for name, network in zip(("actor", "critic"), plain.networks(), strict=True):
        for parameter, value in network.state_dict().items():
            expected = checkpoint[name][parameter]
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=0, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("local_ratio", [0.0, 0.5])
def test_advantages_by_agent(local_ratio, train, monkeypatch):
    """General-sum: an agent's advantages follow from its own rewards. Cooperative: all agents' rewards are one."""
    calls, function = [], script.preopc_advantages
    monkeypatch.setattr(
        script, "preopc_advantages", lambda *inputs: calls.append((inputs, function(*inputs))) or calls[-1][1]
    )
    train(local_ratio=local_ratio, num_envs=4)
    (rewards, values, terminated, done, *rest), advantages = calls[0]
    assert rewards.shape == advantages.shape == (10, 4, 3) and values.shape == (11, 4, 3) and not terminated.any()
    assert done[5].all() and done.sum() == 4, "cut where the episode ends"
    assert (rewards != rewards[..., :1]).any() == (local_ratio > 0)
    changed = rewards.clone()
    changed[..., 1] += 1.0
    moved = (function(changed, values, terminated, done, *rest) != advantages).any(0).any(0)
    assert moved.tolist() == [False, True, False]


def test_steps_and_returns(train):
    """Fillers count neither as steps nor in returns; the return is the mean over agents of their sums of rewards."""
    checkpoint, run_dir, games, _ = train(total_timesteps=50)
    training = games.record[: checkpoint["progress"]["iteration"] * 10]
    filler = np.array([False] + [x[4].any() for x in training[:-1]])
    assert checkpoint["progress"]["global_step"] == 2 * (~filler).sum() and filler.sum() >= 3
    expected = np.mean(np.sum([reward for _, _, reward, *_ in training[:6]], 0))
    logged = scalars(run_dir)
    assert logged["charts/episodic_return"][0].value == pytest.approx(expected, rel=1e-5)
    assert {event.value for event in logged["charts/episodic_length"]} == {6.0}


def test_evaluation(workers):
    """The actor's most likely actions from new starts; the first episode of as many environments as asked for."""
    torch.manual_seed(0)
    actor, games = script.RecurrentNetwork(18, 5, 8, gain=1.0), Recorder(workers)
    workers.reset(seed=6)
    returns = script.evaluate(actor, games, 3, torch.device("cpu"))
    rewards = np.array([reward for _, _, reward, *_ in games.record])
    assert len(rewards) == 25 and returns == pytest.approx(rewards.mean(-1).sum(0)[:3], abs=1e-3)
    hidden = torch.zeros(N * AGENTS, 8)
    with torch.no_grad():
        for seen, actions, *_ in games.record:
            hidden = actor.gru(actor.base(torch.as_tensor(seen["obs"]).flatten(0, 1)), hidden)
            assert np.array_equal(actions, actor.head(hidden).argmax(-1).view(N, AGENTS).numpy())
    games.record.clear()
    returns = script.evaluate(actor, games, 6, torch.device("cpu"))
    rewards = np.array([reward for _, _, reward, *_ in games.record])
    expected = [*rewards[:25].mean(-1).sum(0), *rewards[26:].mean(-1).sum(0)[:2]]
    assert len(rewards) == 51 and returns == pytest.approx(expected, abs=1e-3)


def test_seeds_and_evaluation_in_training(train):
    """The same seed gives the same weights, with evaluations between and another number of workers; others differ."""
    first, run_dir, _, _ = train("a")
    assert differences(first, train("b", eval_every=1, num_workers=2)[0], RUN_STATE) == []
    assert any(path.startswith("/actor/") for path in differences(first, train("c", seed=4)[0]))
    assert len(evaluations(run_dir)) == 1


def resume_changes_nothing(train, simulator):
    """A signal, a checkpoint after the iteration, and --resume ends where an uninterrupted run does."""
    options = {"total_timesteps": 90, "eval_every": 30, "save_every": 40, "simulator": simulator}
    whole, whole_dir, _, status = train("whole", **options)
    assert status == 0
    half, run_dir, _, status = train("half", signal_at=13, **options)
    assert status == 128 + signal.SIGTERM and half["progress"]["iteration"] == 2
    resumed, again, _, status = train("half", argv=["--resume", str(run_dir), "--num-workers", "2"])
    assert status == 0 and again == run_dir
    assert differences(whole, resumed, RUN_STATE) == []
    assert resumed["progress"]["global_step"] == whole["progress"]["global_step"]
    kept, expected = ([{**e, "seconds": 0} for e in evaluations(d)] for d in (run_dir, whole_dir))
    assert kept == expected and len(expected) >= 3


def test_resume_mpe2(train):
    resume_changes_nothing(train, "mpe2")


def test_a_dead_worker_ends_the_run(train):
    """The last weights are saved, the message says how to go on, and one can."""
    saved, run_dir, _, status = train(kill_at=12)
    assert "a process that plays mpe2 is gone" in status and f"--resume runs/{run_dir.name}" in status
    assert saved["progress"]["iteration"] == 1 and saved["envs"] is None
    resumed, _, _, status = train(argv=["--resume", str(run_dir)])
    assert status == 0 and resumed["progress"]["global_step"] >= 30


# -------------------------------------------------------------------------------------- run directory, wrong input
def test_run_directory(train):
    """config.json, eval.jsonl, TensorBoard keys and the checkpoint, as DESIGN section 7 has them."""
    _, run_dir, _, _ = train(total_timesteps=60, eval_every=20, num_envs=3, eval_episodes=4)
    assert run_dir.name.startswith("spread-3-0.5-mpe2__a2po_mpe__3__")
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"config", "eval", "checkpoint", "events"}
    config = json.loads((run_dir / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(script.Args)} <= config.keys()
    assert None not in config.values() and config["agent_blocks"] == 3, "each agent is a block"
    assert config["versions"]["mpe2"] == importlib.metadata.version("mpe2")
    lines = evaluations(run_dir)
    assert len(lines) >= 2 and sorted(e["step"] for e in lines) == [e["step"] for e in lines]
    for line in lines:
        assert line.keys() == {"step", "seconds", "episodic_return", "returns"}
        assert len(line["returns"]) == 4 and line["episodic_return"] == pytest.approx(np.mean(line["returns"]))
    charts = "episodic_return episodic_length SPS learning_rate".split()
    losses = "policy_loss value_loss entropy approx_kl clipfrac explained_variance".split()
    expected = {f"charts/{c}" for c in charts} | {f"losses/{x}" for x in losses}
    expected |= {"eval/episodic_return", "time/rollout_seconds", "time/update_seconds"}
    expected |= {f"a2po/position_{k}/{x}" for k in (1, 2, 3) for x in ("clipfrac", "preceding_clipfrac", "ratio")}
    expected |= {f"a2po/position_of_agent/{i}" for i in range(3)}
    logged = scalars(run_dir)
    assert expected <= logged.keys()
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    assert [event.value for event in logged["eval/episodic_return"]] == pytest.approx(
        [e["episodic_return"] for e in lines]
    )


WRONG = [
    ("--n-agents 1", "--n-agents 1"),
    ("--n-agents 0", "--n-agents 0"),
    ("--n-agents -2", "--n-agents -2"),
    ("--local-ratio 1.5", "--local-ratio 1.5"),
    ("--local-ratio -0.5", "--local-ratio -0.5"),
    ("--local-ratio nan", "--local-ratio nan"),
    ("--num-workers 0", "--num-workers 0"),
    ("--num-envs 0", "--num-envs 0"),
    ("--num-steps 24", "--num-steps 24"),
    ("--agent-blocks 4", "--agent-blocks 4"),
    ("--agent-blocks 0", "--agent-blocks 0"),
    ("--gae-lambda 1.1", "--gae-lambda 1.1"),
    ("--learning-rate inf", "--learning-rate inf"),
    ("--clip-adaptation 2.0", "--clip-adaptation 2.0"),
    ("--seed -1", "--seed -1"),
    ("--eval-only", "--eval-only"),
    ("--checkpoint good.pt", "--checkpoint good.pt"),
    ("--eval-only --checkpoint none.pt", "--checkpoint none.pt"),
    ("--eval-only --checkpoint corrupt.pt", "--checkpoint corrupt.pt"),
    ("--eval-only --checkpoint smac.pt", "--checkpoint smac.pt"),
    ("--eval-only --checkpoint good.pt --n-agents 5", "--checkpoint good.pt"),
    ("--eval-only --checkpoint good.pt --hidden-size 16", "--checkpoint good.pt"),
    ("--resume nowhere", "--resume nowhere"),
    ("--resume run --num-envs 3", "--resume run"),
    ("--resume run --local-ratio 0", "--resume run"),
    ("--resume fast --simulator mpe2", "--resume fast"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with good and bad checkpoints."""
    pytest.importorskip("mpe2")
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        script.main(script.Args(**SMALL | {"total_timesteps": 1, "eval_episodes": 1}))
        (made,) = (folder / "runs").iterdir()
        made.rename(folder / "run")
        (folder / "runs").rmdir()
    good = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
    torch.save(good, folder / "good.pt")
    torch.save(good | {"args": {"map": "3m", "seed": 1}, "script": "a2po_smac"}, folder / "smac.pt")
    (folder / "fast").mkdir()
    torch.save(good | {"args": good["args"] | {"simulator": "jaxmarl"}}, folder / "fast" / "checkpoint.pt")
    (folder / "corrupt.pt").write_bytes(b"no checkpoint at all")
    return folder


@pytest.mark.parametrize(("command", "named"), WRONG, ids=[command for command, _ in WRONG])
def test_wrong_input(command, named, files, monkeypatch, capsys):
    """Status 2 and one line on stderr with the option and its value."""
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as left:
        script.main(dataclasses.replace(script.parse_args(command.split()), torch_threads=1))
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("a2po_mpe.py: error: ") and named in lines[0]
    assert not (files / "runs").exists(), "nothing is left behind"


def eval_only(simulator, files, monkeypatch, capsys):
    """The checkpoint's networks play, in either simulator; nothing is trained or written."""
    monkeypatch.chdir(files)
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    words = f"--eval-only --checkpoint good.pt --eval-episodes 5 --num-envs {N} --simulator {simulator}".split()
    script.main(script.parse_args(words))
    assert "5 greedy episodes: mean return -" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


def test_eval_only_mpe2(files, monkeypatch, capsys):
    eval_only("mpe2", files, monkeypatch, capsys)


def test_command_line():
    """The real thing: a wrong value in a process of its own."""
    command = [sys.executable, ROOT / "a2po_mpe.py", "--n-agents", "1"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1 and "--n-agents 1" in process.stderr


def test_import_needs_no_simulator():
    """Importing the script imports neither JAX nor mpe2."""
    code = "import a2po_mpe, sys; print([m for m in ('jax', 'jaxmarl', 'mpe2', 'pettingzoo') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.strip() == "[]", process.stdout + process.stderr


def test_pins():
    """The versions in the script's PEP 723 block are the installed ones."""
    lines = (ROOT / "a2po_mpe.py").read_text().splitlines()
    block = lines[lines.index("# /// script") + 1 : lines.index("# ///")]
    for pin in tomllib.loads("\n".join(line[2:] for line in block))["dependencies"]:
        name, version = pin.split("==")
        assert importlib.metadata.version(name).split("+")[0] == version


def test_table_10():
    """The defaults are the paper's."""
    args = script.complete_args(script.Args())
    paper = {"update_epochs": 8, "chunk_length": 5, "ent_coef": 0.05, "learning_rate": 2e-4, "gae_lambda": 0.97}
    paper |= {"clip_coef": 0.2, "n_agents": 3, "local_ratio": 0.0, "agent_blocks": 3, "clip_adaptation": 0.5}
    assert paper.items() <= vars(args).items() and script.EPISODE_STEPS == 25
    assert script.complete_args(script.Args(n_agents=5)).agent_blocks == 5


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
    first, _ = games.reset(seed=7)
    whole = random_play(games, 30)
    again, _ = games.reset(seed=7)
    assert np.array_equal(first["obs"], again["obs"]) and same(whole, random_play(games, 30))
    other, _ = games.reset(seed=8)
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
    fast, slow, rng, collisions = (
        jax_games(n, local_ratio),
        script.Games(n, local_ratio, N),
        np.random.default_rng(1),
        0,
    )
    fast.reset(seed=1)
    for t in range(104):
        positions, velocities = np.asarray(fast._state.p_pos), np.asarray(fast._state.p_vel)
        if t % 3 == 0:  # bring the agents together, so that they collide
            positions = np.concatenate([positions[:, :n] * np.float32(0.4), positions[:, n:]], 1)
            fast._state = fast._state.replace(p_pos=fast._to_jax(positions))
        slow.set_state(np.concatenate([positions, velocities], -1).astype(np.float64), np.asarray(fast._state.step))
        actions = rng.integers(5, size=(N, n))
        obs, reward, terminated, truncated, _ = fast.step(actions)
        if t % 26 == 25:  # the filler step; the other tests are about it
            assert not truncated.any() and (np.asarray(fast._state.step) == 0).all()
            continue
        expected_obs, expected_reward, expected_end = slow.play([None] * N, actions)
        bodies, steps = slow.get_state()
        np.testing.assert_allclose(obs["obs"], expected_obs, atol=1e-5)
        np.testing.assert_allclose(fast._state.p_pos, bodies[..., :2], atol=1e-5)
        np.testing.assert_allclose(fast._state.p_vel, bodies[..., 2:], atol=1e-5)
        distances = np.linalg.norm(bodies[:, :n, None, :2] - bodies[:, None, :n, :2], axis=-1)
        clear = (np.abs(distances - 0.3) > 1e-5).all((1, 2))
        np.testing.assert_allclose(reward[clear], expected_reward[clear], atol=1e-5)
        assert np.array_equal(truncated, expected_end) and truncated.all() == (t % 26 == 24) and not terminated.any()
        assert np.array_equal(np.asarray(fast._state.step), steps)
        collisions += (distances[clear] < 0.3).sum() - n * clear.sum()
    assert collisions > 100


def test_starts_are_alike(workers, jax_games):
    """Both draw agents and landmarks uniformly from the square of side 2, at rest."""
    for games in (workers, jax_games(AGENTS, 0.5)):
        seen = []
        for seed in range(40):
            obs = games.reset(seed=seed)[0]["obs"]
            own = obs[:, :, 2:4]
            seen.append(np.concatenate([own, obs[:, 0, 4:10].reshape(N, 3, 2) + own[:, :1]], 1))
        positions = np.array(seen).reshape(-1, 12)
        assert np.abs(positions).max() <= 1 and (np.abs(positions.mean(0)) < 0.2).all()
        assert (np.abs(positions.std(0) - 1 / math.sqrt(3)) < 0.1).all()


def test_jaxmarl_state_fits_new_games(jax_games):
    """As on resume: games that never played take over the state."""
    old = jax_games(AGENTS, 0.5)
    old.reset(seed=3)
    random_play(old, 20)
    saved, expected, fresh = old.get_state(), random_play(old, 10), copy.copy(old)
    del fresh._state, fresh._final
    fresh.set_state(saved)
    assert same(expected, random_play(fresh, 10))


def test_resume_jaxmarl(train, jax_games):
    resume_changes_nothing(train, "jaxmarl")


def test_eval_only_jaxmarl(files, monkeypatch, capsys, jax_games):
    eval_only("jaxmarl", files, monkeypatch, capsys)
