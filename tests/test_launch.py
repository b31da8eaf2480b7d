# SPDX-License-Identifier: Apache-2.0
"""The launcher: what it takes, what it says, and that it runs things as Python would."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from transformers import LlamaForCausalLM, Trainer

from mir_callback import MIRArguments, Probe, distributed
from mir_callback.errors import UnsupportedModelError
from mir_callback.history import read_history
from mir_callback.launch import find_target, is_python, main
from mir_callback.on_start import sitecustomize
from mir_callback.on_start.sitecustomize import FOLDER, VARIABLE
from tests.distributed.launch import ROOT, run_process
from tests.samples import pairs
from tests.training.runs import make_trainer

REPORT = "import sys, os; print('ran', __name__, os.path.basename(sys.argv[0]), sys.argv[1:], sys.path[0])"


@pytest.fixture
def probe(tmp_path):
    return str(Probe.from_pairs(pairs(2)).save(tmp_path / "probe.zip"))


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(REPORT)
    return path


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Writes a console command of a given first line on the PATH."""

    def make(head, body=REPORT):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        path = folder / "train-it"
        path.write_text(f"{head}\n{body}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        return path

    return make


@pytest.fixture
def launch(monkeypatch, capfd):
    """Run the launcher in this process; exit code and what was printed."""
    monkeypatch.setattr(Trainer, "train", Trainer.train)
    for name in (VARIABLE, "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words):
        code = None
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code
        return code, *capfd.readouterr()

    return run


def test_help_shows_three_uses_and_the_flags_in_groups_with_their_defaults(launch):
    code, out, _ = launch("--help")
    assert code == 0
    usage, _, rest = out.partition("\n\n")
    assert [line.split()[:2] for line in usage.removeprefix("usage: ").splitlines()] == [
        ["python", "-m"],
        ["torchrun", "--nproc_per_node"],
        ["deepspeed", "--module"],
    ]
    for option in fields(MIRArguments):
        assert f"  --{option.name}" in rest
    assert {"the probe:", "what is measured:", "when training stops:", "failures:"} <= set(rest.splitlines())
    assert "(default: 50)" in rest
    assert "(default: None)" not in rest


def test_without_arguments_the_uses_and_one_line(launch):
    code, _, err = launch()
    assert code == 2
    assert err.splitlines()[0].startswith("usage: python -m mir_callback.launch")
    assert err.splitlines()[-1].startswith("error: Nothing to run after --: name a script.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mir_images", "a"], "Give both images and texts: images='a', texts=None"),
        ([], "No probe given"),
        (["--mir_images", "a", "--mir_texts", "b", "--mir_every", "0"], "every must be a positive integer"),
        (["--mir_every", "often"], "every='often'"),
        (["--mir_evry", "3"], "Unknown flag --mir_evry 3"),
        (["--mir_batch_size", "x"], "argument --mir_batch_size/--mir-batch-size: invalid int value: 'x'"),
        (["--mir_probe", "no.zip"], "There is no probe at no.zip"),
        (["--mir_images", "no", "--mir_texts", "no"], "There is no folder no"),
    ],
)
def test_what_is_wrong_with_a_flag_is_said_in_one_line_before_the_script_starts(launch, script, words, message):
    code, out, err = launch(*words, "--", script)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith(f"error: {message}")
    assert line.endswith(". See python -m mir_callback.launch --help")
    assert "ran" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--: name a script"),
        (["-m"], "--: name a module"),
        (["nowhere.py"], r"nowhere\.py"),
        (["{probe}"], "neither a Python script nor executable"),
    ],
)
def test_error_when_there_is_nothing_to_run(launch, probe, words, message):
    words = [word.format(probe=probe) for word in words]
    code, _, err = launch("--mir_probe", probe, "--", *words)
    assert code == 2
    assert err.startswith("error: ")
    with pytest.raises(ValueError, match=message):
        find_target(words)


def test_a_script_runs_as_python_would_run_it_and_gets_deepspeeds_rank(launch, script, probe):
    code, out, err = launch("--local_rank=1", "--mir_probe", probe, "--", script, "--lr", "1", "--", "x")
    assert code is None
    assert out.splitlines()[0] == f"ran __main__ train.py ['--lr', '1', '--', 'x', '--local_rank=1'] {script.parent}"
    assert f"[mir] WARNING: no MIR was measured: {script} ended without training" in err


