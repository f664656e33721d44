"""The scripts' small functions against the paper: Eq. (2), Eq. (6), the adaptive clip, the agent orders, masks, chunks.

Expected numbers were worked out by hand or come from the formulas as the paper prints them (float64 loops over
sums of products), never from another recursion. Each test runs on every script that has the function.
"""

import importlib
import inspect
import math
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import SCRIPTS

A2PO_SCRIPTS = [name for name in SCRIPTS if name.startswith("a2po")]
BASELINES = [name for name in SCRIPTS if not name.startswith("a2po")]
RULES = ["semi-greedy", "greedy", "random", "cyclic", "reverse-greedy", "reverse-semi-greedy"]
DRAWN_RULES = ["semi-greedy", "random", "reverse-semi-greedy"]


def script(name):
    return importlib.import_module(name)


def function_of(name, scripts):
    """Run the test once per script, with that script's function `name` as the fixture of the same name."""
    return pytest.mark.parametrize(
        name, [pytest.param(lambda *a, s=s: getattr(script(s), name)(*a), id=s) for s in scripts]
    )


def scripts_named(prefix):
    return [s for s in SCRIPTS if s.startswith(prefix)]


def scripts_with(name):
    """Run the test once per script that has it, with the script as the fixture."""
    return pytest.mark.parametrize(
        "module", [pytest.param(script(s), id=s) for s in SCRIPTS if hasattr(script(s), name)]
    )


def gae_of(name):
    """A script's GAE: its own function for a baseline, PreOPC with all ratios one for A2PO."""

    def gae(rewards, values, terminated, done, gamma, gae_lambda):
        if name in BASELINES:
            return script(name).gae_advantages(rewards, values, terminated, done, gamma, gae_lambda)
        ones = torch.ones(done.shape)
        return script(name).preopc_advantages(rewards, values, terminated, done, ones, gamma, gae_lambda)

    return gae


every_gae = pytest.mark.parametrize("gae", [pytest.param(gae_of(s), id=s) for s in SCRIPTS])
preopc = function_of("preopc_advantages", A2PO_SCRIPTS + scripts_named("happo"))
vtraces = function_of("vtrace", scripts_named("mappo") + scripts_named("coppo"))
order = function_of("agent_order", A2PO_SCRIPTS)


# ---------------------------------------------------------------- Eq. (2): advantages


def rollout(seed=0, T=12, N=5, n=3, shared=False, p_end=0.15):
    """Random rollout, time-major, in which some steps terminate, some are cut by a time limit."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(T, N, 1 if shared else n, generator=g)
    values = 3 * torch.randn(T + 1, N, n, generator=g)
    terminated = torch.rand(T, N, generator=g) < p_end
    truncated = torch.rand(T, N, generator=g) < p_end
    ratio = torch.exp(0.7 * torch.randn(T, N, generator=g))
    if p_end and T > 1:
        assert terminated.any() and (truncated & ~terminated).any() and (ratio < 1).any() and (ratio > 1).any()
    return rewards, values, terminated, terminated | truncated, ratio


def eq2(rewards, values, terminated, done, ratio, gamma, lam):
    """A_t = delta_t + sum_k gamma^k (prod_{j=1..k} lambda min(1, rho_{t+j})) delta_{t+k}, up to the episode's end."""
    values, ratio, terminated, done = values.double(), ratio.double(), terminated.tolist(), done.tolist()
    rewards = rewards.double().expand(*rewards.shape[:2], values.shape[2])
    T, N, n = rewards.shape
    out = torch.zeros(T, N, n, dtype=torch.float64)
    for e in range(N):
        for i in range(n):
            r, v, rho = rewards[:, e, i].tolist(), values[:, e, i].tolist(), ratio[:, e].tolist()
            delta = [r[t] + (0.0 if terminated[t][e] else gamma * v[t + 1]) - v[t] for t in range(T)]
            for t in range(T):
                total = delta[t]
                for k in range(1, T - t):
                    if any(done[s][e] for s in range(t, t + k)):
                        break
                    product = 1.0
                    for j in range(1, k + 1):
                        product *= lam * min(1.0, rho[t + j])
                    total += gamma**k * product * delta[t + k]
                out[t, e, i] = total
    return out


def gae_from_n_step_returns(rewards, values, terminated, done, gamma, lam):
    """GAE as the lambda-weighted mean of m-step advantages (Schulman et al. 2016, Eq. 16): no deltas involved."""
    values = values.double()
    rewards = rewards.double().expand(*rewards.shape[:2], values.shape[2])
    T, N, _ = rewards.shape
    out = torch.zeros_like(rewards)
    for e in range(N):
        for t in range(T):
            end = next((s for s in range(t, T) if done[s, e]), T - 1)
            m_step, ret = [], torch.zeros_like(values[0, e])
            for m in range(1, end - t + 2):
                ret = ret + gamma ** (m - 1) * rewards[t + m - 1, e]
                tail = 0.0 if terminated[t + m - 1, e] else gamma**m * values[t + m, e]
                m_step.append(ret + tail - values[t, e])
            *shorter, longest = m_step
            out[t, e] = sum((1 - lam) * lam**m * a for m, a in enumerate(shorter)) + lam ** len(shorter) * longest
    return out


def assert_near(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=2e-5)


@preopc
@pytest.mark.parametrize("shared", [False, True], ids=["per-agent-reward", "shared-reward"])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_preopc_is_eq2(preopc_advantages, shared, gamma, lam):
    """Eq. (2) as a float64 double loop; endings by both reasons, ratios on both sides of 1."""
    for seed in range(3):
        batch = rollout(seed, shared=shared)
        out = preopc_advantages(*batch, gamma, lam)
        assert out.shape == (12, 5, 3)
        assert_near(out, eq2(*batch, gamma, lam))


