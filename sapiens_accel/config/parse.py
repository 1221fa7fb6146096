"""The typed tree of every knob that changes the maths: defaults <- recipe (YAML) <- command line.

The defaults are the specification (512x384, sigma 3, global batch 32, ...); a recipe in `recipes/` says only what
differs. Processes, precision and ZeRO are owned by `accelerate_configs/` and `ds_configs/` and never appear here.
"""

import dataclasses
import difflib
import glob
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

StageName = Literal["phase1", "phase2", "ssl"]
STAGES: tuple[StageName, ...] = ("phase1", "phase2", "ssl")
# benchmarks/results/ssl_cpu_2026-11-23_weight_1.json: means of 3 seeds.
LITERAL_WARNING = (
    "softmaxes of raw heatmaps with the teacher's alone sharpened; measured on drawn people, 30 labels: AP 4.9 where "
    "supervised training gives 16.1 and kl 28.8, with peaks of 7.9 where targets end at 1"
)
Place = Literal["device", "sharded", "host"]

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class UserError(Exception):
    """Something the user can mend. Its text is one line: the culprit, what was expected, what to do."""


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop and did, with everything saved. Its text says where."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    num_train: int = 600
    """Labelled people to draw for training."""
    num_unlabelled: int = 600
    """People to draw without labels."""
    num_val: int = 160
    """Labelled people to draw for validation."""
    seed: int = 0
    """Seed of the drawing."""


