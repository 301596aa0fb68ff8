"""Whole runs, as a user starts them: files, resume, signals, divergence, bad input, a task of one's own."""

import csv
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLUMNS = ["global_step", "wall_seconds", "episodic_return", "eval_return", "steps_per_second"]


def command(script, quick, **changes):
    words = [sys.executable, script.__file__]
    for name, value in (quick | changes).items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def read_metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    return rows


def without_clock(folder):
    return [[row[name] for name in ("global_step", "episodic_return", "eval_return")] for row in read_metrics(folder)]


def test_a_run_leaves_its_files(script, quick):
    args = script.Args(num_seeds=2, **quick)
    folders = script.train(args)
    head = subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    stamp = folders[0].name.rpartition("__")[2]
    assert [f.name for f in folders] == [f"InvertedPendulum-v4__{script.__name__}__{k}__{stamp}" for k in (1, 2)]
    for k, folder in enumerate(folders):
        config = json.loads((folder / "config.json").read_text())
        assert config["args"]["seed"] == 1 + k
        assert config["args"]["num_seeds"] == 2
        assert config["trained_timesteps"] == args.trained_timesteps
        assert (config["git_commit"] or "").removesuffix("-dirty") == head  # None without a repository
        assert {"python", "torch", "envpool", "gymnasium", "numpy"} <= set(config["versions"])
        assert config["hardware"]["cores"] == os.cpu_count()
        rows = read_metrics(folder)
        assert int(rows[-1]["global_step"]) == config["trained_timesteps"]
        assert 10 <= len(rows) <= 100  # each of the ten iterations, or every hundredth of the run
        assert len(rows) == 100 or script.__name__ not in ("ddpg", "sac")
        assert [row["eval_return"] != "" for row in rows].count(True) == 2
        assert rows[-1]["eval_return"] != ""
        seconds = [float(row["wall_seconds"]) for row in rows]
        assert seconds == sorted(seconds)
        events = EventAccumulator(str(folder)).Reload()
        tags = set(events.Tags()["scalars"])
        assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/episodic_return"} <= tags
        assert any(tag.startswith("losses/") for tag in tags)
        assert len(events.Scalars("charts/SPS")) == len(rows)
        assert (folder / "agent.pt").exists()
    assert (folders[0] / "checkpoint.pt").exists()
    assert not (folders[1] / "checkpoint.pt").exists()
    assert not list(folders[0].parent.rglob("*.tmp"))


def test_same_seed_same_numbers(script, quick):
    """Bit for bit, all that training changes."""
    from test_cuda import final_state  # which imports from here

    if hasattr(script.Args, "buffer_size"):
        quick["save_replay"] = True
    runs = [script.train(script.Args(num_seeds=2, **quick | {"env_threads": 1 + i})) for i in range(2)]
    for first, second in zip(*runs, strict=True):
        assert without_clock(first) == without_clock(second)
    states = [final_state(folders) for folders in runs]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert without_clock(runs[0][0]) != without_clock(runs[0][1])


def test_agent_file_acts_as_the_trained_agent_did(script, quick, capsys):
    """`--evaluate` repeats the run's last evaluation, and so does who loads the file."""
    quick |= {"total_timesteps": 650, "final_eval_episodes": 20}  # of the steps 640 are run
    args = script.Args(num_seeds=2, **quick)
    folders = script.train(args)
    final = [float(read_metrics(folder)[-1]["eval_return"]) for folder in folders]
    for k, folder in enumerate(folders):
        saved = torch.load(folder / "agent.pt", weights_only=True)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in saved["agent"].values())  # no other seed's
        own = script.Args(**saved["args"])
        envs = script.make_envs(own, [0])
        agent = script.Agent(envs.single_observation_space, envs.single_action_space, own)
        agent.load_state_dict(saved["agent"])
        again = script.evaluate(agent, own, 20, saved["global_step"])
        assert again["return"].mean() == pytest.approx(final[k], abs=1e-3)
        capsys.readouterr()
        script.evaluate_saved(script.Args(evaluate=str(folder), final_eval_episodes=20, env_id=args.env_id))
        name, mean, _, std = capsys.readouterr().out.splitlines()[1].split()
        assert name == "return"
        assert (float(mean), float(std)) == pytest.approx((final[k], again["return"].std()), rel=1e-3)
        with open(folder / "evaluation.csv", newline="") as file:
            returns = [float(row["return"]) for row in csv.DictReader(file)]
        assert returns == pytest.approx(again["return"][0], abs=1e-3)
    shutil.rmtree(folders[1])
    resume = script.Args(num_seeds=2, **quick | {"resume": str(folders[0])})
    assert f"{folders[1].name}/config.json cannot be written" in refusal(capsys, lambda: script.train(resume))


