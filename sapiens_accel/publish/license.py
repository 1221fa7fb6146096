"""The origin of a run's weights, and the license that follows from it.

Sapiens v1 is CC BY-NC 4.0 (https://github.com/facebookresearch/sapiens/blob/main/LICENSE): adaptations stay
non-commercial. Sapiens2 has its own license (https://github.com/facebookresearch/sapiens2/blob/main/LICENSE.md):
adaptations are passed on under the same terms, with a copy of them. Weights of unknown origin get the license of their
family.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache

from sapiens_accel.config.schema import ALL, RANDOM, STAGES
from sapiens_accel.errors import read_tree
from sapiens_accel.hub.download import LICENSE_FILES, parse_reference
from sapiens_accel.publish.markdown import REPOSITORY, repository_link

OUR_TAG = "sapiens_accel"  # on every card that this package writes: only such a card's license is trusted
BY_A_RUN = ", by way of an earlier run"
_PUBLISHERS = ("facebook", "noahcao")
# Names of published files, and the repository of each.
_PUBLISHED = (
    (r"sapiens2_([\d.]+b)_(pretrain|pose)\.safetensors", r"facebook/sapiens2-\2-\1"),
    (r"sapiens_([\d.]+b)_epoch_\d+(_clean)?\.pth", r"facebook/sapiens-pretrain-\1"),
    (r"sapiens_[\d.]+b_coco_best_coco_AP_\d+\.pth", "noahcao/sapiens-pose-coco"),
)


@dataclass(frozen=True, kw_only=True)
class LicenseTerms:
    """A license in the metadata of a model card, and the notice in its text."""

    metadata: Mapping[str, str]
    notice: str


CC_BY_NC = LicenseTerms(
    metadata={"license": "cc-by-nc-4.0"},
    notice="**Non-commercial.** These weights are adapted from [Sapiens](https://github.com/facebookresearch/sapiens) "
    "by Meta, which is licensed under [CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/), and are shared "
    "under the same license. They were changed: fine-tuned as described below.",
)
SAPIENS2 = LicenseTerms(
    metadata={
        "license": "other",
        "license_name": "sapiens2-license",
        "license_link": "https://github.com/facebookresearch/sapiens2/blob/main/LICENSE.md",
    },
    notice="These weights are adapted from [Sapiens2](https://github.com/facebookresearch/sapiens2) by Meta and are "
    "shared under the Sapiens2 License. It asks to acknowledge Sapiens2 in publications and forbids a list of uses, "
    "surveillance and biometric processing among them: read it before you use them.",
)
APACHE = LicenseTerms(
    metadata={"license": "apache-2.0"},
    notice="Trained from random weights; no published weights are in them. "
    "[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0).",
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The weights that a run started from.

    Attributes:
        license: the license of weights adapted from them.
        base: their repository on the Hub, if known.
        path: the local file or folder that they were read from, if known.
        description: the same for a reader, as Markdown.
        terms: repositories that hold the text of the license.
    """

    license: LicenseTerms
    base: str | None
    path: Path | None
    description: str
    terms: tuple[str, ...] = ()


def find_origin(run: Mapping[str, Any], stage: str, visited: tuple[Path, ...] = ()) -> Origin:
    """The origin of a stage's weights.

    Args:
        run: the tree of the run's config.yaml.
        visited: run directories on the way here, so that a cycle of them ends.
    """
    name = run["model"]["name"]
    # Else a later run in the same directory has overwritten the settings of this stage.
    stages = STAGES if run.get("stage") == ALL else tuple(str(run.get("stage")).split(","))
    is_its_own, given = stage in STAGES and stage in stages, run.get("weights")
    if is_its_own and given and given != RANDOM:
        return _origin_of_weights(str(given), name, visited)
    starts_here = is_its_own and stages[0] == "phase1" and not run.get("resume_from_checkpoint")
    if name.endswith("_tiny") or starts_here or (is_its_own and given):
        return Origin(license=APACHE, base=None, path=None, description="random weights")
    description = f"weights of unknown origin that were in the run directory when `{stage}` began"
    return _by_family(name, None, None, description)


