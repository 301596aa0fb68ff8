"""Data-parallel PPO: two ranks on gloo, as torchrun starts them. Each test starts torchrun on this file itself."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, load_script
from test_ppo import iteration, learner, random_rollout
from test_runs import read_metrics, refusal

RANKS, N = 2, 3  # ranks, environments of each
SETTINGS = [
    {"num_minibatches": 1},
    {"num_minibatches": 4, "anneal_log_std": False, "ent_coef": 0.01, "clip_vloss": True, "max_grad_norm": 0.05},
    {"num_minibatches": 4, "kl_coef": 1.0, "target_kl": 1e-5},
    {"num_minibatches": 2, "anneal_log_std": False, "kl_coef": 1.0, "target_kl": 1e3, "norm_adv": False},
]
STEPS = 128  # of an iteration of the `quick` arguments, both ranks together


def torchrun(folder, task, kwargs, *options):
    """Run `task` below, on two ranks. Returns the exit status and all that was printed."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), *options]
    words += [__file__, task, str(folder), json.dumps(kwargs)]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see algos/README.md: a restart needs it
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output = process.communicate(timeout=300)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()  # torchrun ends its ranks
    return process.returncode, output


def updates(ppo, rank, kwargs):
    """Three iterations on given rollouts in double precision: on one rank's environments, or (None) on all of them.

    The second rank has fewer valid rows than the first, and of seed 1 in the first minibatch of four none at all."""
    args = ppo.Args(num_seeds=2, num_envs=RANKS * N if rank is None else N, num_steps=8, **kwargs)
    agent, optimizer = learner(ppo, args)
    agent.double()
    kl_coef, found = torch.full((2,), kwargs.get("kl_coef", 0.0), dtype=torch.float64), {}
    for i in range(3):
        rollout = random_rollout(ppo, ppo.Args(num_seeds=2, num_envs=RANKS * N, num_steps=8, **kwargs), seed=i)
        rollout["valid"][::3, :, N:] = False
        rollout["valid"][:2, 1, N:] = False
        if rank is not None:
            rollout = {name: x[:, :, rank * N : (rank + 1) * N] for name, x in rollout.items()}
        rollout = {name: x.double() if x.is_floating_point() else x for name, x in rollout.items()}
        losses, gradients = iteration(ppo, agent, optimizer, rollout, args, kl_coef)
        found |= {f"{i} {name}": value for name, value in losses.items()} | {f"{i} kl_coef": kl_coef.clone()}
        found |= {f"{i} gradient {j}": gradient for j, gradient in enumerate(gradients)}
        found |= {f"{i} {name}": tensor.clone() for name, tensor in agent.state_dict().items()}
    return found


def update_task(ppo, rank, folder, kwargs):
    dist.init_process_group("gloo")
    assert ppo.highest(rank, 15) == [1, 15]  # of a signal that torchrun has sent to all
    torch.save([updates(ppo, rank, each) for each in kwargs], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def threads_of_gloo():
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            names.append(path.read_text().strip())
    return [name for name in names if "gloo" in name]


def last_threads_of_gloo():
    """Names of those that live on. One that has been joined may be listed for a moment yet."""
    deadline = time.monotonic() + 5
    while (left := threads_of_gloo()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def train_task(ppo, rank, folder, kwargs):
    """A run that leaves its agent and the seeds of its environments. With signal=[number, n], the second rank sends
    itself that signal in the nth iteration, unless torchrun has restarted it. With poison, the second rank's rewards
    are NaN, and its clock never asks for a checkpoint."""
    (number, n), poison = kwargs.pop("signal", (0, 0)), kwargs.pop("poison", False) and rank == 1
    kwargs |= {"checkpoint_seconds": 1e9} if poison else {}
    left = {"agents": [], "env_seeds": [], "noise": [], "gloo": [], "strides": []}
    if rank == 1:  # it may be on another machine, without the files of the first
        ppo.find_checkpoint = None
    diverged, make_envs, highest, due = ppo.diverged, ppo.make_envs, ppo.highest, ppo.due
    destroy_process_group, graphs = dist.destroy_process_group, getattr(sys.modules.get("emulator"), "Graph", None)
    iterations = []

    def see_agent(agent):
        left["agents"] = [agent]
        return diverged(agent)

    def see_seeds(args, env_seeds, render_mode=None):
        left["env_seeds"].append(env_seeds)
        envs = make_envs(args, env_seeds, render_mode)
        if poison:
            step = envs.step

            def poisoned(actions):
                obs, rewards, *rest = step(actions)
                return obs, rewards * float("nan"), *rest

            envs.step = poisoned
        return envs

    def see_iteration(*numbers):
        iterations.append(numbers)
        left["gloo"] = threads_of_gloo()
        if rank == 1 and len(iterations) == n and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), number)
        return highest(*numbers)

    def see_report(step, stride, *rest):
        left["strides"].append(stride)
        return due(step, stride, *rest)

    def see_end():
        left["graphs"] = len(graphs.alive) if graphs else 0
        destroy_process_group()

    ppo.diverged, ppo.make_envs, ppo.highest, ppo.due = see_agent, see_seeds, see_iteration, see_report
    dist.destroy_process_group = see_end
    manual_seed = torch.manual_seed
    torch.manual_seed = lambda number: left["noise"].append(number) or manual_seed(number)
    try:
        folders = ppo.train(ppo.Args(**kwargs))
    finally:
        (folder / f"threads{rank}").write_text(" ".join(last_threads_of_gloo()))
    left["devices"] = torch.emulated.chosen if hasattr(torch, "emulated") else []
    left |= {"agent": left.pop("agents")[0].state_dict(), "folders": list(map(str, folders))}
    torch.save(left | {"iterations": len(iterations)}, folder / f"rank{rank}.pt")


