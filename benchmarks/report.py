"""Rebuild, offline, what README.md and benchmarks/README.md show of the results: tables, numbers and figures.

python benchmarks/report.py            # writes the figures and the sections
python benchmarks/report.py --check    # writes nothing; status 1 if the committed files are not what the data gives, a
                                       # section has no data, or a script no longer computes what its results came from
                                       # (--no-fingerprints: without the last, which takes some seconds per script)
python benchmarks/report.py --compare runs/A runs/B     # is B better than A? Folders of run folders, or of results

Protocol: the final evaluation, not the best; deterministic action, frozen statistics, 100 fresh episodes per seed; the
same defaults for all tasks. A mean over seeds comes with Student's t interval at 95 %. Welch's t test compares it with
a published mean whose source has a standard deviation over seeds, with Holm's correction for the number of tests. Over
tasks: returns normalised between the random policy (0) and the best published mean of any of the six algorithms (1),
intervals by stratified bootstrap of the seeds, with a fixed seed of its own.
"""

import io
import itertools
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import matplotlib
import numpy as np
import stats
import tyro
from compare import compare
from fingerprint import circumstances, command, differences, fingerprint, named
from reading import OF_A_CELL, OF_THE_MACHINE, differing, naming, read_result, read_rows, refilled

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
DETAILS = HERE / "README.md"
PUBLISHED_NAME = {"ppo_continuous": "ppo"}
ALGOS = ("ppo_continuous", "trpo", "a2c", "reinforce", "sac", "ddpg")
STEPS = 1_000_000  # of the table, per seed
ESTIMATORS = {  # of variance.py: where in the results the trainings with them are, with the factor gamma^t and without
    "whole return R(tau)": ("estimators/whole_return", None),  # which has it by its form
    "reward-to-go": ("estimators/reward_to_go_with_gamma_t", "estimators/reward_to_go"),
    "minus a moving average": ("estimators/moving_average_with_gamma_t", "estimators/moving_average"),
    "minus a learned V(s)": ("estimators/learned_value_with_gamma_t", "shorter"),  # the default
}


@dataclass
class Args:
    check: bool = False  # compare with the committed files instead of writing them
    fingerprints: bool = True  # with check, also run the scripts for a moment, to tell which results are stale
    compare: tuple[Path, Path] | None = None  # only compare the runs in two folders, the second with the first
    readme: Path = README  # the front page, whose sections are written
    details: Path = DETAILS  # and the page with the rest of the numbers
    results: Path = HERE / "results"  # what run.py gathered
    figures: Path = HERE / "figures"  # where the curves go


@dataclass
class Bar:
    """A published mean of an algorithm on a task: what there is to beat."""

    mean: float = np.nan
    std: float = np.nan  # over seeds, with n - 1; NaN where the source has none
    seeds: int = 0
    sampled: bool = False  # of episodes whose actions were sampled, in training or in tests; ours are the mean action

    @classmethod
    def of(cls, row: dict[str, str]) -> "Bar":
        numbers = float(row["mean_return"]), float(row["std_over_seeds"] or "nan"), int(row["n_seeds"])
        return cls(*numbers, row.get("actions") == "sampled")

    def __str__(self) -> str:
        half = stats.half_width(self.std, self.seeds) if self.seeds else np.nan
        return number(self.mean) + ("" if np.isnan(half) else f" ± {number(half)}") + " †" * self.sampled


def published() -> dict[tuple[str, str], Bar]:
    """The best one by algorithm and task, the task without its version."""
    return {(row["algo"], row["env"]): Bar.of(row) for row in read_rows(HERE / "published.csv")}


def published_curves() -> dict[tuple[str, str, int], Bar]:
    """Points of published learning curves up to a million steps, by algorithm, task without its version, and steps."""
    rows = read_rows(HERE / "published_curves.csv")
    return {(row["algo"], row["env"], int(row["steps"])): Bar.of(row) for row in rows}


def random_returns() -> dict[str, float]:
    """Mean return of random actions by task, as random_policy.py has measured it."""
    return {row["env_id"]: float(row["mean_return"]) for row in read_rows(HERE / "results" / "random.csv")}


def final_returns(seeds: dict[int, dict[str, np.ndarray]], kind: str = "eval_return") -> np.ndarray:
    """[seeds]"""
    return np.array([columns[kind][-1] for columns in seeds.values()])


def number(value: float, sign: str = "") -> str:
    """With a decimal where the task's returns are small."""
    return "" if np.isnan(value) else f"{value:{sign},.{0 if abs(value) >= 100 else 1}f}"


def with_spread(final: np.ndarray, mark: str = "") -> str:
    """Mean, between Markdown's `mark` for bold or italic, and interval of the seeds' returns; one has no interval."""
    mean, half = number(final.mean()), stats.student_interval(final)
    return f"{mark}{mean}{mark}" + ("" if np.isnan(half) else f" ± {number(half)}")


def listed(values: Iterable[str]) -> str:
    *first, last = values
    return f"{', '.join(first)} and {last}" if first else last


def probability(p: float) -> str:
    return "" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


@dataclass
class Cell:
    """The seeds of an algorithm on a task, against the best published mean; NaN where there is none."""

    algo: str
    task: str
    final: np.ndarray  # final return of each seed
    bar: Bar
    alike: np.ndarray  # what compares like for like: the final policy's return by sampled actions where the bar is of
    # such, else `final`
    half: float  # half the width of the interval of mean(alike) - bar
    p: float  # of stats.against, with Holm's correction for the number of tests; NaN if the bar has no deviation

    @property
    def won(self) -> bool:
        """As high is enough: some tasks have a highest return."""
        return bool(self.alike.mean() >= self.bar.mean)


