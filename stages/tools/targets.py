"""Print those of some targets of DVC that are stages here: a group whose section of params.yaml is empty has none.

    python -m stages.tools.targets train_dpo
    python -m stages.tools.targets evaluate@ppo score_samples@ppo

`dvc repro` of a group without stages would run the whole graph. If none of the targets is there, that is one line and
exit code 2.
"""

from typing import Annotated

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.params import GRAPH_FILE, PARAMS_FILE
from stages.lib.command.quoted import nearest
from stages.lib.command.run import run
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings.check import entries_of_group


def main(
    targets: Annotated[list[str], typer.Argument(help="Stages or groups, such as train_dpo or evaluate@ppo.")],
) -> None:
    """Print the TARGETS that are there."""
    graph, document = load_yaml(GRAPH_FILE)["stages"], load_yaml(PARAMS_FILE)
    found, missing = [], []
    for target in targets:
        name, _, entry = target.partition("@")
        stage = graph.get(name)
        if stage is None:
            raise StageError(f"{GRAPH_FILE} has no stage {name}{nearest(name, graph)}")
        names = entries_of_group(stage, document)
        is_there = entry in names if entry else "foreach" not in stage or bool(names)
        (found if is_there else missing).append(target)
    if not found:
        sections = " and ".join(
            f"{section_of(graph[target.partition('@')[0]])} "
            + (f"has no '{target.partition('@')[2]}'" if "@" in target else "is empty")
            for target in missing
        )
        raise StageError(f"{PARAMS_FILE}: {sections}, so there is nothing to do")
    print(" ".join(found))


def section_of(stage: dict) -> str:
    """The mapping or list of params.yaml for each of whose entries a group has a stage."""
    return str(stage["foreach"]).strip("${}")


if __name__ == "__main__":
    run(main)
