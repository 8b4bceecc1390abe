"""Stable-Baselines3's PPO, SAC and TD3 on the dense tasks, with the hyperparameters of the baselines.

    pip install -r benchmark/requirements.txt
    python -m benchmark.sb3 --algo td3 --env-id Hopper-v4 --total-timesteps 100000

Shows that the baselines' cores are right: benchmark/studies/cores.toml trains them; its report has both.
Evaluations are the baselines': every 5,000 steps, 10 episodes without noise from the same starts. At the end
it writes benchmark/results/cores/sb3-ALGO-TASK-SEED.csv.
"""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from baselines.common import evaluate, make_env, task_name
from benchmark.sweep import RESULTS, write

NETWORK = {"net_arch": [256, 256]}
OFF_POLICY = {"learning_rate": 3e-4, "learning_starts": 10_000, "train_freq": 1, "policy_kwargs": NETWORK}


@dataclass
class Args:
    algo: Literal["ppo", "sac", "td3"] = "td3"  # the algorithm
    env_id: str = "Hopper-v4"  # the task, with its dense reward
    seed: int = 1  # seed of networks, environment, exploration and replay
    total_timesteps: int = 100_000  # environment steps of the run
    torch_threads: int = 1  # CPU threads of PyTorch

    dense = True
    sparse_threshold = None


def make_model(args: Args):
    """The model, and its environment; what is not said here is the library's default."""
    env = DummyVecEnv([lambda: Monitor(make_env(args, training=True))])
    common = {"seed": args.seed, "device": "cpu"}
    if args.algo == "ppo":  # CleanRL's settings
        env = VecNormalize(env, clip_obs=10, clip_reward=10)
        optimizer = {"ortho_init": True, "optimizer_kwargs": {"eps": 1e-5}}
        anneal = {"learning_rate": lambda remaining: 3e-4 * remaining}
        value = {"clip_range_vf": 0.2, "vf_coef": 0.25}  # CleanRL: 0.5, of half the squared error
        return PPO("MlpPolicy", env, policy_kwargs=optimizer, **anneal, **value, **common), env
    if args.algo == "sac":
        return SAC("MlpPolicy", env, ent_coef=0.2, **OFF_POLICY, **common), env
    size = env.action_space.shape
    noise = NormalActionNoise(np.zeros(size), np.full(size, 0.1))
    return TD3("MlpPolicy", env, action_noise=noise, batch_size=256, **OFF_POLICY, **common), env


class Evaluation(BaseCallback):
    """Evaluates every 5,000 steps. A row: step, mean and std of the return, seconds of the run so far."""

    def __init__(self, args: Args, env):
        super().__init__()
        self.args, self.env, self.rows, self.start = args, env, [], time.time()
        self.eval_env = make_env(args, training=False)

    def act(self, model, obs):
        if isinstance(self.env, VecNormalize):
            obs = self.env.normalize_obs(obs)
        return model.predict(obs, deterministic=True)[0]

    def _on_step(self) -> bool:
        if self.num_timesteps % 5_000 == 0:
            returns = evaluate(self.act, self.model, self.eval_env, 10, seed=self.args.seed + 100)
            self.rows.append([self.num_timesteps, returns.mean(), returns.std(), time.time() - self.start])
            print(f"step {self.num_timesteps:>9,}   return {returns.mean():8.1f}", flush=True)
        return True


def main(args: Args):
    torch.set_num_threads(args.torch_threads)
    model, env = make_model(args)
    evaluation = Evaluation(args, env)
    model.learn(args.total_timesteps, callback=evaluation)
    lines = ["global_step,return_mean,return_std,wall_time"]
    lines += [f"{step},{mean:.6g},{std:.6g},{seconds:.6g}" for step, mean, std, seconds in evaluation.rows]
    path = RESULTS / "cores" / f"sb3-{args.algo}-{task_name(args.env_id)}-{args.seed}.csv"
    write(path, ("\n".join(lines) + "\n").encode())
    print(path)


if __name__ == "__main__":
    main(tyro.cli(Args))
