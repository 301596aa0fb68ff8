"""On a CUDA device: graph replays give the numbers that eager execution gives. Skipped without one."""

import contextlib
import gc
import json
import os
import time

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import without_clock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEADLINE = time.monotonic() + float(os.environ.get("SECONDS_LIMIT", "inf"))


@pytest.fixture(autouse=True)
def within_the_limit():
    """Of gpu.sh. (An interrupt would be taken by the training that runs, and end that one test alone.)"""
    if time.monotonic() > DEADLINE:
        pytest.exit("time is up")


@pytest.fixture
def quick(quick):
    return quick | {"device": "cuda"}


def final_state(folders):
    """Of a replay, what has been stored: the rest is memory as it was found, and the last place is never drawn."""
    state = torch.load(folders[0] / "checkpoint.pt", weights_only=True, map_location="cpu")["state"]
    for k, count in enumerate(state.get("replay.count", [])):
        state["replay.rows"][k, int(count) :] = 0.0
    return state


def loss_curves(folders):
    """Points of every curve of the losses."""
    found = {}
    for k, folder in enumerate(folders):
        events = EventAccumulator(str(folder)).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("losses/")]
        found |= {f"{tag} {k}": torch.tensor([event.value for event in events.Scalars(tag)]) for tag in tags}
    assert found
    return found


