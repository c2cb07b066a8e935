"""What users write under `reward_functions`, and what a reward that goes wrong turns into."""

import asyncio
import decimal
import functools
import subprocess
import sys

import pytest
import torch

from aligntune.errors import AlignTuneError, ConfigError, DataError, NonFiniteError, RewardError
from aligntune.rewards import REWARDS, check_columns, get_reward, guard, register, resolve_rewards


def length(prompts, completions, completion_ids=None, *, scale=1.0, **columns):
    return [scale * len(completion) for completion in completions]


class Constant:
    def __init__(self, value=3.0):
        self.value = value

    def __call__(self, prompts, completions, **columns):
        return [self.value] * len(completions)


@pytest.fixture
def registered():
    """Undo what a test registers."""
    before, aliases = dict(REWARDS._entries), dict(REWARDS._aliases)
    yield
    REWARDS._entries, REWARDS._aliases = before, aliases


def call(function, completions, **columns):
    count = len(completions)
    return function(prompts=["q"] * count, completions=completions, completion_ids=[[1]] * count, **columns)


def names(functions):
    return [function.__name__ for function in functions]


def test_a_mix_of_every_form():
    functions, weights = resolve_rewards(
        ["exact_match", {"name": "format", "weight": 0.5, "options": {"tags": ["a"]}}, length, Constant(), Constant,
         {"name": length, "weight": -1, "options": {"scale": 2.0}}, "tests.rewards.test_resolve:length"],
    )  # fmt: skip
    assert names(functions) == ["exact_match", "format", "length", "Constant", "Constant_2", "length_2", "length_3"]
    assert weights == [1.0, 0.5, 1.0, 1.0, 1.0, -1.0, 1.0]
    values = [call(function, ["<a>b</a>", "x"], answer=["x", "x"]) for function in functions]
    assert values == [[0.0, 1.0], [1.0, 0.0], [8.0, 1.0], [3.0, 3.0], [3.0, 3.0], [16.0, 2.0], [8.0, 1.0]]


def test_one_reward_need_not_be_a_list():
    for spec in ("exact_match", "Exact-Match", ["exact_match"], ("exact_match",), {"name": "exact_match"}):
        functions, weights = resolve_rewards(spec)
        assert names(functions) == ["exact_match"] and weights == [1.0]
    assert names(resolve_rewards("math_verify")[0]) == ["math"]


def test_weights():
    assert resolve_rewards(["exact_match", length], [2, 0.5])[1] == [2.0, 0.5]
    assert resolve_rewards(None) == ([], [])
    for weights, wrong in [([1], "1 weights for 2"), ([1, 2, 3], "3 weights for 2"), ([1, "2"], r"\[1\].*'2'"),
                           ([1, float("nan")], "nan"), ([True, 1], "True"), ("12", "a list of 2"),
                           (1.0, "a list of 2")]:
        with pytest.raises(ConfigError, match=wrong):
            resolve_rewards(["exact_match", length], weights)
    with pytest.raises(ConfigError, match="use one of the two"):
        resolve_rewards([{"name": "math", "weight": 2}], [1.0])
    with pytest.raises(ConfigError, match="1 weights for 0"):
        resolve_rewards(None, [1.0])


def test_every_fault_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        resolve_rewards(["exact_mach", 5, {"name": "math", "wieght": 1}, {"name": "math", "options": {"colunm": "x"}},
                         {"weight": 1}, {"name": "math", "weight": "1"}, {"name": "math", "options": 3}], [1])
    text = str(caught.value)
    for piece in ("did you mean 'exact_match'", "5: expected a name", "did you mean 'weight'", "did you mean 'column'",
                  "'name' is missing", "not '1'", "not 3", "1 weights for 7"):
        assert piece in text
    assert len(caught.value.faults) == 8
    assert "exact_match" in text and "format" in text and "math" in text


def test_a_function_that_cannot_be_called_as_a_reward_is_refused_before_anything_is_loaded():
    def bare(completions):
        return [0.0]

    def whole(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):
        return [0.0]

    @functools.wraps(bare)
    def decorated(**columns):
        return bare(columns["completions"])

    with pytest.raises(ConfigError, match="'bare' does not take prompts, completion_ids, .*[*][*]columns") as caught:
        resolve_rewards([bare, "exact_mach", whole, lambda prompts, completions, completion_ids: [0.0]])
    assert len(caught.value.faults) == 3
    assert caught.value.faults[2].startswith("reward '<lambda>' does not take trainer_state, log_extra, log_metric: ")
    assert len(resolve_rewards([whole, lambda **columns: [0.0], decorated, "exact_match"])[0]) == 4


def test_a_check_of_rewards_builds_none():
    class Heavy:
        def __init__(self, size=1):
            raise AssertionError("built")

        def __call__(self, prompts, completions, **columns):
            return [0.0]

    class Bare(Heavy):
        def __call__(self, completions):
            return [0.0]

    given = [Heavy, {"name": Heavy, "options": {"size": 2}}]
    assert names(resolve_rewards(given, build=False)[0]) == ["Heavy", "Heavy_2"]
    with pytest.raises(AssertionError, match="built"):
        resolve_rewards(given)
    with pytest.raises(ConfigError) as caught:
        resolve_rewards([{"name": Heavy, "options": {"sise": 2}}, Bare], build=False)
    option, call_of_bare = caught.value.faults
    assert "did you mean 'size'" in option and call_of_bare.startswith("reward 'Bare' does not take prompts, ")


