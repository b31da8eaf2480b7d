# SPDX-License-Identifier: Apache-2.0
"""Write docs/evidence.md and its picture from the raw values in benchmarks/results/decisions.json.

.venv/bin/python -m studies.decisions.evidence
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from mir_callback.record import EvalRecord
from mir_callback.second_opinion import find_contradiction
from studies.decisions import analysis
from studies.decisions.analysis import METRICS, Pairs, Run, Table, is_honest
from studies.decisions.recipes import BY_NAME, SEEDS

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "benchmarks" / "results" / "decisions.json"
PAGE, PICTURE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence.png"

# What is chosen among where no texts belong to the images.
CHOICE = ("mir", "scale_free_mir", "last_layer", "mean_part", "norm_ratio", "cosine", "vision_rank")
SOUND, FAILED, HARMLESS = "sound", "failed without sabotage", "shrunk, but MIR is as without"
LEAST_USE, LEAST_EFFECT = 0.02, 0.1


def _has_same(table: Table, one: int, other: int, *parts: str) -> bool:
    recipes = [BY_NAME[table.recipes[index]] for index in (one, other)]
    return all(getattr(recipes[0], part) == getattr(recipes[1], part) for part in parts)


# Columns of the table of decisions. Sabotaged recipes are in the first only.
MODEL = ("tower", "layer", "pooled", "projector", "gain")
PAIRS: dict[str, Callable[[Table, int, int], bool]] = {
    "all": lambda table, one, other: True,
    "honest": is_honest,
    "same captions": lambda *pair: is_honest(*pair) and _has_same(*pair, "captions"),
    "data or steps": lambda *pair: is_honest(*pair) and _has_same(*pair, *MODEL, "rate"),
    "learning rate": lambda *pair: is_honest(*pair) and _has_same(*pair, *MODEL) and not _has_same(*pair, "rate"),
    "architecture": lambda *pair: is_honest(*pair) and not _has_same(*pair, *MODEL),
}
GAPS = (0.0, 0.1, 0.25, 0.5, 1.0, math.inf)  # in MIR


def page(runs: Sequence[Run]) -> str:
    """The whole of docs/evidence.md."""
    table = analysis.tabulate(runs)
    pairs = {name: analysis.decided_pairs(table, chosen) for name, chosen in PAIRS.items()}
    figures = {
        "recipes": len(table.recipes),
        "left_out": f"\n\nLeft out, as a seed is missing: {', '.join(table.incomplete)}." if table.incomplete else "",
        "seeds": table.accuracy.shape[1],
        "runs": len(runs),
        "lowest": f"{table.accuracy.mean(axis=1).min():.2f}",
        "highest": f"{table.accuracy.mean(axis=1).max():.2f}",
        "accuracy_std": f"{analysis.seed_std(table.accuracy):.3f}",
        "decisions": _decisions(table, pairs),
        "wrong": _wrong(table, pairs["honest"]),
        "gaps": _gaps(table, pairs["honest"]),
        **_disagreements(table, pairs["honest"]),
        "chosen": _chosen(table),
        "seed_table": _seeds(table),
        **_right(table, pairs),
        **_stops(runs),
        **_contradictions(runs),
        **_counted(pairs),
    }
    return TEXT.format(**figures)


def readme_sentence(runs: Sequence[Run]) -> str:
    """The result as the README has it."""
    table = analysis.tabulate(runs)
    pairs = {name: analysis.decided_pairs(table, chosen) for name, chosen in PAIRS.items()}
    return SENTENCE.format(**_right(table, pairs), **_counted(pairs))


def _counted(pairs: dict[str, Pairs]) -> dict[str, str]:
    return {f"pairs_{name.replace(' ', '_')}": str(len(found)) for name, found in pairs.items()}


def _right(table: Table, pairs: dict[str, Pairs]) -> dict[str, str]:
    """Shares of right decisions for the sentences, `mir_honest` and so on."""
    return {
        f"{name}_{kind.replace(' ', '_')}": _percent(table, name, found)
        for name in METRICS
        for kind, found in pairs.items()
    }


def _percent(table: Table, name: str, pairs: Pairs) -> str:
    return f"{analysis.share_right(table.values[name], pairs):.0%}" if pairs else "-"


def _decisions(table: Table, pairs: dict[str, Pairs]) -> str:
    head = ["metric", *(f"{name} ({len(found)})" for name, found in pairs.items())]
    rows = [[*head, "95 % of honest", "single runs", "Spearman"]]
    honest = pairs["honest"]
    for name in sorted(METRICS, key=lambda name: -analysis.share_right(table.values[name], honest)):
        values = table.values[name]
        low, high = analysis.interval(values, honest)
        shares = [_percent(table, name, found) for found in pairs.values()]
        single = f"{analysis.share_right(values, honest, single=True):.0%}"
        rows.append(
            [METRICS[name].title, *shares, f"{low:.0%} to {high:.0%}", single, f"{analysis.spearman(table, name):.2f}"]
        )
    return markdown(rows)


def _wrong(table: Table, pairs: Pairs, count: int = 8) -> str:
    """The pairs that MIR orders wrongly by the largest differences, each recipe at most twice."""
    mir, accuracy, gain = (
        part.mean(axis=1) for part in (table.values["mir"], table.accuracy, -table.values["vision_gain"])
    )
    wrong = sorted((pair for pair in pairs if mir[pair[0]] > mir[pair[1]]), key=lambda p: mir[p[1]] - mir[p[0]])
    head = ["recipe", "MIR", "accuracy", "vision gain"]
    rows, seen = [[f"better {head[0]}", *head[1:], f"worse {head[0]}", *head[1:]]], list[int]()
    for better, worse in wrong:
        if max(seen.count(better), seen.count(worse)) > 1 or len(rows) > count:
            continue
        seen += [better, worse]
        rows.append(
            [
                text
                for index in (better, worse)
                for text in (table.recipes[index], f"{mir[index]:.2f}", f"{accuracy[index]:.2f}", f"{gain[index]:.2f}")
            ]
        )
    return markdown(rows)


def _gaps(table: Table, pairs: Pairs) -> str:
    """How often MIR is right, by how far the two values lie apart."""
    mir = table.values["mir"].mean(axis=1)
    rows = [["difference in MIR", "pairs", "MIR is right"]]
    for low, high in pairwise(GAPS):
        found = [pair for pair in pairs if low <= abs(mir[pair[0]] - mir[pair[1]]) < high]
        title = f"above {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        rows.append([title, str(len(found)), _percent(table, "mir", found)])
    return markdown(rows)


def _disagreements(table: Table, pairs: Pairs) -> dict[str, str]:
    """How often MIR and vision gain order a pair differently, and which one is right."""
    mir, gain, norms = (table.values[name].mean(axis=1) for name in ("mir", "vision_gain", "norm_ratio"))
    differ = [pair for pair in pairs if (mir[pair[0]] < mir[pair[1]]) != (gain[pair[0]] < gain[pair[1]])]
    same_as_norms = sum((mir[one] < mir[other]) == (norms[one] < norms[other]) for one, other in pairs)
    return {
        "disagree": str(len(differ)),
        "disagree_gain": _percent(table, "vision_gain", differ),
        "as_norms": f"{same_as_norms} of {len(pairs)}",
        "gain_wrong": ", ".join(_often_wrong(table, pairs, gain)),
    }


def _often_wrong(table: Table, pairs: Pairs, values: analysis.Array) -> list[str]:
    """The recipes that are in most of the pairs that a metric orders wrongly, until all of these are covered."""
    wrong, found = [pair for pair in pairs if values[pair[0]] > values[pair[1]]], []
    while wrong:
        indices = [index for pair in wrong for index in pair]
        worst = max(sorted(set(indices)), key=indices.count)
        count = indices.count(worst)
        found.append(f"*{table.recipes[worst]}* ({count})")
        wrong = [pair for pair in wrong if worst not in pair]
    return found


def _chosen(table: Table) -> str:
    """What is chosen on one half of the recipes decides on the other, with and without what needs matching texts."""
    rows = [["may choose among", "best one", "most often", "best sum of two", "most often", "MIR itself"]]
    groups = {
        "what needs no matching texts": CHOICE,
        "all that the package has": tuple(name for name, metric in METRICS.items() if metric.kept),
    }
    for title, names in groups.items():
        found = analysis.choose_on_halves(table, names)
        one = ", ".join(f"{METRICS[name].title} ({share:.0%})" for name, share in list(found.picks.items())[:2])
        two = [(" + ".join(METRICS[name].title for name in key), share) for key, share in found.pairs.items()]
        cells = [
            f"{found.one:.0%}",
            one,
            f"{found.two:.0%}",
            f"{two[0][0]} ({two[0][1]:.0%})",
            f"{found.of['mir']:.0%}",
        ]
        rows.append([title, *cells])
    return markdown(rows)


def _seeds(table: Table) -> str:
    head = "SD between seeds", "SD between recipes", "ratio", "correlation of runs with the same seed"
    rows = [["", *head, "SD of a paired difference"]]
    for name, values in {"accuracy": table.accuracy, **table.values}.items():
        found = analysis.seeds_of(values)
        rows.append(
            [
                METRICS[name].title if name in METRICS else "accuracy after stage 2",
                f"{found.within:.3f}",
                f"{found.between:.3f}",
                f"{found.between / found.within:.1f}",
                f"{found.shared:.2f}",
                f"{found.paired:.3f}",
            ]
        )
    return markdown(rows)


def _stops(runs: Sequence[Run]) -> dict[str, str]:
    found = analysis.stops_of(runs)
    return {
        "stop_runs": str(found.runs),
        "stopped": str(found.stopped),
        "stop_cost": _points(found.cost),
        "stop_low": _points(found.interval[0]),
        "stop_high": _points(found.interval[1]),
        "stop_worst": f"{100 * found.worst:.1f}",
        "stop_worst_recipe": found.worst_recipe,
        "fixed_cost": _points(found.fixed_cost),
        "fixed_low": _points(found.fixed_interval[0]),
        "fixed_high": _points(found.fixed_interval[1]),
        "stop_saved": f"{found.saved:.0%}",
        "stop_median": f"{found.median_saved:.0%}",
        "stop_most": f"{found.most_saved:.0%}",
    }


def _points(share: float) -> str:
    return f"{round(100 * share, 2) + 0.0:.2f}"  # no minus before a zero


def contradicted(run: Run) -> str | None:
    """What the package says first against MIR in a run, of its evaluations on captions; None if nothing."""
    records: list[EvalRecord] = []
    for point in run["curve"]:
        if "captions" in point:
            names = ("mir", "mir_se", "scale_free_mir", "vision_gain", "vision_gain_se")
            values = {name: point["captions"][name] for name in names}
            records.append(EvalRecord(step=point["step"], max_steps=run["steps"], **values))
            found = find_contradiction(records)
            if found is not None:
                return found.kind
    return None


def _lowers_mir(run: Run, runs: Sequence[Run]) -> bool:
    """Whether shrinking has lowered a run's MIR: against the same recipe and seed without."""
    twin = run["recipe"].removeprefix("shrunk").removeprefix(", ").removesuffix(" to a half").strip() or "base"
    found = [other for other in runs if (other["recipe"], other["seed"]) == (twin, run["seed"])]
    return not found or found[0]["stage1"]["captions_mir"] - run["stage1"]["captions_mir"] > LEAST_EFFECT


