"""`check --fix`: old keys get their current names in the file; comments, order and quotes stay."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_recipes import cli, recipe_rewrite
from sft_recipes.errors import InputError
from sft_recipes.recipe import parse_value
from sft_recipes.recipe_checks import NOTES, REFUSED, RENAMED, current
from sft_recipes.recipe_keys import load_recipe, trl_keys
from sft_recipes.recipe_rewrite import rewrite

MINIMAL = "model_name_or_path: ./base\ndataset_name: ./data\noutput_dir: runs/x\n"

OLD = """\
# A recipe of 2024,  written by hand
model_name_or_path: org/model   # the base
torch_dtype:  bfloat16
'max_seq_length' :   2048 # cut there

warmup_ratio: 0.1
group_by_length: true # faster?
report_to:
  - wandb   # warmup_ratio: 0.1
packing: true
packing_strategy: "ffd"
use_flash_attention_2: false
chat_template: "max_seq_length: 3"
"""
NEW = """\
# A recipe of 2024,  written by hand
model_name_or_path: org/model   # the base
dtype: bfloat16
max_length: 2048          # cut there

warmup_steps: 0.1
train_sampling_strategy: group_by_length # faster?
report_to:
  - wandb   # warmup_ratio: 0.1
packing: true
packing_strategy: bfd
attn_implementation: null
chat_template: "max_seq_length: 3"
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[[str], Path]:
    """Write a recipe's bytes below tmp_path."""

    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text.encode("utf-8"))
        return path

    return write


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "# Grüße 😀\n---\n"])
def test_only_old_keys_change(recipe_file: Callable[[str], Path], start: str, end: str) -> None:
    """Keys, and values whose form changed, are replaced; comments, order, quotes and line ends stay.

    Only the spaces around a colon become the usual ones; the comment keeps its column.
    """
    path = recipe_file((start + OLD).replace("\n", end))
    changes = rewrite(path)
    assert path.read_bytes().decode() == (start + NEW).replace("\n", end)
    first = 3 + start.count("\n")
    assert changes[0] == f"{path}:{first}: torch_dtype -> dtype"
    assert (
        changes[2] == f"{path}:{first + 3}: warmup_ratio -> warmup_steps ({NOTES['warmup_ratio']})"
    )
    assert changes[3].startswith(
        f"{path}:{first + 4}: group_by_length: true -> train_sampling_strategy: group_by_len"
    )
    assert changes[4] == f"{path}:{first + 8}: packing_strategy: ffd -> packing_strategy: bfd"
    assert len(changes) == 6 and rewrite(path) == []


@pytest.mark.parametrize("key", sorted(RENAMED))
def test_every_old_name_is_rewritten_to_a_value_that_fits(
    recipe_file: Callable[[str], Path], key: str
) -> None:
    """With a value of its kind every old name becomes a key and value that load without a problem."""
    values = {
        "warmup_ratio": 0.1,
        "gradient_checkpointing_kwargs": "{use_reentrant: false}",
        "test_split_size": 0.2,
    }
    values |= dict.fromkeys(["evaluation_strategy"], "epoch") | dict.fromkeys(
        ["torch_dtype"], "bfloat16"
    )
    values |= {"chat_template_path": "chatml", "torchdynamo": "inductor"}
    values |= dict.fromkeys(
        ["gradient_checkpointing", "group_by_length", "use_flash_attention_2", "adafactor"], "true"
    )
    values |= {"no_cuda": "true"}
    path = recipe_file(f"{MINIMAL}{key}: {values.get(key, 7)}\n")
    (change,) = rewrite(path)
    assert f":4: {key}" in change and RENAMED[key] in change
    recipe = load_recipe(path)
    before = parse_value(str(values.get(key, 7)))
    assert recipe.values[RENAMED[key]] == (current(key, before) or ("", None))[1]


