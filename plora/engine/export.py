"""The adapters that a sweep hands out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from plora.checkpoint.layout import SweepLayout
from plora.checkpoint.peft import export_adapter
from plora.config.schema import SweepConfig
from plora.data.tokenizer import ChatTokenizer
from plora.engine.recorder import load_factors
from plora.models.base import BaseModel
from plora.modules.targets import find_targets
from plora.search.trial import Trial

log = logging.getLogger(__name__)


def export_best(
    config: SweepConfig, layout: SweepLayout, base: BaseModel, tokenizer: ChatTokenizer, ranked: Sequence[Trial]
) -> dict[str, Path]:
    """Write the best trials' adapters, as many as ``export.keep`` says, in peft's format.

    Args:
        config: the sweep's.
        layout: where to.
        base: the base model, not packed.
        tokenizer: saved beside each adapter.
        ranked: completed trials, best first.

    Returns:
        The adapter directories, by trial name.
    """
    modules = [base.hf_name(target.path) for target in find_targets(base.module)]
    written = {}
    for trial in ranked[: config.export.n_kept(len(ranked))]:
        written[trial.name] = export_adapter(
            layout.adapter(trial.name),
            load_factors(layout, trial),
            trial.adapter,
            base.hf_name,
            base.export_rows,
            base_name=base.loadable_name,
            revision=base.spec.commit,
            dtype=config.export.dtype,
            tokenizer=tokenizer.hf,
            base_modules=modules,
        )
    log.info("%d adapters written to %s", len(written), layout.trials)
    return written
