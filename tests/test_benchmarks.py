"""The harness: what it gathers, refuses, computes and rebuilds."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import envpool
import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from conftest import ROOT, load_script
from test_off_policy import parts
from test_ppo import WALKER
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT / "benchmarks"))
reading, fingerprint = (
    load_script(ROOT / "benchmarks" / "reading.py"),
    load_script(ROOT / "benchmarks" / "fingerprint.py"),
)
QUICK = ["--num-envs", "4", "--num-steps", "16", "--num-minibatches", "4", "--num-evaluations", "1"]
QUICK += ["--final-eval-episodes", "2", "--checkpoint-seconds", "0.1"]


def run_command(tmp_path, *words, extra=QUICK):
    places = ["--seed", "1", "--run-dir", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return [sys.executable, str(ROOT / "benchmarks" / "run.py"), *words, *places, "--", *extra]


def test_published_numbers_carry_their_sources():
    with open(ROOT / "benchmarks" / "published.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 54
    assert all(row["source"] and row["metric_note"] and int(row["n_seeds"]) >= 3 for row in rows)
    assert len({(row["algo"], row["env"]) for row in rows}) == 54
    with open(ROOT / "benchmarks" / "published_curves.csv", newline="") as file:
        assert all(row["source"] and row["metric_note"] and int(row["n_seeds"]) >= 3 for row in csv.DictReader(file))


def test_committed_results_are_complete_and_the_report_is_what_they_give():
    results = sorted((ROOT / "benchmarks" / "results").glob("*/*/run.json"))
    for path in results:
        seeds = reading.read_result(path.parent)
        assert list(seeds) == [11, 12, 13, 14, 15]
    words = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check", "--no-fingerprints"]
    done = subprocess.run(words, capture_output=True, text=True)
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
        seeds = reading.read_result(folder)
        assert list(seeds) == [1, 2]
        assert seeds[2]["global_step"][-1] == 640
        meta = json.loads((folder / "run.json").read_text())
        assert len(meta["script_sha256"]) == 64
        assert "--num-envs 4" in meta["command"]
        assert str(tmp_path) not in json.dumps(meta)
        assert meta["fingerprint"]["seed 1: steps"] == 4096
    before = (tmp_path / "results" / "ppo_continuous" / "Hopper-v4" / "metrics.csv").stat().st_mtime_ns
    other_threads = [*run_command(tmp_path, *words), "--env-threads", "1", "--torch-threads=1"]
    again = subprocess.run(other_threads, capture_output=True, text=True)
    assert "3 cells, 2 of them complete" in again.stdout
    assert (tmp_path / "results" / "ppo_continuous" / "Hopper-v4" / "metrics.csv").stat().st_mtime_ns == before


@pytest.mark.parametrize("agent", sorted((ROOT / "benchmarks" / "agents").glob("*/*")), ids=lambda path: path.name)
def test_committed_agents_act_as_they_did(agent, tmp_path):
    """Their files stay readable, and ten episodes return what 100 did, which benchmarks/README.md repeats."""
    before = np.loadtxt(agent / "evaluation.csv", delimiter=",", skiprows=1)[:, 0]
    assert before.shape == (100,)
    algo, task = agent.parts[-2:]
    assert f"| {algo} | {task} | {before.mean():,.0f} |" in (ROOT / "benchmarks" / "README.md").read_text()
    shutil.copy(agent / "agent.pt", tmp_path)
    words = ["--evaluate", str(tmp_path), "--final-eval-episodes", "10", "--device", "cpu"]
    done = subprocess.run([sys.executable, str(ROOT / "algos" / f"{algo}.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = np.loadtxt(tmp_path / "evaluation.csv", delimiter=",", skiprows=1)[:, 0]
    assert again.shape == (10,)
    assert again.mean() == pytest.approx(before.mean(), rel=0.15)  # rounding differs between processors


@pytest.mark.parametrize("algo", ["a2c", "ppo_continuous"])
def test_final_agents_are_evaluated_with_sampled_actions_too(tmp_path, algo):
    """From the same starts: almost without noise the return is that of the deterministic evaluation."""
    words = ["--algos", algo, "--env-ids", "InvertedPendulum-v4", "--num-seeds", "2", "--total-timesteps", "640"]
    words = run_command(tmp_path, *words, extra=[*QUICK[:-6], *QUICK[-4:]] if algo == "ppo_continuous" else QUICK[-6:])
    assert subprocess.run(words, capture_output=True).returncode == 0
    result = tmp_path / "results" / algo / "InvertedPendulum-v4"
    final = [own["eval_return"][-1] for own in reading.read_result(result).values()]
    sampled = [sys.executable, str(ROOT / "benchmarks" / "sampled.py"), *words[2 : words.index("--")]]
    for log_std in (None, -20.0):
        for path in (tmp_path / "runs").rglob("agent.pt") if log_std else ():
            saved = torch.load(path, weights_only=True)
            saved["agent"]["log_std"].fill_(log_std)
            torch.save(saved, path)
        done = subprocess.run(sampled, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        columns = [own["sampled_return"] for own in reading.read_result(result).values()]
        assert all(np.isnan(own[:-1]).all() for own in columns)
        found = [own[-1] for own in columns]
        assert (found == pytest.approx(final, abs=1e-3)) == (log_std is not None)
    relative = ["--run-dir", "runs", "--results", "results"]
    assert subprocess.run([*sampled, *relative], cwd=tmp_path, capture_output=True).returncode == 0
    done = subprocess.run([*sampled, "--seed", "2"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no runs of these seeds" in done.stderr
    path = next((tmp_path / "runs").rglob("metrics.csv"))
    path.write_text(path.read_text() + "640,1.0,1.0,1.0,1.0\n")
    done = subprocess.run(sampled, capture_output=True, text=True)
    assert done.returncode == 2
    assert "other runs than those" in done.stderr


OFF_POLICY = ["--hidden-size", "8", "--batch-size", "8", "--learning-starts", "320", "--torch-threads", "1"]
OFF_POLICY += QUICK[-6:]


@pytest.mark.parametrize(
    ("algo", "total", "extra"), [("ppo_continuous", 20_000, QUICK), ("ddpg", 8000, OFF_POLICY)], ids=["ppo", "ddpg"]
)
def test_a_killed_matrix_goes_on(tmp_path, algo, total, extra):
    words = ["--algos", algo, "--env-ids", "InvertedPendulum-v4", "--num-seeds", "1", "--total-timesteps", str(total)]
    command = run_command(tmp_path, *words, extra=extra)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 300
    while not list((tmp_path / "runs").glob("*/*/*/checkpoint.pt")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "results").glob("*/*/run.json"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(list((tmp_path / "runs" / algo / "InvertedPendulum-v4").glob("*__*"))) == 1
    seeds = reading.read_result(tmp_path / "results" / algo / "InvertedPendulum-v4")
    steps = seeds[1]["global_step"]
    assert (np.diff(steps) > 0).all()
    assert steps[-1] == total // 64 * 64
    meta = json.loads((tmp_path / "results" / algo / "InvertedPendulum-v4" / "run.json").read_text())
    assert 0 < meta["resumed"][0]["at_step"] < total


def test_runs_of_another_script_or_length_are_set_aside(tmp_path):
    run = load_script(ROOT / "benchmarks" / "run.py")

    def folders(total, sha256, fingerprint, *flags):
        """How many folders of runs there are once this script has started for so many steps."""
        args = run.Args(run_dir=tmp_path, total_timesteps=total)
        run.Job("a2c", "Hopper-v4", args, [*flags], sha256=sha256, fingerprint=fingerprint).set_other_runs_aside()
        assert (tmp_path / "a2c" / "Hopper-v4" / "started.json").exists()
        return len(list((tmp_path / "a2c").iterdir()))

    assert folders(640, "first", {"norm": 1.0}) == 1
    assert folders(640, "first", {"norm": 1.0}) == 1
    assert folders(640, "another text that computes the same", {"norm": 1.0}) == 1
    assert folders(640, "one that does not, by a little", {"norm": 1.0001}) == 2
    assert folders(640, "one that does not, by a little", None) == 2
    assert folders(640, "one of which that is not known", None) == 3
    assert folders(1280, "one of which that is not known", None) == 4
    # Runs with another flag, in the same folder, may see a change that these do not
    assert folders(1280, "third", {"norm": 2.0}) == 5
    assert folders(1280, "third", {"norm": 1.5}, "--baseline=mean") == 5
    assert folders(1280, "third", {"norm": 2.0}) == 5
    assert folders(1280, "fourth", {"norm": 2.0}) == 6
    assert folders(1280, "fifth", {"norm": 2.0}) == 6  # where there are none
    assert reading.SET_ASIDE in sorted(path.name for path in (tmp_path / "a2c").iterdir())[-1]


def test_a_result_is_replaced_whole_or_not_at_all(tmp_path):
    run = load_script(ROOT / "benchmarks" / "run.py")
    write_result(tmp_path / "Hopper-v4", [1.0, 2.0])
    before = {path: path.read_bytes() for path in (tmp_path / "Hopper-v4").iterdir()}
    with pytest.raises(TypeError):  # as a full disk would
        run.write_result(tmp_path / "Hopper-v4", [{"seed": 7}], {"no JSON": object()})
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_cell_that_cannot_be_started_or_is_done_by_now_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    run = load_script(ROOT / "benchmarks" / "run.py")
    args = run.Args(run_dir=tmp_path / "runs", results=tmp_path / "results")
    names = ("BigfishEasy-v0", "phys2d/CartPole-v1", "Hopper-v4", "Ant-v4")
    matrix = [run.Job("a2c", env_id, args, []) for env_id in names]
    assert matrix[1].runs == tmp_path / "runs" / "a2c" / "phys2d_CartPole-v1"
    started, looked_at = [], []

    class Launcher:
        slots = 1

        def start(self, job):
            if job.env_id == "Ant-v4":
                raise PermissionError("no place for its output")
            started.append(job.env_id)
            job.output.write_text("")

        def poll(self, job):
            return 2

    def is_complete(job):  # Hopper-v4 by another process, while the first ones ran here
        looked_at.append(job.env_id)
        return looked_at.count("Hopper-v4") == 2 and job.env_id == "Hopper-v4"

    monkeypatch.setattr(run, "is_complete", is_complete)
    monkeypatch.setattr(run, "fingerprint_or_none", lambda *_: None)
    (tmp_path / "runs" / "a2c").mkdir(parents=True)
    assert run.run_matrix(matrix, Launcher(), args) == 3
    assert started == ["BigfishEasy-v0", "phys2d/CartPole-v1"]
    assert "a2c on Ant-v4: cannot be started: no place for its output" in capsys.readouterr().out


def test_a_run_that_failed_is_not_gathered_whatever_it_has_left(tmp_path, monkeypatch, capsys):
    """A seed that diverged ends the run with status 1, its metrics complete."""
    run = load_script(ROOT / "benchmarks" / "run.py")
    args = run.Args(run_dir=tmp_path / "runs", results=tmp_path / "results")
    job = run.Job("a2c", "Hopper-v4", args, [])

    class Launcher:
        slots = 1

        def start(self, job):
            job.output.write_text("")

        def poll(self, job):
            return 1

        def how(self):
            return {}

    monkeypatch.setattr(run, "fingerprint_or_none", lambda *_: None)
    monkeypatch.setattr(run.Job, "folders", lambda self: [tmp_path])
    monkeypatch.setattr(run.Job, "steps", lambda self: 0)
    monkeypatch.setattr(run.Job, "gather", lambda *_: pytest.fail("gathered"))
    job.runs.mkdir(parents=True)
    assert run.run_matrix([job], Launcher(), args) == 1
    assert "a2c on Hopper-v4: failed with exit status 1" in capsys.readouterr().out


def test_only_the_same_command_is_complete(tmp_path):
    run = load_script(ROOT / "benchmarks" / "run.py")
    args = run.Args(results=tmp_path)
    job = run.Job("a2c", "Hopper-v4", args, ["--gamma", "0.9"])
    assert not run.is_complete(job)
    job.result.mkdir(parents=True)
    (job.result / "run.json").write_text(json.dumps({"command": f"python {' '.join(job.command)} --env-threads 1"}))
    assert run.is_complete(job)
    for same in ("--env_threads=3", "--device cpu --no-cuda-graphs --compile --checkpoint-seconds 9"):
        assert run.is_complete(run.Job("a2c", "Hopper-v4", args, [*same.split(), *job.extra])), same
    for others in ({"total_timesteps": 640}, {"seed": 1}, {"num_seeds": 3}):
        assert not run.is_complete(run.Job("a2c", "Hopper-v4", run.Args(results=tmp_path, **others), job.extra)), others
    for extra in ([], ["--gamma", "0.99"], [*job.extra, "--no-norm-adv"], [*job.extra, "--device-of-mine", "1"]):
        assert not run.is_complete(run.Job("a2c", "Hopper-v4", args, extra)), extra


def test_the_result_of_another_command_is_not_written_over(tmp_path, capsys):
    run = load_script(ROOT / "benchmarks" / "run.py")
    write_result(tmp_path / "a2c" / "Hopper-v4", [1.0, 2.0])
    before = {path: path.read_bytes() for path in (tmp_path / "a2c" / "Hopper-v4").iterdir()}
    args = run.Args(("a2c",), ("Ant-v4", "Hopper-v4"), seed=16, run_dir=tmp_path / "runs", results=tmp_path)
    assert run.main(args, []) == 2
    assert f"{tmp_path / 'a2c' / 'Hopper-v4'} is the result of another command" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "a2c" / "Hopper-v4").iterdir()} == before


@pytest.mark.parametrize("script", ["trpo", "sac"], indirect=True)
def test_the_discounted_return_of_an_agent(script, quick, tmp_path):
    """InvertedPendulum pays 1 a step, so the length of an episode gives both returns."""
    folders = [str(folder) for folder in script.train(script.Args(**quick, num_seeds=2))]
    words = [sys.executable, str(ROOT / "benchmarks" / "discounted.py"), *folders, "--episodes", "1"]
    for asked, gamma in (([], script.Args().gamma), (["--gamma", "0.9"], 0.9)):
        done = subprocess.run([*words, *asked], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows = list(csv.DictReader(done.stdout.splitlines()))
        assert [(row["seed"], row["global_step"], float(row["gamma"])) for row in rows] == [
            (str(seed), "640", gamma) for seed in (1, 2)
        ]
        lengths = np.array([float(row["length"]) for row in rows])
        assert lengths.min() > 1
        assert [float(row["return"]) for row in rows] == lengths.tolist()
        expected = (1 - gamma**lengths) / (1 - gamma)
        assert [float(row["discounted_return"]) for row in rows] == pytest.approx(expected.tolist(), abs=0.006)
    done = subprocess.run([*words[:2], str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"discounted.py: error: {tmp_path / 'none'}: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("algo", ["a2c", "ppo_continuous"])
def test_a_sampled_action_is_the_policys_own(algo):
    module, script = load_script(ROOT / "benchmarks" / "sampled.py"), load_script(ROOT / "algos" / f"{algo}.py")
    agent = script.Agent(WALKER[0], gymnasium.spaces.Box(-9, 9, (2,)), script.Args(num_seeds=2))
    agent.log_std.data.fill_(-2.0)
    obs = torch.ones(2, 5000, 5)
    with torch.no_grad():
        noise = (module.sampled_action(script, agent, obs) - agent.deterministic_action(obs)) / 9
    assert noise.std(1).flatten().tolist() == pytest.approx([np.exp(-2)] * 4, rel=0.05)
    assert noise.mean(1).abs().max() < 0.01


@pytest.fixture
def training(tmp_path):
    """A harness in the middle of a cell: its command, its process, and the id of the process that trains."""
    words = ["--env-ids", "InvertedPendulum-v4", "--num-seeds", "1", "--total-timesteps", "4000000"]
    command = run_command(tmp_path, *words)
    harness = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.time() + 300
        while not list((tmp_path / "runs").glob("*/*/*/checkpoint.pt")):
            assert time.time() < deadline
            time.sleep(0.1)
        (run,) = processes_of(tmp_path / "runs", "algos/ppo_continuous.py")
        yield command, harness, run
    finally:
        harness.kill()
        harness.wait()
        for left in processes_of(tmp_path / "runs", "algos/ppo_continuous.py"):
            os.kill(left, signal.SIGKILL)


def test_sigterm_ends_a_matrix_and_its_runs(tmp_path, training):
    _, harness, run = training
    harness.terminate()
    assert harness.wait(120) == 128 + signal.SIGTERM
    assert not os.path.exists(f"/proc/{run}")
    assert not list((tmp_path / "results").glob("*/*/run.json"))


def test_what_a_killed_harness_left_running_is_not_trained_twice(tmp_path, training):
    command, harness, run = training
    harness.kill()
    harness.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ppo_continuous on InvertedPendulum-v4: left out, another process trains it" in done.stdout
    assert processes_of(tmp_path / "runs", "algos/ppo_continuous.py") == [run]


def processes_of(run_dir, script):
    """Ids of the processes that run a script in a run folder below run_dir."""
    found = []
    for path in (path for path in os.scandir("/proc") if path.name.isdigit()):
        with contextlib.suppress(OSError):
            with open(f"{path.path}/cmdline") as file:
                words = file.read().split("\0")
            if len(words) > 1 and words[1].endswith(script) and any(word.startswith(str(run_dir)) for word in words):
                found.append(int(path.name))
    return found


def test_what_cannot_work_is_refused(tmp_path):
    for words in (["--algos", "nonsense"], ["--jobs", "0"]):
        done = subprocess.run(run_command(tmp_path, *words), capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("run.py: error: ")
    (tmp_path / "results").write_text("a file")
    done = subprocess.run(run_command(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("run.py: error: ")
    (tmp_path / "results").unlink()
    done = subprocess.run(run_command(tmp_path, extra=["--seed=1"]), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "run.py: error: seed is run.py's own: it goes before the --, or is set by it\n"
    others = (["--gamma", "0.9"], ["--env_kwargs", "max_episode_steps", "9"], ["--final-eval-episodes=1"])
    settings = [["--", *own] for own in others]
    for extra in (["--total-timesteps", "640"], ["--num-seeds", "3"], ["--seed", "2"], *settings):
        words = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--env-ids", "Pendulum-v1", *extra]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == (
            "run.py: error: the table there is of 1,000,000 steps, seeds 11 to 15, by default settings: "
            "give --results another folder\n"
        )
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray.py").write_text("raise ModuleNotFoundError('No module named ray', name='ray')")
    done = subprocess.run(
        run_command(tmp_path, "--launcher", "ray"), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "ray")},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "run.py: error: --launcher ray needs Ray, which is not installed: pip install ray\n"


@pytest.mark.slow
def test_ray_runs_a_matrix_and_survives_the_loss_of_a_worker(tmp_path, request):
    pytest.importorskip("ray")
    words = ["--launcher", "ray", "--job-cpus", "0.5", "--env-ids", "InvertedPendulum-v4", "NoSuchTask-v4"]
    words += ["--num-seeds", "2", "--total-timesteps", "12800"]
    process = subprocess.Popen(run_command(tmp_path, *words), stdout=subprocess.PIPE, text=True)
    request.addfinalizer(process.terminate)
    deadline = time.time() + 300
    while not list((tmp_path / "runs").glob("*/*/*/checkpoint.pt")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    folder = tmp_path / "runs" / "ppo_continuous" / "InvertedPendulum-v4"
    (run,) = processes_of(folder, "algos/ppo_continuous.py")
    with open(f"/proc/{run}/stat") as file:
        worker = int(file.read().rpartition(")")[2].split()[1])  # its parent
    with open(f"/proc/{worker}/comm") as file:
        assert file.read().startswith("ray::")
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "NoSuchTask-v4: failed with exit status 2" in output
    assert "there is no task 'NoSuchTask-v4'" in output
    assert not os.path.exists(f"/proc/{run}")
    # the second worker went on in the same folders
    assert len(list(folder.glob("*__*"))) == 2
    folder = tmp_path / "results" / "ppo_continuous" / "InvertedPendulum-v4"
    seeds = reading.read_result(folder)
    assert list(seeds) == [1, 2]
    assert seeds[2]["global_step"][-1] == 12800
    assert json.loads((folder / "run.json").read_text())["launcher"] == "ray"


def test_a_worker_without_the_project_runs_the_script_as_sent_and_returns_what_is_gathered(tmp_path):
    pytest.importorskip("ray")
    launcher = load_script(ROOT / "benchmarks" / "ray_launcher.py")
    script, runs = (ROOT / "algos" / "a2c.py").read_bytes(), tmp_path / "runs"
    words = ["--env-id", "InvertedPendulum-v4", "--total-timesteps", "1024", "--num-evaluations", "0"]
    words += ["--run-dir", str(runs), "--resume", "auto"]
    for steps in ("512", "1024", "1024"):  # the shorter run that is there is not gone on with, the same one is
        words[3] = steps
        arguments = script, tmp_path / "elsewhere" / "a2c.py", words, runs, steps.encode()
        status, files = launcher.train(*arguments)
        assert status == 0, files["output.txt"].decode()
    assert len(list(tmp_path.glob("runs.set-aside-*"))) == 1
    (config,) = runs.glob("*/config.json")
    assert [each["at_step"] for each in json.loads(config.read_text())["resumed"]] == [1024]
    assert sorted(name.rpartition("/")[2] for name in files) == ["config.json", "metrics.csv", "output.txt"]
    assert all((runs / name).read_bytes() == content for name, content in files.items())


def test_no_result_is_stale(script):
    """What report.py --check does as well: a script still computes what each of its committed results came from."""
    paths = sorted((ROOT / "benchmarks" / "results").glob(f"**/{script.__name__}/*/run.json"))
    assert paths
    now = {}
    for path in paths:
        meta = json.loads(path.read_text())
        key = fingerprint.circumstances(meta)
        now[key] = now.get(key) or fingerprint.fingerprint(ROOT / "algos" / f"{script.__name__}.py", *key)
        assert fingerprint.differences(meta["fingerprint"], now[key]) == [], path


def test_the_random_policy_is_as_committed():
    module = load_script(ROOT / "benchmarks" / "random_policy.py")
    with open(ROOT / "benchmarks" / "results" / "random.csv", newline="") as file:
        committed = {row["env_id"]: float(row["mean_return"]) for row in csv.DictReader(file)}
    for task in ("InvertedPendulum-v4", "Hopper-v4"):
        assert module.random_returns(task, 100, 1).mean() == pytest.approx(committed[task], abs=0.006)


@pytest.mark.parametrize(("algo", "start"), [("a2c", 0), ("sac", 4000)])
def test_a_run_counts_its_mean_rate_by_hand(algo, start, monkeypatch):
    """All seeds' steps, after a fifth of the rows; off-policy, of those in which it learns (after 4,000 steps)."""
    speed = load_script(ROOT / "benchmarks" / "speed.py")

    def run(words, **_):
        folder = Path(words[words.index("--run-dir") + 1]) / "X-v4__x__1__5"
        folder.mkdir()
        rows = [f"{start},0"] * (start > 0) + [f"{start + 100 * k},{k if k < 10 else 14}" for k in range(1, 11)]
        (folder / "metrics.csv").write_text("\n".join(["global_step,wall_seconds", *rows, ""]))

        seen.extend(words)

    seen = []
    monkeypatch.setattr(speed, "run_quietly", run)
    rate = speed.ours(algo, "X-v4", "cuda", 2, "--compile", "--torch-threads", "1")
    assert rate == pytest.approx(2 * 700 / 11)  # not the median interval's 200
    asked = {"--env-id": "X-v4", "--device": "cuda", "--num-seeds": "2", "--num-evaluations": "0"}
    for name, value in (asked | {"--torch-threads": "1"}).items():
        assert seen[seen.index(name) + 1] == value
    assert "--compile" in seen
    assert seen[seen.index("--learning-starts") + 1] == str(start) if start else "--learning-starts" not in seen


