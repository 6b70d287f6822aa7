"""Draws the picture of the README from the state of a migration.

fleetlift migrate status --json --data DIR | python scripts/make_demo_picture.py docs/demo.svg
"""

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from fleetlift.cli.watch import render
from fleetlift.core.status import from_document

WIDTH, HEIGHT = 118, 32


def main(target: Path) -> None:
    status = from_document(json.load(sys.stdin))
    console = Console(
        width=WIDTH,
        height=HEIGHT,
        record=True,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(render(status, WIDTH, HEIGHT))
    picture = console.export_svg(title="fleetlift migrate watch")
    # The font is asked for by name only: a picture must not reach out to the network.
    target.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
