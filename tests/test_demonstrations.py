"""Demonstration files: what is refused, what collecting and loading keep, how demos.make finds a policy."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from baselines import common, td3
from demos import collect, make
from demos.collect import save_demonstrations
from demos.make import BANDS, EXPERTS, PAIRS, evaluations, table
from evaluate import load_policy, rollout
from tests.conftest import ROOT
from tests.test_evaluate import SHIPPED, call, refusal, write_policy

NAMES = sorted(path.stem for path in (ROOT / "demos").glob("*.npz"))


def load(path, env_id="Point2D-v0"):
    """As the gild scripts load it: their DemonstrationBuffer is the one of baselines/common.py."""
    env = common.make_env(td3.Args(env_id=env_id), training=False)
    return common.DemonstrationBuffer(path, env_id, env, torch.device("cpu"))


def refused(path, env_id="Point2D-v0"):
    """The line with which a file is refused."""
    with pytest.raises(common.InputError) as refusal:
        load(path, env_id)
    assert str(path) in str(refusal.value) and len(str(refusal.value).splitlines()) == 1
    return str(refusal.value)


# FILES THAT ARE REFUSED


def arrays(**changes):
    good = dict(observations=np.zeros((8, 2), np.float32), actions=np.zeros((8, 2), np.float32))
    good["metadata"] = np.array(json.dumps({"env_id": "Point2D-v0"}))
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


BAD_ARRAYS = {
    "no observations": dict(observations=None),
    "no actions": dict(actions=None),
    "no metadata": dict(metadata=None),
    "metadata without a task": dict(metadata=np.array("{}")),
    "metadata that is no JSON": dict(metadata=np.array("Point2D-v0")),
    "wide observations": dict(observations=np.zeros((8, 3), np.float32)),
    "wide actions": dict(actions=np.zeros((8, 1), np.float32)),
    "flat observations": dict(observations=np.zeros(16, np.float32)),
    "one number": dict(observations=np.float32(1.0), actions=np.float32(1.0)),
    "unequal lengths": dict(actions=np.zeros((7, 2), np.float32)),
    "no pairs": dict(observations=np.zeros((0, 2), np.float32), actions=np.zeros((0, 2), np.float32)),
    "nan observation": dict(observations=np.full((8, 2), np.nan, np.float32)),
    "infinite observation": dict(observations=np.full((8, 2), np.inf, np.float32)),
    "nan action": dict(actions=np.full((8, 2), np.nan, np.float32)),
    "action outside": dict(actions=np.full((8, 2), 1.5, np.float32)),
    "text": dict(actions=np.full((8, 2), "left")),
    "another task": dict(metadata=np.array(json.dumps({"env_id": "Hopper-v4"}))),
}


@pytest.mark.parametrize("mistake", BAD_ARRAYS)
def test_a_bad_file_is_refused_in_one_line(mistake):
    path = Path("d.npz")
    np.savez(path, **arrays())
    load(path)  # the untouched file is good
    np.savez(path, **arrays(**BAD_ARRAYS[mistake]))
    refused(path)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("observations", np.nan, "pair 3 is not finite"),
        ("actions", -np.inf, "pair 3 is not finite"),
        ("actions", 1.25, "the action of pair 3 is 0.25 outside the box"),
        ("actions", -1.0001, "the action of pair 3 is 0.0001 outside the box"),
    ],
)
def test_the_first_bad_pair_is_named(name, value, words):
    column = np.zeros((8, 2))
    column[3, 1] = column[6, 0] = value
    np.savez("d.npz", **arrays(**{name: column}))
    assert words in refused(Path("d.npz"))


class Tripwire:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_damaged_and_pickled_files_are_refused(tmp_path):
    path = Path("d.npz")
    np.savez(path, **arrays())
    whole = path.read_bytes()
    pickled = np.array([Tripwire()], dtype=object)
    np.savez("pickled.npz", **arrays(observations=pickled), allow_pickle=True)
    contents = [whole[: len(whole) // 2], b"", b"observations", pickle.dumps(Tripwire())]
    contents.append(Path("pickled.npz").read_bytes())
    for content in contents:
        path.write_bytes(content)
        refused(path)
    refused("missing.npz")
    refused(tmp_path)  # a folder


# THE SHIPPED FILES


def test_a_v4_file_serves_v5_where_the_widths_agree():
    assert load(ROOT / "demos" / "Hopper-td3.npz", "Hopper-v5").obs.shape[1] == 11


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files(name):
    task, algorithm = name.split("-")
    path = ROOT / "demos" / f"{name}.npz"
    env_id = "Point2D-v0" if task == "Point2D" else f"{task}-v4"
    buffer = load(path, env_id)
    with np.load(path, allow_pickle=False) as file:
        metadata = json.loads(str(file["metadata"]))
        ends = file["terminations"] | file["truncations"]
        kinds = {name: file[name].dtype for name in file.files if name != "metadata"}
        returns = np.add.reduceat(file["rewards"].astype(float), np.flatnonzero(np.r_[True, ends[:-1]]))
    floats = dict.fromkeys(("observations", "actions", "rewards"), np.dtype("float32"))
    assert kinds == floats | dict.fromkeys(("terminations", "truncations"), np.dtype("bool"))
    assert ends[-1] and ends.sum() == metadata["episodes"]  # whole episodes
    assert PAIRS[task] <= len(buffer.obs) < PAIRS[task] + 1_000
    assert (metadata["env_id"], metadata["algorithm"]) == (env_id, algorithm)
    assert returns.mean() == pytest.approx(metadata["return_mean"], rel=1e-5)
    assert returns.std() == pytest.approx(metadata["return_std"], rel=1e-4)
    # clearly sub-optimal; the rule's 40 % hold for the policy, not for the few episodes that are in the file
    assert 0.2 < returns.mean() / EXPERTS[task][algorithm] < 0.9
    assert path.stat().st_size < 2_000_000
    assert (path.parent / "policies" / f"{name}.pt").stat().st_size < 1_000_000


WHOLE = {
    "Hopper-td3",
    "Walker2d-sac",
    "HalfCheetah-ddpg",
    "Ant-td3",
    "Point2D-sac",
}  # of the others: 1 episode


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file_comes_again_from_its_policy(name, tmp_path, monkeypatch):
    """The policy acts as in the file, and from the file's actions come its observations and rewards.

    Processors round a network's sums differently, and an episode magnifies that. So the policy's actions are
    compared up to rounding, and the environment is given the file's; all the rest must agree byte for byte.
    """
    task, algorithm = name.split("-")
    with np.load(ROOT / "demos" / f"{name}.npz") as file:
        shipped = dict(file)
    script = import_module(f"baselines.{algorithm}")
    make_env = script.make_env

    def make_following(args, training):
        env, actions = make_env(args, training), iter(shipped["actions"])
        step = env.step
        env.step = lambda action: step(next(actions))
        return env

    monkeypatch.setattr(script, "make_env", make_following)
    again, pairs = tmp_path / "again.npz", PAIRS[task] if name in WHOLE else 1
    collect.collect(SHIPPED / f"{name}.pt", again, pairs, explore=task == "Point2D", seed=0)
    with np.load(again) as file:
        found = dict(file)
    assert list(found) == list(shipped)
    if name in WHOLE:
        assert len(found["rewards"]) == len(shipped["rewards"])
        assert str(found["metadata"]) == str(shipped["metadata"])
    for column in ("observations", "rewards", "terminations", "truncations"):
        np.testing.assert_array_equal(found[column], shipped[column][: len(found[column])])
    assert np.abs(found["actions"] - shipped["actions"][: len(found["actions"])]).max() < 1e-4


def test_the_readme_has_the_table_of_the_shipped_files():
    assert table(ROOT / "demos") in (ROOT / "demos" / "README.md").read_text("utf-8")


# COLLECTING


class Box(gym.Env):
    """An action box with any bounds. As careless authors do, it changes its caller's arrays and its own."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, low, high, dtype="float32", render_mode=None):
        low, high = np.array(low, dtype), np.array(high, dtype)
        self.action_space = gym.spaces.Box(low, high, dtype=np.dtype(dtype).type)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, low.shape, np.float64)
        self.state = np.zeros(low.shape)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state[:] = self.np_random.normal(size=self.state.shape)
        self.steps, self.log = 0, []
        return self.state, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.log.append((self.state.copy(), action.copy()))
        self.state += self.np_random.normal(size=self.state.shape)
        action *= 10
        self.steps += 1
        return self.state, np.float32(1.0), False, self.steps == 7, {}


