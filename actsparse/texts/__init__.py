"""Text to evaluate on and to calibrate with: from the hub, from files, or from the packaged default."""

from actsparse.texts.batches import describe_batches as describe_batches
from actsparse.texts.batches import take_batches as take_batches
from actsparse.texts.batches import token_batches as token_batches
from actsparse.texts.sources import load_pages as load_pages
from actsparse.texts.text import Text as Text