def assert_no_thread_of_gloo_is_left(folder):
    """One that dropped its last tensor while the interpreter ends would abort the process, now and then."""
    for rank in range(RANKS):
        assert (folder / f"threads{rank}").read_text() == ""


def read_ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_two_ranks_give_the_update_of_one_process_with_their_data(ppo, tmp_path):
    status, output = torchrun(tmp_path, "update_task", SETTINGS)
    assert status == 0, output
    for first, *others, kwargs in zip(*read_ranks(tmp_path), SETTINGS, strict=True):
        union = updates(ppo, None, kwargs)
        assert union.keys() == first.keys()
        own = [name for name in union if "gradient" not in name]
        assert {"2 approx_kl", "2 kl_coef", "2 obs_stats.var", "2 return_stats.mean", "2 policy_loss"} <= {*own}
        for name, expected in union.items():
            assert all(torch.equal(first[name], other[name]) for other in others), name
            torch.testing.assert_close(
                first[name].double(), expected.double(), rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert union["2 kl_coef"].tolist() == [0.125, 0.125]  # adapted, and by the KL of all rows


def test_ranks_are_equal_after_training_and_the_first_one_writes(ppo, quick, tmp_path):
    status, output = torchrun(tmp_path, "train_task", quick | {"num_seeds": 2, "total_timesteps": 6 * STEPS - 1})
    assert status == 0, output
    first, second = read_ranks(tmp_path)
    for name, tensor in first["agent"].items():
        assert torch.equal(tensor, second["agent"][name]), name
    folders = sorted(Path(quick["run_dir"]).iterdir())
    assert [str(folder) for folder in folders] == first["folders"]
    assert second["folders"] == []
    for folder in folders:
        assert read_metrics(folder)[-1]["global_step"] == str(5 * STEPS)  # of both ranks, and none of a partial rollout
        assert len(list(folder.glob("events.*"))) == 1
    saved = torch.load(folders[0] / "checkpoint.pt", weights_only=True)
    assert (saved["state"]["obs_stats.count"] > 5 * STEPS * 0.8).all()  # all but the reset rows of both
    args = ppo.Args(**quick | {"num_seeds": 2})
    assert first["env_seeds"][0] == ppo.spaced_seeds(args, args.num_envs, 0, 0)  # as without other ranks
    assert not {*first["env_seeds"][0]} & {*second["env_seeds"][0]}
    assert first["noise"] != second["noise"]
    assert len(second["env_seeds"]) == 1  # the first rank alone evaluates
    assert {*first["strides"]} == {STEPS}  # evaluations and rows are due by the steps of both
    assert first["gloo"]  # while it trains
    assert_no_thread_of_gloo_is_left(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch takes one device for its accelerator")
def test_recorded_graphs_hold_the_reductions(ppo, quick, tmp_path):
    """On an emulated device (emulator.py), where graphs repeat what was recorded and nothing else."""
    agents = []
    for device in ("cpu", "emulated"):
        folder = tmp_path / device
        folder.mkdir()
        changes = {"num_seeds": 2, "total_timesteps": 3 * STEPS, "device": device, "run_dir": str(folder / "runs")}
        status, output = torchrun(folder, "train_task", quick | changes)
        assert status == 0, output
        agents += [left["agent"] for left in read_ranks(folder)]
        assert [left["devices"] for left in read_ranks(folder)] == ([[], []] if device == "cpu" else [[0], [1]])
        assert [left["graphs"] for left in read_ranks(folder)] == [0, 0]  # at its end: NCCL would wait
    for name, tensor in agents[0].items():
        assert all(torch.equal(tensor, other[name]) for other in agents[1:]), name


def test_a_rank_that_dies_brings_the_job_down(ppo, quick, tmp_path):
    endless = {"total_timesteps": 10**8, "num_evaluations": 0, "signal": [signal.SIGKILL, 3]}
    status, output = torchrun(tmp_path, "train_task", quick | endless)
    assert status == 1
    report = output[output.index("ChildFailedError") :]
    assert "exitcode  : -9" in report
    assert "rank      : 1 (local_rank: 1)" in report
    assert "Signal 9 (SIGKILL) received" in report


def test_torchrun_restarts_a_run_from_its_checkpoint(ppo, quick, tmp_path):
    changes = {"resume": "auto", "checkpoint_seconds": 0.0, "total_timesteps": 9 * STEPS}
    changes["signal"] = [signal.SIGKILL, 6]
    status, output = torchrun(tmp_path, "train_task", quick | changes, "--max-restarts", "1")
    assert status == 0, output
    (folder,) = Path(quick["run_dir"]).iterdir()
    steps = [int(row["global_step"]) for row in read_metrics(folder)]
    assert steps == [i * STEPS for i in range(1, 10)]
    first, second = read_ranks(tmp_path)
    assert first["iterations"] == second["iterations"] == 4 + 1  # 6 to 9, for the checkpoint had five; and the barrier
    args = ppo.Args(**quick)
    for rank, left in enumerate((first, second)):
        assert left["env_seeds"][0] == ppo.spaced_seeds(args, args.num_envs, 0, 5 * STEPS, rank)
    for name, tensor in first["agent"].items():
        assert torch.equal(tensor, second["agent"][name]), name


def test_a_signal_to_one_rank_stops_all_together(ppo, quick, tmp_path):
    endless = {"total_timesteps": 10**8, "num_evaluations": 0, "signal": [signal.SIGTERM, 3]}
    status, output = torchrun(tmp_path, "train_task", quick | endless)
    assert status == 1
    assert f"exitcode  : {128 + signal.SIGTERM}" in output, output  # of the rank that is seen first
    (folder,) = Path(quick["run_dir"]).iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == 4 * STEPS
    assert_no_thread_of_gloo_is_left(tmp_path)


def test_seeds_that_diverge_end_all_ranks_together(ppo, quick, tmp_path):
    endless = {"total_timesteps": 10**8, "num_evaluations": 0, "checkpoint_seconds": 0.0, "poison": True}
    status, output = torchrun(tmp_path, "train_task", quick | endless)
    assert status == 1
    assert "diverged: seeds 1;" in output, output
    assert_no_thread_of_gloo_is_left(tmp_path)


def test_a_gpu_of_ones_choice_is_refused_under_torchrun(ppo, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--device cuda, not cuda:1" in refusal(capsys, lambda: ppo.Args(device="cuda:1"))


def test_a_rank_without_a_gpu_is_refused(ppo, quick, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "rank 1" in refusal(capsys, lambda: ppo.train(ppo.Args(**quick | {"world_size": 2, "device": "auto"})))


def test_another_number_of_ranks_is_refused(ppo, quick, capsys):
    (folder,) = ppo.train(ppo.Args(**quick))
    capsys.readouterr()
    two = ppo.Args(**quick | {"resume": str(folder), "world_size": 2})
    assert "world_size" in refusal(capsys, lambda: ppo.find_checkpoint(two))


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, (task, folder, words) = ROOT / "algos" / "ppo_continuous.py", sys.argv[1:]
    kwargs, device = json.loads(words), contextlib.nullcontext()
    script = load_script(path)
    if task == "train_task" and kwargs["device"] == "emulated":
        from emulator import Emulation, load_emulated

        script, device = load_emulated(path, [("cpu:gloo,cuda:nccl", "gloo")]), Emulation()
    with device:
        globals()[task](script, int(os.environ["RANK"]), Path(folder), kwargs)
