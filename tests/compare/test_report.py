"""From results to a verdict: what is concluded, asserted, written; on results that are made up."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aligntune.compare import html, measure, outputs, svg, tables
from aligntune.compare.findings import compare_data, machine_findings
from aligntune.compare.markdown import markdown
from aligntune.compare.report import Report, build, check
from aligntune.compare.schema import faults_of
from aligntune.compare.settings import Settings, read_arm, read_assertion
from aligntune.core.run_dir import jsonable
from tests.compare import made_up


def settings(**options: Any) -> Settings:
    return Settings("sft-builtin", {}, {}, read_arm("trl"), read_arm("fast"), **options)


def built(tmp_path: Path, results: Any = None, baseline: Any = None, **options: Any) -> dict[str, Any]:
    return build(settings(**options), results or made_up.results(tmp_path), command=["aligntune"], baseline=baseline)


def test_the_verdict_line(tmp_path: Path) -> None:
    report = built(tmp_path)
    number = r"[\d.]+"
    assert re.fullmatch(rf"fast: {number}x tokens/s \[{number}, {number}\], peak 8\.0 -> 4\.0 GiB, parity PASS "
                        r"\(max \|dloss\| \S+, drift \S+\), noise [\d.]+%", report["verdict"]), report["verdict"]
    assert report["speed"]["ratio"][0] == pytest.approx(1.8, rel=0.03) and report["speed"]["significant"]
    assert report["memory"]["peak_ratio"] == 0.5


def test_mfu_needs_a_known_card_and_its_work(tmp_path: Path) -> None:
    results = made_up.results(tmp_path)
    for one in results["b"]:
        one["work"], one["precision"] = {"linear": 10**9, "trained": 10**9, "attention": 2048}, "bf16"
    report = built(tmp_path, results)
    flops = 6 * 1e9 * 400 + 6 * 40_000 * 2048
    seconds = report["speed"]["b"]["step_seconds"]["p50"]
    assert report["speed"]["b"]["mfu"] == pytest.approx(flops / seconds / 989.4e12, rel=0.02)
    assert report["speed"]["a"]["mfu"] is None


def test_time_to_a_loss_and_cost(tmp_path: Path) -> None:
    report = built(tmp_path, price=3.6, target_loss=2.5)
    a, b = report["speed"]["a"], report["speed"]["b"]
    # The smoothed loss of five steps, 3 - 0.05 n in the middle one, is at 2.5 with step 12.
    assert a["time_to_target"][0] == pytest.approx(1.2, rel=0.03) and b["time_to_target"][0] < a["time_to_target"][0]
    assert report["cost"]["a"]["per_run"] == pytest.approx(3.6 / 3600 * 36)
    assert report["cost"]["a"]["per_million_tokens"] == pytest.approx(3.6 / 3600 * 1e6 / a["tokens_per_second"])
    assert built(tmp_path, target_loss=0.1)["speed"]["a"]["time_to_target"] == [None, None]
    assert built(tmp_path)["cost"]["a"]["per_run"] is None
    # b's losses are a hair above a's: without a target of its own the comparison takes one that both reach.
    default = built(tmp_path)["speed"]
    assert default["target_loss"] == pytest.approx(2.1 + 0.01 * 0.75)
    assert default["a"]["time_to_target"][0] == pytest.approx(2.0, rel=0.03)
    assert default["b"]["time_to_target"][0] == pytest.approx(2.0 / 1.8, rel=0.03)


def test_traced_steps_and_the_warm_up_count_for_no_speed(tmp_path: Path) -> None:
    results = made_up.results(tmp_path)
    results["b"][0]["steps"][9] |= {"traced": True, "seconds": 60.0}
    results["b"][1]["steps"][1]["seconds"] = 60.0
    assert measure.timed_steps(results["a"], results["b"], 5) == [5, 6, 7, 8, *range(10, 20)]
    report = built(tmp_path, results)
    assert report["speed"]["ratio"][0] == pytest.approx(1.8, rel=0.03)
    assert report["speed"]["b"]["warmup_extra"][1] == pytest.approx(60, rel=0.02)


@pytest.mark.parametrize(("b", "words"), [
    ({"noise": 1e-3}, "losses"), ({"gradient": 0.01}, "gradient, step 1"), ({"speed": 1.001}, "no significant"),
])
def test_what_is_wrong_is_in_the_verdict(b: dict[str, Any], words: str, tmp_path: Path) -> None:
    report = built(tmp_path, made_up.results(tmp_path, b=b))
    assert words in report["verdict"]
    assert report["parity"]["passed"] is ("significant" in words)


def test_a_gradient_as_far_from_the_oracle_as_the_yardsticks_passes(tmp_path: Path) -> None:
    results = made_up.results(tmp_path, b={"gradient": 0.01})
    results["yardstick"] = [made_up.result(tmp_path, "yardstick", noise=1e-8, gradient=0.009)]
    assert built(tmp_path, results)["parity"]["passed"] is True


def test_arm_a_is_held_to_the_oracle_too(tmp_path: Path) -> None:
    for wrong, passed in ((9e-7, True), (0.01, False)):
        results = made_up.results(tmp_path, b={"gradient": 8e-7})
        results["a"] = [made_up.result(tmp_path, "a", label="liger", repeat=n, gradient=wrong) for n in range(2)]
        results["yardstick"] = [made_up.result(tmp_path, "yardstick", repeat=n, noise=n * 1e-8, gradient=8e-7)
                                for n in range(2)]
        report = build(dataclasses.replace(settings(), a=read_arm("liger")), results, command=[])
        checks = {one["name"]: one["passed"] for one in report["parity"]["checks"]}
        assert checks["gradient, step 1"] and checks["gradient of a, step 1"] is passed, report["verdict"]
        assert report["parity"]["passed"] is passed
        assert ("gradient of a, step 1 0.01" in report["verdict"]) is not passed
    assert "gradient of a, step 1" not in {one["name"] for one in built(tmp_path)["parity"]["checks"]}


def test_one_parameter_among_many(tmp_path: Path) -> None:
    results = made_up.results(tmp_path)
    from safetensors.torch import load_file, save_file

    place = Path(results["b"][0]["folder"]) / "gradients.safetensors"
    grads = load_file(place)
    grads["1/layers.1.mlp.weight"] = grads["1/layers.1.mlp.weight"] * 0
    results["b"][0]["norms"]["1/layers.1.mlp.weight"] = 0.0
    save_file(grads, place)
    report = built(tmp_path, results)
    assert {one["kind"] for one in report["findings"]} == {"zero-gradient"}
    assert "layers.1.mlp.weight" in report["verdict"]
    assert report["parity"]["worst"][0]["name"] == "layers.1.mlp.weight"
    assert report["parity"]["worst"][0]["relative"] == 1.0 and report["parity"]["worst"][0]["cosine"] is None


def test_other_data_is_no_comparison(tmp_path: Path) -> None:
    results = made_up.results(tmp_path)
    steps = results["b"][0]["steps"]
    steps[4]["data"], steps[5]["data"] = steps[5]["data"], steps[4]["data"]
    report = built(tmp_path, results)
    assert not report["valid"] and report["parity"]["passed"] is None
    assert "the same rows in another order from step 5 on" in report["verdict"]
    steps[4]["data"] = {"ids": ["x"] * 4, "labels": ["x"] * 4, "prompts": ["x"] * 4}
    found = compare_data(results["a"][0], results["b"][0], online=False, repacked=False)
    assert "other rows" in found.findings[0].text


def test_other_rows_are_told_from_another_order_where_the_datasets_are_known(tmp_path: Path) -> None:
    for a, b, kind, words in (("200:aa", "200:aa", "data-order", "in another order, from step 5 on (79 of 80"),
                              ("200:aa", "150:bb", "data", "their datasets hold other rows (79 of 80 are common"),
                              (None, "150:bb", "data-order", "other rows, or the same in another order")):
        one, two = made_up.result(tmp_path, "a"), made_up.result(tmp_path, "b")
        one["dataset"], two["dataset"] = a, b
        two["steps"][4]["data"] = {part: ["x", *names[1:]] for part, names in two["steps"][4]["data"].items()}
        (found,) = compare_data(one, two, online=False, repacked=False).findings
        assert found.kind == kind and words in found.text


def test_packing_is_said_and_not_held_against_the_arms(tmp_path: Path) -> None:
    results = made_up.results(tmp_path)
    for one in results["b"]:
        one["config"] = {"data": {"packing": True}}
        one["steps"] = one["steps"][:15]
    report = built(tmp_path, results)
    assert report["valid"] and {one["kind"] for one in report["findings"]} == {"packing"}
    assert report["parity"]["losses"] == {} and report["speed"]["steps"] == 10


def test_other_data_beside_other_packing_is_no_comparison(tmp_path: Path) -> None:
    for a, b, valid in (("200:aa", "200:aa", True), ("200:aa", "200:bb", False), (None, "200:bb", True)):
        results = made_up.results(tmp_path / f"{a}{b}")
        for one in results["a"]:
            one["dataset"] = a
        for one in results["b"]:
            one["config"], one["dataset"] = {"data": {"packing": True}}, b
        report = built(tmp_path, results)
        assert report["valid"] is valid and "packing" in report["findings"][0]["text"]
        assert ("NOT COMPARABLE" in report["verdict"] and "different data" in report["verdict"]) is not valid


@pytest.mark.parametrize(("change", "words"), [
    (lambda paper: paper["step"]["problems"].append("rms_norm_forward: promised 5, the trace shows 0"), "fell back"),
    (lambda paper: paper.update(step=None), "no step was traced"),
    (lambda paper: paper["step"].update(promised={}, kernels={}), "ran eager"),
    (lambda paper: paper.update(backend="trl"), "ran on backend 'trl'"),
])
def test_a_fallback_is_a_failed_comparison(change: Any, words: str, tmp_path: Path) -> None:
    results = made_up.results(tmp_path)
    change(results["b"][1]["attestation"])
    report = Report(built(tmp_path, results, asserts=[read_assertion("attestation")]), tmp_path)
    assert words in report.verdict and not report.valid and report.exit_code == 10 and report.failed


def test_a_peer_whose_kernels_did_not_run(tmp_path: Path) -> None:
    results = made_up.results(tmp_path, b={"label": "liger", "backend": "trl", "speed": 1.0})
    given = dataclasses.replace(settings(), b=read_arm("liger"))
    for names, valid in (({"_rms_norm_forward_kernel": 9, "sgemm": 40}, True), ({"sgemm": 40}, False)):
        for one in results["b"]:
            one["trace"] = {"step": 4, "device": "cuda", "names": names}
        report = build(given, results, command=[])
        assert report["valid"] is valid, report["verdict"]
    assert "no kernel of liger" in report["verdict"]


def test_another_order_of_the_same_rows_is_told_from_other_rows(tmp_path: Path) -> None:
    """A short run in another order may have no row in common with the first: then the datasets tell."""
    for a, b, kind in (("200:aa", "200:aa", "data-order"), ("200:aa", "200:bb", "data"), (None, None, "data")):
        results = made_up.results(tmp_path / f"{a}{b}")
        for name, dataset in (("a", a), ("b", b)):
            for one in results[name]:
                one["dataset"] = dataset
        for one in results["b"]:
            for step in one["steps"]:
                step["data"] = {part: [f"other {name}" for name in names] for part, names in step["data"].items()}
        report = built(tmp_path, results)
        assert [found["kind"] for found in report["findings"] if found["severity"] == "invalid"] == [kind]


def online(tmp_path: Path, *, reward: float = 0.0, every: int = 4) -> dict[str, Any]:
    """Rounds of `every` steps, whose first tells of its rollouts; b's rewards are higher by `reward`."""
    results = made_up.results(tmp_path, b={"online": True})
    for role in ("a", "b"):
        for one in results[role]:
            one |= {"online": True, "round": every, "seed": 42 + one["repeat"], "beta": 0.04}
            for index, step in enumerate(one["steps"]):
                value = 0.5 + 0.01 * one["repeat"] + (reward if role == "b" else 0.0)
                step["metrics"] = {"entropy": 1.0} if index % every else {"reward": value, "kl": 0.1, "entropy": 1.0}
    return results


