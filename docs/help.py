"""Pictures of what two commands say of themselves: `python docs/help.py` writes docs/help-*.svg."""

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE, WIDTH = Path(__file__).parent, 118
COMMANDS = (("train", "lora"), ("attribute",))


def main() -> None:
    for words in COMMANDS:
        command = [str(Path(sys.executable).with_name("whence")), *words, "--help"]
        environment = os.environ | {"COLUMNS": str(WIDTH), "FORCE_COLOR": "1", "TERMINAL_WIDTH": str(WIDTH)}
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        console = Console(record=True, width=WIDTH, file=io.StringIO())
        console.print(Text.from_ansi(shown))
        console.save_svg(str(HERE / f"help-{'-'.join(words)}.svg"), title=f"whence {' '.join(words)} --help")


if __name__ == "__main__":
    main()