@pytest.mark.parametrize("script", ["a2c", "sac"], indirect=True)
def test_an_agent_is_evaluated_by_a_script_whose_arguments_have_changed(script, quick, capsys):
    (folder,) = script.train(script.Args(**quick))
    saved = torch.load(folder / "agent.pt", weights_only=True)
    saved["args"]["my_weight"] = 0.5
    del saved["args"]["checkpoint_seconds"]
    saved["args"]["device"] = "cuda"
    torch.save(saved, folder / "agent.pt")
    capsys.readouterr()
    machine = {"device": "cpu", "env_threads": 1, "torch_threads": 2}
    script.evaluate_saved(script.Args(evaluate=str(folder), final_eval_episodes=2, **machine))
    assert "squared_action" in capsys.readouterr().out


def test_what_a_task_does_not_have_is_not_evaluated(a2c, quick, capsys):
    """A numbered action has no square, CartPole-v1 no velocity."""
    (folder,) = a2c.train(a2c.Args(**quick | {"env_id": "CartPole-v1"}))
    capsys.readouterr()
    a2c.evaluate_saved(a2c.Args(evaluate=str(folder), final_eval_episodes=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "CartPole-v1, 2 episodes, mean and standard deviation:"
    assert [line.split()[0] for line in lines[1:]] == ["return", "length"]


@pytest.mark.parametrize("changed", [{"env_id": "Hopper-v4"}, {"seed": 7}, {"gamma": 0.5}, {"num_seeds": 2}])
def test_what_an_evaluation_would_ignore_is_refused(script, quick, capsys, changed):
    (folder,) = script.train(script.Args(**quick))
    ((name, value),) = changed.items()
    message = refusal(capsys, lambda: script.evaluate_saved(script.Args(evaluate=str(folder), **changed)))
    assert f"{name} = {value} has no effect on --evaluate" in message
    assert not (folder / "evaluation.csv").exists()


def test_threads_are_as_many_as_the_cores_that_the_process_may_use(script, monkeypatch):
    monkeypatch.setattr(script.os, "sched_getaffinity", lambda _: {5}, raising=False)
    seen, make = [], script.envpool.make
    monkeypatch.setattr(script.envpool, "make", lambda *words, **rest: seen.append(rest) or make(*words, **rest))
    torch.set_num_threads(3)
    args = script.Args(env_threads=0, torch_threads=0, device="cpu")
    script.make_envs(args, [1, 2, 3]).close()
    script.select_device(args)
    assert (seen[0]["num_threads"], torch.get_num_threads()) == (1, 1)
    script.make_envs(script.Args(env_threads=2), [1, 2, 3]).close()
    script.select_device(script.Args(torch_threads=2, device="cpu"))
    assert (seen[1]["num_threads"], torch.get_num_threads()) == (2, 2)


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 1), ("300000 100000", 3), ("50000 100000", 1), ("max 100000", 8), (None, 8)]
)
def test_a_containers_quota_counts(script, quota, cores, monkeypatch):
    def read_text(path):
        assert str(path) == "/sys/fs/cgroup/cpu.max"
        if quota is None:
            raise FileNotFoundError
        return quota + "\n"

    monkeypatch.setattr(script.os, "sched_getaffinity", lambda _: {*range(8)}, raising=False)
    monkeypatch.setattr(script, "Path", lambda path: types.SimpleNamespace(read_text=lambda: read_text(path)))
    assert script.usable_cores() == cores


def test_the_newest_run_of_a_command_is_gone_on_with(script, quick, monkeypatch):
    runs = []
    for now in (1e9, 1e9 + 5):
        monkeypatch.setattr(script.time, "time", lambda now=now: now)
        runs += script.train(script.Args(**quick))
    shutil.copytree(runs[1], f"{runs[1]}_old")  # a backup is not a newer run
    assert script.find_checkpoint(script.Args(**quick | {"resume": "auto"}))[0] == runs[1:]
    assert script.find_checkpoint(script.Args(**quick | {"resume": "auto", "gamma": 0.5})) == ([], None)
    script.train(script.Args(**quick | {"gamma": 0.5}))  # newer, of another command
    assert script.find_checkpoint(script.Args(**quick | {"resume": "auto"}))[0] == runs[1:]
    args = script.Args(**quick | {"env_id": "my/Task-v0", "resume": "auto"})  # as Gymnasium names a package's tasks
    folders = script.claim_folders(args)
    content = {"args": dataclasses.asdict(args), "folders": [folder.name for folder in folders]}
    script.save(folders[0] / "checkpoint.pt", "checkpoint", **content)
    assert script.find_checkpoint(args)[0] == folders


