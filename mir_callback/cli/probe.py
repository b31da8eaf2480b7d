# SPDX-License-Identifier: Apache-2.0
"""`mir probe`: build a probe or open a saved one, inspect it, save it."""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from mir_callback.analysis.pictures import check_sheet_path, draw_sheet
from mir_callback.cli.encoding import ENCODING, add_encoding_flags
from mir_callback.config import MIRConfig
from mir_callback.errors import ConfigError
from mir_callback.model.modality import COUNT
from mir_callback.probe.adapters import HuggingFaceAdapter
from mir_callback.probe.batches import TokenCounts, counts_of_model, counts_of_tokenizer
from mir_callback.probe.conversations import DEFAULT_VIDEO_FRAMES, LAYOUTS
from mir_callback.probe.probe import DEFAULT_MAX_TEXT_TOKENS, Probe
from mir_callback.probe.sample import measured_samples
from mir_callback.probe.sources import open_dataset

EPILOG = """\
examples:
  mir probe --images textvqa/val --texts cnn/stories --save probe.zip --show probe.png
  mir probe probe.zip --model llava-hf/llava-1.5-7b-hf
"""
_SOURCES = ("questions", "llava_json", "dataset")  # none of them: two folders
_DATASET_FLAGS = ("split", "image_column", "text_column", "video_column")
_RECORD_FLAGS = ("layouts", "video_frames")  # of --llava-json and --dataset
_LAYOUTS_SHOWN = 5
_DRAW = ("num_samples", "seed", "max_text_tokens")
_BUILDING = ("images", "texts", *_SOURCES, *_DATASET_FLAGS, *_RECORD_FLAGS, *_DRAW)


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this subcommand."""
    parser.add_argument("probe", nargs="?", help="a saved probe to open (default: build one)")
    source = parser.add_argument_group("source of the samples")
    source.add_argument("--images", metavar="DIR", help="folder of images, searched recursively")
    source.add_argument("--texts", metavar="DIR", help="folder of texts (.txt, .md, .story), searched recursively")
    source.add_argument("--questions", metavar="FILE", help="TextVQA question file: use only its images in --images")
    source.add_argument("--llava-json", metavar="FILE", help="LLaVA-format JSON: images and texts of its records")
    source.add_argument("--dataset", metavar="NAME", help="Hugging Face dataset: a hub name or a folder")
    source.add_argument("--split", metavar="NAME", help="of --dataset (default: validation)")
    source.add_argument("--image-column", metavar="NAME", help="of --dataset (default: image)")
    source.add_argument("--text-column", metavar="NAME", help="of --dataset: texts, or conversations (default: text)")
    source.add_argument("--video-column", metavar="NAME", help="of --dataset (default: none)")
    source.add_argument(
        "--layouts",
        choices=LAYOUTS,
        help="of --llava-json and --dataset, what to draw: pairs of one image and one text (default); images: also "
        "with several images, or videos; all: also without any",
    )
    source.add_argument(
        "--video-frames", type=int, metavar="N", help=f"frames to take of a video (default: {DEFAULT_VIDEO_FRAMES})"
    )
    drawing = parser.add_argument_group("the draw")
    drawing.add_argument("--num-samples", type=int, metavar="N", help="number of samples (default: 100)")
    drawing.add_argument("--seed", type=int, metavar="N", help="of the random draw (default: 0)")
    drawing.add_argument("--max-text-tokens", type=int, metavar="N", help=f"(default: {DEFAULT_MAX_TEXT_TOKENS})")
    result = parser.add_argument_group("output")
    result.add_argument("--save", metavar="PATH", help="save it as one file (.zip) or as a folder")
    result.add_argument("--show", metavar="PNG", help="draw a contact sheet of all samples")
    reading = parser.add_argument_group("as a model reads it")
    reading.add_argument(
        "--model", metavar="NAME", help="count tokens for this model, without its weights, and print the first sample"
    )
    reading.add_argument("--processor", metavar="NAME", help="(default: the model's own)")
    add_encoding_flags(reading, "plain, chat, or a format string with {image} and {text}", "as in a run without it")


def run(options: Namespace) -> None:
    """Build or open the probe, print what is in it, and write the output that was asked for.

    Raises:
        MIRError: a flag, a file or a sample is invalid.
    """
    for name, value in vars(options).items():
        if value == "":
            raise ConfigError(f"{_flag(name)} is empty. Is a shell variable unset?")
    if options.model is None and (stray := list(_pick(options, ("processor", *ENCODING)))):
        raise ConfigError(f"{_flag(stray[0])} needs --model. See mir probe --help.")
    config = MIRConfig(**_pick(options, ENCODING))
    if options.show:
        check_sheet_path(options.show)
    probe = _open_or_build(options)
    if options.save:  # first, as the output pipe may be closed
        probe.save(options.save)
    belonging = " that belong to their images" if probe.matched else ""
    cut = f"texts of at most {probe.max_text_tokens} tokens{belonging}"
    print(f"probe {probe.fingerprint}: {len(probe)} samples, {cut}")
    layouts = Counter(sample.describe() for sample in probe.samples)
    if not all(sample.is_pair for sample in probe.samples):
        for layout, count in layouts.most_common(_LAYOUTS_SHOWN):
            print(f"  layout  {layout}: {count}")
        if len(layouts) > _LAYOUTS_SHOWN:
            print(f"  layout  {len(layouts) - _LAYOUTS_SHOWN} others")
    left_out = len(probe) - len(measured_samples(probe.samples, config.text_only == COUNT))
    if left_out:
        print(f"  {left_out} without an image or a video, which count only with text_only='count'")
    sizes = [image.size for sample in probe.samples for image in sample.open_images()]
    print(f"  images  {_range([width for width, _ in sizes])} x {_range([height for _, height in sizes])} pixels")
    print(f"  texts   {_range([len(' '.join(sample.texts).split()) for sample in probe.samples])} words")
    counts = _count_tokens(probe, options.model, options.processor or options.model, config) if options.model else None
    if options.save:
        print(f"saved {options.save}")
    if options.show:
        print(f"wrote contact sheet {draw_sheet(probe, options.show, counts)}")


def _open_or_build(options: Namespace) -> Probe:
    if options.probe:
        if given := _pick(options, _BUILDING):
            raise ConfigError(
                f"A saved probe ({options.probe}) excludes {', '.join(map(_flag, given))}. Leave one out."
            )
        return Probe.load(options.probe)
    draw, sources = _pick(options, _DRAW), list(_pick(options, _SOURCES))
    if len(sources) > 1:
        raise ConfigError(f"{' and '.join(map(_flag, sources))} exclude each other. Pass one source.")
    if options.dataset is None and (stray := list(_pick(options, _DATASET_FLAGS))):
        raise ConfigError(f"{_flag(stray[0])} needs --dataset. See mir probe --help.")
    record = _pick(options, _RECORD_FLAGS)
    if record and not {*sources} & {"llava_json", "dataset"}:
        raise ConfigError(f"{_flag(next(iter(record)))} needs --llava-json or --dataset. See mir probe --help.")
    match sources:
        case ["questions"]:
            _check_folders(options, "with --questions", images=True, texts=True)
            return Probe.from_textvqa(options.questions, options.images, options.texts, **draw)
        case ["llava_json"]:
            _check_folders(options, "with --llava-json", images=True, texts=False)
            return Probe.from_llava_json(options.llava_json, options.images, **draw, **record)
        case ["dataset"]:
            _check_folders(options, "with --dataset", images=False)
            columns = _pick(options, _DATASET_FLAGS[1:])
            dataset = open_dataset(options.dataset, options.split or "validation")
            return Probe.from_dataset(dataset, texts=options.texts, **columns, **draw, **record)
        case _:
            _check_folders(options, "to build a probe (or name a saved one)", images=True, texts=True)
            return Probe.from_folders(options.images, options.texts, **draw)


def _pick(options: Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options that were given, of these."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _flag(name: str) -> str:
    return name if name == "probe" else "--" + name.replace("_", "-")


def _check_folders(options: Namespace, where: str, **needed: bool) -> None:
    """ConfigError if a source lacks --images or --texts, or if it has its own."""
    for name, need in needed.items():
        value = getattr(options, name)
        if need and value is None:
            raise ConfigError(f"--{name} is needed {where}. See mir probe --help.")
        if not need and value is not None:
            raise ConfigError(f"--{name} {value} cannot be used {where}, which has its own. Leave it out.")


def _count_tokens(probe: Probe, name: str, own: str, config: MIRConfig) -> TokenCounts:
    """Count and print tokens with the processor of ``own``, or with its tokenizer if it has no image processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    failures = []
    for kind in (AutoProcessor, AutoTokenizer):
        try:
            processor = kind.from_pretrained(own, trust_remote_code=False)
            break
        except Exception as error:  # any kind, of the hub client or a damaged folder
            failures.append(f"{kind.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    else:
        flag = "--model" if own == name else "--processor"
        raise ConfigError(f"Could not load a processor or tokenizer of {flag} {own}: {'; '.join(failures)}")
    if getattr(processor, "image_processor", None) is None:
        if config.encoding != MIRConfig().encoding or config.text_only != MIRConfig.text_only:
            raise ConfigError(f"{own} has no image processor: its tokenizer counts texts, without prompt or positions.")
        counts = counts_of_tokenizer(probe, getattr(processor, "tokenizer", processor))
    else:
        try:
            with torch.device("meta"):  # the architecture without its weights
                architecture = AutoConfig.from_pretrained(name, trust_remote_code=False)
                model = AutoModelForImageTextToText.from_config(architecture, trust_remote_code=False)
        except Exception as error:  # any kind, as above
            raise ConfigError(
                f"--model {name} is no vision-language model that transformers builds from its configuration: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
        adapter = HuggingFaceAdapter(model, processor, **config.encoding)
        counts = counts_of_model(probe, adapter, config.text_only)
        first = next((sample for sample in probe.samples if sample.has_vision), None)
        if first is not None:
            print(f"  first sample: {adapter.describe(first, probe.max_text_tokens)}")
    for modality, tokens in (("vision", counts.vision), ("text", counts.text)):
        if tokens is not None:
            print(f"  {modality + ' tokens':13} {_range(tokens)} per sample, {sum(tokens):,} in total")
    known = f"tokens fingerprint {counts.fingerprint}" if counts.fingerprint else None
    why = f"its processor could not be loaded: {failures[0]}" if failures else "the model has only a tokenizer"
    print(f"  {known or f'vision tokens not counted: {why}'}")
    return counts


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least}" if least == most else f"{least} to {most} (median {statistics.median_low(values)})"
