"""Sparse rewards for the MuJoCo tasks: nothing until the agent has moved a certain distance forward.

`SPARSE_THRESHOLDS`, `InputError` and `SparseReward` are baselines/common.py's, to the letter.
"""

import gymnasium as gym

SPARSE_THRESHOLDS = {"Hopper": 1.0, "Walker2d": 1.0, "HalfCheetah": 2.0, "Ant": 1.0}  # metres along +x


class InputError(ValueError):
    """A user's mistake, reported in one line."""


class SparseReward(gym.Wrapper):
    """The task's own reward while the agent is more than `threshold` metres ahead of its start, else 0."""

    def __init__(self, env: gym.Env, threshold: float):
        super().__init__(env)
        self.threshold = threshold
        self.x_init = float(getattr(env.unwrapped, "init_qpos", [0.0])[0])  # the model's, not the episode's

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if "x_position" not in info:
            raise InputError("--sparse-threshold needs a task whose info has x_position")
        ahead = info["x_position"] - self.x_init > self.threshold
        return obs, reward if ahead else 0.0, terminated, truncated, info


def make_sparse(env_id: str, threshold: float, **kwargs) -> gym.Env:
    """The entry point of the ids `envs:SparseHopper-v4` and so on."""
    if env_id == "Ant-v4":
        kwargs.setdefault("use_contact_forces", True)  # |S| = 111, as in the paper
    return SparseReward(gym.make(env_id, **kwargs), threshold)
