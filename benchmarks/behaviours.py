"""Train walkers with other rewards, and keep what they do: numbers from evaluation and a small film of each.

python benchmarks/behaviours.py        # trains what is not there yet, some eight minutes each on two cores

The films and numbers of the README: benchmarks/figures/<name>.gif (of the best seed),
benchmarks/results/behaviours/<name>.csv (100 episodes of each seed) and <name>.json (what ran). report.py makes the
README's table of the numbers.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import imageio
import numpy as np
import tyro
from PIL import Image
from run import digest

ROOT = Path(__file__).resolve().parent.parent
BEHAVIOURS = {
    "0_usual": [],
    "1_backwards": ["forward_reward_weight", "-1"],
    "2_standing still": ["forward_reward_weight", "0", "ctrl_cost_weight", "0.1"],
    "3_sparing its torque": ["ctrl_cost_weight", "0.5"],
}


@dataclass
class Args:
    run_dir: Path = ROOT / "runs" / "behaviours"  # where the runs themselves stay
    results: Path = ROOT / "benchmarks" / "results" / "behaviours"  # where the numbers go
    figures: Path = ROOT / "benchmarks" / "figures"  # where the films go
    num_seeds: int = 3  # trained with each reward
    env_threads: int = 0  # of the script


def shrink(source: Path, target: Path) -> None:
    """Every second picture, the part around the walker alone, in 48 colours: a film that a page can carry four of."""
    frames = [Image.fromarray(frame) for frame in imageio.mimread(source, memtest=False)[::2]]
    images = [frame.crop((100, 130, 435, 465)).resize((200, 200)).quantize(48) for frame in frames]
    images[0].save(target, save_all=True, append_images=images[1:], duration=80, loop=0)


def main(args: Args) -> None:
    script = str(ROOT / "algos" / "ppo_continuous.py")
    # An edited script trains anew, and so does another number of seeds
    parent = args.run_dir / f"{digest(Path(script))[:8]}_{args.num_seeds}"
    stems = {name: name.replace(" ", "_") for name in BEHAVIOURS}
    for name, settings in BEHAVIOURS.items():  # all before the first result, which would leave the repository dirty
        words = [sys.executable, script, "--env-id", "Walker2d-v4", "--run-dir", str(parent / stems[name])]
        words += ["--resume", "auto", "--num-seeds", str(args.num_seeds), "--env-threads", str(args.env_threads)]
        subprocess.run(words + ["--env-kwargs", *settings] * bool(settings), check=True)
    args.results.mkdir(parents=True, exist_ok=True)
    for stem in stems.values():
        runs, lines, returns = [], [], []
        for seed in range(1, args.num_seeds + 1):
            (run,) = (parent / stem).glob(f"Walker2d-v4__*__{seed}__*")
            runs.append(run)
            subprocess.run([sys.executable, script, "--evaluate", str(run)], check=True)
            header, *episodes = (run / "evaluation.csv").read_text().splitlines()
            lines += [f"{seed},{episode}" for episode in episodes]
            returns.append(np.mean([float(episode.split(",")[0]) for episode in episodes]))
        best = runs[int(np.argmax(returns))]
        subprocess.run([sys.executable, script, "--evaluate", str(best), "--capture-video", "mp4"], check=True)
        shrink(best / "videos" / "episode.mp4", args.figures / f"{stem}.gif")
        config = json.loads((runs[0] / "config.json").read_text())
        for private in ("run_dir", "resume", "evaluate"):
            config["args"].pop(private)
        (args.results / f"{stem}.json").write_text(json.dumps(config, indent=2) + "\n")
        (args.results / f"{stem}.csv").write_text("\n".join([f"seed,{header}", *lines, ""]))


if __name__ == "__main__":
    main(tyro.cli(Args))
