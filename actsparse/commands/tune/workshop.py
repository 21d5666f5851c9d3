"""Make and measure a model's candidates on this machine; what was measured before is not measured again."""

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from actsparse.algorithms import get_algorithm
from actsparse.calibration import Settings
from actsparse.commands.bench.apart import PREFILL_TOKENS, compile_decoders, run_apart
from actsparse.commands.bench.decoder import make_settings, name_processor
from actsparse.commands.bench.prepare import DenseModel, Source, prepare_dense
from actsparse.commands.bench.timing import CONTEXT_TOKENS, DISCARDED_TOKENS, time_decoding, time_first_token
from actsparse.commands.common import CALIBRATION_LENGTH, THRESHOLDS_NAME, point_key, recover_on_text
from actsparse.commands.tune.candidates import KERNEL, REFERENCE, Candidate, Speed
from actsparse.console.report import read_json, write_json
from actsparse.evaluation.sparsity import measure_sparsity
from actsparse.evaluation.windows import WindowedText, measure_losses
from actsparse.openvino.acceleration import accelerate
from actsparse.openvino.build import extension_path
from actsparse.openvino.deploy import load_causal_lm
from actsparse.openvino.export import save_tokenizer
from actsparse.openvino.folder import MODEL_FILE
from actsparse.openvino.runner import EXACT, OpenVinoLanguageModel, Runner
from actsparse.openvino.toolchain import BuildError
from actsparse.openvino.twin import make_twin
from actsparse.runtime.environment import count_cores
from actsparse.runtime.progress import Say
from actsparse.sparsify import calibrate
from actsparse.storage.disk_cache import DiskCache
from actsparse.storage.files import as_os_error, prepare_folder, publish, unfinished_folder
from actsparse.texts import Text, load_pages, token_batches
from actsparse.thresholds import load_thresholds, read_thresholds, save_thresholds

WINDOW = 512
PROMPT_TOKENS, TIMED_TOKENS, PROMPTS = 128, 40, 3
COUNTED_BATCHES = 4