@dataclass(frozen=True, kw_only=True)
class MoreData:
    """A further labelled data set to train on; its keypoints become the run's by name."""

    train_annotations: str = "annotations/person_keypoints_train2017.json"
    """COCO keypoint JSON, relative to its root."""
    train_images: str = "train2017"
    """Folder of its pictures, relative to its root."""
    root: str | None = None
    """Its folder, in COCO's form, or shards as data.root takes them, whose `train` is taken. Default: data.root."""
    columns: dict[str, str] = field(default_factory=dict)
    """As data.columns."""
    category: str | None = None
    """As data.category."""
    weight: float | None = None
    """As data.weight."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    root: str | None = None
    """Folder in COCO's form; folder of parquet, Arrow or WebDataset tar shards; or a data set of the Hub,
    hf://ORG/NAME[@REVISION]. Without one, the built-in synthetic people are drawn."""
    columns: dict[str, str] = field(default_factory=dict)
    """What columns of shards are called where the names are neither ours nor common ones: {people: objs, bbox: xywh}.
    Ours: image, image_id, file_name, width, height; people; of a person id, category_id, iscrowd, area, bbox,
    keypoints."""
    streaming: bool = False
    """Training pictures are read from their shards (parquet; here, on the Hub, or at an address that fsspec knows) as
    they are needed: no copy of them is made, and people are shuffled within windows. Needs shards."""
    stream_parts: int = 8
    """streaming: parts of the global batch, each with pictures of its own. Every process then reads only its own
    pictures if this is a multiple of processes x accumulation. The order of an epoch depends on it."""
    stream_window: int = 2
    """streaming: row groups whose people are shuffled among each other."""
    train_annotations: str = "annotations/person_keypoints_train2017.json"
    """COCO keypoint JSON of the training people, relative to the root."""
    train_images: str = "train2017"
    """Folder of its pictures, relative to the root."""
    val_annotations: str = "annotations/person_keypoints_val2017.json"
    """COCO keypoint JSON of the validation people, relative to the root."""
    val_images: str = "val2017"
    """Folder of its pictures, relative to the root."""
    category: str | None = None
    """Name of the category to learn, in a JSON of several with keypoints. Default: the only one that has some, person,
    or all of them where they have the same keypoints."""
    skeleton: str | None = None
    """What the keypoints are: coco17, wholebody133, sapiens308, or a YAML with any of names, mirror, sigmas, upper and
    edges, relative to here or to data.root. Default: what the category of the JSON says, and its names imply. eval.py
    takes what is kept beside the weights."""
    more: tuple[MoreData, ...] = ()
    """Further labelled data sets to train on: [{root: DIR, train_annotations: FILE, train_images: DIR}, ...]. What one
    of them does not label has weight 0 there; people to validate on are those of the first."""
    weight: float | None = None
    """With data.more: how large a part of every epoch is of the first set, against the weights of the others. Give all
    of them or none. Default: as many people as each set has."""
    labels: int | str | None = None
    """Training people that keep their keypoints, in every stage: a count (1000) or a share (5%). The keypoints of the
    others are withheld, and in stage ssl they are unlabelled people. Default: all."""
    labels_by: Literal["first", "random"] = "first"
    """Which people: the first, picture by picture in the order of the JSON's images (published: Xie et al.,
    https://arxiv.org/abs/2011.12498), or at random."""
    labels_seed: int = 0
    """Seed of labels_by random."""
    unlabelled_images: str = "unlabeled2017"
    """Folder of pictures without labels, relative to the root, for stage ssl."""
    unlabelled_annotations: str | None = None
    """COCO JSON with the boxes of the people in them, or a detector's results (a list of image_id, bbox, score).
    Default: annotations/person_boxes_<folder>.json where there is one, else each whole picture counts as one person."""
    unlabelled_min_score: float = 0.5
    """Detections with a score below this are left out."""
    unlabelled_train_people: bool = True
    """Whether the training people that have a box but no keypoints join the unlabelled ones (112,000 in COCO)."""
    unlabelled_min_side: float = 64.0
    """Unlabelled boxes whose shorter side is below this (image px) are left out: nothing can be learnt from them."""
    input_hw: tuple[int, int] = (512, 384)
    """Height and width of the crop that the network sees, in pixels."""
    sigma: float = 3.0
    """Width of the target Gaussian in heatmap pixels. An integer keeps the published patch exactly."""
    box_padding: float = 1.25
    """A person's box is enlarged by this factor before it is cropped."""
    occluded_weight: float = 0.5
    """Target weight of a labelled but occluded keypoint (v=1). Published: 1.0. Unlabelled is 0 and visible is 1."""
    num_workers: int = 4
    """Decoding processes for each rank; the batches are the same bytes for any number."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What to do about a picture that does not decode: stop and name it, or name it and leave its people out."""
    check_images: Literal["auto", "ends", "decode"] = "auto"
    """How pictures are checked before training: first and last bytes (milliseconds for thousands), or a full decode.
    auto decodes sets of up to 5,000 pictures, and of shards, or of over a million people, those of 5,000 people."""
    reduced_decode: bool = True
    """Decode a JPEG to a half, a quarter or an eighth of its size where a training crop shows no more of it anyway: it
    takes less time and aliases less. Evaluation decodes everything whole."""
    cache_dir: str | None = None
    """Where drawn people and Arrow tables are kept. Default: $SAPIENS_ACCEL_CACHE or ~/.cache/sapiens_accel."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Sapiens' training augmentation: facebookresearch/sapiens pose/mmpose/datasets/transforms (recipe of COCO)."""

    flip_p: float = 0.5
    """Probability of mirroring."""
    half_body_p: float = 0.3
    """Probability of cropping to the upper or lower body, for people with at least 9 labelled keypoints."""
    scale: float = 0.5
    """The box is scaled by 1 + scale * t, t from a standard normal truncated to [-1, 1]."""
    rotation: float = 80.0
    """The box is rotated by rotation * t degrees ..."""
    rotation_p: float = 0.6
    """... with this probability."""
    shift: float = 0.16
    """The box is shifted by shift * t of its size, in x and y ..."""
    shift_p: float = 0.3
    """... with this probability."""
    photometric_p: float = 0.5
    """Probability of each photometric change: brightness and contrast, hue and saturation, channel order."""
    blur_p: float = 0.1
    """Probability of each of box blur and median blur, 3 to 7 px."""
    coarse_dropout_p: float = 0.5
    """Probability of one black rectangle of 20-40 % of the height and of the width. Published: 1.0."""
    weak_rotation: float = 10.0
    """ssl, the teacher's view: rotation is weak_rotation * t degrees, t standard normal truncated to [-2, 2]."""
    weak_scale: float = 0.15
    """ssl, the teacher's view: scale is uniform in 1 +- weak_scale."""
    strong_rotation: float = 30.0
    """ssl, the student's view: further rotation of strong_rotation * t degrees."""
    strong_scale: float = 0.35
    """ssl, the student's view: further scale, uniform in 1 +- strong_scale."""
    strong_shift: float = 0.06
    """ssl, the student's view: further shift, uniform in +- strong_shift of the box."""
    strong_half_body_p: float = 0.3
    """ssl, the student's view: probability of cropping to the upper or lower half of the person's box."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = "sapiens_1b"
    """A key of `sapiens_accel.model.SIZES`."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What trades memory for time; the losses stay the same, up to rounding. The plan chooses what is not given."""

    micro_batch: int | None = None
    """People of one forward and backward on one device. Default: the largest that the device is predicted to hold."""
    checkpointed_blocks: int | None = None
    """Transformer blocks, from the first on, that keep only their input and compute the rest again in the backward.
    Default: as few as fit."""
    head_chunk: int | None = None
    """People whose heatmaps and loss are computed at a time. Default: as many as do not raise the peak."""
    offload_activations: bool = False
    """Block inputs wait for the backward in pinned host memory; the copies overlap with the arithmetic."""
    adam_8bit: bool = False
    """Keep AdamW's moments in 8 bits (torchao; pip install torchao): 2 bytes a parameter in place of 8, for a GPU
    without host memory to offload to. Not with DeepSpeed. This one does change the losses a little."""
    compile_blocks: bool = False
    """Compile the transformer blocks with torch.compile: minutes at the start, faster steps. Not with ZeRO-3."""
    teacher: Place | None = None
    """Where the mean teacher's fp32 average is kept: device, on each GPU, whole; sharded, a part on each GPU; host, a
    part in each process's host memory. The last two run a 16-bit copy of it. Default: the plan chooses."""
    force: bool = False
    """Run although the plan predicts that the device does not hold it."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 5e-4
    """Peak learning rate of the head; a block's is lr * layer_decay ^ (its distance from the head)."""
    layer_decay: float = 0.85
    """Layer-wise learning rate decay; 1 gives every layer the same rate."""
    weight_decay: float = 0.05
    """AdamW weight decay; never on biases, norms and the position embedding. Published: 0.1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    warmup_steps: int = 500
    """Steps of linear warm-up from 0.001 of the rate; at most a tenth of the stage."""
    schedule: Literal["constant", "multistep", "cosine", "linear"] = "multistep"
    """What follows the warm-up."""
    milestones: tuple[float, ...] = (170 / 210, 200 / 210)
    """multistep: fractions of the stage at which the rate falls to a tenth."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The mean teacher of stage ssl (Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780)."""

    ema_decay: float | None = None
    """Decay of the teacher's moving average for one step. Default: 1 - 50 / steps, within [0.99, 0.9998]."""
    threshold: float = 0.7
    """A keypoint is learnt from where the teacher's normalised confidence is above this; -1 keeps everything."""
    temperature: float = 0.5
    """Sharpening T of both heatmaps: h^(1/T) / sum h^(1/T)."""
    weight: float = 1.0
    """Weight of the unlabelled loss against the labelled one, after the ramp."""
    ramp: float = 0.05
    """Fraction of the stage over which that weight rises from 0.007 to 1 of itself."""
    ratio: int = 1
    """Unlabelled people for each labelled one in a batch. 0: none; the labelled people alone, and their average."""
    loss: Literal["kl", "mse", "literal"] = "kl"
    """How the student is compared with the teacher: kl (of log-heatmap softmaxes), mse, or literal: softmaxes of raw
    heatmaps, the teacher's alone sharpened. The last makes a model worse (README) and is here to be compared with."""
    target: Literal["rendered", "heatmap"] = "rendered"
    """With what: a target drawn anew at the teacher's keypoints, or its heatmap itself, warped into the student's view
    (mse with it is PoseCons, https://arxiv.org/abs/2011.12498). literal takes the heatmap in any case."""
    confidence: Literal["keypoint", "raw"] = "keypoint"
    """What the threshold holds against: the teacher's peak as a share of what a good keypoint of that kind has (the
    labels' own noise keeps a hip lower than an eye), or the raw peak. literal takes the raw one in any case."""
    cutout: int = 5
    """Squares of the mean colour put on the student's view, each on one of the teacher's keypoints."""

    on_alarm: Literal["stop", "warn"] = "stop"
    """What to do when the stage collapses or inflates: stop it, with the last good weights in place, or only say so."""

    @property
    def compares_maps(self) -> bool:
        """Whether the student's heatmap is compared with the teacher's own."""
        return self.target == "heatmap" or self.loss == "literal"

    @property
    def raw_confidence(self) -> bool:
        return self.confidence == "raw" or self.loss == "literal"


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    epochs: float = 100
    """Passes over the labelled people ..."""
    steps: int | None = None
    """... or optimizer steps; where given, these count."""
    global_batch: int = 32
    """Labelled people of one optimizer step, over all processes and accumulated micro-batches."""
    frozen: tuple[str, ...] = ()
    """Layer groups that do not learn: shell patterns over embeddings, block_0 ... block_N, norm, head."""
    loss_weight: float = 1.0
    """Factor on the heatmap loss. Published Sapiens2: 10."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Its optimizer."""
    teacher: TeacherConfig | None = None
    """Present: the stage also learns from unlabelled people."""

    @property
    def ratio(self) -> int:
        """Unlabelled people for each labelled one."""
        return self.teacher.ratio if self.teacher else 0


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    split: Literal["val", "train"] = "val"
    """People to evaluate on."""
    boxes: str = "gt"
    """Where people are: gt, their own labelled boxes (an easier number), or a detector's results in COCO's form, a JSON
    of image_id, category_id, bbox and score, relative to here or to data.root."""
    images: str | None = None
    """eval.py: look at these pictures instead, a picture, a folder (with all below it) or a video; nothing is measured.
    boxes is then gt, the whole picture as one person, a JSON of boxes, detector, or a detector's folder or Hub name."""
    min_box_score: float = 0.5
    """eval.py --images: boxes with a score below this are left out."""
    flip: bool = True
    """Average the heatmaps of the crop and of its mirror image."""
    scales: tuple[float, ...] = (1.0,)
    """Average the heatmaps of the crop at these sizes, as factors of its pixels."""
    ensemble: bool = False
    """eval.py: also average the heatmaps of all weights that were given."""
    compare: bool = False
    """eval.py: also measure without flip and without scales, to see what each adds and costs."""
    batch_size: int = 32
    """Crops of one forward; of larger ones fewer."""
    nms_threshold: float = 0.9
    """People of one picture whose OKS is above this are the same person."""
    score_threshold: float = 0.2
    """Keypoints below this do not count in a person's score."""
    backend: Literal["pycocotools", "faster_coco_eval"] = "pycocotools"
    """What computes AP and AR; faster_coco_eval gives the same numbers sooner (pip install faster-coco-eval)."""
    save_predictions: str | None = None
    """Write the predictions as COCO's server takes them to this JSON; while training, the last evaluation's."""
    num_pictures: int = 8
    """People drawn with their prediction."""
    num_worst: int = 8
    """People of the lowest OKS drawn with what went wrong; also while training, at each evaluation."""
    html: str | None = None
    """eval.py: also write a page with everything in it to this file; auto: eval.html beside eval.json."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob of a run."""

    recipe: str = "demo"
    """Name of a recipe in sapiens_accel/recipes, or a YAML file."""
    stage: Literal["phase1", "phase2", "ssl", "all"] = "all"
    """What to train; each stage starts from the weights of the one before it."""
    output_dir: str = "runs/{recipe}"
    """Run folder."""
    seed: int = 0
    """Seed of the weights, the batches and the augmentation."""
    weights: str | None = None
    """Weights to start from: a file, a folder, or a Hub repository, ORG/NAME[@REVISION][:PATH/IN/REPO]. Default: the
    stage before, else random."""
    max_steps: int | None = None
    """Stop each stage after this many steps of its schedule."""
    log_every: int = 20
    """Steps between log lines."""
    save_every: int | None = None
    """Steps between resumable checkpoints. Default: none but the stage's final weights."""
    keep_checkpoints: int = 2
    """Checkpoints kept for each stage: the last ones, and beside them the best of those that were evaluated."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """How a stage's weights are written when it hands them over; what it resumes from stays fp32."""
    eval_every: int | None = None
    """Steps between evaluations. Default: at the end of each stage."""
    resume_from_checkpoint: str | None = None
    """latest, or a checkpoint folder. Of another number of processes everything is carried over (not in ZeRO-3), of
    another ZeRO stage or precision: weights, step and teacher."""
    dry_run: bool = False
    """Build and check everything, take one step of the first stage, write no weights."""
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where scalars and pictures go, beside metrics.jsonl."""
    push_to_hub: bool = False
    """Upload weights to the Hugging Face Hub in the background, with a model card, the training curve and the picture
    of predictions on the people who are evaluated."""
    hub_model_id: str | None = None
    """Their repository there, ORG/NAME. It is created if it is not there."""
    hub_strategy: Literal["end", "every_save", "best", "all"] = "end"
    """What is uploaded: end, the final weights of the last stage; every_save, also those of every save; best, those
    that were evaluated best; all, the final weights of every stage in a folder of its own, the last on top as well."""
    hub_private: bool = False
    """The repository is for its owners alone."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    phase1: StageConfig = field(
        default_factory=lambda: StageConfig(epochs=10, frozen=("embeddings", "block_*", "norm"))
    )
    phase2: StageConfig = field(default_factory=StageConfig)
    ssl: StageConfig = field(
        default_factory=lambda: StageConfig(
            epochs=50, teacher=TeacherConfig(), optim=OptimConfig(lr=1e-4, schedule="cosine")
        )
    )
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def stages(self) -> tuple[StageName, ...]:
        return STAGES if self.stage == "all" else (self.stage,)

    def of(self, stage: StageName) -> StageConfig:
        return {"phase1": self.phase1, "phase2": self.phase2, "ssl": self.ssl}[stage]