def vtrace_of_the_definition(rewards, values, terminated, done, ratio, gamma, lam):
    """v_t = V_t + sum_k gamma^k (c_t ... c_{t+k-1}) min(1, rho_{t+k}) delta_{t+k}, c = lambda min(1, rho), up to the
    episode's end; A_t = r_t + gamma v_{t+1} - V_t, where v is V after the rollout or a time limit, 0 after the end."""
    values, ratio = values.double(), ratio.double().clamp(max=1.0)
    rewards = rewards.double().expand(*rewards.shape[:2], values.shape[2])
    v, A = values.clone(), torch.zeros_like(rewards)
    T, N, n = rewards.shape
    for e in range(N):
        for t in range(T):
            c = 1.0
            for k in range(T - t):
                successor = 0.0 if terminated[t + k, e] else gamma * values[t + k + 1, e]
                delta = rewards[t + k, e] + successor - values[t + k, e]
                v[t, e] += gamma**k * c * ratio[t + k, e] * delta
                if done[t + k, e]:
                    break
                c *= lam * ratio[t + k, e]
    for e in range(N):
        for t in range(T):
            after = values if done[t, e] else v
            A[t, e] = rewards[t, e] + (0.0 if terminated[t, e] else gamma * after[t + 1, e]) - values[t, e]
    return A, v[:-1]


@vtraces
@pytest.mark.parametrize("shared", [False, True], ids=["per-agent-reward", "shared-reward"])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_vtrace_is_its_definition(vtrace, shared, gamma, lam):
    for seed in range(3):
        batch = rollout(seed, shared=shared)
        found, expected = vtrace(*batch, gamma, lam), vtrace_of_the_definition(*batch, gamma, lam)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == (12, 5, 3)
            assert_near(ours, theirs)


@vtraces
def test_vtrace_of_the_policy_that_sampled(vtrace):
    """With all ratios 1 its targets are those of GAE; with all ratios 0 the targets are the values."""
    rewards, values, terminated, done, ratio = rollout(4)
    batch, ones = (rewards, values, terminated, done), torch.ones_like(ratio)
    _, targets = vtrace(*batch, ones, 0.9, 0.8)
    assert_near(targets, eq2(*batch, ones, 0.9, 0.8) + values[:-1])
    advantages, targets = vtrace(*batch, 0 * ones, 0.9, 0.8)
    assert_near(targets, values[:-1])
    assert_near(advantages, eq2(*batch, 0 * ones, 0.9, 0.8))


@every_gae
@pytest.mark.parametrize("shared", [False, True], ids=["per-agent-reward", "shared-reward"])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_gae_by_two_formulas(gae, shared, gamma, lam):
    """Eq. (2) with all ratios 1 is GAE: as a sum of deltas and as a mean of m-step advantages."""
    for seed in range(3):
        *batch, _ = rollout(seed, shared=shared)
        out = gae(*batch, gamma, lam)
        assert out.shape == (12, 5, 3)
        assert_near(out, gae_from_n_step_returns(*batch, gamma, lam))
        assert_near(out, eq2(*batch, torch.ones(12, 5), gamma, lam))


# (step that ends or None, terminated?) -> A with rho = (9, 1/2, 3), A with rho = 1; all exact in binary
BY_HAND = {
    "no-end": (None, False, (1.375, 3.0, 4.0), (1.75, 3.0, 4.0)),
    "terminated-0": (0, True, (-1.0, 3.0, 4.0), (-1.0, 3.0, 4.0)),
    "truncated-0": (0, False, (1.0, 3.0, 4.0), (1.0, 3.0, 4.0)),
    "terminated-1": (1, True, (0.75, -2.0, 4.0), (0.5, -2.0, 4.0)),
    "truncated-1": (1, False, (1.25, 2.0, 4.0), (1.5, 2.0, 4.0)),
    "terminated-2": (2, True, (1.125, 1.0, -4.0), (1.25, 1.0, -4.0)),
    "truncated-2": (2, False, (1.375, 3.0, 4.0), (1.75, 3.0, 4.0)),
}


def hand_rollout(end, is_terminal):
    """r = 1, 2, 4 and V = 2, 4, 8, 16: with gamma 1/2 the deltas are 1, 2, 4, less 2, 4, 8 where it terminates."""
    terminated, done = torch.zeros(3, 1, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.bool)
    if end is not None:
        terminated[end], done[end] = is_terminal, True
    return torch.tensor([1.0, 2, 4]).view(3, 1, 1), torch.tensor([2.0, 4, 8, 16]).view(4, 1, 1), terminated, done


@preopc
@pytest.mark.parametrize("case", BY_HAND)
def test_preopc_by_hand(preopc_advantages, case):
    """Eq. (2), three steps in literal numbers, gamma = lambda = 1/2; a time limit bootstraps and cuts the trace."""
    end, is_terminal, expected, _ = BY_HAND[case]
    ratio = torch.tensor([9.0, 0.5, 3.0]).view(3, 1)
    assert preopc_advantages(*hand_rollout(end, is_terminal), ratio, 0.5, 0.5).flatten().tolist() == list(expected)


@every_gae
@pytest.mark.parametrize("case", BY_HAND)
def test_gae_by_hand(gae, case):
    """GAE, three steps in literal numbers, gamma = lambda = 1/2."""
    end, is_terminal, _, expected = BY_HAND[case]
    assert gae(*hand_rollout(end, is_terminal), 0.5, 0.5).flatten().tolist() == list(expected)


@every_gae
def test_lambda_one_is_monte_carlo(gae):
    """lambda = 1: the discounted sum of rewards to the end, plus the last value, minus the first."""
    rewards, values, terminated, done, _ = rollout(T=4, N=2, n=2, p_end=0.0)
    expected = rewards[0] + 0.9 * rewards[1] + 0.81 * rewards[2] + 0.729 * rewards[3] + 0.6561 * values[4] - values[0]
    assert_near(gae(rewards, values, terminated, done, 0.9, 1.0)[0], expected)


