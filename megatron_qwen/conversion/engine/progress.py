"""The progress bar of a conversion: tensors, bytes, rate, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    verb: str, total_tensors: int, total_bytes: int, *, is_shown: bool
) -> Iterator[Callable[[int, int], None]]:
    """Give a function that is told (tensors, bytes) done, from one thread at a time; the bar is on stderr."""
    if not is_shown:
        yield lambda tensors, num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]}/" + f"{total_tensors} tensors"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=total_bytes, tensors=0)

        def advance(tensors: int, num_bytes: int) -> None:
            done = bar.tasks[task].fields["tensors"] + tensors
            bar.update(task, advance=num_bytes, tensors=done)

        yield advance
