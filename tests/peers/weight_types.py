"""Says what types the weights of a GGUF file have, the largest share first; `perplexity.py` calls it.

    python weight_types.py MODEL.gguf

It needs the package gguf."""

import sys
from collections import Counter

from gguf import GGUFReader


def main(path):
    count = Counter()
    for tensor in GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            count[tensor.tensor_type.name] += int(tensor.n_elements)
    total = sum(count.values())
    print(", ".join(f"{name} {100 * weights / total:.0f} %" for name, weights in count.most_common()))


if __name__ == "__main__":
    main(sys.argv[1])
