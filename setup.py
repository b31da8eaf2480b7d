# SPDX-License-Identifier: Apache-2.0
"""Package metadata; the tools' settings are in pyproject.toml, the tried versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """Return the version written in mir_callback/__init__.py, without importing it (torch may not be there yet)."""
    source = (HERE / "mir_callback" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('mir_callback/__init__.py must hold a line __version__ = "X.Y.Z"')
    return found.group(1)


DEEPSPEED = ["deepspeed>=0.12"]
WANDB = ["wandb"]
DATASETS = ["datasets"]
TENSORBOARD = ["tensorboard"]
TRAINER = ["accelerate"]
OPTUNA = ["optuna"]

setup(
    name="mir-callback",
    version=read_version(),
    description="Modality Integration Rate (MIR) of live, sharded vision-language models during pre-training",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["mir_callback", "mir_callback.*", "llava_integration", "llava_integration.*"]),
    package_data={"": ["py.typed"], "mir_callback.analysis.page": ["page.*"]},
    install_requires=[
        *["torch>=2.1", "transformers>=4.37", "numpy", "pillow>=10.1", "tqdm", "psutil", "filelock"],
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
            *["pytest", "hypothesis", "mpmath", "scikit-learn", "peft", "schedulefree", "lightning"],
            *[*DATASETS, *DEEPSPEED, *WANDB, *TENSORBOARD, *TRAINER, *OPTUNA],
        ],
        "checks": ["ruff", "mypy", "codespell"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
