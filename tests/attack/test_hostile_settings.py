"""Hostile recipes through `sft-recipes check`: refused with a place and exit code 2, or trainable.

    python -m pytest -q -s tests/attack/test_hostile_settings.py

Each test prints a table of what was tried and what came of it. Seeded: another SEED tries others of
the same kinds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from sft_recipes import cli
from sft_recipes.errors import InputError, SFTRecipesError
from sft_recipes.recipe_keys import load_recipe, trl_keys
from sft_recipes.training.settings_checks import check_settings
from tests.attack.hostile_values import MINIMAL, VALUES
from tests.conftest import instruction_rows
from tests.test_every_key import EVALUATED, TRL_TRIES
from tests.training.tiny import trainer_for

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("SFT_ATTACK_SEED", "16"))
MOST_SECONDS = 60
# FILE:LINE, or the command line; a template's file is named as well.
PLACE = re.compile(r"(\.(yaml|jinja|json|jsonl)(:\d+)?|command line|^ */\S+): ", re.M)


@dataclass
class Attempt:
    """One hostile recipe: its bytes, and whether it has to be refused."""

    kind: str
    name: str
    content: bytes
    must_refuse: bool = True
    arguments: list[str] = field(default_factory=list)


@dataclass
class Result:
    """What `check` made of an attempt."""

    attempt: Attempt
    code: int
    output: str
    seconds: float

    @property
    def outcome(self) -> str:
        """In a word."""
        if "Traceback" in self.output or self.code not in (0, 1, 2):
            return "traceback"
        if self.seconds > MOST_SECONDS:
            return "hang"
        if self.code == 0:
            return "accepted in silence" if self.attempt.must_refuse else "accepted"
        if self.code == 2 and PLACE.search(self.output):
            return "refused"
        return "refused without a place" if self.code == 2 else "check failed"


def recipe_text(**keys: Any) -> bytes:
    """A recipe with these keys; those given as None are left out."""
    values = {key: value for key, value in {**MINIMAL, **keys}.items() if value is not None}
    return yaml.safe_dump(values, sort_keys=False).encode()


def minimal_with(lines: str) -> bytes:
    """The minimal recipe and lines as they are."""
    return recipe_text() + lines.encode("utf-8", "surrogatepass")


def bomb(levels: int, width: int) -> str:
    """Lists of aliases of lists of aliases."""
    lines = ["a0: &a0 [x, x]"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} [{aliases}]")
    return "\n".join(lines) + "\n"


def texts(chance: random.Random) -> Iterator[Attempt]:
    """What is wrong with the YAML."""
    deep = chance.randint(2000, 4000)
    digits = chance.randint(4400, 6000)
    cases: dict[str, bytes] = {
        "bomb of lists": minimal_with(bomb(chance.randint(9, 40), chance.randint(8, 12))),
        "bomb inside a key": minimal_with(bomb(30, 10) + "chat_template_kwargs: {x: *a29}\n"),
        "bomb of mappings": minimal_with("a: &a {x: 1}\nb: &b {p: *a, q: *a}\n" + "c: [*b]\n" * 1),
        "alias of itself": minimal_with("chat_template_kwargs: &a {x: *a}\n"),
        "list of itself": minimal_with("lora_target_modules: &a [*a]\n"),
        "merge": minimal_with("a: &a {seed: 1}\n<<: *a\n"),
        "unknown alias": minimal_with("seed: *nobody\n"),
        "deep lists": minimal_with("seed: " + "[" * deep + "]" * deep + "\n"),
        "deep mappings": minimal_with("seed: " + "{a: " * deep + "}" * deep + "\n"),
        "deep blocks": minimal_with("gate:\n" + "".join(" " * n + "-\n" for n in range(1, 200))),
        "open brackets": minimal_with("seed: " + "[" * 50_000 + "\n"),
        "list as a key": minimal_with("? [a, b]\n: 1\n"),
        "mapping as a key": minimal_with("? {a: b}\n: 1\n"),
        "number as a key": minimal_with("chat_template_kwargs: {1: 2}\n"),
        "nothing as a key": minimal_with("? \n: 1\n"),
        "truth as a key": minimal_with("true: 1\n"),
        "many digits": minimal_with(f"seed: {'9' * digits}\n"),
        "many hexadecimal digits": minimal_with(f"seed: 0x{'f' * digits}\n"),
        "many digits of a float": minimal_with(f"learning_rate: 0.{'0' * digits}1\n"),
        "large power": minimal_with("learning_rate: 1e99999\n"),
        "python object": minimal_with("seed: !!python/object/apply:os.getpid []\n"),
        "python name": minimal_with("seed: !!python/name:os.system\n"),
        "set": minimal_with("lora_target_modules: !!set {a, b}\n"),
        "binary": minimal_with("run_name: !!binary aGFsbG8=\n"),
        "timestamp": minimal_with("run_name: !!timestamp no\n"),
        "tag that does not fit": minimal_with("seed: !!int five\n"),
        "truth that does not fit": minimal_with("packing: !!bool perhaps\n"),
        "duplicate key": minimal_with("seed: 1\nseed: 2\n"),
        "two documents": minimal_with("---\nseed: 1\n"),
        "tab": minimal_with("evaluation:\n\trows: 1\n"),
        "open quote": minimal_with('run_name: "open\n'),
        "NUL": recipe_text() + b"run_name: a\0b\n",
        "escaped NUL": minimal_with('run_name: "a\\0b"\n'),
        "escaped surrogate": minimal_with('run_name: "a\\ud800b"\n'),
        "latin-1": recipe_text() + b"run_name: caf\xe9\n",
        "UTF-16": recipe_text().decode().encode("utf-16"),
        "empty": b"",
        "comment": b"# nothing\n",
        "list": b"- a\n- b\n",
        "one word": b"recipe\n",
        "number": b"5\n",
        "large file": b"# " + b"x" * 2_000_000,
        "long key": minimal_with(f"{'k' * 1000}: 1\n"),
        "very long key": minimal_with(f"? {'k' * 100_000}\n: 1\n"),
        "line separator": minimal_with("run_name: a\u2028seed: x\n"),
        "random bytes": bytes(chance.randrange(256) for _ in range(500)),
    }
    for name, content in cases.items():
        yield Attempt("YAML", name, content)


def numbers(chance: random.Random) -> Iterator[Attempt]:
    """Numbers, texts and lists that a key must not take."""
    never = ["-5", ".inf", "-.inf", ".nan", str(2**63 + chance.randrange(9)), "[]", "'  '"]
    keys = [name for name, key in {**trl_keys().training, **trl_keys().model}.items() if key.range]
    for key in chance.sample(keys, 30):
        value = chance.choice(never)
        yield Attempt("number", f"{key}: {value}", minimal_with(f"{key}: {value}\n"))
    own = ["max_rows", "weight", "max_rejected", "max_lost", "global_batch_size", "eval_split"]
    for key in own:
        value = chance.choice(never)
        yield Attempt("number", f"{key}: {value}", minimal_with(f"{key}: {value}\n"))
    for line in (
        "num_train_epochs: 0",
        "max_steps: 0",
        "save_steps: 0",
        "save_steps: 1.5",
        "learning_rate: 0",
        "lora_r: 0\nuse_peft: true",
        "lora_dropout: 1\nuse_peft: true",
        "weight: 0",
        "seed: 4294967296",
        "datasets: [{path: ./train.jsonl, fraction: 0}]\ndataset_name: null",
        "evaluation: {rows: 0}",
        "evaluation: {rows: .nan}",
        "lr_scheduler_kwargs: {num_cycles: .inf}\nlr_scheduler_type: cosine",
    ):
        keys_of_line = {part.split(":")[0] for part in line.split("\n")}
        base = dict.fromkeys(keys_of_line & MINIMAL.keys())
        yield Attempt(
            "number", line.replace("\n", ", "), recipe_text(**base) + f"{line}\n".encode()
        )


def paths(chance: random.Random) -> Iterator[Attempt]:
    """Folders and files that there cannot be."""
    long_name = "x" * chance.randint(256, 5000)
    for key in ("output_dir", "model_name_or_path", "dataset_name", "chat_template"):
        for value in ("/etc/passwd", "/etc/passwd/run", f"./{long_name}", "~/run", "./a\0b"):
            content = recipe_text(**{key: value})
            yield Attempt("path", f"{key}: {value[:20]!r}", content)
    yield Attempt("path", "output_dir: long path", recipe_text(output_dir="./" + "abc/" * 2000))


def constructions() -> Iterator[Attempt]:
    """What only the libraries know: they are asked before anything else is done."""
    for schedule in SchedulerType:
        content = recipe_text(lr_scheduler_type=schedule.value)
        yield Attempt("schedule", schedule.value, content, must_refuse=False)
        content = recipe_text(
            lr_scheduler_type=schedule.value,
            lr_scheduler_kwargs={"nonsense": 1},
            eval_split=0.2,
            eval_strategy="epoch",
        )
        yield Attempt("schedule", f"{schedule.value} with nonsense", content)
    for optimizer in OptimizerNames:
        content = recipe_text(optim=optimizer.value)
        yield Attempt("optimizer", optimizer.value, content, must_refuse=False)
    for tracker in (*INTEGRATION_TO_CALLBACK, "nobody"):
        content = recipe_text(report_to=tracker)
        yield Attempt("tracker", tracker, content, must_refuse=tracker == "nobody")
    evaluated = {"eval_split": 0.2, "eval_strategy": "steps", "eval_steps": 4}
    lora = {"use_peft": True}
    combinations: dict[str, dict[str, Any]] = {
        "best without evaluation": {"load_best_model_at_end": True},
        "best, other steps": {**evaluated, "load_best_model_at_end": True, "save_steps": 3},
        "best, other strategy": {
            **evaluated,
            "load_best_model_at_end": True,
            "save_strategy": "epoch",
        },
        "unknown metric": {**evaluated, "metric_for_best_model": "beauty"},
        "unknown layer": {**lora, "lora_target_modules": ["c_attn"]},
        "one unknown layer": {**lora, "lora_target_modules": ["q_proj", "w_proj"]},
        "broken pattern": {**lora, "lora_target_modules": ["(q_proj"]},
        "unknown layer to save": {**lora, "lora_modules_to_save": ["score"]},
        "unknown parameter": {
            **lora,
            "lora_target_parameters": ["experts.weight"],
            "lora_dropout": 0.0,
        },
        "unknown attention": {"attn_implementation": "quick"},
        "unknown compiler": {"torch_compile_backend": "nobody"},
        "unknown debug option": {"debug": "everything"},
        "unknown accelerator setting": {"accelerator_config": {"nonsense": 1}},
        "optimizer arguments": {"optim": "sgd", "optim_args": "momentum"},
        "unknown optimizer argument": {"optim": "adamw_torch_8bit", "optim_args": "a=b"},
        "router without experts": {"router_aux_loss_coef": 0.1},
        "no room for answers": {**evaluated, "evaluation": {"max_new_tokens": 100_000}},
        "template": {"chat_template": "./endless.jinja"},
        "template's syntax": {"chat_template": "./syntax.jinja"},
        "template arguments": {
            "chat_template_kwargs": {"tokenize": True},
            "chat_template": "./good.jinja",
        },
        "generation settings": {"model_name_or_path": "./bad_generation"},
        "small embedding": {"model_name_or_path": "./small_embedding"},
        "broken config": {"model_name_or_path": "./broken_config"},
        "no config": {"model_name_or_path": "./no_config"},
        "broken tokenizer": {"model_name_or_path": "./broken_tokenizer"},
    }
    for name, keys in combinations.items():
        yield Attempt("combination", name, recipe_text(**keys))


def overrides(chance: random.Random) -> Iterator[Attempt]:
    """Values from the command line."""
    for value in (
        "[" * 3000,
        bomb(20, 10),
        "9" * chance.randint(4400, 6000),
        '"a\\0b"',
        "!!python/object:os.system",
        ".nan",
        "-1",
        "[]",
    ):
        name = f"--seed {value[:16]!r}"
        yield Attempt("override", name, recipe_text(), arguments=["--seed", value])
    yield Attempt(
        "override", "--output_dir NUL", recipe_text(), arguments=["--output_dir", '"./a\\0"']
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """The rows, the base and its damaged copies that the recipes name."""
    path = tmp_path_factory.mktemp("hostile")
    rows = "".join(json.dumps(row) + "\n" for row in instruction_rows(40))
    (path / "train.jsonl").write_text(rows)
    turns = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    loop = "{% for x in range(99999) %}" * 3 + "{% endfor %}" * 3
    (path / "good.jinja").write_text(turns)
    (path / "endless.jinja").write_text(loop + turns)
    (path / "syntax.jinja").write_text("{% for %}" + turns)
    damage: dict[str, Callable[[Path], None]] = {
        "base": lambda copy: None,
        "bad_generation": lambda copy: (
            (copy / "generation_config.json").write_text(
                '{"do_sample": false, "num_return_sequences": 4}'
            )
            and None
        ),
        "small_embedding": lambda copy: edit(copy / "config.json", {"vocab_size": 100}),
        "broken_config": lambda copy: edit(copy / "config.json", {"hidden_size": "wide"}),
        "no_config": lambda copy: (copy / "config.json").write_text("") and None,
        "broken_tokenizer": lambda copy: (copy / "tokenizer.json").write_text("{") and None,
    }
    for name, damaged in damage.items():
        copy = path / name
        copy.mkdir()
        for file in base_folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        damaged(copy)
    return path


def edit(file: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def check_in_process(path: Path, attempt: Attempt) -> Result:
    """`sft-recipes check`, without the seconds that importing takes."""
    output = io.StringIO()
    started = time.monotonic()
    code = 0
    arguments = ["sft-recipes", "check", str(path), *attempt.arguments]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        patch.setattr(sys, "argv", arguments)
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except Exception as error:  # noqa: BLE001 - what the suite looks for
            output.write(f"Traceback: {type(error).__name__}: {error}")
    text = output.getvalue().replace("\r", "\n")
    return Result(attempt, code, text, time.monotonic() - started)


def print_table(title: str, results: list[Result]) -> None:
    """Kinds and outcomes; what was not as it should be line by line."""
    kinds = Counter(result.attempt.kind for result in results)
    outcomes = Counter((result.attempt.kind, result.outcome) for result in results)
    print(f"\n{title}, seed {SEED}: {len(results)} tried")
    for kind, tried in kinds.items():
        parts = {outcome: n for (of, outcome), n in outcomes.items() if of == kind}
        assert sum(parts.values()) == tried
        words = ", ".join(f"{n} {outcome}" for outcome, n in sorted(parts.items()))
        longest = max(result.seconds for result in results if result.attempt.kind == kind)
        print(f"  {kind:12} {tried:4} tried: {words}; longest {longest:.1f} s")
    for result in results:
        if result.outcome not in ("refused", "accepted"):
            print(f"  {result.outcome}: {result.attempt.kind}: {result.attempt.name}")
            print("     " + result.output.strip()[-400:].replace("\n", "\n     "))


def test_hostile_recipes_are_refused_with_a_place(folder: Path) -> None:
    """Of all generated recipes none ends in a traceback or hangs; each is refused with exit code 2
    and where it is wrong, but for schedules and optimizers that can be trained with.
    """
    chance = random.Random(SEED)
    attempts = [*texts(chance), *numbers(chance), *paths(chance), *constructions()]
    attempts += overrides(chance)
    results = []
    for number, attempt in enumerate(attempts):
        path = folder / f"recipe{number}.yaml"
        path.write_bytes(attempt.content)
        results.append(check_in_process(path, attempt))
    print_table("hostile recipes", results)
    assert len(results) >= 111
    assert {result.outcome for result in results} <= {"refused", "accepted"}


def test_the_command_line_says_the_same(folder: Path) -> None:
    """A sample of them through the real command: the same exit code, and no traceback."""
    chance = random.Random(SEED + 1)
    attempts = [*texts(chance), *paths(chance), *overrides(chance)]
    results = []
    for number, attempt in enumerate(chance.sample(attempts, 8)):
        path = folder / f"command{number}.yaml"
        path.write_bytes(attempt.content)
        command = [sys.executable, "-m", "sft_recipes", "check", str(path), *attempt.arguments]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        seconds = time.monotonic() - started
        results.append(Result(attempt, done.returncode, done.stdout + done.stderr, seconds))
    print_table("through the command", results)
    assert {result.outcome for result in results} <= {"refused", "accepted"}


def test_what_check_passes_trains(folder: Path) -> None:
    """Every key of TRL with every hostile value: refused by the key's name, or one step is trained."""
    outcomes: Counter[str] = Counter()
    faults = []
    for key in {**trl_keys().model, **trl_keys().training}:
        if key in ("output_dir", "model_name_or_path", "torch_compile", "torch_compile_mode"):
            continue  # paths are tried above; compiling takes a minute and no number
        beside = TRL_TRIES[key].beside if key in TRL_TRIES else {}
        for label, value in VALUES.items():
            outcome = try_value(folder, key, value, beside)
            outcomes[outcome.partition(":")[0]] += 1
            if outcome.startswith("fault"):
                faults.append(f"{key}: {label}: {outcome}")
    print(f"\nTRL's keys with hostile values: {sum(outcomes.values())} tried: {dict(outcomes)}")
    print("\n".join(faults))
    assert not faults


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_every_schedule_and_optimizer_that_passes_trains(folder: Path) -> None:
    """What check accepts of transformers' lists trains two steps."""
    outcomes: Counter[str] = Counter()
    faults = []
    tried = [("lr_scheduler_type", schedule.value) for schedule in SchedulerType]
    tried += [("optim", optimizer.value) for optimizer in OptimizerNames]
    for key, value in tried:
        outcome = try_value(folder, key, value, {})
        outcomes[f"{key} {outcome.partition(':')[0]}"] += 1
        if outcome.startswith("fault"):
            faults.append(f"{key}: {value}: {outcome}")
    assert sum(outcomes.values()) == len(tried)
    print(f"\nschedules and optimizers: {len(tried)} tried: {dict(outcomes)}")
    print("\n".join(faults))
    assert not faults


