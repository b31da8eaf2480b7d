# SPDX-License-Identifier: Apache-2.0
"""Check a wheel, started by the Python of an environment that holds it and what it requires, and nothing else.

    WHEEL_ENVIRONMENT/bin/python -I .ci/check_wheel.py dist/mir_callback-0.1.0-py3-none-any.whl

It holds all files of the two packages and no others. With it `mir --help` answers, a tiny model is measured, in a loop
and from the disk, and its run becomes a page.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mir_callback", "llava_integration")


def check_contents(wheel: Path) -> None:
    """End with a message where the wheel's files are not those of the packages, with licence and command."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    expected = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    if names - information != expected:
        sys.exit(f"{wheel} and the checkout differ in {sorted((names - information) ^ expected)}")
    missing = {"licenses/LICENSE", "entry_points.txt"} - {name.partition("/")[2] for name in information}
    if missing:
        sys.exit(f"{wheel} lacks {sorted(missing)}")


def check_use() -> None:
    """End with a message where the installed package cannot measure a model and show its run."""
    import mir_callback

    if ROOT / "mir_callback" in Path(mir_callback.__file__).parents or sys.prefix not in mir_callback.__file__:
        sys.exit(f"mir_callback was imported from {mir_callback.__file__}, not from the wheel")
    sys.path.append(str(ROOT / "tests"))
    from samples import pairs
    from tiny_models import llava

    model, processor = llava()
    mir = str(Path(sys.executable).with_name("mir"))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([mir, "--help"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        probe = mir_callback.Probe.from_pairs(pairs(6))
        monitor = mir_callback.MIRMonitor(model, probe, processor=processor, output_dir=folder, every=1)
        monitor.step(1, loss=1.0)
        monitor.close()
        values = [record.mir for record in monitor.history]
        if len(values) != 2 or not all(map(math.isfinite, values)):
            sys.exit(f"the tiny model has MIR {values} at steps 0 and 1; two finite values were expected")
        model.save_pretrained(Path(folder) / "model")
        processor.save_pretrained(Path(folder) / "model")
        subprocess.run([mir, "eval", "model", "--probe", "mir_probe.zip"], cwd=folder, check=True)
        subprocess.run([mir, "report", ".", "-o", "page.html"], cwd=folder, check=True)


if __name__ == "__main__":
    check_contents(Path(sys.argv[1]))
    check_use()
    print(f"{sys.argv[1]} is complete")