def _contradictions(runs: Sequence[Run]) -> dict[str, str]:
    scores: dict[str, list[float]] = {}
    for run in runs:
        if run["accuracy"] is not None:
            scores.setdefault(run["recipe"], []).append(run["accuracy"])
    floor = min(float(np.mean(each)) for each in scores.values())
    groups: dict[str, list[tuple[Run, str | None]]] = {SOUND: [], FAILED: []}
    for run in runs:
        title = run["recipe"].split(",")[0].removesuffix(" to a half")
        if run["kind"] != "sabotage":
            title = SOUND if run["accuracy"] > floor + LEAST_USE else FAILED
        elif title == "shrunk" and not _lowers_mir(run, runs):
            title = HARMLESS
        groups.setdefault(title, []).append((run, contradicted(run)))
    rows = [["runs", "called", "of the seeds after the first", "vision is not used", "not used more"]]
    for title, found in groups.items():
        said = [kind for _, kind in found]
        later = [kind for run, kind in found if run["seed"] != SEEDS[0]]
        rows.append([title, _count(said), _count(later), *(str(said.count(kind)) for kind in ("unused", "not more"))])
    unseen = [kind for title in ("all shuffled", "blank") for _, kind in groups.get(title, [])]
    honest = [kind for title in (SOUND, FAILED) for _, kind in groups[title]]
    failed = {run["recipe"] for run, kind in groups[FAILED] if kind}
    return {
        "contradictions": markdown(rows),
        "unseen_called": _count(unseen),
        "shrunk_called": _count([kind for title in ("shrunk", HARMLESS) for _, kind in groups.get(title, [])]),
        "shrunk_harmless": str(len(groups.get(HARMLESS, []))),
        "sound_called": _count([kind for _, kind in groups[SOUND]]),
        "honest_called": _count(honest),
        "failed_called": "; ".join(f"*{name}*" for name in sorted(failed)) or "none",
        "floor": f"{floor:.2f}",
        "least_use": f"{LEAST_USE:g}",
        "least_effect": f"{LEAST_EFFECT:g}",
    }


