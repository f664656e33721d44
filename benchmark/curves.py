"""Learning curves of raw results: python benchmark/curves.py benchmark/results/smax-3s5z --out smax-3s5z.png

A folder holds one eval.jsonl per run, named {script}__{seed}.jsonl, as a run leaves it. Each script is a line: the mean
over its seeds of the greedy win rate, with the range of the seeds shaded. The table that is printed beside has the
median of the last ten evaluations of each seed, as the paper reports it.
"""

import argparse
import collections
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read(folder: Path) -> dict[str, dict[str, list[dict]]]:
    """Script -> seed -> evaluations."""
    runs = collections.defaultdict(dict)
    for path in sorted(folder.glob("*__*.jsonl")):
        script, seed = path.stem.split("__")
        runs[script][seed] = [json.loads(line) for line in path.read_text().splitlines()]
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with {script}__{seed}.jsonl files")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, .png or .svg")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    runs = read(args.folder)
    if not runs:
        parser.error(f"{args.folder}: has no {{script}}__{{seed}}.jsonl file")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    print("| script | seeds | median of the last ten evaluations, by seed | first evaluation of 0.9 or more, by seed |")
    print("|---|---|---|---|")
    for script, seeds in runs.items():
        # The evaluations of the seeds are some steps apart: compare them on a common grid.
        last = min(evaluations[-1]["step"] for evaluations in seeds.values())
        first = max(evaluations[0]["step"] for evaluations in seeds.values())
        grid = np.linspace(first, last, 200)
        curves = [np.interp(grid, [e["step"] for e in r], [e["win_rate"] for e in r]) for r in seeds.values()]
        (line,) = axes.plot(grid, np.mean(curves, 0), label=f"{script} ({len(seeds)} seeds)")
        axes.fill_between(grid, np.min(curves, 0), np.max(curves, 0), color=line.get_color(), alpha=0.15, linewidth=0)
        finals = [float(np.median([e["win_rate"] for e in r[-10:]])) for r in seeds.values()]
        reached = [next((e["step"] for e in r if e["win_rate"] >= 0.9), None) for r in seeds.values()]
        finals, reached = (", ".join(str(x) for x in values) for values in (np.round(finals, 3), reached))
        print(f"| {script} | {', '.join(seeds)} | {finals} | {reached} |")
    axes.set(xlabel="environment steps", ylabel="greedy win rate (32 episodes)", ylim=(-0.02, 1.02), title=args.title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