def load(argv: Sequence[str], prog: str = "train.py", base: Path | None = None) -> Config:
    """Defaults, then the recipe (`--recipe`, or the file `base`), then the other arguments.

    Raises:
        UserError: no such recipe, a key that does not exist (with the nearest one that does), a value of another type.
    """
    show = "--print_config" in argv
    words = _spell_out_switches([word for word in argv if word != "--print_config"])
    recipe = _value_of(words, "recipe") or Config.recipe
    path = base or recipe_path(recipe)
    _check_keys(words, path)
    parser = ArgumentParser(
        prog=prog, default_config_files=[glob.escape(str(path))], exit_on_error=False, description=Config.__doc__
    )
    parser.add_class_arguments(Config)
    try:
        config = Config(**vars(parser.instantiate(parser.parse_args(words))))
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    config = dataclasses.replace(config, output_dir=config.output_dir.replace("{recipe}", _recipe_name(config.recipe)))
    _check_values(config)
    _warn(config)
    if show:
        print(_as_yaml(config), end="")
        sys.exit(0)
    return config


def _warn(config: Config) -> None:
    """Say once what is known to make a model worse."""
    losing = [name for name in config.stages if (teacher := config.of(name).teacher) and teacher.loss == "literal"]
    if losing and os.environ.get("RANK", "0") == "0":
        print(f"warning: --{losing[0]}.teacher.loss literal: {LITERAL_WARNING}", file=sys.stderr, flush=True)


