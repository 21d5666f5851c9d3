"""How many times as fast as dense an accelerated model decodes."""

from pathlib import Path

import numpy as np
import openvino as ov

from actsparse.commands.bench.decoder import compile_decoders, list_precisions, make_core
from actsparse.commands.bench.timing import time_decoding
from actsparse.commands.regression.subject import Subject
from actsparse.openvino.build import extension_path
from actsparse.runtime.environment import count_cores
from actsparse.texts import Text, token_batches

CONTEXT_TOKENS = 64
DISCARDED_TOKENS = 5
TIMED_TOKENS = 60


def measure_decode_ratio(subject: Subject, dense: ov.Model, sparse: ov.Model, folder: Path) -> float:
    """
    Decode the start of the evaluation text with both, turn by turn, each with the precision hint that is best for it.

    :param subject: What they come from.
    :param dense: The dense model.
    :param sparse: The accelerated one.
    :param folder: Where both are saved meanwhile, so that they are compiled as a user's would be.
    :return: The median time of a token dense, over that of the accelerated model.
    :raises DatasetError: If the evaluation text is too short.
    """
    text = Text("the evaluation text", subject.pages)
    length = CONTEXT_TOKENS + DISCARDED_TOKENS + TIMED_TOKENS
    tokens = token_batches(subject.tokenizer, text, num_batches=1, length=length)[0]["input_ids"].numpy()
    core = make_core(extension_path())
    paths = {side: folder / f"{side}-timed.xml" for side in ("dense", "sparse")}
    for side, model in (("dense", dense), ("sparse", sparse)):
        ov.save_model(model, paths[side], compress_to_fp16=False)
    decoders = compile_decoders(core, paths, count_cores())
    times = time_decoding(decoders, tokens, num_prompt_tokens=CONTEXT_TOKENS, num_discarded=DISCARDED_TOKENS)
    best = {side: min(float(np.median(times[side, hint])) for hint in list_precisions(core)) for side in paths}
    return best["dense"] / best["sparse"]
