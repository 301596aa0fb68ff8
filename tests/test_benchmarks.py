"""The harness: what it gathers, refuses, computes and rebuilds."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, load_script

report = load_script(ROOT / "benchmarks" / "report.py")
QUICK = ["--num-envs", "4", "--num-steps", "16", "--num-minibatches", "4", "--num-evaluations", "1"]
QUICK += ["--final-eval-episodes", "2", "--checkpoint-seconds", "0.1"]


def run_command(tmp_path, *words, extra=()):
    places = ["--run-dir", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return [sys.executable, str(ROOT / "benchmarks" / "run.py"), *words, *places, "--", *QUICK, *extra]


def test_student_interval_by_hand():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    # standard deviation sqrt(2.5), t(0.975, 4) = 2.776445
    assert report.student_interval(values) == pytest.approx(2.776445 * np.sqrt(2.5 / 5), rel=1e-6)
    low, high = scipy.stats.t.interval(0.9, 4, values.mean(), scipy.stats.sem(values))
    assert report.student_interval(values, 0.9) == pytest.approx((high - low) / 2)


def test_published_numbers_carry_their_sources():
    with open(ROOT / "benchmarks" / "published.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 54
    assert all(row["source"] and row["metric_note"] and int(row["n_seeds"]) >= 3 for row in rows)
    assert len({(row["algo"], row["env"]) for row in rows}) == 54


def test_committed_results_are_complete_and_the_report_is_what_they_give():
    results = sorted((ROOT / "benchmarks" / "results").glob("*/*/run.json"))
    for path in results:
        seeds = report.read_result(path.parent)
        assert list(seeds) == [1, 2, 3, 4, 5]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_matrix_runs_skips_what_is_complete_and_survives_a_failure(tmp_path):
    words = ["--env-ids", "InvertedPendulum-v4", "NoSuchTask-v4", "Hopper-v4", "--num-seeds", "2", "--jobs", "2"]
    words += ["--total-timesteps", "640"]
    done = subprocess.run(run_command(tmp_path, *words), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NoSuchTask-v4: failed with exit status 2" in done.stdout
    assert "there is no task 'NoSuchTask-v4'" in done.stdout
    for task in ("InvertedPendulum-v4", "Hopper-v4"):
        folder = tmp_path / "results" / "ppo_continuous" / task
        seeds = report.read_result(folder)
        assert list(seeds) == [1, 2]
        assert seeds[2]["global_step"][-1] == 640
        meta = json.loads((folder / "run.json").read_text())
        assert len(meta["script_sha256"]) == 64
        assert "--num-envs 4" in meta["command"]
        assert str(tmp_path) not in json.dumps(meta)
    before = (tmp_path / "results" / "ppo_continuous" / "Hopper-v4" / "metrics.csv").stat().st_mtime_ns
    again = subprocess.run(run_command(tmp_path, *words), capture_output=True, text=True)
    assert "3 cells, 2 of them complete" in again.stdout
    assert (tmp_path / "results" / "ppo_continuous" / "Hopper-v4" / "metrics.csv").stat().st_mtime_ns == before


def test_a_killed_matrix_goes_on(tmp_path):
    words = ["--env-ids", "InvertedPendulum-v4", "--num-seeds", "1", "--total-timesteps", "40000"]
    process = subprocess.Popen(run_command(tmp_path, *words), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 60
    while not list((tmp_path / "runs").glob("*/*/*/checkpoint.pt")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "results").glob("*/*/run.json"))
    done = subprocess.run(run_command(tmp_path, *words), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(list((tmp_path / "runs" / "ppo_continuous" / "InvertedPendulum-v4").glob("*__*"))) == 1
    seeds = report.read_result(tmp_path / "results" / "ppo_continuous" / "InvertedPendulum-v4")
    steps = seeds[1]["global_step"]
    assert (np.diff(steps) > 0).all()
    assert steps[-1] == 40000 // 64 * 64


def test_a_truncated_result_is_refused_by_name(tmp_path):
    results = sorted((ROOT / "benchmarks" / "results").glob("*/*/run.json"))
    assert results, "nothing committed yet"
    folder = tmp_path / "cut"
    shutil.copytree(results[0].parent, folder)
    whole = (folder / "metrics.csv").read_text()
    for cut in (whole[: len(whole) // 2], whole[:-40], "\n".join(whole.splitlines()[:50])):
        (folder / "metrics.csv").write_text(cut)
        with pytest.raises(ValueError, match=r"cut/metrics\.csv"):
            report.read_result(folder)
