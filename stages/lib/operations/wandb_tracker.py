"""Weights & Biases as a tracker: online, or offline for a later `wandb sync`."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.lib.operations.tracker import SECONDS_TO_UPLOAD, ShownReply, TrackedRow, TrackerSettings

SECONDS_TO_CONNECT = 30.0


class WandbTracker:
    """Logs each row as a step of a run whose id a resumed stage uses again (`resume="allow"`).

    Online, the server keeps what it got, and only the steps that it lacks are sent. Offline, wandb resumes nothing: a
    process always writes a folder of its own, and one that is killed loses its last seconds. So each attempt writes
    the earlier rows again, and then removes the folder of the attempt before: one folder holds the whole run.

    Args:
        name: of the run; its id, too.
        config: what wandb shows as the run's configuration; `stage` is its type of job.
        parent: the folder in which wandb makes its own.
        earlier: reads the rows of the steps before the one that comes next.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        runtime: TrackerSettings,
        parent: Path,
        earlier: Callable[[], Sequence[TrackedRow]],
    ) -> None:
        import wandb

        self.offline = runtime.wandb_mode == "offline"
        wandb.setup(wandb.Settings(mode=runtime.wandb_mode, silent=True))  # $WANDB_MODE does not count
        if not self.offline and not wandb.login(prompt=False):
            raise RuntimeError("no API key: run `wandb login`, or set WANDB_API_KEY, or wandb_mode: offline")
        parent.mkdir(parents=True, exist_ok=True)
        run_id = name.replace(" ", "_")
        self.run = wandb.init(
            project=runtime.tracker_project,
            id=run_id,
            name=name,
            job_type=config["stage"],
            tags=runtime.tracker_tags,
            config=dict(config),
            dir=parent,
            mode=runtime.wandb_mode,
            resume=None if self.offline else "allow",
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=SECONDS_TO_CONNECT,
                finish_timeout=SECONDS_TO_UPLOAD,
                finish_timeout_raises=True,
            ),
        )
        self.folder = Path(self.run.dir).parent
        self.next_step = self.run.step if self.run.resumed else 0
        for row in earlier():
            self.log(*row)
        if self.offline:
            for other in set(self.folder.parent.glob(f"offline-run-*-{run_id}")) - {self.folder}:
                shutil.rmtree(other)
        print(f"{name}: wandb {self.folder if self.offline else self.run.url}", flush=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.offline and not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is gone")
        if step >= self.next_step:  # wandb takes no step twice
            self.run.log(dict(values), step=step, commit=True)

    def log_replies(self, step: int, replies: Sequence[ShownReply]) -> None:
        """As a table, which goes into the row of its step."""
        import wandb

        if step >= self.next_step:
            table = wandb.Table(columns=list(ShownReply._fields), data=[list(reply) for reply in replies])
            self.run.log({"replies": table}, step=step, commit=False)

    def finish(self, results: Mapping[str, float], exit_code: int) -> None:
        self.run.summary.update(dict(results))
        self.run.finish(exit_code=exit_code)


def abandon_wandb() -> None:
    """Kill wandb's own process, for which its exit hook would wait, and take the hook away."""
    setup = sys.modules.get("wandb.sdk.wandb_setup")
    connection = getattr(setup._singleton, "_connection", None) if setup else None
    if connection is None:
        return
    with contextlib.suppress(Exception):
        connection._cleanup()
    with contextlib.suppress(Exception):
        connection._proc._process.kill()
