"""A checkpoint is whole or absent whatever fails while it is written, and a run that is asked to stop saves first."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
from pathlib import Path

import pytest
from transformers import TrainerCallback

from muffin.checkpoints import Preempted, StopSignals, last_checkpoint, publish, remove, remove_leftovers
from muffin.policy_trainer import PolicyTrainer
from tests.scored import scored_rows, write_rows

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def scored(tiny_llava_path, tiny_rows_path, tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("scored"), *scored_rows(tiny_llava_path, tiny_rows_path))


@pytest.fixture(scope="module")
def train(load_recipe, tiny_llava_path, scored):
    """`train(output_dir, *flags)`: six steps with a checkpoint every second one; flags given later win."""

    def run(output_dir: Path, *flags: str):
        fixed = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(scored), "--output_dir", str(output_dir)]
        fixed += ["--dtype", "float32", "--learning_rate", "3e-4", "--per_device_train_batch_size", "2", "--max_steps", "6"]
        return load_recipe("train/dpo.py").main([*fixed, "--logging_steps", "1", "--save_steps", "2", "--disable_tqdm", "True", *flags])

    return run


def values(state) -> list[tuple]:
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in state.log_history if "loss" in entry]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


class _At(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == self.step:
            self.action()


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, action)`: every trainer built from now on does `action` when step n begins."""

    def arrange(step: int, action) -> None:
        build = PolicyTrainer.__init__

        def with_callback(self, *args, **kwargs) -> None:
            build(self, *args, **kwargs)
            self.add_callback(_At(step, action))

        monkeypatch.setattr(PolicyTrainer, "__init__", with_callback)

    return arrange


# --- files


def test_a_folder_gets_its_name_at_once_and_replaces_what_had_it(tmp_path):
    new, old = tmp_path / ".partial-run" / "checkpoint-2", tmp_path / "checkpoint-2"
    for folder, text in ((new, "new"), (old, "old")):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_text(text)
    publish(new, old)
    assert names(tmp_path) == [".partial-run", "checkpoint-2"]
    assert (old / "inner" / "file").read_text() == "new"
    remove([old])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_limit_keeps_the_best_and_the_newest(train, tmp_path, scored):
    flags = [
        "--save_steps",
        "1",
        "--save_total_limit",
        "2",
        "--eval_data_path",
        str(scored),
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
    ]
    flags += ["--load_best_model_at_end", "True", "--metric_for_best_model", "eval_logps/chosen", "--greater_is_better", "True"]
    state = train(tmp_path / "run", *flags, "--max_steps", "4")
    best = max((entry["eval_logps/chosen"], entry["step"]) for entry in state.log_history[:-2] if "eval_loss" in entry)[1]
    assert state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
    kept = sorted(folder.name for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == sorted({f"checkpoint-{best}", "checkpoint-4", *(["checkpoint-3"] if best == 4 else [])})
    stored = json.loads((tmp_path / "run" / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert stored["best_model_checkpoint"] == state.best_model_checkpoint


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt"])
def test_full_disk_names_the_folder_and_leaves_the_checkpoints_before(part, train, at_step, monkeypatch, tmp_path):
    """A limit on the size of files stands in for the disk: writes fail half-way, with the errors of those who write."""
    whole = values(train(tmp_path / "whole"))
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "whole" / "checkpoint-4").iterdir()}
    limit = sizes[part] - 1000
    assert part == "model.safetensors" or sizes["model.safetensors"] < limit  # the model is written first
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = tmp_path / "run"
    at_step(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1])))
    found = r"could not be written to .*run \(\d+\.\d GB free there\).*--resume_from_checkpoint last"
    try:
        with pytest.raises(OSError, match=found):
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    monkeypatch.undo()
    assert [name for name in names(run) if "checkpoint" in name] == ["checkpoint-2"]
    assert values(train(run, "--resume_from_checkpoint", "last")) == whole


# --- signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_goes_on(number, status, train, at_step, tmp_path, caplog, monkeypatch):
    whole = values(train(tmp_path / "whole"))
    before = signal.getsignal(number)
    at_step(3, lambda: [os.kill(os.getpid(), number) for _ in range(2)])  # a launcher may send it once more
    with pytest.raises(Preempted) as stopped:
        train(tmp_path / "run", "--save_strategy", "no")
    assert stopped.value.code == status and signal.getsignal(number) == before
    assert f"{number.name} at step 3 of 6: saved as {tmp_path / 'run' / 'checkpoint-3'}; go on by the same command" in caplog.text
    assert [name for name in names(tmp_path / "run") if "checkpoint" in name] == ["checkpoint-3"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    monkeypatch.undo()
    assert values(train(tmp_path / "run", "--resume_from_checkpoint", "last")) == whole


def test_a_signal_in_the_last_step_lets_the_run_finish(train, at_step, tmp_path):
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(tmp_path / "run").global_step == 6
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_signals_are_noted_inside_only():
    signals, before = StopSignals(), signal.getsignal(signal.SIGTERM)
    with signals.caught():
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) == before


def _one_of_two(rank: int, port: int, train, output_dir: Path, flags: list[str], results) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # inherited from the test process, which runs alone
    try:
        results.put((rank, 0, values(train(output_dir, *flags))))
    except Preempted as stopped:
        results.put((rank, stopped.code, []))


def test_processes_stop_at_one_step_when_one_is_asked(train, at_step, monkeypatch, tmp_path):
    def both(output_dir: Path, *flags: str) -> list[tuple]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        results = FORK.SimpleQueue()
        settings = ["--per_device_train_batch_size", "1", "--save_strategy", "no", *flags]
        arguments = [(rank, port, train, output_dir, settings, results) for rank in range(2)]
        processes = [FORK.Process(target=_one_of_two, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [0, 0]
        return sorted(results.get() for _ in processes)

    whole = both(tmp_path / "whole")
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM) if os.environ["RANK"] == "1" else None)
    assert both(tmp_path / "run") == [(0, 143, []), (1, 143, [])]
    monkeypatch.undo()
    folder = last_checkpoint(tmp_path / "run")
    assert folder == tmp_path / "run" / "checkpoint-3"
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "trainer_state.json"} <= set(names(folder))
    assert both(tmp_path / "run", "--resume_from_checkpoint", "last") == whole


# --- NaN


def test_nan_in_a_layer_names_metric_step_and_row_and_the_checkpoint_before_goes_on(train, at_step, load_recipe, monkeypatch, tmp_path):
    whole = values(train(tmp_path / "whole"))
    recipe = load_recipe("train/dpo.py")
    build, built = recipe.build_policy, []

    def keeping(*args):
        built.append(build(*args))
        return built[-1]

    def poison() -> None:
        layer = built[-1].model.language_model.layers[1].mlp
        layer.register_forward_hook(lambda module, inputs, output: output.fill_(float("nan")))

    monkeypatch.setattr(recipe, "build_policy", keeping)
    at_step(4, poison)
    with pytest.raises(FloatingPointError, match=r"^loss is nan at step 4 for the row with idx \d+; .*checkpoint in .*run is intact"):
        train(tmp_path / "run")
    monkeypatch.undo()
    assert [name for name in names(tmp_path / "run") if "checkpoint" in name] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert values(train(tmp_path / "again", "--resume_from_checkpoint", "last")) == whole
