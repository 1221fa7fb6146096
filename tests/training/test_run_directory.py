"""A run directory holds one run, and its record says what that run is: decided and compared before anything is written.

Whole runs of train.main in this process, on a few drawn people.
"""

import errno
import importlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sapiens_accel.config import parse, record
from sapiens_accel.config.schema import STAGES
from sapiens_accel.errors import UserError
from sapiens_accel.runtime import files
from sapiens_accel.runtime.lock import LOCK, lock_directory
from sapiens_accel.training import run_folder

SMALL = [
    "--model.name=sapiens_tiny", "--data.input_hw=[64,48]", "--data.sigma=1", "--data.synthetic.num_train=8",
    "--data.synthetic.num_unlabelled=8", "--data.synthetic.num_val=2", "--data.num_workers=0", "--log_every=1",
    "--eval.num_pictures=0", "--eval.num_worst=0", "--save_every=2",
    *(f"--{stage}.{option}" for stage in STAGES for option in ("steps=8", "global_batch=4")),
]  # fmt: skip
LATEST = "--resume_from_checkpoint=latest"
Main = Callable[..., None]


@pytest.fixture(scope="module")
def main(train_here: Main) -> Main:
    return partial(train_here, SMALL)


@pytest.fixture(scope="module")
def phases(main: Main, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """phase1 finished, then phase2 added to it and cut after step 4 of 8."""
    folder = tmp_path_factory.mktemp("phases") / "run"
    main(folder, "--stage=phase1", "--max_steps=2")
    main(folder, "--stage=phase2", "--max_steps=4")
    return folder


@pytest.fixture
def run(phases: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phases, tmp_path / "run", symlinks=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(folder: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines if "loss" in line]


def test_a_stage_is_added_to_the_run(run: Path) -> None:
    assert lines_of(run) == [("phase1", 1), ("phase1", 2), *(("phase2", step) for step in (1, 2, 3, 4))]
    assert (run / "phase1" / "eval.json").is_file() and not run.with_name("run.1").exists()
    assert not (run / LOCK).exists()
    text = (run / "config.yaml").read_text()
    assert text.startswith("# python ") and f"torch {torch.__version__}" in text.splitlines()[0]
    assert parse.load([], base=run / "config.yaml").phase2.steps == 8, "comments are read over"


def test_a_stage_that_is_trained_again_moves_the_whole_run_aside(
    run: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    main(run, "--stage=phase2", "--max_steps=1", "--phase1.optim.lr=0.7")
    aside = run.with_name("run.1")
    assert contents(aside) == before, "all of it, byte for byte"
    assert f"is now {aside}; phase1 carried over" in capsys.readouterr().out
    assert lines_of(run) == [("phase1", 1), ("phase1", 2), ("phase2", 1)]
    assert contents(run / "phase1").keys() == {n.removeprefix("phase1/") for n in before
                                               if n.startswith("phase1/") and "checkpoints" not in n}  # fmt: skip
    assert [path.name for path in (run / "pictures").iterdir()].count("phase1_crops.jpg") == 1
    assert len(list((run / "tensorboard" / "phase2").iterdir())) == 1, "events of one run"
    assert (run / "phase1" / "weights" / "model.safetensors").stat().st_nlink == 2
    # phase1 is what it was trained with, not what this command would train it with.
    old, new = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (aside, run))
    assert new["phase1"] == old["phase1"] and new["max_steps"] == 1


def test_a_stage_that_begins_with_given_weights_leaves_the_record_of_the_others(
    run: Path, main: Main, tmp_path: Path
) -> None:
    """Neither resumed nor from earlier weights of the directory: config.yaml told of them what this command says."""
    shutil.copytree(run / "phase1" / "weights", tmp_path / "weights")
    begun = yaml.safe_load((run / "config.yaml").read_text())
    given = ["--stage=phase2", f"--weights={tmp_path / 'weights'}", "--max_steps=1"]
    main(run, *given, "--phase1.optim.lr=0.7")
    now = yaml.safe_load((run / "config.yaml").read_text())
    assert now["phase1"] == begun["phase1"] and now["weights"] == str(tmp_path / "weights")


def test_weights_of_two_commands_are_both_recorded(main: Main, run: Path, tmp_path: Path) -> None:
    """One key of config.yaml holds the last ones, a comment those before."""
    for name in "ab":
        shutil.copytree(run / "phase1" / "weights", tmp_path / name)
    main(tmp_path / "other", "--stage=phase1", f"--weights={tmp_path / 'a'}", "--max_steps=1")
    main(tmp_path / "other", "--stage=phase2", f"--weights={tmp_path / 'b'}", "--max_steps=1")
    text = (tmp_path / "other" / "config.yaml").read_text()
    assert yaml.safe_load(text)["weights"] == str(tmp_path / "b")
    assert f"# changed: phase2 from step 1 on: weights was {tmp_path / 'a'}, is {tmp_path / 'b'}\n" in text


def test_the_weights_that_a_run_began_with_stay_in_its_record(main: Main, run: Path, tmp_path: Path) -> None:
    """Their license is that of what the run hands over."""
    given = f"--weights={run / 'phase1' / 'weights'}"
    main(tmp_path / "other", "--stage=phase1", given, "--max_steps=1")
    main(tmp_path / "other", "--stage=phase2", "--max_steps=1")
    assert yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())["weights"] == given.partition("=")[2]


def test_a_directory_that_cannot_be_renamed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that a volume is mounted on."""
    (tmp_path / "run" / "phase1").mkdir(parents=True)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == tmp_path / "run":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot be renamed .*busy.*mount point.*--output_dir"):
        run_folder._move_run_aside(tmp_path / "run", ["phase1"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_cannot_be_carried_over_stays_where_it_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "link", refuse)
    with pytest.raises(OSError, match="No space left"):
        run_folder._move_run_aside(run, ["phase1"])
    assert contents(run) == before and not list(run.parent.glob("run.*"))


def test_every_stage_again_carries_nothing_over(run: Path, main: Main) -> None:
    main(run, "--stage=phase1", "--max_steps=1")
    assert lines_of(run) == [("phase1", 1)]
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["phase1", "pictures", "tensorboard"]
    main(run, "--stage=phase1", "--max_steps=1")
    assert lines_of(run.with_name("run.2")) == [("phase1", 1)]


def test_a_run_that_cannot_start_writes_nothing(run: Path, main: Main, tmp_path: Path) -> None:
    """What is wrong here is seen when the network is built; config.yaml was overwritten before that."""
    before = contents(run)
    (tmp_path / "weights.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        main(run, "--stage=phase2", f"--weights={tmp_path / 'weights.safetensors'}")
    assert contents(run) == before and not run.with_name("run.1").exists()


REFUSED = {
    "model": (["--model.name=sapiens2_tiny"], ["model.name was sapiens_tiny, is sapiens2_tiny"]),
    "crop": (["--data.input_hw=[96,64]"], ["data.input_hw was [64, 48], is [96, 64]"]),
    "frozen": (["--phase2.frozen=[embeddings]"], ["phase2.frozen was [], is [embeddings]"]),
    "teacher": (["--phase2.teacher.ratio=1"], ["phase2.teacher was null"]),
    "two": (["--phase2.frozen=[head]", "--model.name=sapiens2_tiny"], ["phase2.frozen", "model.name"]),
    "people": (["--data.synthetic.num_train=9"], ["data.json", "other people of train", "expected 8", "found 9",
                                                  "--data.allow_other"]),
    "other people, as many": (["--data.synthetic.seed=1"], ["other people of train", "expected 8", "found 8"]),
    "labels": (["--data.labels=4"], ["other people of train", "found 4"]),
    "validation": (["--data.synthetic.num_val=3"], ["other people of val"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resumed_is_one_line_and_nothing_is_written(run: Path, main: Main, case: str) -> None:
    words, named = REFUSED[case]
    before = contents(run)
    with pytest.raises(UserError) as raised:
        main(run, "--stage=phase2", LATEST, *words)
    assert [word for word in (*named, "phase2", "--output_dir") if word not in str(raised.value)] == []
    assert "\n" not in str(raised.value) and contents(run) == before


def test_what_is_applied_is_a_line_each_and_recorded(run: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--phase2.optim.betas=[0.5,0.6]", "--augment.flip_p=0.25", "--max_steps=5", "--data.synthetic.num_train=9"]
    main(run, "--stage=phase2", LATEST, "--data.allow_other", *words, "--phase1.optim.lr=0.9")
    said = [line for line in capsys.readouterr().out.splitlines() if ": applied" in line]
    expected = {
        "phase2.optim.betas was [0.9, 0.999], is [0.5, 0.6]", "augment.flip_p was 0.5, is 0.25",
        "max_steps was 4, is 5", "data.synthetic.num_train was 8, is 9",
    }  # fmt: skip
    assert {line.removeprefix(f"{run / 'config.yaml'}: ") for line in said if "config.yaml" in line} == {
        f"{one}: applied from step 5 of phase2 on" for one in expected
    }
    assert sum("other people of train" in line for line in said) == 1
    tree, text = yaml.safe_load((run / "config.yaml").read_text()), (run / "config.yaml").read_text()
    assert tree["phase2"]["optim"]["betas"] == [0.5, 0.6] and tree["phase1"]["optim"]["lr"] != 0.9
    assert all(f"# changed: phase2 from step 5 on: {one}\n" in text for one in expected)
    assert lines_of(run)[-1] == ("phase2", 5)
    # The next one compares with that, keeps its lines, and says nothing where nothing differs.
    main(run, "--stage=phase2", LATEST, *words)
    assert ": applied" not in capsys.readouterr().out
    assert (run / "config.yaml").read_text() == text, "nothing was trained"


def test_a_finished_run_says_that_nothing_is_trained(run: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    main(run, "--stage=phase2", LATEST, "--max_steps=4", "--phase2.optim.lr=0.9", "--seed=5")
    said = capsys.readouterr().out
    assert "nothing is trained: phase2 reached the last step" in said
    assert "phase2.optim.lr was 0.0025, is 0.9: not applied, phase2 is finished" in said
    assert "seed was 0, is 5: not applied, nothing is trained" in said
    assert contents(run) == before


def test_a_stage_says_at_its_end_what_it_did_not_do(run: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """Worse than the initial weights (by the same protocol); nothing learned from unlabeled people."""
    file = run / "phase1" / "eval.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"AP": 0.9}))
    main(run, "--stage=phase2", "--max_steps=1")
    assert "phase2: warning: AP 0.0, and 90.0 for the initial weights" in capsys.readouterr().out
    main(run, "--stage=phase2", "--max_steps=1", "--eval.flip=false")
    assert "initial weights" not in capsys.readouterr().out, "another protocol gives other numbers"
    main(run, "--stage=ssl", "--max_steps=2", "--ssl.teacher.threshold=1", "--ssl.teacher.confidence=raw")
    said = capsys.readouterr().out
    assert "ssl: warning: keep was 0.00 in the whole stage" in said and "initial weights" not in said
    assert "limit_open" not in said
    main(run, "--stage=ssl", "--max_steps=2", "--ssl.teacher.learned=1e6", "--ssl.teacher.threshold=-1")
    said = capsys.readouterr().out
    assert (
        "ssl: warning: next to nothing was learned from unlabeled people, since the labels have more to teach" in said
    )
    assert "limit_open 0.01). Train longer before this stage, or set --ssl.teacher.learned 1" in said


FEW = ("--stage=ssl", "--weights=random", "--ssl.teacher.threshold=-1")
BY_DEFAULT = "--ssl.teacher.learned=null"  # the demo's recipe says 1


def lines_of_ssl(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "keep" in line]


@pytest.mark.parametrize(
    ("options", "are_few"),
    [
        ((BY_DEFAULT, "--data.synthetic.num_unlabelled=39"), True),
        ((BY_DEFAULT, "--data.synthetic.num_unlabelled=40"), False),
        ((BY_DEFAULT, "--ssl.teacher.ratio=0"), False),
        ((BY_DEFAULT, "--ssl.teacher.weight=0"), False),
        (("--ssl.teacher.learned=1.5",), False),
    ],
)
def test_few_unlabeled_people_count_once_the_labels_are_learned(
    tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str], options: Sequence[str], are_few: bool
) -> None:
    """Fewer than 5 for each of the 8 labeled ones, said as the stage begins, and not where an option asks for it."""
    main(tmp_path / "run", *FEW, "--max_steps=1", *options)
    said = capsys.readouterr().out
    note = (
        "ssl: 39 unlabeled people for 8 labeled ones are few: they count once the labels are learned "
        "(--ssl.teacher.learned 1.5; 1: from the first step on)\n"
    )
    assert note in said if are_few else "ones are few" not in said
    measured = are_few or "--ssl.teacher.learned=1.5" in options
    assert all(("limit_open" in line) == measured for line in lines_of_ssl(tmp_path / "run"))


def test_a_resumed_stage_keeps_what_followed_from_its_people(
    tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """More unlabeled people do not change what a step learns. An option does, from there on, and the record says it."""
    run, many = tmp_path / "run", ("--data.synthetic.num_unlabelled=60", "--data.allow_other")
    main(run, *FEW, BY_DEFAULT, "--max_steps=2")
    capsys.readouterr()
    main(run, *FEW, BY_DEFAULT, LATEST, "--max_steps=3", *many)
    said = capsys.readouterr().out
    assert "learned was" not in said and "ones are few" not in said
    assert ["limit_open" in line for line in lines_of_ssl(run)] == [True] * 3
    main(run, *FEW, "--ssl.teacher.learned=1", LATEST, "--max_steps=4", *many)
    assert "ssl.teacher.learned was null, is 1.0: applied from step 4 of ssl on" in capsys.readouterr().out
    main(run, *FEW, BY_DEFAULT, LATEST, "--max_steps=5", "--data.allow_other")
    assert "ssl.teacher.learned was 1.0, is null: applied from step 5 of ssl on" in capsys.readouterr().out
    assert ["limit_open" in line for line in lines_of_ssl(run)] == [True, True, True, False, True]


def test_the_end_of_a_stage_counts_steps_before_another_limit_as_whole_ones(
    tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main(run, *FEW, "--max_steps=3")
    main(run, *FEW, "--ssl.teacher.learned=1e6", LATEST, "--max_steps=4")
    said = capsys.readouterr().out
    (opened,) = [line["limit_open"] for line in lines_of_ssl(run) if "limit_open" in line]
    assert f"the limit of the gradient of unlabeled people was {100 * (3 + opened) / 4:.0f} % open" in said
    assert "next to nothing was learned" not in said


def test_by_default_a_run_is_saved_at_the_end_of_its_first_epoch(run: Path, main: Main) -> None:
    """8 people in batches of 4. Later ones are saved if saving costs little against the time that they take."""
    main(run, "--stage=ssl", "--max_steps=3", "--save_every=null", "--keep_checkpoints=9")
    assert (run / "ssl" / "checkpoints" / "step_2").is_dir()


def test_another_model_does_not_start_from_earlier_weights_of_the_directory(run: Path, main: Main) -> None:
    before = contents(run)
    with pytest.raises(UserError, match=r"ssl starts from its weights.*model\.name was sapiens_tiny"):
        main(run, "--stage=ssl", "--model.name=sapiens2_tiny")
    assert contents(run) == before


def test_a_dry_run_compares_and_writes_nothing(run: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    main(run, "--stage=phase2", LATEST, "--dry_run", "--seed=5")
    assert "seed was 0, is 5: applied" in capsys.readouterr().out
    assert contents(run) == before


def test_a_checkpoint_of_another_run_is_compared_with_its_own_record(run: Path, main: Main, tmp_path: Path) -> None:
    asked = f"--resume_from_checkpoint={run / 'phase2' / 'checkpoints' / 'step_2'}"
    with pytest.raises(UserError, match=rf"{run}/config\.yaml: step 2 of phase2"):
        main(tmp_path / "other", "--stage=phase2", asked, "--phase2.frozen=[head]")
    assert not (tmp_path / "other").exists()
    main(tmp_path / "other", "--stage=phase2", asked, "--max_steps=3")
    assert lines_of(tmp_path / "other") == [("phase2", 3)]
    (run / "config.yaml").unlink()  # with nothing to compare with, the state itself says so
    with pytest.raises(UserError, match=r"step_2: the state of another network or optimizer"):
        main(tmp_path / "third", "--stage=phase2", asked, "--phase2.frozen=[head]")
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_stages_after_the_one_that_is_resumed_are_set_aside_with_all_of_theirs(run: Path, main: Main) -> None:
    main(run, "--stage=ssl", "--max_steps=1")
    main(run, "--stage=all", LATEST, "--max_steps=3")
    # phase1 goes on from step 2 to 3; what phase2 and ssl made of the weights of step 2 is no part of this run.
    assert lines_of(run) == [("phase1", 1), ("phase1", 2), ("phase1", 3),
                             *((stage, step) for stage in ("phase2", "ssl") for step in (1, 2, 3))]  # fmt: skip
    assert lines_of(run / "phase2.1") == [("phase2", step) for step in (1, 2, 3, 4)]
    assert (run / "phase2.1" / "weights" / "model.safetensors").is_file()
    assert (run / "phase2.1" / "pictures" / "phase2_crops.jpg").is_file()
    assert lines_of(run / "ssl.1") == [("ssl", 1)]
    assert all(len(list((run / "tensorboard" / stage).iterdir())) == 1 for stage in ("phase2", "ssl"))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("data", "holds the data (expected a folder for a run alone, found {root}/data)"),
        (".", "holds the data"),
        ("data/train2017", "holds the data"),
        ("runs", "holds another run (expected a folder for a run alone, found {root}/runs/first)"),
        ("runs/first/phase2", "holds stage phase2 of the run {root}/runs/first"),
        ("s3://key:secret@bucket/run", "--output_dir s3://bucket/run: a URL (expected a folder of this machine"),
        (str(Path(__file__).parents[2]), "holds this package"),
        ("~", "holds the home directory"),
        ("data/run", None),
        ("runs/second", None),
        ("runs/first", None),
        ("runs/first/second", None),
    ],
)
def test_a_directory_that_is_not_a_run_s_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str | None
) -> None:
    """A later run renames all of it: the images were gone in the middle of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train2017").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "phase2").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").touch()
    options = parse.load([f"--output_dir={output}", "--data.root=data"])
    if said is None:
        return run_folder.check_place(options)
    with pytest.raises(UserError) as raised:
        run_folder.check_place(options)
    assert said.format(root=tmp_path) in str(raised.value) and "secret" not in str(raised.value)


