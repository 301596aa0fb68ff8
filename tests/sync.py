"""Rewrite the copies of a definition from one script of algos/ into all others that have it.

python tests/sync.py compute_gae --from algos/ppo_continuous.py
python tests/sync.py surroundings --from algos/ppo_continuous.py     # all that stands below the double rule
"""

import argparse
import ast
from pathlib import Path

ALGOS = Path(__file__).resolve().parent.parent / "algos"
RULE = "# " + "=" * 118 + "\n# Surroundings"


def definitions(source: str) -> dict[str, str]:
    """Every top-level function and class of a script by name, decorators included."""
    lines = source.splitlines(keepends=True)
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "".join(lines[first - 1 : node.end_lineno])
    return found


def surroundings(source: str) -> str:
    """What stands below the double rule. Raises ValueError where there is none."""
    return source[source.index(RULE) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a function or class, or: surroundings")
    parser.add_argument("--from", dest="source", type=Path, required=True, help="the script to copy from")
    options = parser.parse_args()
    source = options.source.read_text()
    everything = options.name == "surroundings"
    if not everything and options.name not in definitions(source):
        parser.error(f"{options.source} defines no {options.name}")
    text = surroundings(source) if everything else definitions(source)[options.name]
    for path in sorted(ALGOS.glob("*.py")):
        target = path.read_text()
        old = surroundings(target) if everything else definitions(target).get(options.name)
        if old not in (None, text):
            path.write_text(target.replace(old, text))
            print(f"{path.name}: {options.name} rewritten")


if __name__ == "__main__":
    main()
