# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA with its processor, conversations about images, and a probe: `assets FOLDER` makes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mir_callback import Probe
from tests import tiny_models
from tests.samples import pairs


def main(folder: Path) -> None:
    """Write `model`, `data`, `probe.zip`."""
    model, processor = tiny_models.llava()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    data = folder / "data"
    data.mkdir()
    rows = []
    for index, (image, text) in enumerate(pairs(16, seed=9)):
        image.save(data / f"{index}.png")
        said = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": text}]
        rows.append({"messages": said, "images": [f"{index}.png"]})
    (data / "scenes.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"scenes": SCENES}))
    Probe.from_pairs(pairs(5)).save(folder / "probe.zip")


SCENES = {
    "file_name": "scenes.json",
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
