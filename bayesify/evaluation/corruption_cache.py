"""A folder that keeps corrupted images: Arrow files of PNGs, named by a fingerprint of what they were made from."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset as TorchDataset

from bayesify.data import PreparedDataset
from bayesify.errors import FormatError
from bayesify.evaluation.imagecorruptions_compat import versions
from bayesify.files import replacing

if TYPE_CHECKING:
    from bayesify.evaluation.corrupted import CorruptedImages


class EncodedImages(TorchDataset):
    """Corrupted images as (PNG, whether already resized and cropped)."""

    def __init__(self, images: CorruptedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[bytes, bool]:
        image, cropped = self.images.image(index)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return file.getvalue(), cropped


class StoredImages(TorchDataset):
    """Corrupted images of an Arrow file, which is mapped into memory by each process for itself.

    Raises:
        FormatError: the file is broken or holds another number of images.
    """

    def __init__(self, images: CorruptedImages, path: Path) -> None:
        self.images, self.path, self.table = images, path, None
        found = self._open().num_rows
        if found != len(images):
            raise FormatError(f"{path}: holds {found} images; expected {len(images)}. Delete it to make it anew.")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int | None]:
        from PIL import Image as PILImage

        if self.table is None:
            self.table = self._open()
        png, cropped = (self.table[name][index].as_py() for name in ("png", "cropped"))
        with PILImage.open(io.BytesIO(png)) as image:
            image.load()
        return self.images.finish(index, image, cropped)

    def _open(self) -> Any:
        import pyarrow as pa

        try:
            return pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise FormatError(
                f"{self.path}: not a file of corrupted images ({error}). Delete it to make it anew."
            ) from error


def write_images(path: Path, batches: Iterable[list[tuple[bytes, bool]]]) -> None:
    """Write the images of `EncodedImages` to an Arrow file, whole or not at all."""
    import pyarrow as pa

    schema = pa.schema([("png", pa.large_binary()), ("cropped", pa.bool_())])
    with replacing(path) as temporary, pa.ipc.new_file(str(temporary), schema) as file:
        for batch in batches:
            pngs, cropped = zip(*batch, strict=True)
            file.write_batch(pa.record_batch({"png": pngs, "cropped": cropped}, schema=schema))


def fingerprint(prepared: PreparedDataset, rows: Sequence[int], seed: int) -> str:
    """Hex digest of what corrupted images depend on: encoded images, preprocessing, seed, library versions."""
    import datasets

    preprocessing: Any = prepared.preprocessing
    described = preprocessing.to_dict()
    if hasattr(preprocessing, "processor"):
        described |= {"processor": preprocessing.processor.to_dict()}
    digest = hashlib.sha256(json.dumps([1, versions(), seed, described], sort_keys=True, default=str).encode())
    column = prepared.input_column
    encoded = prepared.dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    for row in rows:
        content = hashlib.sha256(_content(encoded[row][column], prepared, row)).digest()
        digest.update(row.to_bytes(8, "little") + content)
    return digest.hexdigest()


def _content(value: dict[str, Any] | None, prepared: PreparedDataset, row: int) -> bytes:
    if value is None:
        return b""
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except OSError:  # a path into an archive or on the network, which `datasets` can read
        return prepared.dataset[row][prepared.input_column].tobytes()
