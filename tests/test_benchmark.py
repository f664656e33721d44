"""benchmark/plot.py's numbers on hand-made files; benchmark/run.py's matrices, and what it skips and resumes."""

import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmark" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plot, run = load("plot"), load("run")


def write_run(path, values, steps=None, metric="win_rate"):
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = steps or range(100, 100 * len(values) + 1, 100)
    path.write_text("".join(json.dumps({"step": s, metric: v}) + "\n" for s, v in zip(steps, values, strict=True)))
    return path


def cells(table):
    """Rows of a Markdown table as lists, without the rule."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return [rows[0], *rows[2:]]


# ------------------------------------------------------------------------------------------------------------ plot
def test_nothing_heavy_is_imported():
    code = "import runpy, sys; [runpy.run_path(f'benchmark/{n}.py') for n in ('plot', 'run')]; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"ray", "matplotlib", "rliable", "torch"} & set(modules.split())


def test_score_is_the_median_of_the_last_ten(tmp_path):
    values = [1.0] * 5 + [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    found = plot.read_run(write_run(tmp_path / "t" / "a2po_smac__7.jsonl", values))
    assert (found.task, found.algorithm, found.seed) == ("t", "a2po_smac", 7)
    assert found.score("win_rate") == pytest.approx(0.45)


def test_paper_table(tmp_path):
    for task, scores in (("t", {1: 0.5, 2: 1.0, 3: 0.75}), ("u", {1: 0.25, 2: 0.75, 3: 0.25})):
        for seed, score in scores.items():
            write_run(tmp_path / task / f"a2po_smac__{seed}.jsonl", [score] * 10)
    write_run(tmp_path / "t" / "mappo_smac__1.jsonl", [0.5] * 10)
    runs = plot.read([tmp_path])
    metrics = plot.choose_metrics(runs, "auto")
    header, *rows = cells(plot.paper_table(runs, metrics))
    assert header == ["task", "a2po_smac", "mappo_smac"]
    # The standard deviation of 50, 100, 75 with n - 1 is 25, that of 25, 75, 25 is 50 / sqrt(3).
    assert rows[0] == ["t", "75.0 (25.00)", "50.0 (one seed)"]
    assert rows[1][:2] == ["u", f"25.0 ({50 / 3**0.5:.2f})"]
    assert rows[2][:2] == ["overall (mean)", f"50.0 ({(25 + 50 / 3**0.5) / 2:.2f})"]
    _, first, *_ = cells(plot.run_table(runs, metrics, reach=0.75))
    assert first == ["t", "a2po_smac", "1, 2, 3", "1000, 1000, 1000", "0.5, 1.0, 0.75", "None, 100, 100"]


def test_returns_have_the_digits_that_they_need():
    assert [plot.number(x, "episodic_return") for x in (1234.56, -12.345, 0.1234)] == ["1235", "-12.3", "0.12"]


def test_a_bar_in_a_task_does_not_end_its_cell(tmp_path):
    write_run(tmp_path / "Humanoid-9|8" / "a2po_mujoco__1.jsonl", [1.0] * 10, metric="episodic_return")
    runs = plot.read([tmp_path])
    assert "Humanoid-9\\|8" in plot.paper_table(runs, plot.choose_metrics(runs, "auto"))


@pytest.mark.parametrize("values, middle", [([5.0], 5), ([1.0, 3.0, 8.0], 4), ([0.0, 2.0, 4.0, 90.0], 3)])
def test_iqm(values, middle):
    assert plot.iqm(np.array(values)) == pytest.approx(middle)
    assert plot.iqm(np.array(values)[::-1, None] * [1, 2]) == pytest.approx([middle, 2 * middle])


def test_curves_of_different_steps_meet_on_a_grid():
    curves = [(np.array([0.0, 100, 200]), np.array([0.0, 1, 3])), (np.array([50.0, 250]), np.array([0.0, 2]))]
    grid = plot.common_grid(curves)
    assert grid[0] == 50 and grid[-1] == 200
    values = plot.on_grid(curves, np.array([50.0, 150, 200]))
    assert values == pytest.approx(np.array([[0.5, 2, 3], [0, 1, 1.5]]))
    assert plot.common_grid([(np.array([10.0]), np.zeros(1)), (np.array([20.0]), np.zeros(1))]) == [10]


def test_probability_of_improvement():
    x, y = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[2.0, 0.0], [2.0, 1.0]])
    assert plot.improvement(x, y) == pytest.approx((0.5 + 0.25) / 2)  # by task 1/2, and two ties of four


def test_last_line_that_was_cut_off(tmp_path, capsys):
    path = write_run(tmp_path / "t" / "a__1.jsonl", [0.5, 0.75])
    path.write_text(path.read_text() + '{"step": 300, "win_')
    assert [record["step"] for record in plot.read_records(path)] == [100, 200]
    assert "cut off" in capsys.readouterr().err
    path.write_text('{"step": 1, "win\n' + path.read_text())
    with pytest.raises(SystemExit) as stop:
        plot.read_records(path)
    assert stop.value.code == 2 and "a__1.jsonl:1" in capsys.readouterr().err


def test_steps_that_go_back_are_noticed(tmp_path, capsys):
    """As where two runs wrote one file; a repeated evaluation is none of that."""
    records = plot.read_records(write_run(tmp_path / "a2po_smac__1.jsonl", [0.0, 0.1, 0.2], (100, 200, 200)))
    assert [record["win_rate"] for record in records] == [0.0, 0.2] and not capsys.readouterr().err
    records = plot.read_records(write_run(tmp_path / "a2po_smac__1.jsonl", [0.0, 0.1, 0.2], (100, 300, 200)))
    assert [record["step"] for record in records] == [100, 200, 300] and "not in order" in capsys.readouterr().err


def test_records_come_by_step_and_the_later_of_two_counts(tmp_path):
    path = write_run(tmp_path / "t" / "a__1.jsonl", [0.1, 0.2, 0.3], [200, 100, 200])
    assert [(r["step"], r["win_rate"]) for r in plot.read_records(path)] == [(100, 0.2), (200, 0.3)]


@pytest.mark.parametrize("line", ['{"step": 1}', '{"win_rate": 1}', '{"step": 1, "win_rate": NaN}', "[1]", "3"])
def test_bad_records(tmp_path, line, capsys):
    (tmp_path / "a__1.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit) as stop:
        plot.read([tmp_path])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["nowhere"],
        ["."],
        ["t/notes.txt"],
        ["t", "--out", "x.pdf"],
        ["t", "u", "--reference", "3"],
        ["t", "--metric", "episodic_return"],
        ["t", "--tasks", "z"],
        ["t", "--improvement", "x.png"],
        ["t", "--reps", "0"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(tmp_path, options, monkeypatch, capsys):
    for task in "tu":
        write_run(tmp_path / task / "a__1.jsonl", [0.5] * 10)
    (tmp_path / "t" / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if options == ["."] else tmp_path)
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.tyro.cli(plot.Args, args=options))
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("plot.py: error: ")


def test_metrics_by_task(tmp_path):
    write_run(tmp_path / "t" / "a__1.jsonl", [0.5] * 10)
    write_run(tmp_path / "u" / "a__1.jsonl", [12.0] * 10, metric="episodic_return")
    lines = [json.dumps({"step": s, "win_rate": 1.0, "returns": [1.0, 2.0]}) for s in (1, 2)]
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a__1.jsonl").write_text("\n".join(lines))
    runs = plot.read([tmp_path])
    assert plot.choose_metrics(runs, "auto") == {"t": "win_rate", "u": "episodic_return", "v": "win_rate"}
    assert plot.choose_metrics({"v": runs["v"]}, "episodic_return") == {"v": "episodic_return"}
    assert runs["v"]["a"][0].score("episodic_return") == 1.5
    rows = cells(plot.paper_table(runs, plot.choose_metrics(runs, "auto")))
    assert [row[1] for row in rows[1:]] == ["50.0 (one seed)", "12.0 (one seed)", "100.0 (one seed)"]  # no overall


def test_run_directories(tmp_path, capsys):
    """Ablations are told apart by config.json; of two runs with one seed the one that got further counts."""
    configs = [{}, {"preopc": False}, {"clip_adaptation": 1.0}, {"agent_order": "random"}, {}]
    for number, config in enumerate(configs):
        folder = tmp_path / "runs" / f"3s5z-smax__a2po_smac__1__{100 + number}"
        write_run(folder / "eval.jsonl", [number / 10] * (12 if number == 4 else 10))
        (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "runs" / "3s5z-smax__a2po_smac__2__105").mkdir()  # has not evaluated yet
    runs = plot.read([tmp_path / "runs"])
    assert set(runs["3s5z-smax"]) == {"a2po_smac" + end for end in ("", "-no-preopc", "-fixed-clip", "-random")}
    assert [r.path.parent.name[-3:] for r in runs["3s5z-smax"]["a2po_smac"]] == ["104"]
    assert "__100" in capsys.readouterr().err


def test_over_tasks_only_what_all_have(tmp_path, capsys):
    for task, name, seeds in (
        ("t", "a", (1, 2)),
        ("t", "b", (1, 2)),
        ("u", "a", (1, 2)),
        ("u", "b", (1,)),
        ("v", "a", (1,)),
    ):
        for seed in seeds:
            write_run(tmp_path / task / f"{name}__{seed}.jsonl", [seed / 2] * 10)
    runs = plot.read([tmp_path])
    matrices = plot.score_matrices(runs, plot.choose_metrics(runs, "auto"))
    assert matrices["a"].tolist() == [[0.5, 0.5], [1, 1]] and matrices["b"].tolist() == [[0.5, 0.5]]
    assert "not as many seeds" in capsys.readouterr().err


def test_intervals_agree_with_rliable():
    rliable = pytest.importorskip("rliable.metrics")
    scores = np.random.default_rng(0).random((5, 3))
    assert plot.middle_of(scores, "iqm") == pytest.approx(rliable.aggregate_iqm(scores), abs=1e-12)
    args = plot.Args(paths=(), reps=200)
    low, high = plot.intervals(scores, lambda x: plot.middle_of(x, "iqm"), args)
    assert low < plot.middle_of(scores, "iqm") < high
    assert (low, high) == plot.intervals(scores, lambda x: plot.middle_of(x, "iqm"), args)
    x, y = scores.round(1), np.random.default_rng(1).random((4, 3)).round(1)
    assert plot.improvement(x, y) == pytest.approx(rliable.probability_of_improvement(x, y))


def test_figures(tmp_path, capsys):
    pytest.importorskip("rliable")
    pytest.importorskip("matplotlib")
    for name, seeds in (("a2po_smac", (1, 2)), ("mappo_smac", (1,))):
        for seed in seeds:
            write_run(tmp_path / "t" / f"{name}__{seed}.jsonl", np.linspace(0, 1, 12).tolist())
    options = ["--out", "c.png", "c.svg", "--efficiency", "e.svg", "--improvement", "i.svg", "--table", "t.md"]
    options = [str(tmp_path / o) if "." in o else o for o in options]
    reference = ["--reference", "0.2", "--reference-label", "random policy", "--title", "T", "--reps", "20"]
    plot.main(plot.tyro.cli(plot.Args, args=[str(tmp_path / "t"), *options, *reference]))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "c.svg").read_text()
    assert "mappo_smac (1 seed, no interval)" in svg and "random policy" in svg
    printed = capsys.readouterr()
    assert (tmp_path / "t.md").read_text().strip() == printed.out.strip()
    assert "mappo_smac: one seed, therefore no interval" in printed.err


# ------------------------------------------------------------------------------------------------------------- run
def jobs_of(*argv):
    return run.make_jobs(run.tyro.cli(run.Args, args=list(argv)))


def test_counts():
    scripts = {path.stem for path in ROOT.glob("*_*.py")}

    def existing(benchmark):
        return sum(f"{algorithm}_{benchmark}" in scripts for algorithm in run.ALL)

    assert len(jobs_of("table2")[0]) == 12 * 4 * 3
    assert len(jobs_of("table2", "--smax", "--seeds", "5")[0]) == 9 * 4
    assert len(jobs_of("figure3", "--seeds", "1")[0]) == 14 * existing("mamujoco")
    assert len(jobs_of("figure10", "--seeds", "1")[0]) == 4 * existing("mpe")
    assert len(jobs_of("figure4", "--seeds", "1")[0]) == 2 * existing("grf")
    assert len(jobs_of("figure5", "--seeds", "1", "--tasks", "3s5z")[0]) == 2
    assert len(jobs_of("figure6", "--seeds", "1", "--tasks", "3s5z")[0]) == 6
    assert len(jobs_of("figure5-7", "--smax", "--seeds", "1")[0]) == 8
    assert len(jobs_of("table6")[0]) == 2 * 4 + 3 * existing("mamujoco")
    assert [job.script.stem for job in jobs_of("table2", "--tasks", "3s5z", "--algorithms", "mappo")[0]] == [
        "mappo_smac"
    ] * 3
    assert jobs_of("figure3", "--smax")[0] == []


@pytest.mark.parametrize("matrix", run.MATRICES)
def test_every_command_is_one_of_its_script(matrix, monkeypatch):
    """All options exist and pass the script's own checks; the variants are named as plot.py names them."""
    monkeypatch.setattr(run.load(ROOT / "a2po_grf.py"), "find_football", lambda: True)
    jobs, missing = jobs_of(matrix, "--seeds", "1", "--total-timesteps", "1000")
    assert jobs and len({job.name for job in jobs}) == len(jobs)
    assert not [name for name in missing if (ROOT / name).exists()]
    for job in jobs:
        command = job.command(cpus=2)
        module = run.load(job.script)
        args = module.complete_args(module.parse_args(command[2:]))
        assert (args.seed, args.total_timesteps, args.torch_threads) == (1, 1000, 2)
        assert plot.variant(vars(args)) == job.variant
        assert module.parse_args([*job.options, "--total-timesteps", "1000"]) == run.settings(job)


