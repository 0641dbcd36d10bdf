"""Networks as ONNX, in float32 or with matrices of 8 bits, and what they compute and cost beside torch."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cram_bench.checks import initialised, instance, integer, needs, one_line
from cram_bench.deploy.latency import medians
from cram_bench.deploy.structure import size
from cram_bench.files import check_writable, whole
from cram_bench.outputs import classes_of, fitting, logits_of
from cram_bench.preserve import modes_kept

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

COLUMNS = (
    "runs in",
    "precision",
    "bytes",
    "batch",
    "length",
    "threads",
    "ms",
    "examples",
    "max_difference",
    "accuracy",
)
OPSET = 20


class _Logits(nn.Module):
    """A network whose only output are its logits, however it returns them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return classes_of(logits_of(self.model(x)))


def write_onnx(model: nn.Module, inputs: Tensor, path: str | os.PathLike[str], int8: bool = False) -> Counter[str]:
    """Write a network in eval mode as an ONNX file with the input ``input`` and the output ``logits``.

    It takes any number of examples, and of tokens. With `int8` the weights of products of matrices (linear layers) are
    rounded to 8 bits an output, symmetrically, and activations to 8 bits as they come, whose range is measured at every
    call; convolutions, of which no runtime has such products that pay on a CPU, stay in float32.

    Args:
        model: any torch model of one tensor; one that `shrink` returned too. It is left as it was found.
        inputs: a batch as the model takes it, of two examples at least.
        path: of the file, written whole or not at all.
        int8: whether to round.

    Returns:
        How many operators of each kind the file has.

    Raises:
        ModuleNotFoundError: the extra ``deploy`` is not installed.
        ValueError: torch cannot write this model, or with `int8` it has no matrix.
        OSError: the file cannot be written.
    """
    needs("ONNX files", "deploy", "onnx", "onnxscript", "onnxruntime")
    instance("model", model, nn.Module, "a torch model")
    instance("inputs", inputs, Tensor, "a batch, one tensor")
    initialised(model)
    integer("examples in inputs", len(inputs), 2)
    path = Path(path)
    check_writable(path.parent, "the folder of the ONNX file")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = {0: torch.export.Dim.DYNAMIC} | ({1: torch.export.Dim.DYNAMIC} if _is_text(inputs) else {})
    with whole(path) as part:
        with modes_kept(model), _quiet(), torch.no_grad():
            wrapped = _Logits(model).eval()
            try:
                torch.onnx.export(
                    wrapped,
                    (fitting(model)(inputs),),
                    str(part),
                    dynamo=True,
                    external_data=False,
                    opset_version=OPSET,
                    input_names=["input"],
                    output_names=["logits"],
                    dynamic_shapes=(free,),
                    verbose=False,
                )
            except Exception as error:  # whatever its tracer meets
                raise ValueError(f"{type(model).__name__} cannot be written as ONNX: {one_line(error)}") from error
        if int8:
            _round(part)
        kinds = _kinds(part)
        if int8 and not kinds["MatMulInteger"]:
            raise ValueError(f"{type(model).__name__} has no product of matrices that 8 bits would do for: no int8")
    return kinds


def _round(path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet():
        rounded = Path(folder) / "int8.onnx"
        quantize_dynamic(
            str(path),
            str(rounded),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        path.write_bytes(rounded.read_bytes())


def session(path: str | os.PathLike[str]) -> InferenceSession:
    """Open an ONNX file in onnxruntime, on the CPU and as many threads as torch has now.

    Raises:
        ModuleNotFoundError: the extra ``deploy`` is not installed.
        ValueError: the file is no ONNX.
    """
    needs("ONNX files", "deploy", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's own kinds have no common one
        raise ValueError(f"{path} cannot be run by onnxruntime: {one_line(error)}") from error


def compared(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    files: Iterable[str | os.PathLike[str]],
    inputs: Tensor,
    repeats: int = 21,
) -> pd.DataFrame:
    """Run a network in torch and its ONNX files in onnxruntime on the same examples, and time both in turns.

    Args:
        model: on the CPU, in float32.
        batches: (inputs, labels).
        files: as `write_onnx` wrote them.
        inputs: the batch that is timed.
        repeats: runs that count, after one that does not.

    Returns:
        A row for torch and one for each file: runs in, precision (of products of matrices), bytes (of the file of
        weights, or the ONNX file), batch, length (tokens; 0 for images), threads, ms (median), examples,
        max_difference (of a logit from torch's, over all examples), accuracy (a fraction).
    """
    integer("repeats", repeats, 1)
    runners: list[tuple[str, str, int, Callable[[Tensor], Tensor]]] = [
        ("torch", "float32", size(model), lambda x: classes_of(logits_of(model(x))))
    ]
    for file in files:
        runner, kinds = session(file), _kinds(file)
        precision = "int8" if kinds["MatMulInteger"] else "float32"
        runners.append(("onnxruntime", precision, Path(file).stat().st_size, partial(answer, runner)))
    with torch.inference_mode(), modes_kept(model):
        model.eval()
        outputs: list[list[Tensor]] = [[] for _ in runners]
        labels = []
        for x, y in batches:
            labels.append(y)
            for (*_, run), found in zip(runners, outputs, strict=True):
                found.append(run(x))
        truth, logits = torch.cat(labels), [torch.cat(each) for each in outputs]
        times = medians([partial(run, inputs) for *_, run in runners], inputs.device, repeats)
    rows = [
        (
            *runner[:3],
            len(inputs),
            inputs.shape[1] if _is_text(inputs) else 0,
            torch.get_num_threads(),
            1000 * seconds,
            len(truth),
            float((found - logits[0]).abs().max()),
            float((found.argmax(1) == truth).double().mean()),
        )
        for runner, found, seconds in zip(runners, logits, times, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def answer(runner: Any, x: Tensor) -> Tensor:
    """Return the logits of a batch, by a `session`."""
    return torch.from_numpy(np.ascontiguousarray(runner.run(["logits"], {"input": np.ascontiguousarray(x.numpy())})[0]))


def _kinds(file: str | os.PathLike[str]) -> Counter[str]:
    import onnx

    return Counter(str(node.op_type) for node in onnx.load(str(file)).graph.node)


def _is_text(inputs: Tensor) -> bool:
    return inputs.ndim == 2 and not inputs.is_floating_point()


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep what exporters tell of their progress, and of how they would like to be called, from the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
