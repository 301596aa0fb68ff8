"""The report: its statistics against hand-worked numbers and libraries, comparisons, and the same bytes again."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, load_script
from rliable import metrics
from test_benchmarks import write_result

report, stats = load_script(ROOT / "benchmarks" / "report.py"), load_script(ROOT / "benchmarks" / "stats.py")
compare = load_script(ROOT / "benchmarks" / "compare.py").compare
behaviours = load_script(ROOT / "benchmarks" / "behaviours.py")
TASKS = ("Walker2d-v4", "Hopper-v4", "HalfCheetah-v4", "Ant-v4")


def test_student_interval_by_hand():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    # standard deviation sqrt(2.5), t(0.975, 4) = 2.776445
    assert stats.student_interval(values) == pytest.approx(2.776445 * np.sqrt(2.5 / 5), rel=1e-6)
    low, high = scipy.stats.t.interval(0.9, 4, values.mean(), scipy.stats.sem(values))
    assert stats.student_interval(values, 0.9) == pytest.approx((high - low) / 2)
    assert np.isnan(stats.student_interval(values[:1]))


def test_a_published_mean_is_tested_by_hand():
    """Without a standard deviation it is a point, with one it is Welch's other sample."""
    values, nan = np.array([1.0, 2.0, 3.0]), float("nan")
    # mean 2, standard error 1 / sqrt(3): t = 2 sqrt(3); with 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2)
    t = 2 * np.sqrt(3)
    assert stats.against(values, 0.0, nan, 10) == pytest.approx((4.302653 / np.sqrt(3), 1 - t / np.sqrt(2 + t * t)))
    a, b = values, np.array([4.0, 8.0])
    _, low, high, p = stats.welch(a, b)
    assert stats.against(a, 6.0, np.std(b, ddof=1), 2) == pytest.approx(((high - low) / 2, p))
    equal = np.array([0.1, 0.1, 0.1])  # whose variance is not 0 in floating point
    p = scipy.stats.ttest_1samp(b, 0.1).pvalue  # the other side alone varies
    assert stats.against(equal, 6.0, np.std(b, ddof=1), 2)[1] == pytest.approx(p)
    for nothing in (stats.against(values[:1], 0.0, 1.0, 5), stats.against(equal, 0.0, nan, 5)):
        assert np.isnan(nothing).all()


def test_holm_by_hand():
    # sorted 0.01 0.02 0.03 times 3 2 1 is 0.03 0.04 0.03, and none may be below the one before
    assert stats.holm([0.02, 0.03, 0.01]) == pytest.approx([0.04, 0.04, 0.03])
    with_gap = stats.holm([0.03, float("nan"), 0.6])
    assert with_gap[0] == pytest.approx(0.06)
    assert np.isnan(with_gap[1])
    assert stats.holm([]) == []


def test_welch_by_hand():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([4.0, 8.0])
    # variances 1 and 8: standard error sqrt(1/3 + 4), degrees (13/3)^2 / ((1/3)^2 / 2 + 4^2 / 1)
    error, degrees = np.sqrt(13 / 3), (13 / 3) ** 2 / (1 / 18 + 16)
    difference, low, high, p = stats.welch(a, b)
    half = scipy.stats.t.ppf(0.975, degrees) * error
    assert (difference, low, high) == pytest.approx((4, 4 - half, 4 + half))
    assert p == pytest.approx(2 * scipy.stats.t.sf(4 / error, degrees))
    assert np.isnan(stats.welch(a, b[:1])[1:]).all()


def test_improvement_is_rliables_and_by_hand():
    x, y = np.array([[1.0], [3.0]]), np.array([[2.0], [1.0], [0.0]])
    assert stats.improvement(x, y) == pytest.approx([(1.5 + 3) / 6])  # 1 beats 0 and ties with 1; 3 beats all
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 9, (7, 4)).astype(float), generator.integers(0, 9, (5, 4)).astype(float)
    assert stats.improvement(x, y) == pytest.approx([metrics.probability_of_improvement(x, y)])


def test_interquartile_mean_and_profile_by_hand():
    scores = np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 100.0]])
    assert stats.interquartile_mean(scores) == pytest.approx([(2 + 3 + 4 + 5) / 4])
    assert stats.profile(scores, np.array([-1.0, 3.0, 99.0, 100.0])) == pytest.approx([1, 4 / 8, 1 / 8, 0])


def test_the_bootstrap_repeats_itself_and_resamples_seeds_within_tasks():
    scores = np.array([[0.0, 10.0], [2.0, 14.0], [4.0, 18.0]])
    once, again = (stats.bootstrap(scores, lambda x: x.mean(0)) for _ in range(2))
    assert (once[1] == again[1]).all()
    (low, high), mean = once[1], once[0]
    assert mean == pytest.approx([2, 14])
    assert (low >= [0, 10]).all()
    assert (high <= [4, 18]).all()
    # three seeds: the lowest of 27 resamples is 0 0 0, as likely as 1/27 > 2.5 %
    assert low == pytest.approx([0, 10])
    pairs = [stats.bootstrap([scores, scores + 1], stats.improvement)[1].tolist() for _ in range(2)]
    assert pairs[0] == pairs[1]


def test_what_can_be_compared():
    tasks_of = {"a": {1, 2, 3, 4}, "b": {1, 2, 3, 4}, "c": {2, 3, 4}, "d": {1}}
    assert stats.comparable(tasks_of) == (["a", "b", "c"], [2, 3, 4])
    assert stats.comparable({"a": {1, 2, 3}, "d": {1, 2}}) == ([], [])
    assert stats.comparable({}) == ([], [])


