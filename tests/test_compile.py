"""--compile: the compiled updates are the eager ones, and where nothing compiles a run goes on without."""

from copy import deepcopy

import pytest
import torch

import gild_td3
from benchmark.cost import Learner
from tests.conftest import same, short_run


def test_a_hundred_compiled_updates(gild_script, algorithm):
    """In float64; in float32, Adam can make a full step of the rounding of a gradient near 0."""
    torch.set_default_dtype(torch.float64)
    assert gild_script.can_compile()
    learners = []
    for compiled in (lambda function: function, torch.compile):
        torch.manual_seed(0)
        learners.append(Learner(algorithm, compiled))
        start = deepcopy(learners[-1].networks)
        for number in range(100):
            torch.manual_seed(number)
            learners[-1].iterate(number, with_gild=number % 4 == 0)
    for a, b, c in zip(*(learner.networks for learner in learners), start, strict=True):
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
