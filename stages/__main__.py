"""The commands beside the pipeline: ``python -m stages <command>`` runs one, ``python -m stages``
alone lists them. Each module of ``stages.commands`` is one: its ``main`` takes the options.
"""

import ast
import runpy
import sys
from pathlib import Path

from stages.core.errors import did_you_mean

FOLDER = Path(__file__).parent / "commands"


def commands() -> dict[str, str]:
    """The first line of each command's docstring, by its name."""
    texts = {
        path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("[!_]*.py"))
    }
    docstrings = {name: ast.get_docstring(ast.parse(text)) or "" for name, text in texts.items()}
    return {name: text.partition("\n")[0] for name, text in docstrings.items()}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    known = commands()
    if name not in known:
        hint = f"there is no command '{name}'{did_you_mean(name, known)}" if name else __doc__
        lines = [f"  {each:<10} {line}" for each, line in known.items()]
        print(hint, *lines, sep="\n", file=sys.stderr)
        raise SystemExit(2 if name else 0)
    del sys.argv[0]
    runpy.run_module(f"stages.commands.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
