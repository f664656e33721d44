"""Table 1 made visible: the paper's bounds against exact surrogate errors on random small cooperative games.

    python benchmark/bounds.py --games 5000 --out benchmark/results/table1

A game is a table: states, joint actions, transitions, a team reward, a start distribution. Then everything in Section 3
has a value that linear algebra gives without sampling: returns J, advantages A, visits d, total-variation distances
alpha_i, the surrogate of each algorithm (expectations, no clipping, as in the paper's analysis), PreOPC's estimator and
its error xi_i; so have Section 4's state transition shifts. So both sides of every inequality can be put side by side,
and it can be seen whether an agent's step that maximises its surrogate really raises the joint return after its
predecessors have moved.

Three parts: `--games` random games, one update of all agents each (random, along or against a surrogate, small or
large); a hill climb that looks for games in which an inequality is as tight as it can get, or breaks; the counter-
examples, in closed form, to what does not hold as printed. Prints Markdown; writes raw.jsonl (a line per game),
hardest.jsonl (what the climb found), summary.json, table.md, errors.png and improvement.png.

Shapes: B games at once, n agents, S states, A actions of an agent, K = A^n joint actions; policies (B, n, S, A), joint
policies and advantages (B, S, K), agent 1 being the slowest index of K.
"""

import collections
import contextlib
import importlib.util
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.cli import check_writable, parse_args, write  # noqa: E402


@dataclass
class Args:
    out: Path
    """folder for what the program writes"""
    games: int = 5000
    """random games"""
    seed: int = 1
    """seed of everything random"""
    gae_lambda: float = 1.0
    """lambda of PreOPC, Eq. (2)"""
    climb_steps: int = 2000
    """steps of the hill climb after tight or broken inequalities (0: none)"""


FILES = ("raw.jsonl", "hardest.jsonl", "summary.json", "table.md", "errors.png", "improvement.png")
# What is checked: key -> (where it stands, what it says). "agent": one check per agent, else one per joint update.
INEQUALITIES = {
    "prop1": ("Proposition 1, Eq. (1)", "agent, uncorrected surrogate, as printed: eps = max of A^pi"),
    "prop1_eps": ("not in the paper", "Eq. (1) with eps = max of A^pi and A^pi_hat(i-1)"),
    "prop1_a3": ("Appendix A.3", "last line of Prop. 1's proof, as printed"),
    "prop1_proof": ("not in the paper", "what A.3 gives: 2 alpha_i (eps + eps_i) for 4 alpha_i eps_i"),
    "thm1": ("Theorem 1, Eq. (4)", "agent, A2PO, V = V^pi"),
    "thm1_square": ("Theorem 1, Eq. (4)", "the same, second line"),
    "thm1_fitted": ("Theorem 1, Eq. (4)", "agent, A2PO, fitted V"),
    "thm2": ("Theorem 2, Eq. (5), Table 1", "joint, A2PO, V = V^pi"),
    "thm2_square": ("Theorem 2, Eq. (5)", "the same, second line"),
    "thm2_fitted": ("Theorem 2, Eq. (5), Table 1", "joint, A2PO, fitted V"),
    "mappo": ("Table 1, A.6", "joint, MAPPO: sum of the agents' surrogates"),
    "mappo_mean": ("Appendix A.6", "joint, MAPPO: mean of the agents' surrogates"),
    "coppo": ("Table 1, A.6", "joint, CoPPO"),
    "happo": ("Table 1, A.6", "joint, HAPPO"),
    "happo_agent": ("Appendix A.6", "agent, HAPPO, as printed"),
    "happo_agent_proof": ("not in the paper", "what A.6 gives: 2 alpha_i (eps + eps_i) for 4 alpha_i eps_i"),
    "happo_agent_direct": ("not in the paper", "agent, HAPPO: 2 alpha_i (eps + eps_i) / (1 - gamma)"),
    "rpisa": ("Table 1", "joint, RPISA-PPO"),
    "rpisa_agent": ("Table 1", "agent, RPISA-PPO"),
    "a5": ("Appendix A.5, first line", "joint, A2PO: errors of the agents updated + Theorem 2's terms of the rest"),
    "a5_chain": ("Appendix A.5, next lines", "that bound after an agent's update is at most the one before it"),
    "a5_rest": ("not in the paper", "with J(pi_hat^i) in the surrogate: Theorem 2's terms of the rest alone"),
    "prop2": ("Proposition 2", "the shift an agent meets is the sum of its predecessors' (an identity: bound 0)"),
    "prop2_alone": ("not in the paper", "each one's shift from pi alone: sum is off by 2 sum_(l<j) alpha_l alpha_j"),
    "prop2_size": ("Section 4, after Prop. 2", "the shift an agent meets is at most its predecessors' sum of alpha_j"),
}
# These are climbed with random numbers of their own, so that what the climb finds for the others is not moved by them.
CLIMBED_APART = ("a5", "a5_chain", "a5_rest", "prop2", "prop2_alone", "prop2_size")
UPDATES = ("random", "surrogate", "against", "gradient")
STEPS = (0.01, 0.03, 0.1, 0.3, 1.0)
ADVANTAGES = {
    "unmoved": "A^pi, predecessors taken as unmoved (MAPPO)",
    "none": "A^pi, no correction (HAPPO)",
    "preopc": "PreOPC with V^pi (A2PO)",
    "preopc_fitted": "PreOPC, V fitted to its own targets",
    "exact": "A^pi_hat, exact (a new rollout each)",
}


# ---------------------------------------------------------------- exact quantities


class Game(NamedTuple):
    transition: np.ndarray  # (B, S, K, S)
    reward: np.ndarray  # (B, S, K)
    start: np.ndarray  # (B, S)
    gamma: np.ndarray  # (B,)


class Evaluation(NamedTuple):
    joint: np.ndarray  # (B, S, K)
    visits: np.ndarray  # (B, S), normalised and discounted: d
    J: np.ndarray  # (B,)
    V: np.ndarray  # (B, S)
    A: np.ndarray  # (B, S, K)


