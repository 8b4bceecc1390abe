"""Rolls out a saved policy and writes its episodes as a demonstration file.

    python -m demos.collect --policy runs/<run>/policies/100000.pt --out demos/Hopper-td3.npz

The file (compressed, never pickled) holds observations (M, |S|), actions (M, |A|) and rewards (M,) in
float32, terminations and truncations (M,) in bool, and metadata, a JSON text. The rewards are those of the
evaluation: the task's own, dense in MuJoCo. A file of your own needs only observations, actions and the
metadata's env_id; `save_demonstrations` writes one.
"""

import json
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro


@dataclass
class Args:
    policy: Path  # a policy.pt, or one of policies/, of a run of any of the scripts
    out: Path  # the .npz file to write
    pairs: int = 4_000  # whole episodes are added until there are at least so many pairs
    explore: bool = False  # act as in training: noise of std 0.1 (DDPG, TD3) or a sample (SAC)
    seed: int = 0  # of the episodes and the exploration


def load_policy(path: Path):
    """The actor in a policy file, its algorithm's module (baselines.td3, ...), the file's other entries."""
    try:
        about = torch.load(path, weights_only=True, map_location="cpu")
        algorithm = about["script"].removeprefix("gild_").removesuffix("_il")
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError):
        raise ValueError(f"{path} is no policy file of this project") from None
    module = import_module(f"baselines.{algorithm}")
    env = module.make_env(module.Args(env_id=about["env_id"]), training=False)
    actor = module.Actor(env.observation_space.shape[0], env.action_space)
    actor.load_state_dict(about.pop("actor"))
    return actor, module, {**about, "algorithm": algorithm}


def rollout(actor, module, env_id: str, pairs: int, explore: bool, seed: int, episodes: int = 1):
    """Whole episodes, at least `episodes`, of at least `pairs` steps together.

    Returns the file's five arrays by name, and each episode's dense and sparse return, (episodes, 2).
    """
    env = module.make_env(module.Args(env_id=env_id), training=False)
    threshold = module.SPARSE_THRESHOLDS.get(module.task_name(env_id), -np.inf)
    low, high = env.action_space.low, env.action_space.high
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    steps, returns = [], []
    while len(steps) < pairs or len(returns) < episodes:
        obs, _ = env.reset(seed=seed + len(returns))
        ended, total = False, np.zeros(2)
        while not ended:
            if explore and module.__name__.endswith("sac"):
                action = module.act(actor, obs, explore=True)
            else:
                noise = rng.normal(0, 0.1 * (high - low) / 2) if explore else 0.0
                action = np.float32((module.act(actor, obs) + noise).clip(low, high))
            next_obs, reward, terminated, truncated, info = env.step(action)
            steps.append((obs, action, reward, terminated, truncated))
            total += reward, reward if info.get("x_position", 0.0) > threshold else 0.0
            obs, ended = next_obs, terminated or truncated
        returns.append(total)
    kinds = {"observations": np.float32, "actions": np.float32, "rewards": np.float32}
    kinds |= {"terminations": bool, "truncations": bool}
    columns = zip(kinds.items(), zip(*steps, strict=True), strict=True)
    return {name: np.array(column, kind) for (name, kind), column in columns}, np.array(returns)


def save_demonstrations(path: Path, env_id: str, observations, actions, **more):
    """Writes a demonstration file, atomically; `more` has further arrays, and more metadata as a dict."""
    metadata = {"env_id": env_id, **more.pop("metadata", {})}
    arrays = {"observations": np.float32(observations), "actions": np.float32(actions), **more}
    temporary = Path(path).with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays, metadata=np.array(json.dumps(metadata)))
    os.replace(temporary, path)


def collect(policy: Path, out: Path, pairs: int, explore: bool, seed: int) -> dict:
    """Writes a saved policy's episodes as a demonstration file. Returns its metadata and `pairs`."""
    actor, module, about = load_policy(policy)
    data, returns = rollout(actor, module, about["env_id"], pairs, explore, seed)
    about |= {"explore": explore, "episodes": len(returns)}
    for name, column in zip(("return", "sparse_return"), returns.T, strict=True):
        about |= {f"{name}_mean": float(column.mean()), f"{name}_std": float(column.std())}
    about["versions"] = {package.__name__: package.__version__ for package in (torch, gym, mujoco, np)}
    save_demonstrations(out, about["env_id"], **data, metadata=about)
    return {**about, "pairs": len(data["rewards"])}


def main(args: Args):
    about = collect(args.policy, args.out, args.pairs, args.explore, args.seed)
    print(f"{args.out}: {about['pairs']} pairs, {about['episodes']} episodes, ", end="")
    print(f"return {about['return_mean']:.1f} ± {about['return_std']:.1f}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (OSError, ValueError) as error:
        print(f"demos.collect: {error}", file=sys.stderr)
        sys.exit(2)
