"""Boxes by a detector: what transformers computes by itself, resumed as unresumed, read by ssl and by evaluation."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import forks
import numpy as np
import pytest
import torch
import transformers
from detectors import tiny
from PIL import Image

from sapiens_accel.data import detections as boxes_json
from sapiens_accel.data import people as coco
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import boxes as detections
from sapiens_accel.inference import detect_people as boxes
from sapiens_accel.inference import media
from sapiens_accel.inference.detector import Detector, non_maximum_suppression
from sapiens_accel.sources import images as photo
from sapiens_accel.sources import synthetic

REPOSITORY = Path(__file__).resolve().parents[2]
VAL = "annotations/person_keypoints_val2017.json"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("boxes") / "drawn", num_train=8, num_unlabelled=16, num_val=8)


@pytest.fixture(scope="module")
def detector(root: Path) -> Path:
    return tiny(root.parent / "detector")


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """Seven images of different sizes, one turned by its EXIF data; two in folders of their own."""
    folder = tmp_path / "pics"
    for index, path in enumerate(sorted((root / "unlabeled2017").iterdir())[:7]):
        image = cv2.imread(str(path))
        assert image is not None
        target = folder / ("b/a" if index < 2 else "") / f"p{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), image[: 240 - 20 * index, : 240 - 9 * index])
    turned = Image.open(folder / "p6.png")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "p6.jpg", exif=exif)
    (folder / "p6.png").unlink()
    return folder


def _main(*words: object) -> None:
    boxes.main([*map(str, words), "--num_workers", "0"])


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


# ---- What is found


@pytest.mark.parametrize("kind", ["rt_detr", "rt_detr_v2", "d_fine"])
def test_boxes_are_those_of_transformers(kind: str, folder: Path, tmp_path: Path) -> None:
    """One image at a time, decoded by Pillow, through transformers' own classes and their own reading of outputs."""
    labels, person = (("dog", "cup", "person"), 2) if kind == "d_fine" else (("dog", "Person", "cup"), 1)
    name = tiny(tmp_path / kind, kind, labels)
    model: Any = transformers.AutoModelForObjectDetection.from_pretrained(name).eval()
    processor: Any = transformers.RTDetrImageProcessorPil.from_pretrained(name)
    _main(folder, "--out", tmp_path / "b.json", "--detector", name, "--threshold", "0.05", "--max_iou", "1",
          "--batch_size", "3")  # fmt: skip
    found = _read(tmp_path / "b.json")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.??g"))
    assert len(files) == 7
    shown, others = [], 0
    for file in files:
        image = Image.open(folder / file)
        image = image.transpose(Image.Transpose.ROTATE_270) if file == "p6.jpg" else image
        with torch.no_grad():
            outputs = model(**processor(images=image.convert("RGB"), return_tensors="pt"))
        size = torch.tensor([[image.height, image.width]])
        result = processor.post_process_object_detection(outputs, threshold=0.05, target_sizes=size)[0]
        for score, label, box in zip(result["scores"], result["labels"], result["boxes"].numpy(), strict=True):
            x1, y1, x2, y2 = box.clip(0, [image.width, image.height] * 2)
            others += int(label) != person
            if int(label) == person and x2 - x1 >= 1 and y2 - y1 >= 1:
                shown.append((file, [x1, y1, x2 - x1, y2 - y1], float(score)))
    assert len(shown) > 10 and others > 10
    assert [row["file_name"] for row in found] == [file for file, _, _ in shown]
    assert np.array([row["bbox"] for row in found]) == pytest.approx(np.array([box for _, box, _ in shown]), abs=0.02)
    assert [row["score"] for row in found] == pytest.approx([score for _, _, score in shown], abs=1e-4)
    assert len({tuple(row["bbox"]) for row in found}) > len(files), "what is seen depends on the image"