def test_the_simulator_alone_is_timed_with_a_thread_per_core(monkeypatch):
    speed = load_script(ROOT / "benchmarks" / "speed.py")
    now, made = [0.0], {}

    class Envs:
        single_action_space = gymnasium.spaces.Box(-1, 1, (2,))

        def __init__(self, *_, **how):
            made.update(how)

        def reset(self):
            now[0] += 100.0

        def step(self, actions):
            now[0] += len(actions) / 500

    monkeypatch.setattr(envpool, "make", Envs)
    monkeypatch.setattr(os, "cpu_count", lambda: 48)
    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    for envs, threads in ((64, 48), (16, 16)):
        assert speed.envpool_raw("X-v4", envs) == pytest.approx(500)
        assert (made["num_envs"], made["num_threads"]) == (envs, threads)


def test_ratios_of_measured_speeds_by_hand():
    speed, peer = load_script(ROOT / "benchmarks" / "speed.py"), "Stable-Baselines3, its defaults"
    rates = {"ppo_continuous, 1 seed": [40.0, 41.0, 2.0], "ppo_continuous, 8 seeds": [80.0], peer: [4.0]}
    rates |= {"EnvPool alone, 64 environments": [80.0], "EnvPool alone, 512 environments": [100.0]}
    found = speed.summary("ppo_continuous", speed.Args(), rates)
    assert found["steps_per_second"]["ppo_continuous, 1 seed"] == {"median": 40, "each": [40, 41, 2]}
    assert found["times_peer"] == {peer: {"1 seed": 10, "8 seeds": 20}}
    assert found["of_envpool"] == {"1 seed": 0.5, "8 seeds": 0.8}
    assert found["versions"]["torch"] == torch.__version__
    assert "CleanRL" not in found["versions"]
    rates = {f"sac, {speed.seeds_text(n)}": [10.0 + n] for n in (1, 4, 8)} | {speed.MATRIX: [1e12]}
    rates |= {f"EnvPool alone, {16 * n} environments": [100.0] for n in (1, 4, 8)}
    found = speed.summary("sac", speed.Args(), rates)
    one = speed.update_flop("sac", obs=17, actions=6) / 1e12  # of Walker2d-v4
    assert found["of_matrix_product"] == pytest.approx({"1 seed": 11 * one, "4 seeds": 14 * one, "8 seeds": 18 * one})