BOXES = {
    "unit": ([-1, -1], [1, 1]),
    "small": ([-0.05, -0.05], [0.05, 0.05]),
    "a third": ([-0.3, -0.7], [0.9, 0.1]),
    "large": ([-226.74268, -1e4], [224.91557, 3e4]),
    "shifted": ([3.0, -5.0], [5.0, -4.9]),
}
for name, (low, high) in BOXES.items():
    for dtype in ("float32", "float64"):
        env_id = f"{name.replace(' ', '-')}-{dtype}-v0"
        gym.register(env_id, Box, max_episode_steps=100, kwargs={"low": low, "high": high, "dtype": dtype})


@pytest.mark.filterwarnings("ignore")  # Gymnasium's advice on such boxes
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BOXES)
def test_what_happened_is_stored_in_the_units_of_the_environment(name, dtype, monkeypatch):
    """Saturated actions too: they are at the bounds of the box, and load as -1 and 1."""
    env_id = f"{name.replace(' ', '-')}-{dtype}-v0"
    policy = write_policy(Path("policy.pt"), env_id=env_id)
    whole = torch.load(policy, weights_only=True)
    for weight in whole["actor"].values():
        weight *= 3  # where an untrained actor's actions are small
    torch.save(whole, policy)
    logs, reset = [], Box.reset
    monkeypatch.setattr(Box, "reset", lambda env, **more: [logs.append(env), reset(env, **more)][1])
    code, _, err = call(collect, "--policy", policy, "--out", "d.npz", "--pairs", "7")
    assert code == 0, err
    states, actions = map(np.array, zip(*logs[-1].log, strict=True))
    with np.load("d.npz") as file:
        assert np.array_equal(file["observations"], np.float32(states)) and len(states) == 7
        box = logs[-1].action_space
        size = np.maximum(abs(box.low), abs(box.high)).max()
        np.testing.assert_allclose(file["actions"], actions, atol=3e-7 * size)
        assert (file["actions"] >= np.float32(box.low)).all() and (
            file["actions"] <= np.float32(box.high)
        ).all()
    actor, script, *_ = load_policy(policy)
    expected = np.array([script.act(actor, np.float32(state)) for state in states])
    assert abs(expected).max() > 0.5
    np.testing.assert_allclose(
        load("d.npz", env_id).actions, expected, atol=1e-4 if name == "shifted" else 1e-6
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BOXES)
def test_the_bounds_of_any_box_load(name, dtype):
    """A float64 bound has no float32 of its own: the nearest one can be outside of the box."""
    low, high = (np.array(bound, dtype) for bound in BOXES[name])
    actions = np.array([low, high, [low[0], high[1]], (low + high) / 2])
    save_demonstrations("d.npz", f"{name.replace(' ', '-')}-{dtype}-v0", np.zeros((4, 2)), actions)
    loaded = load("d.npz", f"{name.replace(' ', '-')}-{dtype}-v0").actions
    np.testing.assert_allclose(loaded, [[-1, -1], [1, 1], [-1, 1], [0, 0]], atol=1e-5)


