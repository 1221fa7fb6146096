"""The model card of a run: results and how they were measured, training settings, origin and license.

Everything is read from the run directory; no result is stated that eval.json or metrics.jsonl does not hold.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, TypeGuard

import cv2
import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from jaxtyping import UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy import ndarray as Array

import sapiens_accel
from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import ALL, STAGES, EvalConfig
from sapiens_accel.errors import UserError, read_tree
from sapiens_accel.evaluation import evaluate, tables
from sapiens_accel.evaluation.coco_metrics import KEYPOINT_METRICS, METRICS
from sapiens_accel.evaluation.paired import MIN_ERRORS
from sapiens_accel.hub.download import parse_reference
from sapiens_accel.models import adapters, export
from sapiens_accel.models.checkpoint_formats import read_config
from sapiens_accel.pose import draw
from sapiens_accel.publish import license as origin
from sapiens_accel.publish.license import SAPIENS2, Origin
from sapiens_accel.publish.markdown import literal
from sapiens_accel.visibility import output as visibility
from sapiens_accel.visibility.output import VisibilityOutput

LICENSE_NAME, CURVE_NAME, IMAGE_NAME = "LICENSE.md", "training.png", "predictions.jpg"
TEMPLATE = "card.md.jinja"
DRAWN = "drawn people"
STAGE_COLORS: dict[str, tuple[int, int, int]] = dict(
    zip(STAGES, cycle([(120, 120, 120), (90, 140, 200), (200, 90, 80), (90, 170, 110)]), strict=False)
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 900, 220, 80, 24, 36, 44
FONT = cv2.FONT_HERSHEY_SIMPLEX
GRAY, INK = (225, 225, 225), (40, 40, 40)
Points = list[tuple[float, float]]
LARGEST_NUMBER = 2**53  # in a card; beyond it a float does not hold every step


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The content of a run directory about the weights of a stage, read at one moment.

    Attributes:
        run: the tree of config.yaml.
        network: our part of the weights' config.json.
        scores: by stage, METRICS (0..1) and how they were measured; only for evaluated weights.
        lines: the lines of metrics.jsonl.
        image: JPEG of predictions.
        num_labeled: number of labeled training people.
        has_code: there are Python files (of ours) beside the weights.
        adapter: rank of the adapters that the stage has trained, which are beside the weights; None without any.
        visibility: the second output beside the weights; None without any.
    """

    run: Mapping[str, Any]
    stage: str
    network: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Any]]
    lines: Sequence[Mapping[str, Any]]
    image: bytes | None
    num_labeled: int | None
    has_code: bool
    origin: Origin
    adapter: int | None = None
    visibility: VisibilityOutput | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this run has trained, up to the stage of these weights."""
        return _trained(self.run, self.stage)

    @property
    def is_drawn(self) -> bool:
        return self.run["data"].get("root") is None


def collect(run_folder: Path, stage: str, step: int | None = None, folder: Path | None = None) -> Facts:
    """Read the facts from a run directory.

    Args:
        folder: the weights. Default: RUN_DIR/STAGE/weights.
        step: training step of the weights; scores of other steps are ignored. Default: the last evaluation.

    Raises:
        UserError: it is no run directory, or has no weights of this stage; a file in it is damaged.
    """
    file, weights = run_folder / "config.yaml", (folder or run_folder / stage / "weights") / "config.json"
    if not file.is_file():
        raise UserError(f"{run_folder}: no config.yaml in it (expected a run directory of train.py)")
    if not weights.is_file():
        raise UserError(f"{run_folder}: no {stage}/weights in it: this stage was not trained there")
    run = asdict(config.load([], prog="the model card", base=file))
    lines = read_lines(run_folder)
    steps = {name: step if name == stage else None for name in _trained(run, stage)}
    scores = {name: _score(run_folder / name, run, lines, steps[name]) for name in steps}
    image, labeled = run_folder / "pictures" / f"{stage}_predictions.jpg", run_folder / "labelled_ann_ids.json"
    is_current = image.is_file() and _read_evaluation(run_folder / stage, step) is not None
    return Facts(
        run=run,
        stage=stage,
        network=read_config(weights)[0],
        scores={name: score for name, score in scores.items() if score},
        lines=lines,
        image=image.read_bytes() if is_current else None,
        num_labeled=_num_labeled(labeled) if labeled.is_file() else None,
        has_code=any(weights.parent.glob("*.py")),
        origin=origin.find_origin(run, stage),
        adapter=_rank(weights.parent / adapters.FOLDER / adapters.CONFIG),
        visibility=visibility.read(weights.parent),
    )


def _rank(file: Path) -> int | None:
    """The rank that peft's description of adapters states; None: there is no such file.

    Raises:
        UserError: the file states none.
    """
    if not file.is_file():
        return None
    rank = read_tree(file, json.loads, "JSON").get("r")
    if type(rank) is not int or not 0 < rank < LARGEST_NUMBER:
        raise UserError(f"{file}: r: expected the rank of the adapters, found {rank!r}. Copy the folder again")
    return rank


def _trained(run: Mapping[str, Any], stage: str) -> tuple[str, ...]:
    return STAGES[: STAGES.index(stage) + 1] if run.get("stage") == "all" else (stage,)  # pyright: ignore


def _read_evaluation(stage_folder: Path, step: int | None) -> dict[str, Any] | None:
    """The content of eval.json; None if there is none or it is of another step.

    Raises:
        UserError: the file holds no evaluation.
    """
    file = stage_folder / "eval.json"
    if not file.is_file():
        return None
    tree = read_tree(file, json.loads, "JSON")
    kinds = {"split": str, "boxes": str, "flip": bool}
    if not all(isinstance(tree.get(name), kind) for name, kind in kinds.items()):
        raise UserError(
            f"{file}: not an evaluation (expected {', '.join(kinds)} in it). Move it away, or evaluate again"
        )
    if tree["split"] not in ("train", "val"):
        raise UserError(f"{file}: split: expected train or val, found {tree['split']!r}")
    return tree if step in (None, tree.get("weights_step", tree.get("step"))) else None


def _num_labeled(file: Path) -> int:
    ids = read_tree(file, json.loads, "JSON").get("ann_ids", [])
    if not isinstance(ids, list):
        raise UserError(f"{file}: ann_ids: expected a list, found {type(ids).__name__}")
    return len(ids)


def _score(
    stage_folder: Path, run: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], step: int | None
) -> dict[str, Any] | None:
    if evaluation := _read_evaluation(stage_folder, step):
        return evaluation
    at_step = [line for line in lines if line.get("stage") == stage_folder.name and line.get("step") == step]
    evaluated = [line for line in at_step if "AP" in line]
    if not evaluated:
        return None
    settings = evaluate.protocol_settings(EvalConfig(**run["eval"]), run["data"]["boxes"])
    # The option does not say which area was taken: a JSON without 'area' has none.
    return {**evaluated[-1], **settings, "area": None}


def read_lines(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl.

    Raises:
        UserError: a line has no stage or step.
    """
    file, lines = run_folder / "metrics.jsonl", []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the run was killed while it wrote this line
        entry = entry if isinstance(entry, dict) else {}
        step = entry.get("step")
        if not isinstance(entry.get("stage"), str) or type(step) is not int or abs(step) > LARGEST_NUMBER:
            raise UserError(f"{file}: line {number}: no stage or step (expected both). Remove the line")
        lines.append(entry)
    return lines