def test_normalised_scores_by_hand(tmp_path):
    floor, best = report.random_returns()["Hopper-v4"], 3535.3  # of SAC, the best of all algorithms on Hopper
    finals = {"Hopper-v4": [floor, best, (floor + best) / 2]} | {task: [1.0, 2.0, 3.0, 4.0] for task in TASKS[2:]}
    for algo in ("a2c", "sac"):
        for task, values in finals.items():
            write_result(tmp_path / algo / task, values)
    results = {algo: {task: report.read_result(tmp_path / algo / task) for task in finals} for algo in ("a2c", "sac")}
    scores, tasks = report.normalised_scores(results)
    assert tasks == ["Ant-v4", "HalfCheetah-v4", "Hopper-v4"]
    assert scores["a2c"].shape == (3, 3)
    assert scores["sac"][:, 2] == pytest.approx([0, 1, 0.5], abs=1e-4)


def synthetic_results(folder, algos, tasks):
    generator = np.random.default_rng(0)
    for i, algo in enumerate(algos):
        for task in tasks:
            write_result(folder / algo / task, list(1000.0 * (i + 1) + 300 * generator.standard_normal(5)))


@pytest.mark.parametrize("algos", [(), ("ppo_continuous",), ("ppo_continuous", "a2c", "sac")])
def test_the_report_is_the_same_bytes_again(tmp_path, algos):
    """With no algorithm, one and several; the second process checks what the first has written."""
    (tmp_path / "results").mkdir()
    synthetic_results(tmp_path / "results", algos, TASKS)
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    shutil.copy(ROOT / "benchmarks" / "README.md", tmp_path / "details.md")
    words = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--results", str(tmp_path / "results")]
    words += ["--figures", str(tmp_path / "figures"), "--readme", str(tmp_path / "README.md")]
    words += ["--details", str(tmp_path / "details.md")]
    for extra in ([], ["--check", "--no-fingerprints"]):
        done = subprocess.run([*words, *extra], capture_output=True, text=True)
        assert done.returncode == bool(extra), done.stdout + done.stderr
    unchecked = {line.removeprefix("no data for the section ") for line in done.stdout.splitlines()}  # no more is said
    assert {"speed", "headline", "off-policy", "variance", "behaviours"} <= unchecked
    assert ("aggregates" in unchecked) == (len(algos) < 2)
    assert unchecked.isdisjoint({"results", "cells"})
    text, details = (tmp_path / "README.md").read_text(), (tmp_path / "details.md").read_text()
    assert (tmp_path / "figures" / "aggregate.png").exists() == (len(algos) > 1)
    assert all(("No results yet." in page) == (not algos) for page in (text, details))
    assert ("| ppo_continuous | Ant-v4 |" in details) == bool(algos)
    (tmp_path / "README.md").write_text(text.replace("<!-- end of results -->", "tampered <!-- end of results -->"))
    done = subprocess.run([*words, "--check", "--no-fingerprints"], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"not what the data gives: {tmp_path / 'README.md'}" in done.stdout


def test_the_table_by_hand(tmp_path):
    """Walker2d is above with sampled actions as well, Hopper without them only; TRPO's bar for Ant is of the mean.
    Ant's come with a standard deviation, so they alone are tested."""
    runs = {"Walker2d-v4": [3600.0, 3700.0, 3800.0], "Hopper-v4": [2550.0, 2551.0], "Ant-v4": [2000.0, 2100.0]}
    runs |= {"NotPublished-v4": [1.0, 2.0]}
    for task, finals in runs.items():
        write_result(tmp_path / "ppo_continuous" / task, finals, noise_cost=170.0)
    write_result(tmp_path / "trpo" / "Ant-v4", [3600.0, 3700.0], noise_cost=170.0)
    results = {"ppo_continuous": {task: report.read_result(tmp_path / "ppo_continuous" / task) for task in runs}}
    results["trpo"] = {"Ant-v4": report.read_result(tmp_path / "trpo" / "Ant-v4")}
    _, _, walker, hopper, ant, other, trpo, _, note = report.table(results).splitlines()
    half = 4.302653 * 100 / np.sqrt(3)  # t(0.975, 2)
    bar = report.published()["ppo", "Ant"]
    assert walker == (
        f"| ppo_continuous | Walker2d-v4 | 3,700 ± {half:.0f} | 3600 3700 3800 | 3,530 ± {half:.0f} | 3,510 † |"
        f" above by 20.0 ({20 - half:+.0f} to {20 + half:+.0f}) |  |"
    )
    assert "| 2,400 † | below by 19.5 " in hopper  # 2,550 by the deterministic action

    def p(*finals, mean, std, seeds):
        spread = np.std(finals, ddof=1)
        return scipy.stats.ttest_ind_from_stats(
            np.mean(finals), spread, len(finals), mean, std, seeds, equal_var=False
        ).pvalue

    # Holm's correction of two
    pair = p(1830, 1930, mean=bar.mean, std=bar.std, seeds=bar.seeds), p(3600, 3700, mean=3554, std=1253.7, seeds=3)
    start = "| ppo_continuous | Ant-v4 | 2,050 ± 635 | 2000 2100 | 1,880 ± 635 | 3,258 ± 814 † | below by 1,378 ("
    assert ant.startswith(start)
    assert ant.endswith(f") | {2 * pair[0]:.3f} |")
    assert other == "| ppo_continuous | NotPublished-v4 | 1.5 ± 6.4 | 1.0 2.0 |  |  |  |  |"
    assert trpo.startswith("| trpo | Ant-v4 | 3,650 ± 635 | 3600 3700 |  | 3,554 ± 3,114 | above by 96.0 (")
    assert trpo.endswith(f" | {pair[1]:.3f} |")
    assert "for 2 tests." in note
    head, _, ant, hopper, other, walker, _, note, _, first = report.matrix(results).splitlines()
    assert head == "| | ppo_continuous | trpo |"
    assert ant == "| Ant-v4 | 2,050 ± 635<br>1,880 ▼▼ 3,258 | 3,650 ± 635<br>3,650 ▲ 3,554 |"
    assert hopper.startswith("| Hopper-v4 | 2,550 ± ")
    assert hopper.endswith("<br>2,380 ▼ 2,400 |  |")
    assert other == "| NotPublished-v4 | 1.5 ± 6.4 |  |"
    assert walker == f"| Walker2d-v4 | 3,700 ± {half:.0f}<br>3,530 ▲ 3,510 |  |"
    assert "has a standard deviation: 2 of 4). 3 of the published means are of sampled actions." in note
    one_test = "(1 of 1 test significant)"
    assert (
        first == f"ppo_continuous and trpo: above in 2 of 4 (none of 1 test significant); below in 2 of 4 {one_test}."
    )
    results = {"a2c": {"Ant-v4": results["trpo"]["Ant-v4"]}, "reinforce": {"Ant-v4": results["trpo"]["Ant-v4"]}}
    *_, first, second = report.matrix(results).splitlines()  # ours has a critic, most of what is published has none
    assert first == "a2c: above in 0 of 1; below in 1 of 1 (none of 1 test significant).\\"
    assert second == f"reinforce: above in 1 of 1 {one_test}; below in 0 of 1."


def test_a_cell_that_cannot_be_compared_like_for_like_is_refused_by_name(tmp_path):
    write_result(tmp_path / "a2c" / "Hopper-v4", [2550.0, 2551.0])
    path = tmp_path / "a2c" / "Hopper-v4" / "metrics.csv"
    path.write_text("\n".join(line.rpartition(",")[0] for line in path.read_text().splitlines()))
    with pytest.raises(ValueError, match=r"a2c on Hopper-v4: .*run sampled.py"):
        report.all_cells({"a2c": {"Hopper-v4": report.read_result(path.parent)}})
    half = report.read_result(path.parent)  # joined from results of which one only was sampled
    half[1]["sampled_return"], half[2]["sampled_return"] = np.array([np.nan, 2380.0]), np.array([np.nan, np.nan])
    with pytest.raises(ValueError, match=r"a2c on Hopper-v4: .*run sampled.py"):
        report.all_cells({"a2c": {"Hopper-v4": half}})


def test_seeds_of_different_lengths_are_shown(tmp_path):
    """REINFORCE on whole episodes: the k-th evaluation is at another step for each seed."""
    seeds = {
        1: {"global_step": np.array([90.0, 100, 110, 200]), "eval_return": np.array([np.nan, 1, np.nan, 490])},
        2: {"global_step": np.array([120.0, 220]), "eval_return": np.array([3.0, 480])},
    }
    steps, returns = report.evaluations(seeds)
    assert steps.tolist() == [110, 210]
    assert returns.tolist() == [[1, 490], [3, 480]]
    (line,) = report.shorter_runs([("reinforce", "CartPole-v1", seeds)]).splitlines()[2:]
    assert line == "| reinforce | CartPole-v1 | 210 | 485 | 490 480 |  | 210 steps (475) |"


def test_a_section_that_has_lost_its_marks_is_refused(tmp_path):
    page = "before\n<!-- x: benchmarks/report.py writes what is between -->\nold\n<!-- end of x -->\nafter"
    new = "before\n<!-- x: benchmarks/report.py writes what is between -->\n\nnew\n\n<!-- end of x -->\nafter"
    assert report.fill(page, {"x": "new", "of another page": "y"}) == new
    with pytest.raises(ValueError, match="the section x has no mark of its end"):
        report.fill(page.replace("<!-- end of x", "<!-- end of X"), {"x": "new"})
    page = tmp_path / "page.md"
    page.write_text("<!-- results: benchmarks/report.py writes what is between -->\n<!-- end of results -->")
    with pytest.raises(ValueError, match="neither page has a section for cells"):
        report.contents(report.Args(readme=page, details=page, results=tmp_path), {})


def test_shorter_runs_tell_when_every_seed_has_solved_the_task_and_what_is_published(tmp_path, monkeypatch):
    points = {("a2c", "Ant", 1000): report.Bar(2.5, 1.0, 2), ("a2c", "Pendulum", 999): report.Bar(5.0, 1.0, 2)}
    points |= {("sac", "CartPole", 1000): report.Bar(7.0, 1.0, 2)}
    monkeypatch.setattr(report, "published_curves", lambda: points)
    for task, finals in (("CartPole-v1", [500.0, 480.0]), ("Pendulum-v1", [-150.0]), ("Ant-v4", [1.0, 2.0, 3.0])):
        write_result(tmp_path / "a2c" / task, finals)
    results = report.shorter_results(tmp_path)
    assert report.shorter_figure(results).startswith(b"\x89PNG")
    ant, cart_pole, pendulum = report.shorter_runs(results).splitlines()[2:]
    steps = next(iter(report.read_result(tmp_path / "a2c" / "Ant-v4").values()))["global_step"][-1]
    assert cart_pole.endswith(f"| 490 | 500 480 |  | {steps:,.0f} steps (475) |")
    assert pendulum.endswith("| -150 | -150 |  |  |")  # which has no threshold
    assert ant.endswith("| 2.0 ± 2.5 | 1.0 2.0 3.0 | 2.5 (p 0.633) |  |")  # t = -0.5 / sqrt(5 / 6), 2.27 degrees
    points.clear()
    assert report.shorter_figure(results) is None


def test_the_front_page_of_ddpg_and_sac_by_hand(tmp_path, monkeypatch):
    steps = 1_000  # of write_result
    monkeypatch.setattr(report, "published_curves", lambda: {("sac", "Ant", steps): report.Bar(2.5, 1.0, 10)})
    runs = (("sac", "Ant-v4", [1.0, 3.0]), ("ddpg", "Ant-v4", [7.0]), ("sac", "Hopper-v4", [8.0, 8.5, 9.0]))
    for algo, task, finals in runs:
        write_result(tmp_path / algo / task, finals)
    write_result(tmp_path / "a2c" / "Ant-v4", [4.0])  # which is another table's
    head, _, ant, hopper, *_ = report.off_policy(report.shorter_results(tmp_path)).splitlines()
    assert head == "| | sac, 1,000 steps, 2 or 3 seeds | ddpg, 1,000 steps, 1 seed |"
    assert ant == "| Ant-v4 | 2.0 (2.5) | 7.0 |"
    assert hopper == "| Hopper-v4 | 8.5 |  |"


def measured(rate, same, default, processor):
    """What speed.py leaves of PPO."""
    peers = {"Stable-Baselines3, our minibatch size": same, "Stable-Baselines3, its defaults": default}
    counts = (("1 seed", 1), ("8 seeds", 2))
    return {
        "algo": "ppo_continuous", "env_id": "Walker2d-v4", "of_envpool": {"1 seed": 0.3, "8 seeds": 0.55},
        "hardware": {"cores": 2, "processor": processor, "gpu": None},
        "steps_per_second": {f"ppo_continuous, {seeds}": {"median": n * rate} for seeds, n in counts},
        "times_peer": {name: {"1 seed": ratio} for name, ratio in (peers | {"CleanRL, its defaults": 5.13}).items()},
    }  # fmt: skip


def test_the_front_page_of_speed_by_hand(tmp_path):
    assert report.headline(tmp_path) is None
    (tmp_path / "other").mkdir()
    for path, own in (("", measured(6778, 2.0, 2.8, "X")), ("other", measured(5346.4, 1.94, 2.9, None))):
        (tmp_path / path / "ppo_continuous.json").write_text(json.dumps(own))
    assert report.headline(tmp_path) == (
        "On each of 2 machines with 2 CPU cores PPO makes 5,346 to 6,778 steps of Walker2d-v4 per second with one seed:"
        " 1.9 to 2.0 times as many as Stable-Baselines3 with minibatches of the same size, 2.8 to 2.9 times as many as"
        " with its defaults. Part of this is the simulator: ours is EnvPool's, in C++ on all cores, theirs Gymnasium's,"
        " in one Python process."
    )
    larger = own | {"hardware": own["hardware"] | {"cores": 64}}  # which the sentence must not count among those of two
    (tmp_path / "other" / "ppo_continuous.json").write_text(json.dumps(larger))
    assert report.headline(tmp_path).startswith("On 2 CPU cores PPO makes 6,778 steps of Walker2d-v4 per second")
    _, _, row, _, note = report.speed(tmp_path).splitlines()
    assert row == "| ppo_continuous | 6,778 (30%) | 13,556 (55%) | 2.0 (our minibatch size), 2.8 (its defaults) |"
    assert note.endswith("CleanRL, which step one environment and were not compiled: 5.1 to 5.1 times their rate.")


def test_the_front_page_shows_every_film():
    stems = [name.replace(" ", "_") for name in behaviours.BEHAVIOURS]
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"\(benchmarks/figures/(\w+)\.gif\)", text) == stems
    assert all((ROOT / "benchmarks" / "figures" / f"{stem}.gif").exists() for stem in stems)


