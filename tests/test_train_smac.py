"""The SMAC scripts' training, on a small game of ours in place of the simulator: the update against plain loops, what
is no sample, seeds, interruption and resumption, evaluation, the run directory. Each test runs on every script."""

import dataclasses
import importlib.metadata
import json
import math
import signal
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from helpers import (
    LARGE,
    SCRIPTS,
    SMAC_SCRIPTS,
    SMALL,
    Skirmish,
    assert_same_training,
    differences,
    evaluations,
    in_double,
    leaves,
    load,
    make_args,
    of_agents,
    orders,
    scalars,
)
from helpers import train as train_on
from reference import Reference

from benchmark.run import count_orders

CRASHES = {(7, 0), (12, 1), (13, 0)}  # within an episode, at the start of a rollout, where a game should begin


@pytest.fixture(params=SMAC_SCRIPTS)
def script(request):
    return load(request.param)


@pytest.fixture
def train(script, tmp_path):
    """train(where, **options of Skirmish or Args, argv=None) -> what helpers.train returns."""

    def run(where="run", argv=None, **options):
        names = ("junk", "crashes", "signal_at", "signal_number", "dtype")
        game = {name: options.pop(name) for name in names if name in options}
        args = argv or make_args(script, **options)
        return train_on(script, tmp_path / where, lambda num_envs: Skirmish(num_envs, **game), args)

    return run


# ------------------------------------------------------------------------------------- the update in plain loops
CASES = [
    *[(name, {}) for name in SMAC_SCRIPTS],
    *[(name, {"crashes": CRASHES, "agent_blocks": 3, "update_epochs": 7}) for name in SMAC_SCRIPTS],
    *[(name, {"recurrent": False}) for name in SMAC_SCRIPTS],
    *[(name, {"critic_steps": 3}) for name in SMAC_SCRIPTS],
    ("mappo_smac", {"deep": True}),
    ("a2po_smac", {"clip_adaptation": 0.25}),
    ("a2po_smac", {"preopc": False}),
    ("a2po_smac", {"preopc_targets": False}),
    ("a2po_smac", {"cumulative_blocks": True, "agent_blocks": 3}),
    ("happo_smac", {"preopc": True}),
    ("mappo_smac", {"vtrace": True}),
    ("coppo_smac", {"vtrace": True, "crashes": CRASHES}),
]


@pytest.mark.parametrize(("script", "options"), CASES, ids=str, indirect=["script"])
def test_training_is_the_algorithm_in_plain_loops(script, train, options):
    """Two iterations of main, in double, and of loops over samples: the same losses, weights, steps and episodes."""
    with in_double():
        run = train(**{"update_epochs": 5, "clip_coef": 0.03, "max_grad_norm": 0.15, "dtype": np.float64} | options)
    reference = reference_of(run, script)
    assert_same_training(run, reference, run.games[0].record)
    # The third crash is in place of a filler step: no episode is dropped.
    assert run.checkpoint["progress"]["crashes"] == (2 if "crashes" in options else 0)
    assert reference.active.pop("crashed") == len(options.get("crashes", ()))
    idle = {name for name, times in reference.active.items() if times < 5}
    is_corrected = getattr(run.args, "preopc", False) or getattr(run.args, "vtrace", False)
    assert idle == (set() if is_corrected else {"trace cut"}), "everything else must matter in this test"


def reference_of(run, script):
    networks = [[run.initial[name]] * Skirmish.n for name in ("actor", "critic")]
    return Reference(script.__name__.split("_")[0], *networks, run.args)


def test_training_on_a_gpu(script, train):
    """Pretended: nothing there meets a tensor of the CPU, and the numbers are the CPU's, also after --resume."""
    options = {"total_timesteps": 10, "update_epochs": 2, "crashes": CRASHES}
    here = train("here", **options)
    with elsewhere(script):
        there = train("there", cuda=True, **options)
    assert there.status == 0 and differences(here.checkpoint, there.checkpoint) == []
    scores = [[e["returns"] for e in evaluations(run.folder)] for run in (here, there)]
    assert scores[0] == scores[1] != []
    here = train("here", argv=["--resume", str(here.folder), "--total-timesteps", "30"])
    with elsewhere(script):
        there = train("there", argv=["--resume", str(there.folder), "--total-timesteps", "30"])
    assert there.args.cuda and differences(here.checkpoint, there.checkpoint) == []


