"""The policy alone of a run's checkpoint, as a small file: the actors' weights and the run's settings.

    python benchmark/policy.py runs/<run>/checkpoint.pt benchmark/policies/smac-3s5z-smax.pt
    python a2po_smac.py --eval-only --checkpoint benchmark/policies/smac-3s5z-smax.pt
    python benchmark/watch.py --checkpoint benchmark/policies/smac-3s5z-smax.pt --out watch.gif

MuJoCo's has the observations' normaliser too, which its actors look through.
"""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.cli import check_writable, parse_args, write  # noqa: E402

PARTS = ("actor", "obs_normalizer")


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]
    """checkpoint.pt of a run"""
    out: tyro.conf.Positional[Path]
    """file to write"""


def fail(path: Path, message: str):
    """One line; exit status 2."""
    print(f"policy.py: error: {path}: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def writing(path: Path):
    """What cannot be written in here is one line."""
    try:
        yield
    except OSError as error:
        fail(path, f"cannot be written: {error.strerror}")


def main(args: Args):
    with writing(args.out):  # before there is something to write
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(args.out)
    try:
        checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        learned = {name: part for name, part in checkpoint["learned"].items() if name in PARTS}
        policy = {"args": checkpoint["args"], "script": checkpoint["script"], "learned": learned}
    except FileNotFoundError:
        fail(args.checkpoint, "no such file")
    except Exception:
        fail(args.checkpoint, "is not a checkpoint of these scripts")
    if args.out.exists() and args.out.samefile(args.checkpoint):
        fail(args.out, "is the checkpoint itself, which the run needs to go on")
    buffer = io.BytesIO()
    torch.save(policy, buffer)
    with writing(args.out):
        write(args.out, buffer.getvalue())
    print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