@preopc
def test_gamma_zero_leaves_reward_minus_value(preopc_advantages):
    """Eq. (2) with gamma = 0: A_t = r_t - V(s_t), whatever the ratios."""
    rewards, values, *rest = rollout(1)
    assert_near(preopc_advantages(rewards, values, *rest, 0.0, 0.95), rewards - values[:-1])


@preopc
def test_lambda_zero_leaves_one_step_error(preopc_advantages):
    """Eq. (2) with lambda = 0: A_t = delta_t, whatever the ratios."""
    rewards, values, terminated, done, ratio = rollout(2)
    delta = rewards + 0.99 * values[1:].where(~terminated.unsqueeze(-1), torch.zeros(())) - values[:-1]
    assert_near(preopc_advantages(rewards, values, terminated, done, ratio, 0.99, 0.0), delta)


@preopc
@pytest.mark.parametrize("terminated, expected", [(True, -1.0), (False, 7.0)])
def test_single_step(preopc_advantages, terminated, expected):
    """Eq. (2) with T = 1: 1 + 0.5 * 16 - 2 unless the step terminates; its own ratio is not used."""
    end = torch.tensor([[terminated]])
    rewards, values, ratio = torch.ones(1, 1, 1), torch.tensor([2.0, 16]).view(2, 1, 1), torch.full((1, 1), 0.1)
    out = preopc_advantages(rewards, values, end, end, ratio, 0.5, 0.9)
    assert out.flatten().tolist() == [expected]


@preopc
def test_weight_is_the_ratio_of_the_next_step(preopc_advantages):
    """Eq. (2): j starts at 1, so rho_t does not enter A_t, and rho_{t+1} weighs A_{t+1}."""
    rewards, values, terminated, done, _ = rollout(3, T=4, p_end=0.0)
    ones = preopc_advantages(rewards, values, terminated, done, torch.ones(4, 5), 0.9, 0.8)
    delta = rewards + 0.9 * values[1:] - values[:-1]
    for t in range(4):
        ratio = torch.ones(4, 5)
        ratio[t] = 0.25
        out = preopc_advantages(rewards, values, terminated, done, ratio, 0.9, 0.8)
        assert_near(out[t:], ones[t:])
        if t > 0:
            assert_near(out[t - 1], delta[t - 1] + 0.9 * 0.8 * 0.25 * ones[t])


@preopc
def test_ratio_zero_cuts_the_trace(preopc_advantages):
    """Eq. (2): with rho_{t+1} = 0 nothing of the future but V(s_{t+1}) remains."""
    rewards, values, terminated, done, _ = rollout(4, p_end=0.0)
    out = preopc_advantages(rewards, values, terminated, done, torch.zeros(12, 5), 0.9, 0.8)
    assert_near(out, rewards + 0.9 * values[1:] - values[:-1])


@preopc
@pytest.mark.parametrize("large", [1.001, 7.0, 1e30])
def test_ratio_is_truncated_at_one(preopc_advantages, large):
    """Eq. (2): min(1, rho), so a ratio above 1 counts as 1; below there is no lower limit."""
    rewards, values, terminated, done, ratio = rollout(5)
    above = torch.where(ratio > 1, torch.full_like(ratio, large), ratio / 50)
    at_one = torch.where(ratio > 1, torch.ones_like(ratio), ratio / 50)
    out = preopc_advantages(rewards, values, terminated, done, above, 0.99, 0.95)
    assert_near(out, eq2(rewards, values, terminated, done, at_one, 0.99, 0.95))


@preopc
def test_lambda_enters_once(preopc_advantages):
    """Eq. (2): the weight of delta_{t+1} is gamma * lambda * rho; linear, not quadratic, in lambda."""
    rewards, values, terminated, done, _ = rollout(6, T=2, p_end=0.0)
    ratio = torch.full((2, 5), 0.5)
    low, high = (preopc_advantages(rewards, values, terminated, done, ratio, 0.9, lam)[0] for lam in (0.4, 0.8))
    delta = rewards + 0.9 * values[1:] - values[:-1]
    assert_near(high - low, 0.9 * 0.4 * 0.5 * delta[1])
    assert_near(2 * low - high, delta[0])


@preopc
@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminated", "truncated"])
def test_filler_step_does_not_leak(preopc_advantages, is_terminal):
    """Next-step autoreset: the step after an end and the next episode do not reach back; V of the final state may."""
    rewards, values, terminated, done, ratio = rollout(7, T=6, p_end=0.0)
    terminated[1], done[1] = is_terminal, True
    before = preopc_advantages(rewards, values, terminated, done, ratio, 0.99, 0.95)[:2]
    rewards, values, ratio = rewards.clone(), values.clone(), ratio.clone()
    rewards[2:], values[3:], ratio[2:] = 1e4, -1e4, 1e-3
    assert_near(preopc_advantages(rewards, values, terminated, done, ratio, 0.99, 0.95)[:2], before)
    values[2] += 1.0
    moved = preopc_advantages(rewards, values, terminated, done, ratio, 0.99, 0.95)[1] - before[1]
    assert_near(moved, torch.full_like(moved, 0.0 if is_terminal else 0.99))


@preopc
def test_preopc_leaves_its_inputs_alone(preopc_advantages):
    """The same rollout is corrected again for every agent, so nothing may be written into it."""
    batch = rollout(8)
    copies = [x.clone() for x in batch]
    preopc_advantages(*batch, 0.99, 0.95)
    assert all(torch.equal(x, c) for x, c in zip(batch, copies, strict=True))


# ---------------------------------------------------------------- Eq. (6) and the baselines' rows: surrogates

