"""From data sets to packed microbatches: rows, prompts, labels, order and packing."""

from plora.data.dates import dates
from plora.data.microbatch import pack, pack_eval
from plora.data.report import DataReport
from plora.data.sections import check
from plora.data.stream import ExampleStream
from plora.data.task import load_task
from plora.data.tokenizer import ChatTokenizer
from plora.data.tokenizer import check as check_tokenizer
from plora.data.tokenizer import load as hf_tokenizer
from plora.data.types import IGNORE_INDEX, Example, Microbatch, Task

__all__ = [
    "IGNORE_INDEX",
    "ChatTokenizer",
    "DataReport",
    "Example",
    "ExampleStream",
    "Microbatch",
    "Task",
    "check",
    "check_tokenizer",
    "dates",
    "hf_tokenizer",
    "load_task",
    "pack",
    "pack_eval",
]