def all_cells(results: dict[str, dict[str, dict]]) -> list[Cell]:
    """Raises ValueError where the bar is of sampled actions and sampled.py has not measured ours."""
    bars, cells = published(), []
    for algo, task in ((algo, task) for algo, tasks in results.items() for task in tasks):
        seeds, bar = results[algo][task], bars.get((PUBLISHED_NAME.get(algo, algo), task.rpartition("-")[0]), Bar())
        if bar.sampled and not all(np.isfinite(own.get("sampled_return", [np.nan])[-1]) for own in seeds.values()):
            raise ValueError(f"{algo} on {task}: the published mean is of sampled actions: run sampled.py first")
        final = final_returns(seeds)
        alike = final_returns(seeds, "sampled_return") if bar.sampled else final
        half, p = stats.against(alike, bar.mean, bar.std, bar.seeds)
        if np.isnan(bar.std):  # a test against a mean as if it were exact would find too much
            p = np.nan
        cells.append(Cell(algo, task, final, bar, alike, half, p))
    for cell, p in zip(cells, stats.holm([cell.p for cell in cells]), strict=True):
        cell.p = p
    return cells


def counted(cells: list[Cell]) -> str:
    """How many of these cells are above the published mean and how many below, and how many of each significantly."""
    words = []
    for where, won in (("above", True), ("below", False)):
        side = [cell for cell in cells if cell.won is won]
        tests = [cell.p for cell in side if not np.isnan(cell.p)]
        words.append(f"{where} in {len(side)} of {len(cells)}")
        if tests:
            words[-1] += f" ({sum(p < 0.05 for p in tests) or 'none'} of {plural(len(tests), 'test')} significant)"
    return "; ".join(words)


def plural(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def table(results: dict[str, dict[str, dict]]) -> str:
    """Cell by cell, with each seed and the margin."""
    head = "| algorithm | task | final return, mean of seeds | each seed | by sampled actions | best published mean"
    head += " | margin like for like, 95 % interval | p |"
    lines, cells = [head, "|---|---|---:|---|---:|---:|---|---:|"], all_cells(results)
    for cell in cells:
        margin = cell.alike.mean() - cell.bar.mean
        each = " ".join(number(value).replace(",", "") for value in cell.final)
        outcome = "" if np.isnan(margin) else f"{'above' if cell.won else 'below'} by {number(abs(margin))}"
        if outcome and not np.isnan(cell.half):
            outcome += f" ({number(margin - cell.half, '+')} to {number(margin + cell.half, '+')})"
        row = [cell.algo, cell.task, with_spread(cell.final), each]
        row += [with_spread(cell.alike) if cell.bar.sampled else "", str(cell.bar), outcome, probability(cell.p)]
        lines.append(f"| {' | '.join(row)} |")
    note = (
        "†: the published mean is of sampled actions, so the margin is that of ours by sampled actions. p: Welch's t"
        " test, where the source has a standard deviation over seeds (then the published mean has an interval here),"
        f" with Holm's correction for {np.isfinite([cell.p for cell in cells]).sum()} tests. Where it has none, the"
        " margin's interval takes the published mean as exact and is too narrow. The intervals are not corrected, so"
        " that one may exclude 0 where p is large."
    )
    return "\n".join([*lines, "", note])


def matrix(results: dict[str, dict[str, dict]]) -> str:
    """The front page's table: tasks down, algorithms across; under each return what is compared with the best published
    mean, and how that compares."""
    cells = {(cell.algo, cell.task): cell for cell in all_cells(results)}
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for task in sorted({task for _, task in cells}):
        row = [task]
        for algo in results:
            if (cell := cells.get((algo, task))) is None:
                row.append("")
                continue
            mark = ("▲" if cell.won else "▼") * (2 if cell.p < 0.05 else 1)
            compared = f"<br>{number(cell.alike.mean())} {mark} {number(cell.bar.mean)}"
            row.append(with_spread(cell.final) + ("" if np.isnan(cell.bar.mean) else compared))
        lines.append(f"| {' | '.join(row)} |")
    compared = [cell for cell in cells.values() if not np.isnan(cell.bar.mean)]
    counts = {len(cell.final) for cell in cells.values()}
    seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    sampled = sum(cell.bar.sampled for cell in compared)
    note = (
        "Curves: deterministic evaluations, mean of the seeds with its 95 % interval. Table, upper line: return after a"
        f" million steps, mean of {seeds} seeds with its 95 % interval, the last policy's deterministic action, 100"
        " episodes per seed. Lower line: what of ours is compared, and the best published mean that we found for the"
        " algorithm; ▲ is above it (or equal), ▼ below; ▲▲ and ▼▼ are significant (Welch's t test, p < 0.05 with Holm's"
        " correction, where the source has a standard deviation:"
        f" {sum(not np.isnan(cell.p) for cell in compared)} of {len(compared)})."
    )
    if sampled:
        note += (
            f" {sampled} of the published means are of sampled actions. These are compared with our policies' sampled"
            " actions, which mostly return less: [every seed](benchmarks/README.md#every-cell)."
        )
    # Most of what is published of REINFORCE has no critic, ours has one: counted apart
    groups = [[algo for algo in results if algo != "reinforce"], [algo for algo in results if algo == "reinforce"]]
    sums = [(group, [cell for cell in compared if cell.algo in group]) for group in groups]
    said = "\\\n".join(f"{listed(group)}: {counted(own)}." for group, own in sums if own)
    return "\n".join([*lines, "", note, "", said]).rstrip()


def normalised_scores(results: dict[str, dict[str, dict]]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Final returns of the algorithms that can be compared, [seeds, tasks] each, and the tasks; see stats.comparable.
    0 is the random policy, 1 the best published mean of any of the six algorithms."""
    floor, best = random_returns(), {}
    for (_, env), bar in published().items():
        best[env] = max(bar.mean, best.get(env, -np.inf))
    tops = {task: best[task.rpartition("-")[0]] for task in floor if task.rpartition("-")[0] in best}
    algos, tasks = stats.comparable({algo: set(cells) & tops.keys() for algo, cells in results.items()})
    scores: dict[str, np.ndarray] = {}
    for algo in algos:
        count = min(len(results[algo][task]) for task in tasks)  # a cell with more seeds: its first ones
        columns = [final_returns(results[algo][task])[:count] for task in tasks]
        scores[algo] = np.stack(
            [(column - floor[task]) / (tops[task] - floor[task]) for column, task in zip(columns, tasks, strict=True)],
            1,
        )
    return scores, tasks


def aggregate_figure(scores: dict[str, np.ndarray]) -> bytes:
    """Left the interquartile means, right the performance profiles, both with their bootstrap intervals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.0), layout="constrained")
    thresholds = np.linspace(0, max(1.0, *(float(own.max()) for own in scores.values())), 101)
    for i, (algo, own) in enumerate(scores.items()):
        mean, (low, high) = stats.bootstrap(own, stats.interquartile_mean)
        left.errorbar(mean, [i], xerr=[mean - low, high - mean], fmt="o", color=f"C{i}", capsize=3)
        shares, (low, high) = stats.bootstrap(own, lambda x: stats.profile(x, thresholds))
        right.plot(thresholds, shares, color=f"C{i}", label=algo)
        right.fill_between(thresholds, low, high, color=f"C{i}", alpha=0.2, lw=0)
    left.set_yticks(range(len(scores)), list(scores), fontsize=9)
    left.set_ylim(len(scores) - 0.5, -0.5)
    left.set_xlabel("interquartile mean of normalised returns", fontsize=9)
    right.set_xlabel("normalised return", fontsize=9)
    right.set_ylabel("share of seeds and tasks above it", fontsize=9)
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure)


