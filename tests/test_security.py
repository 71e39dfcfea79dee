"""Secrets, pickles, hostile YAML, names, model text and the network: each case of the project's security list.

What a push uploads is tested in tests/release.
"""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_recipes import cli
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.errors import InputError
from sft_recipes.models import load_for_inference
from sft_recipes.recipe_copies import copy_recipe
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import checkpoints
from sft_recipes.training.train import main as train_main
from sft_recipes.training.train import train
from tests.conftest import instruction_rows

REPOSITORY = Path(__file__).parents[1]
# Shaped like tokens and keys, and nobody's.
TOKEN = "hf_" + "Zq3" * 12
KEY = "wandb" + "9f" * 18
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><a href=javascript:alert(3)>x</a>\"'\u202e"


class Payload:
    """Unpickled with code allowed, it leaves a canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def write_tiny_recipe(folder: Path, base: Path, **keys: Any) -> str:
    """A recipe for the rows in `folder`/train.jsonl."""
    values = {
        "model_name_or_path": str(base),
        "dataset_name": "./train.jsonl",
        "output_dir": "./run",
        **keys,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(folder / "recipe.yaml")


def files_with(folder: Path, *secrets: str) -> list[str]:
    """The files below a folder whose bytes hold one of the secrets."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets)
    ]


