"""The typed tree of all options of train.py and eval.py. The defaults are the specification (512x384, sigma 3, ...).

Processes, precision and ZeRO belong to `accelerate_configs/` and `ds_configs/` and never appear here.

The type of a number holds its valid range. `Annotated` in place of jsonargparse's restricted types keeps the values
plain numbers, which YAML writes and a type checker understands.
"""

import math
import sys
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, cast, get_args

StageName = Literal["phase1", "phase2", "ssl"]
STAGES: tuple[StageName, ...] = get_args(StageName)  # in the order of --stage all
ALL = "all"  # of --stage
RANDOM = "random"  # of --weights
TENSORBOARD = "tensorboard"
TRACKERS = (TENSORBOARD, "wandb", "trackio", "mlflow", "comet_ml")  # of --report_to, by accelerate's names
Preset = Literal["fast", "limited_memory"]
TeacherPlacement = Literal["device", "sharded", "host"]
BaseDtype = Literal["nf4", "int8"]
BUILT_IN = "built_in"  # in augment.albumentations: the changes of pixels that there are without it


@dataclass(frozen=True, repr=False)
class Range:
    """Finite numbers from `low` to `high`; an open end is excluded."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        finite = abs(value) <= sys.float_info.max  # of an integer that no float holds, math.isfinite raises
        return finite and above and below

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
BelowOne = Annotated[float, Range(0, 1, open_high=True)]  # so that a scale of 1 +- x is above 0
Degrees = Annotated[float, Range(0, 180)]


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The built-in synthetic dataset: drawn people."""

    num_train: PositiveCount = 600
    """Labeled people to draw for training."""
    num_unlabelled: Count = 600
    """People to draw without labels."""
    num_val: Count = 160
    """Labeled people to draw for validation."""
    seed: Seed = 0
    """Seed of the drawn people."""


