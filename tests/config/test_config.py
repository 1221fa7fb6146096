import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sapiens_accel.config import parse as config
from sapiens_accel.config.commands import evaluation_options
from sapiens_accel.config.options import options
from sapiens_accel.config.parse import load, save
from sapiens_accel.config.schema import STAGES, Config
from sapiens_accel.errors import UserError

ROOT = Path(config.__file__).parents[2]
COCO_RECIPES = [
    *(f"sapiens_{size}_coco" for size in ("0.3b", "0.6b", "1b", "2b")),
    *(f"sapiens2_{size}_coco" for size in ("0.1b", "0.4b", "0.8b", "1b", "5b")),
]
LORA_RECIPES = [f"{size}_coco_lora" for size in ("sapiens_1b", "sapiens_2b", "sapiens2_5b")]
OFFICIAL_RECIPES = [f"sapiens_{size}_coco_official" for size in ("0.3b", "0.6b", "1b", "2b")]
MIXED = "sapiens_0.3b_coco_mpii_crowdpose_aic"
# Sapiens v1: one decay for all sizes. Sapiens2: one for each; the 0.1B has no published one.
LAYER_DECAY = {"sapiens2_0.4b": 0.80, "sapiens2_0.8b": 0.85, "sapiens2_1b": 0.90, "sapiens2_5b": 0.94}


# ---- Recipes


def test_there_is_a_recipe_for_every_network(recipes: dict[str, Config]) -> None:
    assert set(recipes) == {"demo", *COCO_RECIPES, *LORA_RECIPES, *OFFICIAL_RECIPES, MIXED}
    for name, run in recipes.items():
        assert run.recipe == name and run.output_dir == f"runs/{name}"
        if name != "demo":
            assert run.model.name == name.split("_coco")[0]


@pytest.mark.parametrize("name", COCO_RECIPES)
def test_coco_recipes_hold_the_specification(recipes: dict[str, Config], name: str) -> None:
    run = recipes[name]
    assert (run.data.input_hw, run.data.sigma, run.data.occluded_weight) == ((512, 384), 3, 0.5)
    assert (run.augment.half_body_p, run.augment.coarse_dropout_p) == (0.3, 0.5)
    assert (run.phase1.epochs, run.phase2.epochs, run.ssl.epochs) == (10, 100, 50)
    assert (run.phase1.optim.lr, run.phase2.optim.lr) == (5e-4, 5e-4)
    assert run.phase1.frozen == ("embeddings", "block_*", "norm")
    assert run.phase2.frozen == run.ssl.frozen == ()
    assert run.phase1.teacher is None and run.phase2.teacher is None and run.ssl.teacher is not None
    for stage in STAGES:
        plan = run.get_stage(stage)
        assert (plan.global_batch, plan.steps, plan.loss_weight) == (32, None, 1.0)
        assert (plan.optim.weight_decay, plan.optim.betas) == (0.05, (0.9, 0.999))
        assert (plan.optim.clip_norm, plan.optim.warmup_steps) == (1.0, 500)
    for plan in (run.phase2, run.ssl):
        decay = LAYER_DECAY.get(run.model.name, 0.80 if run.model.name == "sapiens2_0.1b" else 0.85)
        assert plan.optim.layer_decay == decay


