"""benchmark/run.py: its matrices, and what it skips and resumes."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from benchmark import plot, run

ROOT = Path(__file__).resolve().parents[1]


def test_nothing_heavy_is_imported():
    code = "import runpy, sys; [runpy.run_path(f'benchmark/{n}.py') for n in ('plot', 'run')]; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"ray", "matplotlib", "rliable", "torch"} & set(modules.split())


def jobs_of(*argv):
    return run.make_jobs(run.parse_args(run.Args, "", list(argv)))


def test_counts():
    scripts = {path.stem for path in ROOT.glob("*_*.py")}

    def existing(benchmark):
        return sum(f"{algorithm}_{benchmark}" in scripts for algorithm in run.ALL)

    assert len(jobs_of("table2")[0]) == 12 * 4 * 3
    assert len(jobs_of("table2", "--smax", "--seeds", "5")[0]) == 9 * 4
    assert len(jobs_of("figure3", "--seeds", "1")[0]) == 14 * existing("mamujoco")
    assert len(jobs_of("figure10", "--seeds", "1")[0]) == 4 * existing("mpe")
    assert len(jobs_of("figure4", "--seeds", "1")[0]) == 2 * existing("grf")
    names = {job.algorithm for job in jobs_of("preopc", "--seeds", "1", "--tasks", "3s5z")[0]}
    assert names == {"a2po_smac", "a2po_smac-gae-targets", "a2po_smac-no-preopc"}
    names = {job.algorithm for job in jobs_of("figure5", "--seeds", "1", "--tasks", "3s5z")[0]}
    plain = {f"{algorithm}_smac" for algorithm in (*run.ALL, "rpisa")}
    corrected = {"mappo_smac-vtrace", "coppo_smac-vtrace", "happo_smac-preopc", "a2po_smac-no-preopc"}
    assert names == plain | corrected, "the paper's list, and A2PO without PreOPC"
    jobs = jobs_of("figure13", "--seeds", "1")[0]
    assert {job.algorithm for job in jobs} == {name.replace("smac", "mamujoco") for name in names}
    assert {job.task for job in jobs} == {"HalfCheetah-6x1", "Humanoid-9|8"} and len(jobs) == 2 * len(names)
    assert len(jobs_of("figure6", "--seeds", "1", "--tasks", "3s5z")[0]) == 6
    assert len(jobs_of("figure5-7", "--smax", "--seeds", "1")[0]) == 8
    assert len(jobs_of("figure14")[0]) == 3 * 5 * 2 * 3, "tasks, lambdas, with and without PreOPC, seeds"
    assert len(jobs_of("table6")[0]) == 2 * 4 + 3 * existing("mamujoco") + existing("grf")
    assert [job.script.stem for job in jobs_of("table2", "--tasks", "3s5z", "--algorithms", "mappo")[0]] == [
        "mappo_smac"
    ] * 3
    assert jobs_of("figure3", "--smax")[0] == []
    assert len(jobs_of("table2", "--seeds", "1", "1", "--tasks", "3s5z", "3s5z")[0]) == 4, "nothing twice"


def test_steps_may_be_written_with_an_exponent():
    for text in ("2000000", "2_000_000", "2e6"):
        assert jobs_of("preopc", "--total-timesteps", text)[0][0].total_timesteps == 2_000_000
    with pytest.raises(SystemExit):
        jobs_of("preopc", "--total-timesteps", "2.5")


@pytest.mark.parametrize("matrix", run.MATRICES)
def test_every_command_is_one_of_its_script(matrix, monkeypatch):
    """All options exist and pass the script's own checks; the variants are named as plot.py names them."""
    jobs, missing = jobs_of(matrix, "--seeds", "1", "--total-timesteps", "1000")
    assert jobs and len({job.name for job in jobs}) == len(jobs)
    assert not [name for name in missing if (ROOT / name).exists()]
    for job in jobs:
        command = job.command(cpus=2)
        module = run.load(job.script)
        monkeypatch.setattr(module, "find_starcraft2", lambda: (True, ""), raising=False)
        monkeypatch.setattr(module, "find_football", lambda: True, raising=False)
        args = module.complete_args(module.parse_args(command[2:]))
        assert (args.seed, args.total_timesteps, args.torch_threads) == (1, 1000, 2)
        ablation, _, setting = job.variant.partition(" ")
        assert plot.variant(vars(args)) == ablation
        assert not setting or plot.named({"gae_lambda": args.gae_lambda}) == f" {setting}"
        assert module.parse_args([*job.options, "--total-timesteps", "1000"]) == run.settings(job)


def test_smax_tasks_are_those_of_the_script():
    module = run.load(ROOT / "a2po_smac.py")
    assert set(run.SMAC_MAPS) == set(module.TABLE_7) - {"2m_vs_1z", "2s_vs_1sc"}, "those are ours"
    assert set(run.NOT_ON_SMAX) == set(run.SMAC_MAPS) - set(module.SMAX_MAPS)
    assert sorted(run.SMAC_MAPS + run.OTHER_MAPS) == sorted({*module.SMAC_MAPS, *module.SMAX_MAPS})
    assert run.SMACV2_MAP.replace("(", "").replace(")", "") == module.SMACV2_MAP.replace("(", "").replace(")", "")


def test_every_free_setting_is_one_of_some_script():
    scripts = [run.load(path) for path in ROOT.glob("*_*.py")]
    assert run.FREE <= {name for script in scripts for name in script.Args.__dataclass_fields__}


