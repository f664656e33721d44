"""What the programs here share: tyro's command line, with every error on one line and exit status 2, and how they
write their files."""

import contextlib
import io
import os
import re
import shutil
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


def part_of(file: Path) -> Path | None:
    """Where the new contents of a file are written first; nowhere for what is no file, such as a pipe or terminal."""
    if file.exists() and not file.is_file():
        return None
    file = file.resolve()
    return file.with_name(file.name + ".part")


def check_writable(file: Path):
    """An OSError where a file cannot be written, before there is something to write. It is left as it was."""
    part = part_of(file)
    for path in [file] if part is None else [file.resolve(), part]:
        new = not os.path.lexists(path)
        path.open("ab").close()
        if new:
            path.unlink()


def write(file: Path, contents: bytes | str):
    """All or nothing: a disk that is full leaves the file as it was."""
    contents, part = contents.encode() if isinstance(contents, str) else contents, part_of(file)
    if part is None:
        file.write_bytes(contents)
        return
    try:
        part.write_bytes(contents)
        if file.exists():
            shutil.copymode(file, part)
        os.replace(part, file.resolve())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
