"""Seconds per iteration of the SMAC scripts on SMAX, in rollout and update, and their peak memory.

    python benchmark/speed_smac.py --out benchmark/results/smax-3s5z/speed.json

The scripts take turns, so that a noisy machine is noisy for all of them; times are medians over the iterations after
the first five of each turn, and ratios are to MAPPO in the same run. Prints a Markdown table and writes JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
TAGS = {"rollout": "time/rollout_seconds", "update": "time/update_seconds", "steps_per_second": "charts/SPS"}


def run(script: str, options: list[str], steps: int) -> tuple[dict[str, list[float]], float]:
    """What TAGS names, of each iteration after the first five, and the peak memory of the process in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"{script}.py"), "--total-timesteps", str(steps), *options]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
        (run_dir,) = Path(folder, "runs").iterdir()
        events = EventAccumulator(str(run_dir))
        events.Reload()
        return {name: [e.value for e in events.Scalars(tag)][5:] for name, tag in TAGS.items()}, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=["mappo_smac", "coppo_smac", "happo_smac", "a2po_smac"])
    parser.add_argument("--turns", type=int, default=2, help="turns of each script")
    parser.add_argument("--steps", type=int, default=80_000, help="environment steps of a turn")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args, options = parser.parse_known_args()
    options = ["--simulator", "smax", "--eval-every", str(10**9), *options]
    times = {script: {name: [] for name in TAGS} for script in args.scripts}
    memory = dict.fromkeys(args.scripts, 0.0)
    for _ in range(args.turns):
        for script in args.scripts:
            seconds, mebibytes = run(script, options, args.steps)
            memory[script] = max(memory[script], mebibytes)
            for name in TAGS:
                times[script][name] += seconds[name]
    result = {"options": options, "cores": os.cpu_count(), "machine": platform.processor() or platform.machine()}
    result["scripts"] = {}
    for script in args.scripts:
        total = statistics.median(map(sum, zip(times[script]["rollout"], times[script]["update"], strict=True)))
        row = {name: statistics.median(times[script][name]) for name in TAGS} | {"iteration": total}
        row |= {"peak_memory_mib": memory[script], "iterations": times[script]}
        result["scripts"][script] = row
    base = result["scripts"][args.scripts[0]]["iteration"]
    print(f"| script | rollout, s | update, s | iteration, s | over {args.scripts[0]} | steps/s | peak memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    for script, row in result["scripts"].items():
        row["ratio"] = row["iteration"] / base
        print(
            f"| {script} | {row['rollout']:.3f} | {row['update']:.3f} | {row['iteration']:.3f} | {row['ratio']:.2f} "
            f"| {row['steps_per_second']:.0f} | {row['peak_memory_mib']:.0f} |"
        )
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
