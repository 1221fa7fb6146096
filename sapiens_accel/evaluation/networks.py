"""What eval.py is asked to evaluate: a run's stages, weights of any layout, or a name on the Hub, as networks."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from sapiens_accel.config.schema import STAGES, Config, DataConfig, EvalConfig
from sapiens_accel.data.keypoint_mapping import describe_keypoints
from sapiens_accel.errors import UserError, read_tree
from sapiens_accel.evaluation.error_analysis import Reliability, parse_reliability
from sapiens_accel.evaluation.predict import PoseNetwork
from sapiens_accel.hub import download
from sapiens_accel.models import checkpoint_formats as published
from sapiens_accel.models import load as weights
from sapiens_accel.models.checkpoint_formats import FILE, SKELETON_FILE, Weights
from sapiens_accel.models.sapiens import SIZES, SapiensPose
from sapiens_accel.pose import infer_skeleton
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.infer_skeleton import Category, short
from sapiens_accel.pose.person_boxes import PeopleSizes
from sapiens_accel.pose.skeleton import COCO17, PUBLISHED, Skeleton, skeleton_from_tree, words
from sapiens_accel.runtime import distributed
from sapiens_accel.runtime.files import read_json
from sapiens_accel.visibility import output as visibility

PUBLISHED_HW = (1024, 768)  # of Meta's pose networks, whose files do not name it

USUAL_NAMES = ("weights", "model", "pytorch_model")  # which say nothing of the network


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights to evaluate, by what they are called in tables, and where results of them belong."""

    name: str
    weights: Path
    folder: Path


def resolve_path(reference: str) -> Path:
    """A path as it is, or a Hub repository's weights, downloaded.

    Raises:
        UserError: neither.
    """
    if Path(reference).exists():
        return Path(reference)
    try:
        return Path(download.fetch(reference))
    except UserError as error:
        on_hub = str(error).removeprefix(f"--weights {reference}: ")
        raise UserError(f"{reference}: no such run directory or weights here. On the Hub: {on_hub}") from None


def find_run_config(path: Path) -> Path | None:
    """The config.yaml of the run that a folder is, or that weights were trained in."""
    folders = [path, *path.resolve().parents[:3]]
    return next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)


def drop_outputs(run: Config, argv: Sequence[str]) -> tuple[Config, list[str]]:
    """The options without the files to write or to predict on that a run's config.yaml names, and which those were.

    It may be somebody else's, and would have any file of this user overwritten. Those of the command line stay.
    """
    given = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    files = ("save_predictions", "csv", "html", "images")
    dropped = [name for name in files if getattr(run.eval, name) is not None and f"eval.{name}" not in given]
    return replace(run, eval=replace(run.eval, **dict.fromkeys(dropped))), [f"--eval.{name}" for name in dropped]


def list_weights(path: Path, run: Config, output: Path | None) -> list[Candidate]:
    """A run folder's stages that have weights, or the weights themselves.

    Args:
        output: where results belong; default: the run folder, evaluations/NAME for what is none.

    Raises:
        UserError: a run folder without weights of the stages that are asked for.
    """
    if not (path / "config.yaml").is_file():
        name = _name_of(path)
        return [Candidate(name=name, weights=path, folder=output or Path("evaluations") / name)]
    stages = [stage for stage in run.stages if (path / stage / "weights" / FILE).is_file()]
    if not stages:
        trained = [stage for stage in STAGES if (path / stage / "weights" / FILE).is_file()]
        of_others = f"; it has those of {', '.join(trained)}" if trained else ""
        raise UserError(f"{path}: no weights of {run.stage} in it (expected STAGE/weights/{FILE}){of_others}")
    return [Candidate(name=stage, weights=path / stage / "weights", folder=output or path) for stage in stages]


def read_summaries(candidates: Sequence[Candidate]) -> list[str]:
    """What training said of the stages at their end (stage ssl: what was gained, how right its pseudo-labels were)."""
    records = [(choose_name([one], candidates), read_json(one.weights.parent / "eval.json")) for one in candidates]
    summaries = [(name, (record or {}).get("summary")) for name, record in records]
    return [f"{name}, at the end of its training: {text}" for name, text in summaries if isinstance(text, str)]