def test_a_module_runs_as_python_would_run_it(launch, tmp_path, probe, monkeypatch):
    package = tmp_path / "trainers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sft.py").write_text(REPORT)
    monkeypatch.chdir(tmp_path)
    code, out, err = launch("--mir_probe", probe, "--", "-m", "trainers.sft", "a.yaml")
    assert code is None
    assert out.splitlines()[0] == f"ran __main__ sft.py ['a.yaml'] {tmp_path}"
    assert "WARNING: no MIR was measured: -m trainers.sft ended" in err


LONG = "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''"
HERE = os.path.dirname(sys.executable)


@pytest.mark.parametrize("head", ["#!{python}", "#!/usr/bin/env python3", "#!/usr/bin/env -S python -u", LONG])
def test_a_console_command_of_this_python_runs_in_this_process(launch, command, probe, head, monkeypatch):
    path = command(head.format(python=sys.executable), f"{REPORT}\nprint(os.getpid())\nsys.exit(0)")
    monkeypatch.setenv("PATH", HERE, prepend=":")
    code, out, err = launch("--mir_probe", probe, "--", "train-it", "train", "a.yaml")
    assert code == 0
    assert out.splitlines() == [f"ran __main__ train-it ['train', 'a.yaml'] {path.parent}", str(os.getpid())]
    assert f"WARNING: no MIR was measured: {path} ended" in err


@pytest.mark.parametrize("head", ["#!{python}", "#!/usr/bin/env python3", LONG])
def test_a_console_command_of_another_environment_is_not_one_of_this_python(tmp_path, command, monkeypatch, head):
    folder = tmp_path / "another" / "bin"
    folder.mkdir(parents=True)
    (folder / "python3").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    assert not is_python(command(head.format(python=folder / "python3")).as_posix())
    assert is_python(command(f"#!{HERE}/python3").as_posix())


def test_the_working_directory_stays_on_the_path_of_what_is_started(launch, script, probe, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "a::b")
    launch("--mir_probe", probe, "--", script)
    assert os.environ["PYTHONPATH"] == f"{FOLDER}:a::b"


@pytest.mark.parametrize("own", ["", "mir_callback.attach_mir(trainer, sys.argv[2], every=2)"])
def test_a_trainer_of_the_script_is_measured_once(launch, script, probe, tmp_path, own):
    script.write_text(
        "import os, sys, mir_callback\nfrom tests.training.runs import make_trainer\n"
        f"trainer = make_trainer(sys.argv[1], steps=2)\n{own}\nseen, collate = set(), trainer.data_collator\n"
        f"trainer.data_collator = lambda items: (seen.add('{VARIABLE}' in os.environ), collate(items))[1]\n"
        f"trainer.train()\nprint('known', seen, '{VARIABLE}' in os.environ)\n"
    )
    code, out, err = launch("--mir_probe", probe, "--mir_every", "1", "--", script, tmp_path / "run", probe)
    assert code is None
    assert "without training" not in err
    assert err.count("the launcher's flags have no effect") == bool(own)
    assert out.endswith("known {False} True\n")  # to jobs that are started during the training, and after it
    steps = [record.step for record in read_history(tmp_path / "run" / "mir_history.jsonl")]
    assert steps == ([0, 2] if own else [0, 1, 2])


def text_only(trainer):
    trainer.model = LlamaForCausalLM(trainer.model.config.text_config)
    ids = trainer.model.dummy_inputs["input_ids"]
    trainer.data_collator = lambda items: {"input_ids": ids, "labels": ids}
    return trainer


TRAINS_ALL = """
import sys
from tests.test_launch import text_only
from tests.training.runs import make_trainer

for name in sys.argv[1:]:
    trainer = make_trainer(name, steps=1)
    if name.endswith("text"):
        text_only(trainer)
    trainer.train()
    if name.endswith("twice"):
        trainer.train()
"""


def test_each_training_of_a_script_is_measured_but_a_later_one_of_a_text_model(
    launch, script, probe, tmp_path, monkeypatch
):
    script.write_text(TRAINS_ALL)
    waits = []
    monkeypatch.setattr(distributed, "require_everywhere", lambda *_, seconds: waits.append(seconds))
    folders = [tmp_path / name for name in ("one", "twice", "text")]
    code, _, err = launch("--mir_probe", probe, "--", script, *folders)
    assert code is None
    assert waits == [1800] * 4  # the Trainer's ddp_timeout
    assert "no effect" not in err
    assert [(each / "mir_history.jsonl").exists() for each in folders] == [True, True, False]
    assert "no MIR in training 4" in err
    assert f"no MIR was measured in a training of {script}: LlamaForCausalLM has no vision tokens" in err


