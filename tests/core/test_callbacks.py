"""Progress, plots, the clock and the token counter."""

from __future__ import annotations

import io
import math
import os
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from aligntune.core import plots
from aligntune.core.callbacks import Clock, Interrupt, TokenCounter
from aligntune.core.progress import Progress, describe, duration, memory_now, speed
from tests.core import tiny


def state(step, *, main=True, last=10):
    return SimpleNamespace(global_step=step, max_steps=last, is_world_process_zero=main)


def progress(**options):
    metrics = SimpleNamespace(first_step=0, clock=SimpleNamespace(wall=lambda: 20.0, wall_before=0.0))
    return Progress(metrics, **options)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_progress(shown, **options):
    shown.on_train_begin(None, state(0, **options), None)
    for step in range(1, 11):
        shown.on_step_end(None, state(step, **options), None)
        if step % 5 == 0:
            shown.on_log(None, state(step, **options), None, logs={"loss": 2.5, "tokens_per_second": 1234.0})
    shown.on_log(None, state(10, **options), None, logs={"eval_loss": 3.25, "eval_perplexity": 25.8})
    shown.on_log(None, state(10, **options), None, logs={"train_runtime": 1.0, "train_loss": 2.0})
    shown.on_train_end(None, state(10, **options), None)


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    run_progress(progress())
    text = terminal.getvalue()
    assert "step 10/10" in text and "loss 2.5" in text and "1,234 tok/s" in text and "GiB" in text and "left" in text
    assert "evaluation: eval loss 3.25" in text and "\x1b[" in text
    assert text.count("loss 2.5") < 60


@pytest.mark.parametrize(("terminal", "bar"), [(False, True), (True, False)])
def test_elsewhere_one_plain_line_a_log(monkeypatch, terminal, bar):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    run_progress(progress(bar=bar))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in stream.getvalue()
    assert lines[0].startswith("step 5/10  loss 2.5  1,234 tok/s") and lines[0].endswith("0:00:20 left")
    assert lines[2] == "step 10  evaluation: eval loss 3.25  perplexity 25.8"


def test_past_its_end_a_run_has_no_time_left(monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    progress(bar=False).on_log(None, state(6, last=4), None, logs={"loss": 2.5})
    assert stream.getvalue().startswith("step 6/4  loss 2.5") and stream.getvalue().endswith("  0:00:00 left\n")


def test_other_processes_are_silent(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    run_progress(progress(), main=False)
    assert stream.getvalue() == ""


def test_an_error_leaves_the_terminal_usable(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    shown = progress()
    shown.on_train_begin(None, state(0), None)
    shown.close()
    shown.close()
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_memory_is_that_of_this_process_now():
    """Also after a fork; and once it is read, reading it again costs a log nothing to speak of."""
    before = memory_now()
    held = bytearray(b"x" * (256 << 20))
    assert 0.2 < memory_now() - before < 0.4
    begun = time.perf_counter()
    for _ in range(20):
        memory_now()
    assert (time.perf_counter() - begun) / 20 < 1e-3
    if (child := os.fork()) == 0:
        forked = bytearray(b"y" * (256 << 20))
        own = psutil.Process().memory_info().rss / 2**30
        os._exit(0 if abs(memory_now() - own) < 0.05 and forked else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and held


def test_online_methods_show_reward_and_generated_tokens():
    logs = {"loss": 0.001, "reward": 0.75, "kl": 0.02, "tokens_per_second": 900.0, "generated_tokens_per_second": 400.0,
            "frac_reward_zero_std": 0.1}
    assert describe(logs) == "loss 0.001  reward 0.75  kl 0.02"
    assert speed(logs) == "400 generated tok/s" and speed({}) == ""
    assert duration(3725.9) == "1:02:05"


# Plots


def records(count):
    rows = [{"step": step, "kind": "train", "loss": 1 / step, "reward": step / count} for step in range(1, count + 1)]
    return [*rows, {"step": count, "kind": "eval", "eval_loss": 0.5, "eval_reward": 0.9}]


def test_plots_are_drawn_for_what_there_is(tmp_path):
    assert plots.draw([], tmp_path, title="x", online=True) == []
    assert [path.name for path in plots.draw(records(30), tmp_path, title="x", online=False)] == ["loss.png"]
    assert [path.name for path in plots.draw(records(3), tmp_path, title="x", online=True)] == [
        "loss.png", "reward.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "reward.png"]
    assert plots.draw([{"step": 1, "kind": "train", "loss": None}], tmp_path, title="x", online=False) == []


def test_a_plot_shows_raw_and_smoothed_values_and_evaluations(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (seen.append(figure), open(path, "wb").close()))
    plots.draw(records(30), tmp_path, title="sft on a", online=False)
    axes = seen[0].axes[0]
    raw, smooth, evaluation = axes.get_lines()
    assert list(raw.get_ydata()) == [1 / step for step in range(1, 31)]
    assert smooth.get_ydata()[10] == pytest.approx(sum(1 / step for step in (10, 11, 12)) / 3)
    assert list(evaluation.get_xdata()) == [30] and list(evaluation.get_ydata()) == [0.5]
    assert axes.get_xlabel() == "optimizer step" and axes.get_ylabel() == "loss" and axes.get_title() == "sft on a"


def test_smoothing_does_not_lag():
    assert plots.smooth([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.5, 2.0, 3.0, 4.0, 4.5]
    assert plots.smooth([7.0], 5) == [7.0]


def test_matplotlib_is_not_imported_before_a_plot_is_drawn():
    import subprocess
    import sys

    code = ("import sys, aligntune.core.plots, aligntune.core.run_dir\n"
            "print('matplotlib' in sys.modules, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# Clock, counter, Ctrl-C across processes


def test_the_clock_leaves_evaluations_and_saves_out_of_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    clock.start(wall=50.0, training=40.0)
    now[0] = 110.0
    clock.mark()
    now[0] = 113.0  # an evaluation
    clock.skip()
    now[0] = 114.0  # a save
    clock.skip()
    now[0] = 120.0
    assert clock.wall() == 70.0 and clock.training() == 56.0
    clock.stop()
    now[0] = 999.0
    assert clock.wall() == 70.0 and clock.training() == 56.0


def test_the_counter_counts_training_forwards_without_padding():
    model = tiny.llama().train()
    counter = TokenCounter(model, 10.0)
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    model(input_ids=ids, attention_mask=mask)
    model(ids)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    model.eval()(input_ids=ids, attention_mask=mask)
    assert counter.total() == 10 + 8 + 10
    counter.remove()
    model.train()(input_ids=ids)
    assert counter.total() == 28


def test_the_launchers_echo_of_a_ctrl_c_is_not_a_second_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    now = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    interrupt = Interrupt()
    interrupt._handle(2, None)
    now[0] = 11.0
    interrupt._handle(2, None)
    now[0] = 14.0
    with pytest.raises(KeyboardInterrupt):
        interrupt._handle(2, None)


def test_means_are_weighted_and_nan_is_left_out():
    from aligntune.core.eval_metrics import _weighted

    assert _weighted([1.0, 2.0], [4.0, 1.0]) == pytest.approx(1.2)
    assert _weighted([1.0, math.nan], [4.0, 1.0]) == 1.0
    assert _weighted([math.nan], [4.0]) is None
