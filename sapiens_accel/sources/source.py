"""What a file of annotations is: a COCO JSON or the manifest of shards. Nothing outside of this package asks."""

from pathlib import Path

from sapiens_accel.sources import shards
from sapiens_accel.sources.coco import CocoFile
from sapiens_accel.sources.schema import Source


def open_source(file: Path) -> Source:
    """The source that a file of annotations stands for."""
    return shards.ShardedSource(file) if file.suffix == shards.SUFFIX else CocoFile(file)
