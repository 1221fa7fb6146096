"""A Space of the Hugging Face Hub that shows the page of `sapiens-accel app` for a published model."""

import sys
from pathlib import PurePosixPath

import yaml
from huggingface_hub import CommitOperationAdd, HfApi

import sapiens_accel

# Of the page's tests. A Space installs gradio by this number, and what requirements.txt names.
GRADIO = "6.31.0"
PROGRAM = '''"""The page of sapiens-accel app as a Space."""

import os

from sapiens_accel.app.server import serve

serve("{model}", host="0.0.0.0", port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
'''
TEXT = """Keypoints in images and videos by [{model}](https://huggingface.co/{model}), the page of `sapiens-accel app`.

Uploads are removed after an hour. The license is that of the model.
"""


def make_files(model: str) -> dict[str, str]:
    """The files of a Space for this model, ORG/NAME, by their names."""
    metadata = {
        "title": PurePosixPath(model).name,
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "models": [model],
        "tags": ["pose-estimation"],
    }
    return {
        "README.md": f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{TEXT.format(model=model)}",
        "app.py": PROGRAM.format(model=model),
        "requirements.txt": f"sapiens_accel[app]=={sapiens_accel.__version__}\n",
    }


def publish_space(model: str, private: bool) -> str:
    """Create the Space of the model's name if it does not exist, and commit its files. Return its URL.

    Raises:
        Exception: any that the client raises.
    """
    api = HfApi()
    api.create_repo(model, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode()) for name, text in make_files(model).items()
    ]
    api.create_commit(model, repo_type="space", operations=operations, commit_message=f"the page of {model}")
    return f"{api.endpoint}/spaces/{model}"
