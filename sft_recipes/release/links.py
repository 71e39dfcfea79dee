"""Links that lead out of a folder: what they point at is no part of the run, so it is not released.

A link to a key or to somebody else's weights would be followed in silence, and its content sent.
"""

import os
from pathlib import Path

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Problem


def require_no_outside_links(folder: Path) -> None:
    """Raise InputError naming each link of a run or of an exported folder that points elsewhere.

    Looked at are the folder's own files and its evaluations, which the model card shows.
    """
    inside = folder.resolve()
    paths = [*folder.iterdir(), *folder.glob(f"{run_folder.EVALUATIONS}/**/*")]
    problems = []
    for path in sorted(paths):
        # Unlike Path.resolve(), realpath() answers for links in a circle, too.
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
            what = "this is a link that leads out of the folder"
            fix = "put what it points at in its place, or delete it"
            problems.append(Problem(str(path), "", what, fix))
    if problems:
        raise InputError(problems)
