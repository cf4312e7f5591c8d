"""Everything that knows MLflow. It changes no result, so no stage depends on it."""

from ddpm.tracking.run import Run, mark_killed, ship, start_run

__all__ = ["Run", "mark_killed", "ship", "start_run"]
