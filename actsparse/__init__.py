"""Activation sparsity for language models: one call that masks, keeps INT8, and says what it cost."""

from actsparse.errors import ActsparseError as ActsparseError
from actsparse.errors import ScopeError as ScopeError
from actsparse.evaluation.sparsity import measure_sparsity as measure_sparsity
from actsparse.evaluation.word_perplexity import word_perplexity as word_perplexity
from actsparse.insertion import remove_sparsifiers as remove_sparsifiers
from actsparse.scopes.target_scope import TargetScope as TargetScope
from actsparse.sparsify import sparsify_activations as sparsify_activations
from actsparse.thresholds import load_thresholds as load_thresholds
from actsparse.thresholds import save_thresholds as save_thresholds
