"""Football's training: the update with own and with shared parameters on a small game of ours against plain loops, and
runs on the engine. On every script, except where they share what is tested."""

import contextlib
import dataclasses
import os
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from helpers import (
    LARGE,
    SCRIPTS,
    Skirmish,
    assert_same_training,
    differences,
    evaluations,
    in_double,
    leaves,
    load,
    orders,
    scalars,
)
from reference import Reference
from test_train_smac import Clockwork, Counter

import a2po_grf

GRF_SCRIPTS = [name for name in SCRIPTS if name.endswith("_grf")]
own_and_shared = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
engine = pytest.mark.skipif(not a2po_grf.find_football(), reason="gfootball is not installed, the README says how")
CRASHES = {(7, 0), (12, 1), (13, 0)}  # within an episode, at the start of a rollout, where a game should begin
# The options are such that both clips, the line of the value loss and the norm matter.
SMALL = {"scenario": "academy_3_vs_1_with_keeper", "total_timesteps": 40, "num_envs": 3, "ent_coef": 0.1}
SMALL |= {"clip_adaptation": 0.25, "clip_coef": 0.03, "max_grad_norm": 0.15}
NUMBERS = dict.fromkeys(("score", "goal", "lost", "assist", "pass", "attempts"), 1.0)


class Half(gym.vector.VectorEnv):
    """A part of a Skirmish's environments; a step of all is played when it comes to the first part's results."""

    metadata = Skirmish.metadata

    def __init__(self, whole, part):
        self.whole, self.part, self.num_envs = whole, part, len(range(whole.num_envs)[part])
        self.single_observation_space, self.single_action_space = (
            whole.single_observation_space,
            whole.single_action_space,
        )
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)

    def mine(self, obs):
        return {name: value[self.part].copy() for name, value in obs.items()}

    def reset(self, *, seed=None, options=None):
        if self.part.start == 0:
            self.whole.reset()
            self.whole.asked = np.zeros(self.whole.action_space.shape, int)
        return self.mine(self.whole.seen), {}

    def step_async(self, actions):
        self.whole.asked[self.part] = actions

    def step_wait(self):
        if self.part.start == 0:
            self.whole.results = self.whole.step(self.whole.asked.copy())
        obs, *results, info = self.whole.results
        episode = {name: numbers[self.part] for name, numbers in info["episode"].items()}
        episode |= {name: np.full(self.num_envs, number) for name, number in NUMBERS.items()}
        info = {"crashed": info["crashed"][self.part], "episode": episode}
        return self.mine(obs), *(part[self.part].copy() for part in results), info

    def get_state(self):
        return self.whole.get_state() if self.part.start == 0 else []

    def set_state(self, tensors):
        if tensors:
            self.whole.set_state(tensors)


@pytest.fixture(params=GRF_SCRIPTS)
def script(request):
    return load(request.param)


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """train(where, script, **options of Skirmish or Args) -> what helpers.train returns."""

    def run(where="run", script=script, **options):
        monkeypatch.setattr(script, "find_football", lambda: True)
        game = {name: options.pop(name) for name in ("junk", "crashes", "dtype") if name in options}
        games = []

        def make_envs(args):
            games.append(Skirmish(args.num_envs, **game))
            middle = args.num_envs - args.num_envs // 2
            parts = [slice(0, middle), slice(middle, args.num_envs)]
            return script.Halves([script.Episodes(Half(games[0], part)) for part in parts])

        monkeypatch.setattr(helpers, "in_place_of_the_simulator", lambda *_: contextlib.nullcontext(games))
        monkeypatch.setattr(script, "make_envs", make_envs)
        return helpers.train(script, tmp_path / where, None, helpers.make_args(script, **SMALL | options))

    return run


def reference_of(run, script):
    """A reference with the run's first weights; a shared network's are saved as those of the only one."""
    networks = [list(run.initial[name]) for name in ("actor", "critic")]
    if run.args.share_parameters:
        networks = [one * Skirmish.n for one in networks]
        for name in ("actor", "critic"):
            weights = run.checkpoint["learned"][name].items()
            run.checkpoint["learned"][name] = {part.removeprefix("0."): value for part, value in weights}
    method = script.__name__.split("_")[0]
    return Reference(method, *networks, SimpleNamespace(**vars(run.args), recurrent=True))


