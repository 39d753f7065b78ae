"""Makes docs/picture.svg, the terminal in README.md, from commands that it really runs.

    python docs/picture.py

The picture shows this machine's speed and memory, so it is made by hand when the output changes, not by `make docs`.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COMMANDS = (
    'zoo run tiny --prompt "How many experts does Mixtral 8x7B have?"',
    'zoo run tiny --prompt "Which models have a sliding window?"',
    "zoo inspect mixtral-8x7b-instruct",
    'zoo run mixtral-8x7b-instuct --prompt "Hello"',
)
WIDTH = 108
PICTURE = Path(__file__).with_name("picture.svg")


def output_of(command: str) -> str:
    """What the command writes to a terminal, colours included. Its exit status may be any: errors are shown too."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
    # A dumb terminal gets no progress bars, whose redrawing would be part of the picture; an empty line stays of them.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "TERM": "dumb", "PATH": path}
    with subprocess.Popen(command, shell=True, env=environment, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        return _read(ours).replace("\r\n", "\n").strip("\n")


def _read(terminal: int) -> str:
    """Everything until the other side is closed, which Linux reports as an input error."""
    data = b""
    try:
        while block := os.read(terminal, 1 << 16):
            data += block
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    finally:
        os.close(terminal)
    return data.decode()


def main() -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    for number, command in enumerate(COMMANDS):
        if number:
            console.print()
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        console.print(Text.from_ansi(output_of(command)), highlight=False)
    PICTURE.write_text(_plain(console.export_svg(title="zoo", theme=MONOKAI)), encoding="utf-8")


def _plain(svg: str) -> str:
    """The picture without fonts to fetch, without signs that join letters (`8x7`), and with all spaces kept."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("font-size: 20px;", "font-size: 20px;\n        font-variant-ligatures: none;")
    return "\n".join(line.rstrip() for line in svg.replace("<svg ", '<svg xml:space="preserve" ').splitlines()) + "\n"


if __name__ == "__main__":
    main()
