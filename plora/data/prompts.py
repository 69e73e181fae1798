"""From a row to a conversation: prompt and answer columns, chats, and classification by label words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plora.data.mistakes import nearest

Row = Mapping[str, Any]
Message = Mapping[str, str]

INSTRUCT, CHAT, CLASSIFICATION = "instruct", "chat", "classification"
# torchtune's two general builders are read as ours: same settings, same rows, no import of torchtune.
COMPONENTS = {
    "torchtune.datasets.instruct_dataset": INSTRUCT,
    "plora.data.instruct_dataset": INSTRUCT,
    "torchtune.datasets.chat_dataset": CHAT,
    "plora.data.chat_dataset": CHAT,
    "plora.data.classification": CLASSIFICATION,
}
INSTRUCT_KEYS = ("column_map", "prompt_template", "train_on_input", "packed")
CHAT_KEYS = ("conversation_column", "conversation_style", "train_on", "train_on_input", "packed")
CLASSIFICATION_KEYS = ("text_columns", "label_column", "label_words", "prompt_template")
SYSTEM_KEYS = ("system_prompt", "new_system_prompt")
KEYS = {INSTRUCT: INSTRUCT_KEYS, CHAT: CHAT_KEYS, CLASSIFICATION: CLASSIFICATION_KEYS}

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Prompted:
    """A row as a conversation that ends with the assistant; ``messages`` is empty if it has no answer."""

    messages: list[Message]
    fields: Row


def kind_of(section: Mapping[str, Any], columns: Sequence[str]) -> str:
    """How rows of these columns become conversations; rows of other components tell by their columns."""
    component = section.get("_component_", "plora.data.instruct_dataset")
    if component in COMPONENTS:
        return COMPONENTS[component]
    return CHAT if "conversation_column" in section or "messages" in columns else INSTRUCT


def setting_mistakes(section: Mapping[str, Any], kind: str, where: str) -> list[str]:
    """Mistakes in the settings themselves."""
    found = []
    if section.get("train_on_input"):
        found.append(f"{where}.train_on_input: prompts are never trained on here; remove it")
    if section.get("packed"):
        found.append(f"{where}.packed: sequences are packed by token budget without padding anyway; remove it")
    for key in (*SYSTEM_KEYS, "prompt_template"):
        if section.get(key) is not None and not isinstance(section[key], str):
            found.append(f"{where}.{key}: must be text, got {section[key]!r}")
    column_map = section.get("column_map")
    if column_map is not None:
        if not isinstance(column_map, Mapping):
            found.append(f"{where}.column_map: must map input and output to columns, got {column_map!r}")
        else:
            found += [
                f"{where}.column_map.{key}: unknown key; {nearest(key, ('input', 'output'))}"
                for key in column_map
                if key not in ("input", "output")
            ]
    if section.get("train_on", "all") not in ("all", "last"):
        found.append(f"{where}.train_on: must be all (assistant turns) or last, got {section['train_on']!r}")
    if section.get("conversation_style", "openai") not in ("openai", "sharegpt"):
        found.append(f"{where}.conversation_style: must be openai or sharegpt, got {section['conversation_style']!r}")
    if kind == CLASSIFICATION:
        found += _classification_mistakes(section, where)
    return found


def _classification_mistakes(section: Mapping[str, Any], where: str) -> list[str]:
    found = []
    words = section.get("label_words")
    values = list(words.values()) if isinstance(words, Mapping) else words
    if not isinstance(values, list | tuple) or len(values) < 2:
        found.append(f"{where}.label_words: give at least two words, the first for label 0, got {words!r}")
    elif not all(isinstance(v, str) and v.strip() for v in values):
        found.append(
            f"{where}.label_words: must be words, got {words!r}; in YAML put yes, no, true and numbers in quotes"
        )
    elif len(set(values)) < len(values):
        found.append(f"{where}.label_words: must differ from each other, got {words!r}")
    if not section.get("text_columns") and not section.get("prompt_template"):
        found.append(f"{where}.text_columns: name the column or columns to classify, or give a prompt_template")
    return found


def column_mistakes(section: Mapping[str, Any], kind: str, columns: Sequence[str], where: str) -> list[str]:
    """Columns that the settings name and the rows lack."""
    return [
        f"{where}.{key}: there is no column {column!r}; {nearest(column, columns)}"
        for key, column in _columns_used(section, kind, columns)
        if column not in columns
    ]


def _columns_used(section: Mapping[str, Any], kind: str, columns: Sequence[str]) -> list[tuple[str, str]]:
    if kind == CHAT:
        return [("conversation_column", _conversation_column(section, columns))]
    column_map = section.get("column_map") or {}
    if kind == CLASSIFICATION:
        answer = ("label_column", section.get("label_column", "label"))
    else:
        answer = ("column_map.output", column_map.get("output", "output"))
    template = section.get("prompt_template")
    if template is not None:
        names = [m[1] for m in _PLACEHOLDER.finditer(template) if m[1] is not None]
        prompts = [("prompt_template", column_map.get(n, n) if n == "input" else n) for n in names]
    elif kind == CLASSIFICATION:
        prompts = [("text_columns", c) for c in _text_columns(section)]
    else:
        prompts = [("column_map.input", column_map.get("input", "input"))]
    return [*prompts, answer]


def prompter(section: Mapping[str, Any], kind: str, columns: Sequence[str]) -> Callable[[Row], Prompted]:
    """The function that turns a row of these columns into a conversation; the settings are correct."""
    system = section.get("system_prompt") or section.get("new_system_prompt")
    if kind == CHAT:
        column = _conversation_column(section, columns)
        return lambda row: Prompted(_conversation(row, column, system), row)
    column_map = section.get("column_map") or {}
    template = section.get("prompt_template")
    if kind == CLASSIFICATION:
        words = section["label_words"]
        label_column = section.get("label_column", "label")
        template = template or _classification_template(section)
        shown = {**row_words(words)}

        def classify(row: Row) -> Prompted:
            answer = _label_word(_value(row, label_column), shown)
            messages = _messages(system, _fill(str(template), row, column_map), answer)
            return Prompted(messages, {**row, "label_words": tuple(dict.fromkeys(shown.values()))})

        return classify
    template = template or "{input}"
    output = column_map.get("output", "output")
    return lambda row: Prompted(_messages(system, _fill(template, row, column_map), _text(_value(row, output))), row)


def row_words(words: Any) -> dict[str, str]:
    """The word of each label, by the label's text."""
    if isinstance(words, Mapping):
        return {str(label): word for label, word in words.items()}
    return {str(i): word for i, word in enumerate(words)}


