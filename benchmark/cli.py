"""The command line of the programs here: tyro's, with every error on one line and exit status 2."""

import contextlib
import io
import re
import sys
from pathlib import Path

import tyro


def parse_args(args_class, description: str, argv=None):
    """An args_class of the words in argv, by default the program's own."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(args_class, description=description, args=argv)
    except SystemExit as leaving:
        if leaving.code == 2:
            program = Path(sys.modules[args_class.__module__].__file__).name
            print(f"{program}: error: {first_part(told.getvalue())}; see --help", file=sys.stderr)
        raise


def first_part(box: str) -> str:
    """What is wrong, of tyro's box of lines, in Unicode or ASCII: between its heading and the next rule."""
    words = []
    for line in box.splitlines()[1:]:
        text = re.sub(r"^[╰─+-]+[╯+]?$", "", line.strip("│| "))  # nothing is left of a rule
        if words and not text:
            break
        words += text.split()
    return " ".join(words).removeprefix("Error ").rstrip(".")
