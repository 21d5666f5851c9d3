"""Published experiments on activation sparsity as commands, for any causal language model."""