def guarded(main: Callable[[Sequence[str]], None]) -> None:
    """Run a program: a UserError is one line on stderr and exit code 2; any other exception is our bug.

    A run that was asked to stop leaves with exit code 0, and says how to go on.
    """
    try:
        main(sys.argv[1:])
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print(f"{interrupted}; go on with the same launch and: {_resuming(sys.argv)}", flush=True)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(10)  # rank 0 mostly says the same; its exit ends this process before the line is said again
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _resuming(words: Sequence[str]) -> str:
    """A command that goes on where the one of these words stopped."""
    option = "--resume_from_checkpoint"
    kept = [word for before, word in pairwise(["", *words]) if not word.startswith(option) and before != option]
    return shlex.join([*kept, option, "latest"])


def recipe_path(recipe: str) -> Path:
    """The YAML file of a recipe's name, or the file itself.

    Raises:
        UserError: there is neither.
    """
    if recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise UserError(f"--recipe {recipe}: no such file")
        return Path(recipe)
    folder = Path(str(resources.files("sapiens_accel.recipes")))
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if recipe not in names:
        raise UserError(f"--recipe {recipe}: no such recipe{_nearest(recipe, names)}. There are: {', '.join(names)}")
    return folder / f"{recipe}.yaml"


def _check_values(config: Config) -> None:
    """Refuse numbers that no run can have."""
    positive = {"log_every": config.log_every, "save_every": config.save_every, "eval_every": config.eval_every}
    positive |= {"keep_checkpoints": config.keep_checkpoints, "max_steps": config.max_steps}
    positive |= {"data.stream_parts": config.data.stream_parts, "data.stream_window": config.data.stream_window}
    positive |= {"data.sigma": config.data.sigma, "memory.micro_batch": config.memory.micro_batch}
    positive |= {"memory.head_chunk": config.memory.head_chunk}
    for stage in STAGES:
        plan = config.of(stage)
        positive |= {f"{stage}.{knob}": getattr(plan, knob) for knob in ("steps", "epochs", "global_batch")}
        if plan.teacher:
            _check_teacher(stage, plan.teacher)
    for knob, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"--{knob} {value}: expected a number above 0")
    if config.data.weight is not None and not config.data.more:
        raise UserError(f"--data.weight {config.data.weight:g}: of one data set alone; name the others by --data.more")
    if config.push_to_hub and config.hub_model_id is None:
        raise UserError("--push_to_hub: to which repository? Name it by --hub_model_id ORG/NAME")
    check_model_id(config.hub_model_id)
    _check_eval(config.eval)


