"""A run that is killed or stopped, and resumed, ends up as the uninterrupted run, bit for bit."""

import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

import gild_ddpg
from envs.point2d import Point2D
from tests import soak
from tests.conftest import ROOT, call, same
from tests.soak import assert_same_run, equal

# episodes, evaluations, checkpoints, the warm start and the ring's capacity all end at different steps
FLAGS = """--env-id Point2D-v0 --total-timesteps 450 --learning-starts 200 --batch-size 32 --no-cuda
--eval-frequency 90 --eval-episodes 1 --checkpoint-frequency 150 --buffer-size 330"""
GILD = f"{FLAGS} --gild-init random --ws-frac 0.2"


def run_dir():
    (only,) = Path("runs").resolve().iterdir()
    return only


def state_of(path):
    return torch.load(path / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A DDPG+GILD run of 450 steps; its last checkpoint is older than its last evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        assert call(gild_ddpg, *GILD.split())[0] == 0
        assert state_of(run_dir())["global_step"] == 400
        return run_dir()


@pytest.fixture
def copy(finished, tmp_path):
    """The same run as if it had been killed after its last checkpoint, in tmp_path."""
    path = shutil.copytree(finished, tmp_path / "runs" / finished.name)
    (path / "evaluations.csv").unlink()
    (path / "policy.pt").unlink()
    return path


def interrupted(script, monkeypatch, step, how, flags):
    """A run in which `how` is called at an evaluation. Returns what `call` returns."""
    original = script.save_evaluation

    def save_evaluation(run_dir, writer, args, global_step, *more):
        original(run_dir, writer, args, global_step, *more)
        if global_step == step:
            how()

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_evaluation", save_evaluation)
        return call(script, *flags.split())


class Killed(BaseException):
    """Ends a run where a kill could have."""


def kill():
    raise Killed


# KILLS


def test_kills_at_random_moments(algorithm, tmp_path):
    flags = soak.FLAGS.replace("1500", "400")
    first = soak.CONTEXT.Process()  # it waits for the server's imports, which no run has to
    first.start()
    first.join()
    start = time.time()
    whole = soak.uninterrupted(algorithm, tmp_path / "whole", flags)
    longest = (time.time() - start) / 2
    rng = random.Random(algorithm)
    moments = [rng.uniform(0, longest) for _ in range(2)]
    path, kills = soak.killed(algorithm, tmp_path / "killed", moments, flags)
    assert kills > 0
    assert_same_run(path, whole)


def test_what_came_after_the_checkpoint_is_repeated(finished, copy):
    (copy / "checkpoint.pt.tmp").write_bytes(b"half of a checkpoint")
    (copy / "evaluations.csv").write_text("global_step,return_mean,return_std\n90,1.0,1.0\n420,7.0,7.0\n")
    assert call(gild_ddpg, "--resume", copy)[0] == 0
    assert_same_run(copy, finished)


def test_a_run_killed_before_its_first_episode_ends_starts_again(finished, monkeypatch):
    """It resumes from the checkpoint of step 0, and fits f as the first attempt did."""
    fit = partial(gild_ddpg.fit_imitation, iterations=20)
    monkeypatch.setattr(gild_ddpg, "fit_imitation", fit)
    flags = GILD.replace("random", "imitation").replace("450", "300")
    with pytest.raises(Killed):
        interrupted(gild_ddpg, monkeypatch, 90, kill, flags)
    path = run_dir()
    assert state_of(path)["global_step"] == 0 and (path / "evaluations.csv").exists()
    assert call(gild_ddpg, "--resume", path)[0] == 0
    resumed = path.rename(path.parents[1] / "resumed")
    assert call(gild_ddpg, *flags.split())[0] == 0
    assert_same_run(resumed, run_dir())
    assert not equal(state_of(resumed)["gild"], state_of(finished)["gild"])  # the fit makes a difference


def test_an_extension_that_is_stopped_early_loses_nothing(finished, monkeypatch, tmp_path):
    """The run was evaluated at 450, and an extension begins at 200 and is stopped after 270."""
    path = shutil.copytree(finished, tmp_path / "runs" / finished.name)

    def rows():
        return (path / "evaluations.csv").read_text().splitlines()[1:]

    def steps():
        return [int(row.split(",")[0]) for row in rows()]

    old_rows, old_policy = rows(), (path / "policy.pt").read_bytes()
    early = {"global_step": 200, "evaluations": ["global_step,return_mean,return_std", *old_rows[:2]]}
    torch.save(state_of(path) | early, path / "checkpoint.pt")

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    flags = f"--resume {path} --total-timesteps 900"
    assert interrupted(gild_ddpg, monkeypatch, 270, stop, flags)[0] == 128 + signal.SIGTERM
    assert steps() == [90, 180, 270, 360, 450] and rows()[3:] == old_rows[3:]
    assert (path / "policy.pt").read_bytes() == old_policy
    assert call(gild_ddpg, "--resume", path, "--total-timesteps", "540")[0] == 0
    assert steps() == [90, 180, 270, 360, 450, 540]
    assert torch.load(path / "policy.pt", weights_only=True)["global_step"] == 540


def test_it_says_where_it_resumes(copy):
    assert call(gild_ddpg, "--resume", copy)[1].startswith(f"{copy} on cpu, resumed from step 400\n")


def evaluations_and_actor(path):
    return (path / "evaluations.csv").read_text(), torch.load(path / "policy.pt", weights_only=True)["actor"]


@pytest.mark.parametrize(("first", "at_once"), [("0.2", "0.1"), ("1", "1")])
def test_more_steps_are_as_if_asked_for_at_once(first, at_once, tmp_path):
    """The warm start keeps its length, 0.2 * 250 = 0.1 * 500 iterations; one to the end stays that."""
    assert call(gild_ddpg, *GILD.split(), "--total-timesteps", "250", "--ws-frac", first)[0] == 0
    path = run_dir()
    assert state_of(path)["global_step"] == 200
    assert call(gild_ddpg, "--resume", path, "--total-timesteps", "500")[0] == 0
    longer = path.rename(tmp_path / "longer")
    assert call(gild_ddpg, *GILD.split(), "--total-timesteps", "500", "--ws-frac", at_once)[0] == 0
    assert_same_run(longer, run_dir())


def test_a_finished_run_has_nothing_to_do(copy):
    """Neither for the steps it already has nor for fewer; its files are left as they are."""
    assert call(gild_ddpg, "--resume", copy, "--total-timesteps", "460")[0] == 0
    before = {path: path.read_bytes() for path in copy.iterdir()}
    assert json.loads((copy / "args.json").read_text())["args"]["total_timesteps"] == 450  # as it was given
    for total in (None, 460, 430, 300):
        more = [] if total is None else ["--total-timesteps", total]
        code, out, err = call(gild_ddpg, "--resume", copy, *more)
        assert (code, out) == (2, "") and "nothing to do" in err, more
        assert before == {path: path.read_bytes() for path in copy.iterdir()}


def test_fewer_steps_than_the_checkpoint_has(copy):
    code, out, err = call(gild_ddpg, "--resume", copy, "--total-timesteps", "390")
    assert (code, out) == (2, "") and "nothing to do" in err


def test_a_shortened_run_leaves_a_policy_that_can_be_loaded(copy):
    """Its warm start is longer than itself; --ws-frac still is a fraction."""
    saved = json.loads((copy / "args.json").read_text())
    saved["args"]["ws_frac"] = 0.99
    (copy / "args.json").write_text(json.dumps(saved))
    assert call(gild_ddpg, "--resume", copy, "--total-timesteps", "420")[0] == 0
    args = torch.load(copy / "policy.pt", weights_only=True)["args"]
    assert gild_ddpg.Args(**args).ws_frac == 1


# SIGNALS


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("gild_ddpg", signal.SIGINT),
        ("baselines.td3", signal.SIGTERM),
        ("baselines.ddpg_il", signal.SIGINT),
        ("baselines.sac", signal.SIGTERM),
    ],
)
def test_a_signal_leaves_a_checkpoint_at_the_end_of_the_episode(name, number, finished, monkeypatch):
    script = import_module(name)
    flags = GILD if name == "gild_ddpg" else FLAGS.replace("450", "300")
    total = flags.split()[3]
    command = ["/usr/bin/python", "-O", "-m", name]
    monkeypatch.setattr(sys, "orig_argv", [*command, *flags.split()])
    code, out, err = interrupted(script, monkeypatch, 180, lambda: os.kill(os.getpid(), number), flags)
    path = run_dir()
    assert code == 128 + number and state_of(path)["global_step"] == 200
    assert err == "stopping after this episode; Ctrl-C again stops at once\n"
    resume = ["--resume", str(path), "--total-timesteps", total]
    line = f"to resume: cd {shlex.quote(os.getcwd())} && {shlex.join(command + resume)}"
    assert out.splitlines()[-1] == line
    assert call(script, *resume)[0] == 0
    resumed = path.rename(path.parents[1] / "resumed")
    if name != "gild_ddpg":
        assert call(script, *flags.split())[0] == 0
        finished = run_dir()
    (csv, actor), (expected_csv, expected_actor) = map(evaluations_and_actor, (resumed, finished))
    assert csv == expected_csv and same(actor, expected_actor)