# ratio, preceding ratio, advantage -> value, d value / d ratio; eps = 0.2: inner range 0.9..1.1, outer 0.8..1.2
EQ6_CASES = {
    "nothing-clipped A>0": (1.1, 1.0, 2.0, 2.2, 2.0),
    "nothing-clipped A<0": (1.1, 1.05, -2.0, -2.31, -2.1),
    "nothing-clipped g<1": (0.9, 0.95, 2.0, 1.71, 1.9),
    "inner-high A>0": (1.0, 1.5, 2.0, 2.2, 2.2),
    "inner-high A<0": (1.0, 1.5, -2.0, -2.2, -2.2),
    "inner-low A>0": (1.0, 0.5, 2.0, 1.8, 1.8),
    "inner-low A<0": (1.0, 0.5, -2.0, -1.8, -1.8),
    "inner-is-half-of-eps high": (1.0, 1.15, 2.0, 2.2, 2.2),
    "inner-is-half-of-eps low": (1.0, 0.85, 2.0, 1.8, 1.8),
    "outer-high A>0": (1.5, 1.0, 2.0, 2.4, 0.0),
    "outer-high A<0": (1.5, 1.0, -2.0, -3.0, -2.0),
    "outer-low A>0": (0.5, 1.0, 2.0, 1.0, 2.0),
    "outer-low A<0": (0.5, 1.0, -2.0, -1.6, 0.0),
    "both-high A>0": (1.3, 2.0, 2.0, 2.4, 0.0),
    "both-high A<0": (1.3, 2.0, -2.0, -2.86, -2.2),
    "both-low A>0": (0.7, 0.1, 2.0, 1.26, 1.8),
    "both-low A<0": (0.7, 0.1, -2.0, -1.6, 0.0),
    "inner-low outer-high A>0": (1.6, 0.5, 2.0, 2.4, 0.0),
    "inner-high outer-low A<0": (0.6, 5.0, -2.0, -1.6, 0.0),
    "preceding-push-out A>0": (1.15, 1.5, 2.0, 2.4, 0.0),
    "preceding-pull-in A>0": (1.25, 0.92, 2.0, 2.3, 1.84),
}
# the same without a preceding ratio
PPO_CASES = {
    "inside A>0": (1.1, 2.0, 2.2, 2.0),
    "inside A<0": (0.9, -2.0, -1.8, -2.0),
    "high A>0": (1.5, 2.0, 2.4, 0.0),
    "high A<0": (1.5, -2.0, -3.0, -2.0),
    "low A>0": (0.5, 2.0, 1.0, 2.0),
    "low A<0": (0.5, -2.0, -1.6, 0.0),
}
# HAPPO: the product scales the advantage, M = product * A, and neither clip sees it
HAPPO_CASES = {
    "inside, large product": (1.1, 3.0, 2.0, 6.6, 6.0),
    "inside, small product": (0.9, 0.1, 2.0, 0.18, 0.2),
    "inside A<0": (1.1, 3.0, -2.0, -6.6, -6.0),
    "high A>0": (1.5, 3.0, 2.0, 7.2, 0.0),
    "high A<0": (1.5, 3.0, -2.0, -9.0, -6.0),
    "low A>0": (0.5, 0.1, 2.0, 0.1, 0.2),
    "low A<0": (0.5, 0.1, -2.0, -0.16, 0.0),
    "product-does-not-push-out": (1.15, 1.5, 2.0, 3.45, 3.0),
    "product-does-not-pull-in": (1.25, 0.92, 2.0, 2.208, 0.0),
}
product_surrogate = function_of("clipped_surrogate", A2PO_SCRIPTS + scripts_named("coppo"))


def value_and_gradient(surrogate, ratio, *rest, clip_coef=0.2):
    """Surrogate and its derivative by the ratio, in float64."""
    ratio = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    value = surrogate(ratio, *(torch.tensor(x, dtype=torch.float64) for x in rest), clip_coef)
    assert value.shape == ratio.shape, "per sample, before the mean"
    value.sum().backward()
    return value.tolist(), ratio.grad.tolist()


@product_surrogate
@pytest.mark.parametrize("case", EQ6_CASES)
def test_eq6_by_hand(clipped_surrogate, case):
    """Eq. (6), to be maximised: min(l A, clip(l, 1 +- eps) A), l = ratio * clip(preceding, 1 +- eps/2)."""
    ratio, preceding, advantage, *expected = EQ6_CASES[case]
    assert value_and_gradient(clipped_surrogate, ratio, preceding, advantage) == pytest.approx(expected, abs=1e-12)


@product_surrogate
def test_eq6_uses_the_clip_it_is_given(clipped_surrogate):
    """Eq. (6) with eps = 0.1: inner range 0.95..1.05, outer 0.9..1.1."""
    ratio, preceding, advantage = [1.0, 1.0, 1.08, 1.15, 0.85], [1.5, 0.5, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, -2.0]
    value, gradient = value_and_gradient(clipped_surrogate, ratio, preceding, advantage, clip_coef=0.1)
    assert value == pytest.approx([2.1, 1.9, 2.16, 2.2, -1.8])
    assert gradient == pytest.approx([2.1, 1.9, 2.0, 0.0, 0.0])


@product_surrogate
def test_eq6_is_per_sample(clipped_surrogate):
    """Eq. (6) on a (T, N, n) batch: every sample as if alone; only the clipped ones lose their gradient."""
    columns = [torch.tensor(c).view(3, 7, 1).tolist() for c in zip(*EQ6_CASES.values(), strict=True)]
    value, gradient = value_and_gradient(clipped_surrogate, *columns[:3])
    torch.testing.assert_close(torch.tensor(value), torch.tensor(columns[3]))
    torch.testing.assert_close(torch.tensor(gradient), torch.tensor(columns[4]))


