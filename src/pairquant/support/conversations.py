"""Turn the rows of data sets into plain text, or into conversations that the tokenizer's chat template writes as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from .errors import TextError

#: Keys of a row that hold a question and its answer.
ASKED_AND_ANSWERED = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
#: Keys of a row that hold a list of turns.
TURNS = ("messages", "conversations", "conversation")
#: Names that data sets give to the speakers, and the names that chat templates use for the same speakers.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
#: What a row may hold, for the error message.
ALLOWED = (
    "a key 'text', or the keys 'question' and 'answer', or a chat under 'messages', 'conversations' or 'conversation', "
    "under 'prompt' and 'completion' (or 'response'), or under 'instruction' and 'output' (or 'response')"
)


@dataclass(frozen=True)
class Conversation:
    """A chat that a row of a data set holds.

    turns: for each turn "role", "content", and any other keys of the row, which the chat template may use.
    where: the file and the row that the chat comes from, for error messages.
    """

    turns: list[dict[str, Any]]
    where: str

    def written(self, tokenizer: Any) -> str:
        """Write the chat as text with the tokenizer's chat template.

        Raises `TextError` if the tokenizer has no chat template, or if the template refuses the chat.
        """
        if not tokenizer.chat_template:
            raise TextError(
                f"{self.where} is a chat, and the tokenizer has no chat template to write it with. Use the tokenizer of "
                "the model's chat version, or give plain text: rows with 'text'."
            )
        try:
            return tokenizer.apply_chat_template(self.turns, tokenize=False)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TextError(f"{self.where}: the tokenizer's chat template refuses this chat ({error})") from error


def document_of(row: Any, where: str) -> str | Conversation:
    """Return the text of a row, or its conversation. Raises `TextError`, which names the row and its keys."""
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
            return f"{row['question']}\n{row['answer']}"
        if turns := _turns(row, where):
            return Conversation(turns, where)
    keys = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise TextError(f"{where}: needs {ALLOWED}; it has {keys}")


def _turns(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the turns of a row that holds a chat; an empty list if the row holds none."""
    for key in TURNS:
        if isinstance(row.get(key), list) and row[key]:
            return [_turn(turn, f"{where}, {key}, turn {n}") for n, turn in enumerate(row[key], 1)]
    for asked, answered in ASKED_AND_ANSWERED:
        question, answer = row.get(asked), row.get(answered)
        if isinstance(question, str) and isinstance(answer, str):
            more = f"\n\n{row['input']}" if isinstance(row.get("input"), str) and row["input"].strip() else ""
            first = [{"role": "system", "content": row["system"]}] if _filled(row.get("system")) else []
            return [
                *first, {"role": "user", "content": question + more}, {"role": "assistant", "content": answer},
            ]  # fmt: skip
        if isinstance(question, list) and isinstance(answer, list):
            return [_turn(turn, f"{where}, turn {n}") for n, turn in enumerate([*question, *answer], 1)]
    return []


def _filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """Return a turn with the keys "role" and "content"; if its text comes in several parts, they are joined."""
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if content is None and turn.get("tool_calls"):
            content = ""
        if isinstance(role, str) and isinstance(content, str):
            rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
            return {**rest, "role": ROLES.get(role, role), "content": content}
    keys = sorted(map(str, turn)) if isinstance(turn, dict) else type(turn).__name__
    raise TextError(f"{where}: needs texts 'role' and 'content', or 'from' and 'value'; it has {keys}")
