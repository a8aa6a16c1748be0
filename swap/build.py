"""Building an image: checkpoint tensors are read, cast, fused and hashed straight into a segment.

It owns the work of a few threads and memory for one chunk each; there is never a second copy of the
model, however large it is. It never decides the layout. Threads take whole tensors of the image,
the largest first; every byte of a file is read once. Invariant: a manifest is written only behind
complete weights, and only then is the segment sealed; a failed or cancelled build leaves a segment
that nobody can take for an image.

A packed image is packed on the way, and its segment, made for the largest it can be, is cut to
size.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from swap.cast import FORMATS
from swap.checkpoint import CHUNK_BYTES, Checkpoint
from swap.checksum import TensorHasher
from swap.direct_file import ReadBuffer
from swap.errors import BuildCancelled, CheckpointInvalid, InsufficientHostMemory
from swap.image import Manifest, TensorEntry, TensorRecipe, complete, segment_bytes
from swap.piece_writer import PieceWriter, close_gaps
from swap.pieces import place_pieces
from swap.segment import Segment
from swap.writing import write_all, write_manifest

BUILD_THREADS = 2
PROGRESS_BYTES = 16 << 20

Progress = Callable[[int, int], None]


def check_sources(checkpoint: Checkpoint, recipes: Iterable[TensorRecipe]) -> None:
    """Whether the checkpoint has what the recipes are made of, in shapes that stack.

    Raises CheckpointInvalid naming the tensor, what was expected and what was found.
    """
    for recipe in recipes:
        rows = 0
        for source in recipe.sources:
            tensor = checkpoint.tensors.get(source)
            if tensor is None:
                raise _unexpected(recipe, source, "nothing")
            if tensor.dtype not in FORMATS:
                raise _unexpected(recipe, source, f"{tensor.dtype} {list(tensor.shape)}")
            if len(tensor.shape) != len(recipe.shape) or tensor.shape[1:] != recipe.shape[1:]:
                raise _unexpected(recipe, source, str(list(tensor.shape)))
            rows += tensor.shape[0] if tensor.shape else 0
        if recipe.shape and rows != recipe.shape[0]:
            names = " + ".join(recipe.sources)
            shapes = " + ".join(
                str(list(checkpoint.tensors[name].shape)) for name in recipe.sources
            )
            raise _unexpected(recipe, names, shapes)


def build_image(
    checkpoint: Checkpoint,
    recipes: Iterable[TensorRecipe],
    layout: Manifest,
    segment: Segment,
    *,
    threads: int = BUILD_THREADS,
    progress: Progress = lambda done, total: None,
    cancelled: threading.Event | None = None,
) -> Manifest:
    """Fill and seal a segment of `segment_bytes(layout)`; `layout` is the plan of `recipes`.

    `progress(bytes done, bytes in total)` is called from the building threads, one at a time.
    Raises CheckpointInvalid, InsufficientHostMemory, or BuildCancelled once `cancelled` is set.
    """
    recipes = tuple(recipes)
    if segment.size_bytes != segment.whole_pages(segment_bytes(layout)) or segment.sealed:
        raise ValueError(
            f"an image of {segment_bytes(layout)} bytes needs an unsealed segment of that size, "
            f"not one of {segment.size_bytes}"
        )
    check_sources(checkpoint, recipes)
    build = _Build(checkpoint, recipes, layout, segment, progress, cancelled or threading.Event())
    try:
        build.run(threads)
        manifest = (
            complete(layout, build.checksums, build.pieces, build.stored_checksums)
            if layout.packed
            else complete(layout, build.checksums)
        )
        if layout.packed:
            close_gaps(segment, layout, manifest)
        write_manifest(segment.descriptor, manifest)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise InsufficientHostMemory(
            f"the host has no memory left for an image of {segment.size_bytes} bytes: lower the "
            "host store's budget, or free memory",
            needed_bytes=segment.size_bytes,
        ) from error
    segment.seal()
    return manifest


class _Build:
    """The state that the threads of one build share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipes: tuple[TensorRecipe, ...],
        layout: Manifest,
        segment: Segment,
        progress: Progress,
        cancelled: threading.Event,
    ) -> None:
        self._checkpoint = checkpoint
        by_name = {recipe.name: recipe for recipe in recipes}
        work = [(by_name[entry.name], entry) for entry in layout.tensors]
        self._work = iter(
            sorted(work, key=lambda item: (-item[1].size_bytes, self._place(item[0])))
        )
        self._descriptor = segment.descriptor
        self._progress = progress
        self._cancelled = cancelled
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self.checksums: dict[str, str] = {}
        self.pieces: dict[str, tuple[int, ...]] = {}
        self.stored_checksums: dict[str, str] = {}
        """By tensor, the bytes of its pieces, and what they hash to; of a packed image only."""
        self._piece_weights = layout.piece_weights
        self._stored_offsets = {
            piece.tensor.name: piece.stored_offset_bytes for piece in reversed(place_pieces(layout))
        }
        self._bytes_done = 0
        self._bytes_told = 0
        self._bytes_total = sum(entry.size_bytes for entry in layout.tensors)

    def run(self, threads: int) -> None:
        """Build all tensors, noting their checksums."""
        with ThreadPoolExecutor(threads, thread_name_prefix="image build") as pool:
            futures = [pool.submit(self._take_tensors) for _ in range(threads)]
        for future in futures:
            future.result()
        self._progress(self._bytes_total, self._bytes_total)

    def _place(self, recipe: TensorRecipe) -> tuple[int, int]:
        tensor = self._checkpoint.tensors[recipe.sources[0]]
        return tensor.file, tensor.offset_bytes

    def _take_tensors(self) -> None:
        buffer = ReadBuffer(CHUNK_BYTES)
        try:
            while not self._failed.is_set():
                with self._lock:
                    item = next(self._work, None)
                if item is None:
                    return
                self._build_tensor(*item, buffer)
        except BaseException:
            self._failed.set()
            raise

    def _build_tensor(self, recipe: TensorRecipe, entry: TensorEntry, buffer: ReadBuffer) -> None:
        hasher = TensorHasher()
        position = entry.offset_bytes
        writer = self._piece_writer(entry)
        for source in recipe.sources:
            for chunk in self._checkpoint.chunks(source, entry.dtype, buffer):
                if self._cancelled.is_set():
                    raise BuildCancelled(f"the build was given up at tensor {entry.name}")
                if self._failed.is_set():
                    return
                hasher.update(chunk)
                if writer is None:
                    write_all(self._descriptor, chunk, position)
                else:
                    writer.write(chunk)
                position += len(chunk)
                self._count(len(chunk))
        pieces = () if writer is None else writer.finish()
        with self._lock:
            self.checksums[entry.name] = hasher.checksum()
            if writer is not None:
                self.pieces[entry.name] = pieces
                self.stored_checksums[entry.name] = writer.stored_checksum

    def _piece_writer(self, entry: TensorEntry) -> PieceWriter | None:
        """For a packed image; a tensor of no weights has no place in it."""
        if not self._piece_weights:
            return None
        place = self._stored_offsets.get(entry.name, 0)
        return PieceWriter(self._descriptor, entry, place, self._piece_weights)

    def _count(self, count: int) -> None:
        with self._lock:
            self._bytes_done += count
            if self._bytes_done - self._bytes_told >= PROGRESS_BYTES:
                self._bytes_told = self._bytes_done
                self._progress(self._bytes_done, self._bytes_total)


def _unexpected(recipe: TensorRecipe, source: str, found: str) -> CheckpointInvalid:
    expected = list(recipe.shape)
    part = (
        "" if len(recipe.sources) == 1 else f" stacked along its first dimension for {recipe.name}"
    )
    return CheckpointInvalid(
        f"tensor {source}: expected floats of shape {expected}{part}, found {found}; the files do "
        "not belong to this configuration",
        tensor=source,
        expected=expected,
        found=found,
    )