def check_model_id(name: str | None) -> None:
    """Refuse a name that no repository of the Hub can have."""
    part = r"[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?"
    if name is not None and (not re.fullmatch(f"{part}/{part}", name, re.ASCII) or re.search(r"--|\.\.|\.git$", name)):
        raise UserError(f"--hub_model_id {name}: expected ORG/NAME: letters, digits, and single '-', '_' or '.' within")


def _check_eval(evaluation: EvalConfig) -> None:
    scales = evaluation.scales
    if not scales or not all(0.1 <= scale <= 4 for scale in scales) or len(set(scales)) < len(scales):
        shown = " ".join(f"{scale:g}" for scale in scales) or "(none)"
        raise UserError(f"--eval.scales {shown}: expected different factors of 0.1 to 4, as 0.5 1.0 1.5 2.0")
    for knob in ("score_threshold", "nms_threshold", "min_box_score"):
        if not 0 <= (value := getattr(evaluation, knob)) <= 1:
            raise UserError(f"--eval.{knob} {value:g}: expected 0 to 1")
    for knob, least in {"batch_size": 1, "num_pictures": 0, "num_worst": 0}.items():
        if getattr(evaluation, knob) < least:
            raise UserError(f"--eval.{knob} {getattr(evaluation, knob)}: expected at least {least}")
    if evaluation.html is not None and (not evaluation.html or Path(evaluation.html).is_dir()):
        raise UserError(f"--eval.html {evaluation.html or '(empty)'}: expected a file to write, as eval.html")