def test_what_other_machines_have_measured_by_hand(tmp_path):
    assert report.elsewhere(tmp_path) == []
    rates = {"sac, 1 seed": [115.0], "sac, 4 seeds": [157.0], "its peer": [80.0, 90.0, 100.0]}
    result = {"algo": "sac", "hardware": {"cores": 2, "processor": "X"}, "of_envpool": {"1 seed": 0.1, "4 seeds": 0.2}}
    result["steps_per_second"] = {name: {"median": np.median(each), "each": each} for name, each in rates.items()}
    result["times_peer"] = {"its peer": {"1 seed": 1.3, "4 seeds": 1.74}}
    apart = {"sac, a process per core": {"median": 200.0, "each": [200.0]}}
    several = result | {"steps_per_second": result["steps_per_second"] | apart}
    shares = {"of_matrix_product": {"1 seed": 0.43, "4 seeds": 0.58}, "matrix_product_flops": 157e9}
    for name, own in (("a", result), ("b", several | shares)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sac.json").write_text(json.dumps(own))
    assert report.elsewhere(tmp_path)[3:] == [
        "| 2 cores (X) | sac | 1, 4 | 115, 157 | its peer: 1.3, 1.7 |  |",
        "| 2 cores (X) | sac | 1, 4 | 115, 157; 200 by a process per core | its peer: 1.3, 1.7 |"
        " 43%, 58% of 157 GFLOP/s |",
    ]


def test_behaviours_are_the_means_of_each_seed(tmp_path):
    rows = ["seed,return,length,x_velocity,squared_action", "1,9,1000,3,0.2", "1,5,500,2,0.4", "2,7,20,-0.001,0.1"]
    (tmp_path / "0_standing_still.csv").write_text("\n".join([*rows, ""]))
    config = {"args": {"env_kwargs": {"forward_reward_weight": "0"}}}
    (tmp_path / "0_standing_still.json").write_text(json.dumps(config))
    lines = report.behaviours(tmp_path).splitlines()
    assert lines[0] == "| | standing still |"
    assert lines[2].endswith("| `forward_reward_weight 0` |")
    assert [line.split(" | ")[1] for line in lines[3:6]] == ["2.50, 0.00 |", "0.300, 0.100 |", "750, 20 |"]


def test_stale_results_are_named(tmp_path, monkeypatch):
    write_result(tmp_path / "a2c" / "Ant-v4", [1.0, 2.0])
    monkeypatch.setattr(
        report, "fingerprint", lambda script, discrete, own: {"seed 1: steps": 64.0, "seed 1: evaluation": 10.0}
    )
    monkeypatch.setattr(report, "other_defaults", lambda now, meta: [])
    assert report.stale(tmp_path) == ["a2c on Ant-v4 has no fingerprint: run.py --add-fingerprint"]
    path = tmp_path / "a2c" / "Ant-v4" / "run.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"fingerprint": {"seed 1: steps": 64.0, "seed 1: evaluation": 10.001}}))
    assert report.stale(tmp_path) == []
    path.write_text(json.dumps(meta | {"fingerprint": {"seed 1: steps": 64.0, "seed 1: evaluation": 12.0}}))
    assert report.stale(tmp_path) == ["stale: a2c on Ant-v4: seed 1: evaluation was 12, is 10, and 0 more"]
    write_result(tmp_path / "shorter" / "sac" / "Ant-v4", [1.0, 2.0])
    path.write_text(json.dumps(meta | {"fingerprint": {"seed 1: steps": 64.0, "seed 1: evaluation": 10.0}}))
    with monkeypatch.context() as patch:
        patch.setattr(report, "other_defaults", lambda now, meta: ["gamma was 1, is 2"])
        of_sac = "sac on Ant-v4 has no fingerprint: run.py --add-fingerprint"
        assert report.stale(tmp_path) == ["stale: a2c on Ant-v4: gamma was 1, is 2, and 0 more", of_sac]
    shutil.rmtree(tmp_path / "shorter")

    def fail(*_):
        raise RuntimeError("a2c.py fails")

    monkeypatch.setattr(report, "fingerprint", fail)
    assert report.stale(tmp_path) == ["stale: a2c on Ant-v4: a2c.py fails"]


def test_a_fingerprint_is_that_of_the_text_that_trained(tmp_path, monkeypatch):
    run = load_script(ROOT / "benchmarks" / "run.py")
    args = run.Args(run_dir=tmp_path / "runs", results=tmp_path / "results")
    job = run.Job("a2c", "Hopper-v4", args, [], fingerprint={"norm": 1.0})
    folder = write_run(tmp_path / "runs", 11, 1.0, script="edited since", run_dir="", resume="auto", evaluate=None)
    monkeypatch.setattr(run.Job, "folders", lambda self: [folder])
    for job.sha256, known in (("as it was", False), ("edited since", True)):
        job.gather({})
        assert ("fingerprint" in json.loads((job.result / "run.json").read_text())) == known


def test_a_check_tells_what_is_stale(tmp_path, monkeypatch, capsys):
    write_result(tmp_path / "a2c" / "Ant-v4", [1.0, 2.0])
    monkeypatch.setattr(report, "contents", lambda args, results: ({}, []))
    for found, status in (([], 0), (["stale: all of it"], 1)):
        monkeypatch.setattr(report, "stale", lambda results, found=found: found)
        assert report.main(report.Args(results=tmp_path, check=True)) == status
        shown = capsys.readouterr().out
        assert shown == ("stale: all of it\n" if found else "the report is what the data gives; no result is stale\n")


NAMED = "--final-eval-episodes", "10", "--num_evaluations=5", "--gone", "1"


def test_defaults_that_a_fingerprint_cannot_see_are_compared_too():
    """A fingerprint is of a short run, which sets these itself."""
    for algo in ("ddpg", "a2c"):
        defaults = dataclasses.asdict(load_script(ROOT / "algos" / f"{algo}.py").Args())
        meta = json.loads(next((ROOT / "benchmarks" / "results").glob(f"**/{algo}/Hopper-v4/run.json")).read_text())
        assert report.other_defaults(defaults, meta) == []
        meta["args"] |= {"final_eval_episodes": 10, "num_evaluations": 5, "gone": 1}
        expected = ["gone was 1, is absent", "final_eval_episodes was 10, is 100", "num_evaluations was 5, is 10"]
        assert sorted(report.other_defaults(defaults, meta)) == sorted(expected)
        meta["command"] = " ".join([meta["command"].partition(";")[0], *NAMED])
        assert report.other_defaults(defaults, meta) == []


def write_run(folder, seed, final, finished=True, steps=1000, script=None, **args):
    """A run folder as a script leaves it, as far as a comparison reads it. A return of "" is that of a seed whose
    weights are not finite any more."""
    folder = folder / f"Hopper-v4__a2c__{seed}__17"
    folder.mkdir(parents=True)
    args = {"seed": seed, "num_seeds": 5, "env_id": "Hopper-v4", "env_kwargs": {}, "learning_rate": 1e-3} | args
    config = {"trained_timesteps": steps, "args": {"num_evaluations": 10} | args, "versions": {"torch": "2.13.0"}}
    (folder / "config.json").write_text(json.dumps(config | {"script_sha256": script} if script else config))
    rows = ["global_step,wall_seconds,episodic_return,eval_return,steps_per_second", f"{steps // 2},1.0,5.0,,10"]
    rows += [f"{steps},2.0,{final},{final},10"] * finished
    (folder / "metrics.csv").write_text("\n".join([*rows, ""]))
    return folder


def test_every_argument_that_differs_is_named(tmp_path):
    """On each task, and what one side does not have as well."""
    for seed in range(1, 6):
        write_run(tmp_path / "A", seed, 100.0 + seed)
        write_run(tmp_path / "B", seed, 100.0)  # no spread: SciPy would warn of it
        write_run(tmp_path / "A" / "ant", seed, 100.0 + seed, env_id="Ant-v4")
        write_run(tmp_path / "B" / "ant", seed, 100.0 + seed, env_id="Ant-v4", learning_rate=2e-3, my_change=True)
    with warnings.catch_warnings(action="error"):
        text = compare(tmp_path / "A", tmp_path / "B")
    assert "Arguments that differ on Hopper-v4: none\n" in text
    assert "Arguments that differ on Ant-v4: learning_rate 0.001 -> 0.002, my_change absent -> True\n" in text


def test_an_edited_script_does_not_go_unnoticed(tmp_path):
    """The arguments are the same."""
    for seed in range(1, 6):
        for side, script in (("A", "a"), ("B", "b"), ("mixed", "ab"[seed % 2]), ("older", None)):
            write_run(tmp_path / side, seed, 100.0 + seed, script=script)
    text = {side: compare(tmp_path / "A", tmp_path / side) for side in ("A", "B", "mixed", "older")}
    assert "Scripts of A and B: the same text\n" in text["A"]
    assert "Scripts of A and B: not the same text\n" in text["B"]
    assert "Scripts of A and B: not known whether the same text\n" in text["older"]
    assert "warning: Hopper-v4: B was trained by different versions of the script" in text["mixed"]
    assert not any("different versions of the script" in text[side] for side in ("A", "B", "older"))


def test_a_side_that_is_mixed_is_named(tmp_path):
    for seed in range(1, 6):
        write_run(tmp_path / "A", seed, 100.0 + seed)
        write_run(tmp_path / "rates", seed, 100.0 + seed, learning_rate=2e-3 if seed == 3 else 1e-3)
        write_run(tmp_path / "lengths", seed, 100.0 + seed, steps=2000 if seed == 3 else 1000)
    assert (
        "warning: Hopper-v4: B mixes runs of different learning_rate\n"
        in compare(tmp_path / "A", tmp_path / "rates") + "\n"
    )
    text = compare(tmp_path / "lengths", tmp_path / "A")
    assert "warning: Hopper-v4: A mixes runs of different numbers of steps" in text


def test_a_better_change_is_called_better(tmp_path):
    for seed in range(1, 6):
        write_run(tmp_path / "A", seed, 100.0 + seed)
        write_run(tmp_path / "B", seed, 200.0 + 2 * seed, learning_rate=2e-3)
    text = compare(tmp_path / "A", tmp_path / "B")
    difference, low, high, p = stats.welch(np.arange(101.0, 106), np.arange(202.0, 212, 2))
    assert "Arguments that differ: learning_rate 0.001 -> 0.002" in text
    assert f"B - A  {difference:+.1f}, interval {low:+.1f} to {high:+.1f}, p = {p:.3g} (Welch)" in text
    assert "a seed of B beats one of A with probability 1.00\n" in text
    assert "B is better than A." in text
    assert "warning" not in text
    assert "B is worse than A." in compare(tmp_path / "B", tmp_path / "A")
    for path in (tmp_path / "A").glob("*/metrics.csv"):  # the last evaluation counts, not the best
        path.write_text(path.read_text().replace("5.0,,10", "5.0,9e9,10"))
    assert compare(tmp_path / "A", tmp_path / "B") == text


def test_verdicts_over_tasks_are_corrected(tmp_path):
    for gain, left_open in ((2.45, 2), (100.0, 0)):  # p is 0.04 on each task and 0.08 after Holm's correction, and tiny
        folder = tmp_path / str(gain)
        for task in ("Hopper-v4", "Ant-v4"):
            for seed in range(1, 6):
                write_run(folder / "A" / task, seed, float(seed), env_id=task)
                write_run(folder / "B" / task, seed, seed + gain, env_id=task)
        text = compare(folder / "A", folder / "B")
        assert text.count("with so many tasks") == left_open
        assert text.count("B is better") == 2 - left_open
    assert text.count("a seed of B beats one of A with probability 1.00") == 3  # each task, and over both
    write_run(tmp_path / "2.45" / "B" / "Ant-v4", 6, 0.0, finished=False, env_id="Ant-v4")
    partial = compare(tmp_path / "2.45" / "A", tmp_path / "2.45" / "B")
    assert partial.count("Nothing can be said: seeds are unfinished") == 1
    assert partial.count("with so many tasks") == 1
    assert partial.count("a seed of B beats one of A") == 2  # and nothing over the tasks
    for side in ("A", "B"):
        write_run(tmp_path / "2.45" / side / "Swimmer-v4", 1, 0.0, finished=side == "A", env_id="Swimmer-v4")
    partial = compare(tmp_path / "2.45" / "A", tmp_path / "2.45" / "B")
    assert "Swimmer-v4\n  Nothing can be said: all seeds of a side are unfinished" in partial
    assert text.endswith("with probability 1.00, interval 1.00 to 1.00 (bootstrap)")


def test_a_comparison_says_what_weakens_it(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / "A", seed, 100.0 + seed)
        write_run(tmp_path / "B", seed + 1, 104.0 - seed, steps=2000)
    write_run(tmp_path / "B", 7, 0.0, finished=False)
    write_run(tmp_path / "B" / "deeper", 1, 1.0, env_kwargs={"healthy_reward": "0"})
    text = compare(tmp_path / "A", tmp_path / "B")
    assert "No difference is shown" not in text
    assert "seeds are unfinished" in text
    assert "seeds are unfinished" in compare(tmp_path / "B", tmp_path / "A")
    for warning in (
        "B: left out, because unfinished or without a final evaluation: Hopper-v4__a2c__7__17",
        "A has 3 seeds",
        "different seeds",
        "A has trained 1,000 steps and B 2,000",
        "only one of them has Hopper-v4 (healthy_reward 0): left out",
    ):
        assert warning in text, warning
    write_run(tmp_path / "B" / "again", 7, 101.0, steps=2000)
    text = compare(tmp_path / "A", tmp_path / "B")
    assert "unfinished (see" not in text
    a, b = np.array([101.0, 102.0, 103.0]), np.array([103.0, 102.0, 101.0, 101.0])
    _, low, high, _ = stats.welch(a, b)
    assert f"No difference is shown: B may be worse by up to {-low:.1f}, better by up to {high:.1f}, or equal" in text
    assert f"  A  mean 102.0 ± {stats.student_interval(a):.1f}   by seed 1: 101.0, 2: 102.0, 3: 103.0\n" in text
    write_run(tmp_path / "one", 1, 5.0)
    text = compare(tmp_path / "A", tmp_path / "one")
    assert "Nothing can be said" in text
    assert "nan" not in text


def test_what_weakens_several_tasks_is_said_once(tmp_path):
    few = "A has 2 seeds: fewer than 5 hardly know their own spread"
    cases = ("Ant-v4", 2, "Ant-v4"), ("Hopper-v4", 2, "all tasks"), ("Swimmer-v4", 5, "Ant-v4, Hopper-v4")
    for task, seeds, said in cases:
        for seed in range(1, seeds + 1):
            for side in ("A", "B"):
                write_run(tmp_path / side / task, seed, 100.0 + seed, env_id=task)
        text = compare(tmp_path / "A", tmp_path / "B")
        assert [line for line in text.splitlines() if few in line] == [f"warning: {said}: {few}"]


def test_seeds_that_diverged_are_not_passed_over(tmp_path):
    """The mean of those that are left is no answer, however much better it is."""
    for seed in range(1, 6):
        write_run(tmp_path / "A", seed, 100.0 + seed)
        write_run(tmp_path / "B", seed, "" if seed < 4 else 200.0 + seed)
    text = compare(tmp_path / "A", tmp_path / "B")
    assert "B is better" not in text
    assert "Nothing can be said: seeds diverged" in text
    assert "warning: B: diverged on Hopper-v4, so that no mean can count them: seeds 1, 2, 3" in text
    text = compare(tmp_path / "B", tmp_path / "A")
    assert "is worse" not in text
    assert "Nothing can be said: seeds diverged" in text
    for task in ("Ant-v4", "Swimmer-v4"):
        for seed in range(1, 6):
            write_run(tmp_path / "A" / task, seed, 100.0 + seed, env_id=task)
            write_run(tmp_path / "B" / task, seed, 200.0 + seed, env_id=task)
    assert "Over 3 tasks" not in compare(tmp_path / "A", tmp_path / "B")
    for seed in (4, 5):
        (tmp_path / "B" / f"Hopper-v4__a2c__{seed}__17" / "config.json").unlink()
    text = compare(tmp_path / "A", tmp_path / "B")
    assert "Hopper-v4\n  Nothing can be said: all seeds of a side diverged" in text
    assert text.count("B is better") == 2
    assert "Over 2 tasks" not in text
    for task in ("Ant-v4", "Swimmer-v4"):
        shutil.rmtree(tmp_path / "A" / task)
    with pytest.raises(ValueError, match="no task on which both have a finished run"):
        compare(tmp_path / "A", tmp_path / "B")


def test_the_run_that_was_started_last_counts_if_it_is_of_the_same_kind(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / "A", seed, 100.0 + seed)
        write_run(tmp_path / "B" / "z", seed, 200.0 + seed)
        write_run(tmp_path / "B", seed, 300.0).rename(tmp_path / "B" / f"Hopper-v4__a2c__{seed}__18")
    text = compare(tmp_path / "A", tmp_path / "B")
    assert "the one that was started last counts" in text
    assert "B  mean 300.0" in text
    write_run(tmp_path / "B" / "y", 2, 200.0, learning_rate=2e-3)
    reading = load_script(ROOT / "benchmarks" / "reading.py")
    set_aside = tmp_path / "B" / f"y.{reading.SET_ASIDE}17"
    (tmp_path / "B" / "y").rename(set_aside)  # by run.py
    assert "B  mean 300.0" in compare(tmp_path / "A", tmp_path / "B")
    set_aside.rename(tmp_path / "B" / "y")
    with pytest.raises(ValueError, match="B has seed 2 of Hopper-v4 twice, with different learning_rate"):
        compare(tmp_path / "A", tmp_path / "B")
    write_run(tmp_path / "A" / "x", 1, 90.0, steps=500)
    with pytest.raises(ValueError, match="A has seed 1 of Hopper-v4 twice, with different trained_timesteps"):
        compare(tmp_path / "A", tmp_path / "B")


def test_other_versions_are_named_and_other_tools_files_passed_over(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / "A", seed, 100.0 + seed)
        path = write_run(tmp_path / "B", seed, 100.0 + seed) / "config.json"
        path.write_text(path.read_text().replace("2.13.0", "2.12.0"))
    for i, content in enumerate(('{"model": 1}', "[]")):
        (tmp_path / "B" / str(i)).mkdir()
        (tmp_path / "B" / str(i) / "config.json").write_text(content)
    assert "trained with different versions of torch: 2.12.0, 2.13.0" in compare(tmp_path / "A", tmp_path / "B")
    assert "without their replay" not in compare(tmp_path / "A", tmp_path / "B")
    config = json.loads(path.read_text())
    config["args"]["save_replay"] = False
    for at_step, warned in ((5, True), (1000, False)):  # the latter had nothing left to learn
        resumed = [{"at_step": at_step, "before": {"versions": {"torch": "2.11.0"}, "script_sha256": "edited since"}}]
        path.write_text(json.dumps(config | {"resumed": resumed, "script_sha256": "as it is now"}))
        text = compare(tmp_path / "A", tmp_path / "B")
        assert "B was trained by different versions of the script" in text
        assert ("B has runs resumed without their replay" in text) == warned
        assert "trained with different versions of torch: 2.11.0, 2.12.0, 2.13.0" in text
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match=r"B/Hopper-v4__a2c__2__17/config\.json: "):
        compare(tmp_path / "A", tmp_path / "B")


