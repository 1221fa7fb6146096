"""A folder in COCO's form as shards that plain `datasets.load_dataset` reads: python -m sapiens_accel.data convert.

One row is one image, with its bytes as they are and a list of its people: a row for each person would hold the bytes
of COCO's images two and a half times. Who is where is a column of its own, read without the images.
"""

import argparse
import io
import json
import os
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import LocalTokenNotFoundError
from tqdm import tqdm

from sapiens_accel.config.parse import check_model_id
from sapiens_accel.config.schema import DataConfig
from sapiens_accel.errors import UserError, count
from sapiens_accel.hub.errors import explain, hide_token
from sapiens_accel.sources import coco as coco_json
from sapiens_accel.sources import images as photo
from sapiens_accel.sources import shards
from sapiens_accel.sources.schema import PERSON, WHOLE_BODY, annotation_to_person

GROUP_BYTES = 8 << 20  # of a row group: what streaming reads at a time
FOLDERS = {"train": "train", "val": "validation", "unlabelled": "unlabelled"}
WHOLE = {name for name in WHOLE_BODY if name != "keypoints"}

Group = tuple[int, list[dict[str, Any]]]  # the number of a shard, and rows of it


class Split(NamedTuple):
    """A split's name in file names, COCO's files of it, and whether it may be missing."""

    name: str
    annotations: Path
    images: Path
    optional: bool


def main(argv: Sequence[str]) -> None:
    """`convert coco DIR --to parquet OUT`.

    Raises:
        UserError: what is missing or broken; an output folder that holds something.
    """
    asked = _parser().parse_args(argv)
    root, out = Path(asked.root), Path(asked.out)
    if asked.push_to_hub:
        try:
            check_model_id(asked.push_to_hub)
        except UserError as error:
            raise UserError(str(error).replace("--hub_model_id", "--push_to_hub")) from None
        if not get_token():  # before hours of writing
            raise UserError(f"--push_to_hub {asked.push_to_hub}: {explain(LocalTokenNotFoundError(), '')}")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected one in COCO's form")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: there already; name a new folder, or remove it")
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        summary = write(_splits(asked), temporary, asked.to, round(asked.shard_mb * 1e6), asked.group_rows)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(*summary, f"written: {out}", sep="\n")
    if asked.push_to_hub:
        print(f"pushed: {_push(out, asked.push_to_hub, private=asked.private)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sapiens_accel.data", description=__doc__)
    convert = parser.add_subparsers(required=True).add_parser("convert", help="a data set as shards")
    convert.add_argument("form", choices=["coco"], help="what DIR holds")
    convert.add_argument("root", metavar="DIR", help="folder in COCO's form, as --data.root takes it")
    convert.add_argument("out", metavar="OUT", help="a new folder")
    convert.add_argument("--to", choices=["parquet", "webdataset"], default="parquet", help="what OUT will hold")
    convert.add_argument("--shard_mb", type=float, default=500.0, help="size of one file; default 500")
    convert.add_argument("--group_rows", type=int, default=100, help="most images that streaming reads at a time")
    for split in ("train", "val", "unlabelled"):
        for kind, what in (("annotations", "JSON"), ("images", "folder of images")):
            name = f"{split}_{kind}"
            convert.add_argument(f"--{name}", default=getattr(DataConfig, name), help=f"{what}; default %(default)s")
    convert.add_argument("--push_to_hub", metavar="ORG/NAME", help="upload OUT as this data set of the Hub")
    convert.add_argument("--private", action="store_true", help="the data set is for its owners alone")
    return parser


def _splits(asked: argparse.Namespace) -> list[Split]:
    root = Path(asked.root)
    boxes = asked.unlabelled_annotations or f"annotations/person_boxes_{asked.unlabelled_images}.json"
    return [
        Split("train", root / asked.train_annotations, root / asked.train_images, False),
        Split("val", root / asked.val_annotations, root / asked.val_images, False),
        Split("unlabelled", root / boxes, root / asked.unlabelled_images, not asked.unlabelled_annotations),
    ]


def write(splits: Sequence[Split], out: Path, to: str, shard_bytes: int, group_rows: int) -> list[str]:
    """Write the splits' shards under `out`, and say what is in them, a line each.

    Raises:
        UserError: a file is missing or broken.
    """
    summary, written, categories, ending = [], [], [], "parquet" if to == "parquet" else "tar"
    (out / "data").mkdir(parents=True)
    for split in splits:
        if split.optional and not split.images.is_dir():
            continue
        tree, name = _tree(split), FOLDERS[split.name]
        _check_ids(split, tree, to)
        bar = tqdm(
            _rows(split, tree), total=len(tree["images"]), desc=split.name, unit=" images", disable=None, leave=False
        )
        groups = _groups(iter(bar), shard_bytes, group_rows)
        made = (_write_parquet if to == "parquet" else _write_tars)(groups, out / "data", name, tree)
        _number(out / "data", name, ending, made)
        people = len(tree["annotations"])
        summary.append(f"{split.name}: {len(tree['images'])} images, {people} annotations, {made} shard(s)")
        if not _has_people(split) and (others := _other_files(split)):
            suffixes = ", ".join(sorted({path.suffix or "no suffix" for path in others}))
            summary.append(f"{split.name}: left out: {count(len(others), 'file')} with other suffixes ({suffixes})")
        written.append(split.name)
        categories += [{"split": name, **category} for category in tree.get("categories", ())]
    if to == "parquet" and categories:
        pq.write_table(pa.Table.from_pylist(categories), out / "categories.parquet")
    elif categories:
        (out / shards.CATEGORIES).write_text(json.dumps(categories))
    (out / "README.md").write_text(_card(written, ending, named=to == "parquet" and bool(categories)))
    return summary


