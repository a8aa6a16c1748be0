"""The directory of images on disk: which there are, for which checkpoints, and what makes room.

It owns the names in one directory and nothing else: `<digest>.image` is an image, and `<key>.key` a
link to the image that a checkpoint of that identity became. It never reads or writes an image. What
is there is read from the directory each time, so that a crash, a user's `rm` or another file in it
needs no repair. Invariants: a name is there only for a complete file (others write beside it and
rename), and what is kept exceeds neither the budget nor what the disk can spare. Its calls may wait
for the disk; they are for a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from swap.errors import CacheFailed

IMAGE_SUFFIX = ".image"
KEY_SUFFIX = ".key"
FREE_BYTES_MIN = 1 << 30
FREE_SHARE_MIN = 0.1
"""What the cache leaves free of its disk, the larger of the two: others write there too."""

_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CachedImage:
    """An image on disk; `used_ns` is when it was written or last read."""

    digest: str
    path: Path
    size_bytes: int
    used_ns: int


class ImageCache:
    """Images below `directory`, within `budget_bytes`; a budget of 0 keeps and finds none."""

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        self.directory = directory
        self.budget_bytes = budget_bytes

    def open(self) -> None:
        """Make the directory, forget what was half written, and keep to the budget.

        Raises CacheFailed when it cannot be used.
        """
        if not self.budget_bytes:
            return
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if path.name.endswith(".partial"):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise CacheFailed(
                f"the image cache {self.directory} cannot be used: {error}; set "
                "image_cache.directory, or image_cache.budget_bytes = 0"
            ) from error
        self._shrink_to(self.budget_bytes)

    def images(self) -> list[CachedImage]:
        """Everything that is kept, least recently used first."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in entries:
                digest = entry.name.removesuffix(IMAGE_SUFFIX)
                if digest == entry.name or not _NAME.fullmatch(digest):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    path = Path(entry.path)
                    found.append(CachedImage(digest, path, status.st_size, status.st_mtime_ns))
        return sorted(found, key=lambda image: image.used_ns)

    def path_of(self, digest: str) -> Path:
        """Where an image is or would be. Raises ValueError for what is no digest."""
        if not _NAME.fullmatch(digest):
            raise ValueError(f"{digest!r} is no digest")
        return self.directory / f"{digest}{IMAGE_SUFFIX}"

    def find(self, key: str) -> CachedImage | None:
        """The image of the checkpoint of this identity; it counts as used now."""
        if not self.budget_bytes or not _NAME.fullmatch(key):
            return None
        try:
            digest = os.readlink(self.directory / f"{key}{KEY_SUFFIX}").removesuffix(IMAGE_SUFFIX)
            path = self.path_of(digest)
            os.utime(path)
            status = path.stat()
        except (OSError, ValueError):  # no such key, an image that is gone, or no link of ours
            return None
        return CachedImage(digest, path, status.st_size, status.st_mtime_ns)

    def make_room(self, size_bytes: int) -> Path:
        """Remove what was used longest ago until an image of this size may be written.

        Returns the directory. Raises CacheFailed, having removed nothing, with the figure that
        would have to change.
        """
        if size_bytes > self.budget_bytes:
            raise CacheFailed(
                f"an image of {size_bytes} bytes is larger than the image cache "
                f"(image_cache.budget_bytes = {self.budget_bytes})",
                needed_bytes=size_bytes,
                budget_bytes=self.budget_bytes,
            )
        disk = os.statvfs(self.directory)
        free_bytes = disk.f_bavail * disk.f_frsize
        kept_bytes = sum(image.size_bytes for image in self.images())
        left_bytes = max(FREE_BYTES_MIN, int(disk.f_blocks * disk.f_frsize * FREE_SHARE_MIN))
        lacking = size_bytes + left_bytes - free_bytes
        if lacking > kept_bytes:
            raise CacheFailed(
                f"an image of {size_bytes} bytes does not fit on the disk of {self.directory}: "
                f"{free_bytes} bytes are free, {left_bytes} are left free for others, and "
                f"the cache could give up {kept_bytes}: free {lacking - kept_bytes} bytes",
                needed_bytes=size_bytes,
                free_bytes=free_bytes,
            )
        self._shrink_to(min(self.budget_bytes - size_bytes, kept_bytes - max(0, lacking)))
        return self.directory

    def assign(self, key: str, digest: str) -> None:
        """From now on a checkpoint of this identity has this image. Raises OSError."""
        path = self.directory / f"{key}{KEY_SUFFIX}"
        partial = path.with_name(f"{path.name}.partial")
        partial.unlink(missing_ok=True)
        os.symlink(self.path_of(digest).name, partial)
        os.rename(partial, path)

    def remove(self, digest: str) -> None:
        """Forget an image and every key that leads to it."""
        target = self.path_of(digest).name
        self.path_of(digest).unlink(missing_ok=True)
        for path in self.directory.glob(f"*{KEY_SUFFIX}"):
            with contextlib.suppress(OSError):
                if os.readlink(path) == target:
                    path.unlink(missing_ok=True)

    def _shrink_to(self, bytes_max: int) -> None:
        images = self.images()
        kept_bytes = sum(image.size_bytes for image in images)
        for image in images:
            if kept_bytes <= bytes_max:
                return
            self.remove(image.digest)
            kept_bytes -= image.size_bytes