def test_a_text_model_ends_a_script_that_trains_it_first(launch, script, probe, tmp_path):
    script.write_text(TRAINS_ALL)
    with pytest.raises(UnsupportedModelError, match="no vision tokens"):
        launch("--mir_probe", probe, "--", script, tmp_path / "text", tmp_path / "one")
    assert not (tmp_path / "one").exists()


FORKS = f"""
import json, os, sys
child = os.fork()
if not child:
    sys.exit(0)
os.waitpid(child, 0)
print("notes", os.path.isdir(json.loads(os.environ["{VARIABLE}"])["notes"][-1]))
"""


def test_a_process_that_the_script_forks_does_not_clean_up(launch, script, probe):
    script.write_text(FORKS)
    process = os.getpid()
    try:
        _, out, err = launch("--mir_probe", probe, "--", script)
    finally:
        if os.getpid() != process:
            os._exit(0)
    assert out == "notes True\n"
    assert err.count("no MIR was measured") == 1


@pytest.fixture
def started(launch, monkeypatch, tmp_path):
    """Puts this process in the place of one that a launcher has started, and returns a Trainer of it."""
    (tmp_path / "notes").mkdir()

    def start(probe, process=None, notes="notes"):
        sitecustomize.start({"mir_probe": probe}, tmp_path / notes)
        launched = json.loads(os.environ[VARIABLE])
        launched["launcher"][1] = process or os.getppid()
        monkeypatch.setenv(VARIABLE, json.dumps(launched))
        return make_trainer(tmp_path / "run", steps=1)

    return start


def note_in(folder):
    (note,) = folder.iterdir()
    return note.read_text()


def test_a_text_model_trains_on_in_a_process_that_launchers_have_started(started, probe, tmp_path, capfd):
    """Of two launchers, one inside the other, both get the note."""
    (tmp_path / "inner").mkdir()
    started(probe)
    trainer = text_only(started(probe, notes="inner"))
    trainer.train()
    assert trainer.state.global_step == 1
    assert "WARNING: no MIR in training 1 of this process: LlamaForCausalLM" in capfd.readouterr().err
    for notes in ("notes", "inner"):
        assert note_in(tmp_path / notes).startswith("LlamaForCausalLM has no vision tokens")


def test_nothing_is_attached_once_the_launcher_has_ended(started, probe, tmp_path, capfd):
    ended = subprocess.Popen(["true"])
    ended.wait()
    trainer = started(probe, process=ended.pid)
    for _ in range(2):
        trainer.train()
    assert capfd.readouterr().err.count("no MIR in this training: the launcher that started") == 1
    assert not (tmp_path / "run" / "mir_history.jsonl").exists()


def test_a_python_that_cannot_import_the_package_trains_on_and_says_so_once(
    started, probe, tmp_path, capfd, monkeypatch
):
    trainer = started(probe)
    monkeypatch.setitem(sys.modules, "mir_callback.integrations.huggingface", None)
    for _ in range(2):
        trainer.train()
    assert capfd.readouterr().err.count(f"no MIR in this training: {sys.executable} can't import mir_callback") == 1
    assert "can't import mir_callback" in note_in(tmp_path / "notes")


def test_the_exit_code_of_a_script_that_fails_is_its_own(launch, script, probe):
    script.write_text("raise SystemExit(3)")
    code, _, err = launch("--mir_probe", probe, "--", script)
    assert code == 3
    assert "no MIR was measured" in err


STARTS_A_TRAINING = """
import os, subprocess, sys
os.chdir("/")
raise SystemExit(subprocess.call([sys.executable, *sys.argv[1:]]))
"""
TRAINS = """
import os, sys, subprocess
from transformers import TrainerCallback
from tests.training.runs import make_trainer

class StartsAnotherTraining(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        if sys.argv[2:]:
            subprocess.run([sys.executable, __file__, sys.argv[2]], check=True)

trainer = make_trainer(sys.argv[1], steps=2)
trainer.add_callback(StartsAnotherTraining())
trainer.train()
print("user", sys.modules["sitecustomize"].__file__)
"""


@pytest.fixture
def training(script, tmp_path):
    """A script that starts a training in a process of its own, and its arguments for a run in a folder."""
    script.write_text(STARTS_A_TRAINING)
    (tmp_path / "child.py").write_text(TRAINS)
    return [str(script), str(tmp_path / "child.py")]


def launched(*words, **environment):
    return run_process(["-m", "mir_callback.launch", *map(str, words)], environment=environment)


