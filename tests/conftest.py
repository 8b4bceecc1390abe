import contextlib
import io
import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
ALGORITHMS = ("ddpg", "td3", "sac")

for name in ("CI", "BUILD_NUMBER"):  # with these, pytest spends many minutes on how two large files differ
    os.environ.pop(name, None)


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    return request.param


@pytest.fixture
def gild_script(algorithm):
    return import_module(f"gild_{algorithm}")


@pytest.fixture
def vanilla_script(algorithm):
    return import_module(f"baselines.{algorithm}")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test works in its own folder, with one thread and PyTorch's default settings."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    yield
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)


def short_run(script, **changes):
    """60 iterations on Point2D with small batches. Returns the actor's weights and the evaluations."""
    settings = dict(env_id="Point2D-v0", total_timesteps=260, learning_starts=200, batch_size=32)
    settings |= dict(eval_frequency=130, eval_episodes=2, cuda=False, buffer_size=1_000)
    if hasattr(script.Args, "gild_init"):
        settings["gild_init"] = "random"  # no seconds spent on the regression
    run_dir = script.train(script.Args(**(settings | changes)))
    weights = torch.load(run_dir / "policy.pt", weights_only=True)["actor"]
    return weights, (run_dir / "evaluations.csv").read_text()


def call(script, *flags):
    """Runs a script's `main` in this process, as its command line would.

    Returns the exit code, standard output and standard error.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, code = sys.argv, 0
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    sys.argv = [f"{script.__name__}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            script.main(script.train, script.Args)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        script.received_signals.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))


def same(a: dict, b: dict) -> bool:
    """Whether two dicts of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_demonstrations(path, env_id="Point2D-v0", obs_dim=2, action_dim=2, pairs=64):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (pairs, action_dim)).astype(np.float32)
    observations = rng.normal(size=(pairs, obs_dim)).astype(np.float32)
    metadata = np.array(json.dumps({"env_id": env_id}))
    np.savez(path, observations=observations, actions=actions, metadata=metadata)
    return path
