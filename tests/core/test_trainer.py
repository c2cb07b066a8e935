"""AlignTrainer on plain TRL trainers: training, resume, Ctrl-C, evaluation, what the run directory holds."""

from __future__ import annotations

import json
import math
import os
import signal
import threading

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from aligntune.core import plots
from aligntune.core.run_dir import RunDir
from aligntune.core.trainer import AlignTrainer
from aligntune.errors import CheckpointError, DataError, NonFiniteError
from tests.core import tiny

VOLATILE = ("time", "tokens_per_second", "generated_tokens_per_second", "eval_runtime", "eval_samples_per_second",
            "eval_steps_per_second", "eval_model_preparation_time", "step_time")


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Half a second a run; one test looks at them."""
    if "outcome" not in request.node.name:
        monkeypatch.setattr(plots, "draw", lambda *args, **kwargs: [])


def wrap(trainer, path, *, algorithm="sft", **options):
    return AlignTrainer(trainer, config={"algorithm": algorithm}, run_dir=RunDir(path), backend="trl",
                        tokenizer=trainer.processing_class, algorithm=algorithm, progress=False, **options)


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def lines(path):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in VOLATILE} for record in records]


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            return self.action(control)


def ctrl_c(control):
    os.kill(os.getpid(), signal.SIGINT)


def give_up(control):
    raise RuntimeError("power cut")


def test_a_run_leaves_its_outcome(tmp_path):
    trainer = tiny.sft(tmp_path, eval_rows=tiny.text_rows(3), eval_strategy="steps", eval_steps=3,
                       report_to="tensorboard")
    run = wrap(trainer, tmp_path, data_report="16 rows", config_yaml="algorithm: sft\n", notices=["a choice"],
               attestation=lambda: {"kernels": {"rms_norm": 5}})
    out = run.train()
    assert out.global_step == 6 and run.config == {"algorithm": "sft"}
    records = lines(tmp_path)
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if record["kind"] == "eval"] == [3, 6]
    assert losses[-1] < losses[0] and out.training_loss == pytest.approx(sum(losses) / 6, rel=1e-6)
    assert out.metrics["train_loss"] == out.training_loss
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["error"] is None and summary["steps"] == 6
    assert summary["final_loss"] == losses[-1] and summary["training_loss"] == out.training_loss
    assert summary["peak_memory"]["cpu_rss_bytes"] > 2**27
    assert summary["checkpoint"] == str(tmp_path / "checkpoint-6") and summary["notices"] == ["a choice"]
    assert json.loads((tmp_path / "attestation.json").read_text())["kernels"] == {"rms_norm": 5}
    assert run.attestation()["trainer"] == "trl.trainer.sft_trainer.SFTTrainer"
    assert (tmp_path / "data_report.md").read_text() == "16 rows\n"
    assert "algorithm: sft" in (tmp_path / "config.yaml").read_text()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "reward.png").exists()
    assert list((tmp_path / "tb").glob("events*")) and not (tmp_path / "runs").exists()
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["trl"]


def test_a_run_that_failed_leaves_what_ran(tmp_path):
    def unknown():
        raise RuntimeError("the GPU is gone")

    for name, attestation, written in (("known", lambda: {"kernels": {"rms_norm": 5}}, True), ("not", unknown, False)):
        trainer = tiny.sft(tmp_path / name)
        trainer.add_callback(At(3, give_up))
        with pytest.raises(RuntimeError, match="power cut"):
            wrap(trainer, tmp_path / name, attestation=attestation).train()
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["status"] == "failed" and "power cut" in summary["error"]
        file = tmp_path / name / "attestation.json"
        assert file.exists() is written
    assert json.loads((tmp_path / "known" / "attestation.json").read_text())["kernels"] == {"rms_norm": 5}
    with pytest.raises(RuntimeError, match="the GPU is gone"):  # no other error: this one is raised
        wrap(tiny.sft(tmp_path / "whole", max_steps=1), tmp_path / "whole", attestation=unknown).train()


def test_tokens_are_the_real_ones_not_the_padding(tmp_path):
    trainer = tiny.sft(tmp_path, max_steps=8)  # 8 steps of 2 rows: each of the 16 rows once
    run = wrap(trainer, tmp_path)
    run.train()
    expected = sum(len(row) for row in trainer.train_dataset["input_ids"])
    assert expected == 308
    assert json.loads((tmp_path / "summary.json").read_text())["tokens"] == expected


def test_tokens_are_counted_where_trl_counts_none(tmp_path):
    trainer = tiny.sft(tmp_path, max_steps=8)
    del trainer._total_train_tokens
    trainer.compute_loss = lambda model, inputs, **kwargs: model(
        **{key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    wrap(trainer, tmp_path).train()
    assert json.loads((tmp_path / "summary.json").read_text())["tokens"] == 308
    assert not trainer.model._forward_pre_hooks


def test_transformers_own_progress_is_gone_and_a_line_is_printed_a_log(tmp_path, capfd):
    trainer = tiny.sft(tmp_path, max_steps=4, logging_steps=2, save_strategy="no", disable_tqdm=False)
    wrap(trainer, tmp_path).train()
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert not any(issubclass(kind, (ProgressCallback, PrinterCallback)) for kind in kinds)
    out, err = capfd.readouterr()
    assert [line.split()[1] for line in err.splitlines() if line.startswith("step ")] == ["2/4", "4/4"]
    assert "tok/s" in err and "GiB" in err and "loss" in err
    assert "{'loss'" not in out + err


# Resume


@pytest.mark.parametrize(("peft", "stop", "logging_steps"), [(False, 4, 1), (False, 8, 1), (True, 4, 3)],
                         ids=["middle of an epoch", "between epochs", "lora, between two logs"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, peft, stop, logging_steps):
    def make(name):
        trainer = tiny.sft(
            tmp_path / name, model=tiny.llama(dropout=0.3), max_steps=12, save_steps=4, logging_steps=logging_steps,
            peft_config=tiny.lora(lora_dropout=0.2) if peft else None, gradient_accumulation_steps=1,
        )
        return trainer, wrap(trainer, tmp_path / name)

    whole, run = make("whole")
    expected = run.train()
    broken, run = make("broken")
    broken.add_callback(At(stop + 2, give_up))
    with pytest.raises(RuntimeError, match="power cut"):
        run.train()
    assert json.loads((tmp_path / "broken/summary.json").read_text())["status"] == "failed"
    assert "power cut" in json.loads((tmp_path / "broken/summary.json").read_text())["error"]
    resumed, run = make("broken")
    torch.rand(7)  # the resumed process has drawn other numbers before
    got = run.train(resume_from_checkpoint=True)
    assert got.global_step == 12 and got.training_loss == expected.training_loss
    assert same(weights(whole), weights(resumed))
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    assert not same(weights(whole), weights(broken))
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken")]
    assert summaries[0]["tokens"] == summaries[1]["tokens"] > 0
    assert summaries[1]["resumed_from"] == str(tmp_path / f"broken/checkpoint-{stop}")


def test_resume_from_a_path_drops_the_other_future(tmp_path, capsys):
    run = wrap(tiny.sft(tmp_path), tmp_path)
    run.train()
    before = lines(tmp_path)
    again = wrap(tiny.sft(tmp_path), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert lines(tmp_path) == before
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {
        "checkpoint-2", "checkpoint-4", "checkpoint-6", "old-checkpoint-4", "old-checkpoint-6"}
    assert "another continuation" in capsys.readouterr().err


def test_a_finished_run_has_nothing_left_and_trains_no_step_more(tmp_path):
    trainer = tiny.sft(tmp_path, max_steps=5, save_steps=5, logging_steps=2)
    first = wrap(trainer, tmp_path).train()
    again = tiny.sft(tmp_path, max_steps=5, save_steps=5, logging_steps=2, model=tiny.llama(seed=9))
    out = wrap(again, tmp_path).train(resume_from_checkpoint=True)
    assert (out.global_step, out.training_loss) == (5, first.training_loss) and first.training_loss > 1
    assert same(weights(trainer), weights(again))


def test_the_last_line_says_which_step_its_numbers_are_of(tmp_path, capsys):
    wrap(tiny.sft(tmp_path / "a", max_steps=3, logging_steps=2), tmp_path / "a").train()
    wrap(tiny.sft(tmp_path / "b", max_steps=2, logging_steps=2), tmp_path / "b").train()
    odd, even = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finished")]
    assert "(logged at step 2); run in" in odd and "logged at" not in even


def test_the_resume_option_is_what_train_does_when_not_told(tmp_path):
    wrap(tiny.sft(tmp_path, max_steps=2), tmp_path).train()
    run = wrap(tiny.sft(tmp_path), tmp_path, resume=True)
    assert run.train().global_step == 6
    assert json.loads((tmp_path / "summary.json").read_text())["resumed_from"] == str(tmp_path / "checkpoint-2")


def test_training_anew_keeps_the_lines_of_before(tmp_path):
    wrap(tiny.sft(tmp_path, max_steps=2), tmp_path).train()
    old = (tmp_path / "metrics.jsonl").read_text()
    wrap(tiny.sft(tmp_path, max_steps=4), tmp_path).train()
    assert (tmp_path / "metrics-1.jsonl").read_text() == old
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4]


def test_without_a_checkpoint_resume_says_what_exists(tmp_path):
    run = wrap(tiny.sft(tmp_path), tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint in .*no checkpoint-N"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="no checkpoint 'checkpoint-3'.*none"):
        run.train(resume_from_checkpoint="checkpoint-3")


def test_a_checkpoint_of_plain_trl_resumes(tmp_path):
    whole = tiny.sft(tmp_path / "whole")
    whole.train()
    plain = tiny.sft(tmp_path / "run")
    plain.add_callback(At(4, give_up))
    with pytest.raises(RuntimeError):
        plain.train()
    assert (tmp_path / "run/checkpoint-2").is_dir()
    trainer = tiny.sft(tmp_path / "run")
    out = wrap(trainer, tmp_path / "run").train(resume_from_checkpoint=True)
    assert out.global_step == 6 and same(weights(whole), weights(trainer))
    # Only the losses of steps 3-6 are known.
    assert out.training_loss == pytest.approx(sum(r["loss"] for r in lines(tmp_path / "run")) / 4, rel=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    ({"model": lambda: tiny.llama(num_hidden_layers=3)}, "num_hidden_layers: 2 in the checkpoint, 3 now"),
    ({"model": lambda: tiny.llama(num_attention_heads=2)}, "num_attention_heads: 4 in the checkpoint, 2 now"),
    ({"peft_config": lambda: tiny.lora()}, "the checkpoint trains the whole model, this run adapters"),
    ({"per_device_train_batch_size": lambda: 4}, "rows a step .*: 2 in the checkpoint, 4 now"),
    ({"rows": lambda: tiny.text_rows(10)}, "rows in the training set: 16 in the checkpoint, 10 now[.;]"),
    ({"rows": lambda: tiny.text_rows(16).select(range(15, -1, -1))}, "content of the training rows"),
    ({"max_length": lambda: 16}, "content of the training rows"),
    ({"seed": lambda: 4}, "seed: 3 in the checkpoint, 4 now"),
    ({"data_seed": lambda: 4}, "seed: 3 in the checkpoint, 3 with data_seed 4 now"),
    ({"optim": lambda: "sgd"}, "optimizer: adamw_fused in the checkpoint, sgd now"),
    ({"optim": lambda: "adamw_bnb_8bit"}, "optimizer: adamw_fused in the checkpoint, adamw_8bit now"),
], ids=["layers", "heads", "lora", "batch", "rows", "order", "length", "seed", "data seed", "sgd", "8 bit"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    wrap(tiny.sft(tmp_path, max_steps=2), tmp_path).train()
    other = wrap(tiny.sft(tmp_path, **{key: make() for key, make in change.items()}), tmp_path)
    before = weights(other.trainer)
    with pytest.raises(CheckpointError, match=f"{message}.*To start anew .* as model_name"):
        other.train(resume_from_checkpoint=True)
    assert same(before, weights(other.trainer))
    assert (tmp_path / "checkpoint-2").is_dir()


def test_what_does_not_change_the_state_or_the_rows_may_change(tmp_path):
    """So may everything that an earlier version did not write down."""
    wrap(tiny.sft(tmp_path, max_steps=2, optim="adamw_torch"), tmp_path).train()
    rows = tiny.text_rows().map(lambda row: row, keep_in_memory=True)  # another fingerprint of datasets' own
    other = wrap(tiny.sft(tmp_path, max_steps=4, optim="adamw_torch_fused", rows=rows), tmp_path)
    assert other.train(resume_from_checkpoint=True).global_step == 4
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    written = json.loads(state.read_text())
    kept = written["stateful_callbacks"]["AlignTuneState"]["attributes"]["fingerprint"]
    for key in ("optimizer", "seed", "rows_digest"):
        del kept[key]
    state.write_text(json.dumps(written))
    assert wrap(tiny.sft(tmp_path, seed=4), tmp_path).train(resume_from_checkpoint=True).global_step == 6


@pytest.mark.parametrize(("change", "message"), [
    ({"r": 8}, "lora_r: 4 in the checkpoint, 8 now"),
    ({"lora_alpha": 16}, "lora_alpha: 8 in the checkpoint, 16 now"),
    ({"target_modules": ["q_proj"]}, r"target_modules: \['q_proj', 'v_proj'\] in the checkpoint, \['q_proj'\] now"),
    ({"use_rslora": True}, "use_rslora"),
], ids=["rank", "alpha", "modules", "rslora"])
def test_adapters_of_another_shape_are_refused(tmp_path, change, message):
    wrap(tiny.sft(tmp_path, max_steps=2, peft_config=tiny.lora()), tmp_path).train()
    other = wrap(tiny.sft(tmp_path, peft_config=tiny.lora(**change)), tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        other.train(resume_from_checkpoint=True)
    assert "model_name" not in str(caught.value)  # adapters alone are no model


def test_adapters_of_another_base_or_algorithm_are_refused(tmp_path):
    wrap(tiny.sft(tmp_path, max_steps=2, peft_config=tiny.lora()), tmp_path).train()
    other = wrap(tiny.sft(tmp_path, peft_config=tiny.lora(), model=tiny.llama(seed=5)), tmp_path)
    with pytest.raises(CheckpointError, match="weights under the adapters"):
        other.train(resume_from_checkpoint=True)
    other = wrap(tiny.sft(tmp_path, peft_config=tiny.lora()), tmp_path, algorithm="orpo")
    with pytest.raises(CheckpointError, match="algorithm: sft in the checkpoint, orpo now"):
        other.train(resume_from_checkpoint=True)
    same_base = wrap(tiny.sft(tmp_path, peft_config=tiny.lora()), tmp_path)
    assert same_base.train(resume_from_checkpoint=True).global_step == 6


def test_a_mixture_of_experts_resumes_with_its_experts(tmp_path):
    """transformers loads the checkpoint of such a model without its experts, in silence."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def model():
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(
            vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2, max_position_embeddings=128, sliding_window=None))

    whole = tiny.sft(tmp_path / "whole", model=model(), max_steps=4)
    wrap(whole, tmp_path / "whole").train()
    broken = tiny.sft(tmp_path / "broken", model=model(), max_steps=4)
    broken.add_callback(At(3, give_up))
    run = wrap(broken, tmp_path / "broken")
    with pytest.raises(RuntimeError):
        run.train()
    resumed = tiny.sft(tmp_path / "broken", model=model(), max_steps=4)
    wrap(resumed, tmp_path / "broken").train(resume_from_checkpoint=True)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.allclose(weights(whole)[experts], weights(resumed)[experts], atol=1e-6)
    assert not torch.allclose(weights(whole)[experts], dict(model().named_parameters())[experts], atol=1e-3)


