# SPDX-License-Identifier: Apache-2.0
"""Files made to exhaust memory when they are read: refused with their size and the limit, before they are unpacked."""

import io
import json
import os
import struct
import zipfile
import zlib

import pytest
from PIL import Image

from mir_callback import Probe
from mir_callback.analysis.load import read_run
from mir_callback.errors import HistoryError, ProbeError
from mir_callback.history import FILE_NAME, read_history
from mir_callback.probe import storage
from mir_callback.probe.sample import MAX_PIXELS, Sample
from tests.commands.running import run_command
from tests.samples import pairs

HUGE = 200 * 2**20


@pytest.fixture
def saved(tmp_path):
    """The files of a saved probe, by name."""
    with zipfile.ZipFile(Probe.from_pairs(pairs(2)).save(tmp_path / "honest.zip")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def unpacked(monkeypatch):
    """How many bytes of archives were unpacked so far, in a list of one."""
    total, read = [0], zipfile.ZipExtFile.read

    def count(self, n=-1):
        content = read(self, n)
        total[0] += len(content)
        return content

    monkeypatch.setattr(zipfile.ZipExtFile, "read", count)
    return total


def write(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def inflating(size=HUGE):
    """A file of the archive that deflates to a thousandth."""
    return b"[" + b" " * size + b"]"


@pytest.mark.parametrize("where", ["probe.json", "images/00000.png", "unused"])
def test_an_archive_that_would_unpack_to_far_more_than_its_size_is_refused_unread(saved, tmp_path, unpacked, where):
    path = write(tmp_path / "bomb.zip", {**saved, where: inflating()})
    assert path.stat().st_size < 2**20
    with pytest.raises(ProbeError, match=rf"{path.stat().st_size} bytes .* 209\d{{6}}, more than 20 times"):
        Probe.load(path)
    assert unpacked == [0]


@pytest.mark.parametrize("where", ["probe.json", "images/00000.png"])
def test_no_more_is_unpacked_than_an_archive_declares(saved, tmp_path, unpacked, monkeypatch, where):
    path = write(tmp_path / "bomb.zip", {**saved, where: inflating()})
    size = struct.pack("<I", HUGE + 2)
    content = path.read_bytes()
    assert content.count(size) == 2  # in the header, and in the directory at the end
    path.write_bytes(content.replace(size, struct.pack("<I", 500)))
    most, inflate = [0], zlib.decompressobj

    class Counted:
        def __init__(self, *arguments):
            self._own = inflate(*arguments)

        def decompress(self, data, limit=0):
            content = self._own.decompress(data, limit)
            most[0] = max(most[0], len(content))
            return content

        def __getattr__(self, name):
            return getattr(self._own, name)

    monkeypatch.setattr(zlib, "decompressobj", Counted)
    with pytest.raises(ProbeError, match="bomb"):
        Probe.load(path)
    assert unpacked[0] <= sum(map(len, saved.values())) + 500
    assert 0 < most[0] <= 2**20


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_a_limit_are_refused(saved, tmp_path, unpacked, method):
    with pytest.raises(ProbeError, match=f"probe.json is compressed with method {method}"):
        Probe.load(write(tmp_path / "bomb.zip", saved, method))
    assert unpacked == [0]


def test_a_probe_that_was_zipped_by_hand_is_read(saved, tmp_path):
    assert Probe.load(write(tmp_path / "again.zip", saved)) == Probe.load(tmp_path / "honest.zip")


def test_one_image_does_not_stand_for_many(saved, tmp_path):
    index = json.loads(saved["probe.json"])
    index["samples"] = index["samples"][:1] * 1000
    with pytest.raises(ProbeError, match="1000 samples share 1 images"):
        Probe.load(write(tmp_path / "bomb.zip", {**saved, "probe.json": json.dumps(index)}, zipfile.ZIP_STORED))


def test_limits_hold_in_a_folder_too_and_a_device_is_no_image(saved, tmp_path):
    folder = Probe.from_pairs(pairs(2)).save(tmp_path / "probe")
    image = folder / "images" / "00001.png"
    os.truncate(image, storage.MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(ProbeError, match=f"00001.png has {storage.MAX_BYTES + 1} bytes"):
        Probe.load(folder)
    image.unlink()
    image.symlink_to("/dev/zero")
    with pytest.raises(ProbeError, match=r"00001\.png"):
        Probe.load(folder)
    os.truncate(folder / "probe.json", storage.MAX_INDEX_BYTES + 1)
    with pytest.raises(ProbeError, match=f"probe.json has {storage.MAX_INDEX_BYTES + 1} bytes"):
        Probe.load(folder)


@pytest.mark.parametrize(("name", "limit"), [("MAX_SAMPLES", 2), ("MAX_BYTES", 900), ("MAX_INDEX_BYTES", 300)])
def test_a_probe_that_could_not_be_read_is_not_written_and_not_read(tmp_path, monkeypatch, name, limit):
    probe = Probe.from_pairs(pairs(6))
    probe.save(tmp_path / "before.zip")
    monkeypatch.setattr(storage, name, limit)
    with pytest.raises(ProbeError, match=rf"too large.* 6 samples.*{limit}"):
        probe.save(tmp_path / "after.zip")
    assert not (tmp_path / "after.zip").exists()
    with pytest.raises(ProbeError, match=f"{limit}"):
        Probe.load(tmp_path / "before.zip")


def test_an_image_is_refused_by_its_declared_size_before_it_is_decoded(monkeypatch):
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    side = int(MAX_PIXELS**0.5) + 1
    header = b"IHDR" + struct.pack(">II", side, side) + buffer.getvalue()[24:29]
    content = buffer.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + buffer.getvalue()[33:]
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ProbeError, match=f"{MAX_PIXELS} .*{side * side} pixels"):
        Sample.pair("a", content, "text").open_image()


def test_no_other_program_is_run_to_read_an_image():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    with pytest.raises(ProbeError, match="format is EPS"):
        Sample.pair("a", buffer.getvalue(), "text").open_image()


def test_a_page_goes_on_without_pictures_and_says_why(tmp_path, monkeypatch, capsys, unpacked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"step": 1, "mir": 1.0, "per_layer": [1.0, 2.0]}\n')
    write(tmp_path / "other.zip", {"probe.json": inflating()})
    assert run_command("report", capsys, ".") == (0, "wrote mir_report.html\n", "")  # of another name, not opened
    write(tmp_path / "mir_probe.zip", {"probe.json": inflating()})
    status, _, error = run_command("report", capsys, ".")
    assert status == 0
    for place in (error, (tmp_path / "mir_report.html").read_text(encoding="utf-8")):
        assert "no samples are shown" in place
        assert "more than 20 times" in place
    assert unpacked == [0]
    status, _, error = run_command("report", capsys, ".", "--probe", "other.zip")
    assert status == 2
    assert "other.zip" in error


def test_a_file_far_larger_than_any_history_is_refused_unread(tmp_path):
    (tmp_path / FILE_NAME).touch()
    os.truncate(tmp_path / FILE_NAME, 2**34)  # takes no room on the disk
    for read, what in ((read_run, tmp_path), (read_history, tmp_path / FILE_NAME)):
        with pytest.raises(HistoryError, match=f"{FILE_NAME} has {2**34} bytes"):
            read(what)


def test_a_file_of_damaged_lines_is_given_up_and_a_giant_line_is_one(tmp_path):
    giant = '{"step": 1, "mir": 1.5, "own": [' + 2**21 * "[]," + "[]]}\n"
    (tmp_path / FILE_NAME).write_text('{"step": 0, "mir": 1.5}\n' + giant)
    run = read_run(tmp_path)
    assert [record.step for record in run.records] == [0]
    assert any("line 2" in message and str(len(giant)) in message for message in run.problems)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write(1001 * "x\n")
    with pytest.raises(HistoryError, match="1000 damaged lines"):
        read_run(tmp_path)


def test_what_others_wrote_into_records_takes_no_memory_where_records_are_read_in_part(tmp_path):
    line = '{"step": %d, "mir": 1.5, "own": [[], {}], "note": "kept", "number": 3}\n'
    (tmp_path / FILE_NAME).write_text("".join(line % step for step in range(3)))
    for record in read_run(tmp_path, layers_of=lambda records: ()).records:
        assert record.unknown == {"note": "kept", "number": 3}