def test_checkpoints_are_no_more_frequent_than_asked_for(script, quick, monkeypatch):
    """By a clock that ticks whenever it is looked at: one after 60 % of the run, and the last one."""
    saved, save_run, ticks = [], script.save_run, itertools.count()
    monkeypatch.setattr(script.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(script, "save_run", lambda *parts: saved.append(parts[-1]) or save_run(*parts))
    script.train(script.Args(**quick | {"checkpoint_seconds": 1e9, "num_evaluations": 0}))
    looks, saved[:] = next(ticks), []
    script.train(script.Args(**quick | {"checkpoint_seconds": looks * 0.6, "num_evaluations": 0, "seed": 2}))
    assert len(saved) == 2
    assert saved[-1] == 640


def test_resuming_continues_where_the_run_was_killed(script, quick, capsys):
    longer = quick | {"total_timesteps": 64 * 4000, "checkpoint_seconds": 0.2, "num_evaluations": 0}
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen(command(script, longer, num_seeds=2), stdout=nothing, stderr=nothing)
    run_dir = Path(quick["run_dir"])
    deadline = time.time() + 120
    while not (len(list(run_dir.glob("*/metrics.csv"))) == 2 and list(run_dir.glob("*__1__*/checkpoint.pt"))):
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.1)
    time.sleep(1.0)
    args, others = script.Args(num_seeds=2, **longer | {"resume": "auto"}), f"another process trains in {run_dir}"
    assert others in refusal(capsys, lambda: script.train(args))
    process.kill()
    found = list(run_dir.glob("*__1__*/checkpoint.pt"))
    process.wait()
    before = torch.load(found[0], weights_only=True)
    assert 0 < before["global_step"] < longer["total_timesteps"]
    # the same command with `--resume auto` finds it; shortened is refused, so that the test need not run it all
    folders, saved = script.find_checkpoint(args)
    assert folders[0] == found[0].parent
    assert saved["global_step"] == before["global_step"]
    process = subprocess.Popen(command(script, longer, num_seeds=2, resume="auto"))
    while torch.load(found[0], weights_only=True)["global_step"] == before["global_step"]:
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.1)
    assert others in refusal(capsys, lambda: script.train(args))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    after = torch.load(found[0], weights_only=True)
    assert after["global_step"] > before["global_step"]
    assert after["seconds"] > before["seconds"]
    assert after["rows"][1][: len(before["rows"][1])] == before["rows"][1]
    for name, tensor in after["state"].items():
        if name.endswith(("count", ".step")):
            assert (tensor > before["state"][name]).all(), name
    folders = sorted(run_dir.iterdir())
    assert len(folders) == 2  # no second set of folders
    steps = [int(row["global_step"]) for row in read_metrics(folders[1])]
    assert steps == sorted(set(steps))
    config = json.loads((folders[1] / "config.json").read_text())
    (resumed,) = config["resumed"]
    assert resumed["at_step"] == before["global_step"]
    assert resumed["before"] == {name: value for name, value in config.items() if name not in ("args", "resumed")}
    assert {"trained_timesteps", "versions", "hardware", "git_commit", "script_sha256"} == {*resumed["before"]}
    assert len(folders[1].name.split("__")) == 4


def test_resume_restores_all_that_training_changes(script, quick, monkeypatch):
    """Optimisers' moments, targets, replay and all, not the agent alone."""
    if hasattr(script.Args, "save_replay"):
        quick |= {"save_replay": True}
    first = script.train(script.Args(**quick))
    saved = torch.load(first[0] / "checkpoint.pt", weights_only=True)
    recent = np.mean(saved["episodes"][0], axis=0)[0]
    assert read_metrics(first[0])[-1]["episodic_return"] == f"{recent:.8g}"
    more = script.train(script.Args(**quick | {"resume": str(first[0] / "checkpoint.pt")}))  # nothing is left to do
    assert more == first
    given, capture = {}, script.capture

    def watched(function, state, *rest):  # before training goes on
        given.update({name: tensor.clone() for name, tensor in state.items()})
        return capture(function, state, *rest)

    monkeypatch.setattr(script, "capture", watched)
    longer = script.train(script.Args(**quick | {"resume": "auto", "total_timesteps": 960}))
    assert longer == first
    assert (
        int(read_metrics(first[0])[-1]["global_step"])
        == script.Args(**quick | {"total_timesteps": 960}).trained_timesteps
    )
    after = torch.load(first[0] / "checkpoint.pt", weights_only=True)["state"]
    rows = {"replay.rows"} & saved["state"].keys()  # no graph changes them before there is something to store
    assert saved["state"].keys() - rows <= given.keys()
    for name, tensor in saved["state"].items():
        if name not in rows:
            assert torch.equal(tensor, given[name]), name
    for name in rows:
        stored = int(saved["state"]["replay.count"])
        assert torch.equal(saved["state"][name][:, :stored], after[name][:, :stored])
    moved = [name for name, tensor in saved["state"].items() if not torch.equal(tensor, after[name])]
    assert {"exp_avg", "step"} <= {name.rpartition(".")[2] for name in moved}
    fresh = script.train(script.Args(**quick | {"resume": "auto", "seed": 9}))
    assert fresh != first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(script, quick, number):
    endless = quick | {"total_timesteps": 10**8, "checkpoint_seconds": 1000, "num_evaluations": 0}
    process = subprocess.Popen(command(script, endless), stdout=subprocess.PIPE, text=True)
    assert "InvertedPendulum-v4" in process.stdout.readline()
    time.sleep(1.5)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    (folder,) = Path(quick["run_dir"]).iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] > 0
    assert (folder / "agent.pt").exists()