def test_smax_tasks_are_those_of_the_script():
    module = run.load(ROOT / "a2po_smac.py")
    assert set(run.SMAC_MAPS) == set(module.TABLE_7)
    assert set(run.NOT_ON_SMAX) == set(run.SMAC_MAPS) - set(module.SMAX_MAPS)


def test_football_tasks_are_those_of_the_script():
    module = run.load(ROOT / "a2po_grf.py")
    for task in module.SCENARIOS:
        benchmark, options = run.task_options(task, smax=False)
        assert benchmark == "grf" and options[:2] == ("--scenario", task)
        assert ("--share-parameters" in options) == task.startswith("11_vs_11"), "as in the paper"
    assert run.task_options("protoss_5_vs_5", smax=False)[0] == "smac"


def test_mujoco_tasks_are_those_of_the_script():
    module = run.load(ROOT / "a2po_mamujoco.py")
    tasks = {f"{robot}-{partition}" for robot, partitions in module.PARTITIONS.items() for partition in partitions}
    assert set(run.MUJOCO_TASKS) == tasks - {"HumanoidStandup-17x1"} and len(run.MUJOCO_TASKS) == 14


FAKE = '''
"""Counts to --total-timesteps, 100 steps an iteration, and stops on SIGTERM as the real ones do."""
import dataclasses, json, os, signal, sys, time
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
    torch_threads: int | None = None
    resume: str = ""
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
    return dataclasses.replace(args, gae_lambda=0.95 if args.gae_lambda is None else args.gae_lambda)

def main(args):
    args = complete_args(args)
    if args.fail:
        sys.exit("no luck")
    name, step = f"{args.map}-smax__{Path(__file__).stem}__{args.seed}__{time.time_ns()}", 0
    run_dir = Path(args.resume or f"runs/{name}")
    if args.resume:
        step = json.loads((run_dir / "checkpoint.pt").read_text())["step"]
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(args) | {"simulator": "smax"}))
    print(run_dir, os.environ["OMP_NUM_THREADS"], flush=True)
    stops = []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
    while step < args.total_timesteps and not stops:
        time.sleep(args.sleep)
        step += 100
        with (run_dir / "eval.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "win_rate": 0.5}) + "\\n")
        share = 100 * step // args.total_timesteps
        print(f"\\r {share}%|##  | {step}/{args.total_timesteps} [SPS 7]", end="", flush=True)
    saved = {"step": step, "args": dataclasses.asdict(args) | {"resume": ""}}
    (run_dir / "checkpoint.pt").write_text(json.dumps(saved))
    sys.exit(143 if stops else 0)

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
    return jobs_of("figure5", "--smax", "--tasks", "3s5z", "--seeds", "1", *argv)[0]


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
    log.unlink()  # not in our log, and just written to
    assert run.find_run(longer, fake) == ("running", run_dir)
    for file in (fake / run_dir).iterdir():
        os.utime(file, (time.time() - 1000,) * 2)
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


def test_dry_run_prints_what_is_missing(fake, capsys):
    argv = ["figure5", "--smax", "--tasks", "3s5z", "--seeds", "1", "--total-timesteps", "200", "--dir", str(fake)]
    start(fake_jobs("--total-timesteps", "200")[0], fake)
    assert run.main(run.tyro.cli(run.Args, args=[*argv, "--dry-run"])) == 0
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert "--no-preopc" in line and "--torch-threads 1" in line
    assert "2 jobs: 1 done, 1 new" in printed.err


@pytest.mark.parametrize(
    "argv",
    [
        ["figure3", "--smax"],
        ["table2", "--total-timesteps", "0"],
        ["table2", "--cpus-per-job", "0"],
        ["table2", "--gpus-per-job", "-1"],
        ["table2", "--algorithms", "qmix"],
        ["table2", "--dir", "/nowhere"],
        ["table2", "--seeds", "-4", "--tasks", "3s5z"],
        ["table2", "--options=--nonsense 3", "--tasks", "3s5z"],
    ],
    ids=" ".join,
)
def test_bad_options_are_one_line(argv, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run.main(run.tyro.cli(run.Args, args=argv))
    errors = [line for line in capsys.readouterr().err.splitlines() if "left out" not in line]
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("run.py: error: ")


def test_view_redraws_on_a_terminal_only():
    class Terminal(list):
        write = list.append
        isatty = staticmethod(lambda: True)
        flush = staticmethod(lambda: None)

    terminal = Terminal()
    view = run.View(terminal, now=0)
    for _ in range(2):
        view.update({"running": 1}, {"job": (0.5, "x" * 500)}, 0.25, now=60)
    assert terminal[1] == "\x1b[2F\x1b[J" and "0:03:00 left" in terminal[2]
    assert all(len(line) < 500 for line in terminal)
    pipe = Terminal()
    pipe.isatty = lambda: False
    view = run.View(pipe, now=0)
    for now in (0, 30, 61):
        view.update({"running": 1}, {"job": (0.5, "")}, 0.25, now)
    assert len(pipe) == 2 and "\x1b" not in "".join(pipe)