@pytest.mark.parametrize("name", LORA_RECIPES)
def test_recipes_of_adapters_differ_from_the_coco_recipes_in_what_they_say(
    recipes: dict[str, Config], name: str
) -> None:
    run, coco = recipes[name], recipes[name.removesuffix("_lora")]
    assert (run.lora.rank, run.lora.scale, run.lora.target, run.lora.dora) == (16, 2.0, "all", False)
    assert (run.phase2.epochs, run.ssl.epochs) == (20, 10)
    replace = dataclasses.replace
    for stage in ("phase2", "ssl"):
        plan, theirs = run.get_stage(stage), coco.get_stage(stage)
        assert (plan.optim.layer_decay, plan.optim.weight_decay) == (1.0, 0.0)
        optim = replace(plan.optim, layer_decay=theirs.optim.layer_decay, weight_decay=theirs.optim.weight_decay)
        run = replace(run, **{stage: replace(plan, epochs=theirs.epochs, optim=optim)})
    # The head is at the full rate in phase1, whatever the decay by layer.
    phase1 = replace(run.phase1, optim=replace(run.phase1.optim, layer_decay=coco.phase1.optim.layer_decay))
    assert run.memory.max_micro_batch == (None if name == "sapiens2_5b_coco_lora" else 16)
    same = {"recipe": coco.recipe, "output_dir": coco.output_dir, "lora": coco.lora, "phase1": phase1}
    same["memory"] = replace(run.memory, max_micro_batch=None)
    assert replace(run, **same) == coco


@pytest.mark.parametrize("name", [*OFFICIAL_RECIPES, MIXED])
def test_official_recipes_are_the_published_ones(recipes: dict[str, Config], name: str) -> None:
    run, plan = recipes[name], recipes[name].phase2
    assert (run.data.input_hw, run.data.sigma, run.data.occluded_weight) == ((1024, 768), 6, 1.0)
    assert (run.augment.half_body_p, run.augment.coarse_dropout_p) == (0.3, 1.0)
    assert (run.augment.shift_of, run.data.clip_boxes, run.data.reduced_decode) == ("box", True, False)
    assert run.data.outside_keypoints == "near"
    assert (plan.epochs, plan.global_batch, plan.frozen, plan.teacher) == (210, 32, (), None)
    assert (plan.optim.lr, plan.optim.weight_decay, plan.optim.layer_decay) == (5e-4, 0.1, 0.85)
    assert (plan.optim.betas, plan.optim.clip_norm, plan.optim.warmup_steps) == ((0.9, 0.999), 1.0, 500)
    assert plan.optim.schedule == "multistep"
    assert plan.optim.milestones == pytest.approx((170 / 210, 200 / 210), abs=1e-8)


def test_official_recipes_name_the_same_exceptions_and_what_the_published_number_is_of() -> None:
    texts = {name: (ROOT / f"sapiens_accel/recipes/{name}.yaml").read_text() for name in OFFICIAL_RECIPES}
    assert len({text[text.index("# Not as published") : text.index("stage:")] for text in texts.values()}) == 1
    for name, text in texts.items():
        size, (number,) = name.split("_")[1], re.findall(r"COCO val2017, (8\d\.\d|79\.6), is of a checkpoint", text)
        assert number == {"0.3b": "79.6", "0.6b": "81.2", "1b": "82.1", "2b": "82.2"}[size]
        assert "names coco_mpii_crowdpose_aic" in text and "above 25 times" in text
        assert size == "0.3b" or f"with --model.name sapiens_{size}." in text


# ---- What is said where


def test_the_command_line_is_stronger_than_the_recipe_and_the_recipe_than_the_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {sigma: 2, num_workers: 0}\nphase2: {optim: {lr: 1.0e-3}}\n")
    run = load(["--recipe", str(recipe), "--data.num_workers", "7", "--phase2.optim.betas=[0.8,0.9]", "--seed=3"])
    assert (run.data.sigma, run.data.num_workers, run.data.input_hw) == (2.0, 7, (512, 384))
    assert (run.phase2.optim.lr, run.phase2.optim.betas, run.phase2.optim.clip_norm) == (1e-3, (0.8, 0.9), 1.0)
    assert run.phase1.optim.lr == 5e-4, "another stage has an optimizer of its own"
    assert (run.seed, run.output_dir) == (3, "runs/mine")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dry_run"], True),
        (["--dry_run", "--seed", "1"], True),
        (["--seed", "1", "--dry_run"], True),
        (["--dry_run=true"], True),
        (["--dry_run", "false"], False),
        (["--dry_run=false"], False),
        ([], False),
    ],
)
def test_dry_run_is_a_switch(words: list[str], expected: bool) -> None:
    assert load(words).dry_run is expected


