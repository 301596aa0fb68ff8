"""`report.py --compare A B`: is the change better? For two folders of runs, A before it and B after."""

from pathlib import Path
from typing import Any

import numpy as np
import stats
from reading import OF_THE_MACHINE, Run, differing, in_whole_episodes, read_runs

FEW = 5  # seeds; with fewer the spread itself is hardly known
NOT_OF_THE_CHANGE = {"seed", "num_seeds", "run_dir", "resume", "evaluate", "env_id", "env_kwargs", "total_timesteps"}
NOT_OF_THE_CHANGE |= OF_THE_MACHINE


def group(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by task."""
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        tasks.setdefault(run.task, []).append(run)
    return tasks


def unfinished(runs: list[Run]) -> bool:
    """Whether seeds are missing, of which it is not known how they would have ended."""
    missing = {run.seed for run in runs if np.isnan(run.final) and not run.diverged}
    return bool(missing - {run.seed for run in runs if not np.isnan(run.final)})


def finished(runs: list[Run], side: str, warnings: list[str]) -> list[Run]:
    """Those with a final evaluation, one of each seed (the latest), and what is to be said of the others. Raises
    ValueError where two runs of a seed were trained with different arguments: it cannot be known which is meant."""
    done = [run for run in runs if not np.isnan(run.final)]
    if missing := [run for run in runs if np.isnan(run.final) and not run.diverged]:
        names = ", ".join(run.folder.name for run in missing)
        warnings.append(f"{side}: left out, because unfinished or without a final evaluation: {names}")
    if lost := [run for run in runs if run.diverged]:
        names = ", ".join(str(run.seed) for run in lost)
        warnings.append(f"{side}: diverged on {lost[0].task}, so that no mean can count them: seeds {names}")
    latest: dict[int, Run] = {}
    for run in sorted(done, key=lambda run: run.started):
        earlier = latest.setdefault(run.seed, run)
        names = mixed([earlier, run]) + ["trained_timesteps"] * (earlier.trained_timesteps != run.trained_timesteps)
        if names:
            raise ValueError(f"{side} has seed {run.seed} of {run.task} twice, with different {', '.join(names)}")
        latest[run.seed] = run
    if len(latest) < len(done):
        warnings.append(f"{side}: several runs of the same seed; the one that was started last counts")
    return [latest[seed] for seed in sorted(latest)]


def changed(a: list[Run], b: list[Run]) -> list[str]:
    """Arguments that differ, or that one side only has: what the change is, or what was changed by accident."""
    sides = a[0].args, b[0].args
    return [f"{name} {' -> '.join(str(args.get(name, 'absent')) for args in sides)}" for name in mixed([a[0], b[0]])]


def scripts(runs: list[Run]) -> frozenset[str]:
    """Hashes of all texts of the script that trained these runs."""
    return frozenset().union(*(run.scripts for run in runs))


def same_script(a: list[Run], b: list[Run]) -> str:
    """Whether both sides were trained by the same text of the script, which their arguments do not tell."""
    sides = [scripts(a), scripts(b)]
    if not all(sides):
        return "not known whether the same text"
    return "the same text" if sides[0] == sides[1] else "not the same text"


def mixed(runs: list[Run]) -> list[str]:
    """Names of the arguments in which runs differ."""
    return sorted({name for run in runs for name in differing(runs[0].args, run.args, NOT_OF_THE_CHANGE)})


def task_warnings(a: list[Run], b: list[Run]) -> list[str]:
    """What makes a comparison of these finished runs weaker than it looks."""
    warnings = []
    for side, runs in (("A", a), ("B", b)):
        if len(runs) < FEW:
            plural = "s" * (len(runs) > 1)
            warnings.append(f"{side} has {len(runs)} seed{plural}: fewer than {FEW} hardly know their own spread")
        if any(run.refilled for run in runs):
            warnings.append(f"{side} has runs resumed without their replay, which learned less than their steps say")
        if any(run.extended for run in runs):
            warnings.append(f"{side} has runs made longer by --resume, not planned as long from the start")
        if names := mixed(runs):
            warnings.append(f"{side} mixes runs of different {', '.join(names)}")
        if len(scripts(runs)) > 1:
            warnings.append(f"{side} was trained by different versions of the script")
        if len({run.trained_timesteps for run in runs}) > 1:
            warnings.append(f"{side} mixes runs of different numbers of steps")
    versions = [own for run in (*a, *b) for own in run.versions]
    for name in sorted({name for own in versions for name in own}):
        if len(found := {own.get(name, "an unknown one") for own in versions}) > 1:
            warnings.append(f"trained with different versions of {name}: {', '.join(sorted(found))}")
    if {run.seed for run in a} != {run.seed for run in b}:
        warnings.append("A and B have different seeds; the test takes them as independent, so this is allowed")
    sizes = {run.seeds_together for run in (*a, *b)}
    if in_whole_episodes(a[0].args) and len(sizes) > 1:
        numbers = " or ".join(map(str, sorted(sizes)))
        warnings.append(f"{numbers} seeds in a process: on whole episodes, more of them make fewer updates each")
    steps = a[0].trained_timesteps, b[0].trained_timesteps
    if abs(steps[0] - steps[1]) > 0.01 * max(steps):  # whole rollouts are not the same number of steps everywhere
        warnings.append(f"A has trained {steps[0]:,} steps and B {steps[1]:,}: the difference may be theirs")
    return warnings


def verdict(difference: float, low: float, high: float, p: float, seeds: int) -> str:
    """In plain words; p is after Holm's correction if there are several tasks; seeds: of the side that has fewer."""
    if np.isnan(p) and seeds > 1:
        rest = "both return the same" if difference == 0 else "they differ"
        return f"No test can be made: neither side has any spread, and {rest}."
    if np.isnan(p):
        return "Nothing can be said: it takes two seeds a side to tell a change from chance."
    if p < 1 - stats.LEVEL:
        word = "better" if difference > 0 else "worse"
        return (
            f"B is {word} than A. Were they equal, chance would make such a difference in at most {p:.2g} of such"
            " comparisons."
        )
    if low > 0 or high < 0:  # which several tasks together leave open
        return f"No difference is shown: with so many tasks, one such by chance is not rare (p = {p:.2g} corrected)."
    return (
        f"No difference is shown: B may be worse by up to {-low:,.1f}, better by up to {high:,.1f}, or equal;"
        " these seeds cannot tell. More seeds would narrow it."
    )


def side_line(name: str, runs: list[Run]) -> str:
    returns = np.array([run.final for run in runs])
    each = ", ".join(f"{run.seed}: {run.final:,.1f}" for run in runs)
    spread = f" ± {stats.student_interval(returns):,.1f}" if len(returns) > 1 else ""
    return f"  {name}  mean {returns.mean():,.1f}{spread}   by seed {each}"


def compare(folder_a: Path, folder_b: Path) -> str:
    """The whole answer as text. Raises ValueError for folders that cannot be compared."""
    tasks_a, tasks_b = group(read_runs(folder_a)), group(read_runs(folder_b))
    common = [task for task in tasks_a if task in tasks_b]
    if not common:
        raise ValueError(f"no task in common: A has {', '.join(tasks_a)}; B has {', '.join(tasks_b)}")
    warnings = [f"only one of them has {task}: left out" for task in tasks_a.keys() ^ tasks_b.keys()]
    pairs: dict[str, tuple[list[Run], list[Run]]] = {}
    weaknesses: dict[str, list[str]] = {}  # and the tasks that have them
    for task in common:
        a, b = finished(tasks_a[task], "A", warnings), finished(tasks_b[task], "B", warnings)
        if a and b:
            pairs[task] = a, b
            for warning in task_warnings(a, b):
                weaknesses.setdefault(warning, []).append(task)
    if not pairs:
        raise ValueError("no task on which both have a finished run:\n" + "\n".join(warnings))
    for warning, tasks in weaknesses.items():
        warnings.append(f"{', '.join(tasks) if len(tasks) < max(len(pairs), 2) else 'all tasks'}: {warning}")
    lines = [f"A is {folder_a}, B is {folder_b}. Final evaluation returns, intervals at 95 %."]
    changes = {task: ", ".join(changed(*pair)) or "none" for task, pair in pairs.items()}
    if len(set(changes.values())) == 1:
        lines += [f"Arguments that differ: {next(iter(changes.values()))}"]
    else:
        lines += [f"Arguments that differ on {task}: {change}" for task, change in changes.items()]
    texts = dict.fromkeys(same_script(*pair) for pair in pairs.values())
    lines += [f"Scripts of A and B: {', '.join(texts)}"]
    lost = [task for task in common if any(run.diverged for run in (*tasks_a[task], *tasks_b[task]))]
    partial = [task for task in common if unfinished(tasks_a[task]) or unfinished(tasks_b[task])]
    scores = {task: tuple(np.array([run.final for run in side]) for side in pair) for task, pair in pairs.items()}
    tests = {task: stats.welch(*pair) for task, pair in scores.items()}
    corrected = dict(zip(tests, stats.holm([test[-1] for test in tests.values()]), strict=True))
    for task, (a, b) in pairs.items():
        difference, low, high, p = tests[task]
        lines += ["", f"{task}, {b[0].trained_timesteps:,} steps", side_line("A", a), side_line("B", b)]
        lines += [f"  B - A  {difference:+,.1f}"]
        if not np.isnan(p):
            lines[-1] += f", interval {low:+,.1f} to {high:+,.1f}, p = {p:.3g} (Welch)"
        (chance,) = stats.improvement(*(side[:, None] for side in reversed(scores[task])))
        lines += [f"  a seed of B beats one of A with probability {chance:.2f}"]
        if task in lost:
            lines += ["  Nothing can be said: seeds diverged (see below), and the numbers are of the others alone."]
        elif task in partial:  # a process whose seeds have all diverged ends early, like one that was stopped
            lines += ["  Nothing can be said: seeds are unfinished (see below), and the others may be the lucky ones."]
        else:
            lines += ["  " + verdict(difference, low, high, corrected[task], min(len(a), len(b)))]
    for task in dict.fromkeys([*lost, *partial]):
        if task not in pairs:
            why = "diverged" if task in lost else "are unfinished"
            lines += ["", task, f"  Nothing can be said: all seeds of a side {why} (see below)."]
    if len(pairs) > 1 and not lost and not partial:
        sides: list[Any] = []
        for side in (1, 0):  # B, A
            count = min(len(pair[side]) for pair in scores.values())
            sides.append(np.stack([pair[side][:count] for pair in scores.values()], 1))
        (chance,), ((low,), (high,)) = stats.bootstrap(sides, stats.improvement)
        lines += ["", f"Over {len(pairs)} tasks, {len(sides[1])} seeds of A and {len(sides[0])} of B on each"]
        lines[-1] += " (the verdicts above carry Holm's correction for as many looks)"
        lines += [f"  a seed of B beats one of A with probability {chance:.2f}"]
        if min(len(side) for side in sides) >= FEW:  # of fewer, resamples are too much alike
            lines[-1] += f", interval {low:.2f} to {high:.2f} (bootstrap)"
    lines += [""] * bool(warnings) + [f"warning: {warning}" for warning in warnings]
    return "\n".join(lines)