def test_collecting_from_a_run(algorithm):
    """Whole episodes, the same each time; with --explore others."""
    script = import_module(f"baselines.{algorithm}")
    settings = dict(env_id="Point2D-v0", total_timesteps=20, eval_episodes=1, buffer_size=50, cuda=False)
    policy = script.train(script.Args(**settings)) / "policy.pt"
    for name, more in (("a", []), ("b", []), ("c", ["--explore"])):
        flags = "--policy", policy, "--pairs", 150, "--out", f"{name}.npz", *more
        code, out, err = call(collect, *flags)
        assert code == 0 and "200 pairs, 2 episodes, return" in out, err
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()
    plain, explored = load("a.npz"), load("c.npz")
    assert len(plain.obs) == 200  # two whole episodes
    assert torch.equal(plain.obs[:100], plain.obs[100:]) and not torch.equal(plain.obs, explored.obs)
    with np.load("a.npz") as file:
        metadata = json.loads(str(file["metadata"]))
        assert np.flatnonzero(file["truncations"]).tolist() == [99, 199] and not file["terminations"].any()
    assert (metadata["script"], metadata["global_step"]) == (f"baselines.{algorithm}", 20)
    actor, _, args, _ = load_policy(policy)
    np.testing.assert_allclose(script.act(actor, plain.obs.numpy()), plain.actions.numpy(), atol=1e-6)
    first = next(rollout(actor, script, args, script.make_env(args, training=False), seed=0))
    assert np.array_equal(first["observations"], plain.obs[:100])
    assert np.array_equal(first["actions"], plain.actions[:100])