def test_a_signal_in_the_last_episode_changes_nothing(finished, monkeypatch):
    """Step 450 is in the middle of an episode."""
    code, out, _ = interrupted(gild_ddpg, monkeypatch, 450, lambda: os.kill(os.getpid(), signal.SIGINT), GILD)
    assert code == 0 and "to resume" not in out
    assert_same_run(run_dir(), finished)


def wait_for(condition, process):
    end = time.time() + 300
    while not condition() and process.poll() is None:
        assert time.time() < end
        time.sleep(0.02)


def test_the_printed_command_resumes_from_anywhere(tmp_path, monkeypatch):
    """A space in the folder's name, demonstrations named relative to it, and more steps than at first."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    shutil.copy(ROOT / "demos" / "Point2D-ddpg.npz", folder / "my demos.npz")
    monkeypatch.chdir(folder)
    flags = [*GILD.split(), "--demo-path", "my demos.npz", "--checkpoint-frequency", "1"]
    assert call(gild_ddpg, *flags, "--total-timesteps", "200", "--ws-frac", "0.45")[0] == 0
    path = run_dir()
    command = [sys.executable, os.path.relpath(ROOT / "gild_ddpg.py"), "--resume", f"runs/{path.name}"]
    command += ["--total-timesteps", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, **pipes)
    wait_for(lambda: (path / "evaluations.csv").read_text().count("\n") > 4, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143
    stopped = state_of(path)["global_step"]
    assert stopped >= 270 and (path / "policy.pt").exists()
    printed = out.splitlines()[-1].removeprefix("to resume: ")
    assert printed.endswith("--total-timesteps 100000")
    end = stopped + 30
    printed = printed.replace("100000", str(end))
    done = subprocess.run(printed, shell=True, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (path / "evaluations.csv").read_text().splitlines()[-1].startswith(f"{end},")
    assert len(list(folder.iterdir())) == 2


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    """HalfCheetah's episodes have a thousand steps."""
    flags = "--env-id HalfCheetah-v4 --ws-frac 0 --no-cuda --learning-starts 256 --eval-episodes 1"
    process = soak.start("ddpg", tmp_path, f"{flags} --eval-frequency 300".split())
    output = tmp_path / "output.txt"
    for words in ("step       300", "stopping after this episode"):
        end = time.time() + 300
        while words not in (output.read_text() if output.exists() else ""):
            assert process.exitcode is None and time.time() < end
            time.sleep(0.02)
        process.terminate()
    process.join(300)
    assert process.exitcode == -signal.SIGTERM
    (path,) = tmp_path.glob("runs/*")
    assert state_of(path)["global_step"] == 0


