"""What masks cost and what they save: word perplexity and measured sparsity."""