def test_whole_episodes_end_before_the_last_step(tmp_path):
    """REINFORCE's batches of whole episodes have lengths of their own: a run ends where another might not fit."""
    whole = {"baseline": "none", "num_envs": 2, "horizon": 100, "total_timesteps": 1000}
    for folder, steps in (("A", 801), ("B", 950), ("cut", 800)):
        for seed in (1, 2):
            path = write_run(tmp_path / folder, seed, 100.0 * seed, steps=steps, **whole) / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"trained_timesteps": 1000}))
    assert "left out" not in compare(tmp_path / "A", tmp_path / "B")
    with pytest.raises(ValueError, match="B: left out, because unfinished"):
        compare(tmp_path / "A", tmp_path / "cut")
    assert "seeds in a process" not in compare(tmp_path / "A", tmp_path / "B")
    write_run(tmp_path / "B", 3, 100.0, steps=950, **whole | {"num_seeds": 1})
    assert "1 or 5 seeds in a process" in compare(tmp_path / "A", tmp_path / "B")


def test_seeds_that_had_a_process_each_are_told_from_those_that_shared_one():
    reading = load_script(ROOT / "benchmarks" / "reading.py")
    meta = json.loads(
        (ROOT / "benchmarks/results/estimators/moving_average/reinforce/CartPole-v1/run.json").read_text()
    )
    assert reading.seeds_together(meta) == 1
    del meta["processes"]
    assert reading.seeds_together(meta) == 5


