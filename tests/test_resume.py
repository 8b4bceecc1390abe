"""A run that is killed, stopped or resumed is, in the end, the run that was not."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.soak import assert_same_run, killed, uninterrupted

FLAGS = """--env-id Point2D-v0 --total-timesteps 700 --learning-starts 200 --batch-size 32 --no-cuda
--eval-frequency 100 --eval-episodes 1 --checkpoint-frequency 250 --buffer-size 600"""


def run(folder, *flags, script="gild_ddpg.py", code=0):
    """Runs a script to its end in a folder; returns standard output and standard error."""
    command = [sys.executable, ROOT / script, *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def gild_flags(**changes):
    values = {"gild-init": "random", "ws-frac": "0.4", **changes}
    return FLAGS.split() + [word for name, value in values.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A DDPG+GILD run of 700 steps; its last checkpoint is older than its last evaluations."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, *gild_flags())
    (run_dir,) = (folder / "runs").iterdir()
    assert 250 <= torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"] < 700
    return run_dir


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "runs" / finished.name)


def test_kills_at_random_moments(algorithm, tmp_path):
    path, kills = killed(algorithm, tmp_path / "killed", 4, random.Random(algorithm))
    assert kills >= 2
    assert_same_run(path, uninterrupted(algorithm, tmp_path / "whole"))


def test_resuming_repeats_what_came_after_the_checkpoint(finished, copy, tmp_path):
    with open(copy / "evaluations.csv", "a") as file:
        file.write("70")  # a row that a kill tore
    (copy / "policy.pt").unlink()
    run(tmp_path, "--resume", str(copy))
    assert_same_run(copy, finished)
    run(tmp_path, "--resume", str(copy), "--no-save-model")  # logging may change
    assert_same_run(copy, finished)


def test_more_steps_are_as_if_asked_for_at_once(finished, copy, tmp_path):
    """The warm start's end is that of the run's own total, 0.4 * 700 = 0.28 * 1000."""
    run(tmp_path, "--resume", str(copy), "--total-timesteps", "1000")
    run(tmp_path, *gild_flags(**{"total-timesteps": "1000", "ws-frac": "0.28"}))
    (other,) = (path for path in (tmp_path / "runs").iterdir() if path != copy)
    assert_same_run(copy, other)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint(finished, tmp_path, number, code):
    command = [sys.executable, ROOT / "gild_ddpg.py", *gild_flags(**{"checkpoint-frequency": "100000"})]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("runs/*/policy.pt")):
        time.sleep(0.02)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code and len(errors.splitlines()) == 1
    (script, run_dir) = re.search(r"to go on: python (\S+) --resume (\S+)", out).groups()
    assert torch.load(tmp_path / run_dir / "checkpoint.pt", weights_only=True)["global_step"] < 700
    run(tmp_path, "--resume", run_dir, script=script)
    for name in ("evaluations.csv",):
        assert (tmp_path / run_dir / name).read_bytes() == (finished / name).read_bytes()
    weights = (torch.load(path / "policy.pt", weights_only=True) for path in (tmp_path / run_dir, finished))
    a, b = (weight["actor"] for weight in weights)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("script", ["baselines.td3", "baselines.ddpg_il", "baselines.sac_il"])
def test_baselines_resume_too(script, tmp_path):
    """After SIGTERM, by the command that is printed; as modules, from the project's folder."""
    flags = [*FLAGS.split(), "--total-timesteps", "450", "--seed", "77"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-m", script, *flags], **options, **pipes)
    while not list(tmp_path.glob("runs/*/policy.pt")):
        time.sleep(0.02)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    (words,) = re.findall(r"to go on: python (-m \S+ --resume \S+)", out)
    resumed = subprocess.run([sys.executable, *words.split()], **options, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    whole = subprocess.run([sys.executable, "-m", script, *flags], **options, capture_output=True)
    assert whole.returncode == 0
    first, second = sorted(tmp_path.glob("runs/*"))
    assert (first / "evaluations.csv").read_bytes() == (second / "evaluations.csv").read_bytes()
    a, b = (torch.load(path / "policy.pt", weights_only=True)["actor"] for path in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_signal_ends_at_once(tmp_path):
    flags = "--env-id HalfCheetah-v4 --ws-frac 0 --no-cuda --eval-frequency 100 --learning-starts 256"
    command = [sys.executable, ROOT / "gild_ddpg.py", *flags.split(), "--eval-episodes", "1"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("runs/*/policy.pt")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


def test_a_checkpoint_holds_the_filled_part_only(finished):
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert state["added"] == state["global_step"] == len(state["rows"])
    storage = state["rows"].untyped_storage().nbytes()
    assert storage == 4 * len(state["rows"]) * (2 + 2 + 1 + 2 + 1)


def test_a_failed_write_leaves_the_last_file(finished, copy, tmp_path):
    """A limit on the size of files stands for a full disk: it stops the next checkpoint half way."""
    before = (copy / "checkpoint.pt").read_bytes()
    command = [sys.executable, ROOT / "gild_ddpg.py", "--resume", copy, "--total-timesteps", "2000"]
    limit = (500_000, 500_000)
    full = subprocess.run(
        [str(word) for word in command],
        **{"cwd": tmp_path, "capture_output": True, "text": True},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert full.returncode == 2 and len(full.stderr.splitlines()) == 1, full.stderr
    assert "checkpoint.pt could not be written" in full.stderr and "File too large" in full.stderr
    assert (copy / "checkpoint.pt").read_bytes() == before
    assert not list(copy.glob("*.tmp"))


def test_the_replay_buffer_takes_what_the_rows_need(gild_script):
    """Ant's 111 observations and 8 actions, a million times: below 1.1 GB."""
    buffer = gild_script.ReplayBuffer(1_000_000, 111, 8, torch.device("cpu"))
    resident = Path("/proc/self/statm").read_text().split()[1]
    assert buffer.rows.nbytes == 4 * 1_000_000 * (111 + 8 + 1 + 111 + 1) < 1.1e9
    buffer.rows.zero_()
    grown = int(Path("/proc/self/statm").read_text().split()[1]) - int(resident)
    assert grown * os.sysconf("SC_PAGE_SIZE") < 1.1e9


def test_numbers_that_are_not_finite_stop_a_run(gild_script, monkeypatch):
    """A poisoned reward reaches the action within a step or two; the checkpoint before stays."""
    args = gild_script.Args(env_id="Point2D-v0", total_timesteps=400, learning_starts=100, batch_size=16)
    args.cuda, args.ws_frac, args.eval_episodes, args.buffer_size = False, 0.0, 1, 500
    args.checkpoint_frequency = 100
    add = gild_script.ReplayBuffer.add

    def poisoned(self, obs, action, reward, next_obs, terminated):
        add(self, obs, action, float("nan") if self.added >= 250 else reward, next_obs, terminated)

    monkeypatch.setattr(gild_script.ReplayBuffer, "add", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"(action|losses/\w+) is not finite at step \d+; go on from"
    ):
        gild_script.train(args)
    (path,) = Path("runs").glob("*/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    assert state["global_step"] <= 250
    assert all(value.isfinite().all() for value in state["learners"]["actor"].values())