@contextlib.contextmanager
def no_graphs():
    """In here to record one is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", None)
        yield


def check_graph_equals_eager(script, args):
    with contextlib.nullcontext() if "compile" in args else no_graphs():  # the compiler may name the class
        runs = [script.train(script.Args(num_seeds=2, cuda_graphs=False, **args))]
    runs.append(script.train(script.Args(num_seeds=2, **args)))
    states = [final_state(folders) for folders in runs]
    torch.testing.assert_close(*map(loss_curves, runs), rtol=1e-2, atol=1e-3)
    for name, eager in states[0].items():
        torch.testing.assert_close(states[1][name], eager, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    return states[0]


def test_graph_equals_eager(script, quick):
    check_graph_equals_eager(script, quick)


OTHER_SETTINGS = [
    ("ppo_continuous", {"kl_coef": 0.5}),
    ("a2c", {"optimizer": "rmsprop"}),
    ("a2c", {"env_id": "CartPole-v1"}),
    ("trpo", {"line_search_steps": 0}),
    ("trpo", {"env_id": "CartPole-v1"}),
    ("reinforce", {"baseline": "mean"}),
    ("reinforce", {"baseline": "none", "env_id": "CartPole-v1"}),
    ("sac", {"alpha": 0.2}),
    ("ddpg", {"utd_ratio": 2}),
]


@pytest.mark.parametrize(("script", "settings"), OTHER_SETTINGS, ids=str, indirect=["script"])
def test_graph_equals_eager_with_other_settings(script, settings, quick):
    check_graph_equals_eager(script, quick | settings)


def test_a_slow_device_changes_nothing(script, quick, monkeypatch):
    """Every replay begins some milliseconds late: pinned memory that the host wrote or read too early would show."""
    capture, states = script.capture, []

    def late(*inputs):
        replay = capture(*inputs)

        def call():
            torch.cuda._sleep(10_000_000)
            replay()

        return call

    for own in (capture, late):
        monkeypatch.setattr(script, "capture", own)
        states.append(final_state(script.train(script.Args(num_seeds=2, **quick))))
    for name, prompt in states[0].items():
        torch.testing.assert_close(states[1][name], prompt, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_no_stale_pointer_after_resume(script, quick):
    """Graphs that are recorded after the state was restored go on as eager execution does."""
    states = []
    for graphs in (False, True):
        args = quick | {"cuda_graphs": graphs}
        longer = args | {"total_timesteps": 2 * args["total_timesteps"]}
        with contextlib.nullcontext() if graphs else no_graphs():
            first = script.train(script.Args(**args))
            script.train(script.Args(**longer | {"resume": str(first[0])}))
        states.append(final_state(first))
    for name, eager in states[0].items():
        torch.testing.assert_close(states[1][name], eager, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_cuda_repeats_itself(script, quick):
    runs = [script.train(script.Args(num_seeds=2, **quick)) for _ in range(2)]
    assert without_clock(runs[0][0]) == without_clock(runs[1][0])


def one_update(script, first=0, seeds=2, device="cuda"):
    """Networks of one or two of two seeds, and a function that makes one update of them, on the device, from made-up
    data."""
    from test_off_policy import parts
    from test_ppo import WALKER, random_rollout

    def adam(parameters):
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        rate = torch.tensor(1e-3, device=device)
        optimizer = torch.optim.Adam(trained, rate, fused=True, capturable=device == "cuda")
        script.optimizer_state(optimizer, "adam")
        return optimizer

    own, size = slice(first, first + seeds), {"num_envs": 4}
    if script.__name__ in ("sac", "ddpg"):
        args = script.Args(**size, num_seeds=seeds, seed=1 + first, hidden_size=16, batch_size=8)
        everything = [part.to(device) if isinstance(part, torch.nn.Module) else part for part in parts(script, args)]
        nets = [part for part in everything if isinstance(part, torch.nn.Module)]
        replay = script.Replay(seeds, 100, 5, 2, torch.device(device))
        rows = torch.randn(2, 60, 14, generator=torch.Generator().manual_seed(5))[own].to(device)
        replay.add(rows, torch.ones(seeds, 60, dtype=torch.bool, device=device))
        everything[-2], everything[-3], everything[-4] = replay, adam(nets[1].parameters()), adam(nets[0].parameters())
        if script.__name__ == "sac":
            everything[3] = torch.nn.Parameter(torch.zeros(seeds, 1, device=device))
        return nets, lambda: script.update(*everything)
    size |= {"num_steps": 8}
    args = script.Args(**size, num_seeds=seeds, seed=1 + first)
    agent = script.Agent(*WALKER, args).to(device)
    both = random_rollout(script, script.Args(**size, num_seeds=2))
    rollout = {name: tensor[:, own].to(device) for name, tensor in both.items()}
    rollout["age"] = torch.zeros(8, seeds, 4, device=device)
    carry, two = torch.zeros(seeds, 4, device=device), torch.zeros(seeds, 2, device=device)
    optimizer = adam(agent.critic.parameters() if script.__name__ == "trpo" else agent.parameters())

    def ppo():
        batch = script.compute_targets(agent, rollout, carry, args)
        minibatch = {name: x[:, :8] for name, x in batch.items()}
        script.update_minibatch(agent, optimizer, minibatch, two[:, 0], args)
        script.finish_iteration(agent, rollout, batch, two[:, 0], args)

    def trpo():
        batch = script.compute_targets(agent, rollout, carry, args)
        script.update_policy(agent, batch, args)
        script.update_critic(agent, optimizer, batch)

    extra = [two] if script.__name__ == "reinforce" else []
    plain = lambda: script.update(agent, optimizer, rollout, carry, *extra, args)  # noqa: E731
    return [agent], {"ppo_continuous": ppo, "trpo": trpo}.get(script.__name__, plain)


def after_updates(script, monkeypatch, own, device="cuda"):
    """Parameters, [seeds, ...], after three updates of the seeds `own` of two. Batches and noise of a seed alone, or on
    another device, are those that it has among two."""
    rand, randn, generator = torch.rand, torch.randn, torch.Generator().manual_seed(0)
    networks, update = one_update(script, own.start, own.stop - own.start, device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: randn(2, *x.shape[1:], generator=generator)[own].to(device))
        patch.setattr(torch, "rand", lambda _, n, device: rand(2, n, generator=generator)[own].to(device))
        for _ in range(3):
            update()
    parameters = [parameter.detach() for network in networks for parameter in network.parameters()]
    return [parameter.unflatten(0, (own.stop - own.start, -1)) for parameter in parameters]


def tolerance(script):
    """One seed is a plain product, two are a batched one, which rounds otherwise. Conjugate gradient amplifies it: with
    noise of that size on every product on a CPU, TRPO's parameters differ by up to 3.4 times the others' tolerance."""
    return {"rtol": 1e-2, "atol": 1e-4} if script.__name__ == "trpo" else {"rtol": 1e-3, "atol": 1e-5}


def test_seeds_together_equal_seeds_alone(script, monkeypatch):
    found = [after_updates(script, monkeypatch, own) for own in (slice(0, 2), slice(0, 1), slice(1, 2))]
    for together, *alone in zip(*found, strict=True):
        torch.testing.assert_close(together, torch.cat(alone), **tolerance(script))


def test_cuda_computes_what_the_cpu_does(script, monkeypatch):
    """In float32, not in TF32."""
    found = [after_updates(script, monkeypatch, slice(0, 2), device) for device in ("cpu", "cuda")]
    for on_cpu, on_cuda in zip(*found, strict=True):
        torch.testing.assert_close(on_cuda.cpu(), on_cpu, **tolerance(script))


def test_no_host_sync_inside_the_update(script):
    _, update = one_update(script)
    update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_and_the_cpu_reach_the_same_return(script, tmp_path):
    """Their random numbers differ, so their returns can agree in distribution only."""
    args = {"env_id": "InvertedPendulum-v4", "num_seeds": 8, "num_evaluations": 1, "final_eval_episodes": 20}
    args |= {"torch_threads": 1, "env_threads": 4}  # gpu.sh runs six of these side by side
    if script.__name__ in ("sac", "ddpg"):
        args |= {"total_timesteps": 5000, "learning_starts": 1000, "hidden_size": 32, "batch_size": 64}
    else:
        args |= {"total_timesteps": 60_000}
    returns = []
    for device in ("cpu", "cuda"):
        folders = script.train(script.Args(**args, device=device, run_dir=str(tmp_path / device)))
        rows = [(folder / "metrics.csv").read_text().splitlines() for folder in folders]
        column = rows[0][0].split(",").index("eval_return")
        returns.append([float(lines[-1].split(",")[column]) for lines in rows])
    print(script.__name__, [f"{np.mean(own):.0f} +- {np.std(own, ddof=1):.0f}" for own in returns])
    assert scipy.stats.ttest_ind(*returns, equal_var=False).pvalue > 0.001 or np.ptp(returns) < 1


def test_a_checkpoint_moves_between_devices(script, quick, monkeypatch):
    first = script.train(script.Args(**quick | {"device": "auto"}))
    assert json.loads((first[0] / "config.json").read_text())["hardware"]["gpu"]
    before = final_state(first)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    longer = quick | {"device": "auto", "resume": str(first[0]), "total_timesteps": 2 * quick["total_timesteps"]}
    script.train(script.Args(**longer))
    saved = torch.load(first[0] / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == longer["total_timesteps"]
    assert {tensor.device.type for tensor in saved["state"].values()} == {"cpu"}
    assert any(not torch.equal(tensor, before[name]) for name, tensor in saved["state"].items())


@pytest.mark.parametrize("script", ["ppo_continuous", "sac"], indirect=True)
def test_compiled_graph_equals_compiled_eager(script, quick):
    compiled = check_graph_equals_eager(script, quick | {"compile": True})
    if script.__name__ == "ppo_continuous":  # SAC's compiled update draws its noise otherwise
        args = script.Args(num_seeds=2, cuda_graphs=False, **quick)
        for name, plain in final_state(script.train(args)).items():
            torch.testing.assert_close(compiled[name], plain, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("script", ["ppo_continuous"], indirect=True)
def test_recorded_nccl_reductions(script, quick, tmp_path):
    """Of a group of one rank, as under torchrun."""
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check_graph_equals_eager(script, quick)
    finally:
        gc.collect()  # graphs that hold its reductions
        dist.destroy_process_group()
