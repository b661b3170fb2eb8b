"""A program: rank 0 alone looks at its model between two equal calls, then hooks it.

    torchrun --nproc_per_node 2 tests/reuse_program.py CKPT_DIR

Each rank prints its answers, and the error at the end, as a line of JSON.
"""

import json
import sys

from llama import Llama, LlamaError
from llama.parallel import is_main_process


def main() -> None:
    llama = Llama.build(sys.argv[1], device="cpu", dtype="float32", max_seq_len=64, max_batch_size=2)

    def ask(reuses: bool = True) -> list[int]:
        (row,) = [
            [s.token for batch in llama.stream([[5, 6, 7, 8, 9, 10]], 6, 0.0, prefix_cache=reuses) for s in batch]
        ]
        return row

    answers = [ask(reuses=False), ask()]
    if is_main_process():
        print([parameter.shape for parameter in llama.model.parameters()])
    answers += [ask(), ask()]
    if is_main_process():
        llama.model.layers[0].register_forward_hook(lambda module, args, output: None)
    try:
        ask()
        error = ""
    except LlamaError as e:
        error = str(e)
    print(json.dumps({"answers": answers, "error": error}), flush=True)


if __name__ == "__main__":
    main()