@function_of("clipped_surrogate", A2PO_SCRIPTS + scripts_named("coppo") + scripts_named("happo"))
@pytest.mark.parametrize("preceding", [0.5, 0.97, 1.05, 1.5])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_no_gradient_through_the_other_agents(clipped_surrogate, preceding, advantage):
    """Eq. (6): g is a constant, also where its own clip is not active; and so is the product in HAPPO's M."""
    ratio = torch.tensor(1.02, requires_grad=True)
    others = torch.tensor(preceding, requires_grad=True)
    clipped_surrogate(ratio, others, torch.tensor(advantage), 0.2).backward()
    assert ratio.grad != 0
    assert others.grad is None or others.grad == 0


@function_of("clipped_surrogate", scripts_named("mappo") + scripts_named("rpisa"))
@pytest.mark.parametrize("case", PPO_CASES)
def test_mappo_by_hand(clipped_surrogate, case):
    """MAPPO: min(r A, clip(r, 1 +- eps) A), eps = 0.2."""
    ratio, advantage, *expected = PPO_CASES[case]
    assert value_and_gradient(clipped_surrogate, ratio, advantage) == pytest.approx(expected, abs=1e-12)


@function_of("clipped_surrogate", scripts_named("happo"))
@pytest.mark.parametrize("case", HAPPO_CASES)
def test_happo_by_hand(clipped_surrogate, case):
    """HAPPO: min(r M, clip(r, 1 +- eps) M), M = A * product of the preceding ratios, unclipped; eps = 0.2."""
    ratio, preceding, advantage, *expected = HAPPO_CASES[case]
    assert value_and_gradient(clipped_surrogate, ratio, preceding, advantage) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", A2PO_SCRIPTS + scripts_named("coppo") + scripts_named("happo"))
@pytest.mark.parametrize("case", PPO_CASES)
def test_first_agent_is_ppo(name, case):
    """With nobody before it (product 1), every method's agent has PPO's objective."""
    ratio, advantage, *expected = PPO_CASES[case]
    result = value_and_gradient(script(name).clipped_surrogate, ratio, 1.0, advantage)
    assert result == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", SCRIPTS)
def test_clip_coef_sets_the_outer_range(name):
    """Every surrogate with eps = 0.05 and no other agents: 1.1 is cut to 1.05, 1.04 is not."""
    rest = ([2.0, 2.0],) if name.startswith(("mappo", "rpisa")) else ([1.0, 1.0], [2.0, 2.0])
    value, gradient = value_and_gradient(script(name).clipped_surrogate, [1.1, 1.04], *rest, clip_coef=0.05)
    assert value == pytest.approx([2.1, 2.08]) and gradient == pytest.approx([0.0, 2.0])


# ---------------------------------------------------------------- adaptive clipping


@function_of("adaptive_clip", A2PO_SCRIPTS)
@pytest.mark.parametrize("clip, position, n, c, expected", [
    (0.2, 1, 4, 0.5, 0.125), (0.2, 2, 4, 0.5, 0.15), (0.2, 3, 4, 0.5, 0.175), (0.2, 4, 4, 0.5, 0.2),
    (0.05, 1, 2, 0.5, 0.0375), (0.3, 1, 3, 0.8, 0.26), (0.3, 2, 3, 0.2, 0.22),
    (0.2, 1, 4, 1.0, 0.2), (0.2, 3, 4, 1.0, 0.2), (0.2, 1, 4, 0.0, 0.05), (0.2, 3, 4, 0.0, 0.15),
    (0.25, 5, 5, 0.3, 0.25), (0.25, 1, 1, 0.5, 0.25),
])  # fmt: skip
def test_adaptive_clip(adaptive_clip, clip, position, n, c, expected):
    """C(eps, k) = eps c + eps (1 - c) k / n, k = 1..n: c = 1 switches it off, the last position gets eps itself."""
    assert float(adaptive_clip(clip, position, n, c)) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------- agent selection rules

SCORES = [0.3, 2.5, 0.1, 9.0, 1.2, 0.7]
DESCENDING = [3, 1, 4, 5, 0, 2]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_uniform(counts, cells):
    """Chi-square against equal cells; the limit is five sigma of its normal approximation (Wilson-Hilferty)."""
    expected = sum(counts.values()) / cells
    statistic = sum((c - expected) ** 2 / expected for c in counts.values()) + (cells - len(counts)) * expected
    df = cells - 1
    assert statistic < df * (1 - 2 / (9 * df) + 5 * (2 / (9 * df)) ** 0.5) ** 3, counts


def count(items):
    items = list(items)
    return {x: items.count(x) for x in set(items)}


@order
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 2, 3, 6, 27])
def test_order_is_a_permutation(agent_order, rule, n):
    """Every agent is updated once; plain ints; also when all scores are equal or zero."""
    generator = seeded()
    for scores in (torch.rand(n, generator=seeded(n)), torch.zeros(n), torch.full((n,), 1e6)):
        result = agent_order(scores, rule, generator)
        assert isinstance(result, list) and all(type(i) is int for i in result)
        assert sorted(result) == list(range(n))


@order
@pytest.mark.parametrize(
    "rule, expected", [("greedy", DESCENDING), ("reverse-greedy", DESCENDING[::-1]), ("cyclic", [0, 1, 2, 3, 4, 5])]
)
def test_deterministic_orders(agent_order, rule, expected):
    """Greedy: largest E|A| first; reverse-greedy: smallest first; cyclic: as numbered. No draw changes them."""
    generator = seeded()
    assert all(agent_order(torch.tensor(SCORES), rule, generator) == expected for _ in range(5))


