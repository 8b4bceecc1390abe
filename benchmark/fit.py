"""How well f imitates after its first fit, beside the imitation error itself.

    python -m benchmark.fit

For each task: the mean cosine between f's slope in the action and the imitation error's, for actions at some
distance from the demonstrated ones, and how far an actor trained on f alone stays from the demonstrations.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from benchmark.gild_td3_variants import FITS, Args, Error, clone_gradient
from gild_td3 import GILD, Actor, DemonstrationBuffer, gradient, make_env, step

TASKS = "Point2D-v0", "Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Ant-v4"
DISTANCES = 0.02, 0.05, 0.1, 0.2, 0.5  # standard deviation of each action's noise


@dataclass
class Options:
    updates: int = 10_000  # of the actor
    seed: int = 1


def slope_cosine(gild, demonstrations: DemonstrationBuffer, distance: float) -> float:
    demo_obs, demo_action = demonstrations.obs, demonstrations.actions
    action = (demo_action + distance * torch.randn_like(demo_action)).clamp(-1, 1).requires_grad_()
    slope = gradient(gild(demo_obs, demo_action, action).sum(), {"action": action})["action"]
    return F.cosine_similarity(slope, action - demo_action).mean().item()


def clone_distance(gild, demonstrations: DemonstrationBuffer, args: Args, updates: int) -> float:
    """The mean squared distance of an actor that learned from f alone, on all demonstrations."""
    actor = Actor(demonstrations.obs.shape[1], demonstrations.actions.shape[1])
    optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate, fused=True)
    for _ in range(updates):
        step(optimizer, actor, clone_gradient(actor, gild, demonstrations.sample(args.batch_size)))
    with torch.no_grad():
        return (actor(demonstrations.obs) - demonstrations.actions).pow(2).mean().item()


def main(options: Options):
    torch.set_num_threads(1)
    head = ["task", "f fitted to", *(f"cosine at {distance}" for distance in DISTANCES), "actor's distance"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for task in TASKS:
        args = Args(env_id=task)
        env, path = make_env(args, training=True), Path("demos", f"{task.split('-')[0]}-td3.npz")
        demonstrations = DemonstrationBuffer(path, task, env, torch.device("cpu"))
        for fit in (*FITS, "the error itself"):
            torch.manual_seed(options.seed)
            gild = Error()
            if fit in FITS:
                gild = GILD(demonstrations.obs.shape[1], demonstrations.actions.shape[1])
                FITS[fit](gild, demonstrations)
            cells = [f"{slope_cosine(gild, demonstrations, distance):.2f}" for distance in DISTANCES]
            cells.append(f"{clone_distance(gild, demonstrations, args, options.updates):.4f}")
            print(f"| {' | '.join([task, fit, *cells])} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
