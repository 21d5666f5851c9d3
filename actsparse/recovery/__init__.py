"""Training a masked model for a short while, so that it loses less to its masks."""

from actsparse.recovery.recover import TRAINED as TRAINED
from actsparse.recovery.recover import Look as Look
from actsparse.recovery.recover import Recovery as Recovery
from actsparse.recovery.recover import recover as recover
