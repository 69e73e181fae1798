"""Where the assistant's answers lie in a rendered conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
_SENTINEL = "answer"


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation as token ids.

    Args:
        ids: int32 ``[L]``, all of it.
        prompt: int32 ``[P]``, what generation of the last answer starts from.
        spans: first and one past the last token of each trained answer, end of turn included.
    """

    ids: np.ndarray
    prompt: np.ndarray
    spans: list[tuple[int, int]]


def end_of_turn(hf: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template writes after an answer; None if it writes none."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _SENTINEL}]
    try:
        text = _template(hf, messages)
    except _template_errors() as error:
        raise ValueError(
            f"the chat template cannot be used ({type(error).__name__}: {error}): correct it, or set "
            "tokenizer.chat_template to another"
        ) from error
    _, found, suffix = text.rpartition(_SENTINEL)
    if not found:
        raise ValueError("the chat template leaves out the assistant's answer: use a template that renders it")
    special = set(hf.all_special_ids) | {i for i, token in hf.added_tokens_decoder.items() if token.special}
    return next((i for i in _tokenize(hf, [suffix])[0].tolist() if i in special), None)


def render(
    hf: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    end_of_turn_id: int | None,
    *,
    all_turns: bool,
) -> list[Rendered]:
    """Renders conversations that end with the assistant, and finds the answers to train on.

    An answer starts where the generation prompt (the template's text up to and with the answer's
    header) ends and stops with its end-of-turn token.

    Args:
        hf: its ``chat_template`` None means plain prompt, answer and end-of-text token.
        conversations: messages with ``role`` and ``content``.
        end_of_turn_id: see ``end_of_turn``.
        all_turns: train on every answer that follows a user's message, else on the last one.

    Raises:
        ValueError: if the template refuses a conversation or hides where an answer starts.
    """
    if hf.chat_template is None:
        return _render_plain(hf, conversations)
    if all_turns and end_of_turn_id is None and any(len(_answers(c)) > 1 for c in conversations):
        raise ValueError("this chat template ends an answer without a special token: set train_on to last")
    variants: list[dict[str, Any]] = [{}]
    if "enable_thinking" in str(hf.chat_template):
        # Templates of thinking models write an empty thought before an answer, which then belongs to its header.
        variants.append({"enable_thinking": False})
    texts: list[str] = []
    turns_of = []
    for index, messages in enumerate(conversations):
        turns = _answers(messages) if all_turns else _answers(messages)[-1:]
        turns_of.append(turns)
        try:
            texts.append(_template(hf, messages))
            texts += [_template(hf, messages[:t], add_generation_prompt=True, **v) for t in turns for v in variants]
        except _template_errors() as error:
            raise ValueError(
                f"the chat template refuses example {index} ({error}): its messages are {messages}"
            ) from error
    ids = iter(zip(texts, _tokenize(hf, texts), strict=True))
    rendered = []
    for turns in turns_of:
        full_text, full = next(ids)
        starts, prompt = [], full
        for _ in turns:
            start, prompt = _answer_start(hf, full_text, full, [next(ids) for _ in variants])
            starts.append(start)
        rendered.append(Rendered(full, prompt, _spans(full, starts, end_of_turn_id)))
    return rendered


def _answers(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant's messages that answer a user."""
    roles = [m["role"] for m in messages]
    first_user = roles.index("user") if "user" in roles else len(roles)
    return [i for i, role in enumerate(roles) if role == "assistant" and i > first_user]


def _answer_start(
    hf: PreTrainedTokenizerBase, full_text: str, full: np.ndarray, prompts: list[tuple[str, np.ndarray]]
) -> tuple[int, np.ndarray]:
    """First token of the answer, and the prompt's ids."""
    fitting = [ids for _, ids in prompts if np.array_equal(full[: len(ids)], ids)]
    if fitting:
        longest = max(fitting, key=len)
        return len(longest), longest
    text, ids = prompts[0]
    if full_text.startswith(text):
        # The header's last character and the answer's first share a token: labels start after it.
        first = int(np.argmin(full[: len(ids)] == ids[: len(full)]))
        for start in range(first, len(full) + 1):
            if str(hf.decode(full[:start].tolist(), clean_up_tokenization_spaces=False)).startswith(text):
                return start, ids
    raise ValueError(
        "the chat template writes another header before an answer than it writes to ask for one, so it is unknown "
        f"where the answer starts: it is asked for with ...{text[-60:]!r}, but the whole is ...{full_text[-120:]!r}. "
        "Set chat_template to a template file in which both are the same, or to none"
    )


def _spans(full: np.ndarray, starts: list[int], end_of_turn_id: int | None) -> list[tuple[int, int]]:
    """Ends each answer with its end-of-turn token: the first one, and in the last turn the last one."""
    spans = []
    ends = np.flatnonzero(full == end_of_turn_id) + 1 if end_of_turn_id is not None else np.empty(0, dtype=np.int64)
    for i, start in enumerate(starts):
        own = ends[ends > start]
        last_turn = i == len(starts) - 1
        end = int(own[-1 if last_turn else 0]) if len(own) else len(full)
        if end > start:
            spans.append((start, end))
    return spans


def _render_plain(hf: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
    """``{bos}{system}{prompt}{answer}{eos}``; prompt and answer are tokenized apart, so their border is a token's."""
    prompts, answers = [], []
    for index, messages in enumerate(conversations):
        roles = [m["role"] for m in messages]
        if roles[-2:] != ["user", "assistant"] or set(roles[:-2]) - {"system"}:
            raise ValueError(
                f"chat_template: none takes one prompt and one answer, but example {index} has the turns "
                f"{', '.join(roles)}: use a chat template for conversations"
            )
        *system, prompt, answer = (m["content"] for m in messages)
        text = "\n\n".join([*system, prompt])
        # Byte-level vocabularies keep a space with the word that follows it.
        stripped = text.rstrip(" ")
        prompts.append(stripped)
        answers.append(text[len(stripped) :] + answer)
    bos = [i for i in hf("")["input_ids"][:1] if i == hf.bos_token_id]
    rendered = []
    for p, a in zip(_tokenize(hf, prompts), _tokenize(hf, answers), strict=True):
        prompt_ids = np.concatenate([np.array(bos, dtype=np.int32), p])
        ids = np.concatenate([prompt_ids, a, np.array([hf.eos_token_id], dtype=np.int32)])
        rendered.append(Rendered(ids, prompt_ids, [(len(prompt_ids), len(ids))]))
    return rendered


def _template(hf: PreTrainedTokenizerBase, messages: Sequence[Message], **kwargs: Any) -> str:
    text = hf.apply_chat_template([dict(m) for m in messages], tokenize=False, **kwargs)
    assert isinstance(text, str)
    return text


def _template_errors() -> tuple[type[Exception], ...]:
    import jinja2

    return (jinja2.TemplateError, TypeError)


def _tokenize(hf: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Ids as ``apply_chat_template(tokenize=True)`` gives them: the template wrote the special tokens."""
    try:
        ids = (
            hf(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]
            if texts
            else []
        )
    except (TypeError, UnicodeEncodeError) as error:
        # A file may hold halves of surrogate pairs, such as "\ud83d" alone, which no tokenizer takes.
        bad = next((text for text in texts if _is_broken(text)), None)
        if bad is None:
            raise
        raise ValueError(f"a text is not valid Unicode (half a surrogate pair): {bad[:120]!r}; repair it") from error
    return [np.array(i, dtype=np.int32) for i in ids]


def _is_broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
