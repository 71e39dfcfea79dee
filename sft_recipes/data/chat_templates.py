"""Chat templates: find one, attach it to a tokenizer, and render through it everywhere.

Training, inspection, evaluation and serving checks all render through `ChatRenderer`. A template is
a `.jinja` text: one of ours (`chat_templates/*.jinja`), the tokenizer's own, or any file.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sft_recipes.data.encoding import Encoder, SegmentedText, all_text
from sft_recipes.data.fitting import LOOK_UP, TemplateNeeds, find_needs, fit_messages
from sft_recipes.data.template_trial import try_template
from sft_recipes.data.turns import Tools, TurnLayout, TurnLayouts
from sft_recipes.errors import CheckFailed, InputError, Problem, suggest
from sft_recipes.messages import Message
from sft_recipes.plain_values import is_file, quoted
from sft_recipes.recipe import TemplateSettings
from sft_recipes.upstream.tokenizers import control_tokens

SHIPPED_TEMPLATES = Path(__file__).parent / "chat_templates"

# Conversations whose layouts tell what ends a turn.
PROBE: Sequence[Message] = (
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
)
_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "blue"}}}
TOOL_PROBE: Sequence[Message] = (
    PROBE[0],
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
)


def shipped_template_names() -> list[str]:
    """Names that `chat_template:` accepts without a path."""
    return sorted(path.stem for path in SHIPPED_TEMPLATES.glob("*.jinja"))


def load_chat_template(name_or_path: str) -> str:
    """The text of a shipped template or of a `.jinja` file."""
    path = Path(name_or_path)
    names = shipped_template_names()
    if name_or_path in names:
        return (SHIPPED_TEMPLATES / f"{name_or_path}.jinja").read_text(encoding="utf-8").strip("\n")
    if path.suffix in (".jinja", ".j2") and is_file(path):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fix = "save it as UTF-8, in a file that can be read"
            what = f"the template cannot be read ({error})"
            raise InputError(Problem(str(path), "chat_template", what, fix)) from error
    hint = suggest(
        name_or_path, names, f"use one of {', '.join(names)}, 'tokenizer' or a .jinja file"
    )
    raise InputError(
        Problem("recipe", "chat_template", f"there is no template {quoted(name_or_path)}", hint)
    )


class ChatRenderer:
    """Renders conversations with one tokenizer, its template and its `chat_template_kwargs`.

    `stop_ids`: the ids that end an assistant turn when served: turn terminators, then the
    tokenizer's EOS. `has_own_template`: the tokenizer brought the template. `template_place`: the
    file that it stands in, for errors.
    """

    def __init__(
        self, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.has_own_template = True
        self.template_place = "the chat template"
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._layouts = TurnLayouts(self.special_tokens)

    @property
    def template_text(self) -> str:
        """The template's source; of several named templates, all of them."""
        return "\n".join(self._templates)

    @property
    def _templates(self) -> list[str]:
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            return list(template.values())
        return [str(template)]

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of every added token the tokenizer calls special."""
        tokens: dict[str, int] = {}
        for index, token in self.tokenizer.added_tokens_decoder.items():
            if token.special:
                tokens[token.content] = index
        return tokens

    @cached_property
    def encoder(self) -> Encoder:
        """Encodes what is rendered.

        Text of a message becomes no special token and none that the template writes.
        """
        tokens: dict[str, None] = {}
        for template in self._templates:
            tokens |= dict.fromkeys(control_tokens(self.tokenizer, template))
        return Encoder(self.tokenizer, list(tokens))

    @cached_property
    def needs(self) -> TemplateNeeds:
        """The form in which the template reads reasoning and tool calls."""
        return find_needs(self.render)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn when served, the usual terminator first."""
        layouts = [self.layout(PROBE)]
        if self.needs.writes_calls:
            layouts.append(self.layout(fit_messages(TOOL_PROBE, self.needs), [LOOK_UP]))
        ids: list[int] = []
        for layout in layouts:
            if layout is not None and layout.terminator.token is not None:
                ids.append(self.special_tokens[layout.terminator.token])
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(ids))

    @cached_property
    def template_segments(self) -> tuple[str, ...]:
        """The template's own literal lines, such as `### Response:`.

        For telling whether a model writes them itself.
        """
        user: Message = {
            "role": "user",
            "content": "QZuserZQ",
            "instruction": "QZaskZQ",
            "input": "QZinputZQ",
        }
        conversation = [user, {"role": "assistant", "content": "QZanswerZQ"}] * 2
        text = re.sub(r"QZ[a-z]+ZQ", "\n", self.render(conversation, add_generation_prompt=True))
        segments: dict[str, None] = {}
        for line in text.splitlines():
            segment = line.strip()
            if len(segment) > 2:
                segments[segment] = None
        return tuple(segments)

    def render_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Tools = None,
        add_generation_prompt: bool = False,
    ) -> list[str]:
        """Render conversations that share `tools`.

        Raises one of TEMPLATE_ERRORS if the template refuses one.
        """
        return self.tokenizer.apply_chat_template(
            list(map(list, conversations)),
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.chat_template_kwargs,
        )

    def render(
        self, messages: Sequence[Message], tools: Tools = None, add_generation_prompt: bool = False
    ) -> str:
        """Render one conversation."""
        return self.render_batch([messages], tools, add_generation_prompt)[0]

    def layout(self, messages: Sequence[Message], tools: Tools = None) -> TurnLayout | None:
        """How the template lays out the last turn of `messages`, an assistant's.

        None where it gives no clear place.
        """

        def render(conversation: Sequence[Message], prompt: bool) -> str:
            return self.render(conversation, tools, prompt)

        return self._layouts.find(render, messages, bool(tools))

    def text_ids(self, text: str) -> list[int]:
        """Ids of a rendered text, as the tokenizer makes them."""
        return self.encoder.encode([SegmentedText([text])])[0].ids[0].tolist()

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Ids of the generation prompt after `messages`, as served.

        No second BOS, and text is never a control token.
        """
        markers = None
        given = all_text(messages, tools)
        if self.encoder.first_control_token(given) is not None:
            markers = self.encoder.markers_for(given)
            messages = self.encoder.mark(messages, markers)
            tools = self.encoder.mark(tools, markers)
        text = self.render(messages, tools, add_generation_prompt=True)
        return self.encoder.encode([SegmentedText([text], markers)])[0].ids[0].tolist()


def attach_chat_template(tokenizer: Any, settings: TemplateSettings) -> ChatRenderer:
    """Give the tokenizer the recipe's template, EOS and PAD, and return its renderer.

    Without `chat_template` the tokenizer's own is kept; a tokenizer without one (a base model) gets
    the chapter's instruction template as plain text, which needs no new token. Raises InputError if
    the tokenizer cannot be used, CheckFailed if a model trained with the template would not learn
    to stop.
    """
    if not getattr(tokenizer, "is_fast", False):
        fix = "use a model whose tokenizer has a tokenizer.json"
        raise InputError(
            Problem("recipe", "model_name_or_path", "its tokenizer is not a fast one", fix)
        )
    name = settings.chat_template or ("tokenizer" if tokenizer.chat_template else "instruction")
    if name != "tokenizer":
        template = load_chat_template(name)
        # Our plain-text templates know no BOS of their own.
        if name in shipped_template_names() and begins_with_bos(tokenizer):
            template = "{{- bos_token -}}" + template
        tokenizer.chat_template = template
    elif not tokenizer.chat_template:
        fix = f"set chat_template to one of {', '.join(shipped_template_names())}"
        raise InputError(
            Problem("recipe", "chat_template", "the tokenizer has no chat template of its own", fix)
        )
    renderer = ChatRenderer(tokenizer, settings.chat_template_kwargs)
    renderer.has_own_template = name == "tokenizer"
    renderer.template_place = _template_place(tokenizer, name)
    if name not in shipped_template_names():
        try_template(renderer, first_questions)
    _agree_on_end_of_turn(renderer, name)
    _choose_pad_token(renderer)
    return renderer


def _template_place(tokenizer: Any, name: str) -> str:
    """The file that a template stands in, as far as it is a file's."""
    if name != "tokenizer":
        return name
    folder = Path(str(tokenizer.name_or_path))
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        if is_file(folder / file):
            return str(folder / file)
    return f"the chat template of {folder}"