def read_pseudo_labels(candidates: Sequence[Candidate]) -> dict[str, Reliability]:
    """How right the pseudo-labels of each stage ssl were at its end, as its eval.json has it."""
    records = {choose_name([one], candidates): read_json(one.weights.parent / "eval.json") for one in candidates}
    found = {name: parse_reliability((record or {}).get("pseudo_labels")) for name, record in records.items()}
    return {name: bins for name, bins in found.items() if bins}


def _name_of(path: Path) -> str:
    """What weights are called: RUN_STAGE for those of a run, as each run has a folder STAGE/weights; else by their file
    or folder, or by the folder around it where its own name is one that tools write."""
    path, config = path.resolve(), find_run_config(path)
    if config is not None:
        parts = [config.resolve().parent.name, *path.relative_to(config.resolve().parent).with_suffix("").parts]
    else:
        parts = [path.stem if path.is_file() else path.name]
        if parts[-1] in USUAL_NAMES:
            parts = [path.parent.name, *parts] if path.parent.name not in USUAL_NAMES else [path.parent.parent.name]
    return "_".join(part for part in parts if part not in USUAL_NAMES) or path.stem


def choose_name(group: Sequence[Candidate], candidates: Sequence[Candidate]) -> str:
    """What a table calls one of several, or more of them together; those of one name are numbered."""
    if len(group) > 1:
        return "ensemble"
    name = group[0].name
    if sum(one.name == name for one in candidates) == 1:
        return name
    number = [one.weights for one in candidates if one.name == name].index(group[0].weights) + 1
    return f"{name} ({number})"


def choose_skeleton(
    candidates: Sequence[Candidate], annotations: Path, category: str | None, cache: Path
) -> tuple[Skeleton, str]:
    """The most keypoints that the annotations have and all of the weights know, and a line on those left out.

    Their meaning (sigmas, mirror order, edges) is what lies beside the first weights, else what is built in.

    Args:
        category, cache: as in `keypoint_mapping.describe_keypoints`.

    Raises:
        UserError: weights of other keypoints, or without any.
    """
    there = describe_keypoints(annotations, category, cache)
    first, _ = _keypoints_of(candidates[0])
    there = there.called(first) if first else there
    options = _options(there)
    for candidate in candidates:
        names, count = _keypoints_of(candidate)
        if names:
            known = set(map(words, names))
            options = [[name for name in option if words(name) in known] for option in options]
        options = [option for option in options if option and (names or len(option) == count)]
        if not options:
            theirs = f"{count} keypoints" + (f" ({short(names, 3)})" if names else " of unknown names")
            raise UserError(
                f"{candidate.weights}: weights of another skeleton: {theirs}; {annotations} has {there.count or 'no'} "
                f"keypoints{f' ({short(there.names, 3)})' if there.names else ''}; expected names in common"
            )
    best = max(options, key=len)
    left_out = f"{len(best)} of its {there.count} keypoints are known to all of the weights"
    return _meaning(candidates[0], there, best), f"{annotations}: {left_out}" if len(best) < (there.count or 0) else ""


def infer_weights_skeleton(candidates: Sequence[Candidate]) -> Skeleton:
    """The keypoints of the weights themselves, where no labeled people are there to say which are wanted.

    That of skeleton.json beside the first weights; else the largest published one that all of them know.

    Raises:
        UserError: weights of other keypoints, or without any.
    """
    skeletons = [*filter(None, [_stored(candidates[0])]), *reversed(PUBLISHED.values())]
    for candidate in candidates:
        names, count = _keypoints_of(candidate)
        known = [one for one in skeletons if (set(one.names) <= set(names) if names else one.num_keypoints == count)]
        if not known:
            theirs = f"{count} keypoints" + (f" ({', '.join(names[:3])}, ...)" if names else " of unknown names")
            raise UserError(
                f"{candidate.weights}: weights of unknown keypoints: {theirs}; expected those of "
                f"{' or '.join(map(str, PUBLISHED))} keypoints, or a skeleton.json beside the weights"
            )
        skeletons = known
    return skeletons[0]