def test_both_spellings_of_an_option_are_the_same() -> None:
    words = {"--phase2.optim.lr": "1e-5", "--data.input_hw": "[256,192]", "--recipe": "sapiens_0.3b_coco"}
    apart = load([part for pair in words.items() for part in pair])
    assert apart == load([f"{key}={value}" for key, value in words.items()])
    assert (apart.phase2.optim.lr, apart.data.input_hw, apart.model.name) == (1e-5, (256, 192), "sapiens_0.3b")


def test_stages() -> None:
    assert load([]).stages == STAGES
    assert load(["--stage", "ssl"]).stages == ("ssl",)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--resume"], "latest"),
        (["--resume", "--seed", "1"], "latest"),
        (["--resume", "a/b"], "a/b"),
        (["--resume=c"], "c"),
    ],
)
def test_resume_is_a_short_name(words: list[str], value: str) -> None:
    assert load(words).resume_from_checkpoint == value


def test_another_name_of_an_option_of_a_stage_is_that_stage_s() -> None:
    assert _error(["--stage", "ssl", "--lr", "1"]) == "no such option --lr; did you mean --ssl.optim.lr?"


def test_lists_are_words_or_in_brackets() -> None:
    words = [
        "--data.input_hw",
        "64",
        "48",
        "--phase1.frozen",
        "block_*",
        "--phase2.optim.milestones",
        "[0.5]",
        "--seed",
        "3",
    ]
    run = load(words)
    assert (run.data.input_hw, run.phase1.frozen, run.phase2.optim.milestones) == ((64, 48), ("block_*",), (0.5,))
    assert run == load(
        ["--data.input_hw=[64,48]", '--phase1.frozen=["block_*"]', "--phase2.optim.milestones=[0.5]", "--seed=3"]
    )


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_the_short_help_fits_a_screen(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(["--help"], prog=program)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 32 and max(map(len, lines)) <= 120
    keys = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    known = {*options(), *(evaluation_options() if program == "eval.py" else ()), "launch", "print_config"}
    assert 18 <= len(keys) <= 25 and set(keys) <= known
    assert "help all" in lines[-1]


# ---- Save and load


@pytest.mark.parametrize("name", ["demo", "sapiens_1b_coco_official", "sapiens2_5b_coco"])
def test_save_then_load_gives_an_equal_config(recipes: dict[str, Config], name: str, tmp_path: Path) -> None:
    save(recipes[name], tmp_path / "run" / "config.yaml")
    assert load([], base=tmp_path / "run" / "config.yaml") == recipes[name]


def test_save_then_load_keeps_overrides_and_takes_new_ones(tmp_path: Path) -> None:
    words = [
        "--recipe=sapiens2_0.4b_coco", "--phase1.frozen=[embeddings,block_0]", "--phase2.optim.milestones=[0.5]",
        "--ssl.teacher.ema_decay=0.999", "--output_dir", "some/where", "--memory.micro_batch=2", "--data.root=null",
        "--phase2.optim.lr=3.3333333333333335e-05", "--save_every=7", "--stage=phase2", "--data.input_hw=[64,48]",
    ]  # fmt: skip
    run = load(words)
    assert run.phase1.frozen == ("embeddings", "block_0") and run.phase2.optim.milestones == (0.5,)
    assert run.ssl.teacher is not None and run.ssl.teacher.ema_decay == 0.999
    save(run, tmp_path / "config.yaml")
    assert load([], base=tmp_path / "config.yaml") == run
    again = load(["--eval.flip=false", "--stage", "ssl"], base=tmp_path / "config.yaml")
    assert again == dataclasses.replace(run, stage="ssl", eval=dataclasses.replace(run.eval, flip=False))


def test_print_config_prints_what_a_run_would_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe=sapiens_1b_coco", "--phase2.optim.lr=1e-5", "--dry_run"]
    with pytest.raises(SystemExit) as done:
        load([*words, "--print_config"])
    assert done.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load([], base=tmp_path / "printed.yaml") == load(words)


@pytest.mark.parametrize(("said", "meant"), [("30", 30), ("5%", "5%"), ("2.5%", "2.5%"), ("null", None)])
def test_labels_are_a_count_or_a_share_wherever_they_are_said(
    tmp_path: Path, said: str, meant: int | str | None
) -> None:
    (tmp_path / "mine.yaml").write_text(f"data: {{labels: {said}}}")
    runs = [
        load(["--recipe", str(tmp_path / "mine.yaml")]),
        load(["--data.labels", said]),
        load([f"--data.labels={said}"]),
    ]
    assert [run.data.labels for run in runs] == [meant] * 3
    assert [type(run.data.labels) for run in runs] == [type(meant)] * 3
    save(runs[1], tmp_path / "config.yaml")
    assert load([], base=tmp_path / "config.yaml") == runs[1]


# ---- Mistakes


def _error(words: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load(words)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--phase2.optim.lrr=1", "--phase2.optim.lr"),
        ("--data.imput_hw=[64,48]", "--data.input_hw"),
        ("--dryrun", "--dry_run"),
        ("--phase2.layer_decay=0.9", "--phase2.optim.layer_decay"),
        ("--lr=1", "--phase2.optim.lr"),
        (
            "--batch_size=8",
            "--phase2.global_batch (people in a step) or --memory.micro_batch (people on a GPU at a time)",
        ),
        ("--epochs=8", "--phase2.epochs"),
        ("--ssl.teacher.treshold=0.5", "--ssl.teacher.threshold"),
    ],
)
def test_a_misspelled_option_names_the_nearest(word: str, nearest: str) -> None:
    assert _error([word]) == f"no such option {word.split('=')[0]}; did you mean {nearest}?"


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("phase2: {optim: {lrr: 1}}", "phase2.optim.lrr", "phase2.optim.lr"),
        ("dta: {sigma: 1}", "dta", "data"),
        ("ssl: {teacher: {rampp: 0.1}}", "ssl.teacher.rampp", "ssl.teacher.ramp"),
        ("sigma: 2", "sigma", "data.sigma"),
    ],
)
def test_a_misspelled_key_in_a_file_names_the_nearest(tmp_path: Path, text: str, wrong: str, nearest: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    said = _error(["--recipe", str(path)])
    assert f"{path}: no such key {wrong!r}; did you mean {nearest}?" == said


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("--phase2.optim.lr=fast", "phase2.optim.lr"),
        ("--data.input_hw=[512]", "data.input_hw"),
        ("--phase1.epochs=many", "phase1.epochs"),
        ("--stage=phase3", "stage"),
        ("--eval.flip=perhaps", "eval.flip"),
        ("--max_steps=1.5", "max_steps"),
    ],
)
def test_a_value_of_another_type_names_its_key(word: str, key: str) -> None:
    assert key in _error([word])