def aggregate_text(scores: dict[str, np.ndarray], tasks: list[str]) -> str:
    """The figure's numbers, and for each pair the probability that a seed of the one beats a seed of the other."""
    lines = [
        "![interquartile means and performance profiles](figures/aggregate.png)\n",
        f"Over {', '.join(tasks)}; 0 is the random policy, 1 the best published mean of any of the six algorithms"
        " (mostly SAC's); intervals by stratified bootstrap over seeds. Defaults were not searched equally long.\n",
        "| algorithm | seeds per task | interquartile mean | 95 % interval |",
        "|---|---:|---:|---:|",
    ]
    for algo, own in scores.items():
        (mean,), ((low,), (high,)) = stats.bootstrap(own, stats.interquartile_mean)
        lines.append(f"| {algo} | {len(own)} | {mean:.2f} | {low:.2f} to {high:.2f} |")
    lines += ["", "| a seed of | beats one of | probability | 95 % interval |", "|---|---|---:|---:|"]
    for one, other in itertools.combinations(scores, 2):
        (chance,), ((low,), (high,)) = stats.bootstrap([scores[one], scores[other]], stats.improvement)
        lines.append(f"| {one} | {other} | {chance:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def png(figure: plt.Figure) -> bytes:
    """No version of Matplotlib in it: the same data, the same bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, metadata={"Software": None})
    plt.close(figure)
    return picture.getvalue()


def overview(results: dict[str, dict[str, dict]]) -> bytes:
    """Deterministic evaluation return against environment steps, all algorithms of a task in one panel."""
    tasks = sorted({task for cells in results.values() for task in cells})
    figure, axes = panels(tasks, "evaluation return")
    for axis, task in zip(axes, tasks, strict=True):
        for i, algo in enumerate(ALGOS):
            if task in results.get(algo, {}):
                evaluation_curve(axis, results[algo][task], 1e-6, color=f"C{i}", label=algo)
        style(axis)
    add_legend(figure, axes)
    return png(figure)


def panels(
    tasks: list[str], label: str, steps_label: str = "million steps per seed"
) -> tuple[plt.Figure, list[plt.Axes]]:
    """A panel for each task, five in a row at most."""
    rows = -(-len(tasks) // 5)
    columns = -(-len(tasks) // rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.3 * columns, 2.1 * rows + 0.3), layout="constrained", squeeze=False
    )
    for axis, task in itertools.zip_longest(axes.flat, tasks):
        if task is None:
            axis.set_visible(False)
        else:
            axis.set_title(task, fontsize=9)
    for axis in axes.flat[: len(tasks)][-columns:]:  # the lowest of each column
        axis.set_xlabel(steps_label, fontsize=8)
    for row in axes:
        row[0].set_ylabel(label, fontsize=8)
    return figure, list(axes.flat)[: len(tasks)]


def add_legend(figure: plt.Figure, axes: list[plt.Axes]) -> None:
    """One for all panels: in the place of one that is not needed, or above them."""
    handles = {h.get_label(): h for axis in axes for h in axis.get_legend_handles_labels()[0]}
    if spare := figure.axes[len(axes) :]:
        spare[0].set_visible(True)
        spare[0].axis("off")
        legend = spare[0].legend(handles.values(), handles.keys(), loc="right", fontsize=8, frameon=False)
        legend.set_in_layout(False)  # wider than a panel, it would push the columns apart
    else:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=6, fontsize=9, frameon=False)


def clock(results: dict[str, dict[str, dict]], folder: Path) -> bytes | None:
    """The same against minutes, for the task and machine of speed.py: steps over the rate that it has measured for one
    seed, alone on the machine. (The runs' own clocks count whatever else ran there.)"""
    measured = {algo: json.loads(path.read_text()) for algo in ALGOS if (path := folder / f"{algo}.json").exists()}
    measured = {algo: own for algo, own in measured.items() if own["env_id"] in results.get(algo, {})}
    if not measured:
        return None
    figure, axis = plt.subplots(figsize=(5.6, 2.8), layout="constrained")
    for algo, own in measured.items():
        rate = own["steps_per_second"][f"{algo}, 1 seed"]["median"]
        curve = results[algo][own["env_id"]]
        evaluation_curve(axis, curve, 1 / rate / 60, color=f"C{ALGOS.index(algo)}", label=algo)
        axis.set_title(own["env_id"], fontsize=9)
    style(axis)
    axis.set_xlabel("minutes, one seed alone on the machine", fontsize=8)
    axis.set_ylabel("evaluation return", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return png(figure)


def over_seeds(seeds: dict[int, dict[str, np.ndarray]], column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows in which all seeds have a value, and there their mean and the half width of its interval."""
    values = np.array([columns[column] for columns in seeds.values()])
    known = ~np.isnan(values).any(axis=0)
    values = values[:, known]
    return known, values.mean(axis=0), np.array([stats.student_interval(row) for row in values.T])


def evaluation_curve(axis: plt.Axes, seeds: dict[int, dict[str, np.ndarray]], scale: float, **line: str) -> None:
    """Deterministic evaluations; the steps times `scale` go to the right."""
    steps, returns = evaluations(seeds)
    mean, half = returns.mean(0), np.array([stats.student_interval(own) for own in returns.T])
    axis.plot(steps * scale, mean, lw=1.5, marker="o", ms=2.5, **line)
    axis.fill_between(steps * scale, mean - half, mean + half, color=line["color"], alpha=0.15, lw=0)


def evaluations(seeds: dict[int, dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps of the evaluations, [E], and their returns, [seeds, E]. Batches of whole episodes have lengths of their
    own: there the k-th evaluation is at other steps for each seed, and the steps are the mean."""
    marks = [~np.isnan(own["eval_return"]) for own in seeds.values()]
    steps, returns = (
        np.array([own[name][mark] for own, mark in zip(seeds.values(), marks, strict=True)])
        for name in ("global_step", "eval_return")
    )
    return steps.mean(0), returns


def style(axis: plt.Axes) -> None:
    axis.tick_params(labelsize=8)
    axis.set_ylim(bottom=min(0, min(np.nanmin(line.get_ydata()) for line in axis.lines)))
    axis.spines[["top", "right"]].set_visible(False)


Shorter = list[tuple[str, str, dict[int, dict[str, np.ndarray]]]]  # algorithm, task, and its result


def shorter_results(*folders: Path) -> Shorter:
    """What is trained for less than the million steps of the table, or on fewer seeds."""
    found = [path.parent for folder in folders for path in sorted(folder.glob("*/*/run.json"))]
    found.sort(key=lambda cell: (*ALGOS, cell.parent.name).index(cell.parent.name))
    return [(cell.parent.name, cell.name, read_result(cell)) for cell in found]


def shorter_runs(results: Shorter) -> str:
    """The final returns of shorter_results, what a published curve has at that step (with the p-value of Welch's t test
    against it), and the first evaluation at which every seed is at what Gymnasium calls solved, if the task has such a
    threshold. Two seeds have neither interval nor test: they would say nothing."""
    columns = ["algorithm", "task", "steps", "final return, mean of seeds", "each seed", "published curve there"]
    lines = [f"| {' | '.join([*columns, 'every seed solves it after'])} |", "|---|---|---:|---:|---|---:|---|"]
    bar = published_curves()
    for algo, task, seeds in results:
        final, (steps, returns) = final_returns(seeds), evaluations(seeds)
        each = " ".join(number(value).replace(",", "") for value in final)
        cell = (PUBLISHED_NAME.get(algo, algo), task.rpartition("-")[0], int(steps[-1]))
        there = ""
        if cell in bar:
            p = probability(stats.against(final, bar[cell].mean, bar[cell].std, bar[cell].seeds)[1])
            there = number(bar[cell].mean) + (f" (p {p})" if p and len(final) > 2 else "")
        mean = with_spread(final) if len(final) > 2 else number(final.mean())
        row = [algo, task, f"{steps[-1]:,.0f}", mean, each, there, ""]
        threshold = getattr(gymnasium.registry.get(task), "reward_threshold", None)
        if threshold is not None and (solved := steps[returns.min(0) >= threshold]).size:
            row[-1] = f"{solved[0]:,.0f} steps ({threshold:.0f})"
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def off_policy(results: Shorter) -> str:
    """The front page's table of DDPG and SAC in shorter_results: tasks down, runs across. In brackets what a published
    curve has at that step, if it has a point there."""
    bar, shown, counts = published_curves(), {}, {}
    for algo, task, seeds in results:
        if algo in ("ddpg", "sac"):
            steps = int(evaluations(seeds)[0][-1])
            point = bar.get((algo, task.rpartition("-")[0], steps))
            text = number(final_returns(seeds).mean()) + (f" ({number(point.mean)})" if point else "")
            shown[(algo, steps), task] = text
            counts.setdefault((algo, steps), set()).add(len(seeds))
    numbers = [" or ".join(map(str, sorted(own))) + " seed" + "s" * (max(own) > 1) for own in counts.values()]
    heads = [f"{algo}, {steps:,} steps, {own}" for (algo, steps), own in zip(counts, numbers, strict=True)]
    tasks = sorted({task for _, task in shown})
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    lines += [f"| {' | '.join([task, *(shown.get((column, task), '') for column in counts)])} |" for task in tasks]
    note = "Return with the deterministic action, mean of the seeds; in brackets a published curve at that step."
    return "\n".join([*lines, "", note])


def shorter_figure(results: Shorter) -> bytes | None:
    """Deterministic evaluations, each seed's and their mean, beside the published curve with Student's interval, in a
    panel for each of shorter_results that has one; None if none has."""
    bar, shown = published_curves(), []
    for algo, task, seeds in results:
        last = evaluations(seeds)[0][-1]
        name = (PUBLISHED_NAME.get(algo, algo), task.rpartition("-")[0])
        own = sorted((key[2], at.mean, at.std, at.seeds) for key, at in bar.items() if key[:2] == name)
        if points := [point for point in own if point[0] <= last]:
            shown.append((f"{algo}, {task}", seeds, np.array(points).T))
    if not shown:
        return None
    figure, axes = panels([title for title, _, _ in shown], "evaluation return", "thousand steps per seed")
    for axis, (_, seeds, (steps, mean, deviation, count)) in zip(axes, shown, strict=True):
        half = np.array([stats.half_width(*own) for own in zip(deviation, count, strict=True)])
        axis.plot(steps / 1e3, mean, color="0.4", ls="--", lw=1, label="published, mean and interval")
        axis.fill_between(steps / 1e3, mean - half, mean + half, color="0.4", alpha=0.15, lw=0)
        steps, returns = evaluations(seeds)
        axis.plot(steps / 1e3, returns.T, color="C0", lw=0.5, alpha=0.6)
        label = "ours, mean and each seed"
        axis.plot(steps / 1e3, returns.mean(0), color="C0", marker="o", ms=2.5, label=label)
        style(axis)
    add_legend(figure, axes)
    return png(figure)


def curves(algo: str, tasks: dict[str, dict]) -> bytes:
    """Training return against environment steps, mean and Student interval, with the deterministic evaluations."""
    figure, axes = panels(list(tasks), "return")
    bar = published()
    for axis, (task, seeds) in zip(axes, tasks.items(), strict=True):
        steps = next(iter(seeds.values()))["global_step"] / 1e6
        full, mean, half = over_seeds(seeds, "episodic_return")
        axis.plot(steps[full], mean, color="C0", lw=1.5, label="training, sampled actions")
        axis.fill_between(steps[full], mean - half, mean + half, color="C0", alpha=0.2, lw=0)
        marks, mean, half = over_seeds(seeds, "eval_return")
        label = "evaluation, deterministic"
        axis.errorbar(steps[marks], mean, half, fmt="o", ms=3, lw=1, color="C1", label=label)
        if (target := bar.get((PUBLISHED_NAME.get(algo, algo), task.rpartition("-")[0]))) is not None:
            axis.axhline(target.mean, color="0.4", ls="--", lw=1, label="best published mean at 1M")
        style(axis)
    add_legend(figure, axes)
    return png(figure)


def behaviours(folder: Path) -> str:
    """What walkers do that were trained with other rewards: means over the episodes of each seed, by `--evaluate`."""

    def means(episodes: list[dict[str, str]], name: str, digits: int) -> str:
        by_seed: dict[str, list[float]] = {}
        for row in episodes:
            by_seed.setdefault(row["seed"], []).append(float(row[name]))
        return ", ".join(f"{np.mean(each).round(digits) + 0.0:,.{digits}f}" for each in by_seed.values())  # no -0

    header, line = "| |", "|---|"
    rows = ["| `--env-kwargs` |", "| x velocity (m/s) |", "| mean squared action (torque) |"]
    rows += ["| steps before it falls, of 1,000 |"]
    for path in sorted(folder.glob("*.csv")):
        config, episodes = json.loads(path.with_suffix(".json").read_text()), read_rows(path)
        settings = " ".join(f"{name} {value}" for name, value in config["args"]["env_kwargs"].items())
        name = path.stem.partition("_")[2].replace("_", " ")
        header, line = f"{header} {name} |", line + "---|"
        rows[0] += f" `{settings}` |" if settings else " none |"
        rows[1] += f" {means(episodes, 'x_velocity', 2)} |"
        rows[2] += f" {means(episodes, 'squared_action', 3)} |"
        rows[3] += f" {means(episodes, 'length', 0)} |"
    return "\n".join([header, line, *rows])


def variance_figure(result: dict, results: Path) -> bytes:
    """The variance of REINFORCE's gradient with each estimator, as measured by variance.py, and what each learns."""
    names = list(result["estimators"])
    variances = [result["estimators"][name]["variance"] for name in names]
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 2.6), layout="constrained", width_ratios=(4, 3, 3))
    dots, *curves = axes
    for i, (name, value) in enumerate(zip(names, variances, strict=True)):
        color = f"C{(3, 1, 2, 0)[i]}"
        dots.scatter(value, i, color=color)  # bars have no foot on a log axis
        dots.annotate(number(value), (value, i), (7, 0), textcoords="offset points", va="center", fontsize=8)
        for lines, folder in zip(curves, ESTIMATORS[name], strict=True):
            if folder:
                seeds = read_result(results / folder / "reinforce" / result["env_id"])
                evaluation_curve(lines, seeds, 1e-3, color=color)
    dots.set_yticks(range(len(names)), names, fontsize=9)
    dots.set_ylim(len(names) - 0.5, -0.5)
    dots.set_xscale("log")
    dots.set_xlabel("variance of the policy gradient (sum over parameters)", fontsize=9)
    dots.set_xlim(min(variances) / 2, max(variances) * 4)
    dots.grid(axis="x", color="0.9")
    dots.set_axisbelow(True)
    for lines, title in zip(curves, ("training, with gamma^t", "training, without gamma^t"), strict=True):
        lines.set_title(title, fontsize=9)
        lines.set_xlabel("thousand steps per seed", fontsize=9)
        lines.set_ylim(0, 520)  # of at most 500, beyond which an interval says nothing
    curves[0].set_ylabel(f"return, {result['env_id']}", fontsize=9)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure)


def variance_text(result: dict, results: Path) -> str:
    """What the figure shows."""
    estimators = result["estimators"]
    variances = ", ".join(f'"{name}" {number(numbers["variance"])}' for name, numbers in estimators.items())
    seeds = read_result(results / ESTIMATORS[next(iter(estimators))][0] / "reinforce" / result["env_id"])
    return (
        "![variance of the gradient and learning curve, by estimator](benchmarks/figures/variance.png)\n\n"
        f"Left: the gradient of one half-trained policy on {result['env_id']}, {result['batches']} batches of"
        f" {result['episodes_per_batch']} episodes, V(s) fitted to other episodes beforehand, all with the factor"
        f" gamma^t: {variances}. Middle and right: training with each, {len(seeds)} seeds, deterministic evaluations"
        " with 95 % intervals; R(tau) has the factor gamma^t by its form."
    )


def variance_details(result: dict) -> str:
    """How far the means of the estimators lie from that of the last one, and how far they would by chance."""
    *others, (last, numbers) = result["estimators"].items()
    parts = [
        f'"{name}" {own["distance_of_means"]:.2g} ({own["standard_error_of_distance"]:.2g})' for name, own in others
    ]
    return (
        f'As all four keep the factor gamma^t, the means of their gradients should agree: that of "{last}" has norm'
        f" {numbers['mean_norm']:.2g}, and the distance of the others from it is (in brackets what chance alone would"
        f" make it) {', '.join(parts)}. Where the variance is large that says little; `tests/test_reinforce.py` shows"
        " it exactly on a small task."
    )


def speed_results(folder: Path) -> list[dict]:
    paths = [folder / f"{algo}.json" for algo in ALGOS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def speed(folder: Path) -> str:
    """The front page's table: an algorithm per line, with one seed and with the most."""
    results = speed_results(folder)
    most = max(int(seeds.split()[0]) for result in results for seeds in result["of_envpool"])
    lines = [
        f"| | steps per second, 1 seed | {most} seeds | times Stable-Baselines3's rate, one seed each |",
        "|---|---:|---:|---|",
    ]
    others: dict[str, list[float]] = {}
    for result in results:
        row, algo, sb3 = [result["algo"]], result["algo"], []
        for seeds in ("1 seed", f"{most} seeds"):
            share, rate = result["of_envpool"].get(seeds), result["steps_per_second"].get(f"{algo}, {seeds}")
            row.append("" if rate is None else f"{rate['median']:,.0f} ({share:.0%})")
        for peer, times in result["times_peer"].items():
            name, _, what = peer.partition(", ")
            if name in ("Stable-Baselines3", "sb3-contrib"):
                sb3.append(f"{times['1 seed']:.1f} ({what}{', sb3-contrib' * (name == 'sb3-contrib')})")
            else:
                others.setdefault(name, []).append(times["1 seed"])
        lines.append(f"| {' | '.join([*row, ', '.join(sb3)])} |")
    note = f"{places(results)} In brackets the share of EnvPool's own rate with random actions."
    if others:
        ratios = [ratio for own in others.values() for ratio in own]
        note += f" {listed(others)}, which step one environment and were not compiled: {min(ratios):.1f} to"
        note += f" {max(ratios):.1f} times their rate."
    return "\n".join([*lines, "", note])


def places(results: list[dict]) -> str:
    hardware = {
        (result["env_id"], place["cores"], place["processor"] or "processor not known", place["gpu"] or "no GPU")
        for result in results
        for place in [result["hardware"]]
    }
    where = "; ".join(f"{env_id}, {cores} cores ({cpu}), {gpu}" for env_id, cores, cpu, gpu in sorted(hardware))
    return f"{where}. Environment steps of all seeds; off-policy: one update per step."


def speed_details(folder: Path) -> str:
    """The tables of results/speed/*.json: medians, what they are of EnvPool's and a peer's, and where the time goes."""
    results = speed_results(folder)
    lines = [
        "|  | seeds | steps per second | of EnvPool alone | simulator, policy, update |",
        "|---|---:|---:|---:|---|",
    ]
    peers = ["|  | peer | its steps per second | ours / peer |", "|---|---|---:|---|"]
    for result in results:
        algo, rates = result["algo"], result["steps_per_second"]
        for seeds, share in result["of_envpool"].items():
            parts = {"simulator": 0.0, "policy": 0.0, "update": 0.0, "training": 0.0}
            measured = result["parts"].get(seeds)  # nothing where that has failed
            for name, part in (measured or {}).items():
                kind = "policy" if name.startswith("act") else name
                parts[kind if kind in parts else "update"] += part["share"]
            parts.pop("training")  # the whole
            cells = [algo, seeds.split()[0], shown(rates[f"{algo}, {seeds}"]), f"{share:.0%}"]
            shares = ", ".join(f"{part:.0%}" for part in parts.values()) if measured else ""
            lines.append(f"| {' | '.join([*cells, shares])} |")
        if rate := rates.get(f"{algo}, a process per core"):
            cells = [algo, f"1 in each of {result['hardware']['cores']} processes", shown(rate), "", ""]
            lines.append(f"| {' | '.join(cells)} |")
        for peer, times in result["times_peer"].items():
            ratios = ", ".join(f"{ratio:.1f} with {seeds.removesuffix(' seeds')}" for seeds, ratio in times.items())
            peers.append("| " + " | ".join([algo, peer, shown(rates[peer]), ratios]) + " |")
    lines += ["", *peers] if len(peers) > 2 else []
    versions = {f"{name} {text[:12]}": None for own in results for name, text in own.get("versions", {}).items()}
    lines += ["", places(results), *([f"Versions: {', '.join(versions)}."] if versions else [])]
    for result in results:
        if "of_matrix_product" in result:
            shares = ", ".join(f"{share:.0%} with {seeds}" for seeds, share in result["of_matrix_product"].items())
            rate = result["matrix_product_flops"] / 1e9
            lines.append(f"The matrix products of {result['algo']}'s updates run at {shares} of the rate of a")
            lines.append(f"256 x 256 x 256 product timed in the same run ({rate:.0f} GFLOP/s).")
        if goal := result.get("seconds_to_return"):
            seconds = ", ".join(
                f"{name} {'not within 1M steps' if np.isnan(value) else f'{value:.0f} s'}"
                for name, value in goal.items()
                if name != "return"
            )
            lines.append(f"Seconds to a mean training return of {goal['return']:,.0f}, one run each: {seconds}.")
    lines += elsewhere(folder)
    return "\n".join(lines)


def elsewhere(folder: Path) -> list[str]:
    """A table of what other machines have measured, those of the folders in results/speed: an algorithm per line."""
    lines = [
        "",
        "| machine | | seeds | steps per second | times the rate of a peer, by seeds | products of updates |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text())
        algo, rates = result["algo"], result["steps_per_second"]
        seeds = [name.split()[0] for name in result["of_envpool"]]
        own = ", ".join(f"{rates[f'{algo}, {name}']['median']:,.0f}" for name in result["of_envpool"])
        if rate := rates.get(f"{algo}, a process per core"):
            own += f"; {shown(rate)} by a process per core"
        peers = "; ".join(
            f"{peer}: {', '.join(f'{ratio:.1f}' for ratio in times.values())}"
            for peer, times in result["times_peer"].items()
        )
        products = ", ".join(f"{share:.0%}" for share in result.get("of_matrix_product", {}).values())
        if products:
            products += f" of {result['matrix_product_flops'] / 1e9:.0f} GFLOP/s"
        machine = f"{result['hardware']['cores']} cores ({result['hardware']['processor'] or 'processor not known'})"
        cells = [machine, algo, ", ".join(seeds), own, peers, products]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 3 else []


def shown(rate: dict) -> str:
    """A median, and its range if there are several measurements."""
    each = rate["each"]
    return f"{rate['median']:,.0f}" + f" ({min(each):,.0f} to {max(each):,.0f})" * (len(each) > 1)


def headline(folder: Path) -> str | None:
    """PPO's speed and a peer's, on all machines with as many cores that speed.py was run on."""
    paths = [folder / "ppo_continuous.json", *sorted(folder.glob("*/ppo_continuous.json"))]
    measured = [json.loads(path.read_text()) for path in paths if path.exists()]
    peers = ("Stable-Baselines3, our minibatch size", "Stable-Baselines3, its defaults")
    measured = [own for own in measured if set(peers) <= own["times_peer"].keys()]
    if not measured:
        return None
    cores, env_id = measured[0]["hardware"]["cores"], measured[0]["env_id"]
    measured = [own for own in measured if (own["hardware"]["cores"], own["env_id"]) == (cores, env_id)]
    rates = between([own["steps_per_second"]["ppo_continuous, 1 seed"]["median"] for own in measured], ",.0f")
    same, default = (between([own["times_peer"][peer]["1 seed"] for own in measured], ".1f") for peer in peers)
    machines = f"On each of {len(measured)} machines with" if len(measured) > 1 else "On"
    return (
        f"{machines} {cores} CPU cores PPO makes {rates} steps of {env_id} per second with one seed: {same} times as"
        f" many as Stable-Baselines3 with minibatches of the same size, {default} times as many as with its defaults."
        " Part of this is the simulator: ours is EnvPool's, in C++ on all cores, theirs Gymnasium's, in one Python"
        " process."
    )


def between(values: list[float], digits: str) -> str:
    low, high = (f"{value:{digits}}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def fill(page: str, sections: dict[str, str]) -> str:
    """A page with the content of these sections between their marks; a section that it does not have is another's."""
    for name, content in sections.items():
        begin, end = f"<!-- {name}: benchmarks/report.py writes what is between -->", f"<!-- end of {name} -->"
        if begin in page:
            before, _, rest = page.partition(begin)
            if end not in rest:
                raise ValueError(f"the section {name} has no mark of its end")
            page = f"{before}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"
    return page


def stale(results: Path) -> list[str]:
    """A line for each result, of shorter runs and estimators too, whose script no longer gives the numbers that were
    recorded with it, or that has none."""
    from parts import load  # it imports torch, which takes seconds

    lines: list[str] = []
    now: dict[tuple, dict[str, float]] = {}
    for algo in ALGOS:
        script = HERE.parent / "algos" / f"{algo}.py"
        defaults = asdict(load(algo).Args())
        for path in sorted(results.glob(f"**/{algo}/*/run.json")):
            meta = json.loads(path.read_text())
            if "fingerprint" not in meta:
                lines.append(f"{algo} on {path.parent.name} has no fingerprint: run.py --add-fingerprint")
                continue
            key = algo, *circumstances(meta)
            try:
                now[key] = now.get(key) or fingerprint(script, *circumstances(meta))
            except RuntimeError as error:  # of a flag that there is no more, say
                lines.append(f"stale: {algo} on {path.parent.name}: {error}")
                continue
            if changed := differences(meta["fingerprint"], now[key]) + other_defaults(defaults, meta):
                lines.append(f"stale: {algo} on {path.parent.name}: {changed[0]}, and {len(changed) - 1} more")
    return lines


def other_defaults(now: dict[str, Any], meta: dict[str, Any]) -> list[str]:
    """Arguments that the command of a result did not name, and whose default is another one by now, a line each."""
    then = meta["args"]
    known = {*named(command(meta)), *OF_THE_MACHINE}
    names = differing(now, then, {*known, "run_dir", "resume", "evaluate", "seed", "num_seeds"})
    return [f"{name} was {then.get(name, 'absent')}, is {now.get(name, 'absent')}" for name in names]


def one_set_of_defaults(algo: str, tasks: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError unless all tasks of an algorithm were trained with the same arguments and seeds."""
    first_task, first = next(iter(tasks.items()))
    for task, args in tasks.items():
        if names := differing(first, args, OF_A_CELL):
            raise ValueError(f"{algo} on {task} was trained with another {', '.join(names)} than on {first_task}")


def contents(args: Args, results: dict[str, dict[str, dict]]) -> tuple[dict[Path, bytes], list[str]]:
    """What both pages and each figure should be, and the sections of which there is no data: these stay as they are."""
    files = {args.figures / f"{algo}.png": curves(algo, tasks) for algo, tasks in results.items()}
    sections = {"results": "No results yet.", "cells": "No results yet."}
    if results:
        files[args.figures / "overview.png"] = overview(results)
        sections["results"] = "![learning curves](benchmarks/figures/overview.png)\n\n" + matrix(results)
        sections["cells"] = table(results)
    scores, tasks = normalised_scores(results)
    if scores:
        files[args.figures / "aggregate.png"] = aggregate_figure(scores)
        sections["aggregates"] = aggregate_text(scores, tasks)
    if results:
        sections["curves"] = "\n\n".join(f"![learning curves of {algo}](figures/{algo}.png)" for algo in results)
    if sentence := headline(args.results / "speed"):
        sections["headline"] = sentence
    if shorter := shorter_results(args.results / "shorter", args.results / "few_seeds"):
        sections |= {"shorter runs": shorter_runs(shorter), "off-policy": off_policy(shorter)}
        if picture := shorter_figure(shorter):
            files[args.figures / "shorter.png"] = picture
            sections["shorter runs"] += "\n\n![curves beside published ones](figures/shorter.png)"
    if (folder := args.results / "behaviours").exists():
        sections["behaviours"] = behaviours(folder)
    if speed_results(folder := args.results / "speed"):
        sections |= {"speed": speed(folder), "speed in detail": speed_details(folder)}
        if picture := clock(results, folder):
            files[args.figures / "clock.png"] = picture
            sections["speed in detail"] += "\n\n![learning curves against the clock](figures/clock.png)"
    if (path := args.results / "variance.json").exists():
        variance = json.loads(path.read_text())
        files[args.figures / "variance.png"] = variance_figure(variance, args.results)
        sections["variance"] = variance_text(variance, args.results)
        sections["variance in detail"] = variance_details(variance)
    pages = {page: page.read_text() for page in (args.readme, args.details)}
    if lost := [name for name in sections if not any(f"<!-- {name}: " in text for text in pages.values())]:
        raise ValueError(f"neither page has a section for {', '.join(lost)}")
    marked = [name for text in pages.values() for name in re.findall(r"<!-- ([^:>]+): benchmarks/report.py", text)]
    files |= {page: fill(text, sections).encode() for page, text in pages.items()}
    return files, [name for name in marked if name not in sections]


def main(args: Args) -> int:
    complaints: list[str] = []
    try:
        if args.compare:
            print(compare(*args.compare))
            return 0
        if not args.results.is_dir():
            raise ValueError(f"{args.results} is no folder")
        results: dict[str, dict[str, dict]] = {}
        for algo in ALGOS:
            arguments: dict[str, dict[str, Any]] = {}
            for cell in sorted(path for path in (args.results / algo).glob("*") if path.is_dir()):
                if not (cell / "run.json").exists():
                    complaints.append(f"left out, because nothing is gathered yet: {cell}")
                    continue
                results.setdefault(algo, {})[cell.name] = read_result(cell)
                arguments[cell.name] = json.loads((cell / "run.json").read_text())["args"]
                steps = arguments[cell.name]["total_timesteps"]
                if steps != STEPS:
                    raise ValueError(f"{cell} is of {steps:,} steps, the table of {STEPS:,}: shorter/ is for others")
            if arguments:
                one_set_of_defaults(algo, arguments)
        for cell in sorted(path.parent for path in args.results.glob("**/run.json")):
            read_result(cell)  # those too of which no page has a table
            with naming(cell):
                if refilled(json.loads((cell / "run.json").read_text())):
                    complaints.append(f"resumed without its replay, so it learned less than its steps say: {cell}")
        files, without_data = contents(args, results)
        complaints += [f"no data for the section {name}" for name in without_data]
    except ValueError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    for path, content in files.items():
        if path.exists() and path.read_bytes() == content:
            continue
        if args.check:
            complaints.append(f"not what the data gives: {path}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(f"written: {path}")
    if args.check and args.fingerprints:
        complaints += stale(args.results)
    if args.check and not complaints:
        print("the report is what the data gives" + ("; no result is stale" if args.fingerprints else ""))
    for complaint in complaints:
        print(complaint)
    return 1 if args.check and complaints else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
