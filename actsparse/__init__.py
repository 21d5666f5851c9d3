"""Activation sparsity for language models: one call that masks, keeps INT8, and says what it cost."""

from typing import TYPE_CHECKING

from actsparse.lazy import export_lazily

if TYPE_CHECKING:
    from actsparse.budget import sparsify_to_perplexity as sparsify_to_perplexity
    from actsparse.errors import ActsparseError as ActsparseError
    from actsparse.errors import ScopeError as ScopeError
    from actsparse.evaluation.sparsity import measure_sparsity as measure_sparsity
    from actsparse.evaluation.word_perplexity import word_perplexity as word_perplexity
    from actsparse.insertion import remove_sparsifiers as remove_sparsifiers
    from actsparse.scopes.target_scope import TargetScope as TargetScope
    from actsparse.sparsify import sparsify_activations as sparsify_activations
    from actsparse.thresholds import load_thresholds as load_thresholds
    from actsparse.thresholds import save_thresholds as save_thresholds

# Imported when first asked for, so that `actsparse --help` does not wait for torch and NNCF.
_HOMES = {
    "ActsparseError": "errors",
    "ScopeError": "errors",
    "TargetScope": "scopes.target_scope",
    "load_thresholds": "thresholds",
    "measure_sparsity": "evaluation.sparsity",
    "remove_sparsifiers": "insertion",
    "save_thresholds": "thresholds",
    "sparsify_activations": "sparsify",
    "sparsify_to_perplexity": "budget",
    "word_perplexity": "evaluation.word_perplexity",
}

__getattr__, __dir__ = export_lazily(globals(), _HOMES)
