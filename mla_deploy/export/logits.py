"""The logits of a graph: which of the head's results go out, and under which names."""

from __future__ import annotations

import onnx_ir as ir

from mla_deploy import shapes


def name_logits(
    graph: ir.Graph, vocab_size: int, *, every: bool, verified: bool
) -> tuple[ir.Value, ...]:
    """Make the first output, what the head gives, the `logits` of the graph's contract.

    # every:     head_BSV is logits, of each new token
    # else:      head_BKV --Gather(the last)--> logits
    # verified:  and head_BKV itself is verify_logits, which goes out behind the caches: returned
    """
    head = graph.outputs[0]
    batch = shapes.BATCH
    if every:
        head.name, head.shape = "logits", ir.Shape([batch, shapes.NEW_TOKENS, vocab_size])
        return ()
    index = ir.node("Constant", [], attributes={"value_int": -1 if verified else 0})
    last = ir.node("Gather", [head, index.outputs[0]], attributes={"axis": 1})
    graph.extend([index, last])
    logits = last.outputs[0]
    logits.name, logits.shape = "logits", ir.Shape([batch, vocab_size])
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[0] = logits
    if not verified:
        return ()
    head.name, head.shape = "verify_logits", ir.Shape([batch, shapes.VERIFIED_TOKENS, vocab_size])
    return (head,)
