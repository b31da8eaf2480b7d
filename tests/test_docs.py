# SPDX-License-Identifier: Apache-2.0
"""README, docs and the examples' pages: every block of them runs, every link and every test they name is there.

A fenced block is Python, or commands (``sh``, or no word behind the fence), or ``text``: the output of the block right
above it, or a drawing. Each block starts in a folder of its own with what :func:`folder` puts there. Python finds the
names of :func:`make_names`. `mir` runs in this process. What needs more than that stands in :data:`RUN_BY`.
"""

import ast
import functools
import re
import shlex
import shutil
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from mir_callback import MIRCallback, Probe
from mir_callback.cli import _make_parser, main
from mir_callback.config import FLAG_GROUPS, MIRArguments
from mir_callback.history import read_history
from mir_callback.launch import FlagParser
from tests import tiny_models
from tests.samples import pairs, write_folders, write_llava_json
from tests.training.runs import make_trainer

ROOT = Path(__file__).parents[1]
PAGES = [path for pattern in ("README.md", "docs/*.md", "examples/**/*.md") for path in sorted(ROOT.glob(pattern))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("benchmarks/**/*.md"))]
PROGRAMS = tuple(". accelerate cd deepspeed export git make mir pip python swift torchrun wandb".split())

# Beginnings of what is not run here: the test, or the target of make, that runs it instead.
RUN_BY = {
    "make demo": "tests/test_examples.py::test_weights_that_the_demo_leaves_have_the_value_it_measured_last",
    "make test": "make test",
    "make test-faults": "make test-faults",
    "pip install": "make install",
    "python -m mir_callback.launch": "tests/test_launch.py::test_a_process_that_the_script_starts_is_measured",
    "deepspeed --module mir_callback.launch": "tests/llava/test_original.py::test_the_published_recipe_runs_as_written",
    "path/to/mir-callback/examples/llava_v1_5/pretrain.sh": (
        "tests/llava/test_original.py::test_the_published_recipe_runs_as_written"
    ),
    "torchrun --nproc_per_node 4 -m mir_callback eval": (
        "tests/distributed/test_eval.py::test_two_ranks_share_the_probe_and_go_on_together_past_a_broken_checkpoint"
    ),
    "mir eval checkpoints/llava-v1.5-7b-pretrain-mir --base": (
        "tests/llava/test_eval.py::test_projectors_have_the_values_the_run_measured_itself"
    ),
    "from llava.mm_utils import": "tests/llava/test_eval.py::test_whole_models_have_the_values_the_run_measured_itself",
    "python -m pytest": "make test",
    "python examples/choose_learning_rate.py": (
        "tests/test_examples.py::test_learning_rate_with_the_highest_vision_gain_is_chosen_among_those_not_given_up"
    ),
    "python examples/compare_captions.py": (
        "tests/test_examples.py::test_captions_are_compared_with_the_noise_of_their_seeds"
    ),
    "# mir_plugin.py": "tests/loops/test_plugins.py::test_swift_measures_what_its_template_does_not_touch",
    "swift sft": "tests/loops/test_plugins.py::test_swift_measures_what_its_template_does_not_touch",
    "wandb sweep": (
        "tests/test_examples.py::test_program_of_the_wandb_sweep_logs_its_metric_when_started_as_the_agent_does"
    ),
    "wandb agent": (
        "tests/test_examples.py::test_program_of_the_wandb_sweep_logs_its_metric_when_started_as_the_agent_does"
    ),
}
# Where pages have runs, and which of those trained here lies there.
RUNS = {
    "runs/demo": "long1",
    "runs/a": "long1",
    "runs/b": "short1",
    "runs/short_captions": "short1",
    "runs/long_captions": "long1",
    "runs/lr-1e-3": "short1",
    "runs/lr-2e-3": "long1",
    "runs/long": "long1",
    "checkpoints/llava-pretrain": "long1",
    **{f"runs/{mix}_{seed}": f"{mix}{seed}" for mix in ("short", "long") for seed in (1, 2)},
    **{f"runs/{mix}_seed{seed}": f"{mix}{seed}" for mix in ("short", "long") for seed in (1, 2)},
    **{f"runs/captions/{mix}/seed_{seed}": f"{mix}{seed}" for mix in ("short", "long") for seed in (1, 2)},
}


