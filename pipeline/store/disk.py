"""What `file://` leads to, read as every other file of a disk is. Needs fsspec, and so is imported only where a URL is."""

from __future__ import annotations

import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline.base.files import folder_there, regular


class Disk(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """fsspec's local files, but that a GET of a pipe or a device is refused instead of waiting for it or never ending, and takes
    memory for no more bytes than there are."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Bytes start … end − 1 of a file, both from its beginning. Raises DamagedError for what is no regular file."""
        first, place = start or 0, self._strip_protocol(path)
        if os.path.isdir(place):
            raise folder_there(place)
        with open(place, "rb", opener=regular) as file:
            file.seek(first)
            size = os.fstat(file.fileno()).st_size
            return file.read(max(min(size, size if end is None else end) - first, 0))
