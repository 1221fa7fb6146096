"""The typed tree of every option that changes the maths. The defaults are the specification (512x384, sigma 3, ...).

Processes, precision and ZeRO are owned by `accelerate_configs/` and `ds_configs/` and never appear here.

A number's type says outside of which range it means nothing. `Annotated` in place of jsonargparse's restricted types:
the values stay plain numbers, which YAML writes and a type checker understands.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

StageName = Literal["phase1", "phase2", "ssl"]
STAGES: tuple[StageName, ...] = get_args(StageName)  # in the order of --stage all
Place = Literal["device", "sharded", "host"]
BUILT_IN = "built_in"  # in augment.albumentations: the changes of pixels that there are without it


@dataclass(frozen=True, repr=False)
class Range:
    """Finite numbers from `low` to `high`, without the ends that are open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        least = f"a number {'>' if self.open_low else '>='} {self.low:.12g}"
        most = f" and {'<' if self.open_high else '<='} {self.high:.12g}"
        return least if math.isinf(self.high) else least + most

    def __repr__(self) -> str:  # as --help shows it
        return str(self).removeprefix("a number ")


Count = Annotated[int, Range(0)]
PositiveCount = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what NumPy's legacy generator takes
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]  # a scale of 1 +- this stays above 0
Degrees = Annotated[float, Range(0, 180)]


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The built-in drawn people."""

    num_train: PositiveCount = 600
    """Labeled people to draw for training."""
    num_unlabelled: Count = 600
    """People to draw without labels."""
    num_val: Count = 160
    """Labeled people to draw for validation."""
    seed: Seed = 0
    """Seed of the drawing."""


@dataclass(frozen=True, kw_only=True)
class MoreData:
    """A further labeled data set to train on; its keypoints become the run's by name."""

    train_annotations: str = "annotations/person_keypoints_train2017.json"
    """COCO keypoint JSON, relative to its root."""
    train_images: str = "train2017"
    """Folder of its images, relative to its root."""
    root: str | None = None
    """Its folder, in COCO's form, or shards as data.root takes them, whose `train` is taken. Default: data.root."""
    columns: dict[str, str] = field(default_factory=dict)
    """As data.columns."""
    category: str | None = None
    """As data.category."""
    weight: Positive | None = None
    """As data.weight."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained and evaluated on, and how images become input of the network."""

    root: str | None = None
    """Folder in COCO's form; folder of parquet, Arrow or WebDataset tar shards; or a data set of the Hub,
    hf://ORG/NAME[@REVISION]. Without one, the built-in synthetic people are drawn."""
    columns: dict[str, str] = field(default_factory=dict)
    """What columns of shards are called where the names are neither ours nor common ones: {people: objs, bbox: xywh}.
    Ours: image, image_id, file_name, width, height; people; of a person id, category_id, iscrowd, area, bbox,
    keypoints."""
    streaming: bool = False
    """Training images are read from their shards (parquet; here, on the Hub, or at an address that fsspec knows) as
    they are needed: no copy of them is made, and people are shuffled within windows. Needs shards."""
    stream_parts: PositiveCount = 8
    """streaming: parts of the global batch, each with images of its own. Every process then reads only its own
    images if this is a multiple of processes x accumulation. The order of an epoch depends on it."""
    stream_window: PositiveCount = 2
    """streaming: row groups whose people are shuffled among each other."""
    train_annotations: str = "annotations/person_keypoints_train2017.json"
    """COCO keypoint JSON of the training people, relative to the root."""
    train_images: str = "train2017"
    """Folder of its images, relative to the root."""
    val_annotations: str = "annotations/person_keypoints_val2017.json"
    """COCO keypoint JSON of the validation people, relative to the root."""
    val_images: str = "val2017"
    """Folder of its images, relative to the root."""
    category: str | None = None
    """Name of the category to learn, in a JSON of several with keypoints. Default: the only one that has some, person,
    or all of them where they have the same keypoints."""
    skeleton: str | None = None
    """What the keypoints are: coco17, wholebody133, sapiens308, or a YAML with any of names, mirror, sigmas, upper and
    edges, relative to here or to data.root. Default: what the category of the JSON says, and its names imply. eval.py
    takes what is kept beside the weights."""
    boxes: Literal["annotation", "keypoints", "image"] = "annotation"
    """Where labeled people's boxes are from, in training and evaluation: annotation, their `bbox` (who has none, or one
    without width or height, gets one from keypoints); keypoints, the box around the labeled ones; image, the whole
    image, for one animal or person in each (then with box_padding 1 and input_hw in the images' aspect)."""
    box_margin: NonNegative = 0.15
    """Boxes from keypoints: how much larger than theirs on each side, as a share of that box's width or height."""
    more: tuple[MoreData, ...] = ()
    """Further labeled data sets to train on: [{root: DIR, train_annotations: FILE, train_images: DIR}, ...]. What one
    of them does not label has weight 0 there; people to validate on are those of the first."""
    weight: Positive | None = None
    """With data.more: how large a part of every epoch is of the first set, against the weights of the others. Give all
    of them or none. Default: as many people as each set has."""
    labels: PositiveCount | str | None = None
    """Training people that keep their keypoints, in every stage: a count (1000) or a share (5%). The keypoints of the
    others are withheld, and in stage ssl they are unlabeled people. Default: all."""
    labels_by: Literal["first", "random"] = "first"
    """Which people: the first, image by image in the order of the JSON's images (published: Xie et al.,
    https://arxiv.org/abs/2011.12498), or at random."""
    labels_seed: Seed = 0
    """Seed of labels_by random."""
    unlabelled_images: str = "unlabeled2017"
    """Folder of images without labels, relative to the root, for stage ssl."""
    unlabelled_annotations: str | None = None
    """COCO JSON with the boxes of the people in them, or a detector's results (a list of image_id, bbox, score).
    Default: annotations/person_boxes_<folder>.json where there is one, else each whole image counts as one person."""
    unlabelled_min_score: Fraction = 0.5
    """Detections with a score below this are left out."""
    unlabelled_train_people: bool = True
    """Whether the training people that have a box but no keypoints join the unlabeled ones (112,000 in COCO)."""
    unlabelled_min_side: NonNegative = 64.0
    """Unlabeled boxes whose shorter side is below this (image px) are left out: nothing can be learned from them."""
    input_hw: tuple[PositiveCount, PositiveCount] = (512, 384)
    """Height and width of the crop that the network sees, in pixels."""
    sigma: Positive = 3.0
    """Width of the target Gaussian in heatmap pixels. An integer keeps the published patch exactly."""
    box_padding: Positive = 1.25
    """A person's box is enlarged by this factor before it is cropped."""
    visibility_threshold: Positive | None = None
    """The v of keypoints is a score, as models write it: from this one on, a keypoint has a label. Default: v is COCO's
    (0 not labeled, 1 hidden, 2 visible), and a score is refused."""
    absent_is_background: bool = False
    """v=0 means that a keypoint is not in the image: the network learns an empty heatmap for it. By default it means
    that nobody labeled it, and nothing is learned of it."""
    occluded_weight: NonNegative = 0.5
    """Target weight of a labeled but occluded keypoint (v=1). Published: 1.0. Unlabeled is 0 and visible is 1."""
    num_workers: Count = 4
    """Decoding processes for each rank; the batches are the same bytes for any number."""
    allow_other: bool = False
    """Resume although the people of training or validation are others than those of the run that is resumed."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What to do about an image that does not decode: stop and name it, or name it and leave its people out."""
    check_images: Literal["auto", "ends", "decode"] = "auto"
    """How images are checked before training: first and last bytes (milliseconds for thousands), or a full decode.
    auto decodes sets of up to 5,000 images, and of shards, or of over a million people, those of 5,000 people."""
    reduced_decode: bool = True
    """Decode a JPEG to a half, a quarter or an eighth of its size where a training crop shows no more of it anyway: it
    takes less time and aliases less. Evaluation decodes everything whole."""
    cache_dir: str | None = None
    """Where drawn people and Arrow tables are kept. Default: $SAPIENS_ACCEL_CACHE or ~/.cache/sapiens_accel."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Sapiens' training augmentation: facebookresearch/sapiens pose/mmpose/datasets/transforms (recipe of COCO)."""

    flip_p: Fraction = 0.5
    """Probability of mirroring."""
    half_body_p: Fraction = 0.3
    """Probability of cropping to the upper or lower body, for people with at least 9 labeled keypoints."""
    scale: BelowOne = 0.5
    """The box is scaled by 1 + scale * t, t from a standard normal truncated to [-1, 1]."""
    rotation: Degrees = 80.0
    """The box is rotated by rotation * t degrees ..."""
    rotation_p: Fraction = 0.6
    """... with this probability."""
    shift: Fraction = 0.16
    """The box is shifted by shift * t of its size, in x and y ..."""
    shift_p: Fraction = 0.3
    """... with this probability."""
    photometric_p: Fraction = 0.5
    """Probability of each photometric change: brightness and contrast, hue and saturation, channel order."""
    blur_p: Fraction = 0.1
    """Probability of each of box blur and median blur, 3 to 7 px."""
    coarse_dropout_p: Fraction = 0.5
    """Probability of one black rectangle of 20-40 % of the height and of the width. Published: 1.0."""
    albumentations: tuple[dict[str, Any] | str, ...] | str | None = None
    """Pixel transforms of albumentations in place of the built-in ones (photometric_p, blur_p, coarse_dropout_p): a
    YAML file, or a list, [{GaussNoise: {p: 0.3}}, {CLAHE: {clip_limit: 2, p: 0.1}}], in this order. `built_in` in the
    list stands for the built-in ones. Transforms that move pixels are refused."""
    weak_rotation: Degrees = 10.0
    """ssl, the teacher's view: rotation is weak_rotation * t degrees, t standard normal truncated to [-2, 2]."""
    weak_scale: BelowOne = 0.15
    """ssl, the teacher's view: scale is uniform in 1 +- weak_scale."""
    strong_rotation: Degrees = 30.0
    """ssl, the student's view: further rotation of strong_rotation * t degrees."""
    strong_scale: BelowOne = 0.35
    """ssl, the student's view: further scale, uniform in 1 +- strong_scale."""
    strong_shift: Fraction = 0.06
    """ssl, the student's view: further shift, uniform in +- strong_shift of the box."""
    strong_half_body_p: Fraction = 0.3
    """ssl, the student's view: probability of cropping to the upper or lower half of the person's box."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: str = "sapiens_1b"
    """A key of `sapiens_accel.models.sapiens.SIZES`."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What trades memory for time; the losses stay the same, up to rounding. The plan chooses what is not given."""

    micro_batch: PositiveCount | None = None
    """People of one forward and backward on one device. Default: the largest that the device is predicted to hold."""
    checkpointed_blocks: Count | None = None
    """Transformer blocks, from the first on, that keep only their input and compute the rest again in the backward.
    Default: as few as fit."""
    head_chunk: PositiveCount | None = None
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
    """AdamW and the learning rate of a stage."""

    lr: NonNegative = 5e-4
    """Peak learning rate of the head; a block's is lr * layer_decay ^ (its distance from the head)."""
    layer_decay: Annotated[float, Range(0, 1, open_low=True)] = 0.85
    """Layer-wise learning rate decay; 1 gives every layer the same rate."""
    weight_decay: NonNegative = 0.05
    """AdamW weight decay; never on biases, norms and the position embedding. Published: 0.1."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW betas."""
    clip_norm: NonNegative = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    warmup_steps: Count = 500
    """Steps of linear warm-up from 0.001 of the rate; at most a tenth of the stage."""
    schedule: Literal["constant", "multistep", "cosine", "linear"] = "multistep"
    """What follows the warm-up."""
    milestones: tuple[Fraction, ...] = (170 / 210, 200 / 210)
    """multistep: fractions of the stage at which the rate falls to a tenth."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The mean teacher of stage ssl (Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780)."""

    ema_decay: Fraction | None = None
    """Decay of the teacher's moving average for one step. Default: 1 - 50 / steps, within [0.99, 0.9998]."""
    threshold: Annotated[float, Range(-1, 1)] = 0.7
    """A keypoint is learned from where the teacher's normalized confidence is above this; -1 keeps everything."""
    temperature: Annotated[float, Range(1e-3, 10)] = 0.5
    """Sharpening T of both heatmaps: h^(1/T) / sum h^(1/T)."""
    weight: Annotated[float, Range(0, 1e6)] = 1.0
    """Weight of the unlabeled loss against the labeled one, after the ramp."""
    ramp: Fraction = 0.05
    """Fraction of the stage over which that weight rises from 0.007 to 1 of itself."""
    ratio: Annotated[int, Range(0, 64)] = 1
    """Unlabeled people for each labeled one in a batch. 0: none; the labeled people alone, and their average."""
    loss: Literal["kl", "mse", "literal"] = "kl"
    """How the student is compared with the teacher: kl (of log-heatmap softmaxes), mse, or literal: softmaxes of raw
    heatmaps, the teacher's alone sharpened. The last makes a model worse (README) and is here to be compared with."""
    target: Literal["rendered", "heatmap"] = "rendered"
    """With what: a target drawn anew at the teacher's keypoints, or its heatmap itself, warped into the student's view
    (mse with it is PoseCons, https://arxiv.org/abs/2011.12498). literal takes the heatmap in any case."""
    confidence: Literal["keypoint", "raw"] = "keypoint"
    """What the threshold holds against: the teacher's peak as a share of what a good keypoint of that kind has (the
    labels' own noise keeps a hip lower than an eye), or the raw peak. literal takes the raw one in any case."""
    cutout: Annotated[int, Range(0, 64)] = 5
    """Squares of the mean color put on the student's view, each on one of the teacher's keypoints."""

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
    """A stage: how long, on how much at a time, and what learns."""

    epochs: Positive = 100
    """Passes over the labeled people ..."""
    steps: PositiveCount | None = None
    """... or optimizer steps; where given, these count."""
    global_batch: PositiveCount = 32
    """Labeled people of one optimizer step, over all processes and accumulated micro-batches."""
    frozen: tuple[str, ...] = ()
    """Layer groups that do not learn: shell patterns over embeddings, block_0 ... block_N, norm, head."""
    loss_weight: Positive = 1.0
    """Factor on the heatmap loss. Published Sapiens2: 10."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Its optimizer."""
    teacher: TeacherConfig | None = None
    """Present: the stage also learns from unlabeled people."""

    @property
    def ratio(self) -> int:
        """Unlabeled people for each labeled one."""
        return self.teacher.ratio if self.teacher else 0


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How weights are evaluated."""

    split: Literal["val", "train"] = "val"
    """People to evaluate on."""
    boxes: str = "gt"
    """Where people are: gt, their own labeled boxes (an easier number), or a detector's results in COCO's form, a JSON
    of image_id, category_id, bbox and score, relative to here or to data.root."""
    images: str | None = None
    """eval.py: look at these images instead, an image, a folder (with all below it) or a video; nothing is measured.
    boxes is then gt, the whole image as one person, a JSON of boxes, detector, or a detector's folder or Hub name."""
    min_box_score: Fraction = 0.5
    """eval.py --images: boxes with a score below this are left out."""
    flip: bool = True
    """Average the heatmaps of the crop and of its mirror image."""
    scales: tuple[Annotated[float, Range(0.1, 4)], ...] = (1.0,)
    """Average the heatmaps of the crop at these sizes, as factors of its pixels."""
    ensemble: bool = False
    """eval.py: also average the heatmaps of all weights that were given."""
    compare: bool = False
    """eval.py: also measure without flip and without scales, to see what each adds and costs."""
    batch_size: PositiveCount = 32
    """Crops of one forward; of larger ones fewer."""
    nms_threshold: Fraction = 0.9
    """People of one image whose OKS is above this are the same person."""
    score_threshold: Fraction = 0.2
    """Keypoints below this do not count in a person's score."""
    area: Literal["annotation", "box"] = "annotation"
    """A person's area in OKS: as annotated, where the JSON has one, or 0.53 of the box, as CrowdPose and AI Challenger
    are evaluated. Without `area` in the JSON it is the second in any case; every table says which."""
    max_people: PositiveCount = 20
    """Predictions of one image that count, the best ones. COCO's number is 20."""
    backend: Literal["pycocotools", "faster_coco_eval"] = "pycocotools"
    """What computes AP and AR; faster_coco_eval gives the same numbers sooner (pip install faster-coco-eval)."""
    save_predictions: str | None = None
    """Write the predictions as COCO's server takes them to this JSON; while training, the last evaluation's."""
    csv: Literal["long", "deeplabcut"] | None = None
    """eval.py: also write the predictions as a CSV beside the JSON: long, a line for each keypoint of each person;
    deeplabcut, a line for each image or frame under DeepLabCut's header rows."""
    num_pictures: Count = 8
    """People drawn with their prediction."""
    num_worst: Count = 8
    """People of the lowest OKS drawn with what went wrong; also while training, at each evaluation."""
    html: str | None = None
    """eval.py: also write a page with everything in it to this file; auto: eval.html beside eval.json."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob of a run."""

    recipe: str = "demo"
    """Name of a recipe in sapiens_accel/recipes, or a YAML file."""
    stage: Literal[StageName, "all"] = "all"
    """What to train; each stage starts from the weights of the one before it."""
    output_dir: str = "runs/{recipe}"
    """Run directory. A stage that is trained again in it begins a new run: the whole old one is moved to
    OUTPUT_DIR.1, and the stages before that one are carried over."""
    seed: Seed = 0
    """Seed of the weights, the batches and the augmentation."""
    weights: str | None = None
    """Weights to start from: a file, a folder, or a Hub repository, ORG/NAME[@REVISION][:PATH/IN/REPO]. Default: the
    stage before, else random."""
    max_steps: PositiveCount | None = None
    """Stop each stage after this many steps of its schedule."""
    log_every: PositiveCount = 20
    """Steps between log lines."""
    save_every: PositiveCount | None = None
    """Steps between resumable checkpoints. Default: at the end of each epoch, and half an hour after the one before;
    where epochs are short, so often that saving takes at most a twentieth of the time."""
    keep_checkpoints: PositiveCount = 2
    """Checkpoints kept for each stage: the last ones, and beside them the best of those that were evaluated."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """How a stage's weights are written when it hands them over; what it resumes from stays fp32."""
    eval_every: PositiveCount | None = None
    """Steps between evaluations. Default: at the end of each stage."""
    resume_from_checkpoint: str | None = None
    """latest, or a checkpoint folder. Of another number of processes everything is carried over (not in ZeRO-3), of
    another ZeRO stage or precision: weights, step and teacher."""
    trust_checkpoint: bool = False
    """Unpickle whatever the checkpoint holds. Without it, only tensors, numbers and DeepSpeed's own few classes: a
    checkpoint of somebody else could run any code. Needed for one that another version of DeepSpeed wrote."""
    dry_run: bool = False
    """Build and check everything, take one step of the first stage, write no weights."""
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where scalars and images go, beside metrics.jsonl."""
    push_to_hub: bool = False
    """Upload weights to the Hugging Face Hub in the background, with a model card, the training curve and the image
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
        return getattr(self, stage)

    def without_mirroring(self) -> "Config":
        """For keypoints of which left and right are not known: no mirrored images, no flip test."""
        return replace(self, augment=replace(self.augment, flip_p=0.0), eval=replace(self.eval, flip=False))