def test_columns_that_a_reward_needs_and_those_that_it_does_not_take():
    def leveled(prompts, completions, level, *, weights=None, **columns):
        return [0.0]

    def whole(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer):
        return [0.0]

    class Graded:
        def __init__(self):
            raise AssertionError("built")

        def __call__(self, prompts, completions, grade, **columns):
            return [0.0]

    class Free(Graded):
        __call__ = staticmethod(lambda prompts, completions, **columns: [0.0])

    def faults(*given, columns=("answer", "levels"), where="the dataset"):
        functions, _ = resolve_rewards(list(given), build=False)
        try:
            check_columns(functions, columns, where)
        except DataError as error:
            return str(error).splitlines()
        return []

    assert faults(leveled, Graded, whole) == [
        "reward 'leveled' needs the column 'level', which the dataset does not hand to rewards; its columns: answer, "
        "levels; did you mean 'levels'?",
        "reward 'Graded' needs the column 'grade', which the dataset does not hand to rewards; its columns: answer, "
        "levels",
        "reward 'whole' does not take levels of the dataset, which every reward is handed; end its parameters with "
        "**columns",
    ]
    own = faults(lambda prompts, completions, prompt, **columns: [0.0], columns=(), where="the evaluation data")
    assert own == ["reward '<lambda>' needs the column 'prompt', which the evaluation data does not hand to rewards; "
                   "its columns: none beside the prompt"]
    assert faults(lambda prompts, completions, solution, **columns: [0.0], columns=("answer",)) == [
        "reward '<lambda>' needs the column 'solution', which the dataset does not hand to rewards; its columns: "
        "answer"]
    bound = {"name": leveled, "options": {"level": 3}}
    assert not faults(bound, functools.partial(leveled, level=3), Free, length, "format", "exact_match", "math")
    assert not faults(bound, columns=("level",)) and not faults(leveled, Graded, columns=("level", "grade"))
    assert len(faults({"name": leveled, "options": {"weights": 2}})) == 1
    assert not faults({"name": "math", "options": {"column": "levels"}})
    (told,) = faults({"name": "math", "options": {"column": "level"}}, "exact_match", where="the evaluation data")
    assert "'level', which the evaluation data does not have; its columns: answer, levels. Name the column:" in told
    # TRL would call the reward with two values of one name, or with its own in the place of the column's.
    assert faults(Free, length, columns=("completions", "log_extra", "completion_ids")) == [
        f"the dataset has a column {name!r}, and rewards are handed something else by that name: rename it"
        for name in ("completions", "log_extra")]
    assert not faults(torch.nn.Linear(1, 1), columns=("completions",)), "it is called with texts alone"


def test_options_of_functions_are_named_parameters_and_beat_columns():
    function = get_reward("tests.rewards.test_resolve:length", scale=3.0)
    assert call(function, ["ab"], scale=[100.0]) == [6.0]  # the dataset has a column of that name
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        get_reward("tests.rewards.test_resolve:length", scael=3.0)

    def bare(prompts, completions, **columns):
        return [0.0]

    with pytest.raises(ConfigError, match="takes no options"):
        resolve_rewards({"name": bare, "options": {"x": 1}})


