"""Runs a saved policy and tells its returns on the dense and on the sparse task.

    python evaluate.py runs/<run>
    python evaluate.py runs/<run>/policies/100000.pt --episodes 20 --video hopper.mp4

The policy acts deterministically. It can be watched in a window (--render) or recorded off-screen (--video;
without a display, MuJoCo renders with the environment variable MUJOCO_GL=egl or osmesa).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from demos.collect import load_policy


@dataclass
class Args:
    policy: tyro.conf.Positional[Path]  # a run's folder, or a policy file
    episodes: int = 10  # how many, each from a start of its own
    seed: int = 0  # of the first episode; the others follow
    render: bool = False  # show a window
    video: Path | None = None  # record to this file, .mp4 (needs the imageio-ffmpeg package) or .gif


def returns(policy: Path, episodes: int, seed: int, render_mode: str | None = None):
    """A policy's dense and sparse returns, (episodes, 2), and steps, (episodes,); frames and their rate.

    Without a threshold (Point2D, tasks of one's own) the two returns are the same.
    """
    actor, script, about = load_policy(policy)
    env = script.make_env(script.Args(env_id=about["env_id"]), training=False, render_mode=render_mode)
    threshold = script.SPARSE_THRESHOLDS.get(script.task_name(about["env_id"]), -np.inf)
    totals, lengths, frames = np.zeros((episodes, 2)), np.zeros(episodes, int), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        ended = False
        while not ended:
            obs, reward, terminated, truncated, info = env.step(script.act(actor, obs))
            ended = terminated or truncated
            totals[episode] += reward, reward if info.get("x_position", 0.0) > threshold else 0.0
            lengths[episode] += 1
            if render_mode == "rgb_array":
                frames.append(env.render())
    fps = env.metadata.get("render_fps", 30)
    env.close()
    return totals, lengths, (frames, fps)


def main(args: Args):
    policy = args.policy / "policy.pt" if args.policy.is_dir() else args.policy
    render_mode = "rgb_array" if args.video else "human" if args.render else None
    totals, lengths, (frames, fps) = returns(policy, args.episodes, args.seed, render_mode)
    for name, column in zip(("dense return", "sparse return"), totals.T, strict=True):
        print(f"{name:13} {column.mean():9.1f} ± {column.std():.1f}")
    print(f"{'steps':13} {lengths.mean():9.1f} ± {lengths.std():.1f}")
    if args.video:
        import imageio

        imageio.mimwrite(args.video, frames, fps=fps)
        print(f"{args.video}: {len(frames)} frames")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (OSError, ValueError, ImportError) as error:
        print(f"evaluate.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