def test_a_fingerprint_outlives_a_comment_but_not_a_default(tmp_path):
    text = (ROOT / "algos" / "a2c.py").read_text()
    script = tmp_path / "a2c.py"
    script.write_text(text.replace("class Agent(", "# A comment that was not there.\nclass Agent("))
    recorded = fingerprint.fingerprint(script)
    assert fingerprint.differences(recorded, fingerprint.fingerprint(ROOT / "algos" / "a2c.py")) == []
    assert "learning_rate: float = 3e-3" in text
    script.write_text(text.replace("learning_rate: float = 3e-3", "learning_rate: float = 1e-3"))
    assert any("actor" in line for line in fingerprint.differences(recorded, fingerprint.fingerprint(script)))
    broken = text.replace("terminated.reshape(S, N)", "(terminated | truncated).reshape(S, N)")
    assert broken != text
    script.write_text(broken)  # no bootstrap where a time limit ends an episode
    assert any("actor" in line for line in fingerprint.differences(recorded, fingerprint.fingerprint(script)))
    assert fingerprint.differences({"a": 1.0, "b": 2.0}, {"a": 1.001, "c": 2.0}) == ["b is gone", "c is new"]
    script.write_text("print('broken'); raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="broken"):
        fingerprint.fingerprint(script)


def test_a_fingerprint_is_of_the_flags_that_a_result_was_trained_with():
    words = (
        "--env-id X-v1 --num-seeds=2 --env-kwargs healthy_reward -1 --baseline none --no_reward_to_go --torch-threads 1"
    )
    words += " --gamma=0.9 --save-replay"
    own = ("--baseline", "none", "--no-reward-to-go", "--gamma", "0.9")
    assert fingerprint.flags(words.split()) == own
    meta = {
        "command": f"python algos/reinforce.py {words}; python algos/reinforce.py --seed 2",
        "args": {"env_id": "X"},
    }
    assert fingerprint.circumstances(meta) == (False, own)
    assert fingerprint.is_discrete("CartPole-v1")
    script = ROOT / "algos" / "reinforce.py"
    default, discrete = fingerprint.fingerprint(script), fingerprint.fingerprint(script, True)
    whole = fingerprint.fingerprint(script, True, own[:3])
    assert "norm of log_std" in default.keys() - discrete.keys()
    assert fingerprint.differences(discrete, whole)


def test_a_fingerprint_is_added_only_where_the_script_is_the_same(tmp_path):
    digest = hashlib.sha256((ROOT / "algos" / "a2c.py").read_bytes()).hexdigest()
    for task, sha256 in (("Same-v4", digest), ("Other-v4", "0" * 64)):
        path = tmp_path / "results" / "a2c" / task / "run.json"
        path.parent.mkdir(parents=True)
        meta = {"command": "python algos/a2c.py as it was", "script_sha256": sha256, "args": {"env_id": task}}
        path.write_text(json.dumps(meta))
    done = subprocess.run(run_command(tmp_path, "--algos", "a2c", "--add-fingerprint"), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "a2c on Other-v4: refused, a2c.py has changed since\na2c on Same-v4: added\n"
    same = json.loads((tmp_path / "results" / "a2c" / "Same-v4" / "run.json").read_text())
    assert same["command"] == "python algos/a2c.py as it was"
    assert same["fingerprint"]["seed 2: steps"] == 4096
    assert "fingerprint" not in json.loads((tmp_path / "results" / "a2c" / "Other-v4" / "run.json").read_text())


def test_speed_knows_the_default_number_of_environments(script):
    speed = load_script(ROOT / "benchmarks" / "speed.py")
    assert speed.NUM_ENVS[script.__name__] == script.Args.num_envs


def test_a_peer_with_our_sizes_has_them():
    speed = load_script(ROOT / "benchmarks" / "speed.py")
    ppo, a2c, trpo = (load_script(ROOT / "algos" / f"{algo}.py").Args() for algo in ("ppo_continuous", "a2c", "trpo"))
    size, length = "Stable-Baselines3, our minibatch size", "Stable-Baselines3, our rollout length"
    peers = {algo: speed.measurements(algo, speed.Args()) for algo in ("ppo_continuous", "a2c", "trpo")}
    assert peers["ppo_continuous"][size].keywords == {"batch_size": ppo.minibatch_size}
    assert peers["a2c"][length].keywords == {"n_steps": a2c.num_steps}
    assert peers["trpo"]["sb3-contrib, our number of steps"].keywords == {
        "batch_size": trpo.minibatch_size, "n_critic_updates": trpo.value_epochs, "cg_max_steps": trpo.cg_iterations
    }  # fmt: skip


def test_an_off_policy_peer_is_timed_while_it_learns(monkeypatch):
    speed, now, learned = load_script(ROOT / "benchmarks" / "speed.py"), [0.0], []

    class Model:
        def __init__(self, *_, **how):
            assert how["learning_starts"] == 500

        def learn(self, steps, reset_num_timesteps=True):
            learned.append((steps, reset_num_timesteps))
            now[0] += steps / (50 if len(learned) > 1 else 9)

    monkeypatch.setattr(stable_baselines3, "SAC", Model)
    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    assert speed.sb3("sac", "X-v4") == pytest.approx(50)
    assert learned == [(1000, True), (2000, False)]


def test_what_is_measured_ends_with_the_measurement(tmp_path):
    """A time limit ends speed.py alone."""
    words = ["sh", "-c", f"echo $$ > {tmp_path}/pid.tmp; mv {tmp_path}/pid.tmp {tmp_path}/pid; exec sleep 100"]
    code = f"import sys; sys.path.append('benchmarks'); import speed; speed.run_quietly({words})"
    process, deadline = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT), time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    process.wait()
    state = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    with contextlib.suppress(OSError):  # it has ended
        while state.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_cannot_be_measured_leaves_the_other_algorithms(tmp_path, monkeypatch):
    speed = load_script(ROOT / "benchmarks" / "speed.py")

    def worker(words, **_):
        if "EnvPool alone" in words[words.index("--worker") + 1] and "a2c" in words:
            return subprocess.CompletedProcess(words, 1, "")
        if "sb3-contrib, its defaults" in words:
            return subprocess.CompletedProcess(words, 1, "")
        return subprocess.CompletedProcess(words, 0, "100.0")

    def run(words, **_):
        if "--worker" in words:
            return worker(words)
        seeds.append(words[words.index("--num-seeds") + 1])  # of parts.py
        return subprocess.CompletedProcess([], 1, "")

    measured, seeds = [], []
    monkeypatch.setattr(speed.subprocess, "run", run)
    monkeypatch.setattr(speed, "keep", lambda result, args: measured.append(result["algo"]))
    monkeypatch.setattr(speed, "versions", lambda args: {})
    with pytest.raises(SystemExit, match="not measured: a2c, trpo: sb3-contrib, its defaults, parts of trpo"):
        speed.main(speed.Args(algos=("a2c", "trpo"), repeats=1, output=tmp_path))
    assert measured == ["trpo"]
    assert seeds == ["1", "5", "8"]


def test_a_gpu_whose_time_is_up_leaves_what_was_measured(tmp_path, monkeypatch):
    speed = load_script(ROOT / "benchmarks" / "speed.py")

    def worker(words, **_):
        assert "--device cuda" in " ".join(words)
        if words[words.index("--worker") + 1].endswith("compiled"):
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(words, 0, "100.0")

    monkeypatch.setattr(speed.subprocess, "run", worker)
    monkeypatch.setattr(speed, "versions", lambda args: {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H")
    with pytest.raises(KeyboardInterrupt):
        speed.main(speed.Args(algos=("a2c",), repeats=1, device="cuda", peers=False, output=tmp_path))
    rates = json.loads((tmp_path / "a2c_cuda.json").read_text())["steps_per_second"]
    assert {"a2c, 1 seed", "a2c, 8 seeds", "a2c, 1 seed, eager", "a2c, 8 seeds, eager"} <= rates.keys()


@pytest.mark.parametrize("algo", ["sac", "ddpg"])
def test_operations_of_an_update_against_pytorchs_counter(algo):
    """The share of the machine's matrix product rests on this number."""
    speed, script = load_script(ROOT / "benchmarks" / "speed.py"), load_script(ROOT / "algos" / f"{algo}.py")
    everything = parts(script, script.Args(num_seeds=2, batch_size=8, hidden_size=16))
    with FlopCounterMode(display=False) as counter:
        script.update(*everything)
    assert counter.get_total_flops() == 2 * speed.update_flop(algo, obs=5, actions=2, rows=8, hidden=16)


def test_parts_of_training_are_timed():
    clock, defaults = load_script(ROOT / "benchmarks" / "parts.py"), load_script(ROOT / "algos" / "a2c.py").Args
    total = 2 * defaults.num_envs * defaults.num_steps
    found = clock.measure(clock.Args(algo="a2c", env_id="InvertedPendulum-v4", num_seeds=2, total_timesteps=total))
    calls = dict.fromkeys(("act", "simulator"), 2 * defaults.num_steps) | {"learn": 2}
    assert {name: part["calls"] for name, part in found.items()} == calls | {"training": 2 * total}
    assert all(0 < part["share"] <= 1 for part in found.values())
    assert sum(found[name]["share"] for name in calls) <= 1


def test_parts_of_training_off_policy_are_counted_from_the_first_update_on(monkeypatch):
    clock, script, now = load_script(ROOT / "benchmarks" / "parts.py"), types.SimpleNamespace(), [0.0]

    def take(seconds):
        now[0] += seconds

    def learn():
        take(3.0)

    def train(args):
        step, update = script.make_envs(args).step, script.capture(learn)
        for t in range(4):
            step(1.0)
            if t >= 2:
                update()

    script.Args = lambda **values: types.SimpleNamespace(num_envs=16, **values)
    script.capture, script.train = lambda function: function, train
    script.make_envs = lambda args: types.SimpleNamespace(step=take)
    monkeypatch.setattr(clock, "load", lambda algo: script)
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    found = clock.measure(clock.Args(algo="sac", num_seeds=2))  # 3 seconds, 1 and 3
    shares = {"learn": 6 / 7, "simulator": 1 / 7, "training": 1.0}
    assert {name: part["share"] for name, part in found.items()} == pytest.approx(shares)
    assert found["training"]["calls"] == 16 * 2


def write_result(folder, finals, steps=1000, noise_cost=0.0, first_seed=1, **args):
    """A gathered result of these final returns, as run.py and sampled.py leave it; sampled actions return noise_cost
    less, the last training episodes 1 less than that."""
    folder.mkdir(parents=True)
    lines = ["seed,global_step,wall_seconds,episodic_return,eval_return,steps_per_second,sampled_return"]
    for seed, final in enumerate(finals, first_seed):
        lines += [f"{seed},{steps * k // 10},1.0,{final * k / 10 - noise_cost - 1:.3f},,10," for k in range(1, 10)]
        lines += [f"{seed},{steps},1.0,{final - noise_cost - 1:.3f},{final:.3f},10,{final - noise_cost:.3f}"]
    (folder / "metrics.csv").write_text("\n".join([*lines, ""]))
    args = {"num_seeds": len(finals), "env_id": folder.name, "env_kwargs": {}, "exp_name": folder.parent.name} | args
    args = {"total_timesteps": 1_000_000, "seed": first_seed} | args
    meta = {"trained_timesteps": steps, "args": args, "versions": {"torch": "2.13.0"}}
    meta["command"] = f"python algos/{folder.parent.name}.py --env-id {folder.name} --seed {first_seed}"
    (folder / "run.json").write_text(json.dumps(meta))


def test_a_truncated_result_is_refused_by_name(tmp_path):
    folder = tmp_path / "cut"
    write_result(folder, [101.5, 99.0, 103.2])
    assert [columns["eval_return"][-1] for columns in reading.read_result(folder).values()] == [101.5, 99.0, 103.2]
    whole = (folder / "metrics.csv").read_text()
    for cut in (whole[: len(whole) // 2], whole[:-12], "\n".join(whole.splitlines()[:15])):
        (folder / "metrics.csv").write_text(cut)
        with pytest.raises(ValueError, match="cut: "):
            reading.read_result(folder)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("metrics.csv", "eval_return", "another"),
        ("metrics.csv", "global_step", "another"),
        ("metrics.csv", "seed,", "another,"),
        ("metrics.csv", "98.000,99.000", "98.000,"),
        ("metrics.csv", "98.000,99.000", "98.000,nan"),
        ("metrics.csv", "98.000,99.000", ",99.000"),
        ("metrics.csv", "98.000,99.000", "abc,99.000"),
        ("metrics.csv", "2,500,", "2,501,"),
        ("run.json", "trained_timesteps", "another"),
        ("metrics.csv", "\n3,", "\n4,"),
        ("metrics.csv", "\n3,", "\n,"),
        ("run.json", '"seed": 1', '"seed": 2'),
        ("run.json", "}", ""),
    ],
)
@pytest.mark.parametrize("place", ["a2c", "seeds_1_to_5/a2c"])
def test_a_broken_result_is_refused_by_name(file, old, new, place, tmp_path, capsys):
    report = load_script(ROOT / "benchmarks" / "report.py")
    folder = tmp_path / place / "Hopper-v4"
    write_result(folder, [101.5, 99.0, 103.2])
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    assert report.main(report.Args(results=tmp_path, check=True)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"report.py: error: {folder}: ")
    assert len(error.splitlines()) == 1


def test_seeds_of_several_processes_are_joined(tmp_path):
    join = load_script(ROOT / "benchmarks" / "join.py")
    for part, first_seed, finals in (("b", 1, [1.0, 2.0]), ("a", 3, [3.0])):
        write_result(tmp_path / part / "a2c" / "Hopper-v4", finals, first_seed=first_seed, env_threads=first_seed)
        path = tmp_path / part / "a2c" / "Hopper-v4" / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": {"norm": 1.0}, "git_commit": part}))
    parts = tmp_path / "a", tmp_path / "b"
    assert join.main(join.Args(parts, tmp_path / "joined")) == 0
    seeds = reading.read_result(tmp_path / "joined" / "a2c" / "Hopper-v4")
    assert [columns["eval_return"][-1] for columns in seeds.values()] == [1, 2, 3]
    meta = json.loads((tmp_path / "joined" / "a2c" / "Hopper-v4" / "run.json").read_text())
    assert meta["command"].count("--seed") == 2
    assert not reading.refilled(meta)
    assert [process["git_commit"] for process in meta["processes"]] == ["b", "a"]
    write_result(tmp_path / "d" / "a2c" / "Hopper-v4", [4.0], first_seed=4)  # joined to what was joined before
    more = tmp_path / "d" / "a2c" / "Hopper-v4" / "run.json"
    more.write_text(json.dumps(json.loads(more.read_text()) | {"fingerprint": {"norm": 1.0}, "git_commit": "d"}))
    meta, _ = join.join([tmp_path / part / "a2c" / "Hopper-v4" for part in ("joined", "d")])
    assert [process["git_commit"] for process in meta["processes"]] == ["b", "a", "d"]
    assert meta["command"].count("--seed") == 3
    whole = path.read_text()
    for part in parts:
        cell = part / "a2c" / "Hopper-v4" / "run.json"
        own = json.loads(cell.read_text()) | ({"resumed": [{"at_step": 500}]} if part == parts[0] else {})
        cell.write_text(json.dumps(own | {"args": own["args"] | {"save_replay": False}}))
    meta, _ = join.join([part / "a2c" / "Hopper-v4" for part in parts])
    assert reading.refilled(meta)
    for part in parts:
        cell = part / "a2c" / "Hopper-v4" / "run.json"
        own = json.loads(cell.read_text())
        del own["args"]["save_replay"]
        cell.write_text(json.dumps(own))
    for old, new, complaint in (
        ("2.13.0", "2.12.0", "differs from .* in versions"),
        ('"norm": 1.0', '"norm": 2.0', "computes something else .*: norm was 1"),
        ('"env_kwargs": {}', '"env_kwargs": {"healthy_reward": "0"}', "differs from .* in env_kwargs"),
        ('"num_seeds": 1', '"num_seeds": 2', r"its seeds are \[3\], not 2 from 3 on"),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(ValueError, match=complaint):
            join.join([part / "a2c" / "Hopper-v4" for part in parts])
    with pytest.raises(ValueError, match=r"the seeds are \[1, 2, 1, 2\]"):
        join.join([tmp_path / "b" / "a2c" / "Hopper-v4"] * 2)
    write_result(tmp_path / "c" / "a2c" / "Hopper-v4", [4.0], first_seed=4)
    path = tmp_path / "c" / "a2c" / "Hopper-v4" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": {"norm": 1.0}}))
    with pytest.raises(ValueError, match=r"the seeds are \[1, 2, 4\]"):
        join.join([tmp_path / part / "a2c" / "Hopper-v4" for part in "bc"])


def test_a_table_of_several_settings_is_refused_and_what_is_missing_named(tmp_path):
    report = load_script(ROOT / "benchmarks" / "report.py")
    for task, gamma in (("Ant-v4", 0.99), ("Hopper-v4", 0.9)):
        write_result(tmp_path / "a2c" / task, [1.0, 2.0], gamma=gamma, env_threads=int(100 * gamma))
    (tmp_path / "sac" / "Ant-v4").mkdir(parents=True)
    words = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--results", str(tmp_path)]
    done = subprocess.run([*words, "--check", "--no-fingerprints"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "report.py: error: a2c on Hopper-v4 was trained with another gamma than on Ant-v4\n"
    path = tmp_path / "a2c" / "Hopper-v4" / "run.json"
    path.write_text(path.read_text().replace('"gamma": 0.9,', '"gamma": 0.99,'))
    done = subprocess.run([*words, "--check", "--no-fingerprints"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith(f"left out, because nothing is gathered yet: {tmp_path / 'sac' / 'Ant-v4'}\n")
    with pytest.raises(ValueError, match="a2c on Hopper-v4 was trained with another seed than on Ant-v4"):
        report.one_set_of_defaults("a2c", {"Ant-v4": {"seed": 11}, "Hopper-v4": {"seed": 1}})


def test_a_result_that_learned_nothing_while_its_replay_was_refilled_is_named(tmp_path):
    for task, kept in (("Ant-v4", True), ("Hopper-v4", False)):
        write_result(tmp_path / "shorter" / "sac" / task, [1.0, 2.0], save_replay=kept)
        path = tmp_path / "shorter" / "sac" / task / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"resumed": [{"at_step": 500}]}))
    words = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check", "--no-fingerprints"]
    done = subprocess.run([*words, "--results", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    complaint = "resumed without its replay, so it learned less than its steps say: "
    assert [line for line in done.stdout.splitlines() if "replay" in line] == [f"{complaint}{path.parent}"]


def test_a_table_of_other_lengths_is_refused(tmp_path):
    write_result(tmp_path / "a2c" / "Hopper-v4", [101.5, 99.0], total_timesteps=4096)
    words = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check", "--results"]
    done = subprocess.run([*words, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is of 4,096 steps, the table of 1,000,000" in done.stderr
    done = subprocess.run([*words, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"report.py: error: {tmp_path / 'nowhere'} is no folder\n"


def test_the_curve_against_the_clock_is_steps_over_the_measured_rate(tmp_path, monkeypatch):
    report = load_script(ROOT / "benchmarks" / "report.py")
    monkeypatch.setattr(report, "png", lambda figure: [line.get_xdata() for line in figure.axes[0].lines])
    results = {}
    for algo, rate in (("ppo_continuous", 10), ("trpo", 20), ("sac", 1)):
        if algo != "sac":  # which has been timed and has no curve
            write_result(tmp_path / algo / "Task-v4", [1.0, 2.0, 3.0])
            results[algo] = {"Task-v4": reading.read_result(tmp_path / algo / "Task-v4")}
        rates = {"EnvPool alone, 64 environments": {"median": 40}, f"{algo}, 1 seed": {"median": rate}}
        (tmp_path / f"{algo}.json").write_text(json.dumps({"env_id": "Task-v4", "steps_per_second": rates}))
    minutes = [x[-1] for x in report.clock(results, tmp_path)]
    assert minutes == pytest.approx([1000 / 10 / 60, 1000 / 20 / 60])