def test_two_signals_are_one_wish(script):
    """A scheduler tells the whole group to end, and then the group's parent tells its children."""
    before = signal.getsignal(signal.SIGTERM)
    with script.catch_signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a third one ends the process
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL  # the first of its own kind
        assert signals == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_worker_ends_when_its_parent_says_so(script):
    """Else the parent, AsyncVectorEnv's say, would wait for it for ever."""
    with script.catch_signals() as signals:
        if (worker := os.fork()) == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 128 + signal.SIGTERM
    assert signals == []


class Reach(gymnasium.Env):
    """A task of one's own: push a point on a line to the origin. With `poison`, rewards turn NaN after 40 steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-3, 3, (1,), np.float64)

    def __init__(self, poison=False, action_space=action_space, scale=1.0):
        self.poison, self.steps, self.action_space, self.scale = poison, 0, action_space, scale

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-2, 2), 0
        return np.array([self.x]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.x += 0.2 * float(action.flat[-1])
        self.t, self.steps = self.t + 1, self.steps + 1
        reward = float("nan") if self.poison and self.steps > 40 else -self.scale * self.x**2
        return np.array([self.x]), reward, abs(self.x) > 8, self.t >= 20, {}


def reach_envs(poisoned=(), autoreset_mode="NextStep", **settings):
    def make_envs(args, env_seeds, render_mode=None):
        per_seed = len(env_seeds) // args.num_seeds
        envs = gymnasium.vector.SyncVectorEnv(
            [lambda i=i: Reach(i // per_seed in poisoned, **settings) for i in range(len(env_seeds))],
            autoreset_mode=autoreset_mode,
        )
        envs.reset(seed=env_seeds)
        return envs

    return make_envs


def test_a_task_of_ones_own_trains(script, quick, monkeypatch):
    monkeypatch.setattr(script, "make_envs", reach_envs())
    total = {"sac": 4096, "ddpg": 4096}.get(script.__name__, 16384)  # these learn from each step many times
    args = script.Args(**quick | {"env_id": "Reach", "num_envs": 8, "total_timesteps": total, "learning_rate": 3e-3})
    (folder,) = script.train(args)
    rows = read_metrics(folder)
    assert float(rows[-1]["eval_return"]) > -8  # standing still is worth -27 on average, going straight about -3


def test_small_rewards_are_not_rounded_away(a2c, quick, monkeypatch, capsys):
    monkeypatch.setattr(a2c, "make_envs", reach_envs(scale=1e-7))
    (folder,) = a2c.train(a2c.Args(**quick | {"env_id": "Reach"}))
    assert -1e-3 < float(read_metrics(folder)[-1]["eval_return"]) < 0
    assert -1e-3 < float(capsys.readouterr().out.split()[-1].rstrip(")")) < 0


@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.Box(-0.1, 0.1, (2, 3), np.float64),  # float32 would round 0.1 up, out of the bounds
        gymnasium.spaces.Box(-2, 3, (2,), np.int64),
        gymnasium.spaces.Box(np.array([0.0, -1.0]), np.array([0.0, 1.0]), dtype=np.float64),  # one that cannot move
    ],
    ids=["rounded", "integer", "fixed"],
)
def test_actions_are_of_the_tasks_own_kind(script, space, quick, monkeypatch, capsys):
    monkeypatch.setattr(script, "make_envs", reach_envs(action_space=space))  # asserts that its space has them
    args = script.Args(**quick | {"env_id": "Reach"})
    if script.__name__ in ("sac", "ddpg") and (space.high == space.low).any():
        with pytest.raises(SystemExit):
            script.train(args)
        assert "no finite range" in capsys.readouterr().err
    else:
        (folder,) = script.train(args)
        assert np.isfinite(float(read_metrics(folder)[-1]["eval_return"]))


@pytest.mark.parametrize("mode", ["SameStep", "Disabled", None])
def test_another_autoreset_is_refused(script, mode, quick, monkeypatch, capsys):
    def make_envs(*inputs):
        envs = reach_envs(autoreset_mode=mode or "NextStep")(*inputs)
        envs.metadata = envs.metadata if mode else {}  # of one that does not say how it resets
        return envs

    monkeypatch.setattr(script, "make_envs", make_envs)
    error = refusal(capsys, lambda: script.train(script.Args(**quick | {"env_id": "Reach"})))
    assert f"Reach resets in the mode {mode} (its metadata's autoreset_mode); this script takes NextStep" in error


def test_arguments_of_ones_own(script, quick, monkeypatch):
    """What a user adds to Args is not known to check_ranges: a number that is negative by default may be so."""
    fields = [("penalty", float, -1.0), ("offset", int, -2), ("warmup", int, 0), ("weight", float, 0.5)]
    fields += [("large", int, 2**21), ("sizes", tuple[int, ...], (64, 64))]
    own = dataclasses.make_dataclass("Args", fields, bases=(script.Args,))
    own.__annotations__ |= script.Args.__annotations__
    monkeypatch.setattr(script, "Args", own)
    for name, value in (("penalty", -7.0), ("penalty", 3.0), ("offset", -9), ("warmup", 0)):
        assert getattr(own(**{name: value}), name) == value
    for name, value in (("weight", -0.1), ("warmup", -1), ("num_envs", 0), ("penalty", float("nan"))):
        with pytest.raises(SystemExit):
            own(**{name: value})
    (folder,) = script.train(own(**quick))
    assert script.find_checkpoint(own(**quick | {"resume": "auto"}))[0] == [folder.resolve()]


def test_what_a_sweep_in_numpy_leaves_can_be_read(script, quick):
    """weights_only lets in no NumPy scalar, JSON no NumPy integer; out of range is out of range all the same."""
    args = quick | {"learning_rate": np.float64(1e-3), "num_envs": np.int64(4), "seed": np.int32(3)}
    (folder,) = script.train(script.Args(**args))
    script.evaluate_saved(script.Args(evaluate=str(folder), device="cpu", final_eval_episodes=2))
    folders, saved = script.find_checkpoint(script.Args(**args | {"resume": "auto"}))
    assert (folders, saved["args"]["learning_rate"]) == ([folder.resolve()], 1e-3)
    for name, value in (("gamma", np.float64("nan")), ("num_envs", np.int64(0))):
        with pytest.raises(SystemExit):
            script.Args(**{name: value})


@pytest.mark.parametrize("script", ["a2c"], indirect=True)
def test_a_copy_of_several_seeds_is_not_resumed_over_the_others(script, quick, capsys):
    folders = script.train(script.Args(num_seeds=2, **quick))
    capsys.readouterr()
    for folder in folders:
        shutil.copytree(folder, folder.with_name(folder.name[:-3] + "_copy"))
    copied = str(folders[0].with_name(folders[0].name[:-3] + "_copy"))
    again = script.Args(num_seeds=2, **quick | {"resume": copied})
    assert f"was {folders[0].name}" in refusal(capsys, lambda: script.find_checkpoint(again))
    again.resume = str(folders[0])
    assert script.find_checkpoint(again)[0] == [folder.resolve() for folder in folders]
    moved = Path(quick["run_dir"]).with_name("moved")  # a backup of all, which goes on beside the original
    shutil.copytree(quick["run_dir"], moved)
    again.resume = str(moved / folders[0].name)
    assert script.find_checkpoint(again)[0] == [moved.resolve() / folder.name for folder in folders]


@pytest.mark.parametrize("script", ["a2c"], indirect=True)
def test_training_goes_on_where_nobody_reads_its_output(script, quick):
    words, unbuffered = command(script, quick, num_evaluations=3), os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=unbuffered)
    assert "steps of" in process.stdout.readline() + process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    (folder,) = Path(quick["run_dir"]).iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == quick["total_timesteps"]


def test_a_whole_number_will_do_for_a_real_one(script):
    args = script.Args(gamma=0, learning_rate=1, checkpoint_seconds=0)
    assert (args.gamma, args.checkpoint_seconds) == (0, 0)


@pytest.mark.parametrize("script", ["a2c", "sac"], indirect=True)
def test_the_readme_loads_an_agent_and_acts(script, quick):
    algo, task = script.__name__, {"a2c": "CartPole-v1", "sac": "Pendulum-v1"}[script.__name__]
    (folder,) = script.train(script.Args(**quick | {"env_id": task}))
    text = (ROOT / "README.md").read_text().partition("**Load an agent and act**")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    for there, here in {"ppo_continuous": algo, "Walker2d-v4": task, "runs/RUN_FOLDER": str(folder)}.items():
        assert there in code
        code = code.replace(there, here)
    done = subprocess.run([sys.executable, "-c", code + "print(done)"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("True\n")


@pytest.mark.parametrize("script", ["ppo_continuous", "ddpg"], indirect=True)
def test_the_readme_trains_on_a_reward_of_ones_own(script, quick, monkeypatch):
    """Its wrapper charges 0.1 times the action's absolute value; the env_id is Gymnasium's own task."""
    text = (ROOT / "README.md").read_text().partition("replace `make_envs`")[2]
    scope = {"gymnasium": gymnasium, "np": np}
    exec(text.partition("```python\n")[2].partition("```")[0], scope)
    envs = scope["make_envs"](script.Args(env_id="InvertedPendulum-v4"), [1, 2])
    envs.reset()
    assert envs.step(np.array([[0.5], [0.0]], np.float32))[1].tolist() == pytest.approx([0.95, 1.0])
    monkeypatch.setattr(script, "make_envs", scope["make_envs"])
    (folder,) = script.train(script.Args(**quick | {"env_id": "InvertedPendulum-v4"}))
    assert read_metrics(folder)[-1]["eval_return"]


def test_a_seed_that_diverges_is_named_and_the_others_go_on(script, quick, monkeypatch, capsys):
    monkeypatch.setattr(script, "make_envs", reach_envs(poisoned=(1,)))
    args = script.Args(num_seeds=3, **quick | {"env_id": "Reach", "checkpoint_seconds": 0.0})
    with pytest.raises(SystemExit) as stop:
        script.train(args)
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "diverged" in printed
    assert "diverged: seeds 2;" in printed
    folders = sorted(Path(quick["run_dir"]).iterdir())
    for k, folder in enumerate(folders):
        agent = torch.load(folder / "agent.pt", weights_only=True)["agent"]  # of seed 2, the last good one
        assert all(tensor.isfinite().all() for tensor in agent.values()), k
        assert (read_metrics(folder)[-1]["eval_return"] != "") == (k != 1)  # zero actions are no result
    with pytest.raises(SystemExit) as stop:  # complete, and still not a success
        script.train(
            script.Args(num_seeds=3, **quick | {"env_id": "Reach", "checkpoint_seconds": 0.0, "resume": "auto"})
        )
    assert stop.value.code == 1
    assert read_metrics(folders[0])[-1]["global_step"] == "640"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:  # seen by the last checkpoint alone
        script.train(script.Args(num_seeds=3, **quick | {"env_id": "Reach", "seed": 9}))
    assert stop.value.code == 1
    assert "diverged: seeds 10;" in capsys.readouterr().out


def test_all_seeds_diverged_keeps_the_last_good_checkpoint(script, quick, monkeypatch):
    monkeypatch.setattr(script, "make_envs", reach_envs(poisoned=(0,)))
    with pytest.raises(SystemExit) as stop:
        script.train(script.Args(**quick | {"env_id": "Reach", "checkpoint_seconds": 0.0, "num_evaluations": 0}))
    assert stop.value.code == 1
    (folder,) = Path(quick["run_dir"]).iterdir()
    assert int(read_metrics(folder)[-1]["global_step"]) < 640  # nothing is left to train
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] < 640
    assert all(tensor.isfinite().all() for tensor in saved["state"].values())


def test_without_hidden_units_the_networks_are_linear(script, quick):
    box = gymnasium.spaces.Box(-1, 1, (3,))
    actor = script.Agent(box, box, script.Args(num_seeds=2, hidden_size=0)).actor
    x, y = torch.randn(2, 2, 4, 3)
    torch.testing.assert_close(actor(x + y) + actor(0 * x), actor(x) + actor(y))
    assert not torch.equal(actor(x), actor(y))
    script.train(script.Args(**quick | {"hidden_size": 0}))


def test_video(script, quick):
    """Of each seed's own episode."""
    import imageio

    changes = {"env_id": "Hopper-v4", "capture_video": "gif", "env_kwargs": {"healthy_z_min": "1"}, "num_seeds": 2}
    films = []
    for folder in script.train(script.Args(**quick | changes)):
        frames = imageio.mimread(folder / "videos" / "episode.gif")
        assert len(frames) > 5
        assert frames[0].shape[:2] == (240, 240)
        assert np.abs(frames[0].astype(int) - frames[-1].astype(int)).max() > 50  # something moves
        films.append(frames)
    assert any((one != other).any() for one, other in zip(*films, strict=False))
    if script.__name__ == "a2c":
        script.evaluate_saved(script.Args(evaluate=str(folder), capture_video="mp4", final_eval_episodes=1))
        assert len(imageio.mimread(folder / "videos" / "episode.mp4")) > 5


