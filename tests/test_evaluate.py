"""evaluate.py: the returns of a saved policy, and its video."""

import subprocess
import sys

import numpy as np
import pytest
from gymnasium.wrappers import RecordEpisodeStatistics

from demos.collect import load_policy
from evaluate import returns
from tests.conftest import ROOT


def policy_of(script, env_id):
    """A run of 20 random steps, for its policy file."""
    args = script.Args(env_id=env_id, total_timesteps=20, eval_episodes=1, buffer_size=50, cuda=False)
    return script.train(args) / "policy.pt"


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Point2D-v0"])
def test_both_returns_against_the_environments(vanilla_script, env_id):
    """The dense return is the evaluation environment's, the sparse one the training environment's."""
    policy = policy_of(vanilla_script, env_id)
    totals, lengths, _ = returns(policy, episodes=2, seed=3)
    actor, *_ = load_policy(policy)
    for column, training in enumerate((False, True)):
        env = RecordEpisodeStatistics(vanilla_script.make_env(vanilla_script.Args(env_id=env_id), training))
        for episode in range(2):
            obs, _ = env.reset(seed=3 + episode)
            info = {}
            while "episode" not in info:
                obs, _, _, _, info = env.step(vanilla_script.act(actor, obs))
            assert totals[episode, column] == pytest.approx(info["episode"]["r"], abs=1e-3)
            assert lengths[episode] == info["episode"]["l"]


def test_the_command(vanilla_script, tmp_path):
    policy = policy_of(vanilla_script, "Point2D-v0")
    command = [sys.executable, "evaluate.py", policy.parent.absolute(), "--episodes", "2"]
    video = tmp_path / "walk.gif"
    done = subprocess.run([*command, "--video", video], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["dense", "sparse", "steps"]
    assert video.read_bytes()[:3] == b"GIF" and "200 frames" in done.stdout
    assert np.isfinite(float(done.stdout.split()[2]))


@pytest.mark.parametrize("content", [b"", b"weights", None])
def test_a_file_that_is_no_policy(tmp_path, content):
    path = tmp_path / "policy.pt"
    if content is not None:
        path.write_bytes(content)
    done = subprocess.run([sys.executable, "evaluate.py", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