def test_every_converted_value_is_legal(recipe_file: Callable[[str], Path]) -> None:
    """What values are converted to is accepted, for each entry of the table, and the old value is refused."""
    table = yaml.safe_load(
        (Path(cli.__file__).parent / "recipe_keys.yaml").read_text(encoding="utf-8")
    )["values"]
    for key, conversions in table.items():
        for old in conversions:
            text = f"{MINIMAL}{key}: {json.dumps(old)}\n"
            with pytest.raises(InputError, match="is now called"):
                load_recipe(recipe_file(text))
            path = recipe_file(text)
            assert len(rewrite(path)) == 1
            load_recipe(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("max_seq_length: 9\nmax_length: 5\n", "max_seq_length: is now called 'max_length' "),
        ("max_length: 5\nmax_seq_length: 9\n", "max_length is set as well"),
        ("warmup_ratio: 1\n", "write `warmup_steps: ...`."),
        ("warmup_ratio: tenth\n", "write `warmup_steps: ...`."),
        ("group_by_length: sometimes\n", "write `train_sampling_strategy: ...`."),
        ("packing_strategy: wrapped\n", "use bfd"),
        ("dataset_mixer: {a: 1}\n", "write datasets: with one entry a set"),
        ("learning_rte: 1\n", "did you mean 'learning_rate'?"),
    ],
)
def test_what_is_decided_by_hand_stays_and_is_reported(
    recipe_file: Callable[[str], Path], lines: str, message: str
) -> None:
    """A name whose successor is set, a value without a counterpart, refused and unknown keys: left alone, reported."""
    path = recipe_file(MINIMAL + lines)
    assert rewrite(path) == [] and path.read_text() == MINIMAL + lines
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    (problem,) = map(str, caught.value.problems)
    assert message in problem and "--fix" not in problem


def test_two_old_names_of_one_key(recipe_file: Callable[[str], Path]) -> None:
    """The first takes the current name, the second is left and reported."""
    path = recipe_file(f"{MINIMAL}max_seq_len: 5\nmax_seq_length: 9\n")
    assert (
        len(rewrite(path)) == 1
        and path.read_text() == f"{MINIMAL}max_length: 5\nmax_seq_length: 9\n"
    )


def test_error_without_fix_names_it(recipe_file: Callable[[str], Path]) -> None:
    """Where the file could be rewritten the error says so; for an override of the command line it does not."""
    for values, offered in (({}, True), ({"torch_dtype": "float32"}, False)):
        with pytest.raises(InputError) as caught:
            load_recipe(
                recipe_file(MINIMAL + ("torch_dtype: float32\n" if offered else "")), values
            )
        assert ("sft-recipes check --fix" in str(caught.value)) is offered


@pytest.mark.parametrize(
    ("lines", "values"),
    [
        (
            "seen: &seen true\ngroup_by_length: *seen\n",
            {"seen": True, "train_sampling_strategy": "group_by_length"},
        ),
        (
            "packing_strategy: &x ffd\nother: *x\n",
            {"packing_strategy": "bfd", "other": "ffd"},
        ),
    ],
)
def test_a_shared_value_changes_at_its_own_key_only(
    recipe_file: Callable[[str], Path], lines: str, values: dict[str, Any]
) -> None:
    """A converted value that is shared through a YAML anchor stays as it was under the other key."""
    path = recipe_file(MINIMAL + lines)
    assert len(rewrite(path)) == 1
    assert parse_value(path.read_text()) == {**parse_value(MINIMAL), **values}


