"""Public names, command lines and entry points stay: a program or a script that was written for them runs unchanged.

New names, parameters with a default, and options may be added: add them here too.
"""

import importlib
import inspect
import re
import tomllib

import pytest
import typer

from t2kernels.cli import app
from tests.helpers.paths import ROOT

# Module: {name: its parameters and their defaults, where it has any}.
NAMES = {
    "t2kernels": {
        "Expert": "z, manifest=None, sketch=None",
        "ExpertBank": "layers, rows, origin, routing, plan",
        "ExpertError": "",
        "ExpertMismatch": "",
        "Explanation": "title, lines, advice=()",
        "Factor": "U, sigma, V",
        "Factors": "factors, manifest=None, sketches=None",
        "LoraAdapter": "pairs, base_model=None, errors=None, whole=frozenset()",
        "ParameterCount": "matrices, dense, svf, lora, lora_rank",
        "T2Error": "",
        "evaluation": "",
        "adapt": "",
        "count_parameters": "model, targets='all', rank=None, lora_rank=16",
        "decompose": (
            "model_or_path, out=None, rank=None, targets='all', device=None, workers=None, dtype=None, "
            "format=None, max_error=None, progress=None"
        ),
        "explain": "model, batch=1, experts=(), machine=None",
        "patch_model": (
            "model, targets='all', rank='auto', form='auto', factors=None, rows=64, max_error=None, progress=None"
        ),
        "svf_linear": "x, V, U, scale, expert_ids, base=None, bias=None, impl='auto'",
        "svf_linear_group": "x, V, U, scale, expert_ids, base=None, bias=None, impl='auto'",
        "svf_linear_ref": "x, V, U, scale, expert_ids, base=None, bias=None",
        "tasks": "",
        "tiny": "",
        "train": "",
        "unpatch_model": "model, expert=None",
    },
    "t2kernels.ops": {
        "Choice": "impl, why_impl, path, why_path, experts=None",
        "ImplUnavailableError": "",
        "plan": "x, V, Us, expert_ids, base=False, impl='auto', grad=False",
        "svf_linear": "x, V, U, scale, expert_ids, base=None, bias=None, impl='auto'",
        "svf_linear_group": "x, V, U, scale, expert_ids, base=None, bias=None, impl='auto'",
        "svf_linear_ref": "x, V, U, scale, expert_ids, base=None, bias=None",
    },
    "t2kernels.adapt": {
        "CEMConfig": (
            "population=32, elite=0.2, iterations=8, patience=3, tolerance=0.02, mean=None, std=0.5, "
            "low=None, high=None, per='expert', mixing='delta', score='both', likelihood_weight=0.01, "
            "temperature=0.0, samples=1, keep_best=True, take='mean', seed=0, known=False, penalty=0.0"
        ),
        "Classifier": "model, tokenizer, question=None, classifier='classify', **settings",
        "Examples": "model, tokenizer, rows, reward=None, gold=None, max_new_tokens=None, memory=4294967296",
        "FewShot": (
            "model, tokenizer, examples, experts, config=None, name='few-shot', replace=False, caution='auto', "
            "progress=None"
        ),
        "Found": "alpha, expert, scores, stopped, candidates, seconds, answers=<factory>",
        "Nearest": "model, tokenizer, examples, margin=0.0",
        "Prompt": "model, tokenizer, question, margin=0.0, method='likelihood', asked=None, neutral=(), norm='sum'",
        "Question": "template, labels, strip='', chat=False",
        "Router": "judge, step=0.25, most=None",
        "Strategy": "model, tokenizer, max_new_tokens=16",
        "ZeroShot": "model, tokenizer, experts, by='likelihood'",
        "alignment": "source, target, rename=None",
        "labelled": "tasks, question, name='classify'",
        "refine": "examples, completions, start=None, name='refined', steps=15, lr=0.005, batch=32, seed=0",
        "search": "examples, experts, name='few-shot', config=None, logits=None, progress=None",
        "shuffled": "expert, seed=0",
        "transfer": "expert, bank, source=None, rename=None, strength=1.0, **manifest",
    },
    "t2kernels.train": {
        "ReinforceTrainer": (
            "model, args, train_dataset, eval_dataset, scorers, processing_class, choosers=None, **kwargs"
        ),
        "SVFConfig": (
            "output_dir=None, parametrisation='raw', max_new_tokens=None, num_generations=1, temperature=1.0, "
            "reward_range=<factory>, advantage='none', advantage_clip=None, kl_coef=0.05, "
            "kl_direction='reverse', loss_type='sum', num_iterations=1, clip=None, policy_loss='expected', "
            "written_coef=0.02, supervised=False, loss_batch_size=32, loss_memory=None, share_prefix=True, "
            "logits_memory=268435456, keep_best=False, history=None, rollout='transformers', "
            "rollout_options=None, max_staleness=0, importance_cap=2.0"
        ),
        "SVFTrainer": (
            "model, args=None, train_dataset=None, eval_dataset=None, reward=None, experts=None, "
            "reward_weights=None, init=None, processing_class=None, **kwargs"
        ),
        "TrainedExperts": "model, bank, order, parametrisation",
        "experts": "model, names, init=None, parametrisation='raw'",
    },
    "t2kernels.tasks": {
        "Task": (
            "name, rows, extract=<function whole>, max_new_tokens=64, judge=None, stop=(), "
            "checker='equality', chat=False, images=False, check=None, labels=(), system=None, norm='sum', form=None, "
            "made_of_chats=False"
        ),
        "classification": "path, instruction=None, labels=None, check='choice'",
        "from_jsonl": "path, check=None, labels=None",
        "hub_names": "",
        "load": "name, path=None, chat=False, checker='auto', holdout=0, check=None",
        "names": "",
    },
    "t2kernels.tiny": {
        "experts": "",
        "load": "dtype=None",
        "path": "",
    },
    "t2kernels.factors": {
        "Factor": "U, sigma, V",
        "Factors": "factors, manifest=None, sketches=None",
        "svd": "W, rank=None",
    },
    "t2kernels.integrations.vllm": {
        "engine_args": "factors=None, rows=8, form=None, rank=None, max_error=0.1, layout='auto', host=1024, **others",
        "expert": "name, source",
        "few_shot": (
            "llm, experts, rows, reward, out, name='few-shot', caution=2.0, max_new_tokens=None, "
            "progress=None, **options"
        ),
        "register": "",
    },
    "t2kernels.integrations.lm_eval": {
        "SVFLM": (
            "pretrained, expert=None, experts='', expert_column='expert', targets='all', rank='auto', "
            "form='auto', factors=None, **kwargs"
        ),
        "main": "",
        "register": "",
    },
}
# Verb: its options and arguments; "!" is required, "*" may be repeated, "=" is followed by a default.
OPTIONS = {
    "": "--debug",
    "demo": "--quick",
    "train": (
        "--task/-t=math --classes --out/-o --model/-m=tiny --chat/--no-chat --system --check --sft --init --steps "
        "--batch --samples=1 --advantage=none --loss-type=sum --policy-loss --written --lr "
        "--kl --loss-batch=32 --temperature=1.0 --rollout=transformers --max-staleness=0 --param=raw --seed=0 "
        "--max-new-tokens --eval-every=10 "
        "--validation=128 --history --plot --report-to -n=1000 --checkpoints --targets=all --rank=auto --form=auto "
        "--factors --dtype --device"
    ),
    "eval": (
        "--task/-t=math --experts/-e= --by --adapt= --margin=0.0 --other/--no-other=True --calibrate "
        "--classifier=classify --examples --model/-m=tiny -n --split=test --chat/--no-chat --system --check "
        "--batch=256 --max-new-tokens --json --targets=all --rank=auto --form=auto --factors --dtype --device"
    ),
    "generate": (
        "prompts!* --expert/-e*=[] --mix*=[] --adapt --margin=0.0 --other/--no-other=True "
        "--calibrate --classifier=classify --examples --pair "
        "--model/-m=tiny --max-new-tokens=64 --temperature=0.0 --chat/--no-chat --system "
        "--json --targets=all --rank=auto --form=auto --factors --dtype --device"
    ),
    "decompose": "model! --out/-o! --rank --targets=all --dtype --format --max-error --device --workers",
    "inspect": "path! --rows=0",
    "plan": (
        "model! --gpu=h200 --count=1 --experts=64 --rank=1/16 --form=auto --targets=all --context=8192 --batch=1 "
        "--dtype --json"
    ),
    "export": ("expert! into! --to=lora --all --rank --error --uniform --model/-m=tiny --factors --dtype --device"),
    "serve": (
        "model! --experts --host=127.0.0.1 --port=8000 --api-key --name --rows --route --margin=0.0 "
        "--chat-template --engine=auto --option*=[] --kv-tokens=16384 --page-size=16 --batch-tokens=512 "
        "--max-running=64 --max-waiting=512 --max-upload=256 --drain=30.0 --log-level=info --keep-alive=75 "
        "--max-connections=1000 --allow-host*=[] --allow-origin*=[] --no-ui --targets=all --rank=auto "
        "--form=auto --factors --dtype --device"
    ),
    "push": "expert! repo! --file=expert.safetensors --private --model/-m=tiny",
    "tune": (
        "model! --ranks=128,256 --factored/--no-factored=True --dtype=bfloat16 --factors=same,int8 "
        "--tokens=1,8,32,128 --device=cuda --folder"
    ),
    "env": "--json",
}