def test_rollouts_that_feed_several_steps_have_bands_over_the_seeds(tmp_path: Path) -> None:
    report = built(tmp_path, online(tmp_path))
    bands = report["parity"]["bands"]
    assert set(bands) == {"reward", "kl", "entropy"} and bands["reward"]["steps"] == [1, 5, 9, 13, 17]
    assert bands["reward"]["a"] == bands["reward"]["b"] == [[0.5] * 5, [0.51] * 5]
    assert bands["reward"]["spread_over_seeds"] == pytest.approx(0.01) and bands["entropy"]["steps"][:3] == [1, 2, 3]
    page = html.html(jsonable(report))
    assert "reward by step" in page and "Rollouts, means over the run" in page
    outputs.write(Report(report, tmp_path))
    lines = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert [line["reward"] for line in lines[:5]] == ["0.5", "", "", "", "0.5"]
    worse = built(tmp_path, online(tmp_path, reward=-0.2))["parity"]["checks"]
    assert [one["passed"] for one in worse if one["name"] == "reward"] == [False]


def test_a_round_that_no_other_follows_tells_of_no_missing_kl(tmp_path: Path) -> None:
    results = online(tmp_path, every=made_up.STEPS)
    assert built(tmp_path, results)["findings"] == []
    results = online(tmp_path)
    for one in results["b"]:
        for step in one["steps"]:
            step["metrics"].pop("kl", None)
    assert {one["kind"] for one in built(tmp_path, results)["findings"]} == {"kl-missing"}