def license_text(origin: Origin) -> Path | None:
    """The file with the text of the license: beside the weights, in the Hub's cache, or downloaded. None: not found.

    Only the Sapiens2 License has to be passed on as a copy.
    """
    if origin.license is not SAPIENS2:
        return None
    folder = origin.path.parent if origin.path and origin.path.is_file() else origin.path
    beside = [folder / name for name in LICENSE_FILES] if folder else []
    cached = [try_to_load_from_cache(repo, name) for repo in origin.terms for name in LICENSE_FILES]
    for path in [*beside, *(Path(path) for path in cached if isinstance(path, str))]:
        if _is_sapiens2_license(path):
            return path
    for repo in origin.terms:
        for name in LICENSE_FILES:
            try:
                path = Path(HfApi().hf_hub_download(repo, name))
            except Exception:  # no such file, no network, no access: the caller warns that the text is missing
                continue
            if _is_sapiens2_license(path):
                return path
    return None


def _is_sapiens2_license(path: Path) -> bool:
    # The license beside weights in any folder may be that of another project.
    return path.is_file() and "sapiens" in path.read_text(errors="replace").lower()


def _origin_of_weights(text: str, name: str, visited: tuple[Path, ...]) -> Origin:
    path = Path(text).expanduser()
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+", path.as_posix())
    if cached:
        return _origin_of_repo(f"{cached[1]}/{cached[2]}", name, path)
    if not path.exists() and (wanted := parse_reference(text)):
        return _origin_of_repo(wanted.repo, name, None)
    for pattern, repo in _PUBLISHED:
        if match := re.fullmatch(pattern, path.name):
            return _by_family(name, match.expand(repo), path, f"`{path.name}`")  # names that match hold no Markdown
    folder = path if path.is_dir() else path.parent
    for run_folder in (folder, *folder.resolve().parents[:2]):
        file = run_folder / "config.yaml"
        if file.is_file() and run_folder not in visited and path.exists():
            tree = read_tree(file, yaml.safe_load, "YAML")
            model = tree.get("model")
            if isinstance(model, Mapping) and isinstance(model.get("name"), str):
                earlier = find_origin(tree, folder.parent.name, (*visited, run_folder))
                description = earlier.description.removesuffix(BY_A_RUN) + BY_A_RUN
                return replace(earlier, path=earlier.path or path, description=description)
    return _by_card(folder / "README.md", name, None, path) or _by_family(name, None, path, "weights of unknown origin")


def _origin_of_repo(repo: str, name: str, path: Path | None) -> Origin:
    if repo.split("/")[0] in _PUBLISHERS:
        return _by_family(name, repo, path, repository_link(repo))
    card = try_to_load_from_cache(repo, "README.md")
    description = repository_link(repo)
    return (_by_card(Path(card), name, repo, path) if isinstance(card, str) else None) or _by_family(
        name, repo, path, description
    )


def _by_card(readme: Path, name: str, repo: str | None, path: Path | None) -> Origin | None:
    """The origin by a card that this package wrote; any other card is no proof of a license."""
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else None
    except Exception:  # no metadata, not YAML
        return None
    if data is None or OUR_TAG not in (data.get("tags") or ()):
        return None
    known = [license for license in (CC_BY_NC, SAPIENS2, APACHE) if data.get("license") == license.metadata["license"]]
    if not known:
        return None
    base_model = data.get("base_model")
    base_model = base_model if isinstance(base_model, str) and REPOSITORY.fullmatch(base_model) else None
    base = repo or base_model
    description = repository_link(base) if base else "weights of an earlier run of sapiens_accel"
    terms = tuple(repo for repo in (repo, base_model, _published_repo(name)) if repo)
    return Origin(license=known[0], base=base, path=path, description=description, terms=terms)


def _by_family(name: str, repo: str | None, path: Path | None, description: str) -> Origin:
    license = SAPIENS2 if name.startswith("sapiens2") else CC_BY_NC
    terms = tuple(dict.fromkeys(other for other in (repo, _published_repo(name)) if other))
    return Origin(license=license, base=repo, path=path, description=description, terms=terms)


def _published_repo(name: str) -> str | None:
    family, size = name.split("_", 1)
    return None if size == "tiny" else f"facebook/{family}-pretrain-{size}"