def joint_policy(policies):
    """Product of the agents' policies (B, n, S, A) -> (B, S, A^n)."""
    joint = policies[:, 0]
    for i in range(1, policies.shape[1]):
        joint = (joint[..., None] * policies[:, i, :, None]).reshape(*joint.shape[:2], -1)
    return joint


def solve(matrix, vector):
    return np.linalg.solve(matrix, vector[..., None])[..., 0]


def td_error(game, values):
    """E[delta | s, a] = r(s, a) + gamma E V(s') - V(s); with V = V^pi this is A^pi."""
    following = np.einsum("bskt,bt->bsk", game.transition, values)
    return game.reward + game.gamma[:, None, None] * following - values[..., None]


def evaluate(game, joint):
    eye, gamma = np.eye(joint.shape[1]), game.gamma[:, None]
    chain = np.einsum("bsk,bskt->bst", joint, game.transition)
    matrix = eye - gamma[..., None] * chain
    values = solve(matrix, (joint * game.reward).sum(-1))
    visits = (1 - gamma) * solve(matrix.transpose(0, 2, 1), game.start)
    return Evaluation(joint, visits, (game.start * values).sum(-1), values, td_error(game, values))


def preopc(game, base, target, values, gae_lambda):
    """Expectation of Eq. (2) over trajectories from (s, a) on under the base policy -> (B, S, K).

        A(s, a) = delta(s, a) + gamma lambda E_s' u(s')     u(s) = sum_a min(pi, pi_hat)(a | s) A(s, a)

    since pi(a) min(1, pi_hat(a) / pi(a)) = min(pi, pi_hat)(a). One linear system for u, (B, S).
    """
    kept, delta = np.minimum(base, target), td_error(game, values)
    decay = (game.gamma * gae_lambda)[:, None, None]
    matrix = np.eye(base.shape[1]) - decay * np.einsum("bsk,bskt->bst", kept, game.transition)
    u = solve(matrix, (kept * delta).sum(-1))
    return delta + decay * np.einsum("bskt,bt->bsk", game.transition, u)


def fitted_values(game, base, target, gae_lambda):
    """Where V ends when it is fitted to PreOPC's targets A + V on samples of the base policy: E_pi A(s, .) = 0.

    V + E_pi A = E_pi r + gamma P_pi (V + lambda u) is a gamma-contraction of V, so there is one such V. It is neither
    V^pi nor, in general, V^pi_hat: the first action of a target is the base policy's.
    """
    eye, gamma = np.eye(base.shape[1]), game.gamma[:, None, None]
    kept = np.minimum(base, target)
    chain = np.einsum("bsk,bskt->bst", base, game.transition)
    kept_chain = np.einsum("bsk,bskt->bst", kept, game.transition)
    trace = np.linalg.inv(eye - gamma * gae_lambda * kept_chain)
    # u = trace (kept r + gamma kept_chain V - |kept| V); E_pi A = E_pi r + gamma P V - V + gamma lambda P u
    to_u = trace @ (gamma * kept_chain - eye * kept.sum(-1)[..., None])
    matrix = eye - gamma * chain - gamma * gae_lambda * chain @ to_u
    constant = (base * game.reward).sum(-1)[..., None]
    constant = constant + gamma * gae_lambda * chain @ (trace @ (kept * game.reward).sum(-1)[..., None])
    return solve(matrix, constant[..., 0])


def mean_under(visits, joint, f):
    """E_{s ~ visits, a ~ joint} f(s, a) -> (B,)."""
    return np.einsum("bs,bsk,bsk->b", visits, joint, f)


def distances(base, new):
    """alpha_i: the largest total-variation distance over states of each agent's policies -> (B, n)."""
    return 0.5 * np.abs(base - new).sum(-1).max(-1)


def replace(base, new, agents):
    """Policies in which the agents of a slice have their new policy."""
    policies = base.copy()
    policies[:, agents] = new[:, agents]
    return policies


# ---------------------------------------------------------------- the state transition shift, Section 4


class Shifts(NamedTuple):
    """Each (n, B, S, S): sum_a T(s'|s, a) (upper - lower)(a|s) of two joint policies, Section 4; agents from 0."""

    met: np.ndarray  # [j]: pi_hat^(j+1) - pi, met by the agent after j, or after the last one by the next rollout
    caused: np.ndarray  # [j]: pi_hat^(j+1) - pi_hat^j, agent j's summand in Proposition 2
    alone: np.ndarray  # [j]: pi with agent j's new policy - pi


def shifts(game, base, new):
    """All shifts of a stage with the agents in the order 1..n.

    `met` is the definition. A summand of Proposition 2 is not taken as a difference of two joint policies, from which
    the sum would follow whatever they are, but as agent j's own change times its predecessors' new and its followers'
    old policies, which is what "caused by each agent" says. `alone` is how the same words could also be read; from
    `caused` it differs by agent j's change times its predecessors', at most 2 alpha_j sum_(l<j) alpha_l.
    """
    n, pi = base.shape[1], joint_policy(base)

    def shift(change):
        return np.einsum("bsk,bskt->bst", change, game.transition)

    def change_of(j, others):
        return joint_policy(replace(others, new - base, slice(j, j + 1)))

    met = [shift(joint_policy(replace(base, new, slice(j + 1))) - pi) for j in range(n)]
    caused = [shift(change_of(j, replace(base, new, slice(j)))) for j in range(n)]
    alone = [shift(change_of(j, base)) for j in range(n)]
    return Shifts(np.stack(met), np.stack(caused), np.stack(alone))


def size(shift):
    """Half the sum over next states of |shift|, the largest over states, as alpha has it: (n, B, S, S) -> (B, n)."""
    return 0.5 * np.abs(shift).sum(-1).max(-1).T


# ---------------------------------------------------------------- the inequalities


def tightened(errors, terms):
    """Appendix A.5's right sides: errors of the agents already updated, bounds of the rest; (B, n) -> (B, n + 1).

    Column i has i agents updated: column 0 is Theorem 2's bound, column k - 1 is A.5's first line for agent k, and
    column n goes one further than A.5, when all are updated.
    """
    return np.stack([errors[:, :i].sum(1) + terms[:, i:].sum(1) for i in range(errors.shape[1] + 1)], 1)


