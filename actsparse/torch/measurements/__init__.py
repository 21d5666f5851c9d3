"""What algorithms ask of a torch model; each kind of measurement is a file."""

from actsparse.calibration import Loss as Loss
from actsparse.torch.measurements.biases import find_biases as find_biases
from actsparse.torch.measurements.probe import PROBE_TOKENS as PROBE_TOKENS
from actsparse.torch.measurements.probe import Probe as Probe
from actsparse.torch.measurements.torch_measurements import TorchMeasurements as TorchMeasurements