def test_a_value_of_another_type_in_a_file_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("phase2: {optim: {lr: fast}}")
    assert "lr" in _error(["--recipe", str(path)])


def test_a_file_that_is_not_a_tree_of_keys_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text in ("- 1\n- 2\n", "a: [1", "just words"):
        path.write_text(text)
        assert str(path) in _error(["--recipe", str(path)])
    assert str(tmp_path / "none.yaml") in _error(["--recipe", str(tmp_path / "none.yaml")])


def test_an_unknown_recipe_names_the_nearest_and_all(recipes: dict[str, Config]) -> None:
    text = _error(["--recipe", "sapiens_1b_cocoo"])
    assert text.endswith("); did you mean sapiens_1b_coco?")
    assert all(name in text for name in recipes)
    assert "did you mean" not in _error(["--recipe", "xyz"])


def test_a_stage_that_does_not_exist_lists_those_that_do() -> None:
    expected = f"--stage: no such value (expected one of {', '.join(STAGES)}, all, found "
    assert _error(["--stage", "phase3"]) in (f"{expected}phase3); did you mean phase{n}?" for n in (1, 2))
    assert _error(["--stage", "fine"]) == f"{expected}fine)"


# ---- Who owns which knob


def _keys(tree: Any) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield key
            yield from _keys(value)