def gap(gamma, distance):
    """1 / (1 - gamma) - 1 / (1 - gamma (1 - distance)), the factor of all bounds of second order."""
    return 1 / (1 - gamma) - 1 / (1 - gamma * (1 - distance))


def inequalities(game, base, new, gae_lambda):
    """Both sides: key of INEQUALITIES -> (error, bound), (B, n) for one agent's inequality and (B,) for a joint one.

    Agents are updated in the order 1..n; stage i is pi_hat^i. Also what the sides are made of. Of A.5's lines "a5" has
    those for agents k = 2..n, (B, n - 1), "a5_chain" the steps between them and the one after the last update, (B, n),
    and "a5_rest" k = 1..n. The shifts are those met by agents 2..n and by the next rollout, (B, n); "prop2_alone"
    leaves out the first of them, which has one predecessor only.
    """
    n = base.shape[1]
    stages = [evaluate(game, joint_policy(replace(base, new, slice(i)))) for i in range(n + 1)]
    pi, scale = stages[0], 1 / (1 - game.gamma)
    agents = range(n)

    def columns(function):
        return np.stack([function(i) for i in agents], 1)

    gain = columns(lambda i: stages[i + 1].J - stages[i].J)
    # PreOPC's advantages and surrogates (without their constant J), by agent; the critic's values: V^pi, or fitted ones
    corrected = [preopc(game, pi.joint, stages[i].joint, pi.V, gae_lambda) for i in agents]
    refitted = [fitted_values(game, pi.joint, stages[i].joint, gae_lambda) for i in agents]
    refitted = [preopc(game, pi.joint, stages[i].joint, refitted[i], gae_lambda) for i in agents]
    a2po = columns(lambda i: scale * mean_under(pi.visits, stages[i + 1].joint, corrected[i]))
    a2po_fitted = columns(lambda i: scale * mean_under(pi.visits, stages[i + 1].joint, refitted[i]))
    intuitive = columns(lambda i: scale * mean_under(pi.visits, stages[i + 1].joint, pi.A))
    before = columns(lambda i: scale * mean_under(pi.visits, stages[i].joint, pi.A))
    alone = [joint_policy(replace(base, new, slice(i, i + 1))) for i in agents]
    mappo = columns(lambda i: scale * mean_under(pi.visits, alone[i], pi.A))
    rpisa = columns(lambda i: scale * mean_under(stages[i].visits, stages[i + 1].joint, stages[i].A))

    alpha = distances(base, new)
    upto = alpha.cumsum(1)
    preceding, total = upto - alpha, upto[:, -1:]
    eps = np.abs(pi.A).max((1, 2))[:, None]
    eps_i = columns(lambda i: np.abs(stages[i].A).max((1, 2)))
    xi = columns(lambda i: np.abs(corrected[i] - stages[i].A).max((1, 2)))
    xi_fitted = columns(lambda i: np.abs(refitted[i] - stages[i].A).max((1, 2)))
    g, h = game.gamma[:, None], scale[:, None]  # h = 1 / (1 - gamma)
    widest, eps_max = np.maximum(eps, eps_i), eps_i.max(1, keepdims=True)

    def eq1(e):
        return 2 * e * alpha * (3 * h - 2 / (1 - g * (1 - upto))) + 2 * e * preceding * h

    def agent(surrogate, bound):
        return np.abs(gain - surrogate), bound

    def joint(surrogate, bound):
        return np.abs(stages[-1].J - pi.J - surrogate), np.broadcast_to(bound, gain.shape).sum(1)

    second = 4 * eps_i * alpha * gap(g, upto)
    moved = 2 * alpha * (eps + eps_i) * h
    joint_gap = 4 * eps * alpha * gap(g, total)
    terms = 4 * eps_max * alpha * gap(g, upto) + xi * h  # of Theorem 2's sum
    known = tightened(np.abs(gain - a2po), terms)
    from_here_on = columns(lambda i: stages[-1].J - stages[i].J - a2po[:, i:].sum(1))
    shift = shifts(game, base, new)
    checks = {
        "prop1": agent(intuitive, eq1(eps)),
        "prop1_eps": agent(intuitive, eq1(widest)),
        "prop1_a3": agent(intuitive, second + (4 * alpha * eps_i + 2 * preceding * eps) * h),
        "prop1_proof": agent(intuitive, second + moved + 2 * preceding * eps * h),
        "thm1": agent(a2po, second + xi * h),
        "thm1_square": agent(a2po, 4 * g * eps_i * h**2 * alpha * upto + xi * h),
        "thm1_fitted": agent(a2po_fitted, second + xi_fitted * h),
        "thm2": joint(a2po.sum(1), 4 * eps_max * alpha * gap(g, upto) + xi * h),
        "thm2_square": joint(a2po.sum(1), 4 * g * eps_max * h**2 * alpha * upto + xi * h),
        "thm2_fitted": joint(a2po_fitted.sum(1), 4 * eps_max * alpha * gap(g, upto) + xi_fitted * h),
        "mappo": joint(mappo.sum(1), 4 * eps * alpha * h),
        "mappo_mean": joint(mappo.mean(1), 2 * eps * h * (n + 1) / n * alpha),
        "coppo": joint(intuitive[:, -1], joint_gap),
        "happo": joint((intuitive - before).sum(1), joint_gap),
        "happo_agent": agent(intuitive - before, second + (4 * alpha * eps_i + 4 * preceding * eps) * h),
        "happo_agent_proof": agent(intuitive - before, second + moved + 4 * preceding * eps * h),
        "happo_agent_direct": agent(intuitive - before, moved),
        "rpisa": joint(rpisa.sum(1), 4 * eps_max * alpha * gap(g, alpha)),
        "rpisa_agent": agent(rpisa, 4 * eps_i * alpha * gap(g, alpha)),
        "a5": (np.abs(from_here_on[:, :1]).repeat(n - 1, 1), known[:, 1:-1]),
        "a5_chain": (known[:, 1:], known[:, :-1]),
        "a5_rest": (np.abs(from_here_on), tightened(np.zeros_like(terms), terms)[:, :-1]),
        "prop2": (size(shift.met - shift.caused.cumsum(0)), np.zeros_like(alpha)),
        "prop2_alone": (size(shift.met - shift.alone.cumsum(0))[:, 1:], 2 * (alpha * preceding).cumsum(1)[:, 1:]),
        "prop2_size": (size(shift.met), upto),
    }
    details = {
        "stages": stages,
        "corrected": corrected,
        "alpha": alpha,
        "eps": eps,
        "eps_i": eps_i,
        "xi": xi,
        "gain": gain,
        "a2po": a2po,
        "known": known,
        "terms": terms,
        "scale": h,
        "shifts": shift,
    }
    return checks, details