def adopt_image_bits(candidates: Sequence[Candidate], run: Config) -> tuple[Config, str]:
    """The run with the `data.image_bits` of the weights' training, unless it has its own; and a line about it.

    With other bits the images of a microscope are 16 times darker or brighter than those that the weights know.

    Raises:
        UserError: as `_stored`; there are no such weights.
    """
    stored = {one.weights: skeleton.image_bits for one in candidates if (skeleton := _stored(one))}
    trained = {bits for bits in stored.values() if bits is not None}
    if not trained:
        return run, ""
    bits, listed = next(iter(trained)), " and ".join(map(str, sorted(trained)))
    if run.data.image_bits is not None:
        differs = trained != {run.data.image_bits}
        warning = f"warning: --data.image_bits {run.data.image_bits}: the weights were trained with {listed}"
        return run, warning if differs else ""
    line = f"16-bit images are read with --data.image_bits {bits}, as in the training of the weights"
    if len(trained) > 1:
        line = f"warning: {line}; others were trained with other bits ({listed})"
    return replace(run, data=replace(run.data, image_bits=bits)), line


def adopt_box_padding(candidates: Sequence[Candidate], run: Config, *, given: bool) -> tuple[Config, str]:
    """The run with the `data.box_padding` of the weights' training, unless it has its own; and a line about it.

    With other room around them, people have another size in the network's input than those that it was trained on.

    Args:
        given: it is on the command line; one that is not the default is the run's own too.

    Raises:
        UserError: as `_stored`; there are no such weights.
    """
    own = run.data.box_padding
    stored = [skeleton.box_padding for one in candidates if (skeleton := _stored(one))]
    trained = sorted({padding for padding in stored if padding is not None})
    if not set(trained) - {own}:
        return run, ""
    if given or own != DataConfig.box_padding or len(trained) > 1:
        listed = " and ".join(f"{padding:g}" for padding in trained)
        return run, f"warning: --data.box_padding {own:g}: the weights were trained with {listed}"
    line = f"boxes have --data.box_padding {trained[0]:g}, as in the training of the weights"
    return replace(run, data=replace(run.data, box_padding=trained[0])), line


def _options(there: Category) -> list[list[str]]:
    """The lists of keypoints that a JSON can be read as: COCO-WholeBody's 133 or their 17."""
    known = PUBLISHED.get(there.count or 0)
    names = there.names or (known.names if known else ())
    return [list(names), list(COCO17.names)] if there.whole else [list(names)]


def _meaning(candidate: Candidate, there: Category, names: Sequence[str]) -> Skeleton:
    """The skeleton of these keypoints: from beside the weights, else what their names imply."""
    theirs, _ = _keypoints_of(candidate)
    stored = _stored(candidate)
    if stored is not None and stored.names == theirs:
        return stored.select(names)
    return infer_skeleton.infer_skeleton([replace(there, names=tuple(names))], None)[0]


def _stored(candidate: Candidate) -> Skeleton | None:
    """What `export.export` wrote beside the weights.

    Raises:
        UserError: it is no skeleton.
    """
    file = published.find(str(candidate.weights)).parent / SKELETON_FILE
    if not file.is_file():
        return None
    try:
        return skeleton_from_tree(read_tree(file, json.loads, "JSON"))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{file}: not the skeleton of weights: {reason}; mend it or move the weights away from it"
        ) from None


def read_people_sizes(weights: Path) -> PeopleSizes | None:
    """How large people were in the images that weights were trained with; None where nothing beside them says it.

    Raises:
        UserError: as `published.find`; what is beside them is no skeleton.
    """
    stored = _stored(Candidate(name=weights.name, weights=weights, folder=weights))
    return stored.people if stored else None


def _keypoints_of(candidate: Candidate) -> tuple[tuple[str, ...] | None, int]:
    published_weights = published.read(str(candidate.weights))
    count = published.num_keypoints(published_weights.state)
    if not count:
        raise UserError(f"{candidate.weights}: no heatmap head in it; expected weights of a pose network")
    return published_weights.names, count