STARTS_ANY = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import sys; print(sys.meta_path[0], sys.path, list(sys.modules))"], check=True)
"""


def test_a_process_that_trains_nothing_gets_a_finder_and_nothing_else(launch, script, probe):
    script.write_text(STARTS_ANY)
    code, found, _ = launch("--mir_probe", probe, "--", script)
    assert code is None
    assert "sitecustomize._Finder" in found
    assert "on_start" not in found
    assert not any(f"'{name}'" in found for name in ("torch", "transformers", "mir_callback"))


@pytest.mark.slow
def test_a_process_that_the_script_starts_is_measured(training, probe, tmp_path):
    """Launched as a module, by a relative path, from a script that goes to another folder and exits by itself."""
    flags = ["--mir_probe", os.path.relpath(probe, ROOT), "--mir_every", "1"]
    done = launched(*flags, "--", *training, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "no MIR" not in done.stderr
    assert [record.step for record in read_history(tmp_path / "run" / "mir_history.jsonl")] == [0, 1, 2]


@pytest.mark.slow
def test_the_users_own_sitecustomize_runs_and_jobs_of_a_training_are_not_measured(training, probe, tmp_path):
    (tmp_path / "users").mkdir()
    own = tmp_path / "users" / "sitecustomize.py"
    own.touch()
    words = ["--mir_probe", probe, "--", *training, tmp_path / "run", tmp_path / "job"]
    done = launched(*words, PYTHONPATH=f"{ROOT}:{own.parent}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "mir_history.jsonl").exists()
    assert not (tmp_path / "job" / "mir_history.jsonl").exists()
    assert done.stdout.count(f"user {own}") == 2


@pytest.mark.slow
def test_the_exit_code_of_a_process_that_the_script_starts_is_kept(training, probe):
    done = launched("--mir_probe", probe, "--", training[0], "-c", "raise SystemExit(7)")
    assert done.returncode == 7
    assert done.stderr.count("no MIR was measured") == 1


WAITS = "i=0; while [ $i -lt 50 ]; do sleep 0.1; i=$((i+1)); done"


@pytest.mark.parametrize("name", ["TERM", "HUP", "USR1", "USR2", "INT"])
def test_a_command_gets_signals_and_is_waited_for(launch, command, probe, name):
    """Ctrl-C goes to the command too."""
    to = "$PPID $$" if name == "INT" else "$PPID"
    command("#!/bin/sh", f"trap 'sleep 0.2; echo saved; exit 5' {name}\nkill -{name} {to}\n{WAITS}")
    number = getattr(signal, f"SIG{name}")
    handler = signal.default_int_handler if name == "INT" else signal.SIG_DFL
    before = signal.signal(number, handler)  # a shell starts what is in the background with SIGINT ignored
    try:
        assert launch("--mir_probe", probe, "--", "train-it")[:2] == (5, "saved\n")
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_is_ignored_by_the_command_too(launch, command, probe):
    command("#!/bin/sh", "kill -HUP $PPID $$\nexit 7")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch("--mir_probe", probe, "--", "train-it")[0] == 7
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_in_the_working_directory_needs_no_slash(launch, command, probe, monkeypatch):
    path = command("#!/bin/sh", "exit 7")
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert launch("--mir_probe", probe, "--", "train-it")[0] == 7


@pytest.mark.parametrize(("ends", "code"), [("exit 7", 7), ("kill -9 $$", 137)])
def test_any_command_runs_and_its_exit_code_is_kept(launch, command, probe, ends, code):
    path = command("#!/bin/sh", f"echo ran $1\n{ends}")
    found, out, err = launch("--mir_probe", probe, "--", "train-it", "a.yaml")
    assert (found, out) == (code, "ran a.yaml\n")
    assert f"no MIR was measured: {path} ended" in err


@pytest.mark.slow
def test_a_shell_script_that_trains_is_measured_and_ends_with_the_launcher(training, probe, tmp_path):
    """As cluster managers end a job: by a signal to the process that they have started."""
    script = tmp_path / "train.sh"
    script.write_text(f"exec {sys.executable} $1 $2\n")
    words = ["--mir_probe", probe, "--", "bash", script, training[1], tmp_path / "run"]
    done = launched(*words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "mir_history.jsonl").exists()
    script.write_text(f"echo $$ > {tmp_path / 'pid'}\nexec sleep 60\n")
    launcher = [sys.executable, "-m", "mir_callback.launch", *map(str, words)]
    with subprocess.Popen(launcher, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.1)
        process.terminate()
        assert process.wait(20) == 143
        assert "no MIR was measured" in process.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