def test_terminations_are_not_truncations():
    collect.collect(SHIPPED / "Point2D-sac.pt", Path("d.npz"), 1_000, explore=True, seed=0)
    with np.load("d.npz") as file:
        starts = np.flatnonzero(np.r_[True, (file["terminations"] | file["truncations"])[:-1]])
        lengths = np.diff([*starts, len(file["rewards"])])
        ends = starts + lengths - 1
        assert not (file["terminations"] & file["truncations"]).all() and 1_000 <= lengths.sum() < 1_100
        assert (file["truncations"][ends] == (lengths == 100)).all() and file["terminations"].any()


@pytest.mark.parametrize("flags", ["--pairs 0", "--seed -1", "--out d.pt"])
def test_wrong_arguments_of_collect(flags):
    good = "--policy", SHIPPED / "Point2D-td3.pt", "--out", "d.npz"
    assert flags in refusal(collect, *good, *flags.split(), box=True)


def test_what_collect_refuses():
    np.savez("old.npz", **arrays())
    assert "there is no missing.pt" in refusal(collect, "--policy", "missing.pt", "--out", "d.npz")
    assert "is not a policy file" in refusal(collect, "--policy", "old.npz", "--out", "d.npz")
    policy = SHIPPED / "Point2D-td3.pt"
    assert "there is no folder missing" in refusal(collect, "--policy", policy, "--out", "missing/d.npz")
    Path("d.npz").mkdir()
    assert "d.npz could not be written" in refusal(
        collect, "--policy", policy, "--out", "d.npz", "--pairs", 1
    )


def test_saving_replaces_a_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "d.npz"
    pairs = np.zeros((1, 2))
    save_demonstrations(path, "Point2D-v0", pairs, pairs)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_demonstrations(path, "Point2D-v0", pairs, pairs, metadata={"x": object()})

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(ValueError, match="no space left"):
        save_demonstrations(path, "Point2D-v0", pairs, pairs)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# DEMOS.MAKE


@pytest.fixture
def trainings(monkeypatch):
    """The trainings that demos.make starts in this process; one that hangs is killed."""
    started, start = [], make.start

    def watched(command):
        started.append(start(command))
        timer = threading.Timer(90, started[-1].kill)
        timer.daemon = True
        timer.start()
        return started[-1]

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(make, "start", watched)
    return started