def test_runs_made_longer_are_named(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / "A", seed, 100.0 + seed)
        path = write_run(tmp_path / "B", seed, 100.0 + seed) / "config.json"
    config = json.loads(path.read_text())
    for earlier, warned in ((1000, False), (500, True), (None, False)):  # older folders do not say
        resumed = [{"at_step": 500, "before": {"trained_timesteps": earlier} if earlier else {}}]
        path.write_text(json.dumps(config | {"resumed": resumed}))
        assert ("B has runs made longer by --resume" in compare(tmp_path / "A", tmp_path / "B")) == warned


def test_returns_without_any_spread_allow_no_test(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / "A", seed, 1000.0)
        write_run(tmp_path / "B", seed, 1000.0)
        write_run(tmp_path / "C", seed, 900.0)
    none = "No test can be made: neither side has any spread, and "
    assert none + "both return the same." in compare(tmp_path / "A", tmp_path / "B")
    assert none + "they differ." in compare(tmp_path / "A", tmp_path / "C")


def test_gathered_results_are_compared_over_their_tasks(tmp_path):
    synthetic_results(tmp_path, ("a2c", "sac"), TASKS[:2])
    text = compare(tmp_path / "a2c", tmp_path / "sac")
    assert text.count("(Welch)") == 2
    assert "Over 2 tasks" in text
    for path in tmp_path.glob("a2c/*/metrics.csv"):  # the last evaluation counts, not the best
        path.write_text(re.sub(r"(,500,1\.0,[^,]+),,", r"\1,9e9,", path.read_text()))
    assert compare(tmp_path / "a2c", tmp_path / "sac") == text
    for path in (tmp_path / "sac").glob("*/run.json"):
        meta = json.loads(path.read_text())
        resumed = [{"at_step": 500, "before": {"versions": {"torch": "2.11.0"}, "script_sha256": "old"}}]
        meta["args"]["save_replay"] = False
        path.write_text(json.dumps(meta | {"resumed": resumed, "script_sha256": "new"}))
    text = compare(tmp_path / "a2c", tmp_path / "sac")
    for warning in (
        "all tasks: B has runs resumed without their replay",
        "all tasks: B was trained by different versions of the script",
        "all tasks: trained with different versions of torch: 2.11.0, 2.13.0",
    ):
        assert f"warning: {warning}" in text


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path):
    write_run(tmp_path / "A", 1, 5.0)
    write_run(tmp_path / "other", 1, 5.0, env_id="Ant-v4")
    (tmp_path / "empty").mkdir()
    cut = write_run(tmp_path / "cut", 1, 5.0) / "metrics.csv"
    cut.write_text(cut.read_text()[:-6])
    for name, message in (
        ("other", "no task in common"),
        ("empty", "no runs"),
        ("nowhere", "no runs"),
        ("cut", "cut off"),
    ):
        words = [
            sys.executable,
            str(ROOT / "benchmarks" / "report.py"),
            "--compare",
            str(tmp_path / "A"),
            str(tmp_path / name),
        ]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("report.py: error: ")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
