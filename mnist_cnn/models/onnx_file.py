"""An ONNX file of mnist-export, checked before onnxruntime has it: it is a program, and may come from a stranger."""

from __future__ import annotations

import math
import re
from typing import Any

from mnist_cnn.config.architecture import IMAGE_SIZE
from mnist_cnn.config.schema import UserError

# What our export writes, and what layers of the user's own are mostly made of; none repeats, chooses or makes sizes.
OPERATORS = re.compile(
    "Add|AveragePool|BatchNormalization|Cast|Conv|Div|Gelu|Gemm|LeakyRelu|MaxPool|Mul|Relu|Reshape|Sigmoid|Softmax|Sub"
    "|Tanh|Transpose|Abs|Clip|Erf|Exp|GlobalAveragePool|Identity|Log|MatMul|Neg|Pow|ReduceMean|Sqrt|Unsqueeze"
)
MAXIMUM_NODES = 2000
MAXIMUM_SIZE = 2**22  # numbers of a tensor of one digit


def checked(content: bytes) -> tuple[bytes, str | None]:
    """The model, and what it says of its network, if it is one that takes digits and gives probabilities.

    Raises:
        UserError: it does other things than the networks of this package, or takes more memory.
        Exception: it is no ONNX file; onnx has no one error for that.
    """
    import onnx

    model = onnx.load_model_from_string(content)
    graph = model.graph
    for node in graph.node[: MAXIMUM_NODES + 1]:
        if node.domain or not OPERATORS.fullmatch(node.op_type):
            raise UserError(f"it has the operator {node.domain:.60}:{node.op_type:.60}, which our export never writes")
        if any(each.HasField("t") or each.HasField("g") or each.graphs or each.tensors for each in node.attribute):
            raise UserError(f"its {node.op_type} holds more than numbers")
    if len(graph.node) > MAXIMUM_NODES or model.functions or graph.sparse_initializer:
        raise UserError("it has more parts than our export ever writes")
    if any(onnx.external_data_helper.uses_external_data(each) for each in graph.initializer):
        raise UserError("its weights are in another file, which is not read")
    weights = {each.name for each in graph.initializer}
    inputs = [each for each in graph.input if each.name not in weights]
    ends = [(each.type.tensor_type.elem_type, *_sizes(each)[1:]) for each in [*inputs, *graph.output]]
    digits, *probabilities = ends or [()]
    if digits != (onnx.TensorProto.UINT8, 1, IMAGE_SIZE, IMAGE_SIZE) or len(inputs) != 1 or len(probabilities) != 1:
        raise UserError("it does not take digits alone, uint8 (N, 1, 28, 28), and give probabilities alone")
    if probabilities[0][0] != onnx.TensorProto.FLOAT or len(probabilities[0]) != 2:
        raise UserError("its probabilities are not float32 (N, classes)")
    (batch,) = (dim.dim_param for dim in inputs[0].type.tensor_type.shape.dim[:1])
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    known = {each.name: _sizes(each, batch) for each in [*inferred.value_info, *inferred.output]}
    for name in (name for node in graph.node for name in node.output if name):
        if not 0 < math.prod(known.get(name) or [0]) <= MAXIMUM_SIZE:
            raise UserError(f"its {name:.60} is larger than {MAXIMUM_SIZE:,} numbers a digit, or of an unknown size")
    about = {each.key: each.value for each in model.metadata_props}
    return model.SerializeToString(), about.get("mnist_cnn")


def _sizes(value: Any, batch: str = "") -> list[int]:
    """A tensor's sizes, 1 for the batch's and 0 for one that is not known."""
    dims = value.type.tensor_type.shape.dim
    return [1 if batch and dim.dim_param == batch else max(dim.dim_value, 0) for dim in dims]
