"""How much of its greedy episodes on HalfCheetah a policy spends on its back: explains runs that are stuck.

    python benchmark/upside_down.py runs/*/checkpoint.pt --out upside-down.json

32 episodes of 1,000 steps for each checkpoint; on its back is where the torso's angle has a negative cosine.
"""

import contextlib
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.cli import check_writable, parse_args, write  # noqa: E402

EPISODES, STEPS, TORSO_ANGLE = 32, 1000, 1


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """checkpoint.pt of runs of *_mamujoco.py on HalfCheetah"""
    out: Path | None = None
    """JSON file to write"""


@contextlib.contextmanager
def writing(out: Path):
    """What cannot be written in here is an error in the file to write."""
    try:
        yield
    except OSError as error:
        fail(out, f"cannot be written: {error.strerror}")


def fail(path, why: str):
    """One line; exit status 2."""
    print(f"upside_down.py: error: {path}: {why}", file=sys.stderr)
    raise SystemExit(2)


@torch.no_grad()
def measure(path: Path) -> dict:
    """Share of steps on the back, and the returns, of a checkpoint's greedy episodes."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings, learned = checkpoint["args"], checkpoint["learned"]
    except Exception:
        fail(path, "is no checkpoint of a run")
    if settings.get("scenario") != "HalfCheetah":
        fail(path, "is not of HalfCheetah")
    script = importlib.import_module(checkpoint["script"])
    envs = script.MaMuJoCo("HalfCheetah", settings["partition"], settings["env_version"], EPISODES, 7, 1)
    envs = script.Episodes(envs)
    envs.reset()
    n, joints = envs.single_action_space.shape
    (obs_dim,) = envs.single_observation_space["obs"].shape
    actors = [script.GaussianActor(obs_dim, joints, settings["hidden_size"]) for _ in range(n)]
    actors, normalizer = torch.nn.ModuleList(actors), script.ObservationNormalizer(obs_dim)
    actors.load_state_dict(learned["actor"])
    normalizer.load_state_dict(learned["obs_normalizer"])
    on_back, returns = [], np.zeros(EPISODES)
    for _ in range(STEPS):
        obs = envs.look(torch.device("cpu"))["obs"]
        on_back.append((obs[:, TORSO_ANGLE].cos() < 0).float().mean().item())
        actions = torch.stack([actor(normalizer(obs))[0] for actor in actors], 1)
        rewards, _, _ = envs.play(actions)
        returns += rewards[:, 0].numpy()
    envs.close()
    task = {
        "script": checkpoint["script"],
        "seed": settings["seed"],
        "step": checkpoint.get("progress", {}).get("global_step"),
    }
    return task | {"on_its_back": round(float(np.mean(on_back)), 3), "returns": [round(float(r)) for r in returns]}


def main(args: Args):
    if not args.checkpoints:
        fail("checkpoints", "name at least one")
    if args.out:
        with writing(args.out):
            check_writable(args.out)
    torch.set_num_threads(1)
    records = []
    for path in args.checkpoints:
        records.append(measure(path))
        print(records[-1], flush=True)
    if args.out:
        with writing(args.out):
            write(args.out, json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(parse_args(Args, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
