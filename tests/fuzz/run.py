"""Meet the stages with inputs that are wrong, odd or merely unusual, and write down what came of each.

    python -m tests.fuzz.run --cases 3600 --seed 1 --table tests/fuzz/table.md      what `make fuzz` does
    python -m tests.fuzz.run --area rows --case 123 --seed 1                        one case again, with all it printed

A case is known by its area, number and seed. Each runs in a copy of the tiny pipeline, through the real stages, in
children of a process that has loaded what they import.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.fuzz.lists import Result, table, write_lists

SECONDS = 120.0  # that a stage may take; on an idle core none takes 3 but where a template is stopped, at 10
SECONDS_AT_WORK = 8.0  # of an area whose accepted settings may ask for any amount of work
LISTS = Path(".scratch/fuzz")
REPEATED = 0.5  # share of drawn cases among those of a run too short for all that are listed


def chosen(cases: int, seed: int, names: list[str], *, short: bool) -> Iterator[tuple[str, int]]:
    """(area, number) of the cases of a run. A short one takes some of those that are listed, a long one all."""
    from tests.fuzz.areas.all import AREAS

    for name in names:
        area = AREAS[name]
        count, listed = round(cases * area.share), len(area.named) + len(area.systematic)
        if short and count < listed:
            draw = random.Random(f"{seed} {name}")
            numbers = sorted(draw.sample(range(round(listed * (1 + REPEATED))), count))
        else:
            numbers = range(max(count, listed))
        yield from ((name, number) for number in numbers)


def run_case(where: tuple[str, int], seed: int, base: Path, *, keep: bool = False) -> Result:
    """Prepare one case in a folder beside the base, run its stages and judge them."""
    from tests.fuzz import base as project
    from tests.fuzz.areas.all import AREAS
    from tests.fuzz.child import run_stage
    from tests.fuzz.judge import verdict
    from tests.fuzz.summary import summary

    name, number = where
    area = AREAS[name]
    case = area.case(name, number, seed)
    folder = base.parent / f"{name}-{number}"
    started = time.monotonic()
    project.copy(base, folder, area.needs, case.stages)
    for file, changes in (("params.yaml", case.settings), ("runtime.yaml", {"default": case.runtime})):
        settings = project.overlaid(project.settings_of(base / file), changes)
        project.write_settings(folder / file, settings)
    try:
        case.prepare(folder)
    except Exception as error:  # a fault of the case, which must not end the others
        return Result(name, number, case.what, "unprepared", repr(error), "", 0.0)
    standing = {out for stage in case.stages for out in project.outs(stage) if os.path.lexists(folder / out)}
    limit = SECONDS_AT_WORK if area.may_run_on else SECONDS
    runs = []
    for stage in case.stages:
        options = project.options_of(stage)
        runs.append(run_stage(folder, stage, options, limit, unprivileged=case.unprivileged))
        if runs[-1].status != 0:
            break
    outs = [out for out in project.outs(runs[-1].stage) if out not in standing]
    found = verdict(case, folder, runs, outs, may_run_on=area.may_run_on)
    came_to = summary(folder, case.stages) if found.kind in ("accepted", "unexpected") and not runs[-1].status else ""
    if keep:
        show(folder, runs)
    else:
        remove(folder)
    return Result(name, number, case.what, *found, came_to, time.monotonic() - started)


def show(folder: Path, runs: list) -> None:
    """What one case was and did, for whoever looks into it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_relative_to(folder / "stages") and path.stat().st_nlink == 1:
            content = path.read_bytes()[:1500].decode("utf-8", "backslashreplace")
            print(f"--- {path.relative_to(folder)}\n{content}")
    for ended in runs:
        print(f"=== {ended.stage}: exit code {ended.status}, {ended.seconds:.2f} s\n{ended.stdout}{ended.stderr}")
    print(f"kept in {folder}")


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("stdout", "stderr"):
        folder.with_name(f"{folder.name}.{name}").unlink(missing_ok=True)


def run_all(wanted: list[tuple[str, int]], seed: int, base: Path, jobs: int, lists: Path) -> list[Result]:
    started, results = time.monotonic(), []
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for result in pool.map(partial(run_case, seed=seed, base=base), wanted, chunksize=4):
            results.append(result)
            if len(results) % 100 == 0:
                print(f"{len(results)}/{len(wanted)} cases, {time.monotonic() - started:.0f} s", flush=True)
                write_lists(results, lists)
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3600, help="how many, at least those that are listed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--area", nargs="+", default=[], help="these alone")
    parser.add_argument("--case", type=int, help="one case alone, of one area; its folder is kept")
    parser.add_argument("--short", action="store_true", help="so many cases and no more")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", type=Path, help="Markdown file for the table")
    parser.add_argument("--lists", type=Path, default=LISTS, help="folder for the lists of cases")
    return parser.parse_args()


def main() -> int:
    """Run the cases. Returns 1 if one of them found a fault, else 0."""
    os.environ["OMP_NUM_THREADS"] = "1"
    given = arguments()
    from tests.fuzz import base as project
    from tests.fuzz.areas.all import AREAS
    from tests.fuzz.judge import FAULTS

    project.load()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.chmod(0o755)
    base = project.make(folder / project.BASE)
    if given.case is not None:
        result = run_case((given.area[0], given.case), given.seed, base, keep=True)
        print(f"{result.what}\n{result.kind}: {result.detail}\n{result.summary}")
        return int(result.kind in FAULTS)
    wanted = list(chosen(given.cases, given.seed, given.area or list(AREAS), short=given.short))
    random.Random(given.seed).shuffle(wanted)  # what is slow is spread over the run
    before = project.digest(base)
    results = run_all(wanted, given.seed, base, given.jobs, given.lists)
    changed = sorted(set(before.items()) ^ set(project.digest(base).items()))
    if changed:
        print(f"a case has changed the base project, so all after it say nothing: {changed[0][0]}", file=sys.stderr)
    shutil.rmtree(folder)
    results = sorted(results, key=lambda result: (list(AREAS).index(result.area), result.number))
    written = table(results, given.seed)
    print(written)
    write_lists(results, given.lists)
    if given.table:
        given.table.write_text(written)
    return int(bool(changed) or any(result.kind in FAULTS for result in results))


if __name__ == "__main__":
    sys.exit(main())
