"""
How sparse the feed-forward networks of a model are: Sparsing Law (arXiv 2411.02335).

A network is down(a), a = f(gate(x)) · up(x), or f(in(x)) where nothing is gated. Methods say which entries of a count:

- ``topk``: the share V of each token's entries with the largest |f(gate(x))|;
- ``fat``: those where |f(gate(x))| exceeds V;
- ``cett``: those where |a_i| ‖w_i‖, w_i the column of down that reads a_i, exceeds a threshold: in every layer the
  largest one whose mean relative output error does not exceed V;
- ``pplp``: the largest such error for all layers at which perplexity grows by V percent at most.
"""

from actsparse.commands.studies.inspection.job import InspectJob as InspectJob
from actsparse.commands.studies.inspection.job import run_inspect as run_inspect
from actsparse.commands.studies.inspection.job import run_series as run_series