def try_value(folder: Path, key: str, value: Any, beside: Mapping[str, Any]) -> str:
    """What a key with a value comes to: refused, trained, or a fault."""
    path = folder / "tried.yaml"
    quick = {"max_steps": 1, "num_train_epochs": 1, "report_to": "none", "disable_tqdm": True}
    evaluated = dict(EVALUATED) if "eval_strategy" in beside else {}
    keys = {**quick, **evaluated, **beside, "save_strategy": "no"}
    keys.pop(key, None)
    path.write_bytes(recipe_text(**{**keys, key: None}))
    try:
        recipe = load_recipe(path, {key: value})
        check_settings(recipe)
    except InputError as error:
        text = str(error)
        is_named = key in text or any(other in text for other in beside)
        return "refused" if is_named else f"fault: the key is not named: {text[:200]}"
    except Exception as error:  # noqa: BLE001 - what the suite looks for
        return f"fault: {type(error).__name__}: {error}"
    if key in ("num_train_epochs", "gradient_accumulation_steps"):
        keys["max_steps"] = 1
    try:
        trainer_for(path, **{key: value}).train()
    except SFTRecipesError as error:
        # A rate of 100 diverges, and the guard says so.
        return f"trained: {str(error)[:80]}"
    except Exception as error:  # noqa: BLE001 - what the suite looks for
        return f"fault: check passed, train raised {type(error).__name__}: {str(error)[:200]}"
    return "trained"
