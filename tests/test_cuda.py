"""On a CUDA device: graph replays give the numbers that eager execution gives. Skipped without one."""

import pytest
import torch
from test_runs import without_clock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def final_state(folders):
    return torch.load(folders[0] / "checkpoint.pt", weights_only=True, map_location="cpu")["state"]


def test_graph_equals_eager(script, quick):
    runs = [script.train(script.Args(num_seeds=2, device="cuda", cuda_graphs=g, **quick)) for g in (False, True)]
    states = [final_state(folders) for folders in runs]
    for name, eager in states[0].items():
        torch.testing.assert_close(states[1][name], eager, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_no_stale_pointer_after_resume(script, quick):
    """A resumed run replays its graphs on the restored tensors: graphs and eager go on alike."""
    states = []
    for graphs in (False, True):
        args = quick | {"device": "cuda", "cuda_graphs": graphs}
        first = script.train(script.Args(**args))
        script.train(script.Args(**args | {"resume": str(first[0]), "total_timesteps": 2 * args["total_timesteps"]}))
        states.append(final_state(first))
    for name, eager in states[0].items():
        torch.testing.assert_close(states[1][name], eager, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_cuda_repeats_itself(script, quick):
    runs = [script.train(script.Args(num_seeds=2, device="cuda", **quick)) for _ in range(2)]
    assert without_clock(runs[0][0]) == without_clock(runs[1][0])


def test_no_host_sync_inside_the_update(ppo):
    args = ppo.Args(num_seeds=2, num_envs=4, num_steps=8, num_minibatches=4)
    from test_ppo import learner, random_rollout

    agent, _ = learner(ppo, args)
    agent = agent.cuda()
    rollout = {name: tensor.cuda() for name, tensor in random_rollout(ppo, args).items()}
    optimizer = torch.optim.Adam(
        agent.parameters(), torch.tensor(1e-3, device="cuda"), eps=1e-5, fused=True, capturable=True
    )
    ppo.optimizer_state(optimizer, "adam")
    kl_coef, carry = torch.zeros(2, device="cuda"), torch.zeros(2, 4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = ppo.compute_batch(agent, rollout, carry, args)
        ppo.update_minibatch(agent, optimizer, {name: x[:, :8] for name, x in batch.items()}, kl_coef, args)
        ppo.finish_iteration(agent, rollout, batch, kl_coef, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_checkpoint_moves_between_devices(script, quick):
    first = script.train(script.Args(device="cuda", **quick))
    saved = script.load(first[0] / "checkpoint.pt", "checkpoint", torch.device("cpu"))
    assert {tensor.device.type for tensor in saved["state"].values()} == {"cpu"}