def build_network(
    candidate: Candidate, run: Config, skeleton: Skeleton, device: torch.device, autocast: torch.dtype | None = None
) -> tuple[PoseNetwork, str]:
    """A candidate's network on the device, and what became of every tensor of its file.

    Args:
        autocast: the dtype of mixed precision; None is fp32.

    Raises:
        UserError: a file of no network that we have, or one that lacks keypoints of the skeleton.
    """
    published_weights = published.read(str(candidate.weights))
    input_hw = published_weights.input_hw or (PUBLISHED_HW if published_weights.as_published else run.data.input_hw)
    model = SapiensPose(_size_name(published_weights), skeleton.num_keypoints, input_hw, empty=True)
    names, home = skeleton.names if published_weights.names else None, weights.Home(device=device)
    report = weights.load(model, str(candidate.weights), names, home)
    anew = [*report.new_keypoints, *report.missing, *report.reinitialized]
    if anew:
        raise UserError(f"{candidate.weights}: incomplete for {skeleton.num_keypoints} keypoints: no {anew[0]!r} in it")
    codec = Codec(input_hw=input_hw, heatmap_hw=model.heatmap_hw, sigma=run.data.sigma)
    output = visibility.read(published_weights.file.parent, names) if published_weights.file.name == FILE else None
    network = PoseNetwork(
        model=model.eval(), codec=codec, autocast=autocast, name=str(candidate.weights),
        visibility=output and output.to(device),
    )  # fmt: skip
    return network, str(report)


def build_networks(
    accelerator: Accelerator, group: Sequence[Candidate], run: Config, skeleton: Skeleton
) -> list[PoseNetwork]:
    """The networks of several weights, on this rank's device and in the launch's precision.

    Raises:
        UserError: as `build_network`.
    """
    autocast = distributed.autocast_dtype(accelerator)
    built = [build_network(one, run, skeleton, accelerator.device, autocast) for one in group]
    accelerator.print(*(report for _, report in built), sep="\n")
    return [network for network, _ in built]


def _size_name(published_weights: Weights) -> str:
    """The key of SIZES whose network this is: by config.json where it is ours, else by its tensors."""
    if (published_weights.file.parent / "config.json").is_file() and not published_weights.as_published:
        try:
            return weights.description(published_weights.file.parent)["name"]
        except UserError:
            pass  # transformers' own config
    projections = ("patch_embeddings.projection.weight", "patch_embeddings.weight")
    of_patches = (published_weights.state.get(f"backbone.embeddings.{name}") for name in projections)
    width = next((len(one) for one in of_patches if one is not None), None)
    blocks = {
        block[1] for key in published_weights.state if (block := re.search(r"^backbone\..*\.layer\.(\d+)\.", key))
    }
    shape = (published_weights.family, width, len(blocks))
    name = next((name for name, size in SIZES.items() if (size.family, size.width, size.depth) == shape), None)
    if name is None:
        raise UserError(
            f"{published_weights.file}: a {published_weights.family} {width} wide, {len(blocks)} blocks; there are: "
            f"{', '.join(SIZES)}"
        )
    return name


def list_variants(config: EvalConfig, mirror_known: bool = True) -> Iterator[tuple[str, EvalConfig]]:
    """What is asked for, or, with `compare`, first without each kind of augmentation; each by its name.

    Args:
        mirror_known: of the skeleton; without it there is no flip test.

    Raises:
        UserError: there is nothing to leave out.
    """
    if not config.compare:
        yield "", config
        return
    flips, scales = ([False, True] if config.flip else [False]), [(1.0,)]
    scales += [config.scales] if config.scales != (1.0,) else []
    if len(flips) == len(scales) == 1:
        if mirror_known:
            more = "give --eval.flip true or --eval.scales 0.5 1.0 1.5 2.0"
        else:
            more = (
                "left and right of the keypoints are not known, so there is no flip test; give "
                "--eval.scales 0.5 1.0 1.5 2.0, or the pairs as mirror: in --data.skeleton FILE"
            )
        raise UserError(f"--eval.compare: nothing to compare; {more}")
    for scale_choice in scales:
        for flip in flips:
            parts = ["flip"] * flip + ["scales"] * (scale_choice != (1.0,))
            yield " + ".join(parts) or "plain", replace(config, flip=flip, scales=scale_choice)
