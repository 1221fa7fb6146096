"""What a pushed card says of names that come from files, and what it must not say of the machine it was made on."""

import dataclasses
import getpass
import json
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from networks import untrained

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import ModelConfig
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation.coco_metrics import METRICS
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.publish import model_card, push
from sapiens_accel.publish.markdown import literal, repository_link

SECRET = "hunter2"
HOSTILE = [
    "<img src=x onerror=alert(1)>", "a | b", "**bold**", "[x](javascript:alert(1))", "`code`", "# title", "a\n\n# b",
    "\x1b]0;title\x07", "\u202ereversed", "&lt;b&gt;", "---", "| - | - |", "![i](http://x/i.png)", "<!-- c -->", "\\",
    "http://evil.example", "$$x$$", "~~x~~", "_x_",
]  # fmt: skip


class Seen(HTMLParser):
    """The tags and the text of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def _run_folder(folder: Path, names: tuple[str, ...] = COCO17.names, **data: Any) -> Path:
    """A run directory with one evaluated stage, whose keypoints have these names."""
    skeleton = dataclasses.replace(COCO17, names=names)
    run = config.load([])
    run = dataclasses.replace(
        run, stage="phase1", output_dir=str(folder), data=dataclasses.replace(run.data, **data),
        model=ModelConfig(name="sapiens_tiny"),
    )  # fmt: skip
    config.save(run, folder / "config.yaml")
    untrained(folder / "phase1" / "weights", skeleton=skeleton)
    how = {"step": 2, "weights_step": 2, "split": "val", "boxes": "detector (<b>x|y</b>.json)", "flip": True}
    each = {"PCK": dict.fromkeys(names, 0.5)}
    (folder / "phase1" / "eval.json").write_text(json.dumps(dict.fromkeys(METRICS, 0.25) | how | each))
    line = {"stage": "phase1", "step": 2, "loss": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def _written(folder: Path) -> str:
    model_card.write(folder / "card", model_card.collect(folder, "phase1"), "me/pose", None)
    return (folder / "card" / "README.md").read_text()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_literal(name: str) -> None:
    markdown = MarkdownIt("commonmark").enable("table")
    seen = Seen(markdown.render(f"On 3 people of {literal(name)}."))
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name
    assert seen.tags == ["p"] and seen.text.strip() == f"On 3 people of {shown}."
    seen = Seen(markdown.render(f"| a | b |\n|---|---|\n| {literal(name)} | 1 |\n"))
    assert seen.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert shown in seen.text


def test_ordinary_names_stand_as_they_are() -> None:
    for name in (*COCO17.names, "face-0", "person_keypoints_val2017.json", "Left eye", "ground truth", "目.json"):
        assert literal(name) == name
    assert repository_link("facebook/sapiens-pretrain-1b").startswith("[facebook/sapiens-pretrain-1b](https://hugg")
    assert repository_link("a](javascript:x)/b") == r"a\]\(javascript\:x\)\/b"


def test_a_card_of_hostile_names_has_no_more_markup_than_another(tmp_path: Path) -> None:
    markdown = MarkdownIt("commonmark").enable("table")
    names = (*HOSTILE[:17],)
    hostile = _run_folder(tmp_path / "a", names, root="/data", train_annotations="x/<b>|*t*.json")
    plain = _run_folder(tmp_path / "b", root="/data", train_annotations="x/t.json")
    pages = []
    for folder in (hostile, plain):
        _, metadata, body = _written(folder).split("---\n", 2)
        assert yaml.safe_load(metadata)["library_name"] == "transformers"
        pages.append(Seen(markdown.render(body)))
    assert pages[0].tags == pages[1].tags
    assert all(letter.isprintable() or letter == "\n" for letter in pages[0].text)
    assert "<img src=x onerror=alert(1)>" in pages[0].text and "<b>|*t*.json" in pages[0].text


def test_nothing_pushed_names_this_machine(tmp_path: Path) -> None:
    """Paths, user, host and credentials of the run stay at home."""
    folder = tmp_path / "secret_project" / "run"
    other = untrained(tmp_path / "secret_weights" / "w")
    _run_folder(
        folder, root=f"https://user:{SECRET}@host.example/data", cache_dir=str(tmp_path / "secret_cache"),
        train_annotations=str(tmp_path / "secret_labels" / "train.json"),
    )  # fmt: skip
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"weights": str(other), "hub_model_id": "me/pose"}))
    _written(folder)
    push.snapshot(folder / "phase1" / "weights", tmp_path / "pushed" / "files")
    pushed = [*(folder / "card").rglob("*"), *(tmp_path / "pushed").rglob("*")]
    pushed = [file for file in pushed if file.is_file()]
    assert {"README.md", "config.json", "skeleton.json", "model.safetensors"} <= {file.name for file in pushed}
    private = [str(tmp_path), "secret", SECRET, str(Path.home()), "/tmp/", "host.example"]
    # In images and weights, short words may stand by chance.
    short = [f"/{getpass.getuser()}/", f"{getpass.getuser()}@", f"{socket.gethostname()}:", f"@{socket.gethostname()}"]
    for file in pushed:
        words = private if file.suffix in (".png", ".jpg", ".safetensors") else [*private, *short]
        assert [word for word in words if word.encode() in file.read_bytes()] == [], file


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("config.yaml", "a: [", "config.yaml"),
        ("config.yaml", "seed: x", "config.yaml"),
        ("config.yaml", "[1]", "config.yaml"),
        ("phase1/eval.json", "{", "eval.json: not JSON"),
        ("phase1/eval.json", '{"split": "val"}', "eval.json: not an evaluation"),
        ("phase1/weights/config.json", "[]", "config.json"),
        ("phase1/weights/config.json", '{"sapiens_accel": {"keypoints": [1]}}', "config.json"),
        ("labelled_ann_ids.json", '{"ann_ids": 3}', "labelled_ann_ids.json: ann_ids"),
        ("metrics.jsonl", '{"stage": "phase1", "step": "x"}\n', "metrics.jsonl: line 1"),
    ],
)
def test_a_broken_file_of_a_run_is_one_line(tmp_path: Path, file: str, content: str, named: str) -> None:
    folder = _run_folder(tmp_path / "run")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=named):
        _written(folder)


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    folder = _run_folder(tmp_path / "run")
    whole = _written(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "phase1", "st')
    assert _written(folder) == whole
