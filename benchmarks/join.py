"""Join results of the same cells, each of other seeds, into one: what was trained a process per seed.

for k in 1 2 3 4 5; do
    python benchmarks/run.py --algos reinforce --env-ids CartPole-v1 --total-timesteps 500000 --num-seeds 1 --seed $k \\
        --run-dir runs/$k --results runs/mean_$k -- --baseline mean
done
python benchmarks/join.py runs/mean_? --results runs/mean

So seeds are trained that do not fit into one process, or whose batches would wait for each other (REINFORCE on whole
episodes). What differs in more than the seed, or in what the script computes, is refused.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from fingerprint import differences
from reading import read_result, read_rows
from run import write_json

MAY_DIFFER = ("seed", "num_seeds", "env_threads", "torch_threads", "checkpoint_seconds")
OF_A_PROCESS = ("command", "script_sha256", "git_commit", "hardware", "resumed", "jobs_at_a_time")


@dataclass
class Args:
    parts: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders that run.py has gathered into
    results: Path  # where the joined results go


def join(folders: list[Path]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """run.json and the rows of metrics.csv of all seeds of one cell. Raises ValueError for cells that are not alike."""
    metas = [json.loads((folder / "run.json").read_text()) for folder in folders]
    parts = sorted(zip(metas, folders, strict=True), key=lambda part: part[0]["args"]["seed"])
    (first, place), rows, seeds = parts[0], [], []
    for meta, folder in parts:
        seeds += read_result(folder)
        rows += read_rows(folder / "metrics.csv")
        sides = [own["args"] | {"versions": own["versions"]} for own in (first, meta)]
        names = [name for name in sides[0] if name not in MAY_DIFFER and sides[0][name] != sides[1].get(name)]
        if names:
            raise ValueError(f"{place} and {folder} differ in {', '.join(names)}")
        if changed := differences(first["fingerprint"], meta["fingerprint"]):
            raise ValueError(f"{place} and {folder} are of scripts that differ: {changed[0]}")
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))):
        raise ValueError(f"{place.parent.name} on {place.name}: the seeds are {seeds}, not one after another")
    processes = [{name: meta[name] for name in OF_A_PROCESS if name in meta} for meta, _ in parts]
    whole = {name: value for name, value in first.items() if name not in OF_A_PROCESS} | {"processes": processes}
    whole["args"] = first["args"] | {"num_seeds": len(seeds)}
    whole["command"] = "; ".join(meta["command"] for meta, _ in parts)
    return whole, rows


def main(args: Args) -> int:
    cells = sorted({path.parent.relative_to(part) for part in args.parts for path in part.glob("*/*/run.json")})
    try:
        if not cells:
            raise ValueError("there are no results in these folders")
        for cell in cells:
            meta, rows = join([part / cell for part in args.parts if (part / cell / "run.json").exists()])
            (args.results / cell).mkdir(parents=True, exist_ok=True)
            with open(args.results / cell / "metrics.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            write_json(args.results / cell / "run.json", meta)
            print(f"{cell}: {meta['args']['num_seeds']} seeds")
    except (OSError, ValueError) as error:
        print(f"join.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