def _check_teacher(stage: str, teacher: TeacherConfig) -> None:
    ranges = {"ema_decay": (0, 1), "threshold": (-1, 1), "temperature": (1e-3, 10), "ramp": (0, 1), "weight": (0, 1e6)}
    for knob, (low, high) in {**ranges, "ratio": (0, 64), "cutout": (0, 64)}.items():
        value = getattr(teacher, knob)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{stage}.teacher.{knob} {value}: expected {low:g} to {high:g}")


def _recipe_name(recipe: str) -> str:
    # Only a file has a stem: in sapiens_0.3b_coco the dot is part of the name.
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def save(config: Config, path: Path) -> None:
    """Write the whole tree as YAML; `load` with this file as `base` gives an equal one back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_as_yaml(config))


def _as_yaml(config: Config) -> str:
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    for spec in dataclasses.fields(kind):
        yield prefix + spec.name
        inner = TeacherConfig if spec.name == "teacher" else spec.type
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from _keys(inner, f"{prefix}{spec.name}.")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")


def _check_keys(words: Sequence[str], path: Path) -> None:
    known = list(_keys(Config))
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
    for key in _flatten(tree):
        if key not in known:
            raise UserError(f"{path}: no such key {key!r}{_nearest(key, known)}")
    for word in words:
        key = word[2:].split("=")[0]
        if word.startswith("--") and key not in (*known, "help"):
            raise UserError(f"no such option --{key}{_nearest(key, known, '--')}")


def _nearest(word: str, names: Sequence[str], dashes: str = "") -> str:
    # A forgotten or wrong group (--lr for --phase2.optim.lr) is as common as a slip of the finger.
    close = difflib.get_close_matches(word, names, n=1) or [n for n in names if n.split(".")[-1] == word.split(".")[-1]]
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _value_of(words: Sequence[str], name: str) -> str | None:
    for word, following in pairwise([*words, ""]):
        if word == f"--{name}":
            return following
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def _spell_out_switches(argv: Sequence[str]) -> list[str]:
    """`--dry_run` alone means `--dry_run=true`, as everywhere else on a command line."""
    options = (f"memory.{name}" for name in ("offload_activations", "adam_8bit", "compile_blocks", "force"))
    evaluation = (f"eval.{name}" for name in ("flip", "compare", "ensemble"))
    names = ("dry_run", "push_to_hub", "hub_private", "data.streaming", *options, *evaluation)
    values = {f"--{name}": "true" for name in names} | {"--eval.html": "auto"}
    bare = [following.startswith("--") or not following for _, following in pairwise([*argv, ""])]
    return [
        f"{word}={values[word]}" if word in values and last else word for word, last in zip(argv, bare, strict=True)
    ]