@dataclass(frozen=True)
class Block:
    """A fenced block, and the output that stands below it."""

    page: str
    line: int
    language: str
    text: str
    output: str = ""

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(path):
    """The blocks of a page that run; a block of neither kind has "?" as its language."""
    found, above = [], -2
    lines = path.read_text(encoding="utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0, f"{path} has a fence that does not end"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        language = lines[start].strip().removeprefix("```")
        text = textwrap.dedent("\n".join(lines[start + 1 : end])) + "\n"
        follows = found and not "".join(lines[above + 1 : start]).strip()
        if not language:
            language = "sh" if commands_of(text) else "text" if follows else "?"
        if language == "text" and follows:
            found[-1] = Block(*(getattr(found[-1], name) for name in ("page", "line", "language", "text")), text)
        elif language != "text":
            found.append(Block(str(path.relative_to(ROOT)), start + 1, language, text))
            above = end
    return found


def commands_of(text):
    """The words of each command of a block, without a virtual environment's folder; None if it holds something else."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError:
            return None
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            words[0] = words[0].removeprefix(".venv/bin/")
            if words[0] not in PROGRAMS and not words[0].endswith(".sh"):
                return None
            found.append(words)
    return found


BLOCKS = [block for path in PAGES for block in blocks_of(path)]


def run_elsewhere(text):
    """The longest beginning in the table that a command or a block of Python has."""
    return max((start for start in RUN_BY if re.match(rf"{re.escape(start)}(?![\w-])", text)), key=len, default=None)


@functools.cache
def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """All that blocks find in their folder: runs, a probe, images, texts and a model."""
    place, trained = tmp_path_factory.mktemp("prepared"), tmp_path_factory.mktemp("trained")
    probe = Probe.from_pairs(pairs(5))
    for mix, rate in (("short", 3e-2), ("long", 3e-4)):
        for seed in (1, 2):
            folder = trained / f"{mix}{seed}"
            saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
            trainer = make_trainer(folder, seed=seed, learning_rate=rate, include_num_input_tokens_seen=True, **saving)
            MIRCallback(probe, every=2).attach(trainer)
            trainer.train()
            trainer.save_state()
            trainer.save_model()
    for name, run in RUNS.items():
        shutil.copytree(trained / run, place / name)
    shutil.copytree(place / "runs/a/checkpoint-6", place / "runs/a/checkpoint-500")
    for path in (place / "runs/demo").glob("checkpoint-*"):
        shutil.rmtree(path)
    (place / "downloads/mir-8fa3k2").mkdir(parents=True)  # of a wandb artifact
    for name in ("mir_history.jsonl", "mir_probe.zip"):
        shutil.copy(trained / "short2" / name, place / "downloads/mir-8fa3k2")
    probe.save(place / "probe.zip")
    images, texts = write_folders(place / "DIR", 100)
    shutil.copytree(images, place / "textvqa/val")
    shutil.copytree(texts, place / "cnn/stories")
    records, pictures = write_llava_json(place / "llava", 100)
    shutil.copy(records, place / "held_out.json")
    shutil.copytree(pictures, place / "images")
    for part in tiny_models.llava():
        part.save_pretrained(place / "llava-hf/llava-1.5-7b-hf")
    return place


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    """A copy of it, to work in; whoever waits there is interrupted, as by Ctrl-C."""

    def interrupt(seconds):
        raise KeyboardInterrupt

    shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(time, "sleep", interrupt)
    return tmp_path / "work"


def make_names(folder):
    """What a block of Python finds: what a user has. It imports itself what is ours.

    The Trainer takes 3 steps, and a loop 60 in which nothing is trained.
    """
    trainer = make_trainer(folder / "run", steps=3)
    return {
        "Trainer": Trainer,
        "trainer": trainer,
        "model": trainer.model,
        "make_model": lambda: tiny_models.llava()[0],
        "processor": trainer.processing_class,
        "args": trainer.args,
        "dataset": trainer.train_dataset,
        "collator": trainer.data_collator,
        "optimizer": torch.optim.SGD(trainer.model.parameters(), lr=0.1),
        "loader": [None] * 60,
        "loss": torch.tensor(3.5),
        "probe": Probe.from_pairs(pairs(6), matched=True),
        "DIR": "DIR",
    }


def run_python(block, folder):
    """Run a block; if it attaches MIR to the Trainer, the run that follows has measured it, and so has a monitor."""
    names = make_names(folder)
    exec(compile("\n" * block.line + block.text, block.page, "exec"), names)
    trainer, monitor = names["trainer"], names.get("monitor")
    attached = [each for each in trainer.callback_handler.callbacks if isinstance(each, MIRCallback)]
    if attached and not list(folder.glob("run/**/mir_history.jsonl")):
        trainer.train()
    if attached:
        histories = list(folder.glob("run/**/mir_history.jsonl"))
        assert all(read_history(path)[-1].mir is not None for path in histories)
        assert histories
    if monitor is not None:
        steps = {record.step: record.loss for record in monitor.history}
        assert steps == {0: None, 50: 3.5, 60: 3.5}
        assert read_history(next(folder.glob("runs/**/mir_history.jsonl")).parents[1] / "a/mir_history.jsonl")


def run_command(words):
    """Run a `mir`; of everything else, parse what is a flag of ours."""
    line = " ".join(words)
    if run_elsewhere(line) is None:
        assert words[0] == "mir", f"{line!r} is neither run nor in RUN_BY"
        assert main(words[1:]) == 0
        return True
    if "mir_callback.launch" in words:
        flags = words[words.index("mir_callback.launch") + 1 : words.index("--")]
        assert MIRArguments(**vars(FlagParser(FLAG_GROUPS).parse_args(flags))).enabled
    elif "mir_callback" in words or words[0] == "mir":
        parse_mir(words[words.index("mir_callback" if "mir_callback" in words else "mir") + 1 :])
    return False


def parse_mir(words):
    if "--help" not in words:
        _make_parser(words).parse_args(words)


def shape_of(line):
    """Its cells, numbers in them as #; beside numbers, cells of words but the first may say anything."""
    cells = re.split(r"\s{2,}", line.strip())
    shapes = [re.sub(r"\b[0-9a-f]{16}\b|[-+]?\d(?:[\d.,]|e[-+])*", "#", cell) for cell in cells]
    if "#" not in "".join(shapes):
        return tuple(shapes)
    return (shapes[0], *(shape if "#" in shape else "" for shape in shapes[1:]))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_runs_as_written(block, folder, capsys):
    assert block.language in ("python", "sh"), "say what this block is: python, sh, or text for output and drawings"
    if block.language == "python":
        ran = run_elsewhere(block.text) is None
        if ran:
            run_python(block, folder)
    else:
        assert commands_of(block.text), "no commands known in PROGRAMS"
        ran = all([run_command(words) for words in commands_of(block.text)])
    if ran and block.output:
        said = capsys.readouterr().out.replace(f"{folder}/", "").splitlines()
        for line in block.output.replace(".../", "").splitlines():
            assert line.strip() in ("", "...") or shape_of(line) in map(shape_of, said), line


def test_what_is_not_run_here_is_run_by_a_test_or_target_that_exists():
    lines = [" ".join(words) for block in BLOCKS if block.language == "sh" for words in commands_of(block.text)]
    starts = {run_elsewhere(text) for text in (*lines, *(block.text for block in BLOCKS))}
    assert starts - {None} == set(RUN_BY), "an entry is of no use any more"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in RUN_BY.values():
        path, _, function = name.partition("::")
        assert name.removeprefix("make ") in targets or function in functions_of(ROOT / path), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_flags_in_a_sentence_exist(page):
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"`(?:\.venv/bin/)?mir ((?:probe|eval|compare|report) [^`]+)`", text):
        parse_mir(shlex.split(command))
    known = {option for action in FlagParser(FLAG_GROUPS)._actions for option in action.option_strings}
    assert set(re.findall(r"--mir_\w+", text)) <= known


def anchors_of(path):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_files_and_tests_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors_of(path), target
    for file, test in re.findall(r"((?:benchmarks|examples|tests)/[\w/]*\w(?:\.\w+)?)(?:::(\w+))?", text):
        assert (ROOT / file).exists(), file
        assert not test or test in functions_of(ROOT / file), f"{file}::{test}"
    known = set().union(*(functions_of(path) for path in ROOT.glob("tests/**/test_*.py")))
    assert {name for name in re.findall(r"(?<![\w/])(test_\w+)(?!\w*\.py)", text)} <= known


def test_readme_is_read_in_one_sitting():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    assert len(text.split()) <= 1200
