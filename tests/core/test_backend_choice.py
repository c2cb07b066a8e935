"""Who runs the job: an explicit backend never falls back, and "auto" says what it took and why."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aligntune.backends.fast.support import BACKEND as FAST
from aligntune.backends.fast.support import SEQUENCE_RATIOS, FastBackend
from aligntune.core.backend_factory import choose_backend, create_rl_trainer, create_sft_trainer
from aligntune.core.registry import Support
from aligntune.core.resolve import Job, resolve
from aligntune.core.rules import VLLM_STOPS
from aligntune.errors import BackendUnavailableError, ConfigError

HERE = Support("supported", "NVIDIA Stub 9000")
ABSENT = Support("unavailable", "torch sees no CUDA GPU", "an NVIDIA GPU")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: fast is available")
CALLS = {
    "sft": "create_sft_trainer('builtin:tiny', [{'text': 'a'}], backend='fast')",
    "gspo": "create_rl_trainer('builtin:tiny', [{'prompt': 'a'}], algorithm='gspo', backend='fast', "
            "reward_functions=[len])",
}


@pytest.mark.parametrize(("call", "error", "told"), [
    pytest.param("sft", "BackendUnavailableError", ("CUDA", "backend='trl' runs here", "compute capability 8.0"),
                 marks=NO_GPU, id="no GPU"),
    pytest.param("gspo", "UnsupportedAlgorithmError", (SEQUENCE_RATIOS,), id="gspo"),
])
def test_an_explicit_fast_never_falls_back(call: str, error: str, told: tuple[str, ...], tmp_path: Path) -> None:
    """In a process of its own: these tests run with interpreted kernels, which make fast available anywhere."""
    script = (
        "from aligntune import create_rl_trainer, create_sft_trainer\n"
        "from aligntune.errors import AlignTuneError\n"
        f"try:\n    {CALLS[call]}\n"
        "except AlignTuneError as error:\n    print(type(error).__name__, error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    ended = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True,
                           text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"{error} backend='fast'"), ended.stdout
    assert all(part in ended.stdout for part in told), ended.stdout
    assert not list(tmp_path.iterdir())  # nothing is written before it is known who trains


def job_of(algorithm: str = "sft", **options: Any) -> Job:
    rewards = {"reward_functions": ["exact_match"]} if algorithm in ("grpo", "gspo") else {}
    return resolve({"model_name": "m", "dataset_name": "d", "algorithm": algorithm, **rewards, **options})


@pytest.mark.parametrize(("job", "here", "backend", "told"), [
    (job_of, HERE, "fast", "backend: fast (NVIDIA Stub 9000 runs sft)"),
    (lambda: job_of("gspo"), HERE, "trl", f"backend: trl, because fast does not run gspo ({SEQUENCE_RATIOS})"),
    (lambda: job_of("grpo", importance_sampling_level="sequence"), HERE, "trl",
     "backend: trl, because fast does not run importance_sampling_level='sequence'"),
    (lambda: job_of("grpo", trainer_options={"importance_sampling_level": "sequence"}), HERE, "trl",
     "backend: trl, because fast does not run importance_sampling_level='sequence'"),
    (lambda: job_of(device="cpu"), HERE, "trl", "backend: trl, because device='cpu' was asked for"),
    (job_of, ABSENT, "trl", "backend: trl, because fast is not available here (torch sees no CUDA GPU)"),
], ids=["fast", "gspo", "a gate", "a gate by trainer_options", "device='cpu'", "no GPU"])
def test_auto_says_what_it_took_and_why(
    job: Any, here: Support, backend: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(FastBackend, "available", lambda self: here)
    made = job()
    assert made.backend == "auto" and not made.notices
    chosen = choose_backend(made)
    assert (chosen is FAST) == (backend == "fast")
    assert (chosen.name, made.backend, made.config.backend) == (backend, backend, backend)
    assert made.notices == [told]


def test_fast_off_the_gpu_is_a_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"backend": "fast", "device": "cpu"}
    assert choose_backend(job_of(**given)) is FAST  # interpreted, as these tests are
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(FastBackend, "available", lambda self: HERE)
    with pytest.raises(ConfigError, match="model.device = 'cpu' with backend = 'fast': .* backend='trl' trains"):
        job_of(**given)
    assert choose_backend(job_of(**given | {"backend": "trl"})).name == "trl"


def test_auto_does_not_take_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = job_of()
    assert choose_backend(made).name == "trl"
    assert made.notices == ["backend: trl, because TRITON_INTERPRET=1 is for tests of fast, which must be named to run"]


@pytest.mark.parametrize(("fields", "told"), [
    ({"deepspeed": {"zero_optimization": {"stage": 2}}}, r"deepspeed={'zero.*pip install deepspeed"),
    ({"use_liger_kernel": True}, r"use_liger_kernel=True: .*pip install liger-kernel"),
])
def test_a_package_that_a_field_needs_is_asked_for_before_anything_is_read(
    fields: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(BackendUnavailableError, match=told):
        choose_backend(job_of(backend="trl", trainer_options=fields))
    off = dict.fromkeys(fields, False)
    assert choose_backend(job_of(backend="trl", trainer_options=off)).name == "trl"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    assert choose_backend(job_of(backend="trl", trainer_options=fields)).name == "trl"


@pytest.mark.parametrize(("wanted", "told"), [
    ("wandb", r"report_to='wandb': wandb is not installed here; pip install 'aligntune\[wandb\]'"),
    (["tensorboard", "mlflow"], "report_to='mlflow': .*pip install mlflow"),
    ({"trainer_options": {"report_to": ["comet_ml"]}}, "report_to='comet_ml': .*pip install comet-ml"),
])
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_read(
    wanted: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = wanted if isinstance(wanted, dict) else {"report_to": wanted}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(BackendUnavailableError, match=told):
        create_sft_trainer("/no/such/model", "/no/such/data", backend="trl", **given)
    for other in ("none", "all", "tensorboard", [], ["tensorboard"], "no_tracker"):  # the last is transformers' to tell
        assert choose_backend(job_of(backend="trl", report_to=other)).name == "trl"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    assert choose_backend(job_of(backend="trl", **given)).name == "trl"


@pytest.mark.parametrize(("backend", "algorithm", "options", "engine"), [
    ("trl", "grpo", {}, "vllm"), ("auto", "gspo", {}, "vllm"), ("trl", "grpo", {"rollout_engine": "hf"}, "hf"),
    ("trl", "gspo", {"trainer_options": {"optim": "sgd"}}, "vllm"), ("trl", "grpo", {"device": "cpu"}, "auto"),
    ("trl", "grpo", {"stop_strings": None}, "auto"), ("trl", "grpo", {"trainer_options": {"use_vllm": False}}, "auto"),
    ("fast", "grpo", {}, "auto"), ("auto", "grpo", {}, "auto"),
])
@pytest.mark.parametrize("here", ["vllm", "no vllm", "no GPU"])
def test_with_stop_strings_auto_is_an_engine_that_ends_completions_at_them(
    backend: str, algorithm: str, options: dict[str, Any], engine: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: (
        (object() if here != "no vllm" else None) if name == "vllm" else find(name, *rest)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here != "no GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(FastBackend, "available", lambda self: HERE)
    job = job_of(algorithm, backend=backend, **{"stop_strings": "x", **options})
    assert choose_backend(job).name == choose_backend(job).name  # recipes ask, and ask again when they build
    chosen = engine if here == "vllm" or engine != "vllm" else "auto"
    assert job.options.rollout_engine == job.config.rollout.rollout_engine == chosen
    told = [line for line in job.notices if "stop_strings" in line]
    assert [line.partition(",")[0] for line in told] == (
        ["rollout_engine: vllm", VLLM_STOPS] if chosen == "vllm" else [])


@pytest.mark.parametrize("wish", [
    {"rollout_engine": "vllm"}, {"trainer_options": {"use_vllm": True}},
    {"rollout_engine": "vllm", "trainer_options": {"vllm_mode": "server"}},
], ids=["rollout_engine", "use_vllm", "a server"])
@pytest.mark.parametrize("backend", ["trl", "fast", "auto"])
def test_vllm_that_is_not_installed_is_told_before_anything_is_read(
    backend: str, wish: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(FastBackend, "available", lambda self: HERE)
    with pytest.raises(BackendUnavailableError, match=r"vllm.*pip install 'aligntune\[vllm\]'"):
        create_rl_trainer("/no/such/model", "/no/such/data", algorithm="grpo", reward_functions=["exact_match"],
                          backend=backend, **wish)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    assert choose_backend(job_of("grpo", backend=backend, **wish)).name == backend.replace("auto", "fast")