# ----------------------------------------------------------------------------------------- on a small game of ours
SEQUENTIAL = [name for name in GRF_SCRIPTS if hasattr(load(name).Args, "agent_blocks")]
CASES = [(name, {}, 2) for name in GRF_SCRIPTS] + [(name, {}, 3) for name in SEQUENTIAL]
CASES += [("a2po_grf", {"cumulative_blocks": True}, 2), ("a2po_grf", {"preopc_targets": False}, 3)]
CASES += [
    ("a2po_grf", {"preopc": False}, 3),
    ("happo_grf", {"preopc": True}, 3),
    ("mappo_grf", {"vtrace": True}, 2),
    ("coppo_grf", {"vtrace": True}, 2),
]
CASES += [(name, {"critic_steps": 2}, 2) for name in GRF_SCRIPTS]


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(("script", "options", "blocks"), CASES, ids=str, indirect=["script"])
def test_training_is_the_algorithm_in_plain_loops(script, options, blocks, shared, train):
    """Two iterations of main, in double, and of loops over samples: the same losses, weights, steps and episodes."""
    shared = shared or "cumulative_blocks" in options
    options = options | {"share_parameters": shared, "agent_blocks": blocks, "crashes": CRASHES, "dtype": np.float64}
    with in_double():
        # Algorithm 2 makes six epochs of five, in rounds of two or three.
        run = train(**options, update_epochs=5 if shared else 3)
    reference = reference_of(run, script)
    assert_same_training(run, reference, run.games[0].record)
    assert run.checkpoint["progress"]["crashes"] == 2, "the third is in place of a filler step: no episode is dropped"
    idle = [name for name, times in reference.active.items() if times < min(5, len(CRASHES))]
    is_corrected = getattr(run.args, "preopc", False) or getattr(run.args, "vtrace", False)
    assert idle == ([] if is_corrected else ["trace cut"]), "everything else must matter in this test"


@own_and_shared
@pytest.mark.parametrize("script", ["a2po_grf"], indirect=True)
def test_ranks_are_by_the_advantages_of_the_last_update(script, shared, train):
    """As Eq. (2) corrected them, which changes the ranks here."""
    with in_double():
        options = LARGE | {"seed": 12, "update_epochs": 5 if shared else 3}
        run = train(**options, share_parameters=shared, dtype=np.float64)
    reference = reference_of(run, script)
    assert_same_training(run, reference, run.games[0].record, tolerance=1e-5)
    assert list(np.argsort(reference.scores)) != list(np.argsort(reference.last_sizes))


@own_and_shared
def test_training_on_a_gpu(script, shared, train):
    """Pretended: nothing there meets a tensor of the CPU, and the numbers are the CPU's."""
    options = {"share_parameters": shared, "total_timesteps": 10, "update_epochs": 2, "crashes": CRASHES}
    here = train("here", **options)
    with elsewhere(script):
        there = train("there", cuda=True, **options)
    assert there.status == 0 and differences(here.checkpoint, there.checkpoint) == []
    assert len(evaluations(there.folder)) == 1


@own_and_shared
def test_training_in_single_precision(script, shared, train):
    """As users train; rounding is all that differs."""
    run = train(share_parameters=shared, update_epochs=3)
    assert_same_training(run, reference_of(run, script), run.games[0].record, tolerance=3e-5)


@own_and_shared
def test_what_is_no_sample_changes_nothing(shared, train):
    """What players who are off see and may do, terminal observations and the rewards of fillers and crashed steps."""
    one, other = (train(str(junk), junk=junk, crashes=CRASHES, share_parameters=shared) for junk in (1, 2))
    pairs = zip(one.games[0].record, other.games[0].record, strict=False)
    assert any((a.seen["obs"] != b.seen["obs"]).any() for a, b in pairs) and one.games[0].junk_shown > 20
    assert differences(one.checkpoint, other.checkpoint, ["learned"]) == []


def test_the_game_has_what_the_tests_are_about(train):
    """Crashes in an episode, at a rollout's start and where a game should begin; ends of both kinds; agents off."""
    record = train(crashes=CRASHES).games[0].record[: 2 * helpers.SMALL["num_steps"]]
    assert {(t, int(e)) for t, step in enumerate(record) for e in np.flatnonzero(step.crashed)} == CRASHES
    assert [bool(record[t - 1].ended[e]) for t, e in sorted(CRASHES)] == [False, False, True]
    assert sum(step.terminated.sum() for step in record) >= 2
    assert sum((step.ended & ~step.terminated & ~step.crashed).sum() for step in record) >= 2
    assert sum((step.seen["alive"] == 0).sum() for step in record) >= 10


