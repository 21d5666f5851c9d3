"""What algorithms ask of a torch model; each kind of measurement is a file."""

from actsparse.measurements.probe import PROBE_TOKENS as PROBE_TOKENS
from actsparse.measurements.probe import Loss as Loss
from actsparse.measurements.torch_measurements import TorchMeasurements as TorchMeasurements