def _tree(split: Split) -> dict[str, Any]:
    """The split's JSON; of an unlabeled folder without one, its images."""
    if _has_people(split):
        return coco_json.read_json(split.annotations)
    if not split.optional:
        raise UserError(f"{split.annotations}: expected a COCO annotation file; see --{split.name}_annotations")
    images, others = [], _other_files(split)
    for index, path in enumerate(sorted(set(split.images.iterdir()) - set(others))):
        image = photo.read_unchecked_image(path, cv2.IMREAD_COLOR)
        if image is None:
            raise UserError(f"{path}: does not decode; repair it or move it away")
        sizes = {"width": image.shape[1], "height": image.shape[0]}
        images.append({"id": index, "file_name": path.name, **sizes})
    return {"images": images, "annotations": [], "categories": []}


def _has_people(split: Split) -> bool:
    """Whether its JSON lists its images and people; of detections, and without a JSON, the folder is what counts."""
    return split.annotations.is_file() and not coco_json.is_detections(split.annotations)


def _other_files(split: Split) -> list[Path]:
    """What is in the folder of an unlabeled split and is no image by its suffix."""
    return [path for path in split.images.iterdir() if path.suffix.lower() not in photo.IMAGE_SUFFIXES]


def _check_ids(split: Split, tree: dict[str, Any], to: str) -> None:
    """
    Raises:
        UserError: ids of images or annotations that the shards cannot keep as they are written: a column is of numbers
            or of texts, and in tar shards they are numbers.
    """
    for key in ("images", "annotations"):
        num = sum(map(_has_text_id, tree[key]))
        if num and to != "parquet":
            raise UserError(f"{split.annotations}: {key}: ids are texts (expected numbers). Use --to parquet")
        if 0 < num < len(tree[key]):
            raise UserError(
                f"{split.annotations}: {key}: {num} of {len(tree[key])} ids are texts (expected all or none). Write "
                "all as texts"
            )


def _has_text_id(item: dict[str, Any]) -> bool:
    return isinstance(coco_json.given_id(item), str)


def _rows(split: Split, tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each image, in the order of `images`."""
    people: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for position, annotation in enumerate(tree["annotations"]):
        try:
            person = annotation_to_person(annotation, position) | {"id": coco_json.given_id(annotation)}
            people[annotation["image_id"]].append(person)
        except coco_json.BROKEN as error:
            raise UserError(f"{split.annotations}: annotations[{position}]: {coco_json.reason(error)}") from None
    known = [image["id"] for image in tree["images"]]
    unknown = people.keys() - set(known)
    if unknown:
        raise UserError(f"{split.annotations}: image {min(unknown, key=str)} of an annotation is not among 'images'")
    twice = len(known) - len(set(known))
    if twice or not all(isinstance(one, int) for one in known):
        raise UserError(f"{split.annotations}: images: expected whole numbers as ids, each once")
    for image in tree["images"]:
        path = split.images / image["file_name"]
        if not path.is_file():
            raise UserError(f"{split.annotations}: its image {path} is not there")
        yield {
            "image": {"bytes": path.read_bytes(), "path": Path(image["file_name"]).name},
            "image_id": coco_json.given_id(image),
            "file_name": image["file_name"],
            "width": image.get("width"),
            "height": image.get("height"),
            "people": people.get(image["id"], []),
        }


def _features(tree: dict[str, Any]) -> Features:
    """What `load_dataset` sees; COCO-WholeBody's lists only where there are any."""
    has_parts = any(name in one for one in tree["annotations"] for name in WHOLE)
    kinds = {"int64": "int64", "int8": "int8", "double": "float64"}
    annotation = {
        field.name: List(Value("float64")) if pa.types.is_list(field.type) else Value(kinds[str(field.type)])
        for field in PERSON
        if has_parts or field.name not in WHOLE
    }
    if any(map(_has_text_id, tree["annotations"])):
        annotation["id"] = Value("string")
    sizes = {name: Value("int64") for name in ("width", "height")}
    return Features(
        {
            "image": Image(),
            "image_id": Value("string" if any(map(_has_text_id, tree["images"])) else "int64"),
            "file_name": Value("string"),
            **sizes,
            "people": List(annotation),
        }
    )


def _groups(rows: Iterator[dict[str, Any]], shard_bytes: int, most: int) -> Iterator[Group]:
    """Row groups, each with the number of its shard; only one of them is in memory."""
    group, shard, size, held = [], 0, 0, 0
    for row in rows:
        length = len(row["image"]["bytes"])
        full = size and size + length > shard_bytes
        if group and (full or held + length > GROUP_BYTES or len(group) >= most):
            yield shard, group
            group, held = [], 0
        if full:
            shard, size = shard + 1, 0
        group.append(row)
        size, held = size + length, held + length
    if group:
        yield shard, group


def _write_parquet(groups: Iterator[Group], folder: Path, split: str, tree: dict[str, Any]) -> int:
    metadata = json.dumps({"version": 1, "categories": tree.get("categories", [])})
    schema = _features(tree).arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), shards.METADATA: metadata.encode()})
    writers: dict[int, pq.ParquetWriter] = {}
    try:
        for shard, group in groups:
            if shard not in writers:
                for writer in writers.values():
                    writer.close()
                writers[shard] = pq.ParquetWriter(folder / f"{split}-{shard:05d}.parquet", schema, compression="zstd")
            writers[shard].write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=len(group))
    finally:
        for writer in writers.values():
            writer.close()
    return len(writers)