def plant(policies, name="Point2D-v0__td3-expert__1__1.000000"):
    """A run with these evaluations: {step: (mean return, policy file)}."""
    run_dir = Path("runs") / name
    (run_dir / "policies").mkdir(parents=True)
    (run_dir / "checkpoint.pt").touch()
    rows = [
        "global_step,return_mean,return_std",
        *(f"{step},{mean},0.0" for step, (mean, _) in policies.items()),
    ]
    (run_dir / "evaluations.csv").write_text("\n".join(rows) + "\n")
    for step, (_, policy) in policies.items():  # the step tells them apart
        saved = torch.load(policy, weights_only=True) | {"global_step": step}
        torch.save(saved, run_dir / f"policies/{step}.pt")
    return run_dir


def test_making_demonstrations_stops_and_resumes(tmp_path, monkeypatch, trainings):
    """SIGTERM leaves a checkpoint and no file; the same command then resumes the one run."""
    flags = "--env-id Point2D-v0 --algo td3 --total-timesteps 3000 --out ."
    command = [sys.executable, "-m", "demos.make", *flags.split()]
    with open("log", "w") as log, subprocess.Popen(command, stdout=log, start_new_session=True) as first:
        deadline = time.monotonic() + 90
        while "step       250" not in Path("log").read_text("utf-8") and time.monotonic() < deadline:
            time.sleep(0.05)
        first.terminate()
        try:
            first.wait(60)
        finally:
            if first.poll() is None:
                os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == 143 and not list(Path().rglob("*.npz")), Path("log").read_text("utf-8")
    (run_dir,) = Path("runs").iterdir()
    stopped = torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"]
    assert 250 <= stopped < 3_000 and stopped % 100 == 0  # at the end of an episode
    settings = json.loads((run_dir / "args.json").read_text())["args"]
    assert settings["dense"] and settings["keep_policies"]

    def first_after(run_dir, *_):
        return next((step for step in evaluations(run_dir) if step > stopped), None)

    monkeypatch.setattr(make, "behavior", first_after)
    monkeypatch.setitem(PAIRS, "Point2D", 200)
    Path("README.md").write_text("before ±\n\n| file |\n|---|\n\nafter\n", "utf-8")
    make.main(make.Args("Point2D-v0", "td3", total_timesteps=3_000, out=tmp_path))
    assert list(Path("runs").iterdir()) == [run_dir] and trainings[0].returncode == 143
    *_, global_step = load_policy(Path("policies/Point2D-td3.pt"))
    assert global_step == first_after(run_dir) and min(evaluations(run_dir)) == 250
    load(Path("Point2D-td3.npz"))
    assert Path("README.md").read_text("utf-8") == f"before ±\n\n{table(tmp_path)}\nafter\n"
    assert "| Point2D-td3 |" in table(tmp_path)


def test_the_behavior_policy_is_the_first_that_the_rule_admits(monkeypatch, capsys):
    """In the band over its evaluation's ten episodes, and over 20 others."""
    inputs = []
    monkeypatch.setattr(make, "rollout", lambda *given: inputs.append(given[4:]) or rollout(*given))
    untrained, good = write_policy(Path("untrained.pt"), env_id="Point2D-v0"), SHIPPED / "Point2D-td3.pt"
    policies = {250: (0.0, good), 500: (60.0, untrained), 750: (90.0, good), 1_000: (45.0, good)}
    run_dir = plant(policies | {1_250: (50.0, good)})
    known = {}
    assert make.behavior(run_dir, 42.0, 75.0, True, known) == 1_000
    assert list(known) == [500, 1_000] and known[500] == 0 and 65 < known[1_000] < 75
    assert "step 1,000: 45.0, over 20" in capsys.readouterr().out
    assert inputs == [(1_000, True)] * 2  # seeds of their own, and the exploration that Point2D needs
    known[1_000] = 1.0  # a second evaluation is not repeated
    assert make.behavior(run_dir, 42.0, 75.0, True, known) == 1_250
    assert make.behavior(run_dir, 91.0, 95.0, True, known) is None