SCRIPTS = {"t2": "t2kernels.cli:app"}
ENTRY_POINTS = {
    "t2kernels.rollouts": {"vllm": "t2kernels.integrations.vllm.rollouts.opening:open_vllm"},
    "vllm.general_plugins": {"t2kernels": "t2kernels.integrations.vllm:register"},
    "vllm.endpoint_plugins": {"t2kernels": "t2kernels.integrations.vllm.server.front:FrontEnd"},
}
COMMANDS = {"": typer.main.get_command(app), **typer.main.get_command(app).commands}


def parameters(thing) -> list[str]:
    """The parameters of a callable with their defaults, without types."""
    try:
        found = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return []
    plain = [str(p.replace(annotation=inspect.Parameter.empty)) for p in found]
    return [re.sub(r" at 0x\w+", "", p) for p in plain]


def lacking(given: list[str], wanted: list[str]) -> list[str]:
    """The parameters that break callers: wanted ones that are gone or moved, or new ones without a default."""
    rest = iter(given)
    missing = [p for p in wanted if p not in rest]
    return missing or [p for p in given if p not in wanted and "=" not in p and not p.startswith("*")]


@pytest.mark.parametrize("module", NAMES)
def test_public_names(module):
    if module.endswith("lm_eval"):
        pytest.importorskip("lm_eval")
    found = importlib.import_module(module)
    assert set(NAMES[module]) <= set(getattr(found, "__all__", NAMES[module])), "a name that worked is gone"
    for name, wanted in NAMES[module].items():
        assert not lacking(parameters(getattr(found, name)), wanted.split(", ") if wanted else []), name