def _count(said: Sequence[str | None]) -> str:
    return f"{sum(map(bool, said))} of {len(said)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def draw(runs: Sequence[Run], file: Path) -> None:
    """MIR, and vision gain beside it, against accuracy; a dot a run, colours by what a recipe changes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scored = [run for run in runs if run["accuracy"] is not None]
    kinds = list(dict.fromkeys(run["kind"] for run in scored))
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("mir", "scale_free_mir", "vision_gain"), strict=True):
        for number, kind in enumerate(kinds):
            shown = [run for run in scored if run["kind"] == kind]
            values = [METRICS[name].value(run["stage1"]) for run in shown]
            axis.scatter(values, [run["accuracy"] for run in shown], s=18, color=f"C{number}", label=kind, alpha=0.8)
        axis.set_xlabel(METRICS[name].title)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("accuracy after stage 2")
    axes[-1].legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Write both."""
    runs = json.loads(RAW.read_text(encoding="utf-8"))
    PAGE.write_text(page(runs), encoding="utf-8")
    draw(runs, PICTURE)
    print(f"wrote {PAGE} and {PICTURE}")


SENTENCE = (
    "[Where we measured it](docs/evidence.md), on pairs of small recipes scored after a second stage, MIR orders "
    "{mir_data_or_steps} right that differ in data or steps only, {mir_learning_rate} that differ in the learning rate "
    "and {mir_architecture} in tower or projector; vision gain orders {vision_gain_honest} of all."
)
TEXT = (Path(__file__).parent / "evidence.template.md").read_text(encoding="utf-8")

if __name__ == "__main__":
    main()