def test_a_shared_or_slow_card_is_said(tmp_path: Path) -> None:
    results = made_up.results(tmp_path)
    results["a"][0]["machine"] = {"shared": True, "memory_before_mib": 9000.0, "throttled": ["power brake"]}
    texts = [one.text for one in machine_findings(results)]
    assert "a1: somebody else was on the card (9,000 MiB in use before it started)" in texts
    assert any("power brake" in text for text in texts)
    results["a"][0]["machine"]["others"] = ["123, python, 9000"]
    assert machine_findings(results)[0].text.endswith("before it started; 123, python, 9000)")


@pytest.mark.parametrize(("text", "holds"), [
    ("speedup>=1.5", True), ("speedup>=1.8", False), ("speedup<=2", True), ("speedup<1.7", False), ("parity", True),
    ("data", True), ("attestation", True), ("significant", True), ("peak_ratio<=0.5", True), ("peak_ratio<0.5", False),
    ("kl<=1e-6", True), ("top1>=1", True), ("max_dloss<=1e-9", False), ("drift<1e-3", True), ("cold_start<10", True),
    ("tokens_per_second>1e9", False), ("baseline_speedup>=1", False),
])
def test_assertions(text: str, holds: bool, tmp_path: Path) -> None:
    report = built(tmp_path)
    found = check(read_assertion(text), report)
    assert found["holds"] is holds, found