@order
@pytest.mark.parametrize("rule, best", [("semi-greedy", max), ("reverse-semi-greedy", min)])
@pytest.mark.parametrize("n", [5, 6])
def test_semi_greedy(agent_order, rule, best, n):
    """Positions from 0: even ones take the largest (reverse: smallest) left, odd ones are uniform over those left."""
    generator, scores, odd_choices = seeded(1), SCORES[:n], []
    for _ in range(4000):
        left, ranks = list(range(n)), []
        for position, agent in enumerate(agent_order(torch.tensor(scores), rule, generator)):
            if position % 2 == 0:
                assert agent == best(left, key=lambda i: scores[i])
            else:
                ranks.append(left.index(agent))
            left.remove(agent)
        odd_choices.append(tuple(ranks[:2]))
    assert_uniform(count(odd_choices), cells=(n - 1) * (n - 3))


@order
def test_random_is_uniform_over_permutations(agent_order):
    """Random: each of the 24 orders of four agents equally often, whatever their scores."""
    generator = seeded(2)
    orders = (tuple(agent_order(torch.tensor(SCORES[:4]), "random", generator)) for _ in range(4800))
    assert_uniform(count(orders), cells=24)


@order
@pytest.mark.parametrize("rule", DRAWN_RULES)
def test_order_depends_on_the_generator_alone(agent_order, rule):
    """Same generator state, same order, whatever the global random states, which stay untouched (resuming a run)."""
    scores, runs = torch.tensor(SCORES), []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        random.seed(global_seed)
        states = torch.get_rng_state(), random.getstate()
        generator = seeded(3)
        runs.append([agent_order(scores, rule, generator) for _ in range(20)])
        assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert runs[0] == runs[1]
    assert len(count(map(tuple, runs[0]))) > 1
    generator = seeded(3)
    agent_order(scores, rule, generator)
    state = generator.get_state()
    assert agent_order(scores, rule, generator) == runs[0][1]
    generator.set_state(state)
    assert agent_order(scores, rule, generator) == runs[0][1]


@order
@pytest.mark.parametrize("rule", RULES)
def test_order_leaves_the_scores_alone(agent_order, rule):
    """Scores are logged afterwards: marking chosen agents must happen on a copy."""
    scores = torch.tensor(SCORES)
    agent_order(scores, rule, seeded())
    assert scores.tolist() == torch.tensor(SCORES).tolist()


# ---------------------------------------------------------------- masks: what is no sample


@scripts_with("masked_mean")
def test_masked_gradient(module):
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
        advantages = module.normalize_advantages(advantages, mask)
        extra = [] if module.__name__.startswith(("mappo", "rpisa")) else [torch.ones(6, 5)]
        surrogate = module.clipped_surrogate(log_ratio.exp(), *extra, advantages, 0.2)
        losses = module.value_loss(values, old_values, targets, 0.2, 10.0)
        (module.masked_mean(losses, mask) - module.masked_mean(surrogate, mask)).backward()
        return torch.cat([new.grad, values.grad]), torch.cat([mask, mask])

    clean, mask = gradient(None)
    assert torch.equal(gradient(0)[0], clean) and (clean[mask == 0] == 0).all()
    assert not torch.equal(gradient(1)[0], clean)


