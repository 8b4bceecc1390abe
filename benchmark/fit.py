"""How well f imitates after its first fit, beside the imitation error itself.

    python -m benchmark.fit

For each task: the mean cosine between f's slope in the action and the imitation error's, for actions at some
distance from the demonstrated ones, and how far an actor trained on f alone stays from the demonstrations.

    python -m benchmark.fit --run runs/HalfCheetah-v4__gild_td3_variants__1__1700000000.0

What f has become in a run of benchmark.gild_td3_variants, beside f as it was fitted, at the run's last actor.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmark.batched import demonstrations_of, first_weights
from benchmark.gild_td3_variants import FITS, Error
from benchmark.gild_td3_variants import Args as Variant
from evaluate import InputError, command_line
from gild_td3 import GILD, Actor, DemonstrationBuffer, gradient, make_env, step

TASKS = "Point2D-v0", "Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Ant-v4"
DISTANCES = 0.02, 0.05, 0.1, 0.2, 0.5  # standard deviation of each action's noise


@dataclass
class Args:
    updates: int = 10_000  # of the actor
    seed: int = 1
    run: Path | None = None  # a run's folder, instead of all this


def slope(gild, demonstrations: DemonstrationBuffer, action: torch.Tensor) -> torch.Tensor:
    """The slope of f in the action, (demonstrations, |A|)."""
    action = action.detach().requires_grad_()
    objective = gild(demonstrations.obs, demonstrations.actions, action).sum()
    return gradient(objective, {"action": action})["action"]


def slope_cosine(gild, demonstrations: DemonstrationBuffer, distance: float) -> float:
    demo_action = demonstrations.actions
    action = (demo_action + distance * torch.randn_like(demo_action)).clamp(-1, 1)
    return F.cosine_similarity(slope(gild, demonstrations, action), action - demo_action).mean().item()


def clone_distance(gild, demonstrations: DemonstrationBuffer, args: Variant, updates: int) -> float:
    """The mean squared distance of an actor that learned from f alone, on all demonstrations."""
    actor = Actor(demonstrations.obs.shape[1], demonstrations.actions.shape[1])
    optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate, fused=True)
    for _ in range(updates):
        demo_obs, demo_action = demonstrations.sample(args.batch_size)
        loss = gild(demo_obs, demo_action, actor(demo_obs)).mean()
        step(optimizer, actor, gradient(loss, dict(actor.named_parameters())))
    with torch.no_grad():
        return (actor(demonstrations.obs) - demonstrations.actions).pow(2).mean().item()


def describe(gild, actor, demonstrations: DemonstrationBuffer) -> list[float]:
    """f's slope at the actor's actions: its mean length, and that at a_d; its mean cosine with the imitation
    error's; and the share of it that is the same for all demonstrations, the length of the mean slope.
    """
    demo_action = demonstrations.actions
    with torch.no_grad():
        action = actor(demonstrations.obs)
    here, there = (slope(gild, demonstrations, at) for at in (action, demo_action))
    length, length_there = (slopes.norm(dim=1).mean() for slopes in (here, there))
    cosine = F.cosine_similarity(here, action - demo_action).mean()
    return [value.item() for value in (length, length_there, cosine, here.mean(0).norm() / length)]


def describe_run(run_dir: Path):
    try:
        args = Variant(**json.loads((run_dir / "args.json").read_text())["args"])
        checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True, map_location="cpu")
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{run_dir} is no run of benchmark.gild_td3_variants ({error})") from None
    if args.gild_form != "network":
        raise InputError(f"{run_dir} was made with --gild-form {args.gild_form}; f is not a network there")
    demonstrations = demonstrations_of(args)
    shape = demonstrations.obs.shape[1], demonstrations.actions.shape[1]
    actor, gild = Actor(*shape), GILD(*shape)
    actor.load_state_dict(checkpoint["actor"])
    fit = args.gild_fit if args.gild_init == "imitation" else ""
    first = {k: torch.from_numpy(p) for k, p in first_weights(args, fit)["gild"].items()}
    head = ["f", "slope", "slope at a_d", "cosine with the imitation error's", "the same for all"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, weights in (("as fitted" if fit else "at first", first), ("as learned", checkpoint["gild"])):
        gild.load_state_dict(weights)
        cells = [f"{value:.3f}" for value in describe(gild, actor, demonstrations)]
        print(f"| {' | '.join([name, *cells])} |")


def main(args: Args):
    torch.set_num_threads(1)
    if args.run:
        return describe_run(args.run)
    head = ["task", "f fitted to", *(f"cosine at {distance}" for distance in DISTANCES), "actor's distance"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for task in TASKS:
        script_args = Variant(env_id=task)
        env, path = make_env(script_args, training=True), Path("demos", f"{task.split('-')[0]}-td3.npz")
        demonstrations = DemonstrationBuffer(path, task, env, torch.device("cpu"))
        for fit in (*FITS, "the error itself"):
            torch.manual_seed(args.seed)
            gild = Error()
            if fit in FITS:
                gild = GILD(demonstrations.obs.shape[1], demonstrations.actions.shape[1])
                FITS[fit](gild, demonstrations)
            cells = [f"{slope_cosine(gild, demonstrations, distance):.2f}" for distance in DISTANCES]
            cells.append(f"{clone_distance(gild, demonstrations, script_args, args.updates):.4f}")
            print(f"| {' | '.join([task, fit, *cells])} |", flush=True)


if __name__ == "__main__":
    command_line(main, Args)