def tolerance(game):
    """Rounding: far below any error of interest, far above that of float64."""
    return 1e-10 * np.abs(game.reward).max((1, 2)) / (1 - game.gamma)


def ratios(game, error, bound):
    """error / bound where the error is more than rounding, else 0. Above 1: violated."""
    slack = tolerance(game).reshape(-1, *[1] * (error.ndim - 1))
    return np.where(error > slack, (error - slack) / np.maximum(bound, 1e-300), 0.0)


def correction_errors(game, stages, gae_lambda):
    """How near PreOPC comes to A^pi_hat^(i-1), as a share of the distance without it, that of A^pi; agents 2..n.

    By the critic's values, as xi_i has it (largest difference over s, a) and as the agent's update feels it: centred,
    E_pi_hat A(s, .) = 0, since a part that depends on the state alone does not change which policy the surrogate, an
    expectation without clip and normalisation, prefers. -> (B, n - 1) each.
    """
    pi, found = stages[0], collections.defaultdict(list)
    for stage in stages[1:-1]:

        def distances(estimate, stage=stage):
            mean = (stage.joint * estimate).sum(-1, keepdims=True)
            return [np.abs(estimate - stage.A - shift).max((1, 2)) for shift in (0, mean)]

        fitted = fitted_values(game, pi.joint, stage.joint, gae_lambda)
        without = distances(pi.A)
        for name, values in {"V^pi": pi.V, "fitted V": fitted, "V^pi_hat": stage.V}.items():
            estimate = distances(preopc(game, pi.joint, stage.joint, values, gae_lambda))
            for measure, mine, other in zip(("xi", "centred"), estimate, without, strict=True):
                found[name, measure].append(mine / other)
    return {key: np.stack(columns, 1) for key, columns in found.items()}


def comparisons(game, checks, details):
    """What Table 1 and Appendix A.7 say of A2PO against the others, game by game (B,) or agent by agent."""
    stages, alpha, xi, eps_i = (details[name] for name in ("stages", "alpha", "xi", "eps_i"))
    g, pi = game.gamma[:, None], stages[0]
    error, bound = ({key: side[k] for key, side in checks.items()} for k in (0, 1))
    ideal = bound["thm2"] - xi.sum(1) / (1 - game.gamma)  # xi = 0
    others = np.minimum(bound["coppo"], bound["mappo"])
    exact = centred = 0.0  # A2PO's joint surrogate with xi = 0, and with E_pi_hat(i-1) of its advantage taken off
    for before, after, corrected in zip(stages[:-1], stages[1:], details["corrected"], strict=True):
        exact += mean_under(pi.visits, after.joint, before.A) / (1 - game.gamma)
        centred += mean_under(pi.visits, after.joint - before.joint, corrected) / (1 - game.gamma)
    error["xi = 0"], error["centred"] = (np.abs(stages[-1].J - pi.J - x) for x in (exact, centred))
    upto = alpha.cumsum(1)
    right = g * (1 - g) * (upto[:, -1:] - upto) / ((1 - g * (1 - upto)) * (1 - g * (1 - upto[:, -1:])))
    return {
        "A2PO's bound is below CoPPO's and MAPPO's, V = V^pi": bound["thm2"] < others,
        "A2PO's bound is below, fitted V": bound["thm2_fitted"] < others,
        "A2PO's bound is below, xi = 0": ideal < others,
        "A2PO's bound is below, xi = 0 and eps = max of A^pi": ideal * details["eps"][:, 0] / eps_i.max(1) < others,
        "A.7's condition for it, as printed, for all i": (xi < right).all(1),
        "A.7's condition, as printed, for all i < n": (xi < right)[:, :-1].all(1),
        "A2PO's error is below CoPPO's, V = V^pi": error["thm2"] < error["coppo"],
        "A2PO's error is below CoPPO's, fitted V": error["thm2_fitted"] < error["coppo"],
        "A2PO's error is below CoPPO's, V = V^pi, centred": error["centred"] < error["coppo"],
        "A2PO's error is below CoPPO's, xi = 0": error["xi = 0"] < error["coppo"],
        "A2PO's error is below MAPPO's, V = V^pi": error["thm2"] < error["mappo"],
        "CoPPO's error is below MAPPO's": error["coppo"] < error["mappo"],
        "Theorem 1 guarantees the gain of an agent's update": details["a2po"] > bound["thm1"],
        "Theorem 1 guarantees it and it does not come": (details["a2po"] > bound["thm1"]) & (details["gain"] <= 0),
    }


