"""Where a run's weights come from, and the license that its own weights therefore have.

Sapiens v1 is CC BY-NC 4.0 (https://github.com/facebookresearch/sapiens/blob/main/LICENSE): what is made from it stays
non-commercial. Sapiens2 has a license of its own (https://github.com/facebookresearch/sapiens2/blob/main/LICENSE.md):
what is made from it goes on under the same terms, with a copy of them. What is of unknown origin gets its
family's license.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache

from sapiens_accel.config.schema import STAGES
from sapiens_accel.errors import read_tree
from sapiens_accel.hub.download import LICENSE_FILES, parse_reference
from sapiens_accel.publish.markdown import REPOSITORY, repository_link

OUR_TAG = "sapiens_accel"  # on every card of ours: such a card's license is one that was derived here
BY_A_RUN = ", by way of an earlier run"
_PUBLISHERS = ("facebook", "noahcao")
# Names of published files, and the repository that each is from.
_PUBLISHED = (
    (r"sapiens2_([\d.]+b)_(pretrain|pose)\.safetensors", r"facebook/sapiens2-\2-\1"),
    (r"sapiens_([\d.]+b)_epoch_\d+(_clean)?\.pth", r"facebook/sapiens-pretrain-\1"),
    (r"sapiens_[\d.]+b_coco_best_coco_AP_\d+\.pth", "noahcao/sapiens-pose-coco"),
)


@dataclass(frozen=True, kw_only=True)
class LicenseTerms:
    """A license as a card's metadata name it, and what is said about it there."""

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
    """What weights were made from.

    Attributes:
        license: of what is made from them.
        base: their repository on the Hub, where it is known.
        place: the local file or folder that they were read from, where it is known.
        description: the same for a reader, as Markdown.
        terms: repositories that are known to hold the license's text.
    """

    license: LicenseTerms
    base: str | None
    place: Path | None
    description: str
    terms: tuple[str, ...] = ()


def of(run: Mapping[str, Any], stage: str, seen: tuple[Path, ...] = ()) -> Origin:
    """The origin of a stage's weights, from its run's config.yaml.

    Args:
        run: the tree of config.yaml.
        seen: run folders that were asked already; weights that lead back to them have no beginning.
    """
    name = run["model"]["name"]
    # Else a later run in the same folder wrote over its settings, or the folder was set aside by one.
    is_its_own = stage in STAGES and run.get("stage") in ("all", stage)
    if is_its_own and run.get("weights"):
        return _of_weights(str(run["weights"]), name, seen)
    began = is_its_own and run.get("stage") in ("all", "phase1") and not run.get("resume_from_checkpoint")
    if name.endswith("_tiny") or began:
        return Origin(license=APACHE, base=None, place=None, description="random weights")
    return _by_family(name, None, None, f"what was in the run folder when `{stage}` began; nothing tells what that was")


def license_text(origin: Origin) -> Path | None:
    """The license's own text: beside the weights that it came with, in the Hub's cache, or downloaded. None: nowhere.

    Only Sapiens2's has to be passed on as a copy.
    """
    if origin.license is not SAPIENS2:
        return None
    place = origin.place.parent if origin.place and origin.place.is_file() else origin.place
    beside = [place / name for name in LICENSE_FILES] if place else []
    cached = [try_to_load_from_cache(repo, name) for repo in origin.terms for name in LICENSE_FILES]
    for path in [*beside, *(Path(path) for path in cached if isinstance(path, str))]:
        if _is_sapiens2s(path):
            return path
    for repo in origin.terms:
        for name in LICENSE_FILES:
            try:
                path = Path(HfApi().hf_hub_download(repo, name))
            except Exception:  # no such file, no network, no access: the caller tells that there is no text
                continue
            if _is_sapiens2s(path):
                return path
    return None


def _is_sapiens2s(path: Path) -> bool:
    # Weights may lie in any folder: the license beside them may be another project's.
    return path.is_file() and "sapiens" in path.read_text(errors="replace").lower()


def _of_weights(text: str, name: str, seen: tuple[Path, ...]) -> Origin:
    path = Path(text).expanduser()
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+", path.as_posix())
    if cached:
        return _of_repo(f"{cached[1]}/{cached[2]}", name, path)
    if not path.exists() and (wanted := parse_reference(text)):
        return _of_repo(wanted.repo, name, None)
    for pattern, repo in _PUBLISHED:
        if found := re.fullmatch(pattern, path.name):
            return _by_family(name, found.expand(repo), path, f"`{path.name}`")  # the pattern has no mark of Markdown
    folder = path if path.is_dir() else path.parent
    for run_folder in (folder, *folder.resolve().parents[:2]):
        file = run_folder / "config.yaml"
        if file.is_file() and run_folder not in seen and path.exists():
            tree = read_tree(file, yaml.safe_load, "YAML")
            model = tree.get("model")
            if isinstance(model, Mapping) and isinstance(model.get("name"), str):
                earlier = of(tree, folder.parent.name, (*seen, run_folder))
                description = earlier.description.removesuffix(BY_A_RUN) + BY_A_RUN
                return replace(earlier, place=earlier.place or path, description=description)
    return _by_card(folder / "README.md", name, None, path) or _by_family(name, None, path, "weights of unknown origin")


def _of_repo(repo: str, name: str, path: Path | None) -> Origin:
    if repo.split("/")[0] in _PUBLISHERS:
        return _by_family(name, repo, path, repository_link(repo))
    card = try_to_load_from_cache(repo, "README.md")
    description = repository_link(repo)
    return (_by_card(Path(card), name, repo, path) if isinstance(card, str) else None) or _by_family(
        name, repo, path, description
    )


def _by_card(readme: Path, name: str, repo: str | None, path: Path | None) -> Origin | None:
    """What an earlier card of ours says; another's is no proof of a license."""
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else None
    except Exception:  # no metadata, not YAML
        return None
    if data is None or OUR_TAG not in (data.get("tags") or ()):
        return None
    found = [license for license in (CC_BY_NC, SAPIENS2, APACHE) if data.get("license") == license.metadata["license"]]
    if not found:
        return None
    above = data.get("base_model")
    above = above if isinstance(above, str) and REPOSITORY.fullmatch(above) else None
    base = repo or above
    description = repository_link(base) if base else "weights of an earlier run of sapiens_accel"
    terms = tuple(repo for repo in (repo, above, _published_repo(name)) if repo)
    return Origin(license=found[0], base=base, place=path, description=description, terms=terms)


def _by_family(name: str, repo: str | None, path: Path | None, description: str) -> Origin:
    license = SAPIENS2 if name.startswith("sapiens2") else CC_BY_NC
    terms = tuple(dict.fromkeys(other for other in (repo, _published_repo(name)) if other))
    return Origin(license=license, base=repo, place=path, description=description, terms=terms)


def _published_repo(name: str) -> str | None:
    family, size = name.split("_", 1)
    return None if size == "tiny" else f"facebook/{family}-pretrain-{size}"
