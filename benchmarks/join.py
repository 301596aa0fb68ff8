"""Join results of the same cells, each of other seeds, into one: what was trained a process per seed.

for k in 1 2 3 4 5; do
    python benchmarks/run.py --algos reinforce --env-ids CartPole-v1 --total-timesteps 500000 --num-seeds 1 --seed $k \\
        --run-dir runs/$k --results runs/mean_$k -- --baseline mean
done
python benchmarks/join.py runs/mean_? --results runs/mean

So seeds are trained that do not fit into one process, or whose batches would wait for each other (REINFORCE on whole
episodes). What differs in more than the seed, or in what the script computes, is refused.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from fingerprint import differences
from reading import OF_THE_MACHINE, differing, naming, read_result, read_rows
from run import write_result

OF_A_PROCESS = ("command", "script_sha256", "git_commit", "hardware", "resumed", "jobs_at_a_time")


@dataclass
class Args:
    parts: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders that run.py has gathered into
    results: Path  # where the joined results go


def join(folders: list[Path]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """run.json and the rows of metrics.csv of all seeds of one cell. Raises ValueError for cells that are not alike."""
    parts: list[tuple[int, Path, dict[str, Any]]] = []
    for folder in folders:
        with naming(folder):
            meta = json.loads((folder / "run.json").read_text())
            parts.append((meta["args"]["seed"], folder, meta))
    parts.sort(key=lambda part: part[0])
    (_, place, first), rows, seeds = parts[0], [], []
    for _, folder, meta in parts:
        seeds += read_result(folder)
        rows += read_rows(folder / "metrics.csv")
        with naming(folder):
            sides = [own["args"] | {"versions": own["versions"]} for own in (first, meta)]
            if names := differing(*sides, OF_THE_MACHINE | {"seed", "num_seeds"}):
                raise ValueError(f"differs from {place} in {', '.join(names)}")
            if changed := differences(first["fingerprint"], meta["fingerprint"]):
                raise ValueError(f"its script computes something else than that of {place}: {changed[0]}")
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))):
        raise ValueError(f"{place.parent.name} on {place.name}: the seeds are {seeds}, not one after another")
    processes: list[dict[str, Any]] = []
    for *_, meta in parts:  # a part may be a joined result itself
        processes += meta.get("processes") or [{name: meta[name] for name in OF_A_PROCESS if name in meta}]
    whole = {name: value for name, value in first.items() if name not in OF_A_PROCESS} | {"processes": processes}
    whole["args"] = first["args"] | {"num_seeds": len(seeds)}
    whole["command"] = "; ".join(meta["command"] for *_, meta in parts)
    return whole, rows


def main(args: Args) -> int:
    cells = sorted({path.parent.relative_to(part) for part in args.parts for path in part.glob("*/*/run.json")})
    try:
        if not cells:
            raise ValueError("there are no results in these folders")
        for part, cell in ((part, cell) for part in args.parts for cell in cells):
            if not (part / cell / "run.json").exists():  # a seed that failed must not go unnoticed
                raise ValueError(f"{part} has no result of {cell}, which others have")
        for cell in cells:
            meta, rows = join([part / cell for part in args.parts])
            write_result(args.results / cell, rows, meta)
            print(f"{cell}: {meta['args']['num_seeds']} seeds")
    except (OSError, ValueError) as error:
        print(f"join.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