def test_the_home_directory_may_be_abbreviated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No shell replaces the ~ of --output_dir=~/run: a folder of that name was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse.load(["--output_dir=~/run"]).output_dir == f"{tmp_path}/run"


def test_a_second_run_in_the_directory_is_refused_before_anything_is_read(run: Path, main: Main) -> None:
    before = contents(run)
    with lock_directory(run), pytest.raises(UserError, match=r"another run is writing in it"):
        main(run, "--stage=ssl", "--data.root=/no/such/folder")
    assert contents(run) == before


@pytest.mark.parametrize("text", ["{", "[1]", "a: b: c", "\x00"])
def test_a_record_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        record.read_record(tmp_path / "config.yaml")


def test_a_record_without_the_option_of_bf16_weights_had_those_of_fp32(tmp_path: Path) -> None:
    """An earlier version wrote it: the moments and weights of its checkpoint are not rounded without a word."""
    tree = parse.as_tree(parse.load(["--memory.adam_8bit"]))
    del tree["memory"]["bf16_weights"]
    asked = parse.load(["--memory.adam_8bit", "--memory.bf16_weights"])
    context = record.Continuation(file=tmp_path / "config.yaml", trained=["phase2"], resumed="phase2", step=2)
    with pytest.raises(UserError, match=r"memory\.bf16_weights was False, is True"):
        record.check_differences(record.find_differences(tree, asked), context)