def test_actor_and_critic_see_the_agents_numbers(train):
    """Behind the observation, which is the last of the critic's inputs; the weights of the numbers are learned."""
    without, ids = train("without"), train("with", agent_id=True)
    for name in ("actor", "critic"):
        layers = [run.initial[name].base[1].weight for run in (without, ids)]
        n = layers[1].shape[1] - layers[0].shape[1]
        learned = ids.checkpoint["learned"][name]["base.1.weight"]
        assert n == 3 and (learned[:, -n:] != layers[1][:, -n:]).any(0).all()


def test_actor_and_critic_are_as_deep_as_asked(train):
    for deep, layers in ((False, 2 + 1), (True, 3 + 1 + 1)):
        initial = train(str(deep), deep=deep).initial
        for network in (initial["actor"], initial["critic"]):
            assert sum(isinstance(part, torch.nn.Linear) for part in network.modules()) == layers


def test_training_in_single_precision(script, train):
    """As users train; rounding is all that differs."""
    run = train(update_epochs=5, clip_coef=0.03)
    assert_same_training(run, reference_of(run, script), run.games[0].record, tolerance=3e-5)


@pytest.mark.parametrize("script", ["a2po_smac"], indirect=True)
def test_ranks_are_by_the_advantages_of_the_last_update(script, train):
    """As Eq. (2) corrected them, which changes the ranks here; without it they are the places of the greedy rule."""
    with in_double():
        run = train(**LARGE | {"seed": 3}, update_epochs=5, dtype=np.float64)
    reference = reference_of(run, script)
    assert_same_training(run, reference, run.games[0].record, tolerance=1e-5)
    assert list(np.argsort(reference.scores)) != list(np.argsort(reference.last_sizes))
    plain = train("plain", preopc=False, agent_order="greedy").folder
    assert of_agents(plain, "rank") == of_agents(plain, "position") != []


SHARED = [name for name in SCRIPTS if name.endswith(("_smac", "_mpe"))]


@pytest.mark.parametrize("name", [name for name in SHARED if name.startswith("a2po")])
def test_the_order_is_by_the_rule_asked_for(name, tmp_path, monkeypatch):
    """Drawn from the generator that checkpoints have."""
    script, asked = load(name), []
    order = script.agent_order
    monkeypatch.setattr(script, "agent_order", lambda *words: asked.append(words[1:]) or order(*words))
    train_on(script, tmp_path, Skirmish, make_args(script, agent_order="reverse-greedy"))
    assert set(asked) == {("reverse-greedy", torch.default_generator)}


@pytest.mark.parametrize("name", [name for name in SHARED if name.startswith("happo")])
def test_happo_draws_its_order(name, tmp_path):
    script = load(name)
    args = make_args(script, total_timesteps=300, update_epochs=1, agent_blocks=3)
    drawn = orders(train_on(script, tmp_path, Skirmish, args).folder, Skirmish.n)
    assert len(drawn) > 10 and all({order[k] for order in drawn} == {0, 1, 2} for k in range(3))


@pytest.mark.parametrize("name", SHARED)
def test_first_weights_of_the_heads(name, tmp_path):
    """Orthogonal; the actor's are small (gain 0.01), so that all actions are equally likely."""
    script = load(name)
    run = train_on(script, tmp_path, Skirmish, make_args(script, total_timesteps=1, update_epochs=1))
    for part, gain in (("actor", 0.01), ("critic", 1.0)):
        W = run.initial[part].head[-1].weight
        torch.testing.assert_close(W @ W.T, gain**2 * torch.eye(len(W)), rtol=1e-3, atol=1e-6)


