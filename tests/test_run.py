"""The run, which is the same in all scripts: its folder and record, what cannot be written, signals, W&B. Here with
A2PO on SMAC, a small game in place of the simulator; that resuming changes no number stands in test_train_*."""

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, Skirmish, differences, evaluations, in_place_of_the_simulator, make_args, scalars
from helpers import train as train_on
from test_cli import left_with

import a2po_smac


@pytest.fixture
def train(tmp_path):
    """main with the small settings and these options, or with a command line, in tmp_path / name."""

    def train(name="run", argv=None, game=Skirmish, **options):
        return train_on(a2po_smac, tmp_path / name, game, argv or make_args(a2po_smac, **options))

    return train


def everything_in(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ the record
def test_config_keeps_every_stretch(train):
    """The settings that the run began with stay; options given beside --resume stand where they held from."""
    run = train(wandb_group="seeds")
    began = json.loads((run.folder / "config.json").read_text())
    argv = ["--resume", str(run.folder), "--total-timesteps", "6e1", "--learning-rate", "0.1"]
    train(argv=argv)
    train(argv=[*argv[:2], "--total-timesteps=9_0"])
    config = json.loads((run.folder / "config.json").read_text())
    assert {name: value for name, value in config.items() if name != "stretches"} == {
        name: value for name, value in began.items() if name != "stretches"
    }
    assert config["learning_rate"] == SMALL["learning_rate"] and config["total_timesteps"] == 30
    assert [stretch["changed"] for stretch in config["stretches"]] == [
        {},
        {"total_timesteps": 60, "learning_rate": 0.1},
        {"total_timesteps": 90, "learning_rate": 0.1},  # a run goes on with what it was last given
    ]
    steps = [stretch["step"] for stretch in config["stretches"]]
    assert steps[0] == 0 and 30 <= steps[1] < 60 <= steps[2] < 90
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for stretch in [config, *config["stretches"]]:
        assert (stretch["git_commit"] or "").removesuffix("-dirty") == commit
        assert {"torch", "jax", "jaxmarl"} <= stretch["versions"].keys() and stretch["device"] == "cpu"


def test_a_stretch_that_was_never_saved_drops_out(train):
    """--resume with a wrong option that ended at once: what goes on from the same step takes its place."""
    run = train()

    class Broken(Skirmish):
        def step(self, actions):
            raise ZeroDivisionError

    wrong = ["--resume", str(run.folder), "--total-timesteps", "60", "--learning-rate", "9"]
    with pytest.raises(ZeroDivisionError):
        train(argv=wrong, game=Broken)
    stretches = json.loads((run.folder / "config.json").read_text())["stretches"]
    assert stretches[-1]["changed"] == {"total_timesteps": 60, "learning_rate": 9.0}
    train(argv=wrong[:4])
    stretches = json.loads((run.folder / "config.json").read_text())["stretches"]
    assert [stretch["changed"] for stretch in stretches] == [{}, {"total_timesteps": 60}]


def test_config_of_an_older_run(train):
    """From before the stretches were written down, or lost: it can be resumed all the same."""
    run = train()
    config = json.loads((run.folder / "config.json").read_text())
    for text in (json.dumps({k: v for k, v in config.items() if k not in ("stretches", "exp_name")}), "{half"):
        (run.folder / "config.json").write_text(text)
        total = torch.load(run.folder / "checkpoint.pt", weights_only=True)["progress"]["global_step"] + 1
        assert train(argv=["--resume", str(run.folder), "--total-timesteps", str(total)]).status == 0
        written = json.loads((run.folder / "config.json").read_text())
        assert written["map"] == "3m" and len(written["stretches"]) == 1


def test_no_commit_without_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(a2po_smac, "__file__", str(tmp_path / "a2po_smac.py"))
    assert a2po_smac.git_commit() is None
    monkeypatch.setenv("PATH", "")
    assert a2po_smac.git_commit() is None


def test_settings_are_a_table(train, capsys):
    """On the screen and in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train()
    shown = capsys.readouterr().out.splitlines()
    table = [line for line in shown if line.startswith("  ")]
    assert table[0] == f"  {'map':<18} {'3m':<16}  {'simulator':<18} {'smax':<16}  {'seed':<18} 3"
    assert all(line[start - 1] == " " for line in table for start in (2, 21, 39, 58, 76, 95) if start < len(line))
    assert max(map(len, shown)) <= 120 and len(shown) < 20
    events = EventAccumulator(str(run.folder)).Reload()
    (tensor,) = events.Tensors("settings/text_summary")
    (text,) = tensor.tensor_proto.string_val
    lines = text.decode().splitlines()
    assert lines[:2] == ["|setting|value|", "|-|-|"] and "|gae_lambda|0.9|" in lines


def test_exp_name(train):
    run = train(exp_name="wide-net")
    assert run.folder.name.split("__")[:3] == ["3m-smax", "wide-net", "3"]
    config = json.loads((run.folder / "config.json").read_text())
    assert (config["exp_name"], config["script"]) == ("wide-net", "a2po_smac")
    assert train("other").folder.name.split("__")[1] == "a2po_smac"


@pytest.mark.parametrize("name", ["a/b", "a__b", "", "a b"])
def test_exp_names_that_would_break_folders(name, capsys):
    (line,) = left_with(a2po_smac, ["--map", "3m", "--exp-name", name], capsys)
    assert f"{f'--exp-name {name}'.rstrip()}: must be" in line


# ------------------------------------------------------------------------------------------------- nothing is lost
def test_events_after_the_checkpoint_are_dropped(train):
    """Of iterations that a killed run made after its last save, and that are made again."""
    run = train()
    with a2po_smac.SummaryWriter(run.folder) as writer:
        writer.add_scalar("losses/value_loss", 9.0, run.checkpoint["progress"]["global_step"] + 5)
    train(argv=["--resume", str(run.folder), "--total-timesteps", "60"])
    assert 9.0 not in [event.value for event in scalars(run.folder)["losses/value_loss"]]


def test_seconds_of_the_parts_of_an_iteration(monkeypatch):
    run, clock = object.__new__(a2po_smac.Run), iter([1.0, 4.0, 9.0])
    run.progress, run.args, run.stop_signal = {"global_step": 0}, a2po_smac.Args(), 0
    monkeypatch.setattr(a2po_smac, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert run.goes_on()
    run.lap("rollout"), run.lap("update")
    assert run.seconds == {"rollout": 3.0, "update": 5.0}


def test_when_to_evaluate_and_to_save(train, monkeypatch):
    """After the iteration in which a multiple of the steps was passed, and at the end; each by its own option."""
    calls = {"save": [], "log_evaluation": []}
    for name, steps in calls.items():
        original = getattr(a2po_smac.Run, name)

        def watched(self, *inputs, steps=steps, original=original):
            steps.append(self.progress["global_step"])
            return original(self, *inputs)

        monkeypatch.setattr(a2po_smac.Run, name, watched)
    folder = train(total_timesteps=100, save_every=30, eval_every=45, update_epochs=1).folder
    steps = [event.step for event in scalars(folder)["losses/value_loss"]]
    for name, every in (("save", 30), ("log_evaluation", 45)):
        passed = [now for before, now in zip([0, *steps], steps, strict=False) if before // every < now // every]
        assert sorted(set(calls[name])) == sorted({*passed, steps[-1]}), name


@pytest.mark.parametrize("total", ["30", "12"])
def test_a_complete_run_is_left_alone(train, total, capsys):
    """One line says that nothing was done, and why."""
    run = train()
    before = everything_in(run.folder)
    capsys.readouterr()
    again = train(argv=["--resume", str(run.folder), "--total-timesteps", total])
    output = capsys.readouterr()
    assert not again.status and everything_in(run.folder) == before and again.games[0].record == []
    (line,) = (output.out + output.err).splitlines()
    assert "nothing is left to do" in line and f"--total-timesteps is {total}" in line


def test_a_run_has_one_process(train, capsys):
    run = train()
    before = everything_in(run.folder)
    words = ["--resume", str(run.folder), "--total-timesteps", "60"]
    other = (run.folder / "config.json").open("a")
    fcntl.flock(other, fcntl.LOCK_EX)
    capsys.readouterr()
    assert train(argv=words).status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--resume {run.folder}: another process" in line and everything_in(run.folder) == before
    other.close()
    assert train(argv=words).status == 0


def test_a_policy_is_no_run(train, capsys):
    """A file of benchmark/policies has weights and settings alone."""
    run = train()
    policy = {name: run.checkpoint[name] for name in ("args", "script", "learned")}
    torch.save(policy, run.folder / "checkpoint.pt")
    capsys.readouterr()
    assert train(argv=["--resume", str(run.folder), "--total-timesteps", "60"]).status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--resume" in line and "is a policy" in line


# ---------------------------------------------------------------------------------------------- full disks and such
def with_a_full_disk(monkeypatch, name):
    """The next run's file of this name has no room."""
    make = a2po_smac.new_folder

    def new_folder(*arguments):
        folder = make(*arguments)
        (folder / name).symlink_to("/dev/full")
        return folder

    monkeypatch.setattr(a2po_smac, "new_folder", new_folder)


def test_a_save_that_fails(train, monkeypatch, capsys):
    """It is told in a line; the next one has room again. Nothing of it stays."""
    with_a_full_disk(monkeypatch, "checkpoint.tmp")
    run = train(save_every=10, total_timesteps=60)
    assert run.status == 0 and run.checkpoint["progress"]["global_step"] >= 60
    told = [line for line in capsys.readouterr().err.splitlines() if "was not saved" in line]
    assert len(told) == 1 and os.strerror(errno.ENOSPC) in told[0] and str(run.folder.name) in told[0]
    assert not (run.folder / "checkpoint.tmp").exists()


def test_a_last_save_that_fails(train, monkeypatch):
    """Status 1 and one line; the checkpoint before it is whole."""
    first, write, calls = train("first"), Path.write_bytes, []

    def fail_from_the_second_on(self, data):
        calls.append(self)
        if len(calls) > 1:
            write(self, bytes(data)[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail_from_the_second_on)
    run = train("second", save_every=30, total_timesteps=60)
    assert "cannot be written" in run.status and "\n" not in run.status and len(calls) > 1
    assert differences(run.checkpoint, first.checkpoint) == [] and not (run.folder / "checkpoint.tmp").exists()


def test_a_full_disk_on_resuming_leaves_the_run_as_it_was(train, monkeypatch, capsys):
    """config.json is written in its place, where it is locked; eval.jsonl beside it first."""
    run = train(eval_every=10, save_every=30)
    words = ["--resume", str(run.folder), "--total-timesteps", "60"]
    write, before = Path.write_text, everything_in(run.folder)

    def fail(self, data):
        write(self, data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", fail)
    capsys.readouterr()
    assert train(argv=words).status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--resume {run.folder}: cannot be written: {os.strerror(errno.ENOSPC)}" in line
    assert everything_in(run.folder) == before

    monkeypatch.setattr(Path, "write_text", write)
    (run.folder / "eval.tmp").symlink_to("/dev/full")
    assert train(argv=words).status == 2 and everything_in(run.folder) == before
    assert train(argv=words).status == 0


def test_damaged_lines_of_eval_are_told_and_left_out(train, capsys):
    run = train(eval_every=10)
    whole = evaluations(run.folder)
    lines = [b"\0\0\0", b'{"step": 3}}', b'{"seconds": 1.0}', b'{"\xff": 2}', b"7", b'{"step": 1']
    file = run.folder / "eval.jsonl"
    first, *others = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, *lines[:-1], *others, lines[-1]]))
    capsys.readouterr()
    assert train(argv=["--resume", str(run.folder), "--total-timesteps", "60"]).status == 0
    again = evaluations(run.folder)
    assert again[: len(whole)] == whole and len(again) > len(whole)
    assert f"eval.jsonl: left out 6 damaged lines of {len(whole) + 6}" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_refused(train, capsys):
    """PyTorch does not look at the sums with which a checkpoint's parts are stored."""
    run = train()
    file = run.folder / "checkpoint.pt"
    weights = run.checkpoint["learned"]["actor"]["base.0.weight"].numpy().tobytes()
    data = file.read_bytes()
    assert data.count(weights) == 1
    file.write_bytes(data.replace(weights, bytes(255 - byte for byte in weights)))
    torch.load(file, weights_only=True)
    before = everything_in(run.folder)
    capsys.readouterr()
    for words in (["--resume", str(run.folder)], ["--eval-only", "--checkpoint", str(file)]):
        assert train(argv=words).status == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{words[-2]} {file}: is damaged" in line and everything_in(run.folder) == before