@pytest.mark.parametrize(("option", "was", "new"), [("labeled_end", 0.0, 0.2), ("learned", 1.0, 1.5)])
def test_a_record_without_an_option_of_the_teacher_had_what_it_did_before(
    option: str, was: float, new: float, tmp_path: Path
) -> None:
    """An earlier version wrote it: that its stage now goes on otherwise is said."""
    asked = parse.load([f"--ssl.teacher.{option}={new}"])
    tree = parse.as_tree(parse.load([]))
    del tree["ssl"]["teacher"][option]
    context = record.Continuation(file=tmp_path / "config.yaml", trained=["ssl"], begun=["ssl"], resumed="ssl", step=2)
    (line,) = record.check_differences(record.find_differences(tree, asked), context)
    assert f"ssl.teacher.{option} was {was}, is {new}: applied from step 3 of ssl on" in line


def test_images_of_earlier_programs_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    program = importlib.import_module("sapiens_accel.train")
    files = [tmp_path / "pictures" / f"{name}.jpg" for name in ("phase2_predictions", "phase1_val_worst", "ssl_crops")]
    files[0].parent.mkdir()
    for number, file in enumerate(files[:2]):
        file.write_text("earlier")
        os.utime(file, ns=(number, number))
    before = program.list_images(tmp_path)
    for file in files[1:]:
        file.write_text("now")
    written = program.list_images(tmp_path).items() - before.items()
    assert sorted(path for path, _ in written) == sorted(map(str, files[1:]))
