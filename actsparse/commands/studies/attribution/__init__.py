"""
Attribution of what a model says to its heads and neurons: Achieving Sparse Activation in Small Language Models.

The paper is arXiv 2406.06562. For each generated token and each layer, the units (attention heads, neurons) that matter
least by some metric are switched off, and the text generated without them is compared with the dense model's own.

``oracle`` masks are the paper's: the metric is computed from the gradient of the very token that is about to be
generated, which only the dense model's own output can tell. ``static`` masks are thresholds fixed on other text, such
as are deployed. To add a metric, write a function from outputs and gradients to scores and name it in `METRICS`.
"""

from actsparse.commands.studies.attribution.job import AttributionJob as AttributionJob
from actsparse.commands.studies.attribution.job import parse_ratios as parse_ratios
from actsparse.commands.studies.attribution.metrics import METRICS as METRICS
from actsparse.commands.studies.attribution.study import run_attribution as run_attribution