def _messages(system: str | None, prompt: str, answer: str | None) -> list[Message]:
    if answer is None:
        return []
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _fill(template: str, row: Row, column_map: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        name = column_map.get("input", "input") if match[1] == "input" else match[1]
        return _text(_value(row, name)) or ""

    return _PLACEHOLDER.sub(value, template)


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise ValueError(f"a row has no column {column!r}; {nearest(column, row)}: {str(dict(row))[:200]}")
    return row[column]


def _text(value: Any) -> str | None:
    if isinstance(value, (Mapping, list, tuple)):  # written out, it would be Python's notation that is learned
        raise ValueError(
            f"a prompt or an answer must be text or a number, got {str(value)[:80]!r}: name another column, or a "
            "component of yours that returns rows of text"
        )
    return None if value is None else str(value)


def _text_columns(section: Mapping[str, Any]) -> list[str]:
    columns = section.get("text_columns") or []
    return [columns] if isinstance(columns, str) else list(columns)


def _classification_template(section: Mapping[str, Any]) -> str:
    columns = _text_columns(section)
    lines = [f"{c[:1].upper()}{c[1:]}: {{{c}}}" for c in columns] if len(columns) > 1 else [f"{{{columns[0]}}}"]
    words = list(row_words(section["label_words"]).values())
    return "\n".join([*lines, f"Answer with one word: {', '.join(words[:-1])} or {words[-1]}."])


def _label_word(label: Any, words: Mapping[str, str]) -> str | None:
    """The word of a label; None where the row is unlabelled, which public test splits mark by -1."""
    text = str(label)
    if label is None or text == "-1":
        return None
    if text in words:
        return words[text]
    if text in words.values():
        return text
    raise ValueError(f"the label {label!r} has no word; label_words has words for {', '.join(words)}")


def _conversation_column(section: Mapping[str, Any], columns: Sequence[str]) -> str:
    default = "messages" if "messages" in columns else "conversations"
    return section.get("conversation_column") or default


def _conversation(row: Row, column: str, system: str | None) -> list[Message]:
    """Messages up to the last assistant turn, in role and content; ShareGPT's from and value are understood."""
    messages: list[Message] = []
    turns = _value(row, column)
    if not isinstance(turns, list | tuple):
        raise ValueError(f"the column {column!r} must hold a list of messages, got {str(turns)[:80]!r}")
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(
                f"the column {column!r} holds the message {str(turn)[:120]!r}: want role (system, user, assistant) and "
                "content, or from (system, human, gpt) and value, with text as content"
            )
        messages.append({"role": _ROLES[role], "content": content})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if system and messages:
        rest = [m for m in messages if m["role"] != "system"]
        return [{"role": "system", "content": system}, *rest]
    return messages
