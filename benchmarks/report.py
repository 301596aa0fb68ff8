"""Rebuild, offline, what the README shows of the results: the table of final returns and the learning curves.

python benchmarks/report.py            # writes the figures and the README's section
python benchmarks/report.py --check    # writes nothing; status 1 if the committed files are not what the data gives

Protocol: the final evaluation, not the best; deterministic action, frozen statistics, 100 fresh episodes per seed; the
same defaults for all tasks; seeds 1 to 5, which no search of defaults has used. A mean over seeds comes with Student's
t interval at 95 %. Published means have no spread here: they are points.
"""

import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import scipy.stats
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: benchmarks/report.py writes what is between -->", "<!-- end of results -->"
BEGIN_BEHAVIOURS = "<!-- behaviours: benchmarks/report.py writes what is between -->"
END_BEHAVIOURS = "<!-- end of behaviours -->"
BEGIN_VARIANCE = "<!-- variance: benchmarks/report.py writes what is between -->"
END_VARIANCE = "<!-- end of variance -->"
BEGIN_SPEED, END_SPEED = "<!-- speed: benchmarks/report.py writes what is between -->", "<!-- end of speed -->"
PUBLISHED_NAME = {"ppo_continuous": "ppo"}
ALGOS = ("ppo_continuous", "trpo", "a2c", "reinforce", "sac", "ddpg")


@dataclass
class Args:
    check: bool = False  # compare with the committed files instead of writing them
    results: Path = HERE / "results"  # what run.py gathered
    figures: Path = HERE / "figures"  # where the curves go


