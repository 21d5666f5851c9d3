"""Language models with their tokenizers: from a hub id, a local folder, a GGUF file, or the built-in default."""

from actsparse.models.load import LoadedModel as LoadedModel
from actsparse.models.load import load_model as load_model
