"""`pairquant chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import Device, Model, Trust, app, console, quiet_libraries


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Answer this and exit.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Talk to MODEL; the answer appears as it is generated."""
    quiet_libraries()
    from transformers import TextStreamer

    from ..checkpoint.read import ModelFiles
    from ..devices import resolve_device
    from ..verbs import load

    target = resolve_device(device)
    files = ModelFiles.find(model, trust_remote_code)
    tokenizer = files.tokenizer()
    network = load(files, target)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    history: list[dict[str, str]] = []
    if prompt is None:
        console.print("[dim]An empty line or Ctrl-D ends the chat.[/]")
    while question := prompt if prompt is not None else _ask():
        history.append({"role": "user", "content": question})
        inputs = _chat_inputs(tokenizer, history).to(target)
        tokens = network.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, do_sample=False)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        history.append({"role": "assistant", "content": answer})
        if prompt is not None:
            break


def _chat_inputs(tokenizer, history: list[dict[str, str]]):
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return tokenizer("\n".join(turn["content"] for turn in history), return_tensors="pt")


def _ask() -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""