def first_questions(renderer: ChatRenderer) -> None:
    """All that is asked of a template before its first row, as far as it depends on no data."""
    renderer.render(PROBE)
    renderer.render(PROBE[:1], add_generation_prompt=True)
    if renderer.layout(PROBE) is not None:
        tuple(renderer.stop_ids)
        tuple(renderer.template_segments)


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a text.

    The model was pretrained with it then, and must see it in training.
    """
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _agree_on_end_of_turn(renderer: ChatRenderer, name: str) -> None:
    """Make the token that ends a turn the tokenizer's EOS.

    Unless the template itself writes `eos_token`.
    """
    tokenizer = renderer.tokenizer
    if tokenizer.eos_token is None and "eos_token" in renderer.template_text:
        what = "the model would not learn to stop: no EOS token"
        fix = "use a tokenizer with an EOS token or a template that ends turns with a special token"
        raise CheckFailed(str(Problem(name, "chat_template", what, fix)))
    layout = renderer.layout(PROBE)
    if layout is None or layout.terminator.token is None:
        what = "the model would not learn to stop: no special token ends an assistant turn"
        fix = "end the assistant turn with {{ eos_token }}, or use chat_template: instruction"
        raise CheckFailed(str(Problem(name, "chat_template", what, fix)))
    # A closing is the next role's token, which ends turns without being an end of text.
    if not layout.terminator.closing and "eos_token" not in renderer.template_text:
        tokenizer.eos_token = layout.terminator.token


def _choose_pad_token(renderer: ChatRenderer) -> None:
    """PAD is an existing token that is neither EOS nor an end of turn.

    The tokenizer's own, else one that is called pad, reserved or unknown, else any.
    """
    tokenizer = renderer.tokenizer
    taken = {*renderer.stop_ids, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    added: list[str] = []
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if index not in taken:
            added.append(token.content)
    pad_token = _called_like_padding(added)
    if pad_token is None:
        # Padding is masked by attention and labels, so any token that cannot be mistaken for the
        # end will do.
        free = next(index for index in range(len(tokenizer)) if index not in taken)
        pad_token = tokenizer.convert_ids_to_tokens(free)
    tokenizer.pad_token = pad_token


def _called_like_padding(tokens: Sequence[str]) -> str | None:
    """The first token with the best of the names that tokens nobody needs have, or None."""
    for hint in ("pad", "reserved", "unused", "unk"):
        for token in tokens:
            if hint in token.lower():
                return token
    return None
