"""The environments: rewards by hand, Gymnasium's checker, and the scripts' own copies of the wrapper."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
import gild_td3
from envs.point2d import Point2D
from envs.sparse import SPARSE_THRESHOLDS

TASKS = {"Hopper-v4": (11, 1.0), "Walker2d-v4": (17, 1.0), "HalfCheetah-v4": (17, 2.0), "Ant-v4": (111, 1.0)}


def pushed(env, x):
    """A reset environment whose body stands at x, moving forward at 1 m/s."""
    env.reset(seed=0)
    data = env.unwrapped
    qpos, qvel = data.data.qpos.copy(), data.data.qvel.copy()
    qpos[0], qvel[0] = x, 1.0
    data.set_state(qpos, qvel)


@pytest.mark.parametrize("env_id", TASKS)
def test_sparse_rewards_by_hand(gild_script, env_id):
    obs_dim, threshold = TASKS[env_id]
    args = gild_script.Args(env_id=env_id)
    sparse = gild_script.make_env(args, training=True)
    dense = gild_script.make_env(args, training=False)
    assert sparse.observation_space.shape == (obs_dim,)
    action = np.full(sparse.action_space.shape, 0.1, np.float32)
    seen = set()
    for x in (-threshold - 1, 0.0, threshold - 0.2, threshold + 0.1, threshold + 5):
        pushed(sparse, x), pushed(dense, x)
        for _ in range(3):
            obs, reward, terminated, truncated, info = sparse.step(action)
            dense_obs, dense_reward, *dense_ends, dense_info = dense.step(action)
            ahead = dense.unwrapped.data.qpos[0] > threshold
            assert info["x_position"] == dense_info["x_position"]
            assert reward == (dense_reward if ahead else 0.0)
            assert np.array_equal(obs, dense_obs) and [terminated, truncated] == dense_ends
            seen.add(bool(ahead))
    assert seen == {True, False}


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5", "Ant-v4"])
def test_registered_ids_are_the_scripts_environments(gild_script, env_id):
    """envs:SparseHopper-v4 and the in-file wrapper give the same observations and rewards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
        registered = gym.make(f"envs:Sparse{env_id}")
    own = gild_script.make_env(gild_script.Args(env_id=env_id), training=True)
    rewarded = 0
    for x in (0.0, 3.0):
        pushed(registered, x), pushed(own, x)
        for _ in range(5):
            action = np.zeros(own.action_space.shape, np.float32)
            a, b = registered.step(action), own.step(action)
            assert np.array_equal(a[0], b[0]) and a[1:4] == b[1:4]
            rewarded += a[1] != 0
    assert rewarded == 5


def test_every_sparse_id_is_registered():
    for task in SPARSE_THRESHOLDS:
        assert {f"Sparse{task}-v4", f"Sparse{task}-v5"} <= set(gym.registry)
    assert envs.SPARSE_THRESHOLDS == gild_td3.SPARSE_THRESHOLDS


def test_the_time_limit_stays(gild_script):
    env = gild_script.make_env(gild_script.Args(env_id="HalfCheetah-v4"), training=True)
    env.reset(seed=0)
    ends = [env.step(np.zeros(6, np.float32))[2:4] for _ in range(1_000)]
    assert not any(terminated for terminated, _ in ends)
    assert [truncated for _, truncated in ends] == [False] * 999 + [True]


@pytest.mark.parametrize(("dense", "training"), [(False, True), (True, True), (True, False)])
def test_dense_and_evaluation_rewards(gild_script, dense, training):
    """--dense trains on the task's reward; Point2D's evaluation is its sparse reward."""
    env = gild_script.make_env(gild_script.Args(env_id="Hopper-v4", dense=dense), training)
    env.reset(seed=0)
    assert (env.step(np.zeros(3, np.float32))[1] > 0) == dense
    env = gild_script.make_env(gild_script.Args(env_id="Point2D-v0", dense=dense), training)
    env.reset(seed=0)
    reward = env.step(np.ones(2, np.float32))[1]
    assert reward == (pytest.approx(-np.hypot(0.9, 3**0.5 - 0.1)) if dense and training else 0.0)


@pytest.mark.filterwarnings("ignore:.*A Box observation space")  # a plane has no bounds
def test_point2d_passes_gymnasiums_checker():
    check_env(gym.make("Point2D-v0", render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("reward", ["sparse", "dense"])
def test_point2d_against_its_formula(reward):
    goal = (0.5, -0.3)
    env = gym.make("Point2D-v0", goal=goal, goal_radius=0.05, reward_radius=0.4, reward=reward)
    rng = np.random.default_rng(0)
    kinds = set()
    for episode in range(40):
        obs, _ = env.reset(seed=episode)
        assert np.array_equal(obs, [0.0, 0.0])
        position = np.zeros(2)
        for t in range(1, 101):
            # steps towards the goal and beyond the box, disturbed so that some episodes miss it for long
            action = (10 * (goal - position) + rng.normal(0, episode / 10, 2)).astype(np.float32)
            obs, value, terminated, truncated, _ = env.step(action)
            position = position + 0.1 * np.clip(action, -1, 1).astype(np.float64)
            distance = np.sqrt(((position - goal) ** 2).sum())
            np.testing.assert_allclose(obs, position, atol=1e-12)
            assert terminated == (distance < 0.05)
            assert truncated == (t == 100)
            if reward == "dense":
                expected, kind = -distance, "dense"
            elif distance < 0.05:
                expected, kind = 100 - t, "goal"
            elif distance < 0.4:
                expected, kind = 1 - distance, "near"
            else:
                expected, kind = 0.0, "far"
            assert value == pytest.approx(expected, abs=1e-9)
            kinds.add(kind)
            if terminated or truncated:
                break
    assert kinds == ({"dense"} if reward == "dense" else {"goal", "near", "far"})


def test_point2d_defaults():
    env = Point2D()
    assert np.linalg.norm(env.goal) == pytest.approx(2.0)
    assert (env.goal_radius, env.reward_radius, env.reward) == (0.02, 0.2, "sparse")
    with pytest.raises(ValueError, match="sparse"):
        Point2D(reward="shaped")


def test_point2d_renders_its_path():
    env = gym.make("Point2D-v0", render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    for _ in range(10):
        env.step(np.ones(2, np.float32))
    after = env.render()
    assert before.shape == (256, 256, 3) and before.dtype == np.uint8
    changed = np.argwhere((before != after).any(-1))
    assert changed[:, 0].max() <= 128 and changed[:, 1].min() >= 127  # up and to the right