def relaxations(details):
    """What Appendix A.5 concludes, game by game (B,) or update by update: "the condition for improving J is relaxed".

    The condition: a stage's surrogate gain above the bound, Theorem 2's or what A.5 leaves of it. Its errors of the
    agents already updated need their J, so a rollout each; with J in the surrogate too they are not needed.
    """
    gain, a2po, known, terms = (details[name] for name in ("gain", "a2po", "known", "terms"))
    surrogate, n = a2po.sum(1), gain.shape[1]
    gained = gain.sum(1) > 0
    last = gain[:, :-1].sum(1) + a2po[:, -1] > terms[:, -1]
    so_far = np.maximum.accumulate(details["eps_i"], 1)  # over pi_hat^0 .. pi_hat^(k-1), which are known to agent k
    errors, xi_part = np.abs(gain - a2po), details["xi"] * details["scale"]
    seen = [
        errors[:, :k].sum(1) + ((terms - xi_part) * so_far[:, [k]] / so_far[:, -1:] + xi_part)[:, k:].sum(1)
        for k in range(n)
    ]
    guaranteed = (surrogate > known[:, -1]) | last
    return {
        "a stage raises J (a quarter of them go against the surrogate)": gained,
        "Theorem 2 guarantees the gain of a stage": surrogate > known[:, 0],
        "A.5 guarantees it when all but the last agent are updated": surrogate > known[:, -2],
        "A.5's errors guarantee it when all are": surrogate > known[:, -1],
        "with J(pi_hat^(n-1)) in the surrogate it is guaranteed when all but the last are": last,
        "one of these guarantees it and it does not come": guaranteed & ~gained,
        "A.5's bound shrinks with an update": known[:, 1:] < known[:, :-1],
        "A.5's bound shrinks with an update, eps = max over the agents so far": np.diff(np.stack(seen, 1)) < 0,
    }


def contributions(details):
    """What Section 4 draws from Proposition 2, by pairs of agents or update by update.

    A shift "effectively measures the total variation distance between policies", which the clip controls; "shifts
    caused by agents with higher priorities will be encountered by more following agents and thus contribute more".
    """
    alpha, met, caused = details["alpha"], size(details["shifts"].met), size(details["shifts"].caused)
    n = alpha.shape[1]
    first, second = np.triu_indices(n, 1)
    wider, stronger = (x[:, first] - x[:, second] for x in (alpha, caused))
    agree = np.sign(wider) == np.sign(stronger)
    felt = (caused * np.arange(n - 1, -1, -1))[:, :-1]  # agent j's shift, once for each of the n - j that meet it
    return {
        "of two agents the one with the larger alpha causes the larger shift": agree[np.abs(wider) > 1e-9],
        "an agent's shift, times the agents that meet it, is above its successor's": felt[:, :-1] > felt[:, 1:],
        "an agent's update adds to the shift that the next one meets": met[:, 1:] > met[:, :-1],
    }


# ---------------------------------------------------------------- games and updates


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def random_games(rng, count, n, S, A):
    """From smooth to nearly deterministic transitions; 1 - gamma log-uniform from 0.01 to 0.5.

    Rewards are dense to sparse: the sparser, the more an action is worth what it leads to.
    """
    K = A**n
    sharpness = np.exp(rng.uniform(-1, 3, (count, 1, 1, 1)))
    transition = softmax(sharpness * rng.normal(size=(count, S, K, S)))
    reward = rng.normal(size=(count, S, K))
    some = rng.random((count, S, K)) < 10 ** rng.uniform(-1, 0, (count, 1, 1))
    reward *= some | (reward == reward.max((1, 2), keepdims=True))
    start = softmax(rng.normal(size=(count, S)))
    return Game(transition, reward, start, 1 - 10 ** rng.uniform(-2, np.log10(0.5), count))


def random_policies(rng, count, n, S, A, sharpest=3.0):
    return softmax(rng.uniform(0, sharpest, (count, 1, 1, 1)) * rng.normal(size=(count, n, S, A)))


def agent_advantage(policies, advantages, i):
    """E over the others' actions: (B, S, K) -> (B, S, A) for agent i."""
    B, n, S, A = policies.shape
    f = advantages.reshape(B, S, *[A] * n)
    for j in reversed(range(n)):
        if j != i:
            f = np.moveaxis(f, 2 + j, -1)
            f = np.einsum("bs...a,bsa->bs...", f, policies[:, j])
    return f


def best_step(policy, scores, step):
    """The policy with the largest expected score in each state among those within total variation `step`.

    Probability is taken from the worst actions and given to the best. policy, scores (B, S, A); step (B,).
    """
    ascending = np.argsort(scores, -1)
    p = np.take_along_axis(policy, ascending, -1)
    others = p[..., :-1]
    taken = np.clip(step[:, None, None] - (others.cumsum(-1) - others), 0, others)
    p = np.concatenate([others - taken, p[..., -1:] + taken.sum(-1, keepdims=True)], -1)
    out = np.empty_like(p)
    np.put_along_axis(out, ascending, p, -1)
    return out


def sequential_updates(game, base, step, gae_lambda, sign=1.0):
    """A2PO's stage: each agent takes the best step for its corrected surrogate (sign -1: the worst)."""
    new = base.copy()
    start = evaluate(game, joint_policy(base))
    for i in range(base.shape[1]):
        corrected = preopc(game, start.joint, joint_policy(new), start.V, gae_lambda)
        new[:, i] = best_step(base[:, i], sign * agent_advantage(new, corrected, i), step)
    return new


def random_updates(rng, base, step):
    """A share `step` of each agent's policy is replaced by a random, often deterministic one."""
    towards = softmax(np.exp(rng.uniform(-1, 4, (len(base), 1, 1, 1))) * rng.normal(size=base.shape))
    return base + step[:, None, None, None] * (towards - base)


def gradient_updates(game, base, step):
    """All agents at once, pi_i exp(eta A_i): a natural-gradient step, A_i scaled to 1 and eta up to 10."""
    start, new = evaluate(game, joint_policy(base)), base.copy()
    for i in range(base.shape[1]):
        scores = agent_advantage(base, start.A, i)
        scores = scores / np.abs(scores).max((1, 2), keepdims=True)
        new[:, i] = softmax(np.log(base[:, i]) + 10 * step[:, None, None] * scores)
    return new


def mixed_updates(rng, game, base, kind, step, gae_lambda):
    """The update that `kind` (B,), an index into UPDATES, names for each game."""
    by_kind = (
        random_updates(rng, base, step),
        sequential_updates(game, base, step, gae_lambda),
        sequential_updates(game, base, step, gae_lambda, sign=-1.0),
        gradient_updates(game, base, step),
    )
    return np.stack(by_kind)[kind, np.arange(len(base))]


# ---------------------------------------------------------------- does a step improve?