def test_a_film_of_a_long_episode_leaves_steps_out(script, tmp_path, monkeypatch):
    strides = []

    def evaluate(agent, args, num_episodes, step, films=None, every=1):
        strides.append(every)
        for film in films or []:
            film.append(np.zeros((4, 4, 3), np.uint8))
        return {"length": np.array([[1000.0]])}

    monkeypatch.setattr(script, "evaluate", evaluate)
    args = script.Args()
    args.capture_video = "gif"  # afterwards, as this needs no libEGL
    script.capture_video(None, args, 0, [tmp_path])
    assert strides == [1, 4]
    assert (tmp_path / "videos" / "episode.gif").exists()


def test_a_stopped_run_makes_no_film(script, quick, monkeypatch):
    films, sent, due = [], [], script.due

    def stop(*parts):
        if not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))
        return due(*parts)

    monkeypatch.setattr(script, "due", stop)
    monkeypatch.setattr(script, "capture_video", lambda *parts: films.append(parts))
    monkeypatch.setattr(script, "check_task", lambda *parts: None)  # which films, where there is libEGL
    args = script.Args(**quick)
    args.capture_video = "gif"
    with pytest.raises(SystemExit) as ended:
        script.train(args)
    assert (ended.value.code, films) == (128 + signal.SIGTERM, [])


