"""Point2D: reach a goal in the plane, with a reward only close to it (EMRLD's 2-D navigation)."""

from typing import ClassVar, Literal

import gymnasium as gym
import numpy as np


class Point2D(gym.Env):
    """A point moves from (0, 0) by 0.1 times the action, for 100 steps or until it is at the goal.

    With d the distance to the goal after the step, and t the step's number from 1: reward 100 - t and the end
    of the episode when d < `goal_radius`; else 1 - d when d < `reward_radius`; else 0. With reward="dense" it
    is -d at every step, the goal's included.

    Observation: the position, (2,). Action: (2,) in [-1, 1]. The default goal (1, sqrt(3)), at distance 2, is
    on no diagonal: a dead, saturated actor walks a diagonal and would find a goal there one time in four.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}
    step_size = 0.1

    def __init__(
        self,
        goal: tuple[float, float] = (1.0, 3**0.5),
        goal_radius: float = 0.02,
        reward_radius: float = 0.2,
        reward: Literal["sparse", "dense"] = "sparse",
        render_mode: str | None = None,
    ):
        if reward not in ("sparse", "dense"):
            raise ValueError(f"reward is {reward!r}, but must be 'sparse' or 'dense'")
        self.goal = np.asarray(goal, dtype=np.float64)
        self.goal_radius, self.reward_radius, self.reward = goal_radius, reward_radius, reward
        self.render_mode = render_mode
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.position = np.zeros(2)
        self.path = [self.position]
        self.t = 0
        return self.position.copy(), {}

    def step(self, action):
        self.position = self.position + self.step_size * np.clip(action, -1.0, 1.0).astype(np.float64)
        self.path.append(self.position)
        self.t += 1
        distance = float(np.linalg.norm(self.position - self.goal))
        reached = distance < self.goal_radius
        if self.reward == "dense":
            reward = -distance
        elif reached:
            reward = 100.0 - self.t
        else:
            reward = 1.0 - distance if distance < self.reward_radius else 0.0
        return self.position.copy(), reward, reached, False, {"distance": distance}

    def render(self):
        """The path in black, the rewarded disc in red: (256, 256, 3) uint8, 6 x 6 units, y upwards."""
        axis = (np.arange(256) + 0.5) / 256 * 6 - 3
        from_goal = np.hypot(axis - self.goal[0], -axis[:, None] - self.goal[1])
        image = np.full((256, 256, 3), 255, np.uint8)
        image[from_goal < self.reward_radius] = (255, 160, 160)
        image[from_goal < 0.05] = (200, 0, 0)
        columns, rows = ((np.array(self.path) * (1, -1) + 3) / 6 * 255).round().astype(int).clip(1, 254).T
        for shift in np.ndindex(3, 3):  # a dot of 3 x 3 pixels for each position
            image[rows + shift[0] - 1, columns + shift[1] - 1] = 0
        return image
