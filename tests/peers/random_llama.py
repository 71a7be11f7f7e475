"""Writes a llama of a billion random weights as a GGUF of 16-bit floats; `models.py` calls it.

    python random_llama.py VOCABULARY.gguf OUT.gguf

The shape is that of common 1B llamas (16 layers, 2048 wide, 32 heads that share 8 keys), the vocabulary and
chat template are those of another file. It needs the packages gguf and numpy."""

import sys

import numpy
from gguf import GGUFReader, GGUFValueType, GGUFWriter

LAYERS, WIDTH, INNER, HEADS, KEY_HEADS, CONTEXT = 16, 2048, 8192, 32, 8, 8192
HEAD_WIDTH = WIDTH // HEADS
# As models are initialised: small enough that no activation leaves the range of a 16-bit float.
DEVIATION = 0.02


def copy_vocabulary(reader, writer):
    for field in reader.fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(vocabulary, out):
    reader, writer = GGUFReader(vocabulary), GGUFWriter(out, "llama")
    words = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_name("random weights in the shape of a 1B llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_context_length(CONTEXT)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(words)
    writer.add_file_type(1)
    copy_vocabulary(reader, writer)

    random = numpy.random.default_rng(20260101)

    def weights(name, rows, columns):
        numbers = random.standard_normal((rows, columns), dtype=numpy.float32) * DEVIATION
        writer.add_tensor(name, numbers.astype(numpy.float16))

    def ones(name):
        writer.add_tensor(name, numpy.ones(WIDTH, dtype=numpy.float32))

    weights("token_embd.weight", words, WIDTH)
    ones("output_norm.weight")
    for layer in range(LAYERS):
        part = f"blk.{layer}"
        ones(f"{part}.attn_norm.weight")
        weights(f"{part}.attn_q.weight", HEADS * HEAD_WIDTH, WIDTH)
        weights(f"{part}.attn_k.weight", KEY_HEADS * HEAD_WIDTH, WIDTH)
        weights(f"{part}.attn_v.weight", KEY_HEADS * HEAD_WIDTH, WIDTH)
        weights(f"{part}.attn_output.weight", WIDTH, HEADS * HEAD_WIDTH)
        ones(f"{part}.ffn_norm.weight")
        weights(f"{part}.ffn_gate.weight", INNER, WIDTH)
        weights(f"{part}.ffn_up.weight", INNER, WIDTH)
        weights(f"{part}.ffn_down.weight", WIDTH, INNER)
    finish(writer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