def test_a_baseline(tmp_path: Path) -> None:
    before = built(tmp_path, made_up.results(tmp_path, b={"speed": 2.4}))
    report = Report(built(tmp_path, baseline=before), tmp_path)
    assert any("speedup fell from 2.4" in text for text in report.failed) and report.exit_code == 9
    same = Report(built(tmp_path, baseline=built(tmp_path)), tmp_path)
    assert same.failed == [] and same.exit_code == 0
    broken = built(tmp_path, made_up.results(tmp_path, b={"noise": 1e-3}), baseline=built(tmp_path))
    assert "parity passed in the baseline and does not now" in broken["baseline"]["worse"]


def test_a_baseline_of_another_job_is_said(tmp_path: Path) -> None:
    before = jsonable(built(tmp_path))
    assert built(tmp_path, baseline=before)["findings"] == []
    before["arms"]["b"]["gpus"], before["recipe"], before["overrides"] = [], "dpo-builtin", {"batch_size": 8}
    before["memory"]["b"] |= {"peak_is": "resident set of the process (no card)", "peak": 2**20}
    report = built(tmp_path, baseline=before)
    (found,) = report["findings"]
    assert (found["kind"], found["severity"]) == ("baseline", "said") and report["baseline"]["worse"] == []
    assert found["text"] == ("the baseline is of another job: recipe dpo-builtin, here sft-builtin; "
                             'options {"batch_size": 8}, here {}; card no card, here NVIDIA H100 80GB HBM3')


def test_a_known_mistake_is_named_in_either_arm(tmp_path: Path) -> None:
    for role, other in (("a", "b"), ("b", "a")):
        results = made_up.results(tmp_path)
        results["oracle"][0]["hypotheses"] = {"right": results[other][0]["steps"][0]["loss"], "mask+1": 3.5, "all": 2.0}
        for one in results[role]:
            one["steps"][0]["loss"] = 3.5
        found = [one for one in built(tmp_path, results)["findings"] if one["kind"] == "mask"]
        assert len(found) == 1 and found[0]["text"].startswith(f"{role} (")
        assert "shifted by one token (+1)" in found[0]["text"]


# ------------------------------------------------------------------------------------------------------------ the files


def test_the_schema_takes_a_report_and_tells_what_is_wrong_with_others(tmp_path: Path) -> None:
    report = jsonable(built(tmp_path))
    assert faults_of(report) == []
    assert faults_of([]) and faults_of({**report, "schema": "aligntune.compare/0"})[0].startswith("schema is")
    broken = copy.deepcopy(report)
    del broken["memory"]["a"]["peak"]
    broken["valid"], broken["speed"]["ratio"] = 1, ["fast"]
    assert faults_of(broken) == ["report.valid = '1': bool is wanted",
                                 "report.speed.ratio[0] = 'fast': int or float is wanted",
                                 "report.memory.a.peak: missing"]
    assert faults_of({**report, "speed": None}) == []


