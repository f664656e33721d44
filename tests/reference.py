"""Algorithms 1 and 2 and their baselines in plain loops: slow, float64, one sample at a time, from paper and DESIGN.

A sample is (t, e, i): step, environment, agent. Of the scripts only the networks are used, as modules. Everything else
is written again here: what a sample is, values in units of return, Eq. (2), the objectives, the value loss.
"""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch


class Step(NamedTuple):
    """What a game shows of a step of N environments with n agents, next-step autoreset."""

    seen: dict  # before it: obs (N, n, ...), state (N, ...), action_mask (N, n, actions), alive (N, n)
    actions: np.ndarray  # (N, n), or (N, n, joints)
    rewards: np.ndarray  # (N,) or (N, n)
    terminated: np.ndarray  # (N,)
    ended: np.ndarray  # (N,): terminated, or out of time, or crashed
    crashed: np.ndarray  # (N,): the game was lost, the step is none
    after: dict  # what is seen then


class Reference:
    """A training: collect() a rollout, update(), and so on. Each agent has a network, shared ones stand there n times.

    `joints` are those of each agent where actions are continuous; then `own_ratio`, product or mean over an agent's
    joints, is about the ratio in its own objective, while all other ratios are of whole actions.
    """

    def __init__(self, algorithm, actors, critics, args, joints=None, own_ratio="product"):
        self.algorithm, self.args, self.joints, self.own_ratio = algorithm, args, joints, own_ratio
        made = copy.deepcopy((actors, critics))  # as one: networks that are one stay one
        self.actors, self.critics = ([network.double() for network in networks] for networks in made)
        self.n, self.N = len(actors), args.num_envs
        self.shared = self.actors[0] is self.actors[-1] and self.n > 1
        self.optimizers = {}
        for network in {*self.actors, *self.critics}:
            self.optimizers[network] = torch.optim.Adam(network.parameters(), lr=args.learning_rate, eps=1e-5)
        self.weight = self.mean = self.square = 0.0  # decaying sums over the returns
        self.hidden = {}  # (kind, e, i) -> the GRU's state
        self.begins, self.over = [True] * self.N, [False] * self.N
        self.score, self.length, self.global_step, self.iteration = [0.0] * self.N, [0] * self.N, 0, 0
        self.active = dict.fromkeys(["own clip", "inner clip", "value clip", "huber", "actor norm", "critic norm"], 0)
        self.active |= {"trace cut": 0, "dead": 0, "crashed": 0}

    # ------------------------------------------------------------------------------------------------------- networks
    def views(self, seen, e, i):
        """What agent i's actor sees, and its critic: the state too."""
        own = torch.as_tensor(seen["obs"][e][i]).double()
        return {"actor": own, "critic": torch.cat([torch.as_tensor(seen["state"][e]).double(), own])}

    def run(self, kind, seen, e, i, hidden, begins):
        """One step of the agent's actor or critic: its output, and the GRU's state after it."""
        network, x = (self.actors if kind == "actor" else self.critics)[i], self.views(seen, e, i)[kind]
        if not hasattr(network, "gru"):
            return network(x), None
        if hidden is None or begins or not getattr(self.args, "recurrent", True):
            hidden = torch.zeros(self.args.hidden_size).double()
        hidden = network.gru(network.base(x)[None], hidden[None])[0]
        return network.head(hidden), hidden

    def policy(self, output, t, e, i):
        """log pi of what was done, a list with an entry for each joint, and the entropy."""
        action = self.steps[t].actions[e][i]
        if self.joints:
            mean, std = output
            log_p, entropy = [], 0.0
            for k in self.joints[i]:
                distance = (float(action[k]) - mean[k]) / std[k]
                log_p.append(-(distance**2) / 2 - std[k].log() - math.log(2 * math.pi) / 2)
                entropy = entropy + 0.5 + 0.5 * math.log(2 * math.pi) + std[k].log()
            return log_p, entropy
        mask = self.steps[t].seen["action_mask"][e][i] if "action_mask" in self.steps[t].seen else np.ones(len(output))
        available = np.flatnonzero(mask).tolist()
        log_p = output[available].log_softmax(-1)
        return [log_p[available.index(int(action))]], -(log_p.exp() * log_p).sum()

    def unit(self):
        """Mean and standard deviation of the returns so far: the unit of the critic."""
        mean = self.mean / max(self.weight, 1e-5)
        return mean, math.sqrt(max(self.square / max(self.weight, 1e-5) - mean**2, 0.01))

    # -------------------------------------------------------------------------------------------------------- rollout
    @torch.no_grad()
    def collect(self, steps):
        self.steps, self.T, self.episodes = steps, len(steps), []
        self.stored, self.first, self.old, self.outputs, self.values, self.valid = {}, {}, {}, {}, {}, set()
        mean, std = self.unit()
        for t in range(self.T + 1):
            seen = steps[t].seen if t < self.T else steps[-1].after
            for e in range(self.N):
                self.first[t, e] = self.begins[e]
                for i in range(self.n):
                    self.stored[t, e, i] = {k: self.hidden.get((k, e, i)) for k in ("actor", "critic")}
                    value, after = self.run("critic", seen, e, i, self.hidden.get(("critic", e, i)), self.begins[e])
                    self.outputs[t, e, i] = value.item()
                    self.values[t, e, i] = value.item() * std + mean
                    if t < self.T:
                        self.hidden["critic", e, i] = after
                        before = self.hidden.get(("actor", e, i))
                        output, self.hidden["actor", e, i] = self.run("actor", seen, e, i, before, self.begins[e])
                        self.old[t, e, i] = [log_p.item() for log_p in self.policy(output, t, e, i)[0]]
                living = [i for i in range(self.n) if self.alive(seen, e, i)]
                for i in set(range(self.n)) - set(living):  # the others' return is the same
                    self.values[t, e, i] = sum(self.values[t, e, j] for j in living) / max(len(living), 1)
            if t < self.T:
                self.follow(t)
        everyone = [(t, e, i) for t, e in sorted(self.valid) for i in range(self.n)]
        self.samples = [(t, e, i) for t, e, i in everyone if self.alive(steps[t].seen, e, i)]
        self.active["dead"] += len(everyone) - len(self.samples)
        self.global_step += len(self.valid)

    def alive(self, seen, e, i):
        return "alive" not in seen or seen["alive"][e][i] == 1

    def follow(self, t):
        """Whether step t is one, and where its games stand afterwards."""
        step = self.steps[t]
        for e in range(self.N):
            self.active["crashed"] += bool(step.crashed[e])
            if not self.over[e] and not step.crashed[e]:
                self.valid.add((t, e))
                self.score[e] += float(np.mean(step.rewards[e]))
                self.length[e] += 1
                if step.ended[e]:
                    self.episodes.append((self.score[e], self.length[e]))
            self.begins[e], self.over[e] = self.over[e], bool(step.ended[e])
            if self.over[e] or self.begins[e]:
                self.score[e], self.length[e] = 0.0, 0

    # ------------------------------------------------------------------------------------------------------ equations
    def delta(self, t, e, i):
        reward, terminated = self.steps[t].rewards[e], self.steps[t].terminated[e]
        reward = float(reward if np.ndim(reward) == 0 else reward[i])
        successor = 0.0 if terminated else self.values[t + 1, e, i]
        return reward + self.args.gamma * successor - self.values[t, e, i]

    def advantages(self, rho):
        """Eq. (2); rho maps (t, e) to the joint ratio, and what is missing is 1. The trace ends before what is none."""
        A, gamma = {}, self.args.gamma
        for e in range(self.N):
            for i in range(self.n):
                for t in reversed(range(self.T)):
                    A[t, e, i] = self.delta(t, e, i)
                    if (t + 1, e) in self.valid:
                        weight = min(1.0, rho.get((t + 1, e), 1.0))
                        self.active["trace cut"] += weight < 0.99
                        A[t, e, i] += gamma * self.args.gae_lambda * weight * A[t + 1, e, i]
        return A

    def vtrace(self, rho):
        """v_t = V_t + sum over k of gamma^k c_t ... c_{t+k-1} min(1, rho_{t+k}) delta_{t+k}, c = lambda min(1, rho);
        A_t = r_t + gamma v_{t+1} - V_t. Two maps from samples and others, A and v."""
        gamma, A, v = self.args.gamma, {}, {}
        for t, e, i in self.values:
            v[t, e, i], factor, k = self.values[t, e, i], 1.0, t
            while k < self.T and (k == t or (k, e) in self.valid):
                weight = min(1.0, rho.get((k, e), 1.0))
                self.active["trace cut"] += weight < 0.99
                v[t, e, i] += factor * weight * self.delta(k, e, i)
                factor, k = factor * gamma * self.args.gae_lambda * weight, k + 1
        for t, e, i in self.old:
            gain = v[t + 1, e, i] - self.values[t + 1, e, i] if (t + 1, e) in self.valid else 0.0
            A[t, e, i] = self.delta(t, e, i) + gamma * gain
        return A, v

    def objective(self, ratio, g, A, eps):
        """The row of DESIGN's table: min(l M, clip(l) M); returns it and l."""
        inner = min(max(g, 1 - eps / 2), 1 + eps / 2)
        joint, M = {
            "mappo": (ratio, A),
            "rpisa": (ratio, A),
            "coppo": (ratio * inner, A),
            "happo": (ratio, A * g),
            "a2po": (ratio * inner, A),
        }[self.algorithm]
        self.active["own clip"] += abs(joint.item() - 1) > eps
        self.active["inner clip"] += inner != g
        return min(joint * M, joint.clamp(1 - eps, 1 + eps) * M), joint.item()

    def clip(self, k, number):
        """Of the k-th of so many blocks."""
        eps, c = self.args.clip_coef, getattr(self.args, "clip_adaptation", 1.0)
        return eps * c + eps * (1 - c) * k / number

    def huber(self, error):
        size, delta = error.abs(), self.args.huber_delta
        self.active["huber"] += size.item() > delta
        return 0.5 * error**2 if size < delta else delta * (size - 0.5 * delta)

    # --------------------------------------------------------------------------------------------------------- update
    def replay(self, kind, agents):
        """Sample -> what these agents' networks give for it now, chunk by chunk from the states stored before it."""
        outputs = {}
        for e in range(self.N):
            for i in agents:
                for t in range(self.T):
                    if t % getattr(self.args, "chunk_length", self.T) == 0:
                        hidden = self.stored[t, e, i][kind]
                    output, hidden = self.run(kind, self.steps[t].seen, e, i, hidden, self.first[t, e])
                    outputs[t, e, i] = self.policy(output, t, e, i) if kind == "actor" else output[0]
        return {s: outputs[s] for s in self.samples if s[2] in agents}

    @torch.no_grad()
    def ratios(self, agents):
        """Sample -> probability now over the one then, of the whole action."""
        now = self.replay("actor", agents)
        return {s: math.exp(sum(p.item() - q for p, q in zip(now[s][0], self.old[s], strict=True))) for s in now}

    def update(self, order=None):
        """All updates of an iteration; returns what each was like. `order` of the agents, for sequential algorithms."""
        gae = self.advantages({})
        self.scores = [self.size(gae, i) for i in range(self.n)]
        self.last_sizes = list(self.scores)  # of the advantages that the agents were last updated with
        returns = [gae[s] + self.values[s] for s in self.samples]
        self.explained_variance = 1 - np.var([gae[s] for s in self.samples]) / np.var(returns)
        for name, value in (("weight", 1.0), ("mean", np.mean(returns)), ("square", np.mean(np.square(returns)))):
            setattr(self, name, 0.99999 * getattr(self, name) + (1 - 0.99999) * value)
        self.log = []
        simultaneous = order is None
        blocks = [list(range(self.n))] if simultaneous else self.cut(order)
        if self.algorithm == "rpisa":  # the rollout is for one block, the next one for the next
            blocks = [self.cut(range(self.n))[self.iteration % self.args.agent_blocks]]
        self.iteration += 1
        (self.algorithm_2 if self.shared or simultaneous else self.algorithm_1)(blocks, gae)
        return self.log

    def cut(self, order):
        """Blocks as equal as can be, the larger ones first; or each with all before it."""
        size, more = divmod(self.n, self.args.agent_blocks)
        ends = [k * size + min(k, more) for k in range(self.args.agent_blocks + 1)]
        begins = [0] * len(ends) if getattr(self.args, "cumulative_blocks", False) else ends
        return [order[a:b] for a, b in zip(begins, ends[1:], strict=False)]

    def size(self, A, i):
        """E|A_i| over the agent's samples."""
        return np.mean([abs(A[s]) for s in self.samples if s[2] == i])

    def ranks(self):
        """Of each agent by E|A_i| at its last update: one more than there are agents with a larger one."""
        return [1 + sum(other > own for other in self.last_sizes) for own in self.last_sizes]

    def corrected(self, rho, gae):
        """Advantages for the policies that have changed by rho, and the values' targets."""
        if getattr(self.args, "vtrace", False):
            return self.vtrace(rho)
        A = self.advantages(rho) if getattr(self.args, "preopc", False) else gae
        learned = A if getattr(self.args, "preopc_targets", True) else gae
        return A, {s: learned[s] + self.values[s] for s in A}

    def algorithm_1(self, blocks, gae):
        """Own parameters: each block once, with all its epochs; then its ratio joins those of the preceding."""
        rho = dict.fromkeys(self.valid, 1.0)
        for k, block in enumerate(blocks, 1):
            A, targets = self.corrected(rho, gae)
            preceding = {s: rho[s[:2]] for s in self.samples}
            for i in block:
                self.last_sizes[i] = self.size(A, i)
                for _ in range(self.args.update_epochs):
                    self.descend([i], A, targets, preceding, k, len(blocks))
            for (t, e, _), r in self.ratios(block).items():
                rho[t, e] *= r

    def algorithm_2(self, blocks, gae):
        """Shared parameters, or all agents at once: every update moves everyone. ceil(P / blocks) rounds of blocks."""
        for _ in range(math.ceil(self.args.update_epochs / len(blocks))):
            for k, block in enumerate(blocks, 1):
                rho, others = dict.fromkeys(self.valid, 1.0), dict.fromkeys(self.samples, 1.0)
                for (t, e, j), r in self.ratios(range(self.n)).items():
                    rho[t, e] *= r
                    for i in range(self.n):
                        if i != j and (t, e, i) in others:
                            others[t, e, i] *= r
                A, targets = self.corrected(rho, gae)
                for i in block:
                    self.last_sizes[i] = self.size(A, i)
                for agents in [block] if self.shared else [[i] for i in block]:
                    self.descend(agents, A, targets, others, k, len(blocks))

    def descend(self, agents, A, targets, preceding, k, blocks):
        """An update of agents who are one or share their networks; `preceding` ratios, in product and not clipped."""
        args, eps = self.args, self.clip(k, blocks)
        policies = self.replay("actor", agents)
        average = np.mean([A[s] for s in policies])
        deviation = np.sqrt(np.mean([(A[s] - average) ** 2 for s in policies])) + 1e-5
        sums = dict.fromkeys("policy_loss entropy ratio approx_kl clipfrac preceding_clipfrac".split(), 0.0)
        for s, (log_p, entropy) in policies.items():
            log_ratios = [p - q for p, q in zip(log_p, self.old[s], strict=True)]
            ratio = sum(log_ratios).exp()
            if self.own_ratio == "mean":
                ratio = sum(x.exp() for x in log_ratios) / len(log_ratios)
            surrogate, joint = self.objective(ratio, preceding[s], (A[s] - average) / deviation, eps)

            numbers = {"policy_loss": -surrogate, "entropy": entropy, "ratio": ratio.item()}
            whole = sum(log_ratios).item()
            numbers |= {"approx_kl": math.exp(whole) - 1 - whole, "clipfrac": abs(joint - 1) > eps}
            weighed = self.algorithm in ("coppo", "a2po")  # the others clip no product
            numbers["preceding_clipfrac"] = weighed and not 1 - eps / 2 <= preceding[s] <= 1 + eps / 2
            for name, number in numbers.items():
                sums[name] = sums[name] + number / len(policies)
        loss = sums["policy_loss"] - args.ent_coef * sums["entropy"]
        sums["actor_grad_norm"] = self.step("actor", self.actors[agents[0]], loss)
        for _ in range(args.critic_steps):  # the last one is logged
            sums["value_loss"] = self.value_loss(agents, targets)
            sums["critic_grad_norm"] = self.step("critic", self.critics[agents[0]], sums["value_loss"])
        self.log.append({"block": k} | {name: float(torch.as_tensor(x).detach()) for name, x in sums.items()})

    def value_loss(self, agents, targets):
        """Mean of the agents' samples: the worse of two losses, of the value and of the value near the rollout's."""
        losses, (mean, std), eps = [], self.unit(), self.args.clip_coef
        for s, value in self.replay("critic", agents).items():
            target, old = (targets[s] - mean) / std, self.outputs[s]
            near = old + (value - old).clamp(-eps, eps)
            self.active["value clip"] += abs(value.item() - old) > eps
            losses.append(max(self.huber(value - target), self.huber(near - target)))
        return sum(losses) / len(losses)

    def step(self, kind, network, loss):
        """A network's step down the loss, its gradient no longer than `max_grad_norm`; returns how long it was."""
        self.optimizers[network].zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        self.active[f"{kind} norm"] += norm > self.args.max_grad_norm
        for g in gradients:
            g *= min(1.0, self.args.max_grad_norm / (norm + 1e-6))
        self.optimizers[network].step()
        return norm
