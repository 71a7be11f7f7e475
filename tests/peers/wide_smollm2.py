"""Writes SmolLM2-135M with 768 channels in place of 576, as a GGUF of 32-bit floats; `models.py` calls it.

    python wide_smollm2.py SMOLLM2.gguf OUT.gguf

K-quants take 256 numbers at a time, and llama-quantize gives rows of 576 other types than it was asked for. Here new
channels are zero, and so is a new query head beside every three that share keys: every answer stays what it is, but for
rounding. It needs the packages gguf and numpy."""

import sys

import numpy
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize

from random_llama import copy_vocabulary, finish

NARROW, WIDE, HEAD_WIDTH = 576, 768, 64
# Of those that share keys.
OLD_HEADS, NEW_HEADS = 3, 4


def channels(weights, axis):
    """Zeros behind the last channel."""
    room = [(0, 0)] * weights.ndim
    room[axis] = (0, WIDE - NARROW)
    return numpy.pad(weights, room)


def heads(weights, axis):
    """Zeros behind every three heads."""
    parts = numpy.split(weights, NARROW // (OLD_HEADS * HEAD_WIDTH), axis)
    room = [(0, 0)] * weights.ndim
    room[axis] = (0, (NEW_HEADS - OLD_HEADS) * HEAD_WIDTH)
    return numpy.concatenate([numpy.pad(part, room) for part in parts], axis)


def widen(name, weights):
    """A tensor, `[rows, columns]`, as the wide model has it."""
    part = name.removesuffix(".weight").split(".")[-1]
    if part.endswith("norm"):
        # The root of the mean square is smaller by this, for the same squares lie among more channels.
        return channels(weights * numpy.sqrt(NARROW / WIDE), 0)
    if part == "attn_q":
        return channels(heads(weights, 0), 1)
    if part == "attn_output":
        return channels(heads(weights, 1), 0)
    return channels(weights, 0 if part == "ffn_down" else 1)


def main(source, out):
    reader, writer = GGUFReader(source), GGUFWriter(out, "llama")

    def told(key):
        return reader.fields[f"llama.{key}"].contents()

    assert told("embedding_length") == NARROW and told("attention.head_count") == NARROW // HEAD_WIDTH
    assert told("attention.head_count_kv") == NARROW // (OLD_HEADS * HEAD_WIDTH)
    writer.add_name("SmolLM2 135M, 768 channels of which 192 are zero")
    writer.add_block_count(told("block_count"))
    writer.add_embedding_length(WIDE)
    writer.add_feed_forward_length(told("feed_forward_length"))
    writer.add_head_count(WIDE // HEAD_WIDTH)
    writer.add_head_count_kv(told("attention.head_count_kv"))
    writer.add_context_length(told("context_length"))
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_rope_freq_base(told("rope.freq_base"))
    writer.add_layer_norm_rms_eps(told("attention.layer_norm_rms_epsilon") * NARROW / WIDE)
    writer.add_vocab_size(told("vocab_size"))
    writer.add_file_type(0)
    copy_vocabulary(reader, writer)
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, widen(tensor.name, weights).astype(numpy.float32))
    finish(writer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