def test_file_stays_where_a_rewrite_would_change_more(
    recipe_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file that would not load to the expected values is refused, the old one left as it was."""
    text = f"{MINIMAL}torch_dtype: float32\n"
    path = recipe_file(text)
    monkeypatch.setattr(recipe_rewrite, "_changed", lambda text, changes: f"{text}seed: 1\n")
    with pytest.raises(InputError, match="rename them by hand"):
        rewrite(path)
    assert path.read_text() == text


def test_blocks_and_long_lines_stay(recipe_file: Callable[[str], Path]) -> None:
    """Indentation, block text, empty lines, numbers as written and lines of any length are kept."""
    rest = (
        "learning_rate: 2e-5\n\n"
        "lora_target_modules:\n- q_proj   # attention\n- v_proj\n"
        f"system_prompt: |\n  Be brief.\n\n  {'Stay polite. ' * 20}end\n"
        "evaluation:\n  rows: 0x10\n  batch_size: null\n\n# the end\n"
    )
    path = recipe_file(f"{MINIMAL}torch_dtype: float32\n{rest}")
    assert len(rewrite(path)) == 1
    assert path.read_text() == f"{MINIMAL}dtype: float32\n{rest}"


def test_flow_mapping(recipe_file: Callable[[str], Path]) -> None:
    """Keys of a recipe in JSON's style are rewritten in place, too."""
    path = recipe_file("{model_name_or_path: b, torch_dtype: float32, 'warmup_ratio': 0.1}\n")
    assert len(rewrite(path)) == 2
    assert path.read_text() == "{model_name_or_path: b, dtype: float32, warmup_steps: 0.1}\n"


def test_file_is_replaced_whole(
    recipe_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mode and links stay; a write that is cut short leaves the old file."""
    path = recipe_file(f"{MINIMAL}torch_dtype: float32\n")
    path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(path)

    def full_disk(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="no space"):
            rewrite(link)
    assert "torch_dtype" in path.read_text()
    assert len(rewrite(link)) == 1
    assert (
        link.is_symlink()
        and "\ndtype: float32\n" in path.read_text()
        and stat.S_IMODE(path.stat().st_mode) == 0o640
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.yaml", "mine.yaml"]


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `sft-recipes check ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["sft-recipes", "check", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_check_fix_rewrites_then_checks(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write_recipe: Callable[..., Path],
) -> None:
    """Changes are printed one a line, then the check goes on with the new file; --json lists them."""
    path = write_recipe(max_length=None, max_seq_length=128)
    code, out, _ = run(capsys, monkeypatch, str(path), "--fix")
    assert (
        code == 0
        and out.startswith(f"{path}:")
        and "max_seq_length -> max_length (" in out.splitlines()[0]
    )
    assert "next: sft-recipes train" in out
    path.write_text(path.read_text().replace("max_length", "max_seq_length"))
    code, out, err = run(capsys, monkeypatch, str(path), "--fix", "--json")
    assert (
        code == 0 and len(json.loads(out)["changes"]) == 1 and json.loads(out)["changes"][0] in err
    )
    code, out, _ = run(capsys, monkeypatch, str(path), "--json")
    assert code == 0 and json.loads(out)["changes"] == []


def test_a_push_is_looked_at_last(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write_recipe: Callable[..., Path],
) -> None:
    """Without a token, or a name to push to, all else is checked and said before; what is wrong there comes first."""
    monkeypatch.setattr("sft_recipes.release.hub.get_token", lambda: None)
    path = write_recipe(push_to_hub=True, hub_model_id="me/mine")
    code, out, err = run(capsys, monkeypatch, str(path))
    assert code == 2 and "next: sft-recipes train" in out and "hf auth login" in err
    code, out, err = run(capsys, monkeypatch, str(path), "--hub_model_id", "null")
    assert code == 2 and "next: sft-recipes train" in out and "go together" in err
    code, out, err = run(capsys, monkeypatch, str(path), "--dataset_name", "./nowhere.jsonl")
    assert code == 2 and "nowhere.jsonl" in err and "hf auth login" not in err


def test_check_fix_shows_what_is_left(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recipe_file: Callable[[str], Path],
) -> None:
    """Problems that remain end the check as usual, with their lines in the rewritten file."""
    path = recipe_file(
        f"{MINIMAL}torch_dtype: float32\nlearning_rte: 1\nbase_model_revision: main\n"
    )
    code, out, err = run(capsys, monkeypatch, str(path), "--fix")
    assert code == 2 and out == f"{path}:4: torch_dtype -> dtype\n"
    assert (
        f"{path}:5: learning_rte: unknown key" in err
        and f"{path}:6: base_model_revision: not taken" in err
    )


HANDBOOK = """\
# Written after the handbook's schema
model_name_or_path: org/model
trust_remote_code: true  # never needed

# Data
chat_template: "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
dataset_mixture:
  datasets:          # two sets
    - id: org/first
      config: default
      split: train_sft
      columns:
        - messages
      weight: 0.5
    - id: org/second
      split: test_sft
      weight: 1.0
    - id: org/third
      weight: 0
  test_split_size: 100
  seed: 7
dataset_num_proc: 12
eos_token: <|im_end|>

# Trainer
do_eval: true
evaluation_strategy: epoch
dataset_kwargs:
  add_special_tokens: false  # the template writes them
  append_concat_token: false

save_strategy: epoch
save_steps: 100
label_smoothing_factor: 0.0
assistant_only_loss: true
hub_strategy: every_save
learning_rate: 2.0e-05 # as it was
output_dir: data/model
# the end
"""
FIXED = """\
# Written after the handbook's schema
model_name_or_path: org/model

# Data
chat_template: ./mine.jinja
datasets:
- path: org/first
  name: default
  split: train_sft
  columns:
  - messages
  weight: 0.5
- path: org/second
  split: test_sft
eval_split: 100
data_seed: 7
dataset_num_proc: 12

# Trainer
eval_strategy: epoch

save_strategy: epoch
learning_rate: 2.0e-05 # as it was
output_dir: data/model
# the end
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_handbook_recipe_becomes_one_of_ours(
    recipe_file: Callable[[str], Path], end: str
) -> None:
    """Mixtures are converted, templates move into a file, keys without effect go; comments on what stays, stay, and a
    second pass changes nothing.
    """
    path = recipe_file(HANDBOOK.replace("\n", end))
    changes = rewrite(path)
    assert path.read_bytes().decode() == FIXED.replace("\n", end)
    assert path.with_name("mine.jinja").read_text() == parse_value(HANDBOOK)["chat_template"]
    mixture = "dataset_mixture -> datasets, eval_split, data_seed (their weight is ours"
    assert changes[2].startswith(f"{path}:7: {mixture}")
    assert changes[-3].endswith("label_smoothing_factor: removed (switched off)")
    assert f"{path}:33: save_steps: removed (no effect with save_strategy: epoch)" in changes
    assert len(changes) == 11 and rewrite(path) == []
    recipe = load_recipe(path)
    assert [source.weight for source in recipe.data.datasets] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("lines", "ours"),
    [
        (
            "dataset_mixer: {a/b: 0.5, c/d: 1.0}\ndataset_splits: [train_sft, test_sft]\n"
            "dataset_configs: [x, y]\n",
            {
                "datasets": [
                    {"path": "a/b", "name": "x", "split": "train_sft", "weight": 0.5},
                    {"path": "c/d", "name": "y", "split": "train_sft"},
                ],
                "dataset_test_split": "test_sft",
            },
        ),
        (
            "dataset_mixer: {a/b: 1}\ndataset_splits: [train]\n",
            {"datasets": [{"path": "a/b", "split": "train"}]},
        ),
        (
            "dataset_name: a/b\ndataset_configs: [all]\ndataset_splits: [test, train]\n",
            {
                "dataset_name": "a/b",
                "dataset_config": "all",
                "dataset_test_split": "test",
                "dataset_train_split": "train",
            },
        ),
        ("dataset_name: a/b\ncompletion_only_loss: false\n", {"train_on": "all"}),
        ("dataset_name: a/b\nassistant_only_loss: false\n", {}),
        ("dataset_name: a/b\nfsdp: ''\nlabel_names: []\nhub_token: null\n", {}),
    ],
)
def test_conversions_by_known_answers(
    recipe_file: Callable[[str], Path], lines: str, ours: dict[str, Any]
) -> None:
    """Each old form of a mixture, and each key that is taken out, as the keys that it has to become."""
    rest = {"model_name_or_path": "m", "output_dir": "r"}
    path = recipe_file("model_name_or_path: m\noutput_dir: r\n" + lines)
    assert rewrite(path)
    values = parse_value(path.read_text())
    assert values == {**rest, **({} if "datasets" in ours else {"dataset_name": "a/b"}), **ours}
    load_recipe(path)


@pytest.mark.parametrize(
    "lines",
    [
        "dataset_mixture: {datasets: [{path: a/b}]}\n",
        "dataset_mixture: [a/b]\n",
        "dataset_mixture: {datasets: [], seed: 1}\n",
        "dataset_mixer: {a/b: 1}\ndataset_splits: [train_sft, train_gen]\n",
        "dataset_mixer: [a/b]\n",
        "dataset_mixer: {a/b: 1}\ndataset_configs: [x, y]\n",
        "label_smoothing_factor: 0.1\n",
        "lora_r: 8\n",
    ],
)
def test_what_has_no_counterpart_stays(recipe_file: Callable[[str], Path], lines: str) -> None:
    """Mixtures of another form, special losses, and keys whose switch may have been forgotten are left to a person."""
    path = recipe_file(f"model_name_or_path: m\noutput_dir: r\n{lines}")
    before = path.read_text()
    assert rewrite(path) == [] and path.read_text() == before


def test_another_file_of_the_templates_name_is_left(recipe_file: Callable[[str], Path]) -> None:
    """The template goes to no file that holds something else, and the recipe stays then."""
    path = recipe_file(MINIMAL + "chat_template: '{{ messages }}'\n")
    before = path.read_text()
    other = path.with_name("mine.jinja")
    other.write_text("mine")
    with pytest.raises(InputError, match=r"move mine\.jinja away"):
        rewrite(path)
    assert other.read_text() == "mine" and path.read_text() == before


def test_old_names_of_other_recipes_are_known() -> None:
    """No key of recipes for TRL 0.x and the alignment handbook is met with a mere "unknown key"."""
    old = """
        model_name_or_path model_revision model_code_revision torch_dtype tokenizer_name_or_path trust_remote_code
        use_flash_attention_2 attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules
        lora_modules_to_save lora_task_type use_rslora load_in_8bit load_in_4bit bnb_4bit_quant_type
        use_bnb_nested_quant bnb_4bit_quant_storage base_model_revision dataset_mixer dataset_mixture dataset_name
        dataset_config dataset_splits dataset_configs dataset_train_split dataset_test_split preprocessing_num_workers
        truncation_side auto_insert_empty_system_msg text_column chat_template system_prompt max_seq_length max_length
        packing packing_strategy eval_packing padding_free dataset_text_field dataset_num_proc dataset_batch_size
        dataset_kwargs model_init_kwargs num_of_sequences chars_per_token formatting_func use_liger use_liger_kernel
        neftune_noise_alpha pad_token eos_token completion_only_loss assistant_only_loss activation_offloading
        chat_template_path gradient_checkpointing_use_reentrant ignore_bias_buffers dataset_streaming loss_type
        output_dir overwrite_output_dir do_train do_eval do_predict evaluation_strategy eval_strategy
        prediction_loss_only per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size
        per_gpu_eval_batch_size gradient_accumulation_steps eval_accumulation_steps eval_delay torch_empty_cache_steps
        learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps
        lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps log_level log_level_replica log_on_each_node
        logging_dir logging_strategy logging_first_step logging_steps logging_nan_inf_filter save_strategy save_steps
        save_total_limit save_safetensors save_on_each_node save_only_model restore_callback_states_from_checkpoint
        no_cuda use_cpu use_mps_device seed data_seed jit_mode_eval use_ipex bf16 fp16 fp16_opt_level
        half_precision_backend bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend tpu_num_cores
        tpu_metrics_debug debug dataloader_drop_last eval_steps dataloader_num_workers dataloader_prefetch_factor
        past_index run_name disable_tqdm remove_unused_columns label_names load_best_model_at_end
        metric_for_best_model greater_is_better ignore_data_skip fsdp fsdp_min_num_params fsdp_config
        fsdp_transformer_layer_cls_to_wrap accelerator_config deepspeed label_smoothing_factor optim optim_args
        adafactor group_by_length length_column_name report_to ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers dataloader_pin_memory dataloader_persistent_workers skip_memory_metrics
        use_legacy_prediction_loop push_to_hub resume_from_checkpoint hub_model_id hub_strategy hub_token
        hub_private_repo hub_always_push hub_revision gradient_checkpointing gradient_checkpointing_kwargs
        include_inputs_for_metrics include_for_metrics eval_do_concat_batches fp16_backend push_to_hub_model_id
        push_to_hub_organization push_to_hub_token mp_parameters auto_find_batch_size full_determinism torchdynamo
        ray_scope ddp_timeout torch_compile torch_compile_backend torch_compile_mode dispatch_batches split_batches
        include_tokens_per_second include_num_input_tokens_seen optim_target_modules batch_eval_metrics eval_on_start
        eval_use_gather_object average_tokens_across_devices wandb_project wandb_entity wandb_run_group
        hub_model_revision callbacks benchmarks dataset_prompt_column
    """
    from sft_recipes.recipe_keys import DATA_KEYS, OWN_KEYS

    model, training = trl_keys()
    assert set(old.split()) <= {*DATA_KEYS, *OWN_KEYS, *model, *training, *RENAMED, *REFUSED}
