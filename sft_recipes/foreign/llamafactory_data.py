"""LLaMA-Factory's data sets: names that its `dataset_info.json` describes, how they are mixed, and what is held out."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_recipes.errors import suggest
from sft_recipes.foreign.data_sets import put_sources
from sft_recipes.foreign.reading import Reading, Setting
from sft_recipes.foreign.tables import is_off
from sft_recipes.messages import ROLE_ALIASES
from sft_recipes.text_files import interpreting, read_json

_INFO = "dataset_info.json"
_MEND = "repair it, or name another folder as dataset_dir"
# Its names of columns and ours, by its formats; what it reads where an entry has no `columns`.
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_READ_UNASKED = {"prompt": "instruction", "query": "input", "response": "output"}
_BESIDE = ("system", "tools")
_MEDIA = ("images", "videos", "audios")
# Its names of roles and ours, and what they are called where an entry has no `tags`.
_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_KNOWN_KEYS = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}
_OPENAI_SYSTEM = "detailed thinking off"


def names_in(value: Any) -> list[str]:
    """The names in a list, or in a text between commas."""
    if isinstance(value, str):
        value = value.split(",")
    return [str(name).strip() for name in value]


@dataclass
class _DataSet:
    """One data set: our keys for it, or why it cannot be read; what is done otherwise, and what is wrong with it."""

    name: str
    ours: dict[str, Any] = field(default_factory=dict)
    formatting: str = "alpaca"
    fault: str = ""
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


class _Catalogue:
    """What `dataset_info.json` says; without the file, what is known of the data sets that it ships with."""

    def __init__(self, reading: Reading) -> None:
        self.folder = str(reading.value("dataset_dir") or "data")
        self.is_online = self.folder == "ONLINE"
        self.repository = ""
        if self.folder.startswith("REMOTE:"):
            self.repository = self.folder.removeprefix("REMOTE:")
        self.demo_repository = reading.table.more["demo_repository"]
        self.file = reading.find_file(f"{self.folder}/{_INFO}")
        self.entries: Mapping[str, Any] = reading.table.more["shipped"]
        if self.file is not None:
            self.entries = read_json(self.file, _MEND)

    def path_of(self, file_name: str) -> Path:
        """Where a file of rows is, or would be."""
        if self.file is None:
            return Path(self.folder) / file_name
        path = self.file.parent / file_name
        here = Path.cwd()
        if path.is_absolute() and path.is_relative_to(here):
            return path.relative_to(here)
        return path

    def look_up(self, name: str) -> _DataSet:
        """The data set of this name."""
        if self.is_online:
            return _DataSet(name, {"path": name, "format": "instruction"})
        entry = self.entries.get(name)
        if self.repository and (self.repository != self.demo_repository or entry is None):
            what = f"{_INFO} is on the Hub: download {self.repository} and name its folder as dataset_dir"
            return _DataSet(name, fault=f"{name}: {what}")
        if entry is not None:
            with interpreting(f"{self.file or self.folder}: {name}", _MEND):
                return _described(name, entry, self)
        if self.file is None:
            where = f"{self.folder}/{_INFO} is not there"
        else:
            where = f"it is not in {self.file}; {suggest(name, self.entries)}"
        return _DataSet(name, fault=f"{name}: {where}")


def _described(name: str, entry: Mapping[str, Any], catalogue: _Catalogue) -> _DataSet:
    data_set = _DataSet(name)
    columns = entry.get("columns", {})
    media = [column for column in _MEDIA if column in columns]
    if entry.get("ranking") or "kto_tag" in columns:
        data_set.fault = f"{name}: pairs of answers, for preference tuning"
    elif media:
        data_set.fault = f"{name}: rows with {' and '.join(media)}"
    if data_set.fault:
        return data_set
    _place(data_set, entry, catalogue)
    formatting = entry.get("formatting", "alpaca")
    data_set.formatting = formatting
    if formatting == "alpaca":
        _alpaca(data_set, entry)
    elif formatting in ("sharegpt", "openai"):
        _conversations(data_set, entry, formatting)
    else:
        data_set.fault = f"{name}: formatting {formatting!r} is not known"
    return data_set


def _place(data_set: _DataSet, entry: Mapping[str, Any], catalogue: _Catalogue) -> None:
    """Where the rows are."""
    if catalogue.repository:
        data_set.ours |= {"path": catalogue.repository, "name": data_set.name}
    elif "hf_hub_url" in entry:
        data_set.ours["path"] = entry["hf_hub_url"]
        for theirs, ours in {"subset": "name", "split": "split"}.items():
            if entry.get(theirs):
                data_set.ours[ours] = entry[theirs]
        if entry.get("folder"):
            data_set.ours["data_files"] = f"{entry['folder']}/**"
    elif "file_name" in entry and not {"ms_hub_url", "om_hub_url", "script_url"} & entry.keys():
        data_set.ours["path"] = str(catalogue.path_of(entry["file_name"]))
        if catalogue.file is None:
            data_set.notes.append(f"{data_set.name} is a file of LLaMA-Factory's own checkout")
    else:
        data_set.fault = f"{data_set.name}: its rows lie in no file and not on the Hugging Face Hub"
    if entry.get("num_samples"):
        data_set.notes.append(
            f"all rows of {data_set.name}, not {entry['num_samples']}: set `weight`"
        )


def _alpaca(data_set: _DataSet, entry: Mapping[str, Any]) -> None:
    """Rows of an instruction, an input and an output. It reads the columns that an entry lists, and no others."""
    columns = entry.get("columns") or _READ_UNASKED
    mapping = {}
    for theirs, ours in {**_COLUMNS, "system": "system", "tools": "tools"}.items():
        if columns.get(theirs) and columns[theirs] != ours:
            mapping[ours] = columns[theirs]
    data_set.ours["format"] = "instruction"
    data_set.ours["columns"] = [name for name in columns.values() if name]
    if mapping:
        data_set.ours["column_mapping"] = mapping
    if columns.get("query"):
        data_set.notes.append(
            "an input stands a blank line below its instruction, there a line break"
        )


def _conversations(data_set: _DataSet, entry: Mapping[str, Any], formatting: str) -> None:
    """Rows of turns."""
    columns = entry.get("columns", {})
    tags = entry.get("tags", {})
    messages = columns.get("messages", "conversations")
    data_set.ours["format"] = "sharegpt"
    mapping = {}
    if messages != "conversations":
        mapping["conversations"] = messages
    for column in _BESIDE:
        if columns.get(column, column) != column:
            mapping[column] = columns[column]
    if mapping:
        data_set.ours["column_mapping"] = mapping
    _name_turns(data_set, tags)
    if tags and "system_tag" not in tags:
        data_set.notes.append("rows that begin with a system turn are trained; it skips them")
    if formatting == "openai":
        data_set.notes.append(f"no {_OPENAI_SYSTEM!r} is written into rows")
        data_set.findings.append(
            f"{data_set.name}: `formatting: openai` writes {_OPENAI_SYSTEM!r} as system prompt into rows without tools"
        )
    data_set.notes.append("a row whose turns do not alternate ends the run (`on_bad_rows: skip`)")


def _name_turns(data_set: _DataSet, tags: Mapping[str, str]) -> None:
    """What turns call their role, their text and who speaks, where that has to be said."""
    keys = {}
    for tag, known in _KNOWN_KEYS.items():
        if tags.get(tag) and tags[tag] not in known:
            keys[tag.removesuffix("_tag")] = tags[tag]
    roles = {}
    for tag, role in _ROLES.items():
        named = tags.get(tag)
        if named and named != role and ROLE_ALIASES.get(named.lower()) != role:
            roles[role] = named
    if keys:
        data_set.ours["message_mapping"] = keys
    if roles:
        data_set.ours["role_mapping"] = roles


# -- the rules ---------------------------------------------------------------------------------------


def _dataset(reading: Reading, setting: Setting) -> None:
    catalogue = _Catalogue(reading)
    sets = [catalogue.look_up(name) for name in names_in(setting.value)]
    faults = []
    notes: dict[str, None] = {}
    for data_set in sets:
        notes |= dict.fromkeys(data_set.notes)
        if data_set.fault:
            faults.append(data_set.fault)
        for what in (*data_set.findings, *_placeholders(reading, data_set)):
            reading.find(setting, what)
    if faults and reading.data is not None:
        put_sources(reading, setting, [{"path": reading.local_path(reading.data)}])
        reading.differs(setting, f"the rows of --data stand in: {'; '.join(faults)}")
        return
    if faults:
        reading.block(setting, f"{'; '.join(faults)}. --data FILE stands in for all of them")
        return
    reading.beside_config["formatting"] = sets[0].formatting
    sources = [data_set.ours for data_set in sets]
    _share(reading, sources)
    put_sources(reading, setting, sources)
    if notes:
        reading.differs(setting, "; ".join(notes))
    else:
        reading.same(setting, {})


def _placeholders(reading: Reading, data_set: _DataSet) -> Iterator[str]:
    """A finding for data that ships with texts to be replaced, and still holds them."""
    text = reading.table.more["unfilled"].get(data_set.name)
    if text is None:
        return
    path = Path(str(data_set.ours.get("path")))
    if path.is_file() and text not in path.read_text(encoding="utf-8"):
        return
    yield f"{data_set.name} has {text} and the like in 85 of its 91 answers, to be replaced before it is trained"


def _share(reading: Reading, sources: list[dict[str, Any]]) -> None:
    """The shares of an interleaved mixture."""
    strategy = str(reading.value("mix_strategy"))
    if len(sources) < 2 or strategy not in ("interleave_under", "interleave_over"):
        return
    shares = [1 / len(sources)] * len(sources)
    if reading.value("interleave_probs"):
        shares = [float(share) for share in names_in(reading.value("interleave_probs"))]
    for source, share in zip(sources, shares, strict=False):
        source["fraction"] = round(share, 6)


def _mix_strategy(reading: Reading, setting: Setting) -> None:
    if setting.value in ("concat", "interleave_once"):
        reading.no_effect(setting, "all rows once an epoch, shuffled")
    elif setting.value == "interleave_under":
        say = "the same shares (`fraction`), drawn by seed until the first set is used up"
        reading.differs(setting, say)
    else:
        say = "the same shares (`fraction`), of the largest mixture that repeats no row; LLaMA-Factory repeats rows"
        reading.differs(setting, say)


def _interleave_probs(reading: Reading, setting: Setting) -> None:
    if str(reading.value("mix_strategy")).startswith("interleave_"):
        reading.no_effect(setting, "taken as `fraction` of the data sets")
    else:
        reading.no_effect(setting, "sets are not interleaved")


def _dataset_dir(reading: Reading, setting: Setting) -> None:
    reading.no_effect(setting, f"where {_INFO} was looked for")


def _max_samples(reading: Reading, setting: Setting) -> None:
    sets = len(names_in(reading.value("dataset") or ""))
    say = "drawn by seed, where LLaMA-Factory takes the first rows"
    if sets > 1:
        say = f"{setting.value} rows for each of {sets} sets, drawn by seed over all; there the first of each"
    reading.differs(setting, say, {"max_rows": sets * int(setting.value)})


def _val_size(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "no rows are held out")
        return
    size = setting.value
    if size > 1:
        size = int(size)
    say = "eval_split: another seeded draw, rows with one prompt stay together"
    reading.differs(setting, say, {"eval_split": size})


def _eval_dataset(reading: Reading, setting: Setting) -> None:
    catalogue = _Catalogue(reading)
    held_out = names_in(setting.value)
    trained = names_in(reading.value("dataset") or "")
    first = catalogue.look_up(held_out[0])
    path = first.ours.get("path", "FILE")
    say = f"not evaluated during training; afterwards: sft-recipes evaluate RUN --data {path}"
    reading.differs(setting, say)
    both = [name for name in held_out if name in trained]
    if both:
        reading.find(setting, f"{', '.join(both)}: the rows that are evaluated are trained as well")


def _eval_on_each_dataset(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
    else:
        reading.differs(setting, "one evaluation for each: `sft-recipes evaluate RUN --data FILE`")


RULES: Mapping[str, Callable[[Reading, Setting], None]] = {
    "dataset": _dataset,
    "dataset_dir": _dataset_dir,
    "mix_strategy": _mix_strategy,
    "interleave_probs": _interleave_probs,
    "max_samples": _max_samples,
    "val_size": _val_size,
    "eval_dataset": _eval_dataset,
    "eval_on_each_dataset": _eval_on_each_dataset,
}