@dataclass(frozen=True, kw_only=True)
class MoreData:
    """A further labeled dataset to train on; its keypoints are matched with the run's by name."""

    train_annotations: str = "annotations/person_keypoints_train2017.json"
    """COCO keypoint JSON, relative to its root."""
    train_images: str = "train2017"
    """Folder of its images, relative to its root."""
    root: str | None = None
    """A folder in COCO's format, or shards as in data.root, of which the split `train` is used. Default: data.root."""
    columns: dict[str, str] = field(default_factory=dict)
    """As data.columns."""
    category: str | None = None
    """As data.category."""
    weight: Positive | None = None
    """As data.weight."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset, and how its images become input of the network."""

    root: str | None = None
    """A folder in COCO's format; a folder of parquet, Arrow or WebDataset tar shards; or a dataset on the Hub,
    hf://ORG/NAME[@REVISION]. Without it the demo draws people; other recipes do so with --data.synthetic alone."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the columns of shards, where these are neither ours nor common ones: {people: objs, bbox: xywh}.
    Ours: image, image_id, file_name, width, height, people; for each person id, category_id, iscrowd, area, bbox,
    keypoints."""
    streaming: bool = False
    """Read training images from parquet shards (local, on the Hub, or at a URL that fsspec supports) as they are
    needed, without a local copy. People are then shuffled within windows."""
    stream_parts: PositiveCount = 8
    """streaming: number of parts of the global batch, each with its own share of the images. If it is a multiple of
    processes x accumulation, every process reads only its own images. The order of an epoch depends on it."""
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
    """Name of the category to learn, if several have keypoints. Default: the only category with keypoints, person, or
    all categories if they have the same keypoints."""
    skeleton: str | None = None
    """The keypoints: coco17, wholebody133, sapiens308, or a YAML with any of names, mirror, sigmas, upper and edges,
    relative to the current folder or to data.root. Default: derived from the category in the JSON and its names.
    eval.py uses the skeleton.json beside the weights."""
    boxes: Literal["annotation", "keypoints", "image"] = "annotation"
    """Boxes of labeled people, in training and evaluation: annotation, their `bbox` (if it is missing or has no width
    or height, a box around the keypoints); keypoints, the box around the labeled keypoints; image, the whole image, for
    images of one animal or person each (use it with box_padding 1 and input_hw in the images' aspect)."""
    box_margin: NonNegative = 0.15
    """Boxes around keypoints: margin on each side, as a fraction of the width or height of the keypoints."""
    more: tuple[MoreData, ...] = ()
    """Further labeled datasets to train on: [{root: DIR, train_annotations: FILE, train_images: DIR}, ...]. Keypoints
    that one of them does not label have weight 0 there. Validation uses the first dataset."""
    weight: Positive | None = None
    """With data.more: the share of the first dataset in every epoch, relative to the weights of the others. Set all of
    them or none. Default: the number of people of each dataset."""
    labels: PositiveCount | str | None = None
    """Training people whose keypoints are used, in every stage: a count (1000) or a share (5%). Stage ssl uses the
    others as unlabeled people. Default: all."""
    labels_by: Literal["first", "random"] = "first"
    """Which people: the first ones, image by image in the order of the JSON's images (as Xie et al.,
    https://arxiv.org/abs/2011.12498), or random ones."""
    labels_seed: Seed = 0
    """Seed for labels_by random."""
    unlabelled_images: str = "unlabeled2017"
    """Folder of images without labels, relative to the root, for stage ssl."""
    unlabelled_annotations: str | None = None
    """COCO JSON with the boxes of the people in these images, or a detector's results (a list of image_id, bbox,
    score). Default: annotations/person_boxes_<folder>.json if it exists; else each whole image is one person."""
    unlabelled_min_score: Fraction = 0.5
    """Detections with a score below this are left out."""
    unlabelled_train_people: bool = True
    """Use training people with a box but without keypoints as unlabeled people too (112,000 in COCO)."""
    unlabelled_min_side: NonNegative = 64.0
    """Unlabeled boxes whose shorter side is below this (image px) are left out as too small to learn from."""
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
    clip_boxes: bool = False
    """Boxes of labeled people end at the image's border, as published; otherwise they are taken as they are."""
    outside_keypoints: Literal["near", "ignored"] = "near"
    """Keypoints that lie outside of the crop: near, those whose Gaussian still reaches into the heatmap are learned
    (published Sapiens, and mmpose); ignored, none (published Sapiens2)."""
    occluded_weight: NonNegative = 0.5
    """Target weight of a labeled but occluded keypoint (v=1). Published: 1.0. Unlabeled is 0 and visible is 1."""
    num_workers: Count = 4
    """Decoding processes for each rank; the batches are the same bytes for any number."""
    allow_other: bool = False
    """Resume even if the people of training or validation differ from those of the run that is resumed."""
    on_leak: Literal["stop", "skip"] = "stop"
    """What to do about an image of data.more that is an image of validation as well, whatever its name and encoding:
    stop and name it, or leave its people out."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """If an image cannot be decoded: stop and name it, or skip its people and name it."""
    check_images: Literal["auto", "ends", "decode"] = "auto"
    """How images are checked before training: by first and last bytes (milliseconds for thousands), or a full decode.
    auto decodes all images of up to 5,000; of shards and of over a million people, the images of 5,000 people."""
    image_bits: Annotated[int, Range(8, 16)] | None = None
    """Bits that hold the values of all 16-bit images (12, of many cameras): they become 8 bits, larger values white.
    Default: $SAPIENS_ACCEL_IMAGE_BITS or 16."""
    reduced_decode: bool = True
    """Decode a JPEG at a half, a quarter or an eighth of its size where the training crop needs no more: this is faster
    and aliases less. Evaluation always decodes the full size."""
    cache_dir: str | None = None
    """Cache of drawn people and Arrow tables. Default: $SAPIENS_ACCEL_CACHE or ~/.cache/sapiens_accel."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Sapiens' training augmentation: facebookresearch/sapiens pose/mmpose/datasets/transforms (COCO recipe)."""

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
    """The box is shifted by shift * t of its size (shift_of), in x and y ..."""
    shift_p: Fraction = 0.3
    """... with this probability."""
    shift_of: Literal["crop", "box"] = "crop"
    """... where its size is that of the crop, which has the input's aspect, or of the padded box itself, as published:
    for a narrow person, a third of it."""
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
    base_dtype: BaseDtype | None = None
    """With --lora.rank: round the frozen matrices that adapters are added to, to 4 bits (nf4, pip install bitsandbytes)
    or 8 (int8). Exported weights hold the rounded values, since the adapters were trained beside them. Not with ZeRO-3,
    --lora.dora or --memory.compile_blocks. Default: the precision of the launch."""
    visibility: bool = False
    """Export a second output with the weights: the probabilities that each keypoint is present (labeled) and that it is
    visible. It is fitted on labeled people after the network is trained, which it does not change."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) in a frozen backbone, by peft.

    In a stage whose blocks are not frozen, a matrix W of a block is replaced by W + alpha / rank * B A. A, B, the norms
    and the head learn; all else is frozen. A stage whose blocks are frozen anyway (phase1) is unchanged.
    """

    rank: PositiveCount | None = None
    """Rank of the adapters: rows of A and columns of B. Default: no adapters."""
    alpha: Positive | None = None
    """The adapters' product is multiplied by alpha / rank. Default: 2 * rank."""
    dropout: BelowOne = 0.0
    """Probability of dropout on the input of each adapter."""
    target: Literal["attention", "all"] = "all"
    """Matrices with adapters: attention, its four projections; all, those of the MLP too."""
    dora: bool = False
    """Also learn the norm of each matrix's rows (DoRA, https://arxiv.org/abs/2402.09353). Not with ZeRO-3."""

    @property
    def scale(self) -> float:
        """The factor of the adapters' product."""
        return 2.0 if self.alpha is None or self.rank is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation: the network also learns the heatmaps of a fixed teacher, a trained and usually larger network."""

    teacher: str | None = None
    """The teacher: a weights folder, RUN_DIR/STAGE/weights, or a Hub repository of one, ORG/NAME[@REVISION]. Of any
    size and family, with the run's keypoints, input_hw and sigma. Every stage learns its heatmaps of labeled people, of
    all keypoints; in stage ssl its predictions are the pseudo-labels, in place of the mean teacher's. Default: none."""
    weight: Positive = 1.0
    """Weight of that loss of labeled people relative to the loss of the labels."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Options that trade time for memory; losses stay the same up to rounding. The memory plan sets their defaults."""

    micro_batch: PositiveCount | None = None
    """Labeled people in a forward and backward pass on a device. Default: the largest that is predicted to fit."""
    max_micro_batch: PositiveCount | None = None
    """The largest that this default may be. Smaller ones are accumulated to the same batch: less memory, 2 to 3 % more
    time where 16 people are enough to occupy a GPU."""
    checkpointed_blocks: Count | None = None
    """Number of transformer blocks, from the first on, with activation checkpointing: they keep only their input and
    recompute the rest in the backward pass. Default: as few as fit."""
    selective_blocks: Count | None = None
    """Number of blocks after these that keep their matrix products and attention too, and recompute norms and
    activations alone. Default: the plan chooses. Not with ZeRO-3, compiled blocks or offloaded activations."""
    # Half, since no prediction has been measured on a GPU. 0.8 would save 8 % of the time on cards of 16 GB and 13 % on
    # those of 24, and leave 3 GiB for workspaces and fragmentation that the plan does not know of.
    kept_share: Annotated[float, Range(0, 1)] = 0.5
    """Blocks keep what they could recompute while the predicted peak is below this share of a GPU's memory; the rest
    is a reserve for errors of the prediction."""
    head_chunk: PositiveCount | None = None
    """People whose heatmaps and loss are computed at a time. Default: as many as do not raise the peak memory."""
    offload_activations: bool = False
    """Keep block inputs in pinned host memory until the backward pass; the copies overlap with computation."""
    adam_8bit: bool = False
    """Keep AdamW's moments in 8 bits (pip install torchao): 2 bytes a parameter in place of 8, for a GPU without host
    memory to offload to. Not with DeepSpeed. Unlike the other options it changes the losses a little."""
    bf16_weights: bool = False
    """With --memory.adam_8bit and a launch in bf16: also keep the matrices of blocks and head and their gradients in
    bf16, updated with stochastic rounding: 6 bytes a parameter in place of 10. Changes the losses more than 8-bit
    moments alone. Not with adapters."""
    compile_blocks: bool = False
    """Compile the transformer blocks with torch.compile: faster steps after minutes at the start. Not with ZeRO-3."""
    fused_kernels: bool = False
    """Run the norms and the gated MLPs of Sapiens2 by fused kernels (pip install liger-kernel), which should take less
    memory and time than torch's own operations; untried. On GPUs, without ZeRO-3. Losses differ by rounding."""
    teacher: TeacherPlacement | None = None
    """Where the fp32 weights of the mean teacher are kept: device, a whole copy on each GPU; sharded, a shard on each
    GPU; host, a shard in the host memory of each process. The last two run a 16-bit copy. Default: the plan chooses."""
    force: bool = False
    """Run even if the plan predicts too little memory."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the learning rate of a stage."""

    lr: NonNegative = 5e-4
    """Peak learning rate of the head; a block's is lr * layer_decay ^ (its distance from the head)."""
    layer_decay: Annotated[float, Range(0, 1, open_low=True)] = 0.85
    """Layer-wise learning rate decay; 1 is the same rate for every layer."""
    weight_decay: NonNegative = 0.05
    """AdamW weight decay; not applied to biases, norms and the position embedding. Published: 0.1."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW betas."""
    clip_norm: NonNegative = 1.0
    """Maximum global norm of the gradients; 0 is no clipping."""
    warmup_steps: Count = 500
    """Steps of linear warm-up from 0.001 of the rate; at most a tenth of the stage."""
    schedule: Literal["constant", "multistep", "cosine", "linear"] = "multistep"
    """Learning rate schedule after the warm-up."""
    milestones: tuple[Fraction, ...] = (170 / 210, 200 / 210)
    """multistep: fractions of the stage at which the rate is divided by 10."""