def test_the_expert_is_trained_to_the_end(tmp_path, monkeypatch):
    """With --expert the band is a share of the run's own best: the published return plays no part."""
    monkeypatch.setitem(EXPERTS["Point2D"], "td3", 1e6)
    monkeypatch.setitem(PAIRS, "Point2D", 200)
    good = SHIPPED / "Point2D-td3.pt"
    run_dir = plant({250: (30.0, good), 500: (75.0, good), 750: (100.0, good)})
    states = iter([(run_dir, False), (run_dir, True)])
    monkeypatch.setattr(make, "training", lambda args: (state for state in states))
    make.main(make.Args("Point2D-v0", "td3", expert=True, out=tmp_path))
    assert next(states, None) is None  # not before the end
    low, high = (share * 100 for share in BANDS["Point2D"])
    assert low <= 75 <= high and not low <= 30 <= high
    assert (tmp_path / "policies/Point2D-td3.pt").read_bytes() == (run_dir / "policies/500.pt").read_bytes()
    load(tmp_path / "Point2D-td3.npz")


def test_a_higher_band_takes_a_later_policy_of_the_same_training(tmp_path, monkeypatch):
    monkeypatch.setitem(PAIRS, "Point2D", 200)
    good = SHIPPED / "Point2D-td3.pt"
    plant({250: (60.0, good), 500: (70.0, good), 750: (80.0, good)})
    monkeypatch.setattr(make, "start", lambda command: pytest.fail("a training was started"))
    for step, band in ((250, None), (500, (0.8, 0.9))):  # of 83.8
        out = tmp_path / str(step)
        make.main(make.Args("Point2D-v0", "td3", band=band, out=out))
        assert load_policy(out / "policies/Point2D-td3.pt")[-1] == step
        load(out / "Point2D-td3.npz")


def test_a_finished_run_is_not_trained_again(monkeypatch):
    """The trainer would refuse it: there is nothing to do."""
    good = SHIPPED / "Point2D-td3.pt"
    plant({250: (0.0, good), 500: (1.0, good)})
    monkeypatch.setattr(make, "start", lambda command: pytest.fail("a training was started"))
    Path("policies").mkdir()
    flags = "--env-id", "Point2D-v0", "--total-timesteps", 500, "--out", "."
    assert "has no policy with a return from 42 to 75" in refusal(make, *flags)


def test_what_make_refuses(monkeypatch, trainings, tmp_path):
    assert "Pendulum-v1 has no Expert's return" in refusal(make, "--env-id", "Pendulum-v1", "--out", ".")
    backwards = "--env-id", "Point2D-v0", "--band", "0.9", "0.8", "--out", "."
    assert "--band 0.9 0.8: the lower share comes first" in refusal(make, *backwards)
    Path("file").touch()
    assert "--out" in refusal(make, "--env-id", "Point2D-v0", "--out", "file")
    Path("policies").mkdir()
    monkeypatch.setattr(sys, "executable", "false")  # a training that fails
    assert "ended with code 1" in refusal(make, "--env-id", "Point2D-v0", "--out", ".")


def test_windows_ends_a_training_with_ctrl_break(monkeypatch):
    """terminate() would be a kill there, and Ctrl-C does not reach a process group of its own."""
    signals, started = [], {}

    class Process:
        def __init__(self, command, **options):
            started.update(options)

        def send_signal(self, number):
            signals.append(number)

        def communicate(self):
            signals.append("waited")

    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", 1, raising=False)
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    monkeypatch.setattr(subprocess, "Popen", Process)
    make.stop(make.start(["-m", "baselines.td3"]))
    assert signals == [1, "waited"] and started["creationflags"] == 512