def _write_tars(groups: Iterator[Group], folder: Path, split: str, _: dict[str, Any]) -> int:
    number = count = 0
    for shard, group in groups:
        with tarfile.open(folder / f"{split}-{shard:05d}.tar", "a") as tar:
            for row in group:
                image = row.pop("image")
                about = {**row, "people": [{k: v for k, v in one.items() if v is not None} for one in row["people"]]}
                _add(tar, f"{number:09d}{_suffix(row['file_name'], image['bytes'])}", image["bytes"])
                _add(tar, f"{number:09d}.json", json.dumps(about).encode())
                number += 1
        count = shard + 1
    return count


def _suffix(name: str, content: bytes) -> str:
    """An image's suffix in a tar, where its member is known by it: that of its format where its name has another."""
    if (suffix := Path(name).suffix.lower()) in photo.IMAGE_SUFFIXES:
        return suffix
    try:
        with PIL.Image.open(io.BytesIO(content)) as image:
            suffix = f".{image.format}".lower()
    except Exception:  # Pillow documents no complete list of what a broken header raises
        suffix = ""
    return suffix if suffix in photo.IMAGE_SUFFIXES else ".jpg"  # what does not decode is named by its readers


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _number(folder: Path, split: str, ending: str, count: int) -> None:
    """Give the shards the Hub's names: SPLIT-00000-of-00003."""
    for number in range(count):
        path = folder / f"{split}-{number:05d}.{ending}"
        path.rename(folder / f"{split}-{number:05d}-of-{count:05d}.{ending}")


def _card(splits: Sequence[str], ending: str, *, named: bool) -> str:
    """The dataset's README: which files are which split, and what a row is."""
    files = "".join(f"  - split: {FOLDERS[s]}\n    path: data/{FOLDERS[s]}-*.{ending}\n" for s in splits)
    more = "- config_name: categories\n  data_files: categories.parquet\n" * named
    return (
        f"---\ntask_categories:\n- keypoint-detection\nconfigs:\n- config_name: default\n  data_files:\n{files}"
        f"{more}---\n\n"
        "People's keypoints in COCO's form, one row for each image: its bytes, image_id, file_name, width, height,\n"
        "and `people`: id, place (in the JSON it came from), category_id, iscrowd, area, bbox (x, y, width,\n"
        "height) and keypoints (x, y, v, ...), all in pixels of the image. Names of keypoints:\n"
        "the configuration `categories`, or categories.json beside tar shards.\n\n"
        "    train.py --data.root hf://ORG/NAME          (or the folder)\n"
        '    datasets.load_dataset("ORG/NAME")\n'
    )


def _push(folder: Path, name: str, *, private: bool) -> str:
    """Upload the folder in one commit: a push that is cut off has changed nothing, and is begun again.

    Raises:
        UserError: why it could not be, and how to push what has been written.
    """
    api, repo = HfApi(), f"datasets/{name}"
    try:
        api.create_repo(name, repo_type="dataset", private=private or None, exist_ok=True)
        if private and not api.dataset_info(name).private:
            raise UserError(f"{repo} is there and public, and --private was asked for; make it private on the Hub")
        api.upload_folder(repo_id=name, folder_path=folder, repo_type="dataset", commit_message="Data as shards")
    except Exception as error:
        raise UserError(
            f"--push_to_hub {name}: {hide_token(explain(error, repo))}; the shards are whole in {folder}: once that is "
            f"repaired, `hf upload {name} {folder} --repo-type dataset`"
        ) from None
    return f"{api.endpoint}/{repo}"