# -- S1: tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token", "token"])
@pytest.mark.parametrize("where", ["file", "command line", "env block"])
def test_tokens_have_no_place_in_a_recipe(
    key: str,
    where: str,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A token in the file, in `env:` or on the command line is refused with what to do instead; it is shown nowhere."""
    keys = {"file": {key: TOKEN}, "env block": {"env": {"HF_TOKEN": TOKEN}}}.get(where, {})
    path = write_recipe(**keys)
    more = [f"--{key}", TOKEN] if where == "command line" else []
    assert train_main(["--config", str(path), *more]) == 2
    out = "".join(capfd.readouterr())
    assert (
        "environment variables" if where == "env block" else "hf auth login"
    ) in out and TOKEN not in out
    assert not (tmp_path / "run").exists()


def test_a_token_in_the_environment_reaches_no_file(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """HF_TOKEN and a tracker's key are in the environment of a run: in none of its files and nothing it prints."""
    for name, value in {
        "HF_TOKEN": TOKEN,
        "HUGGING_FACE_HUB_TOKEN": TOKEN,
        "WANDB_API_KEY": KEY,
    }.items():
        monkeypatch.setenv(name, value)
    assert (
        train_main(
            ["--config", str(write_recipe(max_steps=2, save_strategy="steps", save_steps=1))]
        )
        == 0
    )
    assert (tmp_path / "run/checkpoint-1/training_args.bin").is_file(), (
        "the file that could hold a token is missing"
    )
    assert files_with(tmp_path, TOKEN, KEY) == []
    out = "".join(capfd.readouterr())
    assert TOKEN not in out and KEY not in out


# -- S3: pickles -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A folder with a recipe and its run, which has checkpoints 2 and 4 of 5 steps and says that it still runs."""
    folder = tmp_path_factory.mktemp("halved")
    rows = [json.dumps(row) for row in instruction_rows(40)]
    (folder / "train.jsonl").write_text("\n".join([*rows, ""]), encoding="utf-8")
    keys = {
        "per_device_train_batch_size": 8,
        "activation_checkpointing": False,
        "save_total_limit": 9,
        "num_train_epochs": 1,
    }
    write_tiny_recipe(
        folder, base_folder, **keys, max_length=128, save_strategy="steps", save_steps=2
    )
    train(load_recipe(folder / "recipe.yaml"))
    run = folder / "run"
    shutil.rmtree(run / "checkpoint-5")
    (run / "model.safetensors").unlink()
    state = run / "run_state.json"
    state.write_text(state.read_text().replace('"finished"', '"running"'))
    return folder


@pytest.fixture
def half_done(halved: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil: the recipe."""
    shutil.copytree(halved, tmp_path, dirs_exist_ok=True)
    return tmp_path / "recipe.yaml"


PICKLES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]


def poison(checkpoint: Path, name: str, canary: Path) -> None:
    """Replace one of a checkpoint's pickles by one that runs code."""
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_bytes(pickle.dumps(Payload(canary), protocol=2))


@pytest.mark.parametrize("name", PICKLES)
def test_a_changed_pickle_is_not_opened(
    name: str, half_done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A pickle that is not the sealed one: the checkpoint is skipped by name, no code runs, the one before is used."""
    poison(tmp_path / "run/checkpoint-4", name, tmp_path / "canary")
    assert train_main(["--config", str(half_done)]) == 0
    assert f"skipped checkpoint-4: corrupt {name}" in capfd.readouterr().out
    assert not (tmp_path / "canary").exists() and (tmp_path / "run/model.safetensors").is_file()


def reseal(checkpoint: Path) -> None:
    """Seal again, as someone does who can write to the run folder."""
    content = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    facts = {
        key: value
        for key, value in content.items()
        if key not in ("schema_version", "files", "seal")
    }
    (checkpoint / checkpoints.MANIFEST).unlink()
    checkpoints.seal(checkpoint, facts)


@pytest.mark.parametrize("name", PICKLES)
def test_a_sealed_pickle_still_runs_no_code(name: str, half_done: Path, tmp_path: Path) -> None:
    """Even with a manifest to match, no code of a pickle runs; the run stops, or never reads the file."""
    for step in (2, 4):
        poison(tmp_path / f"run/checkpoint-{step}", name, tmp_path / "canary")
        reseal(tmp_path / f"run/checkpoint-{step}")
    if name == "training_args.bin":
        assert train_main(["--config", str(half_done)]) == 0
    else:
        assert train_main(["--config", str(half_done)]) == 3
        assert not (tmp_path / "run/model.safetensors").exists()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_a_manifest_reaches_no_file_outside(
    form: str, half_done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A manifest that names a file outside of its checkpoint is not believed, and that file is left alone."""
    outside = tmp_path / "x"
    outside.write_bytes(pickle.dumps(Payload(tmp_path / "canary"), protocol=2))
    checkpoint = tmp_path / "run/checkpoint-4"
    content = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    name = "../../x" if form == "relative" else str(outside)
    content["files"][name] = [
        outside.stat().st_size,
        hashlib.sha256(outside.read_bytes()).hexdigest(),
    ]
    facts = {key: value for key, value in content.items() if key not in ("schema_version", "seal")}
    forged = {**content, "seal": checkpoints._seal_of(facts)}
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(forged))
    before = outside.read_bytes()
    assert train_main(["--config", str(half_done)]) == 0
    assert f"skipped checkpoint-4: {name} is missing" in capfd.readouterr().out
    assert outside.read_bytes() == before and not (tmp_path / "canary").exists()


def copied(base: Path, folder: Path) -> Path:
    """A model folder to spoil."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_weights_as_a_pickle_run_no_code(base_folder: Path, tmp_path: Path) -> None:
    """A model whose weights are a pickle with code in it is refused, and the code does not run."""
    model = copied(base_folder, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(
        pickle.dumps(Payload(tmp_path / "canary"), protocol=2)
    )
    with pytest.raises((InputError, pickle.UnpicklingError)):
        load_for_inference(str(model))
    assert not (tmp_path / "canary").exists()


def test_a_models_own_code_does_not_run(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model folder that brings its own classes is refused; nobody is asked, and its code does not run."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks gets a yes
    model = copied(base_folder, tmp_path / "model")
    (model / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n"
    )
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer = {
        **tokenizer,
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own.Own"]},
    }
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError):
        load_tokenizer(str(model))
    with pytest.raises(InputError):
        load_for_inference(str(model))
    assert not (tmp_path / "canary").exists()


# -- S4: YAML --------------------------------------------------------------------------------------------------------

RECIPES: dict[str, tuple[str, str]] = {
    "code": (
        "run_name: !!python/object/apply:pathlib.Path.touch [CANARY]",
        "recipe.yaml:7: not plain YAML",
    ),
    "code in a data set": (
        "datasets: [{path: !!python/object/apply:os.system ['touch CANARY']}]",
        "recipe.yaml:7: not plain YAML",
    ),
    "code by a tag of our own": ("run_name: !include /etc/passwd", "recipe.yaml:7: not plain YAML"),
    "key twice": (
        "learning_rate: 1e-5\nlearning_rate: 1e-4",
        "recipe.yaml:8: learning_rate: set twice",
    ),
    "unknown key": (
        "learning_rat: 1e-5",
        "recipe.yaml:7: learning_rat: unknown key. Fix: did you mean 'learning_rate'",
    ),
    "no is not false": ("packing: no", "recipe.yaml:7: packing: expected true or false"),
    "dotted path to code": ("_component_: os.system", "recipe.yaml:7: _component_: unknown key"),
    "environment": ("env: {LD_PRELOAD: ./x.so}", "recipe.yaml:7: env: "),
    "remote code": ("trust_remote_code: true", "recipe.yaml:7: trust_remote_code: "),
    "callback by name": ("callbacks: [os.system]", "recipe.yaml:7: callbacks: "),
}


@pytest.mark.parametrize("case", RECIPES)
def test_hostile_yaml_is_refused_with_its_line(
    case: str, tmp_path: Path, base_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing in a recipe is code, and what is not understood is an error with file, line and key."""
    text, message = RECIPES[case]
    (tmp_path / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    recipe = tmp_path / "recipe.yaml"
    lines = [
        f"model_name_or_path: {base_folder}",
        "output_dir: ./run",
        "max_length: 64",
        "seed: 1",
        "max_steps: 1",
    ]
    lines.append("# empty" if text.startswith("datasets") else "dataset_name: ./train.jsonl")
    recipe.write_text("\n".join([*lines, text.replace("CANARY", str(tmp_path / "canary")), ""]))
    assert train_main(["--config", str(recipe)]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "canary").exists() and not (tmp_path / "run").exists()


def test_scientific_notation_is_a_number(write_recipe: Callable[..., Path]) -> None:
    """`1e-5`, which YAML 1.1 reads as text, is the number."""
    path = write_recipe(learning_rate=None)
    path.write_text(path.read_text() + "learning_rate: 1e-5\n")
    assert load_recipe(path).training["learning_rate"] == 1e-5


# -- S5: names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "quickstart/../../x",
        "quickstart/full.yaml",
        "quickstart",
        ".",
        "",
    ],
)
def test_init_copies_shipped_names_only(name: str, tmp_path: Path) -> None:
    """Whatever is not the name of a shipped recipe is refused, and nothing is written."""
    with pytest.raises(InputError, match="there is no shipped recipe"):
        copy_recipe(name, tmp_path / "out", force=True)
    assert list(tmp_path.iterdir()) == []


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def existing_file(out: Path, outside: Path) -> None:
    """A file of the user's."""
    (out / "full.yaml").write_text("mine")


def link_to_a_file(out: Path, outside: Path) -> None:
    """A link where a file is to be written."""
    (out / "full.yaml").symlink_to(outside / "precious")


def dangling_link(out: Path, outside: Path) -> None:
    """A link to a file that would come into being."""
    (out / "full.yaml").symlink_to(outside / "new")


def link_to_a_folder(out: Path, outside: Path) -> None:
    """A link where a folder is to be made."""
    (out / "data").symlink_to(outside, target_is_directory=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("trap", [existing_file, link_to_a_file, dangling_link, link_to_a_folder])
def test_init_never_leaves_its_folder(
    trap: Callable[[Path, Path], None], force: bool, tmp_path: Path
) -> None:
    """Without --force nothing is overwritten; with it nothing outside of the folder is. Refused: nothing is written."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    for folder in (out, outside):
        folder.mkdir()
    (outside / "precious").write_text("precious")
    trap(out, outside)
    before = snapshot(tmp_path)
    if trap is existing_file and force:
        assert copy_recipe("quickstart/full", out, force)
        return
    with pytest.raises(InputError):
        copy_recipe("quickstart/full", out, force)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("target", ["precious", "new"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_new_recipe_follows_no_link(
    target: str,
    force: list[str],
    tmp_path: Path,
    base_folder: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """`init --model --data --output` does not write through a link, forced or not."""
    data = write_rows([{"instruction": "a", "output": "b"}])
    out, outside = tmp_path / "out", tmp_path / "outside"
    for folder in (out, outside):
        folder.mkdir()
    (outside / "precious").write_text("precious")
    (out / "recipe.yaml").symlink_to(outside / target)
    before = snapshot(outside)
    arguments = [
        "init",
        "--model",
        str(base_folder),
        "--data",
        str(data),
        "--output",
        str(out),
        *force,
    ]
    monkeypatch.setattr("sys.argv", ["sft-recipes", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    capfd.readouterr()
    assert ended.value.code == 2 and snapshot(outside) == before


# -- S1, S6, S8: the whole pipeline ----------------------------------------------------------------------------------

# Runs commands of the command line, one per argument, with every answer of a model replaced by a hostile one. An audit
# hook sees each connection and each name that is looked up, whatever library does it in Python, and refuses them.
PIPELINE = r"""
import json, sys, traceback
seen = sys.argv[1]
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(seen, "a") as file:
            file.write(f"{event} {arguments!r}\n" + "".join(traceback.format_stack(limit=12)))
        raise OSError("no network in this test")
sys.addaudithook(hook)
import dataclasses, itertools
from sft_recipes import cli
from sft_recipes.evaluation import answering
real = answering.generate
numbers = itertools.count()
def hostile(*arguments, **options):
    return [dataclasses.replace(one, text=HOSTILE + str(next(numbers))) for one in real(*arguments, **options)]
answering.generate = hostile
for command in sys.argv[2:]:
    sys.argv = ["sft-recipes", *json.loads(command)]
    try:
        cli.main()
    except SystemExit as ended:
        print("ENDED", ended.code or 0, sys.argv[1:], flush=True)
"""


class Page(HTMLParser):
    """Elements, attributes and scripts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        last, attributes = self.elements[-1] if self.elements else ("", {})
        if last == "script" and attributes.get("type") != "application/json":
            self.scripts.append(data)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> tuple[Path, str]:
    """All commands on local files: no variable forbids the network, the hook does; tokens in the environment."""
    folder = tmp_path_factory.mktemp("pipeline")
    rows = [
        {"instruction": f"Say {index}. {HOSTILE}", "output": f"one {index} {HOSTILE}"}
        for index in range(12)
    ]
    (folder / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    keys = {
        "max_length": 256,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "activation_checkpointing": False,
    }
    keys |= {
        "eval_split": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "evaluation": {"max_new_tokens": 8},
    }
    path, run = write_tiny_recipe(folder, base_folder, **keys), str(folder / "run")
    base, base_evaluation = ["--max_new_tokens", "8"], str(folder / "base")
    commands = [
        ["init", "quickstart/full", "--output", str(folder / "copy")],
        [
            "init",
            "--model",
            str(base_folder),
            "--data",
            str(folder / "train.jsonl"),
            "--output",
            str(folder / "new"),
        ],
        ["inspect", path],
        ["check", path],
        ["audit", path, "--output", str(folder / "audit")],
        ["prepare", path],
        ["train", path],
        ["evaluate", run, "--base", str(base_folder), "--output", str(folder / "tuned"), *base],
        [
            "evaluate",
            str(base_folder),
            "--data",
            str(folder / "train.jsonl"),
            "--output",
            base_evaluation,
            *base,
        ],
        [
            "evaluate",
            run,
            "--data",
            str(folder / "train.jsonl"),
            "--output",
            str(folder / "again"),
            *base,
        ],
        [
            "review",
            "build",
            str(folder / "again"),
            base_evaluation,
            "--output",
            str(folder / "review.html"),
        ],
        ["export", run, "--output", str(folder / "export")],
    ]
    online = {
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HF_HUB_DISABLE_TELEMETRY",
        "CI",
    }
    environment = {name: value for name, value in os.environ.items() if name not in online}
    environment |= {
        "HF_TOKEN": TOKEN,
        "WANDB_API_KEY": KEY,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HOME": str(folder / "hf"),
    }
    script = f"HOSTILE = {HOSTILE!r}\n{PIPELINE}"
    arguments = [
        sys.executable,
        "-c",
        script,
        str(folder / "connections"),
        *map(json.dumps, commands),
    ]
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    output = done.stdout + done.stderr
    ended = [line for line in output.splitlines() if line.startswith("ENDED")]
    wrong = [line for line in ended if line.split()[1] != "0"]
    assert len(ended) == len(commands) and not wrong, f"{wrong}\n{output[-6000:]}"
    return folder, output


@pytest.mark.slow
def test_no_connection_is_attempted(pipeline: tuple[Path, str]) -> None:
    """With local files nothing in the whole pipeline opens a connection or looks up a name."""
    seen = pipeline[0] / "connections"
    assert not seen.exists(), seen.read_text()


@pytest.mark.slow
def test_no_secret_is_written_or_printed(pipeline: tuple[Path, str]) -> None:
    """Tokens of the environment are in no report, card, log, state or export, and in nothing that was printed."""
    folder, output = pipeline
    assert files_with(folder, TOKEN, KEY) == [] and TOKEN not in output and KEY not in output
    assert (folder / "export/README.md").is_file() and (folder / "audit").is_dir()


@pytest.mark.slow
def test_hostile_text_is_inert_in_every_page(pipeline: tuple[Path, str]) -> None:
    """Rows and answers full of markup make no element, no handler and no script URL in any page that was written."""
    folder = pipeline[0]
    pages = sorted(path for path in folder.rglob("*.html") if "copy" not in path.parts)
    assert {path.name for path in pages} >= {"report.html", "review.html"} and len(pages) >= 5
    for path in pages:
        assert "alert(1)" in path.read_text(encoding="utf-8"), (
            f"{path.name} shows none of the hostile text"
        )
        page = Page(path)
        elements = page.elements
        assert not {"img", "iframe", "object", "embed", "base"} & {tag for tag, _ in elements}, path
        for tag, attributes in elements:
            assert not [name for name in attributes if name.startswith("on")], (
                path,
                tag,
                attributes,
            )
            assert not [value for value in attributes.values() if "javascript:" in (value or "")], (
                path,
                attributes,
            )
        assert not [script for script in page.scripts if "alert(" in script], path
        policies = [
            one.get("content") for tag, one in elements if tag == "meta" and "http-equiv" in one
        ]
        assert any("default-src 'none'" in (policy or "") for policy in policies), path
