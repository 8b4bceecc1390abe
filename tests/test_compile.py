"""--compile: the compiled updates are the eager ones, and where nothing compiles a run goes on without."""

from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch

import gild_td3
from tests.conftest import same, short_run


class Learner:
    """Networks, optimizers and data of Hopper's shapes, and the update functions, compiled or not."""

    def __init__(self, script, algorithm, compiled):
        torch.manual_seed(0)
        self.script, self.algorithm = script, algorithm
        box = gym.spaces.Box(-1, 1, (3,), np.float32)
        self.networks = script.Actor(11, box), script.Critic(11, 3), script.GILD(11, 3)
        self.targets = deepcopy(self.networks)
        self.optimizers = [torch.optim.Adam(network.parameters(), 3e-4) for network in self.networks]
        functions = script.critic_gradients, script.actor_gradients, script.gild_gradients
        self.update_critic, self.update_actor, self.update_gild = map(compiled, functions)

    def iterate(self, number):
        """One update, GILD's in every second; all random numbers come from the iteration's own seed."""
        torch.manual_seed(number)
        actor, critic, gild = self.networks
        obs, next_obs, val_obs, demo_obs = torch.randn(4, 64, 11)
        action, demo_action = torch.rand(2, 64, 3) * 2 - 1
        batch = obs, action, torch.randn(64, 1), next_obs, torch.zeros(64, 1)
        noise, alpha = torch.randn(3, 64, 3), torch.tensor(0.2)
        sac = self.algorithm == "sac"
        target_actor = actor if sac else self.targets[0]
        extra = {"ddpg": (), "td3": (0.2, 0.5), "sac": (alpha,)}[self.algorithm]
        grads = {}
        grads[critic], _, q, *_ = self.update_critic(
            critic, self.targets[1], target_actor, batch, 0.99, *extra
        )
        if number % 2:
            w_rl = self.script.rl_weight(q, 2.5)
            more = (noise.unbind(), alpha) if sac else ()
            grads[actor], grads[gild], *_ = self.update_gild(
                *(actor, critic, gild, obs, (demo_obs, demo_action), val_obs, *more, w_rl, 3e-4, "gain")
            )
        else:
            grads[actor], *_ = self.update_actor(actor, critic, obs, *((noise[0], alpha) if sac else ()))
        for optimizer, network in zip(self.optimizers, self.networks, strict=True):
            if network in grads:
                self.script.step(optimizer, network, grads[network])


def test_a_hundred_compiled_updates(gild_script, algorithm):
    """In float64; in float32, Adam can make a full step of the rounding of a gradient near 0."""
    torch.set_default_dtype(torch.float64)
    assert gild_script.can_compile()
    eager, compiled = (Learner(gild_script, algorithm, f) for f in (lambda function: function, torch.compile))
    for number in range(100):
        eager.iterate(number)
        compiled.iterate(number)
    start = Learner(gild_script, algorithm, lambda function: function)
    for a, b, c in zip(eager.networks, compiled.networks, start.networks, strict=True):
        assert not same(a.state_dict(), c.state_dict())
        for name, weight in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[name], weight, rtol=0, atol=1e-8)


def test_a_run_with_compile():
    """Through the loop, the warm start and what follows, in float32."""
    eager, _ = short_run(gild_td3, ws_frac=0.2, total_timesteps=260)
    compiled, _ = short_run(gild_td3, ws_frac=0.2, total_timesteps=260, compile=True)
    for name, weight in eager.items():
        torch.testing.assert_close(compiled[name], weight, rtol=0, atol=1e-4)
        assert (compiled[name] - weight).abs().mean() < 1e-6


def test_without_a_compiler_the_run_is_eager(vanilla_script, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no compiler found\nand more")

    plain, _ = short_run(vanilla_script, total_timesteps=220)
    monkeypatch.setattr(torch, "compile", fails)
    eager, _ = short_run(vanilla_script, total_timesteps=220, compile=True)
    assert same(plain, eager)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "--compile: going on without it: no compiler found"


@pytest.fixture(autouse=True)
def eager_again():
    yield
    torch.compiler.reset()
