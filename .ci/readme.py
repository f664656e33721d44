"""Runs every command of the README, in its order, with the .venv of this folder: to its end or, where it goes on for
long, to its first output. Ends with status 1 at the first one that does not do what it should.

What is not run stands in NOT_RUN with the reason.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SET_UP = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt &&"
# How a command begins: why it is not run.
NOT_RUN = {
    f"{SET_UP} .venv/bin/python -m pytest": ".ci/run is this",
    f"{SET_UP} .venv/bin/python a2po_smac.py --map 3s5z": ".ci/run installs, and the first run below trains",
    "apt-get install": ".ci/run does it",
    ". .venv/bin/activate": ".ci/run does it",
    "pip install": ".ci/run does it",
    "uv run": "there is no uv here",
    ".venv/bin/pip install 'protobuf<3.21'": "comes from GitHub, and is of no use without Blizzard's game",
}
# How a command that goes on for long begins: what it has said when it works. Then it is asked to stop.
FIRST_OUTPUT = {
    ".venv/bin/tensorboard": r"TensorBoard \S+ at http",
    ".venv/bin/python a2po_smac.py --map": r"SPS \d+",
    ".venv/bin/python a2po_smac.py --resume": r"SPS \d+",
    ".venv/bin/python a2po_mpe.py": r"SPS \d+",
    ".venv/bin/python a2po_mamujoco.py": r"SPS \d+",
    ".venv/bin/python a2po_grf.py": r"SPS \d+",
}
SECONDS = 600  # for each


def commands(text: str) -> list[str]:
    """The lines of all blocks of bash, those joined that end in a backslash."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line.split(" #")[0]).strip() for line in lines if line.strip()]


def entry(table: dict[str, str], command: str) -> str | None:
    return next((text for begin, text in table.items() if command.startswith(begin)), None)


def run(command: str):
    """RUN is the newest run. Ends the program if the command fails, or has not said in time what it should."""
    runs = sorted(Path("runs").glob("*"), key=os.path.getmtime)
    command = command.replace("runs/RUN", str(runs[-1]) if runs else "runs/RUN")
    print(f"$ {command}", flush=True)
    begin, expected, said = time.time(), entry(FIRST_OUTPUT, command), ""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(shlex.split(command), stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None and time.time() < begin + SECONDS:
            time.sleep(0.5)
            said = os.pread(output.fileno(), 10**7, 0).decode(errors="replace")
            if expected and re.search(expected, said):
                break
        on_time = process.poll() is not None or time.time() < begin + SECONDS
        process.terminate()  # if it still runs: it saves, and leaves
        status = process.wait(120)
        said = os.pread(output.fileno(), 10**7, 0).decode(errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", said) if line.strip()]
    print(f"  {time.time() - begin:.0f} s, status {status}: {lines[-1][:150] if lines else ''}", flush=True)
    stopped = (128 + signal.SIGTERM, -signal.SIGTERM) if expected else ()
    if not on_time or status not in (0, *stopped) or not re.search(expected or "", said):
        sys.exit("\n".join([*lines[-30:], f"this command of the README failed: {command}"]))


def main():
    os.chdir(ROOT)
    for command in commands(Path("README.md").read_text()):
        reason = entry(NOT_RUN, command)
        if reason:
            print(f"not run: {command}: {reason}")
        else:
            run(command)


if __name__ == "__main__":
    main()