def write(folder: Path, facts: Facts, repo_id: str, license: Path | None) -> None:
    """Write README.md, its images and a copy of the license into a folder.

    Args:
        license: file with the text of a license that must be passed on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if license:
        (folder / LICENSE_NAME).write_bytes(license.read_bytes())
    if facts.image:
        (folder / IMAGE_NAME).write_bytes(facts.image)
    curve = draw_curve(facts.lines, facts.stages)
    if curve is not None:
        draw.save_image(curve, folder / CURVE_NAME)
    (folder / "README.md").write_text(
        render(facts, repo_id, has_license=license is not None, has_curve=curve is not None)
    )


def render(facts: Facts, repo_id: str, *, has_license: bool, has_curve: bool) -> str:
    """The card as Markdown with YAML metadata, by card.md.jinja. Text from files is escaped in it."""
    loader = PackageLoader("sapiens_accel.publish", package_path="")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["literal"] = literal
    run, keypoints = facts.run, facts.network.get("keypoints") or []
    own_settings = run.get("stage") == ALL or facts.stage in str(run.get("stage")).split(",")
    license_link = f"[{LICENSE_NAME}]({LICENSE_NAME})" if has_license else f"<{SAPIENS2.metadata['license_link']}>"
    return environment.get_template(TEMPLATE).render(
        facts=facts,
        run=run,
        origin=facts.origin,
        metadata=metadata(facts, repo_id, has_license=has_license).to_yaml(),
        name=repo_id.split("/")[-1],
        version=sapiens_accel.__version__,
        drawn=DRAWN,
        num_keypoints=facts.network.get("num_keypoints", len(keypoints)),
        input_hw=facts.network.get("input_hw") or run["data"]["input_hw"],
        keypoints=keypoints,
        license_link=license_link if facts.origin.license is SAPIENS2 else None,
        has_license=has_license,
        snippet=export.snippet(repo_id, run["model"]["name"].split("_")[0]).strip(),
        results=_results(facts),
        pixels=tables.PIXELS,
        people_by_split={score["split"]: _people(facts, score["split"]) for score in facts.scores.values()},
        from_labeled_boxes=any(score["boxes"] == "ground truth" for score in facts.scores.values()),
        by_keypoint=_by_keypoint(facts, keypoints),
        image_name=IMAGE_NAME,
        training_people=_people(facts, "train"),
        teacher=run[facts.stage].get("teacher"),
        distilled_from=_name_teacher(run),
        handed_over=_handed_over(facts),
        settings=_settings(facts) if own_settings else None,
        has_curve=has_curve,
        curve_name=CURVE_NAME,
    )


def _name_teacher(run: Mapping[str, Any]) -> str | None:
    """The fixed teacher by its repository on the Hub; a local path is not published."""
    reference = run["distill"]["teacher"]
    if not reference:
        return None
    wanted = None if Path(reference).exists() else parse_reference(reference)
    return wanted.repo if wanted else "a local network"


def metadata(facts: Facts, repo_id: str, *, has_license: bool) -> ModelCardData:
    """The metadata of the card, by which the Hub sorts and filters."""
    license = dict(facts.origin.license.metadata)
    if has_license:
        license["license_link"] = LICENSE_NAME
    score = facts.scores.get(facts.stage)
    results = [
        EvalResult(
            task_type="keypoint-detection",
            task_name="2-D human pose",
            dataset_type="drawn-people" if facts.is_drawn else "coco-keypoints-json",
            dataset_name=_people(facts, score["split"]),
            dataset_split=score["split"],
            metric_type=name,
            metric_name=f"COCO keypoint {name} x 100 ({_describe_protocol(score)})",
            metric_value=round(100 * score[name], 1),
        )
        for name in METRICS
        if score and _measured(score, name)
    ]
    return ModelCardData(
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
        base_model=facts.origin.base,
        library_name="transformers",
        pipeline_tag="keypoint-detection",
        tags=[origin.OUR_TAG, "pose-estimation", facts.run["model"]["name"].split("_")[0]],
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
    )


def _handed_over(facts: Facts) -> str:
    """Which step the weights of a stage with a choice are of, and what it gained by them; empty if that is unknown."""
    score = facts.scores.get(facts.stage, {})
    step, last, gain, stderr = (score.get(name) for name in ("weights_step", "step", "oks_gain", "oks_gain_stderr"))
    if "hand_over" not in score or not (isinstance(step, int) and isinstance(last, int)):
        return ""
    if step == 0:
        return f" No evaluation of its {last} steps was better than what the stage began with, which these weights are."
    text = f" They are of step {step} of {last}."
    if not (_is_finite(gain) and _is_finite(stderr)):
        return text
    is_known = "" if abs(gain) > MIN_ERRORS * stderr else ": within 2 standard errors, not known to be better"
    return f"{text} Mean OKS is {gain:+.4f} (standard error {stderr:.4f}) against what the stage began with{is_known}."


def _results(facts: Facts) -> list[list[str]]:
    """The rows of the table of results: metrics of each stage, whole and by part, and how they were measured."""
    rows = []
    others = [name for name in KEYPOINT_METRICS if any(_measured(score, name) for score in facts.scores.values())]
    columns = [*METRICS, *others]
    for stage, score in facts.scores.items():
        boxes = score["boxes"] + tables.describe_people_boxes(score.get("people_boxes"))
        protocol = [
            score["split"],
            literal(boxes),
            "yes" if score["flip"] else "no",
            literal(_area(score)),
            _counted(score),
        ]
        for part in ("", *tables.list_parts(score)):
            cells = [_cell(score, f"{part}/{name}" if part else name) for name in columns]
            rows.append([f"`{stage}` {literal(part)}".rstrip(), *protocol, *cells])
    head = ["weights", "people", "boxes", "flip test", "area", "people an image"]
    return [[*head, *columns], *rows] if rows else []


def _area(score: Mapping[str, Any]) -> str:
    return str(score.get("area_used") or score.get("area") or "not recorded")


def _counted(score: Mapping[str, Any]) -> str:
    number = score.get("max_people", EvalConfig.max_people)
    return str(number) if isinstance(number, int) else "not recorded"


def _cell(score: Mapping[str, Any], name: str) -> str:
    return tables.format_metric(score[name], name.rsplit("/", 1)[-1]) if _measured(score, name) else "-"


def _by_keypoint(facts: Facts, keypoints: Sequence[str]) -> list[list[str]]:
    """The rows of metrics by keypoint, if the evaluation has any: `joints` of eval.json, NAME/KEYPOINT, or, in earlier
    ones, NAME with a value for each."""
    by_name: dict[str, dict[str, Any]] = {}
    for name, value in facts.scores.get(facts.stage, {}).items():
        if name == "joints":
            for keypoint, values in _mapping(_mapping(value).get("keypoints")).items():
                for metric, number in _mapping(values).items():
                    by_name.setdefault(metric, {})[keypoint] = number
        elif isinstance(value, Mapping):
            by_name.setdefault(name, {}).update(value)
        elif "/" in name:
            metric, keypoint = name.split("/", 1)
            by_name.setdefault(metric, {})[keypoint] = value
    names = [name for name, values in by_name.items() if name != "people" and any(k in values for k in keypoints)]
    rows = [["keypoint", *map(literal, names)]]
    for keypoint in keypoints:
        values = [by_name[name].get(keypoint) for name in names]
        rows.append([literal(keypoint), *(f"{v:.3f}" if _is_finite(v) else "-" for v in values)])
    return rows if names else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _settings(facts: Facts) -> list[list[str]]:
    """The rows of the table of training settings, with a column for each stage."""
    rows = [["", *(f"`{stage}`" for stage in facts.stages)]]
    return rows + [[name, *(_setting(facts, stage, name) for stage in facts.stages)] for name in _SETTINGS]


_SETTINGS = {
    "steps": lambda stage, last: str(last),
    "planned": lambda stage, last: f"{stage['steps']} steps" if stage.get("steps") else f"{stage['epochs']:g} epochs",
    "global batch": lambda stage, last: str(stage["global_batch"]),
    "learning rate": lambda stage, last: f"{stage['optim']['lr']:g}, {stage['optim']['schedule']}",
    "layer decay": lambda stage, last: f"{stage['optim']['layer_decay']:g}",
    "weight decay": lambda stage, last: f"{stage['optim']['weight_decay']:g}",
    "frozen": lambda stage, last: ", ".join(f"`{name}`" for name in stage["frozen"]) or "nothing",
}
_ADAPTED = "all but adapters (rank {rank}), norms and head"


def _setting(facts: Facts, stage: str, name: str) -> str:
    last = max((line["step"] for line in facts.lines if line.get("stage") == stage and "step" in line), default=0)
    tree, lora = facts.run[stage], facts.run.get("lora") or {}
    if name == "frozen" and lora.get("rank") and "block_*" not in tree["frozen"]:
        more = "".join(f", `{group}`" for group in tree["frozen"])
        base = (facts.run.get("model") or {}).get("base_dtype")
        return _ADAPTED.format(rank=lora["rank"]) + (f"; matrices of the blocks in {base}" if base else "") + more
    return _SETTINGS[name](tree, last)


def _people(facts: Facts, split: str) -> str:
    # COCO's file names are the defaults, so a file of such a name may hold other people: name the file, not COCO.
    data = facts.run["data"]
    if facts.is_drawn:
        return f"{data['synthetic'][f'num_{split}']} {DRAWN}"
    return Path(data[f"{split}_annotations"]).name


def _describe_protocol(score: Mapping[str, Any]) -> str:
    flip = "flip test" if score["flip"] else "no flip test"
    boxes = f"{score['boxes']} boxes{tables.describe_people_boxes(score.get('people_boxes'))}"
    return f"{boxes}, {flip}, area: {_area(score)}, {_counted(score)} people an image"


def _measured(score: Mapping[str, Any], name: str) -> bool:
    # pycocotools returns -1 where there are no people to measure.
    value = score.get(name)
    return _is_finite(value) and value >= 0


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER


# ---- The training curve: loss above, AP below, stage after stage


def draw_curve(lines: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> UInt8[Array, "h w 3"] | None:
    """Draw the loss (logarithmic) and AP x 100 over the steps of consecutive stages. None: there is no loss to draw.

    Args:
        lines: the lines of metrics.jsonl, in any order of stages.
    """
    losses, scores, first = {}, {}, 0.0
    for stage in stages:
        of_stage = [line for line in lines if line.get("stage") == stage and "step" in line]
        losses[stage] = [
            (first + line["step"], math.log10(line["loss"]))
            for line in of_stage
            if _is_finite(line.get("loss")) and line["loss"] > 0
        ]
        scores[stage] = [
            (first + line["step"], 100 * max(line["AP"], 0.0)) for line in of_stage if _is_finite(line.get("AP"))
        ]
        first += max((line["step"] for line in of_stage), default=0)
    if not any(losses.values()):
        return None
    canvas = np.full((2 * (TOP + HEIGHT) + GAP + 20, WIDTH, 3), 255, np.uint8)
    values = [value for points in losses.values() for _, value in points]
    low, high = min(values), max(max(values), min(values) + 0.1)
    ticks = [low + (high - low) * i / 4 for i in range(5)]
    _panel(canvas, TOP, "loss", [(tick, f"{10**tick:.2g}") for tick in ticks], first, losses)
    most = 10.0 * math.ceil(max([value for points in scores.values() for _, value in points], default=0.0) / 10 + 1e-9)
    ticks = [(most * i / 5, f"{most * i / 5:g}") for i in range(6)]
    _panel(canvas, TOP + HEIGHT + GAP + TOP, "AP x 100", ticks, first, scores)
    for index, stage in enumerate(stage for stage in reversed(stages) if losses[stage]):
        _write_text(canvas, stage, (WIDTH - RIGHT - 90 * (index + 1), 22), STAGE_COLORS[stage])
    return canvas


def _panel(
    canvas: UInt8[Array, "h w 3"],
    top: int,
    title: str,
    ticks: Sequence[tuple[float, str]],
    last: float,
    curves: Mapping[str, Points],
) -> None:
    low, high = ticks[0][0], ticks[-1][0]

    def position(step: float, value: float) -> tuple[int, int]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)
        return round(x), round(top + HEIGHT * (1 - (value - low) / (high - low)))

    for value, label in ticks:
        cv2.line(canvas, position(0, value), position(last, value), GRAY, 1)
        _write_text(canvas, label, (14, position(0, value)[1] + 5))
    _write_text(canvas, title, (LEFT, top - 12))
    for step in (0, last / 2, last):
        _write_text(canvas, f"{step:.0f}", (position(step, low)[0] - 12, top + HEIGHT + 20))
    for stage, points in curves.items():
        where = [position(*point) for point in points]
        for a, b in pairwise(where):
            cv2.line(canvas, a, b, STAGE_COLORS[stage], 2, cv2.LINE_AA)
        if title != "loss" or len(where) == 1:  # evaluations are few
            for point in where:
                cv2.circle(canvas, point, 4, STAGE_COLORS[stage], -1, cv2.LINE_AA)


def _write_text(canvas: np.ndarray, text: str, at: tuple[int, int], color: tuple[int, int, int] = INK) -> None:
    cv2.putText(canvas, text, at, FONT, 0.45, color, 1, cv2.LINE_AA)