@pytest.mark.parametrize(
    ("given", "wanted", "missing"),
    [
        (["a", "b=1"], ["a", "b=1"], []),
        (["a", "c=2", "b=1", "**more"], ["a", "b=1"], []),
        (["a", "b=2"], ["a", "b=1"], ["b=1"]),
        (["b=1", "a"], ["a", "b=1"], ["b=1"]),
        (["a", "b=1", "c"], ["a", "b=1"], ["c"]),
    ],
)
def test_a_change_that_breaks_callers_is_found(given, wanted, missing):
    assert lacking(given, wanted) == missing


def options(command) -> dict[str, str]:
    """{the option's names: names, marks and default}: "!" is required, "*" may be repeated."""
    found = {}
    for p in command.params:
        names = "/".join([*p.opts, *p.secondary_opts])
        marks = ("!" if p.required else "") + ("*" if p.multiple or p.nargs != 1 else "")
        silent = p.default is None or (getattr(p, "is_flag", False) and p.default is False)
        found[names] = names + marks + ("" if silent else f"={p.default}")
    return found


@pytest.mark.parametrize("verb", OPTIONS)
def test_commands_and_their_options(verb):
    assert COMMANDS.keys() == OPTIONS.keys()
    found = options(COMMANDS[verb])
    assert set(OPTIONS[verb].split()) <= set(found.values())
    required = {text for text in found.values() if "!" in text}
    assert required <= set(OPTIONS[verb].split()), "a command line that worked would now lack something"


def test_scripts_and_entry_points_lead_somewhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == SCRIPTS
    assert project["entry-points"] == ENTRY_POINTS
    for target in [*SCRIPTS.values(), *(t for group in ENTRY_POINTS.values() for t in group.values())]:
        module, name = target.split(":")
        file = ROOT / f"{module.replace('.', '/')}.py"
        file = file if file.is_file() else file.with_suffix("") / "__init__.py"
        assert re.search(rf"\b{name}\b", file.read_text()), target  # not imported: it may need vLLM