def test_one_thread_while_the_game_plays(script, train, monkeypatch):
    """All threads for the update; in rollouts and evaluations the others would spin on the simulator's cores."""
    threads = {"act": set(), "value_loss": set()}
    for name, counted in threads.items():
        original = getattr(script, name)

        def watched(*inputs, original=original, counted=counted, **options):
            counted.add(torch.get_num_threads())
            return original(*inputs, **options)

        monkeypatch.setattr(script, name, watched)
    train(torch_threads=2, eval_every=10)
    assert threads == {"act": {1}, "value_loss": {2}}


# ---------------------------------------------------------------------------------------------------------- samples
def test_what_is_no_sample_changes_nothing(train):
    """The dead's observations and masks, terminal observations, rewards of fillers and crashes leave no trace."""
    first, second = (train(str(junk), junk=junk, crashes=CRASHES) for junk in (1, 2))
    game, other = first.games[0], second.games[0]
    assert first.checkpoint["progress"]["iteration"] == 2 and game.junk_shown > 20
    assert any((a.seen["obs"] != b.seen["obs"]).any() for a, b in zip(game.record, other.record, strict=False))
    assert differences(first.checkpoint, second.checkpoint, ["learned"]) == []


def test_truncated_episodes_bootstrap(train, monkeypatch):
    """The counter-check: a change in the last observation of a truncated episode does change the weights."""
    first = train("a")
    observe = Skirmish._observe

    def changed(self):
        seen = observe(self)
        seen["obs"][self.final & ~self.terminated] += 1.0 - 2.0 * np.arange(self.obs_dim, dtype=np.float32) % 2
        return seen

    monkeypatch.setattr(Skirmish, "_observe", changed)
    second = train("b")
    assert any("/critic/" in path for path in differences(first.checkpoint, second.checkpoint, ["learned"]))


def test_the_game_has_what_the_tests_are_about(script, train):
    """Crashes in an episode, at a rollout's start and where a game should begin; ends of both kinds; the dead."""
    game = train(crashes=CRASHES, total_timesteps=42).games[0]
    training = game.record[: 2 * SMALL["num_steps"]]
    assert {(t, int(e)) for t, step in enumerate(training) for e in np.flatnonzero(step.crashed)} == CRASHES
    assert [bool(training[t - 1].ended[e]) for t, e in sorted(CRASHES)] == [False, False, True]
    assert sum(step.terminated.sum() for step in training) >= 2
    assert sum((step.ended & ~step.terminated & ~step.crashed).sum() for step in training) >= 2
    assert sum((step.seen["alive"] == 0).sum() for step in training) >= 10