def test_the_gpus_random_state_is_kept(tmp_path, monkeypatch):
    """Pretended: what the GPU's generator had when it was saved, it has again."""
    state, given = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    run = object.__new__(a2po_smac.Run)
    run.args, run.device, run.folder = a2po_smac.Args(), types.SimpleNamespace(type="cuda"), tmp_path
    run.envs = types.SimpleNamespace(crashes=2, get_state=lambda: None, set_state=lambda _: None)
    run.learned, run.hidden, run.progress, run.evaluations = {}, {}, {}, tmp_path / "eval.jsonl"
    assert run.save()
    run.checkpoint = a2po_smac.read_checkpoint(tmp_path / "checkpoint.pt", "--resume")
    run.go_back()
    assert len(given) == 1 and torch.equal(given[0], state)


def test_evaluations_that_cannot_be_written(train, monkeypatch):
    """The run ends with one line, as it was at its last checkpoint."""
    with_a_full_disk(monkeypatch, "eval.jsonl")
    run = train(save_every=30, total_timesteps=60, eval_every=50)
    assert os.strerror(errno.ENOSPC) in run.status and "\n" not in run.status
    assert run.checkpoint["progress"]["iteration"] == 2  # and the evaluation was due in the third


@pytest.mark.parametrize("link", [False, True])
def test_runs_that_cannot_be_written(tmp_path, monkeypatch, capsys, link):
    """`runs` is a file, or a link to nowhere."""
    if link:
        (tmp_path / "runs").symlink_to(tmp_path / "gone" / "runs")
    else:
        (tmp_path / "runs").write_text("")
    monkeypatch.chdir(tmp_path)
    with in_place_of_the_simulator(a2po_smac, Skirmish) as games, pytest.raises(SystemExit) as left:
        a2po_smac.main(make_args(a2po_smac))
    assert left.value.code == 2 and games[0].record == [], "before the work"
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs/3m-smax__a2po_smac__3" in line and "cannot be written" in line


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock, naps = iter([7.2, 7.3, 7.9, 8.1]), []
    monkeypatch.setattr(a2po_smac, "time", types.SimpleNamespace(time=lambda: next(clock), sleep=naps.append))
    assert [str(a2po_smac.new_folder("a__1")) for _ in range(2)] == ["runs/a__1__7", "runs/a__1__8"]
    assert len(naps) == 2 and all(Path("runs", name).is_dir() for name in ("a__1__7", "a__1__8"))


