"""Names of files stay in their folder."""

from __future__ import annotations

from pathlib import Path

from megatron_qwen.errors import UnsafeInputError


def check_inside(folder: Path, name: str, path: Path) -> None:
    """Refuse a file whose symbolic links lead out of `folder`.

    The one exception is the layout of the Hugging Face cache, where `snapshots/<revision>/x` links to `blobs/<hash>`
    of the same model.

    Raises:
        UnsafeInputError: naming the link and its target.
    """
    target, root = path.resolve(), folder.resolve()
    if target.is_relative_to(root):
        return
    if root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs"):
        return
    raise UnsafeInputError(f"{folder}: {name} is a link to {target}, outside the folder; copy the file into the folder")
