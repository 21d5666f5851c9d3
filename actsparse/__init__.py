"""Activation sparsity for language models: one call that masks, keeps INT8, and says what it cost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actsparse.algorithms import Algorithm as Algorithm
    from actsparse.budget import sparsify_to_perplexity as sparsify_to_perplexity
    from actsparse.commands.tune.job import tune as tune
    from actsparse.errors import ActsparseError as ActsparseError
    from actsparse.errors import ScopeError as ScopeError
    from actsparse.evaluation.sparsity import measure_sparsity as measure_sparsity
    from actsparse.evaluation.word_perplexity import word_perplexity as word_perplexity
    from actsparse.scopes.target_scope import TargetScope as TargetScope
    from actsparse.sparsify import remove_sparsifiers as remove_sparsifiers
    from actsparse.sparsify import sparsify_activations as sparsify_activations
    from actsparse.thresholds import load_thresholds as load_thresholds
    from actsparse.thresholds import save_thresholds as save_thresholds

# Imported when first asked for (PEP 562), so that `actsparse --help` does not wait for torch and NNCF.
_HOMES = {
    "ActsparseError": "errors",
    "Algorithm": "algorithms",
    "ScopeError": "errors",
    "TargetScope": "scopes.target_scope",
    "load_thresholds": "thresholds",
    "measure_sparsity": "evaluation.sparsity",
    "remove_sparsifiers": "sparsify",
    "save_thresholds": "thresholds",
    "sparsify_activations": "sparsify",
    "sparsify_to_perplexity": "budget",
    "tune": "commands.tune.job",
    "word_perplexity": "evaluation.word_perplexity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