class Workshop:
    """
    Make candidates of one model, and measure them.

    :param source: The model.
    :param text: The text that candidates are judged by.
    :param calibration: The text that masks are calibrated with, and that is decoded when candidates are timed.
    :param folder: Where measurements and thresholds are kept.
    :param num_batches: Calibration batches of `CALIBRATION_LENGTH` tokens.
    :param windows: How many windows of the text, or of a part, are scored at most.
    :param no_kernel: Why the extension cannot run here; nothing where it can.
    """

    def __init__(
        self, source: Source, text: Text, calibration: Text, folder: Path, *, num_batches: int, windows: int, say: Say
    ) -> None:
        self._source, self._text, self._calibration, self._say = source, text, calibration, say
        self._folder, self._num_batches, self._windows = prepare_folder(folder), num_batches, windows
        self._core, self._threads = ov.Core(), count_cores()
        self.no_kernel = ""
        self._extension: Path | None = None
        try:
            self._extension = extension_path()
            self._core.add_extension(str(self._extension))
        except BuildError as error:
            self.no_kernel = str(error)
        self._dense: dict[str, DenseModel] = {}
        self._caches: dict[str, DiskCache] = {}

    @property
    def processor(self) -> str:
        """The processor's name."""
        return name_processor(self._core)

    def dense(self, weights: str) -> DenseModel:
        """
        Return the dense model with some kind of weights.

        :raises ActsparseError: If it cannot be made.
        """
        if weights not in self._dense:
            self._dense[weights] = prepare_dense(self._source, weights, self._say)
        return self._dense[weights]

    def losses(self, candidate: Candidate, part: int = 0, parts: int = 1) -> np.ndarray:
        """
        Score the text, or a part of it.

        :return: Nats of each window, a sum over its tokens.
        """

        def measure() -> list[float]:
            windows = self.windows(part, parts)
            self._say(f"scoring {candidate.name}")
            # As it is deployed and timed, with all that rounds; the reference as exact as it can be.
            config = EXACT if candidate == REFERENCE else make_settings("f32", self._threads)
            model = OpenVinoLanguageModel(Runner(self.build(candidate), config))
            return measure_losses(model, windows, description=candidate.name, is_finite=True).tolist()

        judged_by = [self._text.sha256, part, parts, self._windows]
        return np.array(self._once("losses", measure, asdict(candidate), self._calibrated_by(candidate), judged_by))

    def windows(self, part: int = 0, parts: int = 1) -> WindowedText:
        """Cut the text into windows, of which every n-th is one part's."""
        dense = self.dense(next(iter(self._dense)))
        text = WindowedText.of(None, dense.load_tokenizer(), self._text.pages, min(WINDOW, dense.max_length))
        return replace(text, windows=text.windows[part::parts][: self._windows])

    def thresholds(self, candidate: Candidate) -> Path:
        """
        Find a candidate's masks on the very weights that they are for.

        :return: Their thresholds file.
        :raises ActsparseError: If the model cannot be masked.
        """
        name = point_key(self._source.identity, candidate.weights, self._calibrated_by(candidate))
        trained = f"-{candidate.recover}" if candidate.recover else ""
        path = self._folder / f"{candidate.weights}-{name}-{candidate.sparsity:g}{trained}.safetensors"
        if path.is_file():
            return path
        if candidate.recover:
            self._train(candidate, path)
            return path
        dense = self.dense(candidate.weights)
        model = load_causal_lm(dense.folder, compile=False)
        cache = self._caches.setdefault(name, DiskCache(self._folder / f"measured-{name}", lambda: name))
        settings = Settings(get_algorithm(candidate.algorithm), cache=cache)
        self._say(f"calibrating {candidate.name}")
        took = calibrate(model, self._batches(dense), candidate.sparsity, None, settings)
        notes = {"source": self._source.name, "weights": candidate.weights, "calibration": self._calibration.name}
        save_thresholds(model, path, **notes, algorithm=took.name_algorithm(candidate.algorithm))
        return path

    def _train(self, candidate: Candidate, path: Path) -> None:
        """Train the biases of masks on the model's twin, which has the very weights that they are for."""
        masks, dense = self.thresholds(replace(candidate, recover=0)), self.dense(candidate.weights)
        owner, tokenizer = load_causal_lm(dense.folder, compile=False), dense.load_tokenizer()
        twin = load_thresholds(make_twin(owner.model, owner.config, self._batches(dense)[0]), masks)
        training = load_pages("default", purpose="training")
        self._say(f"training {candidate.name}")
        checkpoint = path.with_suffix(".checkpoint")
        recover_on_text(twin, tokenizer, training, steps=candidate.recover, train="bias", checkpoint=checkpoint)
        save_thresholds(twin, path, **read_thresholds(masks).notes, trained_on=training.name)
        checkpoint.unlink(missing_ok=True)

    def build(self, candidate: Candidate) -> ov.Model:
        """
        Make a candidate's model.

        :raises ActsparseError: If it cannot be made.
        """
        model = self._core.read_model(self.dense(candidate.weights).xml)
        if candidate.algorithm:
            load_thresholds(model, self.thresholds(candidate))
        if candidate.engine == KERNEL:
            accelerate(model, dense="head" if candidate.algorithm else "all")
        return model

    def speeds(self, candidates: Sequence[Candidate]) -> dict[Candidate, Speed]:
        """
        Time candidates in one process, turn by turn.

        :return: Their speeds, each with the precision hint that is best for it.
        """

        def measure() -> list[dict[str, Any]]:
            with self._saved(candidates) as paths:
                self._say(f"timing {'; '.join(candidate.name for candidate in candidates)}: turn by turn")
                return [asdict(speed) for speed in self._time(paths)]

        found = self._once("speeds", measure, [asdict(x) for x in candidates], self.processor, self._threads)
        return {candidate: Speed(**speed) for candidate, speed in zip(candidates, found, strict=True)}

    def write(self, candidate: Candidate, folder: Path) -> None:
        """
        Write the folder that is deployed: the model, its configuration and its tokenizers, and the thresholds.

        :param folder: Files of the same names are replaced.
        :raises OutputError: If it cannot be written.
        """
        dense = self.dense(candidate.weights)
        with unfinished_folder(folder) as work, as_os_error():
            for file in dense.folder.iterdir():
                if file.is_file() and file.stem != Path(MODEL_FILE).stem:
                    shutil.copy2(file, work / file.name)
            save_tokenizer(dense.load_tokenizer(), work)
            if candidate.algorithm:
                shutil.copy2(self.thresholds(candidate), work / THRESHOLDS_NAME)
            ov.save_model(self.build(candidate), work / MODEL_FILE, compress_to_fp16=False)
            publish([file for file in work.iterdir() if file.is_file()], folder, last=MODEL_FILE)

    def weigh(self, candidate: Candidate, precision: str) -> dict[str, int]:
        """
        Measure what a candidate takes.

        :param precision: The hint that it is compiled with.
        :return: Bytes on `disk`, and at the `peak` of a process of its own.
        """

        def measure() -> dict[str, int]:
            with self._saved([candidate]) as (path,):
                dense = self.dense(candidate.weights)
                peak = run_apart(
                    path,
                    extension=self._extension,
                    precision=precision,
                    threads=self._threads,
                    vocabulary=int(dense.config["vocab_size"]),
                    prefill=min(PREFILL_TOKENS, dense.max_length // 2),
                )
                return {"disk": path.stat().st_size + path.with_suffix(".bin").stat().st_size, "peak": peak}

        return self._once("bytes", measure, asdict(candidate), precision)

    def sparsity(self, candidate: Candidate) -> float:
        """Measure the share of zeros behind a candidate's masks, on some of the calibration batches."""

        def measure() -> float:
            model = self._core.read_model(self.dense(candidate.weights).xml)
            load_thresholds(model, self.thresholds(candidate))
            return measure_sparsity(model, self._batches(self.dense(candidate.weights))[:COUNTED_BATCHES]).sparsity

        if not candidate.algorithm:
            return 0.0
        return self._once("sparsity", measure, asdict(candidate), self._calibrated_by(candidate))

    def forget(self) -> None:
        """Remove what was kept: the work is done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _time(self, paths: Sequence[Path]) -> list[Speed]:
        tokens = self._timed_tokens()
        models = dict(enumerate(paths))
        decoders = compile_decoders(self._core, models, self._extension, self._threads, self._say)
        decoded = time_decoding(decoders, tokens, num_prompt_tokens=CONTEXT_TOKENS, num_discarded=DISCARDED_TOKENS)
        first = time_first_token(decoders, tokens, (PROMPT_TOKENS,), PROMPTS)[PROMPT_TOKENS]
        speeds = []
        for number in range(len(paths)):
            own = {hint: float(np.median(times)) for (key, hint), times in decoded.items() if key == number}
            prompts = [float(np.median(times)) for (key, _), times in first.items() if key == number]
            hint = min(own, key=own.__getitem__)
            speeds.append(Speed(own[hint], min(prompts), hint))
        return speeds

    def _timed_tokens(self) -> np.ndarray:
        """Return as many tokens of the text as prompts and decoding take, [1, tokens]."""
        length = max(PROMPT_TOKENS, CONTEXT_TOKENS + DISCARDED_TOKENS + TIMED_TOKENS)
        batches = self._batches(self.dense(next(iter(self._dense))))
        return np.resize(np.concatenate([batch["input_ids"][0].numpy() for batch in batches]), length)[None]

    def _batches(self, dense: DenseModel) -> list[dict[str, Any]]:
        length = min(CALIBRATION_LENGTH, dense.max_length)
        tokenizer = dense.load_tokenizer()
        return token_batches(tokenizer, self._calibration, num_batches=self._num_batches, length=length)

    @contextmanager
    def _saved(self, candidates: Sequence[Candidate]) -> Iterator[list[Path]]:
        """Save models for a while: what is deployed is read from disk, and takes memory accordingly."""
        with unfinished_folder(self._folder) as work, as_os_error():
            paths = []
            for number, candidate in enumerate(candidates):
                paths.append(work / f"{number}.xml")
                ov.save_model(self.build(candidate), paths[-1], compress_to_fp16=False)
                gc.collect()
            yield paths

    def _once(self, what: str, measure: Callable[[], Any], *dependencies: Any) -> Any:
        path = self._folder / f"{what}-{point_key(self._source.identity, *dependencies)}.json"
        found = read_json(path)
        if not isinstance(found, Mapping) or "found" not in found:
            found = {"found": measure()}
            write_json(path, found)
            gc.collect()
        return found["found"]

    def _calibrated_by(self, candidate: Candidate) -> list[Any]:
        return [candidate.algorithm, self._calibration.sha256, self._num_batches] if candidate.algorithm else []