# ------------------------------------------------------------------------------------------------- seeds, resuming
def test_seeds_and_evaluation(train):
    """The same seed gives the same weights, whether or not there are evaluations between; another seed others."""
    first = train("a")
    assert differences(first.checkpoint, train("b", eval_every=1).checkpoint) == []
    other = train("c", seed=4)
    assert any("/actor/" in path for path in differences(first.checkpoint, other.checkpoint, ["learned"]))
    assert len(evaluations(first.folder)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_saves_and_resuming_changes_nothing(train, number, capsys):
    """Status 143 or 130, a checkpoint after the iteration, and --resume ends where an uninterrupted run does."""
    options = {"total_timesteps": 100, "eval_every": 30, "save_every": 40}
    whole = train("whole", **options)
    half = train("half", signal_at=SMALL["num_steps"] + 3, signal_number=number, **options)
    assert (whole.status, half.status) == (0, 128 + number) and half.checkpoint["progress"]["iteration"] == 2
    assert "--resume" in capsys.readouterr().err and half.handlers_are_back
    with (half.folder / "eval.jsonl").open("a") as file:  # as if it had gone on after its last checkpoint
        file.write(json.dumps({"step": half.checkpoint["progress"]["global_step"] + 1, "win_rate": 0.5}) + "\n")
        file.write('{"step": 1, "win_ra')  # and was killed while writing
    resumed = train("half", argv=["--resume", str(half.folder)])
    assert resumed.status == 0 and resumed.folder == half.folder
    assert differences(whole.checkpoint, resumed.checkpoint) == []
    kept, expected = ([{**e, "seconds": 0} for e in evaluations(run.folder)] for run in (half, whole))
    assert kept == expected and len(expected) >= 3
    assert json.loads((half.folder / "config.json").read_text())["total_timesteps"] == 100
    steps = [[event.step for event in scalars(run.folder)["losses/value_loss"]] for run in (half, whole)]
    assert steps[0] == steps[1] and count_orders(half.folder) == count_orders(whole.folder)


def test_resume_with_more_steps(train):
    """An option given beside --resume holds: a finished run goes on to a larger total, at another learning rate."""
    run = train("a")
    argv = ["--resume", str(run.folder), "--total-timesteps", "60", "--learning-rate", "0.1"]
    longer = train("a", argv=argv)
    assert longer.status == 0 and longer.folder == run.folder
    assert longer.checkpoint["progress"]["global_step"] >= 60
    args = longer.checkpoint["args"]
    assert (args["total_timesteps"], args["resume"], args["hidden_size"]) == (60, "", SMALL["hidden_size"])
    rates = [value for path, value in leaves(longer.checkpoint["learned"]) if path.endswith("/lr")]
    assert rates == [0.1] * 2


def test_crashes_are_counted_on(train):
    run = train("a", crashes=CRASHES)
    longer = train("a", argv=["--resume", str(run.folder), "--total-timesteps", "60"], crashes={(3, 0), (3, 1)})
    before, after = (r.checkpoint["progress"]["crashes"] for r in (run, longer))
    assert before == 2 < after and scalars(run.folder)["charts/crashes"][-1].value == after


# ------------------------------------------------------------------------------------------------ what is not finite
def test_a_loss_that_is_not_finite_ends_the_run(script, train, monkeypatch):
    """The message has the iteration's number, and the checkpoint of the iteration before is untouched and usable."""
    options = {"total_timesteps": 60, "save_every": 1}
    whole, good, calls = train("whole", **options), script.value_loss, []
    per_iteration = 4  # update_epochs, and 2 blocks * ceil(4 / 2)

    def bad(*inputs):
        calls.append(1)
        return good(*inputs) * (math.nan if len(calls) > 2 * per_iteration else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(script, "value_loss", bad)
        broken = train("broken", **options)
    assert "iteration 3" in broken.status and "finite" in broken.status
    assert broken.checkpoint["progress"]["iteration"] == 2
    assert all(torch.isfinite(torch.as_tensor(x)).all() for _, x in leaves(broken.checkpoint["learned"]))
    resumed = train("broken", argv=["--resume", str(broken.folder)])
    assert differences(whole.checkpoint, resumed.checkpoint) == []


def test_a_gradient_that_is_not_finite_is_not_saved(script, train, monkeypatch):
    """Even where it is the iteration's last and all losses are finite: the weights would be lost with the next save."""
    good, calls = script.value_loss, []

    def bad(values, *inputs):
        calls.append(1)
        if len(calls) == 8:  # the last of the second iteration
            values.register_hook(lambda gradient: gradient * math.nan)
        return good(values, *inputs)

    monkeypatch.setattr(script, "value_loss", bad)
    broken = train("broken", total_timesteps=60, save_every=1)
    assert "iteration 2" in broken.status and "finite" in broken.status
    assert broken.checkpoint["progress"]["iteration"] == 1


def test_games_that_fail_end_the_run_with_a_checkpoint(script, train, monkeypatch):
    """One line, which says how to go on; what was learned until then is saved, and one can."""
    step, get_state = Skirmish.step, Skirmish.get_state

    def failing(self, actions):
        if len(self.record) == 15:
            raise script.GamesFailed("games failed 3 times")
        return step(self, actions)

    monkeypatch.setattr(Skirmish, "get_state", lambda self: None if len(self.record) == 15 else get_state(self))
    with monkeypatch.context() as patch:
        patch.setattr(Skirmish, "step", failing)
        broken = train(total_timesteps=60)
    assert "games failed 3 times" in broken.status and f"--resume runs/{broken.folder.name}" in broken.status
    assert "\n" not in broken.status and broken.checkpoint["progress"]["iteration"] == 1
    assert broken.checkpoint["envs"] is None
    resumed = train(argv=["--resume", str(broken.folder)])
    assert resumed.status == 0 and resumed.checkpoint["progress"]["global_step"] >= 60


# -------------------------------------------------------------------------------------------------- run directory
def test_run_directory(script, train):
    """config.json, eval.jsonl, TensorBoard keys and the checkpoint, as DESIGN section 7 has them."""
    options = {"total_timesteps": 60, "eval_every": 20, "num_envs": 3, "eval_episodes": 4}
    folder = train(clip_coef=None, agent_blocks=None, **options).folder
    assert folder.name.startswith(f"3m-smax__{script.__name__}__3__")
    files = {path.name.split(".")[0] for path in folder.iterdir()}
    assert files == {"config", "eval", "checkpoint", "events"} and not list(folder.glob("*.tmp"))
    config = json.loads((folder / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(script.Args)} <= config.keys()
    not_given = {name for name, value in config.items() if value is None}
    assert not_given <= {"wandb_entity", "wandb_group", "git_commit"}, "config.json has the values that were used"
    assert config["simulator"] == "smax" and config["script"] == script.__name__ and config["num_envs"] == 3
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    lines = evaluations(folder)
    assert len(lines) >= 2 and sorted(e["step"] for e in lines) == [e["step"] for e in lines]
    for line in lines:
        assert line.keys() == {"step", "seconds", "win_rate", "won", "returns"}
        assert len(line["won"]) == len(line["returns"]) == 4 and set(line["won"]) <= {0, 1}
        assert line["win_rate"] == np.mean(line["won"]) and line["seconds"] > 0
    charts = "episodic_return episodic_length SPS learning_rate win_rate crashes".split()
    losses = "policy_loss value_loss entropy approx_kl clipfrac explained_variance".split()
    expected = {f"charts/{c}" for c in charts} | {f"losses/{x}" for x in losses}
    expected |= {"eval/win_rate", "time/rollout_seconds", "time/update_seconds"}
    if script.__name__ == "a2po_smac":
        parts = ("clipfrac", "preceding_clipfrac", "ratio")
        expected |= {f"a2po/position_{k}/{part}" for k in (1, 2, 3) for part in parts}
        expected |= {f"a2po/rank_of_agent/{i}" for i in range(3)}
    if script.__name__.startswith(("a2po", "happo")):
        expected |= {f"{script.__name__.split('_')[0]}/position_of_agent/{i}" for i in range(3)}
    logged = scalars(folder)
    assert expected <= logged.keys()
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    assert [event.step for event in logged["eval/win_rate"]] == [e["step"] for e in lines]
    assert [event.value for event in logged["eval/win_rate"]] == pytest.approx([e["win_rate"] for e in lines])


# ------------------------------------------------------------------------------------------------------ evaluation
class Clockwork(gym.vector.VectorEnv):
    """Environment e plays episodes of e + 1 steps; rewards number the episodes; some crash at their end."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs, crashes=()):
        self.num_envs, self.crashes = num_envs, crashes
        self.single_action_space = gym.spaces.MultiDiscrete([3, 3])
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.actions = []

    def _observe(self):
        obs = np.stack([self.time, self.episode], -1)[:, None].repeat(2, 1).astype(np.float32)
        mask = np.ones((self.num_envs, 2, 3), np.int8)
        mask[:, 1, 2] = 0
        return {"obs": obs, "action_mask": mask}

    def reset(self, *, seed=None, options=None):
        self.time, self.episode, self.final = np.zeros((3, self.num_envs), int)
        return self._observe(), {}

    def step(self, actions):
        self.actions.append(actions)
        reward = np.zeros(self.num_envs)
        for e in range(self.num_envs):
            if self.final[e]:
                self.final[e], self.time[e], self.episode[e] = 0, 0, self.episode[e] + 1
            else:
                self.time[e] += 1
                reward[e] = 1 + self.episode[e] + 0.1 * e
                self.final[e] = self.time[e] == e + 1
        final = self.final.astype(bool)
        crashed = np.array([final[e] and (e, self.episode[e]) in self.crashes for e in range(self.num_envs)])
        info = {"episode": {"won": self.episode % 2}, "crashed": crashed}
        return self._observe(), reward, final & ~crashed, crashed, info

    def get_state(self):
        return torch.tensor(np.array([self.time, self.episode, self.final]))

    def set_state(self, state):
        self.time, self.episode, self.final = state.numpy()


class Counter:
    """An actor whose recurrent state counts the steps of the episode, and which likes action 2 best, then 1."""

    gru = types.SimpleNamespace(hidden_size=1)

    def __init__(self):
        self.wrong = 0

    def __call__(self, inputs, hidden, start):
        hidden = hidden * (1 - start[0].unsqueeze(-1))
        self.wrong += int((hidden[:, 0] != inputs[0, :, 0]).sum())  # inputs[..., 0] is the time in the episode
        return torch.tensor([0.0, 1.0, 2.0]).expand(1, len(hidden), 3), (hidden + 1)[None]


def greedy_episodes(script, envs, episodes, actor=None):
    wrapped = script.Episodes(envs)
    wrapped.reset()
    for _ in range(3):  # a training under way
        wrapped.play(torch.zeros(envs.action_space.shape, dtype=torch.long))
    before = [wrapped.get_state(), list(wrapped.ended)]
    played = script.evaluate(actor or Counter(), wrapped, episodes, torch.device("cpu"))
    after = wrapped.get_state()
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(leaves(before[0]), leaves(after), strict=True))
    return played


def test_evaluation(script):
    """Fixed shares of episodes, whole returns, the best available action, recurrent state from zero each time; and
    then the games are as they were."""
    actor, envs = Counter(), Clockwork(3)
    played = greedy_episodes(script, envs, 7, actor)
    # Shares of 3, 2 and 2; episode k of environment e is won for odd k and returns (e + 1) (1 + k + e / 10).
    expected = [(k % 2, (e + 1) * (1 + k + 0.1 * e)) for e, share in enumerate((3, 2, 2)) for k in range(share)]
    found = [(episode["won"], round(episode["return"], 3)) for episode in played]
    assert sorted(found) == sorted((k, round(r, 3)) for k, r in expected)
    assert all(episode["length"] == episode["env"] + 1 for episode in played) and actor.wrong == 0
    assert all(a[:, 0].tolist() == [2] * 3 and a[:, 1].tolist() == [1] * 3 for a in envs.actions[3:])
    means = script.summarize(played)
    assert means["win_rate"] == pytest.approx(np.mean([won for won, _ in expected]))
    assert means["episodic_return"] == pytest.approx(np.mean([r for _, r in expected]), abs=1e-3)


def test_fewer_episodes_than_environments(script):
    """Only the first environments count then."""
    played = greedy_episodes(script, Clockwork(3), 2)
    assert [(p["env"], p["won"]) for p in played] == [(0, 0), (1, 0)]
    assert [p["return"] for p in played] == pytest.approx([1.0, 2.2])


def test_crashed_episodes_are_played_again(script):
    """They count neither as losses nor at all."""
    played = greedy_episodes(script, Clockwork(2, crashes={(0, 0), (1, 1)}), 4)
    assert sorted(p["return"] for p in played) == pytest.approx(sorted([2.0, 3.0, 2.2, 6.2]))
    assert sum(p["won"] for p in played) == 1


def test_eval_only_of_a_training(script, train, capsys):
    """As many episodes as asked for, with the checkpoint's networks; nothing is trained or written."""
    run = train()
    before = {path: path.stat().st_mtime_ns for path in run.folder.parent.rglob("*")}
    capsys.readouterr()
    argv = ["--eval-only", "--checkpoint", str(run.folder / "checkpoint.pt"), "--eval-episodes", "5"]
    again = train(argv=argv)
    assert again.status == 0 and "5 greedy episodes: won" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.folder.parent.rglob("*")} == before
    assert sum(step.ended.sum() for step in again.games[0].record) >= 5
