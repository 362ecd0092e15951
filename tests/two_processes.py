"""A few lines of Python on two processes of this machine, as a launcher starts a stage."""

import subprocess
from pathlib import Path

from tests.loaded_python import torchrun
from tests.real_files import PROJECT

END = """
from stages.lib.command.process_end import end_process
end_process()
"""


def run_on_two_processes(script: str, folder: Path) -> None:
    """Run `script` in `folder` under torchrun. Each process makes the file <rank>.done at its end; fail if not."""
    (folder / "script.py").write_text(script + END)
    (folder / "runtime.yaml").write_text((PROJECT / "runtime.yaml").read_text())
    environment = {"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin"}
    command = [*torchrun(environment).removesuffix(" -m").split(), "script.py"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in folder.glob("*.done")) == ["0.done", "1.done"]