def test_recipes_own_no_topology_and_no_precision() -> None:
    """Of the recipe files, and of every key that a recipe could have."""
    trees = [yaml.safe_load(path.read_text()) for path in (ROOT / "sapiens_accel" / "recipes").glob("*.yaml")]
    assert len(trees) > 10
    foreign = ("zero", "offload", "process", "deepspeed", "precision", "bf16", "fp16", "gpu", "rank", "bucket")
    # The one option of memory that suits any number of processes.
    assert {key for tree in trees for key in tree.get("memory", {})} == {"max_micro_batch"}
    # What train.py does with any launch, so that a recipe does not say it; the rank of adapters.
    own = {"offload_activations", "bf16_weights", "rank"}
    for key in {key for tree in [*trees, dataclasses.asdict(Config())] for key in _keys(tree)} - own:
        assert not any(word in key.lower() for word in foreign), key


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_ds_configs_own_only_memory(path: Path) -> None:
    tree = json.loads(path.read_text())
    for key in _keys(tree):
        taken = ("scheduler", "batch", "accumulation", "clipping", "lr", "weight_decay")
        assert key != "optimizer" and not any(word in key for word in taken), key
    zero = tree["zero_optimization"]
    assert zero["stage"] == int(path.stem.removeprefix("zero")[0])
    assert ("offload_optimizer" in zero) == path.stem.endswith("_offload")
    assert ("offload_param" in zero) == (path.stem == "zero3_offload")
    buckets = {key: value for key, value in zero.items() if key.endswith("bucket_size")}
    # "auto" would ask the model for hidden_size, which it does not have.
    assert "reduce_bucket_size" in buckets and all(type(value) is int and value > 0 for value in buckets.values())


TOPOLOGY = {
    "compute_environment", "distributed_type", "num_machines", "num_processes", "mixed_precision", "use_cpu",
    "machine_rank", "main_process_ip", "main_process_port", "rdzv_backend", "deepspeed_config",
    "deepspeed_multinode_launcher", "deepspeed_config_file", "zero3_init_flag",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_own_only_topology_and_precision(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    assert set(_keys(tree)) <= TOPOLOGY
    assert {"num_machines", "num_processes", "mixed_precision", "distributed_type"} <= set(tree)
    engine = tree.get("deepspeed_config")
    assert (engine is not None) == (tree["distributed_type"] == "DEEPSPEED")
    if engine:
        # zero.Init would split the weights before they are read from a file.
        assert engine["zero3_init_flag"] is False
        assert (ROOT / engine["deepspeed_config_file"]).is_file()
        if path.stem.startswith("zero"):
            assert Path(engine["deepspeed_config_file"]).stem == path.stem.removesuffix("_fp16")


def test_every_ds_config_is_used() -> None:
    used = {
        yaml.safe_load(path.read_text()).get("deepspeed_config", {}).get("deepspeed_config_file")
        for path in (ROOT / "accelerate_configs").glob("*.yaml")
    }
    assert {f"ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")} == used - {None}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--ssl.teacher.max_grad_ratio=null"],
            "not with max_grad_ratio null, which is no limit. Leave one of them out",
        ),
        (
            ["--ssl.teacher.loss=literal"],
            "not with loss literal, whose errors have another unit. Leave one of them out",
        ),
    ],
)
def test_a_part_of_a_limit_that_there_is_not_is_refused(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        config.load([*words, "--ssl.teacher.learned=1.5"])
    assert str(error.value) == f"--ssl.teacher.learned 1.5: {expected}"
    assert config.load(words).ssl.teacher