def improvements(rng, game, base, gae_lambda, totals):
    """Adds to totals[how predecessors moved, their step, own step, advantage].

    Added are: steps; those that raise J; those that lower it (the rest changes nothing); gain in units of
    max|r| / (1 - gamma); steps that raise J where the step without correction does not; steps that do not raise J
    where it does. Predecessors have moved, at random or as A2PO moves them, and are the same for all advantages; agents
    2..n take the best step for their surrogate E_{d, pi_hat^i} of the advantage, small (0.01) or as large as the
    predecessors'.
    """
    count, n = base.shape[:2]
    pi = evaluate(game, joint_policy(base))
    unit = np.abs(game.reward).max((1, 2)) / (1 - game.gamma)
    for step in STEPS:
        size = np.full(count, step)
        moves = {
            "at random": random_updates(rng, base, size),
            "by A2PO": sequential_updates(game, base, size, gae_lambda),
        }
        for how, moved in moves.items():
            for i in range(1, n):
                policies = replace(base, moved, slice(i))
                now = evaluate(game, joint_policy(policies))
                fitted = fitted_values(game, pi.joint, now.joint, gae_lambda)
                scores = {
                    "unmoved": agent_advantage(base, pi.A, i),
                    "none": agent_advantage(policies, pi.A, i),
                    "preopc": agent_advantage(policies, preopc(game, pi.joint, now.joint, pi.V, gae_lambda), i),
                    "preopc_fitted": agent_advantage(
                        policies, preopc(game, pi.joint, now.joint, fitted, gae_lambda), i
                    ),
                    "exact": agent_advantage(policies, now.A, i),
                }
                for own in sorted({STEPS[0], step}):
                    gains = {}
                    for name, score in scores.items():
                        candidate = policies.copy()
                        candidate[:, i] = best_step(base[:, i], score, np.full(count, own))
                        gains[name] = evaluate(game, joint_policy(candidate)).J - now.J
                    raised = {name: gain > tolerance(game) for name, gain in gains.items()}
                    for name, gain in gains.items():
                        repaired, broken = raised[name] & ~raised["none"], ~raised[name] & raised["none"]
                        lowered = gain < -tolerance(game)
                        row = (raised[name].sum(), lowered.sum(), (gain / unit).sum(), repaired.sum(), broken.sum())
                        totals[how, step, own, name] += (count, *row)


# ---------------------------------------------------------------- hard cases