# Ctrl-C


def test_ctrl_c_finishes_the_step_saves_and_the_run_goes_on_as_if_nothing_was(tmp_path):
    whole = tiny.sft(tmp_path / "whole", save_steps=100, logging_steps=2)
    wrap(whole, tmp_path / "whole").train()
    trainer = tiny.sft(tmp_path / "run", save_steps=100, logging_steps=2)
    trainer.callback_handler.callbacks.insert(0, At(3, ctrl_c))
    before = signal.getsignal(signal.SIGINT)
    run = wrap(trainer, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3 of 6"):
        run.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = tiny.sft(tmp_path / "run", save_steps=100, logging_steps=2)
    wrap(resumed, tmp_path / "run").train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"


def test_ctrl_c_and_on_in_the_same_process(tmp_path):
    whole = tiny.sft(tmp_path / "whole", logging_steps=2)
    wrap(whole, tmp_path / "whole").train()
    trainer = tiny.sft(tmp_path / "run", logging_steps=2)
    trainer.callback_handler.callbacks.insert(0, At(3, ctrl_c))
    run = wrap(trainer, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run.train()
    trainer.callback_handler.callbacks.pop(0)
    assert run.train(resume_from_checkpoint=True).global_step == 6
    assert same(weights(whole), weights(trainer))
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_train_end"])
def test_a_ctrl_c_at_the_very_end_is_not_swallowed(tmp_path, event):
    trainer = tiny.sft(tmp_path, max_steps=2, eval_rows=tiny.text_rows(3), eval_strategy="steps", eval_steps=2)
    callback = TrainerCallback()
    setattr(callback, event, lambda args, state, control, **kwargs: ctrl_c(control) if state.global_step == 2 else None)
    trainer.callback_handler.callbacks.insert(0, callback)
    run = wrap(trainer, tmp_path)
    with pytest.raises(KeyboardInterrupt, match="training is complete"):
        run.train()
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"
    assert (tmp_path / "checkpoint-2/trainer_state.json").is_file()


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def twice(control):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer = tiny.sft(tmp_path, save_steps=100)
    trainer.callback_handler.callbacks.insert(0, At(3, twice))
    run = wrap(trainer, tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="at once"):
        run.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(tmp_path.glob("checkpoint-*"))
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"


def test_outside_the_main_thread_no_handler_is_touched(tmp_path):
    run = wrap(tiny.sft(tmp_path, max_steps=1), tmp_path)
    done = []
    worker = threading.Thread(target=lambda: done.append(run.train().global_step))
    worker.start()
    worker.join()
    assert done == [1]


# Errors that would otherwise be silent


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    trainer = tiny.sft(tmp_path, max_steps=4, save_steps=100)
    run = wrap(trainer, tmp_path)
    plain = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: plain(*a, **k) * (math.nan if trainer.state.global_step == 2 else 1.0)
    with pytest.raises(NonFiniteError, match="loss is nan at step 3"):
        run.train()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and "NonFiniteError" in summary["error"] and summary["steps"] == 3
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] is None


@pytest.mark.parametrize("rows", [None, "empty"])
def test_evaluate_without_data_names_the_options(tmp_path, rows):
    trainer = tiny.sft(tmp_path)
    if rows:
        trainer.eval_dataset = tiny.text_rows(1).select([])
    with pytest.raises(DataError) as error:
        wrap(trainer, tmp_path).evaluate()
    for name in ("eval_dataset_name", "eval_split", "max_eval_samples", "val_split_ratio"):
        assert name in str(error.value)


# Evaluation


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
def test_perplexity_and_accuracy_do_not_depend_on_the_batch(tmp_path, batch):
    trainer = tiny.sft(tmp_path, eval_rows=tiny.text_rows(5), per_device_eval_batch_size=batch, save_strategy="no")
    run = wrap(trainer, tmp_path)
    run.train()
    metrics = run.evaluate()
    nll, right, count = 0.0, 0, 0
    with torch.no_grad():
        for row in trainer.eval_dataset:
            ids = torch.tensor([row["input_ids"]])
            scores = torch.log_softmax(trainer.model(ids).logits[0, :-1], dim=-1)
            nll -= float(scores.gather(1, ids[0, 1:, None]).sum())
            right += int((scores.argmax(-1) == ids[0, 1:]).sum())
            count += ids.shape[1] - 1
    assert count == 86 and 20 < right < 70
    assert metrics["eval_loss"] == pytest.approx(nll / count, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(right / count, abs=1e-6)
    assert trainer.model.training


def test_evaluation_in_training_has_the_same_numbers_and_can_choose_the_best(tmp_path):
    trainer = tiny.sft(tmp_path, eval_rows=tiny.text_rows(5), eval_strategy="steps", eval_steps=2, save_steps=2,
                       load_best_model_at_end=True, metric_for_best_model="perplexity", greater_is_better=False)
    run = wrap(trainer, tmp_path)
    run.train()
    seen = [record["eval_perplexity"] for record in lines(tmp_path) if record["kind"] == "eval"]
    assert trainer.state.best_metric == min(seen)
    assert run.evaluate()["eval_perplexity"] == pytest.approx(min(seen), rel=1e-6)
