"""The registry: a strategy is made by its name, its options are on the command line, mistakes end before a forward."""

import json

import pytest
import typer
from typer.testing import CliRunner

import t2kernels as t2
from t2kernels.adapt import Option, Strategy, make_strategy, register_strategy, strategy_names
from t2kernels.adapt.question import asked_of, choosable
from t2kernels.adapt.strategy_registry import check_options, own_options, strategy_options
from t2kernels.cli import strategies

NAMES = ["math", "code", "reason"]
PROMPTS = ["47+8+6?", "rsxt(gcafd)?", "ab,fj,cd,be,ci,ef;3a?"]


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = t2.tiny.load()
    bank = t2.patch_model(model)
    for name in [*NAMES, "classify"]:
        bank.add(name, t2.tiny.experts()[name])
    return model, tokenizer, bank


class Always(Strategy):
    """The same expert for every prompt."""

    def __init__(self, model, tokenizer, name):
        super().__init__(model, tokenizer)
        self.check_in_bank([name], "to choose is")
        self.name = name

    def choose_batch(self, prompts):
        return [self.name] * len(prompts)


def make_always(model, tokenizer, experts, *, tiny, which):
    return Always(model, tokenizer, list(experts)[which])


@pytest.fixture
def always(monkeypatch):
    """A strategy that is registered while a test runs."""
    from t2kernels.adapt import strategy_registry

    monkeypatch.setattr(strategy_registry, "_STRATEGIES", dict(strategy_registry._STRATEGIES))
    register_strategy("always", make_always, Option("which", int, 0, "Which expert answers."))


def test_every_name_makes_its_strategy(tiny, tmp_path):
    model, tokenizer, _ = tiny
    file = tmp_path / "sub.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in t2.tasks.load("sub").split("train", 2)))
    prompts = tmp_path / "prompts.jsonl"
    rows = [{**row, "expert": name} for name in NAMES for row in t2.tasks.load(name).split("train", 4)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in strategy_names():
        examples = prompts if name == "nearest" else file
        margin = 0.05 if name == "nearest" else 0.5
        options = own_options(name, {"examples": examples, "margin": margin, "classifier": "classify"})
        strategy = make_strategy(name, model, tokenizer, NAMES, tiny=True, **options)
        assert isinstance(strategy, Strategy)
        if name not in ("few-shot", "likelihood"):  # these two choose well only on the whole
            assert strategy.choose(PROMPTS) == NAMES
        if name != "few-shot":
            assert set(strategy.readers) <= {None, "classify", *NAMES}
    tiny[2].remove("few-shot")


def test_names_of_the_bank_may_differ_from_those_in_the_question(tiny):
    model, tokenizer, bank = tiny
    keys = {name: f"{name}@1" for name in NAMES}
    for name, key in keys.items():
        bank.add(key, bank[name])
    try:
        for kind in ("prompt", "classify", "confidence"):
            strategy = make_strategy(kind, model, tokenizer, keys, tiny=True)
            assert strategy.choose(PROMPTS) == list(keys.values())
    finally:
        for key in keys.values():
            bank.remove(key)


def test_a_recorded_question_keeps_the_base_model_for_experts_that_are_not_there(tiny):
    model, tokenizer, bank = tiny
    question = t2.adapt.Question.tiny(NAMES)
    judge = bank["classify"]
    bank.add("judge", t2.Expert(judge.z, {**judge.manifest, "question": question.record()}, judge.sketch))
    try:
        found = make_strategy("classify", model, tokenizer, {"math": "math"}, classifier="judge", margin=-1.0)
        assert found.choose(PROMPTS) == ["math", None, None]
        assert make_strategy("classify", model, tokenizer, NAMES, classifier="judge").choose(PROMPTS) == NAMES
    finally:
        bank.remove("judge")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("luck", {}, ValueError, "no strategy 'luck': wanted one of prompt, classify"),
        ("prompt", {"classifier": "classify"}, ValueError, "'prompt' has no option 'classifier'; it has margin"),
        ("few-shot", {}, ValueError, "'few-shot' needs examples"),
        ("few-shot", {"examples": "nowhere.jsonl"}, FileNotFoundError, "examples=nowhere.jsonl: no such file"),
        ("nearest", {}, ValueError, "'nearest' needs examples"),
        ("prompt", {"calibrate": "nowhere.csv"}, FileNotFoundError, "calibrate=nowhere.csv: no such file"),
        ("classify", {"classifier": None}, ValueError, "no classifier"),
        ("classify", {"classifier": "nobody"}, ValueError, "'nobody'"),
    ],
)
def test_refused_before_any_forward(tiny, name, options, error, message):
    model, tokenizer, _ = tiny
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(error, match=message):
        make_strategy(name, model, tokenizer, NAMES, tiny=True, **options)
    with pytest.raises(ValueError, match="no experts to choose from"):
        make_strategy("prompt", model, tokenizer, [], tiny=True)
    handle.remove()


def test_a_new_strategy_is_one_registration(tiny, always):
    model, tokenizer, _ = tiny
    assert strategy_names()[-1] == "always"
    assert check_options("always", {}) == {"which": 0}
    assert make_strategy("always", model, tokenizer, NAMES, which=1).choose(["a", "b"]) == ["code", "code"]


def test_its_options_are_on_the_command_line(always):
    """Each option once, between the options of the verb, with its type, default and help."""
    got = {}

    @strategies.with_strategy_options
    def choose(first: str = typer.Option("a"), strategy_options: dict = strategies.EACH, last: int = typer.Option(1)):
        got.update(strategy_options, first=first, last=last)

    app = typer.Typer()
    app.command()(choose)
    result = CliRunner().invoke(app, ["--which", "2", "--margin", ".5", "--last", "3"])
    assert result.exit_code == 0, result.output
    expected = {option.name: option.default for option in strategy_options()}
    assert got == {**expected, "which": 2, "margin": 0.5, "first": "a", "last": 3}
    words = CliRunner().invoke(app, ["--help"]).output
    assert words.index("--first") < words.index("--which") < words.index("--last")
    assert words.count("--which") == 1
    assert "Which expert answers" in words


def test_who_answers_a_question_and_who_is_chosen(tiny):
    tokenizer = tiny[1]
    question = t2.adapt.Question.tiny(["math", "code"])
    plain = {name: {} for name in NAMES}
    assert choosable({**plain, "classify": {}, "judge": {"question": question.record()}}) == NAMES
    assert asked_of({**plain, "judge": {"question": question.record()}}, tokenizer) == ("judge", question)
    assert asked_of({**plain, "classify": {}}, tokenizer, tiny=True) == ("classify", t2.adapt.Question.tiny(NAMES))
    assert asked_of(plain, tokenizer) == (None, t2.adapt.Question.about(NAMES))
    with pytest.raises(ValueError, match="no experts to choose from"):
        asked_of({"classify": {}}, tokenizer)