@scripts_with("normalize_advantages")
def test_normalised_advantages(module):
    """Mean 0 and deviation 1 over the samples alone."""
    x, mask = torch.tensor([1.0, 3.0, 5.0, 100.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    expected = torch.tensor([-1.0, 0.0, 1.0]) * math.sqrt(3 / 2)
    torch.testing.assert_close(module.normalize_advantages(x, mask)[:3], expected, atol=1e-4, rtol=0)
    assert module.masked_mean(x, mask) == 3.0 and module.masked_mean(x, 0 * mask) == 0.0
    two, sample = torch.stack([x, 2 * x]), torch.stack([mask, 1 - mask])
    assert module.masked_mean(two, sample, dim=1).tolist() == [3.0, 200.0]


@scripts_with("values_for_the_dead")
def test_team_values(module):
    """The dead get the living's mean value, and zero where nobody lives."""
    values, alive = torch.tensor([[1.0, 3.0, 50.0], [7.0, 8.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert module.values_for_the_dead(values, alive).tolist() == [[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]]


@scripts_with("masked_policy")
def test_masked_policy(module):
    """Unavailable actions have probability 0 and are never drawn; the entropy is that of the others. Where none is
    available, all there is are numbers: what is no sample is multiplied by 0, which NaN would survive."""
    logits, mask = torch.tensor([50.0, 1.0, 1.0, -3.0]).expand(500, 4), torch.tensor([False, True, True, False])
    policy = module.masked_policy(logits, mask.expand(500, 4))
    assert set(policy.sample().tolist()) == {1, 2}
    torch.testing.assert_close(policy.entropy()[0], torch.tensor(math.log(2.0)))
    nothing = module.masked_policy(logits, torch.zeros(500, 4))
    assert nothing.entropy().isfinite().all() and nothing.log_prob(nothing.sample()).isfinite().all()


# ---------------------------------------------------------------- values: the loss, the normaliser, what is logged


@scripts_with("value_loss")
@pytest.mark.parametrize(
    "value, old, target, expected",
    [
        (0.1, 0.0, 0.5, 0.08),  # inside the clip: 0.5 * 0.4^2
        (0.4, 0.0, 0.5, 0.045),  # clipped to 0.2, where the loss is larger: 0.5 * 0.3^2
        (0.9, 0.0, 0.5, 0.08),  # clipped to 0.2, where the loss is smaller: 0.5 * 0.4^2
        (3.0, 3.0, 0.0, 2.5),  # beyond delta = 1: 1 * (3 - 0.5)
        (-3.0, -3.0, 0.0, 2.5),
    ],
)
def test_value_loss_by_hand(module, value, old, target, expected):
    """The worse of free and clipped value; square up to delta, a line beyond."""
    loss = module.value_loss(*(torch.tensor(x) for x in (value, old, target)), 0.2, 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@scripts_with("ValueNormalizer")
def test_value_normalizer(module):
    """Debiased decaying means; to units of 1 std and back; nothing new from nothing; a floor under the variance."""
    normalizer, weights, data = module.ValueNormalizer(beta=0.9), [], []
    assert [x.item() for x in normalizer.statistics()] == pytest.approx([0.0, 0.1])
    for batch in torch.randn(5, 7, generator=seeded()) * 3 + 2:
        normalizer.update(batch)
        weights, data = [0.9 * w for w in weights] + [0.1], [*data, batch.double()]
        total, whole = sum(weights), list(zip(weights, data, strict=True))
        mean = sum(w * x.mean() for w, x in whole) / total
        variance = sum(w * (x**2).mean() for w, x in whole) / total - mean**2
        assert [x.item() for x in normalizer.statistics()] == pytest.approx([mean.item(), variance.sqrt().item()])
    before = normalizer.moments.clone()
    normalizer.update(torch.empty(0))
    assert torch.equal(normalizer.moments, before)
    x = torch.randn(4)
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(x)), x)
    mean, std = normalizer.statistics()
    torch.testing.assert_close(normalizer.normalize(x), (x - mean) / std)


@scripts_with("explained_variance")
def test_explained_variance(module):
    """1 - Var(target - value) / Var(target), of the samples alone; 0 where there is no variance."""
    values, targets = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([1.0, 3.0, 5.0, -70.0])
    sample = torch.tensor([1.0, 1.0, 1.0, 0.0])
    explained = module.explained_variance(targets - values, targets, sample)
    assert explained.item() == pytest.approx(1 - 1 / 4)
    constant = torch.full((4,), 3.0)
    assert module.explained_variance(constant - values, constant, sample) == 0
    assert module.explained_variance(0 * constant, constant, sample) == 0


# ---------------------------------------------------------------- chunks of the rollout for recurrent networks


def unfolded(network, inputs, hidden, start, sample, L):
    """Each chunk of each agent by itself, one after the other."""
    T, N, k = sample.shape
    rows = []
    for t in range(0, T, L):
        for e in range(N):
            for i in range(k):
                outputs, _ = network(
                    inputs[t : t + L, e, i][:, None], hidden[t, e, i][None], start[t : t + L, e][:, None]
                )
                rows.append((t, e, i, outputs[:, 0]))
    return rows


def chunky(module):
    """A network; inputs and states of three agents in two environments, with a last look after step 12; the rollout."""
    torch.manual_seed(0)
    T, N, n, L, H = 12, 2, 3, 4, 8
    network = module.RecurrentNetwork(5, 4, H, gain=1.0)
    inputs, hidden, start = torch.randn(T + 1, N, n, 5), torch.randn(T + 1, N, n, H), torch.zeros(T + 1, N)
    start[0, 0] = start[2, 1] = start[4, 0] = start[7, 1] = start[10, 0] = 1
    sample = torch.ones(T, N, n)
    sample[4:8, 1, 2] = sample[0, 0, 0] = sample[5:8, 0, 1] = 0
    return network, inputs, hidden, SimpleNamespace(start=start, sample=sample, chunk_length=L)


@scripts_with("run_chunks")
def test_chunks_are_run_by_themselves(module):
    """Outputs are those of each chunk alone, from the state stored before it; a chunk without samples gives zeros."""
    network, inputs, hidden, rollout = chunky(module)
    everyone = module.run_chunks(network, inputs, hidden, rollout, torch.arange(3))
    assert everyone.shape == (12, 2, 3, 4)
    for t, e, i, expected in unfolded(network, inputs[:12], hidden, rollout.start, rollout.sample, 4):
        if rollout.sample[t : t + 4, e, i].any():
            torch.testing.assert_close(everyone[t : t + 4, e, i], expected)
        else:
            assert (t, e, i) == (4, 1, 2) and (everyone[t : t + 4, e, i] == 0).all()
    for agents in ([2, 0], [1]):
        outputs = module.run_chunks(network, inputs, hidden, rollout, torch.tensor(agents))
        torch.testing.assert_close(outputs, everyone[:, :, agents])
    # Without a last look, and with one chunk.
    first = SimpleNamespace(start=rollout.start[:4], sample=rollout.sample[:4], chunk_length=4)
    outputs = module.run_chunks(network, inputs[:4], hidden[:4], first, torch.arange(3))
    torch.testing.assert_close(outputs, everyone[:4])


@scripts_with("run_chunks")
def test_gradients_stop_at_the_borders_of_chunks(module):
    """An output depends on its own chunk's inputs up to its step, and, through the stored state, on none before."""
    network, inputs, hidden, rollout = chunky(module)
    inputs.requires_grad_()
    begin, rollout.start = rollout.start, 0 * rollout.start
    outputs = module.run_chunks(network, inputs, hidden, rollout, torch.tensor([2, 0]))
    outputs[10, 1, 0].sum().backward()
    reached = (inputs.grad != 0).any(-1).nonzero().tolist()
    assert reached == [[8, 1, 2], [9, 1, 2], [10, 1, 2]]
    inputs.grad, rollout.start = None, begin
    outputs = module.run_chunks(network, inputs, hidden, rollout, torch.tensor([2, 0]))
    outputs[10, 0, 0].sum().backward()
    assert (inputs.grad != 0).any(-1).nonzero().tolist() == [[10, 0, 2]], "an episode begins there"


@scripts_with("run_chunks")
def test_policy_change_of_a_policy_that_has_not_changed(module):
    """Chunks replay the rollout, with episodes that start inside them: all ratios are 1, for any agents at hand."""
    if not hasattr(module, "masked_policy"):
        pytest.skip("continuous actions")
    T, N, n, H = 12, 2, 3, 8
    torch.manual_seed(0)
    actor = module.RecurrentNetwork(5, 4, H, gain=1.0)
    start = torch.zeros(T + 1, N)
    start[0, 0] = start[2, 1] = start[4, 0] = start[7, 1] = start[10, 0] = 1
    action_mask = torch.ones(T + 1, N, n, 4, dtype=torch.bool)
    action_mask[::2, ..., 1] = False
    sample = torch.ones(T, N, n)
    sample[5:9, 1, 2] = 0
    rollout = SimpleNamespace(chunk_length=4, obs=torch.randn(T + 1, N, n, 5), start=start, action_mask=action_mask)
    hidden, steps = torch.randn(N, n, H), []
    for t in range(T):
        seen = {"obs": rollout.obs[t], "action_mask": action_mask[t], "start": start[t]}
        before = hidden
        actors = [actor] if "actors" in inspect.signature(module.act).parameters else actor
        actions, log_probs, hidden = module.act(actors, seen, hidden)
        begun = before * (1 - start[t]).view(N, 1, 1)
        expected = actor.gru(actor.base(rollout.obs[t]).view(-1, H), begun.view(-1, H)).view(N, n, H)
        torch.testing.assert_close(hidden, expected)
        policy = module.masked_policy(actor.head(expected), action_mask[t])
        torch.testing.assert_close(log_probs, policy.log_prob(actions))
        steps.append((actions, log_probs, before))
    rollout.actions, rollout.log_probs, rollout.actor_hidden = map(torch.stack, zip(*steps, strict=True))
    rollout.sample = sample
    for agents in ([0, 1, 2], [2, 0], [1]):
        log_ratio, entropy = module.policy_change(actor, rollout, torch.tensor(agents))
        assert log_ratio.shape == entropy.shape == (T, N, len(agents))
        torch.testing.assert_close(log_ratio, torch.zeros_like(log_ratio), atol=1e-6, rtol=0)
    rollout.log_probs = rollout.log_probs - 0.5
    log_ratio, _ = module.policy_change(actor, rollout, torch.tensor([2, 0]))
    torch.testing.assert_close(log_ratio, 0.5 * sample[..., [2, 0]], atol=1e-6, rtol=0)
    rollout.log_probs = rollout.log_probs - 99.0
    log_ratio, _ = module.policy_change(actor, rollout, torch.tensor([1]))
    assert torch.isfinite(log_ratio.exp()).all() and (log_ratio == 20 * sample[..., [1]]).all()
    assert log_ratio.requires_grad


def gru_step(x, h, gru):
    """Cho et al. (2014), in PyTorch's order of the gates: reset, update, new."""
    (xr, xz, xn), (hr, hz, hn) = (
        (weight @ v + bias).chunk(3)
        for weight, bias, v in ((gru.weight_ih, gru.bias_ih, x), (gru.weight_hh, gru.bias_hh, h))
    )
    z = torch.sigmoid(xz + hz)
    return (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h


@pytest.mark.parametrize("deep", [False, True])
@scripts_with("RecurrentNetwork")
def test_the_recurrent_network_layer_by_layer(module, deep):
    """Two layers, GRU, head; deep: three layers, GRU, a layer, head. Orthogonal, gain sqrt(2), the head's as given."""
    torch.manual_seed(0)
    network = module.RecurrentNetwork(6, 3, 8, 0.5, deep=deep).double()
    linear = [part for part in network.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linear) == (5 if deep else 3)
    for layer, gain in zip(linear, [math.sqrt(2)] * (len(linear) - 1) + [0.5], strict=True):
        W = layer.weight
        small = W @ W.T if len(W) <= W.shape[1] else W.T @ W
        torch.testing.assert_close(small, gain**2 * torch.eye(len(small)).double(), atol=1e-5, rtol=0)
    for weight in (network.gru.weight_ih, network.gru.weight_hh):
        torch.testing.assert_close(weight.T @ weight, torch.eye(8).double(), atol=1e-5, rtol=0)
    assert not network.gru.bias_ih.any() and not network.gru.bias_hh.any()
    with torch.no_grad():
        for parameter in network.parameters():  # biases, too, shall matter
            parameter += 0.1 * torch.randn_like(parameter)
    norms = [part for part in network.modules() if isinstance(part, torch.nn.LayerNorm)]
    inputs, hidden = torch.randn(4, 6).double(), torch.randn(8).double()
    outputs, states = network(inputs[:, None], hidden[None], torch.tensor([[0.0], [0.0], [1.0], [0.0]]))

    def normed(x, norm):
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias

    before = 3 if deep else 2
    for t in range(4):
        x = normed(inputs[t], norms[0])
        for k in range(before):
            x = normed((linear[k].weight @ x + linear[k].bias).clamp(min=0), norms[1 + k])
        hidden = gru_step(x, hidden if t != 2 else torch.zeros(8).double(), network.gru)
        x = normed(hidden, norms[1 + before])
        for k in range(before, len(linear) - 1):
            x = normed((linear[k].weight @ x + linear[k].bias).clamp(min=0), norms[2 + k])
        torch.testing.assert_close(outputs[t, 0], linear[-1].weight @ x + linear[-1].bias)
        torch.testing.assert_close(states[t, 0], hidden)


@scripts_with("RecurrentNetwork")
def test_without_recurrence_there_is_no_memory(module):
    """recurrent=False: every step is as if it were an episode's first."""
    torch.manual_seed(0)
    inputs, hidden = torch.randn(5, 3, 4), torch.randn(3, 8)
    try:
        network = module.RecurrentNetwork(4, 2, 8, 1.0, recurrent=False)
    except TypeError:
        pytest.skip("has no such option")
    outputs, _ = network(inputs, hidden, torch.zeros(5, 3))
    each = [network(x[None], 0 * hidden, torch.zeros(1, 3))[0][0] for x in inputs]
    torch.testing.assert_close(outputs, torch.stack(each))
    network.recurrent = True
    assert not torch.allclose(network(inputs, hidden, torch.zeros(5, 3))[0], outputs)
    torch.testing.assert_close(network(inputs, hidden, torch.ones(5, 3))[0], outputs)
