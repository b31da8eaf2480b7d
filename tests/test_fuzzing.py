# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in a file or is given as an option: it works, or an error says in a sentence what is wrong."""

import json
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mir_callback import MIRCallback, PlateauRule, Probe
from mir_callback.analysis.load import read_run
from mir_callback.best_model import BestModel
from mir_callback.errors import MIRError
from mir_callback.history import FILE_NAME, History, read_history
from mir_callback.record import EvalRecord
from tests.samples import pairs, write_folders

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
DEFINITION = {"probe_fingerprint": "p", "tokens_fingerprint": "t", "root": "exact"}


def works_or_says_why(call, *arguments, **options):
    """Call it; what it returns, or the text of the error of ours it ends in. Any other error fails the test."""
    try:
        return call(*arguments, **options)
    except MIRError as error:
        message = str(error)
    # A sentence that names the file, the record in it or the option, and not the words of some library alone.
    assert len(message.split()) >= 5, message
    named = (
        "probe",
        "sample",
        "max_text_tokens",
        "json",
        "question",
        "Question",
        "record",
        "mir_best",
        FILE_NAME,
        *options,
    )
    assert any(name in message for name in named), message
    return message


@st.composite
def changed(draw, original):
    """A JSON value with one of its parts, at any depth, replaced or left out."""
    if not isinstance(original, (dict, list)) or not original or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    keys = list(original) if isinstance(original, dict) else list(range(len(original)))
    at = draw(st.sampled_from(keys))
    copy = original.copy()
    if draw(st.booleans()):
        del copy[at]
    else:
        copy[at] = draw(changed(original[at]))
    return copy


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Members of a saved probe."""
    (image, text), (other, _) = pairs(2)
    probe = Probe.from_samples([[image, text], ["a", image, "b", other], [[image, image], text]])
    path = probe.save(tmp_path_factory.mktemp("probe") / "probe.zip")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@FUZZ
@given(data=st.data())
def test_saved_probes_with_another_manifest(saved, tmp_path, data):
    manifest = data.draw(changed(json.loads(saved["probe.json"])))
    with zipfile.ZipFile(tmp_path / "probe.zip", "w") as archive:
        for name, content in {**saved, "probe.json": json.dumps(manifest)}.items():
            archive.writestr(name, content)
    works_or_says_why(Probe.load, tmp_path / "probe.zip")


DEEP = [depth * "[" + depth * "]" for depth in (850, 900, 950, 99999)]
ODD = [*DEEP, "1e400", "-1e400", "1" + 400 * "0", "1" + 5000 * "0", '"\\u001b[31m\\ud800"']


@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{value:.6} of {len(value)}")
def test_odd_json_wherever_json_is_read(saved, tmp_path, value):
    write_folders(tmp_path, 1)
    for text in (value, f'[{{"id": {value}, "conversations": {value}}}]', f'[{{"image": {value}}}]', f"[{value}]"):
        (tmp_path / "data.json").write_text(text)
        works_or_says_why(Probe.from_llava_json, tmp_path / "data.json", tmp_path / "images", num_samples=1)
        questions = (tmp_path / "data.json", tmp_path / "images", tmp_path / "texts")
        works_or_says_why(Probe.from_textvqa, *questions, num_samples=1)
    for field in ("samples", "max_text_tokens", "fingerprint", "version", "extra"):
        manifest = json.dumps({**json.loads(saved["probe.json"]), field: "HERE"}).replace('"HERE"', value)
        with zipfile.ZipFile(tmp_path / "probe.zip", "w") as archive:
            for name, content in {**saved, "probe.json": manifest}.items():
                archive.writestr(name, content)
        works_or_says_why(Probe.load, tmp_path / "probe.zip")
    for field in ("step", "mir", "per_layer", "loading", "companions", "root", "own"):
        line = json.dumps({"step": 2, "mir": 1.0, **DEFINITION, field: "HERE"}).replace('"HERE"', value)
        (tmp_path / FILE_NAME).write_text(f"{line}\n{line}\n")
        works_or_says_why(read_run, tmp_path)
        works_or_says_why(History().open, tmp_path, 5, DEFINITION)
        note = {"step": 2, "mir": 1.0, **DEFINITION, field: "HERE"}
        (tmp_path / "mir_best").mkdir(exist_ok=True)
        (tmp_path / "mir_best" / "mir_best.json").write_text(json.dumps(note).replace('"HERE"', value))
        works_or_says_why(BestModel, lambda folder: None, tmp_path, [EvalRecord(step=2, mir=1.0)], DEFINITION)
        works_or_says_why(read_run, tmp_path / "mir_best")


@FUZZ
@given(
    kind=st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]),
    at=st.integers(0, 10**6),
    value=st.integers(0, 255),
)
def test_compressed_probes_with_a_byte_changed(saved, tmp_path, kind, at, value):
    with zipfile.ZipFile(tmp_path / "probe.zip", "w", kind) as archive:
        for name, content in saved.items():
            archive.writestr(name, content)
    content = bytearray((tmp_path / "probe.zip").read_bytes())
    content[at % len(content)] = value
    (tmp_path / "probe.zip").write_bytes(content)
    works_or_says_why(Probe.load, tmp_path / "probe.zip")


@FUZZ
@given(at=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_saved_probes_with_a_byte_changed_or_cut_off(saved, tmp_path, at, value, cut):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for name, content in saved.items():
            archive.writestr(name, content)
    content = bytearray((tmp_path / "whole.zip").read_bytes())
    content[at % len(content)] = value
    (tmp_path / "probe.zip").write_bytes(content[: at % len(content)] if cut else content)
    works_or_says_why(Probe.load, tmp_path / "probe.zip")


@FUZZ
@given(data=st.data())
def test_llava_json_and_question_files(tmp_path, data):
    images, texts = tmp_path / "images", tmp_path / "texts"
    if not images.exists():
        write_folders(tmp_path, 3)
    record = {"id": "a", "image": "part0/000.png", "conversations": [{"from": "gpt", "value": "words"}]}
    several = {**record, "image": ["part0/000.png"] * 2, "video": "part0"}
    question = {"data": [{"image_id": "a"}, {"image": "part0/000.png"}]}
    (tmp_path / "data.json").write_text(json.dumps(data.draw(changed([record, several]))))
    (tmp_path / "questions.json").write_text(json.dumps(data.draw(changed(question))))
    for layouts in ("pairs", "all"):
        works_or_says_why(Probe.from_llava_json, tmp_path / "data.json", images, num_samples=1, layouts=layouts)
    works_or_says_why(Probe.from_textvqa, tmp_path / "questions.json", images, texts, num_samples=1)


@FUZZ
@given(
    content=st.binary(max_size=60) | st.lists(JSON, max_size=4).map(lambda v: "\n".join(map(json.dumps, v)).encode())
)
def test_history_files(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    works_or_says_why(read_history, tmp_path / FILE_NAME)
    works_or_says_why(History().open, tmp_path, 5, DEFINITION)


@FUZZ
@given(data=st.data())
def test_history_files_with_a_line_changed(tmp_path, data):
    record = {"step": 2, "mir": 1.0, "per_layer": [1.0], "verdict": None, **DEFINITION}
    lines = [json.dumps(data.draw(changed(record))), json.dumps({**record, "step": 4})]
    (tmp_path / FILE_NAME).write_text("\n".join(lines) + "\n")
    history = History()
    if works_or_says_why(history.open, tmp_path, 5, DEFINITION) is None and history.records:
        PlateauRule(window=4, warmup=0).verdict(history.records)


@FUZZ
@given(option=st.sampled_from(["window", "min_delta", "warmup"]), value=SCALARS)
def test_plateau_options(option, value):
    works_or_says_why(PlateauRule, **{option: value})


@FUZZ
@given(option=st.sampled_from(["every", "stop", "batch_size", "root", "probe"]), value=SCALARS)
def test_callback_options(option, value):
    options = {"probe": Probe.from_pairs(pairs(1)), option: value}
    works_or_says_why(MIRCallback, **options)


@FUZZ
@given(option=st.sampled_from(["num_samples", "seed", "max_text_tokens"]), value=SCALARS)
def test_draw_options(tmp_path, option, value):
    if not (tmp_path / "images").exists():
        write_folders(tmp_path, 2)
    works_or_says_why(
        Probe.from_folders, tmp_path / "images", tmp_path / "texts", **{"num_samples": 1, "seed": 0, option: value}
    )