def test_runs_of_the_same_second_do_not_share_a_folder(script, quick, monkeypatch):
    monkeypatch.setattr(script.time, "time", lambda: 1e9)
    args = script.Args(num_seeds=3, **quick)
    first, second = script.claim_folders(args), script.claim_folders(args)
    assert len({*first, *second}) == 6
    assert all(folder.is_dir() for folder in first + second)


def test_without_git_a_run_is_recorded_all_the_same(script, quick, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    (folder,) = script.train(script.Args(**quick))
    assert json.loads((folder / "config.json").read_text())["git_commit"] is None


def test_films_are_refused_where_they_cannot_be_made(script, quick, monkeypatch, capsys):
    monkeypatch.setattr(script, "HAS_EGL", False)
    assert "libegl1" in refusal(capsys, lambda: script.Args(**quick | {"capture_video": "gif"}))


# --------------------------------------------------------------------------------------------------------- bad input

BAD_INPUT = {
    "unknown task": ({"env_id": "Walker3d-v4"}, "Walker2d-v4"),
    "dictionary observations": ({"env_id": "WalkerWalk-v1"}, "Dict"),
    "unknown task setting": ({"env_kwargs": {"forward_weight": "1"}}, "reset_noise_scale"),
    "task setting of the wrong type": ({"env_kwargs": {"max_episode_steps": "many"}}, "int"),
    "fewer steps than one rollout": ({"total_timesteps": 10}, "total_timesteps"),
    "no environment": ({"num_envs": 0}, "num_envs"),
    "negative seed": ({"seed": -1}, "seed"),
    "NaN as a coefficient": ({"learning_rate": float("nan")}, "learning_rate"),
    "discount above 1": ({"gamma": 1.5}, "gamma"),
    "missing checkpoint": ({"resume": "nowhere/checkpoint.pt"}, "nowhere"),
    "missing agent": ({"evaluate": "nowhere"}, "nowhere"),
    "task setting out of range": ({"env_kwargs": {"max_episode_steps": "99999999999"}}, "max_episode_steps"),
    "file that is not there": ({"env_kwargs": {"xml_file": "nothing.xml"}, "env_id": "Walker2d-v4"}, "nothing.xml"),
    "device that cannot train": ({"device": "meta"}, "meta"),
    "unknown device": ({"device": "abacus"}, "abacus"),
}
if not torch.cuda.is_available():
    BAD_INPUT["absent CUDA device"] = ({"device": "cuda"}, "cuda")


def refusal(capsys, function):
    """The message with which `function` ends: one line, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        function()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(script, quick, case, capsys):
    changes, expected = BAD_INPUT[case]

    def run():
        args = script.Args(**quick | changes)
        return script.evaluate_saved(args) if args.evaluate else script.train(args)

    assert expected in refusal(capsys, run)
    assert not Path(quick["run_dir"]).exists()


@pytest.mark.parametrize("name", ["gae_lambda", "tau", "line_search_decay"])
def test_a_weight_above_1_is_refused(script, capsys, name):
    if not hasattr(script.Args, name):
        pytest.skip("an option that this script does not have")
    assert name in refusal(capsys, lambda: script.Args(**{name: 1.5}))


@pytest.mark.parametrize("script", ["a2c", "trpo", "reinforce"], indirect=True)
def test_numbered_actions_are_counted_from_the_tasks_first(script):
    agent = script.Agent(gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(3, start=5), script.Args())
    assert agent.to_task(torch.tensor([[[0.0], [2.0]]])).flatten().tolist() == [5, 7]
    agent.actor[-1].bias.data[..., 1] = 9.0
    assert agent.deterministic_action(torch.zeros(1, 4, 2)).flatten().tolist() == [6.0] * 4


def test_discrete_actions_are_refused(ppo, quick, capsys):
    assert "Discrete" in refusal(capsys, lambda: ppo.train(ppo.Args(**quick | {"env_id": "CartPole-v1"})))


@pytest.mark.parametrize("algo", ["ppo_continuous", "trpo", "a2c", "reinforce"])
def test_a_first_standard_deviation_below_its_floor_is_refused(algo, capsys):
    message = refusal(capsys, lambda: load_script(ROOT / "algos" / f"{algo}.py").Args(log_std_init=-4.0))
    assert "log_std_init = -4.0 is below log_std_min" in message


def test_minibatches_that_do_not_divide_are_refused(ppo, quick, capsys):
    assert "divide" in refusal(capsys, lambda: ppo.Args(**quick | {"num_minibatches": 7}))


def test_bad_checkpoints_are_refused(script, quick, capsys):
    (folder,) = script.train(script.Args(**quick))
    path = folder / "checkpoint.pt"
    capsys.readouterr()
    resume = quick | {"resume": str(folder)}
    message = refusal(capsys, lambda: script.train(script.Args(**resume | {"gamma": 0.5, "num_envs": 8})))
    assert "gamma" in message
    assert "num_envs" in message
    assert "total_timesteps" in refusal(capsys, lambda: script.train(script.Args(**resume | {"total_timesteps": 320})))
    elsewhere = script.Args(**resume | {"run_dir": "elsewhere"})  # a folder may be moved
    assert script.find_checkpoint(elsewhere)[0] == [folder]
    for name, value in (("env_threads", 1), ("torch_threads", 2), ("device", "cpu:0")):
        changed = script.Args(**resume | {name: value})
        assert name in refusal(capsys, lambda changed=changed: script.find_checkpoint(changed))
    message = refusal(capsys, lambda: script.load(folder / "agent.pt", "checkpoint"))
    assert f"is a {script.__name__} agent, not a {script.__name__} checkpoint" in message
    saved = torch.load(path, weights_only=True)
    whole = path.read_bytes()
    first = next(iter(saved["state"]))
    torch.save(saved | {"state": saved["state"] | {first: torch.zeros(1, 2, 3)}}, path)
    assert first in refusal(capsys, lambda: script.train(script.Args(**resume)))
    torch.save(saved | {"state": {name: x for name, x in saved["state"].items() if name != first}}, path)
    assert f"{first} is None" in refusal(capsys, lambda: script.train(script.Args(**resume)))
    torch.save(saved | {"kind": "another checkpoint"}, path)  # of another script with the same --exp-name
    assert "another" in refusal(capsys, lambda: script.train(script.Args(**resume)))
    assert "another" in refusal(capsys, lambda: script.train(script.Args(**quick | {"resume": "auto"})))
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        assert "cannot be read" in refusal(capsys, lambda: script.train(script.Args(**resume)))

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {folder}/hostile",)

    torch.save({"kind": f"{script.__name__} checkpoint", "args": Hostile()}, path)
    assert "cannot be read" in refusal(capsys, lambda: script.train(script.Args(**resume)))
    assert not (folder / "hostile").exists()


def test_the_command_line(script, quick):
    done = subprocess.run(
        command(script, quick, env_kwargs=["reset_noise_scale", "0.02"], num_seeds=2), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "evaluation return" in done.stdout
    folder = next(Path(quick["run_dir"]).iterdir())
    assert json.loads((folder / "config.json").read_text())["args"]["env_kwargs"] == {"reset_noise_scale": "0.02"}
    evaluated = subprocess.run(
        [sys.executable, script.__file__, "--evaluate", str(folder), "--final-eval-episodes", "3"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    assert "squared_action" in evaluated.stdout
    twice = ["--env-kwargs", "reset_noise_scale", "0", "--env_kwargs=healthy_reward", "2"]
    for bad in (twice, ["--env-id", "Nothing-v0"], ["--gamma", "nan"], ["--no-such-option"], ["--seed", "x"]):
        refused = subprocess.run([sys.executable, script.__file__, *bad], capture_output=True, text=True)
        assert refused.returncode == 2, bad
        assert "Traceback" not in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would be read in any case")
def test_what_a_gpu_has_written_is_read_without_one(script, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        script.save(tmp_path / "agent.pt", "agent", agent={"x": torch.ones(2)})
    assert script.load(tmp_path, "agent")[1]["agent"]["x"].tolist() == [1, 1]


def test_a_copy_of_one_file_runs_elsewhere(script, quick, tmp_path, monkeypatch):
    copy = tmp_path / "elsewhere" / "mine.py"
    copy.parent.mkdir()
    copy.write_text(Path(script.__file__).read_text())
    words = command(script, quick)
    words[1] = "mine.py"
    done = subprocess.run(words, cwd=copy.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = Path(quick["run_dir"]).iterdir()
    assert "__mine__" in folder.name
    assert json.loads((folder / "config.json").read_text())["git_commit"] is None
    assert ROOT not in folder.parents
    # In a repository of its own, and edited since: that is the commit, wherever the command is given
    line = "git init -q && git add . && git -c user.name=x -c user.email=x@y commit -qm x && echo '# edited' >> mine.py"
    subprocess.run(line, shell=True, cwd=copy.parent, check=True)
    head = subprocess.run("git rev-parse HEAD", shell=True, cwd=copy.parent, capture_output=True, text=True).stdout
    monkeypatch.setattr(script, "__file__", str(copy))
    args = script.Args(**quick | {"seed": 2})
    folders = script.claim_folders(args)
    script.RunLog(args, torch.device("cpu"), folders, None).close()
    assert json.loads((folders[0] / "config.json").read_text())["git_commit"] == f"{head.strip()}-dirty"


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (OSError(28, "No space left on device"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (NotImplementedError("a kernel that is not there"), False),
        (RecursionError("a fault of the script"), False),
    ],
)
def test_only_what_the_machine_lacks_is_put_in_one_line(script, monkeypatch, capsys, error, refused):
    def fail(args):
        raise error

    monkeypatch.setattr(script, "train", fail)
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit if refused else type(error)) as raised:
        script.main()
    if refused:
        assert raised.value.code == 2
        assert "the machine cannot do it" in capsys.readouterr().err