def test_module_and_file_targets(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def vowels(prompts, completions, **_):\n    return [c.count('a') for c in completions]\nX = 1\n")
    functions, _ = resolve_rewards(f"{file}:vowels")
    assert names(functions) == ["vowels"] and call(functions[0], ["banana", ""]) == [3.0, 0.0]
    for target, wrong in [(f"{file}:vowls", "did you mean 'vowels'"), (f"{file}:X", "cannot be called"),
                          (f"{tmp_path}/none.py:f", "no file"), ("no_such_module_:f", "cannot import")]:
        with pytest.raises(ConfigError, match=wrong):
            resolve_rewards(target)


def test_register(registered):
    register("my-reward", length, aliases=("mine",))

    @register("constant", summary="three")
    class Three(Constant):
        pass

    assert Three().value == 3.0
    functions, _ = resolve_rewards(["my-reward", "mine", {"name": "constant", "options": {"value": 4}}])
    assert names(functions) == ["my-reward", "my-reward_2", "constant"]
    assert call(functions[2], ["x"]) == [4.0]
    with pytest.raises(ConfigError, match="registered already"):
        register("math", length)
    with pytest.raises(ConfigError, match="expected a callable"):
        register("other", 5)
    register("math", length, replace=True)
    assert call(resolve_rewards("math")[0][0], ["abc"]) == [3.0]


def test_importing_rewards_imports_nothing_heavy():
    code = ("import sys, aligntune.rewards as r; r.resolve_rewards(['exact_match', 'format', 'math']);"
            "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'sympy', 'math_verify'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the guard ---------------------------------------------------------------------------------------------------


def rows(*values):
    def reward(prompts, completions, **columns):
        return list(values)

    return guard(reward)


def test_good_values_pass_as_floats():
    import numpy
    import torch

    values = [1, True, 0.5, None, decimal.Decimal("0.25"), numpy.float32(2), numpy.int64(3), torch.tensor(4.0)]
    out = call(rows(*values), ["x"] * 8)
    assert out == [1.0, 1.0, 0.5, None, 0.25, 2.0, 3.0, 4.0]
    assert [type(value) for value in out] == [float] * 3 + [type(None)] + [float] * 4
    assert call(guard(lambda **_: torch.tensor([1.0, 2.0])), ["x"] * 2) == [1.0, 2.0]
    assert call(guard(lambda **_: numpy.array([1, 2])), ["x"] * 2) == [1.0, 2.0]
    assert call(guard(lambda **_: (v for v in (1, 2))), ["x"] * 2) == [1.0, 2.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_reward_row_and_prompt(value):
    with pytest.raises(NonFiniteError, match=rf"'reward' returned {value} for row 1 of the batch of 2.*'q'.*'second'"):
        call(rows(0.0, value), ["first", "second"])


@pytest.mark.parametrize("value", ["1.0", [1.0], {}, 1j, object(), b"1"])
def test_a_value_that_is_no_number_names_its_row(value):
    with pytest.raises(RewardError, match="not a number, for row 1 of the batch of 2"):
        call(rows(0.0, value), ["first", "second"])


@pytest.mark.parametrize(
    ("result", "wrong"),
    [(None, "a NoneType"), (1.0, "a float"), ("ab", "a str"), ({1: 1, 2: 2}, "a dict"),
     ([1.0], "1 values for 2"), ([1.0] * 3, "3 values for 2"), ([], "0 values for 2")],
)  # fmt: skip
def test_a_result_of_the_wrong_shape(result, wrong):
    with pytest.raises(RewardError, match=f"reward 'broken' returned {wrong}"):
        call(guard(lambda **_: result, "broken"), ["x", "y"])


def picky(prompts, completions, number, state=None, **columns):
    assert state == "kept"  # not a column: goes through unsliced
    return [1.0 / value for value in number]


def test_an_exception_names_the_row_and_keeps_its_cause():
    prompts = [[{"role": "user", "content": f"prompt {row} " + "long " * 100}] for row in range(3)]
    with pytest.raises(RewardError, match="'picky', row 2 of the batch of 3.*prompt 2.*ZeroDivisionError") as caught:
        guard(picky)(prompts=prompts, completions=["a", "b", "c"], completion_ids=None, number=[1, 2, 0], state="kept")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert len(str(caught.value)) < 400  # the prompt is shortened


def test_an_exception_of_the_batch_alone_is_still_named():
    def together(prompts, completions, **columns):
        if len(completions) > 1:
            raise KeyError("pair")
        return [0.0]

    with pytest.raises(RewardError, match="reward 'together' raised KeyError: 'pair'"):
        call(guard(together), ["a", "b"])


def test_interrupts_and_our_own_errors_pass_through():
    def stop(prompts, completions, **columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(guard(stop), ["a"])
    with pytest.raises(DataError, match="columns: gold"):
        call(resolve_rewards("exact_match")[0][0], ["a"], gold=["a"])
    assert issubclass(RewardError, AlignTuneError) and not issubclass(RewardError, ValueError)


def test_async_rewards_stay_async_and_are_guarded():
    async def later(prompts, completions, *, scale=1.0, **columns):
        await asyncio.sleep(0)
        return [scale * len(completion) for completion in completions]

    class Later:
        async def __call__(self, prompts, completions, **columns):
            return [1.0] if completions == ["good"] else [float("nan")]

    from trl.trainer.utils import get_callable_name, is_async_callable

    spec = [later, {"name": later, "options": {"scale": 2.0}}, Later(), functools.partial(later)]
    functions, _ = resolve_rewards(spec)
    assert all(is_async_callable(function) for function in functions)
    assert [get_callable_name(function) for function in functions] == ["later", "later_2", "Later", "later_3"]
    assert [asyncio.run(call(function, ["abc"])) for function in functions[:2]] == [[3.0], [6.0]]
    assert asyncio.run(call(functions[2], ["good"])) == [1.0]
    with pytest.raises(NonFiniteError, match="'Later'"):
        asyncio.run(call(functions[2], ["bad"]))

    async def broken(prompts, completions, number, **columns):
        return [1 / value for value in number]

    with pytest.raises(RewardError, match="'broken', row 1 of the batch of 2"):
        asyncio.run(call(guard(broken), ["a", "b"], number=[1, 0]))


def test_a_reward_model_passes_as_it_is():
    import torch

    class Scorer(torch.nn.Module):
        pass

    model = Scorer()
    functions, weights = resolve_rewards([model, "format"], [1.0, 0.1])
    assert functions[0] is model and functions[1].__name__ == "format" and weights == [1.0, 0.1]