class Reader(HTMLParser):
    """Checks that tags close, and collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_file(tmp_path: Path) -> None:
    results = made_up.results(tmp_path)
    for one in results["b"]:
        one["label"] = "fast,x='<b>|</b>'"
    given = dataclasses.replace(settings(asserts=[read_assertion("speedup>=9")]),
                                b=read_arm("fast,lora_alpha='<b>|</b>'"))
    data = build(given, results, command=["aligntune", "compare"])
    outputs.write(Report(data, tmp_path))
    assert faults_of(json.loads((tmp_path / "report.json").read_text())) == []
    lines = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert len(lines) == 20 * (2 + 2 + 1)
    assert {line["arm"] for line in lines} == {"a", "b", "yardstick"} and float(lines[0]["loss"]) == 2.95
    page = (tmp_path / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == [] and reader.fetched == [] and "http" not in page and "url(" not in page
    assert "<b>" not in page and "prefers-color-scheme: dark" in page and page.count("<svg") >= 5
    text = (tmp_path / "report.md").read_text()
    assert data["verdict"].replace("|", "\\|").replace("<", "&lt;") in text and "speedup>=9" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_a_report_without_speed_or_parity_is_drawn_too(tmp_path: Path) -> None:
    results = made_up.results(tmp_path, repeats=1)
    results["oracle"], results["yardstick"] = [], []
    for role in ("a", "b"):
        results[role][0]["steps"] = results[role][0]["steps"][:1]
        results[role][0]["steps"][0]["seconds"] = None
    report = jsonable(built(tmp_path, results, oracle=False))
    assert faults_of(report) == [] and "speed not measured" in report["verdict"]
    assert "noise not measured" in report["verdict"]
    assert html.html(report) and markdown(report)


def test_ticks_are_round_and_inside() -> None:
    assert svg.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert svg.ticks(0.93, 1.07) == pytest.approx([0.95, 1.0, 1.05]) or len(svg.ticks(0.93, 1.07)) >= 3
    assert svg.ticks(3, 3) == [3] and svg.ticks(float("nan"), 1)
    assert [svg.number(value) for value in (0, 1e-7, 0.25, 123456789.0)] == ["0", "1e-07", "0.25", "1.23e+08"]


@pytest.mark.parametrize(("name", "short"), [
    ("void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)"
     "::{lambda(float)#1}, std::array<char*, 2ul> >(int, std::array<char*, 2ul>)", "bfloat16_copy_kernel_cuda"),
    ("void at::native::elementwise_kernel<128, 4, at::native::BinaryFunctor<c10::BFloat16, c10::BFloat16, "
     "at::native::binary_internal::MulFunctor<float> >(at::TensorIteratorBase&)>(int)", "MulFunctor"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, int> >(float)", "reduce_kernel"),
    ("void flash::flash_fwd_kernel(Params)", "flash_fwd_kernel"), ("aten::mm", "mm"),
    ("nvjet_sm90_tss_64x32_64x16_2x4_h_bz_NTT", "nvjet_sm90_tss_64x32_64x16_2x4_h_bz_NTT"),
    ("Memset (Device)", "Memset "), ("rms_norm_forward", "rms_norm_forward"),
])
def test_kernels_are_named_without_their_templates(name: str, short: str) -> None:
    assert tables.kernel_name(name) == short.strip()


def test_kernels_of_one_name_are_counted_together(tmp_path: Path) -> None:
    arm = built(tmp_path)["arms"]["a"]
    arm["trace"] = {"device": "cuda", "step": 4, "names": {"void f<1>(int)": 2, "g": 4, "void f<2>(int)": 3}}
    assert "most frequent of 2 kernels in step 4: f x5, g x4" in tables._ran(arm)


@pytest.mark.parametrize(("first", "name"), [
    ("/home/someone/aligntune/__main__.py", "aligntune"), ("/env/bin/aligntune", "aligntune"), ("mine.py", "mine.py"),
])
def test_the_command_can_be_typed_again(first: str, name: str, tmp_path: Path) -> None:
    report = built(tmp_path)
    report["command"] = [first, "compare", "x", "--assert", "speedup > 1"]
    (found,) = (rows for rows in tables.tables(report) if rows.title == "Protocol")
    assert dict(found.rows)["command"] == f"{name} compare x --assert 'speedup > 1'"