# WRITING


def test_a_run_stays_in_its_folder(finished, tmp_path, monkeypatch):
    """Even if the environment leaves the working directory, as some simulators do."""
    elsewhere, original = tmp_path / "elsewhere", Point2D.step
    elsewhere.mkdir()

    def step(self, action):
        os.chdir(elsewhere)
        return original(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(Point2D, "step", step)
        assert call(gild_ddpg, *GILD.split())[0] == 0
    assert not list(elsewhere.iterdir())
    monkeypatch.chdir(tmp_path)
    assert_same_run(run_dir(), finished)
    assert any(path.stat().st_size > 1_000 for path in run_dir().glob("events.*"))


def test_a_checkpoint_holds_the_filled_part_of_the_buffer_only(gild_script):
    args = gild_script.Args(
        env_id="Point2D-v0", total_timesteps=200, buffer_size=10_000, ws_frac=0.0, cuda=False
    )
    args.checkpoint_frequency = args.eval_episodes = 1
    buffer = state_of(gild_script.train(args))["buffer"]
    assert buffer["added"] == len(buffer["rows"]) == 200
    assert buffer["rows"].untyped_storage().nbytes() == 4 * 200 * (2 + 2 + 1 + 2 + 1)


def test_the_replay_buffer_takes_what_its_rows_need(gild_script):
    """Ant's 111 observations and 8 actions, a million times."""
    buffer = gild_script.ReplayBuffer(1_000_000, 111, 8, torch.device("cpu"))
    assert buffer.rows.nbytes == 4 * 1_000_000 * (111 + 8 + 1 + 111 + 1) < 1.1e9


def test_a_failed_write_leaves_the_last_file(copy):
    """A limit on the size of files stands for a full disk: it stops the next checkpoint half way."""
    before, limits = (copy / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        code, _, err = call(gild_ddpg, "--resume", copy, "--total-timesteps", "2000")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = err.splitlines()
    assert code == 2 and "checkpoint.pt could not be written" in line and "File too large" in line
    assert (copy / "checkpoint.pt").read_bytes() == before
    assert not list(copy.glob("*.tmp"))


# NUMBERS THAT ARE NOT FINITE


@pytest.mark.parametrize(("name", "step"), [("gild_ddpg", 400), ("gild_td3", 251), ("gild_sac", 400)])
def test_a_nan_stops_the_run_and_the_checkpoint_before_it_stays(name, step, monkeypatch):
    """From this step on the task's rewards are nan: in mid-episode, or where the next checkpoint is due."""
    script, original = import_module(name), Point2D.step
    args = script.Args(env_id="Point2D-v0", total_timesteps=600, learning_starts=100, batch_size=16)
    args.cuda, args.ws_frac, args.eval_episodes, args.buffer_size = False, 0.0, 1, 500
    args.checkpoint_frequency = 100

    def poisoned(self, action):
        self.steps = getattr(self, "steps", 0) + 1
        obs, reward, *ends = original(self, action)
        return obs, reward if self.steps < step else float("nan"), *ends

    with monkeypatch.context() as patch:
        patch.setattr(Point2D, "step", poisoned)
        with pytest.raises(FloatingPointError, match=r"not finite at step \d+"):
            script.train(args)
    state = state_of(run_dir())
    assert state["global_step"] == (step - 1) // 100 * 100
    tensors = [value for name in ("actor", "critic", "target_critic") for value in state[name].values()]
    assert all(value.isfinite().all() for value in [*tensors, state["buffer"]["rows"]])
    args.resume, args.total_timesteps = str(run_dir()), step + 20
    script.train(args)  # without the poison it can be resumed


@pytest.mark.parametrize("name", ["actor", "critic", "target_critic"])
def test_no_weights_are_saved_that_are_not_finite(name, copy):
    kinds = {"actor": gild_ddpg.Actor, "critic": gild_ddpg.Critic, "target_critic": gild_ddpg.Critic}
    parts = {part: kind(2, 2) for part, kind in kinds.items()}
    next(parts[name].parameters()).data[0, 0] = float("inf")
    before = (copy / "checkpoint.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="not finite at step 7"):
        gild_ddpg.save_checkpoint(copy / "checkpoint.pt", parts, [], 7, [])
    assert (copy / "checkpoint.pt").read_bytes() == before
