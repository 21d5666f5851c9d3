"""`actsparse tune`: the fastest form of a model on this machine within a perplexity."""

from actsparse.commands.tune.job import tune as tune
