# SPDX-License-Identifier: Apache-2.0
"""Package metadata; the tools' settings are in pyproject.toml, the tried versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
# FOR THE OWNER: the repository's address on GitHub, https://github.com/OWNER/mir-callback. The project's links are made
# of it, and those of the README on a package index, where they lead nowhere without it.
SOURCE = ""


def read_version() -> str:
    """Return the version written in mir_callback/__init__.py, without importing it (torch may not be there yet)."""
    source = (HERE / "mir_callback" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('mir_callback/__init__.py must hold a line __version__ = "X.Y.Z"')
    return found.group(1)


def read_me(version: str) -> str:
    """Return the README; its links to files lead to those of the release, and pictures to the file itself."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    if not SOURCE:
        return text
    places = {"": f"{SOURCE}/blob/v{version}/", "!": f"{SOURCE}/raw/v{version}/"}
    return re.sub(r"(!?)(\[[^]]*\])\((?!https?:|#)", lambda link: f"{link[1]}{link[2]}({places[link[1]]}", text)


VERSION = read_version()
DEEPSPEED = ["deepspeed>=0.12"]
WANDB = ["wandb"]
DATASETS = ["datasets"]
TENSORBOARD = ["tensorboard"]
TRAINER = ["accelerate"]
OPTUNA = ["optuna"]

setup(
    name="mir-callback",
    version=VERSION,
    description="Modality Integration Rate (MIR) of live, sharded vision-language models during pre-training",
    long_description=read_me(VERSION),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["vision-language model", "multimodal", "pre-training", "modality integration rate", "LLaVA"],
    project_urls={"Source": SOURCE, "Changelog": f"{SOURCE}/blob/main/CHANGELOG.md"} if SOURCE else {},
    python_requires=">=3.10",
    packages=find_packages(include=["mir_callback", "mir_callback.*", "llava_integration", "llava_integration.*"]),
    package_data={"": ["py.typed"], "mir_callback.analysis.page": ["page.*"]},
    install_requires=[
        *["torch>=2.1", "transformers>=4.37", "numpy", "pillow>=10.1", "tqdm", "psutil", "filelock>=3.20.1"],
        *["matplotlib", "rich", "scipy", "jinja2"],  # the `mir` command: pictures, tables, Student's t, pages
    ],
    entry_points={"console_scripts": ["mir = mir_callback.cli:main"]},
    extras_require={
        "deepspeed": DEEPSPEED,
        "wandb": WANDB,
        "datasets": DATASETS,
        "optuna": OPTUNA,
        "demo": ["scikit-learn", "tokenizers", *DEEPSPEED, *WANDB, *TRAINER],
        "test": [
            *["pytest", "pytest-xdist", "hypothesis", "mpmath", "scikit-learn", "peft", "bitsandbytes", "schedulefree"],
            *["num2words", "lightning", "trl", *DATASETS, *DEEPSPEED, *WANDB, *TENSORBOARD, *TRAINER, *OPTUNA],
        ],
        "checks": ["ruff", "mypy", "codespell"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
