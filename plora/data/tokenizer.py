"""Prompts and answers as token ids: the checkpoint's own chat template, and labels that never leave the answer."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from plora.data import hub
from plora.data.mistakes import unknown_keys
from plora.data.turns import Message, Rendered, end_of_turn, render
from plora.data.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

CHECKPOINT, NONE = "checkpoint", "none"
TOO_LONG = ("drop", "truncate", "error")
TOKENIZER_KEYS = ("_component_", "source", "revision", "chat_template", "max_seq_len", "too_long")
_INSTRUCT_NAME = re.compile(r"(^|[-_. /])(instruct|chat|it|sft|dpo)([-_. /]|$)", re.IGNORECASE)

Outcome = Literal["kept", "truncated", "too_long", "no_labels"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """What became of one conversation.

    Args:
        example: None if it was dropped.
        outcome: ``kept``, ``truncated``, or why it was dropped.
        ids: the whole conversation's token ids, as ``apply_chat_template`` gives them.
    """

    example: Example | None
    outcome: Outcome
    ids: np.ndarray


class ChatTokenizer:
    """Encodes conversations for training and prompts for generation.

    Labels are the assistant's answer and the token that ends its turn. What the template writes
    after that token (Qwen's newline) is neither labelled nor kept, since nothing learns from it.

    Args:
        hf: the Hugging Face tokenizer; its ``chat_template`` is the one in use (None: plain text).
        max_seq_len: most tokens of prompt, answer and end of turn; None for no limit.
        too_long: what becomes of an example above it: ``drop`` it, ``truncate`` the end of its
            answer (it then has no end-of-turn token, so that a cut answer does not teach to stop),
            or ``error``.
        eos_ids: the checkpoint's own end tokens.
    """

    def __init__(
        self,
        hf: PreTrainedTokenizerBase,
        *,
        max_seq_len: int | None = None,
        too_long: str = "drop",
        eos_ids: Sequence[int] = (),
    ) -> None:
        mistakes = _limit_mistakes(max_seq_len, too_long)
        if mistakes:
            raise ValueError("; ".join(mistakes))
        self.hf = hf
        self.max_seq_len = max_seq_len
        self.too_long = too_long
        self.uses_template = hf.chat_template is not None
        self.eos_ids = tuple(sorted({*eos_ids, *([] if hf.eos_token_id is None else [hf.eos_token_id])}))
        if not self.uses_template and hf.eos_token_id is None:
            raise ValueError("chat_template: none ends an answer with the eos token, but this tokenizer has none")
        self.end_of_turn_id = end_of_turn(hf) if self.uses_template else hf.eos_token_id
        if self.end_of_turn_id is None:
            _log.warning("the chat template ends an answer without a special token: generation will run to its limit")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which generation stops: the checkpoint's ends of text and the end of a turn."""
        end = () if self.end_of_turn_id is None else (self.end_of_turn_id,)
        return tuple(sorted({*self.eos_ids, *end}))

    @property
    def pad_id(self) -> int:
        """A token to fill unused places with. Nothing may be masked by comparing with it."""
        return self.hf.pad_token_id if self.hf.pad_token_id is not None else (self.stop_ids or (0,))[0]

    def encode(
        self, prompt: str, answer: str, *, system_prompt: str | None = None, fields: Mapping[str, Any] | None = None
    ) -> Encoded:
        """One prompt and its answer; see ``encode_all``."""
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
        return self.encode_all([messages], fields=[fields or {}])[0]

    def encode_all(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        fields: Sequence[Mapping[str, Any]] | None = None,
        train_on: str = "all",
    ) -> list[Encoded]:
        """Encodes conversations that end with the assistant.

        Args:
            conversations: messages with ``role`` (system, user, assistant) and ``content``.
            fields: the row of each, kept in its example.
            train_on: ``all`` assistant turns or the ``last`` one.

        Raises:
            ValueError: if the template refuses a conversation or hides where the answer starts,
                or an example is longer than ``max_seq_len`` and ``too_long`` is ``error``.
        """
        rendered = render(self.hf, conversations, self.end_of_turn_id, all_turns=train_on == "all")
        rows = fields or [{}] * len(conversations)
        return [self._example(i, *each) for i, each in enumerate(zip(rendered, conversations, rows, strict=True))]

    def candidates(self, example: Example, answers: Sequence[str]) -> list[Example]:
        """The example with each of ``answers`` in place of its own, whatever their length.

        The labels of each are that answer and its end of turn: compare their summed likelihoods.
        """
        assert example.messages, "the example was not made by a tokenizer"
        conversations = [[*example.messages, {"role": "assistant", "content": answer}] for answer in answers]
        rendered = render(self.hf, conversations, self.end_of_turn_id, all_turns=False)
        return [_build(r, r.spans, c, example.fields) for r, c in zip(rendered, conversations, strict=True)]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, spaces as they are."""
        text = self.hf.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer and the template in use."""
        self.hf.save_pretrained(str(directory))

    def _example(self, index: int, rendered: Rendered, messages: Sequence[Message], row: Mapping[str, Any]) -> Encoded:
        ids = rendered.ids
        spans = rendered.spans
        if not spans or not str(messages[-1]["content"]).strip():
            return Encoded(None, "no_labels", ids)
        length, limit = spans[-1][1], self.max_seq_len
        if limit is None or length <= limit:
            return Encoded(_build(rendered, spans, messages, row), "kept", ids)
        if self.too_long == "error":
            raise ValueError(
                f"example {index} has {length} tokens, more than max_seq_len {limit}: raise max_seq_len, "
                "or set too_long to drop or truncate"
            )
        if self.too_long == "drop":
            return Encoded(None, "too_long", ids)
        cut = [(first, min(last, limit)) for first, last in spans if first < limit]
        if not cut:
            return Encoded(None, "no_labels", ids)
        return Encoded(_build(rendered, cut, messages, row), "truncated", ids)


def _build(
    rendered: Rendered, spans: list[tuple[int, int]], messages: Sequence[Message], row: Mapping[str, Any]
) -> Example:
    """The example up to its last labelled token."""
    end = spans[-1][1]
    labels = np.full(end, IGNORE_INDEX, dtype=np.int32)
    for first, last in spans:
        labels[first:last] = rendered.ids[first:last]
    # Position i predicts token i + 1.
    return Example(
        inputs=rendered.ids[: end - 1],
        labels=labels[1:],
        prompt=rendered.prompt,
        answer=str(messages[-1]["content"]),
        fields=row,
        messages=tuple(messages[:-1]),
    )


def load(
    source: str | Mapping[str, Any],
    *,
    revision: str | None = None,
    chat_template: str = CHECKPOINT,
    max_seq_len: int | None = None,
    too_long: str = "drop",
) -> ChatTokenizer:
    """Loads a tokenizer from a folder or from the hub. In a YAML it is ``plora.data.hf_tokenizer``.

    Args:
        source: folder or hub id, or the whole ``tokenizer`` section as a mapping.
        revision: branch, tag or commit on the hub.
        chat_template: ``checkpoint`` (its own), ``none`` (prompt, answer and eos token as they
            are) or the path of a .jinja file.
        max_seq_len: see ``ChatTokenizer``.
        too_long: see ``ChatTokenizer``.

    Raises:
        ValueError: if a setting is wrong, the tokenizer cannot be found, or it has no template.
    """
    if isinstance(source, Mapping):
        mistakes = check(source)
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return load(**{k: v for k, v in source.items() if k != "_component_"})
    given = {"chat_template": chat_template, "max_seq_len": max_seq_len, "too_long": too_long}
    mistakes = check({"source": source, **given})
    if mistakes:
        raise ValueError("; ".join(mistakes))
    hf = _load_hf(source, revision)
    own_template = hf.chat_template
    if chat_template == NONE:
        hf.chat_template = None
    elif chat_template != CHECKPOINT:
        hf.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
    elif own_template is None:
        raise ValueError(
            f"{source} has no chat template, as base models do: set tokenizer.chat_template to none (prompt and "
            "answer as plain text) or to a .jinja file, or take the Instruct checkpoint"
        )
    tokenizer = ChatTokenizer(
        hf, max_seq_len=max_seq_len, too_long=too_long, eos_ids=_generation_eos_ids(source, revision)
    )
    if tokenizer.uses_template:
        _warn_if_base(source, tokenizer, has_own_template=own_template is not None)
    return tokenizer


def check(section: Mapping[str, Any], where: str = "tokenizer") -> list[str]:
    """The mistakes in a ``tokenizer`` section, found without loading anything; each is ``key: advice``."""
    mistakes = unknown_keys(section, TOKENIZER_KEYS, where)
    if not isinstance(section.get("source"), str) or not section["source"]:
        mistakes.append(f"{where}.source: give a folder or a hub id, got {section.get('source')!r}")
    template = section.get("chat_template", CHECKPOINT)
    if template not in (CHECKPOINT, NONE) and not (isinstance(template, str) and Path(template).expanduser().is_file()):
        mistakes.append(
            f"{where}.chat_template: {template!r} is neither checkpoint, nor none, nor an existing .jinja file"
        )
    limits = _limit_mistakes(section.get("max_seq_len"), section.get("too_long", "drop"))
    return mistakes + [f"{where}.{text}" for text in limits]


def _limit_mistakes(max_seq_len: Any, too_long: Any) -> list[str]:
    mistakes = []
    if max_seq_len is not None and (
        isinstance(max_seq_len, bool) or not isinstance(max_seq_len, int) or max_seq_len < 2
    ):
        mistakes.append(f"max_seq_len: must be a whole number of at least 2, or null for no limit, got {max_seq_len!r}")
    if too_long not in TOO_LONG:
        mistakes.append(f"too_long: must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
    return mistakes


def _load_hf(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    reason = _unreachable(source)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", local_files_only=reason is not None)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"cannot load a tokenizer from {source!r}: {reason or first_line} Give a folder that holds tokenizer.json "
            "and tokenizer_config.json, or the id of a model on the hub; for a gated model set HF_TOKEN, and without a "
            "network download it beforehand"
        ) from error


def _unreachable(source: str) -> str | None:
    """Why a source on the hub must come from the cache."""
    return None if Path(source).exists() else hub.unreachable()


def _generation_eos_ids(source: str, revision: str | None) -> list[int]:
    """The end tokens in the checkpoint's generation_config.json; none where it has no such file."""
    from transformers.utils import cached_file

    path = cached_file(
        source,
        "generation_config.json",
        revision=revision or "main",
        local_files_only=_unreachable(source) is not None,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return []
    try:
        ids = json.loads(Path(path).read_text(encoding="utf-8")).get("eos_token_id") or []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): repair or remove it") from error
    return [ids] if isinstance(ids, int) else list(ids)


def _warn_if_base(source: str, tokenizer: ChatTokenizer, *, has_own_template: bool) -> None:
    """A checkpoint that was tuned on its template ends its text with the template's end of turn."""
    end = tokenizer.end_of_turn_id
    ends_with_turn = end is None or end in tokenizer.eos_ids
    if has_own_template and (ends_with_turn or _INSTRUCT_NAME.search(Path(source).name)):
        return
    token = "its special tokens" if end is None else tokenizer.hf.convert_ids_to_tokens(end)
    _log.warning(
        "%s looks like a base model: its embeddings of %s were probably never trained, and LoRA does not train them. "
        "Set tokenizer.chat_template to none, or take the Instruct checkpoint.",
        source,
        token,
    )
