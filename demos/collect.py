"""Rolls out a saved policy and writes its episodes as a demonstration file.

    python -m demos.collect --policy runs/<run>/policies/100000.pt --out Hopper-td3.npz

The file (compressed, never pickled) holds observations (M, |S|), actions (M, |A|) in the environment's units
and rewards (M,) in float32, terminations and truncations (M,) in bool, and metadata, a JSON text. The rewards
are those of an evaluation: the task's own, dense in MuJoCo. A file of your own needs only observations,
actions and the metadata's env_id; `save_demonstrations` writes it.
"""

import json
import os
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch

from evaluate import InputError, command_line, load_policy, rollout

KINDS = {"observations": np.float32, "actions": np.float32, "rewards": np.float32}
KINDS |= {"terminations": bool, "truncations": bool}


@dataclass
class Args:
    policy: Path  # a policy.pt, or one of policies/, of a run of any script
    out: Path  # the .npz file to write
    pairs: int = 4_000  # whole episodes are added until there are at least this many pairs
    explore: bool = False  # act as in training: with noise (DDPG, TD3), or a sample (SAC)
    seed: int = 0  # seed of the episodes and the exploration
    script: Path | None = None  # the script that wrote the policy; None: found by its name

    def __post_init__(self):
        if self.pairs < 1:
            raise ValueError(f"--pairs {self.pairs} is less than 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} is negative")
        if self.out.suffix != ".npz":
            raise ValueError(f"--out {self.out} does not end in .npz")


def save_demonstrations(path: Path, env_id: str, observations, actions, **more):
    """Writes a demonstration file, atomically; `more` has further arrays, and more metadata as a dict."""
    metadata = json.dumps({"env_id": env_id, **more.pop("metadata", {})})
    arrays = {"observations": np.float32(observations), "actions": np.float32(actions), **more}
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays, metadata=np.array(metadata))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} could not be written: {error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def collect(
    policy: Path, out: Path, pairs: int, explore: bool = False, seed: int = 0, script: Path | None = None
) -> dict:
    """Writes a saved policy's episodes as a demonstration file. Returns its metadata and `pairs`."""
    actor, module, args, global_step = load_policy(policy, script)
    if not out.parent.is_dir():  # fail early
        raise InputError(f"{out} could not be written: there is no folder {out.parent}")
    episodes = []
    with closing(module.make_env(args, training=False)) as env:
        box = env.get_wrapper_attr("box")
        for episode in rollout(actor, module, args, env, seed, explore):
            episodes.append(episode)
            if sum(len(episode["rewards"]) for episode in episodes) >= pairs:
                break
    columns = {name: np.concatenate([episode[name] for episode in episodes]) for name in KINDS}
    low, high = np.float64(box.low), np.float64(box.high)
    columns["actions"] = ((high + low) / 2 + columns["actions"] * (high - low) / 2).clip(low, high)
    script_name = module.__name__
    algorithm = script_name.split(".")[-1].removeprefix("gild_").removesuffix("_il")
    metadata = {"algorithm": algorithm, "script": script_name, "seed": args.seed, "global_step": global_step}
    metadata |= {"explore": explore, "episodes": len(episodes)}
    for name, rewards in (("return", "rewards"), ("sparse_return", "sparse_rewards")):
        returns = [episode[rewards].sum() for episode in episodes]
        metadata |= {f"{name}_mean": float(np.mean(returns)), f"{name}_std": float(np.std(returns))}
    metadata["versions"] = {package.__name__: package.__version__ for package in (torch, gym, mujoco, np)}
    arrays = {name: column.astype(KINDS[name]) for name, column in columns.items()}
    save_demonstrations(out, args.env_id, **arrays, metadata=metadata)
    return {**metadata, "pairs": len(arrays["rewards"])}


def main(args: Args):
    about = collect(args.policy, args.out, args.pairs, args.explore, args.seed, args.script)
    print(f"{args.out}: {about['pairs']} pairs, {about['episodes']} episodes, ", end="")
    print(f"return {about['return_mean']:.1f} ± {about['return_std']:.1f}")


if __name__ == "__main__":
    command_line(main, Args)