@pytest.mark.parametrize("script", ["a2po_grf"], indirect=True)
def test_a_lone_agent_has_no_predecessors(train, monkeypatch):
    """A drill with one agent is Algorithm 1 unless told otherwise: PreOPC has nothing to correct."""
    monkeypatch.setattr(Skirmish, "n", 1)
    options = {"agent_blocks": 1}
    own = [train(f"own{preopc}", preopc=preopc, **options).checkpoint for preopc in (True, False)]
    assert differences(*own, ["learned"]) == []
    shared = [train(f"shared{p}", preopc=p, share_parameters=True, **options).checkpoint for p in (True, False)]
    assert differences(*shared, ["learned"]) != [], "with shared parameters its own ratio counts"


@own_and_shared
def test_a_lone_agent_learns_by_ppo(script, shared, train, monkeypatch):
    """With nobody else all algorithms are MAPPO, to the last bit; with shared parameters that is without PreOPC."""
    monkeypatch.setattr(Skirmish, "n", 1)
    options = {"agent_blocks": 1, "share_parameters": shared, "preopc": not shared}
    mappo, other = train("mappo", load("mappo_grf"), **options), train("other", **options)
    assert script.__name__ in other.folder.name
    assert differences(mappo.checkpoint, other.checkpoint, ["learned"]) == []


@pytest.mark.parametrize("script", ["happo_grf"], indirect=True)
def test_happo_draws_its_order(train):
    """Anew in each iteration, every agent once."""
    run = train(total_timesteps=400, update_epochs=1)
    drawn = orders(run.folder, Skirmish.n)
    assert len(drawn) == run.checkpoint["progress"]["iteration"] > 10
    assert all(sorted(order) == [0, 1, 2] for order in drawn)
    assert {order[0] for order in drawn} == {order[2] for order in drawn} == {0, 1, 2}


@pytest.mark.parametrize("script", ["a2po_grf"], indirect=True)
def test_the_order_is_by_the_rule_asked_for(script, train, monkeypatch):
    """Drawn from the generator that checkpoints have."""
    asked, order = [], script.agent_order
    monkeypatch.setattr(script, "agent_order", lambda *words: asked.append(words[1:]) or order(*words))
    train(agent_order="reverse-greedy")
    assert set(asked) == {("reverse-greedy", torch.default_generator)}


@own_and_shared
def test_first_weights_of_the_heads(script, shared, train):
    """Orthogonal; the actors' are small (gain 0.01), so that all actions are equally likely."""
    run = train(share_parameters=shared, total_timesteps=1, update_epochs=1)
    assert run.checkpoint["learned"].keys() == {"actor", "critic", "normalizer", "actor_optimizer", "critic_optimizer"}
    for part, gain in (("actor", 0.01), ("critic", 1.0)):
        assert len(run.initial[part]) == (1 if shared else 3)
        for network in run.initial[part]:
            W = network.head[-1].weight
            torch.testing.assert_close(W @ W.T, gain**2 * torch.eye(len(W)), rtol=1e-3, atol=1e-6)


class Waiting(Clockwork):
    """A half of the games."""

    closed, single_observation_space = False, gym.spaces.Dict()

    def step_async(self, actions):
        self.asked = actions

    def step_wait(self):
        return self.step(self.asked)


def test_evaluation(script):
    """Of both halves: fixed shares of episodes, the best available action, recurrent state from zero each time; and
    then the games are as they were."""
    actor, halves = Counter(), [Waiting(2), Waiting(1)]
    envs = script.Halves([script.Episodes(half) for half in halves])
    envs.reset()
    for _ in range(3):  # a training under way
        envs.play(torch.zeros(3, 2, dtype=torch.long))
    before = envs.get_state()
    played = script.evaluate([actor], envs, 8, torch.device("cpu"))
    after = envs.get_state()
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(leaves(before), leaves(after), strict=True))
    assert sorted((p["env"], p["length"]) for p in played) == [(0, 1)] * 3 + [(1, 2)] * 3 + [(2, 1)] * 2
    for half in halves:
        assert len(half.actions) > 5 and all((a == [2, 1]).all() for a in half.actions[3:])
    assert actor.wrong == 0