def test_a_detector_is_asked_for_another_class(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mouse's boxes are those that the same network calls mouse; two classes are their sum."""
    name, found = tiny(tmp_path / "animals", "rt_detr", ("mouse", "person", "Rat")), {}
    for classes in ("Mouse", "rat", "mouse,rat"):
        words = ("--detector", name, "--detector.class", classes, "--threshold", 0.05, "--max_iou", 1)
        _main(folder, "--out", tmp_path / "b.json", *words)
        found[classes] = sorted((row["file_name"], *row["bbox"]) for row in _read(tmp_path / "b.json"))
        assert f"boxes of {classes} in 7 images" in capsys.readouterr().out
    assert found["mouse,rat"] == sorted(found["Mouse"] + found["rat"]) and min(map(len, found.values())) > 5


def test_of_boxes_that_overlap_the_surer_one_stays() -> None:
    rng = np.random.default_rng(0)
    found = np.concatenate([rng.uniform(0, 60, (40, 2)), rng.uniform(10, 60, (40, 2))], axis=1)
    scores = rng.permutation(40) / 40
    kept: list[int] = []
    for i in np.argsort(-scores):  # in plain loops
        x, y, w, h = found[i]
        others = [found[j] for j in kept]
        inner = [max(0, min(x + w, a + c) - max(x, a)) * max(0, min(y + h, b + d) - max(y, b)) for a, b, c, d in others]
        if all(one / (w * h + c * d - one) <= 0.3 for one, (_, _, c, d) in zip(inner, others, strict=True)):
            kept.append(int(i))
    assert 3 < len(kept) < 40
    assert non_maximum_suppression(found, scores, 0.3).tolist() == kept
    assert sorted(non_maximum_suppression(found, scores, 1.0).tolist()) == list(range(40))


def test_a_image_that_does_not_decode_is_named_and_the_rest_goes_on(
    folder: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--detector", detector, "--threshold", "0.3", "--batch_size", "2")
    _main(folder, "--out", tmp_path / "all.json", *words)
    cut = folder / "p4.png"
    cut.write_bytes(cut.read_bytes()[:2000])
    _main(folder, "--out", tmp_path / "some.json", *words)
    said = capsys.readouterr().out
    assert f"skipped: {cut} does not decode" in said and f"people in 6 images of {folder}, 1 skipped" in said
    rest = [row for row in _read(tmp_path / "all.json") if row["file_name"] != "p4.png"]
    some = _read(tmp_path / "some.json")
    assert [row["file_name"] for row in some] == [row["file_name"] for row in rest]
    assert np.array([row["bbox"] for row in some]) == pytest.approx(np.array([row["bbox"] for row in rest]), abs=0.011)


# ---- Killed, and again


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("cut", [False, True], ids=["between batches", "within a line"])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    folder: Path, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    words = ("--detector", detector, "--threshold", "0.3", "--batch_size", "2")
    _main(folder, "--out", tmp_path / "whole.json", *words)
    out, partial, scan, seen = tmp_path / "killed.json", tmp_path / "killed.json.partial", Detector.scan, []

    def dies(self: Detector, root: Path, names: list[str], *rest: int) -> Any:
        seen.append(list(names))
        for number, batch in enumerate(scan(self, root, names, *rest)):
            if number == 2 and len(seen) == 1:
                raise _KilledError
            yield batch

    monkeypatch.setattr(Detector, "scan", dies)
    with pytest.raises(_KilledError):
        _main(folder, "--out", out, *words)
    assert not out.exists() and partial.read_bytes().count(b"\n") == 3
    if cut:
        partial.write_bytes(partial.read_bytes()[:-7])
    _main(folder, "--out", out, *words)
    assert len(seen[0]) == 7 and seen[1] == seen[0][2 if cut else 4 :]
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes() and len(_read(out)) > 7
    assert not partial.exists()


def test_what_was_begun_otherwise_is_not_gone_on_with(folder: Path, detector: Path, tmp_path: Path) -> None:
    partial = tmp_path / "b.json.partial"
    partial.write_text(json.dumps({"detector": "other", "threshold": 0.3}) + "\n")
    with pytest.raises(
        UserError, match=r"b\.json\.partial: begun with other settings: detector other is now .*; delete"
    ):
        _main(folder, "--out", tmp_path / "b.json", "--detector", detector)
    assert partial.is_file()


# ---- A video


def _video(path: Path, num: int) -> list[np.ndarray]:
    """A film of a moving square; its frames as OpenCV decodes them."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 64))
    for index in range(num):
        frame = np.full((64, 96, 3), 40, np.uint8)
        frame[10:40, 5 * index : 5 * index + 20] = (200, 90, 10 * index)
        writer.write(frame)
    writer.release()
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    assert len(frames) == num
    return frames


def test_every_third_frame_of_a_video_becomes_a_image(detector: Path, tmp_path: Path) -> None:
    frames = _video(tmp_path / "clip.avi", 11)
    folder = tmp_path / "frames"
    words = ("--detector", detector, "--threshold", "0.3", "--every", 3, "--frames", folder)
    _main(tmp_path / "clip.avi", "--out", tmp_path / "b.json", *words)
    names = [f"clip_{index:06d}.jpg" for index in (0, 3, 6, 9)]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name, index in zip(names, (0, 3, 6, 9), strict=True):
        picture = photo.read_image(folder / name)
        difference = [np.abs(picture.astype(int) - frame).mean() for frame in frames]
        assert int(np.argmin(difference)) == index and difference[index] < 2
    found = _read(tmp_path / "b.json")
    assert {row["image_id"] for row in found} == {Path(name).stem for name in names}
    _main(folder, "--out", tmp_path / "again.json", "--detector", detector, "--threshold", "0.3")
    assert _read(tmp_path / "again.json") == found
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    media.write_frames(tmp_path / "clip.avi", folder, 3)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps, "what is there stays"


# ---- Who reads it


def test_names_and_ids() -> None:
    assert boxes_json.make_ids(["000000000785.jpg", "7.png", "a/8.png", "clip_000001.jpg"]) == [
        785,
        7,
        "a/8",
        "clip_000001",
    ]
    # Two of one number, or of one stem: another rule for all of them.
    assert boxes_json.make_ids(["000000000007.jpg", "7.png"]) == ["000000000007", "7"]
    assert boxes_json.make_ids(["a.jpg", "a.png"]) == ["a.jpg", "a.png"]


def test_evaluation_reads_them(root: Path, detector: Path, tmp_path: Path) -> None:
    people = coco.labeled_people(root, VAL, "val2017", 17, tmp_path / "cache")
    for more in ((), ("--annotations", root / VAL)):
        _main(root / "val2017", "--out", tmp_path / "b.json", "--detector", detector, "--threshold", "0.2", *more)
        read, found = detections.load_boxes(str(tmp_path / "b.json"), people), _read(tmp_path / "b.json")
        assert read.boxes_xywh.tolist() == [row["bbox"] for row in found] and len(read) > 5 and read.note == ""
        assert read.file_names == [f"val2017/{row['file_name']}" for row in found]


@pytest.mark.slow
@pytest.mark.launch
def test_stage_ssl_learns_from_them(root: Path, detector: Path, tmp_path: Path) -> None:
    """Boxes of images whose names are no numbers, by main; then one step of training by the program on them."""
    shutil.copytree(root, tmp_path / "root")
    folder = tmp_path / "mine"
    folder.mkdir()
    for index, path in enumerate(sorted((root / "unlabeled2017").iterdir())):
        shutil.copy(path, folder / f"holiday {index}.jpg")
    out = tmp_path / "b.json"
    _main(folder, "--out", out, "--detector", detector, "--threshold", 0.3)
    least = round(float(np.median([row["score"] for row in _read(out)])), 3)
    num = sum(row["score"] >= least and min(row["bbox"][2:]) >= 24 for row in _read(out))
    assert 5 < num < len(_read(out))
    said = _run(
        "train.py", "--stage", "ssl", "--weights", "random", "--max_steps", 1, "--data.root", root,
        "--data.unlabelled_images", folder,
        "--data.unlabelled_annotations", out, "--data.unlabelled_min_score", least, "--data.num_workers", 0,
        "--data.unlabelled_train_people", "false", "--ssl.global_batch", 2, "--report_to", "none",
        "--output_dir", tmp_path / "run", "--data.cache_dir", tmp_path / "cache",
    )  # fmt: skip
    assert f"{num} unlabeled" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss_unlabelled" in line] == [1]


def _run(*words: object) -> str:
    done = forks.run(words)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Bad input


def _refused(*words: object) -> str:
    with pytest.raises(UserError) as caught:
        _main(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_images_are_refused(folder: Path, detector: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "b.json", "--detector", detector)
    assert f"{tmp_path / 'no'}: no such file or folder" in _refused(tmp_path / "no", *words)
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("")
    assert f"{tmp_path / 'empty'}: no images (.jpg," in _refused(tmp_path / "empty", *words)
    assert "notes.txt: neither an image" in _refused(tmp_path / "empty" / "notes.txt", *words)
    (tmp_path / "clip.mp4").write_bytes(b"no film at all" * 100)
    assert f"{tmp_path / 'clip.mp4'}: does not open as a video" in _refused(tmp_path / "clip.mp4", *words)
    assert "--every and --frames are of a video" in _refused(folder, *words, "--every", 2)
    assert "image b/a/p0.png is not among its images" in _refused(folder, *words, "--annotations", _json(tmp_path))
    for path in folder.rglob("*.??g"):
        path.write_bytes(b"no image")
    assert f"{folder}: none of its 7 images can be used" in _refused(folder, *words)


def _json(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": []}))
    return folder / "a.json"


def test_wrong_detectors_are_refused(
    folder: Path, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (folder, "--out", tmp_path / "b.json", "--detector")
    text = _refused(*words, tiny(tmp_path / "blind", labels=("dog", "cup")))
    assert "blind: no class 'person' among its 2 (dog, cup); name one by --detector.class" in text
    assert "--detector not/a/name/at/all: no such file or folder" in _refused(*words, "not/a/name/at/all")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = _refused(*words, "org/absent_detector")
    assert text.startswith("--detector org/absent_detector: ") and "HF_HUB_OFFLINE" in text
    bare = tmp_path / "bare"
    bare.mkdir()
    assert f"--detector {bare}: not a detector that transformers loads" in _refused(*words, bare)
    (bare / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "not a detector that transformers loads" in _refused(*words, bare)
    cut = Path(shutil.copytree(detector, tmp_path / "cut"))
    tree = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps(tree | {"decoder_layers": 3}))
    assert "cut: incomplete: no '" in _refused(*words, cut)


def test_wrong_numbers_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (folder, "--out", tmp_path / "b.json")
    assert "--threshold 1.5: expected 0 to 1" in _refused(*words, "--threshold", "1.5")
    assert "--batch_size 0: expected 1 or more" in _refused(*words, "--batch_size", "0")
    assert "--every 0: expected 1 or more" in _refused(*words, "--every", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without a launcher" in _refused(*words)
