"""Weights & Biases as a tracker: online, or offline for a later `wandb sync`."""

import contextlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.operations.tracker import SECONDS_TO_UPLOAD, Row, TrackerSettings

SECONDS_TO_CONNECT = 30.0


class WandbTracker:
    """Logs each row as a step of a run whose id a resumed stage uses again.

    Online, the server keeps what it got, and only the steps that it lacks are sent. Offline, wandb resumes nothing: a
    process always writes a folder of its own, and one that is killed loses its last seconds. So each attempt writes
    all rows again from the journal, and then removes the folder of the attempt before: one folder holds the whole run.

    Args:
        parent: the folder in which wandb makes its own.
        run_id: the same for all attempts at a run.
    """

    def __init__(
        self, stage: str, settings: Mapping[str, Any], runtime: TrackerSettings, parent: Path, run_id: str, name: str
    ) -> None:
        self.parent = parent
        self.stage = stage
        self.settings = settings
        self.runtime = runtime
        self.run_id = run_id
        self.name = name
        self.offline = runtime.wandb_mode == "offline"
        self.run: Any = None

    def start(self, _first_step: int, earlier: list[Row]) -> None:
        import wandb

        wandb.setup(wandb.Settings(mode=self.runtime.wandb_mode, silent=True))  # $WANDB_MODE does not count
        if not self.offline and not wandb.login(prompt=False):
            raise RuntimeError("no API key: run `wandb login`, or set WANDB_API_KEY, or wandb_mode: offline")
        self.parent.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=self.runtime.tracker_project,
            id=self.run_id,
            name=self.name,
            job_type=self.stage,
            tags=self.runtime.tracker_tags,
            config={"stage": self.stage, **self.settings},
            dir=self.parent,
            mode=self.runtime.wandb_mode,
            resume=None if self.offline else "allow",
            reinit="create_new",
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
        for row in earlier:
            self.log(row)
        if self.offline:
            for other in set(self.folder.parent.glob(f"offline-run-*-{self.run_id}")) - {self.folder}:
                shutil.rmtree(other)
        print(f"{self.stage}: wandb {self.folder if self.offline else self.run.url}", flush=True)

    def log(self, row: Row) -> None:
        if self.offline and not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is gone")
        if row.step >= self.next_step:  # wandb takes no step twice
            self.run.log({**row.values, "_timestamp": row.time}, step=row.step, commit=True)

    def finish(self, results: Mapping[str, float], exit_code: int) -> None:
        self.run.summary.update(dict(results))
        self.run.finish(exit_code=exit_code)

    def give_up(self) -> None:
        """Kill wandb's own process, for which its exit hook would wait, and take the hook away."""
        setup = sys.modules.get("wandb.sdk.wandb_setup")
        connection = getattr(setup._singleton, "_connection", None) if setup else None
        if connection is None:
            return
        with contextlib.suppress(Exception):
            connection._cleanup()
        connection._proc._process.kill()