@pytest.mark.parametrize("m", [1, 3])
def test_agents_act_with_the_network_that_is_theirs(m):
    """Over several steps, in which environments begin anew, with the states that the steps hand on."""
    torch.manual_seed(0)
    T, N, n, inputs, outputs, H = 7, 4, 3, 5, 6, 8
    networks = torch.nn.ModuleList([a2po_grf.RecurrentNetwork(inputs, outputs, H, gain=1.0) for _ in range(m)])
    obs, hidden, start = torch.randn(T, N, n, inputs), torch.randn(N, n, H), (torch.rand(T, N) < 0.3).float()
    mask, first, results = (torch.rand(T, N, n, outputs) < 0.7), hidden, []
    mask[..., 0] = True
    for t in range(T):
        seen = {"obs": obs[t], "action_mask": mask[t], "start": start[t]}
        actions, log_probs, hidden = a2po_grf.act(networks, seen, hidden, greedy=True)
        results.append((actions, log_probs))
    actions, log_probs = (torch.stack(part) for part in zip(*results, strict=True))
    for i in range(n):
        logits, states = networks[i if m > 1 else 0](obs[:, :, i], first[:, i], start)
        best = logits.masked_fill(~mask[:, :, i], -torch.inf).log_softmax(-1).max(-1)
        assert torch.equal(actions[:, :, i], best.indices)
        torch.testing.assert_close(log_probs[:, :, i], best.values, atol=1e-5, rtol=0)
        torch.testing.assert_close(hidden[:, i], states[-1], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- on the engine
DRILL = "--scenario academy_3_vs_1_with_keeper --num-envs 2 --num-workers 2 --num-steps 60 --eval-episodes 2"
DRILL += " --torch-threads 1 --no-cuda"


def drill(options, script=a2po_grf):
    script.main(script.parse_args(f"{DRILL} {options}".split()))
    return the_run()


def the_run():
    (folder,) = Path("runs").iterdir()
    return folder


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@engine
@pytest.mark.parametrize("shared", ["--share-parameters", "--no-share-parameters"])
def test_a_run_logs_everything_and_can_be_resumed(script, shared, tmp_path, monkeypatch):
    """With own and shared parameters a run that is cut off and resumed in fewer workers ends as an uncut one."""
    checkpoints = []
    for cut in (False, True):
        (tmp_path / str(cut)).mkdir()
        monkeypatch.chdir(tmp_path / str(cut))
        folder = drill(f"--num-steps 100 --total-timesteps {150 if cut else 350} --eval-every 150 {shared}", script)
        if cut:
            script.main(script.parse_args(f"--resume {folder} --total-timesteps 350 --num-workers 1".split()))
        checkpoints.append(saved(folder))
    logged, counts = scalars(folder), ("score", "goal", "lost", "assist", "pass", "attempts")
    names = {f"charts/{name}" for name in (*counts, "win_rate", "episodic_return", "episodic_length", "crashes", "SPS")}
    names |= {f"charts/reward_{term}" for term in a2po_grf.Reward.TERMS} | {f"eval/{name}" for name in counts}
    names |= {"eval/win_rate", "losses/policy_loss", "losses/explained_variance", "time/rollout_seconds"}
    own, method = "no-" in shared, script.__name__.split("_")[0]
    names |= {f"{method}/position_of_agent/0"} if script.__name__ in SEQUENTIAL else set()
    names |= {"a2po/position_3/ratio", "a2po/rank_of_agent/0"} if method == "a2po" else set()
    assert names <= set(logged)
    if own and method == "a2po":  # nobody precedes the first agent with parameters of its own
        assert all(event.value == 0 for event in logged["a2po/position_1/preceding_clipfrac"])
    one, other = checkpoints
    # The engine's own states are not the same bytes, but what is seen of the games is.
    assert differences(one, other, ("learned", "hidden", "rng", "progress")) == []
    for a, b in zip(one["envs"], other["envs"], strict=True):
        assert all(torch.equal(a["obs"][name], b["obs"][name]) for name in a["obs"])
    networks = {name.split(".")[0] for name in one["learned"]["actor"]}
    assert networks == ({"0", "1", "2"} if own else {"0"})
    records = evaluations(folder)
    assert len(records) >= 2 and set(records[0]) == {"step", "seconds", "win_rate", "won", *counts}
    assert all(len(records[0][name]) == 2 for name in ("won", *counts))


class Failing(a2po_grf.Football):
    """Fails after the first iteration, in the second game alone; `again`: in its successors, too."""

    again, calls = False, 0

    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def step(self, action):
        self.calls += 1
        if self.seed == 1001 and (self.calls > 62 if self.build == 0 else self.again):
            self.fail()
        return super().step(action)


class Hanging(Failing):
    def fail(self):
        signal.pause()


@engine
@pytest.mark.parametrize("game", [Failing, Hanging])
def test_training_goes_on_when_a_game_is_lost(game, tmp_path, monkeypatch):
    """A worker that dies, and one whose game hangs: its step is no sample."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(a2po_grf, "Football", game)
    record, fillers = a2po_grf.Episodes.record, []

    def watched(self, *results):
        fillers.append(int(self.final.sum()))
        return record(self, *results)

    monkeypatch.setattr(a2po_grf.Episodes, "record", watched)
    monkeypatch.setattr(a2po_grf.Run, "is_due", lambda *_: False)
    seconds, what = (10, "did not answer for 10 s") if game is Hanging else (120, "died")
    with pytest.warns(UserWarning, match=f"worker 0 {what}; the episodes of its games are dropped"):
        folder = drill(f"--total-timesteps 210 --worker-timeout {seconds}")
    progress = saved(folder)["progress"]
    assert progress["crashes"] == 1
    assert progress["global_step"] == len(fillers) - sum(fillers) - 1


@engine
def test_games_that_fail_three_times_save_the_run(tmp_path, monkeypatch):
    """One line and status 1; --resume goes on from the last whole iteration."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(Failing, "again", True)
        patch.setattr(a2po_grf, "Football", Failing)
        with pytest.raises(SystemExit) as error:
            drill("--total-timesteps 400 --eval-every 1000000")
    folder = the_run()
    # A text as the exit status is printed, and the status is 1.
    assert (
        error.value.code
        == f"games failed 3 times without a whole episode; at last a worker died; go on with --resume {folder}"
    )
    before = saved(folder)
    assert before["progress"]["iteration"] == 1 and before["envs"] is None and before["progress"]["crashes"] == 2
    a2po_grf.main(a2po_grf.parse_args(["--resume", str(folder), "--total-timesteps", "200"]))
    after = saved(folder)["progress"]
    assert after["iteration"] == 2 and after["global_step"] >= 200 and after["crashes"] == 2


@engine
def test_a_checkpoint_is_evaluated(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = drill("--total-timesteps 100 --eval-every 1000000", script)
    script.main(script.parse_args(["--eval-only", "--checkpoint", str(folder / "checkpoint.pt")]))
    shown = capsys.readouterr().out
    assert "2 greedy episodes: won " in shown and "attempts" in shown
    with pytest.raises(SystemExit):
        script.main(script.parse_args(["--resume", str(folder), "--share-parameters"]))
    assert "--share-parameters True: " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    "options, message",
    [
        ("--scenario nowhere", "--scenario nowhere: must be one of 5_vs_5"),
        ("--cumulative-blocks", "--cumulative-blocks True: needs --share-parameters"),
        ("--agent-id", "--agent-id True: needs --share-parameters"),
        ("--agent-blocks 5", "--agent-blocks 5: must be within 1 and 4, the number of agents"),
        ("--num-steps 15", "--num-steps 15: must be a multiple of --chunk-length 10"),
        ("--reward-goal -1", "--reward-goal -1.0: must be a number of at least 0"),
        ("--num-envs 0", "--num-envs 0: must be within 1 and 65536"),
    ],
)
def test_bad_options_are_one_line(script, options, message, monkeypatch, capsys):
    fields = {field.name for field in dataclasses.fields(script.Args)}
    if options.split()[0][2:].replace("-", "_") not in fields:
        return  # it has no such option
    monkeypatch.setattr(script, "find_football", lambda: True)
    with pytest.raises(SystemExit) as error:
        script.main(script.parse_args(options.split()))
    shown = capsys.readouterr().err
    assert error.value.code == 2 and shown.count("\n") == 1 and message in shown


def test_defaults_are_table_11(script):
    """The same for all scripts."""
    args = script.Args()
    table = {"update_epochs": 10, "chunk_length": 10, "ent_coef": 0.001, "learning_rate": 5e-4, "gae_lambda": 0.95}
    assert vars(args) | table | {"clip_coef": 0.25, "gamma": 0.995} == vars(args)
    a2po, own = vars(a2po_grf.Args(exp_name=args.exp_name)), {"agent_blocks", "agent_order", "preopc"}
    own |= {"cumulative_blocks", "clip_adaptation", "preopc_targets"}
    same = {name: value for name, value in vars(args).items() if name not in ("preopc", "vtrace")}
    assert same.items() <= a2po.items() and a2po.keys() - vars(args).keys() <= own


@pytest.mark.parametrize("cores", [2, 64])
def test_the_batch_is_the_authors_on_every_machine(script, cores, monkeypatch):
    """Their launch script has 24 games of 3,000 steps."""
    monkeypatch.setattr(script, "find_football", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    for scenario, steps in (("5_vs_5", 3000), ("11_vs_11_stochastic", 3000), ("academy_corner", 400)):
        args = script.complete_args(script.Args(scenario=scenario))
        assert (args.num_envs, args.num_steps, args.torch_threads) == (24, steps, cores)
