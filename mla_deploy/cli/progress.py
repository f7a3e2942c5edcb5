"""A progress bar on stderr for work that is watched by a person; silence otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mla_deploy.cli.output import Screen

Report = Callable[[str, int, int], None]


@contextmanager
def progress_bar(screen: Screen) -> Iterator[Report | None]:
    """Yields `report(stage, done, total)`, or None when nobody watches (not a terminal, -q)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    if screen.quiet or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        # Libraries load before the first report; a stage of one step is done or not.
        rows: dict[str, TaskID] = {}
        loading = bar.add_task("loading libraries", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(loading, visible=False)
            if stage not in rows:
                rows[stage] = bar.add_task(stage, total=None)
            known = None if (done, total) == (0, 1) else total
            bar.update(rows[stage], completed=done, total=known)

        yield report
