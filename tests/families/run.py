# SPDX-License-Identifier: Apache-2.0
"""The families as a table: `python -m tests.families.run [NAME ...]`; `--write` writes docs/models.md."""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.families.torchvision_ops import load_torchvision

load_torchvision()

from mir_callback import Probe, evaluate_mir  # noqa: E402
from mir_callback.errors import MIRError  # noqa: E402
from tests.families.reference import mir_of  # noqa: E402
from tests.families.registry import Family, families  # noqa: E402
from tests.layouts import documents  # noqa: E402
from tests.samples import pairs  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """\
# Models

Every family of transformers {transformers} that turns images and text into text, as a tiny model of random weights
with its real processor class: MIR against a reference that reads the model's own `output_hidden_states`, one sample
at a time, with the prompt that [`tests/families`](../tests/families) writes out for each family; batches of two
samples of different sizes. {measured} are right to 1e-5 and {refused} are refused, each with its reason, before the
first step. Samples of several images among texts are right to 1e-5 in {several} of them, and refused in the rest. Two
ranks under ZeRO-3 and FSDP2 have the values of one process. `make test-all` holds all of it, and that two steps of a
Trainer are bit-identical with and without MIR; `make test` a dozen. This page is written by
`python -m tests.families.run --write`.

Nothing here is a list that the package reads. How a family writes an image (the placeholder, its start and end
tokens, lists of images) is found by trial on a blank image, and the run says so: `first_sample` in each record, and
`mir probe PROBE --model NAME` before it. A family that is not in the table most likely works; a new one is [one
entry](../tests/families/registry.py).

Other versions: [4.57.6 by hand](../benchmarks/notes/integrations.md#older-transformers), 4.37.2 through LLaVA's own
code.

"One by one": samples of the family change one another in a batch, which is found before the first evaluation.
"""


@dataclass(frozen=True)
class Result:
    """What an evaluation of a family gives."""

    family: Family
    words: str
    is_expected: bool
    value: float | None = None
    error: float | None = None
    batch_size: int = 0
    first_sample: str = ""
    several: str = ""


def result(family: Family, *, loud: bool = False) -> Result:
    """An evaluation of the family, beside the reference."""
    try:
        model, processor = family.build()
        report = evaluate_mir(model, Probe.from_pairs(pairs(4)), processor=processor, batch_size=2)
    except MIRError as error:
        is_expected = bool(family.refused) and family.refused in str(error)
        return Result(family, f"refused: {error}", is_expected)
    except Exception as error:
        if loud:
            traceback.print_exc()
        return Result(family, f"CRASH {type(error).__name__}: {str(error)[:200]}", False)
    if family.refused:
        return Result(family, f"NOT REFUSED: {report.mir:.6f}", False)
    # Of a fresh one: transformers' own capture counts layers twice in a model whose parts have captured before.
    error = report.mir - mir_of(family, *family.build(), pairs(4))
    several, is_expected = several_images(family)
    words = f"{report.mir:.6f}, {error:+.0e} from the reference; several images: {several}"
    sample, is_right = report.first_sample or "", abs(error) < 1e-5
    return Result(
        family, words, is_right and is_expected, report.mir, error, report.batch_size, sample, several.partition(":")[0]
    )


def several_images(family: Family) -> tuple[str, bool]:
    """What samples of several images among texts give, and whether it is the reference's value or a refusal."""
    model, processor = family.build()
    try:
        report = evaluate_mir(model, Probe.from_samples(documents()), processor=processor, batch_size=2)
    except MIRError as error:
        return f"refused: {error}", bool(family.one_image) and family.one_image in str(error)
    error = report.mir - mir_of(family, *family.build(), documents())
    return f"yes: {error:+.0e}", abs(error) < 1e-5 and not family.one_image


def page(results: list[Result]) -> str:
    """docs/models.md."""
    measured = [each for each in results if each.value is not None]
    refused = [each for each in results if each.value is None]
    several = sum(each.several == "yes" for each in measured)
    numbers = {"measured": len(measured), "refused": len(refused), "several": several}
    lines = [HEAD.format(**numbers, transformers=version("transformers"))]
    lines += ["| family | MIR | from the reference | several images | first sample, as the model gets it | |"]
    lines += ["|---|---|---|---|---|---|"]
    for each in measured:
        notes = [each.family.note] if each.family.note else []
        notes += ["one by one"] if each.batch_size == 1 else []
        shown = each.first_sample.partition("the model reads")[0] + "..."
        shown = "`" + " ".join(shown.split()).replace("|", "\\|") + "`"
        cells = (each.family.name, f"{each.value:.4f}", f"{each.error:+.0e}", each.several, shown, "; ".join(notes))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Refused", "", "| family | why |", "|---|---|"]
    lines += [f"| {each.family.name} | {_reason(each)} |" for each in refused]
    return "\n".join(lines) + "\n"


def _reason(each: Result) -> str:
    words = " ".join(each.words.removeprefix("refused: ").split())
    return words.partition(" MIR compares")[0].partition(" Pass processor")[0].replace("|", "\\|")[:300]


def main(names: list[str]) -> int:
    """Print the table, or write the page; how many results are not as expected."""
    writes = "--write" in names
    names = [name for name in names if name != "--write"]
    results = []
    for family in families():
        if names and not any(name in family.name for name in names):
            continue
        started = time.perf_counter()
        each = result(family, loud=bool(names))
        results.append(each)
        word = "as expected" if each.is_expected else "NOT AS EXPECTED"
        print(f"{family.name:28} {time.perf_counter() - started:5.1f} s  {word}  {each.words}", flush=True)
    wrong = sum(not each.is_expected for each in results)
    if writes and not wrong:
        PAGE.write_text(page(results), encoding="utf-8")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