MAX_CUTOUTS, CUTOUTS_PER_KEYPOINT = 5, 0.3  # by default


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The mean teacher of stage ssl (Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780)."""

    ema_decay: Fraction | None = None
    """Decay of the teacher's moving average in each step. Default: 1 - 50 / steps, within [0.99, 0.9998]."""
    threshold: Annotated[float, Range(-1, 1)] = 0.7
    """A keypoint is a pseudo-label if the teacher's normalized confidence is above this; -1 uses all of them."""
    temperature: Annotated[float, Range(1e-3, 10)] = 0.5
    """Sharpening T of both heatmaps: h^(1/T) / sum h^(1/T)."""
    weight: Annotated[float, Range(0, 1e6)] = 1.0
    """Weight of the unlabeled loss relative to the labeled one, after the ramp."""
    ramp: Fraction = 0.05
    """Fraction of the stage over which that weight rises from 0.007 to 1 of itself."""
    labeled_end: Annotated[float, Range(0, 0.9)] = 0.0
    """Fraction of the stage, at its end, whose steps have labeled people alone. With as many unlabeled as labeled
    people such a step takes half the time."""
    ramp_down: Fraction = 0.7
    """Fraction of the steps with unlabeled people, at their end, over which that weight, and its limit, fall to 0:
    pseudo-labels are less exact than labels, which have the last word. 0: they do not fall."""
    ratio: Annotated[float, Range(0, 64)] = 1.0
    """Unlabeled people for each labeled one in a batch, before labeled_end. A micro-batch has a whole number of them:
    with 0.5 it has an even number of labeled people. 0: labeled people alone; the teacher is still averaged."""
    loss: Literal["kl", "mse", "literal"] = "kl"
    """Loss between student and teacher: kl (of softmaxes of log-heatmaps), mse, or literal: softmaxes of raw heatmaps,
    with only the teacher's sharpened. literal makes a model worse (README) and is there for comparison."""
    target: Literal["rendered", "heatmap"] = "rendered"
    """Target of that loss: a heatmap rendered at the teacher's keypoints, or the teacher's heatmap warped into the
    student's view (with mse: PoseCons, https://arxiv.org/abs/2011.12498). literal always uses the heatmap."""
    confidence: Literal["keypoint", "raw", "calibrated"] = "keypoint"
    """Confidence that is compared with the threshold: the teacher's peak divided by the usual peak of a good keypoint
    of that kind (label noise makes it lower for a hip than for an eye), or the raw peak, or the probability of being
    right (calibrated): a logistic regression of the peak with an offset for each keypoint, fitted on validation people
    at the start and at each evaluation. literal always uses the raw peak."""
    cutout: Annotated[int, Range(0, 64)] | None = None
    """Number of squares of the mean color in the student's view, each centered on one of the teacher's keypoints.
    Default: 5, or 3 for 10 keypoints where these are fewer than 17: more would hide all of a body of four."""
    confidence_floor: Fraction = 0.2
    """Lower limit of the usual peak of a good keypoint, so that a kind of keypoint for which all of the teacher's peaks
    are low does not count as confident."""
    min_kept: Fraction = 0.2
    """Fraction of a person's keypoints that must be above the threshold for any of them to be learned from."""
    views: Annotated[int, Range(1, 4)] = 1
    """Views of each unlabeled person that the teacher predicts. With more than one the mean of their heatmaps is used,
    whose peaks are high only where the views agree. Each further view costs another forward of the teacher."""
    max_grad_ratio: NonNegative | None = 1.0
    """Upper limit of the unlabeled loss's gradient norm at the heatmaps, as a multiple of the labeled loss's. The
    weight is lowered to hold it, by the ratio that the steps before had. null: no limit."""
    learned: Annotated[float, Range(1, 1e6)] | None = None
    """Above 1: the limit is whole only once the labels are learned, which is where the student's mean error at
    pseudo-labels is at least this many times that at labels. It falls to a hundredth half-way to where both are equal
    (of 1.5: at 1.25), for until then the labels have more to teach. Labels that are off by chance are never learned:
    with them it may stay closed. Errors are those of the losses, of pseudo-labels that of `loss`. Not with
    max_grad_ratio null, and not with loss literal, whose errors have another unit. Default: 1.5 where there are fewer
    than 5 unlabeled people for each labeled one as the stage begins, else 1; and 1 with a fixed teacher, without a
    limit or a weight, and with loss literal."""
    on_alarm: Literal["stop", "warn"] = "stop"
    """If the teacher's predictions collapse or inflate: stop the stage and keep its last good weights, or only warn."""

    def num_cutouts(self, num_keypoints: int) -> int:
        """Number of squares for a skeleton."""
        few = max(1, round(CUTOUTS_PER_KEYPOINT * num_keypoints))
        return min(MAX_CUTOUTS, few) if self.cutout is None else self.cutout

    def unlabeled_steps(self, num_steps: int) -> int:
        """Number of steps of a stage, from the first on, that have unlabeled people."""
        # 0.7 * 10 is 7 but for its last bit.
        return num_steps - math.floor(self.labeled_end * num_steps + 1e-9) if self.ratio else 0

    @property
    def compares_maps(self) -> bool:
        """Whether the student's heatmap is compared with that of the teacher."""
        return self.target == "heatmap" or self.loss == "literal"

    @property
    def calibrates(self) -> bool:
        """Whether confidence is a probability that is fitted on labeled people."""
        return self.confidence == "calibrated" and self.loss != "literal"

    @property
    def raw_confidence(self) -> bool:
        return self.confidence == "raw" or self.loss == "literal"


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A training stage: length, batch size, trained layers, optimizer."""

    epochs: Positive = 100
    """Passes over the labeled people ..."""
    steps: PositiveCount | None = None
    """... or number of optimizer steps, which overrides epochs."""
    global_batch: PositiveCount = 32
    """Labeled people in an optimizer step, over all processes and accumulated micro-batches."""
    frozen: tuple[str, ...] = ()
    """Frozen layer groups: shell patterns over embeddings, block_0 ... block_N, norm, head."""
    loss_weight: Positive = 1.0
    """Factor on the heatmap loss. Published Sapiens2: 10."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the stage."""
    hand_over: Literal["best", "last"] = "last"
    """Weights that the stage exports. best: those of the highest validation AP among what it began with and every
    evaluation; of equal AP the higher mean OKS, else the earlier. last: those of its last step, or with a teacher the
    last healthy ones."""
    teacher: TeacherConfig | None = None
    """If set, the stage also learns from unlabeled people."""

    @property
    def ratio(self) -> float:
        """Unlabeled people for each labeled one, in the steps that have any."""
        return self.teacher.ratio if self.teacher else 0.0

    def num_unlabeled(self, num_labeled: int) -> int:
        """Unlabeled people that come with so many labeled ones, in the steps that have any: a whole number."""
        return round(num_labeled * self.ratio)

    def pairs_with(self, num_labeled: int) -> bool:
        """Whether a whole number of unlabeled people comes with so many labeled ones."""
        num = self.num_unlabeled(num_labeled)
        # A third as 0.33333 is meant to be one.
        return not self.ratio or (num > 0 and math.isclose(num_labeled * self.ratio, num, rel_tol=1e-4))

    @property
    def mean_ratio(self) -> float:
        """Unlabeled people for each labeled one, over all steps."""
        return self.ratio * (1 - self.teacher.labeled_end) if self.teacher else 0.0

    def unlabeled_steps(self, num_steps: int) -> int:
        """Number of steps, from the first on, that have unlabeled people."""
        return self.teacher.unlabeled_steps(num_steps) if self.teacher else 0


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of weights."""

    split: Literal["val", "train"] = "val"
    """People to evaluate on."""
    boxes: str = "gt"
    """Boxes of people: gt, the labeled ones (which gives higher numbers), or a detector's results in COCO's format: a
    JSON of image_id, category_id, bbox and score, relative to the current folder or to data.root."""
    images: str | None = None
    """eval.py: predict on these images in place of an evaluation: an image, a folder (with its subfolders) or a video.
    boxes is then gt (the whole image is one person), a JSON of boxes, detector, or a detector's folder or Hub name."""
    detector_class: str = "person"
    """eval.py --images with a detector: which of its classes to detect, several separated by commas (--detector.class
    mouse)."""
    min_box_score: Fraction = 0.5
    """eval.py --images: boxes with a score below this are left out."""
    flip: bool = True
    """Average the heatmaps of the crop and of its mirror image."""
    scales: tuple[Annotated[float, Range(0.1, 4)], ...] = (1.0,)
    """Average the heatmaps of the crop at these scales, as factors of its size."""
    ensemble: bool = False
    """eval.py: also average the heatmaps of all given weights."""
    compare: bool = False
    """eval.py: also evaluate without flip and without scales, to measure gain and cost of each."""
    batch_size: PositiveCount = 32
    """Crops in a forward pass; fewer if scales make them larger."""
    nms_threshold: Fraction = 0.9
    """OKS-NMS: predictions of one image whose OKS is above this are the same person."""
    score_threshold: Fraction = 0.2
    """Keypoints with a score below this are ignored in the person's score."""
    area: Literal["annotation", "box"] = "annotation"
    """Area of a person in OKS: that of the annotation, or 0.53 of the box, as CrowdPose and AI Challenger are
    evaluated. It is always the second if the JSON has no `area`; every table states which."""
    max_people: PositiveCount = 20
    """Number of predictions of an image that are evaluated, the best ones. COCO's number is 20."""
    backend: Literal["pycocotools", "faster_coco_eval"] = "pycocotools"
    """Library for AP and AR; faster_coco_eval gives the same numbers faster (pip install faster-coco-eval)."""
    save_predictions: str | None = None
    """JSON to write the predictions to, in COCO's results format; in training, those of the last evaluation."""
    csv: Literal["long", "deeplabcut"] | None = None
    """eval.py: also write the predictions as a CSV beside the JSON: long, a line for each keypoint of each person;
    deeplabcut, a line for each image or frame under DeepLabCut's header rows."""
    smooth: bool = False
    """eval.py --images with a video: smooth each person's keypoints over time (one-euro filter). Predictions are then
    less jittery, and lag behind fast movements by a fraction of a frame."""
    smooth_cutoff: Positive = 2.0
    """smooth: cutoff frequency in Hz of a keypoint that does not move; lower is smoother."""
    smooth_beta: NonNegative = 10.0
    """smooth: by how many Hz the cutoff frequency rises for a keypoint that moves by the size of its person (the square
    root of the box's area) in a second; higher follows fast movements more closely."""
    num_pictures: Count = 8
    """Number of people to draw with their predictions."""
    num_worst: Count = 8
    """Number of people of the lowest OKS to draw with their errors; in training too, at each evaluation."""
    html: str | None = None
    """eval.py: also write an HTML report to this file; auto: eval.html beside eval.json."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run."""

    recipe: str = "demo"
    """A recipe: its name in sapiens_accel/recipes, or a YAML file."""
    preset: Preset | None = None
    """Options that replace those of any recipe: fast (3 + 20 epochs, ssl 10), a first result in about a fifth of the
    time; limited_memory, for GPUs of 8 and 12 GB. Options on the command line replace them. On the command line alone:
    a run records the options, not the preset."""
    stage: str = ALL
    """Stages to train: phase1, phase2, ssl, several of them (phase1,phase2), or all, without ssl if no people are
    unlabeled. Each stage starts from the weights of the one before it."""
    output_dir: str = "runs/{recipe}"
    """Run directory. Training a stage again starts a new run: the whole old one is moved to OUTPUT_DIR.1, and the
    stages before that stage are carried over."""
    seed: Seed = 0
    """Seed of weights, batches and augmentation."""
    weights: str | None = None
    """Weights to start from: a file, a folder, a Hub repository, ORG/NAME[@REVISION][:PATH/IN/REPO], or random.
    Default: those of the stage before, else random ones (for stage ssl these must be asked for)."""
    max_steps: PositiveCount | None = None
    """Stop each stage after this many steps of its schedule."""
    log_every: PositiveCount = 20
    """Steps between log lines."""
    save_every: PositiveCount | None = None
    """Steps between checkpoints. Default: at the end of each epoch and at least every half hour; if epochs are short,
    less often, so that saving takes at most a twentieth of the time."""
    keep_checkpoints: PositiveCount = 2
    """Number of last checkpoints to keep for each stage. The best evaluated one is kept too."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the exported weights of a stage; checkpoints are always fp32."""
    eval_every: PositiveCount | None = None
    """Steps between evaluations. Default: at the end of each stage."""
    resume_from_checkpoint: str | None = None
    """latest, or a checkpoint folder. Another number of processes restores everything (not with ZeRO-3); another ZeRO
    stage or precision restores weights, step and teacher, without the optimizer's state."""
    trust_checkpoint: bool = False
    """Unpickle any class in the checkpoint, so that a checkpoint from somebody else could run any code. Without it only
    tensors, numbers and a few classes of DeepSpeed. Needed for checkpoints of other DeepSpeed versions."""
    dry_run: bool = False
    """Build and check everything, take one step of the first stage, and write nothing."""
    report_to: str = TENSORBOARD
    """Trackers of scalars and images, beside metrics.jsonl: tensorboard, wandb, trackio, mlflow, comet_ml, several
    (tensorboard,wandb) or none. What each of them needs (an account, a server, offline mode) its own variables say."""
    push_to_hub: bool = False
    """Upload weights to the Hugging Face Hub in the background, with a model card, the training curve and an image of
    predictions on validation people."""
    hub_model_id: str | None = None
    """Repository to upload to, ORG/NAME. It is created if it does not exist."""
    hub_strategy: Literal["end", "every_save", "best", "all"] = "end"
    """What to upload: end, the final weights of the last stage; every_save, also those of every checkpoint; best, those
    with the best evaluation; all, the final weights of every stage in its own folder, the last ones at the root too."""
    hub_private: bool = False
    """Make the repository private."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    phase1: StageConfig = field(
        default_factory=lambda: StageConfig(epochs=10, frozen=("embeddings", "block_*", "norm"))
    )
    phase2: StageConfig = field(default_factory=StageConfig)
    ssl: StageConfig = field(
        default_factory=lambda: StageConfig(
            epochs=50, hand_over="best", teacher=TeacherConfig(), optim=OptimConfig(lr=1e-4, schedule="cosine")
        )
    )
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def stages(self) -> tuple[StageName, ...]:
        return STAGES if self.stage == ALL else cast(tuple[StageName, ...], tuple(self.stage.split(",")))

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers that `report_to` names."""
        return () if self.report_to == "none" else tuple(self.report_to.split(","))

    def get_stage(self, stage: StageName) -> StageConfig:
        return getattr(self, stage)

    def without_mirroring(self) -> "Config":
        """The same without mirrored images and flip test: for keypoints whose left and right are not known."""
        return replace(self, augment=replace(self.augment, flip_p=0.0), eval=replace(self.eval, flip=False))