# --------------------------------------------------------------------------------------------------------- signals
def signalled(step):
    return lambda num_envs: Skirmish(num_envs, signal_at=step, signal_number=signal.SIGINT)


def test_the_first_signal_says_what_will_happen(train, capfd):
    """At once, and what a second one does."""
    run = train(game=signalled(SMALL["num_steps"] + 3), total_timesteps=60)
    lines = capfd.readouterr().err.splitlines()
    stopping = next(k for k, line in enumerate(lines) if line.startswith("stopping: saves at the end"))
    assert "a second" in lines[stopping] and any("--resume" in line for line in lines[stopping + 1 :])
    assert run.status == 128 + signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals(train, number):
    """That of `kill`, and what a terminal sends that is closed, once or twice."""
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    game = lambda num_envs: Skirmish(num_envs, signal_at=SMALL["num_steps"] + 3, signal_number=number)  # noqa: E731
    run = train(game=game, total_timesteps=60)
    signal.signal(number, before)
    assert run.status == 128 + number and run.checkpoint["progress"]["iteration"] == 2 and run.handlers_are_back


def test_nohup_holds(train):
    """It has SIGHUP ignored, which the run leaves so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    game = lambda num_envs: Skirmish(num_envs, signal_at=3, signal_number=signal.SIGHUP)  # noqa: E731
    run = train(game=game)
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
    assert run.status == 0 and run.checkpoint["progress"]["global_step"] >= 30


@pytest.mark.parametrize("first", [True, False])
def test_nobody_reads_any_more(train, monkeypatch, first):
    """In `... 2>&1 | tee log` Ctrl-C ends tee, before or after the run tells that it stops: it saves all the same, with
    the status of the signal."""
    kept, (reader, writer) = os.dup(2), os.pipe()

    class Piped(Skirmish):
        def step(self, actions):
            number = len(self.record)
            if first and number == self.signal_at:
                os.close(reader)
            seen = super().step(actions)
            if not first and number == self.signal_at:
                os.close(reader)
            return seen

    def game(num_envs):
        return Piped(num_envs, signal_at=SMALL["num_steps"] + 3, signal_number=signal.SIGINT)

    os.dup2(writer, 2)
    os.close(writer)
    monkeypatch.setattr(sys, "stderr", open(2, "w", buffering=1, closefd=False))
    try:
        run = train(game=game, total_timesteps=60)
        sys.stderr.flush()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    assert run.status == 128 + signal.SIGINT and run.checkpoint["progress"]["iteration"] == 2


def test_a_signal_in_the_last_iteration(train, capfd):
    """What is complete says so, and not that it should be resumed."""
    run = train(game=signalled(SMALL["num_steps"] + 3))
    error = capfd.readouterr().err
    assert run.status == 0 and run.checkpoint["progress"]["iteration"] == 2
    assert f"{run.folder.name} is complete" in error and "--resume" not in error


# ------------------------------------------------------------------------------------------------------- --eval-only
def test_what_an_evaluation_leaves(train, tmp_path, capsys):
    """Mean, spread and number on the screen; with --out a line of JSON for each call."""
    run = train()
    checkpoint, out = str(run.folder / "checkpoint.pt"), tmp_path / "scores.jsonl"
    capsys.readouterr()
    for episodes in (5, 4):
        words = ["--eval-only", "--checkpoint", checkpoint, "--eval-episodes", str(episodes), "--out", str(out)]
        assert train(argv=words).status == 0
    five, four = map(json.loads, out.read_text().splitlines())
    assert (len(five["won"]), len(four["return"])) == (5, 4) and five["script"] == "a2po_smac"
    assert five["step"] == run.checkpoint["progress"]["global_step"] and five["checkpoint"] == checkpoint
    assert five["win_rate"] == sum(five["won"]) / 5
    returns = torch.tensor(five["return"], dtype=torch.float64)
    expected = f"return {returns.mean():.3f} (std {returns.std(correction=0):.3f})"
    assert f"5 greedy episodes: won {five['win_rate']:.3f}" in (shown := capsys.readouterr().out) and expected in shown


def test_an_evaluation_is_written_before_it_is_told(train, tmp_path, monkeypatch):
    """Where nothing can be told, as in `... | true`, the line in --out is there."""
    run, out = train(), tmp_path / "scores.jsonl"

    def closed(*_, file=None, **options):
        if file is None:
            raise BrokenPipeError
        return print(*_, file=file, **options)

    monkeypatch.setattr(a2po_smac, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        train(argv=["--eval-only", "--checkpoint", str(run.folder / "checkpoint.pt"), "--out", str(out)])
    assert len(json.loads(out.read_text())["won"]) == 2


def test_an_evaluation_whose_record_has_no_place(train, tmp_path, capsys):
    """Before it is played."""
    run = train()
    words = ["--eval-only", "--checkpoint", str(run.folder / "checkpoint.pt")]
    again = train(argv=[*words, "--out", str(run.folder / "config.json" / "scores")])
    assert again.status == 2 and again.games[0].record == []
    assert "--out" in (line := capsys.readouterr().err.splitlines()[-1]) and "cannot be written" in line
    assert train(argv=[*words, "--out", "/dev/full"]).status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--out /dev/full: cannot be written: {os.strerror(errno.ENOSPC)}")
    assert train(argv=["--out", "scores"]).status == 2 and "--out scores: is for --eval-only" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- W&B
@pytest.fixture
def wandb(monkeypatch):
    """A double of the package, logged in; `began` has what wandb.init was called with."""
    module = types.ModuleType("wandb")
    module.mode, module.key, module.began = "online", True, []
    module.init = lambda **options: module.began.append(options | {"events": list(Path().glob("runs/*/events*"))})
    module.login = lambda prompt, verify: module.key and not prompt
    module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=module.mode))
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_tracking(train, wandb):
    """Project, team, group, the run's name; a resumed run goes on in the same one."""
    run = train(track=True, wandb_entity="team", wandb_group="seeds", exp_name="mine")
    train(argv=["--resume", str(run.folder), "--total-timesteps", "60"])
    first, second = wandb.began
    assert first["name"] == run.folder.name and (first["entity"], first["group"]) == ("team", "seeds")
    assert first["events"] == []  # W&B follows the writers that are made after its init
    assert first["id"] == second["id"] and second["resume"] == "allow" and first["config"]["gae_lambda"] == 0.9


def test_tracking_needs_a_login(wandb, tmp_path, monkeypatch, capsys):
    wandb.key = False
    monkeypatch.chdir(tmp_path)
    (line,) = left_with(a2po_smac, ["--map", "3m", "--track"], capsys)
    assert "--track" in line and "wandb login" in line and not any(tmp_path.iterdir())
    wandb.mode = "offline"
    with in_place_of_the_simulator(a2po_smac, Skirmish):
        a2po_smac.main(make_args(a2po_smac, track=True))
    assert len(wandb.began) == 1


def test_nothing_needs_a_terminal(train, monkeypatch):
    """Evaluations are written and logged where nobody looks on."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    run = train(eval_every=10)
    assert evaluations(run.folder) and "eval/win_rate" in scalars(run.folder)