def test_football_tasks_are_those_of_the_script():
    module = run.load(ROOT / "a2po_grf.py")
    assert set(run.FOOTBALL_TASKS) == set(module.SCENARIOS)
    for task in module.SCENARIOS:
        benchmark, options = run.task_options(task, smax=False)
        assert benchmark == "grf" and options[:2] == ("--scenario", task)
        assert ("--share-parameters" in options) == task.startswith("11_vs_11"), "as in the paper"
    assert run.task_options("protoss_5_vs_5", smax=False)[0] == "smac"


def test_mujoco_tasks_are_those_of_the_script():
    module = run.load(ROOT / "a2po_mamujoco.py")
    tasks = {f"{robot}-{partition}" for robot, partitions in module.PARTITIONS.items() for partition in partitions}
    assert set(run.MUJOCO_TASKS) == tasks - set(run.OTHER_ROBOTS) and len(run.MUJOCO_TASKS) == 14
    for task in tasks:
        benchmark, options = run.task_options(task, smax=False)
        assert benchmark == "mamujoco" and module.parse_args(list(options)).partition == task.split("-")[1]


@pytest.mark.parametrize(
    "task, meant",
    [
        ("Ant_4x2", "Ant-4x2"),
        ("ant-4x2", "Ant-4x2"),
        ("Humanoid-9x8", "Humanoid-9|8"),
        ("3s_5z", "3s5z"),
        ("5vs5", "5_vs_5"),
        ("spread_3_0", "spread-3-0"),
        ("academy_cornr", "academy_corner"),
        ("mmm2", "MMM2"),
    ],
)
def test_a_task_that_is_none_is_one_line_with_what_may_have_been_meant(task, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        jobs_of("figure10", "--tasks", "3s5z", task)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"did you mean {meant}?" in line and "spread-{agents}" in line


def test_a_task_like_none_is_one_line(capsys):
    with pytest.raises(SystemExit):
        jobs_of("figure10", "--tasks", "quidditch")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run.py: error: --tasks quidditch: it must be one of SMAC's maps")


FAKE = '''
"""Counts to --total-timesteps, 100 steps an iteration, and stops on SIGTERM as the real ones do."""
import dataclasses, fcntl, json, os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import tyro

@dataclass
class Args:
    map: str = "3s5z"
    simulator: str = "auto"
    seed: int = 1
    total_timesteps: int = 1000
    gae_lambda: float | None = None
    preopc: bool = True
    preopc_targets: bool = True
    clip_adaptation: float = 0.5
    torch_threads: int | None = None
    resume: str = ""
    exp_name: str = Path(__file__).stem
    fail: bool = False
    sleep: float = 0.0

def parse_args(argv=None):
    args = tyro.cli(Args, args=argv)
    if args.resume:
        saved = json.loads((Path(args.resume) / "checkpoint.pt").read_text())["args"]
        args = tyro.cli(Args, default=Args(**saved), args=argv)
    return args

def complete_args(args):
    if args.total_timesteps < 1:
        print("fake: error: --total-timesteps", file=sys.stderr)
        raise SystemExit(2)
    gae_lambda = 0.95 if args.gae_lambda is None else args.gae_lambda
    return dataclasses.replace(args, simulator="smax", gae_lambda=gae_lambda)

def main(args):
    args = complete_args(args)
    if args.fail or args.seed == 13:
        sys.exit("no luck")
    name, step = f"{args.map}-smax__{args.exp_name}__{args.seed}__{time.time_ns()}", 0
    run_dir = Path(args.resume or f"runs/{name}")
    checkpoint, file = run_dir / "checkpoint.pt", run_dir / "config.json"
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name != "resume"}
    config = settings | {"script": Path(__file__).stem, "stretches": []}
    if args.resume:
        step, config = json.loads(checkpoint.read_text())["step"], json.loads(file.read_text())
        lines = (run_dir / "eval.jsonl").read_text().splitlines(keepends=True)
        (run_dir / "eval.jsonl").write_text("".join(lines[: step // 100]))
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = file.open("a")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    changed = {name: value for name, value in settings.items() if config[name] != value}
    config["stretches"].append({"step": step, "changed": changed})
    file.write_text(json.dumps(config))
    print(run_dir, os.environ["OMP_NUM_THREADS"], flush=True)
    print("pids", os.environ.get("RAY_RAYLET_PID"), os.getppid(), os.getpid(), flush=True)  # node, worker, script
    stops = []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
    while step < args.total_timesteps and not stops:
        time.sleep(args.sleep)
        step += 100
        with (run_dir / "eval.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "win_rate": 0.5}) + "\\n")
        share = 100 * step // args.total_timesteps
        print(f"\\r {share}%|##  | {step}/{args.total_timesteps} [SPS 7]", end="", flush=True)
        checkpoint.with_suffix(".tmp").write_text(json.dumps({"step": step, "args": settings}))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    if stops:
        sys.exit(print("\\ntold to stop") or 143)

if __name__ == "__main__":
    main(parse_args())
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The folder of a project with one script, in which run.py makes its jobs."""
    (tmp_path / "a2po_smac.py").write_text(FAKE)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.delitem(sys.modules, "a2po_smac", raising=False)
    yield tmp_path
    sys.modules.pop("a2po_smac", None)


def start(job, base, run_dir=None):
    return run.run_process(job.command(1, run_dir), base, run.log_of(job, base), 0)


def fake_jobs(*argv):
    jobs = jobs_of("preopc", "--smax", "--tasks", "3s5z", "--seeds", "1", *argv)[0]
    return [job for job in jobs if "targets" not in job.variant]


def test_new_done_cut_off(fake):
    plain, ablation = fake_jobs("--total-timesteps", "300")
    assert run.find_run(plain, fake) == ("new", None)
    assert start(plain, fake) == 0
    state, run_dir = run.find_run(plain, fake)
    assert state == "done" and not run_dir.is_absolute()
    assert run.find_run(ablation, fake) == ("new", None)  # other settings
    assert run.progress_of(run.log_of(plain, fake)) == (1.0, "300/300 [SPS 7]")
    assert f"{run_dir} 1" in run.log_of(plain, fake).read_text()  # OMP_NUM_THREADS

    longer, _ = fake_jobs("--total-timesteps", "500")
    assert run.find_run(longer, fake) == ("cut off", run_dir)
    assert longer.command(1, run_dir)[2:6] == ["--resume", str(run_dir), "--total-timesteps", "500"]
    assert start(longer, fake, run_dir) == 0
    steps = [json.loads(line)["step"] for line in (fake / run_dir / "eval.jsonl").read_text().splitlines()]
    assert steps == [100, 200, 300, 400, 500]
    assert run.find_run(longer, fake)[0] == run.find_run(plain, fake)[0] == "done"
    other, _ = fake_jobs("--total-timesteps", "300", "--options=--gae-lambda 0.9")
    assert run.find_run(other, fake)[0] == "new"
    same, _ = fake_jobs("--options=--gae-lambda 0.95 --total-timesteps 500")
    assert run.find_run(same, fake)[0] == "done"


def test_a_run_that_was_resumed_with_other_settings_belongs_to_no_job(fake):
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    run_dir = run.find_run(job, fake)[1]
    job, _ = fake_jobs("--total-timesteps", "500")
    resumed = [*job.command(1, run_dir), "--sleep", "0.001"]
    assert run.run_process(resumed, fake, run.log_of(job, fake), 0) == 0
    first, second = run.read_config(fake / run_dir / "config.json")["stretches"]
    assert (second["step"], second["changed"]) == (300, {"total_timesteps": 500, "sleep": 0.001})
    assert run.find_run(job, fake) == ("new", None)
    assert run.resumed_with({"stretches": [first, second]}) == [(300, {"sleep": 0.001})]
    back = {"step": 400, "changed": {"torch_threads": 7}}
    assert run.resumed_with({"stretches": [first, second, second, back]}) == [(300, {"sleep": 0.001}), (400, {})]
    assert run.resumed_with({"stretches": [first, back]}) == run.resumed_with({}) == []


def test_a_stretch_that_was_never_saved_does_not_count(fake):
    """A run resumed with a wrong option, which ended before it saved, is still the job's."""
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    run_dir = fake / run.find_run(job, fake)[1]
    file, config = run_dir / "config.json", run.read_config(run_dir / "config.json")
    wrong = {"step": 300, "changed": {"gae_lambda": 0.5}}
    file.write_text(json.dumps(config | {"stretches": [*config["stretches"], wrong]}))
    for step, gae_lambda, state in ((300, 0.95, "done"), (301, 0.5, "new"), (300, 0.5, "new")):
        saved = {"progress": {"global_step": step}, "args": {"gae_lambda": gae_lambda}}
        torch.save(saved, run_dir / "checkpoint.pt")
        assert run.find_run(job, fake)[0] == state
        if state == "done":
            assert run.collect([job], fake, fake / "results") == 0
            (collected,) = (fake / "results").rglob("*.config.json")
            assert run.read_config(collected)["stretches"] == config["stretches"]
    (run_dir / "checkpoint.pt").write_text("damaged")
    assert run.find_run(job, fake)[0] == "new"


def test_a_damaged_config_is_of_no_run(fake):
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    file = fake / run.find_run(job, fake)[1] / "config.json"
    config = run.read_config(file)
    bad = [json.dumps(config | {"stretches": x}) for x in (3, [3], [{"step": 3}], [{"step": "a", "changed": {}}])]
    for contents in ("[1]", "{half", *bad):
        file.write_text(contents)
        assert run.read_config(file) == {} and run.find_run(job, fake) == ("new", None)


def test_runs_of_another_name_are_others(fake):
    plain, _ = fake_jobs("--total-timesteps", "300")
    idea, _ = fake_jobs("--total-timesteps", "300", "--options=--exp-name idea")
    start(plain, fake)
    assert run.find_run(idea, fake)[0] == "new"
    start(idea, fake)
    assert run.find_run(idea, fake)[0] == run.find_run(plain, fake)[0] == "done"
    run.collect([plain, idea], fake, fake / "results")
    assert set(plot.read([fake / "results"])["3s5z-smax"]) == {"a2po_smac", "idea"}
    older = json.loads((fake / run.find_run(plain, fake)[1] / "config.json").read_text())
    del older["exp_name"]
    (fake / run.find_run(plain, fake)[1] / "config.json").write_text(json.dumps(older))
    assert run.find_run(plain, fake)[0] == "done"


def test_a_setting_that_an_older_run_does_not_have_is_as_by_default(fake):
    plain, without = fake_jobs("--total-timesteps", "300")
    start(plain, fake)
    file = fake / run.find_run(plain, fake)[1] / "config.json"
    older = run.read_config(file)
    del older["preopc"], older["gae_lambda"]  # the latter depends on the task
    file.write_text(json.dumps(older))
    assert run.find_run(plain, fake)[0] == "done" and run.find_run(without, fake)[0] == "new"


def test_a_script_of_ones_own(fake, capsys):
    """Also two of one benchmark; what is not there is told with what is."""
    (fake / "kl_smac.py").write_text(FAKE)
    (fake / "soft_kl_smac.py").write_text(FAKE)
    jobs, _ = jobs_of("table2", "--tasks", "3s5z", "--seeds", "1", "--algorithms", "kl", "soft_kl", "a2po")
    assert [job.script.name for job in jobs] == ["kl_smac.py", "soft_kl_smac.py", "a2po_smac.py"]
    assert len(jobs_of("preopc", "--tasks", "3s5z", "--seeds", "1", "--algorithms", "kl")[0]) == 3
    assert jobs_of("preopc", "--tasks", "3s5z", "--algorithms", "mappo")[0] == []
    assert start(fake_jobs("--algorithms", "kl", "--total-timesteps", "100")[0], fake) == 0
    with pytest.raises(SystemExit) as stop:
        jobs_of("table2", "--algorithms", "kl", "lk")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("run.py: error: --algorithms lk: ")
    assert line.endswith("for these tasks there are a2po kl soft_kl")
    sys.modules.pop("kl_smac", None)


def test_run_without_checkpoint_starts_anew_and_a_cut_line_is_no_step(fake):
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    run_dir = fake / run.find_run(job, fake)[1]
    (run_dir / "eval.jsonl").write_text('{"step": 200, "win_rate": 1}\n{"step": 300, "win')
    assert run.find_run(job, fake)[0] == "cut off"
    (run_dir / "checkpoint.pt").unlink()
    assert run.find_run(job, fake) == ("new", None)


def test_what_others_run_is_left_alone(fake):
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    longer, _ = fake_jobs("--total-timesteps", "900")
    run_dir = run.find_run(longer, fake)[1]
    log = run.log_of(longer, fake)
    with log.open("ab") as file:  # a process of an earlier call
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run.find_run(longer, fake)[0] == "running"
        assert isinstance(start(longer, fake, run_dir), str)
    assert run.find_run(longer, fake) == ("cut off", run_dir)
    with (fake / run_dir / "config.json").open("a") as file:  # somebody else's
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run.find_run(longer, fake) == ("running", run_dir)
    assert run.find_run(longer, fake) == ("cut off", run_dir)


def test_failure_has_status_and_reason(fake):
    job, _ = fake_jobs("--options=--fail")
    assert start(job, fake) == 1
    assert run.reason_of(run.log_of(job, fake)) == "no luck"


@pytest.fixture
def ignoring_ctrl_c():
    """As what a shell starts in the background does, and Ray's workers with it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_becomes_sigterm(fake, ignoring_ctrl_c):
    job, _ = fake_jobs("--total-timesteps", "100000", "--options=--sleep 0.02")

    def interrupt():
        while not list(fake.glob("runs/*/eval.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert start(job, fake) == 143
    assert run.find_run(job, fake)[0] == "cut off"


def test_collect(fake, capsys):
    jobs = fake_jobs("--total-timesteps", "1000")
    start(jobs[1], fake)
    assert run.collect(jobs, fake, fake / "results") == 1
    assert sorted(path.name for path in (fake / "results" / "3s5z-smax").iterdir()) == [
        "a2po_smac-no-preopc__1.config.json",
        "a2po_smac-no-preopc__1.jsonl",
    ]
    assert "not finished (new): 3s5z-smax__a2po_smac__1" in capsys.readouterr().out
    (found,) = plot.read([fake / "results"])["3s5z-smax"]["a2po_smac-no-preopc"]
    assert found.records[-1]["step"] == 1000


def test_collect_replaces_no_run_with_other_settings(fake, capsys):
    """The same one again, further, may be; not one that did not get as far."""
    for total in ("300", "500"):
        job, _ = fake_jobs("--total-timesteps", total)
        start(job, fake, run.find_run(job, fake)[1])
        assert run.collect([job], fake, fake / "results") == 0
    elsewhere, shorter = fake / "elsewhere", fake_jobs("--total-timesteps", "300")[0]
    elsewhere.mkdir()
    start(shorter, elsewhere)
    with pytest.raises(SystemExit) as stop:
        run.collect([shorter], elsewhere, fake / "results")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "a run of 500 steps, not 300; give another folder" in line
    other, _ = fake_jobs("--total-timesteps", "300", "--options=--gae-lambda 0.9")
    start(other, fake)
    with pytest.raises(SystemExit) as stop:
        run.collect([other], fake, fake / "results")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "gae_lambda 0.95, not 0.9; give another folder" in line
    (found,) = plot.read([fake / "results"])["3s5z-smax"]["a2po_smac"]
    assert found.records[-1]["step"] == 500
    assert run.collect([other], fake, fake / "others") == 0


def test_collect_calls_files_as_plot_does(fake):
    job, _ = fake_jobs("--total-timesteps", "300", "--options=--clip-adaptation 0.3")
    start(job, fake)
    run.collect([job], fake, fake / "results")
    (file,) = (fake / "results").rglob("*__1.jsonl")
    assert list(plot.read([fake / "results"])["3s5z-smax"]) == list(plot.read([fake / "runs"])["3s5z-smax"])
    assert file.name == "a2po_smac clip_adaptation=0.3__1.jsonl"


def test_lambdas_are_collected_side_by_side_and_named(fake):
    """Among them the task's own, which is the plain run; with further options, too."""
    argv = ["figure14", "--smax", "--tasks", "3s5z", "--seeds", "1", "--total-timesteps", "100"]
    jobs = jobs_of(*argv)[0]
    plain, _ = fake_jobs("--total-timesteps", "100")
    start(plain, fake)
    assert [job.variant for job in jobs if run.find_run(job, fake)[0] == "done"] == [" gae_lambda=0.95"]
    for job in jobs:
        if job.variant != " gae_lambda=0.95":
            start(job, fake)
    assert run.collect(jobs, fake, fake / "results") == 0
    names = {f"a2po_smac{end} gae_lambda={x}" for end in ("", "-no-preopc") for x in (0.9, 0.93, 0.95, 0.97, 0.99)}
    assert set(plot.read([fake / "results"])["3s5z-smax"]) == names
    assert {path.name for path in (fake / "results").rglob("*.jsonl")} == {f"{name}__1.jsonl" for name in names}
    jobs = jobs_of(*argv, "--options=--clip-adaptation 0.3")[0][:2]
    for job in jobs:
        start(job, fake)
    assert run.collect(jobs, fake, fake / "others") == 0
    ends = {f"a2po_smac{end} clip_adaptation=0.3" for end in ("", "-no-preopc")}
    assert set(plot.read([fake / "others"])["3s5z-smax"]) == ends, "there is one lambda"
    names |= {f"{end} gae_lambda=0.9" for end in ends}
    assert set(plot.read([fake / "results", fake / "others"])["3s5z-smax"]) == names


def log_orders(run_dir, ranks, orders, begin=1, purge_step=None, method="a2po"):
    """As the scripts do, by iteration: the rank of each agent, and the agents in the order of their updates."""
    with SummaryWriter(run_dir, purge_step=purge_step) as writer:
        for step, (of_agent, order) in enumerate(zip(ranks, orders, strict=True), begin):
            for i, rank in enumerate(of_agent):
                writer.add_scalar(f"a2po/rank_of_agent/{i}", rank, step)
            for place, i in enumerate(order, 1):
                writer.add_scalar(f"{method}/position_of_agent/{i}", place, step)
            writer.add_scalar("a2po/position_1/ratio", 1.0, step)


def test_ranks_and_places_are_counted(tmp_path):
    """Of twelve agents, in whose names 10 comes before 2; what was done again after a resumption counts once."""
    random = np.random.default_rng(0)
    ranks, orders = (np.array([random.permutation(12) for _ in range(30)]) for _ in range(2))
    log_orders(tmp_path / "a", ranks[:20] + 1, orders[:20])
    log_orders(tmp_path / "a", ranks[15:] + 1, orders[15:], begin=16, purge_step=16)
    counts = run.count_orders(tmp_path / "a")
    assert counts["rank"] == [[sum(ranks[t][i] == k for t in range(30)) for k in range(12)] for i in range(12)]
    assert counts["position"] == [[sum(orders[t][k] == i for t in range(30)) for k in range(12)] for i in range(12)]
    log_orders(tmp_path / "happo", [[]] * 30, orders, method="happo")
    assert run.count_orders(tmp_path / "happo") == {} == run.count_orders(tmp_path), "no ranks, no events"


def test_ranks_and_places_are_collected(fake):
    """Where there are any; they lie where plot.py looks for them."""
    jobs = fake_jobs("--total-timesteps", "300")
    for job in jobs:
        start(job, fake)
    run_dir = fake / run.find_run(jobs[1], fake)[1]
    log_orders(run_dir, [[2, 1], [2, 1], [1, 2]], [[0, 1], [1, 0], [1, 0]])
    assert run.collect(jobs, fake, fake / "results") == 0
    (file,) = (fake / "results").rglob("*.orders.json")
    assert file.name == "a2po_smac-no-preopc__1.orders.json"
    assert json.loads(file.read_text()) == {"rank": [[1, 2], [2, 1]], "position": [[1, 2], [2, 1]]}
    for folder in (fake / "results", run_dir):
        ((name, shares),) = plot.read_orders(plot.read([folder], algorithms=["a2po_smac-no-preopc"]))[
            "3s5z-smax"
        ].items()
        assert name == "a2po_smac-no-preopc" and (3 * shares["rank"]).tolist() == [[1, 2], [2, 1]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_collect_on_a_full_disk_is_one_line(fake, capsys):
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    folder = fake / "results" / "3s5z-smax"
    folder.mkdir(parents=True)
    (folder / "a2po_smac__1.jsonl").write_text("as it was")
    (folder / "a2po_smac__1.jsonl.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stop:
        run.collect([job], fake, fake / "results")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(
        f"run.py: error: --collect {fake / 'results'}: cannot be written: No"
    )
    assert (folder / "a2po_smac__1.jsonl").read_text() == "as it was"
    assert sorted(path.name for path in folder.iterdir()) == ["a2po_smac__1.config.json", "a2po_smac__1.jsonl"]


def test_dry_run_prints_what_is_missing(fake, capsys):
    argv = ["preopc", "--smax", "--tasks", "3s5z", "--seeds", "1", "--total-timesteps", "200", "--dir", str(fake)]
    start(fake_jobs("--total-timesteps", "200")[0], fake)
    assert run.main(run.parse_args(run.Args, "", [*argv, "--dry-run"])) == 0
    printed = capsys.readouterr()
    targets, line = sorted(printed.out.splitlines(), key=lambda line: "targets" not in line)
    assert "--no-preopc-targets" in targets and "--no-preopc " in line and "--torch-threads 1" in line
    assert "3 jobs: 1 done, 2 new" in printed.err


def test_authors_settings():
    """Their launch scripts: epochs of MAPPO, CoPPO and HAPPO, and lambda 0.95; A2PO's critic steps, and where they
    give it other settings than the paper's tables."""
    tasks = "3s5z_vs_3s6z spread-3-0 spread-5-0.5 spread-6-0 spread-10-0.5 Ant-4x2 Walker2d-2x3 Hopper-3x1".split()
    tasks += "5_vs_5 HalfCheetah-2x3 Humanoid-9|8 Humanoid-17x1 HumanoidStandup-9|8 HumanoidStandup-17x1".split()
    (as_in_tables, _), (theirs, _) = (
        jobs_of("figure3", "--seeds", "1", "--tasks", *tasks, *flag) for flag in ([], ["--authors-settings"])
    )
    epochs = dict.fromkeys([task for task in tasks if task.startswith(("spread", "Ant", "Hopper"))], "5")
    blocks = ("--agent-blocks", "3")
    a2po = dict.fromkeys(("spread-3-0", "spread-5-0.5"), ("--gae-lambda", "0.95"))
    a2po |= dict.fromkeys(("spread-6-0", "spread-10-0.5"), blocks)  # with Table 10's lambda, 0.97
    a2po |= {"HumanoidStandup-9|8": ("--update-epochs", "8")}
    a2po |= {"HumanoidStandup-17x1": ("--gae-lambda", "0.95", "--agent-blocks", "5")}
    for before, job in zip(as_in_tables, theirs, strict=True):
        added = job.options[len(before.options) :]
        expected = ("--gae-lambda", "0.95")
        expected += ("--update-epochs", epochs[job.task]) if job.task in epochs else ()
        if job.algorithm.startswith("a2po"):
            expected = () if job.task == "3s5z_vs_3s6z" else ("--critic-steps", "2", *a2po.get(job.task, ()))
        if job.task == "Humanoid-17x1" and job.algorithm[:5] in ("a2po_", "happo"):
            expected += blocks
        assert job.options[: len(before.options)] == before.options
        assert added == expected, job
    other_epochs = {"3s5z": "5", "3s_vs_5z": "10", "6h_vs_8z": "5", "MMM": "10"}
    other = {task: run.authors_options(task, "happo")[3:] for task in run.SMAC_MAPS}
    assert {task: x[0] for task, x in other.items() if x} == other_epochs
    once = [task for task in run.SMAC_MAPS if not run.authors_options(task, "a2po")]
    assert once == ["3s_vs_5z", "6h_vs_8z", "3s5z_vs_3s6z"]
    # Other algorithms than theirs, and games that no launch script is for.
    assert run.authors_options("3s5z", "rpisa") == run.authors_options("8m", "a2po") == ()


def test_a_new_dir_is_made(fake, tmp_path, monkeypatch):
    """By the runs, not by a dry run."""
    new = tmp_path / "a" / "b"
    monkeypatch.setattr(run, "run_all", lambda jobs, args, cpus, base: base)
    argv = ["preopc", "--smax", "--tasks", "3s5z", "--seeds", "1", "--dir", str(new)]
    assert run.main(run.parse_args(run.Args, "", [*argv, "--dry-run"])) == 0 and not new.parent.exists()
    assert run.main(run.parse_args(run.Args, "", argv)) == new and (new / "runs" / "logs").is_dir()


def test_a_game_that_is_not_here_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run.load(ROOT / "mappo_smac.py"), "find_starcraft2", lambda: (False, "no game"))
    run.settings.cache_clear()
    with pytest.raises(SystemExit) as stop:
        run.main(run.parse_args(run.Args, "", ["table2", "--algorithms", "mappo", "--dir", str(tmp_path)]))
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run.py: error: mappo_smac.py --map MMM") and "no game" in line


@pytest.mark.parametrize(
    "argv",
    [
        ["figure3", "--smax"],
        ["table2", "--total-timesteps", "0"],
        ["table2", "--cpus-per-job", "0"],
        ["table2", "--gpus-per-job", "-1"],
        ["table2", "--algorithms", "qmix"],
        ["table2", "--collect", "x", "--dir", "/nowhere"],
        ["table2", "--seeds", "-4", "--tasks", "3s5z"],
        ["table2", "--options=--nonsense 3", "--tasks", "3s5z"],
        ["table2", "--options=--map '3s5z", "--tasks", "3s5z"],
        ["table2", "--options=foo", "--tasks", "3s5z", "--dry-run"],
        ["table2", "--options=--eval-only --checkpoint x", "--tasks", "3s5z", "--dry-run"],
        ["table2", "--seeds", "2147484", "--dry-run"],
        ["table2", "--dir", __file__, "--dry-run"],
        ["figure10", "--tasks", "spread-1-0", "--dry-run"],
        ["figure10", "--tasks", "spread-3-1.5", "--dry-run"],
        ["table2", "--gpus-per-job", "1.5"],
        ["table2", "--gpus-per-job", "nan"],
        ["preopc", "--algorithms", "mappo"],
    ],
    ids=" ".join,
)
def test_bad_options_are_one_line(argv, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run.main(run.parse_args(run.Args, "", argv))
    errors = [line for line in capsys.readouterr().err.splitlines() if "left out" not in line]
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("run.py: error: ")


@pytest.mark.parametrize(
    ("matrix", "options", "name"),
    [
        ("table2", "--seed 9", "--seed"),
        ("table2", "--save-every 1 --map=8m", "--map"),
        ("figure14", "--gae_lambda 0.9", "--gae-lambda"),
        ("preopc", "--preopc", "--preopc"),  # the second of its two variants has --no-preopc
        ("figure5", "--no-preopc", "--preopc"),  # HAPPO's
        ("table2 --authors-settings", "--update-epochs 3", "--update-epochs"),
        ("table2", "--torch-threads 2", "--torch-threads"),
        ("table2 --total-timesteps 1e6", "--total-timesteps 5e5", "--total-timesteps"),
    ],
)
def test_options_that_the_matrix_sets(matrix, options, name, capsys):
    with pytest.raises(SystemExit) as stop:
        jobs_of(*matrix.split(), "--smax", "--tasks", "3s5z", f"--options={options}")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" not in line]
    assert stop.value.code == 2
    reason = f"{name} is set already, by {matrix.split()[0]} or another option"
    assert line == f"run.py: error: --options {options}: {reason}"


class NodeDied(Exception):
    pass


class Cluster:
    """In Ray's place: each job that is started ends at once with the next of some outcomes."""

    exceptions = SimpleNamespace(
        NodeDiedError=NodeDied,
        WorkerCrashedError=NodeDied,
        LocalRayletDiedError=NodeDied,
        TaskCancelledError=KeyError,
        RayError=RuntimeError,
    )

    def __init__(self, *outcomes):
        self.outcomes, self.commands, self.times = list(outcomes), [], []

    def remote(self, *arguments, **options):
        if options:
            return lambda function: self
        self.commands.append(arguments[0])
        self.times.append(time.time())
        return len(self.commands) - 1

    def wait(self, references, timeout):
        return references, []

    def get(self, reference):
        outcome = self.outcomes[reference]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def shutdown(self):
        pass


@pytest.fixture
def handlers():
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def run_on(cluster, jobs, base, monkeypatch):
    monkeypatch.setattr(run, "start_ray", lambda args, cpus: cluster)
    return run.run_all(jobs, run.Args("preopc"), 1, base)


def test_a_job_that_loses_machine_after_machine_fails(fake, monkeypatch, handlers, capsys):
    job, _ = fake_jobs()
    cluster = Cluster(NodeDied(), NodeDied(), NodeDied(), 0)
    assert run_on(cluster, [(job, None)], fake, monkeypatch) == 1
    assert len(cluster.commands) == run.LOSSES
    printed = capsys.readouterr().err
    assert [f"lost its machine, {k} of at most 3 times: {job.name}" in printed for k in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert printed.count(f"goes on elsewhere, anew: {job.name}") == 2
    assert f"failed: {job.name}: has lost 3 machines" in printed


def test_a_job_that_fails_is_not_repeated(fake, monkeypatch, handlers, capsys):
    jobs = [(job, None) for job in fake_jobs()]
    cluster = Cluster(1, RuntimeError("no such thing\nat line 3"))
    assert run_on(cluster, jobs, fake, monkeypatch) == 1 and len(cluster.commands) == 2
    printed = capsys.readouterr().err
    assert f"failed: {jobs[0][0].name}: status 1: no output" in printed
    assert f"failed: {jobs[1][0].name}: no such thing\n" in printed and "line 3" not in printed


def test_a_lost_job_waits_for_its_process_and_goes_on_from_its_checkpoint(fake, monkeypatch, handlers):
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    job, _ = fake_jobs("--total-timesteps", "500")
    log = run.log_of(job, fake).open("ab")
    fcntl.flock(log, fcntl.LOCK_EX)
    released = []
    threading.Timer(1.5, lambda: (released.append(time.time()), log.close())).start()
    cluster = Cluster(NodeDied(), 0)
    assert run_on(cluster, [(job, run.find_run(job, fake)[1])], fake, monkeypatch) == 0
    first, second = cluster.times
    assert second > released[0] > first + 1
    run_dir = run.find_run(job, fake)[1]
    assert cluster.commands[1][2:6] == ["--resume", str(run_dir), "--total-timesteps", "500"]


def test_a_lost_job_whose_process_has_finished_is_done(fake, monkeypatch, handlers, capsys):
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    cluster = Cluster(NodeDied())
    assert run_on(cluster, [(job, None)], fake, monkeypatch) == 0
    assert len(cluster.commands) == 1 and f"finished: {job.name}" in capsys.readouterr().err


def test_what_was_done_before_is_no_work_of_this_call(fake, monkeypatch, handlers):
    """A run resumed at 60% of its steps that is at 80% has done half of what was left, whenever its bar appeared."""
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    job, _ = fake_jobs("--total-timesteps", "500")
    logs, fractions = ["", " 60%|##  | 300/500 [SPS 7]", " 80%|##  | 400/500 [SPS 7]"], []

    class Playing(Cluster):
        def wait(self, references, timeout):
            if not logs:
                return references, []
            run.log_of(job, fake).write_text("$ resumed\n" + logs.pop(0))
            return [], references

    monkeypatch.setattr(run.View, "update", lambda self, counts, running, fraction, now: fractions.append(fraction))
    assert run_on(Playing(0), [(job, run.find_run(job, fake)[1])], fake, monkeypatch) == 0
    assert fractions[:3] == pytest.approx([0, 0, 0.5])


def wait_until(condition, seconds=40):
    """The condition's first value that is true."""
    end = time.time() + seconds
    while time.time() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it took too long")


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "nonsense", "nowhere.invalid:6379", "127.0.0.1:99999999"])
def test_a_cluster_that_is_none_is_one_line(address, monkeypatch, capfd):
    """auto too, where a cluster that is gone has left its address."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1" if address == "auto" else "")
    begin = time.time()
    with pytest.raises(SystemExit) as stop:
        run.start_ray(run.Args("table2", address=address), 1)
    (line,) = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"run.py: error: --address {address}: no Ray cluster there, ")
    assert time.time() - begin < 20


def process_group(leader: int) -> set[int]:
    members = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            _, after_name = stat.read_text().rsplit(")", 1)
            members |= {int(stat.parent.name)} if int(after_name.split()[2]) == leader else set()
    return members


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_stopped_call_leaves(number, tmp_path, monkeypatch):
    """Its runs are told to stop, by itself or by the end of the worker that started them, and so can save. Where its
    whole process group gets the signal, as from `timeout`, Ray's processes do not."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "benchmark").mkdir()
    for name in ("run.py", "cli.py"):
        shutil.copy(ROOT / "benchmark" / name, tmp_path / "benchmark")
    (tmp_path / "a2po_smac.py").write_text(FAKE)
    command = [sys.executable, "benchmark/run.py", "preopc", "--smax", "--tasks", "3s5z", "--seeds", "1"]
    command += ["--total-timesteps", "6e5", "--options=--sleep 0.1"]
    with (tmp_path / "output").open("w") as output:
        driver = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, process_group=0)
    try:
        at_once = min(3, len(os.sched_getaffinity(0)))
        wait_until(lambda: len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == at_once or driver.poll() is not None)
        assert process_group(driver.pid) == {driver.pid}
        os.killpg(driver.pid, number)
        assert driver.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    finally:
        driver.kill()
    logs = list(tmp_path.glob("runs/logs/*.log"))
    wait_until(lambda: all(log.read_text().endswith("told to stop\n") for log in logs))
    assert len(logs) == at_once


def test_two_machines_one_of_which_is_lost(tmp_path, monkeypatch):
    """A real cluster: jobs run on both nodes; what ran on the one that dies goes on from its checkpoint on the other,
    whether its process was killed too or has time to save."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    (tmp_path / "benchmark").mkdir()
    for name in ("run.py", "cli.py"):
        shutil.copy(ROOT / "benchmark" / name, tmp_path / "benchmark")
    (tmp_path / "a2po_smac.py").write_text(FAKE)

    def pids():
        """Job -> (node, worker, script) of its starts."""
        logs = {log.stem: log.read_text() for log in tmp_path.glob("runs/logs/*.log")}
        return {job: [*map(str.split, re.findall(r"pids (\d+ \d+ \d+)", text))] for job, text in logs.items()}

    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    driver = None
    try:
        lost = str(cluster.add_node(num_cpus=2).all_processes["raylet"][0].process.pid)
        command = [sys.executable, "benchmark/run.py", "preopc", "--smax", "--tasks", "3s5z"]
        command += ["--seeds", "1", "2", "13", "--total-timesteps", "6e3", "--options=--sleep 0.1"]
        command += ["--address", cluster.address]
        with (tmp_path / "output").open("w") as output:
            driver = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        wait_until(lambda: len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == 4 or driver.poll() is not None)
        before = pids()
        there = [job for job, starts in before.items() if starts and starts[-1][0] == lost]
        assert len(there) == 2, "two jobs on each node"
        node, worker, script = before[there[0]][-1]
        os.kill(int(script), signal.SIGKILL)  # as on a machine that is gone
        for pid in (node, worker, before[there[1]][-1][1]):
            os.kill(int(pid), signal.SIGKILL)
        assert driver.wait(240) == 1, (tmp_path / "output").read_text()
    finally:
        if driver:
            driver.kill()
        cluster.shutdown()
    printed = (tmp_path / "output").read_text()
    assert printed.count("finished: ") == 6 and printed.count("status 1: no luck") == 3
    assert not re.search("Traceback|raylet", printed), "Ray's own reports"
    for job in there:
        assert printed.count(f"lost its machine, 1 of at most 3 times: {job}\n") == 1
        assert re.search(rf"goes on elsewhere, evaluated until step \d+: {job}\n", printed)
    for job, starts in pids().items():
        assert len(starts) == (0 if job.endswith("__13") else 2 if job in there else 1), job
    configs = [run.read_config(path) for path in tmp_path.glob("runs/*/config.json")]
    assert sorted(len(config["stretches"]) for config in configs) == [1, 1, 1, 1, 2, 2]
    for path in tmp_path.glob("runs/*/eval.jsonl"):
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(100, 6001, 100))


def test_view_redraws_on_a_terminal_only():
    class Terminal(list):
        write = list.append
        isatty = staticmethod(lambda: True)
        flush = staticmethod(lambda: None)

    terminal = Terminal()
    view = run.View(terminal, now=0)
    for _ in range(2):
        view.update({"running": 1}, {"job": (0.5, "x" * 500)}, 0.25, now=60)
    assert terminal[1].startswith("\x1b[2F\x1b[J0:01:00") and "0:03:00 left" in terminal[1] and len(terminal) == 2
    assert all(len(line) < 500 for text in terminal for line in text.splitlines())
    pipe = Terminal()
    pipe.isatty = lambda: False
    view = run.View(pipe, now=0)
    for now in (0, 30, 61):
        view.update({"running": 1}, {"job": (0.5, "")}, 0.25, now)
    assert len(pipe) == 2 and "\x1b" not in "".join(pipe)


def test_a_view_that_nobody_sees(tmp_path):
    """In `... 2>&1 | tee log` Ctrl-C ends tee first: the runs are waited for all the same."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:
        view = run.View(stream, now=0)
        view.event("stopping")
        view.event("stopped")
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))
