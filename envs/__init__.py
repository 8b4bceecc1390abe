"""Sparse tasks as Gymnasium ids: `gymnasium.make("envs:Point2D-v0")`, `envs:SparseHopper-v4` and so on."""

from gymnasium.envs.registration import register

from envs.sparse import SPARSE_THRESHOLDS

register("Point2D-v0", entry_point="envs.point2d:Point2D", max_episode_steps=100)
for _task, _threshold in SPARSE_THRESHOLDS.items():
    for _version in ("v4", "v5"):
        register(
            f"Sparse{_task}-{_version}",
            entry_point="envs.sparse:make_sparse",
            kwargs={"env_id": f"{_task}-{_version}", "threshold": _threshold},
        )