def read_result(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """The columns of a result by seed. Raises ValueError, naming the file, if it is cut off or inconsistent."""
    path = folder / "metrics.csv"
    meta = json.loads((folder / "run.json").read_text())
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    seeds: dict[int, dict[str, np.ndarray]] = {}
    for seed in sorted({int(row["seed"]) for row in rows if row["seed"]}):
        own = [row for row in rows if row["seed"] == str(seed)]
        if any(value is None for row in own for value in row.values()):
            raise ValueError(f"{path}: a row of seed {seed} is cut off")
        seeds[seed] = {
            name: np.array([float(row[name]) if row[name] else np.nan for row in own])
            for name in own[0]
            if name != "seed"
        }
        last = own[-1]
        if int(last["global_step"]) != meta["trained_timesteps"] or not last["eval_return"]:
            raise ValueError(f"{path}: seed {seed} ends at step {last['global_step']}, not {meta['trained_timesteps']}")
    if len(seeds) != meta["args"]["num_seeds"]:
        raise ValueError(f"{path}: {len(seeds)} seeds, not {meta['args']['num_seeds']}")
    return seeds


def student_interval(values: np.ndarray, level: float = 0.95) -> float:
    """Half the width of the confidence interval of a mean, by Student's t with n - 1 degrees of freedom."""
    n = len(values)
    return float(scipy.stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


def published() -> dict[tuple[str, str], float]:
    with open(HERE / "published.csv", newline="") as file:
        return {(row["algo"], row["env"]): float(row["mean_return"]) for row in csv.DictReader(file)}


def table(results: dict[str, dict[str, dict]]) -> str:
    bar = published()
    lines = ["| algorithm | task | final return, mean of seeds | 95 % interval | each seed | best published mean | |"]
    lines += ["|---|---|---:|---:|---|---:|---|"]
    for algo, tasks in results.items():
        for task, seeds in tasks.items():
            final = np.array([columns["eval_return"][-1] for columns in seeds.values()])
            mean, half = final.mean(), student_interval(final)
            target = bar.get((PUBLISHED_NAME.get(algo, algo), task.rpartition("-")[0]))
            outcome = "" if target is None else f"{'won' if mean > target else 'lost'} by {abs(mean - target):,.0f}"
            each = " ".join(f"{value:.0f}" for value in final)
            point = "" if target is None else f"{target:,.0f}"
            lines.append(f"| {algo} | {task} | {mean:,.0f} | ± {half:,.0f} | {each} | {point} | {outcome} |")
    return "\n".join(lines)


def curves(algo: str, tasks: dict[str, dict]) -> bytes:
    """Training return against environment steps, mean and Student interval, with the deterministic evaluations."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 3.0), layout="constrained", squeeze=False)
    bar = published()
    for axis, (task, seeds) in zip(axes[0], tasks.items(), strict=True):
        steps = next(iter(seeds.values()))["global_step"] / 1e6
        training = np.array([columns["episodic_return"] for columns in seeds.values()])
        full = ~np.isnan(training).any(axis=0)
        mean = training[:, full].mean(axis=0)
        half = np.array([student_interval(column) for column in training[:, full].T])
        axis.plot(steps[full], mean, color="C0", lw=1.5, label="training, sampled actions")
        axis.fill_between(steps[full], mean - half, mean + half, color="C0", alpha=0.2, lw=0)
        evaluated = np.array([columns["eval_return"] for columns in seeds.values()])
        marks = ~np.isnan(evaluated).any(axis=0)
        half = [student_interval(column) for column in evaluated[:, marks].T]
        axis.errorbar(
            steps[marks], evaluated[:, marks].mean(axis=0), half, fmt="o", ms=3, lw=1, color="C1",
            label="evaluation, deterministic",
        )  # fmt: skip
        if (target := bar.get((PUBLISHED_NAME.get(algo, algo), task.rpartition("-")[0]))) is not None:
            axis.axhline(target, color="0.4", ls="--", lw=1, label="best published mean at 1M")
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("million steps per seed", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=min(0, np.nanmin(mean)))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("return", fontsize=9)
    axes[0, 0].legend(fontsize=7, loc="upper left", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, metadata={"Software": None})  # no version in it: the same data, the same bytes
    plt.close(figure)
    return picture.getvalue()


def behaviours(folder: Path) -> str:
    """What walkers do that were trained with other rewards: each from the evaluation.csv of `--evaluate`."""
    header, line = "| |", "|---|"
    rows = ["| `--env-kwargs` |", "| x velocity |", "| mean squared action (torque) |", "| |"]
    for path in sorted(folder.glob("*.csv")):
        config = json.loads(path.with_suffix(".json").read_text())
        settings = " ".join(f"{name} {value}" for name, value in config["args"]["env_kwargs"].items())
        with open(path, newline="") as file:
            episodes = list(csv.DictReader(file))
        columns = {name: np.array([float(row[name]) for row in episodes]) for name in episodes[0]}
        name = path.stem.partition("_")[2].replace("_", " ")
        header, line = f"{header} {name} |", line + "---|"
        rows[0] += f" `{settings}` |" if settings else " none |"
        rows[1] += f" {columns['x_velocity'].mean():.2f} m/s |"
        rows[2] += f" {columns['squared_action'].mean():.3f} |"
        rows[3] += f" ![{name}](benchmarks/figures/{path.stem}.gif) |"
    return "\n".join([header, line, *rows])


def variance_figure(result: dict) -> bytes:
    """The variance of REINFORCE's gradient with each estimator, as measured by variance.py."""
    names = list(result["estimators"])
    variances = [result["estimators"][name]["variance"] for name in names]
    figure, axis = plt.subplots(figsize=(6.4, 2.2), layout="constrained")
    axis.barh(range(len(names)), variances, color=["C3", "C1", "C2", "C0"])
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("variance of the policy gradient (sum over parameters)", fontsize=9)
    for i, value in enumerate(variances):
        axis.text(value, i, f" {value:.3g}", va="center", fontsize=8)
    axis.set_xlim(right=max(variances) * 4)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return picture.getvalue()


def variance_text(result: dict) -> str:
    """How far the means of the estimators lie from that of the last one, in standard errors of that distance."""
    estimators = list(result["estimators"].items())
    parts = [
        f"{name}: {numbers['distance_of_means'] / numbers['standard_error_of_distance']:.2f}"
        for name, numbers in estimators[:-1]
    ]
    return (
        "![variance of the gradient by estimator](benchmarks/figures/variance.png)\n\n"
        f"One half-trained policy on {result['env_id']}, {result['batches']} batches of {result['episodes_per_batch']}"
        f" episodes. All four estimate the same gradient: the means lie within the noise of that of the last one"
        f" (distance in standard errors: {', '.join(parts)})."
    )


def speed(folder: Path) -> str:
    """The table of results/speed/*.json: medians, what that is of a peer's, and where the time goes."""
    lines: list[str] = []
    order = [folder / f"{algo}.json" for algo in ALGOS if (folder / f"{algo}.json").exists()]
    for path in order:
        result = json.loads(path.read_text())
        algo, hardware = result["algo"], result["hardware"]
        lines += [f"**{algo}**, {result['env_id']}, {hardware['cores']} cores ({hardware['machine']}), no GPU:", ""]
        lines += ["| | environment steps per second, all seeds | range |", "|---|---:|---:|"]
        for name, figures in result["steps_per_second"].items():
            if name.endswith("epochs"):
                continue  # measured for the cost of an epoch only
            low, high = min(figures["each"]), max(figures["each"])
            lines.append(f"| {name} | {figures['median']:,.0f} | {low:,.0f} to {high:,.0f} |")
        lines.append("")
        for peer, ratios in result["times_peer"].items():
            times = ", ".join(f"{ratio:.1f} times with {seeds}" for seeds, ratio in ratios.items())
            lines.append(f"Against {peer}: {times}.")
        for seeds, share in result["share_of_time"].items():
            parts = ", ".join(f"{part} {value:.0%}" for part, value in share.items())
            lines.append(f"Time with {seeds}: {parts}.")
        if goal := result.get("seconds_to_return"):
            seconds = ", ".join(
                f"{name} {'not within 1M steps' if np.isnan(value) else f'{value:.0f} s'}"
                for name, value in goal.items()
                if name != "return"
            )
            lines.append(f"Training until a mean return of {goal['return']:,.0f}: {seconds}.")
        lines.append("")
    return "\n".join(lines).strip()


def replace_section(text: str, begin: str, end: str, content: str) -> str:
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def main(args: Args) -> int:
    results: dict[str, dict[str, dict]] = {}
    for algo in ALGOS:
        for meta in sorted((args.results / algo).glob("*/run.json")):
            results.setdefault(algo, {})[meta.parts[-2]] = read_result(meta.parent)
    files = {args.figures / f"{algo}.png": curves(algo, tasks) for algo, tasks in results.items()}
    pictures = [f"![learning curves of {algo}](benchmarks/figures/{algo}.png)" for algo in results]
    readme = replace_section(README.read_text(), BEGIN, END, "\n\n".join([*pictures, table(results)]))
    readme = replace_section(readme, BEGIN_BEHAVIOURS, END_BEHAVIOURS, behaviours(args.results / "behaviours"))
    readme = replace_section(readme, BEGIN_SPEED, END_SPEED, speed(args.results / "speed"))
    variance = json.loads((args.results / "variance.json").read_text())
    files[args.figures / "variance.png"] = variance_figure(variance)
    readme = replace_section(readme, BEGIN_VARIANCE, END_VARIANCE, variance_text(variance))
    files[README] = readme.encode()
    different = [path for path, content in files.items() if not path.exists() or path.read_bytes() != content]
    for path in different:
        print(f"{'not what the data gives' if args.check else 'written'}: {path.relative_to(HERE.parent)}")
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path])
    return 1 if args.check and different else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