def climb(rng, steps, gae_lambda, keys, chains=48, n=2, S=3, A=2):
    """Hill climb on error / bound, `chains` games for each key -> key -> largest ratio, and the game behind it.

    Random games are far from tight; here rewards, transitions, start and both policies are changed at random and a
    change is kept when the ratio grows.
    """
    K, B = A**n, len(keys) * chains
    shapes = [(S, K), (S, K, S), (S,), (n, S, A), (n, S, A)]
    genes = [rng.normal(scale=1 if i == 0 else 3, size=(B, *shape)) for i, shape in enumerate(shapes)]
    gamma = np.tile([0.5, 0.9, 0.99], B // 3 + 1)[:B]
    target = np.repeat(np.arange(len(keys)), chains)

    def decode(genes):
        reward, transition, start, base, new = genes
        reward = reward / np.abs(reward).max((1, 2), keepdims=True)
        return Game(softmax(transition), reward, softmax(start), gamma), softmax(base), softmax(new)

    def fitness(genes):
        game, base, new = decode(genes)
        checks, _ = inequalities(game, base, new, gae_lambda)
        per_game = [ratios(game, *checks[key]).reshape(B, -1).max(1) for key in keys]
        return np.stack(per_game)[target, np.arange(B)]

    best = fitness(genes)
    for _ in tqdm(range(steps), desc="hill climb", unit="step", disable=None):
        width = 10 ** rng.uniform(-2, 0.5, B)
        share = rng.choice([0.1, 0.3, 1.0], B)
        trial = []
        for gene in genes:
            wide = [B] + [1] * (gene.ndim - 1)
            change = rng.normal(size=gene.shape) * (rng.random(gene.shape) < share.reshape(wide)) * width.reshape(wide)
            trial.append(np.clip(gene + change, -30, 30))
        found = fitness(trial)
        better = found > best
        best = np.where(better, found, best)
        for gene, change in zip(genes, trial, strict=True):
            gene[better] = change[better]
    game, base, new = decode(genes)
    result = {}
    for k, key in enumerate(keys):
        at = int(np.argmax(np.where(target == k, best, -1)))
        one = slice(at, at + 1)
        result[key] = (float(best[at]), Game(*(x[one] for x in game)), base[one], new[one])
    return result


def counterexample(key, gamma=0.99, step=0.05):
    """Games with 2 agents, 2 actions, 2 states that break an inequality as printed -> game, base, new policies.

    Both have rewards that cancel under one policy, so that this policy's V is 0 and its A is r.

    prop1: pi has V = 0. State 0 has r = -1 if agent 1 plays 1 and +1 if it plays 0, state 1 the reverse; agent 1 goes
    from (1/2, 1/2) to action 1, agent 2 from action 0 to action 1 with probability `step`, which leads from state 0
    to state 1 for good. Then eps = 1, J(pi_hat^1) = -1/(1 - gamma), O = -1/(1 - gamma), and J(pi_hat^2) comes close
    to +1/(1 - gamma): an error of almost 3/(1 - gamma) with alpha_1 = 1/2 and a small alpha_2, where Eq. (1) allows
    (1 + 6 alpha_2)/(1 - gamma). The advantage after agent 1's move, up to 2/(1 - gamma), is not in eps.

    happo_agent, prop1_a3: pi_hat^1 has V = 0, and pi, before agent 1 moved by `step`, has V = -+2 step/(1 - gamma) in
    state 0 and 1. Under pi_hat^1 it does not matter to be in state 1, under pi it does: eps_2 is 1, eps is not. Agent
    2 goes there from action 0 to action 1.
    """
    transition = np.zeros((1, 2, 4, 2))
    transition[0, 0, [0, 2], 0] = transition[0, 0, [1, 3], 1] = transition[0, 1, :, 1] = 1  # joint action 2 a_1 + a_2
    sign = np.array([[-1.0], [1.0]])
    reward = (sign * np.array([-1.0, -1.0, 1.0, 1.0]))[None]
    start = np.array([[1.0, 0.0]])
    if key == "prop1":
        agent_1, agent_2 = ([0.5, 0.5], [0.0, 1.0]), ([1.0, 0.0], [1 - step, step])
    else:
        agent_1, agent_2 = ([0.5 - step, 0.5 + step], [0.5, 0.5]), ([1.0, 0.0], [0.0, 1.0])
    base, new = (np.array([[[agent_1[k]] * 2, [agent_2[k]] * 2]]) for k in (0, 1))
    return Game(transition, reward, start, np.array([gamma])), base, new


# ---------------------------------------------------------------- output


def short(x):
    return float(f"{x:.3g}")


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(share, digits=1):
    return f"{100 * share:.{digits}f}%"


def plot_errors(raw, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "mappo": "MAPPO (Table 1)",
        "coppo": "CoPPO and HAPPO (Table 1)",
        "thm2": "A2PO, V = V^pi (Theorem 2)",
        "prop1": "one agent, no correction (Prop. 1)",
        "thm1": "one agent, A2PO, V = V^pi (Theorem 1)",
        "rpisa": "RPISA-PPO (Table 1)",
    }
    figure, axes = plt.subplots(2, 3, figsize=(11, 7.4), layout="constrained", sharex=True, sharey=True)
    pairs = {key: np.array([line[key] for line in raw]) / [[line["unit"]] for line in raw] for key in panels}
    everything = np.concatenate(list(pairs.values()))
    low, high = 1e-6, 2 * everything.max()
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        for kind, marker in zip(UPDATES, "o^vs", strict=True):
            chosen = pairs[key][[line["update"] == kind for line in raw]]
            label = {"surrogate": "along A2PO's surrogate", "against": "against it"}.get(kind, kind)
            axis.scatter(*np.maximum(chosen, low).T[::-1], s=3, marker=marker, alpha=0.25, linewidths=0, label=label)
        axis.plot([low, high], [low, high], color="black", linewidth=1)
        axis.text(low * 3, low * 12, "error = bound", rotation=45, rotation_mode="anchor", fontsize=8)
        axis.set(title=title, xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axis.grid(alpha=0.3)
    figure.supxlabel("bound, in units of max|r| / (1 - gamma)")
    figure.supylabel("surrogate error |J - surrogate|, same unit")
    legend = axes[0, 0].legend(markerscale=4, fontsize=8, loc="upper left")
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


def plot_improvement(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7.4), layout="constrained", sharex=True, sharey=True)
    for line, how in zip(axes, ("at random", "by A2PO"), strict=True):
        for axis, own in zip(line, ("small", "same"), strict=True):
            for (name, label), style in zip(ADVANTAGES.items(), ("o:", "o-", "s-", "^--", "k-."), strict=True):
                chosen = [r for r in rows if r["predecessors"] == how and r["advantage"] == name]
                chosen = [r for r in chosen if r["own_step"] == (STEPS[0] if own == "small" else r["step"])]
                lowered = [max(r["lowered"], 0.3 / r["updates"]) for r in chosen]
                axis.plot([r["step"] for r in chosen], lowered, style, label=label, markersize=4)
            size = f"{STEPS[0]}" if own == "small" else "as large"
            axis.set(title=f"predecessors moved {how}, own step {size}", xscale="log", yscale="log")
            axis.grid(alpha=0.3)
    figure.supxlabel("step of the predecessors (total variation, at most)")
    figure.supylabel("share of updates of agents 2..n that lower the joint return (at the bottom: none)")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


def fail(message):
    """One line; exit status 2."""
    print(f"bounds.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def check_arguments(args):
    if args.games < 1:
        fail(f"--games {args.games}: must be at least 1")
    if args.seed < 0:
        fail(f"--seed {args.seed}: must not be negative")
    if not 0 <= args.gae_lambda <= 1:
        fail(f"--gae-lambda {args.gae_lambda}: must lie between 0 and 1")
    if args.climb_steps < 0:
        fail(f"--climb-steps {args.climb_steps}: must not be negative")
    if importlib.util.find_spec("matplotlib") is None:
        fail("matplotlib is missing: pip install -r benchmark/requirements.txt")
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        for file in map(args.out.joinpath, FILES):  # before there is something to write
            check_writable(file)


@contextlib.contextmanager
def writing(folder):
    """What cannot be written in here is an error in --out."""
    try:
        yield
    except OSError as error:
        fail(f"--out {folder}: cannot be written: {error.strerror}")


def study(games, seed, gae_lambda, quiet=False):
    """The random games: raw lines, ratios by inequality, PreOPC's errors, comparisons, improvement."""
    rng = np.random.default_rng(seed)
    shapes = [(n, S, A) for n in (2, 3, 4) for S in (2, 3, 4, 5) for A in (2, 3)]
    raw, found, corrections = [], collections.defaultdict(list), collections.defaultdict(list)
    totals, shares = collections.defaultdict(lambda: np.zeros(6)), collections.defaultdict(list)
    progress = tqdm(total=games, desc="games", unit="game", disable=True if quiet else None)
    for at, (n, S, A) in enumerate(shapes):
        count = len(range(at, games, len(shapes)))
        if not count:
            break
        game, base = random_games(rng, count, n, S, A), random_policies(rng, count, n, S, A)
        kind, step = rng.integers(len(UPDATES), size=count), 10 ** rng.uniform(-2.5, 0, count)
        new = mixed_updates(rng, game, base, kind, step, gae_lambda)
        checks, details = inequalities(game, base, new, gae_lambda)
        ratio = {key: ratios(game, *sides) for key, sides in checks.items()}
        for key in INEQUALITIES:
            found[key].append(ratio[key].ravel())
        for trace in sorted({gae_lambda, 1.0, 0.95, 0.9}, reverse=True):
            for name, values in correction_errors(game, details["stages"], trace).items():
                corrections[trace, *name].append(values.ravel())
        statements = comparisons(game, checks, details) | relaxations(details) | contributions(details)
        for name, values in statements.items():
            shares[name].append(values.ravel())
        for b in range(count):
            line = {"n": n, "S": S, "A": A, "gamma": short(game.gamma[b]), "update": UPDATES[kind[b]]}
            line["step"] = short(step[b])
            line["unit"] = short(np.abs(game.reward[b]).max() / (1 - game.gamma[b]))
            for key in ("mappo", "coppo", "thm2", "prop1", "thm1", "rpisa"):
                error, bound = (side[b] for side in checks[key])
                worst = np.argmax(ratio[key][b])  # the agent with the largest ratio
                line[key] = [short(np.ravel(error)[worst]), short(np.ravel(bound)[worst])]
            violated = [key for key in INEQUALITIES if (ratio[key][b] > 1).any()]
            line |= {"violated": violated} if violated else {}
            raw.append(line)
        improvements(rng, game, base, gae_lambda, totals)
        progress.update(count)
    progress.close()
    found, corrections, shares = (
        {key: np.concatenate(parts) for key, parts in d.items()} for d in (found, corrections, shares)
    )
    exact = {key[:3]: row[3] for key, row in totals.items() if key[3] == "exact"}
    improvement = []
    for (how, step, own, name), (updates, raised, lowered, gain, repaired, broken) in totals.items():
        row = {"predecessors": how, "step": step, "own_step": own, "advantage": name, "updates": int(updates)}
        row |= {
            "improved": raised / updates,
            "lowered": lowered / updates,
            "gain_over_exact": gain / exact[how, step, own],
        }
        improvement.append(row | {"repaired": int(repaired), "broken": int(broken)})
    return raw, found, corrections, shares, improvement


def main(args: Args):
    check_arguments(args)
    raw, found, corrections, shares, improvement = study(args.games, args.seed, args.gae_lambda)
    climbed = {}
    if args.climb_steps:
        together = [key for key in INEQUALITIES if key not in CLIMBED_APART]
        for stream, keys in ((1, together), (2, CLIMBED_APART)):
            climbed |= climb(np.random.default_rng([args.seed, stream]), args.climb_steps, args.gae_lambda, keys)
    summary = {"games": args.games, "seed": args.seed, "gae_lambda": args.gae_lambda, "climb_steps": args.climb_steps}
    summary["inequalities"] = {}
    for key, (where, what) in INEQUALITIES.items():
        r = found[key]
        row = {"where": where, "what": what, "checks": len(r), "violations": int((r > 1).sum())}
        row |= {"median": float(np.median(r)), "p99": float(np.quantile(r, 0.99)), "max": float(r.max())}
        row["climbed"] = climbed[key][0] if climbed else None
        summary["inequalities"][key] = row
    summary["counterexamples"] = {}
    for key in ("prop1", "prop1_a3", "happo_agent"):
        game, base, new = counterexample(key)
        (error,), (bound,) = (side[:, 1] for side in inequalities(game, base, new, args.gae_lambda)[0][key])
        summary["counterexamples"][key] = {"error": float(error), "bound": float(bound), "ratio": float(error / bound)}
    summary["preopc_error_over_uncorrected"] = []
    for (trace, values, measure), x in corrections.items():
        row = {"lambda": trace, "values": values, "measure": measure}
        row |= {"median": float(np.median(x)), "helps": float((x < 1).mean())}
        summary["preopc_error_over_uncorrected"].append(row)
    summary["shares"] = {name: float(x.mean()) for name, x in shares.items()}
    summary["improvement"] = improvement

    with writing(args.out):
        write_all(args.out, raw, climbed, summary)
    print(markdown(summary))


def write_all(out, raw, climbed, summary):
    write(out / "raw.jsonl", "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in raw))
    write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_errors(raw, out / "errors.png")
    plot_improvement(summary["improvement"], out / "improvement.png")
    hardest = []
    for key, (ratio, game, base, new) in climbed.items():
        arrays = {name: x[0].tolist() for name, x in (game._asdict() | {"base": base, "new": new}).items()}
        hardest.append(json.dumps({"inequality": key, "ratio": ratio} | arrays) + "\n")
    write(out / "hardest.jsonl", "".join(hardest))
    write(out / "table.md", markdown(summary) + "\n")


def markdown(summary):
    rows = []
    for key, row in summary["inequalities"].items():
        example = summary["counterexamples"].get(key)
        cells = [row["where"], row["what"], row["checks"], row["violations"]]
        cells += [f"{row[q]:.2g}" for q in ("median", "p99", "max")]
        cells += [
            "" if row["climbed"] is None else f"{row['climbed']:.4f}",
            f"{example['ratio']:.3f}" if example else "",
        ]
        rows.append(cells)
    header = ["where", "inequality", "checks", "violated", "error / bound: median", "99%", "max", "max by hill climb"]
    text = ["Inequalities; above 1 is broken.", table([*header, "counterexample"], rows)]
    header = ["lambda", "V", "measure", "PreOPC's error / that of A^pi, median", "PreOPC is nearer in"]
    rows = [
        [r["lambda"], r["values"], r["measure"], f"{r['median']:.2g}", percent(r["helps"])]
        for r in summary["preopc_error_over_uncorrected"]
    ]
    text += ["PreOPC, agents 2..n; xi as the paper defines it, centred without what depends on the state alone."]
    text += [table(header, rows), "Comparisons."]
    text += [table(["statement", "true in"], [[name, percent(share)] for name, share in summary["shares"].items()])]
    rows, header = [], ["predecessors moved", "their step", "own step", "updates", *ADVANTAGES.values()]
    for r in summary["improvement"]:
        if r["advantage"] == next(iter(ADVANTAGES)):
            rows.append([r["predecessors"], r["step"], r["own_step"], r["updates"]])
        changed = f" (+{r['repaired']} -{r['broken']})" if "preopc" in r["advantage"] else ""
        rows[-1].append(percent(r["improved"], 2) + changed)
    text += ["Steps that raise J; +: where the step without correction does not, -: where that does and this does not."]
    return "\n\n".join([*text, table(header, rows)])


if __name__ == "__main__":
    try:
        main(parse_args(Args, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
