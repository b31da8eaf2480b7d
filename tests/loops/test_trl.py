# SPDX-License-Identifier: Apache-2.0
"""TRL's other Trainers of vision-language models: their own metrics in their own rows, with MIR as without.

Each averages what it has measured since the last row that its `log` has written, and starts again.
"""

import pytest
import trl
from datasets import Dataset

from mir_callback import attach_mir
from tests.loops.running import example
from tests.training.digest import digest

STEPS, SIZE = 4, 16
TIMED = ("time", "runtime", "per_second")


def shown(role, text):
    return [{"role": role, "content": text}]


def rows_of(*columns):
    """Conversations about an image, with the answers that a Trainer takes."""
    made = example("tiny_llava.untrained").make_data(SIZE)
    scenes = [made[index] for index in range(SIZE)]
    answers = {
        "prompt": lambda index: shown("user", "Which digits are there?"),
        "chosen": lambda index: shown("assistant", scenes[index]["caption"]),
        "rejected": lambda index: shown("assistant", scenes[index - 1]["caption"]),
        "completion": lambda index: shown("assistant", scenes[index]["caption"]),
        "label": lambda index: index % 3 != 0,
        "images": lambda index: [scenes[index]["image"]],
    }
    return Dataset.from_list([{name: answers[name](index) for name in (*columns, "images")} for index in range(SIZE)])


def length(completions, **kwargs):
    """A reward that differs between completions."""
    return [float(len(each[0]["content"])) for each in completions]


GENERATES = {"num_generations": 2, "max_completion_length": 6}
# Options of a Trainer's configuration, arguments of the Trainer, columns of its data, a metric that is its own.
TRAINERS = {
    "DPO": ({}, {}, ("prompt", "chosen", "rejected"), "rewards/margins"),
    "KTO": ({}, {}, ("prompt", "completion", "label"), "logps/chosen"),
    "GRPO": (GENERATES, {"reward_funcs": length}, ("prompt",), "rewards/length/mean"),
    "RLOO": (GENERATES, {"reward_funcs": length}, ("prompt",), "rewards/length/mean"),
}


def train(name, folder, watch):
    options, arguments, columns, _ = TRAINERS[name]
    module = example("tiny_llava.untrained")
    model, processor = module.make_model()
    model.save_pretrained(folder / "model")  # from where some load a second one, as reference
    model = type(model).from_pretrained(folder / "model")
    args = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        seed=3,
        **options,
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=model, args=args, train_dataset=rows_of(*columns), processing_class=processor, **arguments
    )
    if watch:
        attach_mir(trainer, module.make_probe(), every=1)
    trainer.train()
    return trainer


def whole(row):
    """A row with all its keys, without what the clock decides."""
    return {key: value for key, value in row.items() if not any(word in key for word in TIMED)}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_whole_rows_and_weights_are_those_of_a_run_without_mir(name, tmp_path):
    plain, watched = train(name, tmp_path / "plain", False), train(name, tmp_path / "watched", True)
    theirs = [whole(row) for row in watched.state.log_history if "mir" not in row]
    ours = [row for row in watched.state.log_history if "mir" in row]
    assert repr(theirs) == repr([whole(row) for row in plain.state.log_history])  # a NaN is equal to itself
    assert [row["step"] for row in ours] == list(range(STEPS + 1))
    assert {key for row in ours for key in row if not key.startswith("mir")} == {"epoch", "step"}
    assert [row["step"] for row in theirs if TRAINERS[name][3] in row] == [2, 4]
    assert digest(watched.model.state_dict()) == digest(plain.model.state_dict())
