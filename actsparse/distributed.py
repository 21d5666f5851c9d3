"""Calibration shared among processes, by the name that users import it by."""

from actsparse.runtime.distributed import together as together
